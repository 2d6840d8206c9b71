"""The finished folders that a stage reads: earlier stages of its run, and what sync put on the cluster's storage.

Each folder is verified once, byte by byte, against its manifest. Followers (other ranks of the stage) trust rank 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sft.common.errors import SftError
from sft.common.strings import first_names
from sft.formats import elsewhere, manifest, remote, steps
from sft.formats.elsewhere import Elsewhere
from sft.formats.manifest import Output
from sft.formats.remote import Remote, SyncMetrics


@dataclass
class Upstream:
    """The folders that the stage `stage` of the run in `run` reads."""

    run: Path
    stage: str
    recipe: str
    cache: Path
    follower: bool
    log: Callable[[str], None]
    _verified: set[str] = field(default_factory=set)

    def folder(self, stage: str) -> Path:
        """The folder of an earlier stage, verified. Raises SftError naming the damage and the next command."""
        folder = self.run / stage
        if stage not in self._verified:
            self._verify(folder, f"make {stage} RECIPE={self.recipe} after removing {folder / manifest.NAME}")
            self._verified.add(stage)
        return folder

    def remote(self) -> Remote:
        """What sync put on the cluster's storage. Raises SftError."""
        return Remote.read(self.folder("sync") / remote.NAME)

    def dataset(self) -> Path:
        """The synced dataset (data/, validation/, dataset.json), verified. Raises SftError."""
        name = self.remote().dataset
        folder = self._local(name)
        if name not in self._verified:
            again = f"make sync RECIPE={self.recipe} after removing {self.run / 'sync' / manifest.NAME}"
            self._verify(folder, again)
            self._verified.add(name)
        return folder

    def base(self) -> Path | None:
        """The synced base weights, verified, or None if training starts from random weights. Raises SftError."""
        synced = self.remote()
        if not (name := synced.base):
            return None
        folder = self._local(name)
        if name not in self._verified:
            again = f"make sync RECIPE={self.recipe} after removing {folder}"
            self._verify(folder, again, synced.below(name))
            self._verified.add(name)
        return folder

    def _local(self, name: str) -> Path:
        """A folder that sync made, as this machine reads it. One in a bucket is first copied to the cache and verified."""
        file = self.run / "sync" / manifest.NAME
        root = SyncMetrics.of(manifest.load(file), str(file)).storage
        scratch = os.environ.get("SFT_SCRATCH", "") if self.stage == "train" and name == self.remote().dataset else ""
        if "://" not in root and not scratch:
            return Path(root) / name
        from sft.storage.localise import localise  # start-up: most stages read no bucket

        # Rank 0 and the first rank of every other machine verify. The other ranks wait for them and read the same files.
        first = not self.follower or os.environ.get("LOCAL_RANK") == "0"
        cache = Path(scratch) if scratch else self.cache
        folder = localise(root, name, cache, self.log, again=first and name not in self._verified, copy=bool(scratch))
        self._verified.add(name)
        return folder

    def _verify(self, folder: Path, again: str, listed: Sequence[Output] | None = None) -> None:
        if self.follower:
            return  # rank 0 has verified it
        away = Elsewhere.of(folder)
        if away.outputs:
            raise SftError(
                f"{folder}: {len(away.outputs)} outputs are elsewhere, in {away.where}; next: make {self.stage} with the"
                f" CLUSTER that made them, or copy them here and remove {folder / elsewhere.NAME}"
            )
        try:
            listed = listed or manifest.load(folder / manifest.NAME).outputs
        except FileNotFoundError:
            raise SftError(f"{folder / manifest.NAME}: not there; next: {again}") from None
        broken = manifest.broken_outputs(folder, listed)
        beside = (elsewhere.NAME, *(steps.BESIDE if folder.name == "train" else ()))
        if others := manifest.strays(folder, listed, beside):
            raise SftError(
                f"{folder}: no stage made {first_names(others)}, and {self.stage} could read"
                f" {'it' if len(others) == 1 else 'them'}; next: remove {'it' if len(others) == 1 else 'them'}"
            )
        if broken:
            raise SftError("\n".join(broken) + f"\nnext: {again}")
