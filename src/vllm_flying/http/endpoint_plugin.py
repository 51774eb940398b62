"""The endpoint plugin: routes under /plugins/flying and the middleware that reads hints.

May import vllm and fastapi. vLLM loads it only if `VLLM_PLUGINS` names `flying`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from vllm_flying.frontend.router import router_of
from vllm_flying.http.middleware import ParallelismHintMiddleware
from vllm_flying.http.routes import build_router


class FlyingEndpointPlugin:
    """Satisfies vLLM's EndpointPlugin protocol."""

    name = "flying"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes; they answer 404 while the plugin isn't enabled for this server."""
        app.include_router(build_router(app))
        app.add_middleware(ParallelismHintMiddleware, is_enabled=lambda: _router(app) is not None)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Remember the engines; announce the layout at start."""
        state.flying_router = None
        if engine_client is not None:
            state.flying_router = router_of(engine_client.engine_core, engine_client.vllm_config)
        if state.flying_router is not None:
            await state.flying_router.ready()


def _router(app: FastAPI) -> Any:
    return getattr(app.state, "flying_router", None)
