"""What is no model, through the real command: one line and exit code 3, whoever finds it out."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from baton.model_files import BUNDLED
from tests.cluster.processes import Terminal, terminals

Type = Callable[..., Terminal]


@pytest.fixture
def type_in() -> Iterator[Type]:
    with terminals() as type_in:
        yield type_in


def test_an_adapter_is_refused_before_a_process_is_started(type_in: Type, tmp_path: Path) -> None:
    about = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    typed = type_in("main.py", "infer", "--model", tmp_path)
    typed.refuses(3, f"{tmp_path} is a LoRA adapter and not a whole model: merge it into its base")


def test_a_damaged_weight_is_named_by_the_worker_that_loads_it(
    type_in: Type, tmp_path: Path
) -> None:
    for each in BUNDLED["demo"].glob("*.json"):
        (tmp_path / each.name).write_bytes(each.read_bytes())
    weights = load_file(BUNDLED["demo"] / "model.safetensors")
    (name,) = [each for each in weights if each.endswith("h.1.mlp.c_fc.weight")]
    weights[name][3, 5] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = type_in("main.py", "infer", "--model", tmp_path).ends(3).splitlines()
    assert said[-1] == (
        f"error: {tmp_path} is damaged: its weight {name} holds NaN, which is not a number; fetch or "
        "convert the model again"
    )
    assert [line for line in said if line.startswith(("error", "Traceback"))] == said[-1:]
