"""Loads compiled kernels into a device and launches them, through the CUDA driver's own interface.

A launch goes to PyTorch's current stream of the device, waits for nothing, and may be captured in a
CUDA graph. That blocks which wait for each other run at the same time is the launch's promise
(clusters, cooperative launches), and `Kernel.resident_teams` says how many teams can.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from .compiler import KernelUnavailableError, architecture, availability, cubin_of, nvrtc_version
from .cubin import resources_of
from .limits import DeviceLimits, known_limits

if TYPE_CHECKING:
    from .instance import Config

__all__ = ["CudaExecutor", "Executor", "Kernel", "describe", "upload"]

# Larger clusters have to be asked for: not every GPU can run them.
_PORTABLE_CLUSTER = 8
# CUresult.CUDA_SUCCESS, which compares with numbers.
_SUCCESS = 0
# Prepared launches that a kernel keeps; a program has few streams and few batch sizes.
_PREPARED_LAUNCHES = 256
# What CUDA graphs copy to a device, at every replay anew: nobody says when the last one was.
_copied_by_graphs: list[torch.Tensor] = []


class Kernel(Protocol):
    """A kernel that is ready to run on one device.

    Attributes:
        resident_teams: how many teams can run at the same time.
    """

    resident_teams: int

    def launch(self, teams: int, parameters: ctypes.Structure) -> None:
        """Puts `teams` teams on the device's current stream; raises if it is refused."""


class Executor(Protocol):
    """Where kernels come from."""

    def load(self, config: Config, device: torch.device) -> Kernel:
        """The kernel of a configuration, compiled and loaded at the first call.

        Raises:
            KernelUnavailableError: if there is none to be had.
        """


def describe(device: torch.device, multiprocessors: int | None = None) -> DeviceLimits:
    """What the choice of a configuration has to know of a GPU.

    Args:
        device: the GPU.
        multiprocessors: plans for fewer of them than there are, as where programs share a GPU;
            by default the variable FUSED_LSTM_MULTIPROCESSORS says it.
    """
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    if multiprocessors is None:
        multiprocessors = _pretended_multiprocessors()
    available = properties.multi_processor_count
    return DeviceLimits(
        arch=arch,
        multiprocessors=available if multiprocessors is None else min(available, multiprocessors),
        shared_bytes=properties.shared_memory_per_block_optin,
        max_cluster=known_limits(arch).max_cluster,
    )


def _pretended_multiprocessors() -> int | None:
    """The variable's number, None without one."""
    text = os.environ.get("FUSED_LSTM_MULTIPROCESSORS", "")
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"FUSED_LSTM_MULTIPROCESSORS must be a positive integer, got {text!r}")
    return int(text)


def _driver():
    """The module that binds the driver."""
    from cuda.bindings import driver

    return driver


def _refusal(driver, status, what: str) -> RuntimeError:
    """The error that says what the driver refused, and why.

    Args:
        driver: the module that binds it.
        status: what it returned.
        what: what was tried.
    """
    lookup, text = driver.cuGetErrorString(status)
    meaning = f" ({text.decode()})" if lookup == _SUCCESS and text else ""
    out_of_memory = status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    error = torch.OutOfMemoryError if out_of_memory else RuntimeError
    return error(f"{what}: the CUDA driver says {driver.CUresult(status).name}{meaning}")


def _checked(driver, function: str, *arguments: object):
    """Calls one of the driver's functions and returns its result, if it has one."""
    status, *results = getattr(driver, function)(*arguments)
    if status != _SUCCESS:
        raise _refusal(driver, status, function)
    return results[0] if results else None


class CudaExecutor:
    """Compiles kernels and loads them into the devices' primary contexts, which PyTorch uses.

    Args:
        multiprocessors: how many of a device's multiprocessors to plan with; see `describe`.
    """

    def __init__(self, multiprocessors: int | None = None) -> None:
        self._multiprocessors = multiprocessors
        self._lock = threading.Lock()
        # Kernels, or why there are none: an error would keep its callers' tensors alive.
        self._kernels: dict[tuple[Config, int], CudaKernel | str] = {}

    def load(self, config: Config, device: torch.device) -> CudaKernel:
        """The kernel of a configuration, compiled and loaded at the first call.

        Raises:
            KernelUnavailableError: if NVRTC is missing or refuses, if the kernel needs more than
                its registers or more than the device has, or if the driver does not load it.
            torch.OutOfMemoryError: if the device has no memory left for it.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        key = config, index
        kernel = self._kernels.get(key)
        if kernel is None:
            try:
                kernel = self._loaded(config, index)
            except KernelUnavailableError as error:
                # It will not get better; the next call shall not compile again.
                kernel = str(error)
            kernel = self._kernels.setdefault(key, kernel)
        if isinstance(kernel, str):
            raise KernelUnavailableError(kernel)
        return kernel

    def _loaded(self, config: Config, index: int) -> CudaKernel:
        if reason := availability():
            raise KernelUnavailableError(reason)
        properties = torch.cuda.get_device_properties(index)
        arch = architecture(properties.major, properties.minor)
        cubin = cubin_of(config.source(), arch)
        if local_bytes := resources_of(cubin).local_bytes:
            raise KernelUnavailableError(
                f"{_name(config)} needs {local_bytes} bytes a thread beyond its registers on {arch}"
            )
        with self._lock:
            # Another thread may have been here meanwhile.
            kernel = self._kernels.get((config, index))
            if isinstance(kernel, CudaKernel):
                return kernel
            limits = describe(torch.device("cuda", index), self._multiprocessors)
            try:
                return CudaKernel(config, cubin, index, limits, properties.multi_processor_count)
            except torch.OutOfMemoryError:
                raise  # there may be memory the next time
            except RuntimeError as error:
                raise KernelUnavailableError(
                    f"{_name(config)}, compiled for {arch} by NVRTC of CUDA {nvrtc_version()}, "
                    f"cannot be loaded by the driver of CUDA {_driver_version()}: {error}"
                ) from error


class CudaKernel:
    """A kernel in the primary context of a device; see `Kernel`.

    Args:
        config: its configuration.
        cubin: its machine code.
        index: of the device.
        limits: of the device.
        multiprocessors: that the device really has.

    Raises:
        RuntimeError: if the driver refuses it, or not one team of it can run.
    """

    def __init__(
        self, config: Config, cubin: bytes, index: int, limits: DeviceLimits, multiprocessors: int
    ) -> None:
        self._config = config
        self._device = torch.device("cuda", index)
        self._driver = driver = _driver()
        self._context = _primary_context(index)
        self._prepared: dict[tuple[int, int], object] = {}
        with _current(driver, self._context), _capture_allowed(driver):
            self._module = _checked(driver, "cuModuleLoadData", cubin)
            try:
                self._function = _checked(
                    driver, "cuModuleGetFunction", self._module, config.kernel_name.encode()
                )
                self._set_attributes()
                self.resident_teams = self._count_teams(limits, multiprocessors)
                if self.resident_teams == 0:
                    raise RuntimeError("the device has no room for a team")
            except BaseException:
                driver.cuModuleUnload(self._module)
                raise

    def _set_attributes(self) -> None:
        """Asks for what a launch may not have unasked."""
        driver, config = self._driver, self._config
        attributes = driver.CUfunction_attribute
        asked = {attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: config.shared_bytes}
        if config.cluster > _PORTABLE_CLUSTER:
            asked[attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
        for attribute, value in asked.items():
            _checked(driver, "cuFuncSetAttribute", self._function, attribute, value)

    def _count_teams(self, limits: DeviceLimits, multiprocessors: int) -> int:
        """How many teams can run at the same time, on the multiprocessors that may be used."""
        driver, config = self._driver, self._config
        if config.cluster > 1:
            clusters = _checked(
                driver, "cuOccupancyMaxActiveClusters", self._function, self._prepare(1, 0)
            )
            return clusters * limits.multiprocessors // multiprocessors
        blocks = _checked(
            driver,
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            self._function,
            config.threads,
            config.shared_bytes,
        )
        return blocks * limits.multiprocessors // config.TEAM

    def launch(self, teams: int, parameters: ctypes.Structure) -> None:
        """Puts `teams` teams on the device's current stream.

        Args:
            teams: how many.
            parameters: the kernel's only argument; it may change when this returns.

        Raises:
            RuntimeError: if the driver refuses.
        """
        driver = self._driver
        stream = _current_stream(self._device)
        prepared = self._prepared.get((teams, stream))
        if prepared is None:
            if len(self._prepared) >= _PREPARED_LAUNCHES:
                self._prepared.clear()
            prepared = self._prepared[teams, stream] = self._prepare(teams, stream)
        arguments = ctypes.c_void_p(ctypes.addressof(parameters))
        # PyTorch's guard would not do: a thread that has not used the GPU yet has no context.
        (status,) = driver.cuCtxPushCurrent(self._context)
        if status == _SUCCESS:
            (status,) = driver.cuLaunchKernelEx(
                prepared, self._function, ctypes.addressof(arguments), 0
            )
            driver.cuCtxPopCurrent()
        if status != _SUCCESS:
            what = f"{teams} teams of {_name(self._config)} on {self._device}"
            raise _refusal(
                driver, status, f"launching {what}, where {self.resident_teams} can be resident"
            )

    def _prepare(self, teams: int, stream: int):
        """The driver's description of a launch of `teams` teams on a stream."""
        driver, config = self._driver, self._config
        prepared = driver.CUlaunchConfig()
        prepared.gridDimX, prepared.gridDimY, prepared.gridDimZ = teams * config.TEAM, 1, 1
        prepared.blockDimX, prepared.blockDimY, prepared.blockDimZ = config.threads, 1, 1
        prepared.sharedMemBytes = config.shared_bytes
        prepared.hStream = stream
        kinds = driver.CUlaunchAttributeID
        attributes = []
        if config.cluster > 1:
            cluster = driver.CUlaunchAttribute()
            cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dimension = cluster.value.clusterDim
            dimension.x, dimension.y, dimension.z = config.cluster, 1, 1
            attributes.append(cluster)
        if config.cooperative:
            cooperative = driver.CUlaunchAttribute()
            cooperative.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            cooperative.value.cooperative = 1
            attributes.append(cooperative)
        prepared.attrs = attributes
        prepared.numAttrs = len(attributes)
        return prepared


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a CPU tensor on a GPU, made on its current stream; nothing waits for it.

    It may be captured in a CUDA graph, which copies what `x` holds now.
    """
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            return x.pin_memory().to(device, non_blocking=True)
        # Where no pinned memory is free it is asked for, which a capture would not have.
        allowed = contextlib.nullcontext() if availability() else _capture_allowed(_driver())
        with allowed:
            pinned = x.pin_memory()
        _copied_by_graphs.append(pinned)
        return pinned.to(device, non_blocking=True)


def _driver_version() -> str:
    """The newest CUDA that the driver knows, such as "13.0"."""
    number = _checked(_driver(), "cuDriverGetVersion")
    return f"{number // 1000}.{number % 1000 // 10}"


def _current_stream(device: torch.device) -> int:
    """The driver's handle of PyTorch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _primary_context(index: int):
    """The context of a device that PyTorch uses; kept for the life of the process."""
    driver = _driver()
    _checked(driver, "cuInit", 0)
    return _checked(driver, "cuDevicePrimaryCtxRetain", _checked(driver, "cuDeviceGet", index))


@contextlib.contextmanager
def _current(driver, context) -> Iterator[None]:
    """Makes a context the thread's current one, and the one before it afterwards."""
    _checked(driver, "cuCtxPushCurrent", context)
    try:
        yield
    finally:
        driver.cuCtxPopCurrent()


@contextlib.contextmanager
def _capture_allowed(driver) -> Iterator[None]:
    """Lets memory be taken, for a module too, while a stream is captured in a CUDA graph."""
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = _checked(driver, "cuThreadExchangeStreamCaptureMode", relaxed)
    try:
        yield
    finally:
        _checked(driver, "cuThreadExchangeStreamCaptureMode", before)


def _name(config: Config) -> str:
    """A configuration in an error's words: the kernel, its constants and the flags that are set."""
    constants = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            constants += [field.name] if value else []
        else:
            constants.append(f"{field.name}={value}")
    return f"{config.kernel_name}({', '.join(constants)})"
