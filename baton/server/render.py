"""`python -m server.render`: renders chat templates, one JSON line in, one JSON line out.

    <- {"template": "...", "tokens": {"bos_token": "<s>", ...}}        once
    <- {"messages": [...], "add_generation_prompt": true, "tools": null}
    -> {"ok": "..."} or {"error": "..."}

A process of its own, because a template is a program of the model's: it may run for ever, and then this
process is killed. The rendering is transformers' own, in Jinja's sandbox.
"""

import json
import resource
import sys
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from baton.host import die_with

MEMORY_BYTES = 2 << 30
LONGEST_REASON = 500


def rendered(template: str, tokens: dict[str, str], asked: dict[str, Any]) -> dict[str, str]:
    """The text, or why there is none."""
    try:
        texts, _ = render_jinja_template(
            conversations=[asked["messages"]],
            tools=asked["tools"] or None,
            chat_template=template,
            add_generation_prompt=asked["add_generation_prompt"],
            **tokens,
        )
    except TemplateError as error:
        return {"error": str(error)[:LONGEST_REASON]}
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST_REASON]}
    except (OverflowError, RecursionError, MemoryError) as error:
        return {"error": f"it is too large ({type(error).__name__})"}
    return {"ok": texts[0]}


def main(parent: int) -> None:
    """Until the server closes our input."""
    if not die_with(parent):
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    first = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        answer = rendered(first["template"], first["tokens"], json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
