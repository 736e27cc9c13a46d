"""The counts of connections: of all workers of an nginx, also of those that have ended."""

from otel_nginx_ebpf.metrics.connections import ConnectionCounts, Total

ONE, OTHER = {"service.instance.id": "one"}, {"service.instance.id": "other"}


def resource_of(pid: int) -> dict[str, str]:
    return OTHER if pid == 30 else ONE


def test_accepted_connections_outlive_their_worker() -> None:
    counts = ConnectionCounts()
    counts.tell(1, [(10, 5, 2, 100), (20, 1, 0, 7), (30, 9, 9, 9)], resource_of)
    assert counts.collect() == [(ONE, Total(6, 2, 107)), (OTHER, Total(9, 9, 9))]
    counts.tell(1, [(20, 2, 1, 8), (40, 1, 1, 1)], resource_of)  # 10 and 30 have ended
    assert counts.collect() == [(ONE, Total(3, 2, 109)), (OTHER, Total(0, 0, 9))]


def test_another_attachment_of_the_same_nginx_goes_on() -> None:
    counts = ConnectionCounts()
    counts.tell(1, [(10, 5, 2, 100)], resource_of)
    counts.remove(1)
    assert counts.collect() == [(ONE, Total(0, 0, 100))]
    counts.tell(2, [(10, 5, 2, 1)], resource_of)
    assert counts.collect() == [(ONE, Total(5, 2, 101))]
