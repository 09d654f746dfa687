"""What the processes share. Prefill runs the first leg, decode the second; the KV cache is passed."""
