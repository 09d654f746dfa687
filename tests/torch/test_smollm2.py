"""A real chat model, where someone has installed the package that holds it."""

import pytest

from baton import LLM, SamplingParams
from baton.model_packages import how_to_get, packaged_model


@pytest.mark.skipif(packaged_model("smollm2") is None, reason=how_to_get("smollm2"))
def test_smollm2_knows_the_capital_of_france() -> None:
    with LLM("smollm2") as llm:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = llm.chat(question, SamplingParams(temperature=0), max_new_tokens=30)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
