import csv
import json
import subprocess
import sys

import pytest

from brushstroke import hub
from brushstroke.data import read_rows
from brushstroke.errors import DataError

ROWS = [
    {"prompt": "12 Main St", "completion": '{"n": "12"}'},
    {"prompt": "caf\u00e9, \u201cB\u201d\u2028x", "completion": ""},
]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def refused(source, *fragments):
    with pytest.raises(DataError) as caught:
        read_rows(source)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message
    return message


def test_every_format_gives_the_same_rows_and_hash(tmp_path):
    import datasets

    sources = [
        write(tmp_path / "a.jsonl", jsonl(ROWS)),
        str(write(tmp_path / "b.json", json.dumps(ROWS, indent=1))),
        write(tmp_path / "lines.json", jsonl(ROWS)),
        write_csv(tmp_path / "c.csv", ROWS),
        write_parquet(tmp_path / "d.PARQUET", ROWS),
        ROWS,
        tuple(ROWS),
        datasets.Dataset.from_list(ROWS),
    ]
    read = [read_rows(source) for source in sources]
    assert all(rows.rows == ROWS for rows in read)
    assert len({rows.hash for rows in read}) == 1
    assert read[0].name == "a.jsonl"


def test_hash_depends_on_content_and_row_order_not_column_order():
    first = read_rows([{"a": 1, "b": 2}, {"a": 3}])
    assert first.hash == read_rows([{"b": 2, "a": 1}, {"a": 3}]).hash
    assert first.hash != read_rows([{"a": 3}, {"a": 1, "b": 2}]).hash
    assert first.hash != read_rows([{"a": 1, "b": 2}, {"a": 4}]).hash
    assert len(first.hash) == 64


def test_a_folder_is_read_in_the_order_of_names_and_places_are_counted_in_files(tmp_path):
    write(tmp_path / "b.jsonl", '{"text": "3"}\n')
    write_csv(tmp_path / "a.csv", [{"text": "1"}, {"text": "2"}])
    write(tmp_path / "README.md", "not data")
    write(tmp_path / ".hidden.jsonl", "broken")
    rows = read_rows(tmp_path)
    assert [row["text"] for row in rows.rows] == ["1", "2", "3"]
    assert rows.where(2).endswith("a.csv, row 2")
    assert rows.where(3).endswith("b.jsonl, row 1")


def test_a_saved_dataset_folder_is_read_as_such(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read_rows(tmp_path / "saved").rows == ROWS


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = write(tmp_path / "a.jsonl", "\ufeff" + jsonl(ROWS).replace("\n", "\r\n"))
    assert read_rows(path).rows == ROWS


def test_long_csv_fields_are_read_and_the_global_limit_is_put_back(tmp_path):
    limit = csv.field_size_limit()
    long = [{"text": "x" * (limit + 1)}]
    assert read_rows(write_csv(tmp_path / "a.csv", long)).rows == long
    assert csv.field_size_limit() == limit


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n   \n{"text": }\n')
    refused(path, str(path), "line 4", "column 10", "correct")
    path = write(tmp_path / "b.jsonl", '{"text": "a"}\n\n{"text": "b"}\n\n')
    assert len(read_rows(path)) == 2


def test_missing_file_error_suggests_similar_names(tmp_path):
    write(tmp_path / "train.jsonl", jsonl(ROWS))
    refused(tmp_path / "trian.jsonl", "trian.jsonl: no such file", "did you mean 'train.jsonl'")
    refused(str(tmp_path / "nowhere" / "train"), "no such file or folder")


@pytest.mark.parametrize("name", ["no-such-file", "train.jsonl", "./a/b", "data.csv:train", "a/b/c"])
def test_names_that_cannot_be_on_the_hub_are_refused_without_asking_it(name, monkeypatch, tmp_path):
    import datasets

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", asked)
    monkeypatch.chdir(tmp_path)
    refused(name, name, "no such file or folder")


@pytest.mark.parametrize(
    ("name", "split"), [("owner/set", "train"), ("owner/set:test", "test"), ("a:b", "b")]
)
def test_a_hub_name_may_carry_a_split(name, split, monkeypatch, tmp_path):
    import datasets

    before = datasets.are_progress_bars_disabled()  # the command line switches them off for good

    def load(path, *, split):
        assert datasets.are_progress_bars_disabled()
        return datasets.Dataset.from_list([{"text": f"{path} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    rows = read_rows(name)
    assert rows.rows == [{"text": f"{name.split(':')[0]} {split}"}]
    assert rows.where(1) == f"{name.split(':')[0]}:{split}, row 1"
    assert datasets.are_progress_bars_disabled() == before


def test_a_hub_failure_is_one_message(monkeypatch, tmp_path):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no route\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(hub, "_why_unreachable", lambda: "")
    monkeypatch.chdir(tmp_path)
    refused("owner/set", "owner/set", "'train'", "no route", "check the name")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_an_empty_file_is_refused(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", "")
    refused(path, str(path), "empty")


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n")]
)
def test_a_file_without_rows_is_refused(tmp_path, name, text):
    refused(write(tmp_path / name, text), name, "no rows")


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    refused(path, str(path), "line 2", "not UTF-8", "save the file as UTF-8")
    refused(write(tmp_path / "b.csv", "text\nx\n", "utf-16"), "not UTF-8", "iconv -f UTF-16 ")


@pytest.mark.parametrize(
    ("name", "text", "fragments"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', ("line 2", "not valid JSON")),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', ("line 2", "a list", "object")),
        ("a.jsonl", '{"text": "a"}\nnull\n', ("line 2", "null", "object")),
        ("a.jsonl", "[" * 100_000 + "\n", ("line 1",)),
        ("a.json", '[{"text": "a"},\n {"text": "b" }\n {"text": "c"}]', ("line 3", "not valid JSON")),
        ("a.json", '[{"text": "a"}, 5]', ("row 2", "a number (5)")),
        ("a.json", '{"item":\n [{"text": "a"}]}', ("one object", "array")),
        ("a.json", "{oops}", ("line 1", "not valid JSON")),
        ("a.csv", "prompt,completion\na,b\nc,d,e\n", ("row 2 (line 3)", "3 fields", "2")),
        ("a.csv", "prompt,completion\na\n", ("row 1", "1 fields")),
        ("a.csv", 'prompt,completion\na,"b\n', ("line 2", "not valid CSV")),
        ("a.csv", "text,text\na,b\n", ("'text'", "twice")),
        ("a.parquet", "not parquet", ("not a readable Parquet file",)),
        ("a.txt", "hello", ("'.txt'", ".jsonl", "convert")),
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path, name, text, fragments):
    path = write(tmp_path / name, text)
    refused(path, str(path), *fragments)


def test_a_folder_without_data_is_refused(tmp_path):
    write(tmp_path / "notes.md", "x")
    refused(tmp_path, str(tmp_path), "no data file", ".jsonl")


def test_lists_are_checked_row_by_row():
    refused([], "no rows")
    refused([{"text": "a"}, "b"], "row 2", "text", "dict")
    refused([{1: "a"}], "row 1", "column names")
    refused(5, "int", "path")
    refused({"text": ["a"]}, "dict", "list of dicts")


def test_dictionary_of_splits_is_refused():
    import datasets

    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    refused(splits, "'train'", "pass one")


def test_reading_local_files_loads_neither_torch_nor_the_hub(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    program = (
        "import sys; from brushstroke.data import read_rows; read_rows(sys.argv[1]); "
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
