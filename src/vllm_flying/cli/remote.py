"""`vllm-flying status`, `switch` and `explain`: the HTTP API from a terminal.

Imports neither torch nor vllm.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_flying.cli.client import add_server_options, call, refusal
from vllm_flying.frontend.audit import read_decisions, sentence


def add_parsers(commands: Any) -> None:
    """Add these commands."""
    common = argparse.ArgumentParser(add_help=False)
    add_server_options(common)
    common.add_argument("--json", action="store_true", help="print the server's answer as it came")
    status = commands.add_parser("status", parents=[common], help="show engines, groups and the last switch")
    status.set_defaults(run=_status)
    switch = commands.add_parser("switch", parents=[common], help="change the layout")
    wanted = switch.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--groups", nargs="+", metavar="E,E", help="all groups, such as: --groups 0,1 2 3")
    wanted.add_argument("--width", type=int, help="all groups of this many engines; 1 splits everything")
    switch.add_argument("--method", help="auto, drain, soft, pause or migrate (default: the server's setting)")
    switch.add_argument("--timeout", type=float, help="seconds until the switch is rolled back")
    switch.set_defaults(run=_switch)
    explain = commands.add_parser("explain", parents=[common], help="say what the controller decided, and why")
    explain.add_argument("--file", help="read an audit log (setting `audit_log`) instead of asking the server")
    explain.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.file:
        path = Path(arguments.file)
        if not path.is_file():
            print(f"there is no file {path}", file=sys.stderr)
            return 2
        sentences = [sentence(entry) for entry in read_decisions(path)]
    else:
        code, answer = call(arguments, "GET", "decisions")
        if code != 200 or arguments.json:
            return _print_answer(code, answer)
        sentences = answer["sentences"]
    print("\n".join(sentences) or "no decisions yet")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    code, answer = call(arguments, "GET", "status")
    if code != 200 or arguments.json:
        return _print_answer(code, answer)
    states = {engine["engine"]: engine["state"] for engine in answer["engines"]}
    print(f"epoch {answer['epoch']}")
    print(f"{'engines':<14}{'layout':<8}{'running':>8}{'waiting':>8}{'paused':>7}{'KV tokens used':>22}  state")
    for group in answer["groups"]:
        engines = ",".join(map(str, group["engines"]))
        used = f"{group['kv_tokens_used']} of {group['kv_tokens_capacity']}"
        print(
            f"{engines:<14}{'tp' + str(group['layout']['tp']):<8}{group['running']:>8}{group['waiting']:>8}"
            f"{group['paused']:>7}{used:>22}  {states[group['leader']]}"
        )
    if answer["last_switch"]:
        print(_sentence(answer["last_switch"]))
    return 0


def _switch(arguments: argparse.Namespace) -> int:
    if arguments.groups:
        try:
            groups = [[int(engine) for engine in group.split(",")] for group in arguments.groups]
        except ValueError:
            print(f"--groups {' '.join(arguments.groups)}: engines are numbers, such as 0,1 2 3", file=sys.stderr)
            return 2
    else:
        code, answer = call(arguments, "GET", "status")
        if code != 200:
            return _print_answer(code, answer)
        engines, width = len(answer["engines"]), arguments.width
        if width < 1 or engines % width:
            print(f"--width {width}: {engines} engines can't be groups of {width}", file=sys.stderr)
            return 2
        groups = [list(range(first, first + width)) for first in range(0, engines, width)]
    body: dict[str, Any] = {"groups": groups}
    if arguments.method:
        body["method"] = arguments.method
    if arguments.timeout is not None:
        body["timeout_s"] = arguments.timeout
    code, answer = call(arguments, "POST", "switch", body)
    if code != 200 or arguments.json:
        return _print_answer(code, answer)
    print(_sentence(answer))
    for proof in answer["proof"]:
        print(f"  worker {proof['worker']}: rank {proof['tp_rank']} of {proof['tp_size']} in {proof['group']}")
    return 0


def _sentence(record: dict[str, Any]) -> str:
    seconds = record["seconds"]
    phases = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in seconds.items() if name != "total")
    text = (
        f"switch {record['epoch']}: {record['from']} -> {record['to']} {record['outcome']} by {record['method']} in "
        f"{1e3 * seconds['total']:.1f} ms ({phases})"
    )
    return f"{text}: {record['error']}" if record["error"] else text


def _print_answer(code: int, answer: Any) -> int:
    if code == 200:
        print(answer if isinstance(answer, str) else json.dumps(answer, indent=2))
        return 0
    print(refusal(code, answer), file=sys.stderr)
    return 1
