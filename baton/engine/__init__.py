"""The forward pass: from token ids to logits, with KV in a paged pool. Knows no role and no router."""
