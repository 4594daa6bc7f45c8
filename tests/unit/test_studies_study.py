"""A study's folder and its results as JSON: damage is reported, nearly equal rates stay distinct."""

import json
from types import SimpleNamespace

import pytest
import torch

import training_kit
from brushstroke.base import Base
from brushstroke.errors import ConfigError, OutputError, ResumeError
from brushstroke.studies import Estimate, Grid, IntrinsicStudy, Material, RankStudy, Report, Task, run_studies
from brushstroke.studies.arms import Arm
from brushstroke.studies.runner import ArmResult
from brushstroke.studies.study import _hash_weights
from brushstroke.training import TrainConfig

IDENTITY = {"studies": [], "seeds": [], "arms": []}
PLAN = {"seconds": 1.0, "runs": 4, "arms": ["q r=1"], "seeds": [0], "left_out": []}


@pytest.fixture
def material(llama) -> Material:
    rows = tuple(training_kit.examples(6))
    tasks = {"task": Task("toy", rows[:2], rows[2:4], rows[4:])}
    return Material(Base(llama), tasks, TrainConfig(max_steps=1), Grid((1e-3, 1e-2), (0,)))


@pytest.mark.parametrize(
    "plan", [{"foo": 1}, [1], 3, {**PLAN, "seconds": "x"}, {**PLAN, "arms": 5}, {**PLAN, "seeds": []}]
)
def test_damaged_plan_error_names_the_file_and_next_step(material, tmp_path, plan):
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"identity": IDENTITY, "notes": {"plan": plan}}))
    with pytest.raises(OutputError, match=r"is damaged; start over \(--overwrite\)") as reported:
        run_studies([RankStudy(("q_proj",), (1,))], material, tmp_path)
    assert str(file) in str(reported.value)


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
