"""Layouts without the members that some builds lack: the kernel program still compiles and attaches."""

from dataclasses import replace
from pathlib import Path

import pytest

from e2e.nginx_server import NginxServer
from otel_nginx_ebpf.kernel.attachment import Attachment
from otel_nginx_ebpf.nginx.processes import instance_of
from otel_nginx_ebpf.planner.plan import make_plan
from otel_nginx_ebpf.settings.sources import load

NEWER = {
    ("ngx_connection_s", "proxy_protocol"),
    ("ngx_http_upstream_state_t", "bytes_sent"),
    ("ngx_table_elt_t", "next"),
}
LACKING = {
    "http2": lambda struct, member: struct.startswith("ngx_http_v2_"),
    "tls": lambda struct, member: (struct, member) == ("ngx_connection_s", "ssl"),
    "newer members": lambda struct, member: (struct, member) in NEWER,
}


@pytest.mark.parametrize("what", LACKING)
def test_a_build_without_it_is_attached_to(public_directory: Path, tmp_path: Path, what: str) -> None:
    prefix = public_directory / tmp_path.name
    prefix.mkdir()
    nginx = NginxServer(prefix, "")
    nginx.start([])
    try:
        settings = load({"pid": [nginx.pid], "metrics_listen": "127.0.0.1:9464", "adopt_upstream_context": True})
        plan = make_plan((instance_of(nginx.pid),), settings)
        structs = {
            struct: {member: at for member, at in members.items() if not LACKING[what](struct, member)}
            for struct, members in plan.layout.structs.items()
        }
        assert structs != plan.layout.structs
        chosen = tuple(each for each in plan.chosen if "_v2_" not in each[1].function or what != "http2")
        lesser = replace(plan, layout=replace(plan.layout, structs=structs), chosen=chosen)
        Attachment(lesser.load_request(settings).to_json().encode()).close()
    finally:
        nginx.stop()
