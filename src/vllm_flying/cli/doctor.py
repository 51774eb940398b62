"""`vllm-flying doctor`: is this machine, this vLLM and this model fit for switching? A report to paste.

Imports vllm when it runs, to read the model's config as vLLM does. With `--url` it asks a running server what steps
cost there.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from vllm_flying.cli.client import add_server_options, call, refusal
from vllm_flying.cli.step_costs import describe_step_costs, why_no_step_costs
from vllm_flying.core.tiles import check_divides
from vllm_flying.core.topology import available_widths
from vllm_flying.patches.supported import model_reasons, sizes_to_divide

OK, WARN, BAD = "ok  ", "warn", "BAD "
Finding = tuple[str, str]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="check versions, seams, model and machine; prints a report")
    parser.add_argument("model", nargs="?", help="checkpoint directory or model name")
    parser.add_argument("--data-parallel-size", "-dp", type=int, default=2, help="engines (default 2)")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, help="workers per engine (default 1)")
    add_server_options(parser, url=None)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if something would keep the server from starting, or the one at --url doesn't answer."""
    findings = [*_versions(), *_plugins(), *_seams(), *_binding(arguments)]
    if arguments.model:
        findings += _model(arguments)
    if arguments.url:
        findings += _running_server(arguments)
    print("vllm-flying doctor")
    for mark, text in findings:
        print(f"  [{mark}] {text}")
    bad = sum(mark == BAD for mark, _ in findings)
    print(f"{bad} problem(s), marked {BAD.strip()}." if bad else "Nothing keeps the server from starting.")
    return 1 if bad else 0


def _versions() -> Iterator[Finding]:
    yield OK, f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    for name in ("vllm-flying", "torch"):
        try:
            yield OK, f"{name} {version(name)}"
        except PackageNotFoundError:
            yield BAD, f"{name} is not installed"
    try:
        from vllm_flying.seams.runtime_check import vllm_version

        yield OK, f"vllm {vllm_version()}"
    except Exception as error:
        yield BAD, str(error)


def _plugins() -> Iterator[Finding]:
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        found = any(point.name == "flying" for point in entry_points(group=group))
        yield (OK if found else BAD), f"entry point flying in {group}: {'found' if found else 'missing; reinstall'}"
    named = os.environ.get("VLLM_PLUGINS")
    if named is None:
        yield WARN, "VLLM_PLUGINS is not set: no HTTP routes under plain `vllm serve`; `vllm-flying serve` sets it"
    else:
        listed = "flying" in named.split(",")
        yield (OK if listed else BAD), f"VLLM_PLUGINS={named}{'' if listed else ': name flying in it'}"


def _seams() -> Iterator[Finding]:
    try:
        from vllm_flying.seams.runtime_check import check_installed

        count = check_installed()
        yield OK, f"seams: all {count} vLLM symbols are as expected"
    except Exception as error:
        yield BAD, f"seams: {error}"


def _binding(arguments: argparse.Namespace) -> Iterator[Finding]:
    from vllm.platforms import current_platform

    workers = arguments.data_parallel_size * arguments.tensor_parallel_size
    if not current_platform.is_cpu():
        yield OK, f"platform {current_platform.device_name}: {workers} devices needed"
        return
    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    entries = binding.split("|")
    if binding == "auto":
        yield WARN, (
            "VLLM_CPU_OMP_THREADS_BIND is auto: engines on one NUMA node can't share it; name cores for every worker, "
            f"such as {'|'.join(map(str, range(workers)))!r}"
        )
    elif len(entries) != workers:
        yield BAD, f"VLLM_CPU_OMP_THREADS_BIND={binding!r} has {len(entries)} entries for {workers} workers"
    else:
        yield OK, f"VLLM_CPU_OMP_THREADS_BIND={binding!r}"
    if workers > (os.cpu_count() or 1):
        yield WARN, f"{workers} workers on {os.cpu_count()} cores: correct, but slow"


def _model(arguments: argparse.Namespace) -> Iterator[Finding]:
    from vllm.config import ModelConfig

    try:
        config = ModelConfig(model=arguments.model)
    except Exception as error:
        yield BAD, f"model {arguments.model}: {error}"
        return
    refused, sizes = model_reasons(config), sizes_to_divide(config)
    yield OK, f"model {arguments.model}: {config.architecture}, " + ", ".join(f"{n} {s}" for n, s in sizes)
    yield from ((BAD, reason) for reason in refused)
    if window := config.get_sliding_window():
        yield WARN, f"a sliding window of {window} tokens: refused at start if layers keep the KV of that window only"
    if refused:
        return
    yield from _weights(arguments)
    kv_heads = config.get_total_num_kv_heads()
    for width in (1, *available_widths(arguments.data_parallel_size)):
        degree = width * arguments.tensor_parallel_size
        reasons = check_divides(sizes, degree)
        if reasons:
            yield BAD, f"groups of {width}: {'; '.join(reasons)}; leave {width} out of the setting `widths`"
            continue
        per_token = 2 * kv_heads // degree * config.get_head_size() * config.dtype.itemsize
        layers = config.get_total_num_hidden_layers()
        yield OK, f"groups of {width}: TP {degree}, {per_token * layers} KV bytes per token and worker, weights shared"


def _weights(arguments: argparse.Namespace) -> Iterator[Finding]:
    files = list(Path(arguments.model).glob("*.safetensors"))
    if files:  # a directory; the size of what would have to be fetched first isn't looked up
        size, each = sum(file.stat().st_size for file in files), arguments.tensor_parallel_size
        yield OK, f"weights: {size / 1e6:.1f} MB as stored, once per engine for all layouts, {size / each / 1e6:.1f} MB a worker"


def _running_server(arguments: argparse.Namespace) -> Iterator[Finding]:
    code, status = call(arguments, "GET", "status")
    if code != 200:
        yield BAD, f"server: {refusal(code, status)}"
        return
    costs = [(OK, line) for line in describe_step_costs(status)]
    yield from costs or [(WARN, why_no_step_costs(status))]
