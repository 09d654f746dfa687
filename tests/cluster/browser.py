"""A real browser without a window: Debian's chromium, spoken to over the DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/
"""

import asyncio
import base64
import itertools
import json
import shutil
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.patience import PATIENCE_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
           "--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0")  # fmt: skip


class Page:
    """One page, and what it complained of."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for text in self._socket:
            news = json.loads(text)
            if "id" in news:
                self._answers.pop(news["id"]).set_result(news)
            elif news["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(news["params"]["exceptionDetails"])[:500])
            elif news["method"] == "Log.entryAdded" and news["params"]["entry"]["level"] == "error":
                self.complaints.append(str(news["params"]["entry"])[:500])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        answer = await asyncio.wait_for(self._answers[number], PATIENCE_S)
        assert "error" not in answer, answer
        return dict(answer["result"])

    async def run(self, script: str) -> Any:
        """The value of this JavaScript."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, script: str, good: Callable[[Any], bool] = bool) -> Any:
        """Its value, once that is good. The page itself is asked at every frame."""
        async with asyncio.timeout(PATIENCE_S):
            while not good(value := await self.run(script)):
                await self.run("new Promise(requestAnimationFrame)")
            return value

    async def look_like(self, width: int, height: int, *, dark: bool = False) -> None:
        """The window's size, and the reader's taste."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self, file: Path) -> None:
        """A screenshot."""
        shot = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser(url: str) -> AsyncIterator[Page]:
    """A page at this address."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="bt-web-") as folder:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *OPTIONS, f"--user-data-dir={folder}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            async with asyncio.timeout(PATIENCE_S):
                while b"DevTools listening on " not in (line := await process.stderr.readline()):
                    assert line, "chromium ended"
            reading = asyncio.create_task(process.stderr.read())
            port = line.decode().split("/")[2].rpartition(":")[2]
            async with connect(await _first_page(int(port)), max_size=None) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=url)
                await page.until(f"document.readyState == 'complete' && location.href == '{url}'")
                yield page
                page._reading.cancel()
            reading.cancel()
        finally:
            process.kill()
            await process.wait()
            process._transport.close()  # type: ignore[attr-defined]


async def _first_page(port: int) -> str:
    def look() -> list[dict[str, str]]:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE_S
        ) as answer:
            return list(json.load(answer))

    pages = await asyncio.to_thread(look)
    return next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
