import pytest
from hypothesis import given
from hypothesis import strategies as st

from brushstroke.data import read_rows
from brushstroke.data.hold_out import hold_out, read_share
from brushstroke.errors import DataError


def rows_of(count, repeats=1):
    return read_rows([{"prompt": f"p{n}", "completion": "c"} for _ in range(repeats) for n in range(count)])


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5), st.integers(1, 3))
def test_the_two_parts_have_all_rows_and_share_none(count, share, seed, repeats):
    rows = rows_of(count, repeats)
    train, held = hold_out(rows, share, seed)
    prompts = [[row["prompt"] for row in part.rows] for part in (train, held)]
    assert not set(prompts[0]) & set(prompts[1])
    assert sorted(prompts[0] + prompts[1]) == sorted(row["prompt"] for row in rows.rows)
    assert len(held) == repeats * min(count - 1, max(1, round(share * count)))
    for part in (train, held):
        for number, row in enumerate(part.rows, start=1):
            place = int(part.where(number).rpartition(" ")[2])
            assert rows.rows[place - 1] is row
        places = [int(part.where(number).rpartition(" ")[2]) for number in range(1, len(part) + 1)]
        assert places == sorted(places)


def test_the_seed_decides_and_the_same_seed_repeats():
    rows = rows_of(40)
    first, again, other = (hold_out(rows, 0.2, seed)[1].hash for seed in (0, 0, 1))
    assert first == again != other


def test_instances_of_one_row_stay_together():
    instances = [{"input": f"{n}", "output": "x"} for n in range(3)]
    rows = read_rows([{"instruction": f"do {k}", "instances": instances} for k in range(6)])
    train, held = hold_out(rows, 0.3, 0)
    assert (len(train), len(held)) == (12, 6)
    assert not {o for o, _ in train.origins} & {o for o, _ in held.origins}
    assert train.notes[-1] == "6 of 18 rows are held out for evaluation (seed 0)"


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(DataError, match="has 1 different row"):
        hold_out(rows_of(1, 5), 0.5)
    with pytest.raises(DataError, match=r"is 1\.5; give a number above 0 and below 1"):
        hold_out(rows_of(4), 1.5)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("0.1", 0.1),
        (".25", 0.25),
        ("10%", 0.1),
        ("2.5%", 0.025),
        ("1", None),
        ("0", None),
        ("100%", None),
        ("a.1", None),
    ],
)
def test_shares_are_numbers_or_per_cent(text, share):
    assert read_share(text) == share
