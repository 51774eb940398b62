"""What this plugin adds to vLLM's compilation: passes over compiled graphs."""
