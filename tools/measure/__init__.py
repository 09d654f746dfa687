"""What lab and benchmarks share: loads, clusters that differ in one thing, latencies, limits."""
