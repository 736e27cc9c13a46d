"""The workers' counts become totals of an nginx: each request counts once, and no count comes from a wrong layout."""

from collections.abc import Collection, Iterator

import pytest

from otel_nginx_ebpf.metrics import totals
from otel_nginx_ebpf.metrics.totals import OVERFLOW, Counts, RequestDurations, Series

METRIC = "http.server.request.duration"
ONE = (5, 1, 0)
EDGE = {"service.instance.id": "edge"}


class WorkersCounts:
    """The kernel's maps, as numbers: a key is the worker's pid and a route."""

    def __init__(self, **counts: Counts) -> None:
        self.counts = {name.encode(): each for name, each in counts.items()}

    def read(self) -> Iterator[tuple[int, bytes, Counts]]:
        for key, counts in self.counts.items():
            yield int(key[1:2]), key, counts

    def series(self, key: bytes) -> Series:
        return Series(METRIC, (("http.route", key[2:].decode()),))

    def forget(self, pids: Collection[int]) -> None:
        self.counts = {key: counts for key, counts in self.counts.items() if int(key[1:2]) not in pids}


def of_edge(pid: int) -> dict[str, str]:
    return EDGE


def told(subject: RequestDurations) -> dict[str, Counts]:
    """By route."""
    return {str(series.attributes[0][1]): counts for _, series, counts in subject.collect()}


def attached(maps: WorkersCounts, alive: Collection[int] = (1, 2)) -> RequestDurations:
    subject = RequestDurations()
    subject.add(maps, of_edge)
    subject.sweep(maps, alive)
    subject.sweep(maps, alive)
    return subject


def test_workers_add_up() -> None:
    subject = attached(WorkersCounts(w1a=(5, 1, 0), w2a=(70, 1, 2), w2b=(9, 0, 1), w2c=(0, 0, 0)))
    assert told(subject) == {"a": (75, 2, 2), "b": (9, 0, 1)}
    assert [resource for resource, _, _ in subject.collect()] == [EDGE, EDGE]


def test_a_worker_that_ended_counts_once() -> None:
    maps = WorkersCounts(w1a=(5, 1, 0), w2a=(70, 1, 2))
    subject = attached(maps)
    maps.counts[b"w1a"] = (6, 2, 0)
    subject.sweep(maps, {2})
    assert list(maps.counts) == [b"w1a", b"w2a"], "it may be younger than the news of who lives"
    subject.sweep(maps, {2})
    assert list(maps.counts) == [b"w2a"]
    assert told(subject) == {"a": (76, 3, 2)}
    maps.counts[b"w3a"] = ONE
    subject.sweep(maps, {2, 3})
    assert told(subject) == {"a": (81, 4, 2)}


def test_nothing_is_told_before_its_names_are_known() -> None:
    maps = WorkersCounts()
    subject = attached(maps)
    maps.counts[b"w1a"] = ONE
    assert told(subject) == {}
    subject.sweep(maps, {1})
    assert told(subject) == {"a": ONE}


def test_what_is_let_go_is_kept() -> None:
    maps = WorkersCounts(w1a=ONE)
    subject = attached(maps)
    subject.remove(maps)
    assert told(subject) == {"a": ONE}


def test_an_nginx_that_is_attached_to_anew_goes_on_where_it_was() -> None:
    maps, later = WorkersCounts(w1a=ONE), WorkersCounts(w1a=(7, 0, 1))
    subject = attached(maps)
    subject.remove(maps)
    subject.add(later, lambda pid: dict(EDGE))
    subject.sweep(later, {1})
    subject.sweep(later, {1})
    assert told(subject) == {"a": (12, 1, 1)}


def test_an_nginx_that_ended_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = WorkersCounts(w1a=ONE)
    subject = attached(maps)
    subject.sweep(maps, ())
    assert told(subject) == {"a": ONE}
    monkeypatch.setattr(totals, "TOLD_S", -1.0)
    subject.sweep(maps, ())
    assert told(subject) == {}


def test_more_series_than_a_metric_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "_SERIES_MAX", 3)
    subject = attached(WorkersCounts(w1a=ONE, w1b=ONE, w1c=ONE, w2d=ONE, w2a=ONE))
    assert {series.attributes: counts for _, series, counts in subject.collect()} == {
        (("http.route", "a"),): (10, 2, 0),
        (("http.route", "b"),): ONE,
        OVERFLOW: (10, 2, 0),
    }
