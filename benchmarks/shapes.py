"""The cases that are timed, in groups: what people run, and sweeps of one size.

Each group says which providers run it besides torch.nn's layers. A budget may end a run anywhere:
groups, and the cases of a group, come in the order of what they tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from fused_lstm.bench.cases import Case, Shape

__all__ = ["ADDITIONS", "GROUPS", "HEADLINE", "SWEEPS", "Group", "groups_of", "list_groups"]

# Everyone who may run: torch.compile is slow to begin.
_BACKENDS = {
    "cpu": ("fused_lstm", "fused_lstm[aten]", "fused_lstm[reference]"),
    "cuda": ("fused_lstm", "fused_lstm[cuda]", "fused_lstm[triton]"),
}
_USUAL = {"cpu": ("fused_lstm", "onnxruntime"), "cuda": (*_BACKENDS["cuda"], "torchrl")}


@dataclass(frozen=True)
class Group:
    """Cases that belong together.

    Attributes:
        name: by which it is asked for.
        cases: in the order of what they tell.
        providers: names of those that run it, besides torch's.
        memory: whether peak memory is measured.
    """

    name: str
    cases: tuple[Case, ...]
    providers: tuple[str, ...]
    memory: bool = False


# The figures of a CPU are the geometric means over these, in float32.
HEADLINE = (
    Shape(1000, 1, 16, 32),
    Shape(100, 1, 64, 64),
    Shape(200, 8, 32, 32),
    Shape(100, 16, 64, 64),
    Shape(50, 128, 16, 64),
    Shape(20, 256, 64, 64),
    Shape(100, 64, 64, 128),
    Shape(100, 64, 128, 256),
    Shape(100, 1, 512, 512),
    Shape(100, 32, 512, 512),
    Shape(50, 64, 1024, 1024),
)

# Steps of a rollout, parallel environments, features of an encoder.
_REINFORCEMENT_LEARNING = {
    "cpu": (Shape(16, 1024, 64, 64), Shape(64, 256, 64, 128), Shape(128, 256, 64, 256)),
    "cuda": (
        Shape(64, 256, 64, 256),
        Shape(128, 1024, 128, 512),
        Shape(16, 4096, 64, 64),
        Shape(32, 4096, 256, 256),
        Shape(128, 4096, 128, 512),
    ),
}
# Few features, long histories: a year of days as in hydrology, weeks of hours, sensors.
_TIME_SERIES = {
    "cpu": (
        Shape(168, 32, 1, 64),
        Shape(1000, 32, 8, 32),
        Shape(365, 256, 32, 64),
        Shape(365, 256, 5, 256),
    ),
    "cuda": (
        Shape(365, 256, 32, 256),
        Shape(365, 256, 5, 64),
        Shape(168, 32, 1, 64),
        Shape(1000, 64, 8, 32),
        Shape(1000, 256, 16, 128),
    ),
}
# Frames of an encoder, of a line of text or of a nanopore's signal.
_SPEECH = {
    "cpu": (
        Shape(400, 1, 80, 256, num_layers=2, bidirectional=True, batch_first=True),
        Shape(400, 16, 80, 256, num_layers=2, bidirectional=True, batch_first=True),
    ),
    "cuda": (
        Shape(800, 32, 80, 512, num_layers=3, bidirectional=True, batch_first=True),
        Shape(2000, 256, 384, 384),
        Shape(400, 64, 80, 256, num_layers=2, bidirectional=True, batch_first=True),
        Shape(1666, 128, 768, 768),
        Shape(1000, 16, 80, 1024, num_layers=5, bidirectional=True, batch_first=True),
    ),
}
_LANGUAGE = {
    "cpu": (Shape(35, 32, 650, 650, num_layers=2), Shape(128, 32, 512, 512, num_layers=2)),
    "cuda": (
        Shape(512, 64, 1024, 1024, num_layers=2),
        Shape(35, 32, 650, 650, num_layers=2),
        Shape(128, 128, 512, 512, num_layers=2),
        Shape(256, 64, 2048, 2048),
    ),
}
# One step a call.
_STREAMING = (
    Shape(1, 1, 64, 64),
    Shape(1, 16, 64, 256),
    Shape(1, 1, 64, 64, cell=True),
    Shape(1, 16, 64, 256, cell=True),
    Shape(1, 1, 512, 512, cell=True),
)
# FlashRNN's published figures are of this one, in bfloat16.
_FLASHRNN = Shape(1024, 16, 768, 768)
_VARIANTS = (
    Shape(100, 32, 64, 128, num_layers=2, bidirectional=True, batch_first=True),
    Shape(100, 16, 64, 64, proj_size=32),
    Shape(100, 64, 128, 256, proj_size=128),
    Shape(100, 16, 64, 64, packed=True),
    Shape(100, 64, 128, 256, packed=True),
)
# The grid of a GPU: what fits in a block, a cluster and the grid, with few rows and many.
_GRID = tuple(
    Shape(512, B, H, H) for H, B in product((256, 512, 128, 1024, 64, 2048), (64, 16, 256, 1))
)

# What a sweep varies.
SWEEPS: dict[str, Callable[[Shape], int]] = {
    "sweep-T": lambda shape: shape.T,
    "sweep-B": lambda shape: shape.B,
    "sweep-H": lambda shape: shape.H,
}


def _sweep(name: str, base: Shape, sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    def shape(size: int) -> Shape:
        if name == "sweep-H":
            return replace(base, I=size, H=size)
        return replace(base, **{name[-1]: size})

    return tuple(map(shape, sizes))


_SWEPT = {
    "cpu": {
        "sweep-T": (Shape(1, 1, 32, 32), (10, 100, 1000, 10_000, 100_000)),
        "sweep-B": (Shape(50, 1, 64, 64), (1, 4, 16, 64, 256, 1024)),
        "sweep-H": (Shape(50, 16, 64, 64), (16, 32, 64, 128, 256, 512, 1024)),
    },
    "cuda": {
        "sweep-T": (Shape(1, 16, 256, 256), (10, 100, 1000, 10_000, 100_000)),
        "sweep-B": (Shape(128, 1, 256, 256), (1, 4, 16, 64, 256, 1024, 4096)),
        "sweep-H": (Shape(128, 32, 64, 64), (32, 64, 128, 256, 512, 1024, 2048)),
    },
}


def _in(dtypes: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[Case, ...]:
    return tuple(Case(shape, dtype) for shape in shapes for dtype in dtypes)


def _groups(device_type: str) -> Iterator[Group]:
    on_cpu = device_type == "cpu"
    usual = _USUAL[device_type]
    # What cuDNN is fast in, and what people train in: then what they expect to be exact.
    all_dtypes = ("float32",) if on_cpu else ("bfloat16", "float16", "tf32", "float32")
    two_dtypes = ("float32",) if on_cpu else ("bfloat16", "float16")
    # It tries out launches for minutes, for each shape and dtype.
    with_flashrnn = (*usual, "flashrnn")
    if on_cpu:
        yield Group("small", _in(("float32",), HEADLINE), (*_BACKENDS["cpu"], "onnxruntime"))
    else:
        yield Group("grid", _in(two_dtypes, _GRID), usual, memory=True)
        yield Group(
            "flashrnn", _in(("bfloat16", "float16"), (_FLASHRNN,)), with_flashrnn, memory=True
        )
    memory = True
    yield Group(
        "reinforcement-learning",
        _in(all_dtypes, _REINFORCEMENT_LEARNING[device_type]),
        usual,
        memory,
    )
    yield Group("time-series", _in(all_dtypes, _TIME_SERIES[device_type]), usual, memory)
    yield Group("speech", _in(two_dtypes, _SPEECH[device_type]), usual, memory)
    yield Group("language", _in(two_dtypes, _LANGUAGE[device_type]), usual, memory)
    yield Group("streaming", _in(two_dtypes, _STREAMING), (*usual, "torch.compile"))
    variants = _in(("float32",), _VARIANTS)
    if on_cpu:
        variants += _in(("float64",), (Shape(100, 16, 64, 64), Shape(100, 64, 128, 256)))
        large = (Shape(100, 1, 512, 512), Shape(100, 32, 512, 512))
        variants += _in(("bfloat16",), (Shape(100, 16, 64, 64), Shape(100, 64, 128, 256), *large))
    yield Group("variants", variants, usual)
    for name, (base, sizes) in _SWEPT[device_type].items():
        yield Group(name, _in(two_dtypes[:1], _sweep(name, base, sizes)), usual)
    if on_cpu:
        yield Group("flashrnn", _in(("bfloat16",), (_FLASHRNN,)), usual)


@cache
def list_groups(device_type: str) -> tuple[Group, ...]:
    """List the groups of a device type, "cpu" or "cuda", the most telling first."""
    return tuple(_groups(device_type))


# Not of cases: what benchmarks/additions.py times.
ADDITIONS = "additions"
GROUPS = (
    *dict.fromkeys(group.name for kind in ("cpu", "cuda") for group in list_groups(kind)),
    ADDITIONS,
)


def groups_of(case: Case, device_type: str) -> tuple[str, ...]:
    """Name the groups that a case is in."""
    return tuple(group.name for group in list_groups(device_type) if case in group.cases)
