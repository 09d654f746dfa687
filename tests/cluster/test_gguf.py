"""`python main.py` with a GGUF file: worker processes agree on the model, and its tokens are those of the
plain folder that it is converted to."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton import LLM, SamplingParams
from baton.models.convert import convert_folder
from tests.cluster.processes import Terminal, short_folder, terminals
from tests.torch.gguf_files import MIXED, Written, write_gguf

PROMPTS = ["In the future", "Once", "A relay is run in legs, and 42 runners"]


@pytest.fixture
def type_in() -> Iterator[Callable[..., Terminal]]:
    with terminals() as run:
        yield run


def test_a_gguf_file_in_prefill_and_decode_processes(
    tmp_path: Path, type_in: Callable[..., Terminal]
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma2", Written(kinds=MIXED))
    convert_folder(path, tmp_path / "plain")
    with LLM(str(tmp_path / "plain"), dtype="float32") as llm:
        greedy = SamplingParams(temperature=0)
        answers = llm.generate(PROMPTS, greedy, max_new_tokens=20)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("".join(f"{each}\n" for each in PROMPTS))
    with short_folder() as runs:
        words = ("main.py", "--model", tmp_path / "model.gguf", "-b", 2, "-l", 20, "--greedy")
        terminal = type_in(
            *words, "--format", "jsonl", "--prompts", prompts, "-o", out, TMPDIR=str(runs)
        )
        said = terminal.ends(0)
    assert "1 prefill worker" in said
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [tuple(each["token_ids"]) for each in written] == [each.token_ids for each in answers]
