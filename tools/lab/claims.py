"""The claims study: commonly claimed speed-ups and savings, measured here.

KV cache, half precision, INT8, compiling, torch.compile, speculation, batching, prefix cache: each is the
ratio of two sides that take turns, by a stated definition, and gets a verdict (claims_findings.py). Speed
claims use a shape with realistic costs; speculation needs a model that writes real text.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from baton.clock import monotonic
from baton.errors import BatonError
from baton.machine import this_machine
from baton.model_files import ModelFiles, resolve_model
from tools.lab.claims_clusters import FULL, held, prefix_cache, speculation
from tools.lab.claims_engine import batching, booted, compiled, kv_cache, torch_compile
from tools.lab.claims_findings import Held, Result, claims_table, findings, memory_result
from tools.lab.plots import draw_claims
from tools.lab.questions import QUESTIONS
from tools.lab.shares import FEWEST
from tools.lab.study import Cell, Notebook, Picture, Setting, Study

MODEL, TEXT_MODEL = "random:gpt2", "demo"
FAILURES = (BatonError, OSError, MemoryError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The amount of work."""

    prompt: int
    new: int  # tokens of the KV-cache claim
    rounds: int
    known: int  # tokens of the prefix-cache claim's prompt
    answer: int  # tokens of an answer with speculation
    texts: int  # number of its prompts
    enough: int  # answers or first tokens of a claim that is measured by them
    torch_compile_s: float  # limit, loading and measuring included; 0: skipped


def sizes_for(setting: Setting, context: int) -> Sizes:
    """Sizes for a setting and a model."""
    small = Sizes(min(64, context // 4), 24, 3, min(512, context // 2), 60, 3, 3, 0.0)
    full = replace(small, prompt=min(128, context // 4), new=50, rounds=5, answer=120, texts=8,
                   enough=FEWEST, torch_compile_s=60.0)  # fmt: skip
    sizes = small if setting.quick else full
    if setting.rounds is not None:  # what the user asks for is done, even if it allows no verdict
        return replace(sizes, rounds=setting.rounds, enough=0)
    return sizes


def run(setting: Setting, notebook: Notebook) -> Study:
    """The whole study. Raises InputError or ModelError for a model that cannot be used at all."""
    begun = monotonic()
    already = len(notebook.failures)
    model = setting.model or (TEXT_MODEL if setting.quick else MODEL)
    files = resolve_model(model)
    sizes = sizes_for(setting, files.max_positions)
    results: dict[str, Result] = {}

    def attempt(what: str, measure: Callable[[], list[Result]]) -> None:
        notebook.say(what)
        try:
            for result in measure():
                results[result.key] = result
                notebook.record("claim", **_plain(result))
        except FAILURES as error:
            notebook.failed(what, error)

    dtype = FULL if setting.dtype == "auto" else setting.dtype  # what auto means on a CPU
    _in_process(attempt, files, dtype, sizes)
    attempt("memory", lambda: _memory(model, files, notebook))
    attempt("torch.compile", lambda: [_torch_compile(model, dtype, sizes)])
    attempt(
        "speculation",
        lambda: speculation(
            TEXT_MODEL, "auto", sizes.answer, _rounds(sizes, sizes.texts), sizes.texts, notebook
        ),
    )
    attempt(
        "prefix cache",
        lambda: [
            prefix_cache(model, dtype, sizes.known, _rounds(sizes, 1), setting.seed, notebook)
        ],
    )
    pictures = []
    if results:
        draw_claims(results, setting.output / "claims.png")
        caption = (
            "The claimed range and the measurement of each claim; dots are rounds (log scale)."
        )
        pictures.append(Picture("claims.png", caption))
    return Study(
        name="claims",
        title="Claims",
        question=QUESTIONS["claims"],
        varied="one thing for each claim, everything else unchanged",
        fixed=_fixed(model, dtype, sizes),
        command="python main.py lab claims",
        findings=tuple(findings(results)),
        tables=(claims_table(results),),
        pictures=tuple(pictures),
        failures=tuple(notebook.failures[already:]),
        seconds=monotonic() - begun,
    )


def _rounds(sizes: Sizes, requests: int) -> int:
    """As many rounds of so many requests as a verdict needs, and `sizes.rounds` at least."""
    return max(sizes.rounds, -(-sizes.enough // requests))


def _in_process(
    attempt: Callable[[str, Callable[[], list[Result]]], None],
    files: ModelFiles,
    dtype: str,
    sizes: Sizes,
) -> None:
    """The claims about the engine alone. Its weights are freed on return."""
    engine = None

    def booting() -> list[Result]:
        nonlocal engine
        engine = booted(files, dtype)
        return []

    attempt(f"loading {files.name}", booting)
    if engine is None:
        return
    ready, rounds = engine, sizes.rounds
    attempt("KV cache", lambda: [kv_cache(ready, sizes.prompt, sizes.new, min(3, rounds))])
    attempt("compiling", lambda: [compiled(ready, files, dtype, rounds)])
    attempt("batching", lambda: [batching(ready, rounds)])


def _memory(model: str, files: ModelFiles, notebook: Notebook) -> list[Result]:
    """A failure in one dtype does not affect the other."""
    found: dict[str, Held] = {}
    for dtype in (FULL, "bfloat16", "int8"):
        try:
            found[dtype] = held(model, dtype, files.max_positions, notebook)
            notebook.record("memory", **asdict(found[dtype]))
        except FAILURES as error:
            notebook.failed(f"memory in {dtype}", error)
    pairs = (("half", "bfloat16"), ("int8", "int8"))
    return [
        memory_result(key, found[FULL], found[dtype])
        for key, dtype in pairs
        if FULL in found and dtype in found
    ]


def _torch_compile(model: str, dtype: str, sizes: Sizes) -> Result:
    if not sizes.torch_compile_s:
        raise BatonError("skipped with --quick: it takes up to a minute")
    return torch_compile(model, dtype, sizes.rounds, sizes.torch_compile_s)


def _fixed(model: str, dtype: str, sizes: Sizes) -> dict[str, str]:
    return {
        "machine": str(this_machine()),
        "device": "the CPU, all cores",
        "model of the speed and memory claims": f"{model}, {dtype} unless the claim is about it",
        "model of the speculation claims": TEXT_MODEL,
        "decoding": "greedy, EOS ignored",
        "rounds": f"{sizes.rounds} (KV cache: {min(3, sizes.rounds)}; speculation: "
        f"{_rounds(sizes, sizes.texts)}; prefix cache: {_rounds(sizes, 1)}); the sides take turns, and "
        "the ratio is taken within each round",
        "verdicts": f"from {FEWEST} timed answers, first tokens or steps on each side on",
        "torch.compile": f"gets {sizes.torch_compile_s:g} s, loading and measuring included"
        if sizes.torch_compile_s
        else "skipped",
    }


def _plain(result: Result) -> dict[str, Cell]:
    return {**asdict(result), "ratios": list(result.ratios)}
