"""The dataset of a run as a folder for OLMo-core's own training scripts: `olmo_core_export(runs/<run>/prepare, folder)`.

In:  prepare's folder.
Out: a new folder with token_ids_part_*.npy, labels_mask_part_*.npy, token_ids_part_*.csv.gz and tokenizer/. The files are linked
     if the file system allows it, and copied otherwise. OLMo-core ends a document at every EOS, so a dataset with EOS inside
     its documents is refused with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.formats.dataset import NAME, DatasetInfo

PARTS = ("token_ids_part_*.npy", "labels_mask_part_*.npy", "token_ids_part_*.csv.gz")


def olmo_core_export(prepared: Path, target: Path) -> int:
    """Makes `target` a dataset folder of OLMo-core and returns its bytes. Raises SftError, and leaves no folder, if it cannot."""
    try:
        info = DatasetInfo.of(prepared)
    except OSError as error:
        raise SftError(f"{prepared / NAME}: {error}; next: make prepare") from None
    if reason := info.facts.olmo_core_obstacle:
        raise SftError(
            f"{prepared / 'data'}: not for OLMo-core: {reason}; next: train here, which reads documents.npy, or choose a "
            "template that writes EOS once, at the end (make fields)"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SftError(f"DST={target}: exists; next: name a new folder")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "tokenizer").mkdir(parents=True)
    data = prepared / "data"
    files = [file for pattern in PARTS for file in sorted(data.glob(pattern))]
    for file in [*files, *sorted((data / "tokenizer").iterdir())]:
        copy = partial / file.relative_to(data)
        try:
            os.link(file, copy)
        except OSError:  # another disk, or one without links
            shutil.copyfile(file, copy)
    keep = ("dtype", "vocab_size", "eos_id", "pad_id", "boundaries", "template", "splits")
    value = info.to_value()
    about = {name: value[name] for name in keep}
    write_atomic(partial / NAME, json.dumps(about, indent=1).encode() + b"\n")
    os.replace(partial, target)
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
