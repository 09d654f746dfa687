"""A conversation. The demo model has no chat template of its own, so this brings a plain one."""

from pathlib import Path

from baton import LLM, SamplingParams

TEMPLATE = Path(__file__).with_name("plain_chat.jinja")

with LLM("demo", chat_template=TEMPLATE) as llm:
    messages = [{"role": "user", "content": "In the future, artificial intelligence will"}]
    for question in ("And then?", "Why is that?"):
        answer = llm.chat(messages, SamplingParams(temperature=0), max_new_tokens=24, stop="\n")
        print(f"{messages[-1]['content']} -> {answer.text.strip()}")
        messages += [
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": question},
        ]
