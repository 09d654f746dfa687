"""Sampler: from logits to token ids. `params` needs no torch; `sample` and `logprobs` are pure functions
of tensors. Nothing is re-exported, because importing `sampler.params` must not load torch.
"""
