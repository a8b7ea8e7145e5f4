"""How the native CPU library is built, shipped, found, loaded and refused."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from fused_lstm.kernels.cpu import library

try:
    import tomllib
except ModuleNotFoundError:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "cpu"
# Any real shared library, for what is to be refused.
SOME_LIBRARY = Path(torch.__file__).parent / "lib" / "libc10.so"

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="about ELF files and /proc")

# A library with the interface of lstm.h that computes nothing: `forward` returns how many threads
# OpenMP gave it, `backward` the number of steps it reads from the structure.
STAND_IN = """
#include "lstm.h"
#include <atomic>
#ifndef ABI
#define ABI kLstmAbiVersion
#endif
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel run_parallel;
static int (*get_thread_num)();
static int (*get_num_threads)();
static void count(void *context) {
  if (get_thread_num() < get_num_threads()) ++*static_cast<std::atomic<int> *>(context);
}
extern "C" {
int64_t fused_lstm_abi_version() { return ABI; }
const char *fused_lstm_instruction_sets() { return NAMES; }
int64_t fused_lstm_multiplies_bfloat16(int64_t instruction_set) { return instruction_set == 0; }
void fused_lstm_set_openmp(Parallel parallel, int (*thread_num)(), int (*num_threads)()) {
  run_parallel = parallel;
  get_thread_num = thread_num;
  get_num_threads = num_threads;
}
int32_t fused_lstm_forward(const LstmForward *, int64_t, int64_t, int64_t threads, int64_t) {
  std::atomic<int> threads_seen{0};
  if (run_parallel) run_parallel(count, &threads_seen, unsigned(threads), 0);
  return threads_seen;
}
#ifndef NO_BACKWARD
int32_t fused_lstm_backward(const LstmBackward *recurrence, int64_t, int64_t, int64_t, int64_t) {
  return int32_t(recurrence->steps);
}
#endif
int32_t fused_lstm_layer_norm_forward(const LstmLayerNormForward *, int64_t, int64_t, int64_t,
                                      int64_t) {
  return 0;
}
int32_t fused_lstm_layer_norm_backward(const LstmLayerNormBackward *recurrence, int64_t, int64_t,
                                       int64_t, int64_t) {
  return int32_t(recurrence->eps);
}
int32_t fused_lstm_plain_forward(const LstmPlain *) { return 0; }
int32_t fused_lstm_plain_backward(const LstmPlain *) { return 0; }
}
""".replace("return NAMES", 'return "avx2,baseline"')

# A preloaded OpenMP runtime, as far as anyone can tell: it counts, and the real one does the work.
PRELOADED = """
#include <dlfcn.h>
extern "C" {
int parallel_calls;
void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags) {
  typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
  ++parallel_calls;
  reinterpret_cast<Parallel>(dlsym(RTLD_NEXT, "GOMP_parallel"))(function, data, threads, flags);
}
}
"""


@pytest.fixture(scope="module")
def compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    pytest.skip("needs a C++ compiler")


@pytest.fixture(scope="module")
def build(compiler, tmp_path_factory):
    """Compiles a shared library from a text."""

    def compile_library(name: str, source: str, *flags: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "source.cpp").write_text(source)
        path = folder / f"{name}.so"
        command = [compiler, "-std=c++17", "-shared", "-fPIC", "-O1", f"-I{SOURCES}", *flags]
        subprocess.run([*command, "source.cpp", "-o", path, "-ldl"], cwd=folder, check=True)
        return path

    return compile_library


@pytest.fixture(scope="module")
def stand_in(build) -> Path:
    return build("stand_in", STAND_IN)


@pytest.fixture
def forgotten(monkeypatch):
    """As if nothing had been loaded yet."""
    monkeypatch.setattr(library, "_outcome", None)
    monkeypatch.delenv(library.PATH_VARIABLE, raising=False)


def python(script: str, *arguments: object, **environment: object) -> str:
    """Runs a script in a fresh interpreter, away from the checkout; returns what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        cwd=os.path.abspath(os.sep),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    return result.stdout


def refusal(path: Path) -> str:
    with pytest.raises(library.LibraryUnavailableError) as caught:
        library._open(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# What is declared


def test_interface_version_is_that_of_the_header() -> None:
    (version,) = re.findall(r"kLstmAbiVersion = (\d+);", (SOURCES / "lstm.h").read_text())
    assert int(version) == library.ABI_VERSION


def test_every_header_is_declared_to_the_build() -> None:
    """One that is not could change without a rebuild."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    headers = {path.relative_to(ROOT).as_posix() for path in SOURCES.glob("*.h")}
    assert set(extension["depends"]) == headers


# This installation


def test_a_machine_with_a_compiler_has_the_library(compiler) -> None:
    """Elsewhere a build that fails is no error, and every test of the kernels would be skipped."""
    loaded = library.load()
    assert loaded.instruction_sets[-1] == "baseline"
    assert library.load() is loaded


def test_importing_loads_nothing() -> None:
    python(
        "import sys, fused_lstm\n"
        "assert not [name for name in sys.modules if name.startswith('fused_lstm.kernels.cpu')]\n"
        "from fused_lstm.kernels.cpu import library\n"
        "assert library._outcome is None\n"
    )


@on_linux
def test_the_library_depends_on_no_openmp_runtime(compiler) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.check_output([readelf, "--dynamic", library.load().path], text=True)
    assert "SYMTAB" in dynamic
    assert not re.search(r"lib(gomp|omp|iomp)", dynamic)


# Loading


def test_many_threads_load_once(forgotten, monkeypatch) -> None:
    opened = []

    def slow_open(path: Path) -> library.Library:
        opened.append(path)
        time.sleep(0.05)
        return library.Library(path, ("baseline",), (False,), *[len] * 6, False, "")

    monkeypatch.setattr(library, "_locate", lambda: Path("somewhere"))
    monkeypatch.setattr(library, "_open", slow_open)
    results = []
    threads = [threading.Thread(target=lambda: results.append(library.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1
    assert len(results) == 8
    assert all(result is results[0] for result in results)


def test_failure_is_remembered(forgotten, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(library.PATH_VARIABLE, str(tmp_path / "nowhere.so"))
    for _ in range(2):
        with pytest.raises(library.LibraryUnavailableError, match=r"nowhere\.so does not exist"):
            library.load()
        monkeypatch.delenv(library.PATH_VARIABLE, raising=False)


def test_structures_are_passed_as_bytes(stand_in) -> None:
    loaded = library._open(stand_in)
    assert loaded.instruction_sets == ("avx2", "baseline")
    assert loaded.multiply_bfloat16 == (True, False)
    assert loaded.backward(struct.pack("=q", 41) + bytes(1000), 1, 0, 1, 0) == 41
    # The last field.
    arguments = bytes(8 * (54 + 13 + 15)) + struct.pack("=d", 43)
    assert loaded.layer_norm_backward(arguments, 1, 0, 1, 0) == 43
    assert loaded.layer_norm_forward(arguments, 1, 0, 1, 0) == 0
    with pytest.raises(AttributeError):
        loaded.openmp = False


def test_environment_names_another_build(stand_in) -> None:
    script = (
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "from fused_lstm.kernels.cpu import library\n"
        "print(library.load().path)\n"
    )
    for named in (stand_in, stand_in.name):
        found = python(script, stand_in.parent, **{library.PATH_VARIABLE: named})
        assert Path(found.strip()) == stand_in


def test_empty_environment_variable_names_nothing(forgotten, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setenv(library.PATH_VARIABLE, "")
    (tmp_path / "_native.so").touch()
    assert library._locate() == tmp_path / "_native.so"


@pytest.mark.parametrize(
    "suffix", [*importlib.machinery.EXTENSION_SUFFIXES, ".so", ".dylib"], ids=str
)
def test_found_next_to_the_package(forgotten, monkeypatch, tmp_path, suffix) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(library.LibraryUnavailableError, match=r"C\+\+17 compiler") as caught:
        library.load()
    assert str(tmp_path) in str(caught.value)
    (tmp_path / f"_native{suffix}").touch()
    assert library._locate() == tmp_path / f"_native{suffix}"


# Refusals


def test_no_file(tmp_path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.so")
    (tmp_path / "dangling.so").symlink_to(tmp_path / "nowhere.so")
    assert "does not exist" in refusal(tmp_path / "dangling.so")


def test_not_a_regular_file(tmp_path) -> None:
    assert "is not a file" in refusal(tmp_path)
    if hasattr(os, "mkfifo"):
        # Nothing ever writes to it: reading it would wait for ever.
        os.mkfifo(tmp_path / "pipe.so")
        assert "is not a file" in refusal(tmp_path / "pipe.so")


def test_unreadable_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "locked.so"
    path.touch()

    def denied(*_) -> None:
        raise PermissionError(13, "Permission denied")

    # Permissions do not stop root, who may be running this.
    monkeypatch.setattr(library, "_promised_size", denied)
    assert "cannot be read: Permission denied" in refusal(path)


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\n", bytes(4096), os.urandom(4096)], ids=["empty", "text", "0", "?"]
)
def test_garbage(tmp_path, content) -> None:
    path = tmp_path / "garbage.so"
    path.write_bytes(content)
    assert "cannot be loaded" in refusal(path)


@on_linux
@pytest.mark.parametrize(("offset", "value"), [(4, 1), (5, 2), (18, 0xF3)])
def test_another_machine(tmp_path, offset, value) -> None:
    """32 bits, the other byte order, another processor."""
    content = bytearray(SOME_LIBRARY.read_bytes())
    content[offset] = value
    path = tmp_path / "foreign.so"
    path.write_bytes(content)
    assert "was built for another processor" in refusal(path)


@on_linux
def test_cut_off_at_any_length(tmp_path) -> None:
    """In its own process: the dynamic loader dies of some of these files."""
    script = """
import sys
from pathlib import Path
from fused_lstm.kernels.cpu import library

content = Path(sys.argv[1]).read_bytes()
# As some tools leave it: without a section table, whose place is the end of the file.
stripped = content[:40] + bytes(8) + content[48:60] + bytes(4) + content[64:]
path = Path(sys.argv[2])
segments_end = max(library._promised_size(path) for _ in [path.write_bytes(stripped)])
for kind, end in ((content, len(content)), (stripped, segments_end)):
    for length in (5, 40, 63, 64, 100, 1000, 4096, end // 4, end // 2, end - 4096, end - 1):
        # A new file each time: the loader knows those it has seen.
        path.unlink()
        path.write_bytes(kind[:length])
        try:
            library._open(path)
        except library.LibraryUnavailableError as error:
            assert "cut off" in str(error), error
        else:
            raise AssertionError(f"{length} of {end} bytes were accepted")
"""
    python(script, SOME_LIBRARY, tmp_path / "cut.so")


@on_linux
def test_another_library() -> None:
    assert "is not fused_lstm's native library: undefined symbol: " in refusal(SOME_LIBRARY)


def test_missing_function(build) -> None:
    path = build("partial", STAND_IN, "-DNO_BACKWARD")
    assert "fused_lstm_backward" in refusal(path)


def test_another_interface_version(build) -> None:
    text = refusal(build("outdated", STAND_IN, "-DABI=99"))
    assert f"its interface has version 99, expected {library.ABI_VERSION}" in text


def test_nothing_for_this_cpu(build) -> None:
    path = build("unsuitable", STAND_IN.replace('"avx2,baseline"', '""'))
    assert "no kernels that this CPU can run" in refusal(path)


@on_linux
def test_unresolved_symbol(build) -> None:
    """Refused when it is loaded, not when it is called."""
    path = build("unresolved", STAND_IN + "void absent(); void *use() { absent(); return 0; }")
    assert "cannot be loaded: undefined symbol" in refusal(path)


# OpenMP


@on_linux
def test_threads_run_on_the_runtime_that_torch_has_loaded(stand_in) -> None:
    script = """
import re, sys, torch
from pathlib import Path
from fused_lstm.kernels.cpu import library

def mapped():
    lines = Path("/proc/self/maps").read_text().splitlines()
    fields = [line.split(maxsplit=5) for line in lines]
    regions = [(*(int(x, 16) for x in f[0].split("-")), f[5]) for f in fields if len(f) == 6]
    return [r for r in regions if re.search(r"/lib(gomp|omp|iomp)[^/]*$", r[2])]

before = {path for _, _, path in mapped()}
loaded = library._open(Path(sys.argv[1]))
assert loaded.openmp, loaded.openmp_reason
assert loaded.openmp_reason == ""
addresses = library._find_openmp()[0]
homes = {path for a in addresses for start, end, path in mapped() if start <= a < end}
assert len(homes) == 1 and homes <= before, homes
torch.set_num_threads(2)
torch.randn(1000, 1000).exp()
assert [loaded.forward(b"", 0, 0, threads, 0) for threads in (1, 2, 3)] == [1, 2, 3]
assert {path for _, _, path in mapped()} == before
"""
    # A limit in the environment would hold for this test as well.
    python(script, stand_in, OMP_THREAD_LIMIT="16", OMP_DYNAMIC="false")


@on_linux
def test_a_preloaded_runtime_is_the_one_that_torch_uses(build, stand_in) -> None:
    script = """
import ctypes, sys, torch
from pathlib import Path
from fused_lstm.kernels.cpu import library

calls = ctypes.c_int.in_dll(ctypes.CDLL(None), "parallel_calls")
loaded = library._open(Path(sys.argv[1]))
torch.set_num_threads(2)
torch.randn(1000, 1000).exp()
assert calls.value > 0
before = calls.value
assert loaded.forward(b"", 0, 0, 2, 0) == 2
assert calls.value == before + 1
"""
    python(script, stand_in, LD_PRELOAD=build("preloaded", PRELOADED))


def test_one_thread_without_an_openmp_runtime(stand_in, monkeypatch) -> None:
    monkeypatch.setattr(library, "_OPENMP_FUNCTIONS", (*library._OPENMP_FUNCTIONS[:2], "absent"))
    loaded = library._open(stand_in)
    assert not loaded.openmp
    assert "no OpenMP runtime that has absent" in loaded.openmp_reason


@on_linux
def test_one_thread_where_torch_is_not_found(stand_in, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    loaded = library._open(stand_in)
    assert not loaded.openmp
    assert "libtorch_cpu.dylib is not to be found" in loaded.openmp_reason


# Building and shipping


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what the build reads, with the stand-in for kernels and a stale library."""
    for tool in ("pip", "setuptools"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"needs {tool}")
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fused_lstm", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "_native.*")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    (copy / "kernels" / "cpu" / "lstm.cpp").write_text(STAND_IN)
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        (copy / "kernels" / "cpu" / f"_native{suffix}").write_text("stale")
    return copy


@pytest.mark.parametrize("missing", ["failing", "absent"])
def test_installs_without_a_compiler(tree, tmp_path, missing) -> None:
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    if missing == "absent":
        (tmp_path / "empty").mkdir()
        environment["PATH"] = str(tmp_path / "empty")
        del environment["CC"], environment["CXX"]
    command = f"{sys.executable} -m pip --no-cache-dir --disable-pip-version-check install --quiet"
    options = "--no-index --no-deps --no-build-isolation --target"
    target = tmp_path / "installed"
    subprocess.run(
        [*command.split(), *options.split(), target, tree], env=environment, check=True, cwd=tree
    )
    installed = {path.name for path in (target / "fused_lstm" / "kernels" / "cpu").iterdir()}
    assert {"lstm.cpp", "lstm.h", "library.py"} <= installed
    assert not [name for name in installed if name.startswith("_native")]
    assert not (target / "kernels").exists()


@on_linux
def test_a_wheel_holds_the_library_and_its_sources(compiler, tree, tmp_path) -> None:
    """Built from the unpacked source distribution, which must therefore be complete."""
    backend = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"

    def build_from(folder: Path, kind: str) -> Path:
        command = [sys.executable, "-W", "ignore", "-c", backend.format(kind), tmp_path]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (built,) = tmp_path.glob("*.tar.gz" if kind == "sdist" else "*.whl")
        return built

    with tarfile.open(build_from(tree, "sdist")) as archive:
        packed = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    sources = {path.name for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h", ".py")}
    assert {f"kernels/cpu/{name}" for name in sources} <= packed
    assert not [name for name in packed if "_native" in name]

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = zipfile.ZipFile(build_from(unpacked, "wheel"))
    names = {Path(name).name for name in wheel.namelist() if "fused_lstm/kernels/cpu/" in name}
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    assert names == sources | {f"_native{suffix}"}
    assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"fused_lstm"}

    # Loads where it was installed, and writes nothing there.
    site = tmp_path / "site"
    wheel.extractall(site)
    for path in (site, *site.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    script = "from fused_lstm.kernels.cpu import library; print(library.load().path)"
    found = Path(python(script, PYTHONPATH=site, PYTHONDONTWRITEBYTECODE=1).strip())
    for path in (site, *site.rglob("*")):
        path.chmod(0o755)
    assert found.parent == site / "fused_lstm" / "kernels" / "cpu"
    assert {path.name for path in found.parent.iterdir()} == names
