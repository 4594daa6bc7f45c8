"""The `brushstroke` command: its subcommands, and the handling of errors.

Each command declares its flags in its own file, which is loaded only when the command runs.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cyclopts import App, CycloptsError, UnknownOptionError

import brushstroke
from brushstroke.cli.configfile import apply_config_file, take_config_flag
from brushstroke.cli.console import fail, people, replace_closed_streams, say, show_library_warnings
from brushstroke.cli.help import HelpFormatter
from brushstroke.cli.hints import flag_hint
from brushstroke.cli.interrupt import INTERRUPTED, SigintHandler
from brushstroke.cli.values import refuse_empty
from brushstroke.errors import BrushstrokeError, ConfigError

OK, REFUSED, USAGE = 0, 1, 2
DEBUG = "BRUSHSTROKE_DEBUG"
CONFIG_HELP = "--config FILE.yaml: flags from a file; those on the command line take precedence."

COMMANDS = {  # name, in the order of their use → its function, its help, and an example
    "plan": (
        "brushstroke.cli.train:plan",
        "Show what train would do, without training.",
        "brushstroke plan models/SmolLM2-135M rows.jsonl --rank 16",
    ),
    "data": (
        "brushstroke.cli.data:data",
        "Show examples with the trained tokens marked.",
        "brushstroke data models/SmolLM2-135M rows.jsonl --rows 5",
    ),
    "train": (
        "brushstroke.cli.train:train",
        "Train an adapter on a frozen base.",
        "brushstroke train models/SmolLM2-135M rows.jsonl --out out/mine --eval 10%",
    ),
    "evaluate": (
        "brushstroke.cli.evaluate:evaluate",
        "Loss and scores of answers on a data file.",
        "brushstroke evaluate models/SmolLM2-135M heldout.jsonl --adapter out/mine --base",
    ),
    "generate": (
        "brushstroke.cli.generate:generate",
        "Answer prompts.",
        'brushstroke generate models/SmolLM2-135M "12 Main St" --adapter out/mine',
    ),
    "chat": (
        "brushstroke.cli.generate:chat",
        "Chat with a base and its adapters.",
        "brushstroke chat models/SmolLM2-135M --adapter out/mine",
    ),
    "merge": (
        "brushstroke.cli.merge:merge",
        "Merge an adapter into new weights.",
        "brushstroke merge models/SmolLM2-135M out/mine --out out/merged",
    ),
    "show": (
        "brushstroke.cli.show:show",
        "Show the contents of an adapter.",
        "brushstroke show out/mine",
    ),
    "spectrum": (
        "brushstroke.cli.analysis:spectrum",
        "Singular values and ranks; truncate.",
        "brushstroke spectrum out/mine",
    ),
    "compare": (
        "brushstroke.cli.analysis:compare",
        "Directions that two adapters share.",
        "brushstroke compare out/mine out/other",
    ),
    "relate": (
        "brushstroke.cli.analysis:relate",
        "Directions of its base that an adapter amplifies.",
        "brushstroke relate out/mine models/SmolLM2-135M",
    ),
    "intruders": (
        "brushstroke.cli.analysis:intruders",
        "New directions that the base does not have.",
        "brushstroke intruders out/mine models/SmolLM2-135M",
    ),
    "study": (
        "brushstroke.cli.study:study",
        "Repeat an experiment of the LoRA paper.",
        "brushstroke study rank models/SmolLM2-135M rows.jsonl --out out/rank",
    ),
    "cache": (
        "brushstroke.cli.cache:cache",
        "Show or remove what is kept on disk.",
        "brushstroke cache --clear gguf",
    ),
}

_QUIET = {
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status (0 ok, 1 refused or failed, 2 usage, 130 interrupted)."""
    interrupts = SigintHandler()
    if tokens is None:  # started as a process of its own
        interrupts.install()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    given = list(sys.argv[1:] if tokens is None else tokens)
    try:
        with show_library_warnings():
            rest, config = take_config_flag(given)
            build(config)(rest, exit_on_error=False, print_error=False)
        sys.stdout.flush()
        return OK
    except CycloptsError as error:
        error.verbose = False
        command = next((word for word in given if word in COMMANDS), None)
        problem = _unknown_option(error) or str(error).strip()
        fail(f"{problem} See: brushstroke {f'{command} ' if command else ''}--help")
        return USAGE
    except ConfigError as error:
        return _failed(error, USAGE)
    except BrushstrokeError as error:
        return _failed(error, REFUSED)
    except KeyboardInterrupt as error:
        people.cache_clear()  # its buffer may still contain an interrupted line
        say(str(error) or "interrupted")
        if tokens is None:
            interrupts.end()
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes stdout again when it ends
        return REFUSED
    except Exception as error:
        return _failed(error, REFUSED, _in_words(error))


def build(config: Path | None = None) -> App:
    """Build the command with all its subcommands, without loading them.

    Args:
        config: a YAML file with flags for the command.
    """
    app = App(
        name="brushstroke",
        help="Low-rank adaptation of any PyTorch network: adapt, train, switch, merge.",
        version=brushstroke.__version__,
        help_format="plaintext",
        help_formatter=HelpFormatter(),
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    from_file = [] if config is None else [partial(apply_config_file, config), refuse_empty]
    for name, (place, about, example) in COMMANDS.items():
        app.command(
            place,
            name=name,
            help=about,
            help_epilogue=f"Example: {example}\n\n{CONFIG_HELP}",
            config=[refuse_empty, *from_file],
            sort_key=list(COMMANDS).index(name),
        )
    return app


def _unknown_option(error: CycloptsError) -> str | None:
    if not isinstance(error, UnknownOptionError):
        return None
    flag = (error.token.keyword or error.token.value).partition("=")[0]
    known = [name for argument in error.argument_collection if argument.parse for name in argument.names]
    return f"Unknown option: {flag}{flag_hint(flag, known)}."


def _failed(error: Exception, status: int, message: str | None = None) -> int:
    fail(_one_line(message or str(error)))
    if os.environ.get(DEBUG, "") not in ("", "0"):
        traceback.print_exception(error)
    return status


def _one_line(message: str) -> str:
    """Join a list of problems into one line."""
    return re.sub(r"\s*\n\s*", "; ", re.sub(r":\s*\n\s*", ": ", message.strip()))


def _in_words(error: Exception) -> str:
    said = str(error).strip()
    first = said.splitlines()[0] if said else ""
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in said:
        return "out of memory; give a smaller --micro-tokens or --batch-size, or --gradient-checkpointing"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if "determine home directory" in said:
        return "a path begins with ~ and an unknown user name; write it without the ~"
    return (
        f"unexpected {kind}{f': {first}' if first else ''}. This is a bug in brushstroke; set {DEBUG}=1 to "
        "see where it comes from, and report it"
    )
