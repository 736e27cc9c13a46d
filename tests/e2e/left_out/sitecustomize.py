"""Python runs this as it starts where PYTHONPATH leads here: an agent's tracepoints are then those of TEST_HANDLERS."""

import os

from otel_nginx_ebpf.planner import tracepoints

_HANDLERS = dict(each.split(":") for each in os.environ["TEST_HANDLERS"].split())
tracepoints.handlers = lambda **_: _HANDLERS  # type: ignore[assignment]
