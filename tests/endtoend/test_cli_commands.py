"""`data`, `generate`, `chat`, `evaluate`, `merge` and `show` on an adapter from `train`."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from cli_kit import ENVIRONMENT, PLAIN, files_in, lines_of, rows, start, write_rows
from transformers import AutoModelForCausalLM

import brushstroke as bs
from brushstroke.cli import main


@pytest.fixture(scope="module")
def adapter(tiny, train_rows, tmp_path_factory):
    """Trained until it knows its dozen rows a little."""
    out = tmp_path_factory.mktemp("adapters") / "oak"
    words = ("train", tiny, train_rows, "--out", out, *PLAIN, "--max-steps", "60", "--learning-rate", "2e-2")
    assert main([str(word) for word in words]) == 0
    return out


def test_data_marks_the_trained_tokens(cli, tiny, train_rows):
    done = cli("data", tiny, train_rows, "--rows", "2")
    assert done.status == 0
    assert done.out.count("⟦") == done.out.count("⟧") == 2
    assert '⟦{"n": "1"}<|im_end|>⟧' in done.out
    assert "<|im_start|>user\nSplit 1 Oak St<|im_end|>" in done.out
    reported = json.loads(cli("data", tiny, train_rows, "--rows", "1", "--json").out)
    assert reported["kind"] == "prompt/completion"
    assert reported["rows"] == reported["examples"] == 12
    assert reported["stop_tokens"] == ["<|im_end|>"]
    assert sum(reported["roles"].values()) == reported["real_tokens"]
    lengths = reported["lengths"]
    assert lengths["min"] <= lengths["median"] <= lengths["max"]
    assert lengths["mean"] * 12 == pytest.approx(reported["real_tokens"])
    (example,) = reported["examples_shown"]
    assert [part["trained"] for part in example["parts"]] == [False, True, False]
    for expected in ("by role", "stop token  <|im_end|>", "lengths", "median"):
        assert expected in done.out


def test_data_counts_rows_that_are_left_out_or_cut(cli, tiny, tmp_path):
    given = [*rows(2), {"prompt": "x" * 99, "completion": "b"}, {"prompt": "a", "completion": "y" * 99}]
    data = write_rows(tmp_path / "rows.jsonl", given)
    flags = ("--max-length", "90", "--skip-too-long")
    reported = json.loads(cli("data", tiny, data, *flags, "--json").out)
    assert reported["skipped_rows"] == [3]
    assert reported["cut_rows"] == [4]
    assert "1 rows whose prompt fills the limit" in cli("data", tiny, data, *flags).out


def test_prompts_from_a_file_exclude_the_answers(cli, tiny, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name in ("rows.ndjson", "ROWS.JSONL"):
        data = write_rows(tmp_path / name, [{"messages": turns}, {"prompt": "c"}])
        done = cli("generate", tiny, "--prompts", data, *PLAIN, "--max-new-tokens", "2", "--json")
        assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == [turns[:1], "c"]


def test_merge_refuses_an_adapter_folder_and_accepts_a_dtype(cli, tiny, adapter, tmp_path):
    import shutil

    own = shutil.copytree(adapter, tmp_path / "own")
    done = cli("merge", tiny, own, "--out", own, "--overwrite")
    assert done.status == 1
    assert "holds an adapter" in done.error
    assert "model.safetensors" not in files_in(own)
    out = tmp_path / "half"
    assert cli("merge", tiny, adapter, "--out", out, "--dtype", "bfloat16").status == 0
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_generate_answers_by_every_adapter_or_by_those_in_use(cli, tiny, adapter):
    words = (
        "generate",
        tiny,
        "Split 3 Oak St",
        "--prompt",
        "Split 4 Oak St",
        *PLAIN,
        "--max-new-tokens",
        "20",
    )
    adapters = ("--adapter", adapter, "--adapter", f"again={adapter}")
    reported = [json.loads(line) for line in cli(*words, *adapters, "--json").out.splitlines()]
    assert [one["adapter"] for one in reported] == ["oak", "again", "oak", "again"]
    assert [one["prompt"] for one in reported] == ["Split 3 Oak St"] * 2 + ["Split 4 Oak St"] * 2
    assert set(reported[0]) == {"adapter", "prompt", "answer", "finish"}
    assert reported[0]["answer"] == reported[1]["answer"]
    mixed = cli(*words, *adapters, "--use", "base,again", "--json")
    chosen = [json.loads(line) for line in mixed.out.splitlines()]
    assert [one["adapter"] for one in chosen] == ["base", "again"]
    assert chosen[1]["answer"] == reported[3]["answer"]
    base = bs.load_base(tiny, dtype="float32", device="cpu")
    (answer,) = bs.generate(base, "Split 3 Oak St", adapters=bs.load(adapter), max_new_tokens=20)
    assert reported[0]["answer"] == answer.text
    plain = cli(*words[:3], *words[5:], "--adapter", adapter)
    assert plain.out == answer.text + "\n"


def test_generate_reads_files_and_stdin(cli, tiny, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    write_rows(tmp_path / "b.jsonl", [{"prompt": "one"}, {"messages": [{"role": "user", "content": "two"}]}])
    flags = (*PLAIN, "--max-new-tokens", "4", "--json")
    answers = []
    for file in ("a.txt", "b.jsonl"):
        done = cli("generate", tiny, "--prompts", tmp_path / file, *flags)
        answers.append([json.loads(line)["answer"] for line in done.out.splitlines()])
    assert len(answers[0]) == 2
    assert answers[0] == answers[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert json.loads(cli("generate", tiny, *flags).out)["answer"] == answers[0][0]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "there is no prompt" in cli("generate", tiny, *flags).error


def test_chat_reads_lines(cli, tiny, adapter, monkeypatch):
    script = (
        "Split 3 Oak St\n/base\nhello\n/use oak\n/reset\nSplit 3 Oak St\n/use none\n/what\n/quit\nnever\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    flags = (*PLAIN, "--adapter", adapter, "--max-new-tokens", "20")
    done = cli("chat", tiny, *flags, "--json")
    assert done.status == 0
    reported = [json.loads(line) for line in done.out.splitlines()]
    assert [one["adapter"] for one in reported] == ["oak", "base", "oak"]
    assert reported[0]["answer"] == reported[2]["answer"]
    assert "no adapter 'none'" in done.err
    assert "unknown command '/what'" in done.err
    monkeypatch.setattr("sys.stdin", io.StringIO("Split 3 Oak St\n"))
    assert cli("chat", tiny, *flags).out == reported[0]["answer"] + "\n"


def test_chat_commands(cli, tiny, adapter, tmp_path, monkeypatch):
    saved = tmp_path / "chat.jsonl"
    script = (
        "/help\n/adapter\nSplit 3 Oak St\n/system Be brief.\n/adapter base\nhello\n"
        f"/save {saved}\n/save {saved}\n/system\n/quit\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    done = cli("chat", tiny, *PLAIN, "--adapter", adapter, "--max-new-tokens", "4")
    assert done.status == 0
    for said in (
        "/save FILE     writes the conversation to a new file",
        "oak answers; there are oak, base",
        "the conversation starts over, with this system message",
        "the conversation starts over, without a system message",
        f"{saved} exists; name a new file",
    ):
        assert said in done.err, said
    (row,) = lines_of(saved)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][0]["content"] == "Be brief."
    assert cli("data", tiny, saved, "--json").status == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/save {tmp_path / 'none'}\n"))
    assert "there is no answer to save yet" in cli("chat", tiny, *PLAIN).err


def test_generate_reads_a_named_column_and_adds_a_system_message(cli, tiny, tmp_path):
    flags = (*PLAIN, "--max-new-tokens", "4", "--json")
    file = tmp_path / "rows.csv"
    file.write_text("id,question,note\n1,one,x\n2,two,y\n")
    named = cli("generate", tiny, "--prompts", file, "--column", "question", *flags)
    given = cli("generate", tiny, "one", "two", *flags)
    assert named.status == 0, named.err
    assert named.out == given.out
    brief = cli("generate", tiny, "one", "two", "--system", "Be brief.", *flags)
    asked = json.loads(brief.out.splitlines()[0])["prompt"]
    assert asked == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    whole = cli("generate", tiny, "--prompts", tmp_path / "m.jsonl", "--system", "Be long.", *flags)
    assert json.loads(whole.out)["answer"] == json.loads(brief.out.splitlines()[0])["answer"]
    assert (
        "has no column 'text'; it has 'id'"
        in cli("generate", tiny, "--prompts", file, "--column", "text").error
    )
    assert "--column needs --prompts" in cli("generate", tiny, "x", "--column", "question").error


def test_evaluate_prints_the_numbers_and_keeps_the_answers(cli, tiny, adapter, train_rows, tmp_path):
    words = ("evaluate", tiny, train_rows, *PLAIN, "--max-new-tokens", "16")
    kept = tmp_path / "answers.jsonl"
    one = json.loads(cli(*words, "--adapter", adapter, "--json", "--out", kept).out)
    assert set(one) == {
        *(
            "rows",
            "loss",
            "exact_match",
            "choice",
            "contains",
            "final_answer",
            "rouge_l",
            "valid_json",
            "field_f1",
            "seconds",
        )
    }
    assert [line["row"] for line in lines_of(kept)] == list(range(1, 13))
    none = json.loads(cli(*words, "--json").out)
    assert one["loss"] < none["loss"]
    several = json.loads(cli(*words, "--adapter", f"a={adapter}", "--adapter", f"b={adapter}", "--json").out)
    assert set(several) == {"a", "b"}
    assert several["a"]["loss"] == several["b"]["loss"] == one["loss"]
    lossy = cli(*words, "--no-generate", "--adapter", adapter)
    assert "oak" in lossy.out
    assert f"{one['loss']:.4f}" in lossy.out


def test_evaluate_scores_labels_and_says_what_else_is_possible(cli, tiny, tmp_path, monkeypatch):
    few = tmp_path / "few.csv"
    few.write_text("text,label\n" + "".join(f"row {i},{('yes', 'nay')[i % 2]}\n" for i in range(6)))
    asked = ("--prompt", "text", "--completion", "label", *PLAIN, "--max-new-tokens", "2")
    one = json.loads(cli("evaluate", tiny, few, *asked, "--json", "--out", tmp_path / "out.jsonl").out)
    chosen = [line["choice"] for line in lines_of(tmp_path / "out.jsonl")]
    assert set(chosen) <= {"yes", "nay"}
    assert one["choice"] == sum(label == ("yes", "nay")[i % 2] for i, label in enumerate(chosen)) / 6
    assert "choice" not in cli("evaluate", tiny, few, *asked, "--choices", "none").out
    only = json.loads(
        cli("evaluate", tiny, few, *asked, "--no-generate", "--choices", "nay, yes", "--json").out
    )
    assert (only["choice"], only["exact_match"]) == (one["choice"], None)
    wrong = cli("evaluate", tiny, few, *asked, "--choices", "yes,no")
    assert "few.csv, row 2: the expected answer 'nay' is not among the 2 choices" in wrong.error
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(json.dumps({"prompt": f"q{i}", "completion": f"l{i % 21}"}) + "\n" for i in range(42))
    )
    hint = cli("evaluate", tiny, many, *PLAIN, "--max-new-tokens", "2").err
    assert "there are 21 different expected answers; --choices all scores" in hint
    joined = json.loads(cli("evaluate", tiny, many, f"{many}:2", *PLAIN, "--no-generate", "--json").out)
    assert joined["rows"] == 126
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "say it", "completion": "two words"}) + "\n")
    assert "rouge l" in cli("evaluate", tiny, text, *PLAIN, "--max-new-tokens", "2").out
    monkeypatch.setattr("brushstroke.inference.scores.find_spec", lambda name: None)
    monkeypatch.setattr("brushstroke.cli.evaluate.find_spec", lambda name: None)
    without = cli("evaluate", tiny, text, *PLAIN, "--max-new-tokens", "2")
    assert "rouge l" not in without.out
    assert "ROUGE-L needs the package rouge-score; run:" in without.err


def test_merge_writes_a_plain_model_and_reports_the_drift(cli, tiny, adapter, tmp_path):
    out = tmp_path / "merged"
    done = cli("merge", tiny, adapter, "--out", out, "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["sites"] == 14
    assert report["survived"] > 0.999
    assert report["logit_drift"] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(out)
    base = bs.load_base(tiny, dtype="float32", device="cpu")
    tokens = torch.arange(20)[None]
    with torch.no_grad(), bs.attach(base, bs.load(adapter)):
        expected = base.model(input_ids=tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    before = files_in(out)
    assert cli("merge", tiny, adapter, "--out", out).status == 1
    assert "merged into" in cli("merge", tiny, adapter, "--out", out, "--overwrite").out
    assert files_in(out) == before
    twice = cli("merge", out, adapter, "--out", tmp_path / "twice")
    assert twice.status == 1
    assert "already" in twice.error
    assert not (tmp_path / "twice").exists()


def test_show_accepts_cards_of_other_programs(cli, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    card = json.loads((copy / "brushstroke.json").read_text())
    for versions in ("0.1", ["0.1"], 3, None):
        card["training"] = {"versions": versions}
        (copy / "brushstroke.json").write_text(json.dumps(card))
        done = cli("show", copy)
        assert done.status == 0, done.err
        assert versions is None or "versions" in done.out


def test_show_needs_no_base(cli, adapter):
    reported = json.loads(cli("show", adapter, "--json").out)
    value = bs.load(adapter)
    assert reported["parameters"] == value.parameters
    assert reported["bytes"] == value.bytes
    assert {site["site"] for site in reported["sites"]} == set(value)
    for site in reported["sites"]:
        update = value[site["site"]]
        assert site["norm"] == pytest.approx(update.delta_norm())
        assert site["shape"] == list(update.shape)
        assert site["rank"] == 8
        assert site["scale"] == 2.0
        assert 0 < site["top_singular_value"] <= site["norm"]
    assert reported["card"]["stop_tokens"] == ["<|im_end|>"]
    assert reported["card"]["training"]["steps"] == 60
    done = cli("show", adapter)
    for expected in ("model.layers.1.mlp.down_proj", "48×32", "rank 8", "parameters", "stop tokens", "steps"):
        assert expected in done.out


def test_closed_pipe_is_not_a_bug(adapter):
    with start("show", adapter) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.parametrize("flag", [(), ("--json",)])
def test_closed_output_stream_is_not_a_bug(adapter, flag):
    words = (sys.executable, "-m", "brushstroke", "show", str(adapter), *flag)
    done = subprocess.run(words, env=ENVIRONMENT, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
