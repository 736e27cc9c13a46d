"""What the emitter holds of one attachment: the kernel's maps, and what it has learnt about the nginx."""

from collections.abc import Mapping

from otel_nginx_ebpf.kernel.ring_buffer import CounterArray, RingBuffer
from otel_nginx_ebpf.metrics.choices import MetricChoices
from otel_nginx_ebpf.metrics.kernel_maps import DurationMaps
from otel_nginx_ebpf.process.messages import Attached
from otel_nginx_ebpf.traces.losses import KERNEL_CAUSES
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.silence import SilenceWatch


class Source:
    """One attachment. Owns the descriptors of its maps."""

    def __init__(self, attached: Attached, ring_buffer_bytes: int, choices: MetricChoices) -> None:
        records, loss_counts, *durations = attached.descriptors
        self.number = attached.number
        self.target = attached.target
        self.layout_source = attached.layout_source
        self.records = RingBuffer(records, ring_buffer_bytes)
        self._loss_counts = CounterArray(loss_counts, len(KERNEL_CAUSES))
        self.durations = DurationMaps(choices, *durations) if durations else None
        self.refuted: set[int] = set()
        """Pids of workers whose memory contradicts the layout."""
        self.doubted = False
        self.silence = SilenceWatch()
        self.hits: Mapping[str, float] = {}
        """Hits a second, by probe, when the supervisor last measured them."""
        self.resource_of: dict[int, Mapping[str, AttributeValue]] = {}

    def losses(self) -> dict[str, int]:
        """Returns the kernel's loss counts since the probes went live, by cause."""
        return dict(zip(KERNEL_CAUSES, self._loss_counts.read(), strict=True))

    def close(self) -> None:
        self.records.close()
        self._loss_counts.close()
        if self.durations:
            self.durations.close()
