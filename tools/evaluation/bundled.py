"""What is evaluated where nothing is said: documents that the bundled model was not trained on, and a
small bundle of tasks in this folder. No torch."""

from itertools import islice
from pathlib import Path

from tools.evaluation.generation import Pair
from tools.training.demo_corpus import documents

HELD_OUT = "held-out"
SEED = 0
TEXTS = 500  # as baton/models/demo/README.md measures
PAIRS = 100
BUNDLE = Path(__file__).parent / "bundle"
MODEL = "demo"


def texts() -> list[str]:
    """Held-out documents, each to be closed by the model's end token."""
    return list(islice(documents(split=HELD_OUT, seed=SEED), TEXTS))


def pairs() -> list[Pair]:
    """Held-out documents cut in the middle, between two words."""
    return [_halves(text) for text in islice(documents(split=HELD_OUT, seed=SEED), PAIRS)]


def _halves(text: str) -> Pair:
    words = text.split(" ")
    middle = len(words) // 2
    return Pair(" ".join(words[:middle]), (" ".join(words[middle:]),))
