"""The splits of a study: no row is in two of them."""

import pytest

from brushstroke.base import Base
from brushstroke.errors import DataError
from brushstroke.studies import make_material


def rows(first: int, count: int) -> list[dict]:
    return [{"input_ids": [first + i, 1, 2], "labels": [-100, -100, 2]} for i in range(count)]


def test_the_splits_of_one_data_set_share_no_row_even_where_rows_repeat(llama):
    material = make_material(Base(llama), rows(5, 20) * 3)
    task = material.tasks["task"]
    splits = [{example.tokens for example in part} for part in (task.train, task.validation, task.test)]
    assert [len(part) for part in splits] == [16, 2, 2]
    assert len(set().union(*splits)) == 20
    assert task.repeated == 40
    assert "40 left out that were there twice" in material.description["data"]


def test_named_held_out_rows_are_not_trained(llama):
    material = make_material(Base(llama), rows(5, 20), validation=rows(8, 2), test=rows(20, 10))
    task = material.tasks["task"]
    assert (len(task.train), len(task.validation), len(task.test)) == (13, 2, 10)
    assert task.repeated == 7


def test_validation_and_test_may_not_overlap(llama):
    with pytest.raises(DataError, match="the validation data and the test data share 1 row;"):
        make_material(Base(llama), rows(5, 20), validation=rows(30, 3), test=rows(32, 4))


def test_controls_lose_the_rows_that_the_task_has(llama):
    material = make_material(Base(llama), rows(5, 20), other=rows(20, 15), general=rows(24, 12))
    assert not {e.tokens for e in material.general} & {e.tokens for e in material.tasks["task"].train}
    assert len(material.general) == 1  # ten are the other task's, one the task's
    assert {e.tokens[0] for e in material.tasks["other task"].train} <= set(range(25, 35))


@pytest.mark.parametrize("control", ["other", "general"])
def test_a_control_that_is_the_task_itself_is_refused(llama, control):
    with pytest.raises(DataError, match="every row is in the task's data too"):
        make_material(Base(llama), rows(5, 20), **{control: rows(5, 20)})
