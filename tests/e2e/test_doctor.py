"""`doctor` on real nginx, and `run --dry-run`."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.agent_process import PROGRAM, AgentProcess
from e2e.nginx_server import NGINX, NginxServer, free_ports, nginx_release
from otel_nginx_ebpf.nginx.binary import Binary
from otel_nginx_ebpf.planner.sites import BOUNDARIES

UNKNOWN = f"9{nginx_release()[1:]}"
"""A release that there is not; as long as this machine's."""

_BREAKPOINT = 0xCC
# Starts a program under a filter (seccomp(2)): words of its first argument, then the program and its arguments.
_FILTERED = """
import ctypes, os, struct, sys
words = [int(word, 0) for word in sys.argv[1].split()]
code = ctypes.create_string_buffer(struct.pack("HBBI" * (len(words) // 4), *words))
class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))
rules = Filter(len(words) // 4, ctypes.addressof(code))
assert ctypes.CDLL(None).prctl(22, 2, ctypes.byref(rules)) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
os.execv(sys.argv[2], sys.argv[2:])
"""
# bpf(), system call 321, fails with EPERM.
_WITHOUT_BPF = "0x20 0 0 0  0x15 0 1 321  0x06 0 0 0x00050001  0x06 0 0 0x7FFF0000"
# Its command 28, BPF_LINK_CREATE, fails with EINVAL, as for uprobes before Linux 6.6.
_WITHOUT_LINKS = "0x20 0 0 0  0x15 0 3 321  0x20 0 0 16  0x15 0 1 28  0x06 0 0 0x00050016  0x06 0 0 0x7FFF0000"
# No capability, as any other user; yet this user, who alone may be able to read the checkout.
_POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


@pytest.fixture
def start(public_directory: Path) -> Iterator[Callable[..., NginxServer]]:
    """Starts an nginx that runs a copy of the machine's, in a directory of the given name, changed as wanted."""
    servers: list[NginxServer] = []
    directories: list[Path] = []

    def start_copy(name: str, change: Callable[[bytes], bytes] = bytes) -> NginxServer:
        directory = public_directory / name
        directories.append(directory)
        (directory / "prefix").mkdir(parents=True)
        binary = directory / "nginx"
        binary.write_bytes(change(NGINX.read_bytes()))
        binary.chmod(0o755)
        address = ("127.0.0.1", free_ports(1)[0])
        http = f"server {{ listen {address[0]}:{address[1]}; }}"
        server = NginxServer(directory / "prefix", http, workers=2, command=(binary,))
        server.start([address])
        servers.append(server)
        return server

    yield start_copy
    for server in servers:
        server.stop()
    for directory in directories:
        shutil.rmtree(directory)


def run(*command: str | Path, environment: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "XDG_", "COLUMNS"))}
    ended = subprocess.run(
        command, env={**inherited, **(environment or {})}, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in ended.stderr
    return ended


def examined(*arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """The doctor's exit code and JSON."""
    ended = run(*prefix, PROGRAM, "doctor", "--json", *arguments)
    return ended.returncode, json.loads(ended.stdout)


def test_it_tells_what_nginx_and_readelf_tell(start: Callable[..., NginxServer]) -> None:
    server = start("plain")
    code, report = examined("--pid", str(server.worker_pids()[0]))
    assert (code, report["ok"], report["problems"]) == (0, True, [])
    (nginx,) = report["nginx"]
    binary = server.prefix.parent / "nginx"
    assert (nginx["path"], nginx["state"], nginx["problems"]) == (str(binary), "ok", [])
    assert nginx["instances"] == [
        {
            "pid": server.pid,
            "workers": 2,
            "pids": [server.pid, *sorted(server.worker_pids())],
            "shares_pid_namespace": True,
        }
    ]
    told = run(binary, "-V").stderr
    assert f"nginx version: nginx/{nginx['version']}\n" in told
    options = told.split("configure arguments:")[1].split()
    assert {flag for flag, there in nginx["flags"].items() if there} == set(options) & set(nginx["flags"])
    assert len(nginx["flags"]) == 5
    assert f"Build ID: {nginx['build_id']}" in run("readelf", "-n", binary).stdout
    assert nginx["layout"]["assumed"] is False
    assert [each["boundary"] for each in nginx["boundaries"]] == [boundary.name for boundary in BOUNDARIES]
    symbols = run("readelf", "--wide", "--dyn-syms", binary).stdout
    for each in nginx["boundaries"]:
        entry = re.search(rf"([0-9a-f]{{16}}) .* {each['function']}$", symbols, re.MULTILINE)
        assert entry
        address = int(entry[1], 16) + each["displacement"]
        bounds = (f"--start-address={address}", f"--stop-address={address + 15}")
        listing = run("objdump", "-d", "-M", "intel", *bounds, binary).stdout
        assert re.search(rf"^ +{address:x}:\t.*\t{each['instruction'].split()[0]} ", listing, re.MULTILINE)
        assert each["cost_us"] == [0.6, 1.1]
    system = report["system"]
    assert system["kernel"]["found"] == f"Linux {os.uname().release}"
    assert {system[name]["state"] for name in ("bpf", "ring_buffer", "uprobes", "capabilities", "bcc")} == {"ok"}
    bcc = run("/usr/bin/python3", "-c", "import bcc; print(bcc.__version__)").stdout.strip()
    assert system["bcc"]["found"] == f"{bcc} at /usr/lib/python3/dist-packages/bcc"


def test_a_screen_of_a_hostile_name(start: Callable[..., NginxServer]) -> None:
    server = start("evil\x1b[31m[red]")
    ended = run(PROGRAM, "doctor", "--pid", str(server.pid))
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert r"evil\x1b[31m[red]/nginx" in "".join(lines)
    assert ended.stdout.replace("\n", "").isprintable()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 40
    assert lines[-1] == "Nothing is in the way of tracing."


def test_without_root_it_tells_what_it_can(start: Callable[..., NginxServer]) -> None:
    server = start("private")
    code, report = examined(prefix=_POWERLESS)
    assert code == 1
    assert report["system"]["capabilities"]["found"] == "CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE missing"
    assert report["system"]["kernel"]["state"] == "ok"
    assert report["system"]["bcc"]["state"] == "ok"
    (hidden,) = [problem for problem in report["problems"] if problem.startswith(f"pid {server.pid} ")]
    assert "not allowed to look at it; run as root" in hidden
    ended = run(*_POWERLESS, PROGRAM, "doctor", "--pid", str(server.pid))
    assert ended.returncode == 1
    assert "FAIL capabilities           CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE missing" in ended.stdout
    assert f"FAIL nginx                  --pid {server.pid}: not allowed to look at it" in ended.stdout


def test_all_problems_at_once(start: Callable[..., NginxServer]) -> None:
    """Of two that cannot be traced, one whose release is not known, one without an export; and one that is no nginx."""
    unknown = start("unknown", unknown_release)
    blind = start("blind", lambda raw: raw.replace(b"\0ngx_http_free_request\0", b"\0ngx_http_free_requesX\0"))
    partial = start("partial", lambda raw: raw.replace(b"\0ngx_setproctitle\0", b"\0ngx_setproctitlX\0"))
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        pids = [unknown.pid, blind.pid, partial.pid, sleeper.pid, 2**22 + 1]
        code, report = examined(*(word for pid in pids for word in ("--pid", str(pid))))
    finally:
        sleeper.kill()
        sleeper.wait()
    assert (code, report["ok"]) == (1, False)
    assert report["problems"] == [f"--pid {2**22 + 1}: no such process"]
    by_pid = {nginx["instances"][0]["pid"]: nginx for nginx in report["nginx"]}

    told = by_pid[unknown.pid]
    assert (told["state"], told["version"], told["layout"]) == ("fail", UNKNOWN, None)
    assert "layouts add" in told["problems"][0]
    assert all(each["state"] == "ok" for each in told["boundaries"]), "the binary tells its sites without a layout"

    told = by_pid[blind.pid]
    assert told["state"] == "fail"
    assert "no usable probe site for “request ends”: ngx_http_free_request is not exported" in told["problems"][0]
    assert [each["boundary"] for each in told["boundaries"] if each["state"] == "fail"] == ["request ends"]
    assert told["layout"]["source"]

    told = by_pid[partial.pid]
    assert (told["state"], told["problems"]) == ("note", [])
    (missing,) = [each for each in told["boundaries"] if each["state"] != "ok"]
    assert missing["without"] == "the accept and the first read of a new worker's first request"
    assert missing["reason"] == "ngx_setproctitle is not exported"

    told = by_pid[sleeper.pid]
    assert told["state"] == "fail"
    assert "/sleep is not an nginx with the http module" in told["problems"][0]


def test_no_nginx() -> None:
    """In a pid namespace of its own it finds none, and knows that it sees little."""
    code, report = examined(prefix=("unshare", "--pid", "--fork", "--mount-proc"))
    assert code == 1
    assert report["nginx"] == []
    assert report["problems"] == [
        "no nginx found: start it, name it with --pid or --binary, or wait for it with --wait"
    ]
    assert report["system"]["pid_namespace"]["state"] == "note"


def test_another_projects_bcc_and_none(tmp_path: Path) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text("")
    _, report = examined(prefix=("env", f"PYTHONPATH={tmp_path}"))
    assert report["system"]["bcc"]["state"] == "fail"
    assert report["system"]["bcc"]["found"] == f"another project's package at {tmp_path}/bcc"
    (tmp_path / "empty").mkdir()
    hide = f'mount --bind {tmp_path}/empty /usr/lib/python3/dist-packages && exec "$@"'
    _, report = examined(prefix=("unshare", "--mount", "sh", "-c", hide, "sh"))
    assert report["system"]["bcc"]["state"] == "fail"
    assert report["system"]["bcc"]["found"] == "none"
    assert "apt-get install python3-bpfcc" in report["system"]["bcc"]["advice"]


def test_lockdown_and_tracefs_where_they_are_mounted() -> None:
    """In a mount namespace of the program's own; the doctor itself mounts nothing."""
    mount = "mount -t securityfs none /sys/kernel/security; mount -t tracefs none /sys/kernel/tracing"
    prefix = (
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'{mount}; cat /sys/kernel/security/lockdown || echo [unknown]; exec "$@"',
        "sh",
    )
    state, _, told = run(*prefix, PROGRAM, "doctor", "--json").stdout.partition("\n")
    system = json.loads(told)["system"]
    active = re.search(r"\[(\w+)\]", state)
    assert active, state
    assert system["lockdown"]["found"] == active[1]
    assert system["tracefs"]["found"] == "/sys/kernel/tracing"


def test_a_system_call_filter() -> None:
    """As containers have: bpf() fails for root as well."""
    prefix = (sys.executable, "-c", _FILTERED, _WITHOUT_BPF)
    _, report = examined(prefix=prefix)
    assert report["system"]["bpf"]["state"] == "fail"
    assert report["system"]["ring_buffer"]["found"] == "unknown"
    ended = run(*prefix, PROGRAM, "run", "--exporter", "json")
    assert ended.returncode == 2
    assert ended.stderr == f"otel-nginx-ebpf: {report['system']['bpf']['advice']}\n"
    assert "seccomp" in ended.stderr


def test_uprobes_where_the_kernel_has_no_links_for_them(start: Callable[..., NginxServer]) -> None:
    """As perf events, which this kernel gives to CAP_SYS_ADMIN only."""
    server = start("unlinked")
    prefix = (sys.executable, "-c", _FILTERED, _WITHOUT_LINKS)
    code, report = examined("--pid", str(server.pid), prefix=prefix)
    assert (code, report["system"]["uprobes"]["found"]) == (0, "as perf events")
    dry_run = (PROGRAM, "run", "--dry-run", "--pid", str(server.pid))
    assert run(*prefix, *dry_run).stderr.startswith("ready: ")
    ended = run(*prefix, "/usr/bin/setpriv", "--bounding-set=-sys_admin", *dry_run)
    assert ended.returncode == 2
    assert "Linux 6.6; without them uprobes may need CAP_SYS_ADMIN" in ended.stderr


def test_least_capabilities(start: Callable[..., NginxServer]) -> None:
    """A user who is not root, with nothing but what README names; dac_override is for the private checkout of tests."""
    server = start("least")
    wanted = "-all,+bpf,+perfmon,+sys_ptrace,+dac_override"
    user = ("--reuid=nobody", "--regid=nogroup", "--clear-groups", "--no-new-privs")
    prefix = ("setpriv", *user, f"--inh-caps={wanted}", f"--ambient-caps={wanted}", f"--bounding-set={wanted}")
    code, report = examined("--pid", str(server.pid), prefix=prefix)
    assert (code, report["system"]["capabilities"]["found"]) == (0, "CAP_SYS_PTRACE, CAP_PERFMON, CAP_BPF")
    assert run(*prefix, PROGRAM, "run", "--dry-run", "--pid", str(server.pid)).stderr.startswith("ready: ")


def test_modules_beside_the_user_are_not_imported(tmp_path: Path) -> None:
    """Root may stand in anyone's directory."""
    for name in ("bcc", "json", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    ended = run("sh", "-c", f'cd {tmp_path} && exec "$@"', "sh", PROGRAM, "doctor", "--json")
    assert json.loads(ended.stdout)["system"]["bcc"]["state"] == "ok"


def unknown_release(raw: bytes) -> bytes:
    return raw.replace(f"nginx/{nginx_release()}".encode(), f"nginx/{UNKNOWN}".encode())


def instruction_bytes(server: NginxServer, binary: Path) -> set[int]:
    """What each worker has in its memory at the probe's place in the function that begins a request."""
    place = Binary(binary).site("ngx_http_create_request", 1).address
    found = set()
    for pid in server.worker_pids():
        base = int(Path(f"/proc/{pid}/maps").read_text().split("-")[0], 16)
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(base + place)
            found.update(struct.unpack("B", memory.read(1)))
    return found


def test_a_dry_run_says_ready_and_leaves_nothing(start: Callable[..., NginxServer], tmp_path: Path) -> None:
    server = start("dry")
    binary = server.prefix.parent / "nginx"
    before = instruction_bytes(server, binary)
    assert _BREAKPOINT not in before
    agent = AgentProcess(server.pid, tmp_path)
    assert instruction_bytes(server, binary) == {_BREAKPOINT}, "this shows whether a probe is there"
    agent.stop()
    assert instruction_bytes(server, binary) == before

    output = tmp_path / "dry"
    ended = run(PROGRAM, "run", "--dry-run", "--pid", str(server.pid), "--exporter", "json", "--output", output)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr.startswith(f"ready: nginx {nginx_release()} (pid {server.pid}), 2 workers, sites ")
    assert ended.stderr.count("\n") == 1
    assert not output.exists()
    assert instruction_bytes(server, binary) == before


def test_a_dry_run_says_why_not(start: Callable[..., NginxServer]) -> None:
    server = start("refused", unknown_release)
    ended = run(PROGRAM, "run", "--dry-run", "--pid", str(server.pid))
    assert ended.returncode == 2
    assert f"the struct layout of nginx {UNKNOWN}" in ended.stderr
    assert "ready" not in ended.stderr
