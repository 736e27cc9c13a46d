"""The pages mention every setting, attribute, metric and loss cause, and everything they point to exists."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import registry.document
import typer
import yaml

from otel_nginx_ebpf import cli
from otel_nginx_ebpf.export.resource import SCHEMA_URL
from otel_nginx_ebpf.settings import document, sources
from otel_nginx_ebpf.traces import attributes
from otel_nginx_ebpf.traces.abi import c_enum

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.glob("*.md"))
RECORDS = sorted((DOCS / "decisions").glob("0*.md"))
EVERYTHING = [README, ROOT / "CONTRIBUTING.md", *PAGES, DOCS / "decisions" / "README.md", *RECORDS]
SOURCES = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "otel_nginx_ebpf").rglob("*.py"))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "name",
    [name for name in sources.SettingsSource.model_fields if sources.variables(name)[0].startswith(sources.PREFIX)],
)
def test_settings(name: str) -> None:
    page = _read(DOCS / "configuration.md")
    row = re.search(rf"^\| `{sources.flag(name)}\b.* \| (`OTEL_.*) \| `{name}\b.*$", page, re.MULTILINE)
    assert row
    assert re.findall(r"`(OTEL_\w+)", row[1]) == list(sources.variables(name))


def test_the_table_of_settings_is_that_of_the_program() -> None:
    assert document.table() in _read(DOCS / "configuration.md"), "python -m otel_nginx_ebpf.settings.document prints it"


@pytest.mark.parametrize("name", sorted(value for key, value in vars(attributes).items() if key.startswith("NGINX_")))
def test_attributes(name: str) -> None:
    assert f"`{name}`" in _read(DOCS / "spans-and-attributes.md")


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_the_tables_of_the_registry(path: Path) -> None:
    assert registry.document.written(_read(path)) == _read(path), (
        "PYTHONPATH=tests python -m registry.document writes it"
    )


def test_each_table_of_the_registry_is_in_a_page() -> None:
    found = [name for path in PAGES for name in re.findall(r"^<!-- table ([\w.]+) -->$", _read(path), re.MULTILINE)]
    assert sorted(found) == sorted(registry.document.TABLES)


def test_the_schema() -> None:
    assert SCHEMA_URL in _read(DOCS / "registry.md")


def test_losses() -> None:
    kernel = {name.lower() for name in c_enum("loss")} - {"loss_causes"}
    causes = kernel | set(re.findall(r'(?:\.lose\w*\(|Lost\(|cause=)"(\w+)"', SOURCES))
    first_columns = re.findall(r"^\| (.*?) \|", _read(DOCS / "reliability.md"), re.MULTILINE)
    assert causes == set(re.findall(r"`((?:lost|partial|began|not)_\w+)`", "".join(first_columns)))


@pytest.mark.parametrize("path", EVERYTHING, ids=_name)
def test_links(path: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", _without_code(_read(path))):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def _anchors(path: Path) -> set[str]:
    """Returns the anchors of a page's headings. GitHub and mkdocs agree on letters, digits and single spaces."""
    headings = re.findall(r"^#+ (.*)$", _without_code(_read(path)), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|^    .*?$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", [README, *PAGES], ids=_name)
def test_named_files_are_there(path: Path) -> None:
    named = re.findall(r"`((?:examples|image|probes|tests)/[\w./-]*)`", _read(path))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_pages_link_to_files_of_the_site_only() -> None:
    """The site has the files of docs/ only; a page names other files without a link."""
    outside = [link for path in PAGES for link in re.findall(r"\]\((\.\./[^)]+)\)", _read(path))]
    assert outside == []


def test_readme_is_short() -> None:
    assert len(_read(README).splitlines()) <= 150


def test_every_page_can_be_found() -> None:
    nav = yaml.safe_load(_read(ROOT / "mkdocs.yml"))["nav"]
    pages = {path.name for path in PAGES}
    assert {page for entry in nav for page in entry.values()} == {*pages, "decisions/README.md"}
    assert pages - {"index.md"} <= set(re.findall(r"\]\(docs/([\w-]+\.md)\)", _read(README)))
    assert [path.name for path in RECORDS] == re.findall(r"\]\((0.*?\.md)\)", _read(DOCS / "decisions" / "README.md"))


def _commands() -> Iterator[tuple[str, str]]:
    """Yields each line of indented code with the name of its page."""
    for path in (README, ROOT / "CONTRIBUTING.md", *PAGES):
        text = _read(path).replace("\\\n", " ")
        yield from ((_name(path), line) for line in re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE))


def test_commands_and_flags_exist() -> None:
    group = typer.main.get_command(cli.app)
    known = {
        name: {flag for option in command.params for flag in option.opts} for name, command in group.commands.items()
    }
    wrong = []
    for page, line in _commands():
        if not (match := re.search(r"otel-nginx-ebpf (run|top|record|replay|report|doctor|layouts)\b([^#]*)", line)):
            continue
        flags = set(re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", match[2]))
        wrong += [(page, match[1], flag) for flag in flags - known[match[1]]]
    assert wrong == []


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", _read(ROOT / "Makefile"), re.MULTILINE))
    named = {
        name
        for path in (README, ROOT / "CONTRIBUTING.md", *PAGES)
        for name in re.findall(r"(?:`|^ {4})make ([a-z]+)", _read(path), re.MULTILINE)
    }
    assert {"demo", "test", "docs"} <= named
    assert named <= targets
