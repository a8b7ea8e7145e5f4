"""Every CUDA configuration that ships, compiled without a GPU: no spills, it fits, tensor cores.

All for sm_90; for the other architectures one of each kind, because each takes most of a second.
`python -m fused_lstm.kernels.cuda.compile_ahead --arch sm_80` compiles all of them for another.
"""

import dataclasses
import json

import pytest
from fused_lstm.kernels.cuda import compile_ahead, compiler
from fused_lstm.kernels.cuda.config import ARCHITECTURES, Config, ForwardConfig, shipped_configs

pytestmark = pytest.mark.skipif(
    compiler.availability() is not None, reason=str(compiler.availability())
)

# Inference in bfloat16 with the fewest columns, where a step is all latency.
SMALLEST = ForwardConfig(
    TYPE="bfloat16",
    SCOPE="block",
    HIDDEN=128,
    TEAM=1,
    COLUMNS=8,
    UNIT_WARPS=8,
    GROUPS=2,
    K_WARPS=1,
    REGISTER_TILES=8,
    SAVE_ACTIVATIONS=False,
    SAVE_CELLS=False,
)
IN_A_CLUSTER = dataclasses.replace(
    SMALLEST, SCOPE="cluster", HIDDEN=256, TEAM=4, GROUPS=1, REGISTER_TILES=16
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    """Compiles anew: what an earlier run has left tells nothing."""
    monkeypatch.setenv("FUSED_LSTM_CACHE", str(tmp_path))


def one_of_each_kind(arch: str) -> list[Config]:
    """The first configuration of each scope, and of each arithmetic, in each direction."""
    kept: dict[object, Config] = {}
    for config in shipped_configs(arch):
        kinds = (
            (config.direction, config.SCOPE),
            (config.direction, config.TYPE, config.TERMS),
            (config.direction, config.HAS_RESETS),
        )
        if any(kind not in kept for kind in kinds):
            kept.update((kind, config) for kind in kinds if kind not in kept)
    return list(dict.fromkeys(kept.values()))


def cases() -> list:
    """Architecture and configuration, named for a reader."""
    found = []
    for arch in ARCHITECTURES:
        configs = shipped_configs(arch) if arch == "sm_90" else one_of_each_kind(arch)
        for number, config in enumerate(configs):
            name = (
                f"{arch}-{number}-{config.direction}-{config.TYPE}x{config.TERMS}"
                f"-{config.HIDDEN}-{config.SCOPE}{config.TEAM}-{config.COLUMNS}"
            )
            found.append(pytest.param(arch, config, id=name))
    return found


@pytest.mark.parametrize(("arch", "config"), cases())
def test_a_shipped_configuration_compiles_without_spills_and_fits(arch, config) -> None:
    report = compile_ahead.report_on(config, arch)
    assert report.kernel == config.kernel_name
    assert report.local_bytes == 0, report
    assert report.registers <= report.register_limit, report
    assert report.shared_bytes <= report.shared_limit, report
    if report.instructions is not None:
        assert report.tensor_core_instructions > 0, report
        # The time loop is found, and it is not unrolled.
        assert 0 < report.loop_instructions < report.instructions, report
    assert report.fits


@pytest.mark.parametrize("config", [SMALLEST, IN_A_CLUSTER], ids=["one block", "a cluster of 4"])
def test_a_step_of_inference_takes_few_instructions(config) -> None:
    report = compile_ahead.report_on(config, "sm_90")
    if report.instructions is None:
        pytest.skip("no disassembler: Triton's wheel has one")
    # Every weight of the warp is multiplied once: the loop holds one step, not several.
    products = 2 * config.GROUPS * config.k_tiles
    assert report.tensor_core_instructions == products
    assert report.loop_instructions <= 260


# ---- how the loop is found


def test_the_time_loop_is_the_smallest_around_every_product() -> None:
    code = [
        (0x00, "MOV R1, R2"),
        (0x10, "IADD3 R1, R1, 1, RZ"),  # the outer loop over tiles begins
        (0x20, "LDSM.16.M88.4 R4, [R2]"),  # the time loop begins
        (0x30, "HMMA.16816.F32.BF16 R4, R8, R12, R4"),
        (0x40, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1]"),
        (0x50, "@!P0 BRA 0x40"),  # a wait
        (0x60, "HMMA.16816.F32.BF16 R4, R8, R12, R4"),
        (0x70, "@P1 BRA 0xa0"),
        (0x80, "@P2 BRA 0x20"),
        (0x90, "@P3 BRA 0x10"),
        (0xA0, "EXIT"),
        (0xB0, "BRA 0xb0"),
    ]
    assert compile_ahead.time_loop(code) == [text for _, text in code[2:9]]


def test_without_products_or_without_a_loop_there_is_no_time_loop() -> None:
    product = (0x20, "HMMA.1688.F32.TF32 R4, R8, R12, R4")
    assert compile_ahead.time_loop([(0x10, "NANOSLEEP 0x10"), (0x20, "BRA 0x10")]) is None
    assert compile_ahead.time_loop([(0x10, "BRA 0x30"), product, (0x30, "BRA 0x30")]) is None


# ---- the command


@pytest.fixture
def two_shipped(monkeypatch) -> list[Config]:
    """Only two configurations ship."""
    monkeypatch.setattr(compile_ahead, "shipped_configs", lambda arch: [SMALLEST, IN_A_CLUSTER])
    return [SMALLEST, IN_A_CLUSTER]


def test_the_command_prints_json(two_shipped, capsys) -> None:
    assert compile_ahead.main(["--arch", "sm_90", "--json", "--jobs", "2"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["config"] for report in reports] == [
        dataclasses.asdict(config) for config in two_shipped
    ]
    assert {report["arch"] for report in reports} == {"sm_90"}


def test_the_command_prints_a_table(two_shipped, capsys) -> None:
    assert compile_ahead.main(["--arch", "sm_90", "--arch", "sm_100", "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("sm_")] == ["sm_90", "sm_100"]
    assert sum(line.startswith("lstm_forward_kernel") for line in lines) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"local_bytes": 8},
        {"shared_bytes": 300_000},
        {"registers": 256},
        {"tensor_core_instructions": 0},
    ],
)
def test_the_command_fails_where_a_kernel_does_not_fit(monkeypatch, capsys, change) -> None:
    good = compile_ahead.report_on(SMALLEST, "sm_90")
    bad = dataclasses.replace(good, **change)
    monkeypatch.setattr(compile_ahead, "shipped_configs", lambda arch: [SMALLEST, SMALLEST])
    monkeypatch.setattr(compile_ahead, "compile_all", lambda *_: iter([good, bad]))
    assert compile_ahead.main(["--arch", "sm_90"]) == 1
    assert capsys.readouterr().out.count("DOES NOT FIT") == 1


def test_the_command_says_what_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(compile_ahead, "availability", lambda: "nothing there")
    with pytest.raises(SystemExit) as caught:
        compile_ahead.main(["--arch", "sm_90"])
    assert caught.value.code == 2
    assert "nothing there" in capsys.readouterr().err


def test_without_a_disassembler_instructions_are_not_counted(monkeypatch) -> None:
    monkeypatch.setattr(compile_ahead, "disassembler", lambda: None)
    report = compile_ahead.report_on(SMALLEST, "sm_90")
    assert report.instructions is None
    assert report.loop_instructions is None
    assert report.fits
