#!/bin/sh
# Aider, a coding agent: a question about a file, whole and streamed, and an edit it may make.
# Needs a chat model.
set -eu
echo 'print("hello")' > hello.py
ask() {
  echo "\$ aider $1 ..."
  aider --model "openai/$MODEL" --no-git --yes-always --no-check-update --analytics-disable \
    --no-show-model-warnings --no-show-release-notes --no-pretty --no-suggest-shell-commands \
    --no-auto-lint --no-detect-urls --map-tokens 0 --no-fancy-input "$@" hello.py < /dev/null > said.txt 2>&1 || { cat said.txt; exit 1; }
  if grep -q 'litellm\.[A-Za-z]*Error\|APIError' said.txt; then cat said.txt; exit 1; fi
  grep '^Tokens:' said.txt
}
ask --no-stream --chat-mode ask --message 'What does this file print?'
ask --stream --chat-mode ask --message 'What does this file print?'
ask --stream --edit-format whole --message 'Print goodbye instead.'
