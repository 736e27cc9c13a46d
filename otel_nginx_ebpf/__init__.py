"""OpenTelemetry traces of an unmodified, running nginx, by eBPF."""

__version__ = "0.1.0"
