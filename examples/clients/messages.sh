#!/bin/sh
# The anthropic package: whole, streamed, counted. The model needs a chat template.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
url=${1:-http://127.0.0.1:8000}
venv=$here/.venv-anthropic
[ -x "$venv/bin/python" ] || { python3 -m venv "$venv" && "$venv/bin/pip" install -q anthropic==2.14.0; }
"$venv/bin/python" - "$url" <<'END'
import json
import sys
import urllib.request

import anthropic

url = sys.argv[1]
with urllib.request.urlopen(f"{url}/v1/models") as answer:
    model = json.load(answer)["data"][0]["id"]
client = anthropic.Anthropic(base_url=url, api_key="none")
asked = {"model": model, "max_tokens": 60, "messages": [{"role": "user", "content": "Who was Ada Lovelace?"}]}
whole = client.messages.create(**asked, system="Answer in one sentence.")
print("whole:", whole.content[0].text, whole.stop_reason, whole.usage.output_tokens)
print("streamed: ", end="")
with client.messages.stream(**asked) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    print("", stream.get_final_message().stop_reason)
print("counted:", client.messages.count_tokens(model=model, messages=asked["messages"]).input_tokens)
END
