"""Chat templates: found, rendered as transformers does, and ended when they do not end."""

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
from baton.server.templates import ChatTemplate, Renderer, read_template

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
    "{% if messages[0]['content'] == 'for ever' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [{"role": "user", "content": "Grüße 🙂 {{ 7*7 }} {% raw %}"}]


Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """What `work` makes with the renderer of a template. There is one for each: a child takes the better
    part of a second to start."""
    renderers: dict[str, Renderer] = {}
    with asyncio.Runner() as runner:

        def run(
            work: Callable[[Renderer], Awaitable[Any]], source: str, patience_s: float = 20.0
        ) -> Any:
            template = ChatTemplate(source, TOKENS)
            if source not in renderers:
                renderers[source] = Renderer(template, patience_s=patience_s)
            return runner.run(work(renderers[source]))  # type: ignore[arg-type]

        yield run
        for each in renderers.values():
            runner.run(each.close())


@pytest.mark.parametrize("source", [CHATML, ALTERNATING])
def test_the_text_is_transformers_own(run: Run, source: str) -> None:
    long = [{"role": "user", "content": "x" * 100_000}]
    more = [*USER, {"role": "assistant", "content": "ja"}, {"role": "user", "content": "\x00\n"}]
    talks = [(talk, prompting) for talk in (USER, more, long) for prompting in (True, False)]

    async def work(renderer: Renderer) -> list[str]:
        return [await renderer.render(t, add_generation_prompt=p) for t, p in talks]

    expected = [
        render_jinja_template(
            conversations=[talk],
            chat_template=source,
            add_generation_prompt=prompting,
            **TOKENS,
        )[0][0]
        for talk, prompting in talks
    ]
    assert run(work, source) == expected
    assert "{{ 7*7 }}" in expected[0]


def test_a_template_may_refuse_and_goes_on(run: Run) -> None:
    wrong = [*USER, *USER]

    async def work(renderer: Renderer) -> str:
        with pytest.raises(RequestError, match="roles must alternate"):
            await renderer.render(wrong)
        return await renderer.render(USER)

    assert run(work, ALTERNATING).startswith("<s>[INST] ")


def test_a_message_without_what_the_template_needs_is_a_refusal(run: Run) -> None:
    async def work(renderer: Renderer) -> None:
        with pytest.raises(RequestError, match="refuses"):
            await renderer.render([{"role": "user"}])

    run(work, CHATML)


def test_a_template_that_does_not_end_is_ended(run: Run) -> None:
    async def work(renderer: Renderer) -> int:
        assert await renderer.render(USER) == ""  # so the child is there
        with pytest.raises(RequestError, match=r"longer than 0\.2 s"):
            await renderer.render([{"role": "user", "content": "for ever"}])
        assert renderer._child is None
        return 0

    run(work, ENDLESS, patience_s=0.2)


def test_a_child_that_is_killed_is_replaced(run: Run) -> None:
    async def work(renderer: Renderer) -> str:
        first = await renderer.render(USER)
        assert renderer._child is not None
        os.kill(renderer._child.pid, signal.SIGKILL)
        await renderer._child.wait()
        assert await renderer.render(USER) == first
        return first

    assert run(work, CHATML).endswith("assistant\n")


def test_many_at_once_do_not_mix_their_answers(run: Run) -> None:
    async def work(renderer: Renderer) -> list[str]:
        talks = [[{"role": "user", "content": str(i)}] for i in range(50)]
        return await asyncio.gather(*(renderer.render(talk) for talk in talks))

    assert [text.split("\n")[1] for text in run(work, CHATML)] == [
        f"{i}<|im_end|>" for i in range(50)
    ]


def test_one_that_is_cancelled_leaves_no_answer_for_the_next(run: Run) -> None:
    async def work(renderer: Renderer) -> str:
        await renderer.render(USER)
        lost = asyncio.create_task(renderer.render([{"role": "user", "content": "lost"}]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        return await renderer.render([{"role": "user", "content": "kept"}])

    assert "kept" in run(work, CHATML)


def test_the_child_ends_with_its_input() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "baton.server.render", str(os.getpid())],
        cwd=Path(__file__).resolve().parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    line = json.dumps({"template": CHATML, "tokens": {}}).encode() + b"\n"
    child.communicate(line, timeout=60)
    assert child.returncode == 0


def test_templates_are_rendered_without_torch() -> None:
    seen = subprocess.run(
        [sys.executable, "-c", "import sys, baton.server.render; print('torch' in sys.modules)"],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert seen.stdout == "False\n"


# ---- where a template comes from


def folder_with(tmp_path: Path, **files: object) -> Path:
    for name, content in files.items():
        path = tmp_path / name.replace("_json", ".json").replace("_jinja", ".jinja")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


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
    assert read_template(folder) == ChatTemplate("B", {})


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
    with pytest.raises(ModelError, match="no JSON"):
        read_template(folder_with(tmp_path, tokenizer_config_json="{"))
