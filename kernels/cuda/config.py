"""Which configuration of the kernels runs a problem.

The choice is a pure function of the problem and the device's limits: it can be tested, and what it
picks compiled (`compile_ahead`), on a machine without a GPU. See layout.cuh for teams and tiles.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from .costs import (
    THREAD_REGISTERS,
    Measurements,
    committed_measurements,
    occupancy,
    registers_beside_weights,
)
from .instance import (
    COLUMN_CHOICES,
    GROUP_UNITS,
    BackwardConfig,
    Config,
    Direction,
    Flags,
    ForwardConfig,
    Scope,
    type_name,
)
from .limits import KNOWN, DeviceLimits, known_limits

__all__ = [
    "ARCHITECTURES",
    "DIRECTIONS",
    "DTYPES",
    "KNOWN",
    "BackwardConfig",
    "Config",
    "DeviceLimits",
    "Direction",
    "Flags",
    "ForwardConfig",
    "Plan",
    "cost_us",
    "fits",
    "known_limits",
    "plan",
    "shipped_configs",
    "terms_of",
]

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INPUT_PRECISIONS = ("ieee", "tf32")
# Architectures that `compile_ahead` compiles for.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
# The first with products of bfloat16 and TF32, and asynchronous copies into shared memory.
OLDEST = 80

# Nothing but the recurrence, in training.
PLAIN = Flags()

CLUSTERS = (2, 4, 8, 16)
MAX_WARPS = 8
MAX_GROUPS = 4
MAX_ROW_TILES = 16


@dataclass(frozen=True)
class Plan:
    """A way to run a problem.

    Attributes:
        config: the kernel.
        tiles: teams for each recurrence: tiles of the batch.
        waves: rounds of teams, as far as the limits tell.
        cost_us: estimated microseconds of a time step.
        reason: the plan in words.
    """

    config: Config
    tiles: int
    waves: int
    cost_us: float
    reason: str


def terms_of(dtype: torch.dtype, input_precision: str) -> int:
    """How many products of the tensor cores make up one.

    Args:
        dtype: of the gates.
        input_precision: of float32 products, "ieee" or "tf32".

    Raises:
        ValueError: if the kernels have no such arithmetic.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    if input_precision not in INPUT_PRECISIONS:
        raise ValueError(
            f"input_precision must be one of {INPUT_PRECISIONS}, got {input_precision!r}"
        )
    return 3 if dtype == torch.float32 and input_precision == "ieee" else 1


def plan(
    direction: Direction,
    *,
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    limits: DeviceLimits,
    terms: int = 1,
    recurrences: int = 1,
    flags: Flags = PLAIN,
    measurements: Measurements | None = None,
) -> list[Plan]:
    """Lists the ways to run a problem, best first; none if there is no way.

    Of each scope, size of team and number of columns there is one.

    Args:
        direction: "forward" or "backward".
        batch: B. It counts as the next 2^n or 3 * 2^n, so that few kernels serve many batches.
        hidden: H.
        dtype: float16, bfloat16 or float32.
        limits: of the device.
        terms: products that make up one; see `terms_of`.
        recurrences: how many of them one launch holds.
        flags: what is asked of the kernel.
        measurements: corrections of the estimates; those of measured.json if None.

    Raises:
        ValueError: if `direction` or `dtype` is not one of those named here.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    if _refusal(hidden, limits) or batch < 1:
        return []
    measurements = committed_measurements() if measurements is None else measurements
    ranked = _ranked(
        direction, _bucket(batch), hidden, dtype, limits, terms, recurrences, flags, measurements
    )
    plans = []
    for config, cost in ranked:
        tiles = -(-batch // config.COLUMNS)
        waves = occupancy(config, tiles * recurrences, limits).waves
        plans.append(Plan(config, tiles, waves, cost, _reason(config, tiles, waves)))
    return plans


def cost_us(config: Config, *, batch: int, recurrences: int, limits: DeviceLimits) -> float:
    """Estimated microseconds of a time step where a configuration runs several recurrences.

    Args:
        config: the kernel.
        batch: as in `plan`.
        recurrences: as in `plan`.
        limits: as in `plan`.
    """
    teams = recurrences * -(-_bucket(batch) // config.COLUMNS)
    return committed_measurements().us_per_step(config, teams, limits)


def fits(
    hidden: int,
    dtype: torch.dtype,
    limits: DeviceLimits,
    *,
    terms: int = 1,
    flags: Flags = PLAIN,
) -> tuple[bool, str]:
    """Says whether a team of `limits` can hold the weights, forward and backward, or why not.

    Args:
        hidden: H.
        dtype: of the gates.
        limits: of the device.
        terms: see `plan`.
        flags: see `plan`.
    """
    if dtype not in DTYPES:
        return False, f"{dtype} is not one of float32, float16, bfloat16"
    refusal = _refusal(hidden, limits)
    if refusal:
        return False, refusal
    options = {"batch": 1, "hidden": hidden, "dtype": dtype, "limits": limits, "terms": terms}
    if all(plan(direction, **options, flags=flags) for direction in DIRECTIONS):
        return True, ""
    weights = 4 * hidden * hidden * dtype.itemsize
    registers = 4 * MAX_WARPS * 32 * THREAD_REGISTERS
    per_block = limits.shared_bytes + registers
    return False, (
        f"W_hh stays on chip: 4 * {hidden} * {hidden} * {dtype.itemsize} bytes = {weights} for "
        f"hidden_size={hidden} in {type_name(dtype)}, of at most {limits.multiprocessors} * "
        f"({limits.shared_bytes} of shared memory + {registers} of registers) = "
        f"{limits.multiprocessors * per_block} on {limits.arch}, which also hold the state and sums"
    )


def _refusal(hidden: int, limits: DeviceLimits) -> str:
    """Why no configuration can serve, whatever its sizes; empty if one may."""
    if limits.capability < OLDEST:
        return f"{limits.arch} is older than sm_{OLDEST}, the first with bfloat16 and TF32"
    if hidden < GROUP_UNITS or hidden % GROUP_UNITS:
        return f"hidden_size={hidden} is not a multiple of {GROUP_UNITS}"
    return ""


def _bucket(batch: int) -> int:
    """The next 2^n or 3 * 2^n."""
    power = 1 << (batch - 1).bit_length()
    return power * 3 // 4 if batch <= power * 3 // 4 else power


@functools.lru_cache(maxsize=4096)
def _ranked(
    direction: Direction,
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    limits: DeviceLimits,
    terms: int,
    recurrences: int,
    flags: Flags,
    measurements: Measurements,
) -> tuple[tuple[Config, float], ...]:
    """Configurations and what they cost, best first."""
    candidates = forward_configs if direction == "forward" else backward_configs
    best: dict[tuple[object, ...], tuple[float, Config]] = {}
    for config in _with_weights(candidates(hidden, type_name(dtype), terms, flags, limits)):
        teams = recurrences * -(-batch // config.COLUMNS)
        if config.shared_bytes > limits.shared_bytes or not occupancy(config, 1, limits).waves:
            continue
        cost = measurements.us_per_step(config, teams, limits)
        key = config.SCOPE, config.TEAM, config.COLUMNS
        if key not in best or cost < best[key][0]:
            best[key] = cost, config
    ranked = sorted(best.values(), key=lambda pair: (pair[0], pair[1].TEAM, pair[1].COLUMNS))
    return tuple((config, cost) for cost, config in ranked)


def _teams(hidden: int, units: int, limits: DeviceLimits) -> Iterator[tuple[Scope, int]]:
    """Scopes and sizes of teams whose blocks own `units` each, the last one some of them."""
    team = -(-hidden // units)
    if team == 1:
        yield "block", 1
        return
    if team in CLUSTERS and team <= limits.max_cluster:
        yield "cluster", team
    if team <= limits.multiprocessors:
        yield "grid", team


def _with_weights(configs: Iterable[Config]) -> Iterator[Config]:
    """The configurations with as many of their weights in registers as find room there."""
    for config in configs:
        room = THREAD_REGISTERS - registers_beside_weights(config)
        if room >= 0:
            tiles = min(config.k_tiles, room // config.words_of_a_tile // 2 * 2)
            yield dataclasses.replace(config, REGISTER_TILES=tiles)


def forward_configs(
    hidden: int, type: str, terms: int, flags: Flags, limits: DeviceLimits
) -> Iterator[ForwardConfig]:
    """Every division of the forward kernel's work, all weights in shared memory."""
    constants = flags.constants("forward")
    for columns, unit_warps, k_warps, groups in itertools.product(
        COLUMN_CHOICES, range(1, MAX_WARPS + 1), (1, 2, 4), range(1, MAX_GROUPS + 1)
    ):
        # Where there are more warps than slabs, two for each at most: half of them have no cells.
        if unit_warps * k_warps > MAX_WARPS or k_warps > columns // 2:
            continue
        for scope, team in _teams(hidden, unit_warps * groups * GROUP_UNITS, limits):
            yield ForwardConfig(
                TYPE=type,
                TERMS=terms,
                SCOPE=scope,
                HIDDEN=hidden,
                TEAM=team,
                COLUMNS=columns,
                UNIT_WARPS=unit_warps,
                GROUPS=groups,
                K_WARPS=k_warps,
                REGISTER_TILES=0,
                **constants,
            )


def backward_configs(
    hidden: int, type: str, terms: int, flags: Flags, limits: DeviceLimits
) -> Iterator[BackwardConfig]:
    """Every division of the backward kernel's work, all weights in shared memory."""
    constants = flags.constants("backward")
    # A block alone may own any number of units; those of a team own whole tiles of 16.
    choices = [*range(16, min(hidden, 257), 16), hidden]
    for columns, units, k_warps in itertools.product(COLUMN_CHOICES, choices, (1, 2, 4, 8)):
        for scope, team in _teams(hidden, units, limits):
            rows = team * -(-units // 16)
            row_tiles = -(-rows // (MAX_WARPS // k_warps))
            if row_tiles > MAX_ROW_TILES:
                continue
            yield BackwardConfig(
                TYPE=type,
                TERMS=terms,
                SCOPE=scope,
                HIDDEN=hidden,
                TEAM=team,
                COLUMNS=columns,
                UNITS=units,
                ROW_WARPS=-(-rows // row_tiles),
                ROW_TILES=row_tiles,
                K_WARPS=k_warps,
                REGISTER_TILES=0,
                **constants,
            )


def _reason(config: Config, tiles: int, waves: int) -> str:
    """A plan in words."""
    kib = config.shared_bytes / 1024
    if config.TEAM == 1:
        team = "one block a team"
    else:
        where = {"cluster": "a cluster", "grid": "the grid"}[config.SCOPE]
        team = f"teams of {config.TEAM} blocks in {where}"
    weights = f"{config.REGISTER_TILES} of {config.k_tiles} weight tiles in registers"
    return (
        f"{config.SCOPE} scope: {team}, {tiles} of {config.COLUMNS} columns each, {weights}, "
        f"{kib:.0f} KiB of shared memory" + (f", {waves} waves" if waves > 1 else "")
    )


# What `shipped_configs` asks `plan` for. In bfloat16, all sizes, of the smallest batch and a large
# one, in training; in inference, the sizes whose instructions are counted. In the other types, and
# with what modifies the recurrence, some of the sizes.
SHIPPED_HIDDEN = (8, 32, 64, 96, 128, 200, 256, 512, 768, 1024, 2048)
ALL_MODIFIERS = Flags(
    lengths=True,
    resets=True,
    recurrent_mask=True,
    zoneout_h=True,
    zoneout_c=True,
    cell_clip=True,
)
INFERENCE = Flags(save_activations=False, save_cells=False)


def _shipped_problems() -> Iterator[tuple[Direction, int, int, torch.dtype, int, Flags]]:
    """Direction, batch, hidden, dtype, terms and flags of the problems that are compiled ahead."""
    half, other, full = torch.bfloat16, torch.float16, torch.float32
    for direction, hidden, batch in itertools.product(DIRECTIONS, SHIPPED_HIDDEN, (1, 256)):
        yield direction, batch, hidden, half, 1, PLAIN
    for hidden in (128, 256):
        yield "forward", 256, hidden, half, 1, INFERENCE
    for direction, hidden in itertools.product(DIRECTIONS, (64, 200, 512, 1024)):
        yield direction, 64, hidden, other, 1, PLAIN
        yield direction, 64, hidden, full, 1, PLAIN
        yield direction, 64, hidden, full, 3, PLAIN
    for direction, hidden in itertools.product(DIRECTIONS, (32, 256, 1024)):
        yield direction, 64, hidden, half, 1, ALL_MODIFIERS
        yield direction, 64, hidden, full, 3, ALL_MODIFIERS
    for direction, hidden in itertools.product(DIRECTIONS, (128, 512)):
        yield direction, 64, hidden, half, 1, Flags(lengths=True)
        yield direction, 64, hidden, half, 1, Flags(packed=True)


def shipped_configs(arch: str) -> tuple[Config, ...]:
    """What `plan` picks on an architecture for a representative set of problems, each once.

    Other problems get other constants in the same code; the host compiles them when they come.

    Args:
        arch: such as "sm_90".
    """
    limits = known_limits(arch)
    picked: dict[Config, None] = {}
    for direction, batch, hidden, dtype, terms, flags in _shipped_problems():
        plans = plan(
            direction,
            batch=batch,
            hidden=hidden,
            dtype=dtype,
            limits=limits,
            terms=terms,
            flags=flags,
        )
        if plans:
            picked[plans[0].config] = None
    return tuple(picked)
