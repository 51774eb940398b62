"""Which allocator the benchmarks' servers get."""

from __future__ import annotations

import pytest

from bench import allocator


def test_what_is_preloaded_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library keeps its place; a tcmalloc that somebody chose is the one."""
    monkeypatch.setattr(allocator, "find_library", {"tcmalloc_minimal": "libtcmalloc_minimal.so.4"}.get)
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    assert allocator.preload() == {"LD_PRELOAD": "libother.so:libtcmalloc_minimal.so.4"}
    monkeypatch.setenv("LD_PRELOAD", "/opt/libtcmalloc.so")
    assert allocator.preload() == {}
    assert allocator.allocator() == "/opt/libtcmalloc.so"


def test_without_one_reports_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures with the C library's own differ."""
    monkeypatch.setattr(allocator, "find_library", lambda name: None)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert allocator.preload() == {}
    assert "no tcmalloc" in allocator.allocator()
