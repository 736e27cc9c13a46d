"""Rules for all tests: what a skip means where everything must run."""

import os
from collections.abc import Generator
from typing import Any

import hypothesis
import pytest

# A busy machine is not a failure.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

# The harness asserts too, and its failures should show their values.
pytest.register_assert_rewrite("e2e")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """In CI everything is there or must be set up: a skip is a failure."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but CI=true: {report.longrepr}"
    return report
