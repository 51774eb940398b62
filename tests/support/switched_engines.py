"""Pages, layouts and requests of engines in a switch, without any vLLM: what `core.transaction` deals with.

Pure. Everything that must hold afterwards is in `check_pages`.
"""

from __future__ import annotations

from typing import Any

from vllm_flying.core.journey import Call
from vllm_flying.core.leases import PageLeases
from vllm_flying.core.topology import Group, Layout, aligned_group
from vllm_flying.core.transaction import SwitchTransaction

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
        self.last_lent: list[int] = []
        """Virtual pages that it backed when it joined its group."""
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

    def dissolve(self, undoing: bool) -> None:
        """What the group had before it was joined stays with it when that is undone: not all members may have joined."""
        free = self.free[len(self.group)]
        pages = sorted(free.intersection(self.last_lent) if undoing else free)
        free.difference_update(pages)
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
        self, epoch: int, group: list[int], lease: int, offering: bool, proving: bool, carrying: bool, undoing: bool
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
                leader.dissolve(undoing)
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
        return {"bytes": 0, "seconds": 0.0, "proof": self.prove() if self.leads else []}

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
        capacity: dict[int, int], urgent_follows: bool,
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
