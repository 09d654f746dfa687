"""`main.py serve --lora`: processes that load adapters for themselves, and one dies in the middle."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from baton.model_files import BUNDLED
from baton.text import Tokenizer
from tests.cluster.processes import short_folder, terminals
from tests.cluster.serving import Server
from tests.patience import until
from tests.torch.lora_files import Written, continued, linears, merged, write_adapter

BASE = BUNDLED["demo"]
PROMPT = "In the future, artificial intelligence will change how people learn and work together."
LENGTH = 12
"""Up to here the best token leads by 0.04 or more, of logits up to 22: far beyond rounding, so tokens do
not depend on who shares a batch."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    folder = tmp_path_factory.mktemp("adapters")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    names = linears(model)
    return {
        "some": write_adapter(
            folder / "some", model, names[::3], seed=1, target_modules=names[::3]
        ),
        "all": write_adapter(folder / "all", model, names, seed=2, r=8, use_rslora=True),
    }


@pytest.fixture(scope="module")
def server(adapters: dict[str, Written]) -> Iterator[Server]:
    lora = [part for name, each in adapters.items() for part in ("--lora", f"{name}={each.folder}")]
    with short_folder() as folder, terminals() as type_in:
        yield Server(type_in, folder, "--dtype", "float32", *lora)


def asked(server: Server, model: str, ahead: int = 0, victim: str = "decode-0") -> list[int]:
    """Token ids, streamed. When `ahead` of them are here, the victim is killed, wherever it is."""
    ids: list[int] = []
    stream = server.client.completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=LENGTH, stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    for chunk in stream:
        for choice in chunk.choices:
            before = len(ids)
            ids += choice.token_ids or []
            if before < ahead <= len(ids):
                server.kill(victim)
    return ids


def test_each_request_gets_its_adapter_although_the_decode_worker_dies(
    server: Server, adapters: dict[str, Written]
) -> None:
    prompt = Tokenizer(BASE / "tokenizer.json").encode(PROMPT)
    wanted = {
        name: continued(merged(BASE, adapters.get(name)), prompt, LENGTH)
        for name in ("demo", *adapters)
    }
    assert len({tuple(each) for each in wanted.values()}) == 3
    assert [each.id for each in server.client.models.list()] == ["demo", "all", "some"]
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = {name: pool.submit(asked, server, name, 2 * (name == "all")) for name in wanted}
        assert {name: each.result() for name, each in answers.items()} == wanted
    until(lambda: server.metric("workers_lost_total") >= 1, "the loss of the worker")


def test_a_job_runs_all_its_prompts_with_one_adapter(
    adapters: dict[str, Written], tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text(f"{PROMPT}\n")
    wanted = continued(
        merged(BASE, adapters["all"]), Tokenizer(BASE / "tokenizer.json").encode(PROMPT), LENGTH
    )
    with short_folder() as folder, terminals() as type_in:
        type_in(
            "main.py", "--prompts", prompts, "-l", LENGTH, "--greedy", "--ignore-eos", "--colocated",
            "--dtype", "float32", "--format", "jsonl", "-o", out,
            "--lora", f"all={adapters['all'].folder}", TMPDIR=str(folder),
        ).ends(0)  # fmt: skip
    assert json.loads(out.read_text())["token_ids"] == wanted
