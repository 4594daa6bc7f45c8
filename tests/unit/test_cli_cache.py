import json

from brushstroke.cli.app import main
from brushstroke.samples.assets import LABELLED


def test_the_cache_is_listed_and_cleared_by_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path))
    assert main(["cache", "--json"]) == 0
    assert [part["entries"] for part in json.loads(capsys.readouterr().out)["parts"]] == [0, 0, 0, 0]
    kept = tmp_path / "gguf" / f"{'0' * 32}-float32"
    kept.mkdir(parents=True)
    (kept / "weights").write_bytes(b"x" * 1000)
    (tmp_path / "data" / f"tokens-{'0' * 32}").mkdir(parents=True)
    (tmp_path / "data" / f"tokens-{'0' * 32}" / "tokens.i4").write_bytes(b"x" * 7)
    (tmp_path / "data" / "mine.txt").write_text("mine")
    (tmp_path / "directions").mkdir()
    (tmp_path / "directions" / "a.directions").write_bytes(b"x" * 10)
    LABELLED["people"].path.parent.mkdir()
    LABELLED["people"].path.write_bytes(b"x" * 5)
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "gguf" / "notes").mkdir()
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "models read from GGUF files" in shown
    assert str(tmp_path) in shown.replace("\n", "")
    assert main(["cache", "--clear", "gguf", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cleared_bytes"] == 1000
    assert {part["part"]: part["bytes"] for part in found["parts"]} == {
        "data": 7,
        "gguf": 0,
        "directions": 10,
        "samples": 5,
    }
    assert not kept.exists()
    assert main(["cache", "--clear", "all"]) == 0
    assert "removed 22 B" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "data",
        "gguf",
        "mine.txt",
        "notes",
        "thesis.txt",
    ]


def test_an_unknown_part_is_refused(capsys):
    assert main(["cache", "--clear", "everything"]) == 2
    assert "gguf" in capsys.readouterr().err
