"""One run of a study: trains an arm at a learning rate with a seed, scores it, and stores its update.

Does not choose learning rates or seeds (`runner` does). All runs use one base, loaded once; a run leaves it
bit for bit unchanged.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from brushstroke.adapter import Adapter
from brushstroke.base import Base
from brushstroke.data import Example
from brushstroke.errors import ConfigError, NonFiniteError
from brushstroke.formats import save
from brushstroke.lowrank import LowRank
from brushstroke.packed.pack import Row
from brushstroke.sites.targets import resolve_targets
from brushstroke.sites.walk import find_sites
from brushstroke.studies.arms import Arm, Run
from brushstroke.studies.random_subspace import SubspaceAdamW
from brushstroke.training import TrainConfig, Training
from brushstroke.training.sampler import BatchSampler
from brushstroke.training.schedule import factor

MICRO_TOKENS = 1024  # size of a pass when predictions are compared with the base's
SCORED_AT_ONCE = 64  # number of examples among which shared prefixes are found
TIMED_STEPS, TIMED_SHARE = 4, 8  # for an estimate: number of steps, and one of how many scored examples
WORDS = 128  # number of token positions whose distributions are compared at a time


@dataclass(frozen=True)
class Task:
    """Examples of one task; no example is in two of the splits.

    Args:
        name: the name in reports.
        train: training examples.
        validation: examples for choosing learning rates.
        test: examples whose scores are reported.
        repeated: number of rows that were removed because they are duplicates or also in a held-out split.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    repeated: int = 0


@dataclass(frozen=True)
class Score:
    """Loss and accuracy on examples.

    Args:
        loss: per trained token, in nats.
        accuracy: share of the trained tokens that have the highest probability.
        tokens: number of trained tokens.
        divergence: mean over the tokens of KL(base ‖ model), in nats; None if it was not measured.
    """

    loss: float
    accuracy: float
    tokens: int
    divergence: float | None = None

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Score":
        """The inverse of `dataclasses.asdict`."""
        value = stored.get("divergence")
        divergence = None if value is None else float(value)
        return cls(float(stored["loss"]), float(stored["accuracy"]), int(stored["tokens"]), divergence)


@dataclass(frozen=True)
class Outcome:
    """The result of a run; it has no scores if the loss or a factor became non-finite.

    Args:
        arm, learning_rate, seed: identify the run.
        parameters: number of trained values.
        steps, real_tokens, seconds: the cost of the run.
        train_loss: mean over the last tenth of the steps.
        validation, test: scores on the task's splits.
        general: score on the general text; None if there is no such text.
        start_change: ‖U − U₀‖/‖U₀‖ over all sites; None if there is no U.
        test_rows: summed loss of each row of the test split; empty if it was not stored.
    """

    arm: str
    learning_rate: float
    seed: int
    parameters: int
    steps: int
    real_tokens: int
    seconds: float
    train_loss: float | None = None
    validation: Score | None = None
    test: Score | None = None
    general: Score | None = None
    start_change: float | None = None
    test_rows: tuple[float, ...] = ()

    @property
    def diverged(self) -> bool:
        """Whether the loss or a factor became non-finite; then there are no scores and no update."""
        return self.test is None

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON types, without the losses of single rows, which have a separate file."""
        return {name: value for name, value in asdict(self).items() if name != "test_rows"}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Outcome":
        """The inverse of `as_dict`."""
        scores = {
            name: None if stored[name] is None else Score.from_dict(stored[name])
            for name in ("validation", "test", "general")
        }
        return cls(**{**stored, **scores})


@dataclass
class ArmRunner:
    """Runs arms on a base and its tasks.

    Args:
        base: the frozen model.
        tasks: name → task; arms refer to these names.
        general: general text, for measuring the divergence of a run from the base; may be empty.
        config: the training settings; each run sets its own learning rate and seed.
        folder: where runs store their updates.
    """

    base: Base
    tasks: Mapping[str, Task]
    general: tuple[Example, ...]
    config: TrainConfig
    folder: Path

    def run(self, run: Run) -> Outcome:
        """Train, score, and store the update in the run's folder."""
        task = self.tasks[run.arm.task]
        began = time.perf_counter()
        session = self._open(run)
        try:
            parameters = run.arm.dimension or sum(p.numel() for p in session.parameters)
            outcome = Outcome(
                run.arm.name, run.learning_rate, run.seed, parameters, self.steps(run.arm), 0, 0.0
            )
            start = _inputs(session.adapter()) if run.arm.rank else {}
            try:
                losses, tokens = self._train(session, task, run)
                test, by_row = score_rows(session, task.test)
                scores = {"validation": score(session, task.validation), "test": test}
                if self.general:
                    spread = divergence(session, self.general)
                    scores["general"] = replace(score(session, self.general), divergence=spread)
            except NonFiniteError:
                return replace(outcome, seconds=time.perf_counter() - began)
            adapter = session.adapter()
            if run.arm.dimension is None:
                save(adapter, self.folder / run.key / "adapter", overwrite=True)
            last = losses[-max(1, len(losses) // 10) :]
            return replace(
                outcome,
                real_tokens=tokens,
                train_loss=sum(last) / len(last),
                start_change=_change(start, _inputs(adapter)) if start else None,
                test_rows=by_row,
                seconds=time.perf_counter() - began,
                **scores,
            )
        finally:
            session.close()

    def steps(self, arm: Arm) -> int:
        """Optimiser steps of a run of this arm."""
        order = BatchSampler(self.tasks[arm.task].train, self.config.batch_size, 0)
        whole = order.steps(self.config.epochs, self.config.max_steps)
        return max(1, round(arm.steps_share * whole))

    def numbers(self, arm: Arm) -> int:
        """The number of weights of an arm's sites and its update; the cost of a step grows with it.

        Raises:
            TargetError: a pattern selects nothing, or a named site does not allow the rank.
            ConfigError: the subspace has more dimensions than there are trained parameters.
        """
        sites = {site.path: site for site in find_sites(self.base.model)}
        ranks = resolve_targets(arm.lora, list(sites.values())).ranks
        whole = sum(sites[path].d * sites[path].h for path in ranks)
        factors = sum(rank * (sites[path].d + sites[path].h) for path, rank in ranks.items())
        learnt = whole if arm.rank is None else factors
        if arm.dimension is not None and arm.dimension > learnt:
            raise ConfigError(
                f"a subspace of {arm.dimension:,} dimensions does not fit the {learnt:,} parameters of "
                f"{arm.name!r}; leave it out of --dimensions"
            )
        return whole + (0 if arm.rank is None else factors)

    def untouched(self) -> dict[str, Score]:
        """The scores of the base: on the test split of each task, and on "general"."""
        session = Training(self.base, Arm("none", ("all-linear",), 1).lora)
        try:
            scores = {name: score(session, task.test) for name, task in self.tasks.items()}
            return {**scores, "general": score(session, self.general)} if self.general else scores
        finally:
            session.close()

    def _open(self, run: Run) -> Training:
        config = replace(self.config, learning_rate=run.learning_rate, seed=run.start_seed)
        if run.arm.dimension is not None:  # clipping would use the norm of the full gradient
            config = replace(config, clip=0.0)
        session = Training(self.base, run.arm.request, config)
        if run.arm.dimension is not None:
            subspace = (session.parameters, run.arm.dimension, run.learning_rate, run.start_seed)
            session.optimizer = cast(torch.optim.Optimizer, SubspaceAdamW(*subspace))
        return session

    def _train(self, session: Training, task: Task, run: Run) -> tuple[list[float], int]:
        order = BatchSampler(task.train, self.config.batch_size, run.seed)
        steps = self.steps(run.arm)
        losses, tokens = [], 0
        for step in range(steps):
            result = session.forward_backward(order.batch(step))
            losses.append(result.loss)
            tokens += result.real_tokens
            session.optim_step(
                run.learning_rate * factor(self.config.schedule, step, steps, self.config.warmup)
            )
        return losses, tokens


class Estimator(ArmRunner):
    """Estimates the seconds of runs instead of running them whole; stores nothing."""

    def run(self, run: Run) -> Outcome:
        """An outcome without scores; its seconds come from a few steps and part of the scoring."""
        session = self._open(run)  # warms up: do not measure what is built only once per process
        session.close()
        began = time.perf_counter()
        session = self._open(run)
        try:
            task = self.tasks[run.arm.task]
            order = BatchSampler(task.train, self.config.batch_size, run.seed)

            def step(number: int) -> None:
                session.forward_backward(order.batch(number % order.steps_per_epoch))
                session.optim_step(0.0)

            step(0)  # also makes the optimiser's state
            seconds = time.perf_counter() - began
            began = time.perf_counter()
            for number in range(1, 1 + TIMED_STEPS):
                step(number)
            steps = self.steps(run.arm)
            seconds += (time.perf_counter() - began) * steps / TIMED_STEPS
            for measure, examples in (
                (score, [*task.validation, *task.test, *self.general]),
                (divergence, self.general),
            ):
                sample = examples[::TIMED_SHARE]
                began = time.perf_counter()
                if sample:
                    measure(session, sample)
                    seconds += (time.perf_counter() - began) * len(examples) / len(sample)
        finally:
            session.close()
        return Outcome(run.arm.name, run.learning_rate, run.seed, 0, steps, 0, seconds)


def score(session: Training, examples: Sequence[Example]) -> Score:
    """Loss per trained token and share of tokens that have the highest probability.

    Raises:
        NonFiniteError: a loss is not a finite number.
    """
    return score_rows(session, examples)[0]


@torch.no_grad()
def score_rows(session: Training, examples: Sequence[Example]) -> tuple[Score, tuple[float, ...]]:
    """The score, and the summed loss of each example, in the order of the examples.

    Raises:
        NonFiniteError: a loss is not a finite number.
    """
    forward = session.step.forward
    total, right, tokens = 0.0, 0, 0
    by_row: dict[Row, float] = {}
    with forward.context():
        for start in range(0, len(examples), SCORED_AT_ONCE):
            passes = session.passes(examples[start : start + SCORED_AT_ONCE])
            for part, outputs in forward.run(passes):
                logits, targets = outputs.logits().float(), outputs.targets
                losses = (
                    torch.nn.functional.cross_entropy(logits, targets, reduction="none") * outputs.weights
                )
                total += float(losses.sum())
                of_rows = losses.cpu().double().split([len(row.wanted) for row in part.rows])
                by_row |= {row: float(loss.sum()) for row, loss in zip(part.rows, of_rows, strict=True)}
                right += int((logits.argmax(-1) == targets).sum())
                tokens += len(targets)
    if not math.isfinite(total):
        raise NonFiniteError("the loss after training is not finite; lower the learning rate")
    found = Score(total / max(1, tokens), right / max(1, tokens), tokens)
    return found, tuple(by_row[Row.of(example)] for example in examples)


@torch.no_grad()
def divergence(session: Training, examples: Sequence[Example]) -> float:
    """Mean over the trained tokens of KL(base ‖ model) = Σ p·(ln p − ln q), in nats; p is from the base.

    Raises:
        NonFiniteError: the divergence is not finite.
    """
    forward = session.step.forward
    total, tokens = 0.0, 0
    with forward.context():
        for part in forward.passes([Row.of(example) for example in examples], MICRO_TOKENS, False):
            with session.attachment.disabled():
                before = forward.logits(part)
            for p, q in zip(before.split(WORDS), forward.logits(part).split(WORDS), strict=True):
                ln_p, ln_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
                total += float((ln_p.exp() * (ln_p - ln_q)).sum(dtype=torch.float64))
            tokens += len(before)
    if not math.isfinite(total):
        raise NonFiniteError("the divergence from the base is not finite; lower the learning rate")
    return max(0.0, total / max(1, tokens))


def _inputs(adapter: Adapter) -> dict[str, torch.Tensor]:
    updates = ((site, update) for site, update in adapter.items() if isinstance(update, LowRank))
    return {site: update.U.detach().clone() for site, update in updates}


def _change(start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor]) -> float:
    moved = sum(float((end[site] - U).double().square().sum()) for site, U in start.items())
    size = sum(float(U.double().square().sum()) for U in start.values())
    return (moved / size) ** 0.5
