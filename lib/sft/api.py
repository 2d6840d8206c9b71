"""The Python API: a run and its files, the stage prepare, packs, and a model that was trained here or is a base.

    import sft

    run = sft.prepare("smoke", lr=1e-4)          # as make prepare RECIPE=smoke lr=1e-4
    ids, mask = run.dataset[0]                   # [T] token ids, [T] True where the token is trained
    packs = sft.pack(run)                        # len(packs) packs of run.recipe.train.seq_len tokens
    model = sft.load_model(run.steps[-1][1])     # a checkpoint, or a Hugging Face folder
    logits, _ = model(ids, positions, cu_seqlens, max_len)

These names are stable within a major version (CHANGELOG.md); `import sft` gives them. Other stages need processes of their own, so they
are commands: make, or `sft`. Everything raises sft.common.errors.SftError with the next command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.common.errors import SftError
from sft.formats import manifest
from sft.recipe import recipe as recipes
from sft.recipe import typed
from sft.recipe.edit import to_toml
from sft.recipe.recipe import Recipe
from sft.runner import plan
from sft.runner.cli import RunOptions

if TYPE_CHECKING:
    from sft.data.dataset import Dataset
    from sft.formats.metrics import StepRecord
    from sft.formats.results import Results
    from sft.model.model import Transformer
    from sft.packing.packs import PackIndex

__all__ = ["Run", "load_model", "pack", "prepare"]


@dataclass(frozen=True)
class Run:
    """A run's folder, runs/<recipe>[_<field>-<value>…]. Reading it changes nothing."""

    folder: Path
    data: str = ""
    cluster: str = "local"

    @classmethod
    def open(cls, folder: Path | str, data: str = "", cluster: str = "local") -> Run:
        """Raises SftError for a folder that is no run."""
        if not (Path(folder) / "run.json").is_file():
            raise SftError(f"{folder}: no run.json is in it; next: make runs lists the runs")
        return cls(Path(folder), data, cluster)

    @property
    def recipe(self) -> Recipe:
        """The recipe with the run's overrides."""
        return plan.load_run(self._place, self.folder.name)

    @property
    def stale(self) -> dict[str, list[str]]:
        """{stage: why it would run again}; empty for stages that are up to date."""
        return {name: state.reasons for name, state in plan.states(self._place, self.recipe).items()}

    @property
    def dataset(self) -> Dataset:
        """The prepared documents, memory-mapped: `dataset[i]` is (ids [T], loss mask [T]) of document i."""
        from sft.data.dataset import Dataset  # start-up: `sft` names this module before NumPy is there

        return Dataset.open(self._made("prepare") / "data")

    @property
    def steps(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint that is kept, the first one first."""
        from sft.checkpoint.step_folder import steps  # start-up: the same, with torch

        return steps(self.folder / "train") if (self.folder / "train").is_dir() else []

    @property
    def losses(self) -> list[StepRecord]:
        """One record for each logged step of the training, with its loss in nats a token; none before training has begun."""
        from sft.formats.metrics import read_steps  # start-up: the same

        file = self.folder / "train" / "metrics.jsonl"
        return read_steps(file) if file.is_file() else []

    @property
    def scores(self) -> Results:
        """The scores of the tasks, with standard errors."""
        from sft.formats.results import Results  # start-up: the same

        return Results.read(self._made("evaluate") / "results.json")

    @property
    def _place(self) -> plan.Place:
        return plan.Place.parse(str(self.folder.parent), self.data, self.cluster)

    def _made(self, stage: str) -> Path:
        folder = self.folder / stage
        if not (folder / manifest.NAME).is_file():
            raise SftError(f"{folder}: not made yet; next: make {stage} for {self.folder.name}")
        return folder


def prepare(recipe: str, *, runs: Path | str = "runs", data: str = "", cluster: str = "local", **fields: Any) -> Run:
    """Runs the stage prepare of a recipe with overrides, unless it is up to date, and returns the run.

    `fields`: names of the recipe's fields with values; a dot is written as two underscores (train__seed=1). Raises SftError.
    """
    from sft.data import prepare as stage_of_data  # start-up: NumPy and the tokenizers
    from sft.runner.stage import open_stage  # start-up: the same

    overrides = [
        f"{name.replace('__', '.')}={value if isinstance(value, str) else to_toml(value)}"
        for name, value in fields.items()
    ]
    place = plan.Place.parse(str(runs), data, cluster)
    found = recipes.load(typed.find(plan.REPO / "recipes", recipe, "recipe"), overrides, cluster)
    run = Run(Path(runs) / found.run, data, cluster)
    if plan.states(place, found)["prepare"].reasons:
        with open_stage("prepare", RunOptions(run.folder, cluster, data, tuple(overrides))) as stage:
            stage.run_shared(stage_of_data.prepare)
    return run


def pack(run: Run, *, seq_len: int = 0, long_documents: str = "") -> PackIndex:
    """The packs of a run's dataset: by its recipe, or by another length or treatment of long documents. Raises SftError."""
    from sft.packing.packs import pack_dataset  # start-up: NumPy and numba

    train = run.recipe.train
    return pack_dataset(run.dataset, seq_len or train.seq_len, long_documents or train.long_documents)


def load_model(folder: Path | str) -> Transformer:
    """The model of a checkpoint (step folder) or of a Hugging Face folder, in fp32 on the CPU, in evaluation mode.

    Call it with documents end to end: ids [T], positions [T] that restart in every document, cu_seqlens [documents + 1] (int32)
    and the longest document's length. It returns logits [T, vocabulary] and hidden states [T, width]. Raises SftError for a
    folder that is neither, and for a step of adapters alone.
    """
    from sft.checkpoint.olmo_core import config_of_step  # start-up: torch
    from sft.model.model import Transformer  # start-up: the same
    from sft.recipe.base_config import read_base  # start-up: the same
    from sft.training.initial_weights import initialise  # start-up: the same

    folder = Path(folder)
    base = None if (folder / "model_and_optim").is_dir() else read_base(folder)
    if base is None and not (folder / "config.json").is_file():
        raise SftError(
            f"{folder}: neither a checkpoint nor a Hugging Face folder; next: run.steps or run.folder / 'convert' / 'model'"
        )
    config = base.config if base is not None else config_of_step(folder / "config.json")
    model = Transformer(config)
    initialise(model, config, folder, seed=0)
    return model.eval()
