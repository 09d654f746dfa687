"""A part of the matrix of families, each for a trait of its own. `make families` does the whole."""

from pathlib import Path

import pytest

from tests.torch.catalog import NAMES
from tests.torch.matrix import COMPILED, DOCUMENT, LENGTHS, TOKENS, WHERE, Verdict, document, judge
from tests.torch.test_native_program import library

TRAITS = {
    "cohere": "stacks the halves of rotary pairs",
    "glm4": "turns a part of a head, in pairs",
    "apertus": "chooses an activation by sign",
    "ministral3": "scales queries by the logarithm of their position",
    "minicpm3": "writes its keys in parts",
    "hunyuan_v1_moe": "asks a packed router for its dtype",
}
IN_TORCH = {"hunyuan_v1_moe"}


@pytest.mark.parametrize("family", TRAITS)
def test_tokens_are_those_of_transformers_with_prefill_and_decode_apart_and_together(
    family: str, tmp_path: Path
) -> None:
    library()  # skips where nothing can be compiled
    verdict = judge(family, tmp_path / family)
    assert verdict.right, verdict
    assert verdict.compared > len(WHERE) * len(LENGTHS) * TOKENS / 2  # few ties
    assert (verdict.backend != COMPILED) == (family in IN_TORCH), verdict.backend


def test_the_document_has_every_family_that_transformers_knows() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in NAMES if f"\n| {name} |" not in text] == []


def test_a_wrong_family_shows() -> None:
    assert not Verdict("llama", backend=COMPILED, compared=160, wrong=1).right
    assert not Verdict("llama", backend=COMPILED).right  # nothing was compared
    page = document([Verdict("llama", backend=COMPILED, compared=160, wrong=1)])
    assert "| llama | compiled | 159 of 160 |" in page
