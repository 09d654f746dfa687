"""Faster forwards on a GPU, each with a slower fallback."""
