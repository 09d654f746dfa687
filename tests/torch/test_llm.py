"""LLM in this process: what a call returns, what it refuses, and what is left when it is cut short."""

import asyncio
import gc
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pytest
from tokenizers import Tokenizer as FastTokenizer

from baton import LLM, Completion, SamplingParams, generate
from baton.errors import BatonError, InputError, RequestError
from baton.local import LocalCluster
from baton.model_files import resolve_model
from tests.patience import PATIENCE_S

GREEDY = SamplingParams(temperature=0)
PROMPTS = ["In the future", "Once upon a time", "The"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", max_num_seqs=8) as llm:
        yield llm


@pytest.fixture
def polls(monkeypatch: pytest.MonkeyPatch) -> "Polls":
    """Look at, or break, what happens in the thread that owns the cluster."""
    return Polls(monkeypatch)


class Polls:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.then = 0, -1, lambda: None
        self.busy = threading.Event()
        self.clusters: set[LocalCluster] = set()
        inner = LocalCluster.poll

        def poll(cluster: LocalCluster, timeout_s: float) -> object:
            self.clusters.add(cluster)
            if timeout_s:  # requests are running
                self.count += 1
                if self.count == self.at:
                    self.then()
                if self.count == 3:
                    self.busy.set()
            return inner(cluster, timeout_s)

        monkeypatch.setattr(LocalCluster, "poll", poll)

    def idle(self) -> bool:
        return all(len(each.router.ledger) == 0 for each in self.clusters)


def alone(llm: LLM) -> list[str]:
    return [llm.generate(each, GREEDY, max_new_tokens=9).text for each in PROMPTS]


def test_a_string_gives_one_completion_and_a_list_gives_a_list(llm: LLM) -> None:
    one = llm.generate(PROMPTS[0], GREEDY, max_new_tokens=9)
    assert isinstance(one, Completion)
    assert one.finish_reason == "length"
    assert len(one.token_ids) == 9
    assert one.prompt_tokens == 3
    assert one.logprobs is None
    assert one.timings.total_s > 0
    assert [each.text for each in llm.generate([PROMPTS[0]], GREEDY, max_new_tokens=9)] == [
        one.text
    ]
    assert llm.generate([]) == []


def test_token_ids_may_stand_for_a_text(llm: LLM) -> None:
    assert llm._tokenizer is not None
    ids = [llm._tokenizer.encode(each) for each in PROMPTS]
    assert [each.text for each in llm.generate(ids, GREEDY, max_new_tokens=9)] == alone(llm)


def test_many_prompts_come_back_in_order(llm: LLM) -> None:
    """More than are with the router at once, of unlike lengths."""
    prompts = [PROMPTS[i % 3] for i in range(100)]
    texts = [each.text for each in llm.generate(prompts, GREEDY, max_new_tokens=9)]
    assert texts == alone(llm) * 33 + alone(llm)[:1]


def test_generate_is_one_call(llm: LLM) -> None:
    assert generate("demo", PROMPTS[0], 9, "cpu", sampling=GREEDY) == alone(llm)[0]
    assert generate("demo", PROMPTS[0], 9, sampling=GREEDY, colocated=True) == alone(llm)[0]
    with pytest.raises(InputError, match="at least one character"):
        generate("demo", "", 9)
    with pytest.raises(RequestError, match="the context is 2,304"):
        generate("demo", PROMPTS[0], 9_999)


def test_options_reach_the_model(llm: LLM) -> None:
    found = llm.generate(PROMPTS[0], GREEDY, max_new_tokens=9, logprobs=2)
    assert found.logprobs is not None
    assert [len(each.top_ids) for each in found.logprobs] == [2] * 9
    stop = found.text.split()[-1]
    stopped = llm.generate(PROMPTS[0], GREEDY, max_new_tokens=20, stop=stop)
    assert stopped.finish_reason == "stop"
    assert stop not in stopped.text
    assert llm.generate(PROMPTS[0], max_new_tokens=9, regex="[0-9]{3}").text.isdigit()
    drawn = [llm.generate(PROMPTS[0], SamplingParams(seed=7), max_new_tokens=9).text for _ in "ab"]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (["a", ""], r"prompts\[1\]: the prompt is empty"),
        (["a", "b", "c" * 9_000], r"prompts\[2\]: the prompt has .* context is 2,304"),
        (["a", [1, 2, 9_999]], r"prompts\[1\]: token id 9999 is outside the vocabulary"),
        (["a", "\ud800"], r"prompts\[1\]: the prompt holds half a surrogate pair at character 0"),
        ([1, 2], r"prompts\[0\]: a prompt is a string or a list of token ids, got int"),
        ("", "the prompt: the prompt is empty"),
    ],
)
def test_a_bad_prompt_is_named_before_anything_starts(
    llm: LLM, polls: Polls, prompts: list[str], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        llm.generate(prompts)
    assert polls.count == 0


def test_a_bad_option_is_named(llm: LLM) -> None:
    with pytest.raises(InputError, match="no option 'max_tokens'; the options are max_new_tokens"):
        llm.generate("a", max_tokens=3)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="at most one of json_schema"):
        llm.generate("a", regex="a", json_object=True)
    with pytest.raises(InputError, match="prompts must be a string or a list, got generator"):
        llm.generate(each for each in PROMPTS)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="leave num_prefill and num_decode out"):
        LLM(router="ipc:///nowhere", num_decode=1)
    with pytest.raises(InputError, match="max_num_seqs must be at least 1, got 0"):
        LLM("demo", max_num_seqs=0)


def test_a_stream_gives_the_same_text_in_pieces(llm: LLM) -> None:
    pieces = list(llm.stream(PROMPTS[0], GREEDY, max_new_tokens=9))
    assert len(pieces) > 3
    assert "".join(pieces) == alone(llm)[0]


def test_leaving_a_stream_aborts_its_request(llm: LLM, polls: Polls) -> None:
    for _ in llm.stream(PROMPTS[0], GREEDY, max_new_tokens=2_000, ignore_eos=True):
        break
    assert llm.generate(PROMPTS[0], GREEDY, max_new_tokens=9).text == alone(llm)[0]
    assert polls.idle()


def test_threads_share_the_model(llm: LLM) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(
            pool.map(lambda i: llm.generate(PROMPTS[i % 3], GREEDY, max_new_tokens=9), range(18))
        )
    assert [each.text for each in found] == alone(llm) * 6


def test_ctrl_c_aborts_the_call_and_leaves_the_llm_usable(llm: LLM, polls: Polls) -> None:
    main = threading.main_thread().ident
    assert main is not None
    polls.at, polls.then = 3, lambda: signal.pthread_kill(main, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as kept:
        llm.generate(PROMPTS, GREEDY, max_new_tokens=2_000, ignore_eos=True)
    assert [each.text for each in llm.generate(PROMPTS, GREEDY, max_new_tokens=9)] == alone(llm)
    assert polls.idle()
    del (
        kept
    )  # until here: an exception that is kept holds the frames of the call, and their generators


CALL = {"generate", "_texts", "_send", "next_requests", "take"}


def test_ctrl_c_at_any_line_of_a_call_aborts_its_requests(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Python raises it is chance: here at each line in turn, until some tokens have come."""
    monkeypatch.setattr("baton.llm.NOT_STREAMED_S", 0.0)
    for at in range(100):
        lines = iter(range(at))

        def trace(frame: FrameType, event: str, _: object, lines: Iterator[int] = lines) -> object:
            if frame.f_code.co_name not in CALL or "baton" not in frame.f_code.co_filename:
                return None
            if event == "line" and next(lines, None) is None:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        with pytest.raises(KeyboardInterrupt) as kept:
            llm.generate(PROMPTS[0], GREEDY, max_new_tokens=2_000, ignore_eos=True)
        sys.settrace(before)
        assert len(llm.generate(PROMPTS[0], GREEDY, max_new_tokens=1).token_ids) == 1
        assert llm._thread._running == {}, f"interrupted at line {at} of the call: {kept.traceback}"


def test_chat_uses_the_template(llm: LLM, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    with pytest.raises(InputError, match="demo has no chat template"):
        llm.chat(messages)
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with LLM("demo", chat_template=file, max_num_seqs=1) as chatty:
        assert chatty.chat(messages, GREEDY, max_new_tokens=9).text == alone(llm)[0]
        pieces = chatty.stream(chatty.chat_ids(messages), GREEDY, max_new_tokens=9)
        assert "".join(pieces) == alone(llm)[0]
        assert chatty.chat_stop_ids == ()


CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]


def test_a_chat_calls_the_tools_that_it_must(tmp_path: Path) -> None:
    file, messages = tmp_path / "chat.jinja", [{"role": "user", "content": "Hi"}]
    file.write_text(
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}<tool_call>\n<function=a>"
        "<parameter=b>"
    )
    with LLM("demo", chat_template=file, max_num_seqs=1) as chatty:
        answer = chatty.chat(messages, GREEDY, tools=TOOLS, tool_choice="required",
                             parallel_tool_calls=False, max_new_tokens=300)  # fmt: skip
        assert answer.tool_calls == (("weather", '{"city": "Oslo"}'),)
        assert (answer.text, answer.finish_reason) == ("", "tool_calls")
        free = chatty.chat(messages, GREEDY, tools=TOOLS, tool_choice="none", max_new_tokens=3)
        assert (free.tool_calls, free.finish_reason) == ((), "length")
        named = {"type": "function", "function": {"name": "x"}}
        with pytest.raises(RequestError, match="none of the tools"):
            chatty.chat(messages, tools=TOOLS, tool_choice=named)
        with pytest.raises(RequestError, match="regex and tools exclude each other"):
            chatty.chat(messages, tools=TOOLS, regex="a")


def test_a_chat_ends_at_the_end_of_its_tokenizer_and_generate_does_not(
    llm: LLM, tmp_path: Path
) -> None:
    ids = llm.generate(PROMPTS[0], GREEDY, max_new_tokens=9).token_ids
    files = resolve_model("demo")
    assert files.folder is not None
    for file in files.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    about = {"eos_token": FastTokenizer.from_file(str(files.tokenizer_file)).id_to_token(ids[4])}
    about["chat_template"] = "{{ messages[0].content }}"
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    messages = [{"role": "user", "content": PROMPTS[0]}]
    with LLM(str(tmp_path), max_num_seqs=1) as chatty:
        assert chatty.chat_stop_ids == (ids[4],)
        answer = chatty.chat(messages, GREEDY, max_new_tokens=9, stop_token_ids=[2])
        assert (answer.token_ids, answer.finish_reason) == (ids[:5], "stop")
        assert chatty.chat(messages, GREEDY, max_new_tokens=9, ignore_eos=True).token_ids == ids
        assert chatty.generate(PROMPTS[0], GREEDY, max_new_tokens=9).token_ids == ids


def test_tasks_share_the_model_and_the_loop_goes_on(llm: LLM) -> None:
    async def work() -> list[str]:
        calls = [llm.agenerate(PROMPTS[i % 3], GREEDY, max_new_tokens=9) for i in range(30)]
        pieces = [each async for each in llm.astream(PROMPTS[0], GREEDY, max_new_tokens=9)]
        return [*(each.text for each in await asyncio.gather(*calls)), "".join(pieces)]

    assert asyncio.run(work()) == alone(llm) * 10 + alone(llm)[:1]


def test_a_cancelled_task_aborts_its_requests(llm: LLM, polls: Polls) -> None:
    async def work() -> str:
        long = asyncio.create_task(llm.agenerate(PROMPTS, GREEDY, max_new_tokens=2_000))
        await asyncio.to_thread(polls.busy.wait, PATIENCE_S)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return (await llm.agenerate(PROMPTS[0], GREEDY, max_new_tokens=9)).text

    assert asyncio.run(work()) == alone(llm)[0]
    assert polls.idle()


def test_what_a_node_raises_is_raised_in_every_call(polls: Polls) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in a node")

    with LLM("demo", max_num_seqs=2) as broken:
        polls.at, polls.then = 2, fail
        with pytest.raises(ZeroDivisionError, match="in a node"):
            broken.generate(PROMPTS, max_new_tokens=500)
        with pytest.raises(BatonError, match="this LLM is closed: in a node"):
            broken.generate("a")


def test_closing_ends_the_calls_of_other_threads(polls: Polls) -> None:
    llm = LLM("demo", max_num_seqs=2)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(llm.generate, PROMPTS, GREEDY, max_new_tokens=2_000)
        assert polls.busy.wait(PATIENCE_S)
        llm.close()
        llm.close()
        with pytest.raises(BatonError, match="close"):
            call.result()
    with pytest.raises(BatonError, match="this LLM is closed"):
        llm.generate("a")


def test_an_llm_nobody_holds_is_closed() -> None:
    llm = LLM("demo", max_num_seqs=1)
    thread = llm._thread._thread
    llm.generate("a", max_new_tokens=1)
    del llm
    gc.collect()
    assert not thread.is_alive()


def test_an_open_llm_does_not_keep_the_process_from_ending_and_torch_comes_late() -> None:
    program = (
        "import sys, baton\n"
        "assert 'baton.llm' not in sys.modules\n"
        "from baton import LLM, SamplingParams\n"
        "assert 'torch' not in sys.modules\n"
        "llm = LLM('demo', max_num_seqs=1)\n"
        "print(llm.generate('In the future', SamplingParams(temperature=0), max_new_tokens=3).text)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert ran.stdout.startswith(", artificial")
    assert ran.stderr == ""
