"""Faults put into copies of the CUDA kernels, to see whether the emulator finds them.

A kernel's tests are worth what they find. Each bug here is a mistake that one could make, above all
in the order of things between threads: a barrier left out, a count that is off, a buffer too few.
Some order of events must then end in an error, or in results that are wrong.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from unittest import mock

import torch
from fused_lstm.kernels.cuda import launch
from fused_lstm.kernels.cuda.config import BackwardConfig, Config, ForwardConfig

from fused_lstm.modifiers import Modifiers
from fused_lstm.reference import recurrence_backward, recurrence_forward

from .emulator import KERNELS, SEARCH, EmulatedExecutor, EmulationError, Options

STEPS, BATCH = 6, 11
LENGTHS = (6, 1, 0, 4, 6, 3, 2, 5, 6, 1, 4)

# Largest difference from float64 that rounding explains, for these problems.
TOLERANCES = {"bfloat16": 0.05, "float16": 0.005, "float32": 0.005}


@dataclasses.dataclass(frozen=True)
class SeededBug:
    """A mistake: in copies of these files, each old text becomes the new one.

    Attributes:
        name: what the mistake is.
        config: of the kernel that it is looked for in.
        changes: (file, old text, new text); the old text occurs once.
    """

    name: str
    config: Config
    changes: tuple[tuple[str, str, str], ...]

    def apply(self, folder: Path) -> None:
        """Copies the kernels' headers to `folder`, with the bug.

        Raises:
            LookupError: if a text to change is not there, or more than once.
        """
        copy_kernels(folder)
        for file, old, new in self.changes:
            path = folder / file
            text = path.read_text()
            if text.count(old) != 1:
                raise LookupError(
                    f"{self.name}: {file} has {text.count(old)} times, not once:\n{old}\n"
                    "The kernel has changed: so must the bug in tests/simt/seeded_bugs.py."
                )
            path.write_text(text.replace(old, new))


def bug(name: str, config: Config, *changes: tuple[str, str, str]) -> SeededBug:
    return SeededBug(name, config, changes)


def copy_kernels(folder: Path) -> None:
    """Copies the kernels' headers."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.cuh", "*.h"):
        for path in KERNELS.glob(pattern):
            shutil.copy(path, folder / path.name)


# ---- what a kernel computes, and what it should


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


class Problem:
    """A recurrence of random numbers for a configuration, and the truth about it in float64."""

    def __init__(self, config: Config):
        self.config = config
        generator = torch.Generator().manual_seed(20)
        dtype = getattr(torch, config.TYPE)
        T, B, H = STEPS, BATCH, config.HIDDEN
        self.gates = _normal(generator, T, B, 4 * H).to(dtype)
        self.weight_hh = (_normal(generator, 4 * H, H) * H**-0.5).to(dtype)
        self.h0 = _normal(generator, B, H).tanh().to(dtype)
        self.c0 = _normal(generator, B, H).to(dtype)
        self.grad_h = _normal(generator, T, B, H).to(dtype)
        self.grad_c = _normal(generator, T, B, H)
        self.grad_h_n = _normal(generator, B, H).to(dtype)
        self.grad_c_n = _normal(generator, B, H).to(dtype)
        self.lengths = torch.tensor(LENGTHS) if config.HAS_LENGTHS else None
        self.modifiers = Modifiers(self.lengths, None, None, None, None, None)
        wide = (x.double() for x in (self.gates, self.weight_hh, self.h0, self.c0))
        self.exact = recurrence_forward(*wide, modifiers=self.modifiers)
        self.activations = self.exact.activations.to(dtype)
        self.c = self.exact.c.float()
        self.expected = self._expected()

    def _expected(self) -> tuple[torch.Tensor, ...]:
        if self.config.direction == "forward":
            exact = self.exact
            return exact.h, exact.c, exact.activations, exact.h_n, exact.c_n
        grads = (self.grad_h, self.grad_c, None, self.grad_h_n, self.grad_c_n)
        saved = (self.activations, self.c, self.weight_hh, self.c0)
        wide = (None if x is None else x.double() for x in (*grads, *saved))
        return recurrence_backward(*wide, modifiers=self.modifiers)[:3]

    def compute(self, executor: EmulatedExecutor) -> tuple[torch.Tensor, ...]:
        """The kernel's results."""
        precision = "tf32" if self.config.TERMS == 1 else "ieee"
        how = {"lengths": self.lengths, "input_precision": precision, "config": self.config}
        with mock.patch.object(launch, "executor_for", return_value=executor):
            if self.config.direction == "forward":
                return launch.lstm_forward(self.gates, self.weight_hh, self.h0, self.c0, **how)
            return launch.lstm_backward(
                self.grad_h, self.grad_c, self.grad_h_n, self.grad_c_n,
                self.activations, self.c, self.weight_hh, self.c0, **how,
            )  # fmt: skip

    def error(self, results: tuple[torch.Tensor, ...]) -> float:
        """The largest difference from the truth; NaN if a result is."""
        differences = (
            (result.double() - expected).abs().max()
            for result, expected in zip(results, self.expected, strict=True)
        )
        return torch.stack(list(differences)).max().item()


def outcome(problem: Problem, folder: Path, directory: Path | None, options: Options) -> str:
    """What comes of a kernel under some options: "right", "wrong: ..." or the emulator's error."""
    executor = EmulatedExecutor(options, directory=directory, kernels=folder)
    try:
        error = problem.error(problem.compute(executor))
    except EmulationError as found:
        return str(found).splitlines()[0]
    return "right" if error <= TOLERANCES[problem.config.TYPE] else f"wrong: error {error:.3g}"


def outcomes(config: Config, folder: Path, directory: Path | None = None) -> list[str]:
    """What comes of it under every one of the options that are searched."""
    problem = Problem(config)
    return [outcome(problem, folder, directory, options) for options in SEARCH]


def first_found(config: Config, folder: Path, directory: Path | None = None) -> str | None:
    """The first thing that goes wrong under any of the options that are searched."""
    problem = Problem(config)
    results = (outcome(problem, folder, directory, options) for options in SEARCH)
    return next((result for result in results if result != "right"), None)


# ---- configurations: small, and with everything that can go wrong in them

FORWARD_BLOCK = ForwardConfig(
    TYPE="bfloat16", SCOPE="block", HIDDEN=64, TEAM=1, COLUMNS=8,
    UNIT_WARPS=8, GROUPS=1, K_WARPS=1, REGISTER_TILES=2,
)  # fmt: skip
FORWARD_SPLIT = ForwardConfig(
    TYPE="float16", SCOPE="block", HIDDEN=32, TEAM=1, COLUMNS=8,
    UNIT_WARPS=2, GROUPS=2, K_WARPS=2, REGISTER_TILES=0,
)  # fmt: skip
FORWARD_CLUSTER = ForwardConfig(
    TYPE="bfloat16", SCOPE="cluster", HIDDEN=64, TEAM=4, COLUMNS=8,
    UNIT_WARPS=2, GROUPS=1, K_WARPS=2, REGISTER_TILES=2,
)  # fmt: skip
FORWARD_GRID = ForwardConfig(
    TYPE="float32", SCOPE="grid", HIDDEN=72, TEAM=3, COLUMNS=8,
    UNIT_WARPS=3, GROUPS=1, K_WARPS=2, REGISTER_TILES=2,
)  # fmt: skip
FORWARD_LENGTHS = dataclasses.replace(FORWARD_BLOCK, HAS_LENGTHS=True)
BACKWARD_BLOCK = BackwardConfig(
    TYPE="bfloat16", SCOPE="block", HIDDEN=32, TEAM=1, COLUMNS=8,
    UNITS=32, ROW_WARPS=2, ROW_TILES=1, K_WARPS=2, REGISTER_TILES=2,
)  # fmt: skip
BACKWARD_CLUSTER = BackwardConfig(
    TYPE="float16", SCOPE="cluster", HIDDEN=64, TEAM=4, COLUMNS=8,
    UNITS=16, ROW_WARPS=2, ROW_TILES=2, K_WARPS=2, REGISTER_TILES=0,
)  # fmt: skip
BACKWARD_GRID = BackwardConfig(
    TYPE="float32", SCOPE="grid", HIDDEN=48, TEAM=3, COLUMNS=8,
    UNITS=16, ROW_WARPS=3, ROW_TILES=1, K_WARPS=2, REGISTER_TILES=2,
)  # fmt: skip
CONFIGS = {
    "forward-block": FORWARD_BLOCK,
    "forward-split": FORWARD_SPLIT,
    "forward-cluster": FORWARD_CLUSTER,
    "forward-grid": FORWARD_GRID,
    "forward-lengths": FORWARD_LENGTHS,
    "backward-block": BACKWARD_BLOCK,
    "backward-cluster": BACKWARD_CLUSTER,
    "backward-grid": BACKWARD_GRID,
}

# ---- the bugs

EXCHANGE, FORWARD = "exchange.cuh", "forward.cuh"
REDUCE, BACKWARD = "reduce.cuh", "backward.cuh"

FORWARD_BUGS = [
    bug(
        "block: no barrier between steps",
        FORWARD_BLOCK,
        (EXCHANGE, "void sent(int) const { device::sync_block(); }", "void sent(int) const {}"),
    ),
    bug(
        "block: one buffer for h",
        FORWARD_BLOCK,
        (FORWARD, "u32 buffer = (s & 1) * L::H_BYTES;", "u32 buffer = 0;"),
        (FORWARD, "shared + (s & 1) * L::H_BYTES, half_bit", "shared, half_bit"),
    ),
    bug(
        "gates: wait one group short",
        FORWARD_BLOCK,
        (FORWARD, "copy_async_wait<C::STAGES - 1>()", "copy_async_wait<C::STAGES>()"),
    ),
    bug(
        "gates: no barrier of the warp after the wait",
        FORWARD_BLOCK,
        (
            FORWARD,
            "copy_async_wait<C::STAGES - 1>();\n    device::sync_warp();",
            "copy_async_wait<C::STAGES - 1>();",
        ),
    ),
    bug(
        "gates: a stage too few",
        FORWARD_BLOCK,
        (FORWARD, "write = write + 1 == C::STAGES", "write = write + 2 == C::STAGES"),
        (FORWARD, "read = read + 1 == C::STAGES", "read = read + 2 == C::STAGES"),
    ),
    bug(
        "sums: no barrier of the warps that share them",
        FORWARD_SPLIT,
        (FORWARD, "    device::sync_named(1 + place.unit_warp, C::K_WARPS * LANES);\n", ""),
    ),
    bug(
        "sums: one barrier for all of them",
        FORWARD_SPLIT,
        (FORWARD, "sync_named(1 + place.unit_warp,", "sync_named(1,"),
    ),
    bug(
        "sums: two warps write to one place",
        FORWARD_SPLIT,
        (FORWARD, "place.k_warp - (place.k_warp > (u32)owner)", "0u * place.k_warp"),
        (FORWARD, "(owner * C::UNIT_WARPS + place.unit_warp) *", "(place.unit_warp) *"),
    ),
    bug(
        "cluster: no wait",
        FORWARD_CLUSTER,
        (EXCHANGE, "{ device::mbarrier_wait(mbarrier(s), (s >> 1) & 1); }", "{}"),
    ),
    bug(
        "cluster: wrong parity",
        FORWARD_CLUSTER,
        (EXCHANGE, "mbarrier_wait(mbarrier(s), (s >> 1) & 1)", "mbarrier_wait(mbarrier(s), s & 1)"),
    ),
    bug(
        "cluster: own bytes expected too",
        FORWARD_CLUSTER,
        (EXCHANGE, "(C::TEAM - 1) * L::UNITS", "C::TEAM * L::UNITS"),
    ),
    bug(
        "cluster: bytes of a peer not expected",
        FORWARD_CLUSTER,
        (EXCHANGE, "(C::TEAM - 1) * L::UNITS", "(C::TEAM - 2) * L::UNITS"),
    ),
    bug(
        "cluster: own warps not awaited",
        FORWARD_CLUSTER,
        (EXCHANGE, "mbarrier_init(mbarrier(0), L::WARPS)", "mbarrier_init(mbarrier(0), 1)"),
        (EXCHANGE, "mbarrier_init(mbarrier(1), L::WARPS)", "mbarrier_init(mbarrier(1), 1)"),
        (EXCHANGE, "else if (thread % LANES == 0)", "else if (false)"),
    ),
    bug(
        "cluster: every lane arrives",
        FORWARD_CLUSTER,
        (EXCHANGE, "else if (thread % LANES == 0)", "else"),
    ),
    bug(
        "cluster: no barrier of the cluster after mbarriers are initialised",
        FORWARD_CLUSTER,
        (
            EXCHANGE,
            "device::mbarrier_init_fence();\n    }\n    device::sync_cluster();",
            "device::mbarrier_init_fence();\n    }\n    device::sync_block();",
        ),
    ),
    bug(
        "cluster: no fence after mbarriers are initialised",
        FORWARD_CLUSTER,
        (EXCHANGE, "      device::mbarrier_init_fence();\n", ""),
    ),
    bug(
        "cluster: no barrier of the cluster at the end",
        FORWARD_CLUSTER,
        (EXCHANGE, "void finish() const { device::sync_cluster(); }", "void finish() const {}"),
    ),
    bug(
        "cluster: one mbarrier for both buffers",
        FORWARD_CLUSTER,
        (EXCHANGE, "L::MBARRIERS + (s & 1) * 8", "L::MBARRIERS"),
        (EXCHANGE, "      device::mbarrier_init(mbarrier(1), L::WARPS);\n", ""),
    ),
    bug(
        "cluster: sent before the warp has written",
        FORWARD_CLUSTER,
        (
            FORWARD,
            "device::sync_warp();\n        constexpr u32 ROWS",
            "constexpr u32 ROWS",
        ),
    ),
    bug(
        "grid: no acquire",
        FORWARD_GRID,
        (EXCHANGE, "device::wait_acquire(flags + peer, s + 1);", "(void)flags;"),
    ),
    bug(
        "grid: acquire of the step before",
        FORWARD_GRID,
        (EXCHANGE, "(flags + peer, s + 1)", "(flags + peer, s)"),
    ),
    bug(
        "grid: no barrier after the acquire",
        FORWARD_GRID,
        (EXCHANGE, "    device::sync_block();\n#pragma unroll 4", "#pragma unroll 4"),
    ),
    bug(
        "grid: release before all warps have stored",
        FORWARD_GRID,
        (
            EXCHANGE,
            "device::sync_block();\n    if (thread == 0) device::store_release",
            "if (thread == 0) device::store_release",
        ),
    ),
    bug(
        "grid: no barrier after h has been copied",
        FORWARD_GRID,
        (
            EXCHANGE,
            "buffers + offset + i * CHUNK_BYTES));\n    device::sync_block();",
            "buffers + offset + i * CHUNK_BYTES));",
        ),
    ),
    bug(
        "grid: one buffer in global memory",
        FORWARD_GRID,
        (
            EXCHANGE,
            "device::load_global128_l2(buffers + offset",
            "device::load_global128_l2(buffers",
        ),
        (
            EXCHANGE,
            "device::store_global128(buffers + offset,",
            "device::store_global128(buffers + offset % L::H_BYTES,",
        ),
    ),
    bug(
        "grid: read through the cache that is not coherent",
        FORWARD_GRID,
        (EXCHANGE, "device::load_global128_l2(", "device::load_global128("),
    ),
    bug(
        "padding: h not cleared",
        FORWARD_GRID,
        (FORWARD, "device::store_shared128(shared + i * CHUNK_BYTES, Words4{0, 0, 0, 0});", ""),
    ),
    bug(
        "padding: weights read beyond the end",
        FORWARD_GRID,
        (FORWARD, "const bool exists = !L::PADDED ||", "const bool exists = true ||"),
    ),
    bug(
        "weights: gates f and g exchanged",
        FORWARD_BLOCK,
        (FORWARD, "const int gate = 2 * m + r % 2,", "const int gate = m + 2 * (r % 2),"),
    ),
    bug(
        "batch: cells beyond it",
        FORWARD_BLOCK,
        (
            FORWARD,
            "exists[group][slab] = in_batch && unit",
            "exists[group][slab] = unit",
        ),
    ),
    bug(
        "lengths: a step too many",
        FORWARD_LENGTHS,
        (
            FORWARD,
            "return C::HAS_LENGTHS ? t < length[slab]",
            "return C::HAS_LENGTHS ? t <= length[slab]",
        ),
    ),
]

BACKWARD_BUGS = [
    bug(
        "block: no barrier after the partials are put",
        BACKWARD_BLOCK,
        (REDUCE, "void sent(int) const { device::sync_block(); }", "void sent(int) const {}"),
    ),
    bug(
        "block: no barrier after da is written",
        BACKWARD_BLOCK,
        (
            BACKWARD,
            "    device::sync_block();\n\n    // What the next steps need",
            "\n    // What the next steps need",
        ),
    ),
    bug(
        "block: warps that share a sum write to one place",
        BACKWARD_BLOCK,
        (REDUCE, "shared + k_warp * L::PARTIAL_BYTES", "shared"),
    ),
    bug(
        "activations: wait one group short",
        BACKWARD_BLOCK,
        (BACKWARD, "copy_async_wait<C::STAGES - 1>()", "copy_async_wait<C::STAGES>()"),
    ),
    bug(
        "activations: no barrier of the warp after the wait",
        BACKWARD_BLOCK,
        (
            BACKWARD,
            "copy_async_wait<C::STAGES - 1>();\n    device::sync_warp();",
            "copy_async_wait<C::STAGES - 1>();",
        ),
    ),
    bug(
        "cluster: no wait",
        BACKWARD_CLUSTER,
        (REDUCE, "{ device::mbarrier_wait(mbarrier(s), (s >> 1) & 1); }", "{}"),
    ),
    bug(
        "cluster: wrong parity",
        BACKWARD_CLUSTER,
        (REDUCE, "mbarrier_wait(mbarrier(s), (s >> 1) & 1)", "mbarrier_wait(mbarrier(s), s & 1)"),
    ),
    bug(
        "cluster: bytes of one warp expected",
        BACKWARD_CLUSTER,
        (
            REDUCE,
            "(C::TEAM - 1) * C::K_WARPS * L::PARTIAL_BYTES",
            "(C::TEAM - 1) * L::PARTIAL_BYTES",
        ),
    ),
    bug(
        "cluster: one buffer for partials",
        BACKWARD_CLUSTER,
        (REDUCE, "shared + (s & 1) * (L::ADDED_PARTIALS * L::PARTIAL_BYTES)", "shared"),
    ),
    bug(
        "cluster: arrives before the lanes have stored",
        BACKWARD_CLUSTER,
        (REDUCE, "L::PARTIAL_BYTES;\n    device::sync_warp();", "L::PARTIAL_BYTES;"),
    ),
    bug(
        "cluster: no barrier of the cluster after mbarriers are initialised",
        BACKWARD_CLUSTER,
        (
            REDUCE,
            "device::mbarrier_init_fence();\n    }\n    device::sync_cluster();",
            "device::mbarrier_init_fence();\n    }\n    device::sync_block();",
        ),
    ),
    bug(
        "cluster: sent to the wrong owner",
        BACKWARD_CLUSTER,
        (REDUCE, "device::map_shared(to, owner)", "device::map_shared(to, owner ^ 1)"),
        (
            REDUCE,
            "device::map_shared(mbarrier(s), owner)",
            "device::map_shared(mbarrier(s), owner ^ 1)",
        ),
    ),
    bug(
        "grid: no acquire",
        BACKWARD_GRID,
        (REDUCE, "device::wait_acquire(flags + producer / C::K_WARPS, s + 1);", "(void)flags;"),
    ),
    bug(
        "grid: no barrier of the warp after the acquire",
        BACKWARD_GRID,
        (REDUCE, "      device::sync_warp();\n      const u8* from =", "      const u8* from ="),
    ),
    bug(
        "grid: release before all warps have stored",
        BACKWARD_GRID,
        (
            REDUCE,
            "device::sync_block();\n    if (thread == 0) device::store_release",
            "if (thread == 0) device::store_release",
        ),
    ),
    bug(
        "grid: no barrier after the partials have been read",
        BACKWARD_GRID,
        (
            REDUCE,
            "    device::sync_block();\n  }\n  DEVICE u32 partials(int) const { return shared; }",
            "  }\n  DEVICE u32 partials(int) const { return shared; }",
        ),
    ),
    bug(
        "grid: one buffer in global memory",
        BACKWARD_GRID,
        (REDUCE, "(s & 1) * C::TEAM + owner", "0 * s + owner"),
    ),
]

BUGS = FORWARD_BUGS + BACKWARD_BUGS
