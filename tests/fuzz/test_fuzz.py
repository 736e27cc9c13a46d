"""`make fuzz`, in short: the kept inputs and some seconds of new ones; and that it finds what is wrong."""

import os
from pathlib import Path

import pytest

from fuzz.__main__ import fuzz, kept
from fuzz.targets import TARGETS, planted_bug

SECONDS = 4


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `fuzz.one` finds the tests' modules."""
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tests}{os.pathsep}{tests.parent}")


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(name: str, tmp_path: Path) -> None:
    result = fuzz(name, SECONDS, tmp_path)
    assert result.found == [], result.log[-4000:]
    assert result.executions > len(kept(name)) > 0
    assert result.reached > 50


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    result = fuzz("planted", 60, tmp_path)
    assert "AssertionError" in result.log
    (found,) = result.found
    with pytest.raises(AssertionError):
        planted_bug(found.read_bytes())
