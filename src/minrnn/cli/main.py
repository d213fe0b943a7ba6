"""The entry point: choose the verb, run it, and turn errors into one line and an exit status."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple


class Command(NamedTuple):
    """A verb: the module whose `run(args) -> int` does it, and its line in the help."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "demo": Command("minrnn.cli.demo", "train a small model, compare it with a baseline, and let it write"),
    "train": Command("minrnn.cli.train", "train a model from a recipe, or go on with a run"),
    "sample": Command("minrnn.cli.sample", "write text with a trained model"),
    "evaluate": Command("minrnn.cli.evaluate", "measure a trained model on its validation split"),
    "act": Command("minrnn.cli.act", "let a trained policy act in its environment, and film it"),
    "make-data": Command("minrnn.cli.make_data", "train a policy in an environment and record what it does"),
    "engines": Command("minrnn.cli.engines", "show what computes the recurrence on which device"),
    "bench": Command("minrnn.cli.bench", "time and check engines and layers beside other implementations"),
    "reproduce": Command("minrnn.cli.reproduce", "make the paper's tables and figures again"),
}

ENVIRONMENT = {
    "MINRNN_ENGINE": "reference: use the plain loop instead of the compiled engines",
    "MINRNN_DATA": "folder that is searched for data sets before they are downloaded",
    "MINRNN_CACHE": "folder for downloads and tokenised corpora (default: the user's cache)",
    "MINRNN_DEBUG": "1: show the traceback of an error",
}

FAILURE, USAGE = 1, 2  # exit statuses; a signal's is 128 + its number, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run `minrnn` with these arguments.

    Args:
        argv: the arguments after the program's name; those of the process when None.

    Returns:
        The exit status: 0, 1 for a failure, 2 for bad usage or input, 128 + n for signal n.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"minrnn {version()}")
        return 0
    if args[0] not in COMMANDS:
        matches = difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=0.5)
        nearest = f"; did you mean {matches[0]}?" if matches else ""
        return _complain(f"unknown command {args[0]!r}{nearest} (minrnn --help lists them)", USAGE)
    return _run(COMMANDS[args[0]], args[1:])


def help_text() -> str:
    """Return what `minrnn --help` prints."""
    return "\n".join(
        [
            "usage: minrnn COMMAND [options]",
            "",
            "Recurrent networks that train in parallel: minGRU and minLSTM.",
            "",
            "commands:",
            *_columns({name: command.help for name, command in COMMANDS.items()}),
            "",
            "`minrnn COMMAND --help` shows a command's options; -V, --version shows the version.",
            "",
            "environment:",
            *_columns(ENVIRONMENT),
        ]
    )


def version() -> str:
    """Return the installed version; a checkout that is not installed has none."""
    try:
        return metadata.version("minrnn")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _columns(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}}  {text}" for name, text in rows.items()]


def _run(command: Command, args: list[str]) -> int:
    """Run a verb; its errors become one line on stderr unless MINRNN_DEBUG asks for the traceback."""
    try:
        return int(importlib.import_module(command.module).run(args))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has gone, as `head` does: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit succeeds
        return 128 + 13  # SIGPIPE, which not every system has a name for
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        _raise_in_debug(error)
        return _complain(_describe(error), USAGE)
    except (RuntimeError, OSError, ImportError) as error:
        _raise_in_debug(error)
        return _complain(_describe(error), FAILURE)


def _raise_in_debug(error: Exception) -> None:
    if os.environ.get("MINRNN_DEBUG") == "1":
        raise error


def _describe(error: Exception) -> str:
    """Return an error as one line; the system's own begin with the file that they are about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _complain(message: str, status: int) -> int:
    print(f"minrnn: error: {message}", file=sys.stderr)
    return status
