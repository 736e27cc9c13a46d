"""Makes an agent use the tracepoints in TEST_HANDLERS. Python runs this at its start if PYTHONPATH leads here."""

import os

from otel_nginx_ebpf.planner import tracepoints

_HANDLERS = dict(each.split(":") for each in os.environ["TEST_HANDLERS"].split())
tracepoints.handlers = lambda **_: _HANDLERS  # type: ignore[assignment]
