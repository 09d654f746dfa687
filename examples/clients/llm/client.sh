#!/bin/sh
# The llm command: a prompt, a stream, a conversation, a schema, a tool.
# Needs a chat model.
set -eu
mkdir -p "$HOME/llm"
export LLM_USER_PATH="$HOME/llm"
cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<END
- model_id: baton
  model_name: $MODEL
  api_base: $OPENAI_BASE_URL
  supports_schema: true
  supports_tools: true
END
set -- -m baton -o temperature 0 -o max_tokens 60
say() { echo "\$ llm $*"; }
say 'Name the capital of France.'
llm prompt "$@" --no-stream 'Name the capital of France.'
say --continue 'And of Italy?'
llm prompt "$@" --continue 'And of Italy?'
say --schema 'name, country' 'The capital of France?'
llm prompt "$@" --schema 'name, country' 'The capital of France?' | tee answer.json
python -c 'import json; assert set(json.load(open("answer.json"))) == {"name", "country"}'
say --tool llm_version 'Which version of llm is this?'
llm prompt "$@" --tool llm_version --chain-limit 3 --tools-debug 'Which version of llm is this?' 2>&1
