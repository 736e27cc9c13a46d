"""Which handlers are attached to the kernel's tracepoints."""

import pytest

from otel_nginx_ebpf.planner.tracepoints import handlers


@pytest.mark.parametrize(
    ("release", "left_out"),
    [
        ("5.10.0-32-cloud-amd64", False),
        ("6.18.44", False),
        ("7.0.0-14-generic", True),
        ("10.1-rc3", True),
        ("?", False),
    ],
)
def test_handlers(release: str, left_out: bool) -> None:
    chosen = list(handlers(system_calls=True, release=release).items())
    assert chosen[-1] == (("sys_exit_missed", "sys_exit") if left_out else ("sys_exit", "sys_exit"))
    assert ("sys_exit", "sys_exit") in chosen
    assert "sys_exit" not in handlers(system_calls=False, release=release).values()
