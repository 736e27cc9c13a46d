"""Completion as a user sees it: by the shell itself, in a terminal."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.agent_process import PROGRAM
from e2e.terminal import Terminal

SHELLS = {"bash": "bash --norc --noprofile", "zsh": "zsh -f"}
BEFORE = {"bash": "true", "zsh": "autoload -Uz compinit && compinit -u -D"}


TYPED = {
    "otel-nginx-ebpf doc": "otel-nginx-ebpf doctor",
    "otel-nginx-ebpf run --keep-e": "otel-nginx-ebpf run --keep-errors",
    "otel-nginx-ebpf run --exporter cons": "otel-nginx-ebpf run --exporter console",
    "otel-nginx-ebpf run --sampler parentbased_t": "otel-nginx-ebpf run --sampler parentbased_traceidratio",
    "otel-nginx-ebpf top --sort tran": "otel-nginx-ebpf top --sort transfer",
    "otel-nginx-ebpf layouts l": "otel-nginx-ebpf layouts list",
    "otel-nginx-ebpf replay day.c": "otel-nginx-ebpf replay day.capture",
}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    """With the program in $PATH and its completion, as it says itself."""
    found = Terminal(tmp_path, SHELLS[request.param])
    found.type(f"cd {tmp_path}; PATH={PROGRAM.parent}:$PATH; touch day.capture; {BEFORE[request.param]}", "Enter")
    found.type('eval "$(otel-nginx-ebpf --show-completion)"; echo is"" ready', "Enter")
    found.wait_for("^is ready", 30)
    yield found
    found.close()


def test_tab(shell: Terminal) -> None:
    for typed, completed in TYPED.items():
        shell.type("C-u")
        shell.type("-l", typed)
        shell.type("Tab")
        shell.wait_for(rf"{completed}\b")
