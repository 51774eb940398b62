"""The executor of an engine: vLLM's own, plus one control call for switches."""

CONTROL = "flying_control"
"""Name of the `collective_rpc` method that an engine keeps for itself."""
