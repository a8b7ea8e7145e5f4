"""Time what fused_lstm does beyond torch.nn.LSTM: beside its plain layer and beside today's way.

Today's way is what has to be written with PyTorch alone: a loop over single steps where states are
reset or all cell states are wanted, packing where lengths differ. Where both compute the same, ours
is first checked against it in float64, results and gradients; what is wrong is not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_lstm
from benchmarks import records
from benchmarks.records import Recorder
from fused_lstm.bench import cases, timing

__all__ = ["SIZES", "Addition", "AdditionsRecord", "list_additions", "measure"]

# T, B, I, H: where matrix products take most of the time, and where they do not.
SIZES = ((128, 64, 128, 128), (128, 8, 16, 64))

# Takes a layer, input, h_0 and c_0; returns the results that are compared and differentiated.
Way = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Addition:
    """One thing that torch.nn.LSTM cannot do.

    Attributes:
        name: of its record.
        call: arguments of the call of the layer.
        options: arguments of `fused_lstm.LSTM`.
        todays: how it is done with PyTorch alone, and `todays_layer` with which layer; None where
            masks are random, so that results could not be compared.
        description: of today's way.
    """

    name: str
    call: dict[str, Any]
    options: dict[str, Any]
    todays: Way | None = None
    todays_layer: type[nn.Module] = nn.LSTM
    description: str = ""


def list_additions(T: int, B: int, device: torch.device) -> list[Addition]:
    """List what is timed: sequences of other lengths, episodes, cell states, regularizers."""
    generator = torch.Generator().manual_seed(0)
    resets = (torch.rand(T, B, generator=generator) < 0.05).to(device)
    keep = (~resets).unsqueeze(-1)
    drawn = torch.randint(T // 4, T + 1, (B,), generator=generator)
    drawn[0] = T
    drawn_on_device, full = drawn.to(device), torch.full((B,), T, device=device)

    def step_by_step(layer: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for x_t, keep_t in zip(x.unbind(0), keep, strict=True):
            output, (h, c) = layer(x_t.unsqueeze(0), (h * keep_t, c * keep_t))
            outputs.append(output)
        return torch.cat(outputs), h, c

    def packed(layer: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        rows = pack_padded_sequence(x, drawn, enforce_sorted=False)
        output, (h, c) = layer(rows, (h, c))
        return pad_packed_sequence(output, total_length=x.shape[0])[0], h, c

    def cell_by_cell(layer: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        h, c = h[0], c[0]
        hs, cs = [], []
        for x_t in x.unbind(0):
            h, c = layer(x_t, (h, c))
            hs.append(h)
            cs.append(c)
        return torch.stack(hs), h.unsqueeze(0), c.unsqueeze(0), torch.stack(cs)

    return [
        Addition(
            "resets",
            {"resets": resets},
            {},
            step_by_step,
            description="loop over nn.LSTM, states masked",
        ),
        Addition(
            "lengths",
            {"lengths": drawn_on_device},
            {},
            packed,
            description="pack_padded_sequence, nn.LSTM, pad_packed_sequence",
        ),
        Addition("lengths-all-T", {"lengths": full}, {}),
        Addition(
            "return_cells",
            {"return_cells": True},
            {},
            cell_by_cell,
            nn.LSTMCell,
            "loop over nn.LSTMCell",
        ),
        Addition("recurrent_dropout", {}, {"recurrent_dropout": 0.25}),
        Addition("weight_dropout", {}, {"weight_dropout": 0.5}),
        Addition("zoneout", {}, {"zoneout": 0.1}),
        Addition("cell_clip", {}, {"cell_clip": 3.0}),
    ]


class AdditionsRecord:
    """The record of all additions of a run, additions.json in the device's folder.

    Args:
        recorder: of the run.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._path = recorder.folder / "additions.json"
        self._measured: list[dict[str, Any]] = []
        if recorder.can_resume(self._path):
            self._measured = records.read_record(self._path)["additions"]

    def resumed(self, name: str, sizes: tuple[int, ...], mode: str) -> dict[str, Any] | None:
        """What an earlier run has of an addition, if this run resumes it."""
        for result in self._measured:
            if (result["addition"], *result["sizes"].values(), result["mode"]) == (
                name,
                *sizes,
                mode,
            ):
                return result
        return None

    def add(self, result: dict[str, Any], gemm: float, seconds: float) -> None:
        """Add what `measure` returned, and write the record.

        `largest_ratio` joins it: what `ratio` would be if ours were nothing but the products of all
        steps, at the rate of a large matrix product.

        Args:
            result: of one addition in one mode.
            gemm: floating-point operations per second of a large matrix product.
            seconds: for the samples of each addition and mode.
        """
        # With lengths there are fewer products.
        if "ratio" in result and result["addition"] != "lengths":
            todays = result["seconds"]["todays"]["p50"]
            result["gemm_flops_per_second"] = gemm
            result["largest_ratio"] = todays * gemm / result["flops"]
        self._measured.append(result)
        records.write_json(
            self._path,
            {
                "schema": records.SCHEMA,
                "environment": asdict(self._recorder.environment),
                "dtype": "float32",
                "seconds_per_mode": seconds,
                "additions": self._measured,
            },
        )


def measure(
    addition: Addition,
    sizes: tuple[int, int, int, int],
    mode: str,
    device: torch.device,
    seconds: float,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Time one addition, the same layer without it, and today's way, in turns.

    Returns:
        What goes into the record, where `ratio` is today's time over ours; and the samples, in
        seconds, by "ours", "plain" and "todays". There are none if ours is wrong.
    """
    T, B, inputs, hidden = sizes
    case = cases.Case(cases.Shape(T, B, inputs, hidden), "float32")
    data = cases.make_data(case, device)
    parameters = cases.make_parameters(case, device)
    training = mode == "training"
    ours = fused_lstm.LSTM(inputs, hidden, device=device, **addition.options).train(training)
    plain = fused_lstm.LSTM(inputs, hidden, device=device).train(training)
    contenders: dict[str, tuple[nn.Module, Way]] = {
        "ours": (ours, lambda layer, x, h, c: _flat(layer(x, (h, c), **addition.call))),
        "plain": (plain, lambda layer, x, h, c: _flat(layer(x, (h, c)))),
    }
    if addition.todays is not None:
        todays = addition.todays_layer(inputs, hidden, device=device).train(training)
        contenders["todays"] = (todays, addition.todays)
    for layer, _ in contenders.values():
        # A cell's parameters are named as a layer's are, without the layer's number.
        values = iter(parameters.values())
        layer.load_state_dict({name: next(values) for name in layer.state_dict()})
    with torch.set_grad_enabled(training):
        explanation = fused_lstm.explain(ours, data.inputs[0], **addition.call)
    result: dict[str, Any] = {
        "addition": addition.name,
        "sizes": dict(zip("TBIH", sizes, strict=True)),
        "options": addition.options,
        "mode": mode,
        "flops": case.flops(mode),
        "backend": explanation.backend,
        "todays_way": addition.description,
        "status": "timed",
    }
    with torch.set_grad_enabled(training), cases.products_of(case):
        if addition.todays is not None:
            worst = _error_over_budget(contenders, data)
            result["error_over_budget"] = worst
            # Written so that NaN is wrong.
            if not worst <= 1:
                result["status"] = "wrong"
                return result, {}
        calls = {
            name: lambda _, layer=layer, way=way: _call(layer, way, data.inputs)
            for name, (layer, way) in contenders.items()
        }
        samples = timing.time_in_turns(calls, device, seconds)
    times = {name: timing.percentiles(taken.seconds) for name, taken in samples.items()}
    result["seconds"] = {name: asdict(time) for name, time in times.items()}
    result["repetitions"] = len(samples["ours"].seconds)
    result["over_plain"] = times["ours"].p50 / times["plain"].p50
    if "todays" in times:
        result["ratio"] = times["todays"].p50 / times["ours"].p50
    return result, {name: taken.seconds for name, taken in samples.items()}


def _flat(results: Any) -> tuple[Tensor, ...]:
    output, states, *rest = results
    return output, *states, *rest


def _call(layer: nn.Module, way: Way, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Call a layer; with gradients enabled, run the backward pass too. This is what is timed."""
    results = way(layer, *inputs)
    if not torch.is_grad_enabled():
        return results
    gradients = torch.autograd.grad(
        results, (*inputs, *layer.parameters()), [torch.ones_like(r) for r in results]
    )
    return (*results, *gradients)


def _error_over_budget(contenders: dict[str, tuple[nn.Module, Way]], data: cases.Data) -> float:
    """The largest error of ours against today's way in float64, over what it may be."""
    (layer, way), (todays, todays_way) = contenders["ours"], contenders["todays"]
    actual = _call(layer, way, data.inputs)
    native = _call(todays, todays_way, data.inputs)
    exact = [t.detach() for t in _call(todays.double(), todays_way, data.to(torch.float64).inputs)]
    todays.float()
    budgets = cases.error_budgets(
        cases.largest_errors(native, exact), exact, torch.finfo(torch.float32).eps
    )
    errors = cases.largest_errors(actual, exact)
    ratios = cases.over_budget(errors, budgets)
    # The maximum of a list with NaN in it depends on the order.
    return math.inf if any(map(math.isnan, ratios)) else max(ratios)
