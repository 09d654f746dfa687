"""The forward pass: from token ids to logits, with KV in a paged pool. It does not depend on roles."""
