"""A WebSocket: two requests at once, one of them cancelled."""

import asyncio
import json
import os

from websockets.asyncio.client import connect

URL = os.environ["BATON_URL"]


async def main() -> None:
    """Until both have ended."""
    async with connect(URL.replace("http", "ws", 1) + "/v1/stream") as socket:
        await socket.send(json.dumps({"prompt": "In the future", "max_tokens": 40}))
        await socket.send(json.dumps({"prompt": "A long tale:", "max_tokens": 2000}))
        texts: dict[str, str] = {}
        done = 0
        while done < 2:
            news = json.loads(await socket.recv())
            name = news["id"]
            if news.get("type") == "done":
                done += 1
                print(f"{name}: {texts[name]!r}")
                continue
            texts[name] = texts.get(name, "") + news["choices"][0]["text"]
            if len(texts[name]) > 300:
                await socket.send(json.dumps({"type": "cancel", "id": name}))


if __name__ == "__main__":
    asyncio.run(main())
