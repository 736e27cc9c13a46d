"""Compiles nginx's own headers with gcc: gives struct layouts and the module signature of a configured source tree."""

import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from unit.c_compiler import DebugInfo, compile_object

_FOLDERS = ("objs", "src/core", "src/event", "src/event/modules", "src/event/quic", "src/os/unix")
_HTTP_FOLDERS = ("src/http", "src/http/modules", "src/http/v2", "src/http/v3")


def configure(sources: Path, *further: str) -> None:
    """Runs `./configure --with-compat` in nginx's sources."""
    options = ["--with-compat", "--with-threads", "--with-http_ssl_module", "--with-http_v2_module", *further]
    subprocess.run(["sh", "./configure", *options], cwd=sources, check=True, capture_output=True)


def measure(
    sources: Path, structs: Iterable[str], compiler: Sequence[str] = ("gcc",)
) -> tuple[dict[str, dict[str, int]], str]:
    """The offsets of all members of structs, with their `sizeof`, and the signature of a build of these sources."""
    include = [sources / folder for folder in (*_FOLDERS, *_HTTP_FOLDERS)]
    headers = "".join(f"#include <ngx_{name}.h>\n" for name in ("config", "core", "event", "http"))
    uses = "".join(f"{name if name.endswith('_t') else 'struct ' + name} *used_{name};\n" for name in structs)
    compiled = compile_object(headers + uses + "char signature[] = NGX_MODULE_SIGNATURE;\n", include, compiler)
    debug_info = DebugInfo(compiled)
    signature = re.search(rb"\d,\d,\d,([01]+)\0", compiled)
    assert signature
    return {name: debug_info.offsets(name) | {"sizeof": debug_info.size(name)} for name in structs}, signature[
        1
    ].decode()
