"""The prefill worker: grants in, filled KV blocks out. It never samples."""
