#!/bin/sh
# pi, a coding agent: one turn over chat completions and one over Responses.
# Needs a chat model.
set -eu
export PI_OFFLINE=1 PI_TELEMETRY=0 PI_CODING_AGENT_DIR="$PWD/agent"
mkdir -p agent work
provider() { printf '"%s": {"baseUrl": "%s", "api": "%s", "apiKey": "none", "models": [{"id": "%s", "contextWindow": 8192, "maxTokens": 200}]}' "$@"; }
{
  echo '{"providers": {'
  provider chat "$OPENAI_BASE_URL" openai-completions "$MODEL"; echo ,
  provider responses "$OPENAI_BASE_URL" openai-responses "$MODEL"
  echo '}}'
} > agent/models.json
cd work
echo 'The secret word is plum.' > note.txt
for api in chat responses; do
  echo "\$ pi --provider $api --print ..."
  pi --provider $api --model "$MODEL" --no-session --mode json --print \
    'Answer with exactly this and nothing else: {"name": "read", "arguments": {"path": "note.txt"}}' < /dev/null > events.jsonl
  node - <<'END'
const lines = require('fs').readFileSync('events.jsonl', 'utf8').trim().split('\n').map(line => JSON.parse(line))
const ended = lines.filter(event => event.type === 'message_end').map(event => event.message)
for (const { role, content, stopReason, errorMessage, toolName } of ended) {
  const text = typeof content === 'string' ? content : content.map(part => part.text ?? part.thinking ?? `${part.name}(${JSON.stringify(part.arguments)})`).join(' ')
  console.log(`${role}${toolName ? ' ' + toolName : ''}:`, text.slice(0, 100).replaceAll('\n', ' '), stopReason ?? '', errorMessage ?? '')
}
const answers = ended.filter(message => message.role === 'assistant')
if (!answers.length || answers.some(message => message.stopReason === 'error')) process.exit(1)
END
done
