"""Every vLLM symbol that this plugin uses, and the check that it is as expected."""
