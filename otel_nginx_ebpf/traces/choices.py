"""What the user chose about the content of spans."""

from dataclasses import dataclass

from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.settings.rules import Rule
from otel_nginx_ebpf.traces.methods import KNOWN_METHODS


@dataclass(frozen=True, slots=True)
class SpanChoices:
    """The choices, as plain values that can be the key of a cache."""

    query: bool = True
    """Whether to keep the query strings of URIs."""
    known_methods: frozenset[str] = KNOWN_METHODS
    """The methods that spans name."""
    opt_in: frozenset[str] = frozenset()
    """The attributes that spans have although the conventions leave them out by default."""
    trusted_proxies: tuple[str, ...] = ()
    """The networks of proxies whose `Forwarded` and `X-Forwarded-*` headers count."""
    clients_by_method: bool = False
    """Whether CLIENT spans have the names of the semantic conventions instead of their phases' names."""
    rules: tuple[Rule, ...] = ()
    """The rules, of which a request names one by its number."""

    def rule(self, number: int) -> Rule | None:
        """Returns the rule with this number. 0, and numbers that no rule has: none."""
        return self.rules[number - 1] if 0 < number <= len(self.rules) else None


DEFAULT_CHOICES = SpanChoices()


def choices_of(settings: Settings) -> SpanChoices:
    return SpanChoices(
        query=settings.query,
        known_methods=frozenset(settings.known_methods) or KNOWN_METHODS,
        opt_in=frozenset(settings.opt_in_attributes),
        trusted_proxies=settings.trusted_proxy,
        clients_by_method=settings.span_names == "semconv",
        rules=settings.rules,
    )
