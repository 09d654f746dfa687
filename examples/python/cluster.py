"""The same calls over worker processes: one fills prompts, two generate. On GPUs each takes its own."""

from baton import LLM, SamplingParams

with LLM("demo", num_prefill=1, num_decode=2) as llm:
    for worker in llm.model.workers:
        print(worker)
    prompts = [f"Number {number} is" for number in range(8)]
    answers = llm.generate(prompts, SamplingParams(temperature=0), max_new_tokens=16)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(prompt + answer.text)
