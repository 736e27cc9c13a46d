"""The channel between supervisor and emitter, over real sockets."""

import os
from contextlib import closing

import pytest

from otel_nginx_ebpf.process.channel import EmitterEnd, EmitterGoneError, SupervisorEnd, make_channel
from otel_nginx_ebpf.process.messages import (
    Abandoned,
    Alive,
    Attached,
    Belongs,
    EmitterReport,
    End,
    Kind,
    Lost,
    Measured,
    Order,
    Retired,
)

ORDERS: list[Order] = [
    Attached(1, "nginx 1.22.1 /usr/sbin/nginx", "catalogue"),
    Abandoned(),
    Alive(1, [7, 8]),
    Measured(1, None, {"sys_exit": 12.5}, False),
    Measured(1, 4_200, {}, True),
    Lost("lost_worker_gone", 3),
    Belongs(1, 7, {"service.version": "1.22.1", "process.pid": 6}),
    Retired(1),
    End(9.5),
]


@pytest.fixture
def ends() -> tuple[SupervisorEnd, EmitterEnd]:
    supervisor, theirs = make_channel()
    return supervisor, EmitterEnd(theirs.detach())


def test_every_order_arrives_as_it_was_sent(ends: tuple[SupervisorEnd, EmitterEnd]) -> None:
    supervisor, emitter = ends
    with closing(supervisor), closing(emitter._socket):
        assert {type(order) for order in ORDERS} == set(Order.__args__)
        for order in ORDERS:
            supervisor.tell(order)
        assert emitter.orders(5) == ORDERS


@pytest.mark.parametrize(
    "order", [Attached(1, "nginx", "DWARF", (0,)), Abandoned((0,))], ids=lambda o: type(o).__name__
)
def test_descriptors_arrive_open(ends: tuple[SupervisorEnd, EmitterEnd], order: Attached | Abandoned) -> None:
    supervisor, emitter = ends
    with closing(supervisor), closing(emitter._socket):
        supervisor.tell(order)
        (arrived,) = emitter.orders(5)
        assert isinstance(arrived, Attached | Abandoned)
        (descriptor,) = arrived.descriptors
        assert os.fstat(descriptor).st_ino == os.fstat(0).st_ino
        os.close(descriptor)


def test_an_answer_overtakes_what_came_before_it(ends: tuple[SupervisorEnd, EmitterEnd]) -> None:
    supervisor, emitter = ends
    with closing(supervisor), closing(emitter._socket):
        supervisor.tell(Retired(2))
        supervisor.tell(Belongs(1, 7, {"process.pid": 6}))
        assert emitter.ask_whose(1, 7) == Belongs(1, 7, {"process.pid": 6})
        assert supervisor.reports(5) == [EmitterReport(Kind.WHOSE, 1, 7)]
        assert emitter.orders(5) == [Retired(2)]


@pytest.mark.parametrize("sent", [b"x", b"\xff" * 12, bytes(13)])
def test_what_is_no_report_is_refused(ends: tuple[SupervisorEnd, EmitterEnd], sent: bytes) -> None:
    supervisor, emitter = ends
    with closing(supervisor), closing(emitter._socket):
        emitter._socket.send(sent)
        with pytest.raises(EmitterGoneError, match="it sent"):
            supervisor.reports(5)


def test_each_end_notices_that_the_other_is_gone(ends: tuple[SupervisorEnd, EmitterEnd]) -> None:
    supervisor, emitter = ends
    with closing(emitter._socket):
        supervisor.close()
        assert emitter.orders(5) == []
        assert emitter.ended
    supervisor, theirs = make_channel()
    with closing(supervisor):
        theirs.close()
        with pytest.raises(EmitterGoneError):
            supervisor.tell(Retired(1))
        with pytest.raises(EmitterGoneError):
            supervisor.reports(5)
