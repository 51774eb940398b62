"""The controller: observe, plan, act. Pure: no torch, no vllm, no clock, no I/O."""
