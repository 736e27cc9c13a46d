"""Decides which probes to attach to an nginx binary, and says why a probe is missing. Attaches nothing.

`planner.client` runs this module as a program for the long-lived process.
"""

import logging
import pickle
import resource
import sys
from dataclasses import dataclass
from typing import get_args

from otel_nginx_ebpf.errors import TemporaryError, UserError
from otel_nginx_ebpf.kernel.loader import LoadRequest, ProbeRequest
from otel_nginx_ebpf.metrics import choices as metric_choices
from otel_nginx_ebpf.nginx.binary import Binary, NoSiteError, Site
from otel_nginx_ebpf.nginx.layouts import Layout, layout_for
from otel_nginx_ebpf.nginx.processes import Instance, pid_namespace
from otel_nginx_ebpf.planner import captured_headers, client, rules, sampling, sites
from otel_nginx_ebpf.planner.program import program_text
from otel_nginx_ebpf.planner.tracepoints import handlers
from otel_nginx_ebpf.process import stdio
from otel_nginx_ebpf.settings.model import LogLevel, Settings

_log = logging.getLogger(__name__)

# Limits of the planner's process. nginx with a static OpenSSL takes 5 s and 0.3 GB.
_CPU_SECONDS_MAX = 300
_MEMORY_BYTES_MAX = 4 << 30

# linux/proc_ns.h, PROC_PID_INIT_INO: the host's own pid namespace.
HOST_PID_NAMESPACE_INODE = 0xEFFFFFFC

# The optional member that a function's handler reads. Without the member the site is useless.
_NEEDED_MEMBERS = {"ngx_http_v2_send_output_queue": ("ngx_http_v2_connection_s", "last_out")}


@dataclass(frozen=True, slots=True)
class Missing:
    """An optional boundary that has no usable site in this binary."""

    boundary: sites.Boundary
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The probes for one binary and the instances that run it."""

    binary: Binary
    layout: Layout
    chosen: tuple[tuple[sites.Boundary, Site], ...]
    missing: tuple[Missing, ...]
    instances: tuple[Instance, ...]

    @property
    def target(self) -> client.Target:
        """What the readers of the records need to know about the binary."""
        return client.Target(
            name=self.binary.name,
            product=self.binary.product,
            version=self.binary.version,
            layout_source=self.layout.source,
            sites=[str(site) for _, site in self.chosen],
            functions={boundary.name: site.function for boundary, site in self.chosen},
        )

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(pid for instance in self.instances for pid in instance.pids)

    def load_request(self, settings: Settings) -> LoadRequest:
        """Returns everything that the loader needs to attach the probes."""
        end = next(site for _, site in self.chosen if site.function == "ngx_http_free_request")
        namespace = pid_namespace()
        text = program_text(
            self.layout.structs,
            {
                f"SITE_{end.function}": end.address,
                **{f"ADDRESS_{name}": self.binary.address(name) for name in sites.OBJECTS},
                **{
                    f"ADDRESS_{name}": self.binary.symbols.get(name, 0)
                    for name in sites.ENDINGS + sites.REDIRECTS + sites.PROCESS
                },
                "OF_FORK": int(self.binary.is_fork),
                "HTTP_CACHE": int(tells_cache_status(self.binary, self.layout)),
                "DETAIL_REQUEST": int(settings.detail == "request"),
                "ERROR_LOG": int(settings.reads_error_log),
                "OTHER_LOG_LINES": int(settings.sends_error_log),
                "LOG_LEVEL": get_args(LogLevel).index(settings.log_level),
                "REQUEST_METRICS": int(settings.measures_requests),
                "EXPONENTIAL_HISTOGRAMS": int(settings.counts_exponentially),
                **metric_choices.constants(settings),
                **sampling.constants(settings),
                **captured_headers.constants(settings, is_fork=self.binary.is_fork),
                **rules.constants(settings.rules),
            },
            rules_text=rules.text(settings.rules),
            follow_all=not settings.pid,
            follow_forks=all(instance.shares_our_pid_namespace for instance in self.instances),
            pid_namespace=None if namespace[1] == HOST_PID_NAMESPACE_INODE else namespace,
            active_requests_max=settings.max_active_requests,
            ring_buffer_bytes=settings.ring_buffer_mib << 20,
        )
        probes = tuple(
            ProbeRequest(
                f"enter_{site.function}",
                site.file_offset,
                writes=boundary.writes,
                spared=boundary.spared,
            )
            for boundary, site in sorted(self.chosen, key=lambda each: each[1] is end)
        )
        return LoadRequest(
            text,
            str(self.binary.path),
            probes,
            handlers(system_calls=settings.detail == "phases"),
            self.pids,
            request_metrics=settings.measures_requests,
            told_on_socket=settings.told_on_socket,
            captured_headers=captured_headers.chosen(settings),
        )


def make_plan(instances: tuple[Instance, ...], settings: Settings, silent: frozenset[str] = frozenset()) -> Plan:
    """Plans the probes for instances that run one binary.

    Args:
        instances: The instances that run the binary.
        settings: The settings; some boundaries are probed only if a setting asks for them.
        silent: Exported functions that are known never to be called.

    Raises:
        UserError: The binary, its layout or a required site cannot be used.
    """
    binary = Binary(instances[0].executable)
    layout = layout_for(binary)
    chosen: list[tuple[sites.Boundary, Site]] = []
    missing: list[Missing] = []
    for boundary in sites.BOUNDARIES:
        if boundary.setting is not None and not getattr(settings, boundary.setting):
            continue
        if settings.detail == "request" and not boundary.at_request_detail:
            continue
        if not has_boundary(layout, boundary):
            continue
        found = find_site(binary, layout, boundary, silent)
        if isinstance(found, Site):
            chosen.append((boundary, found))
        elif boundary.required:
            raise UserError(no_site(binary, boundary, found))
        else:
            missing.append(Missing(boundary, found))
    return Plan(binary, layout, tuple(chosen), tuple(missing), instances)


def has_boundary(layout: Layout, boundary: sites.Boundary) -> bool:
    """Tells whether requests of this build can have the boundary: without TLS there is no handshake."""
    return boundary.of is None or boundary.of[1] in layout.structs.get(boundary.of[0], {})


def tells_cache_status(binary: Binary, layout: Layout) -> bool:
    """Tells whether it is known where nginx keeps its cache's status: in bits behind `cleanup`.

    A fork may have other bits there. A build without the cache has.
    """
    known = "cleanup" in layout.structs.get("ngx_http_upstream_s", {})
    return known and binary.signature.has_http_cache and not binary.is_fork


def tells_cache_lock(binary: Binary, layout: Layout) -> bool:
    """Tells whether it is known where nginx keeps that a request waited for another one to fill the cache."""
    return tells_cache_status(binary, layout) and "wait_time" in layout.structs.get("ngx_http_cache_s", {})


def tells_limit_statuses(layout: Layout) -> bool:
    """Tells whether it is known where nginx keeps what `limit_req` and `limit_conn` said."""
    return {"limit_req_status:3", "limit_conn_status:2"} <= layout.structs["ngx_http_request_s"].keys()


def no_site(binary: Binary, boundary: sites.Boundary, reason: str) -> str:
    """Returns the error message for a required boundary that has no site."""
    return (
        f"{binary.name} ({binary}) has no usable probe site for “{boundary.name}”: {reason}; "
        "use a build that exports its functions (linked with -Wl,-E)"
    )


def find_site(
    binary: Binary, layout: Layout | None, boundary: sites.Boundary, silent: frozenset[str] = frozenset()
) -> Site | str:
    """Returns the site of the first usable candidate, or why no candidate is usable.

    Without a layout, checks only what the binary itself tells.
    """
    reasons: list[str] = []
    for function in boundary.functions:
        if function in silent:
            reasons.append(f"{function} is exported but never called: the compiler has inlined it")
            continue
        struct, member = _NEEDED_MEMBERS.get(function, ("", ""))
        if layout and struct and member not in layout.structs.get(struct, {}):
            reasons.append(f"{function} needs {struct}.{member}, which the layout does not have")
            continue
        try:
            return binary.site(function, boundary.arguments)
        except NoSiteError as error:
            reasons.append(str(error))
    return "; ".join(reasons)


def main() -> None:
    """Runs the planner: reads the arguments of `make_plan` from stdin, writes the answer to stdout, logs to stderr."""
    stdio.log_to_stderr()
    # The binary may come from a container and be built so that parsing it never ends.
    for limit, value in ((resource.RLIMIT_CPU, _CPU_SECONDS_MAX), (resource.RLIMIT_AS, _MEMORY_BYTES_MAX)):
        resource.setrlimit(limit, (value, value))
    instances, settings, silent = pickle.load(sys.stdin.buffer)
    try:
        plan = make_plan(instances, settings, silent)
    except UserError as error:
        client.write_error(sys.stdout.buffer, error)
        return
    except OSError as error:  # the process has ended, or this process lacks memory or descriptors
        client.write_error(sys.stdout.buffer, TemporaryError(f"{instances[0].executable}: {error.strerror}"))
        return
    for missing in plan.missing:
        _log.warning("%s: no %s: %s", plan.target, missing.boundary.without, missing.reason)
    client.write_answer(sys.stdout.buffer, plan.target, plan.load_request(settings).to_json().encode())


if __name__ == "__main__":
    main()
