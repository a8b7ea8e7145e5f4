"""What the CUDA kernels' loader asks of the driver; on a GPU, what the driver makes of it."""

import contextlib
import ctypes
import gc
import threading
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from fused_lstm.kernels.cuda import compiler, driver
from fused_lstm.kernels.cuda.limits import DeviceLimits

bindings = pytest.importorskip("cuda.bindings.driver")
pytestmark = pytest.mark.skipif(
    compiler.availability() is not None, reason=str(compiler.availability())
)
STREAM = 0x77
CONTEXT, MODULE, FUNCTION = "context", "module", "function"


@dataclass(frozen=True)
class SmallConfig:
    """A kernel that notes that it has run, with the interface of `Config`."""

    SCOPE: str = "block"
    TEAM: int = 1
    FLAG: bool = False
    spilling: bool = False

    kernel_name = "small_kernel"
    threads = 64
    shared_bytes = 100_000

    @property
    def cluster(self) -> int:
        return self.TEAM if self.SCOPE == "cluster" else 1

    @property
    def cooperative(self) -> bool:
        return self.SCOPE == "grid"

    def source(self) -> str:
        body = "if (threadIdx.x == 0) p.counts[blockIdx.x] += p.number;"
        if self.spilling:
            body = """int a[300];
              for (int i = 0; i < 300; i++) a[i] = p.counts[i];
              for (int i = 0; i < p.number; i++) a[i * 7 % 300] += a[i * 11 % 300];
              for (int i = 0; i < 300; i++) p.counts[i] = a[i];"""
        return f"""
            struct Parameters {{ int* counts; int number; int padding; char rest[1700]; }};
            extern "C" __global__ void small_kernel(const __grid_constant__ Parameters p) {{
              {body}
            }}"""


class SmallParameters(ctypes.Structure):
    _fields_ = (
        ("counts", ctypes.c_void_p),
        ("number", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("rest", ctypes.c_byte * 1700),
    )


class FakeDriver:
    """The bindings' own types, and functions that note how they are called.

    Attributes:
        calls: name and arguments of each call.
        answers: what a function returns beside success, by its name.
        refusals: status of the functions that fail, by name.
    """

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.refusals: dict[str, str] = {}
        self.answers: dict[str, object] = {
            "cuDeviceGet": 0,
            "cuDevicePrimaryCtxRetain": CONTEXT,
            "cuThreadExchangeStreamCaptureMode": "the mode before",
            "cuModuleLoadData": MODULE,
            "cuModuleGetFunction": FUNCTION,
            "cuOccupancyMaxActiveClusters": 15,
            "cuOccupancyMaxActiveBlocksPerMultiprocessor": 2,
            "cuDriverGetVersion": 12080,
            "cuGetErrorString": b"what it means",
        }

    def __getattr__(self, name: str):
        if not name.startswith("cu"):
            return getattr(bindings, name)

        def called(*arguments):
            if name == "cuLaunchKernelEx":
                # The argument's first bytes, while they are there.
                pointer = ctypes.c_void_p.from_address(arguments[2]).value
                arguments = (*arguments, SmallParameters.from_address(pointer).number)
            self.calls.append((name, *arguments))
            status = getattr(bindings.CUresult, self.refusals.get(name, "CUDA_SUCCESS"))
            return (status, self.answers[name]) if name in self.answers else (status,)

        return called

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def of(self, name: str) -> list[tuple]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def fake(monkeypatch, tmp_path) -> FakeDriver:
    """A device with 132 multiprocessors of sm_90, and no driver behind it."""
    fake = FakeDriver()
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232_448
    )
    monkeypatch.setenv("FUSED_LSTM_CACHE", str(tmp_path))
    monkeypatch.delenv("FUSED_LSTM_MULTIPROCESSORS", raising=False)
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "_current_stream", lambda device: STREAM)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver._primary_context.cache_clear()
    yield fake
    driver._primary_context.cache_clear()


def load(config: SmallConfig = SmallConfig(), index: int = 0, **options):
    return driver.CudaExecutor(**options).load(config, torch.device("cuda", index))


def attributes_of(prepared) -> dict[str, tuple[int, int, int] | int]:
    """A launch's attributes by name, as the driver would read them."""
    kinds = bindings.CUlaunchAttributeID
    found = {}
    for attribute in prepared.attrs:
        if attribute.id == kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
            dimension = attribute.value.clusterDim
            found["cluster"] = dimension.x, dimension.y, dimension.z
        elif attribute.id == kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
            found["cooperative"] = attribute.value.cooperative
        else:
            raise AssertionError(attribute)
    assert prepared.numAttrs == len(found)
    return found


# ---- launches


@pytest.mark.parametrize(
    ("config", "blocks", "attributes"),
    [
        (SmallConfig("block", 1), 3, {}),
        (SmallConfig("cluster", 4), 12, {"cluster": (4, 1, 1)}),
        (SmallConfig("cluster", 16), 48, {"cluster": (16, 1, 1)}),
        (SmallConfig("grid", 32), 96, {"cooperative": 1}),
    ],
)
def test_a_launch_is_described_to_the_driver(fake, config, blocks, attributes) -> None:
    load(config).launch(3, SmallParameters(number=42))
    ((prepared, function, _, extra, number),) = fake.of("cuLaunchKernelEx")
    assert (prepared.gridDimX, prepared.gridDimY, prepared.gridDimZ) == (blocks, 1, 1)
    assert (prepared.blockDimX, prepared.blockDimY, prepared.blockDimZ) == (64, 1, 1)
    assert prepared.sharedMemBytes == 100_000
    assert int(prepared.hStream) == STREAM
    assert attributes_of(prepared) == attributes
    assert (function, extra, number) == (FUNCTION, 0, 42)


def test_a_launch_makes_the_context_current_and_waits_for_nothing(fake) -> None:
    kernel = load()
    fake.calls.clear()
    kernel.launch(1, SmallParameters())
    assert fake.names() == ["cuCtxPushCurrent", "cuLaunchKernelEx", "cuCtxPopCurrent"]
    assert fake.of("cuCtxPushCurrent") == [(CONTEXT,)]


def test_launches_are_prepared_once_for_each_stream_and_number_of_teams(fake, monkeypatch) -> None:
    kernel = load()
    for stream in (1, 2, 1):
        monkeypatch.setattr(driver, "_current_stream", lambda device, stream=stream: stream)
        for teams in (3, 4):
            kernel.launch(teams, SmallParameters())
    launches = [call[0] for call in fake.of("cuLaunchKernelEx")]
    assert [(x.gridDimX, int(x.hStream)) for x in launches] == [
        (3, 1),
        (4, 1),
        (3, 2),
        (4, 2),
        (3, 1),
        (4, 1),
    ]
    assert launches[4] is launches[0]


def test_prepared_launches_do_not_pile_up(fake) -> None:
    kernel = load()
    for teams in range(1, 3 * driver._PREPARED_LAUNCHES):
        kernel.launch(teams, SmallParameters())
    assert len(kernel._prepared) <= driver._PREPARED_LAUNCHES


def test_a_refused_launch_says_what_was_launched_and_why(fake) -> None:
    kernel = load(SmallConfig("grid", 32, FLAG=True))
    fake.refusals["cuLaunchKernelEx"] = "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
    with pytest.raises(RuntimeError) as caught:
        kernel.launch(9, SmallParameters())
    assert str(caught.value) == (
        "launching 9 teams of small_kernel(SCOPE=grid, TEAM=32, FLAG) on cuda:0, where 8 can be "
        "resident: the CUDA driver says CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE (what it means)"
    )
    assert fake.names().count("cuCtxPushCurrent") == fake.names().count("cuCtxPopCurrent")


def test_a_lost_context_is_an_error_of_the_launch(fake) -> None:
    kernel = load()
    fake.calls.clear()
    fake.refusals["cuCtxPushCurrent"] = "CUDA_ERROR_CONTEXT_IS_DESTROYED"
    with pytest.raises(RuntimeError, match=r"launching 1 teams .*CUDA_ERROR_CONTEXT_IS_DESTROYED"):
        kernel.launch(1, SmallParameters())
    assert "cuLaunchKernelEx" not in fake.names()
    assert "cuCtxPopCurrent" not in fake.names()


# ---- loading


def test_loading_asks_for_what_a_launch_may_not_have_unasked(fake) -> None:
    attribute = bindings.CUfunction_attribute
    shared = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    large_cluster = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    load(SmallConfig("cluster", 8))
    assert fake.of("cuFuncSetAttribute") == [(FUNCTION, shared, 100_000)]
    fake.calls.clear()
    load(SmallConfig("cluster", 16))
    assert fake.of("cuFuncSetAttribute") == [
        (FUNCTION, shared, 100_000),
        (FUNCTION, large_cluster, 1),
    ]


def test_loading_is_allowed_while_a_graph_is_captured(fake) -> None:
    load()
    relaxed = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    assert fake.of("cuThreadExchangeStreamCaptureMode") == [(relaxed,), ("the mode before",)]
    names = fake.names()
    first, last = (i for i, name in enumerate(names) if name == "cuThreadExchangeStreamCaptureMode")
    assert first < names.index("cuModuleLoadData") < last
    assert names.count("cuCtxPushCurrent") == names.count("cuCtxPopCurrent") == 1


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "captured"])
def test_an_upload_may_be_captured_and_is_then_kept(fake, monkeypatch, capturing) -> None:
    modes = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        modes.append(fake.of("cuThreadExchangeStreamCaptureMode"))
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(driver, "_copied_by_graphs", [])
    x = torch.tensor([3, 2])
    assert driver.upload(x, torch.device("cpu")).tolist() == [3, 2]
    relaxed = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    # Memory is taken where a capture lets it be; afterwards all is as before.
    assert modes == [[(relaxed,)] if capturing else []]
    exchanged = [(relaxed,), ("the mode before",)] if capturing else []
    assert fake.of("cuThreadExchangeStreamCaptureMode") == exchanged
    assert len(driver._copied_by_graphs) == capturing


def test_a_kernel_is_loaded_once_for_each_device(fake) -> None:
    executor = driver.CudaExecutor()
    kernels = [
        executor.load(SmallConfig(), torch.device(device))
        for device in ("cuda:0", "cuda:1", "cuda", "cuda:1")
    ]
    assert kernels[0] is kernels[2]
    assert kernels[1] is kernels[3]
    assert kernels[0] is not kernels[1]
    assert fake.of("cuDeviceGet") == [(0,), (1,)]
    assert len(fake.of("cuModuleLoadData")) == 2


def test_threads_load_a_kernel_once(fake) -> None:
    executor = driver.CudaExecutor()
    together = threading.Barrier(8)
    loaded = []

    def load_it() -> None:
        together.wait()
        loaded.append(executor.load(SmallConfig(), torch.device("cuda", 0)))

    threads = [threading.Thread(target=load_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, loaded))) == 1
    assert len(loaded) == 8
    assert len(fake.of("cuModuleLoadData")) == 1


def test_a_kernel_that_spills_is_refused_before_it_is_loaded(fake) -> None:
    executor = driver.CudaExecutor()
    for _ in range(2):
        with pytest.raises(
            compiler.KernelUnavailableError,
            match=r"small_kernel\(.*spilling\) needs 1200 bytes a thread beyond .* on sm_90",
        ):
            executor.load(SmallConfig(spilling=True), torch.device("cuda", 0))
    assert fake.calls == []


def test_a_compile_error_is_not_tried_again(fake, monkeypatch) -> None:
    compiled = []

    def refuses(source: str, arch: str) -> bytes:
        compiled.append(arch)
        raise compiler.KernelUnavailableError("line 3: error")

    monkeypatch.setattr(driver, "cubin_of", refuses)
    executor = driver.CudaExecutor()
    for _ in range(2):
        with pytest.raises(compiler.KernelUnavailableError, match="line 3: error"):
            executor.load(SmallConfig(), torch.device("cuda", 0))
    assert compiled == ["sm_90"]


def test_a_remembered_refusal_keeps_nothing_alive(fake, monkeypatch) -> None:
    def refuses(source: str, arch: str) -> bytes:
        raise compiler.KernelUnavailableError("line 3: error")

    monkeypatch.setattr(driver, "cubin_of", refuses)
    executor = driver.CudaExecutor()
    of_the_caller = []

    def call() -> None:
        tensor = torch.zeros(3)
        of_the_caller.append(weakref.ref(tensor))
        with contextlib.suppress(compiler.KernelUnavailableError):
            executor.load(SmallConfig(), torch.device("cuda", 0))

    call()
    gc.collect()
    assert of_the_caller[0]() is None


def test_a_module_that_does_not_load_says_which_versions_met(fake) -> None:
    fake.refusals["cuModuleLoadData"] = "CUDA_ERROR_NO_BINARY_FOR_GPU"
    with pytest.raises(compiler.KernelUnavailableError) as caught:
        load()
    message = str(caught.value)
    assert f"compiled for sm_90 by NVRTC of CUDA {compiler.nvrtc_version()}" in message
    assert "driver of CUDA 12.8" in message
    assert "cuModuleLoadData: the CUDA driver says CUDA_ERROR_NO_BINARY_FOR_GPU" in message
    assert fake.names()[-1] != "cuModuleLoadData"
    assert "cuCtxPopCurrent" in fake.names()


def test_a_device_without_memory_may_have_some_later(fake) -> None:
    executor = driver.CudaExecutor()
    fake.refusals["cuModuleLoadData"] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(torch.OutOfMemoryError):
        executor.load(SmallConfig(), torch.device("cuda", 0))
    fake.refusals.clear()
    assert executor.load(SmallConfig(), torch.device("cuda", 0)).resident_teams == 264


def test_without_a_compiler_the_reason_is_given(fake, monkeypatch) -> None:
    monkeypatch.setattr(driver, "availability", lambda: "nothing there")
    with pytest.raises(compiler.KernelUnavailableError, match="nothing there"):
        load()


# ---- how many teams run at the same time


@pytest.mark.parametrize(
    ("config", "teams", "pretended"),
    [
        (SmallConfig("block", 1), 264, 132),
        (SmallConfig("cluster", 4), 15, 7),
        (SmallConfig("grid", 32), 8, 4),
        (SmallConfig("grid", 96), 2, 1),
    ],
)
def test_resident_teams(fake, monkeypatch, config, teams, pretended) -> None:
    assert load(config).resident_teams == teams
    assert load(config, multiprocessors=66).resident_teams == pretended
    monkeypatch.setenv("FUSED_LSTM_MULTIPROCESSORS", "66")
    assert load(config).resident_teams == pretended


def test_the_occupancy_of_clusters_is_asked_for_the_launch_to_come(fake) -> None:
    load(SmallConfig("cluster", 4))
    ((function, prepared),) = fake.of("cuOccupancyMaxActiveClusters")
    assert function == FUNCTION
    assert prepared.gridDimX == 4
    assert prepared.sharedMemBytes == 100_000
    assert attributes_of(prepared) == {"cluster": (4, 1, 1)}


@pytest.mark.parametrize("config", [SmallConfig("cluster", 4), SmallConfig("grid", 133)])
def test_a_team_that_finds_no_room_is_refused(fake, config) -> None:
    fake.answers["cuOccupancyMaxActiveClusters"] = 0
    fake.answers["cuOccupancyMaxActiveBlocksPerMultiprocessor"] = 1
    with pytest.raises(compiler.KernelUnavailableError, match="no room for a team"):
        load(config)
    assert fake.of("cuModuleUnload") == [(MODULE,)]


def test_a_device_is_described(fake, monkeypatch) -> None:
    device = torch.device("cuda", 0)
    assert driver.describe(device) == DeviceLimits("sm_90", 132, 232_448, 16)
    assert driver.describe(device, 20).multiprocessors == 20
    assert driver.describe(device, 500).multiprocessors == 132
    monkeypatch.setenv("FUSED_LSTM_MULTIPROCESSORS", "8")
    assert driver.describe(device).multiprocessors == 8
    assert driver.describe(device, 20).multiprocessors == 20
    for wrong in ("0", "-3", "many"):
        monkeypatch.setenv("FUSED_LSTM_MULTIPROCESSORS", wrong)
        with pytest.raises(ValueError, match="FUSED_LSTM_MULTIPROCESSORS must be a positive"):
            driver.describe(device)


# ---- on a GPU


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"
)


def scopes() -> list[SmallConfig]:
    """What the GPU at hand can launch."""
    configs = [SmallConfig("block", 1), SmallConfig("grid", 4)]
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9:
        configs.append(SmallConfig("cluster", 4))
    return configs


def launched(kernel, counts: torch.Tensor, teams: int = 2, number: int = 5) -> None:
    kernel.launch(teams, SmallParameters(counts=counts.data_ptr(), number=number))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("config", scopes())
def test_on_a_gpu_every_block_runs_with_the_parameters(config) -> None:
    counts = torch.zeros(100, dtype=torch.int32, device="cuda")
    kernel = driver.CudaExecutor().load(config, counts.device)
    launched(kernel, counts)
    blocks = 2 * config.TEAM
    assert counts.tolist() == [5] * blocks + [0] * (100 - blocks)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("config", scopes())
def test_on_a_gpu_a_launch_is_captured_even_the_first(config) -> None:
    counts = torch.zeros(100, dtype=torch.int32, device="cuda")
    executor = driver.CudaExecutor()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        launched(executor.load(config, counts.device), counts)
    assert counts[0] == 0
    graph.replay()
    graph.replay()
    assert counts[0] == 10


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_launch_goes_to_the_current_stream_of_any_thread() -> None:
    counts = torch.zeros(100, dtype=torch.int32, device="cuda")
    kernel = driver.CudaExecutor().load(SmallConfig(), counts.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def work() -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            counts.fill_(3)
            launched(kernel, counts, teams=1)

    for run in (work, lambda: launched(kernel, counts, teams=1)):
        torch.cuda.synchronize()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    torch.cuda.synchronize()
    assert counts[0] == 13


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus_each_has_its_own_kernel() -> None:
    executor = driver.CudaExecutor()
    for index in (1, 0):
        counts = torch.zeros(100, dtype=torch.int32, device=f"cuda:{index}")
        launched(executor.load(SmallConfig(), counts.device), counts)
        assert counts[:3].tolist() == [5, 5, 0]


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_cooperative_launch_beyond_what_is_resident_is_refused() -> None:
    kernel = driver.CudaExecutor().load(SmallConfig("grid", 4), torch.device("cuda"))
    counts = torch.zeros(4 * kernel.resident_teams + 4, dtype=torch.int32, device="cuda")
    launched(kernel, counts, teams=kernel.resident_teams)
    assert counts.sum() == 5 * 4 * kernel.resident_teams
    with pytest.raises(RuntimeError, match="CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"):
        launched(kernel, counts, teams=kernel.resident_teams + 1)
