"""Where in its data a step folder is: what `make steps` and the doctor know of a run that continues another one.

In:  a step folder. Out: the `DataPosition` in its train/rank0.pt, read without running foreign code.
"""

from __future__ import annotations

import pickle
from pathlib import Path

from sft.common.errors import SftError
from sft.formats.packs import DataPosition


def position_of(step: Path) -> DataPosition | None:
    """The position of a step; None where the step is not on this machine. Raises SftError for a damaged file."""
    file = step / "train" / "rank0.pt"
    if not file.is_file():
        return None
    import torch  # start-up: most runs continue no other one

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return DataPosition.from_value(state["position"], f"{file}: position")
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise SftError(
            f"{file}: not readable: {error}; next: restore it from a backup, or choose another step"
        ) from error
