"""A switch ends in the new layout or the old one, whatever fails and whenever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_topology import layouts
from tests.support.switched_engines import EVERYONE, NUM_ENGINES, NUM_PAGES, Engine, check_pages, moved, run
from vllm_flying.core.journey import Call
from vllm_flying.core.topology import Layout
from vllm_flying.core.transaction import FORWARD, UNDOABLE, Phase, SwitchTransaction


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


@pytest.mark.parametrize("right", [True, False])
def test_the_proof_comes_with_the_copies(right: bool) -> None:
    transaction = SwitchTransaction(1, Layout.separate(2), Layout.of([[0, 1]], 2), "migrate")
    transaction.start()
    for engine in (0, 1):
        reply = {"free_pages": 5, "returnable_pages": 0, "begun": 1, "paused_widths": [1]}
        transaction.replied(engine, {**reply, "kept": (1, 1), "page_tokens": 1})
    offer = {"request_id": "r", "width": 1, "tokens": 1, "packed": b"r", "pages": [1]}
    transaction.replied(0, moved(5, offer))
    (admission,) = transaction.replied(1, moved(5))
    admitted = {"r": {"target_pages": [1], "first_block": 0, "last_block": 1}}
    (transfer,) = transaction.replied(admission.engine, {"admitted": admitted})
    assert transfer.operation == "transfer"
    proof = [{"engine": engine, "tp_size": 2, "tp_rank": engine if right else 0} for engine in (0, 1)]
    calls = transaction.replied(0, {"bytes": 1, "seconds": 0.1, "proof": proof})
    assert [call.operation for call in calls] == (["release"] * 2 if right else ["move"] * 2)


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
