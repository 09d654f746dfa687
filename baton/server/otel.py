"""Spans: one OpenTelemetry trace for each request, across all processes (--otlp-endpoint).

    text_completion demo         from submission to the end, a child of the client's own traceparent
      queue, reserve, wait       router
      prefill, handover          the prefill worker, as the router knew it
      decode, stall              the decode worker

Made from the timeline when a request ends: its stages have their times, so messages carry nothing for
it. Times are sums of nanoseconds: those of seconds since 1970 would be a quarter of a µs off.
Names: https://opentelemetry.io/docs/specs/semconv/gen-ai/ (in development). Optional: needs
opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from baton.errors import InputError
from baton.timeline import Life, short_name
from baton.wire.records import Ended

NANO = 1_000_000_000
REMEMBERED = 10_000
NEEDED = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"

logger = logging.getLogger(__name__)


class Spans:
    """Exports a trace for each request when it has ended."""

    def __init__(
        self, provider: trace.TracerProvider, model: str, finish: Callable[[], None] | None = None
    ) -> None:
        """`finish` exports what waits, and blocks until it is exported."""
        self._finish = finish
        self._tracer = provider.get_tracer("baton")
        self._model = model
        self._parents: OrderedDict[str, Context] = OrderedDict()

    def begin(self, name: str, traceparent: str | None) -> None:
        """The client's traceparent is the parent of this request's trace."""
        if traceparent:
            carrier = {"traceparent": traceparent}
            self._parents[name] = TraceContextTextMapPropagator().extract(carrier)
            while len(self._parents) > REMEMBERED:
                self._parents.popitem(last=False)

    def ended(self, ended: Ended, life: Life, now: float) -> None:
        """`now`: the router's monotonic clock at this moment."""
        if not life.stages:
            return
        shift = time.time_ns() - round(now * NANO)
        parent = self._parents.get(ended.request.rpartition("-")[0])

        def at(seconds: float) -> int:
            return round(seconds * NANO) + shift

        last = life.stages[-1].end
        root = self._tracer.start_span(
            f"text_completion {self._model}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            start_time=at(life.stages[0].start),
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "baton",
                "gen_ai.request.model": self._model,
                "gen_ai.response.id": ended.request,
                "gen_ai.response.finish_reasons": [ended.reason],
                "gen_ai.usage.input_tokens": ended.prompt_tokens,
                "gen_ai.usage.output_tokens": ended.tokens,
                "baton.time_to_first_token": ended.timings.ttft_s,
                "baton.cached_tokens": ended.timings.cached_tokens,
                "baton.prefill_reused_tokens": ended.timings.prefill_reused_tokens,
                "baton.retries": ended.timings.retries,
                "baton.preemptions": ended.timings.preemptions,
            },
        )
        within = trace.set_span_in_context(root)
        for stage in life.stages:
            span = self._tracer.start_span(
                stage.name,
                context=within,
                start_time=at(stage.start),
                attributes={
                    "baton.worker": short_name(stage.worker) or "router",
                    **({"baton.why": stage.why} if stage.why else {}),
                },
            )
            span.end(at(stage.start if stage.end is None else stage.end))
        root.end(at(now if last is None else last))

    async def close(self, timeout_s: float) -> bool:
        """Export what waits. False, and a warning, if that takes longer: a collector that does not answer
        must not keep the process, so a thread that ends with it does the work."""
        if self._finish is None:
            return True
        finish, loop, done = self._finish, asyncio.get_running_loop(), asyncio.Event()

        def work() -> None:
            finish()
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=work, name="last-spans", daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), timeout_s)
        if not done.is_set():
            logger.warning("the collector did not take the last traces within %g s", timeout_s)
        return done.is_set()


def exporting_to(endpoint: str, model: str) -> Spans:
    """Spans exported to this OTLP endpoint (http://HOST:4318/v1/traces) in batches, by a thread. Raises
    InputError if the packages are missing."""
    try:
        sdk: Any = import_module("opentelemetry.sdk.trace")
        batches: Any = import_module("opentelemetry.sdk.trace.export")
        resources: Any = import_module("opentelemetry.sdk.resources")
        otlp: Any = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise InputError(
            f"--otlp-endpoint needs packages that are not installed ({error.name}): pip install {NEEDED}"
        ) from error
    # Not at exit, where it would wait half a minute for a collector that does not answer: see close().
    provider = sdk.TracerProvider(
        resource=resources.Resource.create({"service.name": "baton"}), shutdown_on_exit=False
    )
    exporter = otlp.OTLPSpanExporter(endpoint=endpoint)
    provider.add_span_processor(batches.BatchSpanProcessor(exporter))
    return Spans(provider, model, provider.shutdown)
