"""Other engines, each in an environment of its own, made by `python -m tools.benchmarks.peers`."""
