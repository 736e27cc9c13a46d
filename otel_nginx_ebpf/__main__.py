"""The program: `otel-nginx-ebpf`, or `python -m otel_nginx_ebpf`."""

import signal


def main() -> None:
    """As `cli.main`, whose imports take a third of a second: Ctrl-C ends them without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from otel_nginx_ebpf.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
