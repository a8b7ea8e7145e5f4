"""Compiles every shipped configuration for an architecture, without a GPU, and reports its cost.

    python -m fused_lstm.kernels.cuda.compile_ahead --arch sm_90 [--jobs 8] [--json]

Registers, spills and shared memory are read from the machine code that a launch would load;
instructions are counted in its disassembly by the cuobjdump in Triton's wheel, where there is one.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from .compiler import availability, cubin_of
from .config import ARCHITECTURES, Config, known_limits, shipped_configs
from .cubin import resources_of

__all__ = ["Report", "compile_all", "report_on"]

# "        /*0a50*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  ..."
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", re.MULTILINE)
# "@!P0 BRA.U.ANY `(.L_x_12)" or, with addresses, "@P0 BRA 0xa50"
_BRANCH = re.compile(r"\bBRA\S*\s.*?0x([0-9a-f]+)")
_TENSOR_CORE = re.compile(r"\b[HI]?MMA\.")
# An instruction's address tells one from the next: on every architecture here each takes 16 bytes.


class Code(NamedTuple):
    """What disassembly tells of a kernel.

    Attributes:
        instructions: of the whole kernel.
        tensor_core_instructions: of these, matrix products.
        loop_instructions: of the time loop: those that a warp issues in a step, if it takes no
            branch; None if there is no loop around all products.
    """

    instructions: int
    tensor_core_instructions: int
    loop_instructions: int | None


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs.

    Attributes:
        kernel: its name.
        arch: the architecture compiled for.
        config: the configuration's fields.
        threads: of one block.
        registers: of one thread.
        register_limit: the most that a block of so many threads leaves to one.
        local_bytes: memory of one thread beyond its registers: spills.
        shared_bytes: shared memory of one block, what the launch asks for included.
        shared_limit: the most the architecture gives.
        instructions: of the kernel; None without a disassembler, as for what follows.
        tensor_core_instructions: of these, matrix products.
        loop_instructions: of the time loop: one warp's in one step; None if no loop was found, too.
    """

    kernel: str
    arch: str
    config: dict[str, int | str | bool]
    threads: int
    registers: int
    register_limit: int
    local_bytes: int
    shared_bytes: int
    shared_limit: int
    instructions: int | None
    tensor_core_instructions: int | None
    loop_instructions: int | None

    @property
    def fits(self) -> bool:
        """Whether it can run, nothing spills, and tensor cores multiply, as far as is known."""
        return (
            self.local_bytes == 0
            and self.registers <= self.register_limit
            and self.shared_bytes <= self.shared_limit
            and self.tensor_core_instructions != 0
        )


@functools.cache
def disassembler() -> Path | None:
    """Triton's cuobjdump, or None."""
    triton = importlib.util.find_spec("triton")
    if triton is None or not triton.submodule_search_locations:
        return None
    folder = Path(triton.submodule_search_locations[0], "backends", "nvidia", "bin")
    return next((path for path in folder.glob("cuobjdump*") if path.is_file()), None)


def disassemble(cubin: bytes) -> list[tuple[int, str]] | None:
    """Address and text of every instruction; None without a disassembler."""
    tool = disassembler()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-sass", path], capture_output=True, text=True, check=True
        ).stdout
    return [(int(address, 16), code) for address, code in _INSTRUCTION.findall(text)]


def time_loop(instructions: Sequence[tuple[int, str]]) -> list[str] | None:
    """The instructions of the time loop: the smallest backward branch around every product.

    Instructions outside it that are only jumped to from within are not counted: they are the rare
    way, such as that of a wait that has to try again.
    """
    products = [address for address, code in instructions if _TENSOR_CORE.search(code)]
    if not products:
        return None
    loops = []
    for address, code in instructions:
        target = _BRANCH.search(code)
        if target and (start := int(target[1], 16)) <= products[0] and address >= products[-1]:
            loops.append((address - start, start, address))
    if not loops:
        return None
    _, start, end = min(loops)
    return [code for address, code in instructions if start <= address <= end]


def code_of(cubin: bytes) -> Code | None:
    """What disassembly tells of a kernel; None without a disassembler."""
    instructions = disassemble(cubin)
    if instructions is None:
        return None
    real = [(address, code) for address, code in instructions if not code.startswith("NOP")]
    loop = time_loop(real)
    return Code(
        instructions=len(real),
        tensor_core_instructions=sum(bool(_TENSOR_CORE.search(code)) for _, code in real),
        loop_instructions=None if loop is None else len(loop),
    )


def report_on(config: Config, arch: str) -> Report:
    """Compiles one configuration and reports."""
    cubin = cubin_of(config.source(), arch)
    resources = resources_of(cubin)
    code = code_of(cubin)
    return Report(
        kernel=resources.kernel,
        arch=arch,
        config=asdict(config),
        threads=config.threads,
        registers=resources.registers,
        # 65,536 on every architecture here, dealt to warps in portions of 8 for each thread.
        register_limit=min(255, 65_536 // config.threads // 8 * 8),
        local_bytes=resources.local_bytes,
        shared_bytes=config.shared_bytes + resources.static_shared_bytes,
        shared_limit=known_limits(arch).shared_bytes,
        instructions=code and code.instructions,
        tensor_core_instructions=code and code.tensor_core_instructions,
        loop_instructions=code and code.loop_instructions,
    )


def compile_all(configs: Iterable[Config], arch: str, jobs: int = 1) -> Iterator[Report]:
    """Compiles configurations in as many processes, and reports in their order."""
    configs = list(configs)
    if jobs <= 1:
        yield from (report_on(config, arch) for config in configs)
        return
    # A forked child would inherit the locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(report_on, configs, [arch] * len(configs))


_HEADING = (
    f"{'kernel':21}{'type':11}{'H':>5}{'scope':>8}{'team':>5}{'cols':>5}{'warps':>6}{'split':>6}"
    f"{'tiles':>7}  {'flags':10}{'regs':>5}{'spill':>6}{'shared':>8}{'mma':>6}{'loop':>6}"
)
_FLAG_LETTERS = {
    "SAVE_ACTIVATIONS": "a",
    "SAVE_CELLS": "c",
    "HAS_LENGTHS": "l",
    "PACKED": "p",
    "HAS_RESETS": "r",
    "HAS_RECURRENT_MASK": "m",
    "HAS_ZONEOUT_H": "z",
    "HAS_ZONEOUT_C": "z",
    "HAS_CELL_CLIP": "x",
}
_LEGEND = """\
type    x3: a product is three, for float32 beyond TF32
split   warps that share a sum
tiles   weights in registers, in tiles of a warp, of how many
flags   saves activations, cells; knows lengths, packed rows, resets, mask, zoneout, clip (x)
mma     matrix instructions in the code
loop    instructions of the time loop: those of one warp in one step
"""


def _row(config: Config, report: Report) -> str:
    """A report as a line of the table."""
    flags = "".join(letter for name, letter in _FLAG_LETTERS.items() if report.config.get(name))
    kind = config.TYPE + (f" x{config.TERMS}" if config.TERMS > 1 else "")
    tiles = f"{config.REGISTER_TILES}/{config.k_tiles}"
    line = (
        f"{report.kernel:21}{kind:11}{config.HIDDEN:>5}{config.SCOPE:>8}{config.TEAM:>5}"
        f"{config.COLUMNS:>5}{config.warps:>6}{config.K_WARPS:>6}{tiles:>7}  {flags:10}"
        f"{report.registers:>5}{report.local_bytes:>6}{report.shared_bytes:>8}"
        f"{_or_dash(report.tensor_core_instructions):>6}{_or_dash(report.loop_instructions):>6}"
    )
    return line if report.fits else f"{line}  DOES NOT FIT"


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)


def main(arguments: list[str] | None = None) -> int:
    """Prints the reports; returns 1 if a kernel spills, does not fit or leaves the tensor cores."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=_LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch",
        required=True,
        action="append",
        help=f"such as {', '.join(ARCHITECTURES)}; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes; one for each CPU by default"
    )
    options = parser.parse_args(arguments)
    if reason := availability():
        parser.exit(2, f"{parser.prog}: {reason}\n")
    reports = []
    for arch in options.arch:
        configs = shipped_configs(arch)
        if not options.json:
            print(f"{arch}\n{_HEADING}")
        for config, report in zip(configs, compile_all(configs, arch, options.jobs), strict=True):
            reports.append(report)
            if not options.json:
                print(_row(config, report), flush=True)
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    return 0 if all(report.fits for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
