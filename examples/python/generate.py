"""Continue a few prompts in this process: no server, no other process."""

from baton import LLM, SamplingParams

PROMPTS = ["In the future, artificial intelligence will", "The best way to learn is"]

with LLM("demo") as llm:
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=1)
    answers = llm.generate(PROMPTS, sampling, max_new_tokens=40)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"{prompt}{answer.text}")
        print(f"    [{answer.finish_reason}, first token after {answer.timings.ttft_s:.3f} s]")
