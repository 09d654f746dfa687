"""DraftModel: a small model drafts tokens for a large one with the same vocabulary (Leviathan et al.,
"Fast inference from transformers via speculative decoding", 2023; speculation.py verifies them).

It has its own KV pool in this process, and computes a run's known tokens when it first drafts for it. It
drafts greedily.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from baton.engine.boot import Engine
from baton.engine.errors import within_memory
from baton.engine.pool import Pool
from baton.errors import InputError, OutOfMemory
from baton.kv.row import Logits, Row
from baton.model_files import ModelFiles
from decode_worker.speculation import Wanted


@dataclass(slots=True)
class _Sequence:
    """A run in the draft model's pool: `computed` tokens have their KV there."""

    computed: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class DraftModel:
    """A Proposer (see speculation.py). Runs without room in its pool get no draft."""

    def __init__(self, engine: Engine, blocks: int, *, context: int, chunk: int) -> None:
        self._engine = engine
        self._context = min(context, engine.files.max_positions)
        self._chunk = chunk
        self._pool = Pool.private(engine.layout, blocks, engine.device, spare=True)
        self._free = list(range(blocks))
        self._runs: dict[str, _Sequence] = {}

    def prepare(self, most_rows: int) -> None:
        """Before serving: see Engine.prepare."""
        self._engine.prepare(self._pool, most_rows, self._context)

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Nothing where memory runs out; the sequences are then computed again."""
        try:
            return within_memory("drafts", self._engine.device, partial(self._propose, wanted))
        except OutOfMemory:
            for each in wanted:
                self.forget(each.run)
            return [[] for _ in wanted]

    def _propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in wanted]
        open_ = [i for i, each in enumerate(wanted) if each.most and self._room(each)]
        self._catch_up([wanted[i] for i in open_])
        while open_:
            rows = [self._row(wanted[i], drafts[i]) for i in open_]
            tokens = self._engine.runner.greedy(self._pool, rows)
            for i, token in zip(open_, tokens, strict=True):
                drafts[i].append(token or 0)  # logits that are not finite: any draft will do
            open_ = [i for i in open_ if len(drafts[i]) < wanted[i].most]
        return drafts

    def forget(self, run: str) -> None:
        sequence = self._runs.pop(run, None)
        if sequence is not None:
            self._free += sequence.blocks

    def _room(self, wanted: Wanted) -> bool:
        """Take blocks for known and draft tokens; forget computed tokens that were not accepted."""
        tokens = len(wanted.token_ids) + wanted.most
        if tokens > self._context:
            return False
        sequence = self._runs.setdefault(wanted.run, _Sequence())
        while len(sequence.blocks) < self._engine.layout.blocks_for(tokens):
            if not self._free:
                return False
            sequence.blocks.append(self._free.pop())
        same = 0
        for mine, theirs in zip(sequence.computed, wanted.token_ids[:-1], strict=False):
            if mine != theirs:
                break
            same += 1
        del sequence.computed[same:]
        return True

    def _catch_up(self, wanted: Sequence[Wanted]) -> None:
        """Compute all known tokens but the last, in chunks."""
        for each in wanted:
            sequence = self._runs[each.run]
            while len(sequence.computed) < len(each.token_ids) - 1:
                start = len(sequence.computed)
                end = min(start + self._chunk, len(each.token_ids) - 1)
                tokens = list(each.token_ids[start:end])
                self._engine.runner.fill(self._pool, [Row(tokens, start, sequence.blocks)])
                sequence.computed += tokens

    def _row(self, wanted: Wanted, drafts: Sequence[int]) -> Row:
        """The last known or drafted token, for the next forward."""
        sequence = self._runs[wanted.run]
        token = drafts[-1] if drafts else wanted.token_ids[-1]
        row = Row([token], len(sequence.computed), sequence.blocks, Logits.LAST)
        sequence.computed.append(token)
        return row


def check_draft(draft: ModelFiles, target: ModelFiles) -> None:
    """InputError if their vocabularies differ."""
    if draft.vocab_size != target.vocab_size:
        raise InputError(
            f"{draft.name} cannot draft for {target.name}: {draft.vocab_size} tokens against "
            f"{target.vocab_size}; a draft model must share the vocabulary"
        )
    if draft.tokenizer_file.read_bytes() != target.tokenizer_file.read_bytes():
        raise InputError(
            f"{draft.name} cannot draft for {target.name}: their tokenizer.json differ; a draft "
            "model must share the vocabulary"
        )
