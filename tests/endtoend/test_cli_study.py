"""`study`: every question on a tiny base through the command line; kills, refusals, files."""

import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from cli_kit import ENVIRONMENT, PLAIN, Done, files_in, rows, start, write_rows

SMALL = ("--max-steps", "4", "--batch-size", "4", *PLAIN)
GRID = ("--learning-rates", "1e-3,1e-2,1e-1", "--seeds", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("study") / "rows.jsonl", rows(40))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("study") / "others.jsonl", rows(40, "Elm"))


def results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


def without_clock(reported):
    """The results but for the seconds."""
    if isinstance(reported, dict):
        skipped = ("seconds", "command", "estimate")
        return {key: without_clock(value) for key, value in reported.items() if key not in skipped}
    return [without_clock(part) for part in reported] if isinstance(reported, list) else reported


QUESTIONS = {
    "rank": ("--targets", "q_proj,v_proj", "--ranks", "1,2,4"),
    "seeds": ("--targets", "q_proj,v_proj", "--rank", "2"),
    "targets": ("--sets", "q_proj,v_proj,q_proj+v_proj", "--rank", "2"),
    "delta": ("--targets", "q_proj", "--ranks", "1,2"),
    "intrinsic": ("--targets", "q_proj", "--dimensions", "4,16"),
}


@pytest.mark.slow
def test_rounding_measures_every_form_by_rate_and_steps(cli, tiny, data, tmp_path):
    flags = ("--ranks", "2", "--steps", "1,6", "--learning-rates", "1e-2,1e-1", "--seeds", "2")
    words = ("study", "rounding", tiny, data, *flags, "--batch-size", "4", *PLAIN, "--out", tmp_path / "out")
    done = cli(*words)
    assert done.status == 0, done.err
    (finding,) = results(tmp_path / "out")["findings"]
    arms = finding["data"]["arms"]
    assert [(arm["rate"], arm["steps"]) for arm in arms] == [(0.01, 1), (0.01, 6), (0.1, 1), (0.1, 6)]
    strong = arms[-1]
    assert all(gain > 0.03 for gain in strong["gain"])
    for form in ("attached", "merged stochastically"):
        assert 0.9 < strong["share"][form]["mean"] < 1.1
    assert finding["answer"] in done.out
    again = cli(*words, "--reread")
    assert again.status == 0, again.err
    assert results(tmp_path / "out")["findings"][0]["data"] == finding["data"]


TWO_RANKS = ("--targets", "q_proj", "--ranks", "1,2")


class Finished(NamedTuple):
    """A study that is done: its folder, the words of its command but for --out, and what that wrote."""

    out: Path
    words: tuple
    done: Done

    def copy(self, out):
        """Another folder with the same files."""
        return Path(shutil.copytree(self.out, out))


@pytest.fixture(scope="module")
def studies():
    return {}


@pytest.fixture
def finished(cli, tiny, data, others, studies, tmp_path_factory):
    """Runs a study, once in this file; a test that changes it takes a copy."""

    def study(question, flags=None):
        key = question, flags
        if key not in studies:
            extra = {"seeds": ("--other", others), "delta": ("--general", others)}.get(question, ())
            words = ("study", question, tiny, data, *SMALL, *GRID, *(flags or QUESTIONS[question]), *extra)
            out = tmp_path_factory.mktemp("finished") / "out"
            done = cli(*words, "--out", out)
            assert done.status == 0, done.err
            studies[key] = Finished(out, words, done)
        return studies[key]

    return study


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
def test_study_writes_answer_page_and_numbers(finished, question):
    out, _, done = finished(question)
    reported = results(out)
    (finding,) = reported["findings"]
    assert finding["answer"] in done.out
    page = (out / "report.html").read_text("utf-8")
    assert finding["question"] in page.replace("&#x27;", "'")
    assert len(page) < 5_000_000
    for name, found in reported["arms"].items():
        assert found["conclusive"] == (found["chosen"] is not None and found["edge"] is None), name
        assert len(found["outcomes"]) == (3 if found["conclusive"] else bool(found["chosen"]))


@pytest.mark.slow
def test_a_killed_study_repeats_nothing_and_ends_with_the_same_numbers(finished, tmp_path):
    whole, words, _ = finished("rank", TWO_RANKS)
    killed = start(*words, "--out", tmp_path / "killed")
    runs = tmp_path / "killed" / "runs"
    end = time.monotonic() + 120
    while len(list(runs.glob("*/outcome.json"))) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = {file: file.stat().st_mtime_ns for file in runs.glob("*/outcome.json")}
    assert len(before) >= 3
    assert not (tmp_path / "killed" / "results.json").exists()
    again = start(*words, "--out", tmp_path / "killed")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert without_clock(results(tmp_path / "killed")) == without_clock(results(whole))


@pytest.mark.slow
@pytest.mark.parametrize("finished", [0, 1], ids=["while-workers-start", "during-runs"])
def test_ctrl_c_ends_the_workers_too(tiny, data, tmp_path, finished):
    """A terminal sends it to every process of the group."""
    out = tmp_path / "out"
    words = ("study", "rank", tiny, data, *SMALL[2:], *GRID, "--targets", "q_proj", "--ranks", "1,2")
    study = start(*words, "--max-steps", "200", "--workers", "2", "--out", out)
    end = time.monotonic() + 120
    while not _planned(out) or len(list(out.glob("runs/*/outcome.json"))) < finished:
        assert study.poll() is None, study.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(study.pid, signal.SIGINT)
    _, err = study.communicate(timeout=60)
    assert study.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("interrupted")
    end = time.monotonic() + 20
    while _is_alive(study.pid):  # the helper of multiprocessing ends a moment later
        assert time.monotonic() < end
        time.sleep(0.05)


def _is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _planned(out):
    """Whether the untouched model is scored: the runs come next."""
    file = out / "study.json"
    return file.is_file() and "untouched" in json.loads(file.read_text("utf-8"))["notes"]


@pytest.mark.slow
def test_runs_in_processes_give_the_same_numbers_in_any_order(finished, tmp_path):
    """The numbers of two workers are those of a study without workers."""
    whole, words, _ = finished("rank", TWO_RANKS)
    process = start(*words, "--workers", "2", "--out", tmp_path / "two")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert without_clock(results(tmp_path / "two")) == without_clock(results(whole))


@pytest.mark.slow
def test_figures_as_files(cli, tiny, data, tmp_path):
    out = tmp_path / "out"
    words = ("study", "rank", tiny, data, "--out", out, *SMALL, "--seeds", "2", "--ranks", "1,2")
    words = (*words, "--targets", "q_proj", "--learning-rates", "1e-4,1e-2,1")
    done = cli(*words, "--png", "--csv", "--latex")
    assert done.status == 0, done.err
    pictures = [name for name in files_in(out) if name.endswith(".png")]
    assert pictures
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    drawings = {name for name in files_in(out) if name.endswith(".svg")}
    assert drawings == {name.replace(".png", ".svg") for name in pictures}
    spectra = (out / "figures" / "spectra-layer-0-q_proj.svg").read_text("utf-8")
    assert "layer 0, q_proj" in spectra
    assert "σᵢ/σ₁ of ΔW" in spectra
    tables = {name for name in files_in(out) if name.startswith("tables/")}
    assert {name.removesuffix(".csv") for name in tables if name.endswith(".csv")} == {
        name.removesuffix(".tex") for name in tables if name.endswith(".tex")
    }
    question = "What-rank-is-enough-and-is-the-update-of-low-rank"
    assert {"tables/learning-rates.csv", f"tables/{question}-1.tex"} < tables
    page = (out / "report.html").read_text("utf-8")
    table = list(csv.reader(io.StringIO((out / "tables" / "learning-rates.csv").read_text("utf-8"))))
    assert {"arm", "0.0001", "0.01", "1", "chosen"} <= {*table[0]}
    assert all(f"<td>{row[0]}</td>" in page for row in table[1:])
    (out / "tables" / "mine.csv").write_text("mine")
    assert cli(*words, "--overwrite").status == 0
    assert {name for name in files_in(out) if name.startswith("tables/")} == {"tables/mine.csv"}


AT_ONCE = {  # wrong input that needs no model: words → message
    "rank": "expected a base and data: brushstroke study rank BASE DATA --out DIR",
    "paper BASE DATA --tiny": "paper --tiny has its own model, data and settings; leave out BASE and DATA\n",
    "paper BASE --tiny --max-steps 3": "settings; leave out BASE, --max-steps\n",
    "rank NONE DATA": "there is no file or folder",
    "rank BASE NONE": "none.jsonl",
    "rank BASE DATA --test NONE": "none.jsonl",
    "rank BASE DATA --prompt question": "question",
    "rank BASE DATA --margin nan": "--margin must be a finite number above 0",
    "rank BASE DATA --budget-minutes 0": "--budget-minutes must be a finite number above 0",
    "rank BASE DATA --ranks 0,4": "rank must be a whole number of at least 1; got 0",
    "delta BASE DATA --ranks=4,-1": "rank must be a whole number of at least 1; got -1",
    "seeds BASE DATA --rank 0": "rank must be a whole number of at least 1; got 0",
    "intrinsic BASE DATA --dimensions 0": "dimension must be a whole number of at least 1; got 0",
    "intrinsic BASE DATA --dimensions=10,-3": "dimension must be a whole number of at least 1; got -3",
    "intrinsic BASE DATA --dimensions 1.5": "--dimensions expects numbers separated by commas; got '1.5'",
    "rounding BASE DATA --steps 1,0": "--steps must be a whole number of at least 1; got 0",
    "rounding BASE DATA --max-steps 3": "the length of these runs is set by --steps; leave out --max-steps",
    "rank BASE DATA --steps 3": "--steps is for rounding, not for rank; leave it out",
    "targets BASE DATA --budget 0": "--budget must be a whole number of at least 1; got 0",
    "targets BASE DATA --sets ,": "--sets is empty",
    "targets BASE DATA --sets q_proj": "give at least two (--sets)",
    "targets BASE DATA --sets q_proj,q_proj": "the same matrices: q_proj and q_proj; leave out one of them",
    "targets BASE DATA --sets k_proj,q_proj+v_proj,v_proj+q_proj": "q_proj+v_proj and v_proj+q_proj;",
    "seeds BASE DATA --other DATA": "the other data: every row is in the task's data too",
    "delta BASE DATA --general DATA": "the general text: every row is in the task's data too",
    "rank BASE DATA --alpha nan": "--alpha must be a finite number",
    "rank BASE DATA --learning-rates 1e-3": "at least two learning rates",
    "rank BASE DATA --learning-rates nan,1": "must be finite numbers above 0",
    "rank BASE DATA --seeds 0": "--seeds must be a whole number of at least 1",
    "paper --tiny --workers=-1": "--workers must be a whole number of at least 1",
    "rank BASE DATA --max-steps 0": "--max-steps must be a whole number of at least 1",
    "rank BASE DATA --batch-size 0": "--batch-size must be a whole number of at least 1",
    "rank BASE DATA --epochs 0": "--epochs must be a finite number above 0",
    "rank BASE DATA --reread": "contains no study to read again",
}


def before_torch(words, out, named):
    """Runs a study that is refused: its message, after a check that torch was not loaded."""
    program = (
        "import sys; from brushstroke.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "study", *(named.get(word, word) for word in words.split())]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.split() in (["1", "False"], ["2", "False"]), done.stderr
    return Done(1, "", done.stderr).error


@pytest.mark.parametrize("words", AT_ONCE)
def test_wrong_input_is_refused_before_torch_is_loaded(tiny, data, tmp_path, words):
    named = {"BASE": str(tiny), "DATA": str(data), "NONE": str(tmp_path / "none.jsonl")}
    assert AT_ONCE[words] in before_torch(words, tmp_path / "out", named) + "\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "file is a file; name a folder"),
        ("file/out", "file is a file; name a folder"),
        ("/proc/none/out", "cannot write /proc/none/out"),
    ],
)
@pytest.mark.parametrize("words", ["rank BASE DATA", "paper --tiny"])
def test_folder_that_cannot_be_written_is_refused_before_torch_is_loaded(
    tiny, data, tmp_path, words, out, message
):
    (tmp_path / "file").write_text("mine")
    assert message in before_torch(words, tmp_path / out, {"BASE": str(tiny), "DATA": str(data)})


EVERY_KIND = ["rank BASE DATA", "paper BASE DATA", "paper --smollm2"]
EVERY_KIND += ["paper --tiny", "intrinsic --tiny", "rounding --tiny"]


def study_json(**identity):
    """study.json of a study that has a plan."""
    return json.dumps({"identity": {"arms": [], **identity}, "notes": {"plan": {}}})


@pytest.mark.parametrize("words", EVERY_KIND)
@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({"mine.txt": "mine"}, "", "is not empty; choose another folder"),
        ({"study.json": '{"my": 1}'}, "", "was not written by a study"),
        ({"study.json": study_json(studies=["delta"], seeds=[0])}, "", "(studies: now"),
        ({"study.json": study_json(studies=["delta"], seeds=[0])}, " --reread", "(studies: now"),
        ({"mine.txt": "mine"}, " --reread", "contains no study to read again"),
        ({}, " --reread", "contains no study to read again"),
    ],
)
def test_folder_of_something_else_is_refused_before_torch_is_loaded(
    tiny, data, tmp_path, words, files, flags, message
):
    (tmp_path / "base").mkdir()  # of a study with --tiny
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert message in before_torch(words + flags, tmp_path, {"BASE": str(tiny), "DATA": str(data)})
    assert {name: (tmp_path / name).read_text() for name in files_in(tmp_path)} == files


@pytest.mark.parametrize("flags", ["", " --reread"])
def test_study_of_another_model_is_refused_before_the_small_one_is_trained(tmp_path, flags):
    """`paper` of the user's model in that folder has the same questions and seeds."""
    studies = {"studies": ["targets", "rank", "seeds", "delta"], "seeds": [0, 1, 2, 3, 4]}
    (tmp_path / "study.json").write_text(study_json(**studies))
    assert "/base, which is missing" in before_torch("paper --tiny" + flags, tmp_path, {})
    assert files_in(tmp_path) == {"study.json"}


HOLD = (
    "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_SH); print(flush=True); input()"
)


@pytest.mark.parametrize("words", ["rank BASE DATA", "paper --tiny"])
def test_folder_of_a_running_study_is_refused_with_its_process(cli, tiny, data, tmp_path, monkeypatch, words):
    monkeypatch.setattr("brushstroke.outputs.lock.PATIENCE", 0.1)
    named = {"BASE": tiny, "DATA": data}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        done = cli("study", *(named.get(word, word) for word in words.split()), "--out", tmp_path)
        holder.communicate("\n")
    assert done.status == 1
    assert (
        f"another run is writing to {tmp_path}, or another process is reading it (process {holder.pid})"
        in done.error
    )
    assert not files_in(tmp_path)


@pytest.mark.slow
def test_budget_of_a_preset_advises_only_flags_that_it_takes(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("brushstroke.studies.tiny.STEPS", 1)
    words = ("study", "paper", "--tiny", "--workers", "1", "--budget-minutes", "0.00001")
    done = cli(*words, "--out", tmp_path / "out")
    assert done.status == 2
    assert done.error.endswith("give more minutes (--budget-minutes)")


BAD = [
    (("rank",), "expected a base and data: brushstroke study rank BASE DATA --out DIR"),
    (("paper",), "expected a base and data: brushstroke study paper BASE DATA --out DIR"),
    (("paper", "--tiny", "--general", "DATA"), "leave out --general"),
    (("paper", "BASE", "DATA", "--alpha", "8"), "--alpha is for rank and seeds and targets"),
    (("rank", "BASE", "DATA", "--other", "DATA"), "--other is for seeds and paper, not for rank"),
    (("rank", "BASE", "DATA", "--learning-rates", "1e-3"), "at least two learning rates"),
    (("rank", "BASE", "DATA", "--targets", "q_proj", "--ranks", "999"), "give smaller ranks"),
    (("seeds", "BASE", "DATA", "--targets", "q_proj", "--rank", "999"), "is larger than"),
    (("intrinsic", "BASE", "DATA", "--dimensions", "10,999999999"), "a subspace of 999,999,999 dimensions"),
    (("paper", "--tiny", "BASE", "DATA"), "has its own model, data and settings; leave out BASE and DATA"),
    (("paper", "--tiny", "--max-steps", "3"), "leave out --max-steps"),
    (
        ("paper", "--smollm2", "BASE"),
        "--smollm2 has its own model, data and settings; leave out",
    ),
    (("rank", "BASE", "DATA", "--smollm2"), "--smollm2 is for paper"),
    (("paper", "--smollm2", "--tiny"), "give --tiny or --smollm2, not both"),
    (("rank", "BASE", "DATA", "--dimensions", "3"), "--dimensions is for intrinsic, not for rank"),
    (("rank", "BASE", "DATA", "--ranks", "1,x"), "--ranks expects numbers separated by commas; got '1,x'"),
    (("rank", "BASE", "DATA", "--ranks", "0"), "rank must be a whole number of at least 1; got 0"),
    (("rank", "BASE", "DATA", "--targets", "q_porj"), "matches no site"),
    (("rank", "BASE", "DATA", "--learning-rates", "0,1"), "must be finite numbers above 0"),
    (("rank", "BASE", "DATA", "--seeds", "0"), "--seeds must be a whole number of at least 1"),
    (("targets", "BASE", "DATA", "--rank", "2", "--budget", "9"), "give --rank or --budget, not both"),
    (("targets", "BASE", "DATA", "--budget", "3"), "no set of matrices meets a budget of 3 parameters"),
    (("seeds", "BASE", "DATA", "--tiny"), "--tiny is for paper"),
    (("rank", "BASE", "FEW"), "too few rows for training, validation and test ("),
    (("rank", "BASE", "DATA", "--budget-minutes", "0.00001"), "one arm takes about"),
    (("rank", "BASE", "DATA", "--budget-minutes", "nan"), "--budget-minutes must be a finite number above 0"),
    (("rank", "BASE", "DATA", "--workers", "-1"), "--workers must be a whole number of at least 1"),
    (("rank", "BASE", "DATA", "--learning-rates", "inf,1"), "must be finite numbers above 0"),
    (("seeds", "BASE", "DATA", "--other", "DATA"), "the other data: every row is in the task's data too"),
    (("delta", "BASE", "DATA", "--general", "DATA"), "the general text: every row is in the task's"),
    (("targets", "BASE", "DATA", "--budget", "0"), "--budget must be a whole number of at least 1; got 0"),
    (("targets", "BASE", "DATA", "--sets", ""), "--sets is empty"),
    (("rank", "BASE", "DATA", "--ranks", ","), "--ranks is empty"),
    (("rank", "BASE", "DATA", "--learning-rates", ""), "--learning-rates is empty"),
    (("intrinsic", "BASE", "DATA", "--dimensions", ""), "--dimensions is empty"),
    (("intrinsic", "BASE", "DATA", "--rank", "4"), "they have no rank and no alpha; leave these out"),
    (("rank", "BASE", "DATA", "--margin", "0"), "--margin must be a finite number above 0"),
    (
        ("targets", "BASE", "DATA", "--margin", "nan"),
        "--margin must be a finite number above 0",
    ),
    (("seeds", "BASE", "DATA", "--margin", "1"), "--margin is for rank and targets, not for seeds"),
    (("rank", "BASE", "DATA", "--reread"), "contains no study to read again; leave out --reread"),
    (("paper", "--tiny", "--reread"), "contains no study to read again; leave out --reread"),
    (("rank", "BASE", "DATA", "--reread", "--overwrite"), "give --reread or --overwrite, not both"),
    (("paper", "--tiny", "--seeds", "0"), "--seeds must be a whole number of at least 1"),
    (("paper", "--tiny", "--budget-minutes", "nan"), "--budget-minutes must be a finite number above 0"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_error_is_one_message_and_leaves_no_files(cli, tiny, data, tmp_path, words, message):
    few = write_rows(tmp_path / "few.jsonl", rows(2))
    named = {"BASE": tiny, "DATA": data, "FEW": few}
    done = cli("study", *(named.get(word, word) for word in words), "--out", tmp_path / "out")
    assert done.status in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [(), ("--reread",)])
@pytest.mark.parametrize("other", [{"studies": ["seeds"]}, {"seeds": [0]}], ids=["question", "seeds"])
def test_folder_of_another_study_is_refused_before_the_model_is_loaded(
    cli, tiny, data, tmp_path, monkeypatch, flags, other
):
    monkeypatch.setattr("brushstroke.cli.study.load", lambda *_: pytest.fail("loaded"))
    identity = {"studies": ["rank"], "seeds": [0, 1, 2], "arms": [], **other}
    stored = {"identity": identity, "notes": {"plan": {}}}
    (tmp_path / "study.json").write_text(json.dumps(stored))
    done = cli("study", "rank", tiny, data, "--out", tmp_path, *flags)
    assert done.status == 1
    assert f"holds another study ({next(iter(other))}: now" in done.error


@pytest.mark.slow
def test_report_of_seeds_explains_a_smaller_rank_than_asked_for(cli, tiny, data, tmp_path):
    words = ("--out", tmp_path / "out", *SMALL, *GRID[:2], "--seeds", "2", "--rank", "18")
    done = cli("study", "seeds", tiny, data, *words)
    assert done.status == 0, done.err
    (finding,) = results(tmp_path / "out")["findings"]
    assert any(note.startswith("Tested up to φ(16, 16), not φ(18, 18): ") for note in finding["notes"])


@pytest.mark.slow
def test_study_continues_with_other_workers_and_budget(cli, tiny, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ("study", "rank", tiny, data, "--out", out, *SMALL, *GRID, "--targets", "q_proj", "--ranks", "1")
    assert cli(*words, "--no-whole").status == 0
    before = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/outcome.json")}
    again = cli(*words, "--no-whole", "--workers", "2", "--budget-minutes", "60")
    assert again.status == 0, again.err
    assert {file: file.stat().st_mtime_ns for file in out.glob("runs/*/outcome.json")} == before
    assert "the study has all its runs; --budget-minutes is ignored" in again.err
    assert "if none is done yet" not in again.err
    next(out.glob("runs/*/outcome.json")).unlink()
    monkeypatch.setattr(sys, "argv", ["brushstroke", *map(str, words), "--budget-minutes", "60"])
    missing = cli(*words, "--no-whole", "--budget-minutes", "60")
    assert missing.status == 0, missing.err
    assert "the study continues with its existing plan; --budget-minutes is ignored" in missing.err
    assert results(out)["command"] == shlex.join(["brushstroke", *map(str, words)])
    other = cli(*words)  # with the arm that trains W itself
    assert other.status == 1
    assert "holds another study (arms:" in other.error


@pytest.mark.slow
def test_finished_runs_are_read_again_and_nothing_is_trained(cli, finished, tmp_path):
    out = finished("targets").copy(tmp_path / "out")
    words = (*finished("targets").words, "--out", out)
    runs = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*.json")}
    before = results(out)
    assert len([file for file in runs if file.name == "test_rows.json"]) == len(runs) / 2
    again = cli(*words, "--reread")
    assert again.status == 0, again.err
    assert {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*.json")} == runs
    assert without_clock(results(out)) == without_clock(before)
    (finding,) = before["findings"]
    compared = finding["data"]["comparison"]
    assert (compared["procedure"], compared["seeds"], compared["margin"]) == ("Tukey", [0, 1, 2], 0.01)
    assert all(one["on_new_rows"]["high"] > one["difference"]["high"] for one in compared["differences"])
    assert any("a margin stated before the runs" in note for note in finding["notes"])


@pytest.mark.slow
def test_reread_of_older_runs_claims_nothing_about_new_rows(cli, finished, tmp_path, monkeypatch):
    """They kept no losses of single rows, stated no margin, and compared the base by a weaker hash."""
    out = finished("targets").copy(tmp_path / "out")
    words = (*finished("targets").words, "--out", out)
    for file in out.glob("runs/*/test_rows.json"):
        file.unlink()
    study = json.loads((out / "study.json").read_text("utf-8"))
    del study["notes"]["margins"]
    study["identity"]["base"] = "older"
    monkeypatch.setattr("brushstroke.studies.study._hash_sample", lambda _: "older")
    (out / "study.json").write_text(json.dumps(study))
    again = cli(*words, "--reread", "--margin", "0.5")
    assert again.status == 0, again.err
    assert "the base was compared with that of the runs by the hash of an older" in again.err.lower()
    assert "by the hash of an older version" in (out / "report.html").read_text("utf-8")
    (finding,) = results(out)["findings"]
    assert all(one["on_new_rows"] is None for one in finding["data"]["comparison"]["differences"])
    assert any("speak of these test rows only" in note for note in finding["notes"])
    assert any("less than 0.5 nats" in note and "after the runs" in note for note in finding["notes"])
    next(out.glob("runs/*/outcome.json")).unlink()
    done = cli(*words, "--reread")
    assert done.status == 1
    assert "this study has 1 unfinished run, such as" in done.error


@pytest.mark.parametrize("content", ['{"my": 1}', "[1]", "not json"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("preset", [True, False])
def test_foreign_study_json_is_not_changed(cli, tiny, data, tmp_path, content, overwrite, preset):
    (tmp_path / "runs").mkdir()
    for name, text in (("study.json", content), ("runs/p.txt", "mine"), ("report.html", "mine")):
        (tmp_path / name).write_text(text)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    words = ("paper", "--tiny") if preset else ("rank", tiny, data)
    done = cli("study", *words, "--out", tmp_path, *overwrite)
    assert done.status == 1
    assert "study.json" in done.error
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before


def test_tiny_preset_refuses_a_foreign_model(cli, tmp_path):
    (tmp_path / "base").mkdir()
    done = cli("study", "paper", "--tiny", "--out", tmp_path)
    assert done.status == 1
    assert "holds another model than the one that this study trains" in done.error
