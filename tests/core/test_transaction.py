"""A switch ends in the new layout or the old one, whatever fails and whenever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_topology import layouts
from vllm_flying.core.journey import Call
from vllm_flying.core.leases import PageLeases
from vllm_flying.core.topology import Group, Layout, aligned_group
from vllm_flying.core.transaction import FORWARD, UNDOABLE, Phase, SwitchTransaction

NUM_ENGINES = 4
NUM_PAGES = 10


class Refusal(Exception):
    pass


def moved(free_tokens: int, *offers: dict[str, Any], staying: int = 0, proof: Any = ()) -> dict[str, Any]:
    """An engine's reply to `move`."""
    rest = {"capacity_tokens": 0, "prefill_s": None, "intact": b"", "staying": staying, "page_tokens": 1,
            "proof": list(proof)}  # fmt: skip
    return {"free_tokens": free_tokens, "offers": list(offers), **rest}


class Engine:
    """The page, layout and request side of an engine's agent. A request is a page of KV in one width."""

    def __init__(self, engine: int) -> None:
        self.engine = engine
        self.group: Group = (engine,)
        self.leases = PageLeases(NUM_PAGES)
        self.own_free = set(range(1, NUM_PAGES))
        self.free: dict[int, set[int]] = {2: set(), 4: set()}
        """Virtual pages of the groups it leads that no request holds."""
        self.requests: dict[str, tuple[int, int]] = {}
        self.arriving: dict[str, tuple[int, int]] = {}
        self.handed_back: list[int] | None = None
        """What the leader gave back when the group ended, until this member leaves."""
        self.epoch = 0
        self.preparing: int | None = None
        self.draining: int | None = None
        self.drained: set[str] = set()
        self.began: set[str] = set()
        self.hot = 0
        """Pages that hold cached prefixes worth moving, if so many are free."""
        self.held: tuple[int, list[int]] = (1, [])
        """Width, and pages of it, that are held for prefixes."""
        self.caching: list[int] = []
        """Pages of the present group into which prefixes are copied."""

    def dissolve(self) -> None:
        pages, self.free[len(self.group)] = sorted(self.free[len(self.group)]), set()
        for member in self.group:
            if EVERYONE[member].group == self.group and EVERYONE[member].handed_back is None:
                EVERYONE[member].handed_back = pages

    @property
    def leads(self) -> bool:
        return self.group[0] == self.engine

    @property
    def left(self) -> set[int]:
        """Widths of former groups in which pages are free, that is, left behind by requests that ended."""
        return {w for w, pages in self.free.items() if pages and not (self.leads and w == len(self.group))}

    def begin(self, request_id: str) -> None:
        width = len(self.group)
        pages = self.own_free if width == 1 else self.free[width]
        if self.leads and pages:
            self.requests[request_id] = (width, pages.pop())

    def abort(self, request_id: str) -> None:
        width, page = self.requests.pop(request_id)
        (self.own_free if width == 1 else self.free[width]).add(page)

    def handle(self, call: Call) -> Any:
        return getattr(self, call.operation)(**call.arguments)

    def drain(self, epoch: int) -> dict[str, Any]:
        """The last of its requests is done, and a new one begins. Until the reply has come it counts as draining."""
        assert self.draining is None and self.preparing is None and epoch > self.epoch
        self.draining = epoch
        self.drained = {i for i, (width, _) in self.requests.items() if width == len(self.group)}
        for request_id in self.drained:
            self.abort(request_id)
        before = set(self.requests)
        self.begin(f"{epoch}.{self.engine}.meanwhile")
        self.began = set(self.requests) - before
        return {"finished": len(self.drained)}

    def pool(self, width: int) -> set[int]:
        return self.own_free if width == 1 else self.free[width]

    def let_go(self) -> None:
        width, pages = self.held
        self.pool(width).update(pages)
        self.held = (1, [])

    def end_caching(self) -> None:
        self.pool(len(self.group)).update(self.caching)
        self.caching = []

    def prepare(self, epoch: int, method: str, rates: list[float | None], prefixes_to: int) -> dict[str, Any]:
        if self.preparing is not None:
            raise Refusal("switching already")
        self.preparing, self.draining = epoch, None
        width = len(self.group)
        if prefixes_to and self.leads:
            pages = self.pool(width)
            self.held = (width, [pages.pop() for _ in range(min(self.hot, len(pages)))])
        returnable = len(self.free[width]) if width > 1 and self.leads else 0
        widths = sorted({width for width, _ in self.requests.values()} | self.left)
        return {
            "free_pages": len(self.own_free), "returnable_pages": returnable, "begun": len(self.requests),
            "paused_widths": widths, "prefix_pages": len(self.held[1]),
            "kept": (len(self.requests), len(self.requests)), "page_tokens": 1,
        }  # fmt: skip

    def move(
        self, epoch: int, group: list[int], lease: int, offering: bool, proving: bool, carrying: bool
    ) -> dict[str, Any]:
        assert self.preparing == epoch
        if not carrying:
            self.let_go()
        self.end_caching()
        for width, page in self.arriving.values():
            (self.own_free if width == 1 else self.free[width]).add(page)
        self.arriving = {}
        if len(self.group) > 1:
            leader = EVERYONE[self.group[0]]
            if self.handed_back is None and leader.group == self.group:
                leader.dissolve()
            elif self.handed_back is None:  # the leader refused to join: what was lent to it was never used
                self.handed_back = self.last_lent
            self.own_free.update(self.leases.take_back(len(self.group), self.handed_back or []).tolist())
            self.handed_back = None
        self.group = tuple(group)
        if len(group) > 1:
            physical = [self.own_free.pop() for _ in range(lease)]
            virtual = self.leases.next_virtual_pages(len(group), lease).tolist()
            self.leases.lend(len(group), virtual, physical)
            self.last_lent = virtual
            if self.leads:
                self.free[len(group)].update(virtual)
        offers = [
            {"request_id": i, "width": width, "tokens": 1, "pages": [page], "packed": i.encode()}
            for i, (width, page) in self.requests.items()
            if offering and not (self.leads and width == len(group))
        ]
        free_tokens = lease + 1 if len(group) > 1 else len(self.own_free) + 1
        reply = moved(free_tokens, *offers, proof=self.prove() if proving and self.leads else ())
        width, pages = self.held
        if offering and pages:
            prefix = {"name": f"prefix {self.engine}", "tokens": b"", "salt": None}
            reply["prefixes"] = [{"width": width, "pages": pages, "hits": 2, "prefix": prefix}]
        return reply

    def admit(
        self, epoch: int, packed: list[bytes], recomputed: list[str], intact: bytes, capacity: int, prefixes: Any
    ) -> dict[str, Any]:
        admitted = {}
        for raw in packed:
            pages = self.own_free if len(self.group) == 1 else self.free[len(self.group)]
            if pages:
                self.arriving[raw.decode()] = (len(self.group), page := pages.pop())
                admitted[raw.decode()] = {"target_pages": [page], "first_block": 0, "last_block": 1}
        cached = {}
        for prefix in prefixes:
            free = self.pool(len(self.group))
            if len(free) > 3:
                self.caching.append(page := free.pop())
                cached[prefix["name"]] = {"tokens": 1, "target_pages": [page], "first_block": 0, "last_block": 1}
        return {"admitted": admitted, "prefixes": cached}

    def transfer(self, epoch: int, moves: list[dict[str, Any]], states: dict[str, bytes]) -> dict[str, Any]:
        for move in moves:
            for end in ("source", "target"):
                if self.engine in move[end]:
                    backed = self.leases.virtual_pages(len(move[end])) if len(move[end]) > 1 else set(range(1, NUM_PAGES))
                    assert set(move[f"{end}_pages"]) <= backed
        return {"bytes": 0, "seconds": 0.0}

    def prove(self) -> list[dict[str, int]]:
        return [{"engine": e, "tp_size": len(self.group), "tp_rank": i} for i, e in enumerate(self.group)]

    def release(self, epoch: int, departed: dict[int, list[str]], forget: dict[int, list[str]]) -> dict[str, Any]:
        for width, ids in departed.items():
            for request_id in ids:
                held, page = self.requests.pop(request_id)
                assert held == width
                (self.own_free if width == 1 else self.free[width]).add(page)
        self.let_go()
        reclaimed = {}
        for width, pages in self.free.items():
            if pages and not (self.leads and width == len(self.group)):
                reclaimed[width] = sorted(pages)
                self.free[width] = set()
        return {"gone": [], "reclaimed": reclaimed, "free_pages": len(self.own_free)}

    def commit(
        self, epoch: int, recipients: list[int], gone: Any, returned: Any, extend: int, intact: bytes,
        capacity: dict[int, int],
    ) -> dict[str, Any]:
        self.epoch, self.preparing = epoch, None
        self.let_go()
        self.end_caching()
        for width, pages in returned.items():
            self.own_free.update(self.leases.take_back(width, pages).tolist())
        self.requests |= self.arriving
        self.arriving = {}
        virtual = self.leases.next_virtual_pages(len(self.group), extend).tolist() if extend else []
        physical = [self.own_free.pop() for _ in virtual]
        if extend:
            self.leases.lend(len(self.group), virtual, physical)
        return {"handover": {}, "lent": [virtual, physical], "kv_tokens": 0}

    def extend(self, epoch: int, virtual: list[int], physical: dict[str, list[int]]) -> dict[str, Any]:
        assert set(physical) == {str(engine) for engine in self.group}
        self.free[len(self.group)].update(virtual)
        return {"kv_tokens": 1}

    def cancel(self, epoch: int) -> None:
        if self.preparing == epoch:
            self.preparing = None
            self.let_go()
        if self.draining == epoch:
            self.draining = None


EVERYONE: list[Engine] = []


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
            result = engines[call.engine].handle(call)
            if phase is not transaction.phase:
                continue
            if fails(call, phase, before=False):
                following += transaction.failed(None, "time limit")
            else:
                following += transaction.replied(call.engine, result)
        calls = following


def check_pages(engines: list[Engine], layout: Layout, begun: set[str]) -> None:
    for engine in engines:
        assert engine.group == layout.group_of(engine.engine)
        assert engine.preparing is None and engine.draining is None and not engine.arriving and engine.handed_back is None
        assert not engine.held[1] and not engine.caching, "pages of prefixes are held for ever"
        held = {page for width, page in engine.requests.values() if width == 1}
        lent = engine.leases.lent_pages()
        assert engine.own_free.isdisjoint(lent) and held.isdisjoint(engine.own_free | lent)
        assert len(engine.own_free) + len(held) + len(lent) == NUM_PAGES - 1
        for width, free in engine.free.items():
            used = {page for w, page in engine.requests.values() if w == width}
            assert used.isdisjoint(free)
            if engine.engine % width == 0:
                for member in aligned_group(engine.engine, width):
                    assert engines[member].leases.virtual_pages(width) == used | free
            else:
                assert not used and not free
    homes = [request_id for engine in engines for request_id in engine.requests]
    assert sorted(homes) == sorted(begun), "a request is lost, or in two places"


@settings(max_examples=200)
@given(st.data())
def test_any_sequence_of_switches_with_any_failure_ends_in_one_of_the_two_layouts(data: st.DataObject) -> None:
    engines = [Engine(e) for e in range(NUM_ENGINES)]
    EVERYONE[:] = engines
    layout = Layout.separate(NUM_ENGINES)
    for epoch in range(1, data.draw(st.integers(2, 6))):
        for engine in data.draw(st.lists(st.integers(0, NUM_ENGINES - 1), max_size=5)):
            engines[engine].begin(f"{epoch}.{engine}.{len(engines[engine].requests)}")
        for request_id, home in sorted((i, engine.engine) for engine in engines for i in engine.requests):
            if data.draw(st.booleans()):
                engines[home].abort(request_id)
        begun = {request_id for engine in engines for request_id in engine.requests}
        for each in engines:
            each.hot = data.draw(st.integers(0, 4))
        target = data.draw(layouts(NUM_ENGINES))
        method = data.draw(st.sampled_from(["pause", "migrate", "soft"]))
        before = [Phase.DRAIN, Phase.PREPARE]
        failing = data.draw(st.sampled_from([None, *before, *sorted(UNDOABLE, key=lambda phase: phase.value)]))
        engine = data.draw(st.integers(0, NUM_ENGINES - 1))
        late = data.draw(st.booleans())
        if len(group := layout.group_of(engine)) > 1 and engine == group[0] and failing is Phase.MOVE:
            late = True  # members wait for their leader to leave: one that can't is a dead engine, not a refusal
        if failing is Phase.MOVE and any(engine.left for engine in engines):
            late = True  # one that never joined doesn't hear which pages of a former group its leader gave back

        def fails(call: Call, phase: Phase, before: bool, *, failing=failing, engine=engine, late=late) -> bool:  # type: ignore[no-untyped-def]
            # A refusal happens before an engine acts; a time limit passes after it did.
            wanted = late if not before else not late
            return phase is failing and call.engine == engine and wanted

        transaction = SwitchTransaction(epoch, layout, target, method)
        run(transaction, engines, fails)
        assert transaction.phase in (Phase.COMMITTED, Phase.ROLLED_BACK)
        if method == "soft" and layout != target:
            begun = begun.union(*(e.began for e in engines)).difference(*(e.drained for e in engines))
            if transaction.phase is Phase.COMMITTED:
                finished = sum(reply["finished"] for reply in transaction.drained.values())
                assert finished == sum(len(e.drained) for e in engines)
        for each in engines:
            each.drained, each.began = set(), set()
        if transaction.phase is Phase.COMMITTED and method != "pause" and layout != target:
            assert transaction.journey.arrived or not transaction.journey.offers, "nobody is stranded"
        if transaction.phase is Phase.COMMITTED:
            assert transaction.failure is None or failing is None
            if transaction.carries_prefixes:
                assert not transaction.journey.unplaced, "a begun request waits for the sake of a prefix"
            layout = target
        check_pages(engines, layout, begun)


@pytest.mark.parametrize("phase", sorted(FORWARD, key=lambda phase: phase.value))
@pytest.mark.parametrize("refusing", [0, 1, None])
def test_what_fails_after_the_proof_does_not_keep_the_others_from_going_on(phase: Phase, refusing: int | None) -> None:
    engines = [Engine(e) for e in range(2)]
    EVERYONE[:] = engines
    for engine in engines:
        engine.begin(f"r{engine.engine}")

    def fails(call: Call, now: Phase, before: bool) -> bool:
        return now is phase and before == (refusing is not None) and call.engine == (refusing or 0)

    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), "migrate")
    run(transaction, engines, fails)
    if phase is Phase.EXTEND and refusing == 1:
        assert transaction.phase is Phase.COMMITTED  # only the leader is asked
        return
    assert transaction.phase is Phase.FAILED and transaction.failure and transaction.holds
    going_on = [engine for engine in engines if phase is not Phase.COMMIT or engine.engine != refusing]
    assert all(engine.preparing is None and engine.group == (0, 1) for engine in going_on)


@pytest.mark.parametrize("method", ["migrate", "soft"])
def test_the_time_limit_is_for_what_can_be_undone(method: str) -> None:
    engines = [Engine(e) for e in range(2)]
    EVERYONE[:] = engines
    for engine in engines:
        engine.begin(f"r{engine.engine}")
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), method)
    bounded = {}

    def look(call: Call, phase: Phase, before: bool) -> bool:
        bounded[phase] = transaction.is_bounded
        return False

    run(transaction, engines, look)
    assert bounded == {phase: phase in (Phase.DRAIN, Phase.PREPARE) or phase in UNDOABLE for phase in bounded}
    assert set(bounded) >= FORWARD and (Phase.DRAIN in bounded) == (method == "soft")


def test_pages_left_by_requests_that_ended_go_back_to_every_member() -> None:
    engines = [Engine(e) for e in range(NUM_ENGINES)]
    EVERYONE[:] = engines
    separate, merged = Layout.separate(4), Layout.of([[0, 1, 2, 3]], 4)
    never = lambda call, phase, before: False  # noqa: E731
    run(SwitchTransaction(1, separate, merged, "pause"), engines, never)
    engines[0].begin("r")
    run(SwitchTransaction(2, merged, separate, "pause"), engines, never)
    engines[0].abort("r")
    engines[1].begin("other")
    transaction = SwitchTransaction(3, separate, Layout.of([[0, 1], [2], [3]], 4), "migrate")
    run(transaction, engines, never)
    assert transaction.engines == (0, 1, 2, 3)
    assert [engine.leases.virtual_pages(4) for engine in engines] == [set()] * 4


def test_a_migration_into_the_present_layout_fetches_what_is_paused() -> None:
    engines = [Engine(e) for e in range(2)]
    EVERYONE[:] = engines
    for engine in engines:
        engine.begin(f"r{engine.engine}")
    separate, merged = Layout.separate(2), Layout.of([[0, 1]], 2)
    never = lambda call, phase, before: False  # noqa: E731
    run(SwitchTransaction(1, separate, merged, "pause"), engines, never)
    assert set(engines[0].requests) == {"r0"} and set(engines[1].requests) == {"r1"}
    fetching = SwitchTransaction(2, merged, merged, "migrate")
    run(fetching, engines, never)
    assert {i: width for i, (width, _) in engines[0].requests.items()} == {"r0": 2, "r1": 2}
    # All pages but the two that are held now back the merged group, and none is left behind.
    assert len(engines[0].free[2]) == NUM_PAGES - 1 - 2 and not engines[1].own_free


def test_kv_held_by_engines_outside_the_switch_brings_them_in() -> None:
    transaction = SwitchTransaction(1, Layout.of([[0, 1], [2], [3]], 4), Layout.separate(4), "migrate")
    assert {call.engine for call in transaction.start()} == {0, 1}
    ready = {"free_pages": 5, "returnable_pages": 5, "begun": 0}
    assert transaction.replied(1, {**ready, "paused_widths": []}) == []
    calls = transaction.replied(0, {**ready, "paused_widths": [2, 4]})
    assert [(call.engine, call.operation) for call in calls] == [(2, "prepare"), (3, "prepare")]


def test_engines_whose_group_stays_take_no_part() -> None:
    source = Layout.separate(4)
    transaction = SwitchTransaction(1, source, Layout.of([[0, 1], [2], [3]], 4), "pause")
    assert {call.engine for call in transaction.start()} == {0, 1}


def test_engines_that_are_done_serve_until_all_are_and_only_for_the_group_to_come() -> None:
    transaction = SwitchTransaction(1, Layout.separate(4), Layout.of([[0, 1], [2], [3]], 4), "soft")
    assert {(call.engine, call.operation) for call in transaction.start()} == {(0, "drain"), (1, "drain")}
    assert transaction.serving_until_merged(2) == ()
    assert transaction.replied(1, {"finished": 0}) == []
    assert transaction.serving_until_merged(2) == (1,) and transaction.serving_until_merged(4) == ()
    assert {call.operation for call in transaction.replied(0, {"finished": 2})} == {"prepare"}
    assert transaction.serving_until_merged(2) == ()
    split = SwitchTransaction(2, Layout.of([[0, 1]], 2), Layout.separate(2), "soft")
    split.start()
    split.replied(1, {"finished": 0})
    assert split.serving_until_merged(1) == ()


@pytest.mark.parametrize("failing", [1, None])
def test_a_drain_that_is_called_off_has_moved_nobody(failing: int | None) -> None:
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), "soft")
    transaction.start()
    transaction.replied(0, {"finished": 0})
    assert [call.operation for call in transaction.failed(failing, "no")] == ["cancel", "cancel"]


def test_what_is_only_fetched_is_not_waited_for() -> None:
    fetching = SwitchTransaction(1, Layout.of([[0, 1]], 2), Layout.of([[0, 1]], 2), "soft")
    assert {call.operation for call in fetching.start()} == {"prepare"}


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


def test_a_migration_that_would_leave_every_request_behind_is_undone() -> None:
    transaction = SwitchTransaction(1, Layout.of([[0, 1]], 2), Layout.separate(2), "migrate")
    transaction.start()
    for engine in (0, 1):
        transaction.replied(engine, {"free_pages": 0, "returnable_pages": 1, "begun": 1, "paused_widths": [2]})
    offer = {"request_id": "r", "width": 2, "tokens": 500, "pages": [1, 2], "packed": b"r"}
    transaction.replied(0, moved(32, offer))
    calls = transaction.replied(1, moved(32))
    assert [(call.operation, call.arguments["group"]) for call in calls] == [("move", [0, 1])] * 2
    assert not any(call.arguments["offering"] for call in calls)
    assert "none of 1 begun requests finds room" in (transaction.failure or "")


@pytest.mark.parametrize("begun", [0, 3])
@pytest.mark.parametrize("method", ["pause", "migrate"])
def test_engines_prove_as_they_move_unless_something_is_to_be_copied_first(method: str, begun: int) -> None:
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), method)
    transaction.start()
    for engine in (0, 1):
        calls = transaction.replied(engine, {"free_pages": 5, "returnable_pages": 0, "begun": begun})
    proving = method == "pause" or not begun
    assert all(call.arguments["proving"] is proving for call in calls)
    proof = [{"engine": engine, "tp_size": 2, "tp_rank": engine} for engine in (0, 1)]
    transaction.replied(0, moved(5, proof=proof if proving else ()))
    calls = transaction.replied(1, moved(5))
    assert [call.operation for call in calls] == (["commit", "commit"] if proving else ["prove"])


@pytest.mark.parametrize(("kept", "carrying"), [((0, 0), True), ((1, 100), True), ((1, 161), False)])
def test_hot_prefixes_cost_a_round_and_give_their_pages_up_where_requests_may_need_room(
    kept: tuple[int, int], carrying: bool
) -> None:
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), "auto")
    assert [call.arguments["prefixes_to"] for call in transaction.start()] == [2, 2]
    for engine, held in ((0, 3), (1, 0)):
        reply = {"free_pages": 9 - held, "returnable_pages": 0, "begun": 0, "page_tokens": 16}
        calls = transaction.replied(engine, {**reply, "prefix_pages": held, "kept": kept if held else (0, 0)})
    expected = {"carrying": carrying, "offering": carrying, "proving": not carrying, "lease": 6 if carrying else 9}
    assert all({name: call.arguments[name] for name in expected} == expected for call in calls)
    undoing = transaction.failed(0, "refused") + transaction.replied(1, moved(5))
    assert [(call.operation, call.arguments["lease"]) for call in undoing] == [("move", 0)] * 2


def test_a_wrong_proof_in_a_move_is_undone() -> None:
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), "pause")
    transaction.start()
    for engine in (0, 1):
        transaction.replied(engine, {"free_pages": 5, "returnable_pages": 0, "begun": 0})
    transaction.replied(0, moved(5, proof=[{"engine": 0, "tp_size": 1, "tp_rank": 0}]))
    calls = transaction.replied(1, moved(5))
    assert [(call.operation, call.arguments["group"]) for call in calls] == [("move", [0]), ("move", [1])]


def test_requests_that_cannot_move_stay_and_those_that_begin_again_need_no_room() -> None:
    transaction = SwitchTransaction(1, Layout.of([[0, 1]], 2), Layout.separate(2), "migrate")
    transaction.start()
    for engine in (0, 1):
        transaction.replied(engine, {"free_pages": 0, "returnable_pages": 1, "begun": 1, "paused_widths": [2]})
    offer = {"request_id": "r", "width": 2, "tokens": 500, "packed": b"r", "pages": [1], "begins_again": True}
    transaction.replied(0, moved(32, offer, staying=2))
    (call,) = transaction.replied(1, moved(32))
    assert call.operation == "admit" and call.arguments["recomputed"] == ["r"]
    admission = {"target_pages": [], "first_block": 0, "last_block": 0}
    transaction.replied(call.engine, {"admitted": {"r": admission}})
    assert (transaction.journey.unplaced, transaction.journey.staying) == (0, 2)
    assert transaction.journey.recomputed_tokens == 500


def test_a_wrong_proof_is_undone() -> None:
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), "pause")
    transaction.start()
    for engine in (0, 1):
        calls = transaction.replied(engine, {"free_pages": 5, "returnable_pages": 0, "begun": 0})
    for engine in (0, 1):
        calls = transaction.replied(engine, moved(1))
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
