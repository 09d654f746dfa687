#!/bin/sh
# guidellm: synthetic text, 4 streams at once, 24 requests.
set -eu
guidellm run --disable-progress --output kind=console --output kind=json,path=out.json \
  --backend "kind=openai_http,target=$BATON_URL,model=$MODEL,request_format=/v1/completions" \
  --profile kind=concurrent,streams=4 --constraint kind=max_requests,count=24 \
  --tokenizer "kind=huggingface_auto,model=$TOKENIZER" --data kind=synthetic_text,prompt_tokens=64,output_tokens=32 \
  > log 2>&1 || { cat log; exit 1; }
cat log
python - <<'END'
import json
(bench,) = json.load(open("out.json"))["benchmarks"]
totals = bench["metrics"]["request_totals"]
assert totals["successful"] == 24, totals
assert totals["errored"] == 0, totals
END
