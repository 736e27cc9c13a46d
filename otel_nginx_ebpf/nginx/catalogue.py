"""Measured struct layouts by nginx release, in a file that says each fact once; docs/decisions/0003 says why."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.nginx.dwarf import SIZEOF, Structs
from otel_nginx_ebpf.settings.sources import PREFIX

ABOUT = (
    "Byte offsets of nginx struct members on x86-64 Linux, for builds configured --with-compat; sizeof is the struct's "
    "size. Bit-fields have their width behind a colon, and offsets in bits. Offsets in nested structs are relative to "
    "the nested struct. A single number holds for all listed releases. Otherwise each entry holds from its release to "
    "the next entry, in the order of the list; null means not known. The releases of a fork begin with the fork's "
    "name, such as angie-1.12.1."
)

PATH_VARIABLE = PREFIX + "CATALOGUE"

# A release of nginx has three numbers. A release of OpenResty has four: nginx's three and its own.
_RELEASE = r"^(?:[a-z0-9_.-]{1,64}-)?[0-9]{1,4}(?:\.[0-9]{1,4}){1,3}$"

_Offset = int | None


class _File(BaseModel):
    """The JSON file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    about: str
    releases: list[Annotated[str, Field(pattern=_RELEASE)]]
    structs: dict[str, dict[str, int | dict[str, _Offset]]]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Layouts by exact release, such as `1.22.1` or `angie-1.12.1`: first nginx, then each fork, sorted by version."""

    layouts: Mapping[str, Structs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layouts", {release: self.layouts[release] for release in _sorted(self.layouts)})

    def members(self) -> dict[str, set[str]]:
        """Returns every member that any release has, by struct: the members to measure."""
        members: dict[str, set[str]] = {}
        for layout in self.layouts.values():
            for struct, offsets in layout.items():
                members.setdefault(struct, set()).update(offsets)
        return members

    def last_before(self, release: str) -> str | None:
        """Returns the newest known release of the same product that is older than `release`, or None."""
        older = (
            known for known in self.layouts if _product(known) == _product(release) and _key(known) < _key(release)
        )
        return max(older, key=_key, default=None)

    def before_in_branch(self, release: str) -> str | None:
        """Returns the newest known release of the same branch that is older, such as 1.26.3 for 1.26.5, or None."""
        if not is_release(release):
            return None
        last = self.last_before(release)
        return last if last is not None and _branch(last) == _branch(release) else None

    def filled_from(self, other: "Catalogue") -> "Catalogue":
        """Returns this catalogue plus the releases and members that only the other catalogue has."""
        return Catalogue(
            {
                release: _filled(self.layouts.get(release, {}), other.layouts.get(release, {}))
                for release in self.layouts.keys() | other.layouts.keys()
            }
        )

    def text(self) -> str:
        """Returns the text of the JSON file: a line for each member, and a line for the releases of a branch."""
        branches = [
            "  " + ", ".join(f'"{release}"' for release in group) for _, group in groupby(self.layouts, key=_branch)
        ]
        structs = [
            f'  "{struct}": {{\n'
            + ",\n".join(f'   "{member}": {json.dumps(self._changes(struct, member))}' for member in _ordered(members))
            + "\n  }"
            for struct, members in sorted(self.members().items())
        ]
        return (
            f'{{\n "about": {json.dumps(ABOUT)},\n "releases": [\n'
            + ",\n".join(branches)
            + '\n ],\n "structs": {\n'
            + ",\n".join(structs)
            + "\n }\n}\n"
        )

    def _changes(self, struct: str, member: str) -> int | dict[str, _Offset]:
        """Returns one offset if a member has it in all releases, or the new offset for each release that moved it."""
        changes: dict[str, _Offset] = {}
        offset: _Offset = None
        for release, layout in self.layouts.items():
            now = layout.get(struct, {}).get(member)
            if now != offset:
                changes[release] = offset = now
        if len(changes) == 1 and (first := changes.get(next(iter(self.layouts)))) is not None:
            return first
        return changes


def parse(text: str) -> Catalogue:
    """Reads the text of a catalogue. Raises `ValueError` if the text is not a catalogue."""
    file = _File.model_validate_json(text)
    if file.releases != _sorted(set(file.releases)):
        raise ValueError("releases are not sorted by version, or a release is listed twice")
    layouts: dict[str, Structs] = {release: {} for release in file.releases}
    for struct, members in file.structs.items():
        for member, offsets in members.items():
            changes = offsets if isinstance(offsets, dict) else dict.fromkeys(file.releases[:1], offsets)
            if unknown := changes.keys() - layouts.keys():
                raise ValueError(f"{struct}.{member}: release {', '.join(sorted(unknown))} is not in the list")
            offset: _Offset = None
            for release in file.releases:
                offset = changes.get(release, offset)
                if offset is not None:
                    layouts[release].setdefault(struct, {})[member] = offset
    return Catalogue(layouts)


def shipped() -> Catalogue:
    """Returns the catalogue that this package contains."""
    return parse((files("otel_nginx_ebpf.nginx") / "layouts.json").read_text(encoding="utf-8"))


def own_path() -> Path:
    """Returns the path of the user's catalogue: $OTEL_NGINX_EBPF_CATALOGUE, else a file in the XDG data directory."""
    if path := os.environ.get(PATH_VARIABLE):
        return Path(path)
    # Not Path.home(): it fails if a container's user has no home directory.
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "otel-nginx-ebpf" / "layouts.json"


def load(path: Path) -> Catalogue:
    """Reads a user's catalogue. Returns an empty catalogue if the file does not exist.

    Raises:
        UserError: The file cannot be read, or is not a catalogue.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Catalogue()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the layouts in {path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} holds no layouts: {where}: {first['msg']}; `layouts add` makes such files") from None
    except ValueError as error:
        raise UserError(f"{path} holds no layouts: {error}; `layouts add` makes such files") from None


def known(path: Path | None = None) -> Catalogue:
    """Returns the shipped catalogue plus what only the user's has. Raises `UserError` if the user's cannot be read."""
    return shipped().filled_from(load(path or own_path()))


def differences(old: Structs, new: Structs) -> list[str]:
    """Returns a line for each member that moved, is new or is gone, as `ngx_http_request_s.stream: 1272 → 1168`."""
    places = sorted({(struct, member) for layout in (old, new) for struct in layout for member in layout[struct]})
    lines = []
    for struct, member in places:
        before, after = old.get(struct, {}).get(member), new.get(struct, {}).get(member)
        if before != after:
            lines.append(f"{struct}.{member}: {_or_unknown(before)} → {_or_unknown(after)}")
    return lines


def _or_unknown(offset: _Offset) -> str:
    return "unknown" if offset is None else str(offset)


def contradictions(first: Structs, second: Structs) -> list[str]:
    """Returns the differences between two layouts in the members that both have."""
    return differences(
        *(
            {
                struct: {member: offset for member, offset in layout[struct].items() if member in other[struct]}
                for struct in layout.keys() & other.keys()
            }
            for layout, other in ((first, second), (second, first))
        )
    )


def _filled(layout: Structs, other: Structs) -> Structs:
    return {struct: other.get(struct, {}) | layout.get(struct, {}) for struct in sorted(layout.keys() | other.keys())}


def is_release(text: str) -> bool:
    """Tells whether a catalogue can list a release of this name."""
    return re.match(_RELEASE, text) is not None


def _product(release: str) -> str:
    """Returns the product of a release; empty for nginx itself."""
    return release.rpartition("-")[0]


def _key(release: str) -> tuple[str, tuple[int, ...]]:
    product, _, version = release.rpartition("-")
    return product, tuple(int(number) for number in version.split("."))


def _branch(release: str) -> tuple[str, tuple[int, ...]]:
    """Returns the product and all numbers but the last, which counts the releases with the same features."""
    product, version = _key(release)
    return product, version[:-1]


def _sorted(releases: Iterable[str]) -> list[str]:
    return sorted(releases, key=_key)


def _ordered(members: Iterable[str]) -> list[str]:
    return sorted(members, key=lambda member: (member == SIZEOF, member))
