#!/bin/sh
# guidellm over the API: synthetic prompts, 8 streams at once for 10 seconds.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
url=${1:-http://127.0.0.1:8000}
folder=${2:-$here/../../models/demo}
venv=$here/.venv-guidellm
[ -x "$venv/bin/guidellm" ] || { python3 -m venv "$venv" && "$venv/bin/pip" install -q guidellm==0.8.1; }
model=$(curl -s "$url/v1/models" | sed 's/.*"id":"\([^"]*\)".*/\1/')
HF_HUB_OFFLINE=1 "$venv/bin/guidellm" run --disable-progress --output kind=console \
  --backend "kind=openai_http,target=$url,model=$model,request_format=/v1/completions" \
  --profile kind=concurrent,streams=8 --constraint kind=max_duration,seconds=10 \
  --tokenizer "kind=huggingface_auto,model=$folder" --data kind=synthetic_text,prompt_tokens=64,output_tokens=64
