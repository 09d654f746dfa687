"""The bundled demo model: what lies in its folder, what it was trained on, how it writes."""

import importlib
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "baton" / "models" / "demo"
PROMPTS = (
    "In the future, artificial intelligence will",
    "Scientists have discovered a new way to",
    "On a distant planet, aliens are",
    "One of the greatest inventions in human history is",
    "In a peaceful village, the residents daily",
    "In a mysterious forest, explorers found",
    "In a bustling city, people are",
    "In an ancient castle, there is a hidden",
)
TEXTS = (
    "In a peaceful village, the residents daily bake bread.",
    "  two spaces in front, a tab\t, and a line\nand another\r\n",
    "Größe, naïve, Ærøskøbing, señor",
    "日本語のテキスト と 한국어",
    "emoji 🐉🧑‍🚀 and a flag 🇪🇺",
    "\u0000 control \u001b and \u202e direction",
    "",
)
PERPLEXITY_BOUND = 1.4  # the model card says 1.26


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(
        FOLDER, local_files_only=True, dtype=torch.float32
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture
def training() -> ModuleType:
    return importlib.import_module("tools.training.demo_training")


@pytest.fixture(scope="module")
def written(model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """What the model writes to each prompt: new ids, up to the end token. All prompts at once, padded in
    front."""
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    longest, end = max(map(len, prompts)), int(model.config.eos_token_id)
    ids = torch.tensor([[end] * (longest - len(each)) + each for each in prompts])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=100,
            pad_token_id=end,
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
        )
    found = {}
    for prompt, new in zip(PROMPTS, output[:, longest:].tolist(), strict=True):
        found[prompt] = new[: new.index(end) + 1] if end in new else new
    return found


def test_the_folder_is_small_and_holds_safetensors_only() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert [path.name for path in files if path.suffix == ".safetensors"] == ["model.safetensors"]
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_the_model_has_room_for_2304_positions_and_knows_its_end(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    assert model.config.model_type == "gpt2"
    assert model.config.n_positions == 2304
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    assert model.config.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert model.generation_config.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_reads_the_same_tokens(tokenizer: Tokenizer, text: str) -> None:
    auto = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    assert auto.encode(text) == tokenizer.encode(text).ids
    assert auto.decode(auto.encode(text)) == text
    assert auto.eos_token == auto.pad_token == auto.bos_token == "<|endoftext|>"


def test_held_out_perplexity_is_near_the_one_on_the_card(
    model: PreTrainedModel, tokenizer: Tokenizer, training: ModuleType
) -> None:
    assert training.perplexity(model, tokenizer, texts=30) < PERPLEXITY_BOUND


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_does_not_run_in_circles(written: dict[str, list[int]], prompt: str) -> None:
    new = written[prompt]
    eights = Counter(tuple(new[at : at + 8]) for at in range(len(new) - 7))
    assert len(new) >= 40
    assert max(eights.values()) <= 2


def test_the_corpus_is_the_same_for_a_seed_and_another_for_another(training: ModuleType) -> None:
    def first(*, split: str, seed: int) -> list[str]:
        return list(islice(training.documents(split=split, seed=seed), 20))

    train = first(split="train", seed=0)
    assert train == first(split="train", seed=0)
    assert not set(train) & set(first(split="train", seed=1))
    assert not set(train) & set(first(split="held-out", seed=0))
