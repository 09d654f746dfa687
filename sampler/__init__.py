"""Sampler: logits in, token ids out. `params` (no torch), `sample` and `logprobs` (pure, tensors).

Nothing is re-exported: importing this package, or `sampler.params`, must not load torch.
"""
