"""The page in a real browser: it chats, it shows what happens, on a desk and on a phone."""

import asyncio
import signal
from collections.abc import Iterator

import pytest

from tests.cluster.browser import CHROMIUM, browser
from tests.cluster.processes import short_folder, terminals
from tests.cluster.test_http import Server

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
DECODE = {False: "[0, 158, 115]", True: "[39, 192, 147]"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with short_folder() as folder, terminals() as type_in:
        served = Server(type_in, folder)
        yield served
        served.client.close()
        served.terminal.signal(signal.SIGTERM)
        served.terminal.ends(0, 20)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
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
            await page.until(verdict, lambda line: line != "No traffic yet.")
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

    asyncio.run(visit())
