"""Compiles every shipped configuration for an architecture, without a GPU, and reports its cost.

    python -m fused_lstm.kernels.triton.compile_ahead --arch sm_90 [--modifiers any] [--json]

Registers, spills and shared memory are the compiler's own account: of ptxas, read by the cuobjdump
in Triton's wheel, or the metadata of an AMD code object.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from .config import (
    ARCHITECTURES,
    MODIFIERS,
    SHARED_MEMORY,
    Modifiers,
    ShippedConfig,
    shipped_configs,
)
from .sequence import lstm_backward_sequence_kernel, lstm_forward_sequence_kernel
from .step import lstm_backward_step_kernel, lstm_forward_step_kernel

KERNELS = {
    ("forward", "sequence"): lstm_forward_sequence_kernel,
    ("backward", "sequence"): lstm_backward_sequence_kernel,
    ("forward", "step"): lstm_forward_step_kernel,
    ("backward", "step"): lstm_backward_step_kernel,
}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Tensors that are float32 whatever the input's dtype, and those of zoneout, which may be.
FLOAT32_POINTERS = {
    "c_ptr",
    "c_state_ptr",
    "dc_ptr",
    "dh_kept_ptr",
    "grad_c_ptr",
    "zoneout_h_ptr",
    "zoneout_c_ptr",
}
OTHER_TYPES = {
    "batch_sizes_ptr": "*i64",
    "lengths_ptr": "*i64",
    "resets_ptr": "*u8",
    "cell_clip": "fp32",
}
# Everything a kernel can be asked to do at once.
WORST_FLAGS = {
    "PACKED": True,
    "REVERSE": False,
    "SAVE_ACTIVATIONS": True,
    "SAVE_CELLS": True,
    "HAS_GRAD_H": True,
    "HAS_GRAD_C": True,
    "HAS_GRAD_H_N": True,
    "HAS_GRAD_C_N": True,
    "ONLY_GRAD_H0": False,
    "HAS_LENGTHS": False,
    "HAS_RESETS": False,
    "HAS_RECURRENT_MASK": False,
    "HAS_ZONEOUT_H": False,
    "HAS_ZONEOUT_C": False,
    "HAS_CELL_CLIP": False,
}
# What each kind of modifiers adds to them; lengths and a packed sequence exclude each other.
ANYWHERE = {
    "HAS_RESETS": True,
    "HAS_RECURRENT_MASK": True,
    "HAS_ZONEOUT_H": True,
    "HAS_ZONEOUT_C": True,
    "HAS_CELL_CLIP": True,
}
MODIFIER_FLAGS: dict[Modifiers, list[dict[str, bool]]] = {
    "none": [{}],
    "lengths": [{"PACKED": False, "HAS_LENGTHS": True}],
    "any": [ANYWHERE, {"PACKED": False, "HAS_LENGTHS": True, **ANYWHERE}],
}


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs.

    Attributes:
        kernel: its name.
        arch: the architecture compiled for.
        dtype: of the input.
        input_precision: of float32 products.
        aligned: whether H and the strides are multiples of 16.
        modifiers: what modifies the recurrence, as `select_launch_config` is told.
        config: the configuration's fields.
        registers: of one thread (AMD: vector registers).
        spill_bytes: memory of one thread that registers overflowed into.
        shared_bytes: shared memory of one program.
        shared_limit: the most the architecture gives.
        tensor_core_instructions: matrix instructions in the code.
    """

    kernel: str
    arch: str
    dtype: str
    input_precision: str
    aligned: bool
    modifiers: str
    config: dict[str, int | str]
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_core_instructions: int


def target_of(arch: str) -> GPUTarget:
    """Triton's target for an architecture's name."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def source_of(
    kernel: JITFunction, constants: dict[str, object], dtype: torch.dtype, aligned: bool = True
) -> ASTSource:
    """A kernel with the argument types, and what is known of them, of a launch on tensors.

    Args:
        kernel: the kernel.
        constants: its compile-time arguments by name.
        dtype: of the input.
        aligned: whether H and the strides are multiples of 16.
    """
    signature: dict[str, str] = {}
    constexprs: dict[str, object] = {}
    attributes = {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constexprs[name] = constants[name]
            continue
        if name == "weight_stride_col":
            # A launch makes a stride of 1 a constant.
            signature[name] = "constexpr"
            constexprs[name] = 1
            continue
        pointer = name.endswith("_ptr")
        if name in OTHER_TYPES:
            signature[name] = OTHER_TYPES[name]
        elif pointer:
            signature[name] = "*" + ("fp32" if name in FLOAT32_POINTERS else TYPES[dtype])
        else:
            signature[name] = "i32"
        if pointer or (aligned and not parameter.do_not_specialize):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def compile_shipped(shipped: ShippedConfig, **flags: bool) -> Report:
    """Compiles one configuration, with the worst flags but for those given, and reports."""
    config = shipped.config
    kernel = KERNELS[shipped.direction, config.scope]
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: the kernels are interpreted, not compiled")
    constants = {**asdict(config), **WORST_FLAGS, "INPUT_PRECISION": shipped.input_precision}
    compiled = triton.compile(
        source_of(kernel, {**constants, **flags}, shipped.dtype, shipped.aligned),
        target=target_of(shipped.arch),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    usage: Callable = _nvidia_usage if shipped.arch.startswith("sm_") else _amd_usage
    registers, spill_bytes, tensor_core_instructions = usage(compiled.asm)
    vendor = shipped.arch[:2]
    smallest = min(v for k, v in SHARED_MEMORY.items() if k.startswith(vendor))
    return Report(
        kernel=kernel.__name__,
        arch=shipped.arch,
        dtype=TYPES[shipped.dtype],
        aligned=shipped.aligned,
        input_precision=shipped.input_precision,
        modifiers=shipped.modifiers,
        config=asdict(config),
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        shared_limit=SHARED_MEMORY.get(shipped.arch, smallest),
        tensor_core_instructions=tensor_core_instructions,
    )


def _nvidia_usage(asm: dict) -> tuple[int, int, int]:
    """Registers and local memory of a thread, and matrix instructions, of a cubin."""
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    matrix = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", asm["ptx"])
    return used["REG"], used["STACK"] + used["LOCAL"], len(matrix)


def _amd_usage(asm: dict) -> tuple[int, int, int]:
    """Vector registers and scratch memory of a thread, and matrix instructions."""
    text = asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    spilled = max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count"))
    return field("vgpr_count"), spilled, len(re.findall(r"\bv_s?mfma", text))


def compile_all(arch: str, modifiers: Modifiers = "none") -> Iterable[Report]:
    """Compiles every configuration that ships for `arch` and `modifiers`."""
    for shipped in shipped_configs(arch, modifiers):
        # Compiling the unaligned half for float16 too would tell nothing that bfloat16 does not,
        # nor would the modifiers.
        alike = shipped.dtype == torch.float16
        if alike and not (shipped.aligned and modifiers == "none"):
            continue
        for flags in MODIFIER_FLAGS[modifiers]:
            yield compile_shipped(shipped, **flags)


def main(arguments: list[str] | None = None) -> int:
    """Prints the reports; returns 1 if a kernel spills or asks for too much shared memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", required=True, help=f"such as {', '.join(ARCHITECTURES)}")
    parser.add_argument(
        "--modifiers", choices=MODIFIERS, default="none", help="what modifies the recurrence"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    options = parser.parse_args(arguments)
    reports = []
    if not options.json:
        print(
            f"{'kernel':32}{'type':10}{'H':>5}{'tile':>12}{'warps':>6}{'regs':>6}{'spill':>7}{'shared':>8}"
        )
    for report in compile_all(options.arch, options.modifiers):
        reports.append(report)
        if not options.json:
            config = report.config
            tile = "x".join(str(config[f"BLOCK_{axis}"]) for axis in "BHK")
            math = report.input_precision if report.dtype == "fp32" else ""
            print(
                f"{report.kernel:32}{report.dtype + ' ' + math:10}"
                f"{'16n' if report.aligned else 'any':>5}{tile:>12}{config['num_warps']:>6}"
                f"{report.registers:>6}{report.spill_bytes:>7}{report.shared_bytes:>8}",
                flush=True,
            )
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    fits = all(r.spill_bytes == 0 and r.shared_bytes <= r.shared_limit for r in reports)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
