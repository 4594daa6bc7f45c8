"""Data at URLs, from a real server."""

import functools
import http.server
import json
import threading

import pytest

from brushstroke.data import cache, read_rows
from brushstroke.errors import DataError

ROWS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(4)]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and the address at which it is served."""
    monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_copied_once_and_again_when_it_changes(served):
    pytest.importorskip("aiohttp")
    folder, address = served
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = read_rows(f"{address}/rows.jsonl")
    assert found.rows == ROWS
    assert (found.name, found.where(2)) == ("rows.jsonl", f"{address}/rows.jsonl, row 2")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    assert read_rows(f"{address}/rows.jsonl").rows == ROWS[::-1]  # this server tells no checksum


def test_other_file_systems_and_their_errors(served):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/here/rows.csv", b"prompt,completion\na,b\n")
    assert read_rows("memory://here/rows.csv").rows == [{"prompt": "a", "completion": "b"}]
    assert len(read_rows("memory://here/rows.csv:3")) == 3
    assert len(cache.entries()) == 1
    memory.pipe_file("/here/rows.csv", b"prompt,completion\na,c\n")
    assert read_rows("memory://here/rows.csv").rows == [{"prompt": "a", "completion": "c"}]
    assert len(cache.entries()) == 2
    for url, reason in (
        ("memory://here/none.csv", "there is no such file"),
        ("memory://here", "there is no such file"),
        ("nothing://a/rows.csv", "nothing"),
        ("http://127.0.0.1:9/rows.jsonl", "rows.jsonl"),
    ):
        with pytest.raises(DataError, match=reason):
            read_rows(url)
