"""The host code of the CUDA kernels, in the emulator, against the recurrence in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch
from fused_lstm.kernels.cuda import (
    BackwardProblem,
    ForwardProblem,
    KernelUnavailableError,
    launch,
    lstm_backward,
    lstm_backward_many,
    lstm_forward,
    lstm_forward_many,
)
from fused_lstm.kernels.cuda.config import BackwardConfig, ForwardConfig, known_limits

from fused_lstm.modifiers import Modifiers
from fused_lstm.reference import recurrence_backward, recurrence_forward

from ..budget import assert_within_budget
from ..simt.emulator import CompilerMissingError, EmulatedExecutor, Options, compiler

try:
    compiler()
except CompilerMissingError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN = float("nan")
NAMES = ["h", "c", "activations", "h_n", "c_n", "dgates", "dh0", "dc0"]
PER_STEP = ["resets", "zoneout_h", "zoneout_c"]


@pytest.fixture(autouse=True)
def executor(monkeypatch):
    """The emulator in place of the GPU."""
    emulated = EmulatedExecutor(Options("random", "sometimes", 1))
    monkeypatch.setattr(launch, "executor_for", lambda device: emulated)
    return emulated


def make_inputs(T, B, H, dtype, batch_sizes=None, seed=0):
    """Gates, weight_hh, h0, c0; gradients of h, c, h_n, c_n; every modifier."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, dtype=dtype):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (x * scale).to(dtype)

    def bernoulli(p, *shape):
        return torch.rand(*shape, generator=generator).lt(p)

    leading = (T, B) if batch_sizes is None else (int(batch_sizes.sum()),)
    inputs = [normal(*leading, 4 * H), normal(4 * H, H, scale=H**-0.5), normal(B, H), normal(B, H)]
    grads = [normal(*leading, H), normal(*leading, H, dtype=torch.float32)]
    grads += [normal(B, H), normal(B, H)]
    modifiers = {
        "resets": bernoulli(0.3, *leading),
        "recurrent_mask": bernoulli(0.7, B, H).to(dtype) / 0.7,
        # A mask, as in training, of the gates' dtype; and all of [0, 1] in the state's.
        "zoneout_h": bernoulli(0.4, *leading, H).to(dtype),
        "zoneout_c": torch.rand(*leading, H, generator=generator),
        "cell_clip": 0.7,
    }
    if batch_sizes is None:
        modifiers["lengths"] = torch.randint(T + 1, (B,), generator=generator)
        modifiers["lengths"][:2] = torch.tensor([T, 0])[:B]
    return inputs, grads, modifiers


def ours(inputs, grads, modifiers, **options):
    """All results, forward and backward."""
    configs = {key: options.pop(key, None) for key in ("forward", "backward")}
    out = lstm_forward(*inputs, **modifiers, **options, config=configs["forward"])
    _, weight_hh, _, c0 = inputs
    gradients = lstm_backward(
        *grads, out[2], out[1], weight_hh, c0, **modifiers, **options, config=configs["backward"]
    )
    return [*out, *gradients]


def plain(inputs, grads, modifiers, dtype, batch_sizes=None, reverse=False):
    """The same by the reference, computed in `dtype`."""

    def converted(x):
        return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x

    inputs, grads = [converted(x) for x in inputs], [converted(x) for x in grads]
    packed = Modifiers(**{name: converted(x) for name, x in modifiers.items()})
    out = recurrence_forward(*inputs, None, batch_sizes, packed, reverse)
    grad_h, grad_c, grad_h_n, grad_c_n = grads
    _, weight_hh, _, c0 = inputs
    gradients = recurrence_backward(
        grad_h, grad_c, None, grad_h_n, grad_c_n, out.activations, out.c, weight_hh, c0, None,
        batch_sizes, packed, reverse,
    )  # fmt: skip
    return [*out, *gradients[:3]]


def native(inputs, grads, modifiers, dtype, batch_sizes, reverse, orders=4):
    """What `plain` returns in `dtype`, element by element the worst of several orders of units."""
    H = inputs[2].shape[-1]
    exact = plain(inputs, grads, modifiers, torch.float64, batch_sizes, reverse)
    generator = torch.Generator().manual_seed(0)
    results = []
    for order in (torch.randperm(H, generator=generator) for _ in range(orders)):

        def ordered(x, order=order):
            """The hidden units of x, or of each of its gates, in that order."""
            return None if x is None else x.unflatten(-1, (-1, H))[..., order].flatten(-2)

        gates, weight_hh, h0, c0 = inputs
        own = [ordered(gates), ordered(ordered(weight_hh).T).T, ordered(h0), ordered(c0)]
        of_units = ("recurrent_mask", "zoneout_h", "zoneout_c")
        masks = {n: ordered(x) if n in of_units else x for n, x in modifiers.items()}
        out = plain(own, [ordered(g) for g in grads], masks, dtype, batch_sizes, reverse)
        results.append([ordered(x, order.argsort()) for x in out])
    worst = []
    for truth, *candidates in zip(exact, *results, strict=True):
        every = torch.stack(candidates)
        farthest = (every.double() - truth).abs().argmax(0, keepdim=True)
        worst.append(every.gather(0, farthest)[0])
    return worst


def check(inputs, grads, modifiers, native_dtype=None, **options):
    """All results are within the budget of the reference in the same dtype; returned."""
    dtype = inputs[0].dtype
    actual = ours(inputs, grads, modifiers, **options)
    order = {"batch_sizes": options.get("batch_sizes"), "reverse": options.get("reverse", False)}
    exact = plain(inputs, grads, modifiers, torch.float64, **order)
    theirs = native(inputs, grads, modifiers, native_dtype or dtype, *order.values())
    for name, a, n, e in zip(NAMES, actual, theirs, exact, strict=True):
        assert a.dtype == (torch.float32 if name == "c" else dtype), name
        assert a.is_contiguous(), name
        if name == "c":
            # Kept in float32, of activations that are as exact as their 16 bits.
            n = n.to(dtype)
        assert_within_budget(a, n, e, name)
    return actual


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_lengths_and_everything_that_modifies_the_recurrence(reverse):
    inputs, grads, modifiers = make_inputs(4, 5, 24, torch.float32)
    actual = check(inputs, grads, modifiers, reverse=reverse)
    steps = torch.arange(4)[:, None]
    nothing = steps >= modifiers["lengths"]
    for name, a in zip(NAMES, actual, strict=True):
        if name in ("h", "c", "activations", "dgates"):
            assert not a[nothing].any(), name
    absent = modifiers["lengths"] == 0
    for a, expected in zip(actual[3:5] + actual[6:], [*inputs[2:], *grads[2:]], strict=True):
        assert torch.equal(a[absent], expected[absent])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_rows_and_everything_that_modifies_the_recurrence(reverse):
    batch_sizes = torch.tensor([10, 9, 9, 4, 1])
    inputs, grads, modifiers = make_inputs(5, 10, 24, torch.float32, batch_sizes)
    check(inputs, grads, modifiers, batch_sizes=batch_sizes, reverse=reverse)


def test_nothing_past_a_length_is_read():
    inputs, grads, modifiers = make_inputs(4, 5, 24, torch.float32)
    clean = ours(inputs, grads, modifiers)
    nothing = torch.arange(4)[:, None] >= modifiers["lengths"]
    for x in (inputs[0], *grads[:2], *(modifiers[name] for name in PER_STEP)):
        x[nothing] = NAN if x.is_floating_point() else True
    dirty = ours(inputs, grads, modifiers)
    for name, a, b in zip(NAMES, clean, dirty, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("T", "B"), [(1, 1), (3, 9), (6, 20)], ids=str)
def test_shapes(T, B):
    inputs, grads, _ = make_inputs(T, B, 24, torch.bfloat16)
    check(inputs, grads, {}, reverse=B == 9)


def test_tf32():
    inputs, grads, _ = make_inputs(3, 4, 8, torch.float32)
    # TF32 has the precision of float16, and operands that it rounds as well.
    rounded = [x.to(torch.float16).float() for x in inputs]
    check(rounded, grads, {}, native_dtype=torch.float16, input_precision="tf32")


def strided(x, order):
    """x with its dimensions in another order in memory."""
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


def test_strides_are_read_where_they_can_be(monkeypatch):
    inputs, grads, _ = make_inputs(3, 9, 24, torch.bfloat16)
    expected = ours(inputs, grads, {})
    gates, weight_hh, h0, c0 = inputs
    grad_h, grad_c, grad_h_n, _ = grads
    wide = torch.cat([gates, gates], dim=-1)
    copied = []
    copy = launch._copy
    monkeypatch.setattr(launch, "_copy", lambda x: copied.append(tuple(x.shape)) or copy(x))
    others = [
        # Rows on 16 bytes, in any order: batch first, and every other one of a row twice as long.
        ([strided(gates, [1, 0, 2]), weight_hh, h0, c0], grads, []),
        ([wide[..., : 4 * 24], weight_hh, h0, c0], [strided(grad_h, [1, 0, 2]), *grads[1:]], []),
        # What is neither on 16 bytes nor dense.
        ([strided(gates, [0, 2, 1]), weight_hh, h0, c0], grads, []),
        (
            [gates, strided(weight_hh, [1, 0]), torch.cat([h0, h0], 1)[:, :24], c0],
            [grad_h, strided(grad_c, [2, 0, 1]), strided(grad_h_n, [1, 0]), grads[3]],
            [(96, 24), (9, 24), (9, 24), (96, 24)],
        ),
    ]
    for own, own_grads, copies in others:
        copied.clear()
        actual = ours(own, own_grads, {})
        assert copied == copies
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            assert torch.equal(a, e), name
    # A row that begins between two boundaries.
    memory = torch.empty(gates.numel() + 1, dtype=gates.dtype)
    unaligned = memory[1:].view(gates.shape).copy_(gates)
    assert unaligned.data_ptr() % 16
    copied.clear()
    assert torch.equal(lstm_forward(unaligned, weight_hh, h0, c0)[0], expected[0])
    assert copied == [tuple(gates.shape)]


def test_expanded_masks_and_gradients():
    """In evaluation zoneout is one row for all, with strides of 0."""
    inputs, grads, modifiers = make_inputs(4, 5, 24, torch.float32)
    modifiers["zoneout_h"] = torch.full((24,), 0.25).expand(4, 5, 24)
    modifiers["zoneout_c"] = torch.full((5, 24), 0.125).expand(4, 5, 24)
    modifiers["resets"] = torch.tensor([0, 1, 0, 0]).bool()[:, None].expand(4, 5)
    grads[0] = grads[0][:1, :1].expand(4, 5, 24)
    check(inputs, grads, modifiers)


def test_missing_gradients_are_zeros():
    inputs, grads, _ = make_inputs(3, 9, 24, torch.bfloat16)
    for missing in ([0, 2], [1, 3], [0, 1, 2, 3]):
        own = [None if k in missing else g for k, g in enumerate(grads)]
        zeros = [torch.zeros_like(g) if k in missing else g for k, g in enumerate(grads)]
        for name, a, b in zip(NAMES, ours(inputs, own, {}), ours(inputs, zeros, {}), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("save", [(False, False), (True, False)], ids=str)
def test_what_is_not_saved_is_empty(save):
    inputs, _, _ = make_inputs(3, 9, 24, torch.bfloat16)
    full = lstm_forward(*inputs)
    activations, cells = save
    h, c, a, h_n, c_n = lstm_forward(*inputs, save_activations=activations, save_cells=cells)
    assert c.dtype == torch.float32
    assert c.shape == (0,)
    assert torch.equal(a, full[2]) if activations else a.shape == (0,)
    for result, expected in zip((h, h_n, c_n), (full[0], *full[3:]), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(("T", "B", "H"), [(0, 2, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_to_do(executor, T, B, H):
    (gates, weight_hh, h0, c0), grads, _ = make_inputs(T, B, max(H, 1), torch.float32)
    if H == 0:
        gates, weight_hh, h0, c0 = gates[..., :0], weight_hh[:0, :0], h0[:, :0], c0[:, :0]
        grads = [g[..., :0] for g in grads]
    h, c, activations, h_n, c_n = lstm_forward(gates, weight_hh, h0, c0)
    assert h.shape == c.shape == (T, B, H)
    assert activations.shape == (T, B, 4 * H)
    assert torch.equal(h_n, h0)
    assert torch.equal(c_n, c0)
    assert h_n is not h0
    dgates, dh0, dc0 = lstm_backward(*grads, activations, c, weight_hh, c0)
    assert dgates.shape == gates.shape
    assert torch.equal(dh0, grads[2])
    assert torch.equal(dc0, grads[3])
    _, dh0, dc0 = lstm_backward(*[None] * 4, activations, c, weight_hh, c0)
    assert not dh0.any()
    assert not dc0.any()
    assert not executor.launches


def test_recurrences_side_by_side(executor):
    """Two directions, with different numbers of steps, in one launch; nine take two."""
    problems, backward, expected = [], [], []
    for T, reverse in (3, False), (5, True):
        inputs, grads, _ = make_inputs(T, 9, 24, torch.bfloat16, seed=T)
        expected.append(ours(inputs, grads, {}, reverse=reverse))
        problems.append(ForwardProblem(*inputs, reverse=reverse))
        _, c, activations = expected[-1][:3]
        backward.append(
            BackwardProblem(*grads, activations, c, inputs[1], inputs[3], reverse=reverse)
        )
    executor.launches.clear()
    forward_results = lstm_forward_many(problems)
    backward_results = lstm_backward_many(backward)
    assert [launched.teams for launched in executor.launches] == [4, 4]
    for out, gradients, results in zip(forward_results, backward_results, expected, strict=True):
        for name, a, b in zip(NAMES, [*out, *gradients], results, strict=True):
            assert torch.equal(a, b), name
    executor.launches.clear()
    many = lstm_forward_many([problems[0]] * 9)
    assert [launched.teams for launched in executor.launches] == [16, 2]
    assert all(torch.equal(out[0], expected[0][0]) for out in many)
    assert lstm_forward_many([]) == lstm_backward_many([]) == []
    with pytest.raises(ValueError, match="recurrences of one launch must be alike"):
        lstm_forward_many([problems[0], problems[1]._replace(lengths=torch.ones(9).long())])


@pytest.mark.parametrize("with_lengths", [False, True], ids=["all", "lengths"])
def test_results_go_where_they_are_to_go(with_lengths):
    """Parts of tensors of a longer sequence, full of NaN."""
    (gates, weight_hh, h0, c0), grads, modifiers = make_inputs(3, 2, 8, torch.bfloat16)
    lengths = modifiers["lengths"] if with_lengths else None
    expected = lstm_forward(gates, weight_hh, h0, c0, lengths=lengths)
    whole = [torch.full((5, *x.shape[1:]), NAN, dtype=x.dtype) for x in expected[:3]]
    given = [x[1:4] for x in whole]
    problem = ForwardProblem(
        gates, weight_hh, h0, c0, lengths=lengths, out_h=given[0], out_c=given[1],
        out_activations=given[2],
    )  # fmt: skip
    (results,) = lstm_forward_many([problem])
    for tensor, room, all_steps, right in zip(results, given, whole, expected, strict=False):
        assert tensor is room
        assert torch.equal(tensor, right)
        assert all_steps[::4].isnan().all()
    (unsaved,) = lstm_forward_many(
        [problem._replace(out_c=torch.empty(0), out_activations=None)],
        save_cells=False,
        save_activations=False,
    )
    assert torch.equal(unsaved[0], expected[0])

    _, c, activations, *_ = expected
    right = lstm_backward(*grads, activations, c, weight_hh, c0, lengths=lengths)
    whole_dgates = torch.full((5, *activations.shape[1:]), NAN, dtype=activations.dtype)
    backward = BackwardProblem(
        *grads, activations, c, weight_hh, c0, lengths=lengths, out_dgates=whole_dgates[1:4]
    )
    (gradients,) = lstm_backward_many([backward])
    assert gradients[0].data_ptr() == whole_dgates[1].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(gradients, right, strict=True))
    assert whole_dgates[::4].isnan().all()


@pytest.mark.parametrize(
    "room",
    [
        torch.empty(3, 2, 9, dtype=torch.bfloat16),
        torch.empty(3, 2, 8),
        torch.empty(3, 2, 16, dtype=torch.bfloat16)[..., ::2],
        torch.empty(49, dtype=torch.bfloat16)[1:].view(3, 2, 8),
        torch.empty(3, 2, 8, dtype=torch.bfloat16, device="meta"),
    ],
    ids=["shape", "dtype", "strides", "alignment", "device"],
)
def test_results_do_not_go_where_they_do_not_fit(room):
    inputs, _, _ = make_inputs(3, 2, 8, torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"a result of \[3, 2, 8\], torch.bfloat16 on cpu is to go"
    ):
        lstm_forward_many([ForwardProblem(*inputs, out_h=room)])


def test_parts_of_a_sequence_pass_states_on_in_float32():
    """Two parts are the whole, bit for bit, forward and backward."""
    inputs, grads, _ = make_inputs(5, 9, 24, torch.bfloat16)
    gates, weight_hh, h0, c0 = inputs
    h, c, activations, h_n, c_n, dgates, dh0, dc0 = ours(inputs, grads, {})
    options = {"wide_states": True}
    (first,) = lstm_forward_many([ForwardProblem(gates[:2], weight_hh, h0, c0)], **options)
    rest = ForwardProblem(gates[2:], weight_hh, first[3], first[4])
    (second,) = lstm_forward_many([rest], **options)
    assert first[4].dtype == second[4].dtype == torch.float32
    for parts, whole in zip(
        zip(first[:3], second[:3], strict=True), (h, c, activations), strict=True
    ):
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(second[3], h_n)
    assert torch.equal(second[4].bfloat16(), c_n)
    grad_h, grad_c, *last = grads
    later = BackwardProblem(
        grad_h[2:], grad_c[2:], *last, activations[2:], c[2:], weight_hh, first[4]
    )
    (late,) = lstm_backward_many([later], **options)
    earlier = BackwardProblem(
        grad_h[:2], grad_c[:2], *late[1:], activations[:2], c[:2], weight_hh, c0
    )
    (early,) = lstm_backward_many([earlier], **options)
    assert {x.dtype for x in (*late[1:], *early[1:])} == {torch.float32}
    assert torch.equal(torch.cat([early[0], late[0]]), dgates)
    assert torch.equal(early[1].bfloat16(), dh0)
    assert torch.equal(early[2].bfloat16(), dc0)
    nothing = ForwardProblem(gates[:0], weight_hh, h0, c0)
    assert torch.equal(lstm_forward_many([nothing], **options)[0][4], c0.float())


CLUSTER = {
    "forward": ForwardConfig(
        TYPE="float16", SCOPE="cluster", HIDDEN=40, TEAM=3, COLUMNS=8, K_WARPS=1,
        REGISTER_TILES=2, UNIT_WARPS=2, GROUPS=1,
    ),
    "backward": BackwardConfig(
        TYPE="float16", SCOPE="cluster", HIDDEN=40, TEAM=3, COLUMNS=8, K_WARPS=1,
        REGISTER_TILES=2, UNITS=16, ROW_WARPS=3, ROW_TILES=1,
    ),
}  # fmt: skip
GRID = {
    "forward": dataclasses.replace(CLUSTER["forward"], SCOPE="grid", HIDDEN=32, TEAM=2),
    "backward": dataclasses.replace(CLUSTER["backward"], SCOPE="grid", HIDDEN=32, TEAM=2),
}


def test_a_cluster_that_is_named():
    inputs, grads, modifiers = make_inputs(4, 5, 40, torch.float16)
    check(inputs, grads, {"lengths": modifiers["lengths"]}, **CLUSTER)


def test_a_grid_takes_turns_where_not_all_teams_are_resident(executor):
    inputs, grads, modifiers = make_inputs(3, 20, 32, torch.float16)
    lengths = {"lengths": modifiers["lengths"]}
    together = check(inputs, grads, lengths, **GRID)
    assert [launched.teams for launched in executor.launches] == [3, 3]
    executor.launches.clear()
    executor._kernels.clear()
    executor.resident_blocks = 5
    apart = ours(inputs, grads, lengths, **GRID)
    assert [launched.teams for launched in executor.launches] == [2, 1, 2, 1]
    for name, a, b in zip(NAMES, together, apart, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("recurrences", "tiles", "resident"),
    [(1, 1, None), (8, 100, None), (2, 3, 6), (2, 3, 5), (2, 7, 4), (5, 3, 2), (3, 4, 1)],
)
def test_rounds_do_every_tile_once_and_never_more_than_are_resident(recurrences, tiles, resident):
    done = []
    for first, count, tile, own_tiles in launch._rounds(recurrences, tiles, resident):
        assert resident is None or count * own_tiles <= resident
        done += [(first + r, tile + k) for r in range(count) for k in range(own_tiles)]
    assert sorted(done) == [(r, k) for r in range(recurrences) for k in range(tiles)]


def test_refusals():
    inputs, _, modifiers = make_inputs(2, 2, 24, torch.float16)
    with pytest.raises(ValueError, match="dtype must be one of"):
        lstm_forward(*[x.double() for x in inputs])
    with pytest.raises(ValueError, match="input_precision must be one of"):
        lstm_forward(*inputs, input_precision="tf64")
    with pytest.raises(ValueError, match="config: expected HIDDEN = 24, got 40"):
        lstm_forward(*inputs, config=CLUSTER["forward"])
    with pytest.raises(ValueError, match="config: expected direction = forward, got backward"):
        lstm_forward(*inputs, config=CLUSTER["backward"])
    with pytest.raises(ValueError, match="with batch_sizes they must be None"):
        lstm_forward(
            inputs[0].flatten(0, 1), *inputs[1:], batch_sizes=torch.tensor([2, 2]),
            lengths=modifiers["lengths"],
        )  # fmt: skip
    inputs, _, _ = make_inputs(2, 2, 20, torch.float16)
    with pytest.raises(KernelUnavailableError, match="hidden_size=20 is not a multiple of 8"):
        lstm_forward(*inputs)


def test_without_a_gpu_there_is_nothing_to_launch_on(monkeypatch):
    monkeypatch.undo()
    inputs, _, _ = make_inputs(2, 2, 24, torch.float16)
    with pytest.raises(ValueError, match="CUDA kernels need tensors on an NVIDIA GPU, got device"):
        lstm_forward(*inputs)


# ---- which kernel is taken


class Recorder:
    """An executor that computes nothing; it refuses what it is told to."""

    def __init__(self, refuses=lambda config: False, resident=lambda config: 132) -> None:
        self.refuses, self.resident = refuses, resident
        self.asked, self.launched = [], []

    def load(self, config, device):
        self.asked.append(config)
        if self.refuses(config):
            raise KernelUnavailableError(f"team of {config.TEAM}: no")
        kernel = RecordedKernel()
        kernel.config, kernel.recorder = config, self
        kernel.resident_teams = self.resident(config)
        return kernel


class RecordedKernel:
    def launch(self, teams, parameters) -> None:
        self.recorder.launched.append((self.config, teams))


@pytest.fixture
def use(monkeypatch):
    def replaced(recorder):
        monkeypatch.setattr(launch, "executor_for", lambda device: recorder)
        return recorder

    return replaced


def big(batch=4, hidden=512):
    return (
        torch.zeros(2, batch, 4 * hidden, dtype=torch.bfloat16),
        torch.zeros(4 * hidden, hidden, dtype=torch.bfloat16),
        torch.zeros(batch, hidden, dtype=torch.bfloat16),
        torch.zeros(batch, hidden, dtype=torch.bfloat16),
    )


def test_the_first_plan_that_can_be_had_is_taken_and_remembered(use):
    best = launch.plan(
        "forward", batch=4, hidden=512, dtype=torch.bfloat16, limits=known_limits("sm_90")
    )[0].config
    recorder = use(Recorder())
    lstm_forward(*big())
    lstm_forward(*big())
    assert recorder.asked == [best]
    assert recorder.launched == [(best, 1), (best, 1)]

    recorder = use(Recorder(refuses=lambda config: config == best))
    lstm_forward(*big())
    lstm_forward(*big())
    assert recorder.asked[0] == best
    assert len(recorder.asked) == 2
    assert {config for config, _ in recorder.launched} == {recorder.asked[1]}

    recorder = use(Recorder(resident=lambda config: 0 if config == best else 1))
    lstm_forward(*big())
    assert len(recorder.asked) == 2


def test_launches_of_several_sizes_share_the_kernel_that_is_planned_for_one_of_them(use):
    problem = ForwardProblem(*big(batch=32, hidden=256))
    recorder = use(Recorder())
    for count in (1, 2, 1):
        lstm_forward_many([problem] * count)
    assert len(recorder.asked) == 2
    recorder = use(Recorder())
    for count in (1, 2, 1):
        lstm_forward_many([problem] * count, planned=2)
    assert len(recorder.asked) == 1
    assert {config for config, _ in recorder.launched} == set(recorder.asked)


def test_a_device_with_less_room_than_it_says_gets_smaller_teams(use):
    recorder = use(Recorder(resident=lambda config: 8 // config.TEAM))
    lstm_forward(*big(batch=64))
    assert recorder.launched
    assert all(config.TEAM <= 8 for config, _ in recorder.launched)


def test_when_nothing_can_be_had_the_reasons_are_told_once_and_nothing_is_tried_again(use):
    recorder = use(Recorder(refuses=lambda config: True))
    for _ in range(2):
        with pytest.raises(KernelUnavailableError, match="team of 16: no") as caught:
            lstm_forward(*big())
    assert len(recorder.asked) <= launch._TRIED_PLANS
    assert str(caught.value).count("team of 16: no") == 1


def test_a_remembered_refusal_keeps_nothing_alive(use):
    use(Recorder(refuses=lambda config: True))
    of_the_caller = []

    def call() -> None:
        inputs = big()
        of_the_caller.append(weakref.ref(inputs[0]))
        with contextlib.suppress(KernelUnavailableError):
            lstm_forward(*inputs)

    call()
    gc.collect()
    assert of_the_caller[0]() is None


def test_what_a_packed_batch_needs_is_derived_from_its_sizes():
    sizes, cpu = torch.tensor([3, 2, 2]), torch.device("cpu")
    step_rows, lengths = launch._packed_layout(sizes, 3, cpu)
    assert step_rows.tolist() == [0, 3, 5]
    assert lengths.tolist() == [3, 3, 1]
    assert step_rows.dtype == lengths.dtype == torch.int64


def test_directions_of_a_packed_batch_share_what_is_derived_from_its_sizes(use, monkeypatch):
    use(Recorder())
    derived = []

    def counted(*arguments):
        derived.append(arguments)
        return packed_layout(*arguments)

    packed_layout = launch._packed_layout
    monkeypatch.setattr(launch, "_packed_layout", counted)
    sizes, H = torch.tensor([3, 2, 2]), 64
    states = torch.zeros(3, H), torch.zeros(3, H)
    problem = launch.ForwardProblem(torch.zeros(7, 4 * H), torch.zeros(4 * H, H), *states, sizes)
    launch.lstm_forward_many([problem, problem._replace(reverse=True)])
    assert len(derived) == 1
