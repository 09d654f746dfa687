"""The decode worker: owns the KV pool, turns filled blocks into tokens, one step at a time."""
