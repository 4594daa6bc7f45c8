"""The `brushstroke` command: its subcommands, and the handling of errors.

Each command declares its flags in its own file, which is loaded only when the command runs.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError, UnknownOptionError

import brushstroke
from brushstroke.cli.configfile import apply_config_file
from brushstroke.cli.console import fail, people, replace_closed_streams, say, show_library_warnings
from brushstroke.cli.help import HelpFormatter
from brushstroke.cli.hints import flag_hint
from brushstroke.cli.interrupt import INTERRUPTED, SigintHandler
from brushstroke.cli.values import refuse_empty
from brushstroke.errors import BrushstrokeError, ConfigError

OK, REFUSED, USAGE = 0, 1, 2
DEBUG = "BRUSHSTROKE_DEBUG"

COMMANDS = {  # name → its function, whether it takes a config file, and its help
    "train": ("brushstroke.cli.train:train", True, "Train an adapter on a frozen base."),
    "plan": ("brushstroke.cli.train:plan", True, "Show what train would do, without training."),
    "data": ("brushstroke.cli.data:data", False, "Show examples with the trained tokens marked."),
    "generate": ("brushstroke.cli.generate:generate", False, "Answer prompts."),
    "chat": ("brushstroke.cli.generate:chat", False, "Chat with a base and its adapters."),
    "evaluate": ("brushstroke.cli.evaluate:evaluate", False, "Loss and scores of answers on a data file."),
    "merge": ("brushstroke.cli.merge:merge", False, "Merge an adapter into new weights."),
    "show": ("brushstroke.cli.show:show", False, "Show the contents of an adapter."),
    "spectrum": ("brushstroke.cli.analysis:spectrum", False, "Singular values and ranks; truncate."),
    "compare": ("brushstroke.cli.analysis:compare", False, "Directions that two adapters share."),
    "relate": ("brushstroke.cli.analysis:relate", False, "Directions of its base that an adapter amplifies."),
    "intruders": ("brushstroke.cli.analysis:intruders", False, "New directions that the base does not have."),
    "study": ("brushstroke.cli.study:study", False, "Repeat an experiment of the LoRA paper."),
    "cache": ("brushstroke.cli.cache:cache", False, "Show or remove what is kept on disk."),
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
            build()(given, exit_on_error=False, print_error=False)
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


def build() -> App:
    """Build the command with all its subcommands, without loading them."""
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


def _unknown_option(error: CycloptsError) -> str | None:
    if not isinstance(error, UnknownOptionError):
        return None
    flag = error.token.keyword or error.token.value
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
