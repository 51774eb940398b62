"""`python -m vllm_flying.cli`."""

from vllm_flying.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
