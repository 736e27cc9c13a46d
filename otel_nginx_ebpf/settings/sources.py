"""Reads settings. Flags win over the environment, the environment over an optional TOML file, the file over defaults.

The standard `OTEL_*` variables keep their standard meaning. The OpenTelemetry SDK and its exporters read the standard
variables that are not in the table.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, ValidationError, create_model
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.settings.model import DECLARATIONS, Settings
from otel_nginx_ebpf.settings.rules_file import check_told, read_rules

PREFIX = "OTEL_NGINX_EBPF_"
CONFIG_VARIABLE = PREFIX + "CONFIG"

TYPES: dict[str, Any] = get_type_hints(Settings)


def flag(name: str) -> str:
    """Returns the command-line option of a setting."""
    return ("--no-" if DECLARATIONS[name].turns_off else "--") + name.replace("_", "-")


def variables(name: str) -> tuple[str, ...]:
    """Returns the environment variables of a setting, the strongest first."""
    declaration = DECLARATIONS[name]
    return (PREFIX + name.upper(), *declaration.standard) if declaration.commands else declaration.standard


def _split(value: object) -> object:
    """Splits a list in one environment variable at its commas."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _split_each(value: object) -> object:
    """Splits each item of a list at its commas."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    return _split(value)


def _checked_type(name: str) -> Any:
    """Returns the type of a setting for pydantic, with the checks of its declaration."""
    declaration, annotation = DECLARATIONS[name], TYPES[name]
    optional = declaration.default is None
    # In `int | None` and in `tuple[int, ...]`, the checks apply to the int.
    value = get_args(annotation)[0] if optional or declaration.is_list else annotation
    if declaration.limits:
        value = Annotated[value, Field(**declaration.limits)]
    if declaration.read:
        value = Annotated[value, BeforeValidator(declaration.read)]
    if declaration.check:
        value = Annotated[value, AfterValidator(declaration.check)]
    if declaration.is_list:
        # A list with a default cannot be made empty.
        least = 1 if declaration.default else 0
        listed = tuple[value, ...]  # type: ignore[valid-type]
        return Annotated[
            listed, Field(min_length=least), NoDecode, BeforeValidator(_split_each if declaration.splits else _split)
        ]
    return value | None if optional else value


def _field(name: str) -> Any:
    declaration = DECLARATIONS[name]
    alias: AliasChoices | str | None = None
    if declaration.standard:
        alias = AliasChoices(*variables(name)) if declaration.commands else declaration.standard[0]
    return Field(
        declaration.default,
        validation_alias=alias,
        description=declaration.description,
        examples=[declaration.allowed],
    )


_RULES = "rules"
"""The key of the file that is not a setting: `rules_file` reads it."""


class _FileSource(TomlConfigSettingsSource):
    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__call__().items() if name != _RULES}


class _Sources(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        populate_by_name=True,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
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
        return init_settings, env_settings, _FileSource(settings_cls)


def _make_source(path: Path | None) -> type[BaseSettings]:
    """Makes the pydantic model of the table of settings. The model also reads the TOML file `path`."""

    class FileSources(_Sources):
        model_config = SettingsConfigDict(toml_file=path)

    model_fields: dict[str, Any] = {name: (_checked_type(name), _field(name)) for name in DECLARATIONS}
    return create_model("SettingsSource", __base__=FileSources, **model_fields)


SettingsSource = _make_source(None)

_NEED_PHASES = ("adopt_upstream_context", "propagate")


def _setting(location: str) -> str:
    """Returns the setting that a validation error is about. pydantic names it by the alias that had the value."""
    return next((name for name in DECLARATIONS if location == name or location in variables(name)), location)


def _explain(error: ErrorDetails, config: Path | None) -> str:
    location = str(error["loc"][0]) if error["loc"] else ""
    name = _setting(location)
    if name not in DECLARATIONS:
        known = ", ".join([*(name for name, declaration in DECLARATIONS.items() if declaration.commands), _RULES])
        return f"{config}: unknown setting {location!r}; known are {known}"
    variable = next((v for v in variables(name) if os.environ.get(v)), variables(name)[0])
    return (
        f"{flag(name)} ({variable}, {name} in the TOML file) must be {DECLARATIONS[name].allowed}; "
        f"it is {error['input']!r}"
    )


def load(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Reads the settings.

    Args:
        flags: The values from the command line, by setting; `None`: not given.
        config: The TOML file. Without it, $OTEL_NGINX_EBPF_CONFIG names the file.

    Raises:
        UserError: A value is not allowed, a setting is unknown, or the file cannot be read.
    """
    path = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    if path is not None and not path.is_file():
        raise UserError(f"--config ({CONFIG_VARIABLE}): {path} is not a file")
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        values = _make_source(path)(**given).model_dump()
        tables = tomllib.loads(path.read_text()).get(_RULES) if path else None
    except ValidationError as error:
        raise UserError(_explain(error.errors(include_url=False)[0], path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise UserError(f"--config ({CONFIG_VARIABLE}): {path}: {error}") from error
    settings = Settings(**values, rules=read_rules(tables, path, values["exclude"]))
    for name in _NEED_PHASES:
        if settings.detail == "request" and getattr(settings, name) != DECLARATIONS[name].default:
            raise UserError(f"{flag(name)} needs --detail phases: what it reads or writes, it does during the request")
    if settings.sends_error_log and (settings.log_level == "none" or settings.detail == "request"):
        raise UserError(
            f"--logs {settings.logs} needs nginx's error log, which --detail request and --log-level none do not read"
        )
    check_told(settings)
    return settings
