"""Faster forwards on a CPU, each tested against a slower reference."""
