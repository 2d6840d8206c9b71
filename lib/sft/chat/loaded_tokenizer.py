"""Whether transformers encodes with an export's tokenizer as the data were encoded.

In:  a tokenizer folder, the ids that the data's tokenizer gives for some texts (canaries), the family of the model.
Out: SftError for a text that transformers encodes otherwise.

transformers chooses the class of a tokenizer by the model_type of the config.json beside it. A folder's own tokenizer_class
decides in most families. In the others (`Family.own_tokenizer`) a class of the family always replaces the pre-tokenizer of
tokenizer.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.recipe.families import Family


def check_canaries(tokenizer: Any, canaries: Mapping[str, Sequence[int]], where: str, remedy: str) -> None:
    """Compares the ids of a tokenizer of transformers with the data's. Raises SftError."""
    for text, wanted in canaries.items():
        found = tokenizer.encode(text, add_special_tokens=False)
        if found != list(wanted):
            raise SftError(
                f"{where}: {type(tokenizer).__name__} of transformers encodes {text!r} as {found}, the training data have"
                f" {list(wanted)}: the pre-tokenizers differ; next: {remedy}"
            )


def remedy(family: Family) -> str:
    """What makes transformers encode as the data were encoded."""
    if family.own_tokenizer:
        return (
            f"set [prepare] tokenizer to the base's own: transformers loads every tokenizer of a {family.model_type} model"
            " with that family's class"
        )
    return "set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast"


def check_for_family(folder: Path, canaries: Mapping[str, Sequence[int]], family: Family) -> None:
    """Raises SftError if an export of this family, with the tokenizer of `folder`, would encode otherwise than the data.

    Only families with a class of their own need the comparison: prepare compares the folder for the others.
    """
    if not family.own_tokenizer:
        return
    from transformers import AutoTokenizer  # start-up: transformers takes a second

    with tempfile.TemporaryDirectory() as made:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                shutil.copy(folder / name, made)
        (Path(made) / "config.json").write_text(json.dumps({"model_type": family.model_type}), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(made, local_files_only=True, trust_remote_code=False)
    check_canaries(tokenizer, canaries, str(folder / "tokenizer.json"), remedy(family))
