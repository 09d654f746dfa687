#!/bin/sh
# curl: whole, streamed and wrong, as the server says it.
set -eu
ask() { curl -sS -N "$OPENAI_BASE_URL/completions" -H 'Content-Type: application/json' -d "$1"; echo; }
ask "{\"model\": \"$MODEL\", \"prompt\": \"In the future\", \"max_tokens\": 20, \"temperature\": 0}" | tee whole
ask "{\"model\": \"$MODEL\", \"prompt\": \"In the future\", \"max_tokens\": 5, \"stream\": true}" | tee streamed
ask "{\"model\": \"$MODEL\", \"prompt\": \"In the future\", \"temperature\": 3}" | tee wrong
grep -q '"finish_reason"' whole && grep -q 'data: .DONE.' streamed && grep -q temperature wrong
