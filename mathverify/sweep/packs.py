"""Tickets -> packs: which train together, who takes a free place, what happens when a pack breaks up.

Knows runs and tickets; where tickets come from (a grid or a study) is pack_launcher.py's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from mathverify.base import resolve_device
from mathverify.entry import one_line
from mathverify.errors import CannotWrite, Interrupted, NoRoom, RunFailed, without_frames
from mathverify.pack_screen import PackScreen
from mathverify.prepare import Workbench, plan_again, prepare
from mathverify.progress import shown
from mathverify.records import RunRecord, Status, read_record
from mathverify.run import PackRunner, Run, interruptible, open_run
from mathverify.sweep.grouping import difference
from mathverify.sweep.ticket import Ticket

MOST_ON_CPU, MOST_ON_GPU = 8, 32
"""Runs at once unless told; on a GPU memory may allow fewer (prepare.Workbench.at_once)."""


@dataclass
class _Pack:
    """Those that train together. crew: tickets of its first runs, and `each` one's share of the seconds that the bench
    took. places: runs at once. aboard: runs that are open. broken: tickets of runs that were cut short as it broke up.
    """

    bench: Workbench
    crew: list[Ticket]
    each: float
    places: int
    aboard: dict[Run, Ticket] = field(default_factory=dict)
    broken: list[Ticket] = field(default_factory=list)

    @property
    def first(self) -> Ticket:
        """Whose base is that of all."""
        return self.crew[0]


class Packs:
    """Works off tickets, pack after pack, until none is left.

    take: the next ticket, None when there is none now. most: runs at once, None for as many as make sense. stop:
    whether a signal has come.
    """

    def __init__(
        self, take: Callable[[], Ticket | None], most: int | None, screen: PackScreen, stop: Callable[[], bool]
    ) -> None:
        self.take, self.most, self.screen, self.stop = take, most, screen, stop
        self.held: list[Ticket] = []
        self._fewer: dict[str, int] = {}
        self._trouble: Exception | None = None

    def run(self) -> None:
        """Do all there is to do.

        Raises:
            Interrupted: a signal came; begun tickets are released, their runs saved.
            Exception: what `take` or a ticket's end raised (a study's storage), once the runs under way are done.
        """
        try:
            while self._fill():
                self._one_pack()
                if self._trouble is not None:
                    raise self._trouble
            if self.stop():
                raise Interrupted
        finally:
            for ticket in self.held:
                ticket.release()

    def _fill(self) -> bool:
        """Take tickets until there are as many as may be in hand; whether there is something to do."""
        while not self.stop() and (not self.held or len(self.held) < self._most_beside(self.held[0])):
            ticket = self.take()
            if ticket is None:
                break
            if self.most is None:
                self.most = MOST_ON_CPU if resolve_device(ticket.config.device) == "cpu" else MOST_ON_GPU
            self.held.append(ticket)
        return bool(self.held) and not self.stop()

    def _most_beside(self, ticket: Ticket) -> int:
        """Runs at once on this ticket's base: fewer where packs broke up, until the one to blame is found."""
        return self._fewer.get(ticket.base, self.most or 1)

    # One pack

    def _one_pack(self) -> None:
        """The first ticket in hand and those that share its base, as many as may, and those that follow them."""
        first = self.held[0]
        crew = [ticket for ticket in self.held if ticket.base == first.base][: self._most_beside(first)]
        self.held = [ticket for ticket in self.held if ticket not in crew]
        crew = [ticket for ticket in crew if self._begin(ticket)]
        pack = self._prepared(crew) if crew else None
        if pack is None:
            return
        follow, closed = partial(self._follow, pack), partial(self._closed, pack)
        runner = PackRunner(pack.bench, self.screen, self.stop, follow, closed)
        try:
            runner.run(self._opened(pack))
        except Interrupted:
            raise
        except Exception as error:
            self._broke_up(pack, error)

    def _begin(self, ticket: Ticket) -> bool:
        """Whether the ticket's job is under way."""
        try:
            return ticket.has_begun or ticket.begin()
        except CannotWrite as error:  # those aboard finish first
            self._trouble = self._trouble or error
            return False

    def _prepared(self, crew: list[Ticket]) -> _Pack | None:
        """A pack of these tickets, as far as there is room; None when there can be none, and their jobs have ended."""
        start = time.perf_counter()
        try:
            if (threads := crew[0].config.train.threads) is not None:
                torch.set_num_threads(threads)
            with shown() as progress:
                configs = [ticket.config for ticket in crew]
                bench = prepare(configs[0], interruptible(progress, self.stop), configs[1:])
        except Interrupted:
            self.held = crew + self.held
            raise
        except Exception as error:  # what is wrong with the base or the data is wrong for all of them
            for ticket in crew:
                self._end(ticket, error=error)
            return None
        crew, left = crew[: bench.at_once], crew[bench.at_once :]
        self.held = left + self.held
        self.screen.prepared(bench, crew[0].config, [ticket.number for ticket in crew])
        each = (time.perf_counter() - start) / len(crew)
        return _Pack(bench, crew, each, places=len(crew) if left else self._most_beside(crew[0]))

    def _opened(self, pack: _Pack) -> list[Run]:
        return [run for ticket in pack.crew if (run := self._open(pack, ticket, pack.each)) is not None]

    def _open(self, pack: _Pack, ticket: Ticket, seconds: float = 0.0) -> Run | None:
        """A ticket's run; None when its job has ended already: refused, or finished before; or waits for room.

        Args:
            seconds: its share of what was prepared for it and others.
        """
        start = time.perf_counter()
        try:
            if pack.places == 1:
                self._plan_again(pack.bench, ticket)
            run = open_run(ticket.config, ticket.folder, pack.bench, ticket.judge)
            if run is None:
                record = read_record(ticket.folder)
                self.screen.finished_before(ticket.number, record)
                self._end(ticket, value=_value(record))
                return None
        except Exception as error:
            if isinstance(error, NoRoom) and pack.aboard:
                pack.places = len(pack.aboard)
                self.held.insert(0, ticket)
                self.screen.say(f"run {ticket.number} waits until there is room in memory for its adapter")
            else:
                self._end(ticket, error=error)
            return None
        run.spend("prepare", seconds + time.perf_counter() - start)
        self.screen.opened(run, ticket.number)
        pack.aboard[run] = ticket
        return run

    def _plan_again(self, bench: Workbench, ticket: Ticket) -> None:
        """A run that trains alone has a plan of its own."""
        before = bench.budget.text
        plan_again(bench, ticket.config)
        if bench.budget.text != before:
            self.screen.say(f"run {ticket.number} {bench.budget.text}")

    # The runner's questions

    def _follow(self, pack: _Pack) -> Run | None:
        """A run for a free place, if there is a place and a ticket on this base."""
        while len(pack.aboard) < pack.places and self._trouble is None and not self.stop():
            ticket = self._next(pack)
            if ticket is None:
                return None
            if self._begin(ticket) and (run := self._open(pack, ticket)) is not None:
                return run
        return None

    def _next(self, pack: _Pack) -> Ticket | None:
        for ticket in self.held:
            if ticket.base == pack.first.base:
                self.held.remove(ticket)
                return ticket
        while len(pack.aboard) + len(self.held) < self._most_beside(pack.first):
            try:
                ticket_or_none = self.take()
            except Exception as error:  # the study's trouble; those aboard finish first
                self._trouble = error
                return None
            if ticket_or_none is None or ticket_or_none.base == pack.first.base:
                return ticket_or_none
            self.screen.waits(ticket_or_none.number, difference(ticket_or_none.config, pack.first.config))
            self.held.append(ticket_or_none)
        return None

    def _closed(self, pack: _Pack, run: Run) -> None:
        ticket = pack.aboard.pop(run)
        match run.record.status:
            case _ if run.error is not None:
                self._end(ticket, error=run.error, is_told=True)
            case Status.interrupted if self.stop():
                ticket.release()
            case Status.interrupted:
                pack.broken.append(ticket)
            case Status.failed:
                self._end(ticket, error=RunFailed(run.record.reason), is_told=True)
            case _:
                self._end(ticket, value=_value(run.record))

    def _end(
        self, ticket: Ticket, value: float | None = None, error: Exception | None = None, is_told: bool = False
    ) -> None:
        """Its job is over. What the disk or the study's storage has against that ends the work, after those aboard."""
        try:
            ticket.end(value, error, is_told)
        except Exception as trouble:
            self._trouble = self._trouble or trouble

    def _broke_up(self, pack: _Pack, error: Exception) -> None:
        """Several runs went under together: they go on from their checkpoints, half as many at once, down to one, which
        then fails alone if it is the one to blame; after it, as many train at once as before."""
        without_frames(error)  # a run that failed alone has it as its end
        if pack.broken:
            fewer = self._fewer[pack.first.base] = max(1, len(pack.broken) // 2)
            self.screen.say(f"the pack broke up ({one_line(error)}): its runs go on, {fewer} at once")
        elif self._fewer.pop(pack.first.base, None) is not None:
            self.screen.say(f"the run that broke failed alone: the others go on, up to {self.most} at once")
        self.held = pack.broken + self.held


def _value(record: RunRecord) -> float | None:
    """What mathverify.train's task returns: accuracy on validation."""
    validation = record.metrics.validation
    return None if validation is None else validation.accuracy.value
