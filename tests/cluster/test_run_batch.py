"""`python main.py run-batch`, with everything behind it."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.points import failpoints
from tests.cluster.processes import Terminal, journaled, short_folder, terminals
from tests.patience import PATIENCE_S, until

LENGTH = 60
Type = Callable[..., Terminal]


@pytest.fixture
def type_in() -> Iterator[Type]:
    with terminals() as opened:
        yield opened


def test_a_batch_that_is_killed_goes_on_and_is_complete(type_in: Type, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": "demo", "max_tokens": LENGTH, "temperature": 0}
    lines = [
        {"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions",
         "body": body | {"prompt": prompt}}
        for i, prompt in enumerate(calm.PROMPTS)
    ]  # fmt: skip
    wrong = {"custom_id": "w", "method": "POST", "url": "/v1/completions",
             "body": body | {"prompt": "x", "temperature": 9}}  # fmt: skip
    source.write_text("".join(json.dumps(line) + "\n" for line in [*lines, wrong]))
    with short_folder() as folder, failpoints() as points:
        points.arm("decode.step:stop:150")
        command = ("main.py", "run-batch", source, out, "--max-num-seqs", 1)
        first = type_in(*command, TMPDIR=str(folder), **points.environment)
        part = tmp_path / "out.jsonl.part"
        until(lambda: journaled(part) >= 2 or not first.runs(), "two answers in the journal")
        assert first.runs(), first.said
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait(PATIENCE_S)
        assert not out.exists()
        said = type_in(*command, TMPDIR=str(folder)).ends(0)
    assert "13 answers are in" in said
    assert not part.exists()
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["custom_id"] for each in answers] == [*(f"c{i}" for i in range(12)), "w"]
    expected = calm.answers(LENGTH, SamplingParams(temperature=0.0))
    texts = [each["response"]["body"]["choices"][0]["text"] for each in answers[:12]]
    assert texts == [each.text for each in expected]
    assert answers[12]["response"]["status_code"] == 400
    assert answers[12]["response"]["body"]["error"]["param"] == "temperature"
