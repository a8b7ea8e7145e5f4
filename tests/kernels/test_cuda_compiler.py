"""The run-time compiler of the CUDA kernels and its cache, on a machine without a GPU."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from fused_lstm.kernels.cuda import cache, compile_ahead, compiler, cubin

KEY = "ab" * 32
SOURCE = 'extern "C" __global__ void small_kernel(float* p) { *p = 1.f; }'
# 300 numbers of a thread, each read at places known only at run time: they have to go to memory.
SPILLING = """
extern "C" __global__ void spilling_kernel(float* p, int n) {
  __shared__ float shared[100];
  float a[300];
  for (int i = 0; i < 300; i++) a[i] = p[i];
  for (int i = 0; i < n; i++) a[(i * 7) % 300] += a[(i * 11) % 300];
  shared[threadIdx.x % 100] = a[n % 300];
  __syncthreads();
  for (int i = 0; i < 300; i++) p[i] = a[i] + shared[i % 100];
}
"""

needs_nvrtc = pytest.mark.skipif(
    compiler.availability() is not None, reason=str(compiler.availability())
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own; it does not exist yet."""
    path = tmp_path / "cache"
    monkeypatch.setenv("FUSED_LSTM_CACHE", str(path))
    return path


@pytest.fixture
def fresh_availability():
    """Asks anew what is there, and forgets the answer afterwards."""
    compiler.availability.cache_clear()
    yield
    compiler.availability.cache_clear()


def never() -> bytes:
    raise AssertionError("compiled again")


# ---- the cache


def test_the_folder_is_the_named_one_or_the_users(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FUSED_LSTM_CACHE")
    assert cache.cache_folder() == tmp_path / "xdg" / "fused_lstm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    if os.name == "posix":
        assert cache.cache_folder() == tmp_path / "home" / ".cache" / "fused_lstm"


def test_a_cubin_is_compiled_once(folder) -> None:
    first = cache.CubinCache()
    assert first.get(KEY, lambda: b"code") == b"code"
    assert first.get(KEY, never) == b"code"
    assert cache.CubinCache().get(KEY, never) == b"code"
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.cubin"]


def test_keys_are_apart() -> None:
    kept = cache.CubinCache()
    assert kept.get(KEY, lambda: b"one") == b"one"
    assert kept.get("cd" * 32, lambda: b"two") == b"two"


def test_a_failed_compilation_keeps_nothing(folder) -> None:
    kept = cache.CubinCache()

    def fails() -> bytes:
        raise compiler.KernelUnavailableError("no")

    with pytest.raises(compiler.KernelUnavailableError, match="no"):
        kept.get(KEY, fails)
    assert not folder.exists()
    assert kept.get(KEY, lambda: b"code") == b"code"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-1], id="truncated"),
        pytest.param(lambda content: content[:10], id="cut in its head"),
        pytest.param(lambda content: content + b"!", id="longer"),
        pytest.param(lambda content: content[:-1] + bytes([content[-1] ^ 1]), id="one bit"),
        pytest.param(lambda content: b"\x7fELF something else entirely", id="foreign"),
    ],
)
def test_a_damaged_file_is_ignored_and_rewritten(folder, damage) -> None:
    cache.CubinCache().get(KEY, lambda: b"code")
    path = folder / f"{KEY}.cubin"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cache.CubinCache().get(KEY, lambda: b"code") == b"code"
    assert path.read_bytes() == whole


def test_a_file_under_another_key_is_ignored(folder) -> None:
    cache.CubinCache().get(KEY, lambda: b"code")
    (folder / f"{KEY}.cubin").rename(folder / f"{'cd' * 32}.cubin")
    assert cache.CubinCache().get("cd" * 32, lambda: b"other") == b"other"


def test_a_folder_that_cannot_be_written_costs_one_warning(folder) -> None:
    folder.write_text("a file stands where the folder should be")
    kept = cache.CubinCache()
    with pytest.warns(UserWarning, match=r"cache of compiled kernels cannot be .*FUSED_LSTM_CACHE"):
        assert kept.get(KEY, lambda: b"one") == b"one"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept.get("cd" * 32, lambda: b"two") == b"two"
        assert kept.get(KEY, never) == b"one"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_read_only_folder_costs_one_warning(folder) -> None:
    folder.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert cache.CubinCache().get(KEY, lambda: b"code") == b"code"


def test_a_file_that_cannot_be_read_costs_one_warning(folder) -> None:
    (folder / f"{KEY}.cubin").mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read") as caught:
        assert cache.CubinCache().get(KEY, lambda: b"code") == b"code"
    assert len(caught) == 1
    assert len(list(folder.iterdir())) == 1


def test_no_home_costs_one_warning(monkeypatch) -> None:
    monkeypatch.delenv("FUSED_LSTM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", no_home)
    with pytest.warns(UserWarning, match="home directory"):
        assert cache.CubinCache().get(KEY, lambda: b"code") == b"code"


def test_a_write_that_fails_leaves_nothing_behind(folder, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert cache.CubinCache().get(KEY, lambda: b"code") == b"code"
    assert list(folder.iterdir()) == []


def test_threads_compile_once() -> None:
    kept = cache.CubinCache()
    together = threading.Barrier(8)
    compiled = []

    def compile_slowly() -> bytes:
        compiled.append(1)
        threading.Event().wait(0.05)
        return b"code"

    def ask() -> None:
        together.wait()
        kept.get(KEY, compile_slowly)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1


def test_one_key_does_not_wait_for_another() -> None:
    kept = cache.CubinCache()
    # The outer compilation holds its key's lock while the inner one runs.
    assert kept.get(KEY, lambda: kept.get("cd" * 32, lambda: b"code")) == b"code"


# Writes and reads the same few files again and again; what it reads must always be whole.
_WORKER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
for round in range(60):
    for number in range(3):
        kept, key = cache.CubinCache(), f"{number:064x}"
        code = bytes([number]) * 100_000
        assert kept.get(key, lambda: code) == code
        kept._write(key, code)
"""


def test_processes_share_the_folder(folder) -> None:
    command = [sys.executable, "-W", "error", "-c", _WORKER, cache.__file__]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert sorted(path.name for path in folder.iterdir()) == [f"{n:064x}.cubin" for n in range(3)]


# ---- the compiler


@needs_nvrtc
def test_the_key_depends_on_everything_that_the_code_depends_on(monkeypatch) -> None:
    def key(source: str = SOURCE, arch: str = "sm_90") -> str:
        return compiler._cache_key.__wrapped__(source, arch)

    keys = [key(), key(source=SOURCE + "\n"), key(arch="sm_80")]
    headers = compiler._headers()
    assert {"device.cuh", "parameters.h", "layout.cuh", "forward.cuh"} <= set(headers)
    with monkeypatch.context() as patch:
        for name, text in headers.items():
            others = {other: headers[other] for other in headers if other != name}
            for changed in (
                {**headers, name: text + b"\n"},
                others,
                dict(sorted({**others, f"{name}x": text}.items())),
            ):
                patch.setattr(compiler, "_headers", lambda changed=changed: changed)
                keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_OPTIONS", (*compiler._OPTIONS, "--use_fast_math"))
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "nvrtc_version", lambda: "99.0")
        keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_every_header_of_the_folder_is_passed() -> None:
    folder = Path(compiler.__file__).parent
    names = {path.name for path in folder.iterdir() if path.suffix in (".cuh", ".h")}
    assert set(compiler._headers()) == names
    # Those that a host compiler's twin of device.cuh needs are not: NVRTC would not find them.
    assert "simt_device.h" not in names


@needs_nvrtc
def test_a_kernel_compiles_without_cuda_headers(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    code = compiler.compile_source('#include "device.cuh"\n' + SOURCE, "sm_90")
    assert code[:4] == b"\x7fELF"
    assert cubin.resources_of(code).kernel == "small_kernel"


@needs_nvrtc
def test_a_cubin_is_compiled_for_the_asked_architecture_and_kept(folder) -> None:
    # Unlike any other test's: the process keeps what it has compiled.
    source = SOURCE.replace("small_kernel", "kept_kernel")
    code = compiler.cubin_of(source, "sm_80")
    assert compiler.cubin_of(source, "sm_80") is code
    assert compiler.cubin_of(source, "sm_86") != code
    assert len(list(folder.iterdir())) == 2


@needs_nvrtc
def test_a_refused_source_says_where_and_why() -> None:
    with pytest.raises(compiler.KernelUnavailableError) as caught:
        compiler.compile_source("\n\nint three = ;", "sm_90")
    message = str(caught.value)
    assert "NVRTC could not compile a kernel for sm_90 (NVRTC_ERROR_COMPILATION)" in message
    assert "instance.cu(3): error: expected an expression" in message


@needs_nvrtc
def test_an_error_in_a_header_names_the_header() -> None:
    source = "#define __device__ nonsense\n" + '#include "device.cuh"\n' + SOURCE
    with pytest.raises(compiler.KernelUnavailableError, match=r"device\.cuh\(\d+\): error"):
        compiler.compile_source(source, "sm_90")


@needs_nvrtc
@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_120"),
    ],
)
def test_each_capability_has_its_architecture(capability, arch) -> None:
    assert compiler.architecture(*capability) == arch


@needs_nvrtc
def test_a_newer_device_runs_the_code_of_an_older_one(monkeypatch) -> None:
    monkeypatch.setattr(compiler, "_supported_architectures", lambda: (75, 80, 86, 90, 100, 103))
    assert compiler.architecture(8, 9) == "sm_86"
    assert compiler.architecture(10, 7) == "sm_103"
    with pytest.raises(compiler.KernelUnavailableError, match=r"capability 12\.0"):
        compiler.architecture(12, 0)
    with pytest.raises(compiler.KernelUnavailableError, match=r"NVRTC .* capability 7\.0"):
        compiler.architecture(7, 0)


def test_without_cuda_bindings_the_reason_says_what_to_install(
    monkeypatch, fresh_availability
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert compiler.availability() == (
        "the package cuda-bindings is not installed: pip install fused-lstm[cuda]"
    )
    with pytest.raises(compiler.KernelUnavailableError, match="not installed"):
        compiler.compile_source(SOURCE, "sm_90")


def test_without_nvrtcs_library_the_reason_says_so(monkeypatch, fresh_availability) -> None:
    class Bindings:
        @staticmethod
        def nvrtcVersion():  # noqa: N802 (NVRTC's own name)
            raise RuntimeError("Failed to dlopen libnvrtc.so.13\nand much more")

    monkeypatch.setattr(compiler, "_nvrtc", Bindings)
    assert compiler.availability() == (
        "NVRTC's library cannot be loaded (Failed to dlopen libnvrtc.so.13): "
        "pip install fused-lstm[cuda]"
    )


def test_availability_is_asked_once(monkeypatch, fresh_availability) -> None:
    calls = []

    def count():
        calls.append(1)
        raise ImportError("no", name="cuda")

    monkeypatch.setattr(compiler, "_nvrtc", count)
    assert compiler.availability() == compiler.availability()
    assert len(calls) == 1


def test_importing_needs_no_cuda_bindings() -> None:
    script = (
        "import sys; sys.modules['cuda'] = None\n"
        "import fused_lstm.kernels.cuda.driver, fused_lstm.kernels.cuda.compile_ahead\n"
        "from fused_lstm.kernels.cuda.compiler import availability\n"
        "assert 'not installed' in availability(), availability()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- what a cubin tells


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_resources_are_those_that_cuobjdump_reports(arch, tmp_path) -> None:
    tool = compile_ahead.disassembler()
    if tool is None:
        pytest.skip("no cuobjdump: Triton's wheel has one")
    for source in (SOURCE, SPILLING):
        code = compiler.compile_source(source, arch)
        path = tmp_path / "kernel.cubin"
        path.write_bytes(code)
        text = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        used = dict(field.split(":") for field in text.split() if field.count(":") == 1)
        resources = cubin.resources_of(code)
        assert f"Function {resources.kernel}:" in text
        assert resources.registers == int(used["REG"])
        assert resources.local_bytes == int(used["STACK"]) + int(used["LOCAL"])
        # From sm_90 on cuobjdump adds the kilobyte that the system takes.
        reserved = 1024 if int(used["SHARED"]) >= 1024 else 0
        assert resources.static_shared_bytes == int(used["SHARED"]) - reserved
        assert (resources.local_bytes > 0) == (source is SPILLING)
        assert resources.static_shared_bytes == (400 if source is SPILLING else 0)


@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF\x02\x01" + b"\0" * 200])
def test_what_is_not_a_cubin_is_refused(content) -> None:
    with pytest.raises(ValueError, match="not a cubin"):
        cubin.resources_of(content)


@needs_nvrtc
def test_two_kernels_are_refused() -> None:
    two = SOURCE + SOURCE.replace("small", "other")
    with pytest.raises(ValueError, match="not a cubin of one kernel"):
        cubin.resources_of(compiler.compile_source(two, "sm_90"))
