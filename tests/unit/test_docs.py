"""The docs agree with the code: names, version, layers, files, links."""

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
        if folder != "data" and path.stem != "__init__" and path.name not in shown.split()
    ]
    assert not unnamed
    assert {path.parent.name for path in source.glob("*/__init__.py")} == packages.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
