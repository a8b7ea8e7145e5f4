"""How long a step takes: a small model, corrected by what has been measured.

The model counts, for one block and one time step, cycles of what blocks that share a multiprocessor
share too (the *work*), and of what they wait for, each by itself (the *latency*). It is there to
put configurations in an order, not to predict: figures of a GPU go into measured.json.

measured.json holds `{"schema": 1, "measurements": [...]}`, each of these an object with

    arch          "sm_90"
    direction     "forward" or "backward"
    config        the constants that divide the work: those of `Config.shape`, all of them
    us_per_step   microseconds of one time step of one launch whose teams are all resident

A measured configuration costs what was measured. Others of the same architecture, direction and
scope cost what the model says times the median of measured over modelled.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from .instance import GATES, BackwardConfig, Config, ForwardConfig
from .limits import DeviceLimits, known_limits

__all__ = [
    "THREAD_REGISTERS",
    "Measurements",
    "Occupancy",
    "committed_measurements",
    "occupancy",
    "registers_beside_weights",
    "us_per_step",
]

SCHEMA = 1
MEASURED_FILE = pathlib.Path(__file__).with_name("measured.json")

CYCLES_PER_US = 1700
# Of a multiprocessor, and the most that one thread may have.
REGISTERS = 65_536
THREAD_REGISTERS = 255
# Microseconds until what the slowest block has stored is seen by all of the team.
EXCHANGE_US = {"block": 0.1, "cluster": 0.35, "grid": 1.2}
# Bytes that a multiprocessor moves in a cycle: of its shared memory, of that of its peers or the L2
# cache, and of device memory, alone and when all do.
SHARED_RATE, EXCHANGE_RATE, MEMORY_RATE, MEMORY_SHARE = 128, 24, 48, 14
SPECIAL_FUNCTIONS_RATE = 16
# Cycles until a product's result can enter the next one.
PRODUCT_LATENCY = 25
# Cycles between two products of a scheduler (a quarter of a multiprocessor), by generation.
PRODUCT_INTERVAL = {80: 8, 86: 16, 87: 16, 89: 16, 90: 4, 100: 4}
# From the last sum to the next operand in shared memory: activations one after another, stores.
POINTWISE_LATENCY = {"forward": 250, "backward": 220}
# Instructions of a warp for the cells of a slab, and what special functions a cell takes.
CELL_INSTRUCTIONS = {"forward": 55, "backward": 80}
SPECIAL_FUNCTIONS = {
    ("forward", "bfloat16"): 6,
    ("forward", "float16"): 10,
    ("forward", "float32"): 12,
    ("backward", "bfloat16"): 1,
    ("backward", "float16"): 2,
    ("backward", "float32"): 3,
}


@dataclass(frozen=True)
class Occupancy:
    """How teams fill a GPU.

    Attributes:
        waves: rounds of teams, one after another.
        blocks: of one multiprocessor, at the same time.
    """

    waves: int
    blocks: int


def registers_beside_weights(config: Config) -> int:
    """About how many registers a thread needs that hold no weights.

    Fitted to what the compiler needs not to spill, as `compile_ahead` reports it.
    """
    several = config.column_tiles > 1
    grid = config.SCOPE == "grid"
    if isinstance(config, ForwardConfig):
        needed = 15 + 10 * config.cells + config.accumulators
        needed += 12 if grid else 0
        needed += 8 if config.HAS_LENGTHS else 0
        needed += 36 if config.modified else 0
        # What does not exist is not loaded.
        if config.k_units != config.HIDDEN:
            needed += (16 if config.TYPE == "float32" else 8) + 16 * config.GROUPS
        split = config.K_WARPS > 1
        # Sums on their way to and from other warps.
        needed += config.accumulators * max(2, config.column_tiles) if split else 0
        # Operands in two parts, those of the weights for all columns at once.
        if config.TERMS == 3:
            needed += 40 if config.GROUPS * config.column_tiles == 1 else 96
            needed += (100 if several else 60) if split else 0
        return needed
    assert isinstance(config, BackwardConfig)
    needed = 25 + 10 * config.cells
    needed += 8 if config.HAS_LENGTHS else 0
    needed += 16 + 8 * config.cells if config.modified else 0
    needed += 16 if config.TYPE == "float32" else 0
    needed += 12 + 8 * config.ROW_TILES if config.TERMS == 3 else 0
    needed += 24 if config.TEAM * config.UNITS != config.HIDDEN else 0
    # Adding up what comes through the L2 cache.
    needed += 0 if not grid else 150 if several else 24 * config.TERMS
    # Of many sums most live no longer than the product.
    return max(needed + min(config.accumulators, 32), 56 + config.accumulators)


def registers_of(config: Config) -> int:
    """About how many registers a thread takes."""
    return min(THREAD_REGISTERS, registers_beside_weights(config) + config.weight_registers)


def occupancy(config: Config, teams: int, limits: DeviceLimits) -> Occupancy:
    """How `teams` teams run, 0 waves if not even one can."""
    # The driver keeps 1 KiB of each block's shared memory.
    memory = (limits.shared_bytes + 1024) // (config.shared_bytes + 1024)
    blocks = min(
        memory, REGISTERS // (registers_of(config) * config.threads), 2048 // config.threads
    )
    resident = limits.multiprocessors // config.TEAM
    if config.SCOPE == "cluster":
        # A cluster lies within a group of multiprocessors, and these have uneven sizes.
        resident -= config.TEAM >= 8
        if limits.max_cluster < config.TEAM:
            return Occupancy(0, 0)
    if resident < 1 or blocks < 1:
        return Occupancy(0, 0)
    blocks = min(blocks, -(-teams // resident))
    return Occupancy(-(-teams // (resident * blocks)), blocks)


def us_per_step(config: Config, teams: int, limits: DeviceLimits) -> float:
    """Microseconds of one time step by the model, all waves together."""
    place = occupancy(config, teams, limits)
    if isinstance(config, ForwardConfig):
        counts = _forward(config)
    else:
        assert isinstance(config, BackwardConfig)
        counts = _backward(config)
    products, chain, shared, exchanged, memory, instructions = counts
    warps = -(-config.warps // 4)
    interval = PRODUCT_INTERVAL.get(limits.capability, 16 if limits.capability > 100 else 8)
    cells = config.units * config.COLUMNS
    special = cells * SPECIAL_FUNCTIONS[config.direction, config.TYPE] / SPECIAL_FUNCTIONS_RATE
    # Several blocks' work overlaps; within a block one phase waits for another.
    work = max(
        products * warps * interval,
        shared / SHARED_RATE,
        warps * instructions,
        special,
        memory / MEMORY_RATE,
    )
    work = place.blocks * (work + exchanged / EXCHANGE_RATE)
    active = -(-teams // place.waves) * config.TEAM
    work = max(work, memory * active / (MEMORY_SHARE * limits.multiprocessors))
    latency = max(0, chain * PRODUCT_LATENCY - products * warps * interval)
    latency += POINTWISE_LATENCY[config.direction] + (60 if config.K_WARPS > 1 else 0)
    # What a large team wins by little, it takes from what else the GPU has to do.
    crowd = 1 + 0.02 * math.log2(config.TEAM)
    return place.waves * crowd * (EXCHANGE_US[config.SCOPE] + (work + latency) / CYCLES_PER_US)


def _split_instructions(config: Config, operands: float) -> float:
    """Instructions that round a warp's float32 operands to TF32, or split them into two."""
    if config.TYPE != "float32":
        return 0
    return operands * (4 if config.TERMS == 3 else 0)


def _forward(config: ForwardConfig) -> tuple[float, float, float, float, float, float]:
    """Of a warp: products, those in a chain, instructions; of a block: bytes of three kinds.

    Returns:
        products, chain, bytes of shared memory, bytes exchanged, bytes of device memory,
        instructions.
    """
    tiles, groups, columns = config.k_tiles, config.GROUPS, config.column_tiles
    products = tiles * groups * 2 * columns * config.TERMS
    sets = 2 if groups * columns == 1 else 1
    chain = tiles * config.TERMS / sets
    weights = config.shared_tiles * groups * 2
    reads = config.warps * (tiles * columns * 256 + weights * 512)
    own = config.units * config.COLUMNS
    h = config.h_bytes
    exchanged = 0 if config.SCOPE == "block" else h
    rows = GATES * config.element_bytes * (1 + config.SAVE_ACTIVATIONS) + config.element_bytes
    memory = own * (rows + 4 * config.SAVE_CELLS)
    slabs = config.cells * (0.5 if config.slab_owners < config.K_WARPS else 1)
    instructions = (
        products
        + tiles / 2 * columns
        + weights
        + _split_instructions(config, tiles * (groups * 8 + columns * 2))
        + slabs * CELL_INSTRUCTIONS["forward"]
    )
    return products, chain, reads, exchanged, memory, instructions


def _backward(config: BackwardConfig) -> tuple[float, float, float, float, float, float]:
    """As `_forward`."""
    tiles, rows, columns = config.k_tiles, config.ROW_TILES, config.column_tiles
    products = tiles * rows * columns * config.TERMS
    passes = -(-columns // config.pass_tiles)
    chain = passes * tiles * config.TERMS / config.sums
    weights = config.shared_tiles * rows * passes
    partial = config.partial_bytes * config.producers
    reads = config.warps * (tiles * columns * 256 + weights * 512) + 2 * partial
    exchanged = 0 if config.SCOPE == "block" else 2 * partial
    own = config.units * config.COLUMNS
    memory = own * (2 * GATES * config.element_bytes + config.element_bytes + 8)
    instructions = (
        products
        + tiles / 2 * columns
        + weights
        + _split_instructions(config, tiles * (rows * 4 + columns * 2))
        + rows * columns * 4
        + config.cells * (CELL_INSTRUCTIONS["backward"] + config.TEAM * config.K_WARPS)
    )
    return products, chain, reads, exchanged, memory, instructions


class Measurements:
    """A table of measurements, and what it says of configurations that are not in it."""

    def __init__(self, table: Mapping[str, object]) -> None:
        """Takes a table as measured.json holds it.

        Raises:
            ValueError: if it is not as the module's text says.
        """
        if not isinstance(table, Mapping) or set(table) != {"schema", "measurements"}:
            raise ValueError('measured.json: expected the keys "schema" and "measurements"')
        if table["schema"] != SCHEMA:
            raise ValueError(f"measured.json: expected schema {SCHEMA}, got {table['schema']!r}")
        entries = table["measurements"]
        if not isinstance(entries, list):
            raise ValueError('measured.json: "measurements" must be a list')
        self._measured: dict[tuple[str, Config], float] = {}
        for number, entry in enumerate(entries):
            try:
                arch, config, us = _measurement(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"measured.json: measurement {number}: {error}") from error
            if (arch, config) in self._measured:
                raise ValueError(f"measured.json: measurement {number} is there twice")
            self._measured[arch, config] = us
        ratios: dict[tuple[str, str, str], list[float]] = {}
        for (arch, config), us in self._measured.items():
            modelled = us_per_step(config, 1, known_limits(arch))
            ratios.setdefault((arch, config.direction, config.SCOPE), []).append(us / modelled)
        self._factors = {key: statistics.median(values) for key, values in ratios.items()}

    def us_per_step(self, config: Config, teams: int, limits: DeviceLimits) -> float:
        """Microseconds of one time step, measured, or modelled and corrected."""
        measured = self._measured.get((limits.arch, config.without_flags()))
        if measured is not None:
            return measured * occupancy(config, teams, limits).waves
        factor = self._factors.get((limits.arch, config.direction, config.SCOPE), 1.0)
        return factor * us_per_step(config, teams, limits)


def _measurement(entry: object) -> tuple[str, Config, float]:
    """Architecture, configuration and microseconds of an entry."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"expected an object, got {entry!r}")
    expected = {"arch", "direction", "config", "us_per_step"}
    if set(entry) != expected:
        raise ValueError(f"expected the keys {sorted(expected)}, got {sorted(entry)}")
    directions = {"forward": ForwardConfig, "backward": BackwardConfig}
    if entry["direction"] not in directions:
        raise ValueError(f"direction must be one of {list(directions)}, got {entry['direction']!r}")
    config = directions[entry["direction"]](**entry["config"])
    if set(entry["config"]) != set(config.shape):
        raise ValueError(f"config must have {sorted(config.shape)}, and nothing else")
    us = entry["us_per_step"]
    if isinstance(us, bool) or not isinstance(us, (int, float)) or not us > 0:
        raise ValueError(f"us_per_step must be a positive number, got {us!r}")
    if not isinstance(entry["arch"], str) or not entry["arch"].startswith("sm_"):
        raise ValueError(f'arch must be a name such as "sm_90", got {entry["arch"]!r}')
    return entry["arch"], config.without_flags(), float(us)


@functools.cache
def committed_measurements() -> Measurements:
    """Those of measured.json."""
    return Measurements(json.loads(MEASURED_FILE.read_text(encoding="utf-8")))
