"""Several sources with weights."""

import json

import data_tokenizers as have
import pytest

from brushstroke.data import cache, encode, hold_out, read_rows
from brushstroke.data.mixture import read_weight
from brushstroke.errors import DataError

PAIRS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(6)]
ALPACA = [{"instruction": f"i{n}", "output": f"o{n}"} for n in range(4)]
ALPACA_AS_PAIRS = [{"prompt": f"i{n}", "completion": f"o{n}"} for n in range(4)]
CHATS = [
    {"messages": [{"role": "user", "content": f"u{n}"}, {"role": "assistant", "content": f"a{n}"}]}
    for n in range(3)
]


@pytest.fixture(params=["small", "large"])
def write(tmp_path, monkeypatch, request):
    if request.param == "large":
        monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(cache, "LARGE", 0)

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_rows_are_repeated_and_halved(write):
    a, b = write("a.jsonl", PAIRS), write("b.jsonl", ALPACA)
    found = read_rows([f"{a}:2", f"{b}:0.5"])
    assert [row["prompt"] for row in found.rows[:12]] == [f"p{n}" for n in range(6)] * 2
    assert len(found) == 14
    assert found.form == "alpaca"
    assert found.where(7) == f"{a}, row 1"
    assert found.where(14).startswith(f"{b}, row ")
    assert found.notes == (
        "a.jsonl: 12 examples of 6 rows (weight 2)",
        "b.jsonl: 2 examples of 4 rows (weight 0.5)",
    )
    assert read_rows([f"{a}:2", f"{b}:0.5"]).hash == found.hash
    assert len(read_rows(f"{a}:1.5")) == 9
    assert len(read_rows([a, b])) == 10


def test_pairs_and_messages_become_messages_with_the_same_tokens(write):
    chatml = have.byte_level(have.CHATML)
    several = [
        *PAIRS,
        {"prompt": [*CHATS[0]["messages"], {"role": "user", "content": "x"}], "completion": "y"},
    ]
    a, b = write("a.jsonl", several), write("b.jsonl", CHATS)
    joined = encode(read_rows([a, b]), chatml)
    apart = [*encode(read_rows(a), chatml), *encode(read_rows(b), chatml)]
    assert [(e.tokens, e.weights) for e in joined] == [(e.tokens, e.weights) for e in apart]
    assert [e.row for e in joined] == list(range(1, 11))


def test_errors_name_the_file_of_the_row(write):
    a, b = write("a.jsonl", PAIRS), write("b.jsonl", [{"prompt": "x", "completion": 3}])
    with pytest.raises(DataError, match=r"b\.jsonl, row 1"):
        encode(read_rows([a, b]), have.byte_level(have.CHATML))
    with pytest.raises(DataError, match="weight is 0"):
        read_rows([a, f"{b}:0"])
    for name, reason in (
        ("none.jsonl:2", "no such file"),
        (f"{a}:2:3", "no such file"),
        (f"{a}:0.01", "takes none"),
    ):
        with pytest.raises(DataError, match=reason):
            read_rows([a, name])


def test_a_file_of_that_name_has_precedence(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl:2", PAIRS)
    assert read_weight("rows.jsonl:2") == ("rows.jsonl:2", 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_equal_rows_are_held_out_together_however_often_they_occur(write, seed):
    a, b = write("a.jsonl", PAIRS), write("b.jsonl", [*PAIRS[:4], *ALPACA_AS_PAIRS])
    for sources in ([f"{a}:2", b], [f"{b}:1.5", a], f"{a}:1.5"):
        sides = hold_out(read_rows(sources), 0.3, seed)
        kept, held = ({row["prompt"] for row in side.rows} for side in sides)
        assert not kept & held
