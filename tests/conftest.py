"""Sets rules for all tests, such as what a skip means in CI."""

import os
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest
from registry import seen

# A busy machine is not a failure.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

# The helpers assert, too. Their failures should show the values.
pytest.register_assert_rewrite("e2e")


def _check_what_was_seen() -> None:
    found = seen.take()
    assert not found, "docs/registry.yaml and tests/semconv do not allow:\n" + "\n".join(found[:20])


@pytest.fixture(autouse=True)
def _registry_of_the_test() -> Iterator[None]:
    """Fail a test that read a span, a metric or a resource that the registries do not allow."""
    yield
    _check_what_was_seen()


@pytest.fixture(autouse=True, scope="module")
def _registry_of_the_module() -> Iterator[None]:
    """Check also what the module's fixtures read after its last test."""
    yield
    _check_what_was_seen()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List every attribute that the tests read of real programs, and what was excused."""
    if lines := seen.summary():
        terminalreporter.section("attributes held against the registries")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Turn a skip into a failure in CI, where every requirement is set up."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but CI=true: {report.longrepr}"
    return report
