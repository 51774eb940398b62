"""The board: whole or not at all, and one switch at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vllm_flying.frontend.board import BoardGroup, BoardState, LayoutBoard, SwitchPendingError, switch_lock


def state(epoch: int) -> BoardState:
    return BoardState(epoch, 1, (BoardGroup((0, 1), 100 + epoch), BoardGroup((2,), 50)), {"epoch": epoch})


def test_what_is_published_is_read_by_others(tmp_path: Path) -> None:
    writer, reader = LayoutBoard(tmp_path), LayoutBoard(tmp_path)
    assert not reader.exists
    for epoch in range(3):
        writer.publish(state(epoch))
        assert reader.read() == state(epoch)


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    board = LayoutBoard(tmp_path)
    board.publish(state(0))
    stop = threading.Event()

    def write() -> None:
        epoch = 0
        while not stop.is_set():
            epoch += 1
            board.publish(state(epoch))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(2000):
            read = LayoutBoard(tmp_path).read()
            assert read == state(read.epoch)
    finally:
        stop.set()
        thread.join()


def test_one_switch_at_a_time(tmp_path: Path) -> None:
    with switch_lock(tmp_path), pytest.raises(SwitchPendingError), switch_lock(tmp_path):
        pass
    with switch_lock(tmp_path):
        pass
