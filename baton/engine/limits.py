"""The part of the self-test that crosses limits: lengths at which a config changes what is computed.

These are the limits of the rotary frequencies (baton/rope.py) and the sliding windows. For each of them
four sequences run in the same batches:

    short      far below the limit
    up to it   as long as the limit
    beyond     a prompt that is longer
    growing    a prompt below the limit, and generated tokens up to beyond it

    forward 1  all tokens but the last nine      forward 2  eight tokens      forward 3  the last one

Everything runs twice, the second time in reverse order, because a model must keep no state. Limits for
which this takes too long are left out. For rotary frequencies the modules alone are then tested there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from baton.engine.attention import NAME
from baton.engine.pool import Pool
from baton.engine.probe import windows
from baton.engine.rotary import Rotary
from baton.engine.runner import Forward
from baton.kv.layout import KVLayout
from baton.kv.row import Logits, Row

AFFORDABLE = 1e11
"""Operations for one limit: two or three seconds on two cores. That is every limit of a small model, one
of 40 tokens for GPT-2, and none for a model of billions of weights."""

MOST_TOKENS = 2048
"""Eager attention needs memory for the square of a sequence's length."""

TAIL = 9
"""Tokens at a sequence's end that are compared: eight in one forward and the last."""

Compared = tuple[str, torch.Tensor, torch.Tensor]
"""What was computed, our values and the model's own: [positions, values]."""


@dataclass(frozen=True, slots=True)
class Text:
    """A test sequence of which the first `floor` tokens are a prompt."""

    token_ids: list[int]
    floor: int
    blocks: list[int]

    def row(self, forward: int) -> Row:
        """Its part of forward 0, 1 or 2."""
        cuts = (0, len(self.token_ids) - TAIL, len(self.token_ids) - 1, len(self.token_ids))
        start, end = cuts[forward : forward + 2]
        logits = Logits.ALL if forward else Logits.LAST
        return Row(self.token_ids[start:end], start, self.blocks, logits, self.floor)


def limits(model: PreTrainedModel) -> list[int]:
    """The lengths within the model's context beyond which it computes something else."""
    config: Any = model.config.get_text_config(decoder=True)
    rotary = Rotary.of(model)
    positions = int(getattr(config, "max_position_embeddings", 2**62))
    context = rotary.rule.context(positions) if rotary else positions
    found = {window for window in windows(type(model).__name__, config) if window}
    found |= set(rotary.rule.limits) if rotary else set()
    return sorted(limit for limit in found if limit + 2 * TAIL < context)


def crossed(runner: Forward, model: PreTrainedModel, layout: KVLayout) -> Iterator[Compared]:
    """Logits of the sequences of every affordable limit."""
    weights = sum(weight.numel() for weight in model.parameters())
    for limit in limits(model):
        tokens = 3 * (limit + 2 * TAIL) * 3  # sequences, computed once by the model and twice here
        if limit <= MOST_TOKENS and 2 * weights * tokens <= AFFORDABLE:
            yield from _across(runner, model, layout, limit)


def _across(
    runner: Forward, model: PreTrainedModel, layout: KVLayout, limit: int
) -> Iterator[Compared]:
    texts = _texts(model, layout, limit)
    own = [own_logits(model, t.token_ids, floor=t.floor, last=TAIL) for t in texts]
    pool = Pool.private(layout, sum(len(text.blocks) for text in texts), runner.device)
    for order in (range(len(texts)), reversed(range(len(texts)))):
        chosen = list(order)
        ours: dict[int, list[torch.Tensor]] = {i: [] for i in chosen}
        for forward in range(3):
            found = runner.run(pool, [texts[i].row(forward) for i in chosen])
            lines = 1 if forward != 1 else TAIL - 1
            for i, part in zip(chosen, found.clone().split(lines), strict=True):
                ours[i] += [part] if forward else []  # the first forward is there for its KV
        for i in chosen:
            what = f"a sequence of {len(texts[i].token_ids)} tokens, where a limit is {limit},"
            yield what, torch.cat(ours[i]), own[i]


def _texts(model: PreTrainedModel, layout: KVLayout, limit: int) -> list[Text]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    rotary = Rotary.of(model)
    least = TAIL + 1
    lengths = [(least, least), (max(limit, least), max(limit, least)), (limit + TAIL, limit + TAIL)]
    if rotary is not None and not rotary.rule.recomputes:
        lengths.append((limit + TAIL + 1, max(1, limit - 1)))
    texts: list[Text] = []
    taken = 0
    for tokens, floor in lengths:
        ids = [(7 * i + 3 + 11 * len(texts)) % vocabulary for i in range(tokens)]
        blocks = list(reversed(range(taken, taken + layout.blocks_for(tokens))))
        texts.append(Text(ids, floor, blocks))
        taken += len(blocks)
    return texts


@torch.inference_mode()
def own_logits(
    model: PreTrainedModel, token_ids: Sequence[int], *, floor: int, last: int
) -> torch.Tensor:
    """A sequence run alone with transformers' attention and rotary modules, as generate() would: the
    first `floor` tokens in one forward, then one by one. fp32 logits [last, vocabulary]."""
    rotary = Rotary.of(model)
    ids = torch.tensor([list(token_ids)], device=model.device)
    model.set_attn_implementation("eager")
    try:
        if rotary is None:
            return _logits(model, ids, floor, last)
        with rotary.alone():
            return _logits(model, ids, floor, last)
    finally:
        model.set_attn_implementation(NAME)


def _logits(model: PreTrainedModel, ids: torch.Tensor, floor: int, last: int) -> torch.Tensor:
    tokens = ids.shape[1]
    if floor >= tokens:
        return _kept(model(input_ids=ids, use_cache=False, logits_to_keep=last))
    found: list[torch.Tensor] = []
    past = None
    for start, end in pairwise((0, *range(floor, tokens + 1))):
        output = model(
            input_ids=ids[:, start:end],
            past_key_values=past,
            use_cache=True,
            logits_to_keep=min(last, end - start),
        )
        past = output.past_key_values
        found.append(_kept(output))
    return torch.cat(found)[-last:]


def _kept(output: Any) -> torch.Tensor:
    logits: torch.Tensor = output.logits[0].float()
    return logits


@torch.inference_mode()
def rotated(model: PreTrainedModel) -> Iterator[Compared]:
    """Cosines and sines of tokens around every limit of the rotary frequencies, of several sequences in
    one forward and of each alone in a new module."""
    rotary = Rotary.of(model)
    if rotary is None:
        return
    limits = rotary.rule.limits
    floors = sorted({2, *chain(*[(n - 1, n, n + 1, 3 * n) for n in limits])} - {0, 1})
    steps = [[sorted({0, floor // 2, floor - 1}), [floor], [floor + 1]] for floor in floors]
    for layers, module in rotary.named():
        named = {"layer_type": layers} if layers else {}
        alone: list[torch.Tensor] = []
        for forwards in steps:
            with rotary.alone():
                alone += [_turned(module, positions, named) for positions in forwards]
        places = [(floor, p) for floor, forwards in zip(floors, steps, strict=True)
                  for p in chain(*forwards)]  # fmt: skip
        for order in (places, places[::-1]):
            rows = [Row([0], p, [], rope_floor=floor) for floor, p in order]
            with rotary.rotating(rows):
                ours = _turned(module, [p for _, p in order], named)
            theirs = torch.cat(alone)
            yield "its rotary embedding", ours, theirs if order is places else theirs.flip(0)


def _turned(
    module: torch.nn.Module, positions: Sequence[int], named: dict[str, str]
) -> torch.Tensor:
    """All that a rotary module returns for these positions of one forward: [positions, values]."""
    device = next(module.buffers()).device
    x = torch.zeros(1, len(positions), 1, device=device)
    found = module(x, torch.tensor([list(positions)], device=device), **named)
    parts = [found] if isinstance(found, torch.Tensor) else list(found)
    real = [torch.view_as_real(p).flatten(-2) if p.is_complex() else p for p in parts]
    return torch.cat([part.reshape(len(positions), -1) for part in real], dim=-1)
