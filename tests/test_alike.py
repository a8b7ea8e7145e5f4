"""Whether tensors are like others: every difference that would make a kernel read wrong memory."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._vmap_internals import _vmap as legacy_vmap
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fused_lstm.alike import tensors_like
from fused_lstm.transforms import hidden_observer

SHAPES = (5, 3, 4), (24, 6), (24,)
positions = pytest.mark.parametrize("k", range(len(SHAPES)))
grad_modes = pytest.mark.parametrize("grad_mode", [False, True], ids=["no-grad", "grad"])


def some_tensors(**options):
    return [torch.randn(shape, **options) for shape in SHAPES]


def replaced(tensors, k, other):
    return [*tensors[:k], other, *tensors[k + 1 :]]


def question():
    alike = tensors_like(some_tensors())
    assert alike is not None
    return alike


# What does not differ


@grad_modes
def test_other_tensors_are_alike(grad_mode):
    alike = question()
    with torch.set_grad_enabled(grad_mode):
        assert alike(*some_tensors())
        assert alike(*some_tensors(requires_grad=False))
        assert alike(*[torch.randn(2, *shape)[1] for shape in SHAPES])
    learned = tensors_like(some_tensors(requires_grad=True))
    assert learned(*some_tensors(requires_grad=True))
    # A leaf or not.
    assert learned(*[t * 2 for t in some_tensors(requires_grad=True)])


def test_views_of_one_memory_are_alike():
    memory = torch.randn(6, 5)
    alike = tensors_like([memory[:3], memory[3:]])
    assert alike(memory[:3], memory[1:4])


def test_the_tensors_are_not_kept():
    tensors = some_tensors(requires_grad=True)
    alike, alive = tensors_like(tensors), [weakref.ref(t) for t in tensors]
    del tensors
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)
    assert alike(*some_tensors(requires_grad=True))


# What differs

DIFFERENT = {
    "a parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "a subclass": lambda t: t.as_subclass(type("Other", (torch.Tensor,), {})),
    "float64": torch.Tensor.double,
    "bfloat16": torch.Tensor.bfloat16,
    "int32 of the same bits": lambda t: t.view(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "of mkldnn": torch.Tensor.to_mkldnn,
    "a lazy negation": torch._neg_view,
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "no numbers": lambda t: t[:0],
    "requires a gradient": lambda t: t.clone().requires_grad_(),
    "None": lambda t: None,
    "a list": torch.Tensor.tolist,
    "an array": torch.Tensor.numpy,
}
NO_TENSORS = ("None", "a list", "an array")


@positions
@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_tensor_of_another_kind_is_unlike(kind, k):
    alike, tensors = question(), some_tensors()
    assert not alike(*replaced(tensors, k, DIFFERENT[kind](tensors[k])))
    assert alike(*tensors)


@pytest.mark.parametrize("kind", [name for name in DIFFERENT if name not in NO_TENSORS])
def test_an_ordinary_tensor_is_unlike_one_of_another_kind(kind):
    tensors = some_tensors()
    # Where it cannot be asked, it is not.
    alike = tensors_like(replaced(tensors, 1, DIFFERENT[kind](tensors[1])))
    assert alike is None or not alike(*tensors)


@positions
@pytest.mark.parametrize("by", [-1, 1])
def test_every_size_counts(k, by):
    alike, tensors = question(), some_tensors()
    for d, size in enumerate(SHAPES[k]):
        shape = (*SHAPES[k][:d], size + by, *SHAPES[k][d + 1 :])
        assert not alike(*replaced(tensors, k, torch.randn(shape)))
        # The sizes alone.
        other = torch.empty(1000).as_strided(shape, tensors[k].stride())
        assert not alike(*replaced(tensors, k, other))


@positions
@pytest.mark.parametrize("by", [-1, 1])
def test_every_stride_counts(k, by):
    alike, tensors = question(), some_tensors()
    for d in range(len(SHAPES[k])):
        strides = list(tensors[k].stride())
        strides[d] += by
        other = torch.empty(1000).as_strided(SHAPES[k], strides)
        assert not alike(*replaced(tensors, k, other))


def test_tensors_in_another_order_are_unlike():
    tensors = some_tensors()
    assert not question()(*reversed(tensors))


@grad_modes
@positions
def test_whether_a_gradient_is_recorded_counts(k, grad_mode):
    tensors = some_tensors()
    learned = replaced(tensors, k, tensors[k].clone().requires_grad_())
    with torch.set_grad_enabled(grad_mode):
        assert not tensors_like(tensors)(*learned)
        assert not tensors_like(learned)(*tensors)
        assert tensors_like(learned)(*learned)


def test_a_tensor_that_is_given_twice_is_unlike_two():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    alike = tensors_like([x, y])
    assert alike(y, x)
    assert not alike(x, x)
    alike = tensors_like([x, x])
    assert alike(y, y)
    assert not alike(x, y)
    assert not alike(x[:2], x[:2])


def test_tensors_that_are_given_more_than_once():
    x, y, z = torch.randn(3, 3, 4)
    alike = tensors_like([x, y, x, y, x])
    assert alike(y, z, y, z, y)
    for others in (
        (x, x, x, x, x),
        (x, y, z, y, x),
        (x, y, x, y, y),
        (x, y, y, x, x),
        (x, y[:2], x, y[:2], x),
    ):
        assert not alike(*others)
    with pytest.raises(TypeError):
        tensors_like([x, y])(x)


def test_another_number_of_tensors_is_no_question():
    tensors = some_tensors()
    for wrong in (tensors[:-1], [*tensors, torch.ones(1)]):
        with pytest.raises(TypeError):
            question()(*wrong)


# What is under way


def answers_within(transform):
    """What is answered to a tensor from outside of a transform, and to the transform's own."""
    x, answers = torch.randn(3, 4), []
    alike = tensors_like([x])
    made_within = []

    def look(own):
        answers.append([alike(x), alike(own)])
        made_within.append(tensors_like([own]))
        return own * 2

    transform(look)(x)
    assert answers
    # What was made within is not asked for outside.
    assert not any(each is not None and each(x) for each in made_within)
    assert alike(x)
    return answers


TRANSFORMS = {
    "vmap": lambda f: lambda x: torch.vmap(f)(torch.stack([x, x])),
    "legacy vmap": lambda f: lambda x: legacy_vmap(f)(torch.stack([x, x])),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": torch.func.functionalize,
    "trace": lambda f: lambda x: torch.jit.trace(f, x, check_trace=False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_tensors_within_a_transform_are_unlike(name):
    for outside, own in answers_within(TRANSFORMS[name]):
        assert not outside
        assert not own


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("name", MODES)
def test_the_same_tensors_are_unlike_within_a_mode(name):
    tensors = some_tensors()
    alike = tensors_like(tensors)
    with MODES[name]():
        assert not alike(*tensors)
        assert not alike(*some_tensors())
        within = tensors_like(tensors)
        assert within(*tensors)
    assert alike(*tensors)
    assert not within(*tensors)


def test_tensors_of_inference_mode_are_unlike_others():
    with torch.inference_mode():
        tensors = some_tensors()
    assert not question()(*tensors)
    assert not tensors_like(tensors)(*some_tensors())


def test_what_the_question_does_not_see_is_seen_by_another():
    tensors = some_tensors()
    alike = tensors_like(tensors)
    assert not hidden_observer()
    with FlopCounterMode(display=False):
        assert hidden_observer()
    with forward_ad.dual_level():
        assert alike(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])
        assert hidden_observer()
    assert not hidden_observer()


# Where there is no such question


def test_without_the_question(monkeypatch):
    guards = torch._C._dynamo.guards
    tensors = some_tensors()

    def refuses(*arguments, **options):
        raise TypeError("other arguments")

    monkeypatch.setattr(guards, "TensorGuards", refuses)
    assert tensors_like(tensors) is None
    monkeypatch.delattr(guards, "TensorGuards")
    assert tensors_like(tensors) is None


def test_a_question_that_denies_what_it_was_made_from_is_none(monkeypatch):
    class Denies:
        def __init__(self, *tensors, **options):
            pass

        def check(self, *tensors):
            return False

    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Denies)
    assert tensors_like(some_tensors()) is None


def test_copies_of_a_tensor_are_alike():
    tensors = some_tensors()
    assert question()(*copy.deepcopy(tensors))
