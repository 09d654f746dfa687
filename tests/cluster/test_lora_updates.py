"""`main.py serve --allow-lora-updates`: real processes load an adapter, lose workers and the router, and
unload it while it runs."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from transformers import AutoModelForCausalLM

from baton.model_files import BUNDLED
from baton.text import Tokenizer
from tests.cluster.processes import short_folder, terminals
from tests.cluster.serving import Server
from tests.cluster.test_lora import LENGTH, PROMPT, asked
from tests.patience import PATIENCE_S, until
from tests.torch.lora_files import Written, continued, linears, merged, write_adapter

BASE = BUNDLED["demo"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    folder = tmp_path_factory.mktemp("adapters")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    names = linears(model)[::3]
    some = write_adapter(folder / "some", model, names, seed=1, target_modules=names)
    foreign = write_adapter(folder / "foreign", model, names, seed=2, target_modules=names)
    config = foreign.folder / "adapter_config.json"
    wrong = json.loads(config.read_text()) | {"target_modules": "all-linear"}
    config.write_text(json.dumps(wrong))
    return {"some": some}


@pytest.fixture(scope="module")
def server(adapters: dict[str, Written]) -> Iterator[Server]:
    root = adapters["some"].folder.parent
    with short_folder() as folder, terminals() as type_in:
        yield Server(type_in, folder, "--dtype", "float32", "--allow-lora-updates", root)


def change(server: Server, what: str, **body: object) -> tuple[int, str]:
    """Status and text."""
    request = urllib.request.Request(
        f"{server.url}/v1/{what}_lora_adapter",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def names(server: Server) -> list[str]:
    return [each.id for each in server.client.models.list()]


def test_an_adapter_comes_outlives_the_processes_and_goes(
    server: Server, adapters: dict[str, Written]
) -> None:
    prompt = Tokenizer(BASE / "tokenizer.json").encode(PROMPT)
    wanted = continued(merged(BASE, adapters["some"]), prompt, LENGTH)
    assert wanted != continued(merged(BASE, None), prompt, LENGTH)
    status, text = change(server, "load", lora_name="foreign", lora_path="foreign")
    assert status == 400
    assert "decode-0" in text or "prefill-0" in text
    assert "its file holds nothing for it" in text
    assert change(server, "load", lora_name="x", lora_path=str(Path("/etc")))[0] == 400
    assert names(server) == ["demo"]
    status, text = change(server, "load", lora_name="some", lora_path="some")
    assert (status, text) == (200, "Success: LoRA adapter 'some' added successfully.")
    assert names(server) == ["demo", "some"]
    assert asked(server, "some", ahead=2) == wanted  # the decode worker dies in the middle
    until(lambda: server.metric("workers_lost_total") >= 1, "the loss of the worker")
    server.kill("prefill-0")
    assert asked(server, "some") == wanted
    assert asked(server, "some", ahead=2, victim="router") == wanted
    assert names(server) == ["demo", "some"]

    stream = server.client.completions.create(
        model="some", prompt=PROMPT, temperature=0, max_tokens=LENGTH, stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    ids: list[int] = []
    for number, chunk in enumerate(stream):
        if number == 0:
            assert change(server, "unload", lora_name="some")[0] == 200
            assert names(server) == ["demo"]
        ids += [each for choice in chunk.choices for each in choice.token_ids or []]
    assert ids == wanted
    with pytest.raises(openai.NotFoundError):
        asked(server, "some")
    assert change(server, "unload", lora_name="some")[0] == 404
