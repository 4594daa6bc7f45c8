"""Runs the arms of a study: chooses each arm's learning rate on the validation split, then runs its seeds.

Does not execute runs (`arm_run` and `executors` do). If the best learning rate of an arm is at the edge of
its grid, the grid is extended, at most `EXTENSIONS` times; if it is still at the edge, the arm is
inconclusive, because a better rate may lie beyond. A control uses the rate of another arm, so that the two
have the same rate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.checks import check_number, check_rates
from brushstroke.errors import ConfigError, TrainingError
from brushstroke.studies.arm_run import ArmRunner, Outcome
from brushstroke.studies.arms import Arm, Run
from brushstroke.studies.comparisons import RowLosses
from brushstroke.studies.executors import Executor, in_process
from brushstroke.studies.store import Store
from brushstroke.studies.words import listed

RATES, WIDER, SEEDS = "learning rates", "a wider grid", "seeds"  # names of the stages
EXTENSIONS = 5  # maximum number of extensions of an arm's grid, by one rate each


@dataclass(frozen=True)
class Grid:
    """The learning rates and seeds of each arm.

    Args:
        rates: learning rates for arms without their own.
        seeds: the first seed is used for choosing rates.
        extend: whether a grid is extended if its best rate is at the edge.

    Raises:
        ConfigError: there are fewer than two rates or no seed, or a rate is not a finite number above 0.
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    extend: bool = True

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("a study needs at least one seed; give more (--seeds)")
        check_rates(self.rates)
        object.__setattr__(self, "rates", tuple(sorted(set(self.rates))))
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))

    def of(self, arm: Arm) -> tuple[float, ...]:
        """The initial rates of an arm; none if it has one rate, or uses the rate of another arm."""
        if arm.rate_of is not None or arm.rate is not None:
            return ()
        return tuple(sorted(arm.rates)) if arm.rates else self.rates

    def runs(self, arm: Arm, seeds: int) -> int:
        """The number of runs of an arm if its grid is not extended."""
        return seeds + max(0, len(self.of(arm)) - 1)


@dataclass(frozen=True)
class Estimate:
    """The estimated time of a study, and the arms and seeds that a time budget leaves out.

    Args:
        seconds: estimated time of all planned runs on this machine.
        runs: number of planned runs.
        arms: the arms that fit into the budget.
        seeds: the seeds that fit into the budget.
        left_out_arms: the arms that do not fit.
        left_out_seeds: the seeds that do not fit.
        budget_minutes: the time budget for which the plan was made; None if there was none.
        resumed: whether the plan was read from the folder of an interrupted or finished study.
        finished: whether all runs of the study are finished.
    """

    seconds: float
    runs: int
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    left_out_arms: tuple[str, ...] = ()
    left_out_seeds: tuple[int, ...] = ()
    budget_minutes: float | None = None
    resumed: bool = False
    finished: bool = False

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], arms: Sequence[str], seeds: Sequence[int]) -> "Estimate":
        """The inverse of `as_dict`, also after JSON and of older versions.

        Args:
            stored: the plan; what it left out is not read from it.
            arms, seeds: all arms and seeds of the study.

        Raises:
            KeyError, TypeError, ValueError: the data is not an estimate.
        """
        kept, of_plan = tuple(stored["arms"]), tuple(stored["seeds"])
        if not kept or not of_plan or {type(seed) for seed in of_plan} != {int}:
            raise ValueError("a plan needs arms, and seeds that are whole numbers")
        budget = stored.get("budget_minutes")  # older versions did not store it
        return cls(
            float(stored["seconds"]),
            int(stored["runs"]),
            kept,
            of_plan,
            tuple(arm for arm in arms if arm not in kept),
            tuple(seed for seed in seeds if seed not in of_plan),
            None if budget is None else float(budget),
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """The arms and seeds that do not fit, as text: a line each for seeds and arms."""
        both = (("seed", self.left_out_seeds), ("arm", [f'"{name}"' for name in self.left_out_arms]))
        return tuple(listed(one, names) for one, names in both if names)

    def has_less_than(self, budget_minutes: float | None) -> bool:
        """Whether a time budget is larger than that of this plan; None is no limit."""
        return budget_minutes is None or (self.budget_minutes or budget_minutes) < budget_minutes

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON types, without the state of the study."""
        return {key: value for key, value in asdict(self).items() if key not in ("resumed", "finished")}


@dataclass(frozen=True)
class ArmResult:
    """The results of one arm.

    Args:
        arm: the arm.
        tried: learning rate → validation loss of the first seed; None if the run diverged. Empty if the arm
            uses the rate of another arm.
        chosen: the rate with the lowest validation loss; None if all runs diverged.
        edge: "lowest" or "highest" if the chosen rate is at that end of the grid, else None.
        outcomes: seed → outcome at the chosen rate; a run that diverged has no scores.
    """

    arm: Arm
    tried: Mapping[float, float | None]
    chosen: float | None
    edge: str | None
    outcomes: Mapping[int, Outcome]

    @property
    def conclusive(self) -> bool:
        """Whether the chosen rate has a neighbour in the grid on both sides."""
        return self.chosen is not None and self.edge is None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that did not diverge: those with scores and an update."""
        return tuple(seed for seed, outcome in self.outcomes.items() if not outcome.diverged)

    def losses(self) -> dict[int, float]:
        """Seed → loss on the test split, of the runs that did not diverge."""
        return {seed: o.test.loss for seed, o in self.outcomes.items() if o.test is not None}


@dataclass
class Results:
    """The results of all arms of a study, with access to their updates."""

    store: Store
    arms: dict[str, ArmResult]
    untouched: dict[str, Any]
    estimate: Estimate
    planned: tuple[str, ...] = ()  # every requested arm, also those that the budget left out
    test_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # task → tokens of each test row
    margins: Mapping[str, float] = field(default_factory=dict)  # study → margin stored before its runs
    _loaded: dict[tuple[str, int], Adapter] = field(default_factory=dict)

    def adapter(self, arm: str, seed: int) -> Adapter:
        """The update of an arm with a seed, at the chosen learning rate."""
        if (arm, seed) not in self._loaded:
            found = self.arms[arm]
            assert found.chosen is not None
            self._loaded[arm, seed] = self.store.adapter(Run(found.arm, found.chosen, seed))
        return self._loaded[arm, seed]

    def row_losses(self, names: Sequence[str]) -> RowLosses:
        """The losses of single test rows of arms of one task, if they were stored."""
        sums, tokens = {}, ()
        for found in (self.arms[name] for name in names):
            tokens = self.test_tokens.get(found.arm.task, ())
            runs = {seed: Run(found.arm, found.chosen, seed) for seed in found.seeds if found.chosen}
            sums[found.arm.name] = {seed: self.store.test_rows(run) for seed, run in runs.items()}
        return RowLosses(tokens, sums)

    def seeds(self, *names: str) -> tuple[int, ...]:
        """The seeds with which all of these arms have an update."""
        common = [set(self.arms[name].seeds) for name in names]
        return tuple(seed for seed in self.estimate.seeds if all(seed in found for found in common))

    def conclusive(self, names: Sequence[str] | None = None) -> dict[str, ArmResult]:
        """The arms whose learning rate could be chosen."""
        chosen = (
            self.arms if names is None else {name: self.arms[name] for name in names if name in self.arms}
        )
        return {name: found for name, found in chosen.items() if found.conclusive}


@dataclass(frozen=True)
class Progress:
    """The progress of a study, reported after every run.

    Args:
        done, planned: numbers of runs of this stage.
        stage: the name of the stage.
        outcome: of the run that ended.
        seconds_left: estimated time left for the study.
    """

    done: int
    planned: int
    stage: str
    outcome: Outcome
    seconds_left: float


def estimate(
    estimator: ArmRunner,
    arms: Sequence[Arm],
    grid: Grid,
    workers: int = 1,
    budget_minutes: float | None = None,
    execute: Executor = in_process,
    shorten: Sequence[str] = (),
    before: Estimate | None = None,
) -> Estimate:
    """Time a few steps, and plan the runs that fit into the budget; ignores extensions of grids.

    Times the largest low-rank arm and the largest arm that trains W, and uses these times for the other arms.
    All workers time the same arm at once, since a core is slower while the other cores work. To meet the
    budget, drops seeds first, from the last, down to one; then arms, from the last.

    Args:
        estimator: an `Estimator`; its outcomes contain the estimated seconds of a run.
        shorten: what else than more minutes helps if not even one arm fits, for the error.
        before: a plan whose arms and seeds are kept in any case.

    Raises:
        ConfigError: not even one arm fits, or the budget is not a number above 0.
    """
    if budget_minutes is not None:
        check_number("the time budget in minutes (--budget-minutes)", budget_minutes, above=0)
    each: dict[bool, float] = {}
    for arm in sorted(arms, key=estimator.numbers, reverse=True):
        trains_whole = arm.rank is None
        if trains_whole not in each:
            timed = [Run(arm, (arm.rates or grid.rates)[0], number) for number in range(workers)]
            seconds = [outcome.seconds for _, outcome in execute(estimator, timed)]
            each[trains_whole] = sum(seconds) / len(seconds)

    def cost(some: Sequence[Arm], seeds: int) -> tuple[int, float]:
        runs = {arm.name: grid.runs(arm, seeds) for arm in some}
        seconds = sum(runs[arm.name] * arm.steps_share * each[arm.rank is None] for arm in some)
        return sum(runs.values()), seconds / workers

    kept, seeds = list(arms), len(grid.seeds)
    limit = float("inf") if budget_minutes is None else budget_minutes * 60
    least_seeds, least_arms = (len(before.seeds), len(before.arms)) if before else (1, 1)
    while cost(kept, seeds)[1] > limit and seeds > least_seeds:
        seeds -= 1
    while cost(kept, seeds)[1] > limit and len(kept) > least_arms:
        kept.pop()
    runs, seconds = cost(kept, seeds)
    if seconds > limit and before is None:
        advice = " or ".join(("more minutes (--budget-minutes)", *shorten))
        raise ConfigError(
            f"one arm takes about {seconds / 60:.2g} minutes with one seed and the budget is "
            f"{budget_minutes:g}: give {advice}"
        )
    names = tuple(arm.name for arm in arms)
    fit = len(kept)
    return Estimate(
        seconds, runs, names[:fit], grid.seeds[:seeds], names[fit:], grid.seeds[seeds:], budget_minutes
    )


def all_finished(store: Store, arms: Sequence[Arm], grid: Grid, plan: Estimate) -> bool:
    """Whether every run to which a plan leads is finished."""
    stages = _Stages(store, arms, grid, plan)
    return all(store.outcome(run) is not None for _, runs in stages for run in runs)


def run_arms(
    arm_runner: ArmRunner,
    store: Store,
    arms: Sequence[Arm],
    grid: Grid,
    plan: Estimate,
    *,
    execute: Executor = in_process,
    workers: int = 1,
    on_run: Callable[[Progress], None] | None = None,
) -> dict[str, ArmResult]:
    """Execute every run that is not finished; `workers` is the number of parallel runs of `execute`.

    Raises:
        TrainingError: every run of every arm diverged.
    """
    stages = _Stages(store, arms, grid, plan)
    conductor = _Conductor(arm_runner, store, execute, workers, plan.runs, on_run)
    for stage, runs in stages:
        if stage == WIDER:
            conductor.planned += len(runs)
        elif stage == SEEDS:
            conductor.planned = conductor.finished + len(runs)
        conductor.do(stage, runs)
    results = stages.results()
    for found in results.values():
        for rate in found.tried:
            if rate != found.chosen:
                store.forget_adapter(Run(found.arm, rate, plan.seeds[0]))
    if all(found.chosen is None for found in results.values()):
        raise TrainingError(
            "every run diverged, at every learning rate; give smaller ones (--learning-rates)"
        )
    return results


class _Stages:
    """The runs of a plan in their order; which runs a stage has follows from the outcomes of those before."""

    def __init__(self, store: Store, arms: Sequence[Arm], grid: Grid, plan: Estimate) -> None:
        self._store, self._grid, self._seeds = store, grid, plan.seeds
        self._arms = [arm for arm in arms if arm.name in plan.arms]
        self._searched = [arm for arm in self._arms if arm.rate_of is None and arm.rate is None]
        self._rates = {arm.name: list(grid.of(arm)) for arm in self._arms}

    def __iter__(self) -> Iterator[tuple[str, list[Run]]]:
        """Each stage with its runs; the runs of a stage must be finished before the next is asked for."""
        first = self._seeds[0]
        yield RATES, [Run(arm, rate, first) for arm in self._arms for rate in self._rates[arm.name]]
        for _ in range(EXTENSIONS if self._grid.extend else 0):
            if not (further := self._extend()):
                break
            yield WIDER, further
        chosen = self._chosen()
        again = []
        for seed in self._seeds:
            for arm in self._arms:
                rate, edge = chosen[arm.name]
                if rate is not None and edge is None and (seed != first or arm not in self._searched):
                    again.append(Run(arm, rate, seed))
        yield SEEDS, again

    def results(self) -> dict[str, ArmResult]:
        """Name of the arm → its results, after the last stage."""
        results = {}
        for name, (rate, edge) in self._chosen().items():
            arm = next(arm for arm in self._arms if arm.name == name)
            tried = dict(sorted(self._tried(arm).items()))
            found = {seed: self._store.outcome(Run(arm, rate, seed)) for seed in self._seeds} if rate else {}
            outcomes = {seed: outcome for seed, outcome in found.items() if outcome is not None}
            results[name] = ArmResult(arm, tried, rate, edge, outcomes)
        return results

    def _extend(self) -> list[Run]:
        """A run at the next rate for every arm whose best rate is at the edge of its grid."""
        further = []
        for arm in self._searched:
            rates = self._rates[arm.name]
            if beyond := _beyond(rates, self._tried(arm)):
                rates.append(beyond)
                further.append(Run(arm, beyond, self._seeds[0]))
        return further

    def _chosen(self) -> dict[str, tuple[float | None, str | None]]:
        """Name of the arm → its rate, and the edge of the grid that this is at; in the order of the arms."""
        chosen = {arm.name: _choose(self._tried(arm)) for arm in self._searched}
        none = (None, None)
        return {
            arm.name: (arm.rate, None) if arm.rate is not None else chosen.get(arm.rate_of or arm.name, none)
            for arm in self._arms
        }

    def _tried(self, arm: Arm) -> dict[float, float | None]:
        """Learning rate → validation loss with the first seed; None if the run diverged."""
        tried: dict[float, float | None] = {}
        for rate in self._rates[arm.name]:
            outcome = self._store.outcome(Run(arm, rate, self._seeds[0]))
            score = outcome.validation if outcome else None
            tried[rate] = score.loss if score else None
        return tried


@dataclass
class _Conductor:
    arm_runner: ArmRunner
    store: Store
    execute: Executor
    workers: int
    planned: int
    on_run: Callable[[Progress], None] | None
    finished: int = 0  # finished runs of the study
    ran: int = 0  # runs of this session
    seconds: float = 0.0  # sum of the times of this session's runs

    def do(self, stage: str, runs: Sequence[Run]) -> None:
        missing = [run for run in runs if self.store.outcome(run) is None]
        before = len(runs) - len(missing)
        self.finished += before
        for count, (run, outcome) in enumerate(self.execute(self.arm_runner, missing), start=1):
            self.store.finish(run, outcome)
            self.finished += 1
            self.ran += 1
            self.seconds += outcome.seconds
            if self.on_run:
                pace = self.seconds / self.ran / self.workers
                left = max(0, self.planned - self.finished) * pace
                self.on_run(Progress(before + count, len(runs), stage, outcome, left))


def _choose(tried: Mapping[float, float | None]) -> tuple[float | None, str | None]:
    """The best rate, and the edge of the grid that it is at, if any.

    A rate whose neighbour diverged is not at the edge. If several rates have exactly the lowest loss and one
    of them is at an edge, that one is chosen.
    """
    known = {rate: loss for rate, loss in tried.items() if loss is not None}
    if not known:
        return None, None
    least = min(known.values())
    best = sorted(rate for rate, loss in known.items() if loss == least)
    if best[0] == min(tried):
        return best[0], "lowest"
    if best[-1] == max(tried):
        return best[-1], "highest"
    return best[0], None


def _beyond(rates: Sequence[float], tried: Mapping[float, float | None]) -> float | None:
    """The next rate beyond the edge that the best rate is at; None if it is not at an edge."""
    best, edge = _choose(tried)
    ordered = sorted(rates)
    if best is None:
        return ordered[0] / 10
    if edge is None:
        return None
    last = ordered[:2] if edge == "lowest" else ordered[-2:]
    ratio = last[1] / last[0] if len(last) > 1 else 10**0.5
    beyond = ordered[0] / ratio if edge == "lowest" else ordered[-1] * ratio
    rounded = float(f"{beyond:.1e}")
    return rounded if rounded < ordered[0] or rounded > ordered[-1] else beyond
