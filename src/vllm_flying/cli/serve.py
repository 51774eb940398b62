"""`vllm-flying serve`: vLLM's own serve command with the plugin enabled.

May import vllm. Uses vLLM's command object rather than its `vllm` script, which does not start where vLLM is installed
under another distribution name (the CPU wheel).
"""

from __future__ import annotations

import os

EXTENSION_FLAG = "--worker-extension-cls"
EXTENSION = "vllm_flying.WorkerExtension"
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def enabled_arguments(arguments: list[str]) -> list[str]:
    """The arguments with the plugin's flag, unless it is there."""
    present = any(a == EXTENSION_FLAG or a.startswith(EXTENSION_FLAG + "=") for a in arguments)
    return arguments if present else [*arguments, EXTENSION_FLAG, EXTENSION]


def enable_plugin() -> None:
    """Name the plugin in VLLM_PLUGINS, which vLLM asks for before it adds HTTP routes.

    The variable is also a list of the only plugins of other kinds that load, so those that would load without it are
    named along.
    """
    from importlib.metadata import entry_points

    named = os.environ.get("VLLM_PLUGINS")
    if named is None:
        names = [point.name for group in PLUGIN_GROUPS for point in entry_points(group=group)]
    else:
        names = [name for name in named.split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "flying"]))


def serve(arguments: list[str]) -> int:
    """Run the server until it is stopped."""
    enable_plugin()
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own script does
    parser = FlexibleArgumentParser(description="vLLM with vllm-flying")
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    (command,) = cmd_init()
    command.subparser_init(subparsers)
    parsed = parser.parse_args(["serve", *enabled_arguments(arguments)])
    command.validate(parsed)
    command.cmd(parsed)
    return 0
