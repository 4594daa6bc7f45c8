"""Memory and times of training on a large JSONL file: first run, second run, and after a kill.

It makes two-turn chats of 200 to 2,000 characters from a seed, and trains one step of one example on
SmolLM2-135M. The memory is the sum of the anonymous pages of all processes of the command (Linux only), minus
the same of a run on the first 1,000 rows.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from _common import keep
from brushstroke.samples import model_path

WORDS = """
the of and a to in is you that it he was for on are as with his they at be this have from or one had
by word but not what all were we when your can said there use an each which she do how their if will
up other about out many then them these so some her would make like him into time has look two more
write see number no way could people my than first water been call who its now find long down day
did get come
"""
FILE = "chats.jsonl"


def chats(seed: int = 0) -> Iterator[str]:
    """Lines of JSON; a tenth of the words are random letters, which a tokenizer cannot have cached."""
    chosen = random.Random(seed)
    roles = ("user", "assistant") * 2
    while True:
        shares = [chosen.uniform(0.1, 1) for _ in roles]
        size = chosen.randint(200, 2000) / sum(shares)
        messages = [
            {"role": role, "content": _text(chosen, int(size * share))}
            for role, share in zip(roles, shares, strict=True)
        ]
        yield json.dumps({"messages": messages}) + "\n"


def _text(chosen: random.Random, size: int) -> str:
    words, length, known = [], 0, WORDS.split()
    while length < size:
        rare = chosen.random() < 0.1
        letters = chosen.choices("abcdefghijklmnopqrstuvwxyz", k=chosen.randint(3, 10)) if rare else ()
        words.append("".join(letters) or chosen.choice(known))
        length += len(words[-1]) + 1
    return " ".join(words)[: max(size, 10)]


def write(path: Path, size: int) -> int:
    """Write lines until the file has this size, and return their number."""
    written = count = 0
    with path.open("w") as file:
        for line in chats():
            written += file.write(line)
            count += 1
            if written >= size:
                return count
    raise AssertionError("the chats do not end")


def anonymous(process: int) -> float:
    """MiB of anonymous memory of a process and its descendants."""
    total = 0.0
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
        total = int(found[1]) / 1024 if found else 0.0
        for task in Path(f"/proc/{process}/task").iterdir():
            total += sum(anonymous(int(child)) for child in (task / "children").read_text().split())
    except OSError:
        pass  # it has ended
    return total


def train(data: Path, folder: Path, kill_after: float | None = None) -> dict[str, float]:
    """Seconds of the command, and peaks of its memory: before the base is loaded, and of all."""
    log = folder / "log.txt"
    shutil.rmtree(folder / "out", ignore_errors=True)
    flags = ["--max-steps", "1", "--batch-size", "1", "--out", str(folder / "out"), "--no-keep-best"]
    command = [sys.executable, "-m", "brushstroke", "train", str(model_path()), str(data), *flags]
    peaks = {"tokenising_mib": 0.0, "peak_mib": 0.0}
    began = time.perf_counter()
    own = os.environ | {"BRUSHSTROKE_CACHE": str(folder)}
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=own)
        while process.poll() is None:
            used = anonymous(process.pid)
            peaks["peak_mib"] = max(peaks["peak_mib"], used)
            if "loading" not in log.read_text():
                peaks["tokenising_mib"] = max(peaks["tokenising_mib"], used)
            if kill_after is not None and time.perf_counter() - began > kill_after:
                process.kill()
            time.sleep(0.25)
    seconds = time.perf_counter() - began
    if kill_after is None and process.returncode:
        raise SystemExit(log.read_text())
    return {"seconds": round(seconds, 1), **{name: round(peak) for name, peak in peaks.items()}}


def main() -> None:
    """Run it, and append the figures to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--kill-after", type=float, default=60.0, help="seconds, in a run before the first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write(folder / FILE, options.bytes)
        with (folder / FILE).open() as file:
            (folder / "few.jsonl").write_text("".join(islice(file, 1000)))
        model_path()
        found = {
            "small data": [train(folder / "few.jsonl", folder) for _ in range(2)][1],
            "killed": train(folder / FILE, folder, options.kill_after),
            "first": train(folder / FILE, folder),
            "second": train(folder / FILE, folder),
        }
        kept = sum(file.stat().st_size for file in (folder / "data").rglob("*") if file.is_file())
    for name, figures in found.items():
        print(f"{name:12} {figures}", flush=True)
    above = {name: found[name]["peak_mib"] - found["small data"]["peak_mib"] for name in ("first", "second")}
    print(f"{count:,} rows; {kept / 2**30:.2f} GiB in the cache; peak above small data: {above} MiB")
    keep("large_data", bytes=options.bytes, rows=count, cache_bytes=kept, runs=found)


if __name__ == "__main__":
    main()
