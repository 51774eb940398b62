"""A pool keeps the large pages that vLLM's own buffer would have had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_flying.worker import host_pool
from vllm_flying.worker.host_pool import HostPool
from vllm_flying.worker.large_pages import LARGE_PAGE, wants_large_pages


def in_large_pages() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemPmdMapped:"))


@pytest.mark.parametrize(
    ("text", "wanted"), [("[always] madvise never", True), ("always [madvise] never", False), ("always madvise [never]", False)]
)
def test_the_system_says_whether_memory_gets_large_pages(tmp_path: Path, text: str, wanted: bool) -> None:
    setting = tmp_path / "enabled"
    setting.write_text(text)
    assert wants_large_pages(setting) is wanted
    assert not wants_large_pages(tmp_path / "none")


def can_collapse() -> bool:
    """Linux 6.1 and later, built with large pages for files in memory."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    return release >= (6, 1) and setting.is_file() and "[deny]" not in setting.read_text()


@pytest.mark.skipif(not can_collapse(), reason="this kernel can't")
@pytest.mark.parametrize("wanted", [True, False])
def test_a_pool_gets_large_pages_where_others_do(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    monkeypatch.setattr(host_pool, "wants_large_pages", lambda: wanted)
    before = in_large_pages()
    pool = HostPool(8 * LARGE_PAGE + 4096)
    large = in_large_pages() - before
    assert not pool.buffer.any() and pool.buffer.data_ptr() % LARGE_PAGE == 0
    pool.buffer[-1] = 7
    assert os.pread(pool.offer([pool.buffer]).fd, 1, 8 * LARGE_PAGE + 4095) == b"\7"
    assert large == (8 * LARGE_PAGE if wanted else 0)
