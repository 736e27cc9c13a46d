"""Sets rules for all tests, such as what a skip means in CI."""

import os
from collections.abc import Generator
from typing import Any

import hypothesis
import pytest

# A busy machine is not a failure.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

# The helpers assert, too. Their failures should show the values.
pytest.register_assert_rewrite("e2e")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Turn a skip into a failure in CI, where every requirement is set up."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but CI=true: {report.longrepr}"
    return report
