"""Training with products in 8-bit floats: [train] precision = "fp8".

In:  a Transformer on the meta device. Out: the same model, whose matrices in the blocks multiply in float8_e4m3, by torchao's
     float8 training with its recipe "rowwise": in each of the three products of a matrix both operands get a scale for each row, a power of
     two that is computed from their values. Embedding, head, norms, attention and a Gated DeltaNet's two gates stay bf16. Parameters keep
     their names, dtypes and bytes in a checkpoint.

torch is imported where it is needed: the planner reads `require_sizes` without it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sft.common.errors import SftError
from sft.model.hf import shapes
from sft.model.torchao_import import importing_torchao
from sft.model.trained import Shapes
from sft.recipe.architecture import ModelConfig
from sft.recipe.schema import Hardware, Train
from sft.runner.precision import NEEDS

if TYPE_CHECKING:
    import torch
    from torch import nn

MULTIPLE = 16
"""The kernels read rows of 16 bytes (torch._scaled_mm)."""
GATES = ("attention.w_a", "attention.w_b")
"""Of a Gated DeltaNet: a row for each head, from which decays and step sizes are computed in fp32."""
EMULATED = False
"""Only tests set it: torchao then rounds as a GPU does, and multiplies the rounded values in a wider type on any device."""


def fp8_matrices(config: ModelConfig) -> Shapes:
    """{name: shape} of the matrices that multiply in fp8."""
    return {name: shape for name, shape in shapes(config).items() if _is_fp8(name) and len(shape) == 2}


def _is_fp8(name: str) -> bool:
    return name.startswith("blocks.") and not name.removesuffix(".weight").endswith(GATES)


def require_sizes(config: ModelConfig, train: Train, hardware: Hardware) -> None:
    """Raises SftError for precision "fp8" with a matrix, or a number of tokens, that is no multiple of 16."""
    if train.precision != "fp8":
        return
    for name, (rows, columns) in fp8_matrices(config).items():
        if rows % MULTIPLE or columns % MULTIPLE:
            raise SftError(
                f"[train] precision = 'fp8': {name} is {rows} x {columns}, and products in fp8 need multiples of {MULTIPLE};"
                " next: precision=bf16"
            )
    tokens = (hardware.microbatch_tokens or train.seq_len) // hardware.context_degree
    if tokens % MULTIPLE:
        raise SftError(
            f"[train] precision = 'fp8': a rank has {tokens} tokens of a microbatch, and products in fp8 need a multiple of"
            f" {MULTIPLE}; next: another seq_len, microbatch_tokens or context_degree, or precision=bf16"
        )


def check_device(device: torch.device) -> None:
    """Raises SftError for a device without products in fp8 with a scale for each row."""
    import torch  # start-up

    if EMULATED:
        return
    then = "next: precision=bf16, or another CLUSTER="
    if device.type != "cuda" or torch.version.hip:
        found = "an AMD GPU, where it was never tried" if device.type == "cuda" else "a CPU"
        raise SftError(f"[train] precision = 'fp8': this process has {found}, and {NEEDS}; {then}")
    if (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        name, number = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise SftError(f"[train] precision = 'fp8': the {name} has {number}, and {NEEDS}; {then}")


def multiply_in_fp8(model: nn.Module) -> None:
    """Puts torchao's Float8Linear in the place of the linear layers of the blocks. Call it before compiling and sharding. Raises
    SftError without torchao."""
    with importing_torchao("precision = 'fp8'", "precision=bf16"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # start-up: torchao takes a second
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=EMULATED)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: _is_fp8(name))
