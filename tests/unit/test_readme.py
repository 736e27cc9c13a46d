"""README tells of every setting, attribute, loss and link that there is."""

import re
from pathlib import Path

import pytest

from otel_nginx_ebpf.settings import sources
from otel_nginx_ebpf.traces import attributes
from otel_nginx_ebpf.traces.abi import c_enum

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "otel_nginx_ebpf").rglob("*.py"))


@pytest.mark.parametrize("name", [name for name in sources.Source.model_fields if name != "sdk_disabled"])
def test_settings(name: str) -> None:
    row = re.search(rf"^\| `{sources.flag(name)}\b.* \| (`OTEL_.*) \| `{name}\b.*$", README, re.MULTILINE)
    assert row
    assert re.findall(r"`(OTEL_\w+)", row[1]) == list(sources.variables(name))


@pytest.mark.parametrize("name", sorted(value for key, value in vars(attributes).items() if key.startswith("NGINX_")))
def test_attributes(name: str) -> None:
    assert f"`{name}`" in README


def test_losses() -> None:
    kernel = {name.lower() for name in c_enum("loss")} - {"loss_causes"}
    causes = kernel | set(re.findall(r'(?:\.lose\w*\(|cause=)"(\w+)"', SOURCES))
    assert causes == set(re.findall(r"`((?:lost|partial|began|not)_\w+)`", README)) - {"partial_"}


def test_links() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
