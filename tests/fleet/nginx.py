"""The configuration of each nginx of a fleet."""

from collections.abc import Mapping
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

_TEXT = """
    include %(examples)s/traceparent.conf;
    include %(examples)s/fleet/access-log.conf;
    upstream app { server %(ipv4)s; keepalive 8; }
    upstream retried { server %(dead1)s max_fails=0; server %(ipv4)s backup; keepalive 8; }
    server {
        listen 127.0.0.1:%(port)d;
        access_log %(logs)s/fleet.log fleet;
        keepalive_requests 1000000;
        location / { proxy_pass http://app; }
        location /broken { proxy_pass http://app; }
        location /slow { proxy_pass http://app; }
        location /retried { proxy_pass http://retried; }
        location /static { return 200 "nginx itself\\n"; }
    }
"""


def http_block(upstream_addresses: Mapping[str, str], port: int, logs: Path) -> str:
    """Return the content of the http block: an application's locations, a retried peer, and the examples' log."""
    return _TEXT % {**upstream_addresses, "examples": EXAMPLES, "port": port, "logs": logs}
