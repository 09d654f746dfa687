"""The page in a real browser: it chats, it shows what happens, on a desk and on a phone."""

import asyncio
import json
import random
import signal

import pytest

from tests.cluster.browser import CHROMIUM, browser
from tests.cluster.processes import short_folder, terminals
from tests.cluster.serving import Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

GREEN = """(() => {
  const canvas = document.getElementById("canvas");
  const dots = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const [r, g, b] = %s;
  let found = 0;
  for (let i = 0; i < dots.length; i += 4)
    found += dots[i] === r && dots[i + 1] === g && dots[i + 2] === b;
  return found;
})()"""
BUBBLES = (
    "['user', 'assistant', 'error'].map((k) => document.querySelectorAll('.turn.' + k).length)"
)
IDLE = "document.getElementById('stop').hidden && document.querySelector('.turn .about') !== null"
KEPT = "JSON.parse(localStorage.conversation).turns.map((turn) => turn.role)"
PRESS = (
    "[...document.querySelectorAll('.turn.%s button')].find((b) => b.textContent == '%s').click()"
)
DECODE = {False: "[0, 158, 115]", True: "[39, 192, 147]"}


@pytest.mark.parametrize(("width", "height", "dark"), [(1440, 900, False), (390, 844, True)])
def test_a_message_is_answered_and_seen_on_its_way(
    server: Server, width: int, height: int, dark: bool
) -> None:
    async def visit() -> None:
        async with browser(f"{server.url}/") as page:
            await page.look_like(width, height, dark=dark)
            await page.until("document.getElementById('model').textContent.startsWith('demo')")
            rows = "document.querySelectorAll('#workers tbody tr').length"
            await page.until(rows, lambda found: found == 2)
            await page.run("document.querySelector('#ideas button').click()")
            about = await page.until("document.querySelector('.turn .about')?.textContent")
            assert "tokens" in about
            assert len(await page.run("document.querySelector('.turn.assistant').textContent")) > 80
            if width < 600:
                assert (
                    await page.run("getComputedStyle(document.getElementById('live')).display")
                    == "none"
                )
                await page.run("document.getElementById('show-live').click()")
            await page.until(GREEN % DECODE[dark], lambda dots: dots > 20)
            verdict = "document.getElementById('verdict').textContent"
            await page.until(verdict, lambda line: "ended in 60 s" in line)
            wide = await page.run("document.documentElement.scrollWidth")
            assert wide <= width, f"the page is {wide} wide on a screen of {width}"
            assert page.complaints == []

    asyncio.run(visit())


def test_a_request_that_is_wrong_is_told_in_the_conversation(server: Server) -> None:
    async def visit() -> None:
        async with browser(f"{server.url}/") as page:
            await page.until("document.querySelector('#ideas button') !== null")
            await page.run("document.querySelector('[name=max_tokens]').value = 99999")
            await page.run("document.querySelector('#ideas button').click()")
            told = await page.until("document.querySelector('.turn.error')?.textContent")
            assert "context is 2,304" in told
            # the question was not answered: it waits to be sent again, and once
            assert await page.run("document.getElementById('text').value")
            await page.run("document.querySelector('[name=max_tokens]').value = 5")
            await page.run("document.getElementById('ask').requestSubmit()")
            await page.until("document.querySelector('.turn .about')?.textContent")
            assert await page.run(BUBBLES) == [1, 1, 0]
            assert await page.run(KEPT) == ["user", "assistant"]

    asyncio.run(visit())


def test_an_answer_is_regenerated_a_question_edited_and_both_are_kept(server: Server) -> None:
    async def visit() -> None:
        async with browser(f"{server.url}/") as page:
            await page.until("document.querySelector('#ideas button') !== null")
            await page.run("document.querySelector('[name=max_tokens]').value = 8")
            await page.run("document.querySelector('[name=probabilities]').checked = true")
            await page.run("document.querySelector('#ideas button').click()")
            await page.until(f"({BUBBLES})[1] == 1 && {IDLE}")
            await page.run(PRESS % ("assistant", "Regenerate"))
            await page.until(f"({BUBBLES})[1] == 1 && {IDLE}")
            assert await page.run(KEPT) == ["user", "assistant"]
            await page.run(PRESS % ("assistant", "Tokens"))
            assert await page.run("document.querySelectorAll('.token').length") == 8
            title = await page.run("document.querySelector('.token').title")
            assert title.count(" %") == 6  # the token itself, and five that might have been
            await page.call("Page.reload")
            await page.until(f"document.readyState == 'complete' && ({BUBBLES})[1] == 1")
            await page.run(PRESS % ("user", "Edit"))
            assert await page.run(BUBBLES) == [0, 0, 0]
            assert await page.run(KEPT) == []
            assert "KV cache" in await page.run("document.getElementById('text').value")
            assert page.complaints == []

    asyncio.run(visit())


MARKDOWN = {
    "**a *b* c** `d*` ~~e~~": "<strong>a <em>b</em> c</strong> <code>d*</code> <del>e</del>",
    "***both*** snake_case_name 2 * 3 * 4": "<em><strong>both</strong></em> snake_case_name 2 * 3 * 4",
    "<img src=x onerror=alert(1)>": "&lt;img src=x onerror=alert(1)&gt;",
    "[x](javascript:alert(1)) [y](data:text/html,z)": "[x](javascript:alert(1)) [y](data:text/html,z)",
    "\\*no\\* **open": "*no* **open",
}
BLOCKS = {
    "- a\n- b\n  - c": "<ul><li>a</li><li><p>b</p><ul><li>c</li></ul></li></ul>",
    "1. d\n2. e": "<ol><li>d</li><li>e</li></ol>",
    "# T\n> q": "<h3>T</h3><blockquote><p>q</p></blockquote>",
}
RENDERED = """import("/page/markdown.js").then(({render}) => {
  const box = document.createElement("div");
  box.append(render(%s));
  const names = [...box.querySelectorAll("*")].flatMap((e) => [e.nodeName, ...e.getAttributeNames()]);
  return [box.innerHTML, [...new Set(names)]];
})"""
NODES = {
    *(
        "P",
        "H3",
        "H4",
        "H5",
        "H6",
        "STRONG",
        "EM",
        "DEL",
        "CODE",
        "PRE",
        "UL",
        "OL",
        "LI",
        "BLOCKQUOTE",
    ),
    *("HR", "BR", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "A", "DIV", "SPAN", "BUTTON"),
    *("href", "target", "rel", "class", "type", "data-copy", "tabindex", "start"),
}
PIECES = [
    "*",
    "**",
    "_",
    "`",
    "```\n",
    "[",
    "](",
    ")",
    "http://a",
    "<b onload=x>",
    "- ",
    "> ",
    "\n",
    " ",
]
PIECES += ["a", "|", "|-|-|", "#", "1. ", "javascript:", "~~", "\\", "&lt;"]


def test_markdown_becomes_nodes_and_nothing_else(server: Server) -> None:
    async def visit() -> None:
        async with browser(f"{server.url}/") as page:
            shown = lambda text: page.run(RENDERED % json.dumps(text))  # noqa: E731
            for text, html in MARKDOWN.items():
                assert (await shown(text))[0] == f"<p>{html}</p>"
            for text, html in BLOCKS.items():
                assert (await shown(text))[0] == html
            links = (await shown("[a **b**](https://x.org/y) https://z.org."))[0]
            assert links.count('rel="noopener noreferrer nofollow"') == links.count("<a ") == 2
            assert "<code>x\n  y</code>" in (await shown("```py\nx\n  y"))[0]
            assert "<th>a</th>" in (await shown("|a|b|\n|-|-|\n|1|2|"))[0]
            dice = random.Random(7)
            for _ in range(100):
                text = "".join(dice.choice(PIECES) for _ in range(dice.randint(1, 60)))
                assert set((await shown(text))[1]) <= NODES, text
            assert page.complaints == []

    asyncio.run(visit())


def test_what_happens_to_workers_and_to_the_server_is_seen() -> None:
    async def visit(server: Server) -> None:
        async with browser(f"{server.url}/") as page:
            rows = "document.querySelectorAll('#workers tbody tr').length"
            await page.until(rows, lambda found: found == 2)
            server.kill("decode-0")
            events = "document.getElementById('events').textContent"
            await page.until(
                events, lambda told: "decode-0 is gone" in told or "decode-0 joined" in told
            )
            await page.until("document.getElementById('dot').className == 'dot ready'")
            assert await page.run(rows) == 2
            server.terminal.signal(signal.SIGTERM)
            await page.until("document.body.classList.contains('stale')")
            assert "does not answer" in await page.run(
                "document.getElementById('feed').textContent"
            )

    with short_folder() as folder, terminals() as type_in:
        served = Server(type_in, folder)
        asyncio.run(visit(served))
        served.client.close()
        served.terminal.ends(0)


SAYS = "document.getElementById('show-says').textContent"
PLAYING = "!document.getElementById('show-stop').hidden"
TICKS = """(() => {
  const canvas = document.getElementById("show-act-%d");
  const dots = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let found = 0;
  for (let i = 0; i < dots.length; i += 4)
    found += dots[i] === 0 && dots[i + 1] === 158 && dots[i + 2] === 115;
  return found;
})()"""


def test_show_me_plays_both_acts_with_real_requests_and_can_be_stopped(server: Server) -> None:
    async def visit() -> None:
        async with browser(f"{server.url}/") as page:
            await page.look_like(1440, 900)
            await page.until("document.getElementById('model').textContent.startsWith('demo')")
            await page.until("!document.getElementById('show-me').disabled")
            await page.run("document.getElementById('show-me').click()")
            await page.until(PLAYING)
            await page.until(f"{SAYS}.includes('a prompt of 2,048 tokens')")
            await page.run("document.getElementById('show-stop').click()")
            assert (
                await page.until(f"!({PLAYING}) && {SAYS}")
                == "The comparison ended early: stopped."
            )
            await page.until("!document.getElementById('show-me').disabled")
            await page.run("document.getElementById('show-me').click()")
            await page.until(f"{SAYS}.includes('together')")  # the second act
            says = await page.until(f"!({PLAYING}) && {SAYS}")
            assert "ended early" not in says
            assert "tokens came" in says or "noticed little" in says
            for act in (0, 1):
                said = await page.run(f"document.getElementById('show-said-{act}').textContent")
                assert "first token came after" in said
                assert await page.run(TICKS % act) > 100
            assert "prefill-0 computed" in await page.run(
                "document.getElementById('show-said-0').textContent"
            )
            assert page.complaints == []

    asyncio.run(visit())
