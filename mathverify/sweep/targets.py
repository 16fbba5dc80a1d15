"""Which classes a study's config may name: `_target_` makes an object, so it is limited to Optuna's kinds of parts.

A config file may come from someone else. Samplers, pruners and storages (and what these take as arguments) may be
classes of the user's own, as long as they are of those kinds; no other key of ours is ever instantiated or evaluated,
but for custom_search_space, which names a function by definition. Hydra's own parts (launcher, callbacks, logging) are
Hydra's, which takes launchers from its plugins only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hydra.utils import get_class
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.samplers.nsgaii import BaseCrossover
from optuna.storages import BaseStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileOpenLock, JournalFileSymlinkLock

from mathverify.errors import UserError

LOCKS = (JournalFileOpenLock, JournalFileSymlinkLock)
KINDS = (BaseSampler, BaseCrossover, BasePruner, BaseStorage, BaseJournalBackend, *LOCKS)


def check_targets(tree: Any, where: str) -> None:
    """Look at every `_target_` of a config tree, before any of it is made.

    Raises:
        UserError: one is no class, or of none of the KINDS.
    """
    for target in _targets(tree):
        try:
            found = get_class(target)
        except Exception as error:
            raise UserError(f"{where}._target_ = {target}: no such class ({error})") from None
        if not issubclass(found, KINDS):
            raise UserError(
                f"{where}._target_ = {target}: is no sampler, pruner or storage of Optuna's kind, and nothing else is "
                "made from a config: name a class of optuna.samplers, optuna.pruners or optuna.storages"
            )


def _targets(tree: Any) -> Iterator[str]:
    match tree:
        case dict():
            if tree.get("_target_"):
                yield str(tree["_target_"])
            for value in tree.values():
                yield from _targets(value)
        case list() | tuple():
            for value in tree:
                yield from _targets(value)
