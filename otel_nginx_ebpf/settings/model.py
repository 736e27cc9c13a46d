"""The table of settings, and the user's choices as plain values. `sources` reads, checks and explains settings."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from otel_nginx_ebpf.settings.declaration import (
    Declaration,
    like_a_switch,
    lower,
    nanoseconds,
    network,
    openable,
    pattern,
    power_of_two,
    setting,
)
from otel_nginx_ebpf.settings.rules import Rule, compared_path

ExporterName = Literal["otlp", "console", "line", "json"]
Color = Literal["auto", "always", "never"]
Sampler = Literal[
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
]
Propagator = Literal["tracecontext", "baggage", "b3", "b3multi", "xrequestid", "none"]
Propagate = Literal["off", "auto", "socket", "memory"]
OptInAttribute = Literal[
    "client.port",
    "http.request.size",
    "http.response.size",
    "network.local.address",
    "network.local.port",
    "network.transport",
    "url.scheme",
]
"""The attributes that the semantic conventions leave out of HTTP spans by default, and that the program knows."""
MetricsAttribute = Literal[
    "error.type",
    "http.request.method",
    "http.response.status_code",
    "http.route",
    "network.peer.address",
    "network.peer.port",
    "network.protocol.version",
    "nginx.cache.status",
    "nginx.server_name",
    "nginx.upstream.name",
    "server.address",
    "server.port",
    "url.scheme",
]
"""The attributes of the metrics of all requests."""
HistogramAggregation = Literal["explicit_bucket_histogram", "base2_exponential_bucket_histogram"]
SpanNames = Literal["phases", "semconv"]
Detail = Literal["phases", "request"]
Logs = Literal["off", "error", "access", "all"]
"""Which log records are sent: of the error log, one for each traced request, or both."""
LogLevel = Literal["none", "emerg", "alert", "crit", "error", "warn", "notice", "info"]
"""nginx's levels, in the order of nginx's numbers. `debug` is left out: nginx logs many such lines for a request."""
OtlpProtocol = Literal["grpc", "http/protobuf"]

_HEADER_NAME = "^[a-z0-9_-]{1,56}$"
_HEADER_NAMES = "names of headers, not patterns: up to 56 letters, digits, - and _, with commas between them"

Sort = Literal["rate", "errors", "total", "read", "connect", "wait", "transfer", "write", "nginx"]
"""The columns that `top` can sort by. From the third on they are durations."""


def _headers(whose: str, kind: str) -> tuple[str, ...]:
    """Declares the names of headers that become attributes of a span."""
    return setting(
        (),
        f"Give spans these headers of {whose}, as http.{kind}.header.<name>. Secrets are REDACTED.",
        commands=("run", "record", "doctor"),
        allowed=_HEADER_NAMES,
        metavar="NAMES",
        standard=(f"OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_{kind.upper()}",),
        remark="none",
        read=lower,
        limits={"pattern": _HEADER_NAME},
        splits=True,
    )


@dataclass(frozen=True, slots=True)
class TopView:
    """How `top` shows the requests."""

    sort: Sort
    interval_s: float
    """The time that the tables cover, in seconds. Without a terminal they are printed this often."""
    once: bool
    """Whether to print the tables of one interval, and exit."""
    of_file: bool = False
    """Whether the requests come from a capture file. Then the tables cover all of it, by its own times."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The table of settings, and the value of each setting. `sources.load` makes objects with valid values.

    A setting has one name everywhere: `ring_buffer_mib` in the TOML file, `--ring-buffer-mib` on the command line,
    `OTEL_NGINX_EBPF_RING_BUFFER_MIB` in the environment. These fields, in this order, define the command line,
    `--help`, the variables, the keys of the file, the error messages, and the documentation's table.
    """

    pid: tuple[int, ...] = setting(
        (),
        "Trace this nginx: the pid of its master or of a worker.",
        commands=("run", "top", "record", "doctor"),
        allowed="process ids, each 1 or more",
        metavar="PID",
        remark="every nginx found",
        limits={"gt": 0},
    )
    binary: tuple[Path, ...] = setting(
        (),
        "Trace every process that runs this nginx binary.",
        commands=("run", "top", "record", "doctor"),
        allowed="paths",
        metavar="PATH",
        remark="every nginx found",
        check=openable,
    )
    wait: bool = setting(
        False,
        "Wait for nginx to start instead of exiting.",
        commands=("run", "record"),
        remark="the program exits if no nginx runs",
    )
    exporter: tuple[ExporterName, ...] = setting(
        ("otlp",),
        "Where traces go: otlp (to a collector), console (waterfalls), line (one line a request), "
        "json (one object a trace).",
        commands=("run", "replay"),
        allowed="of otlp, console, line, json",
        metavar="NAME",
    )
    output: Path | None = setting(
        None,
        "Write the console, line or json exporter's text to this file instead of stdout.",
        commands=("run", "replay"),
        allowed="a path",
        metavar="FILE",
        remark="stdout",
        check=openable,
    )
    query: bool = setting(
        True,
        "Keep the query string of each URI, or only the path.",
        commands=("run", "replay", "report"),
        remark="query strings are kept",
    )
    known_methods: tuple[str, ...] = setting(
        (),
        "The request methods that spans and metrics name; all others are _OTHER. Replaces the whole list.",
        commands=("run", "replay", "report"),
        allowed="methods, such as GET",
        metavar="METHOD",
        standard=("OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS",),
        remark="the methods of RFC 9110, PATCH and QUERY",
        limits={"pattern": r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"},
    )
    span_names: SpanNames = setting(
        "phases",
        "How CLIENT spans are named. phases: upstream connect, upstream exchange. semconv: by the method alone, as the "
        "semantic conventions say.",
        commands=("run", "replay"),
        allowed="phases or semconv",
        metavar="NAMES",
    )
    opt_in_attributes: tuple[OptInAttribute, ...] = setting(
        (),
        "Also give spans these attributes, which the semantic conventions leave out by default.",
        commands=("run", "replay", "report"),
        allowed=f"of {', '.join(get_args(OptInAttribute))}",
        metavar="NAME",
        remark="none",
    )
    trusted_proxy: tuple[str, ...] = setting(
        (),
        "Believe what proxies in this network say about a request in Forwarded, X-Forwarded-Proto and "
        "X-Forwarded-Host. unix: stands for all unix sockets.",
        commands=("run", "record", "replay", "report"),
        allowed="networks or addresses, such as 10.0.0.0/8, 2001:db8::/32 or 127.0.0.1, or unix:",
        metavar="CIDR",
        remark="none: the headers do not count",
        check=network,
    )
    capture_request_headers: tuple[str, ...] = _headers("the client's request", "request")
    capture_response_headers: tuple[str, ...] = _headers("the response", "response")
    sanitize_headers: tuple[str, ...] = setting(
        (),
        "Captured headers whose value is REDACTED, too: regular expressions that match at the beginning of a name.",
        commands=("run", "record", "doctor"),
        allowed="regular expressions, with commas between them, such as x-session-.*",
        metavar="REGEX",
        standard=("OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SANITIZE_FIELDS",),
        remark="Authorization, Cookie, Proxy-Authorization and Set-Cookie always are",
        check=pattern,
        splits=True,
    )
    color: Color = setting(
        "auto",
        "When to use colours. auto: on a terminal, unless NO_COLOR is set.",
        commands=("run", "top", "replay", "doctor"),
        allowed="auto, always or never",
        metavar="WHEN",
    )
    sampler: Sampler = setting(
        "parentbased_always_on",
        "Which requests to trace: always_on, always_off or traceidratio. With parentbased_ before it, the incoming "
        "context decides, and the sampler only decides for requests without one.",
        commands=("run", "record"),
        allowed=f"one of {', '.join(get_args(Sampler))}",
        metavar="NAME",
        standard=("OTEL_TRACES_SAMPLER",),
        read=lower,
    )
    sampler_arg: float = setting(
        1.0,
        "The fraction of traces that traceidratio takes.",
        commands=("run", "record"),
        allowed="a number from 0 to 1",
        metavar="RATIO",
        standard=("OTEL_TRACES_SAMPLER_ARG",),
        limits={"ge": 0, "le": 1},
    )
    keep_errors: bool = setting(
        False,
        "Also trace requests that the sampler leaves out, if their status is 500 or more or nginx logs an error for "
        "them. An incoming context that says no still wins.",
        commands=("run", "record"),
    )
    keep_slower_than: int | None = setting(
        None,
        "Also trace requests that took longer than this (500ms, 2s) and that the sampler leaves out. An incoming "
        "context that says no still wins.",
        commands=("run", "record"),
        allowed="a number and its unit, us, ms or s, such as 500ms",
        metavar="TIME",
        remark="off",
        read=nanoseconds,
        limits={"gt": 0},
    )
    """Nanoseconds."""
    exclude: tuple[str, ...] = setting(
        (),
        "Do not trace requests to this path (/healthz, /static/*). One * stands for any characters. A rule of the TOML "
        "file can say more.",
        commands=("run", "record", "replay", "report", "doctor"),
        allowed="paths without query, such as /healthz, /static/*, *.css or /static/*.css",
        metavar="PATH",
        remark="none",
        check=compared_path,
    )
    propagators: tuple[Propagator, ...] = setting(
        ("tracecontext",),
        "The request headers that carry the trace context: tracecontext (W3C), b3, b3multi, xrequestid (X-Request-ID "
        "is the trace id), or none. baggage is accepted and has no effect.",
        commands=("run", "record"),
        allowed=f"of {', '.join(get_args(Propagator))}",
        metavar="NAME",
        standard=("OTEL_PROPAGATORS",),
        read=lower,
    )
    adopt_upstream_context: bool = setting(
        False,
        "Use the ids of the traceparent that nginx itself sends upstream (proxy_set_header) for the spans.",
        commands=("run", "record"),
    )
    propagate: Propagate = setting(
        "off",
        "Write a traceparent into the requests that nginx sends upstream: on the socket (HTTP/1 over TCP), in nginx's "
        "memory (every protocol, if the kernel is not locked down), or, without a value, what works here.",
        commands=("run", "record"),
        allowed="socket, memory, auto, or off; true and false mean auto and off",
        metavar="[=WAY]",
        alone="auto",
        read=like_a_switch("auto"),
    )
    detail: Detail = setting(
        "phases",
        "phases: spans of all phases, to the nanosecond. request: at lower cost, the request and its last upstream "
        "attempt, with nginx's own times in milliseconds.",
        commands=("run", "top", "record"),
        allowed="phases or request",
        metavar="LEVEL",
    )
    log_level: LogLevel = setting(
        "warn",
        "Add the lines of nginx's error log, from this level up, to the spans of their requests. What nginx does not "
        "log stays out; none adds no lines.",
        commands=("run", "record"),
        allowed=f"one of {', '.join(get_args(LogLevel))}",
        metavar="LEVEL",
        read=lower,
    )
    logs: Logs = setting(
        "off",
        "Also send log records with the ids of trace and span to the collector: error (or no value), the lines of "
        "nginx's error log; access, one record for each traced request; all, both.",
        commands=("run", "replay"),
        allowed="error, access, all, or off; true and false mean error and off",
        metavar="[=LOG]",
        alone="error",
        read=like_a_switch("error"),
    )
    ring_buffer_mib: int = setting(
        16,
        "Size in MiB of the buffer between the kernel and this program.",
        commands=("run", "top", "record"),
        allowed="a power of two from 1 to 256",
        metavar="MIB",
        limits={"ge": 1, "le": 256},
        check=power_of_two,
    )
    max_active_requests: int = setting(
        16_384,
        "How many requests in flight can be traced at once.",
        commands=("run", "top", "record"),
        allowed="64 to 1048576",
        metavar="N",
        limits={"ge": 64, "le": 1_048_576},
    )
    max_cost_per_request: int | None = setting(
        None,
        "Detach if tracing a request takes more processor time than this (20us).",
        commands=("run", "record"),
        allowed="a number and its unit, us, ms or s, such as 20us",
        metavar="TIME",
        remark="no limit",
        read=nanoseconds,
        limits={"gt": 0},
    )
    """Nanoseconds."""
    max_loss: float | None = setting(
        None,
        "Detach if more than this fraction of the traces is lost in the kernel (0.05).",
        commands=("run", "record"),
        allowed="a number from 0 to 1",
        metavar="PART",
        remark="no limit",
        limits={"ge": 0, "le": 1},
    )
    reattach_seconds: float = setting(
        60.0,
        "How many seconds to stay detached after that: twice as long each time, up to an hour.",
        commands=("run", "record"),
        allowed="seconds, 1 to 3600",
        metavar="S",
        remark="then twice as long each time, up to an hour",
        limits={"ge": 1, "le": 3600},
    )
    queue_size: int = setting(
        262_144,
        "How many spans may wait for the collector.",
        commands=("run", "replay"),
        allowed="a number of spans, 1 or more",
        metavar="SPANS",
        standard=("OTEL_BSP_MAX_QUEUE_SIZE",),
        limits={"ge": 1},
    )
    queue_mib: int = setting(
        64,
        "How many MiB of encoded spans may wait for the collector.",
        commands=("run", "replay"),
        allowed="1 to 65536",
        metavar="MIB",
        remark="the queue keeps what fits both limits",
        limits={"ge": 1, "le": 65_536},
    )
    queue_dir: Path | None = setting(
        None,
        "Keep traces in this directory while the collector is down, also for the next run.",
        commands=("run", "replay"),
        allowed="a directory of this program's own",
        metavar="DIR",
        remark="none: the queue is in memory",
        check=openable,
    )
    queue_dir_mib: int = setting(
        1_024,
        "How many MiB may wait in --queue-dir.",
        commands=("run", "replay"),
        allowed="1 or more",
        metavar="MIB",
        remark="compressed",
        limits={"ge": 1},
    )
    batch_size: int = setting(
        4_096,
        "How many spans to send to the collector at once.",
        commands=("run", "replay"),
        allowed="a number of spans, 1 or more",
        metavar="SPANS",
        standard=("OTEL_BSP_MAX_EXPORT_BATCH_SIZE",),
        remark="at most 2 MiB",
        limits={"ge": 1},
    )
    batch_delay_ms: int = setting(
        5_000,
        "How many milliseconds a span waits for its batch to fill.",
        commands=("run", "replay"),
        allowed="milliseconds, 0 to 3600000",
        metavar="MS",
        standard=("OTEL_BSP_SCHEDULE_DELAY",),
        limits={"ge": 0, "le": 3_600_000},
    )
    otlp_protocol: OtlpProtocol = setting(
        "grpc",
        "The protocol of the collector: grpc or http/protobuf.",
        commands=("run", "replay"),
        allowed="grpc or http/protobuf",
        metavar="NAME",
        standard=("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"),
    )
    otlp_logs_protocol: OtlpProtocol | None = setting(
        None,
        "The protocol of the collector for log records, if it is not that of the traces.",
        commands=(),
        allowed="grpc or http/protobuf",
        standard=("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL",),
    )
    grace_seconds: float = setting(
        10.0,
        "How many seconds to deliver queued traces after the program was told to stop.",
        commands=("run", "replay"),
        allowed="seconds, 0 to 3600",
        metavar="S",
        remark="in the image 9, as `docker stop` waits 10",
        limits={"ge": 0, "le": 3600},
    )
    user: str | None = setting(
        None,
        "The user that reads requests and sends traces, without privileges.",
        commands=("run", "top", "record"),
        allowed="a user's name or number",
        metavar="USER",
        remark="`nobody` if root starts the program, else the user who starts it",
        limits={"pattern": r"^\w[\w.-]*\$?$"},
    )
    metrics: bool = setting(
        False,
        "Also send metrics of all requests and of this program to the collector.",
        commands=("run",),
    )
    metrics_listen: str | None = setting(
        None,
        "Serve metrics of all requests and of this program to Prometheus at this address.",
        commands=("run",),
        allowed="an address and a port, as in 127.0.0.1:9464 or [::1]:9464",
        metavar="ADDRESS",
        remark="none",
        limits={"pattern": r"^[^:]+:[0-9]{1,5}$|^\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}$"},
    )
    request_metrics: bool = setting(
        True,
        "Whether the metrics have the durations of all requests.",
        commands=("run",),
        allowed="on or off",
        metavar="ON|OFF",
        remark="has an effect with `--metrics` or `--metrics-listen`",
    )
    metrics_attributes: tuple[MetricsAttribute, ...] = setting(
        (),
        "The attributes that the metrics of all requests keep. Series that differ only in others are added up.",
        commands=("run",),
        allowed=f"of {', '.join(get_args(MetricsAttribute))}",
        metavar="NAME",
        remark="all",
    )
    metrics_histograms: HistogramAggregation = setting(
        "explicit_bucket_histogram",
        "The histograms that the collector gets.",
        commands=(),
        allowed=f"one of {', '.join(get_args(HistogramAggregation))}",
        standard=("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",),
        metavar="NAME",
        read=lower,
    )
    sdk_disabled: bool = setting(
        False,
        "Send nothing to a collector.",
        commands=(),
        standard=("OTEL_SDK_DISABLED",),
    )
    rules: tuple[Rule, ...] = ()
    """The paths of `exclude`, then `[[rules]]` of the TOML file. Neither an option nor a variable has all of a rule."""
    top: TopView | None = None
    """How to show requests instead of exporting them; `None`: export them."""

    @property
    def tells_in_memory(self) -> bool:
        """Tells whether upstreams are told the context in nginx's memory."""
        return self.propagate in ("auto", "memory")

    @property
    def tells_on_socket(self) -> bool:
        """Tells whether upstreams are told the context on the socket."""
        return self.propagate in ("auto", "socket")

    @property
    def told_on_socket(self) -> tuple[str, ...]:
        """Returns the propagators whose headers are written on the socket."""
        if not self.tells_on_socket:
            return ()
        b3 = () if "none" in self.propagators else (each for each in ("b3", "b3multi") if each in self.propagators)
        return ("tracecontext", *b3)

    @property
    def sends_error_log(self) -> bool:
        """Tells whether the lines of nginx's error log are sent as log records."""
        return self.logs in ("error", "all") and self.sends_logs

    @property
    def sends_logs(self) -> bool:
        """Tells whether log records are sent."""
        return self.logs != "off" and self.top is None and not self.sdk_disabled

    @property
    def sends_access_log(self) -> bool:
        """Tells whether a log record is sent for each traced request."""
        return self.logs in ("access", "all") and self.sends_logs

    @property
    def reads_error_log(self) -> bool:
        """Tells whether the lines of nginx's error log are read. System calls show their text."""
        return self.log_level != "none" and self.detail == "phases" and self.top is None

    @property
    def measures_requests(self) -> bool:
        """Tells whether the durations of all requests go to the collector or to Prometheus."""
        return self.request_metrics and (self.metrics or self.metrics_listen is not None)

    @property
    def counts_exponentially(self) -> bool:
        """Tells whether the collector gets exponential histograms of the durations."""
        return self.metrics and self.request_metrics and self.metrics_histograms.startswith("base2_exponential")


DECLARATIONS: dict[str, Declaration] = {
    field.name: field.metadata["declaration"] for field in fields(Settings) if field.metadata
}
"""The table by the settings' names."""
