#!/bin/sh
# aiperf (NVIDIA): a profile of streamed completions with synthetic prompts, 4 at once.
set -eu
export COLUMNS=130
unset HF_HUB_OFFLINE  # with it aiperf 0.13 takes no folder for a tokenizer
aiperf profile --model "$MODEL" --url "$BATON_URL" --endpoint-type completions --streaming --tokenizer "$TOKENIZER" \
  --concurrency 4 --request-count 24 --extra-inputs ignore_eos:true --synthetic-input-tokens-mean 64 --output-tokens-mean 32 --ui none \
  --artifact-dir out > log 2>&1 || { cat log; exit 1; }
cat log
python - <<'END'
import glob, json
(kept,) = glob.glob("out/**/profile_export_aiperf.json", recursive=True)
told = json.load(open(kept))
assert told["request_count"]["avg"] == 24, told["request_count"]
assert not told.get("error_summary"), told["error_summary"]
END
