"""No page is lost or owned twice, under any sequence of leases."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_flying.core.leases import LeaseError, PageLeases

NUM_PAGES = 12
WIDTHS = st.sampled_from([2, 4])


class LeaseMachine(RuleBasedStateMachine):
    """Two members of the same groups, with different free pages; the engine's own pool beside the leases."""

    def __init__(self) -> None:
        super().__init__()
        self.members = [PageLeases(NUM_PAGES), PageLeases(NUM_PAGES)]
        self.free = [set(range(1, NUM_PAGES)), set(range(1, NUM_PAGES))]
        self.used: list[set[int]] = [set(), set()]
        self.behind: dict[tuple[int, int], dict[int, int]] = {(id(m), w): {} for m in self.members for w in (2, 4)}

    @rule(member=st.integers(0, 1), data=st.data())
    def a_request_takes_a_page(self, member: int, data: st.DataObject) -> None:
        if self.free[member]:
            page = data.draw(st.sampled_from(sorted(self.free[member])))
            self.free[member].remove(page)
            self.used[member].add(page)

    @rule(member=st.integers(0, 1))
    def a_request_ends(self, member: int) -> None:
        if self.used[member]:
            self.free[member].add(self.used[member].pop())

    @rule(width=WIDTHS, data=st.data())
    def merge(self, width: int, data: st.DataObject) -> None:
        most = min(len(free) for free in self.free)
        room = NUM_PAGES - 1 - len(self.members[0].virtual_pages(width))
        count = data.draw(st.integers(0, min(most, room)))
        agreed = [leases.next_virtual_pages(width, count) for leases in self.members]
        assert list(agreed[0]) == list(agreed[1])
        for leases, free, virtual in zip(self.members, self.free, agreed, strict=True):
            physical = data.draw(st.permutations(sorted(free)))[:count]
            leases.lend(width, virtual, physical)
            self.behind[id(leases), width].update(zip(virtual.tolist(), physical, strict=True))
            free.difference_update(physical)

    @rule(width=WIDTHS, data=st.data())
    def split(self, width: int, data: st.DataObject) -> None:
        backed = sorted(self.members[0].virtual_pages(width))
        returned = [page for page in backed if data.draw(st.booleans())]
        for leases, free in zip(self.members, self.free, strict=True):
            physical = leases.take_back(width, returned).tolist()
            behind = self.behind[id(leases), width]
            assert physical == [behind.pop(page) for page in returned]
            assert free.isdisjoint(physical)
            free.update(physical)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        for leases, free, used in zip(self.members, self.free, self.used, strict=True):
            lent = leases.lent_pages()
            assert len(lent) == sum(len(leases.virtual_pages(width)) for width in (2, 4))
            assert lent.isdisjoint(free) and lent.isdisjoint(used) and free.isdisjoint(used)
            assert lent | free | used == set(range(1, NUM_PAGES))

    @invariant()
    def members_back_the_same_virtual_pages(self) -> None:
        for width in (2, 4):
            assert self.members[0].virtual_pages(width) == self.members[1].virtual_pages(width)


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=30)


def test_broken_leases_are_refused_by_name() -> None:
    leases = PageLeases(8)
    leases.lend(2, [1, 2], [5, 6])
    for virtual, physical, text in (
        ([3], [5], "lent already"),
        ([1], [7], "backed already"),
        ([3], [0], "outside"),
        ([3, 4], [7], "can't be backed"),
        ([3, 4], [7, 7], "twice"),
    ):
        with pytest.raises(LeaseError, match=text):
            leases.lend(2, virtual, physical)
    with pytest.raises(LeaseError, match="not backed"):
        leases.take_back(2, [3])
    with pytest.raises(LeaseError, match="5 numbers are left"):
        leases.next_virtual_pages(2, 6)
