"""A kernel that leaves programs out of tracepoints (otel_nginx_ebpf/planner/tracepoints.py). Our kernel does not.

So the tests attach the program that sees what the other program missed: alone, where the other one misses everything,
and behind another program that misses nothing. `make vm` has a kernel that leaves programs out.
"""

from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess
from e2e.http2_client import Http2Connection, Http2Request
from e2e.kernel_maps import attached_programs
from e2e.stage import Stage
from e2e.timing import ONE_TURN

PHASES = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
HANDLERS = {
    "all": "sched_process_exit:sched_process_exit sys_exit_missed:sys_exit",
    "none": "sched_process_exit:sched_process_exit sys_exit:sys_exit sys_exit_missed:sys_exit",
}


@pytest.fixture(params=HANDLERS)
def agent(request: pytest.FixtureRequest, stage: Stage, tmp_path: Path) -> AgentProcess:
    environment = {"PYTHONPATH": str(Path(__file__).with_name("left_out")), "TEST_HANDLERS": HANDLERS[request.param]}
    agent = AgentProcess(stage.site.nginx.pid, tmp_path, environment=environment)
    assert len(attached_programs(agent)) - len(attached_programs(stage.site.agent)) == (
        0 if request.param == "all" else 1
    )
    return agent


@pytest.mark.nginx(
    server="""
    location / { proxy_pass http://@NAME@; proxy_http_version 1.1; proxy_set_header Connection ""; }
    location /dead { proxy_pass http://@DEAD1@; }
    location /short { return 200 ok; }
    """,
    http="upstream @NAME@ { server @UP@; keepalive 4; }",
)
def test_proxied(stage: Stage, agent: AgentProcess) -> None:
    targets = ["/?delay_ms=30", "/?bytes=100000", "/dead", "/short"] * 5
    with stage.connect() as connection:
        for target in targets:
            assert connection.request(target).status == (502 if target == "/dead" else 200)
    exchanges = stage.match(stage.lines(len(targets)), agent.poll)
    agent.stop()
    assert exchanges[0].trace.outline() == PHASES
    assert exchanges[1].trace.outline() == [name for name in PHASES if name != "upstream connect"]
    assert exchanges[2].trace.outline() == [name for name in PHASES if name != "upstream exchange"]
    assert "lost 0" in agent.stderr()
    stage.exchanges(len(targets))


@pytest.mark.nginx(listen="listen @LISTEN@ http2;", server="location / { proxy_pass http://@UP@; }")
def test_http2(stage: Stage, agent: AgentProcess) -> None:
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    requests = [Http2Request(f"/{index}?bytes={100 * index}&delay_ms={index}") for index in range(50)]
    assert {each.status for each in connection.exchange(requests)} == {200}
    connection.close()
    exchanges = stage.match(stage.lines(len(requests)), agent.poll, ONE_TURN)
    agent.stop()
    assert {tuple(each.trace.outline()) for each in exchanges} == {tuple(PHASES)}
    assert "lost 0" in agent.stderr()
    stage.exchanges(len(requests), ONE_TURN)
