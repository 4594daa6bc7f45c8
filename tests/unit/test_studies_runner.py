import json
import math

import pytest

from brushstroke.errors import ConfigError, OutputError, ResumeError, TrainingError
from brushstroke.studies.arms import Arm, Run
from brushstroke.studies.runner import Estimate, Grid, conduct, estimate
from brushstroke.studies.store import Store
from brushstroke.studies.workshop import Outcome, Score


class Ledger:
    """An executor whose losses follow from a rule; it counts what it is asked to run."""

    def __init__(self, loss) -> None:
        self.loss, self.asked = loss, []

    def __call__(self, workshop, runs):
        for run in runs:
            self.asked.append((run.arm.name, run.learning_rate, run.seed))
            value = self.loss(run)
            score = None if value is None else Score(value, 0.5, 10)
            yield run, Outcome(run.arm.name, run.learning_rate, run.seed, 1, 1, 1, 0.1, value, score, score)


def best_at(rate: float):
    return lambda run: abs(math.log(run.learning_rate / rate)) + 0.01 * run.seed


ARM = Arm("a", ("q",), 2)
GRID = Grid((1e-3, 1e-2, 1e-1), (0, 1))
PLAN = Estimate(1.0, 4, ("a",), (0, 1))


def run(folder, ledger, arms=(ARM,), grid=GRID, plan=PLAN):
    return conduct(None, Store(folder, {"x": 1}), arms, grid, plan, execute=ledger)


def test_the_rate_is_chosen_inside_and_the_other_seeds_use_it(tmp_path):
    ledger = Ledger(best_at(1e-2))
    found = run(tmp_path, ledger)["a"]
    assert found.conclusive
    assert found.chosen == 1e-2
    assert ledger.asked == [("a", 1e-3, 0), ("a", 1e-2, 0), ("a", 1e-1, 0), ("a", 1e-2, 1)]
    assert found.losses() == pytest.approx({0: 0.0, 1: 0.01})


def test_a_finished_run_is_never_run_again(tmp_path):
    run(tmp_path, Ledger(best_at(1e-2)))
    again = Ledger(best_at(1e-2))
    assert run(tmp_path, again)["a"].chosen == 1e-2
    assert again.asked == []


def test_the_grid_is_extended_once(tmp_path):
    ledger = Ledger(best_at(1e-1))
    found = run(tmp_path, ledger)["a"]
    assert ("a", 1.0, 0) in ledger.asked
    assert found.conclusive
    assert found.chosen == 1e-1


def test_an_arm_at_the_edge_is_inconclusive_and_gets_no_further_seeds(tmp_path):
    ledger = Ledger(best_at(100.0))
    found = run(tmp_path, ledger)["a"]
    assert not found.conclusive
    assert found.edge == "highest"
    assert {seed for *_, seed in ledger.asked} == {0}


def test_a_rate_that_diverged_is_no_edge_to_stop_at(tmp_path):
    def loss(run):
        return None if run.learning_rate > 1e-2 else best_at(1e-2)(run)

    found = run(tmp_path, Ledger(loss))["a"]
    assert found.conclusive
    assert found.tried[1e-1] is None


def test_when_all_diverge_nothing_is_reported(tmp_path):
    with pytest.raises(TrainingError, match="every run diverged"):
        run(tmp_path, Ledger(lambda run: None))


def test_arms_beyond_the_plan_are_not_run(tmp_path):
    ledger = Ledger(best_at(1e-2))
    found = run(tmp_path, ledger, arms=(ARM, Arm("b", ("v",), 2)))
    assert list(found) == ["a"]


class Timed:
    """A workshop whose runs take ten seconds."""

    def seconds_of(self, arm):
        return 10.0

    def numbers(self, arm):
        return 1


def test_a_budget_leaves_out_seeds_then_arms_and_says_so():
    arms = [Arm(name, ("q",), 2) for name in "abc"]
    grid = Grid((1e-3, 1e-2, 1e-1), (0, 1, 2))
    whole = estimate(Timed(), arms, grid)
    assert (whole.runs, whole.seconds, whole.left_out) == (15, 150.0, ())
    fewer = estimate(Timed(), arms, grid, budget_minutes=2)
    assert fewer.seeds == (0, 1)
    assert fewer.left_out == ("seeds 2",)
    few = estimate(Timed(), arms, grid, budget_minutes=1)
    assert (few.arms, few.seeds) == (("a", "b"), (0,))
    assert few.left_out == ("seeds 1, 2", "arms c")
    assert estimate(Timed(), arms, grid, workers=2).seconds == 75.0
    with pytest.raises(ConfigError, match="one arm takes about"):
        estimate(Timed(), arms, grid, budget_minutes=0.1)


def test_a_store_refuses_another_study_and_foreign_files(tmp_path):
    Store(tmp_path / "s", {"seeds": [0]})
    Store(tmp_path / "s", {"seeds": [0]})
    with pytest.raises(ResumeError, match="seeds: now \\[1\\], then \\[0\\]"):
        Store(tmp_path / "s", {"seeds": [1]})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files already"):
        Store(tmp_path / "mine", {})


def test_overwrite_removes_a_study_and_nothing_else(tmp_path):
    store = Store(tmp_path, {"seeds": [0]})
    store.finish(Run(ARM, 0.1, 0), Outcome("a", 0.1, 0, 1, 1, 1, 0.1))
    (tmp_path / "mine.txt").write_text("mine")
    fresh = Store(tmp_path, {"seeds": [1]}, overwrite=True)
    assert fresh.outcome(Run(ARM, 0.1, 0)) is None
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert json.loads((tmp_path / "study.json").read_text())["identity"] == {"seeds": [1]}


def test_overwrite_leaves_the_users_files_in_the_studys_own_folders(tmp_path):
    store = Store(tmp_path, {"seeds": [0]})
    store.finish(Run(ARM, 0.1, 0), Outcome("a", 0.1, 0, 1, 1, 1, 0.1))
    store.keep_note("figures", ["ranks.png"])
    (tmp_path / "figures").mkdir()
    for name in ("runs/notes.txt", "figures/mine.png", "figures/ranks.png"):
        (tmp_path / name).write_text("mine")
    Store(tmp_path, {"seeds": [1]}, overwrite=True)
    left = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {"study.json", "runs/notes.txt", "figures/mine.png"}


def test_the_time_that_is_left_counts_the_runs_of_a_wider_grid(tmp_path):
    left = []
    store = Store(tmp_path, {"x": 1})
    conduct(
        None,
        store,
        [ARM],
        GRID,
        PLAN,
        execute=Ledger(best_at(1e-1)),
        on_run=lambda p: left.append(p.seconds_left),
    )
    assert [seconds > 0 for seconds in left] == [True, True, True, True, False]


def test_a_wider_grid_never_names_a_rate_that_was_tried(tmp_path):
    ledger = Ledger(lambda run: run.learning_rate)
    run(tmp_path, ledger, grid=Grid((1e-3, 1.001e-3), (0,)), plan=Estimate(1.0, 2, ("a",), (0,)))
    assert len({rate for _, rate, _ in ledger.asked}) == 3


def test_overwrite_refuses_runs_that_nobody_knows(tmp_path):
    """What an interrupted --overwrite may have left: never taken for runs of the new study."""
    Store(tmp_path, {"seeds": [0]}).finish(Run(ARM, 0.1, 0), Outcome("a", 0.1, 0, 1, 1, 1, 0.1))
    (tmp_path / "study.json").unlink()
    with pytest.raises(OutputError, match="without a study"):
        Store(tmp_path, {"seeds": [0]}, overwrite=True)


def test_one_rate_is_no_grid():
    with pytest.raises(ConfigError, match="at least two learning rates"):
        Grid((1e-3,), (0,))


def test_a_later_seed_that_diverges_is_in_no_number(tmp_path):
    found = run(tmp_path, Ledger(lambda run: None if run.seed else best_at(1e-2)(run)))["a"]
    assert found.conclusive
    assert found.seeds == (0,)
    assert found.losses() == {0: 0.0}
