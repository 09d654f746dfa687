"""OpenAI's batch format, read; and the trace file of a job."""

import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import InputError
from baton.offline.run_batch import Item, read_items
from baton.offline.tracing import Tracing
from baton.timeline import Moment
from baton.wire.messages import Observed
from baton.wire.records import Ended, Timings

GOOD: dict[str, Any] = {
    "custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"},
}  # fmt: skip


def written(tmp_path: Path, *lines: object) -> Path:
    file = tmp_path / "in.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts))
    return file


def test_every_line_is_a_request_and_empty_ones_are_none(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD, "", GOOD | {"custom_id": "b", "url": "/v1/chat/completions"})
    assert read_items(file) == [
        Item("a", "/v1/completions", {"prompt": "x"}),
        Item("b", "/v1/chat/completions", {"prompt": "x"}),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: this is not JSON"),
        ("[]", "line 2: a request is"),
        (GOOD | {"method": "GET"}, "line 2: a request is"),
        (GOOD | {"custom_id": 1}, "line 2: a request is"),
        (GOOD | {"body": []}, "line 2: a request is"),
        (GOOD | {"url": "/v1/embeddings"}, "line 2: url must be"),
        (GOOD | {"body": {"stream": True}}, "line 2: a batch cannot stream"),
        (GOOD, "custom_id 'a' occurs twice"),
    ],
)
def test_the_line_that_is_wrong_is_named(tmp_path: Path, line: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_items(written(tmp_path, GOOD, line))


def test_a_file_that_is_not_there_or_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_items(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no requests"):
        read_items(written(tmp_path, "", ""))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read"):
        read_items(tmp_path / "bytes")


class PretendClient:
    """Its polls bring what is still to come."""

    def __init__(self, tracing: Tracing, news: list[Observed]) -> None:
        self.tracing, self.news = tracing, news

    def poll(self, timeout_s: float) -> list[object]:
        self.tracing.observe(self.news.pop(0))
        return []


def test_the_last_moments_are_waited_for(tmp_path: Path) -> None:
    tracing = Tracing(tmp_path / "trace.json")
    tracing.observe(Observed(1.0, (Moment("r", 1.0, "queued", tokens=3),), (), None))
    ended = Ended("r", "stop", 3, 2, "", Timings())
    last = Observed(2.0, (Moment("r", 2.0, "finished", note="stop"),), (ended,), None)
    tracing.write(PretendClient(tracing, [last]), "demo")  # type: ignore[arg-type]
    trace = json.loads((tmp_path / "trace.json").read_text())
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["dur"], e["args"]["ended"]) for e in slices] == [("queue", 1e6, "stop")]


def test_a_trace_that_cannot_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--trace-file .* is a folder"):
        Tracing(tmp_path)
