"""EngineSubject: a model in this process, run by the same forward that serves.

Spans run in groups of a few thousand tokens. A prefix that several spans of a group share, as the options
of one question do, is computed once:

    prefix   whole blocks before the first scored token, one row for each distinct prefix    no logits
    rest     the tokens after it except the last, which is scored but not read              logits

The logits of a forward take rows x vocabulary floats, so the rest runs in pieces that fit LOGITS_BYTES.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch

from baton.engine.boot import boot
from baton.engine.device import describe_device
from baton.engine.pool import Pool
from baton.errors import ModelError
from baton.kv.row import Logits, Row
from baton.model_files import ModelFiles
from baton.params import GenerationParams
from baton.text import TextStream, Tokenizer
from sampler.logprobs import logprobs_of
from tools.evaluation.subject import About, Continuation, Meter, Scored, Span, groups_of

BLOCK = 16
READ = 4096  # tokens of a group of spans, and of a forward without logits
LOGITS_BYTES = 2**27
ROWS = 32  # continuations generated as one batch
UNSOUND = (
    "the model's logits are not numbers (NaN): its weights are broken, or --dtype has too small a "
    "range: try float32"
)


class EngineSubject:
    """See Subject. `threads`: None for torch's default."""

    def __init__(
        self,
        files: ModelFiles,
        *,
        device: str,
        dtype: str,
        threads: int | None,
        kv_dtype: str = "auto",
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.meter = Meter()
        self._engine = boot(files, device=device, dtype=dtype, kv_dtype=kv_dtype, block_size=BLOCK)
        self._layout = self._engine.layout
        self._tokenizer = Tokenizer(files.tokenizer_file)
        self._rows = max(1, LOGITS_BYTES // (4 * files.vocab_size))  # rows with logits of a forward
        self._pool: Pool | None = None
        # Beyond the first limit a prefix has other KV in every text, and here texts share prefixes.
        within = min([files.max_positions, *files.rope.limits[:1]])
        self.about = About(
            model=files.name,
            fingerprint=files.fingerprint,
            asked="in process",
            runs=f"{describe_device(self._engine.device)}, {self._engine.dtype}, "
            f"KV {self._layout.dtype}, "
            f"{self._engine.runner.backend}",
            call="forward",
            context=within,
            longest=within,
        )

    def score(self, spans: Iterable[Span]) -> Iterator[Scored]:
        """See Subject."""
        for group in groups_of(spans, tokens=READ, most=READ):
            yield from self._score(group)

    def write(self, prompts: Iterable[tuple[int, ...]], new_tokens: int) -> Iterator[Continuation]:
        """See Subject."""
        waiting = iter(prompts)
        while batch := list(islice(waiting, ROWS)):
            yield from self._write(batch, new_tokens)

    def _score(self, group: Sequence[Span]) -> list[Scored]:
        prefixes: dict[tuple[int, ...], list[int]] = {}
        tables: list[list[int]] = []
        used = 0
        for span in group:
            whole = (span.start - 1) // BLOCK
            prefix = span.token_ids[: whole * BLOCK]
            if prefix not in prefixes:
                prefixes[prefix] = list(range(used, used + whole))
                used += whole
            more = self._layout.blocks_for(len(span.token_ids) - 1) - whole
            tables.append([*prefixes[prefix], *range(used, used + more)])
            used += more
        pool = self._pool_of(used)
        self._fill(pool, [(ids, blocks) for ids, blocks in prefixes.items() if ids])
        values, best = self._rest(pool, group, tables)
        return [Scored(tuple(v), tuple(b)) for v, b in zip(values, best, strict=True)]

    def _rest(
        self, pool: Pool, group: Sequence[Span], tables: Sequence[Sequence[int]]
    ) -> tuple[list[list[float]], list[list[bool]]]:
        values: list[list[float]] = [[] for _ in group]
        best: list[list[bool]] = [[] for _ in group]
        pieces = []
        for number, (span, blocks) in enumerate(zip(group, tables, strict=True)):
            begin = (span.start - 1) // BLOCK * BLOCK
            for at in range(begin, len(span.token_ids) - 1, self._rows):
                ids = span.token_ids[at : min(at + self._rows, len(span.token_ids) - 1)]
                pieces.append((number, Row(ids, at, blocks, Logits.ALL)))
        for numbers, rows in _packed(pieces, self._rows):
            since = time.perf_counter()
            logits = self._engine.runner.run(pool, rows)
            targets: list[int] = []
            for number, row in zip(numbers, rows, strict=True):
                targets += group[number].token_ids[row.start + 1 : row.end + 1]
            logprobs, highest = _judged(logits, targets)
            self.meter.called(since)
            at = 0
            for number, row in zip(numbers, rows, strict=True):
                skip = max(0, group[number].start - 1 - row.start)  # read, not scored
                end = at + len(row.token_ids)
                values[number] += logprobs[at + skip : end]
                best[number] += highest[at + skip : end]
                at = end
        return values, best

    def _write(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> Iterator[Continuation]:
        ends = frozenset(self._engine.files.eos_token_ids)
        tables, used = [], 0
        for prompt in prompts:
            more = self._layout.blocks_for(len(prompt) + new_tokens)
            tables.append(list(range(used, used + more)))
            used += more
        pool = self._pool_of(used)
        self._fill(pool, [(p[:-1], t) for p, t in zip(prompts, tables, strict=True) if p[1:]])
        written: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        while live:
            rows = [
                Row(
                    [written[i][-1] if written[i] else prompts[i][-1]],
                    len(prompts[i]) - 1 + len(written[i]),
                    tables[i],
                    Logits.LAST,
                )
                for i in live
            ]
            since = time.perf_counter()
            for i, token in zip(live, self._engine.runner.greedy(pool, rows), strict=True):
                written[i].append(_sound(token))
            self.meter.called(since)
            live = [i for i in live if written[i][-1] not in ends and len(written[i]) < new_tokens]
        for prompt, ids in zip(prompts, written, strict=True):
            stream = TextStream(self._tokenizer, prompt, GenerationParams(new_tokens))
            text = stream.push(ids) + stream.finish()
            yield Continuation(text, len(ids), ids[-1] in ends)

    def _fill(self, pool: Pool, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Compute keys and values of (token ids, blocks) sequences."""
        pieces = [
            (number, Row(ids[at : at + READ], at, blocks))
            for number, (ids, blocks) in enumerate(sequences)
            for at in range(0, len(ids), READ)
        ]
        for _, rows in _packed(pieces, READ):
            since = time.perf_counter()
            self._engine.runner.fill(pool, rows)
            self._engine.wait()
            self.meter.called(since)

    def _pool_of(self, blocks: int) -> Pool:
        """A pool of at least `blocks` blocks: the current one, if it is large enough."""
        if self._pool is None or self._pool.blocks < blocks:
            self._pool = None  # freed before the larger one is allocated
            self._pool = Pool.private(self._layout, blocks, self._engine.device)
        return self._pool


def _judged(logits: torch.Tensor, targets: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Each row's target: its logprob, and whether no logit is higher. `logits`: [rows, vocabulary]."""
    ids = torch.tensor(targets, device=logits.device)
    wanted = logits.gather(1, ids[:, None])[:, 0]
    logprobs: list[float] = logprobs_of(logits, ids).tolist()
    _refuse_nan(logprobs)
    return logprobs, (wanted >= logits.amax(dim=-1)).tolist()


def _refuse_nan(values: Sequence[float]) -> None:
    if any(map(math.isnan, values)):
        raise ModelError(UNSOUND)


def _sound(token: int | None) -> int:
    if token is None:
        raise ModelError(UNSOUND)
    return token


def _packed(pieces: Iterable[tuple[int, Row]], most: int) -> Iterator[tuple[list[int], list[Row]]]:
    """Pieces in order, packed into forwards of at most `most` tokens. Only the last piece of a sequence
    is shorter than `most`, so no forward holds two pieces of one sequence."""
    numbers: list[int] = []
    rows: list[Row] = []
    tokens = 0
    for number, row in pieces:
        if rows and tokens + len(row.token_ids) > most:
            yield numbers, rows
            numbers, rows, tokens = [], [], 0
        numbers.append(number)
        rows.append(row)
        tokens += len(row.token_ids)
    if rows:
        yield numbers, rows
