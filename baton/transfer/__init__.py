"""Moving KV blocks from the prefill worker's memory into the decode worker's pool."""
