"""torch.compile against the same model without it. It has its own process: it may take minutes, or fail.

    python -m tools.lab.claims_torch MODEL DTYPE ROUNDS PARENT

The last line printed is JSON: ms of a decode step without and with it, turn by turn.
"""

import json
import sys
import time
from typing import Any

import torch
from transformers import StaticCache

from baton.engine.device import DTYPES
from baton.engine.loading import load_model
from baton.host import die_with
from baton.model_files import resolve_model

CONTEXT = 110
STEPS = 10  # of one turn: five turns are enough for a verdict


class Turn:
    """One side: a model, and a cache with CONTEXT tokens in it."""

    def __init__(self, model: Any, run: Any, longest: int) -> None:
        self.run, self.at = run, CONTEXT
        self.cache = StaticCache(config=model.config, max_cache_len=longest)
        model(input_ids=torch.full((1, CONTEXT), 5), past_key_values=self.cache, use_cache=True)

    def step(self) -> torch.Tensor:
        """Run one token. Returns its logits, [1, 1, vocabulary]."""
        position = torch.tensor([[self.at]])
        self.at += 1
        found: torch.Tensor = self.run(
            input_ids=torch.tensor([[5]]),
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return found

    def ms(self) -> float:
        """ms of one step, the mean of several."""
        begun = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        return 1e3 * (time.perf_counter() - begun) / STEPS


@torch.inference_mode()
def main(name: str, dtype: str, rounds: int) -> None:
    """Load, compile, measure both in turn."""
    model = load_model(resolve_model(name), torch.device("cpu"), DTYPES[dtype])
    model.set_attn_implementation("sdpa")
    longest = CONTEXT + STEPS * rounds + 8
    eager, compiled = Turn(model, model, longest), Turn(model, torch.compile(model), longest)
    begun = time.perf_counter()
    first = compiled.step()
    compile_s = time.perf_counter() - begun
    off = float((first - eager.step()).abs().max())
    for _ in range(2):  # the second may compile again
        eager.step(), compiled.step()
    ms = [(eager.ms(), compiled.ms()) for _ in range(rounds)]
    print(json.dumps({"ms": ms, "compile_s": compile_s, "off": off, "steps": STEPS * rounds}))


if __name__ == "__main__":
    if die_with(int(sys.argv[4])):
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
