"""The doctor's report. tests/e2e/test_doctor.py runs the doctor on real nginx."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from otel_nginx_ebpf.doctor.examine import (
    BoundaryReport,
    Examination,
    InstanceReport,
    LayoutReport,
    NginxReport,
    RuleReport,
    examine,
)
from otel_nginx_ebpf.doctor.render import text
from otel_nginx_ebpf.export.console import make_console
from otel_nginx_ebpf.kernel.preflight import Check
from otel_nginx_ebpf.planner import sites
from otel_nginx_ebpf.settings.sources import load

GOOD = BoundaryReport(
    "request begins", "ok", "ngx_http_create_request", 4, "push rbx", "emulated", (0.6, 1.1), None, None
)
ABSENT = BoundaryReport(
    "HTTP/2 response begins",
    "note",
    *(None, None, None, None, None),
    "ngx_http_v2_send_output_queue is not exported",
    "downstream write spans on HTTP/2",
)
NGINX = NginxReport(
    state="note",
    path="/usr/sbin/nginx",
    product="nginx",
    version="1.26.4",
    build_id="51887fc9f6f3ec3ee6e0b7feab62a32795d03124",
    flags={"--with-compat": True, "--with-http_v3_module": False},
    instances=(InstanceReport(71, 2, (71, 72, 73), True), InstanceReport(80, 1, (80,), False)),
    layout=LayoutReport("catalogue 1.26.3 (assumed)", True),
    boundaries=(GOOD, ABSENT),
    problems=(),
)
FINE = Examination("1.0", True, {"kernel": Check("kernel", "ok", "Linux 6.1")}, (NGINX,), ())
BAD = replace(
    FINE,
    ok=False,
    system={"uprobes": Check("uprobes", "fail", "none", "this kernel has no uprobes; use one that has them")},
    nginx=(replace(NGINX, state="fail", layout=None, problems=("the struct layout is not known; install it",)),),
    problems=("--pid 5: no such process",),
)


@pytest.fixture(autouse=True)
def _no_color_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


def shown(report: Examination, width: int = 80, color: Literal["auto", "always", "never"] = "auto") -> str:
    console = make_console(io.StringIO(), color)
    console.width = width
    return text(report, console)


def test_nothing_in_the_way_in_80_columns() -> None:
    assert shown(FINE).splitlines() == [
        "otel-nginx-ebpf 1.0",
        "",
        "ok   kernel                 Linux 6.1",
        "",
        "nginx 1.26.4 /usr/sbin/nginx",
        "     pid                    71, 2 workers",
        "     pid                    80, 1 worker, in another pid namespace",
        "     configured             --with-compat, not --with-http_v3_module",
        "     build-id               51887fc9f6f3ec3ee6e0b7feab62a32795d03124",
        "note layout                 catalogue 1.26.3 (assumed)",
        "                            counts once nginx's memory has confirmed it, at the",
        "                            first requests",
        "ok   request begins         ngx_http_create_request+4 (push rbx)",
        "note HTTP/2 response begins no downstream write spans on HTTP/2:",
        "                            ngx_http_v2_send_output_queue is not exported",
        "                            everything else is traced; to trace this too, use a",
        "                            build that exports its functions (-Wl,-E) or install",
        "                            its debug symbols",
        "                            a probe hit costs about 0.6 to 1.1 µs",
        "",
        "Nothing is in the way of tracing.",
    ]


def test_a_layout_that_does_not_tell_the_cache_status() -> None:
    told = LayoutReport("DWARF", False, without_cache_status=True)
    lines = shown(replace(FINE, nginx=(replace(NGINX, layout=told),))).splitlines()
    row = lines.index("note cache                  no nginx.cache.status: the layout does not tell")
    assert lines[row - 1] == "ok   layout                 DWARF"
    assert not any("cache" in line for line in shown(FINE).splitlines())


def test_a_layout_that_does_not_tell_what_limits_said() -> None:
    told = LayoutReport("catalogue 1.24.0", False, without_limit_statuses=True)
    shown_lines = shown(replace(FINE, nginx=(replace(NGINX, layout=told),))).splitlines()
    row = shown_lines.index("note limits                 no nginx.limit_req.status, nginx.limit_conn.status:")
    assert shown_lines[row + 1].strip() == "the layout does not tell"
    assert not any("limit_req" in line for line in shown(FINE).splitlines())


def test_every_problem_is_shown_beside_the_others() -> None:
    lines = shown(BAD).splitlines()
    assert [line[28:] for line in lines if line.startswith("FAIL")] == [
        "none",
        "the struct layout is not known; install it",
        "--pid 5: no such process",
    ]
    assert "                            this kernel has no uprobes; use one that has them" in lines
    assert lines[-1] == "Something is in the way of tracing: see FAIL."


@settings(deadline=None)
@given(path=st.text(), problem=st.text(), width=st.integers(60, 200))
def test_no_text_breaks_the_screen(path: str, problem: str, width: int) -> None:
    """Names come from whoever may start a process; rich's own markup among them means nothing."""
    report = replace(BAD, nginx=(replace(NGINX, path=path, problems=(problem,)),), problems=(problem,))
    written = shown(report, width)
    assert written.replace("\n", "").isprintable()
    assert all(cell_len(line) <= width for line in written.split("\n"))


def test_a_path_is_shown_whole() -> None:
    path = "/opt/[bold]\x1b[31m\N{RIGHT-TO-LEFT OVERRIDE}/" + "x" * 100
    written = "".join(shown(replace(FINE, nginx=(replace(NGINX, path=path),))).splitlines())
    assert r"/opt/[bold]\x1b[31m\u202e/" + "x" * 100 in written


def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in shown(BAD)
    assert "\x1b[" in shown(BAD, color="always")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(BAD)


def test_the_keys_of_json() -> None:
    told = json.loads(json.dumps(BAD.to_dict()))
    assert list(told) == ["program_version", "ok", "system", "nginx", "problems", "rules"]
    assert list(told["system"]["uprobes"]) == ["name", "state", "found", "advice"]
    (nginx,) = told["nginx"]
    assert list(nginx) == [
        *("state", "path", "product", "version", "build_id", "flags", "instances", "layout", "boundaries", "problems")
    ]
    assert nginx["instances"][1] == {"pid": 80, "workers": 1, "pids": [80], "shares_pid_namespace": False}
    assert nginx["boundaries"][0] == {
        "boundary": "request begins",
        "state": "ok",
        "function": "ngx_http_create_request",
        "displacement": 4,
        "instruction": "push rbx",
        "handling": "emulated",
        "cost_us": [0.6, 1.1],
        "reason": None,
        "without": None,
    }
    assert nginx["boundaries"][1]["without"] == "downstream write spans on HTTP/2"


def test_a_process_of_another_program() -> None:
    """This one: the program must not fail, and still tells of the system."""
    report = examine(load({"pid": [os.getpid()]}))
    assert not report.ok
    (nginx,) = report.nginx
    assert nginx.instances[0].pid == os.getpid()
    assert nginx.boundaries == ()
    assert "is not an nginx with the http module" in nginx.problems[0]
    assert list(report.system) == [
        *("kernel", "capabilities", "bpf", "ring_buffer", "jit", "uprobes", "lockdown", "tracefs", "bcc"),
        *("propagate", "pid_namespace"),
    ]
    assert report.system["kernel"].found == f"Linux {os.uname().release}"


def test_which_headers_would_be_captured() -> None:
    named = {"pid": [os.getpid()], "capture_request_headers": ["x-a,cookie,x-b"], "sanitize_headers": ["x-b"]}
    found = examine(load(named)).system["captured_headers"]
    assert (found.state, found.found) == (
        "ok",
        "of requests: x-a, cookie (redacted), x-b (redacted); of responses: none",
    )


def test_what_was_named_and_is_not_there(tmp_path: Path) -> None:
    report = examine(load({"binary": [tmp_path / "one", tmp_path / "two"]}))
    assert not report.ok
    assert report.problems == (
        f"--binary {tmp_path}/one: no such file",
        f"--binary {tmp_path}/two: no such file",
    )


def test_the_columns_hold_every_boundary() -> None:
    assert max(len(boundary.name) for boundary in sites.BOUNDARIES) <= 22


def test_rules_in_their_order(tmp_path: Path) -> None:
    """With their places, in text and in JSON."""
    path = tmp_path / "a.toml"
    path.write_text('[[rules]]\nlocation = "/api/"\nstatus = "5xx"\nservice_name = "api"')
    found = examine(load({"exclude": ["/healthz"]}, path)).rules
    assert found == (
        RuleReport("--exclude /healthz", "path /healthz: drop true"),
        RuleReport(f"{path}: rule 1", "location /api/, status 5xx: service_name api"),
    )
    lines = shown(replace(FINE, rules=(found[0], RuleReport("a.toml: rule 1", found[1].rule)))).splitlines()
    assert lines[lines.index("The first rule that matches a request decides") :] == [
        "The first rule that matches a request decides",
        "     rule 1                 path /healthz: drop true",
        "                            (--exclude /healthz)",
        "     rule 2                 location /api/, status 5xx: service_name api",
        "                            (a.toml: rule 1)",
        "",
        "Nothing is in the way of tracing.",
    ]
    assert json.loads(json.dumps(replace(FINE, rules=found).to_dict()))["rules"][0] == {
        "place": "--exclude /healthz",
        "rule": "path /healthz: drop true",
    }
