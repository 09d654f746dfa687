"""A part of the matrix of families, each for a trait of its own. `make families` does the whole."""

from pathlib import Path

import pytest

from tests.torch.catalog import NAMES
from tests.torch.matrix import (
    COMPILED,
    DOCUMENT,
    LENGTHS,
    TOKENS,
    WHERE,
    Verdict,
    document,
    judge,
    recorded,
)
from tests.torch.test_native_program import library

TRAITS = {
    "cohere": "stacks the halves of rotary pairs",
    "glm4": "turns a part of a head, in pairs",
    "apertus": "chooses an activation by sign",
    "ministral3": "scales queries by the logarithm of their position",
    "minicpm3": "writes its keys in parts",
    "gemma3n_text": "writes into a part of a tensor",
    "deepseek_v2": "chooses experts in groups, and turns pairs as complex numbers",
}


@pytest.mark.parametrize("family", TRAITS)
def test_tokens_are_those_of_transformers_with_prefill_and_decode_apart_and_together(
    family: str, tmp_path: Path
) -> None:
    library()  # skips where nothing can be compiled
    verdict = judge(family, tmp_path / family)
    assert verdict.right, verdict
    assert verdict.compared > len(WHERE) * len(LENGTHS) * TOKENS / 2  # few ties
    assert verdict.backend == COMPILED


def test_the_document_has_every_family_that_transformers_knows() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in NAMES if f"\n| {name} |" not in text] == []


def test_a_wrong_family_shows() -> None:
    assert not Verdict("llama", backend=COMPILED, compared=160, wrong=1).right
    assert not Verdict("llama", backend=COMPILED).right  # nothing was compared
    page = document([Verdict("llama", backend=COMPILED, compared=160, wrong=1)])
    assert "| llama | compiled | 159 of 160 |" in page


def test_the_document_holds_what_it_was_made_from() -> None:
    """So a part of the families can be judged again, and the others keep their rows."""
    text = DOCUMENT.read_text(encoding="utf-8")
    known = recorded(text)
    assert document(list(known.values())) == text
    assert known["llama"] == Verdict("llama", backend=COMPILED, compared=320)
    assert known["bert"].refusal.startswith("bert is BertLMHeadModel, which cannot be served: ")
    assert known["longcat_flash"].not_built
    one = recorded(document([Verdict("jetmoe", backend="in torch", compared=9, wrong=2)]))
    assert one == {"jetmoe": Verdict("jetmoe", backend="in torch", compared=9, wrong=2)}
    assert recorded(text.replace("transformers 5", "transformers 4")) == {}
