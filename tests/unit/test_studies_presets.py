"""The presets: what they plan, and that the tiny one runs from nothing to its findings."""

import pytest

from brushstroke.studies import presets, run_studies, smollm2_paper, tiny, tiny_paper


@pytest.mark.slow
def test_the_tiny_preset_trains_its_model_and_answers_every_question(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "STEPS", 30)
    monkeypatch.setattr(presets, "STEPS", 4)
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


def test_the_tiny_tasks_share_no_32_bytes_between_what_is_learnt_and_what_is_held_out():
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
