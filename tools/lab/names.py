"""Names: the studies by name, in the order they run, the module of each, and who reads which option."""

MODULES = {
    "baseline": "tools.lab.baseline",
    "batching": "tools.lab.batching",
    "kv-cache": "tools.lab.kv_cache",
    "claims": "tools.lab.claims",
    "disagg": "tools.lab.disagg",
}
"""Imported by name, each in a process of its own: a study that is missing stops no other."""

STUDIES = tuple(MODULES)

READERS = {
    "batch_sizes": ("batching",),
    "windows_ms": ("batching",),
    "prompt_lengths": ("kv-cache", "disagg"),
    "rates": ("disagg",),
}
"""Fields of Setting that only these studies read; all the others are for every study."""

DEFAULT_MODEL = "random:gpt2-4k"
"""GPT-2 small with made-up weights and room for 4,096 tokens: its costs are those of the real one, and
the bundled model is so small that the processes, not the weights, are most of a step."""

QUICK_MODEL = "demo"


def model_of(named: str | None, *, quick: bool) -> str:
    """The user's, else the studies' own."""
    return named or (QUICK_MODEL if quick else DEFAULT_MODEL)


NEW_TOKENS, QUICK_TOKENS = 50, 6
"""Of an answer in the study of the KV cache (and, the first, in the baseline), and with --quick."""
