"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "kernels" / "cpu" / "lstm.cpp"
# What is run on the sanitized build.
KERNEL_TESTS = ROOT / "tests" / "kernels" / "test_native.py"
# Of the modifiers only what reaches every line of the kernels, and goes to their ends.
MODIFIER_TESTS = ROOT / "tests" / "kernels" / "test_native_modifiers.py"
MODIFIER_TEST_NAMES = (
    "test_all_together",
    "test_all_together_in_a_packed_batch",
    "test_many_threads_and_few_long_sequences",
    "test_layer",
    "test_outputs_of_any_stride_and_nothing_beside_them",
)
# Likewise of layer normalization.
LAYER_NORM_TESTS = ROOT / "tests" / "kernels" / "test_native_layer_norm.py"
LAYER_NORM_TEST_NAMES = (
    "test_all_together",
    "test_packed",
    "test_outputs_of_any_stride_and_nothing_beside_them",
)
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizers' runtime"),
    pytest.mark.timeout(1200),
]

# One mistake for each sanitizer, and a function without any.
SEEDED = """
#include <cstdint>
#include <cstdlib>
extern "C" {
int32_t correct(int64_t n) {
  float *x = static_cast<float *>(malloc(n * sizeof(float)));
  for (int64_t i = 0; i < n; ++i) x[i] = float(i);
  int32_t last = int32_t(x[n - 1]);
  free(x);
  return last;
}
int32_t writes_out_of_bounds(int64_t n) {
  float *x = static_cast<float *>(malloc(n * sizeof(float)));
  for (int64_t i = 0; i <= n; ++i) x[i] = float(i);
  int32_t last = int32_t(x[n - 1]);
  free(x);
  return last;
}
int32_t overflows(int64_t n) { return int32_t(n) + INT32_MAX; }
}
"""


@pytest.fixture(scope="module")
def compiler() -> str:
    path = shutil.which("g++")
    if path is None:
        pytest.skip("needs g++")
    return path


@pytest.fixture(scope="module")
def environment(compiler) -> dict[str, str]:
    """What an unsanitized Python needs, to run a sanitized library."""
    # The C++ runtime next to the sanitizer's: where it is loaded later only, as Python's extensions
    # load it, the sanitizer does not know whom to pass an exception on to, and aborts.
    runtimes = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        path = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        # An unknown name comes back as it was.
        if not os.path.isabs(path):
            pytest.skip(f"needs {name}")
        runtimes.append(os.path.realpath(path))
    # The worker that this test may run in is none of the other process's business.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return {
        **inherited,
        "LD_PRELOAD": ":".join(runtimes),
        # Python itself leaves memory allocated when it ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def test_sanitizers_catch_a_mistake(compiler, environment, tmp_path) -> None:
    (tmp_path / "seeded.cpp").write_text(SEEDED)
    library = tmp_path / "seeded.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", *SANITIZERS, tmp_path / "seeded.cpp", "-o", library],
        check=True,
    )
    script = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1])[sys.argv[2]](ctypes.c_int64(100)))"

    def run(function: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script, library, function]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run("correct").stdout == "99\n"
    for function, message in (
        ("writes_out_of_bounds", "heap-buffer-overflow"),
        ("overflows", "signed integer overflow"),
    ):
        caught = run(function)
        assert caught.returncode != 0
        assert message in caught.stderr
        # The stack names the place.
        assert "seeded.cpp" in caught.stderr


def test_kernels_are_clean(compiler, environment, tmp_path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    flags = [flag for flag in extension["extra-compile-args"] if not flag.startswith("-O")]
    library = tmp_path / "sanitized.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", *flags, *SANITIZERS, SOURCE, "-o", library], check=True
    )
    # The tests run in this process, so that it can be asked at the end what it had loaded.
    script = """
import sys
import pytest
from fused_lstm.kernels.cpu import library
status = pytest.main(sys.argv[1:])
print("loaded:", getattr(library._outcome, "path", library._outcome))
sys.exit(status)
"""
    # A report is written to the file descriptor just before the end: pytest must leave it alone.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-n", "0", "--timeout=0", "--capture=sys"]
    some_tests = [
        *(f"{MODIFIER_TESTS}::{name}" for name in MODIFIER_TEST_NAMES),
        *(f"{LAYER_NORM_TESTS}::{name}" for name in LAYER_NORM_TEST_NAMES),
    ]
    result = subprocess.run(
        [sys.executable, "-c", script, KERNEL_TESTS, *some_tests, *options],
        env={**environment, "FUSED_LSTM_NATIVE_LIBRARY": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert f"loaded: {library}" in result.stdout
    assert re.search(r"\d+ passed", result.stdout)
