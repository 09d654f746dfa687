"""One trace for each request, made of its stages."""

import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from baton.errors import InputError
from baton.server import otel
from baton.server.otel import Spans, exporting_to
from tests.pure.traced import END, ENDED, PARENT, life


def test_a_trace_is_the_clients_with_a_span_for_each_stage() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    made = Spans(provider, "demo")
    made.begin("cmpl-1", PARENT)
    made.ended(ENDED, life(), END)
    found = {span.name: span for span in exporter.get_finished_spans()}
    assert list(found) == ["queue", "prefill", "handover", "decode", "text_completion demo"]
    root = found["text_completion demo"]
    assert f"{root.context.trace_id:032x}" in PARENT
    assert f"{root.parent.span_id:016x}" in PARENT
    lasted = {n: round((s.end_time - s.start_time) / 1e9, 3) for n, s in found.items()}
    assert lasted == {
        "queue": 0.5, "prefill": 1.25, "handover": 0.25, "decode": 0.375,
        "text_completion demo": 2.375,
    }  # fmt: skip
    assert abs(root.end_time / 1e9 - time.time()) < 60
    assert found["decode"].attributes["baton.worker"] == "decode-0"
    assert root.attributes["gen_ai.usage.output_tokens"] == 7
    children = [span for span in found.values() if span is not root]
    assert {span.parent.span_id for span in children} == {root.context.span_id}


def test_without_the_packages_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(otel, "import_module", missing)
    with pytest.raises(InputError, match="pip install opentelemetry-sdk"):
        exporting_to("http://localhost:4318", "demo")
