"""How fast a layer of given sizes is on this machine, beside `torch.nn.LSTM`.

`python -m fused_lstm bench` calls `run`; the benchmark suite in the repository is made of the same
parts. Every contender's results and gradients are first checked against float64, and one that is
wrong is not timed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from fused_lstm.bench.arguments import select_device

__all__ = ["ArgumentError", "run"]


class ArgumentError(ValueError):
    """An argument of `run` cannot be; the message names it, its value and what was expected."""


def run(
    *,
    input: int = 64,
    hidden: int = 256,
    batch: int = 32,
    steps: int = 100,
    layers: int = 1,
    proj: int = 0,
    bidirectional: bool = False,
    batch_first: bool = False,
    packed: bool = False,
    cell: bool = False,
    compile: bool = False,
    dtype: str = "float32",
    mode: str | None = None,
    backend: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    seconds: float = 2.0,
    memory: bool = False,
) -> bool:
    """Time a layer in inference and in training, and print a table with the ratio to torch's.

    Args:
        input: features of the input, I.
        hidden: hidden units, H.
        batch: sequences, B.
        steps: time steps, T.
        layers: of them, one on the other, L.
        proj: features of the projection, 0 for none.
        bidirectional: both directions.
        batch_first: the input is [B, T, I], not [T, B, I].
        packed: the input is a `PackedSequence` of lengths from T/4 to T.
        cell: an `LSTMCell`, one step a call; `steps` and what concerns layers are not used.
        compile: time what torch.compile makes of `torch.nn`'s layer, too.
        dtype: of tensors and parameters; "float32" multiplies in IEEE arithmetic on every device,
            "tf32" lets a GPU multiply float32 in TF32.
        mode: "inference" or "training" (forward and backward pass); None for both.
        backend: a backend to insist on, or several, each a row of its own; None for the choice
            that users get.
        device: a CPU or CUDA device; None for CUDA if there is any, else the CPU.
        seconds: how long to take samples, in each mode.
        memory: measure the peak memory of a call, too; on a CPU in processes of their own.

    Returns:
        Whether no layer of ours was wrong or failed.

    Raises:
        ArgumentError: if an argument cannot be.
    """
    from fused_lstm.bench.cases import DTYPES, MODES, Case, Shape
    from fused_lstm.bench.comparison import measure
    from fused_lstm.bench.limits import Limits, cache_bytes, measure_copy, measure_gemm
    from fused_lstm.bench.providers import BACKENDS, COMPILED, TORCH, provider_of_backend
    from fused_lstm.bench.table import print_table

    backends = [backend] if isinstance(backend, str) else backend or ["default"]
    sizes = {"input": input, "hidden": hidden, "batch": batch, "steps": steps, "layers": layers}
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentError(f"{name} should be a positive whole number, got {size}")
    if not 0 <= proj < hidden:
        raise ArgumentError(f"proj should be 0 or from 1 to hidden - 1 = {hidden - 1}, got {proj}")
    of_layers = {
        "layers": layers if layers > 1 else 0,
        "proj": proj,
        "bidirectional": bidirectional,
        "batch_first": batch_first,
        "packed": packed,
    }
    if cell and any(of_layers.values()):
        got = ", ".join(f"{name}={value}" for name, value in of_layers.items() if value)
        raise ArgumentError(f"cell=True: expected nothing that only a layer has, got {got}")
    if packed and batch_first:
        raise ArgumentError(
            "packed=True: a PackedSequence has no batch_first, got batch_first=True"
        )
    for name, value, choices in (
        ("dtype", dtype, DTYPES),
        ("mode", mode or MODES[0], MODES),
        *(("backend", each, BACKENDS) for each in backends),
    ):
        if value not in choices:
            raise ArgumentError(f"{name} should be one of {', '.join(choices)}, got {value!r}")
    if not seconds > 0:
        raise ArgumentError(f"seconds should be positive, got {seconds}")
    where = _device(device)
    if dtype == "tf32" and where.type != "cuda":
        raise ArgumentError(f"dtype='tf32': expected a CUDA GPU, got device {str(where)!r}")

    if cell:
        shape = Shape(1, batch, input, hidden, cell=True)
    else:
        shape = Shape(steps, batch, input, hidden, layers, bidirectional, batch_first, proj, packed)
    case = Case(shape, dtype)
    on_gpu = where.type == "cuda"
    limits = Limits(measure_gemm(dtype, where), measure_copy(where), cache_bytes=cache_bytes(where))
    name = (
        torch.cuda.get_device_name(where) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{case.name} on {name}, torch {torch.__version__}; matrix products: "
        f"{limits.gemm_flops_per_second / 1e9:.0f} GFLOP/s"
    )
    providers = [TORCH, *map(provider_of_backend, backends)]
    if compile:
        providers.insert(1, COMPILED)
    results = [
        result
        for each in ([mode] if mode else MODES)
        for result in measure(case, each, providers, where, seconds, limits, memory=memory).results
    ]
    print_table(results)
    if (load := _load()) is not None and load > 0.75 * (os.cpu_count() or 1):
        print(
            f"WARNING: this machine has other work (load average {load:.1f} on {os.cpu_count()} "
            "processors), and these times are worth little"
        )
    print(
        "ratio: median time of torch.nn's layer over this one's, above 1 this is the faster\n"
        "of limit: share of what matrix products and memory allow\n"
        "error: against float64, over its budget: twice torch.nn's in this dtype, and a rounding"
    )
    ours = {provider.name for provider in providers if provider.is_ours}
    return not any(
        result.status in ("wrong", "failed") for result in results if result.provider in ours
    )


def _load() -> float | None:
    """How many processes have run or waited, over the last minute; None where nobody says."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _device(device: str | torch.device | None) -> torch.device:
    """Read an argument of `run`."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        where = torch.device("meta")
    if where.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device should be cpu, cuda or cuda:N, got {device!r}")
    try:
        return select_device(where)
    except LookupError as error:
        raise ArgumentError(
            f"device should be one that is there, got {str(device)!r}, and {error}"
        ) from None
