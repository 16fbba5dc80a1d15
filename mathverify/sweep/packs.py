"""Tickets -> packs: which train together, who takes a free place, what happens when a pack breaks up.

Knows runs and tickets; where tickets come from (a grid or a study) is pack_launcher.py's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mathverify.base import resolve_device
from mathverify.entry import one_line
from mathverify.errors import CannotWrite, Interrupted, RunFailed, without_frames
from mathverify.pack_screen import PackScreen
from mathverify.prepare import Workbench, prepare
from mathverify.progress import shown
from mathverify.records import RunRecord, Status, read_record
from mathverify.run import PackRunner, Run, interruptible, open_run
from mathverify.sweep.grouping import difference
from mathverify.sweep.ticket import Ticket

MOST_ON_CPU, MOST_ON_GPU = 8, 32
"""Runs at once unless told; on a GPU memory may allow fewer (prepare.Workbench.at_once)."""


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
        self.aboard: dict[Run, Ticket] = {}
        self._broken: list[Ticket] = []
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
        self.first = self.held[0]
        crew = [ticket for ticket in self.held if ticket.base == self.first.base][: self._most_beside(self.first)]
        self.held = [ticket for ticket in self.held if ticket not in crew]
        crew = [ticket for ticket in crew if self._begin(ticket)]
        runs = self._opened(crew) if crew else []
        if not runs:
            return
        runner = PackRunner(self.bench, self.screen, self.stop, self._follow, self._closed)
        try:
            runner.run(runs)
        except Interrupted:
            raise
        except Exception as error:
            self._broke_up(error)
        finally:
            del self.bench  # on a GPU its base may have to make room for the next one

    def _begin(self, ticket: Ticket) -> bool:
        """Whether the ticket's job is under way."""
        try:
            return ticket.has_begun or ticket.begin()
        except CannotWrite as error:  # those aboard finish first
            self._trouble = self._trouble or error
            return False

    def _opened(self, crew: list[Ticket]) -> list[Run]:
        """The runs of these tickets on a bench of their own; what has no room there is put back."""
        start = time.perf_counter()
        try:
            if (threads := self.first.config.train.threads) is not None:
                torch.set_num_threads(threads)
            with shown() as progress:
                configs = [ticket.config for ticket in crew]
                self.bench: Workbench = prepare(configs[0], interruptible(progress, self.stop), configs[1:])
        except Interrupted:
            self.held = crew + self.held
            raise
        except Exception as error:  # what is wrong with the base or the data is wrong for all of them
            for ticket in crew:
                self._end(ticket, error=error)
            return []
        crew, left = crew[: self.bench.at_once], crew[self.bench.at_once :]
        self.held = left + self.held
        self.places = len(crew) if left else self._most_beside(self.first)
        self.screen.prepared(self.bench, crew[0].config, [ticket.number for ticket in crew])
        each = (time.perf_counter() - start) / len(crew)
        return [run for ticket in crew if (run := self._open(ticket, each)) is not None]

    def _open(self, ticket: Ticket, seconds: float = 0.0) -> Run | None:
        """A ticket's run; None when its job has ended already: refused, or finished before.

        Args:
            seconds: its share of what was prepared for it and others.
        """
        start = time.perf_counter()
        try:
            run = open_run(ticket.config, ticket.folder, self.bench, ticket.judge)
            if run is None:
                record = read_record(ticket.folder)
                self.screen.finished_before(ticket.number, record)
                self._end(ticket, value=_value(record))
                return None
        except Exception as error:
            self._end(ticket, error=error)
            return None
        run.spend("prepare", seconds + time.perf_counter() - start)
        self.screen.opened(run, ticket.number)
        self.aboard[run] = ticket
        return run

    # The runner's questions

    def _follow(self) -> Run | None:
        """A run for a free place, if there is a place and a ticket on this base."""
        while len(self.aboard) < self.places and self._trouble is None and not self.stop():
            ticket = self._next()
            if ticket is None:
                return None
            if self._begin(ticket) and (run := self._open(ticket)) is not None:
                return run
        return None

    def _next(self) -> Ticket | None:
        for ticket in self.held:
            if ticket.base == self.first.base:
                self.held.remove(ticket)
                return ticket
        while len(self.aboard) + len(self.held) < self._most_beside(self.first):
            try:
                ticket_or_none = self.take()
            except Exception as error:  # the study's trouble; those aboard finish first
                self._trouble = error
                return None
            if ticket_or_none is None or ticket_or_none.base == self.first.base:
                return ticket_or_none
            self.screen.waits(ticket_or_none.number, difference(ticket_or_none.config, self.first.config))
            self.held.append(ticket_or_none)
        return None

    def _closed(self, run: Run) -> None:
        ticket = self.aboard.pop(run)
        match run.record.status:
            case _ if run.error is not None:
                self._end(ticket, error=run.error, is_told=True)
            case Status.interrupted if self.stop():
                ticket.release()
            case Status.interrupted:
                self._broken.append(ticket)
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

    def _broke_up(self, error: Exception) -> None:
        """Several runs went under together: they go on from their checkpoints, half as many at once, down to one, which
        then fails alone if it is the one to blame; after it, as many train at once as before."""
        without_frames(error)  # a run that failed alone has it as its end
        if self._broken:
            fewer = self._fewer[self.first.base] = max(1, len(self._broken) // 2)
            self.screen.say(f"the pack broke up ({one_line(error)}): its runs go on, {fewer} at once")
        elif self._fewer.pop(self.first.base, None) is not None:
            self.screen.say(f"the run that broke failed alone: the others go on, up to {self.most} at once")
        self.held = self._broken + self.held
        self._broken = []


def _value(record: RunRecord) -> float | None:
    """What mathverify.train's task returns: accuracy on validation."""
    validation = record.metrics.validation
    return None if validation is None else validation.accuracy.value
