"""The record of a switch, as the HTTP API gives it.

Pure: no torch, no vllm.
"""

from __future__ import annotations

from typing import Any

from vllm_flying.core.precopy import NOTHING_COPIED, Precopied
from vllm_flying.core.transaction import SwitchTransaction

PHASES = ("precopy", "drain", "prepare", "move", "admit", "transfer", "prove", "release", "commit", "extend")


def switch_record(
    transaction: SwitchTransaction, seconds: dict[str, float], reason: str, copied: Precopied = NOTHING_COPIED
) -> dict[str, Any]:
    """What one transaction did. `seconds` has the time of each phase and the `total`, of which what was `copied` before is no part."""
    journey = transaction.journey
    committed = transaction.holds
    moved = len(journey.arrived) if committed else 0
    recomputed = len(journey.recomputed & journey.arrived.keys()) if committed else 0
    begun = sum(reply["begun"] for reply in transaction.prepared.values())
    waited_for = (*transaction.drained.values(), *transaction.prepared.values())
    paused = journey.staying if transaction.migrates else begun
    return {
        "epoch": transaction.epoch,
        "from": transaction.source.to_lists(),
        "to": transaction.target.to_lists(),
        "reason": reason,
        "method": transaction.method,
        "outcome": transaction.phase.value.replace(" ", "_"),
        "error": transaction.failure,
        "requests": {
            "finished": sum(reply.get("finished", 0) for reply in waited_for),
            "moved": moved - recomputed,
            "recomputed": recomputed,
            "paused": paused,
        },
        "why": journey.reasons() if committed and transaction.migrates else {},
        "recomputed_tokens": journey.recomputed_tokens if committed else 0,
        "prefixes": journey.prefixes.report() if committed else {"moved": 0, "tokens": 0},
        "kv": journey.report(),
        "precopied": copied.report(),
        "waves": 1,
        "seconds": {name: round(value, 6) for name, value in {**seconds, "precopy": copied.took_s}.items()},
        "proof": transaction.proof,
    }


def add_wave(record: dict[str, Any], wave: dict[str, Any]) -> dict[str, Any]:
    """The record of a migration in several waves: counts, bytes and times add up, the rest is the first wave's."""
    requests, kv = wave["requests"], record["kv"]
    total_bytes, seconds = kv["bytes"] + wave["kv"]["bytes"], kv["seconds"] + wave["kv"]["seconds"]
    return {
        **record,
        "epoch": wave["epoch"],
        "requests": {
            **{name: record["requests"][name] + requests[name] for name in ("finished", "moved", "recomputed")},
            "paused": requests["paused"],
        },
        "why": {
            "recomputed": {name: count + wave["why"]["recomputed"][name] for name, count in record["why"]["recomputed"].items()},
            "paused": wave["why"]["paused"],
        },
        "recomputed_tokens": record["recomputed_tokens"] + wave["recomputed_tokens"],
        "prefixes": {name: number + wave["prefixes"][name] for name, number in record["prefixes"].items()},
        "kv": {"bytes": total_bytes, "seconds": seconds, "bytes_per_s": round(total_bytes / seconds) if seconds else 0},
        "waves": record["waves"] + 1,
        "seconds": {name: round(value + wave["seconds"][name], 6) for name, value in record["seconds"].items()},
    }
