#!/bin/sh
# Codex, OpenAI's coding agent: one turn over Responses, with its own tools but web_search.
# Needs a chat model.
set -eu
export CODEX_HOME="$PWD/codex"
mkdir -p codex work
# Its own instructions are longer than the context of a small model.
echo 'You are a coding agent.' > codex/instructions.md
cat > codex/config.toml <<END
model = "$MODEL"
model_provider = "ours"
model_instructions_file = "$PWD/codex/instructions.md"
model_context_window = 8192
approval_policy = "never"
sandbox_mode = "read-only"
web_search = "disabled"
[model_providers.ours]
name = "ours"
base_url = "$OPENAI_BASE_URL"
wire_api = "responses"
env_key = "OPENAI_API_KEY"
[analytics]
enabled = false
END
cd work
echo 'The secret word is plum.' > note.txt
codex exec --skip-git-repo-check --json --output-last-message last.txt 'Say hello.' < /dev/null > events.jsonl 2> errors.txt || {
  tail -n 20 events.jsonl errors.txt
  exit 1
}
node - <<'END'
const events = require('fs').readFileSync('events.jsonl', 'utf8').trim().split('\n').map(line => JSON.parse(line))
for (const event of events) {
  const item = event.item ? `${event.item.type}: ${event.item.text ?? event.item.message ?? ''}` : ''
  console.log(event.type, item.slice(0, 120).replaceAll('\n', ' '), event.usage ? JSON.stringify(event.usage) : '')
}
if (!events.some(event => event.type === 'turn.completed')) process.exit(1)
END
