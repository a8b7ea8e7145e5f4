"""The choice of a CUDA kernel's configuration: pure, feasible, and the sizes those of the C++."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json

import pytest
import torch
from fused_lstm.kernels.cuda import parameters
from fused_lstm.kernels.cuda.config import (
    ALL_MODIFIERS,
    ARCHITECTURES,
    DIRECTIONS,
    DTYPES,
    INFERENCE,
    BackwardConfig,
    Config,
    DeviceLimits,
    Flags,
    ForwardConfig,
    fits,
    known_limits,
    plan,
    shipped_configs,
    terms_of,
)
from fused_lstm.kernels.cuda.costs import MEASURED_FILE, Measurements, committed_measurements

from ..simt import emulator

HOPPER = known_limits("sm_90")
KINDS = [(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 1), (torch.float32, 3)]
kinds = pytest.mark.parametrize(("dtype", "terms"), KINDS, ids=["fp16", "bf16", "tf32", "fp32"])
directions = pytest.mark.parametrize("direction", DIRECTIONS)
architectures = pytest.mark.parametrize("arch", ARCHITECTURES)


def plans(direction="forward", batch=16, hidden=64, dtype=torch.bfloat16, limits=HOPPER, **options):
    return plan(direction, batch=batch, hidden=hidden, dtype=dtype, limits=limits, **options)


def best(*arguments, **options) -> Config:
    return plans(*arguments, **options)[0].config


def check_feasible(config: Config, hidden: int, limits: DeviceLimits) -> None:
    """What no configuration may lack, whatever the plan thinks of it."""
    assert hidden == config.HIDDEN
    assert config.TEAM * config.units >= hidden
    # Every block has something to do.
    assert (config.TEAM - 1) * config.units < hidden
    assert config.COLUMNS in (8, 16, 32, 64)
    assert 1 <= config.warps <= 8
    assert config.threads == 32 * config.warps
    assert config.k_tiles % 2 == config.REGISTER_TILES % 2 == 0
    assert 0 <= config.REGISTER_TILES <= config.k_tiles
    assert config.weight_registers + config.accumulators < 250
    assert config.shared_bytes <= limits.shared_bytes
    assert (config.SCOPE == "block") == (config.TEAM == 1)
    assert config.cooperative == (config.SCOPE == "grid") == (config.exchange_bytes > 0)
    if config.SCOPE == "cluster":
        assert config.cluster == config.TEAM <= limits.max_cluster
    else:
        assert config.cluster == 1
        assert limits.multiprocessors >= config.TEAM
    if isinstance(config, BackwardConfig):
        assert config.TEAM * config.unit_tiles <= config.ROW_WARPS * config.ROW_TILES
        assert config.UNITS % (8 if config.TEAM == 1 else 16) == 0


@directions
@kinds
@architectures
def test_every_plan_is_feasible(direction, dtype, terms, arch):
    limits = known_limits(arch)
    flags = [Flags(), ALL_MODIFIERS]
    for hidden, batch in itertools.product((8, 24, 64, 136, 200, 512), (1, 100)):
        found = plans(
            direction, batch, hidden, dtype, limits, terms=terms, flags=flags[hidden % 16 == 8]
        )
        assert found
        assert [p.cost_us for p in found] == sorted(p.cost_us for p in found)
        for p in found:
            check_feasible(p.config, hidden, limits)
            assert p.config.direction == direction
            assert terms == p.config.TERMS
            assert p.tiles == -(-batch // p.config.COLUMNS)
            assert p.waves >= 1
            assert p.config.SCOPE in p.reason


@directions
def test_every_hidden_size_up_to_2048_runs_in_16_bits_on_hopper(direction):
    for hidden in range(8, 2049, 8):
        found = plans(direction, 8, hidden, torch.bfloat16)
        assert found, hidden
        check_feasible(found[0].config, hidden, HOPPER)
    assert fits(2048, torch.float16, HOPPER) == (True, "")


@directions
def test_every_number_of_columns_can_be_had(direction):
    for hidden in (64, 256):
        assert {p.config.COLUMNS for p in plans(direction, 64, hidden)} == {8, 16, 32, 64}


def test_same_arguments_same_plan():
    assert plans() == plans()
    assert hash(best()) == hash(best())


@directions
def test_small_teams_for_small_layers(direction):
    """DESIGN: a block to 128 units, a cluster to about 512, beyond them the grid."""
    assert best(direction, 8, 64).SCOPE == "block"
    assert best(direction, 8, 256).SCOPE == "cluster"
    assert best(direction, 8, 1024).SCOPE == "grid"
    ampere = known_limits("sm_80")
    for hidden in (64, 256, 512):
        assert {p.config.SCOPE for p in plans(direction, 8, hidden, limits=ampere)} <= {
            "block",
            "grid",
        }


def test_a_large_batch_gets_smaller_teams_than_a_small_one():
    assert best(batch=8, hidden=256).TEAM > best(batch=256, hidden=256).TEAM


@directions
def test_few_kernels_serve_many_batches(direction):
    for hidden in (64, 512):
        assert len({best(direction, batch, hidden) for batch in range(1, 257)}) <= 8


def test_recurrences_count_like_rows_of_the_batch():
    both = plans(batch=128, hidden=256, recurrences=2)
    alone = plans(batch=256, hidden=256)
    assert [p.config for p in both] == [p.config for p in alone]
    assert both[0].tiles * 2 == alone[0].tiles


def test_fewer_multiprocessors_make_more_waves_or_smaller_teams():
    few = dataclasses.replace(HOPPER, multiprocessors=8)
    assert plans(batch=256, hidden=256, limits=few)[0].waves > 1
    assert all(p.config.TEAM <= 8 for p in plans(batch=256, hidden=256, limits=few))


def test_what_is_refused_and_why():
    assert fits(64, torch.bfloat16, HOPPER) == (True, "")
    assert fits(64, torch.float64, HOPPER) == (
        False,
        "torch.float64 is not one of float32, float16, bfloat16",
    )
    assert fits(20, torch.bfloat16, HOPPER) == (False, "hidden_size=20 is not a multiple of 8")
    ok, reason = fits(64, torch.float16, known_limits("sm_75"))
    assert not ok
    assert reason == "sm_75 is older than sm_80, the first with bfloat16 and TF32"
    ok, reason = fits(4096, torch.float16, HOPPER)
    assert not ok
    assert "4 * 4096 * 4096 * 2 bytes = 134217728 for hidden_size=4096 in float16" in reason
    assert "132 * (232448 of shared memory + 261120 of registers) = 65150976 on sm_90" in reason
    assert plans(hidden=4096) == []
    assert plans(hidden=20) == []
    with pytest.raises(ValueError, match="direction must be one of"):
        plans("sideways")
    with pytest.raises(ValueError, match="dtype must be one of"):
        plans(dtype=torch.float64)


def test_terms():
    assert terms_of(torch.bfloat16, "ieee") == terms_of(torch.float32, "tf32") == 1
    assert terms_of(torch.float32, "ieee") == 3
    with pytest.raises(ValueError, match="input_precision"):
        terms_of(torch.float32, "tf64")
    with pytest.raises(ValueError, match="dtype"):
        terms_of(torch.float64, "ieee")


@pytest.mark.parametrize(
    ("arch", "like"),
    [("sm_87", "sm_86"), ("sm_90a", "sm_90"), ("sm_103", "sm_100"), ("sm_121", "sm_120")],
)
def test_limits_of_other_architectures_are_those_of_relatives(arch, like):
    known = known_limits(like)
    assert known_limits(arch) == dataclasses.replace(known, arch=arch.rstrip("a"))


def test_an_unknown_generation_gets_what_all_have():
    limits = known_limits("sm_150")
    assert limits.max_cluster == 1
    assert limits.shared_bytes == 99 * 1024
    assert fits(128, torch.bfloat16, limits)[0]


# ---- measurements


def table(*measurements) -> dict:
    return {"schema": 1, "measurements": list(measurements)}


def measured(config: Config, us: float, arch: str = "sm_90") -> dict:
    return {
        "arch": arch,
        "direction": config.direction,
        "config": config.shape,
        "us_per_step": us,
    }


def test_the_committed_table_is_valid():
    assert committed_measurements() is committed_measurements()
    Measurements(json.loads(MEASURED_FILE.read_text()))


def test_a_measurement_decides():
    order = plans(batch=64, hidden=256)
    slow, fast = order[0], order[4]
    made_up = Measurements(
        json.loads(json.dumps(table(measured(slow.config, 9.0), measured(fast.config, 0.01))))
    )
    corrected = plans(batch=64, hidden=256, measurements=made_up)
    assert corrected[0].config == fast.config
    assert corrected[0].cost_us == pytest.approx(0.01 * fast.waves)
    # Flags do not matter, the architecture does.
    lengths = plans(batch=64, hidden=256, measurements=made_up, flags=Flags(lengths=True))
    assert lengths[0].config.shape == fast.config.shape
    elsewhere = Measurements(table(measured(fast.config, 0.01, "sm_100")))
    assert plans(batch=64, hidden=256, measurements=elsewhere) == order


def test_measurements_correct_the_model_of_the_same_scope():
    order = plans(batch=64, hidden=256)
    cluster = next(p for p in order if p.config.SCOPE == "cluster")
    made_up = Measurements(table(measured(cluster.config, 100.0)))
    corrected = plans(batch=64, hidden=512, measurements=made_up)
    assert corrected[0].config.SCOPE == "grid"
    grid = {p.config: p.cost_us for p in plans(batch=64, hidden=512) if p.config.SCOPE == "grid"}
    assert {p.config: p.cost_us for p in corrected if p.config.SCOPE == "grid"} == grid


def test_a_table_that_is_wrong_says_where():
    right = measured(best(), 1.0)
    for wrong, message in [
        ({}, 'expected the keys "schema" and "measurements"'),
        ({"schema": 2, "measurements": []}, "expected schema 1, got 2"),
        ({"schema": 1, "measurements": {}}, "must be a list"),
        (table(right, right), "measurement 1 is there twice"),
        (table(right | {"us_per_step": 0}), "measurement 0: us_per_step must be a positive number"),
        (table(right | {"arch": 90}), "measurement 0: arch must be a name"),
        (table(right | {"direction": "up"}), "measurement 0: direction must be one of"),
        (table(right | {"note": ""}), "measurement 0: expected the keys"),
        (table(right | {"config": {"TYPE": "float16"}}), "measurement 0: .*missing"),
        (table(right | {"config": right["config"] | {"SPEED": 1}}), "measurement 0: .*SPEED"),
        (table(right | {"config": right["config"] | {"PACKED": True}}), "and nothing else"),
    ]:
        with pytest.raises(ValueError, match=message):
            Measurements(wrong)


# ---- what is compiled ahead


@architectures
def test_a_modest_number_of_configurations_ships(arch):
    shipped = shipped_configs(arch)
    assert 50 <= len(shipped) <= 90
    assert len(set(shipped)) == len(shipped)
    for config in shipped:
        check_feasible(config, config.HIDDEN, known_limits(arch))
    assert {c.direction for c in shipped} == set(DIRECTIONS)
    assert {(c.TYPE, c.TERMS) for c in shipped} == {
        (str(dtype)[6:], terms) for dtype, terms in KINDS
    }
    assert any(c.PACKED for c in shipped)
    assert any(c.HAS_ZONEOUT_H and c.HAS_CELL_CLIP and c.HAS_RESETS for c in shipped)


def test_the_configurations_whose_instructions_are_counted_ship():
    shipped = {
        (c.HIDDEN, c.TEAM, c.COLUMNS)
        for c in shipped_configs("sm_90")
        if c.direction == "forward" and not c.SAVE_ACTIVATIONS and c.TYPE == "bfloat16"
    }
    assert shipped == {(128, 1, 8), (256, 4, 8)}


# ---- the same sizes in C++


def test_flags_become_constants():
    config = best(flags=Flags(packed=True))
    assert config.PACKED
    assert config.HAS_LENGTHS
    assert config.with_flags(Flags()) == best()
    assert best(flags=INFERENCE).SAVE_CELLS is False
    source = best(flags=ALL_MODIFIERS).source()
    for line in (
        '#include "forward.cuh"',
        "static constexpr Type TYPE = Type::bfloat16;",
        "static constexpr Scope SCOPE = Scope::block;",
        "static constexpr int HIDDEN = 64;",
        "static constexpr bool HAS_CELL_CLIP = true;",
        "LSTM_FORWARD_KERNEL(Configuration)",
    ):
        assert line in source
    assert '#include "backward.cuh"' in best("backward").source()


def sizes_source(configs: list[Config]) -> str:
    """C++ that asserts the sizes of configurations without compiling their kernels."""
    parts = ['#include "layout.cuh"', '#include "backward_layout.cuh"']
    for number, config in enumerate(configs):
        instance = config.source().replace("Configuration", f"Configuration{number}")
        parts += [
            line
            for line in instance.splitlines()
            if not line.startswith(("#include", "LSTM_FORWARD", "LSTM_BACKWARD"))
        ]
        layout = f"{config.direction.capitalize()}Layout<Configuration{number}>"
        parts.append(f'static_assert({layout}::K_TILES == {config.k_tiles}, "");')
        parts.append(f'static_assert({layout}::WARPS == {config.warps}, "");')
    return "\n".join(parts)


def structure_source() -> str:
    """C++ with a function that writes the sizes and offsets of the parameters."""
    values = []
    for structure, name in (
        (parameters.Modifiers, "Modifiers"),
        (parameters.ForwardRecurrence, "ForwardRecurrence"),
        (parameters.BackwardRecurrence, "BackwardRecurrence"),
        (parameters.ForwardParameters, "ForwardParameters"),
        (parameters.BackwardParameters, "BackwardParameters"),
    ):
        values.append(f"sizeof({name})")
        values += [f"offsetof({name}, {field})" for field, _ in structure._fields_]
    return f"""
#include <cstddef>
extern "C" int max_recurrences() {{ return MAX_RECURRENCES; }}
extern "C" void parameter_layout(long long* to) {{
  const long long values[] = {{{", ".join(values)}}};
  for (long long value : values) *to++ = value;
}}
"""


def test_sizes_and_parameters_are_those_of_the_headers():
    configs = {
        p.config
        for direction, (dtype, terms), hidden in itertools.product(
            DIRECTIONS, KINDS, (8, 72, 256, 768)
        )
        for limits in (HOPPER, known_limits("sm_80"))
        for p in plans(direction, 64, hidden, dtype, limits, terms=terms)
    }
    assert len(configs) > 300
    assert {c.K_WARPS for c in configs} == {1, 2, 4, 8}
    assert {type(c) for c in configs} == {ForwardConfig, BackwardConfig}
    library = emulator.compile_library(sizes_source(sorted(configs, key=repr)) + structure_source())
    assert library.max_recurrences() == parameters.MAX_RECURRENCES
    expected = []
    for structure in (
        parameters.Modifiers,
        parameters.ForwardRecurrence,
        parameters.BackwardRecurrence,
        parameters.ForwardParameters,
        parameters.BackwardParameters,
    ):
        expected.append(ctypes.sizeof(structure))
        expected += [getattr(structure, field).offset for field, _ in structure._fields_]
    layout = (ctypes.c_longlong * len(expected))()
    library.parameter_layout(layout)
    assert list(layout) == expected


def test_dtypes_have_names():
    assert {best(dtype=dtype).TYPE for dtype in DTYPES} == {"float16", "bfloat16", "float32"}
