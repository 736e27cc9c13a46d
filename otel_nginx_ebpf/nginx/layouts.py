"""Where nginx keeps its facts: byte offsets of struct members, by release."""

import json
from dataclasses import dataclass
from importlib.resources import files

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.nginx.binary import Binary


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes by struct and member; `sizeof` is the struct's size. `source` says where they are from."""

    structs: dict[str, dict[str, int]]
    source: str


def layout_for(binary: Binary) -> Layout:
    """The layout of a binary, by its exact release: stable branches receive changes that move members.

    Raises:
        UserError: none is known.
    """
    catalogue = json.loads((files("otel_nginx_ebpf.nginx") / "layouts.json").read_text(encoding="utf-8"))
    releases: dict[str, dict[str, dict[str, int]]] = catalogue["releases"]
    if not binary.with_compat:
        raise UserError(
            f"the struct layout of {binary.name} (nginx {binary.version}) is unknown: it was configured without "
            "--with-compat, and its options move the members; use a build of a distribution or of nginx.org"
        )
    if binary.version not in releases:
        raise UserError(
            f"the struct layout of nginx {binary.version} ({binary.name}) is unknown; known: {', '.join(releases)}"
        )
    return Layout(releases[binary.version], source="catalogue")
