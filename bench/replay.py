"""Encodes the traces of a capture's records, and does nothing else, so that callgrind counts only this.

    python -m bench.replay FILE RECORDS [access]

Calls getppid after RECORDS records and at the end, as a mark for callgrind.
"""

import os
import random
import sys
from pathlib import Path

from bench.stages import taken
from otel_nginx_ebpf.export.otlp.encoding import Encoder
from otel_nginx_ebpf.export.otlp.records import RecordEncoder
from otel_nginx_ebpf.traces.capture import read_capture
from otel_nginx_ebpf.traces.spans import RandomIds

if __name__ == "__main__":
    frames = list(read_capture(Path(sys.argv[1])))
    first = int(sys.argv[2])
    encoder = RecordEncoder(Encoder(RandomIds(random.Random(1)).generate_span_id))
    for part in (frames[:first], frames[first:]):
        taken(part, encoder, access=sys.argv[3:] == ["access"])
        os.getppid()
