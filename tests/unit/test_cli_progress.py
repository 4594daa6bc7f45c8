"""The estimate of the time left, and progress without a terminal."""

import random

import pytest

from brushstroke.cli import progress
from brushstroke.cli.progress import TimeLeft, TrainProgress, clock
from brushstroke.cli.study import StudyRunOptions, _Progress
from brushstroke.studies import Estimate
from brushstroke.training.events import StepEvent

CLOSE = 0.1  # of the time that was really left, after a minute


def events(steps, seed=0, seconds_per_token=0.004):
    """(seconds, computed tokens) of steps: the seconds follow the tokens, with noise."""
    rng = random.Random(seed)
    for _ in range(steps):
        tokens = rng.randrange(300, 900)
        yield tokens * seconds_per_token * rng.uniform(0.85, 1.15), tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("evaluations", [0, 5])
def test_the_time_left_is_close_after_a_minute(seed, evaluations):
    steps = 300
    run = list(events(steps, seed))
    per_step = sum(tokens for _, tokens in run) / steps
    left = TimeLeft(steps, per_step, evaluations)
    each = steps // evaluations if evaluations else steps + 1
    clock_now, checked = 0.0, 0
    for number, (seconds, tokens) in enumerate(run, start=1):
        left.step(seconds, tokens)
        clock_now += seconds
        if number % each == 0:
            left.evaluation(30.0)
            clock_now += 30.0
        really = sum(s for s, _ in run[number:]) + 30.0 * (evaluations - number // each if evaluations else 0)
        if clock_now > 60 and number > each * bool(evaluations) and really > 60:
            assert left.seconds == pytest.approx(really, rel=CLOSE)
            checked += 1
    assert checked > 50
    assert left.seconds == 0.0


def test_time_left_follows_a_slower_machine():
    left = TimeLeft(400, 100)
    for _ in range(100):
        left.step(1.0, 100)
    for _ in range(65):
        left.step(2.0, 100)
    assert left.seconds == pytest.approx(2.0 * 235, rel=CLOSE)


def test_time_left_of_resumed_run_counts_remaining_steps():
    left = TimeLeft(100, 50, done=90)
    assert left.seconds is None
    left.step(2.0, 50)
    assert left.seconds == pytest.approx(18.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (3599.9, "1:00 h"), (3660, "1:01 h")],
)
def test_clock(seconds, words):
    assert clock(seconds) == words


def test_progress_lines_without_terminal_are_rate_limited(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with TrainProgress() as reported:
        for step in range(1, 101):
            now[0] += 0.5
            reported.step(StepEvent(step, 100, 1.25, 100, 40, 80, 0.5, 1e-3, 2**30))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]
    assert all("loss 1.2500  200 tokens/s" in line and "peak 1.00 GiB" in line for line in lines)


@pytest.mark.parametrize("budget", [None, 60.0])
def test_a_resumed_study_mentions_the_budget_only_if_one_is_given(budget, capsys):
    with _Progress(1, StudyRunOptions(budget_minutes=budget)) as shown:
        shown.estimate(Estimate(1.0, 4, ("q r=1",), (0,), resumed=True))
    err = capsys.readouterr().err
    assert "the study continues with its existing plan" in err
    assert ("--budget-minutes is ignored" in err) == (budget is not None)
