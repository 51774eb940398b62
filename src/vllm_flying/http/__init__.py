"""HTTP: the endpoint plugin `flying`, its routes and its middleware."""

from __future__ import annotations

from typing import Any


def endpoint_plugin() -> Any:
    """Entry point of `vllm.endpoint_plugins`."""
    from vllm_flying.http.endpoint_plugin import FlyingEndpointPlugin

    return FlyingEndpointPlugin()
