"""What `plain_layers` remembers of calls: tensors alike and unlike in turns, and nothing stale."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref

import pytest
import torch
from fused_lstm.kernels import cpu as kernels
from fused_lstm.kernels.cpu import LibraryUnavailableError, load
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import fused_lstm
from fused_lstm import plain

try:
    load()
except LibraryUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

T, B, I, H = 5, 3, 4, 6  # noqa: E741  (the field's name for the input size)

MODULES = {
    "layer": lambda **kw: fused_lstm.LSTM(I, H, **kw),
    "stack": lambda **kw: fused_lstm.LSTM(
        I, H, num_layers=2, bidirectional=True, batch_first=True, **kw
    ),
    "no-bias": lambda **kw: fused_lstm.LSTM(I, H, bias=False, **kw),
    "cell": lambda **kw: fused_lstm.LSTMCell(I, H, **kw),
    "cell-no-bias": lambda **kw: fused_lstm.LSTMCell(I, H, bias=False, **kw),
}
modules = pytest.mark.parametrize("name", MODULES)
two_modules = pytest.mark.parametrize("name", ["layer", "cell"])


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(plain, "_calls", {})
    plain._prepare.cache_clear()


@pytest.fixture
def looks(monkeypatch):
    """One entry for each call whose tensors were looked at: whether the kernel took it."""
    seen, look = [], plain._look_at

    def look_at(*arguments):
        found = look(*arguments)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(plain, "_look_at", look_at)
    return seen


def make(name, dtype=torch.float64, **options):
    return MODULES[name](dtype=dtype, **options)


def is_cell(module):
    return isinstance(module, nn.LSTMCell)


def dtype_of(module):
    return module.weight_hh.dtype if is_cell(module) else module.weight_hh_l0.dtype


def make_input(module, steps=T, batch=B):
    leading = (steps, batch)
    if is_cell(module):
        leading = (batch,)
    elif module.batch_first:
        leading = (batch, steps)
    return torch.randn(*leading, module.input_size, dtype=dtype_of(module))


def make_states(module, batch=B):
    leading = (batch,)
    if not is_cell(module):
        leading = (module.num_layers * (2 if module.bidirectional else 1), batch)
    shape = (*leading, module.hidden_size)
    return tuple(torch.randn(2, *shape, dtype=dtype_of(module)))


def results_of(module, x, hx=None):
    """Output, h_n and c_n; of a cell h and c."""
    first, rest = module(x, hx)
    return [first, rest] if is_cell(module) else [first, *rest]


def weight_of(module, kind="weight_hh"):
    return getattr(module, kind if is_cell(module) else f"{kind}_l0")


def losses(results):
    return sum((result.sin() * (k + 1)).sum() for k, result in enumerate(results))


def as_torch(module):
    """torch.nn's module with the same weights, as its own."""
    theirs = copy.deepcopy(module).to_torch()
    for ours, copied in zip(module.parameters(), theirs.parameters(), strict=True):
        copied.requires_grad_(ours.requires_grad)
    return theirs


def assert_torchs(module, x, hx=None, **tolerance):
    """Values, gradients of all that wants one, and what the results require."""
    leaves = [x, *(hx or ())]
    copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
    theirs = as_torch(module)
    actual = results_of(module, x, hx)
    expected = results_of(theirs, copies[0], tuple(copies[1:]) or None)
    for ours, other in zip(actual, expected, strict=True):
        assert ours.requires_grad == other.requires_grad
    torch.testing.assert_close(actual, expected, **tolerance)
    pairs = [
        (a, b)
        for a, b in zip(
            [*leaves, *module.parameters()], [*copies, *theirs.parameters()], strict=True
        )
        if a.requires_grad
    ]
    if actual[0].requires_grad and len({id(a) for a, _ in pairs}) == len(pairs):
        gradients = [
            torch.autograd.grad(losses(results), wanted)
            for results, wanted in zip((actual, expected), zip(*pairs, strict=True), strict=True)
        ]
        torch.testing.assert_close(*gradients, **tolerance)


def remembered():
    return sum(map(len, plain._calls.values()))


def transposed(t):
    """The same numbers in other memory."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def gaps(t):
    return torch.stack([t, t.new_full(t.shape, float("nan"))], -1)[..., 0]


# What is remembered


@modules
@pytest.mark.parametrize("states", [False, True])
def test_tensors_alike_are_looked_at_once(name, states, looks):
    module = make(name)
    for _ in range(4):
        assert_torchs(module, make_input(module), make_states(module) if states else None)
    assert looks == [True]
    for call in itertools.chain(*plain._calls.values()):
        assert call.backward_alike


@modules
def test_another_module_of_the_same_sizes_is_remembered_as_well(name, looks):
    for _ in range(3):
        module = make(name)
        assert_torchs(module, make_input(module))
    assert looks == [True]


def test_calls_of_a_frozen_module_are_remembered(looks):
    module = make("layer").requires_grad_(False)
    for _ in range(3):
        assert_torchs(module, make_input(module))
    assert looks == [True]


ODD = {
    "ordinary": lambda module, x, hx: (x, hx),
    "no states": lambda module, x, hx: (x, None),
    "strided input": lambda module, x, hx: (x.repeat_interleave(2, 0)[::2], hx),
    "input with gaps": lambda module, x, hx: (gaps(x), hx),
    "transposed input": lambda module, x, hx: (transposed(x), hx),
    "expanded input": lambda module, x, hx: (x[:1].expand(x.shape), hx),
    "input within others": lambda module, x, hx: (torch.stack([x * 2, x])[1], hx),
    "input with a gradient": lambda module, x, hx: (x.requires_grad_(), hx),
    "states with gradients": lambda module, x, hx: (x, tuple(s.requires_grad_() for s in hx)),
    "transposed states": lambda module, x, hx: (x, tuple(map(transposed, hx))),
    "one state with gaps": lambda module, x, hx: (x, (hx[0], gaps(hx[1]))),
    "a state twice": lambda module, x, hx: (x, (hx[0], hx[0])),
    "expanded states": lambda module, x, hx: (x, tuple(s[..., :1].expand(s.shape) for s in hx)),
    "a lazy negation": lambda module, x, hx: (torch._neg_view(x), hx),
    "another batch": lambda module, x, hx: (make_input(module, T, 2), make_states(module, 2)),
    "another length": lambda module, x, hx: (make_input(module, 2), hx),
}


@modules
@pytest.mark.parametrize("kind", ODD)
def test_tensors_alike_and_unlike_in_turns(name, kind):
    module = make(name)
    for k in range(6):
        given = make_input(module), make_states(module)
        assert_torchs(module, *(ODD[kind](module, *given) if k % 2 else given))


@pytest.mark.parametrize("name", ["stack", "cell"])
def test_everything_in_turns(name, looks):
    """More kinds than are remembered of one size, twice over, with and without gradients."""
    module = make(name)
    for _ in range(2):
        for kind, odd in ODD.items():
            for context in (torch.enable_grad, torch.no_grad):
                with context():
                    arguments = odd(module, make_input(module), make_states(module))
                    try:
                        assert_torchs(module, *arguments)
                    except AssertionError as error:
                        raise AssertionError(f"{kind}, {context.__name__}: {error}") from error
    assert looks


@two_modules
def test_dtypes_in_turns(name):
    module = make(name)
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for dtype in (*dtypes, *reversed(dtypes), *dtypes):
        module.to(dtype)
        for grad_mode in (False, True):
            with torch.set_grad_enabled(grad_mode):
                x, hx = make_input(module), make_states(module)
                loose = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {}
                results = results_of(module, x, hx)
                assert {result.dtype for result in results} == {dtype}
                assert_torchs(module, x, hx, **loose)


@two_modules
@pytest.mark.parametrize("where", ["input", "h", "c", "weight"])
def test_one_tensor_of_another_dtype_raises_as_it_does_at_first(name, where):
    module = make(name)
    for _ in range(2):
        assert_torchs(module, make_input(module), make_states(module))
    x, (h, c) = make_input(module), make_states(module)
    if where == "weight":
        weight_of(module).data = weight_of(module).data.float()
    with pytest.raises((RuntimeError, ValueError)):
        results_of(
            module,
            x.float() if where == "input" else x,
            (h.float() if where == "h" else h, c.float() if where == "c" else c),
        )


@two_modules
def test_frozen_weights_in_turns(name):
    module = make(name)
    weights = list(module.parameters())
    for k in range(8):
        module.requires_grad_(k % 4 != 3)
        weights[k % len(weights)].requires_grad_(k % 2 == 0)
        assert_torchs(module, make_input(module), make_states(module))


@two_modules
@pytest.mark.parametrize("modes", [(False, True), (True, False)], ids=str)
def test_whether_gradients_are_recorded_in_turns(name, modes):
    module = make(name)
    for mode in modes * 3:
        with torch.set_grad_enabled(mode):
            assert results_of(module, make_input(module))[0].requires_grad == mode
            assert_torchs(module, make_input(module))


@two_modules
def test_autocast_in_turns(name):
    module = make(name, torch.float32)
    x = make_input(module)
    expected = as_torch(module)(x)[0]
    for on in (True, False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            found = module(x)[0]
        assert found.dtype == (torch.bfloat16 if on else torch.float32)
        close = {"rtol": 0.1, "atol": 0.1} if on else {}
        torch.testing.assert_close(found.float(), expected, **close)


@modules
def test_modes_in_turns(name):
    module = make(name)
    for _ in range(2):
        assert_torchs(module, make_input(module))
        with torch.no_grad():
            assert_torchs(module, make_input(module))
        x = make_input(module)
        expected = [t.detach() for t in results_of(module, x)]
        with torch.inference_mode():
            results = results_of(module, x)
            assert all(t.is_inference() for t in results)
            torch.testing.assert_close([t.clone() for t in results], expected)
            inference = make_input(module)
        with torch.no_grad():
            assert not any(t.is_inference() for t in results_of(module, inference))
        with torch.autocast("cpu", torch.bfloat16):
            results = results_of(module, x)
        torch.testing.assert_close(
            [t.double() for t in results], expected, rtol=0.1, atol=0.1, check_dtype=False
        )


# Of PyTorch's own rules for forward derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@two_modules
def test_what_looks_on_sees_calls_that_are_remembered(name):
    module = make(name)
    for _ in range(2):
        assert_torchs(module, x := make_input(module))
    expected = results_of(module, -x)[0].detach()
    stacked = torch.stack([x, -x])
    assert torch.allclose(torch.vmap(lambda v: results_of(module, v)[0])(stacked)[1], expected)
    with FlopCounterMode(display=False) as counter:
        results_of(module, x)
    assert counter.get_total_flops() > 0
    _, tangent = torch.func.jvp(lambda v: results_of(module, v)[0], (x,), (x,))
    assert tangent.any()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        out = torch.autograd.forward_ad.unpack_dual(results_of(module, dual)[0])
    torch.testing.assert_close(out.tangent, tangent)
    leaf = x.clone().requires_grad_()
    output = results_of(module, leaf)[0].sin().sum()
    (gradient,) = torch.autograd.grad(output, leaf, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), leaf)[0].any()
    ones = torch.ones(2, dtype=torch.float64)
    output = results_of(module, leaf)[0].sum()
    (batched,) = torch.autograd.grad(output, leaf, ones, is_grads_batched=True)
    torch.testing.assert_close(batched[0], batched[1])


def test_a_cell_is_compiled_in_one_piece():
    cell = make("cell")
    x = make_input(cell)
    expected = cell(x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: cell(x)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


# Gradients that come

ODD_GRADIENTS = {
    "a lazy negation": lambda g: torch._neg_view(-g),
    "zeros without memory": lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype),
    "a subclass": lambda g: g.as_subclass(type("Other", (torch.Tensor,), {})),
    "expanded": lambda g: g[:1].expand(g.shape),
    "transposed": transposed,
    "with gaps": gaps,
}


@two_modules
@pytest.mark.parametrize("kind", ODD_GRADIENTS)
def test_gradients_of_all_kinds_in_turns(name, kind):
    """What is remembered of ordinary ones is not held true of others."""
    module = make(name)
    x = make_input(module).requires_grad_()
    wanted = [x, *module.parameters()]

    def gradients(g, **options):
        return torch.autograd.grad(results_of(module, x)[0], wanted, g, **options)

    for _ in range(3):
        g = torch.randn_like(results_of(module, x)[0])
        expected = gradients(g)
        odd = ODD_GRADIENTS[kind](g)
        ordinary = odd.as_subclass(torch.Tensor).clone(memory_format=torch.contiguous_format)
        torch.testing.assert_close(gradients(odd), gradients(ordinary))
        batched = gradients(torch.stack([g, -2 * g]), is_grads_batched=True)
        for actual, one in zip(batched, expected, strict=True):
            torch.testing.assert_close(actual, torch.stack([one, -2 * one]))


@two_modules
def test_a_gradient_that_is_given_twice(name):
    module = make(name)
    leaves = [make_input(module), *make_states(module)]
    for leaf in leaves:
        leaf.requires_grad_()
    g = torch.randn_like(leaves[-1])
    for given in ((g, g), (g, g.clone()), (g, g)):
        states = results_of(module, leaves[0], tuple(leaves[1:]))[-2:]
        theirs = results_of(as_torch(module), leaves[0], tuple(leaves[1:]))[-2:]
        torch.testing.assert_close(
            torch.autograd.grad(states, leaves, given), torch.autograd.grad(theirs, leaves, given)
        )


@two_modules
def test_gradients_with_tangents_after_others(name):
    module = make(name)
    x = make_input(module).requires_grad_()
    g, tangent = torch.randn(2, *results_of(module, x)[0].shape, dtype=x.dtype)
    for _ in range(2):
        torch.autograd.grad(results_of(module, x)[0], x, g)
    (expected,) = torch.autograd.grad(results_of(module, x)[0], x, tangent)
    out = results_of(module, x)[0]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(g, tangent)
        (found,) = torch.autograd.grad(out, x, dual)
        found = torch.autograd.forward_ad.unpack_dual(found).tangent
    assert found is not None
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("D", [1, 2])
def test_any_one_gradient_of_a_stack(D, states):
    """Nothing is differentiated below it, and nothing beside it is written that is not there."""
    module = fused_lstm.LSTM(I, H, num_layers=3, bidirectional=D == 2, dtype=torch.float64)
    x, hx = make_input(module), make_states(module) if states else None
    leaves = [x, *(hx or ()), *module.parameters()]
    for wanted in leaves:
        for leaf in leaves:
            leaf.requires_grad_(leaf is wanted)
        assert_torchs(module, x, hx)


# How much is remembered


def test_little_is_remembered_of_backward_passes():
    module = make("stack")
    x = make_input(module)
    for width in range(2 * H, 2 * H + 20):
        g = torch.randn(*x.shape[:2], width, dtype=x.dtype)[..., : 2 * H]
        torch.autograd.grad(results_of(module, x)[0], module.weight_hh_l1, g)
        (call,) = itertools.chain(*plain._calls.values())
        (questions,) = call.backward_alike.values()
        assert 0 < len(questions) <= plain._BACKWARDS_OF_A_CALL


def test_few_patterns_of_gradients_are_remembered(monkeypatch):
    monkeypatch.setattr(kernels.plain, "_PATTERNS", 3)
    module = make("stack")
    x, seen = make_input(module), []
    for wanted in itertools.islice(itertools.product([False, True], repeat=4), 1, None):
        for parameter, want in zip(module.parameters(), wanted, strict=False):
            parameter.requires_grad_(want)
        assert_torchs(module, x)
        for call in itertools.chain(*plain._calls.values()):
            seen.append(len(call.kernel._gradients))
    assert max(seen) == 3


@pytest.mark.parametrize("rooms", [1, 2])
def test_what_is_remembered_is_bounded(rooms, monkeypatch):
    monkeypatch.setattr(plain, "_KEYS", 3)
    monkeypatch.setattr(plain, "_CALLS_OF_A_KEY", rooms)
    module = make("layer")
    for k in range(3):
        for steps in range(1, 6):
            for x in (make_input(module, steps), transposed(make_input(module, steps))):
                for wanted in (False, True):
                    assert_torchs(module, x.detach().requires_grad_(wanted))
                    assert 0 < len(plain._calls) <= 3, k
                    assert all(0 < len(calls) <= rooms for calls in plain._calls.values())


@two_modules
def test_what_is_copied_is_not_piled_up(name, looks):
    module = make(name)
    x, (h, c) = make_input(module), make_states(module)
    for hx in ((transposed(h), c), (h, gaps(c)), (transposed(h), transposed(c))):
        for _ in range(5):
            assert_torchs(module, x, hx)
            assert remembered() == 0
    assert looks == [True] * 15


@two_modules
def test_tensors_that_are_given_twice_are_remembered_as_such(name, looks):
    """A decoder's cell whose input is h, both states from one tensor, one bias for both."""
    sizes = (H, H) if name == "cell" else (H, H, 1)
    module = (fused_lstm.LSTMCell if name == "cell" else fused_lstm.LSTM)(
        *sizes, dtype=torch.float64
    )
    for _ in range(3):
        x, (h, c) = make_input(module, 1), make_states(module)
        for given in ((x, (h, c)), (x, (h, h)), (h, (h, c)), (h, (h, h)), (c, (h, c))):
            assert_torchs(module, given[0], given[1])
    assert looks == [True] * 5
    setattr(module, "bias_ih" if name == "cell" else "bias_ih_l0", weight_of(module, "bias_hh"))
    for _ in range(3):
        assert_torchs(module, make_input(module), make_states(module))
    assert looks == [True] * 6


def test_calls_that_others_run_are_not_remembered(looks):
    module = make("layer")
    for x in (torch.zeros(T, 0, I), torch.zeros(T, I)):
        module(x.double())
    with fused_lstm.use_backend("reference"):
        module(make_input(module))
    weight_of(module).data = transposed(weight_of(module).data)
    assert_torchs(module, make_input(module))
    assert remembered() == 0
    assert not any(looks)


def test_no_tensor_is_kept(looks):
    module = make("layer")
    tensors = [make_input(module), *make_states(module)]
    losses(results_of(module, tensors[0], tuple(tensors[1:]))).backward()
    alive = [weakref.ref(t) for t in (*tensors, *module.parameters())]
    del tensors, module
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)
    assert looks == [True]
    assert remembered() == 1


def test_without_the_question_every_call_is_looked_at(looks, monkeypatch):
    monkeypatch.setattr(plain, "tensors_like", lambda tensors: None)
    module = make("stack")
    for _ in range(3):
        assert_torchs(module, make_input(module), make_states(module))
    assert looks == [True] * 3
    assert remembered() == 0


def test_threads_with_unlike_tensors(monkeypatch):
    monkeypatch.setattr(plain, "_KEYS", 2)
    monkeypatch.setattr(plain, "_CALLS_OF_A_KEY", 1)
    wide, narrow, errors = make("layer"), make("layer", torch.float32), []

    def work(first):
        try:
            for k in range(first, first + 20):
                module = (wide, narrow)[k % 2]
                x = make_input(module, 1 + k % 3)
                x = transposed(x) if k % 5 == 0 else x
                assert_torchs(module, x, rtol=1e-4, atol=1e-5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# Attributes


class Unhashable(int):
    __hash__ = None


@two_modules
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("hidden_size", float(H)),
        ("hidden_size", None),
        ("hidden_size", H + 1),
        ("hidden_size", [H]),
        ("input_size", float(I)),
        ("input_size", I + 1),
    ],
    ids=str,
)
def test_odd_attributes_neither_break_nor_poison(name, warm, attribute, value):
    module = make(name)
    x = make_input(module)
    expected = as_torch(module)(x)[0]
    if warm:
        torch.testing.assert_close(module(x)[0], expected)
    good = getattr(module, attribute)
    setattr(module, attribute, value)
    for _ in range(2):
        try:
            found = module(x)[0]
        except (TypeError, RuntimeError, ValueError):
            continue
        # What equals the number may be taken for it, and a cell's weights know their sizes.
        torch.testing.assert_close(found, expected)
    setattr(module, attribute, good)
    assert_torchs(module, x)
    assert all(type(size) in (int, bool) for key in plain._calls for size in key[-1])


@two_modules
def test_numbers_without_a_hash_are_numbers(name):
    module = make(name)
    module.hidden_size = Unhashable(H)
    module.input_size = Unhashable(I)
    for _ in range(2):
        assert_torchs(module, make_input(module), make_states(module))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("layers", [0, -1, False, 2])
def test_another_number_of_layers_raises(warm, layers):
    module = make("layer")
    if warm:
        assert_torchs(module, make_input(module))
    module.num_layers = layers
    for hx in (None, make_states(make("layer"))):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            module(make_input(module), hx)
    module.num_layers = 1
    assert_torchs(module, make_input(module))


# Weights that are not where they were

BIASES = ("bias_ih", "bias_hh")


def pruned(cell):
    for bias in BIASES:
        prune.identity(cell, bias)


def parametrized(cell):
    for bias in BIASES:
        parametrize.register_parametrization(cell, bias, nn.Identity())


def of_the_object(cell):
    for bias in BIASES:
        value = getattr(cell, bias).detach()
        delattr(cell, bias)
        setattr(cell, bias, value)


def buffers(cell):
    for bias in BIASES:
        value = getattr(cell, bias).detach()
        delattr(cell, bias)
        cell.register_buffer(bias, value)


@pytest.mark.parametrize("moved", [pruned, parametrized, of_the_object, buffers])
@pytest.mark.parametrize("count", [1, 2])
def test_biases_of_a_cell_that_are_not_parameters_count(moved, count, monkeypatch):
    cell = make("cell")
    x, hx = make_input(cell), make_states(cell)
    expected = results_of(as_torch(cell), x, hx)
    monkeypatch.setattr(f"{__name__}.BIASES", BIASES[:count])
    moved(cell)
    for _ in range(2):
        torch.testing.assert_close(results_of(cell, x, hx), expected)


def test_biases_of_a_cell_that_are_gone_are_missed():
    cell = make("cell")
    del cell.bias_ih, cell.bias_hh
    with pytest.raises(AttributeError, match="bias_ih"):
        cell(make_input(cell))


@pytest.mark.parametrize("missing", BIASES)
def test_a_cell_with_one_bias_is_not_one_without(missing):
    cell = make("cell")
    for _ in range(2):
        assert_torchs(cell, make_input(cell))
    setattr(cell, missing, None)
    results = []
    for module in (cell, cell.to_torch()):
        torch.manual_seed(1)
        try:
            results.append(results_of(module, make_input(cell)))
        except (RuntimeError, TypeError) as error:
            results.append(type(error))
    if isinstance(results[1], list):
        torch.testing.assert_close(*results)
    else:
        assert not isinstance(results[0], list)


def test_parameters_of_a_cell_in_another_order():
    cell = make("cell")
    x = make_input(cell)
    cell.register_parameter("another", nn.Parameter(torch.ones(3)))
    weight = cell.weight_ih
    del cell.weight_ih
    cell.weight_ih = weight
    theirs = nn.LSTMCell(I, H, dtype=torch.float64)
    theirs.load_state_dict({k: v for k, v in cell.state_dict().items() if k != "another"})
    for _ in range(2):
        torch.testing.assert_close(results_of(cell, x), results_of(theirs, x))


WRONG = {
    "smaller": lambda t: torch.ones(1, 1, dtype=t.dtype),
    "one row less": lambda t: t[:-1].clone(),
    "larger": lambda t: torch.cat([t, t]),
    "flat": torch.Tensor.flatten,
    "narrow": torch.Tensor.float,
    "transposed sizes": lambda t: t.t().contiguous(),
}
weights = pytest.mark.parametrize("weight", ["weight_ih", "weight_hh"])


def raises_or_is_right(loss, module, expected):
    """A tensor of the same numbers, rounded, may do; without `expected` none does."""
    try:
        gradients = torch.autograd.grad(loss, list(module.parameters()))
    except (RuntimeError, ValueError, IndexError):
        return
    assert expected is not None
    for actual, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)


@two_modules
@weights
@pytest.mark.parametrize("kind", WRONG)
def test_weights_replaced_between_calls(name, weight, kind):
    """Through `.data`: it is the same object, and its version says nothing."""
    module = make(name)
    for _ in range(2):
        assert_torchs(module, make_input(module))
    parameter = weight_of(module, weight)
    own = parameter.data
    parameter.data = WRONG[kind](own)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            results_of(module, make_input(module))
    parameter.data = transposed(own)
    assert_torchs(module, make_input(module))
    parameter.data = own.clone()
    assert_torchs(module, make_input(module))


@two_modules
@weights
@pytest.mark.parametrize("kind", WRONG)
def test_weights_replaced_before_a_backward_pass_like_others(name, weight, kind):
    module = make(name)
    for _ in range(2):
        assert_torchs(module, make_input(module))
    parameter, x = weight_of(module, weight), make_input(module)
    own = parameter.data
    expected = torch.autograd.grad(losses(results_of(module, x)), list(module.parameters()))
    loss = losses(results_of(module, x))
    parameter.data = WRONG[kind](own)
    raises_or_is_right(loss, module, expected if kind == "narrow" else None)
    parameter.data = own
    for layout in (transposed, torch.clone):
        loss = losses(results_of(module, x))
        parameter.data = layout(own)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        torch.testing.assert_close(gradients, expected)
        parameter.data = own


@two_modules
def test_an_input_replaced_before_a_backward_pass_like_others(name):
    module = make(name)
    x = make_input(module)
    expected = torch.autograd.grad(losses(results_of(module, x)), list(module.parameters()))
    for layout in (torch.clone, transposed, gaps):
        leaf = x.clone().requires_grad_()
        loss = losses(results_of(module, leaf))
        leaf.data = layout(x)
        torch.testing.assert_close(torch.autograd.grad(loss, list(module.parameters())), expected)
    for wrong in (x[:1].clone(), x.float(), x[..., :-1].clone()):
        leaf = x.clone().requires_grad_()
        loss = losses(results_of(module, leaf))
        leaf.data = wrong
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            loss.backward()


@two_modules
@pytest.mark.parametrize("count", [0, 3])
def test_hooks_that_bring_back_other_tensors(name, count):
    """Before and after backward passes like it are remembered."""
    module = make(name)
    for _ in range(count):
        assert_torchs(module, make_input(module))
    x = make_input(module)
    expected = torch.autograd.grad(losses(results_of(module, x)), list(module.parameters()))
    for brings in (torch.clone, transposed, gaps, lambda t: t.clone().requires_grad_()):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, brings):
            loss = losses(results_of(module, x))
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        torch.testing.assert_close(gradients, expected)
    for brings in (lambda t: t[:1].clone(), torch.Tensor.float, lambda t: t.flatten()[:1]):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, brings):
            loss = losses(results_of(module, x))
        raises_or_is_right(loss, module, expected if brings is torch.Tensor.float else None)


KEPT = ("input", "h", "c", "weight_ih", "weight_hh")


@pytest.mark.filterwarnings("ignore::fused_lstm.KernelFallbackWarning")
@two_modules
@pytest.mark.parametrize("offset", [0, 1], ids=["whole", "view"])
@pytest.mark.parametrize(
    ("which", "backward"),
    # No gradient depends on a bias.
    [*itertools.product(KEPT, [False, True]), ("bias_hh", False)],
)
def test_memory_that_is_gone_raises(name, which, backward, offset):
    """The address of a view is an offset then, and not null."""
    module = make(name)
    for _ in range(2):
        assert_torchs(module, make_input(module), make_states(module))
    x, (h, c) = make_input(module), make_states(module)
    tensors = {"input": x, "h": h, "c": c}
    gone = tensors[which] if which in tensors else weight_of(module, which)
    gone.data = gone.data.expand(2, *gone.shape).clone()[offset]
    loss = losses(results_of(module, x, (h, c)))
    gone.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        loss.backward() if backward else results_of(module, x, (h, c))


@two_modules
def test_a_bias_may_shrink_before_a_backward_pass(name):
    """No gradient depends on it, and torch does not look at it."""
    module, results = make(name), []
    x = make_input(module).requires_grad_()
    for shrinks in (False, True):
        loss = losses(results_of(module, x))
        if shrinks:
            bias = weight_of(module, "bias_hh")
            bias.data = bias.data[:1]
        results.append(torch.autograd.grad(loss, x))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@two_modules
def test_nested_tensors_are_refused_by_their_dimensions(name):
    module = make(name)
    shape = make_input(module).shape
    with pytest.raises(ValueError, match=f"got {len(shape) + 1}D"):
        module(torch.nested.nested_tensor([torch.randn(shape), torch.randn(shape)]))


# Results


@modules
@pytest.mark.parametrize("grad_mode", [False, True], ids=["no-grad", "grad"])
def test_results_are_apart_from_each_other_and_from_other_calls(name, grad_mode):
    module = make(name)
    x, hx = make_input(module), make_states(module)
    with torch.set_grad_enabled(grad_mode):
        first = results_of(module, x, hx)
        copies = [t.detach().clone() for t in (*first, x, *hx)]
        second = results_of(module, x, hx)
    for result in second:
        result.detach().zero_()
    assert all(map(torch.equal, [*first, x, *hx], copies))
    for k, result in enumerate(first):
        result.detach().fill_(k)
    for k, result in enumerate(first):
        assert result.eq(k).all()


@modules
def test_graphs_of_calls_alike_are_apart(name):
    """Their backward passes in another order, and one of them twice."""
    module = make(name)
    inputs = [make_input(module).requires_grad_() for _ in range(3)]
    expected = [torch.autograd.grad(losses(results_of(module, x)), x)[0] for x in inputs]
    loss = [losses(results_of(module, x)) for x in inputs]
    for k in (1, 0, 1, 2):
        (gradient,) = torch.autograd.grad(loss[k], inputs[k], retain_graph=True)
        torch.testing.assert_close(gradient, expected[k], rtol=0, atol=0)
