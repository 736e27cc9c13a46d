"""Renders the result of an examination for people."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from otel_nginx_ebpf.doctor.examine import Examination, NginxReport
from otel_nginx_ebpf.kernel.preflight import State
from otel_nginx_ebpf.printable import printable

_TO_HAVE_ALL = (
    "everything else is traced; to trace this too, use a build that exports its functions (-Wl,-E) or install its "
    "debug symbols"
)

_STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "fail": "bold red"}


def render(report: Examination) -> RenderableType:
    """Renders the report. It fits in 60 columns or more, however long names and paths are."""
    parts: list[RenderableType] = [Text(f"otel-nginx-ebpf {report.program_version}", style="bold"), Text()]
    system = _table()
    for check in report.system.values():
        _row(system, check.state, check.name, check.found, check.advice)
    parts.append(system)
    for nginx in report.nginx:
        name = f"{nginx.product} {nginx.version} {nginx.path}" if nginx.version else "nginx"
        parts += [Text(), Text(printable(name), style="bold", overflow="fold"), _nginx_table(nginx)]
    if report.rules:
        rules = _table()
        for number, rule in enumerate(report.rules, 1):
            _row(rules, None, f"rule {number}", rule.rule, f"({rule.place})")
        parts += [Text(), Text("The first rule that matches a request decides", style="bold"), rules]
    if report.problems:
        nowhere = _table()
        for problem in report.problems:
            _row(nowhere, "fail", "nginx", problem)
        parts += [Text(), nowhere]
    end = "Nothing is in the way of tracing." if report.ok else "Something is in the way of tracing: see FAIL."
    return Group(*parts, Text(), Text(end, style=_STYLES["ok" if report.ok else "fail"]))


def _table() -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(width=4)
    table.add_column(width=22)
    table.add_column(ratio=1, overflow="fold")
    return table


def _row(table: Table, state: State | None, name: str, found: str, advice: str = "") -> None:
    mark = "FAIL" if state == "fail" else state or ""
    text = Text(printable(found), style="" if state in (None, "ok") else _STYLES[state])
    if advice:
        text = Text.assemble(text, "\n", printable(advice))
    table.add_row(Text(mark, style=_STYLES[state] if state else ""), Text(name), text)


def _nginx_table(nginx: NginxReport) -> Table:
    table = _table()
    for instance in nginx.instances:
        workers = f"{instance.workers} worker{'' if instance.workers == 1 else 's'}"
        elsewhere = "" if instance.shares_pid_namespace else ", in another pid namespace"
        _row(table, None, "pid", f"{instance.pid}, {workers}{elsewhere}")
    if nginx.flags:
        given = " ".join(flag for flag, there in nginx.flags.items() if there)
        absent = " ".join(flag for flag, there in nginx.flags.items() if not there)
        _row(table, None, "configured", (given or "plainly") + (f", not {absent}" if absent else ""))
        _row(table, None, "build-id", nginx.build_id or "none")
    if nginx.layout:
        advice = "counts once nginx's memory has confirmed it, at the first requests" if nginx.layout.assumed else ""
        _row(table, "note" if nginx.layout.assumed else "ok", "layout", nginx.layout.source, advice)
        if nginx.layout.without_cache_status:
            _row(table, "note", "cache", "no nginx.cache.status: the layout does not tell where it is")
        if nginx.layout.without_cache_lock:
            _row(table, "note", "cache lock", "no nginx.cache.lock_waited: the layout does not tell where it is")
        if nginx.layout.without_limit_statuses:
            _row(
                table, "note", "limits", "no nginx.limit_req.status, nginx.limit_conn.status: the layout does not tell"
            )
    for each in nginx.boundaries:
        if each.reason is None:
            place = f"{each.function}+{each.displacement} ({each.instruction})"
            # Where the price is known, no instruction is stepped.
            _row(table, each.state, each.boundary, place if each.cost_us else f"{place}, {each.handling}")
        elif each.state == "note":
            _row(table, each.state, each.boundary, f"no {each.without}: {each.reason}", _TO_HAVE_ALL)
    costs = [each.cost_us for each in nginx.boundaries if each.reason is None]
    if costs and costs[0]:
        _row(table, None, "", "a probe hit costs about {} to {} µs".format(*costs[0]))
    elif costs:
        _row(table, None, "", "what a probe hit costs was not measured on this kind of machine; make bench measures it")
    for problem in nginx.problems:
        _row(table, "fail", "tracing", problem)
    return table


def text(report: Examination, console: Console) -> str:
    """Returns the report as `console` would show it."""
    # Render first, write later: on a broken pipe rich itself would end the program.
    with console.capture() as capture:
        console.print(render(report))
    return "\n".join(line.rstrip() for line in capture.get().split("\n"))
