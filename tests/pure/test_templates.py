"""Chat templates: found, rendered as transformers does, stopped when they take too long."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from baton.errors import ModelError, RequestError
from baton.server.templates import (
    ChatTemplate,
    CompiledTemplate,
    ProcessRenderer,
    Renderer,
    ThreadRenderer,
    read_template,
)
from baton.server.turns import Conversation
from tests.patience import PATIENCE_S

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] + eos_token }}"
    "{% endfor %}"
)
ENDLESS = (
    "{% if messages[0]['content'] == 'for ever' %}{% set r = range(99999) %}"
    "{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}{% endif %}{{ messages[0]['content'] }}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [{"role": "user", "content": "Grüße 🙂 {{ 7*7 }} {% raw %}"}]

Kind = type[ThreadRenderer] | type[ProcessRenderer]
Work = Callable[[Any], Awaitable[Any]]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """What `work` makes with a renderer of this kind and template. There is one for each: children
    take time to start."""
    renderers: dict[tuple[Kind, str], Renderer] = {}
    with asyncio.Runner() as runner:

        async def use(work: Work, kind: Kind, source: str, patience_s: float) -> Any:
            if (kind, source) not in renderers:
                template = ChatTemplate(source, TOKENS)
                renderers[kind, source] = kind(template, patience_s=patience_s)
            return await work(renderers[kind, source])

        def run(work: Work, kind: Kind, source: str, patience_s: float = 20.0) -> Any:
            return runner.run(use(work, kind, source, patience_s))

        yield run
        for each in renderers.values():
            runner.run(each.close())


both = pytest.mark.parametrize("kind", [ThreadRenderer, ProcessRenderer])


def theirs(source: str, messages: list[Any], *, prompting: bool = True, tools: Any = None) -> str:
    """transformers' own rendering."""
    texts, _ = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=source,
        add_generation_prompt=prompting, **TOKENS,
    )  # fmt: skip
    return str(texts[0])


@both
@pytest.mark.parametrize("source", [CHATML, ALTERNATING])
def test_the_text_is_transformers_own(run: Run, kind: Kind, source: str) -> None:
    long = [{"role": "user", "content": "x" * 100_000}]
    more = [*USER, {"role": "assistant", "content": "ja"}, {"role": "user", "content": "\x00\n"}]
    talks = [(talk, prompting) for talk in (USER, more, long) for prompting in (True, False)]

    async def work(renderer: Renderer) -> list[str]:
        return [await renderer.render(Conversation(t, p)) for t, p in talks]

    expected = [theirs(source, talk, prompting=prompting) for talk, prompting in talks]
    assert run(work, kind, source) == expected
    assert "{{ 7*7 }}" in expected[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ tools | tojson(indent=2) }}{% if tools is none %}none{% endif %}",
        "{%- for m in messages -%}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ m.content }}"
        "{% break %}{% else %}empty{% endfor %}\n",
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m['content'] | trim }}"
        "{% endfor %}",
        "{% generation %}{{ messages[0].content }}{% set x = 1 %}{% endgeneration %}{{ x is defined }}",
        "{% set ns = namespace(n=0, self=1) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 3 * 2 %}{% endfor %}"
        "{{ ns.n ** 2 }}{{ dict(a=1) }}{{ dict.fromkeys([1]) }}{{ 'ab' * 3 }}{{ [1] * 2 }}",
        "{% macro f(x) %}{{ caller() if caller else x }}{% endmacro %}{{ f('<&>') }}"
        "{% call f(1) %}c{% endcall %}",
        "{{ messages | map(attribute='role') | join(',') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ missing }}{{ strftime_now('%%') }}",
    ],
)  # fmt: skip
def test_what_a_template_may_use_means_the_same_as_there(source: str) -> None:
    messages = [*USER, {"role": "assistant", "content": " ja "}]
    tools = [{"type": "function", "function": {"name": "ü<f>"}}]
    ours = CompiledTemplate(ChatTemplate(source, TOKENS))
    for offered in (None, tools):
        expected = theirs(source, messages, tools=offered)
        assert ours.render(Conversation(messages, tools=offered)) == expected


ODD_TURNS = [
    {"role": "assistant", "content": "4", "reasoning_content": "2 + 2", "tool_calls": None},
    {"role": "assistant", "thinking": "hm", "content": ""},
    {"content": "5", "reasoning": {"a": None}, "role": "assistant", "mood": ["x"], "items": 1},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"ü": None}}}]},
    {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "{}"},
]  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m | tojson }}{% endfor %}",
        "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.thinking }}{{ m.content }}{{ m.tool_calls }}{{ m.name }}{% endfor %}",
        "{% for m in messages %}{{ 'content' in m }}{{ m.content is defined }}{{ m.content is none }}"
        "{{ m.mood }}{{ m.get('items') }}{% for k, v in m.items() %}{{ k }}{% endfor %}"
        "{% endfor %}",
    ],
)  # fmt: skip
def test_a_template_sees_every_field_of_a_message_as_there(source: str) -> None:
    messages = [*USER, *ODD_TURNS]
    dropped = [{k: v for k, v in each.items() if v is not None} for each in messages]
    ours = CompiledTemplate(ChatTemplate(source, TOKENS))
    expected = theirs(source, dropped)  # apply_chat_template drops them first
    assert ours.render(Conversation(messages)) == expected
    assert "<think>2 + 2" in expected or "mood" in expected


def test_who_only_calls_tools_may_say_nothing_where_the_template_wants_a_text() -> None:
    ours = CompiledTemplate(ChatTemplate(CHATML, TOKENS))
    told = ours.render(Conversation([*USER, ODD_TURNS[3]], add_generation_prompt=False))
    assert told.endswith("<|im_start|>assistant\n<|im_end|>\n")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}", "{{ ''.__class__.mro() }}", "{{ lipsum(10 ** 9) }}",
        "{% set ns = namespace(__class__=1) %}", "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ 10 ** (10 ** 10) }}", "{{ 'x' * 10 ** 9 }}", "{{ 10 ** 9 * [1, 2] }}", "{{ range(10 ** 9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 // 0 }}", "{{ 1 + 'a' }}", "{{ a.b.c }}",
        "{{ cycler() }}", "{% if %}", "{{ [1] | batch(0) }}{{ 'a' | no_such_filter }}",
        "{% set ns = namespace(x=3) %}"
        "{% for i in range(99999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    ],
)  # fmt: skip
def test_what_the_sandbox_forbids_is_a_refusal(source: str) -> None:
    template = CompiledTemplate(ChatTemplate(source, {}))
    for _ in range(2):
        with pytest.raises(RequestError, match=r"the chat template refuses these messages: \S"):
            template.render(Conversation(USER))


def test_a_text_without_end_is_ended() -> None:
    source = "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(RequestError, match="more than 4,194,304 characters"):
        CompiledTemplate(ChatTemplate(source, {})).render(
            Conversation([{"role": "user", "content": "x" * 1000}])
        )


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        "{% set r = range(99999) %}{% for i in r if r | sum < 0 %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% set r = range(99999) %}{% set m = [r] * 99999 %}{{ m | map('sum') | list }}",
        "{% set r = range(99999) %}{% set m = [r] * 99999 %}{{ m | select('in', m) | list }}",
    ],
)
def test_whatever_repeats_itself_ends_in_time(source: str) -> None:
    template = CompiledTemplate(ChatTemplate(source, {}), patience_s=0.05)
    with pytest.raises(RequestError, match=r"longer than 0\.05 s"):
        template.render(Conversation([{"role": "user", "content": "for ever"}]))


@both
def test_a_template_may_refuse_and_goes_on(run: Run, kind: Kind) -> None:
    async def work(renderer: Renderer) -> str:
        with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
            await renderer.render(Conversation([*USER, *USER]))
        return await renderer.render(Conversation(USER))

    assert run(work, kind, ALTERNATING).startswith("<s>[INST] ")


@both
def test_a_message_without_what_the_template_needs_is_a_refusal(run: Run, kind: Kind) -> None:
    async def work(renderer: Renderer) -> None:
        with pytest.raises(RequestError, match="refuses"):
            await renderer.render(Conversation([{"role": "user"}]))

    run(work, kind, CHATML)


@both
def test_a_template_that_does_not_end_is_ended(run: Run, kind: Kind) -> None:
    async def work(renderer: Renderer) -> str:
        with pytest.raises(RequestError, match=r"longer than 1 s"):
            await renderer.render(Conversation([{"role": "user", "content": "for ever"}]))
        return await renderer.render(Conversation([{"role": "user", "content": "short"}]))

    assert run(work, kind, ENDLESS, patience_s=1.0) == "short"


@both
def test_a_slow_conversation_does_not_block_the_others(kind: Kind) -> None:
    async def work() -> list[str]:
        renderer = kind(ChatTemplate(ENDLESS, TOKENS), patience_s=3600.0)
        slow = asyncio.create_task(
            renderer.render(Conversation([{"role": "user", "content": "for ever"}]))
        )
        talks = [Conversation([{"role": "user", "content": str(i)}]) for i in range(20)]
        texts = await asyncio.gather(*(renderer.render(talk) for talk in talks))
        assert not slow.done()
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        await renderer.close()
        return texts

    assert asyncio.run(work()) == [str(i) for i in range(20)]


@both
def test_many_at_once_do_not_mix_their_answers(run: Run, kind: Kind) -> None:
    async def work(renderer: Renderer) -> list[str]:
        talks = [Conversation([{"role": "user", "content": str(i)}]) for i in range(50)]
        return await asyncio.gather(*(renderer.render(talk) for talk in talks))

    assert [text.split("\n")[1] for text in run(work, kind, CHATML)] == [
        f"{i}<|im_end|>" for i in range(50)
    ]


@both
def test_one_that_is_cancelled_leaves_no_answer_for_the_next(run: Run, kind: Kind) -> None:
    async def work(renderer: Renderer) -> list[str]:
        lost = Conversation([{"role": "user", "content": "lost"}])
        kept = Conversation([{"role": "user", "content": "kept"}])
        tasks = [asyncio.create_task(renderer.render(lost)) for _ in range(5)]
        await renderer.render(kept)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [await renderer.render(kept) for _ in range(5)]

    assert all("kept" in text for text in run(work, kind, CHATML))


# ---- children


def pids(renderer: ProcessRenderer) -> list[int]:
    return [child._starting.result().pid for child in renderer._children]


async def started(renderer: ProcessRenderer) -> ProcessRenderer:
    await asyncio.gather(*(child._starting for child in renderer._children))
    return renderer


def test_children_that_are_killed_are_replaced() -> None:
    async def work() -> None:
        renderer = await started(ProcessRenderer(ChatTemplate(CHATML, TOKENS)))
        first = await renderer.render(Conversation(USER))
        before = pids(renderer)
        for child in renderer._children:
            os.kill(child._starting.result().pid, signal.SIGKILL)
            await child._starting.result().wait()
        for _ in before:
            assert await renderer.render(Conversation(USER)) == first
        assert not set(before) & set(pids(renderer))
        await renderer.close()

    asyncio.run(work())


def test_a_child_that_cannot_be_interrupted_is_killed() -> None:
    """As one operation may last; here it is stopped from outside."""

    async def work() -> None:
        renderer = ProcessRenderer(ChatTemplate(CHATML, TOKENS), patience_s=0.1)
        before = pids(await started(renderer))
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        for _ in before:
            with pytest.raises(RequestError, match=r"longer than 0\.1 s"):
                await renderer.render(Conversation(USER))
        await started(renderer)
        assert not set(before) & set(pids(renderer))
        await renderer.close()

    asyncio.run(work())


def test_a_child_without_memory_refuses() -> None:
    source = "{{ ('x' * 4000000).replace('x', 'y' * 1000) }}"

    async def work() -> None:
        renderer = ProcessRenderer(ChatTemplate(source, TOKENS))
        with pytest.raises(RequestError, match="too large"):
            await renderer.render(Conversation(USER))
        await renderer.close()

    asyncio.run(work())


def test_a_child_ends_with_its_input() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "baton.server.templates", str(os.getpid())],
        cwd=Path(__file__).resolve().parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    line = json.dumps({"source": CHATML, "tokens": {}, "patience_s": 1.0}).encode() + b"\n"
    child.communicate(line, timeout=PATIENCE_S)
    assert child.returncode == 0


# ---- where a template comes from


def folder_with(tmp_path: Path, **files: object) -> Path:
    for name, content in files.items():
        path = tmp_path / name.replace("_json", ".json").replace("_jinja", ".jinja")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def texts_of(folder: Path) -> tuple[str, str]:
    """What its templates make of a message, and of one with tools."""
    template = read_template(folder)
    assert template is not None
    ours = CompiledTemplate(template)
    return ours.render(Conversation(USER)), ours.render(Conversation(USER, tools=[{}]))


def test_it_is_the_models_own_with_its_tokens(tmp_path: Path) -> None:
    config = {
        "chat_template": "T",
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "pad_token": None,
    }
    folder = folder_with(tmp_path, tokenizer_config_json=config)
    assert read_template(folder) == ChatTemplate("T", TOKENS)


def test_of_several_it_is_the_default_one(tmp_path: Path) -> None:
    many = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    folder = folder_with(tmp_path, tokenizer_config_json={"chat_template": many})
    assert texts_of(folder) == ("B", "A")
    folder = folder_with(tmp_path, tokenizer_config_json={"chat_template": {"default": "C"}})
    assert texts_of(folder) == ("C", "C")


def test_files_of_several_go_before_all_of_the_configuration(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    folder = folder_with(tmp_path, tokenizer_config_json={"chat_template": named})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    with pytest.raises(RequestError, match=r"several chat templates \(tool_use\).*offer tools"):
        texts_of(folder)
    folder_with(tmp_path, chat_template_jinja="D")
    assert texts_of(folder) == ("D", "T")
    (folder / "additional_chat_templates" / "tool_use.jinja").rename(folder / "rag.jinja")
    assert texts_of(folder) == ("D", "D")


def test_several_without_a_default_are_no_template_for_all(tmp_path: Path) -> None:
    named = [{"name": "b", "template": "A"}, {"name": "a", "template": "B"}]
    folder = folder_with(tmp_path, tokenizer_config_json={"chat_template": named})
    with pytest.raises(
        RequestError, match=r"templates \(a, b\) and none.*: choose one with --chat"
    ):
        texts_of(folder)


def test_a_broken_template_for_tools_is_none_for_others(tmp_path: Path) -> None:
    named = {"tool_use": "{% if %}", "default": "B"}
    template = CompiledTemplate(ChatTemplate(named, {}))
    assert template.render(Conversation(USER)) == "B"
    with pytest.raises(RequestError, match="the chat template refuses"):
        template.render(Conversation(USER, tools=[{}]))


def test_children_have_all_templates_too() -> None:
    async def work() -> list[str]:
        renderer = ProcessRenderer(ChatTemplate({"tool_use": "A", "default": "B"}, {}))
        talks = [Conversation(USER), Conversation(USER, tools=[{}])]
        texts = [await renderer.render(talk) for talk in talks]
        await renderer.close()
        return texts

    assert asyncio.run(work()) == ["B", "A"]


def test_a_file_beside_the_model_and_one_that_is_named_go_before(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path, tokenizer_config_json={"chat_template": "A"}, chat_template_jinja="B"
    )
    assert read_template(folder) == ChatTemplate("B", {})
    mine = tmp_path / "mine.jinja"
    mine.write_text("C")
    assert read_template(folder, mine) == ChatTemplate("C", {})
    assert read_template(None, mine) == ChatTemplate("C", {})


def test_many_models_have_none(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    assert read_template(None) is None


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.jinja"):
        read_template(tmp_path, tmp_path / "nowhere.jinja")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read: it is not JSON"):
        read_template(folder_with(tmp_path, tokenizer_config_json="{"))
