"""What the demo does and measures: training, scores, switching, a mixed batch, a merge."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import show
import torch
from settings import Settings

import brushstroke as bs
from brushstroke.inference import Scores, score
from brushstroke.samples import labelled

BASE_TASK = "addresses"  # what the untouched base is asked
BATCH = 62  # rows that are answered together
SPARE_TOKENS = 12
FIRST_TOKENS = 16


@dataclass(frozen=True)
class Run:
    """What a training run recorded: totals, (step, loss per trained token), whether it is an older one."""

    real_tokens: int
    seconds: float
    peak_memory_bytes: int
    losses: tuple[tuple[int, float], ...]
    reused: bool


@dataclass(frozen=True)
class Judged:
    """How held-out rows were answered: the scores; for each row its prompt, the answer, the expected one."""

    scores: Scores
    prompts: tuple[Any, ...]
    answers: tuple[bs.Answer, ...]
    expected: tuple[str, ...]

    @property
    def rows(self) -> int:
        """How many rows there were."""
        return len(self.answers)

    def as_dict(self) -> dict[str, float | int | None]:
        """The three scores and the number of rows, as results.json has them."""
        names = ("valid_json", "field_f1", "exact_match")
        return {**{name: getattr(self.scores, name) for name in names}, "rows": self.rows}


@dataclass(frozen=True)
class Mixed:
    """One row of the mixed batch: the adapter (None is the base), what it was asked, what it said."""

    adapter: str | None
    line: str
    answer: str


@dataclass(frozen=True)
class Merged:
    """The merged model against the adapted one (tokens) and against the base (time of a forward pass)."""

    same_tokens: bool
    compared: int
    tokens: int
    base_ms: float
    merged_ms: float
    latency_ratio: float  # merged over base, the median of the pairs
    same_classes: bool


def train_or_reuse(base: bs.Base, rows: Sequence[labelled.Row], folder: Path, form: Settings) -> Run:
    """Train an adapter into a folder, or take the one that the same settings and rows made before."""
    lora = bs.LoraConfig(rank=8, alpha=16, targets="all-linear")
    config = bs.TrainConfig(epochs=1, learning_rate=form.learning_rate, batch_size=form.batch_size)
    with show.training() as on_step:
        try:
            result = bs.train(base, list(rows), lora, config, out=folder, resume=True, on_step=on_step)
        except bs.errors.ResumeError:  # made with other settings, or from other rows
            result = bs.train(base, list(rows), lora, config, out=folder, overwrite=True, on_step=on_step)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return Run(
        real_tokens=result.summary["real_tokens"],
        seconds=result.summary["seconds"],
        peak_memory_bytes=result.summary["peak_memory_bytes"],
        losses=tuple((line["step"], line["loss"]) for line in lines),
        reused=result.resumed_from == result.summary["steps"],
    )


def first_words(base: bs.Base, rows: Sequence[labelled.Row]) -> list[tuple[str, str]]:
    """How the base begins to answer some rows: (line, answer) pairs."""
    prompts = [labelled.prompt_of(row) for row in rows]
    answers = bs.generate(base, prompts, max_new_tokens=FIRST_TOKENS, batch_size=len(prompts))
    return [
        (labelled.line_of(row, BASE_TASK), answer.text) for row, answer in zip(rows, answers, strict=True)
    ]


def judge(
    base: bs.Base, bank: bs.Bank, heldout: dict[str, list[labelled.Row]], base_rows: int
) -> dict[str | None, Judged]:
    """How held-out rows are answered, each by its own adapter, and some addresses also by the base (None).

    All of them go through the one frozen base together: batches whose rows use different adapters, arranged
    by the length of the right answers. An answer may be a few tokens longer than the longest right one of its
    batch; what is longer is cut, and so no valid object.
    """
    asked: list[tuple[str | None, labelled.Row]] = [(None, row) for row in heldout[BASE_TASK][:base_rows]]
    asked += [(name, row) for name, rows in heldout.items() for row in rows]
    voices = [voice for voice, _ in asked]
    prompts = [labelled.prompt_of(row) for _, row in asked]
    expected = [row["messages"][-1]["content"] for _, row in asked]
    with show.asking(len(asked)):
        answers = _answers(base, prompts, expected, adapters=bank, rows=voices)
    found = {}
    for name in dict.fromkeys(voices):
        mine = [i for i, voice in enumerate(voices) if voice == name]
        found[name] = Judged(
            score((answers[i].text, expected[i]) for i in mine),
            tuple(prompts[i] for i in mine),
            tuple(answers[i] for i in mine),
            tuple(expected[i] for i in mine),
        )
    return found


def mixed(judged: dict[str | None, Judged], heldout: dict[str, list[labelled.Row]]) -> list[Mixed]:
    """A row of each voice in the batches of `judge`."""
    return [
        Mixed(name, labelled.line_of(heldout[name or BASE_TASK][0], name or BASE_TASK), found.answers[0].text)
        for name, found in judged.items()
    ]


def switch_ms(bank: bs.Bank, rounds: int = 600) -> float:
    """Median time of switching the whole model to another adapter, in milliseconds."""
    names = [*bank.names, None]
    times = []
    for turn in range(rounds):
        begun = time.perf_counter()
        bank.use(names[turn % len(names)])
        times.append(time.perf_counter() - begun)
    bank.use(None)
    return 1000 * statistics.median(times)


def merged(base: bs.Base, adapter: bs.Adapter, adapted: Judged, form: Settings) -> Merged:
    """Merge into a copy; compare its shortest answers with the adapted model's, its speed with the base's."""
    folded = bs.merge(base, adapter)
    short = sorted(range(adapted.rows), key=lambda i: len(adapted.expected[i]))[: form.compared]
    reported = [adapted.answers[i] for i in short]
    answers = _answers(folded, [adapted.prompts[i] for i in short], [adapted.expected[i] for i in short])
    base_times, merged_times = _latencies(base.model, folded.model, form.timed)
    classes = [[type(module) for module in model.modules()] for model in (base.model, folded.model)]
    return Merged(
        same_tokens=all(_agree(one, two) for one, two in zip(answers, reported, strict=True)),
        compared=len(reported),
        tokens=sum(len(answer.tokens) for answer in reported),
        base_ms=statistics.median(base_times),
        merged_ms=statistics.median(merged_times),
        latency_ratio=statistics.median(b / a for a, b in zip(base_times, merged_times, strict=True)),
        same_classes=classes[0] == classes[1],
    )


def _agree(one: bs.Answer, two: bs.Answer) -> bool:
    """Whether the tokens are the same, as far as both answers were allowed to go."""
    shorter = min(len(one.tokens), len(two.tokens))
    whole = {answer.finish for answer in (one, two) if len(answer.tokens) == shorter}
    same = one.tokens[:shorter] == two.tokens[:shorter]
    return same and (len(one.tokens) == len(two.tokens) or whole == {"length"})


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights; a shared one counts once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def _answers(
    base: bs.Base,
    prompts: Sequence[Any],
    expected: Sequence[str],
    rows: Sequence[str | None] = (),
    **voices: Any,
) -> tuple[bs.Answer, ...]:
    """Answers in the order of the prompts; each batch has rows whose right answers are about as long."""
    lengths = [len(ids) for ids in base.tokenizer(list(expected), add_special_tokens=False)["input_ids"]]
    # The base seldom stops: its rows stand together, so that they keep one batch waiting and not several.
    order = sorted(range(len(prompts)), key=lambda i: (bool(rows) and rows[i] is None, lengths[i]))
    found: dict[int, bs.Answer] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        if rows:
            voices["rows"] = [rows[i] for i in batch]
        limit = max(lengths[i] for i in batch) + SPARE_TOKENS
        asked = [prompts[i] for i in batch]
        answers = bs.generate(base, asked, max_new_tokens=limit, batch_size=BATCH, **voices)
        found.update(zip(batch, answers, strict=True))
    return tuple(found[i] for i in range(len(prompts)))


def _latencies(
    first: torch.nn.Module, second: torch.nn.Module, rounds: int
) -> tuple[list[float], list[float]]:
    """Times in milliseconds of one forward pass of each, taken in pairs and in turns."""
    ids = torch.arange(3, 3 + 128)[None].to(next(first.parameters()).device)

    def once(model: torch.nn.Module) -> float:
        begun = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - begun)

    times: tuple[list[float], list[float]] = ([], [])
    pair: list[tuple[Callable[[], float], list[float]]] = [
        (lambda: once(first), times[0]),
        (lambda: once(second), times[1]),
    ]
    with torch.no_grad():
        for model in (first, second):
            once(model)
        for turn in range(rounds):
            for run, kept in pair if turn % 2 else reversed(pair):
                kept.append(run())
    return times
