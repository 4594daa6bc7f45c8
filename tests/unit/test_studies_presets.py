"""The presets: their plans, and a complete run of the tiny one."""

import json

import pytest

from brushstroke.base import Base
from brushstroke.cli import study
from brushstroke.data import Example
from brushstroke.errors import ConfigError, OutputError
from brushstroke.outputs import lock
from brushstroke.studies import (
    DeltaStudy,
    Grid,
    Material,
    Task,
    paper_questions,
    presets,
    rounding,
    run_studies,
    smollm2_paper,
    tiny,
    tiny_intrinsic,
    tiny_paper,
    tiny_rounding,
)
from brushstroke.studies.presets import tiny_material
from brushstroke.study_folder import check_folder, locked
from brushstroke.training import TrainConfig
from sampling import WHOLE


@pytest.mark.slow
@pytest.mark.sweep
def test_the_tiny_preset_trains_its_model_and_answers_every_question(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "STEPS", 30)
    monkeypatch.setattr(presets, "STEPS", 4)
    if not WHOLE:
        monkeypatch.setattr(tiny, "SIZES", {"train": 256, "validation": 8, "test": 16})
        monkeypatch.setattr(tiny, "GENERAL", 16)
    studies, material = tiny_paper(tmp_path, seeds=(0, 1))
    report = run_studies(studies, material, tmp_path)
    assert [len(finding.answer) > 0 for finding in report.findings] == [True] * 4
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert {found.arm.name for found in report.results.arms.values()} == {
        arm.name for study in studies for arm in study.arms(material)
    }
    again, _ = tiny_paper(tmp_path, seeds=(0, 1))
    assert run_studies(again, material, tmp_path).results.arms.keys() == report.results.arms.keys()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == runs


def test_tiny_tasks_share_no_32_bytes_between_training_and_held_out_text():
    for task in tiny.tasks().values():
        pieces = [
            {bytes(e.tokens)[i : i + 32] for e in part for i in range(len(e) - 31)}
            for part in (task.train, task.validation, task.test)
        ]
        assert len(task.train) > 1000
        assert not pieces[0] & (pieces[1] | pieces[2])
        assert not pieces[1] & pieces[2]


@pytest.mark.model
@pytest.mark.slow
def test_the_real_preset_compares_every_set_at_one_budget():
    studies, material = smollm2_paper()
    arms = {arm.name: arm for study in studies for arm in study.arms(material)}
    assert studies[0]._found.left_out == {}
    assert {"q r=26", "k r=40", "q,v r=16", "q,k,v,o r=8", "gate,up,down r=5", "all r=3"} <= arms.keys()
    assert {"q,v r=1", "q,v r=4", "q,v r=64", "q,v W itself", "q,v r=16, other task"} <= arms.keys()
    task = material.tasks["task"]
    rows = [example.tokens for part in (task.train, task.validation, task.test) for example in part]
    assert (len(task.train), len(task.validation), len(task.test)) == (800, 32, 48)
    assert len(set(rows)) == len(rows)


def test_the_third_question_has_two_ranks_also_where_the_matrices_are_small(llama):
    row = (Example((1, 2, 3), (0.0, 1.0, 1.0)),)
    material = Material(
        Base(llama), {"task": Task("toy", row, row, row)}, TrainConfig(), Grid((1e-3, 1e-2), (0,))
    )
    for ranks, expected in (((1, 2, 4, 8, 64), (4, 8)), ((1, 2), (1, 2)), ((1, 4, 16, 64), (4, 16))):
        (delta,) = [one for one in paper_questions(material, ranks) if isinstance(one, DeltaStudy)]
        assert delta.ranks == expected
        assert len(delta.arms(material)) == 2


def test_settings_that_cannot_work_are_refused_before_the_model_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "tiny_base", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="at least one seed"):
        tiny_paper(tmp_path / "out", seeds=())
    assert not (tmp_path / "out").exists()


def test_the_tiny_model_is_announced_only_if_it_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "STEPS", 1)
    told = []
    for _ in range(2):
        material = tiny_material(tmp_path, seeds=(0,), on_base=lambda: told.append("training"))
    assert told == ["training"]
    assert material.shorten == ()


def test_the_tiny_model_is_trained_by_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    monkeypatch.setattr(tiny, "tiny_base", lambda *_: pytest.fail("trained"))
    with locked(tmp_path), pytest.raises(OutputError, match="another run is writing"):
        tiny_material(tmp_path, seeds=(0,))


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_damaged_record_of_the_tiny_model_is_refused(tmp_path, content):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "made_by.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(OutputError, match=r"made_by\.json"):
        tiny.tiny_base(tmp_path / "base")


def test_partially_saved_model_is_trained_again(monkeypatch, tmp_path):
    """Interrupted then, nothing is there; after a kill, a hidden folder. The same command makes the base."""

    def killed(self, folder, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "STEPS", 1)
    model = tiny._pretrained(0)
    monkeypatch.setattr(tiny, "_pretrained", lambda seed: model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny.tiny_base(tmp_path / "base")
    assert not list(tmp_path.iterdir())
    (tmp_path / ".base.partial-0123abcd" / "new").mkdir(parents=True)
    check_folder(tmp_path)
    tiny.tiny_base(tmp_path / "base")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("make", [tiny_paper, tiny_intrinsic, tiny_rounding])
def test_folder_of_another_study_is_refused_before_the_model_is_trained(monkeypatch, tmp_path, make):
    monkeypatch.setattr(tiny, "tiny_base", lambda *_: pytest.fail("trained"))
    stored = {"identity": {"studies": [], "seeds": [], "arms": []}, "notes": {}}
    (tmp_path / "study.json").write_text(json.dumps(stored))
    with pytest.raises(OutputError, match="holds another study"):
        make(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["study.json"]


def test_the_command_knows_questions_and_seeds_of_presets_before_torch_is_loaded(llama):
    row = (Example((1, 2, 3), (0.0, 1.0, 1.0)),)
    material = Material(
        Base(llama), {"task": Task("toy", row, row, row)}, TrainConfig(), Grid((1e-3, 1e-2), (0,))
    )
    assert [one.name for one in paper_questions(material)] == study.STUDIES["paper"]
    runs = study.StudyRunOptions()
    for given, expected in (("tiny", presets.SEEDS), ("smollm2", presets.SMOL_SEEDS)):
        options = study.QuestionOptions(**{given: True})
        assert study._seeds("paper", options, runs) == list(expected)
    assert study._seeds("rounding", study.QuestionOptions(), runs) == list(rounding.SEEDS)
