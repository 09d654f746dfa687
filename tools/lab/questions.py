"""Questions: what each study answers, and what to expect; said before it runs. Pure."""

QUESTIONS = {
    "baseline": "Where does the time of one request go, and which of prefill and decode is slower?",
    "batching": "What throughput does batching gain, and at what latency?",
    "kv-cache": "When does the KV cache save time, and when does it fill the memory?",
    "claims": "Which of the commonly claimed speed-ups and savings hold here, and by how much?",
    "disagg": "Does splitting prefill from decode pay, and when not?",
}

EXPECTATIONS = {
    "baseline": "Expect decode to take most of the time, and a decoded token to cost several prefilled "
    "ones: decode reads all weights for each token, prefill once for the whole prompt.",
    "batching": "Expect tokens/s to rise with the batch size, less with each doubling, and every request "
    "of a larger batch to take longer to execute.",
    "kv-cache": "Expect a token to cost the same at every prompt length with the cache, and more "
    "without it; and the cache to outgrow the weights at some number of tokens.",
    "claims": "Expect claims about memory to hold exactly, and claims about speed to depend on this "
    "machine; speculation gains only on text that repeats itself.",
    "disagg": "Expect shorter gaps between tokens with P/D while long prompts arrive, and a longer TTFT: "
    "with the same cores, prefill has only its part of them.",
}
