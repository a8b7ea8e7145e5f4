"""The cases that are timed, in groups: what people run, and sweeps of one size.

Each group says which providers run it besides torch.nn's layers. A budget may end a run anywhere:
groups, and the cases of a group, come in the order of what they tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from fused_lstm.backends import cuda, triton
from fused_lstm.bench.cases import Case, Shape

__all__ = ["ADDITIONS", "GROUPS", "HEADLINE", "SWEEPS", "Group", "groups_of", "list_groups"]


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
_COMPILED = (Shape(1, 16, 128, 128, cell=True), Shape(16, 64, 64, 128))
# FlashRNN's published figures are of this one, in bfloat16.
_FLASHRNN = Shape(1024, 16, 768, 768)
_VARIANTS = (
    Shape(100, 32, 64, 128, num_layers=2, bidirectional=True, batch_first=True),
    Shape(100, 16, 64, 64, proj_size=32),
    Shape(100, 64, 128, 256, proj_size=128),
    Shape(100, 16, 64, 64, packed=True),
    Shape(100, 64, 128, 256, packed=True),
)
# The grid of a GPU: what fits in a cluster and in the grid, with few rows and many.
_GRID = tuple(Shape(512, B, H, H) for H, B in product((256, 512, 1024, 2048), (64, 16, 256)))
# What a first look at a GPU should show, if there are a few minutes only.
_CORE = (
    Case(Shape(512, 64, 256, 256), "bfloat16"),
    Case(Shape(512, 16, 1024, 1024), "bfloat16"),
    Case(Shape(64, 256, 64, 256), "bfloat16"),
    Case(Shape(64, 256, 64, 256), "tf32"),
    Case(Shape(365, 256, 32, 256), "bfloat16"),
    Case(Shape(800, 32, 80, 512, num_layers=3, bidirectional=True, batch_first=True), "bfloat16"),
    Case(Shape(512, 64, 1024, 1024, num_layers=2), "bfloat16"),
    Case(Shape(512, 64, 256, 256), "float16"),
    Case(Shape(64, 256, 64, 256), "float32"),
    Case(Shape(1, 16, 64, 256, cell=True), "bfloat16"),
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
    return tuple(Case(shape, dtype) for dtype in dtypes for shape in shapes)


def _groups_of_cpu() -> Iterator[Group]:
    usual = ("fused_lstm", "onnxruntime")
    for name, shapes in (
        ("small", HEADLINE),
        ("reinforcement-learning", _REINFORCEMENT_LEARNING["cpu"]),
        ("time-series", _TIME_SERIES["cpu"]),
        ("speech", _SPEECH["cpu"]),
        ("language", _LANGUAGE["cpu"]),
        ("streaming", _STREAMING),
    ):
        more = {
            "small": ("fused_lstm[aten]", "fused_lstm[reference]"),
            "streaming": ("torch.compile",),
        }
        large = name not in ("small", "streaming")
        yield Group(name, _in(("float32",), shapes), (*usual, *more.get(name, ())), memory=large)
    small, large = Shape(100, 16, 64, 64), Shape(100, 64, 128, 256)
    yield Group(
        "variants",
        (
            *_in(("float32",), _VARIANTS),
            *_in(("float64",), (small, large)),
            *_in(("bfloat16",), (small, large, Shape(100, 1, 512, 512), Shape(100, 32, 512, 512))),
        ),
        usual,
    )
    for name, (base, sizes) in _SWEPT["cpu"].items():
        yield Group(name, _in(("float32",), _sweep(name, base, sizes)), usual)
    yield Group("flashrnn", _in(("bfloat16",), (_FLASHRNN,)), usual)


def _groups_of_cuda() -> Iterator[Group]:
    usual = ("fused_lstm[cuda]", "fused_lstm[triton]", "torchrl")
    if cuda.VERIFIED_ARCHITECTURES or triton.VERIFIED_ARCHITECTURES:
        # Else it is torch's own layer, by another way.
        usual = ("fused_lstm", *usual)
    # What cuDNN is fast in, and what people train in: then what they expect to be exact.
    dtypes = ("bfloat16", "tf32", "float16", "float32")
    half = ("bfloat16", "float16")
    yield Group("core", _CORE, usual, memory=True)
    for name, of, shapes in (
        ("reinforcement-learning", dtypes, _REINFORCEMENT_LEARNING["cuda"]),
        ("time-series", dtypes, _TIME_SERIES["cuda"]),
        ("speech", half, _SPEECH["cuda"]),
        ("language", half, _LANGUAGE["cuda"]),
        ("grid", half, _GRID),
        ("streaming", half, _STREAMING),
    ):
        yield Group(name, _in(of, shapes), usual, memory=name != "streaming")
    for name, (base, sizes) in _SWEPT["cuda"].items():
        yield Group(name, _in(half[:1], _sweep(name, base, sizes)), usual)
    yield Group("variants", _in(("float32",), _VARIANTS), usual)
    # FlashRNN tries out launches, and torch.compile writes code, for minutes: cases of their own.
    yield Group("flashrnn", _in(half, (_FLASHRNN,)), (*usual, "flashrnn"), memory=True)
    yield Group("compiled", _in(half[:1], _COMPILED), (*usual, "torch.compile"))


@cache
def list_groups(device_type: str) -> tuple[Group, ...]:
    """List the groups of a device type, "cpu" or "cuda", the most telling first."""
    return tuple(_groups_of_cpu() if device_type == "cpu" else _groups_of_cuda())


# Not of cases: what benchmarks/additions.py times.
ADDITIONS = "additions"
GROUPS = (
    *dict.fromkeys(group.name for kind in ("cpu", "cuda") for group in list_groups(kind)),
    ADDITIONS,
)


def groups_of(case: Case, device_type: str) -> tuple[str, ...]:
    """Name the groups that a case is in."""
    return tuple(group.name for group in list_groups(device_type) if case in group.cases)
