"""Moves KV blocks from a prefill worker's memory into a decode worker's pool."""
