"""Files as Beaker datasets: uploaded once under a name that names their content, and downloaded as a job's results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from beaker import Beaker
from beaker import beaker_pb2 as pb2
from beaker.exceptions import BeakerDatasetConflict, BeakerDatasetNotFound

from sft.common import paths
from sft.common.errors import SftError

UPLOAD_S = 3600.0
"""An upload by another process that has not ended after this time was killed."""
UPLOAD_WAIT_S = 1800.0
"""How long an upload by another process is waited for."""
POLL_S = 10.0


class DatasetUploads:
    """Uploads datasets, each once."""

    def __init__(self, client: Beaker):
        self.client = client
        self.begun: set[str] = set()  # ids of the datasets that this process began

    def upload(self, name: str, source: Path | Callable[[], Path], workspace: pb2.Workspace) -> None:
        """Uploads a file or a folder, or the one that `source()` makes, unless a dataset of this name exists. Raises SftError.

        `name` contains a digest of the content, so an existing dataset has the same content.
        """
        dataset = self._create(name, workspace)
        if dataset is None:
            return
        self.begun.add(dataset.id)
        path = source if isinstance(source, Path) else source()
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            self.client.dataset.upload(dataset, file, file.relative_to(path) if path.is_dir() else file.name)
        self.client.dataset.commit(dataset)

    def _create(self, name: str, workspace: pb2.Workspace) -> pb2.Dataset | None:
        """A new, empty dataset; None when a complete one exists. Waits while another process uploads it."""
        until = time.monotonic() + UPLOAD_WAIT_S
        while True:
            try:
                return self.client.dataset.create(name, workspace=workspace, commit=False)
            except BeakerDatasetConflict:
                with contextlib.suppress(BeakerDatasetNotFound):  # deleted in between
                    dataset = self.client.dataset.get(f"{self.client.user_name}/{name}")
                    if dataset.HasField("committed"):
                        return None
                    if dataset.id in self.begun or time.time() - dataset.created.ToSeconds() > UPLOAD_S:
                        self.client.dataset.delete(dataset)  # of an upload that was killed
                    elif time.monotonic() < until:
                        time.sleep(POLL_S)
                    else:
                        raise SftError(
                            f"Beaker dataset {name}: another upload of it has not ended; next: try again, or, if that"
                            f" upload was killed, beaker dataset delete {dataset.id}"
                        ) from None


def download_results(client: Beaker, job: pb2.Job, target: Path) -> int:
    """Downloads a job's results; the client compares every file with its digest. Returns the number of files.

    Results that were deleted on Beaker count as no files: whoever reads `target` reports what is missing.
    """
    dataset = None
    try:
        dataset = client.job.get_results(job)
    except BeakerDatasetNotFound:
        print(f"[beaker] the results of the job {job.id} were deleted from Beaker", flush=True)
    if dataset is None:
        return 0
    files = list(client.dataset.list_files(dataset))
    for file in files:
        path = paths.inside(target, file.path, f"results of {job.id}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as f:
            for chunk in client.dataset.stream_file(dataset, file.path):
                f.write(chunk)
    return len(files)
