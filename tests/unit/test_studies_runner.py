import json
import math
from concurrent.futures import Future
from types import SimpleNamespace
from typing import ClassVar

import pytest

from brushstroke.errors import ConfigError, OutputError, ResumeError, TrainingError
from brushstroke.studies import executors
from brushstroke.studies import store as store_module
from brushstroke.studies.arm_run import Outcome, Score
from brushstroke.studies.arms import Arm, Run, on_other_task
from brushstroke.studies.runner import EXTENSIONS, Estimate, Grid, estimate, run_arms
from brushstroke.studies.store import Store
from brushstroke.study_folder import check_folder


class Ledger:
    """An executor whose losses follow from a rule; it counts what it is asked to run."""

    def __init__(self, loss) -> None:
        self.loss, self.asked = loss, []

    def __call__(self, arm_runner, runs):
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
IDENTITY = {"studies": ["rank"], "seeds": [0], "arms": []}


def identity(**others):
    return {**IDENTITY, **others}


def run(folder, ledger, arms=(ARM,), grid=GRID, plan=PLAN):
    return run_arms(None, Store(folder, IDENTITY), arms, grid, plan, execute=ledger)


def test_the_rate_is_chosen_inside_and_the_other_seeds_use_it(tmp_path):
    ledger = Ledger(best_at(1e-2))
    found = run(tmp_path, ledger)["a"]
    assert found.conclusive
    assert found.chosen == 1e-2
    assert ledger.asked == [("a", 1e-3, 0), ("a", 1e-2, 0), ("a", 1e-1, 0), ("a", 1e-2, 1)]
    assert found.losses() == pytest.approx({0: 0.0, 1: 0.01})


CONTROL = on_other_task(ARM)
WITH_CONTROL = Estimate(1.0, 6, (ARM.name, CONTROL.name), (0, 1))


def test_control_runs_only_at_the_rate_of_its_arm(tmp_path):
    """However low its own loss were at another rate."""
    ledger = Ledger(lambda run: best_at(1e-2 if run.arm.name == "a" else 1e-1)(run))
    found = run(tmp_path, ledger, (ARM, CONTROL), plan=WITH_CONTROL)
    control = found[CONTROL.name]
    assert control.conclusive
    assert (control.chosen, control.seeds, control.tried) == (1e-2, (0, 1), {})
    assert [asked for asked in ledger.asked if asked[0] == CONTROL.name] == [
        (CONTROL.name, 1e-2, 0),
        (CONTROL.name, 1e-2, 1),
    ]
    again = Ledger(best_at(1e-2))
    run(tmp_path, again, (ARM, CONTROL), plan=WITH_CONTROL)
    assert again.asked == []


def test_a_control_takes_the_rate_that_an_extended_grid_found(tmp_path):
    found = run(tmp_path, Ledger(best_at(1e-5)), (ARM, CONTROL), plan=WITH_CONTROL)
    assert found[CONTROL.name].chosen == found["a"].chosen == 1e-5


@pytest.mark.parametrize("arms", [("a", CONTROL.name), (CONTROL.name,)], ids=["inconclusive", "left out"])
def test_a_control_of_an_arm_without_a_rate_does_not_run(tmp_path, arms):
    other = Arm("b", ("v",), 2)
    ledger = Ledger(lambda run: run.learning_rate if run.arm.name != "b" else best_at(1e-2)(run))
    plan = Estimate(1.0, 6, (*arms, "b"), (0, 1))
    found = run(tmp_path, ledger, (ARM, CONTROL, other), plan=plan)
    assert not found[CONTROL.name].conclusive
    assert found[CONTROL.name].outcomes == {}
    assert CONTROL.name not in {name for name, _, _ in ledger.asked}


def test_a_finished_run_is_never_run_again(tmp_path):
    run(tmp_path, Ledger(best_at(1e-2)))
    again = Ledger(best_at(1e-2))
    assert run(tmp_path, again)["a"].chosen == 1e-2
    assert again.asked == []


@pytest.mark.parametrize(
    ("best", "further"), [(1e-1, [1.0]), (1e1, [1.0, 10.0, 100.0]), (1e-4, [1e-4, 1e-5])]
)
def test_the_grid_is_extended_until_the_best_rate_lies_inside(tmp_path, best, further):
    ledger = Ledger(best_at(best))
    found = run(tmp_path, ledger)["a"]
    assert [rate for _, rate, seed in ledger.asked if seed == 0][3:] == pytest.approx(further)
    assert found.conclusive
    assert found.chosen == pytest.approx(best)


def test_the_grid_is_extended_five_times_at_the_most(tmp_path):
    ledger = Ledger(best_at(1e9))
    assert not run(tmp_path, ledger)["a"].conclusive
    assert len(ledger.asked) == 3 + EXTENSIONS


def test_a_grid_that_must_not_grow_does_not(tmp_path):
    ledger = Ledger(best_at(1.0))
    assert not run(tmp_path, ledger, grid=Grid(GRID.rates, GRID.seeds, extend=False))["a"].conclusive
    assert len(ledger.asked) == 3


def test_an_arm_at_the_edge_is_inconclusive_and_gets_no_further_seeds(tmp_path):
    ledger = Ledger(best_at(1e9))
    found = run(tmp_path, ledger)["a"]
    assert not found.conclusive
    assert found.edge == "highest"
    assert {seed for *_, seed in ledger.asked} == {0}


def test_diverged_rate_does_not_make_an_edge(tmp_path):
    def loss(run):
        return None if run.learning_rate > 1e-2 else best_at(1e-2)(run)

    found = run(tmp_path, Ledger(loss))["a"]
    assert found.conclusive
    assert found.tried[1e-1] is None


@pytest.mark.parametrize(
    "tied", [(1e-3, 1e-2, 1e-1), (1e-3, 1e-2), (1e-2, 1e-1)], ids=["all", "lowest", "highest"]
)
def test_equal_loss_at_the_edge_counts_as_the_edge(tmp_path, tied):
    """Rates too small to learn anything give one and the same loss."""

    def loss(run):
        low = 0.0 if 1e-3 in tied else tied[0]
        high = math.inf if 1e-1 in tied else tied[-1]
        return 6.0 if low <= run.learning_rate <= high else 7.0

    found = run(tmp_path, Ledger(loss))["a"]
    assert not found.conclusive
    assert found.losses() == {0: 6.0}


def test_no_result_if_all_rates_diverge(tmp_path):
    with pytest.raises(TrainingError, match="every run diverged"):
        run(tmp_path, Ledger(lambda run: None))


def test_arms_beyond_the_plan_are_not_run(tmp_path):
    ledger = Ledger(best_at(1e-2))
    found = run(tmp_path, ledger, arms=(ARM, Arm("b", ("v",), 2)))
    assert list(found) == ["a"]


class Timed:
    """An estimator for which each run takes ten seconds."""

    def run(self, run):
        return Outcome(run.arm.name, run.learning_rate, run.seed, 0, 1, 0, 10.0)

    def numbers(self, arm):
        return 1


def test_budget_leaves_out_seeds_then_arms_and_reports_it():
    arms = [Arm(name, ("q",), 2) for name in "abc"]
    grid = Grid((1e-3, 1e-2, 1e-1), (0, 1, 2))
    whole = estimate(Timed(), arms, grid)
    assert (whole.runs, whole.seconds, whole.left_out) == (15, 150.0, ())
    fewer = estimate(Timed(), arms, grid, budget_minutes=2)
    assert fewer.seeds == (0, 1)
    assert (fewer.left_out_arms, fewer.left_out_seeds, fewer.left_out) == ((), (2,), ("seed 2",))
    few = estimate(Timed(), arms, grid, budget_minutes=1)
    assert (few.arms, few.seeds) == (("a", "b"), (0,))
    assert (few.left_out_arms, few.left_out_seeds) == (("c",), (1, 2))
    assert few.left_out == ("seeds 1, 2", 'arm "c"')
    assert Estimate.from_dict(json.loads(json.dumps(few.as_dict())), ("a", "b", "c"), (0, 1, 2)) == few
    assert estimate(Timed(), arms, grid, workers=2).seconds == 75.0
    with pytest.raises(ConfigError, match=r"one arm takes about .* give more minutes \(--budget-minutes\)$"):
        estimate(Timed(), arms, grid, budget_minutes=0.1)
    with pytest.raises(ConfigError, match=r"minutes \(--budget-minutes\) or fewer steps$"):
        estimate(Timed(), arms, grid, budget_minutes=0.1, shorten=("fewer steps",))
    assert fewer.budget_minutes == 2


def test_all_workers_time_an_arm_at_once():
    asked = []

    def counted(estimator, runs):
        asked.append([(run.arm.name, run.learning_rate) for run in runs])
        for number, run in enumerate(runs):
            yield run, Outcome("", run.learning_rate, run.seed, 0, 1, 0, 10.0 + 20.0 * number)

    arms = [Arm("a", ("q",), 2), Arm("b", ("q",), 4), Arm("w", ("q",), None, rates=(1e-4, 1e-3, 1e-2))]
    found = estimate(Timed(), arms, Grid((1e-3, 1e-2, 1e-1), (0,)), workers=2, execute=counted)
    assert asked == [[("a", 1e-3)] * 2, [("w", 1e-4)] * 2]
    assert found.seconds == found.runs * 20.0 / 2


def test_a_store_refuses_another_study_and_foreign_files(tmp_path):
    Store(tmp_path / "s", identity(seeds=[0]))
    Store(tmp_path / "s", identity(seeds=[0]))
    with pytest.raises(ResumeError, match="seeds: now \\[1\\], then \\[0\\]"):
        Store(tmp_path / "s", identity(seeds=[1]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        Store(tmp_path / "mine", IDENTITY)


def test_overwrite_removes_a_study_and_nothing_else(tmp_path):
    store = Store(tmp_path, identity(seeds=[0]))
    store.finish(Run(ARM, 0.1, 0), Outcome("a", 0.1, 0, 1, 1, 1, 0.1, test_rows=(1.0, 2.0)))
    (tmp_path / "mine.txt").write_text("mine")
    fresh = Store(tmp_path, identity(seeds=[1]), overwrite=True)
    assert fresh.outcome(Run(ARM, 0.1, 0)) is None
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert json.loads((tmp_path / "study.json").read_text())["identity"] == identity(seeds=[1])


def test_row_losses_are_stored_with_the_outcome(tmp_path):
    store, run = Store(tmp_path, IDENTITY), Run(ARM, 0.1, 0)
    store.finish(run, Outcome("a", 0.1, 0, 1, 1, 1, 0.1, test_rows=(1.23456789, 2.0)))
    assert store.test_rows(run) == (1.234568, 2.0)
    assert "test_rows" not in (tmp_path / "runs" / run.key / "outcome.json").read_text()
    assert store.outcome(run) == Outcome("a", 0.1, 0, 1, 1, 1, 0.1)
    assert store.test_rows(Run(ARM, 0.1, 1)) == ()
    (tmp_path / "runs" / run.key / "test_rows.json").write_text("[1, null]")
    with pytest.raises(OutputError, match=r"test_rows.json is damaged; remove this file"):
        store.test_rows(run)


def test_overwrite_leaves_the_users_files_in_the_studys_own_folders(tmp_path):
    store = Store(tmp_path, identity(seeds=[0]))
    store.finish(Run(ARM, 0.1, 0), Outcome("a", 0.1, 0, 1, 1, 1, 0.1))
    store.keep_note("figures", ["ranks.png"])
    (tmp_path / "figures").mkdir()
    for name in ("runs/notes.txt", "figures/mine.png", "figures/ranks.png"):
        (tmp_path / name).write_text("mine")
    Store(tmp_path, identity(seeds=[1]), overwrite=True)
    left = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {"study.json", "runs/notes.txt", "figures/mine.png"}


def test_time_left_includes_runs_of_an_extended_grid(tmp_path):
    left = []
    store = Store(tmp_path, IDENTITY)
    run_arms(
        None,
        store,
        [ARM],
        GRID,
        PLAN,
        execute=Ledger(best_at(1e-1)),
        on_run=lambda p: left.append(p.seconds_left),
    )
    assert [seconds > 0 for seconds in left] == [True, True, True, True, False]


def test_an_extended_grid_never_repeats_a_rate(tmp_path):
    ledger = Ledger(lambda run: run.learning_rate)
    run(tmp_path, ledger, grid=Grid((1e-3, 1.001e-3), (0,)), plan=Estimate(1.0, 2, ("a",), (0,)))
    assert len({rate for _, rate, _ in ledger.asked}) == 2 + EXTENSIONS


def test_overwrite_refuses_unknown_runs(tmp_path):
    """What an interrupted --overwrite may have left: never taken for runs of the new study."""
    Store(tmp_path, identity(seeds=[0])).finish(Run(ARM, 0.1, 0), Outcome("a", 0.1, 0, 1, 1, 1, 0.1))
    (tmp_path / "study.json").unlink()
    with pytest.raises(OutputError, match=r"without a study\.json"):
        Store(tmp_path, identity(seeds=[0]), overwrite=True)


def test_single_rate_is_not_extended():
    with pytest.raises(ConfigError, match="at least two learning rates"):
        Grid((1e-3,), (0,))


def test_a_seed_that_diverges_is_left_out_of_all_numbers(tmp_path):
    found = run(tmp_path, Ledger(lambda run: None if run.seed else best_at(1e-2)(run)))["a"]
    assert found.conclusive
    assert found.seeds == (0,)
    assert found.losses() == {0: 0.0}


def outcome_of(run: Run) -> Outcome:
    return Outcome(run.arm.name, run.learning_rate, run.seed, 1, 1, 1, 0.1)


def test_overwrite_follows_no_path_out_of_the_figures_folder(tmp_path):
    folder = tmp_path / "a" / "study"
    (folder / "figures" / "sub").mkdir(parents=True)
    kept = [tmp_path / "victim.txt", folder / "mine.txt", folder / "figures" / "sub" / "x.png"]
    for file in (*kept, folder / "figures" / "ranks.png"):
        file.write_text("mine")
    noted = [
        "../../../victim.txt",
        "../mine.txt",
        str(tmp_path / "victim.txt"),
        "sub/x.png",
        "..",
        "",
        "sub",
        7,
    ]
    notes = {"figures": [*noted, "ranks.png"]}
    (folder / "study.json").write_text(json.dumps({"identity": IDENTITY, "notes": notes}))
    Store(folder, IDENTITY, overwrite=True)
    assert all(file.read_text() == "mine" for file in kept)
    assert not (folder / "figures" / "ranks.png").exists()


def test_overwrite_removes_only_runs_of_the_study(tmp_path):
    store = Store(tmp_path, IDENTITY)
    finished, killed = Run(ARM, 0.1, 0), Run(Arm("q, v: b", ("q",), 2), 1.0000001e-5, 3)
    store.finish(finished, outcome_of(finished))
    for run in ("mymodel", killed.key):
        (tmp_path / "runs" / run / "adapter").mkdir(parents=True)
        (tmp_path / "runs" / run / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "runs" / finished.key / "adapter").mkdir()
    (tmp_path / "runs" / finished.key / "adapter" / "my_notes.txt").write_text("mine")
    (tmp_path / "runs" / "mymodel" / "outcome.json").write_text("{}")
    Store(tmp_path, IDENTITY, overwrite=True)
    left = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {
        "study.json",
        "runs/mymodel/outcome.json",
        "runs/mymodel/adapter/adapter_config.json",
        f"runs/{finished.key}/adapter/my_notes.txt",
    }
    assert not (tmp_path / "runs" / killed.key).exists()


@pytest.mark.parametrize("place", ["runs", "figures", "run", "adapter"])
def test_overwrite_follows_no_link(tmp_path, place):
    """What a link leads to may be anybody's."""
    folder, elsewhere, run = tmp_path / "study", tmp_path / "elsewhere", Run(ARM, 0.1, 0)
    other = Store(elsewhere, IDENTITY)
    other.finish(run, outcome_of(run))
    (other.runs / run.key / "adapter").mkdir()
    (elsewhere / "figures").mkdir()
    Store(folder, IDENTITY)
    paths = {
        "runs": "runs",
        "figures": "figures",
        "run": f"runs/{run.key}",
        "adapter": f"runs/{run.key}/adapter",
    }
    link = folder / paths[place]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere / paths[place])
    with pytest.raises(OutputError, match=f"{link.name}: a link"):
        Store(folder, IDENTITY, overwrite=True)
    assert other.outcome(run) is not None


def test_study_json_without_required_keys_is_foreign(tmp_path):
    (tmp_path / "study.json").write_text('{"identity": {}, "notes": {}}')
    with pytest.raises(OutputError, match="was not written by a study"):
        Store(tmp_path, IDENTITY, overwrite=True)


def test_study_killed_before_the_first_run_can_continue(monkeypatch, tmp_path):
    """Wherever it comes: before study.json nothing of the study is there."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "s", IDENTITY)
    assert Store(tmp_path / "s", IDENTITY).outcome(Run(ARM, 0.1, 0)) is None


@pytest.mark.parametrize("left", ["base", ".base.partial-0123abcd", ".study.json.partial-0123abcd"])
def test_leftovers_of_a_kill_before_the_study_begins_are_not_foreign(tmp_path, left):
    for name in {"base", left}:
        (tmp_path / name).mkdir()
    check_folder(tmp_path)
    (tmp_path / "base.other").mkdir()
    with pytest.raises(OutputError, match="is not empty"):
        check_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", "null", '{"validation": 1}'])
def test_damaged_outcome_error_names_the_file_and_next_step(tmp_path, content):
    store, one = Store(tmp_path, IDENTITY), Run(ARM, 0.1, 0)
    store.finish(one, outcome_of(one))
    file = store.runs / one.key / "outcome.json"
    file.write_text(content)
    with pytest.raises(OutputError, match="is damaged; remove this file") as reported:
        store.outcome(one)
    assert str(file) in str(reported.value)


def test_scores_of_other_types_are_damage(tmp_path):
    store, one = Store(tmp_path, IDENTITY), Run(ARM, 0.1, 0)
    ((_, outcome),) = Ledger(best_at(1e-2))(None, [one])
    store.finish(one, outcome)
    file = store.runs / one.key / "outcome.json"
    reported = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**reported, "test": {**reported["test"], "loss": "low"}}), "utf-8")
    with pytest.raises(OutputError, match=r"outcome\.json is damaged; remove this file"):
        store.outcome(one)


def test_missing_update_error_names_the_file_and_next_step(tmp_path):
    store, one = Store(tmp_path, IDENTITY), Run(ARM, 0.1, 0)
    store.finish(one, outcome_of(one))
    with pytest.raises(OutputError, match="and the run is done again"):
        store.adapter(one)


def test_invalid_plan_is_refused():
    reported = {"arms": ["a"], "seeds": [0, 0.5], "seconds": 1.0, "runs": 2}
    with pytest.raises(ValueError, match="whole numbers"):
        Estimate.from_dict(reported, ("a",), (0,))


def test_extended_grid_uses_the_ratio_at_its_edge(tmp_path):
    for best, beyond in ((1e-6, 1e-4 / 3), (1e3, 0.3 * 30)):
        ledger = Ledger(best_at(best))
        run(tmp_path / str(best), ledger, grid=Grid((1e-4, 3e-4, 1e-2, 0.3), (0,)))
        assert ledger.asked[4][1] == pytest.approx(beyond, rel=0.05)  # the first beyond the four


def test_time_left_divides_runs_among_workers(tmp_path):
    """What else passes, such as the start of processes, is not part of a run."""
    left = []
    run_arms(
        None,
        Store(tmp_path, IDENTITY),
        [ARM],
        GRID,
        PLAN,
        execute=Ledger(best_at(1e-2)),
        workers=2,
        on_run=lambda progress: left.append(progress.seconds_left),
    )
    assert left == pytest.approx([0.15, 0.1, 0.05, 0.0])  # runs of 0.1 seconds


class Pool:
    """A pool that runs nothing, and knows how often one was made."""

    made: ClassVar[list[int]] = []

    def __init__(self, size, *_, **__):
        self.made.append(size)

    def submit(self, _, run):
        done = Future()
        done.set_exception(run) if isinstance(run, Exception) else done.set_result(run)
        return done

    def shutdown(self, **_):
        pass


def test_processes_are_started_once_for_all_stages_of_a_study(monkeypatch):
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Pool)
    execute, arm_runner = executors.processes(3), SimpleNamespace()
    for stage in (["a", "b", "c", "d"], [], ["e"], ["f", "g", "h"]):
        assert sorted(outcome for _, outcome in execute(arm_runner, stage)) == stage
    assert Pool.made == [3]
    list(execute(SimpleNamespace(), ["a"]))  # another arm_runner
    list(execute(arm_runner, ["a"]))
    list(execute(arm_runner, ["a", "b"]))  # more at a time than were needed so far
    assert Pool.made == [3, 1, 1, 2]
    with pytest.raises(KeyError):
        list(execute(arm_runner, ["a", KeyError()]))
    list(execute(arm_runner, ["a"]))  # after an error
    assert Pool.made == [3, 1, 1, 2, 1]
