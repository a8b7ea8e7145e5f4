"""python -m fused_lstm info | check."""

from __future__ import annotations

import pytest
import torch

from fused_lstm import check
from fused_lstm.__main__ import main


def test_info_prints_versions_and_the_choice(capsys) -> None:
    assert main(["info", "--hidden", "32", "--device", "sm_90"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "LSTM(64, 32) on sm_90 GPU" in printed
    assert "-> aten" in printed


def test_check_passes_here(capsys) -> None:
    assert main(["check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for line in ("aten       float32   ok", "reference  float64   ok", "reference  bfloat16  ok"):
        assert line in printed
    assert "triton     float64   --" in printed


def test_check_notices_a_wrong_result(monkeypatch, capsys) -> None:
    right = check._results
    calls = []

    def wrong(layer, x, packed):
        results = right(layer, x, packed)
        calls.append(1)
        # The first of three is the layer under test.
        return [r * 1.5 for r in results] if len(calls) % 3 == 1 else results

    monkeypatch.setattr(check, "_results", wrong)
    assert main(["check", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_command_is_required(capsys) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "command" in capsys.readouterr().err
