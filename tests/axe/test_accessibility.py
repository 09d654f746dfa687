"""The page under axe-core (https://github.com/dequelabs/axe-core): every state, in both themes, on a desk
and on a phone. `make test-axe` fetches axe-core from npm and runs this."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.browser import CHROMIUM, Page, browser
from tests.cluster.processes import short_folder, terminals
from tests.cluster.serving import Server
from tests.cluster.test_page import BUBBLES, IDLE, PRESS

assert CHROMIUM is not None, "needs Debian's chromium"

LOOKS = [(width, dark) for width in (1440, 390) for dark in (False, True)]
FOUND = """axe.run(document, {resultTypes: ["violations"]}).then((found) => JSON.stringify(
  found.violations.map((each) => [each.id, each.help, each.nodes.map((node) => node.html)])))"""
MARKDOWN = r"# T\n\nSome `code`, **words**, a [link](https://example.org).\n\n```\nx\n```\n\n- one"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with short_folder() as folder, terminals() as type_in:
        served = Server(type_in, folder)
        yield served
        served.client.close()
        served.terminal.signal(signal.SIGTERM)


async def ready(page: Page) -> None:
    await page.run(Path(os.environ["AXE"]).read_text() + "; true")
    assert await page.run("axe.version")
    await page.until("document.getElementById('model').textContent.startsWith('demo')")


async def check(page: Page, state: str) -> None:
    """Nothing is wrong, whoever looks. Both panes of a phone."""
    wrong = []
    for width, dark in LOOKS:
        await page.look_like(width, 900, dark=dark)
        for pane in ("show-live", "show-chat"):
            await page.run(f"document.getElementById('{pane}').click()")
            await page.run("new Promise(requestAnimationFrame)")
            wrong += [(width, dark, pane, *each) for each in json.loads(await page.run(FOUND))]
    assert not wrong, f"{state}: {wrong}"


def test_axe_finds_what_is_wrong(server: Server) -> None:
    async def visit() -> None:
        async with browser(f"{server.url}/") as page:
            await ready(page)
            await page.run("document.body.append(document.createElement('button'))")
            assert [each[0] for each in json.loads(await page.run(FOUND))] == ["button-name"]

    asyncio.run(visit())


def test_nothing_is_wrong_idle_and_with_a_dialog_open(server: Server) -> None:
    async def visit() -> None:
        async with browser(f"{server.url}/") as page:
            await ready(page)
            await check(page, "idle")
            await page.run("document.getElementById('key-dialog').showModal()")
            assert json.loads(await page.run(FOUND)) == []

    asyncio.run(visit())


def test_nothing_is_wrong_in_a_conversation(server: Server) -> None:
    async def visit() -> None:
        async with browser(f"{server.url}/") as page:
            await ready(page)
            for details in ("true", "false"):
                await page.run(
                    f"document.querySelectorAll('details').forEach((e) => e.open = {details})"
                )
                await check(page, f"all details: {details}")
            await page.run("document.querySelector('[name=max_tokens]').value = 8")
            await page.run("document.querySelector('[name=probabilities]').checked = true")
            await page.run("document.querySelector('#ideas button').click()")
            await page.until(f"({BUBBLES})[1] == 1 && {IDLE}")
            await check(page, "answered")
            await page.run(PRESS % ("assistant", "Tokens"))
            await check(page, "with its tokens")
            await page.run("document.querySelector('[name=max_tokens]').value = 99999")
            await page.run(f'document.getElementById("text").value = "{MARKDOWN}"')
            await page.run("document.getElementById('ask').requestSubmit()")
            await page.until("document.querySelector('.turn.error')?.textContent")
            await check(page, "refused")
            await page.run(
                "import('/page/markdown.js').then(({render}) => "
                f'document.querySelector(".turn.assistant").append(render("{MARKDOWN}")))'
            )
            await check(page, "with Markdown")

    asyncio.run(visit())


def test_nothing_is_wrong_while_requests_run_and_are_looked_at(server: Server) -> None:
    async def visit() -> None:
        async with browser(f"{server.url}/") as page:
            await ready(page)
            await page.run("document.getElementById('show-me').click()")
            await page.until("!document.getElementById('show-stop').hidden")
            await check(page, "Show me plays")
            await page.until("document.getElementById('show-stop').hidden")
            await check(page, "Show me is over")
            await page.run(
                "document.getElementById('canvas').focus(); for (let i = 0; i < 3; i++) "
                "document.getElementById('canvas').dispatchEvent("
                "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
            )
            await page.until("!document.getElementById('detail').hidden")
            await check(page, "a request is looked at")

    asyncio.run(visit())


def test_nothing_is_wrong_when_a_worker_dies_and_the_server_is_gone() -> None:
    async def visit(server: Server) -> None:
        async with browser(f"{server.url}/") as page:
            await ready(page)
            server.kill("decode-0")
            told = "document.getElementById('events').textContent"
            await page.until(told, lambda text: "decode-0" in text)
            await check(page, "decode-0 died")
            server.terminal.signal(signal.SIGTERM)
            await page.until("document.body.classList.contains('stale')")
            await check(page, "the server is gone")

    with short_folder() as folder, terminals() as type_in:
        served = Server(type_in, folder)
        asyncio.run(visit(served))
        served.client.close()
        served.terminal.ends(0, 20)
