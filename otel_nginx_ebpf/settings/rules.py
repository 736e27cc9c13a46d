"""Rules: which requests are traced, and under which names. The first rule that matches a request decides.

The long-lived processes import this module, so it uses neither pydantic nor typer. `rules_file` reads rules.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otel_nginx_ebpf.settings.model import Sampler

RULES_MAX = 32
TEXTS_MAX = 128
"""How many texts all rules may compare together."""
TEXT_BYTES_MAX = 128
"""The longest text before and after a `*` (probes/maps.c, RULE_TEXT_BYTES)."""
WHOLE_BYTES_MAX = 511
"""A longer text of a request matches only by its beginning (probes/maps.c, RULE_PATH_BYTES)."""

TEXT_KEYS = ("server_name", "location", "path", "method", "user_agent")
"""What a rule may compare with texts. `None` in a request: it has no such text."""


def compared_text(value: object) -> str:
    """Returns the text if a rule can compare it. The ValueError says what it must be."""
    if not isinstance(value, str) or not value.replace("*", ""):
        raise ValueError("text, with at most one * for any characters")
    parts = value.split("*")
    if len(parts) > 2:
        raise ValueError("text with at most one *; give several texts as a list, or end the text at its first *")
    if "\0" in value or any(len(part.encode()) > TEXT_BYTES_MAX for part in parts):
        raise ValueError(f"text of at most {TEXT_BYTES_MAX} bytes before and after the *")
    return value


def compared_path(value: object) -> str:
    """Returns the text if it can be the path of a rule. The ValueError says what it must be."""
    text = compared_text(value)
    if text[0] not in "/*" or "?" in text or " " in text:
        raise ValueError("a path without query, such as /healthz, /static/*, *.css or /static/*.css")
    return text


@dataclass(frozen=True, slots=True)
class Pattern:
    """A text with at most one `*`, which stands for any characters."""

    start: str
    end: str | None
    """What follows the `*`; `None`: there is no `*`, the whole text is `start`."""

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        start, star, end = text.partition("*")
        return cls(start, end if star else None)

    def matches(self, text: str) -> bool:
        count = len(text.encode())
        if self.end is None:
            return text == self.start and count <= WHOLE_BYTES_MAX
        if not self.end:
            return text.startswith(self.start)
        return (
            text.startswith(self.start)
            and text.endswith(self.end)
            and len(self.start.encode()) + len(self.end.encode()) <= count <= WHOLE_BYTES_MAX
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """Which requests a rule is about, and what holds for them. What is `None` is as the settings say.

    A request matches if it has one of the values of each condition that is not empty.
    """

    place: str
    """Where the user wrote it."""
    server_name: tuple[str, ...] = ()
    location: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    method: tuple[str, ...] = ()
    user_agent: tuple[str, ...] = ()
    status: tuple[str, ...] = ()
    """Statuses, such as `404`, and classes, such as `5xx`."""
    drop: bool = False
    sampler: "Sampler | None" = None
    sampler_arg: float | None = None
    keep_slower_than: int | None = None
    """Nanoseconds."""
    metrics: bool = True
    span_name: str | None = None
    attributes: tuple[tuple[str, str | bool | int | float], ...] = ()
    service_name: str | None = None

    @property
    def conditions(self) -> dict[str, tuple[str, ...]]:
        """The values of each condition that is not empty."""
        values = {name: getattr(self, name) for name in (*TEXT_KEYS, "status")}
        return {name: value for name, value in values.items() if value}

    @property
    def decides(self) -> bool:
        """Tells whether the rule says which of its requests are sampled."""
        return self.drop or self.sampler is not None

    def __str__(self) -> str:
        """Returns the rule in the words of the file."""
        when = ", ".join(f"{name} {' or '.join(values)}" for name, values in self.conditions.items())
        said = [
            f"{field.name} {_word(field.name, getattr(self, field.name))}"
            for field in fields(self)[len(TEXT_KEYS) + 2 :]
            if getattr(self, field.name) != field.default
        ]
        return f"{when or 'every request'}: {', '.join(said)}"


def _word(name: str, value: object) -> str:
    if name == "keep_slower_than" and isinstance(value, int):
        return f"{value / 1_000_000:g}ms"
    if isinstance(value, tuple):
        return ", ".join(f"{key}={each}" for key, each in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def exclusion(path: str) -> Rule:
    """Returns the rule that `--exclude` stands for."""
    return Rule(f"--exclude {path}", path=(path,), drop=True)
