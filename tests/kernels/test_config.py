"""The choice of a kernel and its tiles: pure, total, and all of it compiled ahead."""

import itertools

import pytest
import torch
from fused_lstm.kernels.triton.config import (
    ARCHITECTURES,
    DIRECTIONS,
    DTYPES,
    INPUT_PRECISIONS,
    MODIFIERS,
    LaunchConfig,
    select_launch_config,
    shipped_configs,
)

SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 512, 1000, 4096, 10**6]
PROBLEMS = list(itertools.product(DIRECTIONS, DTYPES, INPUT_PRECISIONS))


def select(
    direction="forward", batch=16, hidden=64, dtype=torch.bfloat16, **options
) -> LaunchConfig:
    options = {"arch": "sm_90", "input_precision": "ieee", **options}
    return select_launch_config(direction, batch=batch, hidden=hidden, dtype=dtype, **options)


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_86", "sm_89", "sm_120", "gfx950"])
def test_every_problem_has_a_shipped_configuration(arch):
    shipped = {
        (s.direction, s.dtype, s.input_precision if s.dtype == torch.float32 else None, s.config)
        for s in shipped_configs(arch)
    }
    chosen = set()
    for direction, dtype, precision in PROBLEMS:
        for batch, hidden, scope in itertools.product(SIZES, SIZES, [None, "step"]):
            config = select(
                direction, batch, hidden, dtype, arch=arch, input_precision=precision, scope=scope
            )
            assert config.scope == (scope or config.scope)
            if config.scope == "sequence":
                assert hidden <= config.BLOCK_H
            key = precision if dtype == torch.float32 else None
            chosen.add((direction, dtype, key, config))
    assert chosen == shipped


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_modifies_the_recurrence_has_shipped_configurations(arch, modifiers):
    shipped = {(s.direction, s.dtype, s.config) for s in shipped_configs(arch, modifiers)}
    assert {s.modifiers for s in shipped_configs(arch, modifiers)} == {modifiers}
    chosen = {
        (direction, dtype, select(direction, batch, hidden, dtype, **options))
        for direction, dtype, precision in PROBLEMS
        for batch, hidden, scope in itertools.product([1, 1000], SIZES, [None, "step"])
        for options in [
            {"arch": arch, "input_precision": precision, "scope": scope, "modifiers": modifiers}
        ]
    }
    assert chosen == shipped


@pytest.mark.parametrize("modifiers", MODIFIERS)
def test_modifiers_take_no_hidden_size_from_the_sequence_kernel(modifiers):
    for arch, (direction, dtype, precision) in itertools.product(ARCHITECTURES, PROBLEMS):
        for hidden in SIZES:
            options = {"arch": arch, "input_precision": precision}
            plain = select(direction, 16, hidden, dtype, **options)
            modified = select(direction, 16, hidden, dtype, **options, modifiers=modifiers)
            assert (plain.scope, plain.BLOCK_B) == (modified.scope, modified.BLOCK_B)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_configurations_ship(arch):
    for direction in DIRECTIONS:
        # fp16 and bf16 share theirs.
        shipped = [s for s in shipped_configs(arch) if s.direction == direction]
        assert len({s.config for s in shipped if s.dtype != torch.bfloat16}) <= 12


def test_same_arguments_same_choice():
    assert select() == select()
    assert hash(select()) == hash(select())


def test_small_hidden_sizes_run_in_one_launch():
    assert select(hidden=128).scope == "sequence"
    assert select(hidden=129).scope == "step"
    assert select(hidden=64).scope == select(hidden=63).scope == "sequence"
    assert select(hidden=64, dtype=torch.float32, input_precision="tf32").scope == "sequence"


def test_batch_only_chooses_a_bucket():
    buckets = {select(batch=batch, hidden=512) for batch in range(1, 300)}
    assert len(buckets) == 2


def test_naming_a_kernel():
    assert select(scope="step").scope == "step"
    assert select(scope="sequence").scope == "sequence"
    with pytest.raises(ValueError, match=r"4 \* 256 \* 256 \* 2 bytes = 524288 .*hidden <= 128"):
        select(hidden=256, scope="sequence")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"direction": "sideways"}, "direction"),
        ({"dtype": torch.float64}, "dtype"),
        ({"input_precision": "bf16x3"}, "input_precision"),
        ({"scope": "grid"}, "scope"),
        ({"modifiers": "dropout"}, "modifiers"),
    ],
    ids=str,
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        select(**wrong)
