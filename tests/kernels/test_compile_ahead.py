"""Every shipped configuration, compiled for every architecture: no spills, and it fits."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from fused_lstm.kernels.triton.config import ARCHITECTURES, shipped_configs


def compile_ahead(arch, modifiers, cache) -> list[dict]:
    """The reports on every configuration that ships; none spills, and all fit."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    # The interpreter, which the other tests run in, does not compile.
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "fused_lstm.kernels.triton.compile_ahead"]
    result = subprocess.run(
        [*command, "--arch", arch, "--modifiers", modifiers, "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout, result.stderr
    reports = json.loads(result.stdout)
    compiled = {tuple(report["config"].values()) for report in reports}
    assert compiled == {tuple(asdict(s.config).values()) for s in shipped_configs(arch, modifiers)}
    for report in reports:
        assert report["spill_bytes"] == 0, report
        assert report["shared_bytes"] <= report["shared_limit"], report
        if report["dtype"] != "fp32" or report["input_precision"] == "tf32":
            assert report["tensor_core_instructions"] > 0, report
    assert result.returncode == 0, result.stderr
    return reports


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_compiles_without_spills(arch, tmp_path):
    assert compile_ahead(arch, "none", tmp_path)


# For the other architectures it takes minutes more: the command says the same of them.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("arch", "modifiers"), [("sm_90", "lengths"), ("sm_90", "any")])
def test_what_modifies_the_recurrence_compiles_without_spills(arch, modifiers, tmp_path):
    assert {report["modifiers"] for report in compile_ahead(arch, modifiers, tmp_path)} == {
        modifiers
    }
