"""What the benchmarks share: the data sets, runs in processes of their own, dated results."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brushstroke.samples import labelled_file, model_path, read_task

HERE = Path(__file__).resolve().parent


RESULTS = HERE / "results.jsonl"
UNSLOTH = HERE.parent / ".venv-unsloth" / "bin" / "python"  # its pins clash with ours
TRIAL_STEPS, TRIAL_SECONDS = 3, 600  # of one dtype, to choose a peer's faster one
SIDES = {
    "brushstroke": "brushstroke",
    "peft": "PEFT + Trainer",
    "grouped": "the same, by length",
    "best": "PEFT's best: faster dtype",
    "trl": "PEFT + TRL's SFTTrainer",
    "unsloth": "Unsloth",
    "full": "full fine-tuning, AdamW",
}
INSTRUCTION = (
    "You split postal addresses of the United States into their parts. The address that you are given "
    "was typed by people in a hurry: words may be misspelt, abbreviated, doubled, in any case, and "
    "commas may be missing. Answer with one JSON object and nothing else. Its keys are the names of "
    "the parts, in the order in which the parts occur; its values are the words of the address "
    "exactly as they were typed, punctuation included. Known parts are: Recipient, "
    "AddressNumberPrefix, AddressNumber, AddressNumberSuffix, StreetNamePreModifier, "
    "StreetNamePreDirectional, StreetNamePreType, StreetName, StreetNamePostType, "
    "StreetNamePostDirectional, SubaddressType, SubaddressIdentifier, BuildingName, OccupancyType, "
    "OccupancyIdentifier, PlaceName, StateName, ZipCode, USPSBoxType and USPSBoxID. Leave out a part "
    "that does not occur. Never invent a word, never correct one, and use every word exactly once. "
    "Address:\n"
)


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a task: addresses, the same under a long instruction, or plain texts."""
    if task == "plain":
        return list(plain_texts(count))
    found = read_task("addresses", labelled_file("addresses")).training[:count]
    if len(found) < count:
        raise SystemExit(f"the address set has {len(found)} training rows; {count} are asked for")
    if task == "addresses":
        return found
    return [
        {
            "messages": [
                {**m, "content": INSTRUCTION + m["content"]} if m["role"] == "user" else m
                for m in row["messages"]
            ]
        }
        for row in found
    ]


def plain_texts(count: int) -> Iterator[dict[str, str]]:
    """Paragraphs of the help texts that every Python carries: nothing shared, every token trained."""
    from pydoc_data.topics import topics

    paragraphs = [p.strip() for text in topics.values() for p in text.split("\n\n")]
    fitting = list(dict.fromkeys(p for p in paragraphs if 300 < len(p) < 900))
    if len(fitting) < count:
        raise SystemExit(f"there are {len(fitting)} fitting paragraphs; {count} are asked for")
    return ({"text": text} for text in fitting[:count])


@contextmanager
def prepared(
    rows: Sequence[dict[str, Any]], device: str = "cpu", base: str | None = None, **settings: Any
) -> Iterator[dict[str, Any]]:
    """A data file of the rows in a scratch folder, within the settings that a run is given."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        yield {
            "base": base or str(model_path()),
            "data": str(data),
            "scratch": scratch,
            "device": device,
            "dtype": "float32",
            "quantize": None,
            "rank": 8,
            "seed": 0,
            "steps": len(rows) // settings.get("batch_size", 8),
            "batch_size": 8,
            "peer_parts": 1,
            "learning_rate": 1e-3,
            **settings,
        }


def in_own_process(
    script: Path, settings: dict[str, Any], python: str | Path = sys.executable, timeout: float | None = None
) -> Any:
    """The JSON value on the last line of what a script prints, given settings in a process of its own."""
    command = [str(python), str(script), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    if done.returncode:
        sys.exit(f"{script.name} failed with {settings}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_side(side: str, settings: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """Run one side in a process of its own: its figures, and its wall time from outside.

    Raises:
        subprocess.TimeoutExpired: the process took longer than `timeout` seconds, and was stopped.
    """
    script, python = HERE / "_run_trainer.py", Path(sys.executable)
    if side == "brushstroke":
        script = HERE / "_run_brushstroke.py"
    elif side == "unsloth":
        if not UNSLOTH.exists():
            raise SystemExit(f"{UNSLOTH} is missing; run: make {UNSLOTH.parent.parent.name}/.installed")
        script, python = HERE / "_run_unsloth.py", UNSLOTH
        settings = {**settings, "base": _as_folder(settings)}
    elif side == "best":
        settings = {**settings, "dtype": _faster_dtype(settings)}
    began = time.perf_counter()
    run = in_own_process(script, {**settings, "side": side}, python, timeout)
    run["outside_seconds"] = time.perf_counter() - began
    run["real_tokens_per_second"] = run["real_tokens"] / run["seconds"]
    run["mean_loss"] = statistics.fmean(run["losses"])
    return run


def _as_folder(settings: dict[str, Any]) -> str:
    """The base as a folder of safetensors, for peers that read nothing else."""
    folder = Path(settings["scratch"]) / "base"
    if not folder.exists():
        import brushstroke as bs

        base = bs.load_base(settings["base"], dtype=settings["dtype"])
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return str(folder)


def _faster_dtype(settings: dict[str, Any]) -> str:
    """The dtype in which the peer's few first steps are faster; chosen once for a benchmark."""
    chosen = Path(settings["scratch"]) / "faster_dtype"
    if not chosen.exists():
        speeds = {}
        for dtype in ("float32", "bfloat16"):
            trial = {**settings, "dtype": dtype, "steps": TRIAL_STEPS}
            try:
                speeds[dtype] = run_side("grouped", trial, TRIAL_SECONDS)["real_tokens_per_second"]
            except subprocess.TimeoutExpired:
                speeds[dtype] = 0.0
        chosen.write_text(max(speeds, key=speeds.__getitem__))
    return chosen.read_text()


def interleaved(
    sides: Sequence[str], rounds: int, settings: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Let the sides take turns, and say what each run gave."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            runs[side].append(run_side(side, settings))
            print(f"{SIDES[side]:26} {describe(runs[side][-1])}", file=sys.stderr, flush=True)
    return runs


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median of every number of several runs."""
    return {
        key: statistics.median(run[key] for run in runs)
        for key, value in runs[0].items()
        if isinstance(value, int | float)
    }


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of a/b over rounds, with its 95 % interval (Student's t of the logarithms)."""
    from scipy.stats import t

    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / len(logs) ** 0.5
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def describe(run: dict[str, Any]) -> str:
    """One line on a run."""
    return (
        f"{run['real_tokens_per_second']:7.1f} real tokens/s   {run['peak_bytes'] / 2**30:5.2f} GiB   "
        f"mean loss {run['mean_loss']:.4f}   loop {run['seconds']:6.1f} s   "
        f"start and end {run['outside_seconds'] - run['seconds']:5.1f} s"
    )


def keep(benchmark: str, **figures: Any) -> None:
    """Append a dated line to `results.jsonl`."""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{os.cpu_count()} cores, {features()}",
        **figures,
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def features() -> str:
    """The processor's vector instructions, the GPU if there is one, and torch's version."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{gpu}, torch {torch.__version__}"
