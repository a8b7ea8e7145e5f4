"""The forward kernel in the SIMT emulator, division of work by division of work, against float64.

Every scope, type, number of columns, and every flag, with batches that do not fill their tiles and
hidden sizes that do not fill theirs, under several orders of events. Which division serves which
problem is not asked here: tests/kernels/test_cuda_launch.py leaves the choice to the plan.
"""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from fused_lstm.kernels.cuda import launch
from fused_lstm.kernels.cuda.config import ForwardConfig

from fused_lstm import reference
from fused_lstm.modifiers import Modifiers
from tests.budget import assert_within_budget
from tests.simt.emulator import EmulatedExecutor, Options

# Orders of events that differ much: who goes on, and when what is asynchronous happens.
ORDERS = (
    Options("fifo", "late", 1),
    Options("priority", "sometimes", 2),
    Options("lifo", "late", 3),
    Options("random", "late", 4),
    Options("lifo", "eager", 5),
)


def config(scope: str, hidden: int, team: int, columns: int, warps: tuple[int, int, int], **more):
    """A division of the work; `warps` are those along the units, groups of each, along K."""
    unit_warps, groups, k_warps = warps
    return ForwardConfig(
        SCOPE=scope, HIDDEN=hidden, TEAM=team, COLUMNS=columns,
        UNIT_WARPS=unit_warps, GROUPS=groups, K_WARPS=k_warps,
        **{"TYPE": "bfloat16", "REGISTER_TILES": 2, **more},
    )  # fmt: skip


CONFIGS = [
    # A block alone: all columns, groups, sums shared by warps, weights in both memories.
    config("block", 8, 1, 8, (1, 1, 1)),
    config("block", 24, 1, 64, (3, 1, 1), TYPE="float16"),
    config("block", 40, 1, 32, (3, 2, 1), TYPE="float32", REGISTER_TILES=0),
    config("block", 64, 1, 16, (4, 2, 2)),
    config("block", 128, 1, 8, (8, 2, 1), REGISTER_TILES=8),
    # Three TF32 products for one of float32; surplus warps that have no cells of their own.
    config("block", 32, 1, 8, (2, 2, 4), TYPE="float32", TERMS=3),
    # Clusters, with blocks and parts of K that hold nothing but padding.
    config("cluster", 64, 2, 8, (4, 1, 2), STAGES=2),
    config("cluster", 72, 4, 16, (1, 3, 4), TYPE="float16", REGISTER_TILES=0),
    config("cluster", 128, 16, 8, (1, 1, 4)),
    config("cluster", 40, 2, 16, (3, 1, 2), TYPE="float32", TERMS=3),
    # The grid.
    config("grid", 128, 4, 16, (4, 1, 2), REGISTER_TILES=4),
    config("grid", 40, 5, 8, (1, 1, 2), TYPE="float32"),
    config("grid", 136, 6, 32, (3, 1, 2), TYPE="float16"),
]


def name_of(config: ForwardConfig) -> str:
    size = f"{config.SCOPE}{config.TEAM}-{config.HIDDEN}x{config.COLUMNS}"
    return f"{config.TYPE}{config.TERMS if config.TERMS > 1 else ''}-{size}"


class Case(NamedTuple):
    """A recurrence: arguments of the kernel, as `launch.ForwardProblem` names them."""

    steps: int
    batch: int
    reverse: bool = False
    packed: bool = False
    lengths: bool = False
    modified: bool = False


# Batches of less than a tile, a tile and a bit; one step and several.
PLAIN = (Case(5, 11), Case(1, 3, reverse=True), Case(3, 65, reverse=True))
MODIFIED = (
    Case(4, 9, lengths=True),
    Case(5, 7, reverse=True, packed=True),
    Case(4, 6, reverse=True, lengths=True, modified=True),
    Case(4, 10, packed=True, modified=True),
    Case(3, 8, modified=True),
)


def problem_of(case: Case, hidden: int, dtype: torch.dtype, seed: int) -> launch.ForwardProblem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def chance(p: float, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) < p

    T, B, H = case.steps, case.batch, hidden
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    lengths[-1] = 0
    lengths[0] = T
    batch_sizes = None
    leading: tuple[int, ...] = (T, B)
    if case.packed:
        own = lengths.clamp(min=1).sort(descending=True).values
        batch_sizes = torch.stack([(own > t).sum() for t in range(T)])
        leading = (int(batch_sizes.sum()),)
    modifiers: dict[str, object] = {}
    if case.modified:
        modifiers = {
            "resets": chance(0.3, *leading),
            "recurrent_mask": (chance(0.7, B, H) / 0.7).to(dtype),
            "zoneout_h": chance(0.3, *leading, H).to(dtype),
            # A probability, with strides of 0.
            "zoneout_c": torch.full((1,) * len(leading) + (H,), 0.25).expand(*leading, H),
            "cell_clip": 0.75,
        }
    gates = normal(*leading, 4 * H)
    if case.lengths:
        # What is not to be read.
        gates = gates.masked_fill((torch.arange(T)[:, None] >= lengths)[..., None], torch.nan)
    return launch.ForwardProblem(
        gates=gates.to(dtype),
        weight_hh=(normal(4 * H, H) * H**-0.5).to(dtype),
        h0=normal(B, H).tanh().to(dtype),
        c0=normal(B, H).to(dtype),
        batch_sizes=batch_sizes,
        lengths=lengths if case.lengths else None,
        reverse=case.reverse,
        **modifiers,
    )


def by_reference(problem: launch.ForwardProblem, dtype: torch.dtype) -> reference.RecurrenceForward:
    def cast(x: object) -> object:
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.to(dtype) if floating else x

    p = launch.ForwardProblem(*map(cast, problem))
    modifiers = Modifiers(
        p.lengths, p.resets, p.recurrent_mask, p.zoneout_h, p.zoneout_c, p.cell_clip
    )
    return reference.recurrence_forward(
        p.gates, p.weight_hh, p.h0, p.c0, None, p.batch_sizes, modifiers, p.reverse
    )


# Of TF32 the 11 bits, of bfloat16's activation functions the 11 that they are computed to.
ROUNDING = 2.0**-11


def check(
    problem: launch.ForwardProblem, results: tuple[torch.Tensor, ...], config: ForwardConfig
) -> None:
    truth = by_reference(problem, torch.float64)
    native = by_reference(problem, problem.gates.dtype)
    coarse = config.TYPE == "bfloat16" or (config.TYPE == "float32" and config.TERMS == 1)
    for name, actual in zip(("h", "c", "activations", "h_n", "c_n"), results, strict=True):
        expected, plain = getattr(truth, name), getattr(native, name)
        assert actual.dtype == plain.dtype, name
        if coarse and actual.dtype == torch.float32:
            error = (actual.double() - expected).abs().max().item()
            budget = 2 * (plain.double() - expected).abs().max().item()
            budget += 4 * ROUNDING * max(1.0, expected.abs().max().item())
            assert error <= budget, f"{name}: error {error:.3g} above its budget of {budget:.3g}"
        else:
            assert_within_budget(actual, plain, expected, name)
        if problem.lengths is not None and actual.dim() == 3:
            beyond = torch.arange(actual.shape[0])[:, None] >= problem.lengths
            assert not actual[beyond].any(), f"{name} beyond the lengths"


@pytest.fixture(scope="session")
def emulator_directory(tmp_path_factory: pytest.TempPathFactory):
    # Below the folder that all workers share.
    directory = tmp_path_factory.getbasetemp().parent / "emulated-kernels"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch, emulator_directory) -> EmulatedExecutor:
    executor = EmulatedExecutor(directory=emulator_directory)
    monkeypatch.setattr(launch, "executor_for", lambda device: executor)
    return executor


def compute(problem: launch.ForwardProblem, **options: object) -> tuple[torch.Tensor, ...]:
    (result,) = launch.lstm_forward_many([problem], **options)
    return result


def run(executor: EmulatedExecutor, config: ForwardConfig, case: Case, order: Options, seed: int):
    """One recurrence and, for odd seeds, another in the same launch: other T, other direction."""
    dtype = getattr(torch, config.TYPE)
    executor.options = order
    other = case._replace(reverse=not case.reverse, steps=case.steps + 1)
    cases = [case, other] if seed % 2 else [case]
    problems = [problem_of(each, config.HIDDEN, dtype, seed + k) for k, each in enumerate(cases)]
    results = launch.lstm_forward_many(
        problems, input_precision="ieee" if config.TERMS == 3 else "tf32", config=config
    )
    for problem, result in zip(problems, results, strict=True):
        check(problem, result, config)


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_plain(config: ForwardConfig, executor: EmulatedExecutor):
    for seed, order in enumerate(ORDERS):
        run(executor, config, PLAIN[seed % len(PLAIN)], order, seed)
    assert all(launched.statistics.bank_conflicts == 0 for launched in executor.launches)


# The flags meet each scope and type once; each kernel with flags is compiled for itself.
@pytest.mark.parametrize(
    ("config", "case"),
    [
        (CONFIGS[k], case)
        for k, case in zip((2, 3, 4, 0, 5, 6, 7, 9, 10, 12, 11), MODIFIED * 3, strict=False)
    ],
    ids=lambda x: name_of(x) if isinstance(x, ForwardConfig) else "",
)
def test_modified(config: ForwardConfig, case: Case, executor: EmulatedExecutor):
    for seed, order in enumerate(ORDERS[:4]):
        run(executor, config, case, order, seed)


def test_nothing_is_saved_that_is_not_asked_for(executor: EmulatedExecutor):
    problem = problem_of(Case(3, 5), 64, torch.bfloat16, 0)
    config = CONFIGS[3]
    h, c, activations, h_n, c_n = compute(
        problem, save_activations=False, save_cells=False, config=config
    )
    assert c.shape == activations.shape == (0,)
    whole = compute(problem, config=config)
    for actual, expected in zip((h, h_n, c_n), (whole[0], *whole[3:]), strict=True):
        assert torch.equal(actual, expected)


def test_every_order_gives_the_same_bits(executor: EmulatedExecutor):
    for config in CONFIGS[6], CONFIGS[10]:
        problem = problem_of(Case(4, 9), config.HIDDEN, torch.bfloat16, 3)
        results = []
        for executor.options in ORDERS:
            results.append(compute(problem, config=config))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


def test_saturated_and_not_a_number(executor: EmulatedExecutor):
    """Gates far beyond saturation reach their limits; a NaN stays in its row."""
    for config in CONFIGS[3], CONFIGS[1], CONFIGS[2], CONFIGS[5]:
        dtype, H = getattr(torch, config.TYPE), config.HIDDEN
        problem = problem_of(Case(3, 4), H, dtype, 1)
        gates = problem.gates.clone()
        gates[:, 0] = 60000.0
        gates[:, 1] = -60000.0
        gates[1, 2, H // 2] = torch.nan
        problem = problem._replace(gates=gates)
        h, c, *_ = compute(
            problem,
            input_precision="ieee" if config.TERMS == 3 else "tf32",
            config=config,
        )
        truth = by_reference(problem, torch.float64)
        for actual, expected in (h, truth.h), (c, truth.c):
            assert torch.equal(actual.isnan(), expected.isnan())
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0.02, equal_nan=True)


def test_gates_of_every_magnitude(executor: EmulatedExecutor):
    """From where exponentials vanish to where they overflow, in steps of a sixteenth."""
    for config in CONFIGS[3], CONFIGS[1], CONFIGS[2], CONFIGS[5]:
        dtype, H = getattr(torch, config.TYPE), config.HIDDEN
        problem = problem_of(Case(1, 64), H, dtype, 5)
        gates = torch.linspace(-130, 130, 64 * 4 * H).view(1, 64, 4 * H)[..., torch.randperm(4 * H)]
        problem = problem._replace(
            gates=gates.to(dtype), weight_hh=torch.zeros_like(problem.weight_hh)
        )
        precision = "ieee" if config.TERMS == 3 else "tf32"
        results = compute(problem, input_precision=precision, config=config)
        check(problem, results, config)


def test_one_row_of_any_stride(executor: EmulatedExecutor):
    """The addresses of steps that there are not must be aligned, too."""
    config = CONFIGS[3]
    problem = problem_of(Case(1, 1), config.HIDDEN, torch.bfloat16, 2)
    wide = torch.zeros(1, 1, 4 * config.HIDDEN + 1, dtype=torch.bfloat16)
    wide[..., :-1] = problem.gates
    problem = problem._replace(gates=wide[..., :-1])
    check(problem, compute(problem, config=config), config)


def test_an_infinite_state_stays_with_its_row(executor: EmulatedExecutor):
    """Units that only fill a team up have weights of 0, and 0 times infinity is NaN."""
    config = CONFIGS[7]
    assert config.TEAM * config.units > config.HIDDEN
    problem = problem_of(Case(3, 5), config.HIDDEN, torch.float16, 2)
    problem.h0[0, 3] = torch.inf
    h, *_ = compute(problem, config=config)
    truth = by_reference(problem, torch.float64).h
    assert torch.equal(h.isnan(), truth.isnan())
    assert not h[:, 1:].isnan().any()


def test_lengths_beyond_the_sequence_are_those_of_it(executor: EmulatedExecutor):
    """Who calls the kernels by hand does not read what is not there."""
    config = CONFIGS[3]
    problem = problem_of(Case(3, 5), config.HIDDEN, torch.bfloat16, 2)
    whole = compute(problem._replace(lengths=torch.full((5,), 3)), config=config)
    beyond = compute(problem._replace(lengths=torch.full((5,), 9)), config=config)
    assert all(map(torch.equal, beyond, whole))


def test_states_of_a_part_are_float32(executor: EmulatedExecutor):
    """Two parts, c carried from one to the other in float32, are the whole, bit for bit."""
    config = CONFIGS[3]
    problem = problem_of(Case(6, 5), 64, torch.bfloat16, 2)
    whole = compute(problem, config=config)
    first = problem._replace(gates=problem.gates[:2], c0=problem.c0.float())
    ((h, *_, h_n, c_n),) = launch.lstm_forward_many([first], config=config, wide_states=True)
    assert c_n.dtype == torch.float32
    second = problem._replace(gates=problem.gates[2:], h0=h_n, c0=c_n)
    ((later, *_, last_h, last_c),) = launch.lstm_forward_many(
        [second], config=config, wide_states=True
    )
    assert torch.equal(torch.cat([h, later]), whole[0])
    assert torch.equal(last_h, whole[3])
    assert torch.equal(last_c.bfloat16(), whole[4])


def test_a_configuration_says_what_it_is_for(executor: EmulatedExecutor):
    problem = problem_of(Case(2, 3), 64, torch.float16, 0)
    with pytest.raises(ValueError, match="TYPE"):
        compute(problem, config=CONFIGS[3])
    with pytest.raises(ValueError, match="HIDDEN"):
        compute(problem, config=dataclasses.replace(CONFIGS[3], HIDDEN=56, TYPE="float16"))
