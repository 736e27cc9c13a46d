"""The choice of attributes: the kernel's keys lose what the chosen attributes do not need, and nothing else."""

import ctypes
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry.reader import own

from otel_nginx_ebpf.metrics.choices import constants, metric_choices_of
from otel_nginx_ebpf.metrics.series import CLIENT_KEY, LIMITS, SERVER_KEY, of_client_key, of_server_key
from otel_nginx_ebpf.metrics.totals import Series
from otel_nginx_ebpf.settings.model import MetricsAttribute, Settings
from otel_nginx_ebpf.traces.abi import CStruct
from otel_nginx_ebpf.traces.record import CACHE_STATUSES, ENDINGS, HTTP_VERSIONS, OUTCOMES
from unit.c_compiler import compile_library

PROBES = Path(__file__).parents[3] / "probes"
NAMES: tuple[MetricsAttribute, ...] = get_args(MetricsAttribute)
PEER = b"127.0.0.1:80"

_SOURCE = r"""
#include <linux/types.h>
#include "record.h"
#include "metrics.h"

void choose(u8 *server, u8 *client)
{
    choose_server_series((struct server_series *)server);
    choose_client_series((struct client_series *)client);
}
"""

CHOICES: list[tuple[MetricsAttribute, ...]] = [
    (),
    *((name,) for name in NAMES),
    ("http.response.status_code", "http.route", "url.scheme"),
    tuple(islice(NAMES, 1, None, 2)),
]


def name_of(pid: int, configuration: int) -> str | None:
    return {1: "/api/", 2: "backend"}.get(configuration)


def keys(kind: CStruct, **values: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    fields = [values.get(name, st.just(0)) for _, name in kind.fields]
    return st.tuples(*fields).map(lambda numbers: kind.struct.pack(*numbers))


METHODS = st.sampled_from([0, 1, 2, 8, 0x400])
CONFIGURATIONS = st.sampled_from([0, 1, 2])
STATUSES = st.sampled_from([0, 9, 200, 404, 499, 502])
SERVER = keys(
    SERVER_KEY,
    method=METHODS,
    location=CONFIGURATIONS,
    server=CONFIGURATIONS,
    http_version=st.sampled_from(sorted(HTTP_VERSIONS)),
    ending=st.sampled_from(sorted(ENDINGS)),
    cache_status=st.sampled_from([0, *CACHE_STATUSES]),
    status=STATUSES,
    tls=st.sampled_from([0, 1]),
)
CLIENT = keys(
    CLIENT_KEY,
    method=METHODS,
    upstream=CONFIGURATIONS,
    status=STATUSES,
    connect_errno=st.sampled_from([0, 111]),
    no_header=st.sampled_from([0, 1]),
    peer_bytes=st.just(len(PEER)),
    outcome=st.sampled_from(sorted(OUTCOMES)),
)


def only(series: Series, names: frozenset[str]) -> Series:
    return Series(series.metric, tuple((name, value) for name, value in series.attributes if name in names))


@pytest.mark.parametrize("chosen", CHOICES, ids=",".join)
def test_the_kernel_keeps_what_the_chosen_attributes_need(chosen: tuple[MetricsAttribute, ...]) -> None:
    settings = Settings(metrics_attributes=chosen)
    defined = {"REQUEST_METRICS": 1, **constants(settings)}
    library = compile_library("".join(f"#define {name} {value}\n" for name, value in defined.items()) + _SOURCE,
                              [PROBES / "stub_headers" / "include", PROBES])  # fmt: skip
    choices, everything = metric_choices_of(settings), metric_choices_of(Settings())

    @given(SERVER, CLIENT)
    def agree(server: bytes, client: bytes) -> None:
        raw = ctypes.create_string_buffer(server, len(server)), ctypes.create_string_buffer(client, len(client))
        library.choose(*raw)
        peer = (PEER if defined["SERIES_BY_PEER"] else b"").ljust(LIMITS["PEER_BYTES_MAX"], b"\0")
        kept = of_server_key(raw[0].raw, name_of, choices), of_client_key(raw[1].raw + peer, name_of, choices)
        all_peer = PEER.ljust(LIMITS["PEER_BYTES_MAX"], b"\0")
        unparsed = SERVER_KEY.struct.unpack(server)[1] == 0
        told_server = of_server_key(server, name_of, everything)
        if unparsed:
            told_server = only(told_server, frozenset(NAMES) - {"network.protocol.version"})
        told = told_server, of_client_key(client + all_peer, name_of, everything)
        assert kept == tuple(only(series, choices.attributes) for series in told)

    agree()


def test_every_attribute_of_the_metrics_can_be_chosen() -> None:
    groups = (own().groups[f"metric.nginx.http.{side}.request.duration"] for side in ("server", "client"))
    assert {name for group in groups for name in group.attributes} - {"otel.metric.overflow"} == set(NAMES)
    assert list(NAMES) == sorted(NAMES)
