"""LiteLLM: chat, streams, tools, schemas, text, embeddings, Responses; and its proxy.

Needs a chat model.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import litellm
from openai import OpenAI
from pydantic import BaseModel

litellm.suppress_debug_info = True  # it names its providers otherwise
URL, MODEL = os.environ["OPENAI_BASE_URL"], os.environ["MODEL"]
ASK = [{"role": "user", "content": "Name the capital of France."}]


class City(BaseModel):
    """A city and its country."""

    name: str
    country: str


TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}  # fmt: skip


def library() -> None:
    """A model's name begins with the provider whose API it is: ours are those of three."""
    for provider in ("openai", "hosted_vllm", "anthropic"):
        base = URL.removesuffix("/v1") if provider == "anthropic" else URL
        asked = {
            "model": f"{provider}/{MODEL}",
            "api_base": base,
            "temperature": 0,
            "max_tokens": 60,
        }
        whole = litellm.completion(**asked, messages=ASK)
        parts = litellm.completion(**asked, messages=ASK, stream=True)
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == whole.choices[0].message.content
        called = litellm.completion(
            **asked, messages=[{"role": "user", "content": "The weather in Oslo?"}], tools=[TOOL],
            tool_choice="required",
        )  # fmt: skip
        (call, *_) = called.choices[0].message.tool_calls
        print(f"{provider}: {text} | {call.function.name} {json.loads(call.function.arguments)}")
    asked = {"model": f"openai/{MODEL}", "api_base": URL}
    shaped = litellm.completion(
        **asked, messages=ASK, response_format=City, temperature=0, max_tokens=100
    )
    print("schema:", City.model_validate_json(shaped.choices[0].message.content))
    story = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=URL,
        prompt="Once",
        max_tokens=8,
        temperature=0,
    )
    print("text:", repr(story.choices[0].text))
    print("embeddings:", len(litellm.embedding(**asked, input=["a cat"]).data[0]["embedding"]))
    print(
        "Responses:", litellm.responses(**asked, input=ASK[0]["content"], temperature=0).output_text
    )


def proxy() -> None:
    """A proxy of litellm in front of ours, with a name and a key of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = {
        "model_name": "small",
        "litellm_params": {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none"},
    }
    Path("config.yaml").write_text(
        json.dumps({"model_list": [served], "general_settings": {"master_key": "sk-own"}})
    )
    program = str(Path(sys.executable).with_name("litellm"))
    words = [program, "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    with open("proxy.log", "wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as running:
        try:
            wait_for(f"http://127.0.0.1:{port}/health/liveliness", running)
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-own")
            whole = client.chat.completions.create(model="small", messages=ASK, temperature=0)
            stream = client.chat.completions.create(
                model="small", messages=ASK, temperature=0, stream=True
            )
            text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
            assert text == whole.choices[0].message.content
            print("proxy:", text)
        finally:
            running.terminate()


def wait_for(url: str, running: subprocess.Popen[bytes]) -> None:
    """Until it answers; at most five minutes."""
    until = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            if running.poll() is not None or time.monotonic() > until:
                raise AssertionError(Path("proxy.log").read_text()[-2000:]) from None
            time.sleep(0.5)


if __name__ == "__main__":
    library()
    proxy()
