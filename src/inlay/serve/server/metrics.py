"""`/metrics`: what a server counts, for Prometheus.

An adapter is a label only once the server has it, and only the first `MAX_NAMES` of them have series of their own: a
client cannot make series by asking for names. Those of an adapter that is removed go with it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from inlay.serve.bank import Bank
from inlay.serve.model_bank import ModelBank
from inlay.serve.server.generation import GenerationLoop
from inlay.serve.server.loop import Loop
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.trace import Trace

MAX_NAMES = 200  # adapters with series of their own; one has about 50
OTHERS = "(others)"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

router = APIRouter()


class Metrics:
    """The counts of one service, in a registry of its own.

    Args:
        bank: Whose adapters are counted.
        queue: Whose length is counted.
        loop: Which may have texts under way.
    """

    def __init__(self, bank: Bank | ModelBank, queue: RequestQueue, loop: Loop) -> None:
        self.registry = CollectorRegistry()
        self._names: set[str] = set()
        self.requests = Counter(
            "inlay_requests",
            "Requests over HTTP that were answered.",
            ["route", "adapter", "status"],
            registry=self.registry,
        )
        self.refusals = Counter(
            "inlay_refusals", "Requests that were refused, by the kind of the error.", ["kind"], registry=self.registry
        )
        self.seconds = Histogram(
            "inlay_request_seconds",
            "Time of a request: waiting in the queue, computing in a batch, whole with decoding and sending.",
            ["adapter", "part"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "inlay_tokens", "Tokens of prompts, and written ones.", ["adapter", "kind"], registry=self.registry
        )
        self.rows = Histogram("inlay_batch_rows", "Rows of a batch.", buckets=ROWS, registry=self.registry)
        self.adapters = Histogram(
            "inlay_batch_adapters", "Different adapters in a batch.", buckets=ROWS, registry=self.registry
        )
        self.registry.register(_Levels(bank, queue, loop))

    def count_batch(self, requests: Sequence[Request]) -> None:
        """Count a batch that is about to be computed; of texts those that join one at the same time."""
        self.rows.observe(len(requests))
        self.adapters.observe(len({request.adapter for request in requests}))

    def count_request(self, trace: Trace, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered.

        Args:
            trace: What was noted of it.
            route: The pattern of its path.
            status: Of the answer.
            seconds: From its first byte to the last one of the answer.
        """
        adapter = self._label(trace)
        self.requests.labels(route, adapter, status).inc()
        if trace.refusal:
            self.refusals.labels(trace.refusal).inc()
        if not adapter or status >= 400:  # a refusal is quick, and would lower the latency
            return
        parts = {"waiting": trace.waiting_s, "computing": trace.computing_s, "whole": seconds}
        for part, value in parts.items():
            if value is not None:
                self.seconds.labels(adapter, part).observe(value)
        for kind, count in zip(("prompt", "written"), trace.count_tokens(), strict=True):
            if count:
                self.tokens.labels(adapter, kind).inc(count)

    def forget(self, name: str) -> None:
        """Drop the series of an adapter that is no longer served."""
        if name in self._names:
            self._names.discard(name)
            for metric in (self.requests, self.seconds, self.tokens):
                metric.remove_by_labels({"adapter": name})

    def _label(self, trace: Trace) -> str:
        if not trace.is_known:
            return ""
        if trace.adapter not in self._names:
            if len(self._names) >= MAX_NAMES:
                return OTHERS
            self._names.add(trace.adapter)
        return trace.adapter


class _Levels(Collector):
    """What a bank and a queue hold at the moment of a scrape."""

    def __init__(self, bank: Bank | ModelBank, queue: RequestQueue, loop: Loop) -> None:
        self._bank, self._queue, self._loop = bank, queue, loop

    @override
    def collect(self) -> Iterator[Metric]:
        bank = self._bank
        yield GaugeMetricFamily("inlay_queue_length", "Requests that wait for a batch.", len(self._queue))
        if isinstance(self._loop, GenerationLoop):
            yield GaugeMetricFamily("inlay_texts", "Texts that are being written.", self._loop.writing)
        yield GaugeMetricFamily("inlay_adapters", "Adapters that are served.", len(bank.names))
        yield GaugeMetricFamily("inlay_adapters_resident", "Adapters that are in memory.", len(bank.resident))
        yield GaugeMetricFamily("inlay_adapters_bytes", "Size of the stacks of adapters.", bank.counts.bytes)
        for name, help, value in (
            ("inlay_adapter_hits", "Adapters of batches that were in memory.", bank.counts.hits),
            ("inlay_adapter_loads", "Adapters that were read and checked.", bank.counts.loads),
            ("inlay_adapter_evictions", "Adapters that gave way to others.", bank.counts.evictions),
        ):
            yield CounterMetricFamily(name, help, value)


@router.get("/metrics")
async def show_metrics(request: HttpRequest) -> Response:
    """All counts in the format that the scraper accepts."""
    metrics: Any = request.app.state.service.metrics
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(metrics.registry), media_type=kind)
