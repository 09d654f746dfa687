#!/bin/sh
# lm-evaluation-harness, local-completions: a small task written here, by logprobs of echoed prompts, and one generated.
set -eu
cat > data.jsonl <<'DATA'
{"text": "In the future, artificial intelligence will", "choices": [" learn to smell smoke", " xq zzt vvk"]}
{"text": "On a distant planet, aliens are", "choices": [" not so different from us", " the the the of"]}
DATA
cat > choices.yaml <<TASK
task: baton_choices
dataset_path: json
dataset_kwargs: {data_files: {test: $PWD/data.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
TASK
cat > generated.yaml <<TASK
task: baton_generated
dataset_path: json
dataset_kwargs: {data_files: {test: $PWD/data.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 32, do_sample: false}
metric_list: [{metric: exact_match}]
TASK
lm_eval run --model local-completions --include_path . --tasks baton_choices,baton_generated --output_path out --log_samples \
  --model_args "model=$MODEL,base_url=$OPENAI_BASE_URL/completions,tokenizer_backend=huggingface,tokenizer=$TOKENIZER,num_concurrent=4" \
  > log 2>&1 || { cat log; exit 1; }
grep '|' log
python - <<'END'
import glob, json
(kept,) = glob.glob("out/**/results*.json", recursive=True)
results = json.load(open(kept))["results"]
assert results["baton_choices"]["acc,none"] == 1, results
END
