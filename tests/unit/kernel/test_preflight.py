"""How each check judges what it finds. tests/e2e/test_errors.py and test_doctor.py give the checks things to find."""

import pytest

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.kernel import preflight

_ALL_CAPABILITIES = (1 << 41) - 1
_CAP_SYS_ADMIN = 21


@pytest.mark.parametrize(("release", "state"), [("5.4.0-42-generic", "fail"), ("5.8.0", "ok"), ("6.18.44", "ok")])
def test_kernels(release: str, state: str) -> None:
    check = preflight.kernel(release)
    assert check.state == state
    assert bool(check.advice) == (state == "fail")


def test_capabilities() -> None:
    assert preflight.capabilities(_ALL_CAPABILITIES).state == "ok"
    only_admin = preflight.capabilities(1 << _CAP_SYS_ADMIN)
    assert (only_admin.state, only_admin.found) == ("fail", "CAP_SYS_PTRACE missing")
    assert preflight.capabilities(0).found == "CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE missing"


@pytest.mark.parametrize(
    ("content", "state", "found"),
    [
        ("[none] integrity confidentiality", "ok", "none"),
        ("none [integrity] confidentiality", "ok", "integrity"),
        ("none integrity [confidentiality]", "fail", "confidentiality"),
    ],
)
def test_lockdown(content: str, state: str, found: str) -> None:
    check = preflight.lockdown(content)
    assert (check.state, check.found) == (state, found)


def test_check_says_the_first_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "CHECKS", (lambda: preflight.kernel("6.1"), lambda: preflight.kernel("4.19")))
    with pytest.raises(UserError, match=r"^Linux 4\.19 is too old"):
        preflight.check()
