"""Pure logic: which layouts exist, who owns which page, what a switch does. No torch, no vllm."""
