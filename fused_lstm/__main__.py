"""`python -m fused_lstm info | check | bench | demo`: what runs here, is it right, is it fast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_lstm.bench.arguments import positive_count, positive_number
from fused_lstm.bench.cases import DTYPES, MODES

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: as in `sys.argv[1:]`, the default.

    Returns:
        The exit status: 0, or 1 if `check`, `bench` or `demo` found a difference from
        `torch.nn.LSTM`.
    """
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fused_lstm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    info = commands.add_parser("info", help="versions, devices, and which backend a layer gets")
    info.add_argument("--input", type=int, default=64, help="input features (default: 64)")
    info.add_argument("--hidden", type=int, default=256, help="hidden units (default: 256)")
    info.add_argument("--device", help="a torch device, or a GPU such as sm_90 (default: each)")
    info.set_defaults(run=_info)

    check = commands.add_parser("check", help="compare every backend with torch.nn.LSTM, here")
    check.add_argument("--device", help="a torch device (default: cuda if there is one, else cpu)")
    check.set_defaults(run=_check)

    bench = commands.add_parser(
        "bench", help="time a layer of your sizes beside torch.nn.LSTM, here"
    )
    _add_bench_arguments(bench)
    bench.set_defaults(run=_bench)

    demo = commands.add_parser(
        "demo", help="train a language model with torch.nn.LSTM and with fused_lstm.LSTM"
    )
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for demo.png")
    demo.add_argument("--device", help="a torch device (default: cuda if there is one, else cpu)")
    demo.add_argument("--steps", type=int, help="optimizer steps of each model")
    demo.add_argument("--seed", type=int, help="seed of everything random")
    demo.set_defaults(run=_demo)
    return parser


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of a layer and of its input, and how to time it."""
    sizes = {"input": 64, "hidden": 256, "batch": 32, "steps": 100, "layers": 1}
    meanings = ("input features", "hidden units", "sequences", "time steps", "layers")
    for (name, default), meaning in zip(sizes.items(), meanings, strict=True):
        parser.add_argument(
            f"--{name}",
            type=positive_count,
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument(
        "--proj", type=positive_count, default=0, metavar="N", help="features of a projection"
    )
    for name, meaning in (
        ("bidirectional", "both directions"),
        ("batch-first", "input of batch, time, features"),
        ("packed", "a PackedSequence, of lengths between a quarter of the steps and all"),
        ("cell", "LSTMCell: one step a call"),
        ("compile", "torch.compile's version of torch.nn's layer, too"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="float32 multiplies in IEEE arithmetic, tf32 may use TF32 (default: float32)",
    )
    parser.add_argument("--mode", choices=MODES, help="default: both")
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="native, cuda, triton, aten, reference, or default for the choice that users get; may "
        "be repeated (default: default)",
    )
    parser.add_argument("--device", help="a torch device (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--seconds", type=positive_number, default=2.0, help="for each mode (default: 2)"
    )
    parser.add_argument("--memory", action="store_true", help="measure peak memory, too")


def _info(options: argparse.Namespace) -> int:
    import torch

    import fused_lstm

    print(f"fused_lstm {fused_lstm.__version__}, torch {torch.__version__}", end="")
    try:
        import triton

        print(f", triton {triton.__version__}")
    except ImportError as error:
        print(f", no triton ({error})")
    devices = [options.device] if options.device else ["cpu"]
    if not options.device:
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    layer = fused_lstm.LSTM(options.input, options.hidden, device="meta")
    for device in devices:
        print()
        print(fused_lstm.explain(layer, device=device))
    return 0


def _check(options: argparse.Namespace) -> int:
    from fused_lstm.check import run

    return 0 if run(options.device) else 1


def _bench(options: argparse.Namespace) -> int:
    from fused_lstm import bench

    chosen = vars(options)
    del chosen["run"]
    try:
        return 0 if bench.run(**chosen) else 1
    except bench.ArgumentError as error:
        print(f"python -m fused_lstm bench: error: {error}", file=sys.stderr)
        return 2


def _demo(options: argparse.Namespace) -> int:
    from fused_lstm import demo

    chosen = {
        name: value
        for name in ("device", "steps", "seed")
        if (value := getattr(options, name)) is not None
    }
    return 0 if demo.run(options.out, **chosen).curves_coincide else 1


if __name__ == "__main__":
    sys.exit(main())
