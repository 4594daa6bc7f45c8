"""Large data: rows stay in their file, tokens in the cache, and both are equal to those of small data."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import data_tokenizers as have
import numpy as np
import pytest

from brushstroke.data import ChatFormat, cache, encode, encode_rows, hold_out, read_rows
from brushstroke.data.examples import Example
from brushstroke.data.row_files import LineRows
from brushstroke.data.token_arrays import ArrayFiles, TokenArrays, read_arrays
from brushstroke.data.workers import map_in_processes
from brushstroke.errors import DataError
from brushstroke.outputs import size_of


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file counts as large, the cache is empty, and no processes are started."""
    monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LARGE", 0)
    monkeypatch.setattr(encode_rows, "usable_cores", lambda: 1)
    return tmp_path


@pytest.fixture(scope="module")
def chatml() -> Any:
    return have.byte_level(have.CHATML)


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} + {n}?" * (1 + n % 7)},
                {"role": "assistant", "content": f"It is {2 * n}." * (1 + n % 5)},
            ],
            "source": None if n % 3 else "sums",
        }
        for n in range(start, start + count)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n\n".join(map(json.dumps, rows)), "utf-8-sig")  # blank lines, and a byte order mark
    return path


def in_memory(monkeypatch: pytest.MonkeyPatch, path: Path, *args: Any, **options: Any) -> Any:
    with monkeypatch.context() as small:
        small.setattr(cache, "LARGE", 2**40)
        return encode(read_rows(path), *args, **options)


def same(one: Any, other: Any) -> bool:
    return (one.examples, one.report, one.name, one.hash) == (
        other.examples,
        other.report,
        other.name,
        other.hash,
    )


def test_large_data_has_the_tokens_and_the_report_of_small_data(
    large: Path, monkeypatch: pytest.MonkeyPatch, chatml: Any
) -> None:
    path, seen = write_lines(large / "chats.jsonl", chats(2500)), []
    rows = read_rows(path)
    assert isinstance(rows.rows, LineRows)
    monkeypatch.setattr(encode_rows, "usable_cores", lambda: 2)
    first = encode(rows, chatml, on_progress=lambda done, count: seen.append((done, count)))
    small = in_memory(monkeypatch, path, chatml)
    assert same(first, small)
    assert first.examples.hash == small.examples.hash
    assert seen[-1] == (2500, 2500)
    seen.clear()
    again = encode(read_rows(path), chatml, on_progress=lambda done, count: seen.append((done, count)))
    assert same(again, first)
    assert not seen  # the tokens were found
    assert isinstance(again.examples.arrays["tokens"], np.memmap)
    for options in (
        {"max_length": 100, "skip_too_long": True},
        {"split_turns": True},
        {"chat_template": "alpaca"},
    ):
        assert same(
            encode(read_rows(path), chatml, **options), in_memory(monkeypatch, path, chatml, **options)
        )


def test_changed_content_is_read_again(large: Path, chatml: Any) -> None:
    path = write_lines(large / "chats.jsonl", chats(5))
    before = encode(read_rows(path), chatml)
    write_lines(path, chats(5, start=90))
    assert path.stat().st_size
    after = encode(read_rows(path), chatml)
    assert before.hash != after.hash
    assert "90" in chatml.decode(after[0].tokens)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl.gz", "rows.json", "folder"])
def test_other_files_are_written_to_the_cache_as_lines(
    large: Path, monkeypatch: pytest.MonkeyPatch, name: str, chatml: Any
) -> None:
    rows = [{"instruction": f"Say {n}", "input": "x" * (n % 3), "output": f"{n}\u2028é"} for n in range(40)]
    path = large / name
    if name == "folder":
        path.mkdir()
        for part in range(2):
            write_lines(path / f"part-{part}.jsonl", rows[part::2])
    elif name.endswith("csv"):
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith("json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = read_rows(path)
    assert isinstance(found.rows, LineRows)
    assert found.form == "alpaca"
    again = read_rows(path)
    assert (list(again.rows), again.hash, again.where(17)) == (list(found.rows), found.hash, found.where(17))
    assert same(encode(again, chatml), in_memory(monkeypatch, path, chatml))


def test_rows_with_instances_and_held_out_rows_are_the_same(
    large: Path, monkeypatch: pytest.MonkeyPatch, chatml: Any
) -> None:
    rows = [
        {"instruction": f"Do {n}", "instances": [{"input": "a", "output": f"{n}"}] * (1 + n % 3)}
        for n in range(30)
    ]
    path = write_lines(large / "seeds.jsonl", rows)
    stored = hold_out(read_rows(path), 0.2, seed=3)
    with monkeypatch.context() as small:
        small.setattr(cache, "LARGE", 2**40)
        plain = hold_out(read_rows(path), 0.2, seed=3)
    for ours, theirs in zip(stored, plain, strict=True):
        assert list(ours.rows) == list(theirs.rows)
        assert (ours.hash, ours.notes, ours.where(2)) == (theirs.hash, theirs.notes, theirs.where(2))
        assert same(encode(ours, chatml), encode(theirs, chatml))
    kept = len(cache.entries())
    encode(stored[1], chatml)
    assert len(cache.entries()) == kept


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [}', "line 3 is not valid JSON"),
        ("[1]", "line 3 is a list"),
        ('{"prompt": "a", "completion": "b"}', "row 2"),
        ('{"messages": [{"role": "user", "content": 3}]}', "row 2"),
        ('{"instruction": "a", "output": "b"}', "row 2"),
    ],
)
def test_invalid_rows_are_refused_as_in_small_data(
    large: Path, monkeypatch: pytest.MonkeyPatch, chatml: Any, line: str, reason: str
) -> None:
    path = large / "rows.jsonl"
    good = json.dumps(chats(1)[0])
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(DataError, match=reason) as found:
        encode(read_rows(path), chatml)
    with pytest.raises(DataError) as small:
        in_memory(monkeypatch, path, chatml)
    assert str(found.value) == str(small.value)
    assert not any("tokens" in entry.name for entry in cache.entries())


def test_damaged_entries_are_made_again(large: Path, chatml: Any) -> None:
    path = write_lines(large / "chats.jsonl", chats(50))
    whole = encode(read_rows(path), chatml)
    for entry in cache.entries():
        for file in entry.iterdir():
            file.write_bytes(random.Random(file.name).choice((file.read_bytes()[:-1], b"\xff" * 99)))
            assert same(encode(read_rows(path), chatml), whole), file


def test_a_full_cache_forgets_what_was_not_used_for_longest(
    large: Path, monkeypatch: pytest.MonkeyPatch, chatml: Any
) -> None:
    paths = [write_lines(large / f"{n}.jsonl", chats(30, start=100 * n)) for n in range(3)]
    for path in paths[:2]:
        encode(read_rows(path), chatml)
    size = sum(file.stat().st_size for entry in cache.entries() for file in entry.iterdir())
    for entry in cache.entries():
        os.utime(entry, (1, 1))
    encode(read_rows(paths[0]), chatml)  # used now
    monkeypatch.setattr(cache, "LIMIT", 1.2 * size)
    encode(read_rows(paths[2]), chatml)
    assert sum(map(size_of, cache.entries())) <= 1.2 * size
    made: list[int] = []
    encode(read_rows(paths[0]), chatml, on_progress=lambda done, _: made.append(done))
    assert not made
    encode(read_rows(paths[1]), chatml, on_progress=lambda done, _: made.append(done))
    assert made


def test_a_cache_that_cannot_be_written_is_said(
    large: Path, monkeypatch: pytest.MonkeyPatch, chatml: Any
) -> None:
    path = write_lines(large / "chats.jsonl", chats(20))
    (large / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="is read into memory"):
        rows = read_rows(path)
    assert same(encode(rows, chatml), in_memory(monkeypatch, path, chatml))


def test_weights_other_than_0_and_1_are_kept_exactly(tmp_path: Path) -> None:
    plain = [Example((1, 2, 3), (0.0, 1.0, 0.0), 1, {"user": 2}), Example((4,), (0.0,), 2)]
    weighted = [Example((5, 6), (0.0, 0.1), 3, {"tool": 2}, cut=4)]
    files = ArrayFiles(tmp_path)
    for part in (plain, weighted, plain):
        files.append(TokenArrays.of(part))
    files.close()
    found = read_arrays(tmp_path)
    assert list(found) == [*plain, *weighted, *plain]
    assert found == TokenArrays.joined([TokenArrays.of(part) for part in (plain, weighted, plain)])
    assert found[-1] == plain[1]
    with pytest.raises(IndexError):
        found[5]
    assert [example.row for example in found.suspects(5)] == [3]
    assert [example.row for example in TokenArrays.of([Example((), (), 7)]).suspects(None)] == [7]


def test_processes_give_results_in_order_and_raise_what_the_function_raised() -> None:
    assert list(map_in_processes(abs, range(-50, 0), 2)) == list(range(50, 0, -1))
    with pytest.raises(TypeError):
        list(map_in_processes(abs, [1, "a"], 2))
    with pytest.raises(DataError, match="ended unexpectedly"):
        list(map_in_processes(os._exit, [1], 1))


def test_a_killed_command_leaves_no_tokens_and_the_next_one_makes_them(large: Path, chatml: Any) -> None:
    path = write_lines(large / "chats.jsonl", chats(6000))
    chatml.save_pretrained(large / "tokenizer")
    script = (
        "import sys; from brushstroke.data import cache, encode, read_rows; cache.LARGE = 0\n"
        "from transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(large / 'tokenizer')!r})\n"
        "import os\n"
        f"encode(read_rows({str(path)!r}), tokenizer, on_progress=lambda *_: os.kill(os.getpid(), 9))"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert killed.returncode == -signal.SIGKILL
    left = [entry.name for entry in cache.folder().iterdir() if entry.name.startswith(".")]
    assert left
    found = encode(read_rows(path), chatml)
    assert len(found) == 6000
    assert not [entry.name for entry in cache.folder().iterdir() if entry.name.startswith(".")]


def test_a_chat_format_is_the_same_in_another_process(chatml: Any) -> None:
    import pickle

    chat = ChatFormat(chatml)
    again = pickle.loads(pickle.dumps(chat))
    assert again.identity() == chat.identity()
    assert again.prompt_tokens("hello") == chat.prompt_tokens("hello")
    assert (again.template, again.stop_texts) == (chat.template, chat.stop_texts)


def overwrite(path: Path, text: str) -> None:
    """Write into the same file, as an editor or a script does that does not rename."""
    with path.open("r+") as file:
        file.write(text)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def test_a_file_that_changes_while_it_is_read_is_refused(large: Path, chatml: Any) -> None:
    path, old, new = large / "chats.jsonl", chats(2100), chats(2100)
    for row in new:
        row["messages"][1]["content"] = row["messages"][1]["content"].replace("It", "He")
    write_lines(path, old)
    texts = ["\ufeff" + "\n\n".join(map(json.dumps, rows)) for rows in (old, new)]
    whole = encode(read_rows(path), chatml)
    for entry in cache.entries():
        cache.remove(entry)
    rows = read_rows(path)
    with pytest.raises(DataError, match="was changed while it was read"):
        encode(rows, chatml, on_progress=lambda *_: overwrite(path, texts[1]))
    with pytest.raises(DataError, match="was changed"):
        encode(rows, chatml)
    overwrite(path, texts[0])
    assert same(encode(read_rows(path), chatml), whole)


def test_tokens_of_other_tokenizers_and_options_are_not_found(large: Path) -> None:
    chatml = have.byte_level(have.CHATML)  # of this test alone, which changes it
    path = write_lines(large / "chats.jsonl", chats(10))
    made: list[int] = []

    def tokens(tokenizer: Any, **options: Any) -> Any:
        return encode(read_rows(path), tokenizer, on_progress=lambda done, _: made.append(done), **options)

    tokens(chatml)
    chatml.split_special_tokens = True
    tokens(chatml)
    assert made == [10, 10]
    chatml.split_special_tokens = False
    schemas = [{"name": "f", "description": "d"}, {"description": "d", "name": "f"}]
    keys = {str(encode_rows.cache.key_of([schema])) for schema in schemas}
    assert len(keys) == 2
    kept = len(cache.entries())

    class Own(type(chatml)):  # type: ignore[misc]
        pass

    other = Own(tokenizer_object=chatml.backend_tokenizer, chat_template=chatml.chat_template)
    assert ChatFormat(other).identity() is None
    encode(read_rows(path), other)
    chatml.apply_chat_template = lambda *args, **kwargs: type(chatml).apply_chat_template(
        chatml, *args, **kwargs
    )
    encode(read_rows(path), chatml)
    assert len(cache.entries()) == kept


def test_tokens_stay_in_memory_where_they_cannot_be_kept(
    large: Path, monkeypatch: pytest.MonkeyPatch, chatml: Any
) -> None:
    path = write_lines(large / "chats.jsonl", chats(20))
    rows = read_rows(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArrayFiles, "append", full)
    with pytest.warns(UserWarning, match="stay in memory, because cannot write .*No space left"):
        found = encode(rows, chatml)
    assert len(found) == 20


def test_without_processes_the_rows_are_encoded_in_this_one(
    large: Path, monkeypatch: pytest.MonkeyPatch, chatml: Any
) -> None:
    path = write_lines(large / "chats.jsonl", chats(20))
    small = in_memory(monkeypatch, path, chatml)
    monkeypatch.setattr(encode_rows, "usable_cores", lambda: 2)
    for executable in ("/nothing", "", None):
        monkeypatch.setattr(sys, "executable", executable)
        monkeypatch.setenv("PATH", "")
        assert same(encode(read_rows(path), chatml), small)
        for entry in cache.entries():
            cache.remove(entry)
    assert list(map_in_processes(lambda value: value + 1, [1, 2], 2)) == [2, 3]  # a lambda cannot be pickled


def test_examples_without_a_trained_token_are_refused_again(chatml: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [{"role": "user", "content": "x"}]}]
    data = encode([rows[1]], chatml, need_trained=False)
    with pytest.raises(DataError, match="row 1"):
        encode(data, chatml)
    data = encode([rows[0]], chatml)
    assert encode(data, chatml) is data


def test_capital_endings_and_unreadable_files(
    large: Path, monkeypatch: pytest.MonkeyPatch, chatml: Any
) -> None:
    packed = large / "ROWS.JSONL.GZ"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, chats(5))).encode()))
    assert same(encode(read_rows(packed), chatml), in_memory(monkeypatch, packed, chatml))

    def unreadable(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("brushstroke.data.row_files.file_sum", unreadable)
    with pytest.raises(DataError, match=r"ROWS\.JSONL\.GZ: cannot be read \(Permission denied\)"):
        read_rows(packed)


def test_rows_are_read_after_their_entry_was_removed(large: Path, chatml: Any) -> None:
    path = large / "rows.csv"
    path.write_text("prompt,completion\n" + "a,b\n" * 9)
    rows = read_rows(path)
    for entry in cache.entries():
        cache.remove(entry)
    assert len(encode(rows, chatml)) == 9
