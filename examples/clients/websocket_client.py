"""Two requests on one WebSocket, one of them cancelled.

python examples/clients/websocket_client.py [URL]
"""

import asyncio
import json
import sys

from websockets.asyncio.client import connect

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


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
