"""Every mistake of seeded_bugs.py is found, in kernels that are right without it."""

import pytest

from . import emulator, seeded_bugs
from .seeded_bugs import BUGS, CONFIGS, SEARCH


def name_of(bug: seeded_bugs.SeededBug) -> str:
    words = f"{bug.config.direction} {bug.name}".replace(":", "").split()
    return "-".join(words)


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_are_right(emulator_directory, name):
    outcomes = seeded_bugs.outcomes(CONFIGS[name], emulator.KERNELS, emulator_directory)
    assert outcomes == ["right"] * len(SEARCH)


@pytest.mark.parametrize("bug", BUGS, ids=name_of)
def test_bug_is_found(emulator_directory, tmp_path, bug):
    assert bug.config in CONFIGS.values(), "the kernel itself must be known to be right"
    bug.apply(tmp_path / "kernels")
    # What is compiled is of no use to any other test.
    assert seeded_bugs.first_found(bug.config, tmp_path / "kernels", tmp_path)
