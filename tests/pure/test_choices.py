"""From the router's messages to chunks and whole responses in OpenAI's form."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from baton.client.aio import Queue
from baton.client.tracker import News, PendingRequest
from baton.clock import monotonic
from baton.params import GenerationParams
from baton.server.admission import GROUP_WINDOW, Admission
from baton.server.api_error import ApiError
from baton.server.logprobs import Vocabulary, lists, objects
from baton.server.quotas import Quotas
from baton.server.shapes import (
    ChatShape,
    Choice,
    ChunkEncoder,
    CompletionShape,
    Delta,
    Extras,
    Shape,
    billed,
)
from baton.server.sse import event
from baton.server.stream import Deadlines, GenerationStream, PreparedRequest
from baton.wire.messages import Accepted, Emitted, Failed, Finished, PromptScored, Submit
from baton.wire.records import Logprob, Timings


class Words:
    """Token 7 is " w7"."""

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(f" w{i}" for i in ids)

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def raw_bytes(self, token_id: int) -> bytes:
        return self.token_text(token_id).encode()

    def token_bytes(self, token_id: int) -> None:
        """All tokens are text."""

    special_ids: frozenset[int] = frozenset()


class PretendClient:
    """Records the requests that were submitted and those that were aborted."""

    def __init__(self) -> None:
        self.requests: list[PendingRequest] = []
        self.aborted: list[PendingRequest] = []

    def submit(self, submit: Submit, queue: Queue) -> PendingRequest:
        self.requests.append(PendingRequest(submit, queue))
        return self.requests[-1]

    def abort(self, request: PendingRequest) -> None:
        request.ended = True
        self.aborted.append(request)


def put(request: PendingRequest, news: News) -> None:
    """As the client does when something arrives."""
    request.ended = request.ended or isinstance(news, Finished | Failed)
    request.context.put_nowait((request, news))


HEAD = {"id": "x", "created": 1, "model": "m"}
TOKENS: Any = Words()
END = Finished("r", "length", Timings(cached_tokens=2))


def said(*tokens: int, logprobs: bool = False) -> list[News]:
    chance = (Logprob(-0.5, (1, 2), (-0.5, -1.5)),) if logprobs else ()
    return [Emitted("r", (token,), f" w{token}", chance) for token in tokens]


def together(*tokens: int) -> Emitted:
    """Several tokens in one message, with logprobs."""
    each = [one for one in said(*tokens, logprobs=True) if isinstance(one, Emitted)]
    chances = tuple(one.logprobs[0] for one in each)
    return Emitted("r", tuple(tokens), "".join(one.text for one in each), chances)


def prepared(
    prompts: Sequence[tuple[int, ...]],
    *,
    each: int = 1,
    shape: Shape | None = None,
    admission: Admission | None = None,
    **options: Any,
) -> PreparedRequest:
    """A request with `each` choices of each prompt."""
    shape = shape or CompletionShape(HEAD, TOKENS, Extras(logprobs=-1))
    ticket = (admission or Admission(256)).take("Ann", len(prompts) * each)
    params = (GenerationParams(5),) * len(prompts)
    return PreparedRequest("r", tuple(prompts), params, each, shape, ticket, **options)


def run(
    shape: Shape, news: Sequence[Sequence[News]], **options: Any
) -> tuple[list[Any], GenerationStream]:
    """The events of a stream with one request for each list of news."""

    async def work() -> tuple[str, GenerationStream]:
        client = PretendClient()
        asked = prepared([(8, 9)], each=len(news), shape=shape, include_usage=True, **options)
        stream = GenerationStream(client, asked)  # type: ignore[arg-type]
        stream.start()
        for request, each in zip(client.requests, news, strict=True):
            put(request, Accepted("r", 2, 0.0))
            for one in each:
                put(request, one)
        await stream.accepted()
        sent = b"".join([sent async for sent in stream.events()])
        assert client.aborted == client.requests  # does nothing to those that have ended
        return sent.decode(), stream

    sent, stream = asyncio.run(work())
    assert sent.endswith("\n\n")
    return [event.removeprefix("data: ") for event in sent[:-2].split("\n\n")], stream


def test_what_a_client_does_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three choices wait for a client that reads the first piece only."""
    monkeypatch.setattr("baton.server.stream.BACKLOG", 40)

    async def work() -> tuple[list[Any], PretendClient]:
        client = PretendClient()
        stream = GenerationStream(client, prepared([(8, 9)], each=3))  # type: ignore[arg-type]
        stream.start()
        for request in client.requests:
            put(request, Accepted("r", 2, 0.0))
        await stream.accepted()
        parts = stream.chunks()
        put(client.requests[0], together(1, 2, 3))
        found = [await anext(parts)]
        for token in range(
            4
        ):  # three tokens, three logprobs and six of the likeliest: 12 a message
            assert not client.aborted
            put(client.requests[token % 3], together(4, 5, 6))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert client.aborted == client.requests
        put(client.requests[1], together(7, 8, 9))  # was on its way
        found += [each async for each in parts]
        return found, client

    (first, error), _ = asyncio.run(work())
    assert first["choices"][0]["text"] == " w1 w2 w3"
    assert error["error"]["code"] == "client_too_slow"
    assert "48 tokens and logprobs wait, 40 may" in error["error"]["message"]


def test_an_answer_that_is_not_streamed_may_be_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.server.stream.BACKLOG", 5)

    async def work() -> GenerationStream:
        client = PretendClient()
        stream = GenerationStream(client, prepared([(8, 9)]))  # type: ignore[arg-type]
        stream.start()
        for news in (Accepted("r", 2, 0.0), together(1, 2, 3, 4), together(5, 6), END):
            put(client.requests[0], news)
        await stream.accepted()
        await stream.whole(never_gone)
        return stream

    async def never_gone() -> Any:
        await asyncio.Event().wait()

    assert asyncio.run(work()).choices[0].text == " w1 w2 w3 w4 w5 w6"


def chunks(texts: Sequence[str]) -> list[Any]:
    assert texts[-1] == "[DONE]"
    return [json.loads(text) for text in texts[:-1]]


@pytest.mark.parametrize("groups", [[1, 1, 1, 1, 1], [1, 2, 2], [1, 4], [5]])
def test_tokens_that_come_together_are_one_piece(groups: list[int]) -> None:
    shape = CompletionShape(HEAD, TOKENS, Extras(logprobs=1, prompt_logprobs=-1))
    spoken: list[News] = []
    for count in groups:
        first = sum(groups[: len(spoken)]) + 1
        spoken.append(together(*range(first, first + count)))
    texts, stream = run(shape, [[*spoken, END]])
    found = chunks(texts)
    pieces = [chunk["choices"][0] for chunk in found[:-1]]
    assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert "".join(p["text"] for p in pieces) == " w1 w2 w3 w4 w5"
    tokens = [t for p in pieces[:-1] for t in p["logprobs"]["tokens"]]
    offsets = [o for p in pieces[:-1] for o in p["logprobs"]["text_offset"]]
    assert tokens == [" w1", " w2", " w3", " w4", " w5"]
    assert offsets == [0, 3, 6, 9, 12]
    assert len(pieces) - 1 == len(groups)
    assert found[-1]["usage"]["completion_tokens"] == 5
    assert (
        json.loads(shape.whole(stream.choices, stream.usage()))["choices"][0]["text"]
        == " w1 w2 w3 w4 w5"
    )


def test_a_conversation_says_who_speaks_once_for_each_answer() -> None:
    shape = ChatShape(HEAD, TOKENS, Extras(logprobs=2))
    news = [[*said(1, logprobs=True), END], [*said(2, logprobs=True), END]]
    found = chunks(run(shape, news)[0])
    deltas = [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in found[:-1]]
    speaks = {"role": "assistant", "content": ""}
    assert deltas == [
        (0, speaks), (0, {"content": " w1"}), (0, {}), (1, speaks), (1, {"content": " w2"}), (1, {}),
    ]  # fmt: skip
    (entry,) = found[1]["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == (" w1", list(b" w1"))
    assert [each["token"] for each in entry["top_logprobs"]] == [" w1", " w2"]


def test_an_answer_that_fails_ends_the_stream_with_its_error() -> None:
    shape = CompletionShape(HEAD, TOKENS, Extras(logprobs=-1))
    failed = Failed("r", "worker_lost", "3 workers died")
    found = chunks(run(shape, [[*said(1), failed]])[0])
    assert found[-1]["error"]["code"] == "worker_lost"
    assert found[-1]["error"]["type"] == "server_error"
    assert all(c["choices"][0]["finish_reason"] is None for c in found[:-1])


def test_an_echo_comes_first_and_its_first_token_has_no_logprob() -> None:
    shape = CompletionShape(HEAD, TOKENS, Extras(logprobs=0, prompt_logprobs=0))
    scored = PromptScored("r", (Logprob(-0.25),))
    news: list[News] = [scored, Emitted("r", (1,), " w1", (Logprob(-0.5),)), END]
    _, stream = run(shape, [news])
    stream.choices[0].echo = " w8 w9"
    told = json.loads(shape.whole(stream.choices, stream.usage()))["choices"][0]
    assert told["text"] == " w8 w9 w1"
    assert told["logprobs"] == {
        "tokens": [" w8", " w9", " w1"], "token_logprobs": [None, -0.25, -0.5],
        "top_logprobs": None, "text_offset": [0, 3, 6],
    }  # fmt: skip


def test_of_several_answers_to_a_long_prompt_the_first_goes_ahead() -> None:
    """The others are asked for when it speaks: then the prompt's KV is there."""

    async def work(cancel: bool) -> tuple[list[str], int]:
        client = PretendClient()
        long, short = tuple(range(64)), (1, 2)
        stream = GenerationStream(client, prepared([long, short], each=3))  # type: ignore[arg-type]
        stream.start()
        assert [request.id for request in client.requests] == ["r-0", "r-3", "r-4", "r-5"]
        for request in client.requests:
            put(request, Accepted(request.id, 2, 0.0))
        await stream.accepted()
        if cancel:
            stream.cancel()
            stream.cancel()
        else:
            put(client.requests[0], said(1)[0])
        ends = []
        async for each in stream.deltas():
            if each is stream.choices[0] or isinstance(each, Delta):
                assert cancel or len(client.requests) == 6
            for request in client.requests:
                if not request.ended:
                    put(request, END)
            if not isinstance(each, Delta):
                ends.append(f"{each.index} {each.finish_reason}")
        stream.close()
        return sorted(ends), len(client.requests)

    assert asyncio.run(work(False)) == ([f"{i} length" for i in range(6)], 6)
    assert asyncio.run(work(True)) == ([f"{i} abort" for i in range(6)], 4)


@pytest.mark.parametrize("logprobs", [-1, 1])
@pytest.mark.parametrize("text", ["a", "", "\0", ' "\\', "\n\n\u2028", "ü🙂"])
def test_a_frame_is_the_event_of_its_piece(text: str, logprobs: int) -> None:
    head = HEAD | {"id": "cmpl-\\u0000"}
    for shape in (
        CompletionShape(head, TOKENS, Extras(logprobs=logprobs, prompt_logprobs=-1)),
        ChatShape(head, TOKENS, Extras(logprobs=logprobs)),
    ):
        frames = ChunkEncoder(shape)
        for index in (0, 1, 0):
            choice = Choice(index, (8, 9), token_ids=[3, 4])
            fresh = Delta(choice, text, (4,), (Logprob(-0.5, (1,), (-0.5,)),))
            assert frames.event(fresh) == event(shape.piece(fresh))


def test_what_is_there_at_the_same_time_goes_together() -> None:
    async def work() -> list[bytes]:
        client = PretendClient()
        asked = prepared([(8, 9)], include_usage=True)
        stream = GenerationStream(client, asked)  # type: ignore[arg-type]
        stream.start()
        (request,) = client.requests
        put(request, said(1)[0])
        sent = []
        async for each in stream.events():
            sent.append(each)
            if not request.ended:
                for news in (*said(2, 3), END):
                    put(request, news)
        return sent

    first, rest = asyncio.run(work())
    assert first.count(b"data: ") == 1
    assert rest.count(b"data: ") == 5  # two pieces, the reason, the usage, [DONE]


def test_what_cannot_come_has_a_number_that_json_knows() -> None:
    never = Logprob(float("-inf"), (1,), (float("-inf"),))
    legacy = lists(Vocabulary(TOKENS), [1], [never], [0], top=1)
    assert (legacy["token_logprobs"], legacy["top_logprobs"]) == ([-9999.0], [{" w1": -9999.0}])
    chat = objects(Vocabulary(TOKENS), [1], [never])["content"][0]
    assert (chat["logprob"], chat["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


def test_a_prompt_counts_once_however_many_answers_it_has() -> None:
    shape = CompletionShape(HEAD, TOKENS, Extras(logprobs=-1))
    _, stream = run(shape, [[*said(1), END], [*said(2, 3), END]])
    assert stream.usage() == {
        "prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


def asked(client: PretendClient) -> list[int]:
    """The choices that were submitted."""
    return [int(request.id.rpartition("-")[2]) for request in client.requests]


def test_a_large_request_waits_in_its_own_line() -> None:
    """A window of it is at the router without a token. The next follows when one speaks, or ends."""

    async def work() -> None:
        client, admission = PretendClient(), Admission(256)
        prompts = [(i, 1) for i in range(20)]
        request = prepared(prompts, each=2, admission=admission)
        stream = GenerationStream(client, request)  # type: ignore[arg-type]
        stream.start()
        assert asked(client) == list(range(GROUP_WINDOW))
        assert (admission.waiting, admission.in_lines) == (GROUP_WINDOW, 40 - GROUP_WINDOW)
        deltas = stream.deltas()
        put(client.requests[3], said(1)[0])
        await anext(deltas)
        put(client.requests[5], END)
        await anext(deltas)
        put(client.requests[3], said(2)[0])  # it has spoken before
        await anext(deltas)
        assert asked(client) == list(range(GROUP_WINDOW + 2))
        assert (admission.waiting, admission.in_lines) == (GROUP_WINDOW, 40 - GROUP_WINDOW - 2)
        ends = 1
        while ends < 40:
            for each in client.requests:
                if not each.ended:
                    put(each, END)
            ends += isinstance(await anext(deltas), Choice)
        assert asked(client) == list(range(40))
        assert [choice.finish_reason for choice in stream.choices] == ["length"] * 40
        assert admission.waiting == 0
        await deltas.aclose()
        stream.close()

    asyncio.run(work())


@pytest.mark.parametrize("how", ["close", "cancel", "failed"])
def test_what_waits_in_line_is_never_sent_once_its_request_is_over(how: str) -> None:
    async def work() -> None:
        client, admission = PretendClient(), Admission(256)
        request = prepared([(1, 2)], each=50, admission=admission)
        stream = GenerationStream(client, request)  # type: ignore[arg-type]
        stream.start()
        deltas = stream.deltas()
        if how == "cancel":
            stream.cancel()
            ends = [each async for each in deltas if isinstance(each, Choice)]
            assert [each.finish_reason for each in ends] == ["abort"] * 50
        elif how == "failed":
            put(client.requests[0], Failed("r", "worker_lost", "no"))
            sent = b"".join([part async for part in stream.events()]).decode()
            assert "worker_lost" in sent
            assert sent.endswith("data: [DONE]\n\n")
        stream.close()
        assert all(request.ended for request in client.requests)
        assert (admission.waiting, admission.in_lines) == (0, 0)
        assert len(client.requests) <= GROUP_WINDOW + 1

    asyncio.run(work())


def test_a_submit_says_whose_it_is_and_how_long_it_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("baton.server.stream.monotonic", lambda: 104.0)
    limits = Deadlines(began=100.0, timeout_s=10.0, queue_timeout_s=3.0)
    submit = prepared([(1, 2)], each=2, deadlines=limits).submit(1)
    assert submit.request == "r-1"
    assert (submit.tenant, submit.group) == ("Ann", "r")
    assert (submit.timeout_s, submit.queue_timeout_s) == (6.0, 3.0)
    late = replace(limits, began=0.0)
    assert 0 < prepared([(1,)], deadlines=late).submit(0).timeout_s < 0.01  # 0 would mean: no limit
    assert prepared([(1,)], deadlines=Deadlines()).submit(0).timeout_s == 0


@pytest.mark.parametrize("accepted", [False, True])
def test_a_router_that_forgets_a_deadline_does_not_keep_the_client(
    accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.server.stream.SLACK_S", 0.02)

    async def work() -> str:
        client = PretendClient()
        limits = Deadlines(timeout_s=0.02, queue_timeout_s=9.0)
        stream = GenerationStream(client, prepared([(1,)], each=3, deadlines=limits))  # type: ignore[arg-type]
        stream.start()
        if accepted:
            for request in client.requests:
                put(request, Accepted("r", 2, 0.0))
        try:
            await stream.accepted()
            return b"".join([part async for part in stream.events()]).decode()
        except ApiError as error:
            stream.close()
            return f"{error.status} {error.code}"

    found = asyncio.run(work())
    if accepted:
        assert '"code":"deadline_exceeded"' in found
        assert found.endswith("data: [DONE]\n\n")
    else:
        assert found == "504 deadline_exceeded"


def test_a_tenant_pays_for_prompts_that_were_worked_on() -> None:
    long, short = (7,) * 100, (8, 9)

    def choices() -> list[Choice]:
        """Two of each prompt."""
        return [Choice(index, long if index < 2 else short) for index in range(4)]

    assert billed(choices(), 2) == 0
    for news in (*said(5), END, PromptScored("r", (Logprob(-0.5),))):
        found = choices()
        found[3].update(news)
        assert billed(found, 2) == 2 + isinstance(news, Emitted)
    for index in range(3):
        found[index].update(said(5)[0])
    assert billed(found, 2) == 100 + 2 + 3
    nothing = choices()
    nothing[0].update(Failed("r", "invalid_request", "no"))
    nothing[1].update(Finished("r", "abort", Timings()))
    assert billed(nothing, 2) == 0


@pytest.mark.parametrize("served", [False, True])
def test_a_request_that_the_router_refuses_leaves_its_tenants_tokens(served: bool) -> None:
    quotas = Quotas(tokens=60)
    place = quotas.take("Ann", monotonic())
    place.charge(600, monotonic())
    news: list[News] = [*said(1), END] if served else [Failed("r", "overloaded", "no")]

    async def work() -> None:
        client = PretendClient()
        stream = GenerationStream(client, prepared([(7,) * 600], place=place))  # type: ignore[arg-type]
        stream.start()
        for each in (Accepted("r", 2, 0.0), *news):
            put(client.requests[0], each)
        await stream.accepted()
        assert [_ async for _ in stream.events()]

    asyncio.run(work())
    if not served:
        quotas.take("Ann", monotonic())
        return
    with pytest.raises(ApiError, match="used up"):
        quotas.take("Ann", monotonic())
