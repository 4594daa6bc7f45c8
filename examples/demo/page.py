"""The demo's page: the same results as on the terminal, in one file that is readable offline."""

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from settings import Settings
from show import line, megabytes, percent

import brushstroke as bs
from brushstroke.report import Page, bars, curves

TITLE = "Three brush strokes on one model"
LEAD = (
    "SmolLM2-135M-Instruct stays frozen. Three low-rank adapters, trained on this machine, teach it to split "
    "messy lines into JSON: US addresses, names of people, names of companies."
)


def write(
    file: Path,
    *,
    form: Settings,
    results: Mapping[str, Any],
    before: Any,
    judged: Mapping[str, Any],
    runs: Mapping[str, Any],
    mixed: Sequence[Any],
    merged: Any,
    seconds: float,
) -> None:
    """Write the page."""
    page = Page(TITLE, LEAD)
    _before_and_after(page, results)
    _untouched(page, before)
    for name, found in judged.items():
        _adapter(page, name, found)
    _training(page, results, runs)
    _switching(page, results, mixed)
    _merging(page, results, merged)
    _made(page, form, seconds)
    page.write(file)


def scores_figure(results: Mapping[str, Any]) -> str:
    """The scores of the base on addresses, and of every adapter on its own rows, as bars."""
    names = {"valid_json": "valid JSON", "field_f1": "field F1", "exact_match": "exact match"}
    groups = {"the base, on addresses": results["base"], **results["adapters"]}
    return bars(
        {group: {text: found[key] for key, text in names.items()} for group, found in groups.items()},
        y="share of held-out rows (F1: of fields)",
        limits=(0.0, 1.0),
    )


def _before_and_after(page: Page, results: Mapping[str, Any]) -> None:
    page.section("Before and after, on rows that were never trained on")
    page.figure(scores_figure(results))
    page.table(
        ["", "valid JSON", "field F1", "exact match", "rows"],
        [
            [
                name,
                percent(found["valid_json"]),
                f"{found['field_f1']:.2f}",
                percent(found["exact_match"]),
                found["rows"],
            ]
            for name, found in {"the base, on addresses": results["base"], **results["adapters"]}.items()
        ],
        "An answer is valid when the whole of it parses to one JSON object. Field F1 counts (key, value) "
        "pairs over all rows.",
    )


def _untouched(page: Page, before: Any) -> None:
    page.section("How the untouched base fails")
    page.text(
        "What the base answers when it is asked to split an address into JSON, up to a right one's length:"
    )
    for prompt, answer in list(zip(before.prompts, before.answers, strict=True))[:3]:
        page.code(answer.text, caption=line(prompt))


def _adapter(page: Page, name: str, found: Any) -> None:
    page.section(f"With the adapter for {name}")
    page.table(
        ["line", "answer", "expected"],
        [
            [line(prompt), answer.text, "the same" if answer.text.strip() == expected.strip() else expected]
            for prompt, answer, expected in list(
                zip(found.prompts, found.answers, found.expected, strict=True)
            )[:8]
        ],
    )


def _training(page: Page, results: Mapping[str, Any], runs: Mapping[str, Any]) -> None:
    page.section("Training")
    figure = curves(
        {name: run.losses for name, run in runs.items()}, x="optimiser step", y="loss per trained token"
    )
    page.figure(figure)
    page.table(
        ["adapter", "real tokens", "seconds", "tokens/s", "peak memory", "adapter", "base"],
        [
            [
                name,
                f"{found['real_tokens']:,}",
                f"{found['seconds']:.0f}",
                f"{found['real_tokens'] / found['seconds']:.0f}",
                megabytes(found["peak_memory_bytes"]),
                megabytes(found["adapter_bytes"]),
                megabytes(results["base_bytes"]),
            ]
            for name, found in results["adapters"].items()
        ],
        "Peak memory: the highest of the process by the end of that run, loading and judging included.",
    )


def _switching(page: Page, results: Mapping[str, Any], mixed: Sequence[Any]) -> None:
    page.section("Switching, and mixed batches with all of them")
    page.text(
        f"All three adapters sit in the model at once. Switching the whole model to another one takes "
        f"{1000 * results['switch_ms']:.0f} µs (median), because no weight moves. "
        "These rows were answered in mixed batches:"
    )
    page.table(
        ["adapter", "line", "answer"],
        [[row.adapter or "the untouched base", row.line, row.answer] for row in mixed],
    )


def _merging(page: Page, results: Mapping[str, Any], merged: Any) -> None:
    page.section("Merging")
    page.text(
        f"W + U·V, computed once, gives a plain model: the same classes of modules "
        f"({'checked' if merged.same_classes else 'NOT the same here'}), "
        f"{'the same' if merged.same_tokens else 'NOT the same'} {merged.tokens:,} tokens on "
        f"{merged.compared} held-out prompts as the adapted model, and a forward pass of "
        f"{merged.merged_ms:.1f} ms against the base's {merged.base_ms:.1f} ms: {merged.latency_ratio:.2f}×."
    )


def _made(page: Page, form: Settings, seconds: float) -> None:
    page.section("How this was made")
    page.table(
        ["what", "value"],
        [
            ["command", "make demo" if form.name == "full" else f"BRUSHSTROKE_DEMO={form.name} make demo"],
            ["time", f"{seconds / 60:.1f} minutes"],
            ["rows trained on, once each", ", ".join(f"{count} {name}" for name, count in form.rows.items())],
            ["adapters", "rank 8, alpha 16, all linear layers"],
            ["learning rate, examples a step", f"{form.learning_rate:g}, {form.batch_size}"],
            ["machine", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"],
            ["threads", torch.get_num_threads()],
            [
                "versions",
                f"brushstroke {bs.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}",
            ],
            ["rows from", "usaddress 0.5.16 and probablepeople 0.5.6, hand-labelled, MIT"],
        ],
    )
