"""Presets of the paper's experiments: on a small model that is trained first, and on SmolLM2-135M.

Does not run studies (`run_studies` does).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from brushstroke.base import load_base
from brushstroke.samples import labelled_file, model_path, read_task
from brushstroke.studies import tiny
from brushstroke.studies.arms import allowed_ranks, matrix_sets
from brushstroke.studies.delta import DeltaStudy
from brushstroke.studies.inputs import make_material
from brushstroke.studies.intrinsic import IntrinsicStudy
from brushstroke.studies.rank import RankStudy
from brushstroke.studies.rounding import RoundingStudy
from brushstroke.studies.runner import Grid
from brushstroke.studies.seeds import SeedsStudy
from brushstroke.studies.study import Material, Study
from brushstroke.studies.targets import TargetsStudy
from brushstroke.study_folder import BASE, check_folder, locked
from brushstroke.training import TrainConfig

QV = ("q_proj", "v_proj")

# on the tiny model
STEPS = 250
RATES = (1e-2, 3e-2, 1e-1)  # arms that train W use a tenth; grids are extended if necessary
SEEDS = (0, 1, 2, 3, 4)
TINY_ROUNDING_RATES = (3e-4, 3e-3, 3e-2)  # the usual one, and a tenth and a hundredth of it
TINY_DIMENSIONS = (1_000, 3_000, 10_000, 30_000, 60_000)  # of 106,496 weights

# on SmolLM2-135M
SMOL_MINUTES = 110  # default time budget
SMOL_STEPS, SMOL_BATCH = 32, 4
SMOL_RATES = (1.5e-3, 5e-3, 1.5e-2)
SMOL_SEEDS = (0, 1, 2)
SMOL_ROWS = {"train": 800, "validation": 32, "test": 48, "other": 400}
SMOL_GENERAL, SMOL_CHARACTERS = 16, 300  # number of texts, and characters of each
SMOL_BUDGET = 915_840  # trained parameters: rank 3 of all matrices, which all sets meet within 5 %


def tiny_paper(
    out: str | Path,
    *,
    seeds: Sequence[int] = SEEDS,
    overwrite: bool = False,
    on_base: Callable[[], None] | None = None,
) -> tuple[list[Study], Material]:
    """Studies and material of `study paper --tiny`; arguments and errors are those of `tiny_material`."""
    material = tiny_material(out, seeds=seeds, overwrite=overwrite, on_base=on_base)
    return paper_questions(material, (1, 2, 4, 8, 16, 32)), material


def tiny_intrinsic(
    out: str | Path,
    *,
    seeds: Sequence[int] = SEEDS,
    overwrite: bool = False,
    on_base: Callable[[], None] | None = None,
) -> tuple[list[Study], Material]:
    """Study and material of `study intrinsic --tiny`; arguments and errors are those of `tiny_material`."""
    return [IntrinsicStudy(dimensions=TINY_DIMENSIONS)], tiny_material(
        out, seeds=seeds, overwrite=overwrite, on_base=on_base
    )


def tiny_rounding(
    out: str | Path,
    *,
    seeds: Sequence[int] = SEEDS,
    overwrite: bool = False,
    on_base: Callable[[], None] | None = None,
) -> tuple[list[Study], Material]:
    """Study and material of `study rounding --tiny`; arguments and errors are those of `tiny_material`."""
    material = tiny_material(out, seeds=seeds, overwrite=overwrite, on_base=on_base)
    study = RoundingStudy()
    config = TrainConfig(**study.training, batch_size=16)
    return [study], replace(material, config=config, grid=Grid(TINY_ROUNDING_RATES, tuple(seeds)))


def tiny_material(
    out: str | Path,
    *,
    seeds: Sequence[int] = SEEDS,
    overwrite: bool = False,
    on_base: Callable[[], None] | None = None,
) -> Material:
    """A small model that is trained first, and texts of the Python standard library.

    Args:
        out: the folder of the study; the model is stored in its subfolder `base`.
        seeds: of every arm.
        overwrite: whether to start the study over.
        on_base: called before the model is trained, but not if it is stored already.

    Raises:
        ConfigError: there is no seed.
        DataError: this Python does not have the texts.
        OutputError: the folder cannot be written, or contains other files or another study, or another
            process runs a study in it.
    """
    grid = Grid(RATES, tuple(seeds))  # raises errors before the model is trained
    folder = Path(out).expanduser()
    check_folder(folder, overwrite=overwrite, with_base=True)
    if (folder / BASE).is_dir():
        base = tiny.tiny_base(folder / BASE)
    else:
        with locked(folder):
            if on_base:
                on_base()
            base = tiny.tiny_base(folder / BASE)
    return Material(
        base,
        tiny.tasks(),
        TrainConfig(max_steps=STEPS, batch_size=16, warmup=20, schedule="linear"),
        grid,
        tiny.general(),
        {
            "model": f"Llama's architecture over bytes, {tiny.LAYERS} layers of width {tiny.WIDTH}, trained "
            f"for {tiny.STEPS:,} steps on the source of Python's standard library",
            "task": "the prose of Python's help texts",
            "other task": "the tables of Python's character encodings",
        },
        shorten=(),
    )


def smollm2_paper(*, seeds: Sequence[int] = SMOL_SEEDS) -> tuple[list[Study], Material]:
    """Studies and material of `study paper --smollm2`: SmolLM2-135M-Instruct on labelled US addresses.

    Downloads the model and the rows if they are missing.

    Args:
        seeds: of every arm.

    Raises:
        AssetError: they cannot be downloaded.
        DataError: this Python does not have the general text.
    """
    addresses = read_task("addresses", labelled_file("addresses"))
    people = read_task("people", labelled_file("people"))
    count = SMOL_ROWS
    material = make_material(
        load_base(model_path(), dtype="float32", device="cpu"),
        list(addresses.training[: count["train"]]),
        validation=list(addresses.training[-count["validation"] :]),
        test=list(addresses.heldout[: count["test"]]),
        other=list(people.training[: count["other"]]),
        general=[{"text": text[:SMOL_CHARACTERS]} for text in tiny.help_texts()[:SMOL_GENERAL]],
        config=TrainConfig(max_steps=SMOL_STEPS, batch_size=SMOL_BATCH, warmup=4, schedule="linear"),
        learning_rates=SMOL_RATES,
        seeds=tuple(seeds),
    )
    description = {
        **material.description,
        "model": "SmolLM2-135M-Instruct, from its Q4_1 weights, in float32",
        "task": "US addresses into JSON",
        "other task": "names of people into JSON",
        "general": "the beginnings of Python's help texts",
    }
    sets = {name: targets for name, targets in matrix_sets(material.sites).items() if name != "up,down"}
    material = replace(material, description=description, shorten=())
    targets = TargetsStudy(sets, SMOL_BUDGET)
    return paper_questions(material, (1, 4, 16, 64), rank=16, targets=targets), material


def paper_questions(
    material: Material,
    ranks: Sequence[int] = (1, 2, 4, 8, 64),
    *,
    rank: int = 8,
    targets: TargetsStudy | None = None,
) -> list[Study]:
    """The paper's questions 1 to 3 for any material; q and v are the matrices if the model has them.

    Args:
        material: model and data.
        ranks: of the second question; the third uses a small one and the largest that the matrices allow.
        rank: of the study that compares seeds.
        targets: the first question, if its sets or budget are not the defaults.

    Raises:
        ConfigError: the matrices allow none of the ranks, or the model has no attention matrices.
    """
    names = {site.name for site in material.sites}
    matrices = QV if names >= set(QV) else ("attention",)
    allowed = allowed_ranks(ranks, matrices, material.sites)
    small = 4 if allowed[-1] > 4 else allowed[0]
    return [
        targets or TargetsStudy(),
        RankStudy(matrices, tuple(ranks)),
        SeedsStudy(matrices, rank),
        DeltaStudy(matrices, (small, allowed[-1])),
    ]
