"""Benchmarks against stock vLLM: one command each, results in bench/results/."""
