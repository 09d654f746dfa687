"""A model twice: once for our engine, once for transformers itself, whose word is what counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from baton.engine.boot import Engine, boot
from baton.model_files import ModelFiles, resolve_model
from baton.text import Tokenizer

CLEAR = 1e-3
"""A greedy step whose two best logits are nearer than this proves nothing: rounding may decide it."""


@dataclass(frozen=True)
class Said:
    """A greedy continuation, and the lead that each token of it had over the next best."""

    tokens: list[int]
    leads: list[float]

    @property
    def lead(self) -> float:
        """The smallest."""
        return min(self.leads)


@dataclass(frozen=True, eq=False)
class Model:
    """A model, loaded once for our engine and once more for transformers itself. Itself and no other:
    what transformers says is kept, also for another engine over the same reference."""

    files: ModelFiles
    engine: Engine
    tokenizer: Tokenizer
    reference: PreTrainedModel

    def generate(
        self,
        prompt: Sequence[int],
        length: int,
        *,
        eos: tuple[int, ...] = (),
        repetition_penalty: float = 1.0,
    ) -> Said:
        """What transformers.generate says greedily. It is asked once."""
        said = _generate(self.reference, tuple(prompt), length, eos, repetition_penalty)
        return Said(list(said.tokens), list(said.leads))

    def clear_prompts(
        self, lengths: Sequence[int], length: int, *, repetition_penalty: float = 1.0
    ) -> list[list[int]]:
        """Prompts of these lengths, with a clear winner at every step of their continuations."""
        found = _clear_prompts(
            self.reference, self.files.vocab_size, tuple(lengths), length, repetition_penalty
        )
        return [list(prompt) for prompt in found]


@cache
def _generate(
    reference: PreTrainedModel,
    prompt: tuple[int, ...],
    length: int,
    eos: tuple[int, ...],
    repetition_penalty: float,
) -> Said:
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            repetition_penalty=repetition_penalty,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    best = torch.cat(out.scores).topk(2).values
    leads = (best[:, 0] - best[:, 1]).tolist()
    return Said(out.sequences[0, len(prompt) :].tolist(), leads)


@cache
def _clear_prompts(
    reference: PreTrainedModel,
    vocab_size: int,
    lengths: tuple[int, ...],
    length: int,
    repetition_penalty: float,
) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(11)
    prompts: list[list[int]] = []
    for size in lengths:
        for _ in range(50):
            ids = torch.randint(1, vocab_size, (size,), generator=numbers).tolist()
            if _generate(reference, tuple(ids), length, (), repetition_penalty).lead > CLEAR:
                prompts.append(ids)
                break
    assert len(prompts) == len(lengths), "no prompt has a clear answer"
    return prompts


def load(name: str, *, block_size: int) -> Model:
    """The model of this name or folder, on the CPU, in fp32."""
    files = resolve_model(name)
    reference = AutoModelForCausalLM.from_pretrained(
        files.folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    reference.generation_config = GenerationConfig()
    return Model(
        files,
        boot(files, device="cpu", dtype="float32", block_size=block_size),
        Tokenizer(files.tokenizer_file),
        reference.eval(),
    )
