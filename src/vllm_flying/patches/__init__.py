"""The few places where no seam of vLLM's exists and a function has to be wrapped; see docs/patches.md."""
