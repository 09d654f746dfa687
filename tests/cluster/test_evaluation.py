"""Evaluation through a real server: the same numbers as in process."""

import json
from pathlib import Path

import pytest

from baton.model_files import resolve_model
from baton.text import Tokenizer
from tests.cluster.processes import terminals
from tests.cluster.serving import Server
from tools.evaluation import data
from tools.evaluation.engine import EngineSubject
from tools.evaluation.perplexity import score_texts
from tools.evaluation.server import ServerSubject
from tools.evaluation.subject import Span

FILES = resolve_model(data.BUNDLED_MODEL)
TEXT = "In an ancient castle, there is a hidden clock. Nobody has ever heard it strike. " * 12


def test_a_server_and_the_engine_give_the_same_numbers(server: Server) -> None:
    tokenizer = Tokenizer(FILES.tokenizer_file)
    here = EngineSubject(FILES, device="cpu", dtype="auto", threads=None)
    there = ServerSubject(server.url, FILES, served=None)
    assert (there.about.model, there.about.context) == (here.about.model, here.about.context)

    ids = tokenizer.encode(TEXT)
    spans = [Span(tuple(ids[at : at + 30 + at]), 1 + at) for at in range(0, 40, 2)]
    for ours, theirs in zip(here.score(spans), there.score(spans), strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.likeliest == theirs.likeliest
    one, other = (
        score_texts(each, tokenizer, [TEXT], window=100, stride=30) for each in (here, there)
    )
    assert one.bits == pytest.approx(other.bits, rel=1e-5)

    prompts = [tuple(tokenizer.encode(pair.prompt)) for pair in data.held_out_pairs()[:20]]
    assert list(here.write(prompts, 12)) == list(there.write(prompts, 12))


def test_the_command_asks_the_server(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    with terminals() as type_in:
        said = type_in(
            "main.py",
            "eval",
            "core",
            "--max-per-task",
            6,
            "--url",
            f"{server.url}/v1",
            "--json",
            file,
        ).ends(0)
    found = json.loads(file.read_text())
    assert found["subject"]["asked"] == server.url
    assert found["settings"]["max_per_task"] == 6
    assert {each["examples"] for each in found["core"]["tasks"]} == {6}
    assert "CORE" in said
