"""An engine's part in a switch with the method `soft`, before the switch proper: its begun requests finish.

May import vllm's types. New and fresh requests are kept aside meanwhile, so that the engine is done with the old ones as
soon as it can; then they begin, until the engine is told to come to rest. An engine that has no begun request goes on as
if there were no switch. Whatever becomes of the API server that asked, a drain ends by itself.
"""

from __future__ import annotations

from concurrent.futures import Future

from vllm_flying.scheduler.facade import FlyingScheduler

Finished = dict[str, int]
"""The reply: how many requests were waited for."""


class Drain:
    """Of one engine in one switch."""

    def __init__(self, facade: FlyingScheduler, epoch: int) -> None:
        self._epoch = epoch
        self._facade = facade
        self._finishing = 0
        self._done: Future[Finished] | None = None

    @property
    def under_way(self) -> int | None:
        """The switch's epoch, while begun requests are waited for."""
        return None if self._done is None else self._epoch

    def begin(self) -> Finished | Future[Finished]:
        """Keep aside what hasn't begun, unless nothing else is here."""
        facade = self._facade
        if facade.parked:
            return {"finished": 0}
        facade.holding = True
        facade.deferral.put_back(facade.active)
        facade.set_aside_fresh()
        if not self._begun_are_left():
            self._serve()
            return {"finished": 0}
        self._finishing = sum(facade.active.get_request_counts()) + len(facade.deferral)
        self._done = Future()
        return self._done

    def after_step(self) -> None:
        """Say so, and serve again, once the last one is done."""
        if self._done is not None and not self._begun_are_left():
            self._end({"finished": self._finishing})

    def cancel(self, epoch: int) -> None:
        """The switch is off: serve as before, whatever has finished until now."""
        if self.under_way == epoch:
            self._end({"finished": 0})  # nobody waits for it any more

    def _begun_are_left(self) -> bool:
        return bool(self._facade.active.has_unfinished_requests() or len(self._facade.deferral))

    def _end(self, reply: Finished) -> None:
        done, self._done = self._done, None
        self._serve()
        if done is not None:
            done.set_result(reply)

    def _serve(self) -> None:
        self._facade.holding = False
        self._facade.release_held()
