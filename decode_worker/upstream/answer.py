"""Answer: one run's tokens as another server generates them, and its end. Pure.

A run that has tokens already is resumed in one of two ways:

    continue   from prompt and tokens, as every run here. The next token must not depend on which of them
               were generated: greedy, or seeds by position; no grammar, no penalty on generated tokens.
    repeat     from the prompt, with the same seed; the tokens that are known are compared and dropped.
               Other servers draw from a stream of random numbers that begins with the answer, and a
               text that is tokenized again need not be the same tokens.

llama.cpp leaves out ids in the middle of a character, and counts them (Gap): what follows is asked for
as one reply, which has all.

If the repeated tokens differ, the answer continues from those that were sent, with another seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from baton.params import GenerationParams
from baton.wire.messages import Start
from decode_worker.upstream.dialects import Asked, Dialect, Piece, without_free_calls
from decode_worker.upstream.texts import Reader, Texts, Untellable


class Faulty(Exception):
    """The upstream did not do what was asked: another try may succeed."""


class Hopeless(Exception):
    """Another try at this upstream, or at one like it, ends in the same way."""


class Diverged(Exception):
    """The upstream generated other tokens than before, from the same prompt and seed."""


class Gap(Exception):
    """The upstream generated more tokens than it sent ids for."""


@dataclass(slots=True)
class Answer:
    """A run at the upstream. Like a Run it can be buffered (token_buffer.py)."""

    token_ids: list[int]
    prompt_tokens: int  # of token_ids; the others were generated
    params: GenerationParams
    dialect: Dialect
    vocabulary: int
    texts: Texts | None = None  # for a dialect of text
    repeats: int = 0  # tokens that the upstream generates again; 0: it continues from all
    sent: bool = False  # a token of this run was sent to the router
    ended: bool = False
    call: int = 0  # the HTTP request that serves it
    streamed: bool = True
    _reader: Reader | None = field(init=False, default=None)
    _received: int = field(init=False, default=0)  # ids of the present request
    _repeated: int = field(init=False, default=0)  # of these, so far
    _shift: int = field(init=False, default=0)  # of the seed

    @classmethod
    def of(
        cls, order: Start, dialect: Dialect, vocabulary: int, texts: Texts | None = None
    ) -> "Answer":
        """For a Start whose params this dialect supports."""
        ids, prompt = list(order.token_ids), order.prompt_tokens
        params = without_free_calls(order.params)
        repeats = 0 if _continues(params, dialect) else len(ids) - prompt
        return cls(ids, prompt, params, dialect, vocabulary, texts, repeats)

    @property
    def generated(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    def asked(self, model: str) -> Asked:
        """What to ask for now. Raises RequestError if the prompt must be a text and is none."""
        params, have = self.params, 0 if self.repeats else self.generated
        if self._shift and params.sampling is not None:
            other = (params.sampling.choice + self._shift) % 2**31
            params = replace(params, sampling=replace(params.sampling, choice=other))
        ids = self.token_ids[: self.prompt_tokens + have]
        text = "" if self.texts is None else self.texts.prompt(ids, have)
        self._reader = None if self.texts is None else Reader(self.texts)
        return Asked(
            model,
            ids,
            params.max_new_tokens - have,
            max(0, params.min_tokens - have),
            params,
            self.streamed,
            text,
        )

    def take(self, piece: Piece) -> Iterator[tuple[int, str | None]]:
        """New tokens, each already in `token_ids`; the last with the finish reason. Raises Faulty,
        Hopeless, Diverged or Gap."""
        if piece.error:
            raise Faulty(f"an error in the stream: {piece.error}")
        if self._reader is not None:
            yield from self._take_text(piece, self._reader)
            return
        if piece.token_ids is None:
            raise Hopeless(f"it sent text without token ids; needed is {self.dialect.needs}")
        self._received += len(piece.token_ids)
        if self.streamed and piece.total is not None and piece.total > self._received:
            raise Gap
        yield from self._take_ids(piece.token_ids)
        if piece.finish is not None and not self.ended:
            yield self._last(piece)

    def _take_ids(self, ids: Sequence[int]) -> Iterator[tuple[int, str | None]]:
        for token in ids:
            if token >= self.vocabulary:
                raise Hopeless(f"it sent token id {token}, the vocabulary has {self.vocabulary:,}")
            if self._repeated < self.repeats:
                if token != self.token_ids[self.prompt_tokens + self._repeated]:
                    raise Diverged
                self._repeated += 1
                continue
            yield self._append(token)
            if self.ended:
                return

    def _take_text(self, piece: Piece, reader: Reader) -> Iterator[tuple[int, str | None]]:
        """Its own limit ends the answer, whether the text has as many tokens here or not."""
        try:
            ids = reader.feed(piece.text, ends=piece.finish is not None)
        except Untellable as error:
            raise Hopeless(str(error)) from error
        yield from self._take_ids(ids[:-1])
        if ids and not self.ended:
            limited = piece.finish == "length" and self._repeated == self.repeats
            for token, finish in self._take_ids(ids[-1:]):
                self.ended |= limited
                yield token, finish or ("length" if limited else None)
        if piece.finish is not None and not self.ended:
            yield self._last(piece)

    def go_on(self) -> None:
        """After Diverged: continue from the tokens that were sent. Raises Hopeless with a grammar, whose
        state the upstream would not know."""
        if self.params.grammar:
            raise Hopeless(
                "it generated other tokens than before from the same prompt and seed, and an answer "
                "with a grammar cannot go on from its middle"
            )
        self.repeats = self._repeated = self._received = 0
        self._shift = self.generated

    def ask_whole(self) -> None:
        """After Gap."""
        self.streamed = False
        self.repeats = 0 if _continues(self.params, self.dialect) else self.generated
        self._repeated = self._received = 0

    def _append(self, token: int) -> tuple[int, str | None]:
        self.token_ids.append(token)
        stops = token in self.params.stop_token_ids and self.generated > self.params.min_tokens
        full = self.generated >= self.params.max_new_tokens
        self.ended = stops or full
        return token, "stop" if stops else "length" if full else None

    def _last(self, piece: Piece) -> tuple[int, str | None]:
        """The upstream ended the answer by a token that it did not show, or for a reason of its own."""
        if self._repeated < self.repeats:
            raise Diverged
        stops = self.params.stop_token_ids
        if piece.finish == "stop" and stops:
            token = piece.end_id if piece.end_id in stops and piece.end_id is not None else stops[0]
            self.token_ids.append(token)
            self.ended = True
            return token, "stop"
        if piece.finish == "stop":
            raise Hopeless("it ended the answer although no token ends it (ignore_eos)")
        if piece.finish == "length":
            raise Hopeless(
                f"it ended after {self.generated} of {self.params.max_new_tokens} tokens: its context is "
                "shorter than this cluster's; start router and workers with its --max-model-len"
            )
        raise Faulty(f"it ended the answer with {piece.finish!r:.80}")


def _continues(params: GenerationParams, dialect: Dialect) -> bool:
    """The next token is the same whether the last ones were generated or part of the prompt."""
    sampling = params.sampling
    assert sampling is not None, "params of a run are resolved"
    if params.grammar or sampling.presence_penalty or sampling.frequency_penalty or dialect.text:
        return False
    return sampling.greedy or dialect.seeds_by_position
