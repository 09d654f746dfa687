"""Evaluation through the engine: transformers' losses and texts, known models, the bundled tasks."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from baton.engine.pool import Pool
from baton.errors import ModelError
from baton.kv.row import Row
from baton.model_files import resolve_model
from baton.text import Tokenizer
from sampler.narrow import greedy
from tests.torch.families import (
    CONTEXT,
    TEXT,
    VOCABULARY,
    make_model,
    make_tokenizer,
    save_checkpoint,
)
from tools.evaluation import data, engine
from tools.evaluation.bundle import read_bundle
from tools.evaluation.core import run_task
from tools.evaluation.engine import EngineSubject
from tools.evaluation.generation import write
from tools.evaluation.perplexity import score_texts, windows
from tools.evaluation.subject import Span
from tools.training import demo_training

LONG = f"{TEXT} {TEXT[::-1]} {TEXT.upper()}"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread would only wait for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo() -> EngineSubject:
    return subject(data.BUNDLED_MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(resolve_model(data.BUNDLED_MODEL).tokenizer_file)


def subject(model: str | Path, dtype: str = "float32") -> EngineSubject:
    return EngineSubject(resolve_model(str(model)), device="cpu", dtype=dtype, threads=None)


def loss_of_transformers(folder: Path, ids: list[int], window: int, stride: int) -> float:
    """Mean of ln p over the same windows, by labels of -100 where nothing is scored."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    for each in windows(len(ids), window=window, stride=stride):
        given = torch.tensor([ids[each.begin : each.end]])
        labels = given.clone()
        labels[:, : each.start - each.begin] = -100
        with torch.inference_mode():
            total += model(given, labels=labels).loss.item() * (each.end - each.start)
    return total / (len(ids) - 1)


def is_compiled(it: EngineSubject) -> bool:
    """Whether it computes in native code, which has the same bits however the work is cut."""
    return it.about.runs.endswith("compiled for this CPU")


@pytest.mark.parametrize(
    ("family", "window", "stride"),
    [("gpt2", 100, 30), ("gpt2", 64, 64), ("qwen2", CONTEXT - 1, 1), ("gemma2", 100, 30)],
)
def test_perplexity_is_that_of_transformers_on_the_same_windows(
    tmp_path: Path, family: str, window: int, stride: int
) -> None:
    folder = save_checkpoint(family, tmp_path / family)
    text = LONG if stride > 1 else TEXT
    tokenizer = Tokenizer(folder / "tokenizer.json")
    ids = tokenizer.encode(text)
    assert len(ids) > window
    found = score_texts(subject(folder), tokenizer, [text], window=window, stride=stride)
    expected = loss_of_transformers(folder, ids, window, stride)
    assert found.tokens == len(ids) - 1
    assert found.perplexity == pytest.approx(math.exp(expected), rel=2e-5)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(tmp_path: Path) -> None:
    model = make_model("qwen2", attention="eager")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    found = score_texts(
        subject(tmp_path), Tokenizer(tmp_path / "tokenizer.json"), [TEXT], window=50
    )
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_scores_do_not_depend_on_how_the_work_is_cut(
    demo: EngineSubject, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = tokenizer.encode(" ".join(data.held_out_texts()[:2]))
    spans = [
        Span((*head[:cut], *tokenizer.encode(end)), start)
        for cut, start in ((100, 100), (100, 99), (100, 1), (20, 17), (5, 3))
        for end in (" in the dark.", " snow", " of a long and winding road, which nobody knew.")
    ]
    whole = list(demo.score(spans))
    assert [len(each.logprobs) for each in whole] == [len(s.token_ids) - s.start for s in spans]
    alone = [next(demo.score([span])) for span in spans]
    monkeypatch.setattr(engine, "READ", 40)
    monkeypatch.setattr(demo, "_rows", 7)
    cut = list(demo.score(spans))
    if is_compiled(demo):
        assert cut == whole == alone
    for others in (
        cut,
        alone,
    ):  # in torch, without native code, sums are rounded as the rows are cut
        for ours, theirs in zip(others, whole, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_held_out_perplexity_is_that_of_the_models_card(
    demo: EngineSubject, tokenizer: Tokenizer
) -> None:
    """By the code that trained it, which measured the card's figure on more of these texts."""
    assert data.HELD_OUT == demo_training.HELD_OUT
    model = AutoModelForCausalLM.from_pretrained(
        data.BUNDLE.parents[2] / "baton" / "models" / "demo", dtype=torch.float32
    ).eval()
    fast = demo_training.Tokenizer.from_file(str(resolve_model(data.BUNDLED_MODEL).tokenizer_file))
    expected = demo_training.perplexity(model, fast, texts=15)
    found = score_texts(demo, tokenizer, data.held_out_texts()[:15], end=0)
    assert found.perplexity == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("native")
def test_int8_foresees_nearly_as_well(demo: EngineSubject, tokenizer: Tokenizer) -> None:
    assert is_compiled(demo), demo.about.runs
    texts = data.held_out_texts()[:8]
    fine = score_texts(demo, tokenizer, texts)
    coarse = score_texts(subject(data.BUNDLED_MODEL, "int8"), tokenizer, texts)
    assert coarse.perplexity == pytest.approx(fine.perplexity, rel=5e-3)
    assert coarse.perplexity != fine.perplexity


def test_continuations_are_those_of_transformers(
    demo: EngineSubject, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ROWS", 3)
    model = AutoModelForCausalLM.from_pretrained(
        data.BUNDLE.parents[2] / "baton" / "models" / "demo", dtype=torch.float32
    ).eval()
    prompts = [tuple(tokenizer.encode(pair.prompt)) for pair in data.held_out_pairs()[:4]]
    for prompt, found in zip(prompts, demo.write(prompts, 90), strict=True):
        ids = generated(model, prompt, 90)
        assert found.ended == (ids[-1] == 0)
        assert found.tokens == len(ids)
        whole = tokenizer.decode([*prompt, *ids])
        assert tokenizer.decode(prompt) + found.text == whole


def generated(model: PreTrainedModel, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new_tokens, do_sample=False, temperature=None, top_k=None, top_p=None,
        )  # fmt: skip
    return [int(each) for each in output[0, len(prompt) :]]


def test_a_model_whose_logits_are_no_numbers_is_refused(demo: EngineSubject) -> None:
    class Broken:
        def run(self, pool: Pool, rows: Sequence[Row]) -> torch.Tensor:
            return torch.full((sum(len(row.token_ids) for row in rows), 8), math.nan)

        def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
            return greedy(self.run(pool, rows))

    broken = copy.copy(demo)
    broken._engine = replace(demo._engine, runner=Broken())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="NaN"):
        list(broken.score([Span((1, 2, 3), 1)]))
    with pytest.raises(ModelError, match="NaN"):
        list(broken.write([(1,)], 3))


def test_a_model_meets_its_own_words_again(demo: EngineSubject, tokenizer: Tokenizer) -> None:
    """What it writes, given as the reference, has full marks."""
    pairs = data.held_out_pairs()[:4]
    first = write(demo, tokenizer, pairs, new_tokens=24)
    again = [replace(p, references=(text,)) for p, text in zip(pairs, first.texts, strict=True)]
    found = write(demo, tokenizer, again, new_tokens=24)
    assert found.bleu == pytest.approx(100)
    assert found.rouge.longest == 1


RIGHT = {  # of the bundled tasks, by the bundled model
    "story_facts": 27,
    "story_schema": 14,
    "story_endings": 24,
    "common_sense": 9,
    "common_schema": 7,
    "opposites": 0,
}


def test_the_bundled_model_answers_the_bundled_tasks_as_it_did(
    demo: EngineSubject, tokenizer: Tokenizer
) -> None:
    results = [run_task(demo, tokenizer, task, begin=[]) for task in read_bundle(data.BUNDLE)]
    assert {each.task.label: each.right for each in results} == RIGHT
    facts = results[0]
    assert facts.accuracy > facts.task.baseline + 3 * facts.standard_error
    assert not any(v.cropped or v.moved or not v.fits for each in results for v in each.verdicts)
