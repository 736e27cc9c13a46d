"""`make bench` compares with a module of nginx: here one of Debian's, which adds a header instead of tracing."""

import urllib.request
from pathlib import Path

import pytest

from bench.site import SCENARIOS, Module, ModuleError, Site

MODULE = Path("/usr/lib/nginx/modules/ngx_http_headers_more_filter_module.so")
DIRECTIVES = "more_set_headers 'X-Module: here';"


def test_a_module_runs_in_the_nginx_under_load(directory: Path) -> None:
    with Site(directory, Module(MODULE, DIRECTIVES)) as site:
        before = site.counts()
        with urllib.request.urlopen(site.url(SCENARIOS["static"])) as response:
            assert response.headers["X-Module"] == "here"
        after = site.counts()
    assert after.requests == before.requests + 2
    assert before.cpu_ns < after.cpu_ns == after.main_thread_cpu_ns


@pytest.mark.parametrize(
    ("path", "directives", "said"),
    [
        (Path("/missing.so"), "", r'dlopen\(\) "/missing.so" failed'),
        (MODULE, "otel_trace on;", 'unknown directive "otel_trace"'),
    ],
)
def test_a_module_that_nginx_refuses_is_told_in_nginx_words(
    directory: Path, path: Path, directives: str, said: str
) -> None:
    with pytest.raises(ModuleError, match=said):
        Site(directory, Module(path, directives))
