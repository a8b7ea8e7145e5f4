"""The CUDA backward kernel in the emulator, against the equations in float64.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `N` rows of a packed batch.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from fused_lstm.kernels.cuda.config import BackwardConfig
from fused_lstm.kernels.cuda.parameters import MAX_RECURRENCES, BackwardParameters
from torch import Tensor

from fused_lstm.modifiers import Modifiers
from fused_lstm.reference import recurrence_backward, recurrence_forward
from tests.budget import assert_within_budget
from tests.simt import emulator

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN = float("nan")
UNTOUCHED = 7.0


@pytest.fixture(scope="module", autouse=True)
def needs_a_compiler():
    try:
        emulator.compiler()
    except emulator.CompilerMissingError as error:
        pytest.skip(str(error))


class Gradients(NamedTuple):
    """What comes in, and what goes out; see `recurrence_backward`."""

    grad_h: Tensor | None
    grad_c: Tensor | None
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None


@dataclasses.dataclass
class Recurrence:
    """One recurrence to differentiate.

    Attributes:
        activations: [T, B, 4H] or [N, 4H].
        c: [T, B, H] or [N, H] float32.
        weight_hh: [4H, H].
        c0: [B, H], float32 if `wide`.
        gradients: of the outputs; those of final states float32 if `wide`.
        modifiers: of the recurrence; without lengths for packed rows.
        batch_sizes: [T] of packed rows, or None.
        reverse: whether time ran from T-1 to 0.
        wide: whether states and their gradients are float32.
    """

    activations: Tensor
    c: Tensor
    weight_hh: Tensor
    c0: Tensor
    gradients: Gradients
    modifiers: Modifiers
    batch_sizes: Tensor | None
    reverse: bool
    wide: bool

    def expected(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """grad_gates, grad_h0 and grad_c0 by the equations, in `dtype` or that of the tensors."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            floating = tensor is not None and tensor.is_floating_point()
            return tensor.to(dtype) if dtype and floating else tensor

        grads = (cast(g) for g in self.gradients)
        grad_h, grad_c, grad_h_n, grad_c_n = grads
        result = recurrence_backward(
            grad_h,
            grad_c,
            None,
            grad_h_n,
            grad_c_n,
            cast(self.activations),
            cast(self.c),
            cast(self.weight_hh),
            cast(self.c0),
            None,
            self.batch_sizes,
            Modifiers(*(cast(m) if isinstance(m, Tensor) else m for m in self.modifiers)),
            self.reverse,
        )
        return result[0], result[1], result[2]

    @property
    def lengths(self) -> Tensor | None:
        """[B], of packed rows, too."""
        if self.batch_sizes is None:
            return self.modifiers.lengths
        columns = torch.arange(self.c0.shape[0])
        return (self.batch_sizes.unsqueeze(-1) > columns).sum(0)

    def beyond_lengths(self) -> Tensor | None:
        """[T, B] bool: the steps that rows do not have."""
        if self.batch_sizes is not None or self.modifiers.lengths is None:
            return None
        return torch.arange(self.c.shape[0]).unsqueeze(-1) >= self.modifiers.lengths


def make_recurrence(
    dtype: torch.dtype,
    steps: int,
    batch: int,
    hidden: int,
    *,
    lengths: list[int] | None = None,
    packed: bool = False,
    resets: bool = False,
    recurrent_mask: bool = False,
    zoneout_h: torch.dtype | None = None,
    zoneout_c: torch.dtype | None = None,
    cell_clip: float | None = None,
    reverse: bool = False,
    absent: tuple[str, ...] = (),
    strided: bool = False,
    wide: bool = False,
    seed: int = 0,
) -> Recurrence:
    """A recurrence of random numbers; what no kernel may read is NaN.

    Args:
        dtype: of the elements.
        steps: T.
        batch: B.
        hidden: H.
        lengths: of the rows; for packed ones in descending order.
        packed: whether the rows are packed.
        resets: whether some states are reset.
        recurrent_mask: whether h is masked.
        zoneout_h: dtype of that mask, or None.
        zoneout_c: likewise.
        cell_clip: see `Modifiers`.
        reverse: whether time ran backwards.
        absent: gradients that are None.
        strided: whether gradients are not contiguous.
        wide: whether states are float32.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch_sizes = None
    rows: tuple[int, ...] = (steps, batch)
    if packed:
        columns = torch.arange(steps).unsqueeze(-1)
        batch_sizes = (torch.tensor(lengths) > columns).sum(1)
        rows = (int(batch_sizes.sum()),)
    modifiers = Modifiers(
        None if packed or lengths is None else torch.tensor(lengths),
        torch.rand(rows, generator=generator) < 0.25 if resets else None,
        (torch.rand(batch, hidden, generator=generator) < 0.7).to(dtype) / 0.7
        if recurrent_mask
        else None,
        *(
            None if z is None else torch.rand((*rows, hidden), generator=generator).to(z)
            for z in (zoneout_h, zoneout_c)
        ),
        cell_clip,
    )
    weight_hh = (normal(4 * hidden, hidden) * hidden**-0.5).to(dtype)
    c0 = normal(batch, hidden).to(torch.float32 if wide else dtype)
    out = recurrence_forward(
        normal(*rows, 4 * hidden).to(dtype),
        weight_hh,
        normal(batch, hidden).tanh().to(dtype),
        c0,
        None,
        batch_sizes,
        modifiers,
        reverse,
    )
    state = torch.float32 if wide else dtype

    def sequence(dtype: torch.dtype) -> Tensor:
        if strided:
            return normal(*rows, 2 * hidden).to(dtype)[..., :hidden]
        return normal(*rows, hidden).to(dtype)

    gradients = Gradients(
        grad_h=None if "grad_h" in absent else sequence(dtype),
        grad_c=None if "grad_c" in absent else sequence(torch.float32),
        grad_h_n=None if "grad_h_n" in absent else normal(batch, hidden).to(state),
        grad_c_n=None if "grad_c_n" in absent else normal(batch, hidden).to(state),
    )
    recurrence = Recurrence(
        out.activations, out.c, weight_hh, c0, gradients, modifiers, batch_sizes, reverse, wide
    )
    beyond = recurrence.beyond_lengths()
    if beyond is not None:
        unread = (out.activations, out.c, *gradients[:2], modifiers.zoneout_h, modifiers.zoneout_c)
        for tensor in unread:
            if tensor is not None:
                tensor[beyond] = NAN
    return recurrence


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def differentiate(
    config: BackwardConfig,
    recurrences: list[Recurrence],
    options: emulator.Options,
    *,
    first_tiles: tuple[int, ...] = (0,),
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Runs the kernel in the emulator.

    Args:
        config: the kernel's configuration.
        recurrences: of one launch, of the same B and H.
        options: how it is emulated.
        first_tiles: the first tile of each launch: the tiles are divided between so many.

    Returns:
        grad_gates, grad_h0 and grad_c0 of each recurrence.
    """
    assert len(recurrences) <= MAX_RECURRENCES
    kernel = emulator.build(config.source(), "backward")
    batch = recurrences[0].c0.shape[0]
    parameters = BackwardParameters(recurrences=len(recurrences), batch=batch)
    results, alive = [], []
    for r, recurrence in zip(parameters.recurrence, recurrences, strict=False):
        grad_gates = torch.full_like(recurrence.activations, NAN)
        beyond = recurrence.beyond_lengths()
        if beyond is not None:
            grad_gates[beyond] = UNTOUCHED
        state = recurrence.c0
        result = (grad_gates, torch.full_like(state, NAN), torch.full_like(state, NAN))
        results.append(result)
        r.grad_gates, r.grad_h0, r.grad_c0 = map(pointer, result)
        for name in ("activations", "c", "weight_hh", "c0"):
            setattr(r, name, pointer(getattr(recurrence, name)))
        packed = recurrence.batch_sizes is not None
        for name, tensor in zip(Gradients._fields, recurrence.gradients, strict=True):
            setattr(r, name, pointer(tensor))
            if tensor is not None and name in ("grad_h", "grad_c"):
                setattr(r, f"{name}_stride_t", 0 if packed else tensor.stride(0))
                setattr(r, f"{name}_stride_b", tensor.stride(-2))
        modifiers, given = r.modifiers, recurrence.modifiers
        lengths = recurrence.lengths
        modifiers.lengths = pointer(lengths)
        alive.append(lengths)
        r.steps = recurrence.c.shape[0]
        if recurrence.batch_sizes is not None:
            sizes = recurrence.batch_sizes
            step_rows = sizes.cumsum(0) - sizes
            modifiers.step_rows = pointer(step_rows)
            alive.append(step_rows)
            r.steps = len(sizes)
        if given.resets is not None:
            modifiers.resets = pointer(given.resets)
            modifiers.resets_stride_t = 0 if packed else given.resets.stride(0)
            modifiers.resets_stride_b = given.resets.stride(-1)
        modifiers.recurrent_mask = pointer(given.recurrent_mask)
        for name in ("zoneout_h", "zoneout_c"):
            mask = getattr(given, name)
            if mask is not None:
                setattr(modifiers, name, pointer(mask))
                setattr(modifiers, f"{name}_stride_t", 0 if packed else mask.stride(0))
                setattr(modifiers, f"{name}_stride_b", mask.stride(-2))
                setattr(modifiers, f"{name}_is_float", mask.dtype == torch.float32)
        modifiers.cell_clip = given.cell_clip or 0.0
        r.reverse, r.wide_states = recurrence.reverse, recurrence.wide
    ends = (*first_tiles[1:], -(-batch // config.COLUMNS))
    for first, end in zip(first_tiles, ends, strict=True):
        parameters.first_tile, parameters.tiles = first, end - first
        teams = len(recurrences) * (end - first)
        exchange = torch.empty(teams * config.exchange_bytes, dtype=torch.uint8)
        flags = torch.zeros(teams * config.TEAM, dtype=torch.int32)
        parameters.exchange, parameters.flags = exchange.data_ptr(), flags.data_ptr()
        kernel.launch(teams, parameters, options)
    return results


def check(
    config: BackwardConfig,
    recurrences: list[Recurrence],
    options: emulator.Options = emulator.SEARCH[0],
    first_tiles: tuple[int, ...] = (0,),
) -> None:
    """Asserts that the kernel computes what the equations say, and nothing beyond the lengths."""
    results = differentiate(config, recurrences, options, first_tiles=first_tiles)
    for recurrence, actual in zip(recurrences, results, strict=True):
        exact, native = recurrence.expected(torch.float64), recurrence.expected()
        beyond = recurrence.beyond_lengths()
        if beyond is not None:
            assert (actual[0][beyond] == UNTOUCHED).all(), "stored beyond the lengths"
            actual[0][beyond] = 0.0
        for name, a, n, e in zip(
            ("grad_gates", "grad_h0", "grad_c0"), actual, native, exact, strict=True
        ):
            if config.TYPE == "float32" and config.TERMS == 1:
                # As far from the truth as TF32, of 11 significant bits, may be.
                n = e + 2**-11 * e.abs().max()
            elif recurrence.wide:
                # What is carried is as exact as the products, whose operands are rounded.
                n = e + torch.finfo(recurrence.activations.dtype).eps * e.abs().max() / 2
            assert_within_budget(a, n, e, name)


def config_of(hidden: int, dtype: str = "bfloat16", **fields: object) -> BackwardConfig:
    """A configuration: that of a block alone, with weights in registers, unless fields differ."""
    scope = fields.pop("SCOPE", "block")
    team = fields.pop("TEAM", 1)
    units = fields.pop("UNITS", -(-hidden // 8) * 8)
    warps = fields.pop("ROW_WARPS", 2)
    row_tiles = -(-(team * -(-units // 16)) // warps)
    config = BackwardConfig(
        TYPE=dtype,
        SCOPE=scope,
        HIDDEN=hidden,
        TEAM=team,
        UNITS=units,
        ROW_WARPS=warps,
        ROW_TILES=row_tiles,
        **{"COLUMNS": 8, "K_WARPS": 1, "REGISTER_TILES": 0, **fields},
    )
    if "REGISTER_TILES" in fields:
        return config
    return dataclasses.replace(config, REGISTER_TILES=config.k_tiles)


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TEAMS = {
    "block": {},
    "cluster": {"SCOPE": "cluster", "TEAM": 2, "UNITS": 16},
    "grid": {"SCOPE": "grid", "TEAM": 2, "UNITS": 16},
}
ALL_FLAGS = {
    "HAS_LENGTHS": True,
    "HAS_RESETS": True,
    "HAS_RECURRENT_MASK": True,
    "HAS_ZONEOUT_H": True,
    "HAS_ZONEOUT_C": True,
    "HAS_CELL_CLIP": True,
}


def everything(dtype: torch.dtype) -> dict:
    """All modifiers but lengths; one mask in float32."""
    return {
        "resets": True,
        "recurrent_mask": True,
        "zoneout_h": torch.float32,
        "zoneout_c": dtype,
        "cell_clip": 0.8,
    }


@pytest.mark.parametrize(
    ("dtype", "terms", "scope"),
    [
        ("float16", 1, "block"),
        ("bfloat16", 1, "cluster"),
        ("bfloat16", 1, "grid"),
        ("float32", 1, "cluster"),
        ("float32", 3, "grid"),
    ],
)
def test_plain(dtype: str, terms: int, scope: str):
    """Both directions in one launch, with tails of the batch and of H."""
    config = config_of(24, dtype, TERMS=terms, **TEAMS[scope])
    recurrences = [
        make_recurrence(DTYPES[dtype], 4, 11, 24, seed=1),
        make_recurrence(DTYPES[dtype], 3, 11, 24, seed=2, reverse=True),
    ]
    check(config, recurrences)


@pytest.mark.parametrize("options", emulator.SEARCH[1:], ids=str)
@pytest.mark.parametrize("scope", ["cluster", "grid"])
def test_schedules(scope: str, options: emulator.Options):
    """Whatever comes first: the same bits."""
    config = config_of(24, **TEAMS[scope])
    recurrence = make_recurrence(torch.bfloat16, 5, 5, 24, seed=4)
    check(config, [recurrence], options)
    first = differentiate(config, [recurrence], emulator.SEARCH[0])[0]
    again = differentiate(config, [recurrence], options)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("scope", "packed"), [("block", False), ("block", True), ("cluster", True), ("grid", False)]
)
def test_everything(scope: str, packed: bool, reverse: bool):
    """All modifiers at once."""
    config = config_of(24, "float32", TERMS=3, PACKED=packed, **TEAMS[scope], **ALL_FLAGS)
    lengths = [5, 5, 4, 2, 2, 2, 1, 1, 1] if packed else [3, 0, 5, 1, 4, 0, 2, 5, 1, 0, 0]
    recurrence = make_recurrence(
        torch.float32,
        5,
        len(lengths),
        24,
        lengths=lengths,
        packed=packed,
        reverse=reverse,
        seed=3,
        **everything(torch.float32),
    )
    check(config, [recurrence])


@pytest.mark.parametrize(
    "fields",
    [
        {"COLUMNS": 16, "ROW_WARPS": 3, "K_WARPS": 2, "REGISTER_TILES": 2},
        {"COLUMNS": 64, "ROW_WARPS": 1, "STAGES": 2},
        {"ROW_WARPS": 1, "K_WARPS": 4, "STAGES": 4},
        {"SCOPE": "cluster", "TEAM": 2, "UNITS": 32, "REGISTER_TILES": 4, "K_WARPS": 2},
        {"SCOPE": "grid", "TEAM": 3, "UNITS": 16, "ROW_WARPS": 3, "K_WARPS": 2},
    ],
    ids=str,
)
def test_divisions_of_the_work(fields: dict):
    """Columns, warps, weights in shared memory, stages: H of 40, which divides into nothing."""
    config = config_of(40, "float16", **fields)
    check(config, [make_recurrence(torch.float16, 3, 11, 40, seed=5)])


def test_one_group_of_units():
    """The smallest H, for which fragments are half empty."""
    check(config_of(8, ROW_WARPS=1), [make_recurrence(torch.bfloat16, 6, 3, 8, seed=6)])


@pytest.mark.parametrize(
    "absent",
    [("grad_h", "grad_c"), ("grad_h_n", "grad_c_n"), ("grad_h_n",)],
    ids="+".join,
)
def test_absent_gradients(absent: tuple[str, ...]):
    """No tensor stands for zeros; others need not be contiguous."""
    recurrence = make_recurrence(torch.bfloat16, 3, 5, 16, absent=absent, strided=True, seed=7)
    check(config_of(16, ROW_WARPS=1), [recurrence])


def test_tiles_in_several_launches():
    """A launch may begin with any tile, when not all fit on the device at the same time."""
    recurrences = [make_recurrence(torch.bfloat16, 3, 27, 16, seed=s) for s in (9, 10)]
    check(config_of(16, ROW_WARPS=1), recurrences, first_tiles=(0, 1, 3))


def test_states_in_float32():
    """Between the parts of a sequence nothing is rounded."""
    config = config_of(16, "float16", ROW_WARPS=1, HAS_LENGTHS=True)
    recurrences = [
        make_recurrence(
            torch.float16, 3, 5, 16, lengths=lengths, reverse=reverse, wide=True, seed=8
        )
        for reverse, lengths in ((False, [3, 1, 0, 2, 3]), (True, [2, 0, 2, 1, 0]))
    ]
    check(config, recurrences)


def test_no_steps():
    """Rows without a step hand the gradients of their states on."""
    recurrence = make_recurrence(torch.float16, 2, 3, 16, lengths=[0, 0, 0], seed=11)
    check(config_of(16, "float16", ROW_WARPS=1, HAS_LENGTHS=True), [recurrence])


def test_infinite_weights_stay_out_of_short_rows():
    """What a row does not take part in cannot reach it, NaN neither."""
    recurrence = make_recurrence(torch.float16, 3, 4, 16, lengths=[3, 1, 0, 2], seed=12)
    recurrence.weight_hh[3, 5] = float("inf")
    config = config_of(16, "float16", ROW_WARPS=1, HAS_LENGTHS=True)
    _, grad_h0, grad_c0 = differentiate(config, [recurrence], emulator.SEARCH[0])[0]
    assert torch.equal(grad_h0[2], recurrence.gradients.grad_h_n[2])
    assert torch.equal(grad_c0[2], recurrence.gradients.grad_c_n[2])
    # The only step of row 1 reads its weights once, for grad_h0, not for its gates.
    exact = recurrence.expected(torch.float64)[2][1]
    assert_within_budget(grad_c0[1], exact.to(torch.float16), exact, "grad_c0")
