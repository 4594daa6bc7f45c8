"""The paper's three questions at once, on a model that is trained here."""

from collections.abc import Callable, Sequence
from pathlib import Path

from brushstroke.files import output_errors
from brushstroke.studies import tiny
from brushstroke.studies.delta import DeltaStudy
from brushstroke.studies.rank import RankStudy
from brushstroke.studies.runner import Grid
from brushstroke.studies.seeds import SeedsStudy
from brushstroke.studies.store import BASE
from brushstroke.studies.study import Material, Study
from brushstroke.studies.targets import TargetsStudy
from brushstroke.training import TrainConfig

QV = ("q_proj", "v_proj")
STEPS = 250
RATES = (1e-2, 3e-2, 1e-1)  # of W's own training a tenth; all are extended once where need be
SEEDS = (0, 1, 2, 3, 4)


def tiny_paper(
    out: str | Path, *, seeds: Sequence[int] = SEEDS, on_base: Callable[[], None] | None = None
) -> tuple[list[Study], Material]:
    """Studies and material of `study paper --tiny`.

    Args:
        out: the folder of the study; the model is kept in its `base`.
        seeds: of every arm.
        on_base: told before the model is trained.

    Raises:
        DataError: this Python does not carry the texts.
        OutputError: the folder cannot be written.
    """
    folder = Path(out).expanduser()
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if on_base:
        on_base()
    base = tiny.tiny_base(folder / BASE)
    material = Material(
        base,
        tiny.tasks(),
        TrainConfig(max_steps=STEPS, batch_size=16, warmup=20, schedule="linear"),
        Grid(RATES, tuple(seeds)),
        tiny.general(),
        {
            "model": f"Llama's architecture over bytes, {tiny.LAYERS} layers of width {tiny.WIDTH}, trained "
            f"for {tiny.STEPS:,} steps on the source of Python's standard library",
            "task": "the prose of Python's help texts",
            "other task": "the tables of Python's character encodings",
        },
    )
    return paper_questions(material, (1, 2, 4, 8, 16, 32)), material


def paper_questions(material: Material, ranks: Sequence[int] = (1, 2, 4, 8, 64)) -> list[Study]:
    """The paper's questions 1 to 3 of any material, with q and v as the matrices where there are such.

    Args:
        material: model and data.
        ranks: of the second question; the third takes rank 4 and the largest.
    """
    names = {site.name for site in material.sites}
    matrices = QV if names >= set(QV) else ("attention",)
    return [
        TargetsStudy(),
        RankStudy(matrices, tuple(ranks)),
        SeedsStudy(matrices, 8),
        DeltaStudy(matrices, (4, max(ranks))),
    ]
