"""The processes that train one run together (torchrun): who am I, how many are we, sums over all. No training here.

The first process (rank 0) leads: it alone has a folder, a screen and a say, and tells the others what to do next. They
do their share of it. What goes wrong with one of them, or a signal that comes to it, is known to all after the next
sum, so nobody waits for somebody who has left. Without torchrun everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mathverify.errors import Interrupted, RunFailed, UserError

if TYPE_CHECKING:  # a command line that is not a run asks for its place too, and neither numpy nor torch is there yet
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Result = TypeVar("Result")

PATIENCE = timedelta(minutes=30)
"""How much longer than another one a process may take for its share before it is taken for lost."""

BETWEEN_WORDS = timedelta(days=7)
"""How long the others wait for the first one's word: it may be generating text, or waiting for a server."""


@dataclass(frozen=True)
class Place:
    """Where torchrun put this process: its number among all and on its host (which is that of its GPU)."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1


def place() -> Place:
    """As the environment says; the only one of its kind without torchrun. Imports no torch."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    return Place(*map(int, values)) if all(value.isdigit() for value in values) else Place()


@dataclass(frozen=True)
class Begin:
    """A word: begin the run, if these are the fingerprints of your rows and base too."""

    rows: str
    base: str


@dataclass(frozen=True)
class Step:
    """A word: take a step, all trials of the pack, which stand at these steps."""

    at: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """A word: score this split under the trial's adapter, or under the bare base."""

    split: str
    bare: bool


def share_out(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices for each of `size` processes: longest first, each to the one that has the fewest tokens so far."""
    loads = [0] * size
    shares: list[list[int]] = [[] for _ in range(size)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = loads.index(min(loads))
        loads[lightest] += lengths[index]
        shares[lightest].append(index)
    return [sorted(share) for share in shares]


class Abandoned(Exception):
    """On a process that does not lead: the work at hand is given up, and the leader knows why."""


class Ranks:
    """This process and the others; this class is for one that is alone, for whom every sum is its own."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.heed(lambda: False)

    def heed(self, came: Callable[[], bool]) -> None:
        """came: tells whether a signal asked this process to end."""
        self._came = came

    def stop(self) -> bool:
        """Whether a signal came, to this process or, as far as is known, to another one."""
        return self._came()

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Indices of this process's share of some work, equal in tokens as far as that goes; lengths: tokens."""
        return list(range(len(lengths)))

    def sum(self, work: Callable[[], NDArray[np.float64]], count: int) -> NDArray[np.float64]:
        """Do one's own share, which gives `count` numbers, and return their sums over all processes.

        Raises:
            Exception: what `work` raised; on the leader also what it raised elsewhere, as UserError, Interrupted or
                RunFailed. Abandoned: on the others, instead of either.
        """
        return work()

    def together(self, work: Callable[[], Result]) -> Result:
        """Do what every process does for itself. Raises as `sum`."""
        import numpy as np

        results: list[Result] = []

        def one() -> NDArray[np.float64]:
            results.append(work())
            return np.zeros(0)

        self.sum(one, 0)
        return results[0]

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place; bitwise the same on all of them."""

    def tell(self, word: Any) -> None:
        """The leader says what comes next; the others, who `hear` it, say nothing."""

    def spread(self, state: Any, tensors: Mapping[str, Tensor], device: Any) -> tuple[Any, Mapping[str, Tensor]]:
        """What the leader gives, on every process. state: picklable; device: where the tensors are to be."""
        return state, tensors


class Joined(Ranks):
    """This process among others. Words and small sums go by gloo, tensors on a GPU by NCCL."""

    def __init__(self, here: Place) -> None:
        import torch.distributed as dist
        import torch.distributed.nn  # noqa: F401 - imported later, its functions would hold the group as their default

        super().__init__()
        self.rank, self.size = here.rank, here.size
        self._elsewhere = self._broken = False
        if here.local_size == here.size:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may lead nowhere
        with self._explaining():
            dist.init_process_group("gloo", timeout=BETWEEN_WORDS)
            self._sums: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._tensors = self._sums

    def use(self, device: str) -> None:
        """Sum tensors on this device from now on. All processes call this at the same time."""
        import torch
        import torch.distributed as dist

        if device.startswith("cuda"):
            with self._explaining():
                torch.cuda.set_device(device)
                self._tensors = dist.new_group(backend="nccl", timeout=PATIENCE)
                # NCCL takes its memory now, so that the planner of passes sees what is left.
                self.add(torch.zeros(1 << 20, device=device))
                torch.cuda.synchronize()

    def stop(self) -> bool:
        return self._elsewhere or self._came()

    def share(self, lengths: Sequence[int]) -> list[int]:
        return share_out(lengths, self.size)[self.rank]

    def sum(self, work: Callable[[], NDArray[np.float64]], count: int) -> NDArray[np.float64]:
        import numpy as np
        import torch
        import torch.distributed as dist

        values, error = np.zeros(count), None
        try:
            values = work()
        except Exception as raised:
            error = raised
        numbers = torch.from_numpy(np.concatenate([[self._came(), error is not None], values]).astype(np.float64))
        with self._explaining():
            dist.all_reduce(numbers, group=self._sums)
        self._elsewhere = self._elsewhere or bool(numbers[0] > 0)
        if numbers[1] > 0:
            self._give_up(error)
        return numbers[2:].numpy()

    def _give_up(self, error: Exception | None) -> None:
        import torch.distributed as dist

        said: list[tuple[str, str] | None] = [None] * self.size
        with self._explaining():
            own = None if error is None else (type(error).__name__, str(error))
            dist.all_gather_object(said, own, group=self._sums)
        if self.rank > 0:
            raise Abandoned from error
        if error is not None:
            raise error
        rank, kind, text = next((rank, *one) for rank, one in enumerate(said) if one is not None)
        if kind == Interrupted.__name__:
            raise Interrupted
        if kind == UserError.__name__:
            raise UserError(f"process {rank} of 0 to {self.size - 1}: {text}")
        raise RunFailed(f"process {rank} of 0 to {self.size - 1}: {kind}: {text}")

    def add(self, tensor: Tensor) -> None:
        import torch.distributed as dist

        with self._explaining():
            dist.all_reduce(tensor, group=self._tensors)

    def tell(self, word: Any) -> None:
        if self.rank == 0:
            self._word(word)

    def hear(self) -> Any:
        """The leader's next word; None when it is over."""
        return self._word(None)

    def _word(self, word: Any) -> Any:
        import torch.distributed as dist

        words = [word]
        with self._explaining():
            dist.broadcast_object_list(words, src=0)
        return words[0]

    def spread(self, state: Any, tensors: Mapping[str, Tensor], device: Any) -> tuple[Any, Mapping[str, Tensor]]:
        import torch
        import torch.distributed as dist

        state, kinds = self._word((state, {name: (tuple(one.shape), one.dtype) for name, one in tensors.items()}))
        received = {}
        for name, (shape, dtype) in kinds.items():
            one = tensors[name].to(device) if self.rank == 0 else torch.empty(shape, dtype=dtype, device=device)
            with self._explaining():
                dist.broadcast(one.contiguous(), src=0, group=self._tensors)
            received[name] = one
        return state, received

    def leave(self) -> None:
        """It is over: the leader says so, unless one of them is gone; then the others notice when this one ends."""
        import torch.distributed as dist

        if not self._broken:
            self.tell(None)
            # Nobody else may hold a group: its threads end with it, and one that lives when the interpreter ends, with
            # a tensor of the last sum, can end the process with SIGABRT.
            self._sums = self._tensors = None
            dist.destroy_process_group()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """What gloo and NCCL raise when another process is gone, as one line."""
        try:
            yield
        except RuntimeError as error:
            self._broken = True
            first = (str(error).strip().splitlines() or [""])[0][:200]
            raise RunFailed(
                f"another process of this run is gone or silent ({first}): its own lines say why; "
                "the same command continues from the last checkpoint"
            ) from error


@contextmanager
def leading(word: Any, device: str, came: Callable[[], bool]) -> Iterator[Ranks]:
    """This run's processes, of which this one leads; none but this one without torchrun.

    Args:
        word: the first thing that the others hear. device: as the config names it.

    Raises:
        UserError: there are more processes than GPUs, or the device cannot be one of each process's own.
    """
    here = place()
    if here.size == 1:
        alone = Ranks()
        alone.heed(came)
        yield alone
        return
    _refuse_impossible(here, device)
    ranks = Joined(here)
    ranks.heed(came)
    try:
        ranks.tell(word)
        ranks.use(own_device(device, here))
        yield ranks
    except KeyboardInterrupt:
        raise  # at once: the others notice when this process ends
    except BaseException:
        with suppress(RunFailed):  # that another one is gone too is not what this one has to say
            ranks.leave()
        raise
    ranks.leave()


def own_device(device: str, here: Place) -> str:
    """The device of a process: of several on a host with GPUs each has the GPU of its number."""
    import torch

    return f"cuda:{here.local}" if device in ("auto", "cuda") and torch.cuda.is_available() else device


def _refuse_impossible(here: Place, device: str) -> None:
    import torch

    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"device = {device!r}: torchrun gives each process a GPU of its own, use device=auto")
    gpus = torch.cuda.device_count()
    if device != "cpu" and 0 < gpus < here.local_size:
        raise UserError(f"torchrun started {here.local_size} processes, this host has {gpus} GPUs: start one a GPU")
