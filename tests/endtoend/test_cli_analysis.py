"""`spectrum`, `compare`, `relate` and `intruders` on small adapters of brushstroke and PEFT."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from cli_kit import ENVIRONMENT, Done, files_in, inference_kit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import brushstroke as bs
from brushstroke.adapter import Adapter
from brushstroke.base import FolderWeights
from brushstroke.lowrank import LowRank

FLOAT32 = 1e-5  # relative, for factors and weights stored in float32
ALL = ["spectrum", "compare", "relate", "intruders"]
DECILES = ("inputs", "chance, inputs", "outputs", "chance, outputs")


def table(file):
    """The rows of a CSV file."""
    return list(csv.DictReader(io.StringIO(file.read_text("utf-8"))))


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Two random adapters of the tiny base, of rank 4 and 2."""
    folder = tmp_path_factory.mktemp("adapters")
    base = bs.load_base(tiny, dtype="float32", device="cpu")
    for name, rank, seed in (("four", 4, 1), ("two", 2, 2)):
        with bs.attach(base, bs.LoraConfig(rank=rank)) as attachment:
            fresh = attachment.adapter()
        generator = torch.Generator().manual_seed(seed)
        updates = {
            site: LowRank(
                torch.randn(update.shape[0], rank, generator=generator),
                torch.randn(rank, update.shape[1], generator=generator),
                0.5,
            )
            for site, update in fresh.items()
        }
        bs.save(Adapter(updates, fresh.card), folder / name)
    return folder


@pytest.fixture(scope="module", params=["plain", "rslora", "patterns"])
def by_peft(request, tiny, tmp_path_factory):
    """(folder, site → ΔW (d×h) by PEFT itself)."""
    peft = pytest.importorskip("peft")
    config = {
        "plain": {"r": 4, "lora_alpha": 8},
        "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
        "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    }[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **config)
    )
    deltas = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "get_delta_weight"):
            module.lora_B["default"].weight.data.normal_(std=0.1)
            site = name.removeprefix("base_model.model.")
            deltas[site] = module.get_delta_weight("default").detach().mT
    folder = tmp_path_factory.mktemp("peft") / request.param
    wrapped.save_pretrained(folder)
    return folder, deltas


def test_spectra_of_adapters_that_peft_wrote(cli, by_peft):
    folder, deltas = by_peft
    (reported,) = json.loads(cli("spectrum", folder, "--json").out)["adapters"]
    assert {site["site"] for site in reported["sites"]} == set(deltas)
    for site in reported["sites"]:
        dense = torch.linalg.svdvals(deltas[site["site"]].double())
        assert site["sigma"] == pytest.approx(dense[: len(site["sigma"])].tolist(), rel=1e-4)
        assert site["rank"] == (2 if folder.name == "patterns" and "q_proj" in site["site"] else 4)
    norm = math.sqrt(sum(float(delta.double().square().sum()) for delta in deltas.values()))
    assert reported["norm"] == pytest.approx(norm, rel=FLOAT32)


def test_relations_of_adapters_that_peft_wrote(cli, tiny, by_peft):
    folder, deltas = by_peft
    reported = json.loads(cli("relate", folder, tiny, "--json").out)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for row in reported["sites"]:
        W = model.get_submodule(row["site"]).weight.detach().double().mT
        left, _, right = torch.linalg.svd(deltas[row["site"]].double(), full_matrices=False)
        r = row["rank"]
        projection = float((left[:, :r].mT @ W @ right[:r].mT).norm())
        assert row["projection_delta"] == pytest.approx(projection, rel=1e-3)
        assert row["norm_base"] == pytest.approx(float(W.norm()), rel=FLOAT32)
        expected = float(torch.linalg.svdvals(W)[:r].norm())
        assert row["projection_base"] == pytest.approx(expected, rel=FLOAT32)


def test_spectrum_prints_sites_a_map_and_advice(cli, tiny, adapters):
    words = ("spectrum", adapters / "four", adapters / "two", "--base", tiny)
    done = cli(*words, "--map", "relative", "--sites")
    assert done.status == 0, done.err
    for expected in ("model.layers.0.self_attn.q_proj", "layer, relative", "mlp.down_proj", "four", "two"):
        assert expected in done.out
    assert "rank 4: keeps 99 % of the energy at 90 % of the sites of a kind of matrix" in done.out
    reported = json.loads(cli("spectrum", adapters / "four", "--base", tiny, "--json").out)["adapters"][0]
    weights = FolderWeights(tiny)
    for row in reported["sites"]:
        assert row["relative_norm"] == pytest.approx(
            row["norm"] / float(weights[row["site"]].norm()), rel=1e-5
        )


@pytest.mark.parametrize("flags", [("--energy", "0.5"), ("--budget", "900"), ()])
def test_truncation_loses_the_predicted_energy(cli, adapters, tmp_path, flags):
    out = tmp_path / "cut"
    done = cli("spectrum", adapters / "four", "--truncate", out, *flags, "--json")
    assert done.status == 0, done.err
    cut = json.loads(done.out)["truncated"]
    before, after = bs.load(adapters / "four"), bs.load(out)
    assert (before - after).norm() == pytest.approx(cut["loss"], rel=1e-4, abs=1e-4)
    assert after.parameters == cut["parameters"] <= before.parameters
    assert set(after) == {site for site, rank in cut["ranks"].items() if rank}
    assert all(after[site].rank == cut["ranks"][site] for site in after)
    if "--budget" in flags:
        assert cut["parameters"] <= 900
    again = cli("spectrum", adapters / "four", "--truncate", out, *flags)
    assert again.status == 1
    assert "--overwrite" in again.error


def test_compare_gives_grids_with_chance(cli, adapters):
    done = cli("compare", adapters / "four", adapters / "two", "--sites")
    assert done.status == 0, done.err
    assert "left φ" in done.out
    assert "right z" in done.out
    reported = json.loads(cli("compare", adapters / "four", adapters / "two", "--json").out)
    row = next(row for row in reported["sites"] if row["site"].endswith("0.mlp.down_proj"))
    assert (len(row["left"]), len(row["left"][0])) == (4, 2)
    assert row["chance_left"][3][1] == pytest.approx(4 / 48)
    assert row["chance_right"][0][1] == pytest.approx(2 / 32)
    one = cli("compare", adapters / "four", adapters / "two", "--of", "U")
    assert "right φ" not in one.out
    assert "not a property of ΔW" in one.out
    same = json.loads(cli("compare", adapters / "four", adapters / "four", "--json").out)
    assert same["cosine"] == pytest.approx(1)


def test_relate_and_intruders_print(cli, tiny, adapters):
    done = cli("relate", adapters / "four", tiny)
    assert done.status == 0, done.err
    for expected in ("ratio to chance", "amplification", "energy of ΔW by tenth of W"):
        assert expected in done.out
    done = cli("intruders", adapters / "four", tiny, "--top", "3")
    assert done.status == 0, done.err
    assert "tested" in done.out
    sentence = r"\d+ of the 42 strongest directions of W \+ four are intruders \(.*\), at \d+ of 14 sites"
    assert re.match(sentence, done.out)


def test_the_repair_is_written(cli, tiny, adapters, tmp_path):
    out = tmp_path / "mended"
    words = ("intruders", adapters / "four", tiny, "--threshold", "0.6")
    done = cli(*words, "--repair", out, "--scale", "0", "--json")
    assert done.status == 0, done.err
    reported = json.loads(done.out)
    assert reported["intruders"] > 0
    before, after = bs.load(adapters / "four"), bs.load(out)
    for row in reported["sites"]:
        assert after[row["site"]].rank == before[row["site"]].rank + row["intruders"]
    assert (before - after).norm() > 0
    assert json.loads(cli(*words, "--json").out)["intruders"] == reported["intruders"]


@pytest.fixture
def commands(tiny, adapters):
    """Name → its words, with what is in the first words of its answer."""
    four, two = adapters / "four", adapters / "two"
    return {
        "spectrum": (
            ("spectrum", four, "--base", tiny),
            "four holds 99 % of its energy in rank 4 of 4, over",
        ),
        "compare": (("compare", four, two), "four and two share 0."),
        "relate": (("relate", four, tiny), "four amplifies what W does in its directions"),
        "intruders": (("intruders", four, tiny, "--threshold", "0.6"), "of W + four are intruders"),
    }


@pytest.mark.parametrize("command", ALL)
def test_the_summary_comes_first_and_sites_when_asked_for(cli, commands, command):
    words, sentence = commands[command]
    done = cli(*words)
    assert done.status == 0, done.err
    first, *rest = done.out.splitlines()
    assert sentence in first
    assert "model.layers" not in done.out
    heads = [line.split() for line in rest if line.strip().startswith(("matrix", "layer"))]
    assert [head[:2] for head in heads] == [["matrix", "sites"], ["layer", "sites"]]
    kinds = [line.split()[0] for line in rest if "_proj" in line and "advice" not in line]
    assert kinds == ["q_proj", "v_proj", "o_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]
    with_sites = cli(*words, "--sites").out
    assert with_sites.splitlines()[0] == first
    assert "model.layers.1.self_attn.q_proj" in with_sites


@pytest.mark.parametrize("command", ALL)
def test_json_holds_the_summary_and_all_sites(cli, commands, command):
    words, sentence = commands[command]
    reported = json.loads(cli(*words, "--json").out)
    reported = reported["adapters"][0] if command == "spectrum" else reported
    assert sentence in reported["summary"]["sentence"]
    assert [row["matrix"] for row in reported["summary"]["matrices"]][:2] == ["q_proj", "v_proj"]
    assert [row["layer"] for row in reported["summary"]["layers"]] == ["0", "1"]
    assert len(reported["sites"]) == 14


@pytest.mark.parametrize("command", ALL)
def test_every_table_is_written_as_csv_and_latex(cli, commands, command, tmp_path):
    words, _ = commands[command]
    more = {"relate": "deciles", "intruders": "directions"}
    names = {"matrices", "layers", "sites"} | ({more[command]} if command in more else set())
    done = cli(*words, "--csv", tmp_path / "t", "--latex", tmp_path / "t", "--json")
    assert done.status == 0, done.err
    reported = json.loads(done.out)
    reported = reported["adapters"][0] if command == "spectrum" else reported
    printed = names - ({"sites"} if command == "intruders" else set())
    assert files_in(tmp_path / "t") == {f"{name}.csv" for name in names} | {f"{x}.tex" for x in printed}
    tables = {name: table(tmp_path / "t" / f"{name}.csv") for name in names}
    measure = {
        "spectrum": "norm",
        "compare": "cosine",
        "relate": "projection_delta",
        "intruders": "undecided",
    }
    for plain, row in zip(reported["sites"], tables["sites"], strict=True):
        assert (row["site"], row["matrix"]) == (plain["site"], plain["site"].rpartition(".")[2])
        assert row["layer"] == plain["site"].split(".")[2]
        assert [int(row["d"]), int(row["h"])] == plain["shape"]
        assert float(row[measure[command]]) == plain[measure[command]]
    for name in ("matrices", "layers"):
        for plain, row in zip(reported["summary"][name], tables[name], strict=True):
            measures = {key: value for key, value in plain.items() if isinstance(value, dict)}
            for key, value in measures.items():
                assert float(row[f"{key}_mean"]) == value["mean"]
                assert float(row[f"{key}_sd"]) == value["sd"]
    for name in printed:
        text = (tmp_path / "t" / f"{name}.tex").read_text("utf-8")
        assert text.startswith("% ")
        assert len({line.count(" & ") for line in text.splitlines() if line.endswith(r"\\")}) == 1
        assert not re.search(r"(?<!\\)_(?!\d)", text.split("\\begin", 1)[1])


def test_tables_replace_files_only_with_overwrite(cli, commands, tmp_path):
    words, _ = commands["relate"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("mine")
    refused = cli(*words, "--csv", tmp_path / "t")
    assert (refused.status, refused.out) == (1, "")
    assert "--overwrite" in refused.error
    assert files_in(tmp_path) == {"t/mine.txt"}
    assert cli(*words, "--csv", tmp_path / "t", "--overwrite").status == 0
    words, _ = commands["spectrum"]
    assert cli(*words, "--latex", tmp_path / "t", "--csv", tmp_path / "t", "--overwrite").status == 0
    left = {f"t/{name}.{kind}" for name in ("matrices", "layers", "sites") for kind in ("csv", "tex")}
    assert files_in(tmp_path) == {"t/mine.txt", *left}  # no deciles of another command


def test_tables_and_the_page_may_share_a_folder_but_not_with_a_new_adapter(cli, commands, tmp_path):
    words, _ = commands["spectrum"]
    done = cli(*words, "--csv", tmp_path / "t", "--html", tmp_path / "t" / "page.html")
    assert done.status == 0, done.err
    assert "t/page.html" in files_in(tmp_path)
    done = cli(*words, "--csv", tmp_path / "n", "--truncate", tmp_path / "n")
    assert done.status == 2
    assert "choose another folder" in done.error
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("flag", ["--csv", "--latex"])
def test_a_file_for_the_tables_is_refused(cli, commands, tmp_path, flag):
    words, _ = commands["compare"]
    name = f"table.{'csv' if flag == '--csv' else 'tex'}"
    done = cli(*words, flag, tmp_path / name)
    assert done.status == 2
    assert f"{flag} takes a folder" in done.error
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        *(
            ((command, "none", "none"), flag)
            for command in ("compare", "relate")
            for flag in ("--csv", "--html")
        ),
        (("spectrum", "none"), "--latex"),
        (("spectrum", "none"), "--truncate"),
        (("intruders", "none", "none"), "--repair"),
    ],
)
def test_unwritable_output_is_refused_before_anything_is_read(cli, tmp_path, words, flag):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file" / "new" / "out", tmp_path / ("x" * 300) / "out"):
        done = cli(*words, flag, place)
        assert (done.status, done.out) == (1, "")
        assert "name a folder" in done.error or "File name too long" in done.error
    assert files_in(tmp_path) == {"file"}


def test_a_folder_for_the_page_is_refused(cli, commands, tmp_path):
    words, _ = commands["compare"]
    done = cli(*words, "--html", tmp_path)
    assert (done.status, done.out) == (1, "")
    assert f"--html takes a file; {tmp_path} is a folder" in done.error


def test_several_adapters_share_tables(cli, adapters, tmp_path):
    done = cli("spectrum", adapters / "four", adapters / "two", "--csv", tmp_path, "--latex", tmp_path)
    assert done.status == 0, done.err
    rows = table(tmp_path / "sites.csv")
    assert [row["adapter"] for row in rows] == ["four"] * 14 + ["two"] * 14
    assert (rows[0]["sigma_4"] != "", rows[-1]["sigma_4"]) == (True, "")
    assert "adapter & matrix & sites" in (tmp_path / "matrices.tex").read_text("utf-8")


def test_deciles_are_shown_with_chance(cli, tiny, adapters):
    lines = cli("relate", adapters / "four", tiny).out.splitlines()
    rows = {name: line.split()[-10:] for line in lines for name in DECILES if line.strip().startswith(name)}
    assert list(rows) == list(DECILES)
    for row in rows.values():
        assert sum(map(float, row)) <= 100.5
    reported = json.loads(cli("relate", adapters / "four", tiny, "--json").out)["sites"]
    total = sum(row["norm_delta"] ** 2 for row in reported)
    chance = sum(row["norm_delta"] ** 2 * row["deciles"]["chance_right"][0] for row in reported) / total
    assert float(rows["chance, outputs"][0]) == pytest.approx(100 * chance, abs=0.05)
    assert chance < 0.1  # some W have more outputs than directions


@pytest.fixture(scope="module")
def unlike(tiny, tmp_path_factory):
    """An adapter whose kinds of matrices have other ranks, some of them zero, and one that is not trained."""
    folder = tmp_path_factory.mktemp("unlike")
    base = bs.load_base(tiny, dtype="float32", device="cpu")
    with bs.attach(base, bs.LoraConfig(rank=4)) as attachment:
        fresh = attachment.adapter()
    bs.save(fresh, folder / "untrained")
    kinds = {"q_proj": 1, "v_proj": 0, "k_proj": 2}
    updates = {}
    for site, update in fresh.items():
        rank = kinds.get(site.rpartition(".")[2], 4)
        V = torch.linalg.qr(torch.randn(update.shape[1], 4)).Q.mT
        V[rank:] = 0
        updates[site] = LowRank(torch.linalg.qr(torch.randn(update.shape[0], 4)).Q, V, 0.5)
    bs.save(Adapter(updates, fresh.card), folder / "mixed")
    return folder


def test_the_advice_is_by_kind_of_matrix_and_a_zero_adapter_gets_none(cli, unlike, tmp_path):
    done = cli("spectrum", unlike / "mixed", "--html", tmp_path / "mixed.html")
    assert done.status == 0, done.err
    advice = "rank 1 for q_proj; rank 2 for k_proj; rank 4 for o_proj, gate_proj, up_proj, down_proj"
    assert advice in done.out
    assert advice in (tmp_path / "mixed.html").read_text("utf-8")
    (reported,) = json.loads(cli("spectrum", unlike / "mixed", "--json").out)["adapters"]
    assert reported["advised_ranks_99"] == {
        "q_proj": 1,
        "o_proj": 4,
        "k_proj": 2,
        "gate_proj": 4,
        "up_proj": 4,
        "down_proj": 4,
    }
    done = cli("spectrum", unlike / "untrained", "--html", tmp_path / "zero.html")
    assert done.status == 0, done.err
    assert done.out.startswith("untrained changes nothing: its update is zero at all 14 sites.")
    page = (tmp_path / "zero.html").read_text("utf-8")
    assert "changes nothing" in page
    assert not any("advice" in text.lower() for text in (done.out, page))
    (reported,) = json.loads(cli("spectrum", unlike / "untrained", "--json").out)["adapters"]
    assert reported["advised_ranks_99"] == {}


def test_every_command_accepts_untrained_adapters(cli, tiny, adapters, unlike):
    assert "amplifies nothing" in cli("relate", unlike / "untrained", tiny).out
    assert cli("intruders", unlike / "untrained", tiny).out.startswith("None of the ")
    done = cli("compare", unlike / "mixed", adapters / "four")
    assert "over 12 sites (2 more are zero)" in done.out
    assert "φ undefined, an update is zero" in done.out


@pytest.mark.parametrize("second", ["untrained", "four"])
@pytest.mark.parametrize("of", ["delta", "V"])
def test_comparing_with_a_zero_adapter_prints_a_note(cli, adapters, unlike, tmp_path, second, of):
    other = (unlike if second == "untrained" else adapters) / second
    words = ("compare", unlike / "untrained", other, "--of", of)
    files = ("--csv", tmp_path, "--latex", tmp_path, "--html", tmp_path / "page.html")
    done = cli(*words, "--sites", *files)
    assert done.status == 0, done.err
    assert "nothing to compare: at all 14 sites one update or both are zero" in done.out
    assert "φ is undefined" in done.out
    assert done.out.count("layers.1.self_attn.q_proj") == 2  # its row, and the list of them all
    assert len(table(tmp_path / "sites.csv")) == 14
    assert files_in(tmp_path) == {"sites.csv", "sites.tex", "page.html"}
    assert "φ is undefined" in (tmp_path / "page.html").read_text("utf-8")
    reported = json.loads(cli(*words, "--json").out)
    assert len(reported["unmatched"]["zero"]) == 14
    assert (reported["cosine"], reported["sites"], reported["summary"]["matrices"]) == (None, [], [])


def test_adapters_with_few_common_sites_and_of_other_models(cli, adapters, tmp_path):
    four = bs.load(adapters / "four")
    one = {site: update for site, update in four.items() if site.endswith("0.self_attn.q_proj")}
    bs.save(Adapter(one, four.card), tmp_path / "one")
    done = cli("compare", tmp_path / "one", adapters / "two")
    assert done.status == 0, done.err
    assert "over 1 site;" in done.out
    assert "only in the second" in done.out
    plain = Adapter({name: LowRank(torch.randn(8, 2), torch.randn(2, 8)) for name in ("fc1", "fc2", "out")})
    bs.save(plain, tmp_path / "mlp")
    done = cli("spectrum", tmp_path / "mlp", "--csv", tmp_path / "t")
    assert done.status == 0, done.err
    kinds = [line.split()[0] for line in done.out.splitlines() if line.startswith(("  fc", "  out"))]
    assert kinds == ["fc1", "fc2", "out"]
    assert [row["layer"] for row in table(tmp_path / "t" / "layers.csv")] == ["–"]


@pytest.mark.parametrize("command", ["spectrum", "compare", "relate", "intruders"])
def test_pages_work_offline(cli, tiny, adapters, tmp_path, command):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    words = {
        "spectrum": (adapters / "four", adapters / "two"),
        "compare": (adapters / "four", adapters / "two", "--site", "model.layers.1.self_attn.v_proj"),
        "relate": (adapters / "four", tiny),
        "intruders": (adapters / "four", tiny),
    }[command]
    page = tmp_path / "page.html"
    done = cli(command, *words, "--html", page)
    assert done.status == 0, done.err
    text = page.read_text("utf-8")
    shown = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)  # the code that draws names schemas
    assert shown.count("<svg") >= 1
    assert "<table" in shown
    assert not re.search(r'(?:src|href)="(?!#)', shown)
    assert "http" not in shown
    assert not re.search(r"<script[^>]* src", text)
    if command == "compare":
        specs = [json.loads(spec) for spec in re.findall(r'application/json"[^>]*>(.*?)</script>', text)]
        for spec, n in zip(specs, (32, 16), strict=True):  # the input side, and the output side
            (data,) = spec["datasets"].values() if "datasets" in spec else [spec["data"]["values"]]
            assert [record["panel"] for record in data] == ["v_proj", "random pair"]
            assert {(record["rows"], record["columns"], record["n"]) for record in data} == {(2, 4, n)}
            words = json.dumps(spec, ensure_ascii=False)
            assert '"i, two"' in words  # the smaller rank
            assert '"j, four"' in words


BAD = {
    "no adapter": (("spectrum",), 2, "at least one"),
    "a folder that is none": (("spectrum", "{none}"), 1, "there is no folder"),
    "an energy without a place": (("spectrum", "{four}", "--energy", "0.9"), 2, "--truncate OUT"),
    "a map of no base": (("spectrum", "{four}", "--map", "relative"), 2, "--base BASE"),
    "two rules": (
        ("spectrum", "{four}", "--truncate", "{out}", "--energy", "1", "--budget", "9"),
        2,
        "not both",
    ),
    "two to truncate": (("spectrum", "{four}", "{two}", "--truncate", "{out}"), 2, "one adapter"),
    "too much energy": (
        ("spectrum", "{four}", "--truncate", "{out}", "--energy", "2"),
        2,
        "--energy must be a finite number above 0 and of at most 1",
    ),
    "no energy": (
        ("spectrum", "{four}", "--truncate", "{out}", "--energy", "0"),
        2,
        "--energy must be a finite number above 0 and of at most 1",
    ),
    "a tiny budget": (
        ("spectrum", "{four}", "--truncate", "{out}", "--budget", "3"),
        2,
        "too small for one rank",
    ),
    "an unknown site": (("compare", "{four}", "{two}", "--site", "model.q"), 2, "no result for the site"),
    "an unknown factor": (("compare", "{four}", "{two}", "--of", "A"), 2, "--of"),
    "a base that is none": (("relate", "{four}", "{none}"), 1, "none"),
    "an adapter as the base": (("relate", "{four}", "{two}"), 1, "two"),
    "a scale without a place": (("intruders", "{four}", "{none}", "--scale", "0.5"), 2, "--repair OUT"),
    "a scale above one": (
        ("intruders", "{four}", "{none}", "--repair", "{out}", "--scale", "2"),
        2,
        "--scale",
    ),
    "no directions": (("intruders", "{four}", "{tiny}", "--top", "0"), 2, "top"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line(cli, tiny, adapters, tmp_path, case):
    words, status, expected = BAD[case]
    places = {
        "four": adapters / "four",
        "two": adapters / "two",
        "tiny": tiny,
        "none": tmp_path / "none",
        "out": tmp_path / "out",
    }
    done = cli(*(word.format(**places) for word in words))
    assert done.status == status, done.err
    assert expected in done.error
    assert done.out == ""
    assert files_in(tmp_path) == set()


def test_another_base_and_a_merged_one_are_refused(cli, tiny, adapters, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "other")
    for command in ("relate", "intruders"):
        done = cli(command, adapters / "four", tmp_path / "other")
        assert done.status == 1
        assert "--allow-different-base" in done.error
        assert cli(command, adapters / "four", tmp_path / "other", "--allow-different-base").status == 0
    assert cli("merge", tiny, adapters / "four", "--out", tmp_path / "merged", "--no-verify").status == 0
    assert "already merged into the base" in cli("relate", adapters / "four", tmp_path / "merged").error


@pytest.mark.parametrize("command", ["relate", "intruders"])
def test_a_negative_limit_is_refused(cli, tiny, adapters, command):
    done = cli(command, adapters / "four", tiny, "--dense-limit", "-1")
    assert done.status == 2
    assert "dense_limit (--dense-limit) must be a whole number of at least 0; got -1" in done.error


@pytest.fixture(scope="module")
def others(tiny, tmp_path_factory):
    """Bases that the adapters do not fit, and an adapter of other sites."""
    folder = tmp_path_factory.mktemp("others")
    inference_kit.llama(intermediate_size=96).save_pretrained(folder / "wide")
    inference_kit.llama(num_hidden_layers=1).save_pretrained(folder / "short")
    inference_kit.gpt2(n_embd=64).save_pretrained(folder / "gpt2")
    (folder / "empty").mkdir()
    shutil.copy(tiny / "config.json", folder / "empty")
    _adapter_of(folder / "gpt2", folder / "adapter")
    return folder


def _adapter_of(base, out):
    with bs.attach(bs.load_base(base, dtype="float32", device="cpu"), bs.LoraConfig(rank=2)) as attachment:
        fresh = attachment.adapter()
    updates = {site: LowRank(torch.randn(update.U.shape), update.V) for site, update in fresh.items()}
    bs.save(Adapter(updates, fresh.card), out)


AT_ONCE = {
    "no adapter": ("relate {none} {tiny}", 1, "there is no folder"),
    "no base": ("intruders {four} {none}", 1, "there is no file or folder"),
    "no weights": ("relate {four} {empty}", 1, "has a config.json but no weights"),
    "another width": (
        "relate {four} {wide}",
        1,
        "mlp.down_proj: W must be (d, h) = (48, 32); the base's is (96",
    ),
    "fewer layers": ("intruders {four} {short}", 1, "lacks at least 7 of 14 adapted sites"),
    "another class": ("spectrum {four} --base {gpt2}", 1, "lacks at least 14 of 14 adapted sites"),
    "an adapter as the base": (
        "relate {four} {two}",
        1,
        "holds an adapter, not a base model; give the base that it was trained on in its place, and the",
    ),
    "a negative limit": (
        "relate {four} {tiny} --dense-limit -1",
        2,
        "must be a whole number of at least 0; got -1",
    ),
    "no directions": ("intruders {four} {tiny} --top 0", 2, "--top must be a whole number of at least 1"),
    "too high a threshold": (
        "intruders {four} {tiny} --threshold 2",
        2,
        "--threshold must be a finite number above 0 and of at most 1; got 2",
    ),
    "no energy": (
        "spectrum {four} --energy 0 --truncate {none}",
        2,
        "--energy must be a finite number above 0 and of at most 1; got 0",
    ),
    "a budget below one rank": ("spectrum {four} --budget 10 --truncate {none}", 2, "too small for one rank"),
    "no second adapter": ("compare {four} {none}", 1, "there is no folder"),
    "adapters of other sites": ("compare {four} {adapter}", 1, "no site in common"),
    "an unknown site": ("compare {four} {two} --site model.q", 2, "--site: no result for the site"),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_wrong_input_is_refused_before_torch_is_loaded(tiny, adapters, others, tmp_path, case):
    words, status, expected = AT_ONCE[case]
    names = {"tiny": tiny, "none": tmp_path / "none"}
    names |= {name: adapters / name for name in ("four", "two")}
    names |= {name: others / name for name in ("wide", "short", "gpt2", "empty", "adapter")}
    program = (
        "import sys; from brushstroke.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, *(word.format(**names) for word in words.split())]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.split() == [str(status), "False"], done.stderr
    assert expected in Done(status, "", done.stderr).error


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_base_whose_weights_are_stored_otherwise_is_not_refused(cli, others, tmp_path, prefix):
    """GPT-2 stores (d, h), often without the prefix of its sites."""
    folder = shutil.copytree(others / "gpt2", tmp_path / "gpt2")
    file = folder / "model.safetensors"
    tensors = {f"{prefix}{key.removeprefix('transformer.')}": t for key, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    done = cli("relate", others / "adapter", folder, "--json", "--no-cache")
    assert done.status == 0, done.err
    assert len(json.loads(done.out)["sites"]) == 8


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A base with weights that are worth keeping directions of, and an adapter of it."""
    folder = tmp_path_factory.mktemp("larger")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=288,
            intermediate_size=320,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=64,
        )
    )
    model.save_pretrained(folder / "base")
    with bs.attach(model, bs.LoraConfig(rank=2)) as attachment:
        fresh = attachment.adapter()
    updates = {
        site: LowRank(torch.randn(update.shape[0], 2), torch.randn(2, update.shape[1]), 0.1)
        for site, update in fresh.items()
    }
    bs.save(Adapter(updates, fresh.card), folder / "adapter")
    return folder


@pytest.mark.parametrize("command", ["relate", "intruders"])
@pytest.mark.parametrize("flags", [(), ("--dense-limit", "16")])
def test_directions_of_the_base_are_cached(cli, larger, tmp_path, monkeypatch, command, flags):
    monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path))
    words = (command, larger / "adapter", larger / "base", "--json", *flags)
    plain = cli(*words, "--no-cache")
    assert (plain.status, list(tmp_path.iterdir())) == (0, [])
    first = cli(*words)
    assert "cached directions" not in first.err
    floors = 2 if command == "intruders" and flags else 0  # of the weights with more outputs than inputs
    assert len(list((tmp_path / "directions").iterdir())) == 7 + floors
    second = cli(*words)
    assert "used cached directions of the base for 7 sites, from" in second.err
    assert "--no-cache" in second.err
    assert plain.out == first.out == second.out
    for file in (tmp_path / "directions").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    third = cli(*words)
    assert "own directions" not in third.err
    assert third.out == plain.out
