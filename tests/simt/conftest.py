"""Where the emulator keeps what it compiles."""

import pytest

from . import emulator


@pytest.fixture(scope="session")
def emulator_directory():
    """Shared by the workers and kept from run to run; skips where there is no compiler."""
    try:
        emulator.compiler()
    except emulator.CompilerMissingError as error:
        pytest.skip(str(error))
    return emulator.default_directory()
