"""A verdict in sentences. Decides nothing: what is said here was found in verdict.py."""

from __future__ import annotations

from collections.abc import Sequence

from mathverify.compare.power import Needs
from mathverify.compare.seeds import Configuration
from mathverify.compare.verdict import By, Outcome, Selection, Verdict, Versus

LISTED = 3
"""Runs that a sentence names before it says how many more."""


def sentences(verdict: Verdict) -> list[str]:
    """The verdict, what would settle it, how it was chosen, and what to mind; one line each."""
    said = [_baseline(verdict) if verdict.is_baseline else _contender(verdict)]
    said += _untested(verdict)
    if settling := _settling(verdict):
        said.append(settling)
    chosen = verdict.selection
    if chosen is not None and chosen.candidates > 1 and verdict.chosen_on == "validation":
        said.append(
            f"selection: the best of {chosen.candidates} on validation, {chosen.validation:.1%} there and "
            f"{chosen.test:.1%} on test: optimism {points(chosen.optimism)}{_interval(chosen)}"
        )
    if len(verdict.entries) > 1 and verdict.by is By.run and verdict.versus:
        said.append(
            "these are single runs: this says which adapter is better, not which settings; "
            "more seeds of each would (seed=1,2,3,...)"
        )
    return [*said, *(f"note: {note}" for note in verdict.notes)]


def all_sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """Those of every test set; where there are several, each after its number."""
    if len(verdicts) == 1:
        return sentences(verdicts[0])
    return [f"test set {number}: {said}" for number, v in enumerate(verdicts, 1) for said in sentences(v)]


def _contender(verdict: Verdict) -> str:
    reference = verdict.reference
    if reference is None:
        return "no verdict: no runs that can be compared"
    name = f"{verdict.name(reference)} ({_accuracy(reference)})"
    if not verdict.versus:
        if len(verdict.entries) > 1:
            return f"no verdict: {name} has nothing it could be tested against"
        return f"{name}: nothing to compare it with"
    better = [versus for versus in verdict.versus if versus.outcome is Outcome.better]
    if better:
        return (
            f"no winner: {name} is the best on {verdict.chosen_on}, but on test {_named(better, verdict)} "
            f"{'is' if len(better) == 1 else 'are'} better: {_one(better[0], verdict)}"
        )
    if verdict.ties:
        others = "the other" if len(verdict.versus) == 1 else f"{len(verdict.ties)} of {len(verdict.versus)} others"
        ties = _listed(verdict.ties, verdict)
        return f"no winner: {name} is the best on {verdict.chosen_on}, but a tie with {others}: {ties}"
    closest = max(verdict.versus, key=lambda versus: versus.difference)
    count = len(verdict.versus)
    others = f"each of the {count} others, closest" if count > 1 else "the other,"
    if verdict.winner is None:
        return f"no winner: {name} is better than {others} {_one(closest, verdict)}, but not all could be tested"
    return f"winner: {name} is better than {others} {_one(closest, verdict)}"


def _baseline(verdict: Verdict) -> str:
    assert verdict.reference is not None
    parts = []
    for outcome, words in ((Outcome.better, "better"), (Outcome.tie, "tied"), (Outcome.worse, "worse")):
        found = [versus for versus in verdict.versus if versus.outcome is outcome]
        if found:
            parts.append(f"{words}: {_listed(found, verdict)}")
    start = f"against the baseline {verdict.name(verdict.reference)} ({_accuracy(verdict.reference)})"
    return f"{start}: {'; '.join(parts) or 'nothing could be tested'}"


def _untested(verdict: Verdict) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for entry, why in verdict.untested.items():
        reasons.setdefault(why, []).append(verdict.name(entry))
    return [f"not tested ({why}): {_some(labels)}" for why, labels in reasons.items()]


def _settling(verdict: Verdict) -> str:
    """What it would take to settle the closest tie that has any difference."""
    open_ties = [versus for versus in verdict.ties if versus.needs is not None]
    if not open_ties:
        return ""
    seen = [versus for versus in open_ties if versus.difference != 0]
    if not seen:
        return "to settle: no difference was seen, so no number of rows or seeds can be named"
    hardest = min(seen, key=lambda versus: abs(versus.difference))
    start = f"to settle a difference of {points(abs(hardest.difference), sign=False)} ({verdict.name(hardest.other)})"
    return f"{start}: {needs_text(hardest.needs, verdict)}"


def needs_text(needs: Needs | None, verdict: Verdict) -> str:
    """'about 5,600 test rows (now 2,000) or 21 seeds each (now 8), for 80% power'."""
    if needs is None:
        return ""
    ways = []
    if needs.rows is not None:
        ways.append(f"about {rounded(needs.rows)} test rows (now {verdict.rows:,})")
    if needs.seeds is not None:
        now = min(len(entry.runs) for entry in verdict.entries if entry not in verdict.untested)
        ways.append(f"about {rounded(needs.seeds)} seeds each (now {now:,})")
    if needs.both is not None:
        rows, seeds = needs.both
        ways.append(f"about {rounded(rows)} test rows and {rounded(seeds)} seeds each together; neither alone does it")
    if not ways:
        return "out of reach"
    alone = ""
    if verdict.by is By.configuration and needs.both is None:
        alone = "; more rows alone do not do it" if needs.rows is None else alone
        alone = "; more seeds alone do not do it" if needs.seeds is None else alone
    return f"{' or '.join(ways)}, for {needs.power:.0%} power{alone}"


def rounded(number: int) -> str:
    """To two digits, upwards: these are plans, not measurements."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return f"{-(-number // unit) * unit:,}"


def points(difference: float, sign: bool = True) -> str:
    """A difference of shares in percentage points."""
    return f"{signed(difference)} points" if sign else f"{100 * difference:.2g} points"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def signed(difference: float) -> str:
    """A difference of shares, in percent, with its sign."""
    return f"{100 * difference + 0.0:+.1f}"


def _accuracy(entry: Configuration) -> str:
    over = f" over {len(entry.runs)} seeds" if len(entry.runs) > 1 else ""
    return f"{entry.mean:.1%} on test{over}"


def _one(versus: Versus, verdict: Verdict) -> str:
    return f"{verdict.name(versus.other)} ({points(versus.difference)}{_interval(versus)}, {p_text(versus.corrected)})"


def _interval(found: Versus | Selection) -> str:
    return "" if found.low is None or found.high is None else f" [{signed(found.low)}, {signed(found.high)}]"


def _listed(found: Sequence[Versus], verdict: Verdict) -> str:
    ordered = sorted(found, key=lambda versus: -versus.difference)
    more = f", and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(_one(versus, verdict) for versus in ordered[:LISTED]) + more


def _named(found: Sequence[Versus], verdict: Verdict) -> str:
    return _some([verdict.name(versus.other) for versus in sorted(found, key=lambda versus: -versus.difference)])


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:LISTED]) + (f", and {len(labels) - LISTED} more" if len(labels) > LISTED else "")
