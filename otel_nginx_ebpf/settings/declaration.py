"""How the table of settings (`model.Settings`) declares a setting; the functions that convert and check values.

The long-lived processes import this module, so it uses neither pydantic nor typer.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Declaration:
    """Describes a setting. The field of `Settings` has its name and its type."""

    default: Any
    description: str
    """The help text."""
    commands: tuple[str, ...]
    """The commands that have its option. If no command has it, only its standard variables set it."""
    allowed: str = "true or false"
    """The valid values, as an error message names them after "must be"."""
    metavar: str | None = None
    """The name of the option's value in `--help`. `None`: the option is a switch, without a value."""
    alone: str = ""
    """The value of an option that is given without a value. Only `--option=VALUE` gives it another value."""
    standard: tuple[str, ...] = ()
    """The standard OpenTelemetry variables that set it too, the strongest first."""
    remark: str = ""
    """The documentation's note on the default. If the default is `None` or empty, the note stands alone."""
    read: Callable[[object], object] | None = None
    """Converts the given value, or each item of a list, before the checks."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Limits of the value, or of each item of a list, as arguments of pydantic's `Field`."""
    check: Callable[[Any], Any] | None = None
    """Returns the value, or each item of a list; raises ValueError if it is not valid."""
    splits: bool = False
    """Each value of the option, or of the file's list, may be several, with commas between them."""

    @property
    def is_list(self) -> bool:
        """Tells whether the option may be repeated."""
        return isinstance(self.default, tuple)

    @property
    def is_switch(self) -> bool:
        """Tells whether the option has no value."""
        return self.metavar is None

    @property
    def turns_off(self) -> bool:
        """Tells whether the option is a switch that turns off what is on by default."""
        return self.is_switch and self.default is True


def setting(default: Value, description: str, **more: Any) -> Value:
    """Makes a field of `Settings` that carries its `Declaration`."""
    made: Value = field(default=default, metadata={"declaration": Declaration(default, description, **more)})
    return made


def lower(value: object) -> object:
    """Converts text to lower case: the specification's enumerated values are case-insensitive."""
    return value.lower() if isinstance(value, str) else value


_NANOSECONDS = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}


def like_a_switch(alone: str) -> Callable[[object], object]:
    """Returns a function that converts `true` to `alone`, and `false` to `off`."""
    switched = {True: alone, False: "off", "true": alone, "false": "off", "1": alone, "0": "off"}

    def read(value: object) -> object:
        value = lower(value)
        return switched.get(value, value) if isinstance(value, str | bool) else value

    return read


def nanoseconds(value: object) -> int:
    """Converts a duration such as `500ms`, `1.5s` or `800us` to nanoseconds; raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(us|ms|s)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a duration")
    return round(float(match[1]) * _NANOSECONDS[match[2]])


def power_of_two(value: int) -> int:
    """Returns the value; raises ValueError unless it is a power of two."""
    if value & (value - 1):
        raise ValueError("not a power of two")
    return value


def network(value: str) -> str:
    """Returns the text; raises ValueError unless it is a network, an address, or `unix:`."""
    if value != "unix:":
        from ipaddress import ip_network

        ip_network(value, strict=False)
    return value


def pattern(value: str) -> str:
    """Returns the text; raises ValueError unless it is a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(str(error)) from error
    return value


def openable(value: Path) -> Path:
    """Returns the path; raises ValueError if it has a zero byte. TOML allows a zero byte, but no path can have it."""
    if "\0" in str(value):
        raise ValueError("a zero byte")
    return value
