"""Downloads debug files from debuginfod servers, with the conventions of elfutils' client (debuginfod-find(1))."""

import logging
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from otel_nginx_ebpf import __version__

_log = logging.getLogger(__name__)

# elfutils waits 90 s for a server. A user who waits for traces should not. nginx has about 4 MB of debug information.
_DEFAULT_TIMEOUT_S = 30
_DEFAULT_TIME_MAX_S = 60
_DEFAULT_BYTES_MAX = 256 << 20
_CHUNK_BYTES = 1 << 16


def fetch(build_id: str) -> bytes | None:
    """Returns a build's debug file, from the cache or from the first server of $DEBUGINFOD_URLS that has the file.

    Returns None if no server is set or no server has the file. Logs a warning for a server that fails. Also honours
    DEBUGINFOD_TIMEOUT (in seconds, for each read), DEBUGINFOD_MAXTIME (in seconds, for the whole file),
    DEBUGINFOD_MAXSIZE (in bytes) and DEBUGINFOD_CACHE_PATH.
    """
    # Between the URLs there may be words such as `ima:enforcing`.
    urls = [url for url in os.environ.get("DEBUGINFOD_URLS", "").split() if url.startswith(("http://", "https://"))]
    if not urls:
        return None
    cached = _cache_directory() / build_id / "debuginfo"
    try:
        # elfutils leaves an empty file if no server had the debug file. A server may have it now.
        if content := cached.read_bytes():
            return content
    except OSError:
        pass
    for url in urls:
        try:
            content = _download(f"{url.rstrip('/')}/buildid/{build_id}/debuginfo")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 404:
                _log.warning("debuginfod server %s: %s", url, error)
            continue
        except (OSError, HTTPException, ValueError) as error:
            _log.warning("debuginfod server %s: %s", url, error)
            continue
        _store(cached, content)
        return content
    return None


def _download(url: str) -> bytes:
    """Returns the content of a URL. Raises `OSError`, `HTTPException` or `ValueError`."""
    timeout_s = _number("DEBUGINFOD_TIMEOUT", _DEFAULT_TIMEOUT_S)
    bytes_max = _number("DEBUGINFOD_MAXSIZE", _DEFAULT_BYTES_MAX)
    deadline_s = time.monotonic() + _number("DEBUGINFOD_MAXTIME", _DEFAULT_TIME_MAX_S)
    request = urllib.request.Request(url, headers={"User-Agent": f"otel-nginx-ebpf/{__version__}"})
    content = bytearray()
    response: HTTPResponse
    with _opener().open(request, timeout=timeout_s) as response:
        while chunk := response.read1(_CHUNK_BYTES):
            content += chunk
            if len(content) > bytes_max:
                raise ValueError(f"the file has more than {bytes_max} bytes (DEBUGINFOD_MAXSIZE)")
            if time.monotonic() > deadline_s:
                raise TimeoutError("the file takes too long (DEBUGINFOD_MAXTIME)")
        if response.length:
            raise ValueError("the connection ended before the file did")
    return bytes(content)


def _opener() -> urllib.request.OpenerDirector:
    """Returns an opener for HTTP and HTTPS. urllib's default opener would follow a redirect to FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _number(variable: str, default: int) -> int:
    """Reads a setting of elfutils' client. 0 and texts that are not numbers mean the default, as in elfutils."""
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() and int(text) else default


def _cache_directory() -> Path:
    if path := os.environ.get("DEBUGINFOD_CACHE_PATH"):
        return Path(path)
    # Not Path.home(): it fails if a container's user has no home directory.
    older = Path(os.path.expanduser("~/.debuginfod_client_cache"))
    if older.is_dir():
        return older
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "debuginfod_client"


def _store(path: Path, content: bytes) -> None:
    """Writes a file to the cache. A failure is not an error: the next call downloads the file again."""
    if not path.is_absolute():
        return  # `~` is not expanded for a user without a home directory
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        _log.debug("debuginfod cache %s: %s", path, error)
