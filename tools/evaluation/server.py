"""ServerSubject: a model asked through OpenAI's completions API, of our server or any other that takes
token ids, echo and logprobs (vLLM and SGLang do). Standard library alone, no torch.

The texts are tokenized here, with the tokenizer of a local folder, and sent as ids: so the server's must
be the same, which is tried first. Scoring is a request for one more token that echoes its prompt with
logprobs.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from baton.client.http import HttpClient, error_message, unreachable
from baton.errors import InputError, ProtocolError
from baton.model_files import ModelFiles
from baton.text import Tokenizer
from tools.evaluation.subject import About, Continuation, Meter, Scored, Span

TRIES = 6
WAIT_S = 2.0  # where the server does not say for how long
BUSY = (429, 503)
AT_ONCE, WRITING = 4, 16  # requests under way: of many spans each, of one prompt each
SPANS, SPAN_TOKENS = 16, 8192  # in one request
PROBE = "If both sides cut this sentence into the same tokens, they have the same tokenizer."


@dataclass(slots=True)
class Patient:
    """Asks a site, and asks again while it is busy."""

    site: HttpClient
    pause: Callable[[float], None] = field(default=time.sleep)

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that it answers. Raises InputError if it refuses, or nobody is there."""
        where = f"{self.site.url}{path}"
        for left in reversed(range(TRIES)):
            try:
                reply = self.site.ask(path, body)
            except OSError as error:
                raise unreachable(self.site, error) from error
            except ValueError as error:
                raise ProtocolError(f"{where} answers no JSON: {error}") from error
            if reply.status < 400:
                return reply.body
            if reply.status not in BUSY or not left:
                raise InputError(f"{where} says {reply.status}: {error_message(reply.body)}")
            self.pause(_seconds(reply.retry_after))
        raise AssertionError("the last try returns or raises")


class ServerSubject:
    """See Subject. `files` is the local folder of the served model; `served` its name there, None if
    the server has one model only."""

    def __init__(self, site: HttpClient, files: ModelFiles, *, served: str | None) -> None:
        self.meter = Meter()
        self._patient = Patient(site)
        self._served, context = _model(self._patient, served)
        context = min(context or files.max_positions, files.max_positions)
        self.about = About(
            model=self._served,
            fingerprint=files.fingerprint,
            asked=site.url,
            runs="a server",
            call="request",
            context=context,
            longest=context - 1,  # one more token is asked for, and must have room
        )
        self._try(Tokenizer(files.tokenizer_file))

    def score(self, spans: Iterable[Span]) -> Iterator[Scored]:
        """See Subject."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for group in pool.map(self._score, _groups(spans)):
                yield from group

    def write(self, prompts: Iterable[tuple[int, ...]], new_tokens: int) -> Iterator[Continuation]:
        """See Subject."""
        with ThreadPoolExecutor(WRITING) as pool:
            yield from pool.map(lambda prompt: self._write(prompt, new_tokens), prompts)

    def _try(self, tokenizer: Tokenizer) -> None:
        """Can it score at all, and has it this tokenizer? Servers write single tokens differently
        (spaces, halves of characters), so half of them must be the same."""
        ids = tokenizer.encode(PROBE)
        (choice,) = self._echoed([ids])
        _scored(Span(tuple(ids), 1), choice)
        theirs = choice["logprobs"].get("tokens") or []
        pairs = zip(ids, theirs, strict=False)
        same = sum(tokenizer.decode([ours]).strip() == str(word).strip() for ours, word in pairs)
        if theirs and same < len(ids) / 2:
            raise InputError(
                f"{self._served} at {self.about.asked} has another tokenizer than the local folder: "
                "say with --model which model it is"
            )

    def _score(self, spans: Sequence[Span]) -> list[Scored]:
        choices = self._echoed([list(span.token_ids) for span in spans])
        return [_scored(span, choice) for span, choice in zip(spans, choices, strict=True)]

    def _echoed(self, prompts: list[list[int]]) -> list[Any]:
        choices = self._ask(prompt=prompts, max_tokens=1, echo=True, logprobs=1)["choices"]
        if len(choices) != len(prompts):
            raise ProtocolError(f"{len(prompts)} prompts were sent, {len(choices)} answers came")
        return sorted(choices, key=lambda choice: int(choice["index"]))

    def _write(self, prompt: Sequence[int], new_tokens: int) -> Continuation:
        # repetition_penalty: 1, whatever the model's generation_config.json says.
        answer = self._ask(prompt=list(prompt), max_tokens=new_tokens, repetition_penalty=1.0)
        choice = answer["choices"][0]
        tokens = int(answer["usage"]["completion_tokens"])
        return Continuation(str(choice["text"]), tokens, choice["finish_reason"] == "stop")

    def _ask(self, **body: Any) -> Any:
        since = time.perf_counter()
        answer = self._patient.ask(
            "/v1/completions", {"model": self._served, "temperature": 0, **body}
        )
        self.meter.called(since)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise ProtocolError(f"{self.about.asked} answers without choices: {str(answer)[:200]}")
        return answer


def _scored(span: Span, choice: Mapping[str, Any]) -> Scored:
    """Of the echoed prompt, the part that was asked about."""
    told = choice.get("logprobs") or {}
    values, tops = told.get("token_logprobs") or [], told.get("top_logprobs") or []
    here = slice(span.start, len(span.token_ids))
    logprobs, best = values[here], tops[here]
    short = min(len(values), len(tops)) < len(span.token_ids)
    if short or None in logprobs or None in best:
        raise ProtocolError(
            f"the server gives {len(values)} logprobs for an echoed prompt of "
            f"{len(span.token_ids)} tokens: it cannot be asked to score (echo with logprobs)"
        )
    return Scored(
        tuple(float(each) for each in logprobs),
        tuple(
            each >= max(top.values(), default=each)
            for each, top in zip(logprobs, best, strict=True)
        ),
    )


def _model(patient: Patient, served: str | None) -> tuple[str, int | None]:
    """Its name at the server, and its context if that is told."""
    answer = patient.ask("/v1/models")
    listed = answer.get("data") if isinstance(answer, dict) else None
    known = {str(each["id"]): each for each in listed or [] if "id" in each}
    if served is None and len(known) == 1:
        (served,) = known
    if served not in known:
        asked = "which one is meant is not said" if served is None else f"{served!r} is not one"
        raise InputError(
            f"{patient.site.url} serves {', '.join(known) or 'no model'}, and {asked}: use --served-model"
        )
    context = known[served].get("max_model_len")
    return served, context if isinstance(context, int) else None


def _groups(spans: Iterable[Span]) -> Iterator[list[Span]]:
    group: list[Span] = []
    tokens = 0
    for span in spans:
        if group and (len(group) == SPANS or tokens + len(span.token_ids) > SPAN_TOKENS):
            yield group
            group, tokens = [], 0
        group.append(span)
        tokens += len(span.token_ids)
    if group:
        yield group


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdigit() else WAIT_S
