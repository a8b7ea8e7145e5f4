"""Time fused_lstm's layers beside torch.nn's: same parameters, same inputs, taking turns.

Each layer is first checked against torch.nn's in float64; one that is wrong is not timed.
Records go to a folder named after the device. The exit status is 0; 1 if a layer was wrong or
failed; 2 for arguments that cannot be.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import fused_lstm
from benchmarks import cases, records, timing
from benchmarks.cases import Case, Data, Provider, Shape
from benchmarks.records import Environment, Result
from fused_lstm import ops
from fused_lstm.backends import ORDER

DEFAULT_SECONDS = {"cpu": 2.0, "cuda": 0.3}
DEFAULT_BUDGET = {"cpu": 420.0, "cuda": 150.0}
DEFAULT_BACKENDS = {"cpu": ("default",), "cuda": ("default", "cuda", "triton")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    device: torch.device = options.device
    if options.tuned_allocator:
        if device.type != "cpu":
            parser.error(f"argument --tuned-allocator: expected --device cpu, got {str(device)!r}")
        library, version = platform.libc_ver()
        # Before 2.35, it ignored thresholds above 32 MiB.
        if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
            parser.error(
                "argument --tuned-allocator: expected a Python on glibc 2.35 or later, got "
                f"{' '.join((library, version)).strip() or platform.system()}"
            )
        if not records.allocator_is_tuned():
            # The allocator reads its environment when a process starts.
            command = [sys.executable, "-m", "benchmarks.compare", *arguments]
            environment = {**os.environ, **records.TUNED_ALLOCATOR}
            return subprocess.run(command, env=environment, check=False).returncode
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error(
                f"argument --device: expected a device that is there, got {str(device)!r}, and "
                f"torch {torch.__version__} sees no CUDA GPU"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            parser.error(
                f"argument --device: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}, "
                f"got {str(device)!r}"
            )
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(
            f"argument --out: expected a folder that can be written to, got {str(options.out)!r} "
            f"({error.strerror})"
        )
    chosen = [
        replace(case, tuned_allocator=options.tuned_allocator)
        for case in cases.list_cases(device.type, options.dtype or (), options.shape or ())
    ]
    return run(
        chosen,
        cases.list_providers(options.backend or DEFAULT_BACKENDS[device.type]),
        device,
        options.out,
        seconds=options.seconds or DEFAULT_SECONDS[device.type],
        budget=options.budget or DEFAULT_BUDGET[device.type],
        name="run" + cases.TUNED_ALLOCATOR_SUFFIX * options.tuned_allocator,
    )


def run(
    chosen: Sequence[Case],
    providers: Sequence[Provider],
    device: torch.device,
    out: Path,
    *,
    seconds: float,
    budget: float,
    name: str = "run",
) -> int:
    """Run cases until the budget is spent, write their records, print the table.

    Args:
        chosen: the cases, in order.
        providers: `cases.TORCH` first.
        device: where to run.
        out: folder of all devices' records.
        seconds: time for each case and mode.
        budget: seconds for the whole run; a case that would not fit is not begun.
        name: of the record of the run.

    Returns:
        0, or 1 if a layer was wrong or failed.
    """
    start = time.monotonic()
    environment = records.describe_environment(device)
    folder = out / environment.slug
    print(
        f"{environment.device}, torch {environment.torch}, {environment.threads} threads, load "
        f"average {environment.load_average}"
    )
    done: list[tuple[Case, list[Result]]] = []
    durations: list[float] = []
    gemm: dict[torch.dtype, float] = {}
    not_run: dict[str, str] = {}
    broken = False
    lost = ""
    for case in chosen:
        begun = time.monotonic()
        # A case is taken to last as long as those before it.
        expected = statistics.median(durations) if durations else 0.0
        if lost or begun - start + expected > budget:
            not_run[case.name] = lost or f"beyond the budget of {budget:g} s"
            continue
        print(f"[{begun - start:5.0f} s] {case.name}", flush=True)
        try:
            # Measured again with every case, for the first may have met a busy machine.
            limit = timing.gemm_flops_per_second(case.dtype, device)
            gemm[case.dtype] = max(limit, gemm.get(case.dtype, 0.0))
            sets, results = measure(case, providers, device, seconds, gemm[case.dtype])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
        except Exception as error:
            # No memory for the inputs, a kernel that fails while it is timed; or one that broke
            # the CUDA context, and with it all that would follow.
            broken = True
            not_run[case.name] = f"{type(error).__name__}: {error}"
            lost = _lost(device, case)
            continue
        records.write_case(
            folder,
            case,
            environment,
            results,
            gemm_flops_per_second=gemm[case.dtype],
            input_sets=sets,
            seconds_per_mode=seconds,
        )
        done.append((case, results))
        durations.append(time.monotonic() - begun)
    path = folder / f"{name}.json"
    right = _report(path, environment, done, not_run, budget, time.monotonic() - start)
    return 0 if right and not broken else 1


def _lost(device: torch.device, case: Case) -> str:
    """Say why nothing more can run on the device; "" if something can."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return f"the device was lost in {case.name}: {error}"
    return ""


def measure(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    seconds: float,
    gemm: float,
) -> tuple[int, list[Result]]:
    """Check every provider in every mode and launch, and time what is right.

    Args:
        case: what to run.
        providers: `cases.TORCH` first.
        device: where to run.
        seconds: time for each mode.
        gemm: floating-point operations per second of a large matrix product.

    Returns:
        The number of sets of inputs that were rotated over, and the results.
    """
    parameters = cases.make_parameters(case, device)
    first = cases.make_data(case, device)
    sets = timing.sets_to_rotate(first.inputs[0].nbytes, device)
    data = [first, *(cases.make_data(case, device, seed) for seed in range(1, sets))]
    reference = cases.make_layer(
        providers[0], case, parameters, device, "training", dtype=torch.float64
    )
    exact = [t.detach() for t in cases.run_layer(reference, first.to(torch.float64))]
    launches = ("eager", "graph") if device.type == "cuda" else ("eager",)
    results: list[Result] = []
    for mode in case.modes:
        comparison = _Comparison(case, mode, device, parameters, data, exact)
        with torch.set_grad_enabled(mode == "training"), warnings.catch_warnings():
            # What falls back to another backend would be timed under a wrong name.
            warnings.simplefilter("error", fused_lstm.KernelFallbackWarning)
            for provider in providers:
                for launch in launches:
                    results.append(comparison.check(provider, launch))
            comparison.time(seconds, gemm)
    return sets, results


class _Comparison:
    """The contenders of one case in one mode."""

    def __init__(
        self,
        case: Case,
        mode: str,
        device: torch.device,
        parameters: dict[str, Tensor],
        data: list[Data],
        exact: list[Tensor],
    ) -> None:
        self.case, self.mode, self.device = case, mode, device
        self.parameters, self.data = parameters, data
        self.exact = exact if mode == "training" else exact[: len(data[0].gradients)]
        self.budgets: list[float] = []
        self.calls: dict[tuple[str, str], timing.Call] = {}
        self.results: dict[tuple[str, str], Result] = {}

    def check(self, provider: Provider, launch: str) -> Result:
        """Compare a provider's results with float64; it is a contender if they are right."""
        result = Result(provider.name, self.mode, launch, self.case.flops(self.mode))
        if provider.name == "torch":
            result.backend, result.reason = "torch", "the layer that the others are compared with"
        try:
            # A kernel that failed before is tried again: otherwise it falls back in silence.
            ops._failed.clear()
            self._check(provider, launch, result)
        except fused_lstm.BackendUnavailableError as error:
            result.status, result.detail = "unavailable", str(error)
        except torch.OutOfMemoryError as error:
            result.status, result.detail = "unavailable", f"out of memory: {error}"
        except Exception as error:
            # Whatever a compiler or a library raises belongs in the record. What torch cannot do
            # is no failure of ours.
            result.status = "unavailable" if provider.name == "torch" else "failed"
            result.detail = f"{type(error).__name__}: {error}"
        return result

    def _check(self, provider: Provider, launch: str, result: Result) -> None:
        case, device = self.case, self.device
        layer = cases.make_layer(provider, case, self.parameters, device, self.mode)
        names = cases.result_names(layer, self.mode)
        if isinstance(layer, fused_lstm.LSTM | fused_lstm.LSTMCell):
            explanation = fused_lstm.explain(layer, self.data[0].input)
            result.backend = explanation.backend
            result.reason = explanation.reasons.get(explanation.backend, "")

        def call(index: int) -> tuple[Tensor, ...]:
            return cases.run_layer(layer, self.data[index])

        if launch == "graph":
            call = timing.capture(call, len(self.data))
        errors = cases.largest_errors(call(0), self.exact)
        if not self.budgets:
            if provider.name != "torch":
                raise fused_lstm.BackendUnavailableError(
                    "torch.nn's layer, whose error would be the measure, could not run"
                )
            native_errors = self._float64_errors() if case.dtype == torch.float64 else errors
            self.budgets = cases.error_budgets(native_errors, self.exact, case.dtype)
        result.errors = {
            name: {"error": error, "budget": budget}
            for name, error, budget in zip(names, errors, self.budgets, strict=True)
        }
        # A result that is zero throughout may have a budget of zero.
        ratios = {
            name: 0.0 if error == 0 else error / budget if budget else math.inf
            for name, error, budget in zip(names, errors, self.budgets, strict=True)
        }
        # The maximum of a list with NaN in it depends on the order.
        worst = max(ratios, key=lambda name: math.inf if math.isnan(ratios[name]) else ratios[name])
        result.error_over_budget = ratios[worst]
        if not ratios[worst] <= 1:
            result.status = "wrong"
            result.detail = (
                f"{worst}: an error of {result.errors[worst]['error']:.3g} against float64, "
                f"budget {result.errors[worst]['budget']:.3g}"
            )
            return
        if self.mode == "training" and launch == "eager" and device.type == "cuda":
            result.peak_memory_bytes = timing.peak_memory(call, device)
        result.status = "timed"
        self.calls[provider.name, launch] = call
        self.results[provider.name, launch] = result

    def _float64_errors(self) -> list[float]:
        """Errors to expect in float64: four times those of torch.nn's layer in float32, scaled.

        Its own cannot be seen, for its results are what all are compared with, and errors of both
        meet there: against extended precision (T 100, B 16, I and H 64, two cores of an EPYC) the
        gradient of W_ih was off by 7.5e-14 in torch.nn.LSTM and by 2.3e-14 in ours.
        """
        layer = cases.make_layer(
            cases.TORCH, self.case, self.parameters, self.device, self.mode, dtype=torch.float32
        )
        results = cases.run_layer(layer, self.data[0].to(torch.float32))
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return [4 * scale * error for error in cases.largest_errors(results, self.exact)]

    def time(self, seconds: float, gemm: float) -> None:
        """Time the contenders in turns."""
        if not self.calls:
            return
        samples = timing.time_in_turns(
            self.calls,
            self.device,
            seconds,
            sets=len(self.data),
            calls_per_sample=self.case.calls_per_sample,
            queued=lambda key: key[1] == "graph",
        )
        for (provider, launch), taken in samples.items():
            result = self.results[provider, launch]
            result.repetitions = len(taken.seconds)
            result.seconds = timing.percentiles(taken.seconds)
            result.host_seconds = timing.percentiles(taken.host) if taken.host else None
            result.flops_per_second = result.flops / result.seconds.p50
            result.fraction_of_gemm = result.flops_per_second / gemm
            baseline = samples.get(("torch", launch))
            if baseline is not None:
                result.ratio = statistics.median(baseline.seconds) / result.seconds.p50
                result.ratio_of_pairs = timing.ratio_of_pairs(baseline.seconds, taken.seconds)


def _report(
    path: Path,
    environment: Environment,
    done: list[tuple[Case, list[Result]]],
    not_run: dict[str, str],
    budget: float,
    elapsed: float,
) -> bool:
    """Print the table, its summary and what is missing from it; write the record of the run.

    Returns:
        Whether no layer was wrong or failed.
    """
    everything = [(case, result) for case, results in done for result in results]
    wrong, failed = (
        [
            f"{case.name} {result.provider} {result.mode} {result.launch}: {result.detail}"
            for case, result in everything
            if result.status == status
        ]
        for status in ("wrong", "failed")
    )
    headlines = records.list_headlines(done)
    records.write_json(
        path,
        {
            "schema": records.SCHEMA,
            "environment": asdict(environment),
            "budget_seconds": budget,
            "elapsed_seconds": elapsed,
            "headlines": [asdict(headline) for headline in headlines],
            "cases": [case.name for case, _ in done],
            "not_run": not_run,
            "wrong": wrong,
            "failed": failed,
        },
    )
    print()
    records.print_table(done)
    print(
        "ratio: median time of torch.nn.LSTM over ours, above 1 ours is faster; of GEMM: share of "
        "the\nspeed of a large matrix product; error: against float64, over its budget"
    )
    for headline in headlines:
        print(
            f"{headline.provider}, {headline.mode}: {headline.geometric_mean_of_ratio:.2f}, the "
            f"geometric mean of the ratio over {len(headline.shapes)} of "
            f"{len(cases.HEADLINE_SHAPES)} headline shapes"
        )
    for title, lines in (("WRONG", wrong), ("FAILED", failed)):
        for line in lines:
            print(f"{title}  {line}")
    for name, reason in not_run.items():
        print(f"not run  {name}: {reason}")
    print(f"{len(done)} cases in {elapsed:.0f} s; records in {path.parent}")
    return not (wrong or failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        type=device_argument,
        default=torch.device("cpu"),
        help="cpu (default), cuda or cuda:N",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder of the records (default: benchmarks/results)",
    )
    parser.add_argument(
        "--seconds",
        type=positive_number,
        help="time for each case and mode (default: 2 on a CPU, 0.3 on a GPU)",
    )
    parser.add_argument(
        "--budget",
        type=positive_number,
        help="seconds for the whole run (default: 420 on a CPU, 150 on a GPU)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=cases.DTYPES,
        help="may be repeated (default: float32 on a CPU; bfloat16, float16, float32 on a GPU)",
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="T,B,I,H",
        help="time steps, batch, input features, hidden units, instead of the list; may be "
        "repeated",
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=("default", *ORDER),
        help="may be repeated (default: default on a CPU; default and triton on a GPU)",
    )
    parser.add_argument(
        "--threads", type=_positive_count, help="threads on a CPU (default: torch's own choice)"
    )
    parser.add_argument(
        "--tuned-allocator",
        action="store_true",
        help="time training where glibc keeps the memory of large tensors (thresholds of 4 GiB); "
        f"records end in {cases.TUNED_ALLOCATOR_SUFFIX}",
    )
    return parser


def device_argument(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return device


def positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number


def _positive_count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _shape(text: str) -> Shape:
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(
            f"expected four positive whole numbers T,B,I,H, got {text!r}"
        )
    return Shape(*map(int, sizes))


if __name__ == "__main__":
    sys.exit(main())
