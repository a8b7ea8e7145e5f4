"""Which kernel runs a problem, and in what tiles.

The choice is a pure function of the problem and the architecture's name: it can be tested, and
every configuration it can return compiled, on a machine without a GPU (`compile_ahead`).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["forward", "backward"]
Scope = Literal["sequence", "step"]
# What modifies the recurrence: nothing, lengths alone, or any of resets, a recurrent mask, zoneout
# and a clip, with lengths or without. Registers that they take are not there for W_hh.
Modifiers = Literal["none", "lengths", "any"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
SCOPES: tuple[Scope, ...] = ("sequence", "step")
MODIFIERS: tuple[Modifiers, ...] = ("none", "lengths", "any")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INPUT_PRECISIONS = ("ieee", "tf32")
# Architectures that every configuration is compiled for by `compile_ahead`.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Shared memory one program may use, in bytes; an architecture not listed here is taken to have
# what the smallest of its vendor's has.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        scope: "sequence", one launch for the whole sequence, or "step", one for each time step.
        BLOCK_B: batch rows of a program.
        BLOCK_H: hidden units of a program (all of them in the sequence kernel).
        BLOCK_K: length of the product's inner tile; 0 in the sequence kernel, which has no loop.
        num_warps: warps of a program.
        num_stages: tiles of the inner loop in flight.
        GATES_IN_REGISTERS: sequence kernel: gates whose part of W_hh stays in registers; that of
            the others is read from shared memory in every step.
    """

    scope: Scope
    BLOCK_B: int
    BLOCK_H: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GATES_IN_REGISTERS: int = 0


@dataclass(frozen=True)
class ShippedConfig:
    """A configuration together with the problems it ships for.

    Attributes:
        direction: "forward" or "backward".
        dtype: of the input.
        input_precision: of float32 products; "ieee" for other dtypes.
        arch: the architecture.
        aligned: whether H is a multiple of 16.
        modifiers: what modifies the recurrence.
        config: the configuration.
    """

    direction: Direction
    dtype: torch.dtype
    input_precision: str
    arch: str
    aligned: bool
    modifiers: Modifiers
    config: LaunchConfig


def sequence_config(
    direction: Direction, math: str, block_h: int, amd: bool, aligned: bool, modifiers: Modifiers
) -> LaunchConfig:
    """The sequence kernel's configuration for H up to `block_h`."""
    # 16 batch rows are what one tensor-core instruction takes. Warps divide the hidden units,
    # so that each holds its share of W_hh in registers.
    if math == "ieee" and not amd:
        # No tensor cores: threads that multiply element by element keep W_hh in shared memory.
        # Eight warps, but where the compiler then does not find the registers for the modifiers.
        fails = not aligned and modifiers == ("any" if direction == "forward" else "lengths")
        return LaunchConfig("sequence", 16, block_h, 0, 4 if fails else 8, 1, 0)
    if amd:
        return LaunchConfig("sequence", 16, block_h, 0, max(1, block_h // 16), 1, 4)
    if block_h == 128:
        # All four gates' parts would take 128 of a thread's 255 registers: too many.
        in_registers = 2 if direction == "forward" else 3
        if modifiers == "any" and direction == "backward":
            in_registers = 1
        return LaunchConfig("sequence", 16, block_h, 0, 8, 1, in_registers)
    # Twice the warps for 64 units, but where the compiler then stops at 128 registers and spills.
    stops = direction == "forward" and math == "16-bit" and aligned
    num_warps = 8 if block_h == 64 and not stops else 4
    in_registers = 3 if block_h == 64 and math == "tf32" and modifiers == "any" else 4
    return LaunchConfig("sequence", 16, block_h, 0, num_warps, 1, in_registers)


def step_config(
    direction: Direction, math: str, block_b: int, amd: bool, aligned: bool, modifiers: Modifiers
) -> LaunchConfig:
    """The step kernel's configuration for tiles of `block_b` batch rows."""
    # A small batch has few tiles: narrow ones spread W_hh over more of the GPU.
    block_h = 16 if block_b == 16 else 32
    block_k = (128 if block_b == 16 else 64) // (1 if math == "16-bit" else 2)
    if math == "ieee" and not amd:
        # Without tensor cores a tile's operands pass through registers: half as many.
        block_h, block_k = 16, 32
    if math == "16-bit" and not aligned:
        # Addresses of single elements take more registers.
        block_k = 64
    num_stages = 2 if amd else 3
    if not amd and modifiers == "any" and direction == "forward":
        # The recurrent mask has a tile of its own beside that of h.
        block_k //= 2
    if modifiers != "none" and math != "16-bit":
        num_stages = 2
    num_warps = 4 if amd or block_b == 16 else 8
    return LaunchConfig("step", block_b, block_h, block_k, num_warps, num_stages)


def sequence_blocks(math: str, arch: str, aligned: bool) -> tuple[int, ...]:
    """Hidden units that the sequence kernel takes, in tiles of these sizes.

    A tile is left out where the compiler has to spill. Where H is no multiple of 16 (not
    `aligned`), addresses and masks of single elements take more registers.
    """
    if math == "16-bit":
        return (32, 64, 128) if aligned else (32, 64)
    if math == "ieee" and not arch.startswith("gfx"):
        return (32, 64) if aligned and arch.startswith(("sm_8", "sm_90")) else (32,)
    return (32, 64)


def step_blocks(aligned: bool) -> tuple[int, ...]:
    """Batch rows of the step kernel's tiles."""
    return (16, 64) if aligned else (16,)


def math_of(dtype: torch.dtype, input_precision: str) -> str:
    """The arithmetic of the products: "16-bit", "tf32" or "ieee".

    Raises:
        ValueError: if the kernels have no such arithmetic.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    if input_precision not in INPUT_PRECISIONS:
        raise ValueError(
            f"input_precision must be one of {INPUT_PRECISIONS}, got {input_precision!r}"
        )
    return input_precision if dtype == torch.float32 else "16-bit"


def select_launch_config(
    direction: Direction,
    *,
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    arch: str,
    input_precision: str,
    scope: Scope | None = None,
    modifiers: Modifiers = "none",
) -> LaunchConfig:
    """Chooses the kernel and its tiles.

    Args:
        direction: "forward" or "backward".
        batch: B; only the bucket it falls into matters.
        hidden: H.
        dtype: float16, bfloat16 or float32.
        arch: the GPU's name for compilers, such as "sm_90" or "gfx942".
        input_precision: of float32 products, "ieee" or "tf32".
        scope: "sequence" or "step" to name the kernel; None for the best.
        modifiers: what modifies the recurrence: "none", "lengths" if they alone do, else "any".

    Raises:
        ValueError: if an argument is not one of those named here, or if `scope` is "sequence"
            and W_hh does not fit on chip.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")
    if modifiers not in MODIFIERS:
        raise ValueError(f"modifiers must be one of {MODIFIERS}, got {modifiers!r}")
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES} or None, got {scope!r}")
    math = math_of(dtype, input_precision)
    amd = arch.startswith("gfx")
    aligned = hidden % 16 == 0
    blocks = sequence_blocks(math, arch, aligned)
    for block_h in blocks:
        if hidden <= block_h and scope != "step":
            return sequence_config(direction, math, block_h, amd, aligned, modifiers)
    if scope == "sequence":
        largest = blocks[-1]
        need = 4 * hidden * hidden * dtype.itemsize
        have = 4 * largest * largest * dtype.itemsize
        raise ValueError(
            f"scope 'sequence' keeps W_hh on chip: 4 * {hidden} * {hidden} * {dtype.itemsize} "
            f"bytes = {need} for hidden = {hidden} in {dtype}, and the kernel takes {have} "
            f"(hidden <= {largest}) with {math} products on {arch}"
            + ("" if aligned else ", hidden not being a multiple of 16")
        )
    blocks = step_blocks(aligned)
    block_b = next((block for block in blocks if batch <= block), blocks[-1])
    return step_config(direction, math, block_b, amd, aligned, modifiers)


def shipped_configs(arch: str, modifiers: Modifiers = "none") -> Iterator[ShippedConfig]:
    """Every configuration that `select_launch_config` can return on `arch` for `modifiers`."""
    amd = arch.startswith("gfx")
    for direction, dtype, aligned in itertools.product(DIRECTIONS, DTYPES, (True, False)):
        for input_precision in INPUT_PRECISIONS if dtype == torch.float32 else ("ieee",):
            math = math_of(dtype, input_precision)
            for block_h in sequence_blocks(math, arch, aligned):
                config = sequence_config(direction, math, block_h, amd, aligned, modifiers)
                yield ShippedConfig(
                    direction, dtype, input_precision, arch, aligned, modifiers, config
                )
            for block_b in step_blocks(aligned):
                config = step_config(direction, math, block_b, amd, aligned, modifiers)
                yield ShippedConfig(
                    direction, dtype, input_precision, arch, aligned, modifiers, config
                )
