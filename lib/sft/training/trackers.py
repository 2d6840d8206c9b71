"""Sends metrics to Weights & Biases, TensorBoard, Comet and trackio, as the recipe asks.

In:  the recipe's [train] table, then one flat dict of numbers per step, on rank 0.
Out: a W&B or Comet run (offline, in the train folder, if the environment has no key), event files in
     train/tensorboard/, a trackio database in train/trackio/.

A tracker that cannot start, or fails later, is logged once and dropped. Training continues.
"""

from __future__ import annotations

import contextlib
import io
import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sft.recipe.schema import Train


class Tracker(Protocol):
    """A destination of metrics."""

    def log(self, values: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    def __init__(self, project: str, name: str, identity: str, config: Mapping[str, Any], out: Path) -> None:
        import wandb  # start-up: optional, and takes a second

        os.environ.setdefault("WANDB_SILENT", "true")  # the report and make runs show the training

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = wandb.init(
            project=project, name=name, mode=mode, id=identity[:16], resume="allow", dir=str(out), config=dict(config)
        )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        """`start`: the last finished step. TensorBoard drops what an earlier attempt logged after it."""
        from torch.utils.tensorboard import SummaryWriter  # start-up: optional, and takes a second

        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Comet:
    def __init__(self, project: str, name: str, identity: str, config: Mapping[str, Any], out: Path) -> None:
        """Continues the run of this identity. Offline, every attempt is an archive, and `comet upload` in their order
        joins them."""
        os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")  # read when it is imported
        import comet_ml  # start-up: optional, and takes a second

        online = bool(os.environ.get("COMET_API_KEY"))
        attempt = 1 + len(list((out / "comet").glob("*")))
        folder = (
            out / "comet" / str(attempt)
        )  # an archive has the name of the run: a second one would replace the first
        folder.mkdir(parents=True)
        # Only what is logged here: no code, arguments, environment or terminal output.
        names = (
            "log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch", "log_env_details",
            "auto_param_logging", "auto_metric_logging", "auto_log_co2",
        )  # fmt: skip
        off: dict[str, Any] = dict.fromkeys(names, False)
        options = comet_ml.ExperimentConfig(
            name=name, offline_directory=str(folder), auto_output_logging="", display_summary_level=0, **off
        )
        self._run = comet_ml.start(
            project_name=project,
            experiment_key=identity[:40],
            mode="get_or_create" if online else "create" if attempt == 1 else "get",
            online=online,
            experiment_config=options,
        )
        self._run.log_parameters(dict(config))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._run.end()


class Trackio:
    def __init__(self, project: str, name: str, config: Mapping[str, Any], out: Path, start: int) -> None:
        """Continues the run of this name. `start`: the last finished step. What an earlier attempt logged after it is removed."""
        os.environ.setdefault("TRACKIO_DIR", str(out / "trackio"))  # read when it is imported
        import trackio  # start-up: optional, and takes a second
        from trackio.sqlite_storage import SQLiteStorage

        if (file := SQLiteStorage.get_project_db_path(project)).is_file():
            keep = start if start else -1  # an attempt from the start measures the starting weights again
            with contextlib.closing(sqlite3.connect(file)) as database, database:
                database.execute("DELETE FROM metrics WHERE run_name = ? AND step > ?", (name, keep))
        self._finish: Callable[[], None] = trackio.finish
        with contextlib.redirect_stdout(io.StringIO()):  # the report and make runs show the training
            self._run = trackio.init(
                project, name, config=dict(config), resume="allow", auto_log_gpu=False, auto_log_cpu=False, embed=False
            )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log({key: value for key, value in values.items() if key != "step"}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._finish()


class Trackers:
    """The trackers that the recipe names and that could start."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self._open: dict[str, Tracker] = {}

    @classmethod
    def start(
        cls,
        train: Train,
        name: str,
        identity: str,
        config: Mapping[str, Any],
        out: Path,
        start: int,
        log: Callable[[str], None],
    ) -> Trackers:
        """`identity`: hex, the same for every attempt of a run. `start`: the last finished step."""
        self = cls(log)
        if train.wandb_project:
            self._check_key("wandb_project", "WANDB_API_KEY", "wandb sync")
            self.add("wandb_project", lambda: Wandb(train.wandb_project, name, identity, config, out))
        if train.tensorboard:
            self.add("tensorboard", lambda: TensorBoard(out / "tensorboard", start))
        if train.comet_project:
            self._check_key("comet_project", "COMET_API_KEY", "comet upload")
            self.add("comet_project", lambda: Comet(train.comet_project, name, identity, config, out))
        if train.trackio_project:
            if start and (remote := [v for v in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(v)]):
                self.log(
                    f"trackio_project: {remote[0]} is set, so steps that ran after step {start} before appear twice there"
                )
            self.add("trackio_project", lambda: Trackio(train.trackio_project, name, config, out, start))
        return self

    def _check_key(self, field: str, variable: str, upload: str) -> None:
        if not os.environ.get(variable):
            self.log(f"{field}: {variable} is not set, so metrics are recorded offline; next: {upload}")

    def add(self, field: str, make: Callable[[], Tracker]) -> None:
        try:
            self._open[field] = make()
        except ImportError as error:
            self.log(
                f"warning: [train] {field}: the package {error.name} is not installed; training continues without it;"
                f" next: .venv/bin/pip install {(error.name or '').replace('_', '-')}"
            )
        except Exception as error:
            self._report(field, error)

    def record(self, record: Mapping[str, Any]) -> None:
        """Sends a record of metrics.jsonl. Groups in it become group/name."""
        flat = {k: v for k, v in record.items() if not isinstance(v, Mapping)}
        for group, values in record.items():
            if isinstance(values, Mapping):
                flat |= {f"{group}/{key}": value for key, value in values.items()}
        for field, tracker in list(self._open.items()):
            try:
                tracker.log(flat, flat["step"])
            except Exception as error:
                del self._open[field]
                self._report(field, error)

    def close(self) -> None:
        for field, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                self._report(field, error)
        self._open.clear()

    def _report(self, field: str, error: Exception) -> None:
        self.log(f"warning: [train] {field}: {type(error).__name__}: {error}; training continues without it")
