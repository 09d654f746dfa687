"""The lab: studies of this machine that teach what batching, the KV cache and disaggregation do."""
