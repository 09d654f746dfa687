"""Tensors: token ids in, logits out, KV in a paged pool. Knows no role and no router."""
