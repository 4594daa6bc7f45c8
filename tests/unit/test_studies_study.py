"""A study's folder and its results as JSON: damage is reported, nearly equal rates stay distinct."""

import hashlib
import html
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import training_kit
from brushstroke.base import Base
from brushstroke.errors import ConfigError, OutputError, ResumeError
from brushstroke.outputs import lock
from brushstroke.studies import (
    DeltaStudy,
    Estimate,
    Grid,
    IntrinsicStudy,
    Material,
    RankStudy,
    Report,
    SeedsStudy,
    TargetsStudy,
    Task,
    run_studies,
)
from brushstroke.studies.arm_run import Outcome
from brushstroke.studies.arms import Arm
from brushstroke.studies.page import report_page
from brushstroke.studies.runner import ArmResult
from brushstroke.studies.study import BY_A_SAMPLE, LEFT_OUT, _hash_weights
from brushstroke.study_folder import locked
from brushstroke.training import TrainConfig

IDENTITY = {"studies": [], "seeds": [], "arms": []}
PLAN = {"seconds": 1.0, "runs": 4, "arms": ["q r=1"], "seeds": [0]}


@pytest.fixture
def material(llama) -> Material:
    rows = tuple(training_kit.examples(6))
    tasks = {"task": Task("toy", rows[:2], rows[2:4], rows[4:])}
    return Material(Base(llama), tasks, TrainConfig(max_steps=1), Grid((1e-3, 1e-2), (0,)))


@pytest.mark.parametrize(
    "plan", [{"foo": 1}, [1], 3, {**PLAN, "seconds": "x"}, {**PLAN, "arms": 5}, {**PLAN, "seeds": []}]
)
def test_damaged_plan_error_names_the_file_and_next_step(material, tmp_path, plan):
    with pytest.raises(KeyboardInterrupt):
        run_studies([ONE_RANK], material, tmp_path, on_estimate=interrupted)
    change(tmp_path, "notes", plan=plan)
    with pytest.raises(OutputError, match=r"is damaged; start over \(--overwrite\)") as reported:
        run_studies([ONE_RANK], material, tmp_path)
    assert str(tmp_path / "study.json") in str(reported.value)


def test_other_ranks_in_the_same_folder_are_another_study(material, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_studies([RankStudy(("q_proj",), (1, 2))], material, tmp_path, on_estimate=interrupted)
    for ranks in ((1,), (1, 4)):
        with pytest.raises(ResumeError, match="holds another study"):
            run_studies([RankStudy(("q_proj",), ranks)], material, tmp_path)


@pytest.mark.parametrize("notes", [{"untouched": {"task": 5}}, {"untouched": [1]}, {"seconds": "x"}])
def test_damaged_study_files_are_reported_before_any_run(material, tmp_path, notes):
    def untold(*_):
        pytest.fail("ran")

    studies = [RankStudy(("q_proj",), (1,), train_whole=False)]
    with pytest.raises(KeyboardInterrupt):
        run_studies(studies, material, tmp_path, on_estimate=interrupted)
    file = tmp_path / "study.json"
    reported = json.loads(file.read_text())
    reported["notes"] |= notes
    file.write_text(json.dumps(reported))
    with pytest.raises(OutputError, match="is damaged; start over"):
        run_studies(studies, material, tmp_path, execute=untold)


def test_another_study_is_refused_before_steps_are_timed(material, tmp_path):
    """A study that was killed before it stored its plan."""
    (tmp_path / "study.json").write_text(json.dumps({"identity": IDENTITY, "notes": {}}))
    with pytest.raises(ResumeError, match="holds another study"):
        run_studies([ONE_RANK], material, tmp_path, execute=lambda *_: pytest.fail("timed"))


def interrupted(*_):
    raise KeyboardInterrupt


def test_nearly_equal_rates_are_separate_in_results():
    tried = {1e-3: 1.0, 1.0000001e-3: 2.0, 1.0: None}
    found = ArmResult(Arm("q", ("q_proj",)), tried, None, None, {})
    results = SimpleNamespace(estimate=Estimate(1.0, 3, ("q",), (0,)), untouched={}, arms={"q": found})
    reported = Report((), results, {}, 1.0).as_dict()["arms"]["q"]["tried"]
    assert reported == {"0.001": 1.0, "0.0010000001": 2.0, "1": None}


@pytest.mark.parametrize("given", [{"rank": 8}, {"alpha": 16.0}])
def test_a_subspace_of_the_weights_has_no_rank_and_no_alpha(material, given):
    with pytest.raises(ConfigError, match="leave these out"):
        IntrinsicStudy(("q_proj",), (4,), **given).arms(material)
    assert IntrinsicStudy(("q_proj",), (4,)).arms(material)[0].rank is None
    (full, _) = IntrinsicStudy(("q_proj",), (4,), of="factors", **given).arms(material)
    assert (full.rank, full.alpha) == (8, 16.0)


@pytest.mark.parametrize("of", ["W", "factors"])
def test_the_rate_of_a_subspace_grows_as_one_over_the_root_of_its_dimension(material, of):
    study = IntrinsicStudy(dimensions=(4, 16, 64), of=of)
    full, *subspaces = study.arms(material)
    sites = [site for site in material.sites if site.in_groups and not site.is_output]
    size = sum(site.d * site.h if of == "W" else 8 * (site.d + site.h) for site in sites)
    for arm in subspaces:
        expected = [rate * (size / arm.dimension) ** 0.5 for rate in material.grid.of(full)]
        assert arm.rates == pytest.approx(expected, rel=0.06)  # of two digits


def test_a_study_notices_every_changed_weight(material):
    before = _hash_weights(material.base)
    weight = next(iter(material.base.model.parameters()))
    with torch.no_grad():
        weight.view(-1)[-1] += 1
    assert _hash_weights(material.base) != before


ONE_RANK = RankStudy(("q_proj",), (1,), train_whole=False)


def stored(folder):
    return json.loads((folder / "study.json").read_text("utf-8"))


def change(folder, part, **values):
    """Change a part of study.json."""
    whole = stored(folder)
    whole[part] |= values
    (folder / "study.json").write_text(json.dumps(whole), "utf-8")


def sample_hash(model):
    """The hash of the base in studies of the first versions: 64 values or a few more of each weight."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()[:: max(1, weight.numel() // 64)].float().numpy()
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]


def test_study_with_the_older_hash_of_its_base_is_read_but_not_continued(material, tmp_path):
    answer = run_studies([ONE_RANK], material, tmp_path).findings[0].answer
    change(tmp_path, "identity", base=sample_hash(material.base.model))
    again = run_studies([ONE_RANK], material, tmp_path, reread=True)
    assert again.findings[0].answer == answer
    assert again.notes == (BY_A_SAMPLE,)
    page = html.unescape(report_page(again, title="again").html())
    assert "the hash of an older version, which contains 64 values" in page
    with pytest.raises(ResumeError, match=r"of an older version.*\(--reread\)"):
        run_studies([ONE_RANK], material, tmp_path)
    change(tmp_path, "identity", base="0123456789abcdef")
    with pytest.raises(ResumeError, match="holds another study"):
        run_studies([ONE_RANK], material, tmp_path, reread=True)


def test_seconds_do_not_grow_when_nothing_is_trained(material, tmp_path):
    plans = []
    first = run_studies([ONE_RANK], material, tmp_path, on_estimate=plans.append)
    again = [
        run_studies([ONE_RANK], material, tmp_path, on_estimate=plans.append, **execute)
        for execute in ({"reread": True}, {})
    ]
    assert [report.seconds for report in again] == [first.seconds, first.seconds]
    assert [plan.finished for plan in plans] == [False, True, True]


def test_study_with_an_unfinished_run_is_not_called_finished(material, tmp_path):
    plans = []
    run_studies([ONE_RANK], material, tmp_path)
    next(tmp_path.glob("runs/*/outcome.json")).unlink()
    run_studies([ONE_RANK], material, tmp_path, on_estimate=plans.append)
    assert [plan.finished for plan in plans] == [False]


def test_a_folder_has_one_study_at_a_time(material, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    run_studies([ONE_RANK], material, tmp_path)
    with locked(tmp_path):
        with pytest.raises(OutputError, match="another run is writing"):
            run_studies([ONE_RANK], material, tmp_path)
        run_studies([ONE_RANK], material, tmp_path, reread=True)
    run_studies([ONE_RANK], material, tmp_path)


def run_part(studies, material, folder, arms, seeds=(0,)):
    """The findings of a study of which a budget of a minute left out other arms and seeds."""
    with pytest.raises(KeyboardInterrupt):
        run_studies(studies, material, folder, budget_minutes=1.0, on_estimate=interrupted)
    plan = {**stored(folder)["notes"]["plan"], "arms": list(arms), "seeds": list(seeds)}
    change(folder, "notes", plan=plan)
    return run_studies(studies, material, folder, budget_minutes=1.0)


def test_a_question_whose_arms_the_budget_left_out_names_the_budget(material, tmp_path):
    questions = [TargetsStudy({"q": ("q_proj",), "v": ("v_proj",)}, rank=1)]
    questions += [RankStudy(("o_proj",), (1,)), SeedsStudy(("o_proj",), 2), DeltaStudy(("o_proj",), (2,))]
    report = run_part(questions, material, tmp_path, ["q r=1"])
    first, *others = report.findings
    assert first.answer.endswith('Not run, because of the time budget (--budget-minutes): "v r=1".')
    for finding in others:
        assert finding.answer == f"No arm of this question was run, {LEFT_OUT}."
        assert all(table.rows for table in finding.tables)
        assert any(': arms "v r=1", "o r=1", "o W itself", "o r=2".' in note for note in finding.notes)
    left_out = ["v r=1", "o r=1", "o W itself", "o r=2"]
    assert report.as_dict()["estimate"]["left_out_arms"] == (*left_out,)


@pytest.mark.parametrize(
    ("study", "kept", "missing"),
    [
        (TargetsStudy({"q": ("q_proj",), "v": ("v_proj",), "o": ("o_proj",)}, rank=1), 1, '"v r=1", "o r=1"'),
        (RankStudy(("q_proj",), (1, 2)), 2, '"q W itself"'),
        (IntrinsicStudy(("q_proj",), (2, 4)), 1, '"q W itself, 2 dimensions", "q W itself, 4 dimensions"'),
        (IntrinsicStudy(("q_proj",), (2, 4)), 2, '"q W itself, 4 dimensions"'),
    ],
)
def test_arms_that_the_budget_left_out_are_in_the_answer_and_the_table(
    material, tmp_path, study, kept, missing
):
    names = [arm.name for arm in study.arms(material)]
    (finding,) = run_part([study], material, tmp_path, names[:kept]).findings
    assert finding.answer.endswith(f" Not run, because of the time budget (--budget-minutes): {missing}.")
    assert "only set with a learning rate" not in finding.answer
    cells = {row[0]: row[3] for row in finding.tables[0].rows}
    assert cells.keys() == {*names}
    assert all("left out by the budget" in cells[name] for name in names[kept:])


@pytest.mark.parametrize("budget", [None, 60.0])
def test_a_larger_budget_continues_with_what_was_left_out(material, tmp_path, budget):
    """The finished runs are kept, and the report equals that of a study in one go."""
    two = replace(material, grid=Grid((1e-3, 1e-2), (0, 1)))
    studies = [RankStudy(("q_proj",), (1, 2), train_whole=False)]
    run_part(studies, two, tmp_path / "part", ["q r=1"])
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("part/runs/*/outcome.json")}
    again = run_studies(studies, two, tmp_path / "part", reread=True)
    assert again.results.estimate.left_out == ("seed 1", 'arm "q r=2"')
    whole = run_studies(studies, two, tmp_path / "part", budget_minutes=budget)
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert whole.results.estimate.left_out == ()
    assert whole.results.estimate.budget_minutes == budget
    in_one_go = run_studies(studies, two, tmp_path / "whole", budget_minutes=budget)
    assert whole.findings == in_one_go.findings
    plans = []
    run_studies(studies, two, tmp_path / "part", budget_minutes=0.1, on_estimate=plans.append)
    assert [(plan.finished, plan.left_out) for plan in plans] == [(True, ())]


def test_two_seeds_are_missed_because_of_the_budget(material, tmp_path):
    two = replace(material, grid=Grid((1e-3, 1e-2), (0, 1)))
    (finding,) = run_part([SeedsStudy(("q_proj",), 1)], two, tmp_path, ["q r=1"]).findings
    assert "the time budget left only one: give more minutes (--budget-minutes)" in finding.answer


def test_the_page_counts_every_run():
    """A control has no grid, so that all of its seeds are runs."""
    arms = {
        "a": ArmResult(Arm("a", ("q",)), {0.1: 1.0, 0.2: 2.0, 0.3: 3.0}, 0.2, None, outcomes("a", 5)),
        "b": ArmResult(Arm("b", ("q",)), {}, 0.2, None, outcomes("b", 5)),
    }
    results = SimpleNamespace(estimate=Estimate(1.0, 12, ("a", "b"), (0,)), untouched={}, arms=arms)
    page = report_page(Report((), results, {"model": {}, "training": {}, "arms": []}, 1.0), title="runs")
    assert "12 runs of 2 arms" in page.html()


def outcomes(name, seeds):
    return {seed: Outcome(name, 0.2, seed, 1, 1, 1, 0.1) for seed in range(seeds)}
