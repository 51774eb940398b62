"""A switch ends in the new layout or the old one, whatever fails and whenever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_topology import layouts
from vllm_flying.core.leases import PageLeases
from vllm_flying.core.topology import Group, Layout
from vllm_flying.core.transaction import Call, Phase, SwitchTransaction

NUM_ENGINES = 4
NUM_PAGES = 10


class Refusal(Exception):
    pass


class Engine:
    """The page and layout side of an engine's agent."""

    def __init__(self, engine: int) -> None:
        self.engine = engine
        self.group: Group = (engine,)
        self.leases = PageLeases(NUM_PAGES)
        self.own_free = set(range(1, NUM_PAGES))
        self.epoch = 0
        self.preparing: int | None = None

    def handle(self, call: Call, engines: list[Engine]) -> Any:
        arguments = dict(call.arguments)
        arguments.pop("method", None), arguments.pop("recipients", None)
        if call.operation == "move":
            return self.move(engines=engines, **arguments)
        return getattr(self, call.operation)(**arguments)

    def prepare(self, epoch: int) -> dict[str, int]:
        if self.preparing is not None:
            raise Refusal("switching already")
        self.preparing = epoch
        width = len(self.group)
        leading = width > 1 and self.group[0] == self.engine
        returnable = len(self.leases.virtual_pages(width)) if leading else 0
        return {"free_pages": len(self.own_free), "returnable_pages": returnable, "begun": 0}

    def move(self, epoch: int, group: list[int], lease: int, engines: list[Engine]) -> dict[str, int]:
        assert self.preparing == epoch
        width = len(self.group)
        if width > 1:
            self.own_free.update(self.leases.take_back(width, sorted(self.leases.virtual_pages(width))))
        self.group = tuple(group)
        if len(group) > 1:
            physical = [self.own_free.pop() for _ in range(lease)]
            self.leases.lend(len(group), self.leases.next_virtual_pages(len(group), lease), physical)
        return {"kv_tokens": lease}

    def prove(self) -> list[dict[str, int]]:
        return [{"engine": e, "tp_size": len(self.group), "tp_rank": i} for i, e in enumerate(self.group)]

    def commit(self, epoch: int) -> dict[str, Any]:
        self.epoch, self.preparing = epoch, None
        return {"handover": {}}

    def cancel(self, epoch: int) -> None:
        if self.preparing == epoch:
            self.preparing = None


def run(transaction: SwitchTransaction, engines: list[Engine], fails: Any) -> None:
    """Deliver calls in an order and with failures that `fails` decides."""
    calls = transaction.start()
    sent = 0
    while not transaction.is_over:
        assert calls or transaction.waiting_for, "a switch that isn't over waits for somebody"
        following: list[Call] = []
        phase = transaction.phase
        for call in calls:
            sent += 1
            assert sent < 200
            if fails(call, phase, before=True):
                if phase is transaction.phase:
                    following += transaction.failed(call.engine, f"{call.operation} refused")
                continue
            # Calls of a phase that was given up meanwhile are still handled, in order; nobody waits for the reply.
            result = engines[call.engine].handle(call, engines)
            if phase is not transaction.phase:
                continue
            if fails(call, phase, before=False):
                following += transaction.failed(None, "time limit")
            else:
                following += transaction.replied(call.engine, result)
        calls = following


def check_pages(engines: list[Engine], layout: Layout) -> None:
    for engine in engines:
        assert engine.group == layout.group_of(engine.engine)
        assert engine.preparing is None
        assert engine.own_free.isdisjoint(engine.leases.lent_pages())
        assert len(engine.own_free) + len(engine.leases.lent_pages()) == NUM_PAGES - 1
    for group in layout.groups:
        backed = [engines[e].leases.virtual_pages(len(group)) for e in group if len(group) > 1]
        assert all(pages == backed[0] for pages in backed)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_sequence_of_switches_with_any_failure_ends_in_one_of_the_two_layouts(data: st.DataObject) -> None:
    engines = [Engine(e) for e in range(NUM_ENGINES)]
    layout = Layout.separate(NUM_ENGINES)
    for epoch in range(1, data.draw(st.integers(2, 6))):
        target = data.draw(layouts(NUM_ENGINES))
        failing = data.draw(st.sampled_from([None, Phase.PREPARE, Phase.MOVE, Phase.PROVE]))
        engine = data.draw(st.integers(0, NUM_ENGINES - 1))
        late = data.draw(st.booleans())

        def fails(call: Call, phase: Phase, before: bool, *, failing=failing, engine=engine, late=late) -> bool:  # type: ignore[no-untyped-def]
            # A refusal happens before an engine acts; a time limit passes after it did.
            wanted = late if not before else not late
            return phase is failing and call.engine == engine and wanted

        transaction = SwitchTransaction(epoch, layout, target, "pause")
        run(transaction, engines, fails)
        assert transaction.phase in (Phase.COMMITTED, Phase.ROLLED_BACK)
        if transaction.phase is Phase.COMMITTED:
            assert transaction.failure is None or failing is None
            layout = target
        check_pages(engines, layout)


def test_engines_whose_group_stays_take_no_part() -> None:
    source = Layout.separate(4)
    transaction = SwitchTransaction(1, source, Layout.of([[0, 1], [2], [3]], 4), "pause")
    assert {call.engine for call in transaction.start()} == {0, 1}


def test_an_equal_layout_is_committed_without_a_call() -> None:
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.separate(2), "pause")
    assert transaction.start() == []
    assert transaction.phase is Phase.COMMITTED


def test_a_group_without_pages_is_refused_before_anything_moves() -> None:
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), "pause")
    transaction.start()
    transaction.replied(0, {"free_pages": 5, "returnable_pages": 0, "begun": 0})
    calls = transaction.replied(1, {"free_pages": 0, "returnable_pages": 0, "begun": 3})
    assert [call.operation for call in calls] == ["cancel", "cancel"]
    assert "no KV pages" in (transaction.failure or "")


def test_a_wrong_proof_is_undone() -> None:
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), "pause")
    transaction.start()
    for engine in (0, 1):
        calls = transaction.replied(engine, {"free_pages": 5, "returnable_pages": 0, "begun": 0})
    for engine in (0, 1):
        calls = transaction.replied(engine, {"kv_tokens": 1})
    assert [call.operation for call in calls] == ["prove"]
    calls = transaction.replied(0, [{"engine": 0, "tp_size": 2, "tp_rank": 0}, {"engine": 1, "tp_size": 1, "tp_rank": 0}])
    assert [(call.operation, call.arguments["group"]) for call in calls] == [("move", [0]), ("move", [1])]


@pytest.mark.parametrize(
    ("source", "target", "engine", "expected"),
    [
        ([[0], [1], [2], [3]], [[0, 1, 2, 3]], 2, [0]),
        ([[0], [1], [2], [3]], [[0, 1, 2, 3]], 0, [0]),
        ([[0, 1, 2, 3]], [[0, 1], [2, 3]], 0, [0, 2]),
        ([[0, 1, 2, 3]], [[0], [1], [2, 3]], 0, [0, 1, 2]),
        ([[0, 1, 2, 3]], [[0, 1], [2, 3]], 3, [2]),
    ],
)
def test_fresh_requests_go_where_they_can_run(
    source: list[list[int]], target: list[list[int]], engine: int, expected: list[int]
) -> None:
    transaction = SwitchTransaction(1, Layout.of(source, 4), Layout.of(target, 4), "pause")
    assert transaction.recipients(engine) == expected
