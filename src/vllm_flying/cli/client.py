"""Asks a running server over its HTTP API, for the commands that need one.

Imports neither torch nor vllm.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request
from typing import Any

DEFAULT_URL = "http://127.0.0.1:8000"


def add_server_options(parser: argparse.ArgumentParser, url: str | None = DEFAULT_URL) -> None:
    """Where the server is and what it wants to see; without a default `url` no server is asked unless it is given."""
    default = f" (default {url})" if url else f", such as {DEFAULT_URL}; adds what it says to the report"
    parser.add_argument("--url", default=url, help=f"address of the server{default}")
    parser.add_argument(
        "--api-key", default=os.environ.get("VLLM_API_KEY"), help="the server's API key (default: VLLM_API_KEY)"
    )


def call(arguments: argparse.Namespace, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """HTTP status and answer; status 0 and a sentence if no server answers."""
    url = f"{arguments.url.rstrip('/')}/plugins/flying/{path}"
    request = urllib.request.Request(url, method=method)
    if arguments.api_key:
        request.add_header("Authorization", f"Bearer {arguments.api_key}")
    if body is not None:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(body).encode()
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            return error.code, json.loads(text)
        except ValueError:
            return error.code, text
    except urllib.error.URLError as error:
        return 0, f"no server answers at {url}: {error.reason}; is it up, and is --url right?"


def refusal(code: int, answer: Any) -> str:
    """An answer that is not a 200, as a text."""
    text = answer if isinstance(answer, str) else json.dumps(answer, indent=2)
    return f"HTTP {code}: {text}" if code else text
