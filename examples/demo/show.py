"""What the demo prints: headings, progress, answers, tables. Without a terminal, plain lines."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from settings import Settings

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
LINES = 8  # reports of a training run where there is no terminal to redraw


def opening(form: Settings) -> None:
    """Say what will happen and how long it will take."""
    minutes = max(1, round(form.estimated_seconds() / 60))
    console.print(
        f"[bold]Three adapters on one frozen model[/] ({form.name} form): about {minutes} "
        f"minute{'s' if minutes > 1 else ''} on this machine ({torch.get_num_threads()} threads), "
        "after the downloads."
    )
    if form.name == "full":
        console.print("BRUSHSTROKE_DEMO=quick shows the same in less time, with less training.")


def heading(text: str) -> None:
    """Begin a part."""
    console.print(f"\n[bold]{escape(text)}[/]")


def loaded(base: Any, weight_bytes: int) -> None:
    """Say what the base is."""
    count = sum(weight.numel() for weight in base.model.parameters())
    console.print(
        f"The base: SmolLM2-135M-Instruct, {count / 1e6:.0f} million weights, {megabytes(weight_bytes)} in "
        f"{str(base.dtype).removeprefix('torch.')} on {base.device}; none of them will change."
    )


@contextmanager
def training() -> Iterator[Callable[[Any], None]]:
    """Live progress of a training run; gives what `train` calls after every step."""
    tokens = seconds = done = 0.0
    with _progress("{task.fields[state]}") as progress:
        task = progress.add_task("training", total=None, state="")

        def on_step(event: Any) -> None:
            nonlocal tokens, seconds, done
            tokens, seconds, done = tokens + event.real_tokens, seconds + event.seconds, done + 1
            state = (
                f"loss {event.loss:.3f} · {tokens / seconds:,.0f} real tokens/s · "
                f"peak memory {megabytes(event.peak_memory_bytes)}"
            )
            progress.update(task, completed=event.step, total=event.steps, state=state)
            if not console.is_terminal and event.step % -(-event.steps // LINES) == 0:
                left = seconds / done * (event.steps - event.step)
                console.print(f"  step {event.step} of {event.steps} · {state} · {left:.0f} s left")

        yield on_step


@contextmanager
def asking(rows: int) -> Iterator[None]:
    """While rows are answered, in mixed batches."""
    if not console.is_terminal:
        yield
        return
    with console.status(f"answering {rows} held-out rows"):
        yield


def pairs(found: Sequence[tuple[str, str]]) -> None:
    """Show lines with the answers to them."""
    for asked, answer in found:
        console.print(f"  {escape(asked)}")
        console.print(f"  [dim]{escape(shortened(answer))}[/]")


def answers(who: str, judged: Any, limit: int) -> None:
    """Say how often the answers were valid, and show some."""
    valid = percent(judged.scores.valid_json)
    console.print(f"{who}: valid JSON in {valid} of {judged.rows} rows. For example:")
    shown = list(zip(judged.prompts, judged.answers, strict=True))[:limit]
    pairs([(line(prompt), answer.text) for prompt, answer in shown])


def trained(run: Any) -> None:
    """Say what an adapter was trained on."""
    reported = f"trained on {run.real_tokens:,} tokens in {run.seconds:.0f} s"
    reused = f"Reused: the same rows and settings made it before, {reported}."
    console.print(reused if run.reused else f"{reported.capitalize()}.")


def mixed(rows: Sequence[Any], switch_ms: float) -> None:
    """Show the batch whose rows use different adapters."""
    console.print(f"Switching the whole model takes {1000 * switch_ms:.0f} µs. One batch, four behaviours:")
    for row in rows:
        console.print(f"  [bold]{row.adapter or 'the untouched base'}[/]: {escape(row.line)}")
        console.print(f"  [dim]{escape(shortened(row.answer))}[/]")


def merged(found: Any) -> None:
    """Show what merging did."""
    console.print(
        f"{'The same' if found.same_tokens else 'DIFFERENT'} tokens as the adapted model on {found.compared} "
        f"prompts ({found.tokens:,} tokens). A forward pass takes {found.merged_ms:.1f} ms, the base's "
        f"{found.base_ms:.1f} ms ({found.latency_ratio:.2f}×)."
    )


def closing(results: dict[str, Any], out: Path, model: Path, seconds: float) -> None:
    """The table of everything, and where to go on."""
    console.print()
    table = Table(
        "", "valid JSON", "field F1", "exact match", "real tokens", "training", "peak memory", "size"
    )
    base = results["base"]
    table.add_row("the base, on addresses", *_scores(base), "", "", "", megabytes(results["base_bytes"]))
    for name, found in results["adapters"].items():
        table.add_row(
            f"+ {name}",
            *_scores(found),
            f"{found['real_tokens']:,}",
            f"{found['seconds']:.0f} s",
            megabytes(found["peak_memory_bytes"]),
            megabytes(found["adapter_bytes"]),
        )
    console.print(table)
    console.print(f"Done in {seconds / 60:.1f} minutes. {out / 'report.html'} shows all of it. Go on with:")
    adapter, rows = out / "adapters" / "addresses", out / "heldout" / "addresses.jsonl"
    for command in (
        f"show {adapter}",
        f"evaluate {model} {rows} --adapter {adapter}",
        f"chat {model} --adapter {adapter}",
    ):
        console.print(f"  .venv/bin/brushstroke {command}", markup=False, soft_wrap=True)


def line(prompt: Sequence[dict[str, str]]) -> str:
    """The raw line that a prompt asks about."""
    return prompt[-1]["content"].partition("\n")[2]


def shortened(text: str, limit: int = 160) -> str:
    """A text on one line, cut where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[:limit] + " …"


def percent(share: float) -> str:
    """0.975 → 98 %."""
    return f"{100 * share:.0f} %"


def megabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def _scores(found: dict[str, Any]) -> tuple[str, str, str]:
    return percent(found["valid_json"]), f"{found['field_f1']:.2f}", percent(found["exact_match"])


def _progress(extra: str) -> Progress:
    columns = [
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        TextColumn(extra),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
