"""GET /plugins/flying/status, /layout, /decisions, /memory and the page itself, and POST /plugins/flying/switch.

May import vllm and fastapi. Guarded by vLLM's API keys as the /v1 routes are, but for the page, which holds no data:
it asks for the key and calls the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_flying.core.topology import LayoutError
from vllm_flying.frontend.audit import read_decisions, sentence
from vllm_flying.frontend.board import SwitchPendingError
from vllm_flying.frontend.control_loop import DECISIONS_FILE
from vllm_flying.frontend.observe import step_costs
from vllm_flying.frontend.switcher import SwitchFailed

PREFIX = "/plugins/flying"
PAGE = Path(__file__).parent / "page" / "index.html"
ENGINE_FIELDS = ("engine", "state", "group", "pages", "scheduled_tokens", "pace")


class SwitchBody(BaseModel):
    """What a client asks for."""

    model_config = ConfigDict(extra="forbid")

    groups: list[list[int]]
    method: str | None = None
    timeout_s: float | None = Field(default=None, gt=0, le=3600)


def build_router(app: FastAPI) -> APIRouter:
    """The routes, guarded. Dependencies are coroutines: FastAPI would run plain functions in threads, at a hop each."""

    async def guard(request: Request) -> None:
        keys = [key for key in (app.state.args.api_key or [envs.VLLM_API_KEY]) if key]
        if keys and not AuthenticationMiddleware(app, keys).verify_token(request.headers):
            raise HTTPException(401, "Unauthorized")

    async def enabled() -> Any:
        router = getattr(app.state, "flying_router", None)
        if router is None:
            raise HTTPException(
                404, "vllm-flying is not enabled on this server: start it with --worker-extension-cls "
                "vllm_flying.WorkerExtension and --data-parallel-size of at least 2"
            )
        return router

    routes = APIRouter(prefix=PREFIX, dependencies=[Depends(guard)])

    @routes.get("/status")
    async def status(flying: Any = Depends(enabled)) -> JSONResponse:
        return JSONResponse(await _status(flying))

    @routes.get("/layout")
    async def layout(flying: Any = Depends(enabled)) -> JSONResponse:
        """For whoever asks often: no engine is asked."""
        state = await flying.ready()
        groups = [list(group.engines) for group in state.groups]
        return JSONResponse({"epoch": state.epoch, "groups": groups, "since": state.since})

    @routes.get("/decisions")
    async def decisions(flying: Any = Depends(enabled)) -> JSONResponse:
        entries = list(read_decisions(flying.directory / DECISIONS_FILE))
        return JSONResponse({"decisions": entries, "sentences": [sentence(entry) for entry in entries]})

    @routes.get("/memory")
    async def memory(flying: Any = Depends(enabled)) -> JSONResponse:
        if any(len(group.engines) > 1 for group in (await flying.ready()).groups):
            return _error(409, "parked engines' workers can't be asked, they wait for their leader; ask with all engines apart")
        return JSONResponse({"workers": await flying.engines.call_all("memory")})

    @routes.post("/switch")
    async def switch(body: SwitchBody, flying: Any = Depends(enabled)) -> JSONResponse:
        settings = flying.settings
        method = body.method or settings.switch_method
        try:
            await flying.ready()
            target = flying.switcher.check(body.groups, method)
            record = await flying.switcher.switch(target, method, body.timeout_s or settings.switch_timeout_s)
        except (LayoutError, ValueError) as error:
            return _error(422, str(error))
        except SwitchPendingError as error:
            return _error(409, str(error))
        except SwitchFailed as failure:
            return _error(504 if failure.timed_out else 500, str(failure), failure.record)
        return JSONResponse(record)

    everything = APIRouter()
    everything.include_router(routes)

    @everything.get(f"{PREFIX}/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text())

    return everything


def _error(code: int, message: str, record: dict[str, Any] | None = None) -> JSONResponse:
    body: dict[str, Any] = {"error": {"message": message, "code": code}}
    if record is not None:
        body["record"] = record
    return JSONResponse(body, status_code=code)


async def _status(flying: Any) -> dict[str, Any]:
    state = await flying.ready()
    statuses = await flying.engines.call_all("status")
    by_engine = {status["engine"]: status for status in statuses}
    groups = []
    for group in state.groups:
        members = [by_engine[engine] for engine in group.engines]
        leader = members[0]
        groups.append(
            {
                "engines": list(group.engines),
                "layout": {"tp": len(group.engines) * state.engine_tp, "sp": 1, "pp": 1},
                "leader": group.engines[0],
                "running": leader["running"],
                "waiting": sum(member["waiting"] for member in members),
                "paused": sum(member["paused"] for member in members),
                "kv_tokens_capacity": leader["kv_tokens_capacity"],
                "kv_tokens_used": leader["kv_tokens_used"],
            }
        )
    return {
        "epoch": state.epoch,
        "policy": flying.settings.policy,
        "engines": [{**{name: s[name] for name in ENGINE_FIELDS}, "step_costs": _engine_costs(s)} for s in statuses],
        "groups": groups,
        "step_costs": {str(width): curve.to_dict() for width, curve in step_costs(statuses).items()},
        "last_switch": state.last_switch,
    }


def _engine_costs(status: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By width what this engine has learned, from how many `steps` of its own, and its probe: see `worker.probe`."""
    return {
        width: {**report["curve"], "steps": report["steps"], "probe": status["probes"].get(width, [])}
        for width, report in status["costs"].items()
    }
