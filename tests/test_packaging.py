"""What an installation contains: metadata, packages, the type marker."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

import fused_lstm

try:
    import tomllib
except ModuleNotFoundError:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed(project) -> None:
    """An editable install hides a package that is not listed."""
    folders = {}
    for top, name in (("fused_lstm", "fused_lstm"), ("kernels", "fused_lstm.kernels")):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            folders[".".join((name, *parts))] = init
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_no_top_level_package_called_kernels(project) -> None:
    packages = project["tool"]["setuptools"]["packages"]
    assert {name.split(".")[0] for name in packages} == {"fused_lstm"}


def test_the_core_depends_on_torch_and_triton_alone() -> None:
    required = [r for r in metadata.requires("fused-lstm") if "extra ==" not in r]
    assert {re.match(r"[\w-]+", r).group() for r in required} == {"torch", "triton"}
    (triton,) = (r for r in required if r.startswith("triton"))
    assert "Linux" in triton
    assert set(metadata.metadata("fused-lstm").get_all("Provides-Extra")) == {
        "bench",
        "cuda",
        "dev",
        "peers",
    }


def test_versions_agree(project) -> None:
    assert fused_lstm.__version__ == project["project"]["version"]


def test_types_are_exported() -> None:
    assert (Path(fused_lstm.__file__).parent / "py.typed").exists()


def test_every_public_name_exists_and_is_documented() -> None:
    for name in fused_lstm.__all__:
        assert getattr(fused_lstm, name).__doc__
