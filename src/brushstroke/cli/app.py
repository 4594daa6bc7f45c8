"""The `brushstroke` command: its commands by name, and what becomes of errors.

It knows no command's flags: each file beside it declares its own, and is loaded when it is asked for.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

import brushstroke
from brushstroke.cli.configfile import apply_config_file
from brushstroke.cli.console import fail, people, replace_closed_streams, say, show_library_warnings
from brushstroke.cli.help import HelpFormatter
from brushstroke.cli.interrupt import INTERRUPTED, SigintHandler
from brushstroke.cli.values import refuse_empty
from brushstroke.errors import BrushstrokeError, ConfigError

OK, REFUSED, USAGE = 0, 1, 2
DEBUG = "BRUSHSTROKE_DEBUG"

COMMANDS = {  # name → where it is, and whether it takes a config file
    "train": ("brushstroke.cli.train:train", True, "Train an adapter on a frozen base."),
    "plan": ("brushstroke.cli.train:plan", True, "Show what train would do, and stop."),
    "data": ("brushstroke.cli.data:data", False, "Show examples with the trained tokens marked."),
    "generate": ("brushstroke.cli.generate:generate", False, "Answer prompts."),
    "chat": ("brushstroke.cli.generate:chat", False, "Talk to a base and its adapters."),
    "evaluate": ("brushstroke.cli.evaluate:evaluate", False, "Loss and scores of answers on a data file."),
    "merge": ("brushstroke.cli.merge:merge", False, "Fold an adapter into new weights."),
    "show": ("brushstroke.cli.show:show", False, "Show what is in an adapter."),
    "spectrum": ("brushstroke.cli.analysis:spectrum", False, "Singular values and ranks; truncate."),
    "compare": ("brushstroke.cli.analysis:compare", False, "What two adapters share."),
    "relate": ("brushstroke.cli.analysis:relate", False, "What an adapter amplifies in its base."),
    "intruders": ("brushstroke.cli.analysis:intruders", False, "Directions that the base does not have."),
    "study": ("brushstroke.cli.study:study", False, "Answer a question of the LoRA paper by runs."),
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
    if tokens is None:  # the process is ours
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
            build()(given, exit_on_error=False, print_error=False)
        sys.stdout.flush()
        return OK
    except CycloptsError as error:
        error.verbose = False
        command = next((word for word in given if word in COMMANDS), None)
        fail(f"{str(error).strip()} See: brushstroke {f'{command} ' if command else ''}--help")
        return USAGE
    except ConfigError as error:
        return _failed(error, USAGE)
    except BrushstrokeError as error:
        return _failed(error, REFUSED)
    except KeyboardInterrupt as error:
        people.cache_clear()  # a line that was being printed is still in its buffer
        say(str(error) or "interrupted")
        if tokens is None:
            interrupts.end()
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more when it ends
        return REFUSED
    except Exception as error:
        return _failed(error, REFUSED, _in_words(error))


def build() -> App:
    """The command with all its sub-commands, none of them loaded."""
    app = App(
        name="brushstroke",
        help="Low-rank adaptation of any PyTorch network: adapt, train, switch, merge.",
        version=brushstroke.__version__,
        help_format="plaintext",
        help_formatter=HelpFormatter(),
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for name, (place, takes_config, about) in COMMANDS.items():
        checks = [refuse_empty, *([apply_config_file, refuse_empty] if takes_config else [])]
        app.command(place, name=name, help=about, config=checks)
    return app


def _failed(error: Exception, status: int, message: str | None = None) -> int:
    fail(_one_line(message or str(error)))
    if os.environ.get(DEBUG, "") not in ("", "0"):
        traceback.print_exception(error)
    return status


def _one_line(message: str) -> str:
    """A list of problems becomes a sentence."""
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
        return "a path begins with ~ and a name that no user here has; write it without the ~"
    return (
        f"unexpected {kind}{f': {first}' if first else ''}. This is a bug in brushstroke; set {DEBUG}=1 to "
        "see where it comes from, and report it"
    )
