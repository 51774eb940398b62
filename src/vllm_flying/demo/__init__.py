"""`python -m vllm_flying.demo`: a small chat server that merges and splits its engines while it answers."""
