"""Demo corpus: short English prose on nine themes, written by a seeded grammar, no data needed."""

from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from random import Random

from tools.training.demo_corpus.grammar import Theme, read_theme, write_document

HERE = Path(__file__).parent


@cache
def load_themes() -> tuple[Theme, ...]:
    paths = sorted((HERE / "themes").glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"no theme files in {HERE / 'themes'}")
    common = HERE / "common.txt"
    return tuple(
        read_theme(path, frames=HERE / "frames" / path.name, common=common) for path in paths
    )


def document(*, split: str, seed: int, index: int) -> str:
    """The same text for the same three values, on every machine."""
    random = Random(f"{split}/{seed}/{index}")
    themes = load_themes()
    theme = random.choices(themes, [theme.share for theme in themes])[0]
    return write_document(theme, random)


def documents(*, split: str, seed: int, start: int = 0) -> Iterator[str]:
    """An endless stream of documents; `train` and `held-out` never share a random state."""
    return (document(split=split, seed=seed, index=index) for index in count(start))
