"""The CUDA kernels on a GPU: numbers, launches, streams, graphs, and layers that run on them.

The cases of the emulator's tests, within the same budgets, and what the emulator cannot have: real
sizes, clusters of 16, streams, graphs, sanitizers. `-k small` selects what is quick under
compute-sanitizer: every scope, forward and backward, the reference on the CPU.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `L` layers.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fused_lstm.kernels.cuda import driver, launch
from fused_lstm.kernels.cuda.config import Config, fits, plan
from fused_lstm.kernels.cuda.driver import CudaExecutor
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_lstm import KernelFallbackWarning, ops, stack, wavefront
from fused_lstm.modifiers import Modifiers

from ..budget import assert_within_budget
from ..dropin import helpers, test_gpu
from . import test_cuda_backward as backward
from . import test_cuda_forward as forward
from .test_cuda_forward import Case


def missing() -> str:
    """What the tests need and this machine has not; empty if there is nothing."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"needs a GPU of sm_80 or later, not sm_{major}{minor}"


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(missing()), reason=missing() or "nothing"),
    # A kernel that hangs holds the main thread where no signal is seen.
    pytest.mark.timeout(method="thread"),
]
# What torch.empty leaves as it was is NaN.
poisoned = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def ieee(monkeypatch):
    """Layers multiply float32 in float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


class Arithmetic(NamedTuple):
    """Types of a kernel, named as its configuration names them."""

    TYPE: str
    TERMS: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.TYPE)


ARITHMETIC = {
    "bf16": Arithmetic("bfloat16"),
    "fp16": Arithmetic("float16"),
    "tf32": Arithmetic("float32"),
    "ieee": Arithmetic("float32", 3),
}
arithmetics = pytest.mark.parametrize("arithmetic", ARITHMETIC.values(), ids=ARITHMETIC)
SCOPES = ("block", "cluster", "grid")
scopes = pytest.mark.parametrize("scope", SCOPES)


# ---- the same tensors there


def placed(x: Any, device: torch.device) -> Any:
    """A tensor on another device, of the same strides; anything else as it is."""
    if not isinstance(x, Tensor) or x.device.type == device.type:
        return x
    # What stands for many elements is copied once.
    one = x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]
    there = torch.empty_strided(one.shape, one.stride(), dtype=x.dtype, device=device)
    return there.copy_(one).expand(x.shape)


def problem_on(device: torch.device, problem: Any) -> Any:
    """A `ForwardProblem` or `BackwardProblem` on another device; batch_sizes stay on the CPU."""
    return type(problem)(
        *(
            x if name == "batch_sizes" else placed(x, device)
            for name, x in zip(problem._fields, problem, strict=True)
        )
    )


def on_cpu(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.cpu() for x in results)


def options_of(kind: Config | Arithmetic) -> dict[str, Any]:
    """What a launch is told to run this configuration, or whatever the plan chooses."""
    return {
        "input_precision": "ieee" if kind.TERMS == 3 else "tf32",
        "config": kind if isinstance(kind, Config) else None,
    }


def need(kind: Config | Arithmetic, device: torch.device) -> None:
    """Skips where the device has less than a configuration needs."""
    limits = launch.limits_of(device)
    if not isinstance(kind, Config):
        return
    if kind.cluster > limits.max_cluster:
        pytest.skip(f"{limits.arch} has no clusters of {kind.cluster}")
    if kind.shared_bytes > limits.shared_bytes:
        pytest.skip(f"{limits.arch} has less than {kind.shared_bytes} bytes of shared memory")


def check_forward(
    kind: Config | Arithmetic, problems: list[launch.ForwardProblem], device: torch.device
) -> None:
    """Computes recurrences in one launch, and compares with float64 where the problems are."""
    need(kind, device)
    results = launch.lstm_forward_many(
        [problem_on(device, p) for p in problems], **options_of(kind)
    )
    for problem, result in zip(problems, results, strict=True):
        forward.check(problem, tuple(x.to(problem.gates.device) for x in result), kind)


def backward_problem(recurrence: backward.Recurrence) -> launch.BackwardProblem:
    r = recurrence
    return launch.BackwardProblem(
        *r.gradients, r.activations, r.c, r.weight_hh, r.c0, r.batch_sizes, *r.modifiers, r.reverse
    )


def differentiate(
    kind: Config | Arithmetic, recurrences: list[backward.Recurrence], device: torch.device
) -> list[tuple[Tensor, ...]]:
    """Gradients, on the CPU, as the emulator's tests take them: UNTOUCHED beyond the lengths."""
    need(kind, device)
    results = launch.lstm_backward_many(
        [problem_on(device, backward_problem(r)) for r in recurrences],
        wide_states=recurrences[0].wide,
        **options_of(kind),
    )
    for recurrence, (grad_gates, *_) in zip(recurrences, results, strict=True):
        beyond = recurrence.beyond_lengths()
        if beyond is not None:
            beyond = beyond.to(device)
            assert not grad_gates[beyond].any(), "not 0 beyond the lengths"
            grad_gates[beyond] = backward.UNTOUCHED
    return [on_cpu(result) for result in results]


@pytest.fixture
def differentiated_there(monkeypatch, device) -> None:
    """The emulator's backward tests run on the device."""
    monkeypatch.setattr(
        backward,
        "differentiate",
        lambda config, recurrences, options=None, **_: differentiate(config, recurrences, device),
    )


def recurrence_of(problem: launch.ForwardProblem) -> backward.Recurrence:
    """What a problem leaves to differentiate, where it is; gradients from the same numbers."""
    out = forward.by_reference(problem, problem.gates.dtype)
    generator = torch.Generator().manual_seed(1)

    def like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x)

    gradients = backward.Gradients(*map(like, (out.h, out.c, out.h_n, out.c_n)))
    p = problem
    modifiers = Modifiers(
        p.lengths, p.resets, p.recurrent_mask, p.zoneout_h, p.zoneout_c, p.cell_clip
    )
    return backward.Recurrence(
        out.activations, out.c, p.weight_hh, p.c0, gradients, modifiers, p.batch_sizes, p.reverse,
        wide=False,
    )  # fmt: skip


def planned(
    direction: str, device: torch.device, arithmetic: Arithmetic, hidden: int, batch: int, **wanted
) -> Config:
    """The best plan of which `wanted` holds; skips where there is none."""
    plans = plan(
        direction,
        batch=batch,
        hidden=hidden,
        dtype=arithmetic.dtype,
        terms=arithmetic.TERMS,
        limits=launch.limits_of(device),
    )
    for each in plans:
        if all(getattr(each.config, name) == value for name, value in wanted.items()):
            return each.config
    pytest.skip(f"no {direction} plan for {hidden} units with {wanted}")


def both_planned(*arguments, **wanted) -> tuple[Config, Config]:
    """Plans of both directions."""
    return planned("forward", *arguments, **wanted), planned("backward", *arguments, **wanted)


# What a backward problem has of the forward one, next to weights and states.
AS_FORWARD = ("batch_sizes", *Modifiers._fields, "reverse")


def run_both(
    problem: launch.ForwardProblem, grads: backward.Gradients, kinds: tuple[Any, Any]
) -> list[Tensor]:
    """All results of a recurrence, and its gradients, where its tensors are."""
    (out,) = launch.lstm_forward_many([problem], **options_of(kinds[0]))
    _, c, activations, *_ = out
    differentiated = launch.BackwardProblem(
        *grads, activations, c, problem.weight_hh, problem.c0,
        **{name: getattr(problem, name) for name in AS_FORWARD},
    )  # fmt: skip
    (gradients,) = launch.lstm_backward_many([differentiated], **options_of(kinds[1]))
    return [*out, *gradients]


def make_both(
    case: Case, hidden: int, arithmetic: Arithmetic, device: torch.device, seed: int = 0
) -> tuple[launch.ForwardProblem, backward.Gradients]:
    """A problem on the device, and gradients for `run_both`."""
    problem = forward.problem_of(case, hidden, arithmetic.dtype, seed)
    gradients = recurrence_of(problem).gradients
    return (
        problem_on(device, problem),
        backward.Gradients(*(placed(g, device) for g in gradients)),
    )


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"result {k} differs"


class Watched:
    """An executor that notes its launches, and may say or ask for more than there is.

    Attributes:
        launches: configuration, teams and recurrences of each.
    """

    def __init__(self, executor: Any, resident: int | None = None, excess: int = 1) -> None:
        self.executor, self.resident, self.excess = executor, resident, excess
        self.launches: list[tuple[Config, int, int]] = []

    def load(self, config: Config, device: torch.device) -> WatchedKernel:
        return WatchedKernel(self, config, self.executor.load(config, device))


class WatchedKernel:
    def __init__(self, watched: Watched, config: Config, kernel: Any) -> None:
        self.watched, self.config, self.kernel = watched, config, kernel
        self.resident_teams = watched.resident or kernel.resident_teams

    def launch(self, teams: int, parameters: Any) -> None:
        self.watched.launches.append((self.config, teams, parameters.recurrences))
        self.kernel.launch(teams * self.watched.excess, parameters)


@pytest.fixture
def watch(monkeypatch, device) -> Callable[..., Watched]:
    """Puts a `Watched` executor in place of the usual one."""
    usual = launch.executor_for(device)

    def put(executor: Any = usual, **options) -> Watched:
        watched = Watched(executor, **options)
        monkeypatch.setattr(launch, "executor_for", lambda device: watched)
        return watched

    return put


# ---- quick under a sanitizer


SMALL = [ARITHMETIC["bf16"], ARITHMETIC["tf32"]]
small_types = pytest.mark.parametrize("arithmetic", SMALL, ids=["bf16", "tf32"])
packed_or_not = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def small_config(scope: str, arithmetic: Arithmetic) -> Config:
    """24 units: the last block, and the product's sum, are partly padding."""
    team, warps = (1, 3) if scope == "block" else (2, 2)
    return forward.config(scope, 24, team, 8, (warps, 1, 1), **arithmetic._asdict())


@poisoned
@scopes
@small_types
def test_small_forward(scope, arithmetic, device):
    config = small_config(scope, arithmetic)
    cases = Case(3, 9), Case(2, 9, reverse=True)
    problems = [forward.problem_of(c, 24, arithmetic.dtype, k) for k, c in enumerate(cases)]
    check_forward(config, problems, device)


@poisoned
@scopes
@small_types
@packed_or_not
def test_small_forward_modified(scope, arithmetic, packed, device):
    config = small_config(scope, arithmetic)
    case = Case(3, 9, reverse=packed, packed=packed, lengths=not packed, modified=True)
    check_forward(config, [forward.problem_of(case, 24, arithmetic.dtype, 0)], device)


def small_backward_config(scope: str, arithmetic: Arithmetic) -> Config:
    options = backward.TEAMS[scope]
    return backward.config_of(24, arithmetic.TYPE, TERMS=arithmetic.TERMS, **options)


@poisoned
@scopes
@small_types
def test_small_backward(scope, arithmetic, differentiated_there):
    recurrences = [
        backward.make_recurrence(arithmetic.dtype, 3, 9, 24, seed=1),
        backward.make_recurrence(arithmetic.dtype, 2, 9, 24, seed=2, reverse=True),
    ]
    backward.check(small_backward_config(scope, arithmetic), recurrences)


@poisoned
@scopes
@small_types
@packed_or_not
def test_small_backward_modified(scope, arithmetic, packed, differentiated_there):
    recurrence = backward.make_recurrence(
        arithmetic.dtype, 3, 9, 24, lengths=[3, 3, 2, 2, 2, 1, 1, 1, 1], packed=packed,
        reverse=packed, seed=3, **backward.everything(arithmetic.dtype),
    )  # fmt: skip
    backward.check(small_backward_config(scope, arithmetic), [recurrence])


# ---- numbers: what the emulator's tests ask


@poisoned
@pytest.mark.parametrize("config", forward.CONFIGS, ids=forward.name_of)
def test_forward(config, device):
    """Alone, and with another recurrence in the same launch: other T, other direction."""
    dtype = getattr(torch, config.TYPE)
    for seed, case in enumerate(forward.PLAIN):
        other = case._replace(reverse=not case.reverse, steps=case.steps + 1)
        for cases in ([case], [case, other]):
            problems = [
                forward.problem_of(each, config.HIDDEN, dtype, seed + k)
                for k, each in enumerate(cases)
            ]
            check_forward(config, problems, device)


@poisoned
@pytest.mark.parametrize("case", forward.MODIFIED, ids=range(len(forward.MODIFIED)))
@pytest.mark.parametrize("config", forward.CONFIGS, ids=forward.name_of)
def test_forward_modified(config, case, device):
    for seed in range(3):
        problem = forward.problem_of(case, config.HIDDEN, getattr(torch, config.TYPE), seed)
        check_forward(config, [problem], device)


def same_cases_as(test: Any) -> Callable[[Any], Any]:
    """Gives a test the parameters of another."""

    def decorated(function: Any) -> Any:
        for mark in test.pytestmark:
            function = pytest.mark.parametrize(*mark.args, **mark.kwargs)(function)
        return function

    return decorated


@poisoned
@same_cases_as(backward.test_plain)
def test_backward(dtype, terms, scope, differentiated_there):
    backward.test_plain(dtype, terms, scope)


@poisoned
@same_cases_as(backward.test_everything)
def test_backward_everything(scope, packed, reverse, differentiated_there):
    backward.test_everything(scope, packed, reverse)


@poisoned
@packed_or_not
@scopes
@arithmetics
def test_backward_everything_in_every_type(arithmetic, scope, packed, differentiated_there):
    config = backward.config_of(
        24, arithmetic.TYPE, TERMS=arithmetic.TERMS, **backward.TEAMS[scope]
    )
    for reverse, seed in itertools.product((False, True), (1, 2)):
        recurrence = backward.make_recurrence(
            arithmetic.dtype, 5, 9, 24, lengths=[5, 5, 4, 2, 2, 2, 1, 1, 1], packed=packed,
            reverse=reverse, seed=seed, **backward.everything(arithmetic.dtype),
        )  # fmt: skip
        backward.check(config, [recurrence])


@poisoned
@same_cases_as(backward.test_divisions_of_the_work)
def test_backward_divisions_of_the_work(fields, differentiated_there):
    backward.test_divisions_of_the_work(fields)


@poisoned
@same_cases_as(backward.test_absent_gradients)
def test_backward_absent_gradients(absent, differentiated_there):
    backward.test_absent_gradients(absent)


@poisoned
@pytest.mark.parametrize(
    "test",
    [
        backward.test_one_group_of_units,
        backward.test_states_in_float32,
        backward.test_no_steps,
        backward.test_infinite_weights_stay_out_of_short_rows,
    ],
    ids=lambda test: test.__name__.removeprefix("test_"),
)
def test_backward_edges(test, differentiated_there):
    test()


# ---- numbers: real sizes, the plan's choice


@arithmetics
@pytest.mark.parametrize(
    ("hidden", "batch"),
    [(64, 256), (128, 1), (200, 33), (256, 64), (512, 16), (1024, 3), (1024, 256)],
    ids=str,
)
def test_real_sizes(hidden, batch, arithmetic, device, differentiated_there):
    """64 steps, the reference in float64 on the device."""
    ok, why_not = fits(hidden, arithmetic.dtype, launch.limits_of(device), terms=arithmetic.TERMS)
    if not ok:
        pytest.skip(why_not)
    case = Case(64, batch, reverse=batch == 3)
    problem = forward.problem_of(case, hidden, arithmetic.dtype, 0)
    problem = problem_on(device, problem)
    check_forward(arithmetic, [problem], device)
    backward.check(arithmetic, [recurrence_of(problem)])


@arithmetics
@scopes
def test_every_scope_as_planned(scope, arithmetic, device, differentiated_there):
    """Configurations of the plan, which fill the registers; tiles that are not full."""
    hidden = 64 if scope == "block" else 256
    configs = both_planned(device, arithmetic, hidden, 37, SCOPE=scope)
    problem = forward.problem_of(Case(30, 37), hidden, arithmetic.dtype, 1)
    problem = problem_on(device, problem)
    check_forward(configs[0], [problem], device)
    backward.check(configs[1], [recurrence_of(problem)])


@arithmetics
@pytest.mark.parametrize("hidden", [256, 512])
def test_clusters_of_16(hidden, arithmetic, device, differentiated_there):
    configs = both_planned(device, arithmetic, hidden, 37, SCOPE="cluster", TEAM=16)
    problem = forward.problem_of(Case(30, 37), hidden, arithmetic.dtype, 2)
    problem = problem_on(device, problem)
    check_forward(configs[0], [problem], device)
    backward.check(configs[1], [recurrence_of(problem)])


# ---- launches: rounds, repetition, streams, graphs, devices


def some_configs(scope: str, device: torch.device) -> tuple[Config, Config]:
    """Both directions of bfloat16, `SIZES[scope]` units, in a scope."""
    return both_planned(device, ARITHMETIC["bf16"], SIZES[scope], 40, SCOPE=scope)


SIZES = {"block": 64, "cluster": 256, "grid": 512}


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_a_grid_takes_turns(resident, watch, device):
    """Several launches for one batch, and for several recurrences: the same bits as in one."""
    configs = some_configs("grid", device)
    case = Case(20, 40, lengths=True)
    problem, grads = make_both(case, SIZES["grid"], ARITHMETIC["bf16"], device)
    together = run_both(problem, grads, configs)
    watched = watch(resident=resident)
    for _ in range(3):
        assert_same_bits(run_both(problem, grads, configs), together)
    for config in configs:
        teams = [n for launched, n, _ in watched.launches if launched.direction == config.direction]
        assert max(teams) <= resident
        assert sum(teams) == 3 * -(-40 // config.COLUMNS)
    (again, *_) = launch.lstm_forward_many([problem] * 3, config=configs[0])
    assert_same_bits(list(again), together[:5])


@pytest.mark.parametrize("hidden", [128, 256])
@pytest.mark.parametrize("multiprocessors", [4, 6, 16])
def test_a_part_of_the_device(multiprocessors, hidden, monkeypatch, watch, device):
    """As where programs share a GPU: the plan, and the rounds, are those of fewer processors."""
    monkeypatch.setenv("FUSED_LSTM_MULTIPROCESSORS", str(multiprocessors))
    watched = watch(CudaExecutor())
    arithmetic = ARITHMETIC["bf16"]
    problem = forward.problem_of(Case(12, 100), hidden, arithmetic.dtype, 3)
    problem = problem_on(device, problem)
    (result,) = launch.lstm_forward_many([problem])
    forward.check(problem, result, arithmetic)
    recurrence = recurrence_of(problem)
    (gradients,) = launch.lstm_backward_many([problem_on(device, backward_problem(recurrence))])
    names = "grad_gates", "grad_h0", "grad_c0"
    exact, native = recurrence.expected(torch.float64), recurrence.expected()
    for name, a, n, e in zip(names, gradients, native, exact, strict=True):
        assert_within_budget(a, n, e, name)
    assert watched.launches
    for config, teams, _ in watched.launches:
        blocks = teams * config.TEAM
        assert multiprocessors >= config.TEAM
        # A multiprocessor has room for 32 blocks at most.
        assert not config.cooperative or blocks <= 32 * multiprocessors


@scopes
def test_runs_repeat_bit_for_bit(scope, device):
    configs = some_configs(scope, device)
    problem, grads = make_both(Case(60, 40), SIZES[scope], ARITHMETIC["bf16"], device)
    first = run_both(problem, grads, configs)
    for _ in range(30):
        assert_same_bits(run_both(problem, grads, configs), first)


@pytest.mark.parametrize(
    "pair",
    [("grid", "grid"), ("grid", "cluster"), ("cluster", "cluster"), ("block", "grid")],
    ids="-".join,
)
def test_two_kernels_at_the_same_time(pair, device):
    """On two streams: neither waits for blocks that the other keeps away, and the same bits."""
    jobs = []
    for k, scope in enumerate(pair):
        # The batch fills the device, or most of it.
        case = Case(50, 200, reverse=k == 1)
        problem, grads = make_both(case, SIZES[scope], ARITHMETIC["bf16"], device, seed=k)
        configs = both_planned(device, ARITHMETIC["bf16"], SIZES[scope], 200, SCOPE=scope)
        jobs.append((problem, grads, configs))
    alone = [run_both(*job) for job in jobs]
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in jobs]
    results: list[list[list[Tensor]]] = [[] for _ in jobs]
    for _ in range(10):
        for job, stream, found in zip(jobs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(run_both(*job))
    torch.cuda.synchronize(device)
    for expected, found in zip(alone, results, strict=True):
        for each in found:
            assert_same_bits(each, expected)


def changed(problem: launch.ForwardProblem, grads: backward.Gradients) -> None:
    """Other numbers in the same memory."""
    for tensor in (problem.gates, problem.h0, problem.c0, *grads):
        tensor.normal_()


@packed_or_not
@scopes
def test_graphs(scope, packed, device):
    configs = some_configs(scope, device)
    case = Case(20, 40, packed=packed, reverse=packed)
    problem, grads = make_both(case, SIZES[scope], ARITHMETIC["bf16"], device)
    run_both(problem, grads, configs)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_both(problem, grads, configs)
    for _ in range(3):
        changed(problem, grads)
        graph.replay()
        assert_same_bits(captured, run_both(problem, grads, configs))
        graph.replay()
        assert_same_bits(captured, run_both(problem, grads, configs))


@scopes
def test_a_kernel_is_loaded_while_a_graph_is_captured(scope, watch, device):
    configs = some_configs(scope, device)
    problem, grads = make_both(Case(20, 40), SIZES[scope], ARITHMETIC["bf16"], device)
    expected = run_both(problem, grads, configs)
    torch.cuda.synchronize(device)
    watch(CudaExecutor())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_both(problem, grads, configs)
    graph.replay()
    assert_same_bits(captured, expected)


@scopes
def test_another_device_than_the_current_one(scope, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        configs = some_configs(scope, other)
        problem, grads = make_both(Case(20, 40), SIZES[scope], ARITHMETIC["bf16"], other)
        results = run_both(problem, grads, configs)
        assert {x.device for x in results} == {other}
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert_same_bits(run_both(problem, grads, configs), results)


# ---- layers


I, H = 16, 32  # noqa: E741  (the field's name for the input size)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS = {
    "plain": {},
    "no-bias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "batch-first": {"batch_first": True, "num_layers": 2},
    "two-layers-bidirectional": {"num_layers": 2, "bidirectional": True},
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

Call = Callable[[nn.Module, Any, Any], Any]


class Called(nn.Module):
    """A layer that is called in some way."""

    def __init__(self, layer: nn.Module, call: Call | None = None) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Any, hx: Any) -> Any:
        return self.call(self.layer, x, hx) if self.call else self.layer(x, hx)


def compare_layers(
    native: nn.LSTM,
    ours: nn.Module,
    x: Any,
    hx: Any,
    *,
    native_call: Call | None = None,
    our_call: Call | None = None,
) -> None:
    """One training step: within the budget of cuDNN's 16 bits, or near float64."""
    dtype = helpers.data_of(x).dtype
    wide = copy.deepcopy(native).double()
    exact = helpers.run(
        Called(wide, native_call),
        helpers.map_input(torch.Tensor.double, x),
        tuple(state.double() for state in hx),
    )
    actual = test_gpu.train(Called(ours.to(test_gpu.DEVICE), our_call), x, hx)
    assert actual.keys() == exact.keys()
    if dtype != torch.float32:
        theirs = test_gpu.train(Called(native.to(test_gpu.DEVICE), native_call), x, hx)
        helpers.assert_same_results(actual, theirs, reference64=exact)
        return
    for name, expected in exact.items():
        # TF32 would be a hundred times as far away.
        tolerance = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            actual[name].double(), expected, rtol=0, atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def layers_of(dtype: torch.dtype = torch.float32, **options) -> tuple[nn.LSTM, nn.Module]:
    return helpers.build_pair(I, H, dtype=dtype, backend="cuda", **options)


@dtypes
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed-unsorted"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_layers(options, form, dtype):
    native, ours = layers_of(dtype, **options)
    x = helpers.make_input(form, dtype=dtype, batch_first=native.batch_first, size=I)
    compare_layers(native, ours, x, helpers.make_hx(native, form, dtype=dtype))


@dtypes
@pytest.mark.parametrize(("hidden", "batch", "steps"), [(256, 16, 30), (512, 3, 20)])
def test_larger_layers(hidden, batch, steps, dtype):
    options = {"num_layers": 2, "bidirectional": True, "dtype": dtype}
    native, ours = helpers.build_pair(48, hidden, backend="cuda", **options)
    x = helpers.make_input(dtype=dtype, steps=steps, batch=batch, size=48)
    compare_layers(native, ours, x, helpers.make_hx(native, dtype=dtype, batch=batch))


@dtypes
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
def test_lengths_are_packing(bidirectional, dtype):
    native, ours = layers_of(dtype, num_layers=2, bidirectional=bidirectional)
    steps, lengths = 9, [4, 9, 1, 6, 9]

    def packing(layer: nn.Module, x: Tensor, hx: Any) -> Any:
        packed, states = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        return pad_packed_sequence(packed, total_length=steps)[0], states

    compare_layers(
        native,
        ours,
        helpers.make_input(dtype=dtype, steps=steps, batch=5, size=I),
        helpers.make_hx(native, dtype=dtype, batch=5),
        native_call=packing,
        our_call=lambda layer, x, hx: layer(x, hx, lengths=lengths),
    )


@dtypes
def test_resets_are_new_states(dtype):
    native, ours = layers_of(dtype, num_layers=2)
    resets = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)) < 0.3

    def step_by_step(layer: nn.Module, x: Tensor, hx: Any) -> Any:
        outputs = []
        for own, reset in zip(x.split(1), resets.to(x.device), strict=True):
            output, hx = layer(own, tuple(s.masked_fill(reset.unsqueeze(1), 0) for s in hx))
            outputs.append(output)
        return torch.cat(outputs), hx

    compare_layers(
        native,
        ours,
        helpers.make_input(dtype=dtype, steps=9, batch=5, size=I),
        helpers.make_hx(native, dtype=dtype, batch=5),
        native_call=step_by_step,
        our_call=lambda layer, x, hx: layer(x, hx, resets=resets.to(x.device)),
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(dtype):
    native, ours = layers_of(num_layers=2)
    x, hx = helpers.make_input(size=I), helpers.make_hx(native)
    exact = test_gpu.exact(native, x, hx)
    with torch.autocast(test_gpu.DEVICE, dtype=dtype):
        theirs, actual = (test_gpu.train(m.to(test_gpu.DEVICE), x, hx) for m in (native, ours))
    assert actual["output"].dtype == dtype
    for name, expected in theirs.items():
        assert_within_budget(actual[name].to(dtype), expected.to(dtype), exact[name], name)


def test_tf32_is_what_cudnn_is_told(monkeypatch):
    """Operands are rounded where torch's own layers' would be, not else."""
    native, ours = helpers.build_pair(I, 128, backend="cuda")
    x, hx = helpers.make_input(steps=20, size=I), helpers.make_hx(native)
    exact = test_gpu.exact(native, x, hx)["output"]
    errors = {}
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
        actual = test_gpu.train(ours.to(test_gpu.DEVICE), x, hx)["output"]
        errors[precision] = (actual.double() - exact).abs().max().item()
    assert errors["ieee"] < 5e-6
    assert 10 * errors["ieee"] < errors["tf32"] < 5e-3


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, LAYERS["two-layers-bidirectional"]], ids=["one", "all"])
def test_compiled_as_one_graph(options, compiler):
    native, ours = layers_of(**options)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        ours.to(test_gpu.DEVICE).compile(fullgraph=True, backend=compiler)
        compare_layers(native, ours, helpers.make_input(size=I), helpers.make_hx(native))
    torch._dynamo.reset()


def test_a_stack_as_a_wavefront(monkeypatch, watch):
    """Three layers in three chunks of time: five launches each way."""
    watched = watch()
    for module in (wavefront, stack):
        monkeypatch.setattr(module, "chunk_lengths", lambda problem, layers, directions: (7, 7))
    native, ours = layers_of(num_layers=3)
    x = helpers.make_input(steps=20, batch=9, size=I)
    compare_layers(native, ours, x, helpers.make_hx(native, batch=9))
    assert [recurrences for *_, recurrences in watched.launches] == [1, 2, 3, 2, 1] * 2


def test_directions_share_a_launch(watch):
    watched = watch()
    native, ours = layers_of(num_layers=2, bidirectional=True)
    compare_layers(native, ours, helpers.make_input(size=I), helpers.make_hx(native))
    assert [recurrences for *_, recurrences in watched.launches] == [2] * 4


def test_a_long_sequence_becomes_a_wavefront_by_itself(watch):
    watched = watch()
    native, ours = helpers.build_pair(I, 64, 3, backend="cuda")
    x = helpers.make_input(steps=2000, batch=2, size=I)
    compare_layers(native, ours, x, helpers.make_hx(native, batch=2))
    assert max(recurrences for *_, recurrences in watched.launches) > 1


def test_a_refused_launch_falls_back_with_one_warning(monkeypatch, watch):
    """More teams than can run at the same time, where all must."""
    monkeypatch.setattr(ops, "_failed", set())

    def on_the_grid(*arguments, **options):
        plans = plan(*arguments, **options)
        return [each for each in plans if each.config.SCOPE == "grid"]

    monkeypatch.setattr(launch, "plan", on_the_grid)
    watched = watch(excess=100_000)
    native, ours = layers_of()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compare_layers(native, ours, helpers.make_input(size=I), helpers.make_hx(native))
    messages = [str(w.message) for w in caught if issubclass(w.category, KernelFallbackWarning)]
    assert [m.split(" kernel")[0] for m in messages] == ["the forward", "the backward"]
    assert all("resident" in m for m in messages)
    # Neither is tried a second time.
    assert len(watched.launches) == 2
    assert all(config.cooperative for config, *_ in watched.launches)


def test_the_limits_that_are_known_without_the_device(device):
    actual, known = driver.describe(device, multiprocessors=10**6), launch.known_limits("sm_90")
    if actual.arch != known.arch:
        pytest.skip(f"{actual.arch} comes in several sizes")
    assert dataclasses.replace(actual, multiprocessors=known.multiprocessors) == known
