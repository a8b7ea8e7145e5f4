"""A kernel's compile-time constants, the sizes that follow from them, and its C++ source.

The sizes repeat `ForwardLayout` of layout.cuh and `BackwardLayout` of backward_layout.cuh, where
each has its reason; every instance asserts that both agree.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

__all__ = ["BackwardConfig", "Config", "Direction", "Flags", "ForwardConfig", "Scope", "type_name"]

Direction = Literal["forward", "backward"]
Scope = Literal["block", "cluster", "grid"]

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
COLUMN_CHOICES = (8, 16, 32, 64)
LANES = 32
CHUNK_BYTES = 16
K_TILE_BYTES = 32
GROUP_UNITS = 8
GATES = 4


def type_name(dtype: torch.dtype) -> str:
    """The kernels' name of a dtype: "float16", "bfloat16" or "float32"."""
    return str(dtype).removeprefix("torch.")


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Flags:
    """What a kernel is asked to do, as far as its code depends on it.

    Attributes:
        save_activations: stores the activated gates (forward only).
        save_cells: stores the cell states (forward only).
        lengths: rows have lengths; so have packed ones.
        packed: rows are those of a packed sequence.
        resets: states are set to zero before some steps.
        recurrent_mask: h is multiplied by a mask where it enters W_hh.
        zoneout_h: a part of h stays as it was.
        zoneout_c: a part of c stays as it was.
        cell_clip: c is clipped.
    """

    save_activations: bool = True
    save_cells: bool = True
    lengths: bool = False
    packed: bool = False
    resets: bool = False
    recurrent_mask: bool = False
    zoneout_h: bool = False
    zoneout_c: bool = False
    cell_clip: bool = False

    def constants(self, direction: Direction) -> dict[str, bool]:
        """The configuration's fields that say the same."""
        saved = {
            "SAVE_ACTIVATIONS": self.save_activations,
            "SAVE_CELLS": self.save_cells,
        }
        return (saved if direction == "forward" else {}) | {
            "HAS_LENGTHS": self.lengths or self.packed,
            "PACKED": self.packed,
            "HAS_RESETS": self.resets,
            "HAS_RECURRENT_MASK": self.recurrent_mask,
            "HAS_ZONEOUT_H": self.zoneout_h,
            "HAS_ZONEOUT_C": self.zoneout_c,
            "HAS_CELL_CLIP": self.cell_clip,
        }


@dataclass(frozen=True, kw_only=True)
class Config:
    """Constants that both kernels have; their names are those in C++.

    Attributes:
        TYPE: "float16", "bfloat16" or "float32": of gates, h and the products' operands.
        TERMS: products that make up one: 1, or 3 for float32 beyond TF32.
        SCOPE: how what a block computes reaches the others of its team: "block" (there
            are no others), "cluster" (through each other's shared memory) or "grid" (through the L2
            cache).
        HIDDEN: H, a multiple of 8.
        TEAM: blocks that share the hidden units of a tile of the batch.
        COLUMNS: batch rows of a tile: columns of the product's operand.
        K_WARPS: warps that share a sum.
        REGISTER_TILES: of the tiles along K of a warp's weights, those in registers, even; the
            others are in shared memory.
        STAGES: steps whose gates (backward: activations) are on chip or on their way.
        HAS_LENGTHS: see `Flags`, as for what follows.
        PACKED: likewise.
        HAS_RESETS: likewise.
        HAS_RECURRENT_MASK: likewise.
        HAS_ZONEOUT_H: likewise.
        HAS_ZONEOUT_C: likewise.
        HAS_CELL_CLIP: likewise.
    """

    TYPE: str
    TERMS: int = 1
    SCOPE: Scope
    HIDDEN: int
    TEAM: int
    COLUMNS: int
    K_WARPS: int
    REGISTER_TILES: int
    STAGES: int = 3
    HAS_LENGTHS: bool = False
    PACKED: bool = False
    HAS_RESETS: bool = False
    HAS_RECURRENT_MASK: bool = False
    HAS_ZONEOUT_H: bool = False
    HAS_ZONEOUT_C: bool = False
    HAS_CELL_CLIP: bool = False

    direction: ClassVar[Direction]

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return ELEMENT_BYTES[self.TYPE]

    @property
    def column_tiles(self) -> int:
        """Matrix tiles side by side in COLUMNS."""
        return self.COLUMNS // 8

    @property
    def warps(self) -> int:
        """Warps of a block."""
        raise NotImplementedError

    @property
    def units(self) -> int:
        """Hidden units of a block."""
        raise NotImplementedError

    @property
    def k_tiles(self) -> int:
        """Tiles along K of a warp's weights."""
        raise NotImplementedError

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold sums."""
        raise NotImplementedError

    @property
    def weight_registers(self) -> int:
        """Registers of a thread that hold weights."""
        return self.REGISTER_TILES * self.words_of_a_tile

    @property
    def words_of_a_tile(self) -> int:
        """Words that a thread has of one tile along K of its warp's weights."""
        raise NotImplementedError

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        raise NotImplementedError

    @property
    def exchange_bytes(self) -> int:
        """Global memory through which a team exchanges; 0 but in grid scope."""
        raise NotImplementedError

    @property
    def cells(self) -> int:
        """Cells of a thread."""
        raise NotImplementedError

    @property
    def modified(self) -> bool:
        """Whether anything but lengths modifies the recurrence."""
        masks = self.HAS_RECURRENT_MASK or self.HAS_ZONEOUT_H or self.HAS_ZONEOUT_C
        return masks or self.HAS_RESETS or self.HAS_CELL_CLIP

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * LANES

    @property
    def shared_tiles(self) -> int:
        """Tiles along K of a warp's weights in shared memory."""
        return self.k_tiles - self.REGISTER_TILES

    @property
    def cluster(self) -> int:
        """Blocks of a cluster; 1 without clusters."""
        return self.TEAM if self.SCOPE == "cluster" else 1

    @property
    def cooperative(self) -> bool:
        """Whether all blocks of a launch must be resident at the same time."""
        return self.SCOPE == "grid"

    @property
    def kernel_name(self) -> str:
        """The kernel's name in the compiled module."""
        return f"lstm_{self.direction}_kernel"

    def with_flags(self, flags: Flags) -> Config:
        """The same division of the work for what `flags` asks."""
        return dataclasses.replace(self, **flags.constants(self.direction))  # type: ignore[arg-type]

    def without_flags(self) -> Config:
        """The same division of the work with the flags that are the default."""
        return self.with_flags(Flags())

    @property
    def shape(self) -> dict[str, object]:
        """The constants that divide the work: all but those that `Flags` has."""
        flags = Flags().constants(self.direction)
        return {name: getattr(self, name) for name in self._fields() if name not in flags}

    def source(self) -> str:
        """The instance: a translation unit with this kernel."""
        direction = self.direction
        layout = f"{direction.capitalize()}Layout<Configuration>"
        constants = "\n".join(
            f"  static constexpr {declaration};"
            for declaration in map(self._declared, self._fields())
        )
        return f"""#include "{direction}.cuh"
struct Configuration {{
{constants}
}};
static_assert({layout}::THREADS == {self.threads}, "");
static_assert({layout}::SHARED_BYTES == {self.shared_bytes}, "");
static_assert({layout}::EXCHANGE_BYTES == {self.exchange_bytes}, "");
LSTM_{direction.upper()}_KERNEL(Configuration)
"""

    def _fields(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self)]

    def _declared(self, name: str) -> str:
        """A constant's declaration in C++."""
        value = getattr(self, name)
        if name == "TYPE":
            return f"Type TYPE = Type::{value}"
        if name == "SCOPE":
            return f"Scope SCOPE = Scope::{value}"
        if isinstance(value, bool):
            return f"bool {name} = {str(value).lower()}"
        return f"int {name} = {value}"


@dataclass(frozen=True, kw_only=True)
class ForwardConfig(Config):
    """The forward kernel: a warp owns groups of 8 hidden units, all four gates of each.

    Attributes:
        UNIT_WARPS: warps side by side in a block's units; it has UNIT_WARPS * K_WARPS.
        GROUPS: groups of 8 units of a warp.
        SAVE_ACTIVATIONS: see `Flags`.
        SAVE_CELLS: likewise.
    """

    UNIT_WARPS: int
    GROUPS: int
    SAVE_ACTIVATIONS: bool = True
    SAVE_CELLS: bool = True

    direction: ClassVar[Direction] = "forward"

    @property
    def warps(self) -> int:
        """See `Config`."""
        return self.UNIT_WARPS * self.K_WARPS

    @property
    def units(self) -> int:
        """See `Config`."""
        return self.UNIT_WARPS * self.GROUPS * GROUP_UNITS

    @property
    def k_units(self) -> int:
        """The units that the product sums over, padded."""
        tile = K_TILE_BYTES // self.element_bytes
        return round_up(self.TEAM * self.units, 2 * tile * self.K_WARPS)

    @property
    def k_tiles(self) -> int:
        """See `Config`."""
        return self.k_units * self.element_bytes // K_TILE_BYTES // self.K_WARPS

    @property
    def words_of_a_tile(self) -> int:
        """See `Config`."""
        return self.GROUPS * 2 * 4

    @property
    def accumulators(self) -> int:
        """See `Config`."""
        tiles = self.GROUPS * self.column_tiles
        return tiles * 2 * 4 * (2 if tiles == 1 else 1)

    @property
    def slab_owners(self) -> int:
        """Warps of those that share a sum that compute cells."""
        return min(self.K_WARPS, 2 * self.column_tiles)

    @property
    def cells(self) -> int:
        """Cells of a thread: one for each slab that its warp owns."""
        return self.GROUPS * (2 * self.column_tiles // self.slab_owners)

    @property
    def h_bytes(self) -> int:
        """Bytes of h of a tile, padded."""
        return self.k_units * self.COLUMNS * self.element_bytes

    @property
    def shared_bytes(self) -> int:
        """See `Config`."""
        weights = self.shared_tiles * self.GROUPS * 2 * self.threads * CHUNK_BYTES
        owners = self.slab_owners * self.UNIT_WARPS
        sums = owners * (self.K_WARPS - 1) * self.cells * LANES * GATES * 4
        ring = self.STAGES * self.warps * self.cells * LANES * GATES * self.element_bytes
        return 2 * self.h_bytes + weights + sums + ring + 16

    @property
    def exchange_bytes(self) -> int:
        """See `Config`."""
        return 2 * self.h_bytes if self.SCOPE == "grid" else 0


@dataclass(frozen=True, kw_only=True)
class BackwardConfig(Config):
    """The backward kernel: a warp owns 16-row tiles of dh, of all the team's units.

    Attributes:
        UNITS: hidden units of a block: a multiple of 16, or of 8 without others in the team.
        ROW_WARPS: warps side by side in the rows of dh; a block has ROW_WARPS * K_WARPS.
        ROW_TILES: tiles of 16 rows of a warp.
    """

    UNITS: int
    ROW_WARPS: int
    ROW_TILES: int

    direction: ClassVar[Direction] = "backward"

    @property
    def warps(self) -> int:
        """See `Config`."""
        return self.ROW_WARPS * self.K_WARPS

    @property
    def units(self) -> int:
        """See `Config`."""
        return self.UNITS

    @property
    def unit_tiles(self) -> int:
        """Tiles of 16 rows of a block's own units."""
        return -(-self.UNITS // 16)

    @property
    def fragments(self) -> int:
        """Tiles of the product that are a block's own: 16 units, 8 columns."""
        return self.unit_tiles * self.column_tiles

    @property
    def k_chunks(self) -> int:
        """Chunks along K, the gates of a block's units, padded."""
        chunk_units = CHUNK_BYTES // self.element_bytes // GATES
        return round_up(self.unit_tiles * 16 // chunk_units, 4 * self.K_WARPS)

    @property
    def k_tiles(self) -> int:
        """See `Config`."""
        return self.k_chunks // 2 // self.K_WARPS

    @property
    def words_of_a_tile(self) -> int:
        """See `Config`."""
        return self.ROW_TILES * 4

    @property
    def pass_tiles(self) -> int:
        """Tiles of columns that a warp multiplies at a time."""
        room = {1: 8, 2: 4, 3: 2, 4: 2}.get(self.ROW_TILES, 1)
        return min(self.column_tiles, room)

    @property
    def sums(self) -> int:
        """Sets of sums."""
        return max(1, min(4 // (self.ROW_TILES * self.pass_tiles), self.k_tiles // 2))

    @property
    def accumulators(self) -> int:
        """See `Config`."""
        return self.ROW_TILES * self.pass_tiles * 4 * self.sums

    @property
    def cells(self) -> int:
        """Cells of a thread."""
        slabs = 4 * self.fragments
        share = 4 if slabs >= 4 * self.warps else 2 if slabs >= 2 * self.warps else 1
        return -(-(slabs // share) // self.warps) * share

    @property
    def partial_bytes(self) -> int:
        """What one warp's part of K contributes to the sums of a block's own units."""
        return self.fragments * LANES * CHUNK_BYTES

    @property
    def producers(self) -> int:
        """How many partials are added up for a block."""
        return self.TEAM * self.K_WARPS

    @property
    def shared_bytes(self) -> int:
        """See `Config`."""
        added = self.producers
        if self.SCOPE == "grid":
            added = max(1, min(self.warps // self.fragments, added))
        partials = (2 if self.SCOPE == "cluster" else 1) * added * self.partial_bytes
        operand = self.k_chunks * (self.COLUMNS + 1) * CHUNK_BYTES
        weights = self.shared_tiles * self.ROW_TILES * self.threads * CHUNK_BYTES
        ring = self.STAGES * self.warps * self.cells * LANES * GATES * self.element_bytes
        return partials + operand + weights + ring + 16

    @property
    def exchange_bytes(self) -> int:
        """See `Config`."""
        if self.SCOPE != "grid":
            return 0
        return 2 * self.TEAM * self.producers * self.partial_bytes
