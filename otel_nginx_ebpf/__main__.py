"""`python -m otel_nginx_ebpf`."""

from otel_nginx_ebpf.cli import main

main()
