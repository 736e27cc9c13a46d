"""What the kernel hands over of one binary, as the emitter holds it."""

from collections.abc import Mapping

from otel_nginx_ebpf.kernel.ring_buffer import CounterArray, RingBuffer
from otel_nginx_ebpf.metrics.kernel_maps import DurationMaps
from otel_nginx_ebpf.process.messages import Attached
from otel_nginx_ebpf.traces.losses import KERNEL_CAUSES
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.silence import SilenceWatch


class Source:
    """What the kernel hands over of one binary."""

    def __init__(self, attached: Attached, ring_buffer_bytes: int) -> None:
        records, loss_counts, *durations = attached.descriptors
        self.number = attached.number
        self.target = attached.target
        self.layout_source = attached.layout_source
        self.records = RingBuffer(records, ring_buffer_bytes)
        self._loss_counts = CounterArray(loss_counts, len(KERNEL_CAUSES))
        self.durations = DurationMaps(*durations) if durations else None
        self.refuted: set[int] = set()
        """Workers whose memory is not as the layout says."""
        self.doubted = False
        self.silence = SilenceWatch()
        self.hits: Mapping[str, float] = {}
        """Of each probe, a second, when they were last counted."""
        self.resource_of: dict[int, Mapping[str, AttributeValue]] = {}

    def losses(self) -> dict[str, int]:
        """The kernel's loss counters since the probes went live, by cause."""
        return dict(zip(KERNEL_CAUSES, self._loss_counts.read(), strict=True))

    def close(self) -> None:
        self.records.close()
        self._loss_counts.close()
        if self.durations:
            self.durations.close()
