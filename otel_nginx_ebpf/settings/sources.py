"""Settings: flags over environment over an optional TOML file over defaults.

A setting has one name everywhere: `ring_buffer_mib` in the TOML file, `--ring-buffer-mib` on the command
line, `OTEL_NGINX_EBPF_RING_BUFFER_MIB` in the environment. The standard `OTEL_*` variables keep their
standard meaning; those not listed here are read by the OpenTelemetry SDK and its exporters themselves.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.settings.model import Color, Detail, ExporterName, OtlpProtocol, Propagator, Sampler, Settings

PREFIX = "OTEL_NGINX_EBPF_"
CONFIG_VARIABLE = PREFIX + "CONFIG"

_NANOSECONDS = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}


def _split(value: object) -> object:
    """A list in one environment variable is separated by commas."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("not a power of two")
    return value


def _lower(value: object) -> object:
    """The specification's enumerated values are case-insensitive."""
    return value.lower() if isinstance(value, str) else value


def _nanoseconds(value: object) -> object:
    """A number and its unit: `500ms`, `1.5s`, `800us`."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(us|ms|s)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a duration")
    return round(float(match[1]) * _NANOSECONDS[match[2]])


def _openable(value: Path) -> Path:
    """TOML can say what no path can be."""
    if "\0" in str(value):
        raise ValueError("a zero byte")
    return value


_Path = Annotated[Path, AfterValidator(_openable)]
_Listed = (NoDecode, BeforeValidator(_split))


def _standard(own: str, *variables: str) -> AliasChoices:
    """Besides its own variable (first) a setting is read from standard ones."""
    return AliasChoices(own, PREFIX + own.upper(), *variables)


class Source(BaseSettings):
    """The fields of `Settings`, read and checked. `description` is the help text, `examples[0]` what is allowed."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    pid: Annotated[tuple[Annotated[int, Field(gt=0)], ...], *_Listed] = Field(
        (),
        description="Trace this nginx: its master's or a worker's pid.",
        examples=["process ids, each 1 or more"],
    )
    binary: Annotated[tuple[_Path, ...], *_Listed] = Field(
        (), description="Trace every process that runs this nginx binary.", examples=["paths"]
    )
    wait: bool = Field(
        False,
        description="Where no nginx runs yet, wait for one instead of ending.",
        examples=["true or false"],
    )
    exporter: Annotated[tuple[ExporterName, ...], Field(min_length=1), *_Listed] = Field(
        ("otlp",),
        description="Where traces go: otlp (to a collector), console (waterfalls), "
        "line (one line a request), json (one object a trace).",
        examples=["of otlp, console, line, json"],
    )
    output: _Path | None = Field(
        None,
        description="Write the console, line or json exporter's text to this file instead of stdout.",
        examples=["a path"],
    )
    query: bool = Field(
        True,
        description="Keep the query string of each URI; without it only the path.",
        examples=["true or false"],
    )
    color: Color = Field(
        "auto",
        description="Colours of the console exporter; auto: on a terminal, unless NO_COLOR is set.",
        examples=["auto, always or never"],
    )
    sampler: Annotated[Sampler, BeforeValidator(_lower)] = Field(
        "parentbased_always_on",
        validation_alias=_standard("sampler", "OTEL_TRACES_SAMPLER"),
        description="Which requests are traced: always_on, always_off, traceidratio, or parentbased_ and one of these, "
        "for requests whose incoming context does not say.",
        examples=[f"one of {', '.join(get_args(Sampler))}"],
    )
    sampler_arg: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        validation_alias=_standard("sampler_arg", "OTEL_TRACES_SAMPLER_ARG"),
        description="The part of the traces that the samplers traceidratio take.",
        examples=["a number from 0 to 1"],
    )
    keep_errors: bool = Field(
        False,
        description="Trace also what the sampler leaves out where its status is 500 or more, "
        "unless the incoming context said no.",
        examples=["true or false"],
    )
    keep_slower_than: Annotated[int, Field(gt=0), BeforeValidator(_nanoseconds)] | None = Field(
        None,
        description="Trace also what the sampler leaves out where it took longer (500ms, 2s), "
        "unless the incoming context said no.",
        examples=["a number and its unit, us, ms or s, such as 500ms"],
    )
    propagators: Annotated[
        tuple[Annotated[Propagator, BeforeValidator(_lower)], ...], Field(min_length=1), *_Listed
    ] = Field(
        ("tracecontext",),
        validation_alias=_standard("propagators", "OTEL_PROPAGATORS"),
        description="Whose headers tell a request's trace: tracecontext (W3C), b3, b3multi, "
        "xrequestid (X-Request-ID is the trace id), or none. baggage is accepted and has no effect.",
        examples=[f"of {', '.join(get_args(Propagator))}"],
    )
    adopt_upstream_context: bool = Field(
        False,
        description="Where nginx itself sends a traceparent upstream (proxy_set_header), take its ids for our spans.",
        examples=["true or false"],
    )
    propagate: bool = Field(
        False,
        description="Write our traceparent into the requests that nginx sends upstream, in its memory. "
        "Needs a kernel that is not locked down.",
        examples=["true or false"],
    )
    detail: Detail = Field(
        "phases",
        description="phases: spans of all phases, to the nanosecond; request: at less of a price, the request "
        "and its last upstream attempt, by nginx's own clock of milliseconds.",
        examples=["phases or request"],
    )
    ring_buffer_mib: Annotated[int, Field(ge=1, le=256), AfterValidator(_power_of_two)] = Field(
        16,
        description="Size in MiB of the buffer between the kernel and this program.",
        examples=["a power of two from 1 to 256"],
    )
    max_active_requests: Annotated[int, Field(ge=64, le=1_048_576)] = Field(
        16_384,
        description="How many requests can be in flight in nginx at once and be traced.",
        examples=["64 to 1048576"],
    )
    max_cost_per_request: Annotated[int, Field(gt=0), BeforeValidator(_nanoseconds)] | None = Field(
        None,
        description="Detach where tracing takes more processor time a request than this (20us).",
        examples=["a number and its unit, us, ms or s, such as 20us"],
    )
    max_loss: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="Detach where more than this part of the traces is lost in the kernel (0.05).",
        examples=["a number from 0 to 1"],
    )
    reattach_seconds: Annotated[float, Field(ge=1, le=3600)] = Field(
        60.0,
        description="How long in seconds to stay detached after that; twice as long each time, up to an hour.",
        examples=["seconds, 1 to 3600"],
    )
    queue_size: Annotated[int, Field(ge=1)] = Field(
        262_144,
        validation_alias=_standard("queue_size", "OTEL_BSP_MAX_QUEUE_SIZE"),
        description="How many spans may wait for the collector.",
        examples=["a number of spans, 1 or more"],
    )
    queue_mib: Annotated[int, Field(ge=1, le=65_536)] = Field(
        64,
        description="How many MiB of encoded spans may wait for the collector.",
        examples=["1 to 65536"],
    )
    queue_dir: _Path | None = Field(
        None,
        description="Keep what waits for the collector in this directory while it is down, and for the next run.",
        examples=["a directory of this program's own"],
    )
    queue_dir_mib: Annotated[int, Field(ge=1)] = Field(
        1_024,
        description="How many MiB may wait in --queue-dir.",
        examples=["1 or more"],
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        4_096,
        validation_alias=_standard("batch_size", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
        description="How many spans are sent to the collector at once.",
        examples=["a number of spans, 1 or more"],
    )
    batch_delay_ms: Annotated[int, Field(ge=0, le=3_600_000)] = Field(
        5_000,
        validation_alias=_standard("batch_delay_ms", "OTEL_BSP_SCHEDULE_DELAY"),
        description="How long in milliseconds a span waits for its batch to fill.",
        examples=["milliseconds, 0 to 3600000"],
    )
    otlp_protocol: OtlpProtocol = Field(
        "grpc",
        validation_alias=_standard(
            "otlp_protocol", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
        ),
        description="How the collector is spoken to: grpc or http/protobuf.",
        examples=["grpc or http/protobuf"],
    )
    grace_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        10.0,
        description="How long in seconds to keep delivering what is queued after the end was asked for.",
        examples=["seconds, 0 to 3600"],
    )
    metrics: bool = Field(
        False,
        description="Send the collector metrics of all requests and of this program itself, too.",
        examples=["true or false"],
    )
    metrics_listen: Annotated[str | None, Field(pattern=r"^[^:]+:[0-9]{1,5}$|^\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}$")] = Field(
        None,
        description="Offer metrics of all requests and of this program itself to Prometheus at this address.",
        examples=["an address and a port, as in 127.0.0.1:9464 or [::1]:9464"],
    )
    user: Annotated[str | None, Field(pattern=r"^\w[\w.-]*\$?$")] = Field(
        None,
        description="The user that reads requests and sends traces, without any privilege; without root who runs this.",
        examples=["a user's name or number"],
    )
    request_metrics: bool = Field(
        True,
        description="With --metrics or --metrics-listen: whether the durations of all requests are in them.",
        examples=["on or off"],
    )
    sdk_disabled: bool = Field(
        False,
        validation_alias="OTEL_SDK_DISABLED",
        description="Send nothing to a collector.",
        examples=["true or false"],
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


_NEED_PHASES = ("adopt_upstream_context", "propagate")


def flag(name: str) -> str:
    """The command-line option of a setting."""
    return "--no-query" if name == "query" else "--" + name.replace("_", "-")


def variables(name: str) -> tuple[str, ...]:
    """The environment variables of a setting, the strongest first."""
    alias = Source.model_fields[name].validation_alias
    if alias is None:
        return (PREFIX + name.upper(),)
    return tuple(str(choice) for choice in (alias.choices[1:] if isinstance(alias, AliasChoices) else [alias]))


def _setting(location: str) -> str:
    """The setting a validation error is about: pydantic names it by the alias that had the value."""
    return next((name for name in Source.model_fields if location == name or location in variables(name)), location)


def _explain(error: ErrorDetails, config: Path | None) -> str:
    location = str(error["loc"][0]) if error["loc"] else ""
    name = _setting(location)
    if name not in Source.model_fields:
        known = ", ".join(field for field in Source.model_fields if field != "sdk_disabled")
        return f"{config}: unknown setting {name!r}; known are {known}"
    allowed = Source.model_fields[name].examples
    variable = next((v for v in variables(name) if os.environ.get(v)), variables(name)[0])
    return (
        f"{flag(name)} ({variable}, {name} in the TOML file) must be {allowed[0] if allowed else ''}; "
        f"it is {error['input']!r}"
    )


def load(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Reads the settings.

    Args:
        flags: What was given on the command line, by setting; None: not given.
        config: The TOML file; without it $OTEL_NGINX_EBPF_CONFIG.

    Raises:
        UserError: A value that is not allowed, an unknown setting, a file that cannot be read.
    """
    path = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    if path is not None and not path.is_file():
        raise UserError(f"--config ({CONFIG_VARIABLE}): {path} is not a file")

    class FileSource(Source):
        model_config = SettingsConfigDict(toml_file=path)

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = Settings(**FileSource(**given).model_dump())
    except ValidationError as error:
        raise UserError(_explain(error.errors(include_url=False)[0], path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise UserError(f"--config ({CONFIG_VARIABLE}): {path}: {error}") from error
    for name in _NEED_PHASES:
        if settings.detail == "request" and getattr(settings, name):
            raise UserError(f"{flag(name)} needs --detail phases: what it reads or writes, it does during the request")
    return settings
