"""Prints the documentation's table of settings: `python -m otel_nginx_ebpf.settings.document`."""

from otel_nginx_ebpf.settings import sources
from otel_nginx_ebpf.settings.model import DECLARATIONS

_HEAD = """\
| flag | variable | TOML | default | allowed values |
| --- | --- | --- | --- | --- |
"""
_CONFIG = f"| `--config FILE` | `{sources.CONFIG_VARIABLE}` | | none | a TOML file |\n"


def _default(name: str) -> str:
    declaration = DECLARATIONS[name]
    match declaration.default:
        case None | ():
            value = ""
        case bool(on):
            value = "on" if on else "off"
        case tuple(items):
            value = ", ".join(f"`{item}`" for item in items)
        case str(word):
            value = f"`{word}`"
        case number:
            value = f"{number:g}" if isinstance(number, float) else str(number)
    return "; ".join(filter(None, [value, declaration.remark]))


def _row(name: str) -> str:
    declaration = DECLARATIONS[name]
    flag = f"{sources.flag(name)} {declaration.metavar or ''}".strip().replace("|", "\\|")
    flag = f"`{flag}`, repeatable" if declaration.is_list else f"`{flag}`"
    # The value with the effect of the switch.
    value = "" if not declaration.is_switch else "false" if declaration.turns_off else "true"
    variables = [f"`{variable}={value}`" if value else f"`{variable}`" for variable in sources.variables(name)]
    key = f"`{name} = {value}`" if value else f"`{name}`"
    return f"| {flag} | {', '.join(variables)} | {key} | {_default(name)} | {declaration.allowed} |\n"


def table() -> str:
    """Returns the table in Markdown, with a row for each setting that has a command-line option."""
    rows = [_row(name) for name, declaration in DECLARATIONS.items() if declaration.commands]
    return "".join([_HEAD, *rows, _CONFIG])


if __name__ == "__main__":
    print(table(), end="")
