"""Finds what prevents tracing on this machine and in every nginx that runs on it. Changes nothing."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.kernel import preflight
from otel_nginx_ebpf.kernel.preflight import Check, State
from otel_nginx_ebpf.machine import Handling
from otel_nginx_ebpf.nginx.binary import Binary, Site
from otel_nginx_ebpf.nginx.layouts import Layout, layout_for
from otel_nginx_ebpf.nginx.processes import Instance, Watch, file_identity, is_master, pid_namespace, title
from otel_nginx_ebpf.planner import captured_headers, sites
from otel_nginx_ebpf.planner.plan import (
    HOST_PID_NAMESPACE_INODE,
    find_site,
    has_boundary,
    no_site,
    tells_cache_lock,
    tells_cache_status,
    tells_limit_statuses,
)
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.supervisor.tracing import by_binary, find_instances

_FLAGS = ("--with-compat", "--with-debug", "--with-http_ssl_module", "--with-http_v2_module", "--with-http_v3_module")


# The fields of the following classes are the keys of --json.


@dataclass(frozen=True, slots=True)
class BoundaryReport:
    """Where the probe for a boundary of `sites.BOUNDARIES` would sit. A field is None if it does not apply."""

    boundary: str
    state: State
    function: str | None
    displacement: int | None
    """The distance from the function's entry, in bytes."""
    instruction: str | None
    handling: Handling | None
    """What the kernel does about the instruction."""
    cost_us: tuple[float, float] | None
    """About what a hit costs nginx, at least and at most, in microseconds. None: not measured on this machine."""
    reason: str | None
    """Why there is no site."""
    without: str | None
    """What traces lack without this probe."""


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """A master and its workers."""

    pid: int
    workers: int
    pids: tuple[int, ...]
    shares_pid_namespace: bool
    """nginx has the same pid namespace as this process."""


@dataclass(frozen=True, slots=True)
class LayoutReport:
    """The source of the struct layout; `nginx.layouts.Layout` explains the fields."""

    source: str
    assumed: bool
    without_cache_status: bool = False
    """The build may have the HTTP cache, but it is not known where it keeps its status."""
    without_cache_lock: bool = False
    """The same for requests that waited for another one to fill the cache."""
    without_limit_statuses: bool = False
    """It is not known where nginx keeps what `limit_req` and `limit_conn` said. Before nginx 1.17.6: nowhere."""


@dataclass(frozen=True, slots=True)
class NginxReport:
    """One binary and all instances that run it. Fields that could not be determined are None or empty."""

    state: State
    path: str | None
    product: str | None
    """`nginx`, or the name of the fork."""
    version: str | None
    build_id: str | None
    flags: dict[str, bool]
    """The options of nginx's ./configure that matter here, and whether each was given."""
    instances: tuple[InstanceReport, ...]
    layout: LayoutReport | None
    boundaries: tuple[BoundaryReport, ...]
    problems: tuple[str, ...]
    """What prevents tracing, each with the next step."""


@dataclass(frozen=True, slots=True)
class RuleReport:
    """A rule of `--exclude` or of the TOML file."""

    place: str
    rule: str
    """Its requests, and what it says about them."""


@dataclass(frozen=True, slots=True)
class Examination:
    """The result of `examine`. `ok`: nothing prevents tracing."""

    program_version: str
    ok: bool
    system: dict[str, Check]
    nginx: tuple[NginxReport, ...]
    problems: tuple[str, ...]
    """Why nginx was not found, each with the next step."""
    rules: tuple[RuleReport, ...] = ()
    """In the order in which they are tried."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)


def examine(settings: Settings) -> Examination:
    """Runs all checks. Raises nothing: reports all problems together."""
    checks = [*(check() for check in preflight.CHECKS), preflight.bcc(), preflight.propagation(), _pid_namespace()]
    if headers := captured_headers.chosen(settings):
        checks.append(Check("captured headers", "ok", captured_headers.text(headers)))
    instances, problems = _find(settings)
    nginx = tuple(_examine_nginx(group) for group in by_binary(instances))
    states = [check.state for check in checks] + [each.state for each in nginx]
    ok = not problems and "fail" not in states
    system = {check.name.replace(" ", "_"): check for check in checks}
    rules = tuple(RuleReport(rule.place, str(rule)) for rule in settings.rules)
    return Examination(__version__, ok, system, nginx, problems, rules)


def _pid_namespace() -> Check:
    name = "pid namespace"
    if pid_namespace()[1] == HOST_PID_NAMESPACE_INODE:
        return Check(name, "ok", "the host's own")
    return Check(
        name, "note", "a container's", "only nginx in this namespace is found; --pid=host or a shared one shows more"
    )


def _find(settings: Settings) -> tuple[tuple[Instance, ...], tuple[str, ...]]:
    """Returns the instances that the settings select, and why others were not found."""
    found: dict[int, Instance] = {}
    problems: list[str] = []
    wanted = (
        [replace(settings, pid=(pid,)) for pid in settings.pid]
        or [replace(settings, binary=(path,)) for path in settings.binary]
        or [settings]
    )
    for each in wanted:
        try:
            found |= {instance.master_pid: instance for instance in find_instances(each, Watch(each.binary))}
        except UserError as error:
            problems.append(str(error))
    if not settings.pid and not settings.binary and (hidden := list(_hidden())):
        problems = hidden
    return tuple(found.values()), tuple(problems)


def _hidden() -> Iterator[str]:
    """Yields a problem for each process whose title says nginx master and whose executable may not be examined."""
    for pid in psutil.pids():
        if is_master(pid):
            try:
                file_identity(pid)
            except PermissionError:
                yield f"pid {pid} ({title(pid)}): not allowed to look at it; run as root or with CAP_SYS_PTRACE"
            except OSError:
                continue


def _examine_nginx(instances: tuple[Instance, ...]) -> NginxReport:
    running = tuple(
        InstanceReport(each.master_pid, each.workers, each.pids, each.shares_our_pid_namespace) for each in instances
    )
    try:
        binary = Binary(instances[0].executable)
    except UserError as error:
        return NginxReport("fail", None, None, None, None, {}, running, None, (), (str(error),))
    problems: list[str] = []
    layout: Layout | None = None
    try:
        layout = layout_for(binary)
    except UserError as error:
        problems.append(str(error))
    # The sites of the probes can be found without a layout too.
    boundaries = tuple(
        _examine_boundary(binary, layout, boundary, problems)
        for boundary in sites.BOUNDARIES
        if layout is None or has_boundary(layout, boundary)
    )
    noted = any(boundary.state == "note" for boundary in boundaries) or (layout is not None and layout.assumed)
    return NginxReport(
        state="fail" if problems else "note" if noted else "ok",
        path=binary.name,
        product=binary.product,
        version=binary.version,
        build_id=binary.build_id or None,
        flags=_flags(binary),
        instances=running,
        layout=_layout_report(binary, layout) if layout else None,
        boundaries=boundaries,
        problems=tuple(problems),
    )


def _layout_report(binary: Binary, layout: Layout) -> LayoutReport:
    has_no_cache = binary.signature.is_understood and not binary.signature.has_http_cache
    return LayoutReport(
        layout.source,
        layout.assumed,
        not has_no_cache and not tells_cache_status(binary, layout),
        not has_no_cache and not tells_cache_lock(binary, layout),
        not tells_limit_statuses(layout),
    )


def _flags(binary: Binary) -> dict[str, bool]:
    given = binary.configure_arguments.split()
    # The module signature tells --with-compat even if the text of the arguments is lost.
    return {flag: flag in given for flag in _FLAGS} | {"--with-compat": binary.with_compat}


def _examine_boundary(
    binary: Binary, layout: Layout | None, boundary: sites.Boundary, problems: list[str]
) -> BoundaryReport:
    found = find_site(binary, layout, boundary)
    if isinstance(found, Site):
        cost_us = None if found.handling == "stepped" else binary.machine.hit_us
        place = (found.function, found.displacement, found.instruction, found.handling)
        return BoundaryReport(boundary.name, "ok", *place, cost_us, None, None)
    if boundary.required:
        problems.append(no_site(binary, boundary, found))
    state: State = "fail" if boundary.required else "note"
    return BoundaryReport(boundary.name, state, None, None, None, None, None, found, boundary.without)
