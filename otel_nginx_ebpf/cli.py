"""The command line."""

import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from otel_nginx_ebpf import __version__, commands
from otel_nginx_ebpf.printable import printable
from otel_nginx_ebpf.process import entry
from otel_nginx_ebpf.process.stdio import PROGRAM, complain, forget_stdout
from otel_nginx_ebpf.settings import sources
from otel_nginx_ebpf.settings.model import DECLARATIONS, Settings, Sort, TopView

Result = TypeVar("Result")

_VARIABLE_SHOWN_MAX = 44

_ABOUT = """
OpenTelemetry traces of a running nginx, by eBPF.

No nginx module, no configuration change, no restart.

Examples:

    otel-nginx-ebpf doctor                   check this machine and each nginx

    otel-nginx-ebpf run                      trace every nginx, to a collector

    otel-nginx-ebpf run --exporter console   show each request as a waterfall

    otel-nginx-ebpf top                      show where the time goes, live

    otel-nginx-ebpf record -o day.capture    keep the kernel's records

    otel-nginx-ebpf replay day.capture --exporter json     export them later

    otel-nginx-ebpf report day.capture -o day.html         show them as a page

A flag wins over the environment; the environment wins over a TOML file
(--config FILE).
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
    """Returns the words of a type's Literals."""
    found = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(word) for word in found]
    return [word for inner in found for word in _choices(inner)]


def _option(name: str) -> inspect.Parameter:
    """Makes the option of a setting. It takes text: all sources of a setting are checked by the same code."""
    declaration, flag = DECLARATIONS[name], sources.flag(name)
    # A name that is longer than the column would be cut, with the names beside it: docs/configuration.md has it.
    notes = [f"env: {', '.join(each for each in sources.variables(name) if len(each) <= _VARIABLE_SHOWN_MAX)}"]
    if declaration.default not in (None, (), False):
        default = ", ".join(declaration.default) if declaration.is_list else declaration.default
        notes.append(f"default: {default}")
    if declaration.is_list:
        notes.append("may be repeated")
    words = _choices(sources.TYPES[name])
    option = typer.Option(
        f"{flag.replace('--no-', '--')}/{flag}" if declaration.turns_off else flag,
        autocompletion=(lambda incomplete: [word for word in words if word.startswith(incomplete)]) if words else None,
        metavar=declaration.metavar,
        help=f"{declaration.description} \\[{'; '.join(notes)}]",
        show_default=False,
    )
    given: Any = list[str] if declaration.is_list else bool if declaration.is_switch else str
    return _parameter(name, Annotated[given | None, option])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_CONFIG_FILE = _parameter(
    "config_file",
    Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help=f"A TOML file of settings. \\[env: {sources.CONFIG_VARIABLE}]"),
    ],
)


def _with_settings(command: Callable[..., Result]) -> Callable[..., Result]:
    """Gives a command the options of its settings and --config, in place of its parameter `settings`.

    A parameter with the name of one of these settings only says where `--help` shows that option.
    """
    names = [name for name, declaration in DECLARATIONS.items() if command.__name__ in declaration.commands]
    options = {name: _option(name) for name in names}
    own = inspect.signature(command).parameters
    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        if name == "settings":
            parameters += [*(options[name] for name in names if name not in own), _CONFIG_FILE]
        else:
            parameters.append(options.get(name, parameter))

    @functools.wraps(command)
    def with_settings(config_file: Path | None, **arguments: Any) -> Result:
        given = {name: arguments.pop(name) for name in names}
        given = {name: value for name, value in given.items() if value not in (None, [], ())}
        return command(settings=sources.load(given, config_file), **arguments)

    with_settings.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_settings


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


@app.command()
@_with_settings
def run(
    *,
    settings: Settings,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compile, load, attach, say ready, detach; send nothing.")
    ] = False,
) -> None:
    """Trace running nginx processes until SIGINT or SIGTERM. Needs root.

    Without --pid and --binary it traces every nginx on this machine. When the
    probes are live, a line that starts with "ready" appears on stderr. At the
    end the program prints how many traces it received, exported and lost.

    Examples:

        otel-nginx-ebpf run --pid $(cat /run/nginx.pid) --exporter console

        otel-nginx-ebpf run --exporter otlp --exporter line --output phases.log

        OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317 otel-nginx-ebpf run
    """
    if not dry_run:
        entry.become(commands.run, settings)
    from otel_nginx_ebpf.supervisor import supervise

    supervise.dry_run(settings)


@app.command()
@_with_settings
def top(
    *,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A capture file to read instead of live requests.", show_default=False),
    ] = None,
    # `--help` shows these before --sort.
    pid: None = None,
    binary: None = None,
    sort: Annotated[Sort, typer.Option(help="The column to sort by.")] = "rate",
    interval: Annotated[
        float,
        typer.Option(
            min=1, max=3600, metavar="S", help="The seconds that the tables are of; without a terminal, one so often."
        ),
    ] = 10,
    once: Annotated[bool, typer.Option("--once", help="Print the tables of one interval, and end.")] = False,
    settings: Settings,
) -> int:
    """Show live where the time of requests goes, by location and by upstream. Needs root, but no collector.

    All requests count, whatever the sampler takes. Each row shows requests per
    second, how many had a status of 4xx and 5xx, and how long they took, as
    p50, p95 or p99 (all three if the terminal has 178 columns):

        TOTAL  from the first byte to the last

        READ   the client sends its request      CONN   connecting to a peer

        WAIT   for the peer's first byte         XFER   the rest of its response

        WRITE  the response to the client        NGINX  none of these

    Keys: q or Ctrl-C quits. ← and → (or < and >) change the column to sort by,
    p changes the percentile. u shows each peer of an upstream, a the time since
    the start. Space pauses. / shows only rows that contain the typed text.

    The tables are printed as text without a terminal, with --once, and for a
    capture file. A capture file needs no root.

    Examples:

        otel-nginx-ebpf top

        otel-nginx-ebpf top --once --interval 60 --sort wait

        otel-nginx-ebpf top day.capture
    """
    settings = replace(
        settings,
        top=TopView(sort, interval, once, of_file=file is not None),
        sampler="always_on",
        propagate="off",
        adopt_upstream_context=False,
        metrics=False,
        metrics_listen=None,
        rules=(),
    )
    if file is None:
        entry.become(commands.top, settings)
    return commands.replay(settings, file)


@app.command()
@_with_settings
def record(
    *,
    file: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The capture file to write.")],
    settings: Settings,
) -> None:
    """Write the kernel's records to a capture file until SIGINT or SIGTERM. Needs root.

    Example:

        otel-nginx-ebpf record --pid $(cat /run/nginx.pid) -o day.capture
    """
    entry.become(commands.record, settings, file)


@app.command()
@_with_settings
def replay(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A capture file.", show_default=False)],
    settings: Settings,
) -> int:
    """Export the requests in a capture file. Needs no root, no nginx and no BCC.

    If the file is damaged, the program exports the requests before the damage
    and exits with 1.

    Example:

        otel-nginx-ebpf replay day.capture --exporter console
    """
    return commands.replay(settings, file)


@app.command()
@_with_settings
def report(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A capture file.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write.")],
    settings: Settings,
) -> int:
    """Write an HTML page that shows where the time of a capture file's requests went. Needs no root, nginx or BCC.

    The page has latency by phase over time, tables by location and upstream,
    and the slowest requests as waterfalls. It loads nothing from elsewhere, so
    you can send it to others. They then see what clients sent: addresses, URIs
    and user agents.

    If the file is damaged, the page shows the requests before the damage, and
    the program exits with 1.

    Example:

        otel-nginx-ebpf report day.capture -o day.html
    """
    return commands.report(settings, file, output)


@app.command()
@_with_settings
def doctor(
    *,
    settings: Settings,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Check this machine and every nginx for what is in the way of tracing. Attaches nothing.

    Exits with 1 if a check says FAIL, else with 0. Without root some checks are not possible.

    Examples:

        otel-nginx-ebpf doctor

        otel-nginx-ebpf doctor --json --pid $(cat /run/nginx.pid)
    """
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
    help="Struct layouts of nginx releases: where nginx keeps the facts that traces need.", no_args_is_help=True
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

    The program looks for debug information where `run` does: in the binary, in
    its debug file, and on the servers of $DEBUGINFOD_URLS. Afterwards `run`
    knows every build of that release that was configured --with-compat.
    Each user has a catalogue: add as root what root's `run` is to know.

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


def _with_values(arguments: Sequence[str]) -> list[str]:
    """Gives options that may stand alone their value. `--logs access` and `--logs=access` are the same."""
    names = {sources.flag(name): name for name, declaration in DECLARATIONS.items() if declaration.alone}
    whole: list[str] = []
    for each in arguments:
        name = names.get(whole[-1]) if whole else None
        if name and each in get_args(sources.TYPES[name]):
            whole[-1] += f"={each}"
        else:
            whole.append(each)
    return [f"{each}={DECLARATIONS[names[each]].alone}" if each in names else each for each in whole]


def _command() -> int:
    try:
        return app(_with_values(sys.argv[1:]), prog_name=PROGRAM, standalone_mode=False) or 0
    except typer.TyperException as error:
        # The message is empty if no command was given; typer has printed the help.
        if message := error.format_message():
            complain(message)
        return 2
    except typer.Abort:
        return entry.INTERRUPTED


def main() -> None:
    """Runs the program. Exits with 0; 1 for damaged input or a failed check of `doctor`; 2 for an error of the user."""
    sys.exit(entry.exit_code(_command))
