"""The search for the cheapest plan that keeps a metric of the user's own: few scores, each one once.

A score may take minutes, an error on the selection batches takes a moment. So errors come first: a profile of them over
the budgets, and at every budget they choose among the proposals, as for the other targets. The scores then close in on
the cheapest budget that holds. Between two scored budgets the next one is guessed from the errors: a metric near its
best falls about with the square of the error, so the scored drops say at which error ``max_drop`` is reached, and the
profile at which budget. Where guesses do not halve what is left, the middle is taken. A metric that is noisy makes
the search end early or late, never on a plan that was not scored or did not hold.

The proposals are the planner's allocators. Effects measured again around a plan, shared first factors and the plain
baseline would each take a score of their own and do not compete here. The factors that proposals are compared with are
kept from one to the next (``factor_cache.py``); corrected ones belong to one pick, which is scored once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lowrank_fx.planners.budget import Outcome, within_budget
from lowrank_fx.planners.problem import Allocator, Pick, Problem
from lowrank_fx.targets import Metric

PROFILE = 8
"""Budgets whose error is measured before anything is scored."""

FIRST_ERROR = 0.1
"""The error of the first plan that is scored, where nothing is known of the metric yet."""

RESOLUTION = 256
"""The search ends where the budgets left to try are this part of the whole range."""

MARGIN = 8
"""A guess stays this part of what is left away from either end."""


@dataclass(frozen=True)
class Scored:
    """A plan that was scored.

    Attributes:
        pick: one option per site.
        error: its measured error on the selection batches.
        value: its metric; infinite where it is none.
    """

    pick: Pick
    error: float
    value: float


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        outcome: the cheapest plan that held; dense if none did.
        before: the original's metric.
        after: the metric of the plan.
        scored: every plan that was scored besides the original, in order.
    """

    outcome: Outcome
    before: float
    after: float
    scored: tuple[Scored, ...]

    @property
    def evaluations(self) -> int:
        """How often the metric was asked for."""
        return 1 + len(self.scored)


def within_drop(
    problem: Problem,
    target: Metric,
    allocators: Mapping[str, Allocator],
    evaluate: Callable[[Pick], float],
    score: Callable[[Pick], float],
) -> Searched:
    """The cheapest plan found whose metric drops by at most ``target.max_drop``.

    Args:
        problem: every site's options.
        target: the drop, the quantity to save, and the bound on scores; its function is not called.
        allocators: propose a pick for a budget, by name.
        evaluate: the error of a pick on the selection batches; asked often.
        score: the metric of a pick; asked at most ``target.evaluations`` times, and once for any pick.
    """
    return _Search(problem, target, allocators, evaluate, score).run()


class _Search:
    """Closes in on a budget: nothing is sought at ``low`` or below, and ``high`` is what the best plan so far costs."""

    def __init__(
        self,
        problem: Problem,
        target: Metric,
        allocators: Mapping[str, Allocator],
        evaluate: Callable[[Pick], float],
        score: Callable[[Pick], float],
    ) -> None:
        self.problem, self.target = problem, target
        self.allocators, self.evaluate, self.score = allocators, evaluate, score
        self.smallest, self.high = problem.smallest(target.of), problem.cost(problem.dense, target.of)
        self.low = self.smallest - 1
        self.errors = {self.high: 0.0}
        self.before = score(problem.dense)
        self.scored: dict[Pick, Scored] = {}
        self.best, self.outcome = Scored(problem.dense, 0.0, self.before), Outcome(problem.dense, "dense", 0.0)
        self.failed: Scored | None = None

    def run(self) -> Searched:
        span = self.high - self.smallest
        for part in range(PROFILE if span else 0):
            self.propose(self.smallest + span * part // PROFILE)
        widths: list[int] = []
        while self.width > max(span // RESOLUTION, 1) and 1 + len(self.scored) < self.target.evaluations:
            slow = len(widths) > 1 and 2 * self.width > widths[-2]
            widths.append(self.width)
            budget = self.middle if slow else self.guess()
            outcome = self.propose(budget)
            found = self.scored.get(outcome.pick)
            # A plan whose outputs are not finite could not be returned, so it takes no score.
            if found is None and math.isfinite(outcome.error):
                found = Scored(outcome.pick, outcome.error, self.score(outcome.pick))
                self.scored[outcome.pick] = found
            if found is not None and self.target.holds(self.before, found.value):
                self.high = self.problem.cost(found.pick, self.target.of)
                self.best, self.outcome, self.errors[self.high] = found, outcome, found.error
            else:
                self.low, self.failed = budget, found or self.failed
        return Searched(self.outcome, self.before, self.best.value, tuple(self.scored.values()))

    @property
    def width(self) -> int:
        return self.high - self.low

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2

    def propose(self, budget: int) -> Outcome:
        """The proposal of least error within a budget."""
        outcome = within_budget(self.problem, self.target.of, budget, self.allocators, self.evaluate)
        self.errors[budget] = outcome.error
        return outcome

    def guess(self) -> int:
        """The next budget to score, strictly between ``low`` and ``high``."""
        aim = self.aim()
        if aim is None or not aim > 0:
            return self.middle
        if self.low < self.smallest and aim >= self.errors[self.smallest]:
            return self.smallest
        margin = max(self.width // MARGIN, 1)
        return min(max(self.budget_of(aim), self.low + margin), self.high - margin)

    def aim(self) -> float | None:
        """The error at which the drop is expected to reach what was asked; None where the scores do not tell."""
        asked, best, failed = self.target.max_drop, self.best, self.failed
        if not self.scored:
            return FIRST_ERROR
        drop = self.target.drop(self.before, best.value)
        if failed is None:
            return best.error * math.sqrt(asked / drop) if drop > 0 and asked > 0 else math.inf
        lost = self.target.drop(self.before, failed.value)
        if asked == 0 or not best.error < failed.error or not math.isfinite(lost):  # how far off it was is not known
            return None
        if drop <= 0 or best.error == 0:
            return failed.error * math.sqrt(asked / lost)
        way = math.log(lost) - math.log(drop)  # between two scored drops the power law is theirs, not the square
        share = (math.log(asked) - math.log(drop)) / way if way > 0 else 0.5
        return math.exp((1 - share) * math.log(best.error) + share * math.log(failed.error))

    def budget_of(self, error: float) -> int:
        """The cheapest budget with at most this error, by the errors measured; between two of them log-linear."""
        above = self.high
        for budget in sorted((each for each in self.errors if each < self.high), reverse=True):
            here = self.errors[budget]
            if not here <= error:
                floor = max(self.errors[above], error / MARGIN)  # dense has no error and so no logarithm
                if not math.isfinite(here) or floor >= here:
                    return above
                return budget + int((above - budget) * math.log(here / error) / math.log(here / floor))
            above = budget
        return self.smallest
