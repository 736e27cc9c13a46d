"""Makes the kernel program read the headers of proxies. Python runs this at its start if PYTHONPATH leads here."""

from otel_nginx_ebpf.planner import sampling

_constants = sampling.constants
sampling.constants = lambda settings: {**_constants(settings), "TRUSTED_PROXIES": 1}
