"""The command line: what it adds to vLLM's arguments, and its errors."""

from __future__ import annotations

import os

import pytest

from vllm_flying.cli.main import run
from vllm_flying.cli.serve import enable_plugin, enabled_arguments


def test_serve_adds_one_flag_once() -> None:
    flag = ["--worker-extension-cls", "vllm_flying.WorkerExtension"]
    assert enabled_arguments(["MODEL"]) == ["MODEL", *flag]
    assert enabled_arguments(["MODEL", *flag]) == ["MODEL", *flag]
    assert enabled_arguments(["--worker-extension-cls=x.Y"]) == ["--worker-extension-cls=x.Y"]


@pytest.mark.parametrize(("before", "after"), [("other", ["other", "flying"]), ("flying,other", ["flying", "other"])])
def test_serve_names_the_plugin(monkeypatch: pytest.MonkeyPatch, before: str, after: list[str]) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", before)
    enable_plugin()
    assert os.environ["VLLM_PLUGINS"].split(",") == after


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_engines_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["switch", "--groups", "a,b"]) == 2
    assert "engines are numbers" in capsys.readouterr().err
