import os
from pathlib import Path

import pytest

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.settings.rules import Pattern, Rule
from otel_nginx_ebpf.settings.sources import load


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def rules_of(tmp_path: Path, text: str, **flags: object) -> tuple[Rule, ...]:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return load(flags, path).rules


def test_all_keys_in_their_order(tmp_path: Path) -> None:
    text = """
    metrics = true
    [[rules]]
    server_name = "shop.example"
    location = ["/api/", "@fallback"]
    path = "/api/*/cart"
    method = ["GET", "HEAD"]
    user_agent = "kube-probe/*"
    status = ["4xx", 503]
    sampler = "parentbased_traceidratio"
    sampler_arg = 0.25
    keep_slower_than = "1.5s"
    metrics = false
    span_name = "{method} cart"
    attributes = { team = "shop", "slo.target" = 0.5, paid = true }
    service_name = "shop"
    [[rules]]
    drop = false
    """
    place = f"{tmp_path / 'settings.toml'}: rule"
    assert rules_of(tmp_path, text, exclude=["/healthz"]) == (
        Rule("--exclude /healthz", path=("/healthz",), drop=True),
        Rule(
            f"{place} 1",
            server_name=("shop.example",),
            location=("/api/", "@fallback"),
            path=("/api/*/cart",),
            method=("GET", "HEAD"),
            user_agent=("kube-probe/*",),
            status=("4xx", "503"),
            sampler="parentbased_traceidratio",
            sampler_arg=0.25,
            keep_slower_than=1_500_000_000,
            metrics=False,
            span_name="{method} cart",
            attributes=(("team", "shop"), ("slo.target", 0.5), ("paid", True)),
            service_name="shop",
        ),
        Rule(f"{place} 2", drop=False),
    )


def test_no_rules(tmp_path: Path) -> None:
    assert load({}).rules == ()
    assert rules_of(tmp_path, "rules = []") == ()


def test_exclusions_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_NGINX_EBPF_EXCLUDE", "/healthz, /static/*.css")
    assert [rule.path for rule in load({}).rules] == [("/healthz",), ("/static/*.css",)]


@pytest.mark.parametrize("path", ["healthz", "/a?b", "/a*b*c", "*", "/" + "a" * 128, "/a b"])
def test_an_exclusion_that_is_no_path(path: str) -> None:
    with pytest.raises(
        UserError, match=r"--exclude \(OTEL_NGINX_EBPF_EXCLUDE, exclude in the TOML file\) must be paths"
    ):
        load({"exclude": [path]})


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        ('pfad = "/"', "unknown key 'pfad'; known are server_name, location, path,", ""),
        ('path = "healthz"', "path", "a path without query, such as /healthz"),
        ('path = "/a?b=c"', "path", "a path without query"),
        ('path = "/*/a/*"', "path", "at most one *; give several texts as a list, or end the text at its first *"),
        ('path = "*"', "path", "text, with at most one *"),
        ("path = 3", "path", "text, with at most one *"),
        ("path = []", "path", "one value or a list of values"),
        (f'path = "/{"a" * 128}"', "path", "at most 128 bytes"),
        (f'user_agent = "a*{"é" * 65}"', "user_agent", "at most 128 bytes"),
        ('user_agent = ""', "user_agent", "text"),
        ('server_name = "a\\u0000"', "server_name", "text"),
        ('method = "GET*"', "method", "a method of at most 16 characters, such as GET"),
        ('method = "A B"', "method", "a method"),
        ('status = "6xx"', "status", "a status, such as 404, or a class, such as 5xx"),
        ("status = true", "status", "a status"),
        ("status = [200, 20]", "status", "a status"),
        ('drop = "yes"', "drop", "true or false"),
        ('metrics = 1\npath = "/"', "metrics", "true or false"),
        ('sampler = "half"', "sampler", "one of always_on, "),
        ("sampler_arg = 2", "sampler_arg", "a number from 0 to 1"),
        ("sampler_arg = nan", "sampler_arg", "a number from 0 to 1"),
        ('sampler = "traceidratio"', "sampler", "traceidratio needs the key sampler_arg"),
        (
            'sampler = "always_on"\nsampler_arg = 0.5',
            "sampler_arg",
            "needs a sampler with traceidratio in the same rule",
        ),
        ("keep_slower_than = 500", "keep_slower_than", "a number and its unit"),
        ('keep_slower_than = "0s"', "keep_slower_than", "a number and its unit"),
        ('span_name = " "', "span_name", "text"),
        ("attributes = {}", "attributes", "a table of constants"),
        ('attributes = "team"', "attributes", "a table of constants"),
        ('attributes = { Team = "x" }', "attributes", "'Team' is not the name of one"),
        ('attributes = { a.b = "x" }', "attributes", "a is something else"),
        ('attributes = { "http.route" = "/x" }', "attributes", "http.route would look like a fact"),
        ("attributes = { number = 9223372036854775808 }", "attributes", "number is something else"),
        ("service_name = 1", "service_name", "text"),
        ('drop = true\nspan_name = "x"', "drop", "what is dropped has no span_name"),
        ('path = "/"', "says nothing about its requests", ""),
        ("", "says nothing about its requests", ""),
    ],
)
def test_a_wrong_rule_gets_one_line_with_file_rule_and_key(tmp_path: Path, keys: str, key: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        rules_of(tmp_path, f"[[rules]]\ndrop = true\n[[rules]]\n{keys}")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'settings.toml'}: rule 2")
    assert f" {key}" in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["rules = 3", 'rules = ["/a"]', "[rules]\ndrop = true"])
def test_rules_that_are_no_tables(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"settings\.toml: rules must be tables .* write \[\[rules\]\]"):
        rules_of(tmp_path, text)


def test_there_may_be_32_rules_and_128_values(tmp_path: Path) -> None:
    assert len(rules_of(tmp_path, "[[rules]]\ndrop = true\n" * 31, exclude=["/a"])) == 32
    with pytest.raises(UserError, match=r"settings\.toml: rule 32 is one too many: there may be 32 rules"):
        rules_of(tmp_path, "[[rules]]\ndrop = true\n" * 32, exclude=["/a"])
    one = f"[[rules]]\ndrop = true\nmethod = {['GET'] * 64}\n"
    assert len(rules_of(tmp_path, one * 2)) == 2
    with pytest.raises(UserError, match=r"rule 3: all rules together may compare 128 values"):
        rules_of(tmp_path, one * 2 + '[[rules]]\ndrop = true\npath = "/"')


@pytest.mark.parametrize(
    ("way", "text", "refused"),
    [
        ("off", 'status = "4xx"\ndrop = true', False),
        ("socket", 'status = "4xx"\ndrop = true', True),
        ("socket", 'status = "4xx"\nkeep_slower_than = "1s"', False),
        ("socket", 'status = "4xx"\nspan_name = "x"\n[[rules]]\nsampler = "always_off"', True),
        ("socket", 'location = "/"\ndrop = true', False),
        ("memory", 'location = "/"\ndrop = true', True),
        ("auto", 'location = "/"\ndrop = true', True),
        ("auto", '[[rules]]\npath = "/"\ndrop = true\n[[rules]]\nlocation = "/"\nservice_name = "x"'[10:], False),
    ],
)
def test_what_is_told_must_be_known_when_it_is_told(tmp_path: Path, way: str, text: str, refused: bool) -> None:
    text = f"[[rules]]\n{text}"
    if not refused:
        assert rules_of(tmp_path, text, propagate=way)
        return
    with pytest.raises(UserError, match=rf"rule 1, (status|location): --propagate={way} tells the decision before"):
        rules_of(tmp_path, text, propagate=way)


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("/a", "/a", True),
        ("/a", "/ab", False),
        ("/a*", "/a", True),
        ("/a*", "/", False),
        ("*.css", "/x/y.css", True),
        ("*.css", ".css", True),
        ("/ab*ba", "/aba", False),
        ("/ab*ba", "/abba", True),
        ("/ab*ba", "/ab/c/ba", True),
        ("/*", "/" + "x" * 600, True),
        ("*x", "/" + "x" * 510, True),
        ("*x", "/" + "x" * 511, False),
    ],
)
def test_patterns(pattern: str, text: str, matches: bool) -> None:
    assert Pattern.parse(pattern).matches(text) == matches


def test_a_rule_in_words() -> None:
    rule = Rule("", path=("/a", "/b*"), status=("5xx",), keep_slower_than=1_500_000_000, metrics=False)
    assert str(rule) == "path /a or /b*, status 5xx: keep_slower_than 1500ms, metrics false"
    assert str(Rule("", drop=True)) == "every request: drop true"
