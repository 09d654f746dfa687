#!/bin/sh
# Whole, streamed, and wrong: what the server says to curl.
set -eu
url=${1:-http://127.0.0.1:8000}
model=$(curl -s "$url/v1/models" | sed 's/.*"id":"\([^"]*\)".*/\1/')
ask() { curl -sS -N "$url/v1/completions" -H 'Content-Type: application/json' -d "$1"; echo; }
ask "{\"model\": \"$model\", \"prompt\": \"In the future\", \"max_tokens\": 20}"
ask "{\"model\": \"$model\", \"prompt\": \"In the future\", \"max_tokens\": 5, \"stream\": true}"
ask "{\"model\": \"$model\", \"prompt\": \"In the future\", \"temperature\": 3}"
