"""Opens the files that only the starting user may open, and hands them to the emitter as descriptors."""

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.process import privileges, seccomp
from otel_nginx_ebpf.process.privileges import Account
from otel_nginx_ebpf.settings.model import Settings

_OTLP_FILES = ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")


def otlp_file_variables(*signals: str) -> list[str]:
    """Returns the environment variables that name a file for the SDK's exporters (OTLP exporter specification).

    Args:
        signals: `TRACES`, `METRICS` or `LOGS`; the variables of all signals are always returned.
    """
    return [
        f"OTEL_EXPORTER_OTLP_{prefix}{file}" for prefix in ("", *(f"{s}_" for s in signals)) for file in _OTLP_FILES
    ]


# Files that the emitter reads after it has given up root: modules, and the trusted certificates for HTTPS.
_PROGRAM_FILES = (__file__, sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))


@dataclass(frozen=True, slots=True)
class Handover:
    """The emitter's user, and the descriptors that it gets."""

    account: Account | None
    """`None`: the emitter keeps the supervisor's user."""
    output: int | None
    """Descriptor of the output file; `None` is stdout."""
    files: dict[str, int]
    """Descriptors of copies in memory, by the environment variable that named the original."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (*self.files.values(), *([] if self.output is None else [self.output]))


def open_output(settings: Settings) -> int | None:
    """Opens the file of the text exporter for appending; returns its descriptor, or `None` for stdout.

    Raises:
        UserError: The file cannot be opened, or the settings do not name exactly one text exporter.
    """
    if settings.output is None:
        return None
    texts = [name for name in dict.fromkeys(settings.exporter) if name != "otlp"]
    if len(texts) != 1:
        raise UserError(
            "--output (OTEL_NGINX_EBPF_OUTPUT) needs exactly one of the exporters console, line and json; "
            f"--exporter has {', '.join(texts) or 'none of them'}"
        )
    try:
        return os.open(settings.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"--output (OTEL_NGINX_EBPF_OUTPUT): {settings.output}: {error.strerror}") from error


def make_handover(settings: Settings, output: int | None) -> Handover:
    """Opens the files, and makes the directory, that the emitter could not open or make itself.

    Args:
        settings: Name the emitter's user and its queue directory.
        output: Descriptor of the output file, to hand over too.

    Raises:
        UserError: The user, the directory or a file cannot be used.
    """
    account = privileges.account(settings.user)
    closed = [path for path in _PROGRAM_FILES if account and not privileges.can_read(account, path)]
    if account and closed:
        raise UserError(
            f"user {account.name}, who is to read requests and send traces, cannot read the program's own files, "
            f"such as {closed[0]}: put the program where that user can, below /opt for example; or say --user root "
            "(OTEL_NGINX_EBPF_USER): it is root then, without capabilities"
        )
    if account and settings.queue_dir and not settings.queue_dir.exists():
        try:
            settings.queue_dir.mkdir(mode=0o700, parents=True)
            os.chown(settings.queue_dir, account.uid, account.gid)
        except OSError as error:
            raise UserError(f"--queue-dir {settings.queue_dir}: {error.strerror}") from error
    named = {
        variable: Path(os.environ[variable])
        for variable in otlp_file_variables("TRACES", "METRICS", "LOGS")
        if os.environ.get(variable)
    }
    return Handover(account, output, {variable: _copy(variable, path) for variable, path in named.items()})


def _copy(variable: str, path: Path) -> int:
    """Copies a file into memory. The emitter's user may open the copy by a path, as exporters do, but not the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{variable}: cannot read the file {path}: {error.strerror}") from error
    descriptor = os.memfd_create(variable)
    os.write(descriptor, content)
    return descriptor


def take_over(handover: Handover) -> None:
    """Becomes the emitter's user without privileges, and points the environment variables to the copies."""
    privileges.give_up(handover.account)
    seccomp.refuse_system_calls()
    for variable, descriptor in handover.files.items():
        os.environ[variable] = f"/proc/self/fd/{descriptor}"
