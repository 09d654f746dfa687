#!/bin/sh
# lm-evaluation-harness over the API, with the served model's tokenizer from a local folder, no network but pip's.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
url=${1:-http://127.0.0.1:8000}
folder=${2:-$here/../../models/demo}
venv=$here/.venv-lm-eval
[ -x "$venv/bin/lm_eval" ] || { python3 -m venv "$venv" && "$venv/bin/pip" install -q 'lm-eval[api,hf]==0.4.13'; }
mkdir -p "$venv/task"
cat > "$venv/task/data.jsonl" <<'DATA'
{"text": "In the future, artificial intelligence will", "choices": [" learn to smell smoke", " xq zzt vvk"]}
{"text": "On a distant planet, aliens are", "choices": [" not so different from us", " the the the of"]}
DATA
cat > "$venv/task/smoke.yaml" <<TASK
task: baton_smoke
dataset_path: json
dataset_kwargs: {data_files: {test: $venv/task/data.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
TASK
model=$(curl -s "$url/v1/models" | sed 's/.*"id":"\([^"]*\)".*/\1/')
HF_HUB_OFFLINE=1 "$venv/bin/lm_eval" --model local-completions --include_path "$venv/task" --tasks baton_smoke \
  --model_args "model=$model,base_url=$url/v1/completions,tokenizer_backend=huggingface,tokenizer=$folder,num_concurrent=4"
