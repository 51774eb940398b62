"""Lets vLLM's Model Runner V2 run on a CPU by Triton's interpreter: gives Triton a backend named `cpu`."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import types

    import triton.backends

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)
