import os
from pathlib import Path

import pytest

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.settings import sources
from otel_nginx_ebpf.settings.sources import SettingsSource, load


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    settings = load({})
    assert settings.exporter == ("otlp",)
    assert (settings.pid, settings.binary, settings.output) == ((), (), None)
    assert (settings.ring_buffer_mib, settings.max_active_requests) == (16, 16384)
    assert (settings.queue_size, settings.batch_size, settings.batch_delay_ms) == (262144, 4096, 5000)
    assert settings.query is True
    assert settings.otlp_protocol == "grpc"
    assert (settings.sampler, settings.sampler_arg) == ("parentbased_always_on", 1.0)
    assert settings.propagators == ("tracecontext",)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, "ring_buffer_mib = 2\nmax_active_requests = 200\nbatch_size = 3\nquery = false\npid = [7]")
    monkeypatch.setenv("OTEL_NGINX_EBPF_RING_BUFFER_MIB", "4")
    monkeypatch.setenv("OTEL_NGINX_EBPF_MAX_ACTIVE_REQUESTS", "400")
    settings = load({"ring_buffer_mib": "8", "color": None}, path)
    assert settings.ring_buffer_mib == 8
    assert settings.max_active_requests == 400
    assert settings.batch_size == 3
    assert settings.query is False
    assert settings.pid == (7,)
    assert settings.color == "auto"


def test_the_file_may_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_NGINX_EBPF_CONFIG", str(toml(tmp_path, "grace_seconds = 2.5")))
    assert load({}).grace_seconds == 2.5


@pytest.mark.parametrize(
    ("name", "own", "standard", "text", "value"),
    [
        ("queue_size", "OTEL_NGINX_EBPF_QUEUE_SIZE", "OTEL_BSP_MAX_QUEUE_SIZE", "9", 9),
        ("batch_size", "OTEL_NGINX_EBPF_BATCH_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "9", 9),
        ("batch_delay_ms", "OTEL_NGINX_EBPF_BATCH_DELAY_MS", "OTEL_BSP_SCHEDULE_DELAY", "9", 9),
        (
            "otlp_protocol",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "http/protobuf",
            "http/protobuf",
        ),
    ],
)
def test_standard_variables_count_and_the_more_special_one_wins(
    name: str, own: str, standard: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    default = SettingsSource.model_fields[name].default
    path = toml(tmp_path, f"{name} = {default!r}")
    monkeypatch.setenv(standard, text)
    assert getattr(load({}, path), name) == value
    monkeypatch.setenv(own, str(default))
    assert getattr(load({}, path), name) == default
    assert getattr(load({name: text}, path), name) == value


def test_the_standard_variable_of_known_methods_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load({}).known_methods == ()
    monkeypatch.setenv("OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS", "GET,PROPFIND, brew")
    assert load({}).known_methods == ("GET", "PROPFIND", "brew")
    monkeypatch.setenv("OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS", "GET,NO METHOD")
    with pytest.raises(UserError, match=r"OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS.* must be methods"):
        load({})


def test_trusted_proxies_are_networks_addresses_and_unix_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_NGINX_EBPF_TRUSTED_PROXY", "10.1.2.3/8, 2001:db8::/32,127.0.0.1,unix:")
    assert load({}).trusted_proxy == ("10.1.2.3/8", "2001:db8::/32", "127.0.0.1", "unix:")
    with pytest.raises(UserError, match=r"--trusted-proxy .* must be networks or addresses, .*; it is '10\.0/8'"):
        load({"trusted_proxy": ["10.0/8"]})


def test_captured_headers_are_lists_with_commas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prefix = "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS"
    monkeypatch.setenv(f"{prefix}_SERVER_REQUEST", "X-Tenant, Accept")
    monkeypatch.setenv(f"{prefix}_SERVER_RESPONSE", "ETag")
    monkeypatch.setenv(f"{prefix}_SANITIZE_FIELDS", ".*session.*,set-cookie")
    settings = load({})
    assert settings.capture_request_headers == ("x-tenant", "accept")
    assert settings.capture_response_headers == ("etag",)
    assert settings.sanitize_headers == (".*session.*", "set-cookie")
    assert load({"capture_request_headers": ["a,B", "c"]}).capture_request_headers == ("a", "b", "c")
    monkeypatch.delenv(f"{prefix}_SERVER_REQUEST")
    path = toml(tmp_path, 'capture_request_headers = ["Via", "x-a, x-b"]')
    assert load({}, path).capture_request_headers == ("via", "x-a", "x-b")
    monkeypatch.setenv(f"{prefix}_SERVER_REQUEST", "X-.*")
    with pytest.raises(UserError, match=r"SERVER_REQUEST.* must be names of headers, not patterns: .*; it is 'x-\.\*'"):
        load({})


def test_the_standard_variables_of_sampling_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.125")
    monkeypatch.setenv("OTEL_PROPAGATORS", "b3multi,tracecontext, baggage")
    settings = load({})
    assert (settings.sampler, settings.sampler_arg) == ("traceidratio", 0.125)
    assert settings.propagators == ("b3multi", "tracecontext", "baggage")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "jaeger_remote")
    with pytest.raises(
        UserError, match=r"OTEL_TRACES_SAMPLER.*always_on, always_off, traceidratio, parentbased_always_on"
    ):
        load({})


@pytest.mark.parametrize("name", SettingsSource.model_fields)
def test_a_variable_of_another_program_is_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load({})
    monkeypatch.setenv(name.upper(), "7")
    monkeypatch.setenv(name, "7")
    assert load({}) == before


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "")
    assert load({}).queue_size == 262144


def test_a_list_in_a_variable_is_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_NGINX_EBPF_PID", "12, 34")
    monkeypatch.setenv("OTEL_NGINX_EBPF_EXPORTER", "console,otlp")
    monkeypatch.setenv("OTEL_NGINX_EBPF_BINARY", "/usr/sbin/nginx")
    settings = load({})
    assert settings.pid == (12, 34)
    assert settings.exporter == ("console", "otlp")
    assert settings.binary == (Path("/usr/sbin/nginx"),)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in SettingsSource.model_fields
        if name not in ("output", "binary", "queue_dir", "known_methods", "sanitize_headers")
    ],
)
def test_a_wrong_value_gets_one_line_with_flag_variable_and_what_is_allowed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = sources.variables(name)[0]
    monkeypatch.setenv(variable, "-7.x")
    with pytest.raises(UserError) as caught:
        load({})
    message = str(caught.value)
    assert sources.flag(name) in message
    assert variable in message
    assert str(SettingsSource.model_fields[name].examples[0]) in message  # type: ignore[index]
    assert message.endswith("it is '-7.x'")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ring_buffer_mib", "3"),
        ("ring_buffer_mib", "512"),
        ("ring_buffer_mib", "0"),
        ("pid", ["0"]),
        ("pid", ["1", "one"]),
        ("exporter", ["otlp", "jaeger"]),
        ("exporter", ""),
        ("otlp_protocol", "http/json"),
        ("queue_size", "0"),
        ("sampler", "jaeger_remote"),
        ("sampler_arg", "1.1"),
        ("sampler_arg", "nan"),
        ("propagators", ["tracecontext", "xray"]),
        ("opt_in_attributes", ["client.port", "user_agent.original"]),
        ("trusted_proxy", ["10.0.0.0/33"]),
        ("trusted_proxy", ["10.0.0.0/8", "proxy.example"]),
        ("trusted_proxy", ["unix:/run/a.sock"]),
        ("capture_request_headers", ["x-.*"]),
        ("capture_request_headers", ["x-a,x b"]),
        ("capture_response_headers", ["x-" + "a" * 55]),
        ("sanitize_headers", ["x-(a"]),
        ("propagate", "sockets"),
        ("propagate", 2),
        ("keep_slower_than", "500"),
        ("keep_slower_than", "0ms"),
        ("keep_slower_than", "2 h"),
        ("keep_slower_than", "9" * 400 + "s"),
    ],
)
def test_values_outside_of_what_is_allowed(name: str, text: object) -> None:
    with pytest.raises(UserError, match=sources.flag(name)):
        load({name: text})


def test_an_unknown_setting_in_the_file_is_named_together_with_the_known(tmp_path: Path) -> None:
    path = toml(tmp_path, "ringbuffer = 3")
    with pytest.raises(UserError, match=r"settings\.toml: unknown setting 'ringbuffer'; known are .*ring_buffer_mib"):
        load({}, path)


@pytest.mark.parametrize(("text", "reason"), [("pid 3", "Expected '='"), ("x = '\udcff'", "utf-8")])
def test_a_file_that_is_not_toml(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=reason):
        load({}, path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        load({}, tmp_path / "none.toml")


def test_every_setting_explains_itself() -> None:
    for name, field in SettingsSource.model_fields.items():
        assert field.description, name
        assert field.examples, name


@pytest.mark.parametrize(
    ("given", "way", "in_memory", "on_socket"),
    [
        ("true", "auto", True, True),
        ("Socket", "socket", False, True),
        ("memory", "memory", True, False),
        ("false", "off", False, False),
        (None, "off", False, False),
    ],
)
def test_ways_to_propagate(given: str | None, way: str, in_memory: bool, on_socket: bool) -> None:
    settings = load({"propagate": given})
    assert (settings.propagate, settings.tells_in_memory, settings.tells_on_socket) == (way, in_memory, on_socket)


@pytest.mark.parametrize(("line", "way"), [("propagate = true", "auto"), ('propagate = "memory"', "memory")])
def test_a_way_to_propagate_in_the_file(tmp_path: Path, line: str, way: str) -> None:
    (tmp_path / "settings.toml").write_text(line)
    assert load({}, tmp_path / "settings.toml").propagate == way


@pytest.mark.parametrize(
    ("given", "logs"), [("true", "error"), ("ERROR", "error"), ("all", "all"), ("0", "off"), (None, "off")]
)
def test_which_logs(given: str | None, logs: str) -> None:
    settings = load({"logs": given})
    assert (settings.logs, settings.sends_logs) == (logs, logs != "off")


def test_the_access_log_needs_no_error_log() -> None:
    settings = load({"logs": "access", "log_level": "none", "detail": "request"})
    assert (settings.sends_access_log, settings.sends_error_log) == (True, False)


@pytest.mark.parametrize(("name", "value"), [("log_level", "none"), ("detail", "request")])
def test_the_error_log_is_not_sent_unread(name: str, value: str) -> None:
    with pytest.raises(UserError, match="--logs error needs nginx's error log, which --detail request and"):
        load({"logs": "error", name: value})


def test_nothing_is_sent_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not load({"logs": "error"}).sends_logs
