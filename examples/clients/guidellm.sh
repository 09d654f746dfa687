#!/bin/sh
# guidellm over the API: synthetic prompts, 8 streams at once for 10 seconds.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
url=${1:-http://127.0.0.1:8000}
folder=${2:-$here/../../models/demo}
venv=$here/.venv-guidellm
[ -x "$venv/bin/guidellm" ] || { python3 -m venv "$venv" && "$venv/bin/pip" install -q guidellm==0.8.1; }
model=$(curl -s "$url/v1/models" | sed 's/.*"id":"\([^"]*\)".*/\1/')
HF_HUB_OFFLINE=1 "$venv/bin/guidellm" benchmark --target "$url" --model "$model" \
  --request-format /v1/completions --rate-type concurrent --rate 8 --max-seconds 10 \
  --tokenizer "kind=huggingface_auto,model=$folder" --data "prompt_tokens=64,output_tokens=64"
