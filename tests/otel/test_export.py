"""Traces as a collector gets them: OTLP over HTTP, protobuf, decoded by OpenTelemetry's own messages.

`make test-otel` runs this in an environment of its own, because the exporter is an optional dependency.
"""

import gzip
import json
import queue
import signal
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from baton.server.otel import exporting_to
from tests.cluster.processes import short_folder, terminals
from tests.cluster.serving import Server
from tests.patience import PATIENCE_S
from tests.pure.traced import CALLER, END, ENDED, PARENT, TRACE, life

WITHOUT = "OpenTelemetry's exporter is not installed; `make test-otel` runs this with it"
PROTO = "opentelemetry.proto"
wire = pytest.importorskip(f"{PROTO}.collector.trace.v1.trace_service_pb2", reason=WITHOUT)
Span = pytest.importorskip(f"{PROTO}.trace.v1.trace_pb2", reason=WITHOUT).Span

STAGES = {"queue", "prefill", "handover", "decode"}


@dataclass
class Collector:
    """What was received: spans, and the names of the services that sent them."""

    url: str = ""
    spans: "queue.Queue[Span]" = field(default_factory=queue.Queue)
    services: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)

    def take(self, kind: str, body: bytes) -> None:
        self.kinds.add(kind)
        for each in wire.ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = {a.key: a.value.string_value for a in each.resource.attributes}
            self.services.add(attributes["service.name"])
            for scope in each.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)

    def trace(self, root: str) -> dict[str, Span]:
        """By name, once the root is there: stages end before it, so they come before it."""
        found: dict[str, Span] = {}
        while root not in found:
            span = self.spans.get(timeout=PATIENCE_S)
            found[span.name] = span
        return found


@contextmanager
def collecting() -> Iterator[Collector]:
    """A stand-in for a collector, on a port of its own."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.take(f"{self.headers['Content-Type']} {self.path}", body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        collector.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def values(span: Span) -> dict[str, str | int | float]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}


def is_whole(found: dict[str, Span], root: Span) -> None:
    """One trace, the caller's: every stage within the request, one after the other."""
    assert set(found) >= STAGES
    assert {span.trace_id.hex() for span in found.values()} == {TRACE}
    assert root.parent_span_id.hex() == CALLER
    assert root.kind == Span.SPAN_KIND_SERVER
    for name in STAGES:
        span = found[name]
        assert span.parent_span_id == root.span_id, name
        assert root.start_time_unix_nano <= span.start_time_unix_nano, name
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano, name
    starts = [found[name].start_time_unix_nano for name in ("queue", "prefill", "decode")]
    assert starts == sorted(starts)


def test_a_trace_arrives_as_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")  # ms; 5 s otherwise
    with collecting() as collector:
        made = exporting_to(collector.url, "demo")
        made.begin("cmpl-1", PARENT)
        made.ended(ENDED, life(), END)
        found = collector.trace("text_completion demo")
        assert collector.services == {"baton"}
        assert collector.kinds == {"application/x-protobuf /v1/traces"}
    root = found["text_completion demo"]
    is_whole(found, root)
    assert root.end_time_unix_nano - root.start_time_unix_nano == 2_375_000_000
    told = values(root)
    assert told["gen_ai.usage.input_tokens"] == 9
    assert told["gen_ai.usage.output_tokens"] == 7
    assert values(found["decode"])["baton.worker"] == "decode-0"


def test_what_waits_is_sent_when_the_server_ends() -> None:
    with collecting() as collector, short_folder() as folder, terminals() as type_in:
        server = Server(type_in, folder, "--otlp-endpoint", collector.url)
        body = {"model": "demo", "prompt": "In the future", "max_tokens": 5}
        asked = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "traceparent": PARENT},
        )
        with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
            usage = json.load(answer)["usage"]
        server.terminal.signal(signal.SIGTERM)
        found = collector.trace("text_completion demo")
        server.terminal.ends(0)
    root = found["text_completion demo"]
    is_whole(found, root)
    told = values(root)
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
