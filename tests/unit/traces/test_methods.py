"""Which methods spans and series name."""

from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.traces.choices import SpanChoices, choices_of
from otel_nginx_ebpf.traces.methods import KNOWN_METHODS, OTHER_METHOD, counted_method, known_method, method_of_bit
from otel_nginx_ebpf.traces.record import METHODS

names = st.sampled_from([*sorted(KNOWN_METHODS), "PROPFIND", "UNLOCK", "BREW", "get", ""]) | st.text()


@given(names | st.none(), st.frozensets(names))
def test_a_name_is_known_exactly_or_other(method: str | None, known: frozenset[str]) -> None:
    assert known_method(method, known) == (method if method in known else OTHER_METHOD)


@given(st.integers(0, 2**32 - 1) | st.sampled_from([1 << shift for shift in range(32)]), st.frozensets(names))
def test_a_series_has_one_name_for_a_number_and_for_its_method(bit: int, known: frozenset[str]) -> None:
    """The kernel counts by the number, and an exemplar is found by the name."""
    method = method_of_bit(bit)
    assert counted_method(method, known) == known_method(method, known)


def test_methods_without_a_number_are_counted_together() -> None:
    known = frozenset({"BREW", "PROPFIND", "GET"})
    assert [counted_method(each, known) for each in ("BREW", "PROPFIND", "GET", "POST", None)] == [
        OTHER_METHOD,
        "PROPFIND",
        "GET",
        OTHER_METHOD,
        OTHER_METHOD,
    ]


def test_nginx_numbers() -> None:
    assert {bit: method_of_bit(bit) for bit in METHODS} == METHODS
    assert [method_of_bit(bit) for bit in (0, 1, 0x400, 0x10000, 1 << 31)] == [None, None, "PROPFIND", "CONNECT", None]


def test_settings_become_choices() -> None:
    settings = Settings(query=False, opt_in_attributes=("client.port",), trusted_proxy=("unix:",), span_names="semconv")
    assert choices_of(settings) == SpanChoices(False, KNOWN_METHODS, frozenset({"client.port"}), ("unix:",), True)
    assert choices_of(Settings()) == SpanChoices()


def test_without_a_list_the_conventions_decide() -> None:
    assert choices_of(Settings()).known_methods == KNOWN_METHODS
    assert choices_of(Settings(known_methods=("BREW",))).known_methods == {"BREW"}
