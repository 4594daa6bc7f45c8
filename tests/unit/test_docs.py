"""The docs agree with the code and with results: names, version, layers, files, links, numbers."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import brushstroke

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_api_page_lists_every_public_name_and_no_other():
    listed = re.findall(r"^\| `(\w+)[^`]*` \|", read("docs/api.md"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(brushstroke.__all__)
    for name in listed:
        assert getattr(brushstroke, name) is not None


def test_version_and_top_entry_of_the_changelog_agree():
    top = re.search(r"^## \[([^\]]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert top is not None
    assert top[1] == PROJECT["project"]["version"] == brushstroke.__version__


def test_layers_on_the_architecture_page_match_import_linter():
    checked = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    shown = re.search(r"^```\n(cli\n.*?)```", read("docs/architecture.md"), re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert shown[1].splitlines() == [layer.replace("brushstroke.", "") for layer in checked["layers"]]


def test_files_in_the_folder_tree_exist():
    tree = re.search(
        r"^```\n(src/brushstroke/\n.*?)```", read("docs/architecture.md"), re.MULTILINE | re.DOTALL
    )
    assert tree is not None
    folder = package = ROOT / "src" / "brushstroke"
    for line in tree[1].splitlines()[1:]:
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if indent == 0:
            path = ROOT / name
        elif indent == 2:
            path = package / name
            folder = path
        else:
            path = folder / name
        assert path.exists(), line


def test_the_folder_tree_names_every_module():
    tree = read("docs/architecture.md").split("```\nsrc/brushstroke/\n")[1].partition("```")[0]
    parts = re.split(r"^  (\w+)/", tree, flags=re.MULTILINE)
    packages = dict(zip(parts[1::2], parts[2::2], strict=True))
    source = ROOT / "src" / "brushstroke"
    unnamed = [
        f"{folder}/{path.name}"
        for folder, shown in packages.items()
        for path in source.glob(f"{folder}/*.py")
        if path.stem != "__init__" and path.name not in shown.split()
    ]
    assert not unnamed
    assert {path.parent.name for path in source.glob("*/__init__.py")} == packages.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def shown(found, digits):
    """An interval as the pages print it."""
    mean, low, high = (f"{found[key]:.{digits}f}".replace("-", "−") for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def test_page_of_the_tiny_study_has_the_numbers_of_its_file():
    page = " ".join(read("docs/paper_tiny.md").split())
    study = json.loads(read("docs/results/paper_tiny.json"))
    sets, ranks, seeds, delta = (finding["data"] for finding in study["findings"])
    for found in (sets, ranks):
        losses = (f"{loss['mean']:.3f}" for loss in found["test_loss"].values())
        assert f"| test loss | {' | '.join(losses)} |" in page
    for row in seeds["blocks"]:
        values = (shown(row[key], 3) for key in ("phi", "other_task", "within_other"))
        assert f"put | {' | '.join(values)} | {row['chance']:.3f} |" in page
    for side in seeds["matrices"]["q more than v"].values():
        assert shown(side, 2) in page
    for rank in ("4", "32"):
        assert shown(delta[rank]["over_chance"], 2) in page
        assert shown(delta[rank]["random_over_chance"], 2) in page
    for ratio in delta["general"]["ratios"]:
        assert f"| {shown(ratio['ratio'], 2)} |" in page
    arms = study["arms"].values()
    runs = sum(len(arm["tried"]) + len(arm["outcomes"]) - bool(arm["tried"]) for arm in arms)
    assert f"{runs} runs in {study['seconds']:.0f} seconds" in page


KINDS = ["agrees", "does not agree", "open", "not in the paper", "true by construction"]


@pytest.mark.parametrize("page", ["paper_tiny", "paper_smollm2"])
def test_summary_of_a_study_of_the_paper_has_the_kinds_of_its_body(page):
    """What is not shown is open: it neither agrees nor disagrees with the paper."""
    head, body = read(f"docs/{page}.md").split("## Question 1", 1)
    rows = dict(re.findall(r"^\| (\w[^|]*?) \| (.*) \|$", head.split("\n## ", 1)[1], re.MULTILINE))
    summary = {
        next(kind for kind in KINDS if name.startswith(kind)): text
        for name, text in rows.items()
        if text != "here"
    }
    marks = re.findall(r"^- \*\*(.*?)[:*]", body, re.MULTILINE)
    found = {next((kind for kind in KINDS if mark.lower().startswith(kind)), mark) for mark in marks}
    assert found == summary.keys() == set(KINDS)
    assert "not shown" not in summary["agrees"] + summary["does not agree"]


def test_committed_studies_have_no_paths_of_a_machine():
    for file in (ROOT / "docs" / "results").glob("*.json"):
        assert not re.search(r"/(tmp|home|root|work)/", file.read_text("utf-8")), file.name
