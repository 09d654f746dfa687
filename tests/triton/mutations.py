"""Breaks the Triton kernels in every way that has a name, one at a time: the check at load must see each.

    make test-triton                                    # among other tests
    .venv-triton/bin/python -m tests.triton.mutations   # alone, one line for each

A mutation replaces a text of triton_kernels.py. Each runs in a process of its own, because a kernel that
writes where it must not may end it; that counts as seen."""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

import tests.triton.conftest  # noqa: F401  (mends the interpreter)
from baton.engine.cuda import triton_kernels
from baton.engine.errors import Unsupported
from tests.triton.kit import PECULIAR, PLAIN, module_of, setting


@dataclass(frozen=True, slots=True)
class Mutation:
    """What is wrong, and the text that makes it so."""

    name: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "wrong stride of tokens", "* HEADS_KV + kv_head  # in", "* (HEADS_KV + 1) + kv_head  # in"
    ),
    Mutation(
        "wrong stride of values", "values + vector[:, None] * DV", "values + vector[:, None] * DK"
    ),
    Mutation("a split ends one key early", "edge + SPLIT)\n", "edge + SPLIT - 1)\n"),
    Mutation("a split ends one key late", "edge + SPLIT)\n", "edge + SPLIT + 1)\n"),
    Mutation("splits of a window counted from 0", "(low // SPLIT + split)", "split"),
    Mutation("no softcap", "scores = softcap - 2.0 * softcap / (power + 1.0)", "scores = scores"),
    Mutation(
        "a window one key too long",
        "position[:, None] - window)",
        "position[:, None] - window - 1)",
    ),
    Mutation(
        "a window that begins one key late", "begin - window + 1, 0)", "begin - window + 2, 0)"
    ),
    Mutation("no sink", " + tl.exp2(sink - top))", ")"),
    Mutation(
        "a sink in base e", ".to(tl.float32) * LOG2E\n        top", ".to(tl.float32)\n        top"
    ),
    Mutation(
        "query heads of another KV head",
        "kv_head * GROUP + m % GROUP",
        "kv_head + m % GROUP * HEADS_KV",
    ),
    Mutation("another KV head in reduce", "head // GROUP) * splits", "head % HEADS_KV) * splits"),
    Mutation(
        "padded rows of a tile are stored",
        "(m < TOKENS * GROUP) & (token < count)",
        "token < count",
    ),
    Mutation("rows past the end of a sequence are stored", " & (token < count)", ""),
    Mutation(
        "scaled twice", 'input_precision="ieee") * scale', 'input_precision="ieee") * scale * scale'
    ),
    Mutation(
        "the block table of another row",
        "row.to(tl.int64) * width",
        "row.to(tl.int64) * (width - 1)",
    ),
    Mutation("blocks of another row", "tables + row.to(tl.int64) * width", "tables"),
    Mutation(
        "reduce without rescaling",
        "kept = tl.exp2(peak - top)\n            totals",
        "kept = tl.where(seen, 1.0, 0.0)\n            totals",
    ),
    Mutation("attend without rescaling", "mixed * kept[:, None], input", "mixed, input"),
    Mutation("sums without rescaling", "total * kept + tl.sum", "total + tl.sum"),
    Mutation("a query does not see itself", "key[None, :] <= position", "key[None, :] < position"),
    Mutation(
        "no causal mask", "there[None, :] & (key[None, :] <= position[:, None])", "there[None, :]"
    ),
    Mutation(
        "whole steps reach too far",
        "tl.minimum(start + begin + 1, context)",
        "tl.minimum(start + begin + TOKENS, context)",
    ),
    Mutation(
        "values past the context are read",
        "of_values = there[:, None] & of_values",
        "of_values = of_values",
    ),
    Mutation(
        "a launch begins with the first tile again", "place + first_tile, tiles", "place, tiles"
    ),
]


def seen(mutation: Mutation, folder: Path) -> str:
    """How the check sees it; empty if it does not."""
    source = Path(triton_kernels.__file__).read_text(encoding="utf-8")
    assert mutation.old in source, f"{mutation.name}: {mutation.old!r} is not in the kernels"
    kernels = module_of(source.replace(mutation.old, mutation.new), folder, "mutated")
    try:
        setting(torch.device("cpu"), kernels=kernels).check([PECULIAR, PLAIN])
    except Unsupported as error:
        return str(error)
    return ""


def in_a_process(mutation: Mutation) -> bool:
    """Whether it is seen, with a line that says how."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        with tempfile.TemporaryDirectory() as folder:
            how = seen(mutation, Path(folder))
        print(f"{mutation.name}: {how or 'NOT SEEN'}", flush=True)
        os._exit(0 if how else 7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        print(f"{mutation.name}: its process ended by signal {-status}", flush=True)
    return status <= 0


def main(wanted: list[str]) -> int:
    """Number of mutations that are not seen, among those whose names hold one of these texts."""
    torch.set_num_threads(1)
    chosen = [each for each in MUTATIONS if not wanted or any(text in each.name for text in wanted)]
    missed = [each.name for each in chosen if not in_a_process(each)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} are seen", flush=True)
    return len(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
