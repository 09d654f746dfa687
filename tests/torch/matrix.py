"""The matrix of families: what becomes of each causal language model that transformers knows.

    python -m tests.torch.matrix --write                all of them, into docs/models.md (`make families`)
    python -m tests.torch.matrix --write cohere glm4    these; the others keep their rows
    python -m tests.torch.matrix cohere glm4            these, to the terminal

Each is made tiny, saved as a folder and loaded as any other model. An accepted one answers a ragged batch
greedily, with prefill and decode apart (chunks of 7 tokens, two pools) and colocated. Prompts are longer
than the window, and their chunks end inside blocks. The tokens are compared with those of transformers'
generate() for each prompt alone.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from baton.checkpoints.families import REFUSED
from baton.errors import BatonError
from tests.cluster.real_town import RealTown
from tests.cluster.reference import CLEAR, Model, load
from tests.torch.catalog import NAMES, NotBuilt, save_config, save_tiny, text_families

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "models.md"
CACHE = (
    ROOT / ".pytest_cache" / "home"
)  # as of the tests: programs of tiny models are nobody else's
LENGTHS = (5, 1, 23, 70)
TOKENS = 40
BLOCK = 4
WHERE = (dict(prefills=1, decodes=2, chunk=7, transport="frames"), dict(prefills=0))
COMPILED = "compiled for this CPU"
UNKNOWN = "not judged yet: run `make families`"


@dataclass(frozen=True)
class Verdict:
    """What became of one family."""

    family: str
    refusal: str = ""  # our one line
    not_built: str = ""  # why transformers made none
    backend: str = ""
    compared: int = 0  # tokens, those up to the first that rounding may decide
    wrong: int = 0  # of them

    @property
    def right(self) -> bool:
        """Refused in one line or served with transformers' tokens."""
        return not self.wrong and (bool(self.refusal or self.not_built) or self.compared > 0)


def judge(family: str, folder: Path) -> Verdict:
    """Make it, load it, and compare its tokens with those of transformers."""
    try:
        (save_config if family in REFUSED else save_tiny)(family, folder)
    except NotBuilt as why:
        return Verdict(family, not_built=str(why))
    try:
        model = load(str(folder), block_size=BLOCK)
    except BatonError as error:
        return Verdict(family, refusal=" ".join(str(error).replace(str(folder), family).split()))
    expected = [said(model, prompt) for prompt in prompts(model)]
    compared = wrong = 0
    for where in WHERE:
        with RealTown(model, batch_size=8, blocks=256, **where) as town:  # type: ignore[arg-type]
            answers = town.ask(prompts(model), TOKENS)
        for ours, theirs in zip(answers, expected, strict=True):
            compared += len(theirs)
            wrong += sum(a != b for a, b in zip(ours[: len(theirs)], theirs, strict=True))
    return Verdict(family, backend=model.engine.runner.backend, compared=compared, wrong=wrong)


def prompts(model: Model) -> list[list[int]]:
    """Of LENGTHS, the same for each family of one vocabulary."""
    numbers = torch.Generator().manual_seed(11)
    top = model.files.vocab_size
    return [torch.randint(1, top, (size,), generator=numbers).tolist() for size in LENGTHS]


def said(model: Model, prompt: Sequence[int]) -> list[int]:
    """What generate() says to this prompt alone, up to the first token whose lead over the next one is
    below CLEAR: rounding may decide that one, and then all that follow differ."""
    found = model.generate(prompt, TOKENS)
    unclear = [i for i, lead in enumerate(found.leads) if lead <= CLEAR]
    return found.tokens[: unclear[0]] if unclear else found.tokens


# ---- the document

PAGE = """# Models

Written by `make families`; do not edit. Every causal language model that transformers {version}
knows, made tiny with random weights and loaded like any other folder. A served one answers a ragged
batch greedily, in float32 on a CPU, with prefill and decode in separate workers (chunks of 7 tokens,
two decode workers, KV sent in frames) and colocated: {prompts} prompts of up to {longest} tokens, longer
than the sliding window, {tokens} new tokens each. *Equal* counts the tokens that are those of
`generate()` for the prompt alone, of those compared: the ones before the first whose lead over the next
best is below {clear}, where rounding may decide. A model of your own: [checkpoints](checkpoints.md).

{served} are served, {compiled} of them compiled; {refused} are refused in one line.

## Served

| family | runs | equal |
| --- | --- | --- |
{served_rows}

## Refused

| family | in one line |
| --- | --- |
{refused_rows}

## Not tried

transformers makes no small one of these from a config alone; most of them see, hear or translate.

| family | why |
| --- | --- |
{other_rows}
"""


def document(verdicts: Sequence[Verdict]) -> str:
    """docs/models.md."""
    verdicts = sorted(verdicts, key=lambda each: each.family)
    served = [each for each in verdicts if each.backend]
    refused = [each for each in verdicts if each.refusal]
    others = {each.family: each.not_built for each in verdicts if each.not_built}
    judged = {each.family for each in verdicts}
    others |= {name: UNKNOWN for name in text_families() if name not in judged}
    others |= {name: f"as {name}_text" for name in NAMES if f"{name}_text" in NAMES}
    return PAGE.format(
        version=transformers.__version__,
        prompts=len(LENGTHS),
        longest=max(LENGTHS),
        tokens=TOKENS,
        clear=CLEAR,
        served=len(served),
        compiled=sum(each.backend == COMPILED for each in served),
        refused=len(refused),
        served_rows=_rows((each.family, _how(each.backend), _equal(each)) for each in served),
        refused_rows=_rows((each.family, each.refusal) for each in refused),
        other_rows=_rows(sorted(others.items())),
    )


def recorded(text: str) -> dict[str, Verdict]:
    """The verdicts of a document, by family; none if it is of another transformers."""
    if f"transformers {transformers.__version__}\n" not in text:
        return {}
    found = [
        *(Verdict(name, backend=_backend(how), compared=compared, wrong=compared - equal)
          for name, how, count in _cells(text, "Served")
          for equal, compared in [map(int, count.split(" of "))]),
        *(Verdict(name, refusal=why) for name, why in _cells(text, "Refused")),
        *(Verdict(name, not_built=why) for name, why in _cells(text, "Not tried") if why != UNKNOWN),
    ]  # fmt: skip
    return {each.family: each for each in found if each.family in text_families()}


def _cells(text: str, section: str) -> list[list[str]]:
    """The cells of each row of a section's table."""
    rows = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    return [row[2:-2].split(" | ") for row in rows if row.startswith("| ")][2:]


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _equal(verdict: Verdict) -> str:
    return f"{verdict.compared - verdict.wrong} of {verdict.compared}"


def _how(backend: str) -> str:
    return "compiled" if backend == COMPILED else backend


def _backend(how: str) -> str:
    return COMPILED if how == "compiled" else how


def main(names: Sequence[str], *, write: bool) -> int:
    """Judge these, or all. The document is written after each, so that a run may be interrupted. 1 if
    one is wrong."""
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    warnings.filterwarnings("ignore")  # of modeling code: other families' business
    torch.set_num_threads(1)  # a second thread would only wait for its turn
    known = recorded(DOCUMENT.read_text(encoding="utf-8")) if write else {}
    right = True
    for family in names or list(text_families()):
        with tempfile.TemporaryDirectory() as folder:
            verdict = judge(family, Path(folder) / family)
        right = right and verdict.right
        text = verdict.not_built or verdict.refusal or verdict.backend
        wrong = "" if verdict.right else "WRONG "
        print(f"{wrong}{family:24} {_equal(verdict):>10}  {text}", flush=True)
        if write:
            known[family] = verdict
            DOCUMENT.write_text(document(list(known.values())), encoding="utf-8")
    return int(not right)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    wanted = [each for each in arguments if each != "--write"]
    sys.exit(main(wanted, write=len(wanted) < len(arguments)))
