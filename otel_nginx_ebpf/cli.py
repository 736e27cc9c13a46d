"""The command line."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from otel_nginx_ebpf import __version__, commands
from otel_nginx_ebpf.printable import printable
from otel_nginx_ebpf.process import entry
from otel_nginx_ebpf.process.stdio import PROGRAM, complain, forget_stdout
from otel_nginx_ebpf.settings import sources
from otel_nginx_ebpf.settings.model import Settings, Sort, Top

_ABOUT = """
OpenTelemetry traces of a running nginx, by eBPF.

No nginx module, no configuration change, no restart.

Examples:

    otel-nginx-ebpf run                      every nginx here, to a collector

    otel-nginx-ebpf run --exporter console   waterfalls in the terminal

    otel-nginx-ebpf doctor                   what is in the way of that

    otel-nginx-ebpf record -o day.capture    keep what the kernel reports …

    otel-nginx-ebpf replay day.capture --exporter json     … for later

    otel-nginx-ebpf top                      where the time goes, live

    otel-nginx-ebpf report day.capture -o day.html     the same as a page

A flag wins over the environment, that over a TOML file (--config FILE).
The standard variables mean what they mean everywhere: OTEL_SERVICE_NAME
(default: nginx), OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_ENDPOINT
(default: http://localhost:4317), OTEL_EXPORTER_OTLP_HEADERS, ….
"""

app = typer.Typer(
    help=_ABOUT,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _choices(annotation: Any) -> list[str]:
    """The words of a type's Literals."""
    found = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(word) for word in found]
    return [word for inner in found for word in _choices(inner)]


def _option(name: str, metavar: str | None = None, *declarations: str) -> Any:
    """The option of a setting. It takes text: all sources of a setting are checked by the same code."""
    field = sources.Source.model_fields[name]
    notes = [f"env: {', '.join(sources.variables(name))}"]
    if field.default not in (None, (), False):
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        notes.append(f"default: {default}")
    if metavar is not None and name in ("pid", "binary", "exporter", "propagators"):
        notes.append("may be repeated")
    words = _choices(field.annotation)
    return typer.Option(
        *(declarations or (sources.flag(name),)),
        autocompletion=(lambda incomplete: [word for word in words if word.startswith(incomplete)]) if words else None,
        metavar=metavar,
        help=f"{field.description} \\[{'; '.join(notes)}]",
        show_default=False,
    )


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help=f"A TOML file of settings. \\[env: {sources.CONFIG_VARIABLE}]"),
]
Pid = Annotated[list[str] | None, _option("pid", "PID")]
Binary = Annotated[list[str] | None, _option("binary", "PATH")]
Wait = Annotated[bool | None, _option("wait", None, "--wait")]
ExporterNames = Annotated[list[str] | None, _option("exporter", "NAME")]
Output = Annotated[str | None, _option("output", "FILE")]
Query = Annotated[bool | None, _option("query", None, "--query/--no-query")]
Color = Annotated[str | None, _option("color", "WHEN")]
Sampler = Annotated[str | None, _option("sampler", "NAME")]
SamplerArg = Annotated[str | None, _option("sampler_arg", "RATIO")]
KeepErrors = Annotated[bool | None, _option("keep_errors", None, "--keep-errors")]
KeepSlowerThan = Annotated[str | None, _option("keep_slower_than", "TIME")]
Propagators = Annotated[list[str] | None, _option("propagators", "NAME")]
AdoptUpstreamContext = Annotated[bool | None, _option("adopt_upstream_context", None, "--adopt-upstream-context")]
Propagate = Annotated[bool | None, _option("propagate", None, "--propagate")]
Detail = Annotated[str | None, _option("detail", "LEVEL")]
RingBuffer = Annotated[str | None, _option("ring_buffer_mib", "MIB")]
MaxActiveRequests = Annotated[str | None, _option("max_active_requests", "N")]
MaxCostPerRequest = Annotated[str | None, _option("max_cost_per_request", "TIME")]
MaxLoss = Annotated[str | None, _option("max_loss", "PART")]
ReattachSeconds = Annotated[str | None, _option("reattach_seconds", "S")]
QueueSize = Annotated[str | None, _option("queue_size", "SPANS")]
QueueMib = Annotated[str | None, _option("queue_mib", "MIB")]
QueueDirectory = Annotated[str | None, _option("queue_dir", "DIR")]
QueueDirMib = Annotated[str | None, _option("queue_dir_mib", "MIB")]
BatchSize = Annotated[str | None, _option("batch_size", "SPANS")]
BatchDelay = Annotated[str | None, _option("batch_delay_ms", "MS")]
OtlpProtocol = Annotated[str | None, _option("otlp_protocol", "NAME")]
Metrics = Annotated[bool | None, _option("metrics", None, "--metrics")]
MetricsListen = Annotated[str | None, _option("metrics_listen", "ADDRESS")]
User = Annotated[str | None, _option("user", "USER")]
RequestMetrics = Annotated[str | None, _option("request_metrics", "ON|OFF")]
GraceSeconds = Annotated[str | None, _option("grace_seconds", "S")]


def _settings(context: typer.Context) -> Settings:
    given = {name: context.params.get(name) for name in sources.Source.model_fields}
    given = {name: value for name, value in given.items() if value not in (None, [], ())}
    return sources.load(given, context.params["config_file"])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


# The commands take their options from the context: `_settings` passes on what was given.


@app.command()
def run(
    context: typer.Context,
    pid: Pid = None,
    binary: Binary = None,
    wait: Wait = None,
    exporter: ExporterNames = None,
    output: Output = None,
    query: Query = None,
    color: Color = None,
    sampler: Sampler = None,
    sampler_arg: SamplerArg = None,
    keep_errors: KeepErrors = None,
    keep_slower_than: KeepSlowerThan = None,
    propagators: Propagators = None,
    adopt_upstream_context: AdoptUpstreamContext = None,
    propagate: Propagate = None,
    detail: Detail = None,
    ring_buffer_mib: RingBuffer = None,
    max_active_requests: MaxActiveRequests = None,
    max_cost_per_request: MaxCostPerRequest = None,
    max_loss: MaxLoss = None,
    reattach_seconds: ReattachSeconds = None,
    queue_size: QueueSize = None,
    queue_mib: QueueMib = None,
    queue_dir: QueueDirectory = None,
    queue_dir_mib: QueueDirMib = None,
    batch_size: BatchSize = None,
    batch_delay_ms: BatchDelay = None,
    otlp_protocol: OtlpProtocol = None,
    grace_seconds: GraceSeconds = None,
    user: User = None,
    metrics: Metrics = None,
    metrics_listen: MetricsListen = None,
    request_metrics: RequestMetrics = None,
    config_file: ConfigFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compile, load, attach, say ready, detach; send nothing.")
    ] = False,
) -> None:
    """Trace running nginx processes until SIGINT or SIGTERM. Needs root.

    Without --pid and --binary: every nginx of this machine.
    When the probes are live a line that starts with "ready" appears on stderr,
    at the end the counts of what was received, exported and lost.

    Examples:

        otel-nginx-ebpf run --pid $(cat /run/nginx.pid) --exporter console

        otel-nginx-ebpf run --exporter otlp --exporter line --output phases.log

        OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317 otel-nginx-ebpf run
    """
    settings = _settings(context)
    if not dry_run:
        entry.become(commands.run, settings)
    from otel_nginx_ebpf.supervisor import supervise

    supervise.dry_run(settings)


@app.command()
def top(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A capture file, instead of what happens now.", show_default=False),
    ] = None,
    pid: Pid = None,
    binary: Binary = None,
    sort: Annotated[Sort, typer.Option(help="The column to sort by.")] = "rate",
    interval: Annotated[
        float,
        typer.Option(
            min=1, max=3600, metavar="S", help="The seconds that the tables are of; without a terminal, one so often."
        ),
    ] = 10,
    once: Annotated[bool, typer.Option("--once", help="Print the tables of one interval, and end.")] = False,
    color: Color = None,
    detail: Detail = None,
    ring_buffer_mib: RingBuffer = None,
    max_active_requests: MaxActiveRequests = None,
    user: User = None,
    config_file: ConfigFile = None,
) -> int:
    """Show where requests' time goes, by location and by upstream, as it happens. Needs root; no collector.

    Whatever the sampler takes, all requests count. Of each location and
    upstream: requests/s, those with a status of 4xx and 5xx, and how long they
    took, as p50, p95 or p99 (all three where the terminal has 178 columns):

        TOTAL  from the first byte to the last

        READ   the client sends its request      CONN   connecting to a peer

        WAIT   for the peer's first byte         XFER   the rest of its response

        WRITE  the response to the client        NGINX  none of these

    Keys: q or Ctrl-C quits, ← → (or < >) change the column that is sorted by,
    p the percentile, u shows each peer of an upstream, a all time since the
    start, space pauses, / shows only rows that contain what is typed.

    Without a terminal, with --once and of a capture file (which needs no root)
    the tables are printed as text.

    Examples:

        otel-nginx-ebpf top

        otel-nginx-ebpf top --once --interval 60 --sort wait

        otel-nginx-ebpf top day.capture
    """
    settings = replace(
        _settings(context),
        top=Top(sort, interval, once, of_file=file is not None),
        sampler="always_on",
        propagate=False,
        adopt_upstream_context=False,
        metrics=False,
        metrics_listen=None,
    )
    if file is None:
        entry.become(commands.top, settings)
    return commands.replay(settings, file)


@app.command()
def record(
    context: typer.Context,
    file: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The capture file to write.")],
    pid: Pid = None,
    binary: Binary = None,
    wait: Wait = None,
    sampler: Sampler = None,
    sampler_arg: SamplerArg = None,
    keep_errors: KeepErrors = None,
    keep_slower_than: KeepSlowerThan = None,
    propagators: Propagators = None,
    adopt_upstream_context: AdoptUpstreamContext = None,
    propagate: Propagate = None,
    detail: Detail = None,
    ring_buffer_mib: RingBuffer = None,
    max_active_requests: MaxActiveRequests = None,
    max_cost_per_request: MaxCostPerRequest = None,
    max_loss: MaxLoss = None,
    reattach_seconds: ReattachSeconds = None,
    user: User = None,
    config_file: ConfigFile = None,
) -> None:
    """Write the kernel's records to a capture file until SIGINT or SIGTERM. Needs root.

    Example:

        otel-nginx-ebpf record --pid $(cat /run/nginx.pid) -o day.capture
    """
    entry.become(commands.record, _settings(context), file)


@app.command()
def replay(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A capture file.", show_default=False)],
    exporter: ExporterNames = None,
    output: Output = None,
    query: Query = None,
    color: Color = None,
    queue_size: QueueSize = None,
    queue_mib: QueueMib = None,
    queue_dir: QueueDirectory = None,
    queue_dir_mib: QueueDirMib = None,
    batch_size: BatchSize = None,
    batch_delay_ms: BatchDelay = None,
    otlp_protocol: OtlpProtocol = None,
    grace_seconds: GraceSeconds = None,
    config_file: ConfigFile = None,
) -> int:
    """Export what a capture file holds. Needs no root, no nginx and no BCC.

    Where the file is damaged it exits with 1, after it exported all before that.

    Example:

        otel-nginx-ebpf replay day.capture --exporter console
    """
    return commands.replay(_settings(context), file)


@app.command()
def report(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A capture file.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write.")],
    query: Query = None,
    config_file: ConfigFile = None,
) -> int:
    """Write what a capture file holds as one HTML page: where the time goes. Needs no root, no nginx and no BCC.

    Latency by phase over time, tables by location and upstream, the slowest
    requests as waterfalls. The page fetches nothing and can be sent to others,
    who then see what clients sent: addresses, URIs, user agents.

    Where the file is damaged it exits with 1, and the page is of all before that.

    Example:

        otel-nginx-ebpf report day.capture -o day.html
    """
    return commands.report(_settings(context), file, output)


@app.command()
def doctor(
    context: typer.Context,
    pid: Pid = None,
    binary: Binary = None,
    color: Color = None,
    config_file: ConfigFile = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the same as one JSON object.")] = False,
) -> None:
    """Tell what is in the way of tracing, here and in every nginx found. Attaches nothing.

    Exits with 1 where something is, FAIL, and with 0 where nothing is. Without root it tells what it can.

    Examples:

        otel-nginx-ebpf doctor

        otel-nginx-ebpf doctor --json --pid $(cat /run/nginx.pid)
    """
    settings = _settings(context)
    from otel_nginx_ebpf.doctor.examine import examine
    from otel_nginx_ebpf.doctor.render import text
    from otel_nginx_ebpf.export.console import make_console
    from otel_nginx_ebpf.export.text import open_output

    examination = examine(settings)
    stdout = open_output()
    try:
        if json_:
            print(json.dumps(examination.to_dict(), indent=2), file=stdout, flush=True)
        else:
            print(text(examination, make_console(stdout, settings.color)), end="", file=stdout, flush=True)
    except BrokenPipeError:
        forget_stdout()
    if not examination.ok:
        raise typer.Exit(1)


layouts = typer.Typer(
    help="Struct layouts of nginx releases: where nginx keeps what traces are made of.", no_args_is_help=True
)
app.add_typer(layouts, name="layouts")

Catalogue = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help=f"Your own catalogue. \\[env: {sources.PREFIX}CATALOGUE; default: in the XDG data directory]",
        show_default=False,
    ),
]


@layouts.command("add")
def add_layouts(
    binary: Annotated[Path, typer.Argument(metavar="BINARY", help="An nginx binary.", show_default=False)],
    catalogue: Catalogue = None,
) -> None:
    """Add the release of a binary with debug information to your own catalogue.

    It is looked for where `run` looks for it: in the binary, in its debug
    file, on the servers of $DEBUGINFOD_URLS. Afterwards `run` knows every
    build of that release that was configured --with-compat. Your own
    catalogue is that of the user you are: of root, for a `run` by root.

    Example:

        otel-nginx-ebpf layouts add /usr/sbin/nginx
    """
    from otel_nginx_ebpf.nginx.catalogue import own_path
    from otel_nginx_ebpf.nginx.layouts import add_release

    for line in add_release(binary, catalogue or own_path()):
        typer.echo(printable(line))


@layouts.command("list")
def list_layouts(catalogue: Catalogue = None) -> None:
    """Print the releases whose layout is known, and which catalogue has it."""
    from otel_nginx_ebpf.nginx.catalogue import own_path
    from otel_nginx_ebpf.nginx.layouts import list_releases

    for line in list_releases(catalogue or own_path()):
        typer.echo(printable(line))


def _command() -> int:
    try:
        return app(prog_name=PROGRAM, standalone_mode=False) or 0
    except typer.TyperException as error:
        # Empty where no command was given: the help is out already.
        if message := error.format_message():
            complain(message)
        return 2
    except typer.Abort:
        return entry.INTERRUPTED


def main() -> None:
    """The program: exits with 0, with 1 for damaged input or what `doctor` finds, with 2 for what the user can mend."""
    sys.exit(entry.exit_code(_command))
