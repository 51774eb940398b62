"""The general plugin `flying`: what every vLLM process with this package installed runs at start.

Wraps one function that looks for `--worker-extension-cls vllm_flying.WorkerExtension`; without that flag vLLM behaves
as if the package weren't there.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of `vllm.general_plugins`. May run several times in a process."""
    from vllm_flying.patches.apply import apply_patches
    from vllm_flying.patches.engine_args import engine_args_patches

    apply_patches(engine_args_patches())
