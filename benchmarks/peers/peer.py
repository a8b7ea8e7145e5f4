"""What the peers share: saying what they cannot do, importing them, and a first call."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_lstm.bench.cases import MODES, Case, Shape, make_data, products_of
from fused_lstm.bench.providers import Call, Prepared, Provider, UnavailableError


class Peer(Provider):
    """The LSTM of another package.

    Attributes:
        title: what messages call it.
        packages: the distributions to install for it.
        device_type: of the devices that it runs on.
        dtypes: names of the dtypes that it computes in.
        why_dtypes: what it does, that leaves these.
        modes: what it does.
        lacks: names of fields of `Shape` that must be as they are by default, and why.
    """

    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    device_type: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    why_dtypes: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = MODES
    lacks: ClassVar[Mapping[str, str]]

    def prepare(
        self, case: Case, parameters: dict[str, Tensor], device: torch.device, mode: str
    ) -> Prepared:
        # What can never run is said first: nobody should install a package to learn that.
        self._check(case, device, mode)
        missing = [package for package in self.packages if installed_version(package) is None]
        if missing:
            raise UnavailableError(
                f"{self.title} is not installed: pip install {' '.join(missing)}"
            )
        return self._build(case, parameters, device, mode)

    @abstractmethod
    def _build(
        self, case: Case, parameters: dict[str, Tensor], device: torch.device, mode: str
    ) -> Prepared:
        """Do what `prepare` does, of a case that has been checked."""

    def _check(self, case: Case, device: torch.device, mode: str) -> None:
        if device.type != self.device_type:
            raise UnavailableError(
                f"device = {str(device)!r}: {self.title} runs on a {self.device_type} device"
            )
        if mode not in self.modes:
            raise UnavailableError(f"mode = {mode!r}: {self.title} does {self.modes[0]} only")
        if case.dtype_name not in self.dtypes:
            raise UnavailableError(
                f"dtype = {case.dtype_name!r}: {self.title} {self.why_dtypes}; "
                f"it takes {' or '.join(self.dtypes)}"
            )
        for field in fields(Shape):
            value = getattr(case.shape, field.name)
            if field.name in self.lacks and value != field.default:
                raise UnavailableError(
                    f"{field.name} = {value}: {self.title} {self.lacks[field.name]}"
                )

    def _import(self, module: str) -> Any:
        try:
            return importlib.import_module(module)
        # OSError: of a shared library or a toolkit that is not there.
        except (ImportError, OSError) as error:
            raise UnavailableError(f"{self.title} cannot import {module}: {error}") from error

    def _version(self) -> str:
        return f"{self.name} {installed_version(self.name)}"


def installed_version(package: str) -> str | None:
    """Look up the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def try_call(call: Call, case: Case, device: torch.device, mode: str) -> None:
    """Run a call once, so that what it compiles or cannot do shows now."""
    with products_of(case), torch.set_grad_enabled(mode == "training"):
        call(make_data(case, device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
