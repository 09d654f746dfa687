"""Shared by lab and benchmarks: loads, clusters that differ in one thing, latencies, machine limits."""
