"""The entry point: choose the verb, run it, and turn errors into one line and an exit status."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import FrameType
from typing import IO, NamedTuple

from minrnn.files import nearest


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
    "MINRNN_CACHE": "folder for downloads and tokenized corpora (default: the user's cache)",
    "MINRNN_DEBUG": "1: show the traceback of an error",
}

FAILURE, USAGE = 1, 2  # exit statuses; a signal's is 128 + its number, as shells have it
BROKEN_PIPE = 128 + 13  # SIGPIPE, which not every system has a name for

ENDING_SIGNALS = ("SIGTERM", "SIGHUP")
"""Signals that end a command as Ctrl-C does where nothing takes them for a request; Windows has no SIGHUP."""

USAGE_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)
"""What says itself what is wrong with arguments and files."""

FAILURES = (RuntimeError, OSError, ImportError, subprocess.SubprocessError, EOFError, BufferError)
"""What says itself what has failed; torch's lack of memory is a RuntimeError."""

TYPED_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError)
"""Errors whose kind says more than their text."""

MIN_COLUMNS = 60
"""Columns that help and tables are given at least."""


class Ended(KeyboardInterrupt):
    """A signal ends the command; locks, partial files and the terminal are put right on the way.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run `minrnn` with these arguments.

    Args:
        argv: the arguments after the program's name; those of the process when None.

    Returns:
        The exit status: 0, 1 for a failure, 2 for bad usage or input, 128 + n for signal n.
    """
    _open_descriptors()
    _widen_terminal()
    with _ended_by_signals():
        try:
            status = _main(list(sys.argv[1:] if argv is None else argv))
        except SystemExit:  # help was asked for
            if lost := _flush():
                return lost
            raise
        return _flush() or status


def _main(args: list[str]) -> int:
    try:
        if not args or args[0] in ("-h", "--help"):
            print(help_text())
            return 0
        if args[0] in ("-V", "--version"):
            print(f"minrnn {version()}")
            return 0
        if args[0] not in COMMANDS:
            hint = nearest(args[0], COMMANDS)
            raise ValueError(f"unknown command {args[0]!r}{hint} (minrnn --help lists them)")
        return int(importlib.import_module(COMMANDS[args[0]].module).run(args[1:]))
    except Ended as end:
        return 128 + end.signum
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has gone, as `head` does: nobody is left to tell
        return BROKEN_PIPE
    except USAGE_ERRORS as error:
        return _complain(error, USAGE)
    except (*FAILURES, *TYPED_ERRORS) as error:
        return _complain(error, FAILURE)


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


def _open_descriptors() -> None:
    """Open those of the descriptors 0 to 2 that are closed, or the next file would get their numbers.

    What is written to its stdout and stderr then goes nowhere, and what they cannot encode is escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        with contextlib.suppress(AttributeError):  # a test's or a notebook's
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _widen_terminal() -> None:
    """Let tables and help be as wide as they have to be; in a narrower terminal they would vanish."""
    width = shutil.get_terminal_size().columns  # of COLUMNS, or the terminal, or by default
    if width < MIN_COLUMNS or os.environ.get("COLUMNS") == "0":
        os.environ["COLUMNS"] = str(max(width, MIN_COLUMNS))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let the signals that would end the process raise Ended; one that is ignored, as under nohup, stays so.

    What goes wrong with the output in another thread, such as one that redraws a bar, the main thread meets
    itself, and says.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        raise Ended(signum)

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError) or _debugging():
            old_hook(args)

    known = [getattr(signal, name) for name in ENDING_SIGNALS if hasattr(signal, name)]
    ours = [signum for signum in known if signal.getsignal(signum) is signal.SIG_DFL]
    old_hook, threading.excepthook = threading.excepthook, hook
    for signum in ours:
        signal.signal(signum, end)
    try:
        yield
    finally:
        for signum in ours:
            signal.signal(signum, signal.SIG_DFL)
        threading.excepthook = old_hook


def _complain(error: Exception, status: int) -> int:
    """Say an error in one line on stderr, unless MINRNN_DEBUG asks for its traceback."""
    if _debugging():
        raise error
    with contextlib.suppress(OSError):  # nobody reads it; the status says it too
        print(f"minrnn: error: {_describe(error)}", file=sys.stderr, flush=True)
    return status


def _debugging() -> bool:
    return os.environ.get("MINRNN_DEBUG") == "1"


def _describe(error: Exception) -> str:
    """Return an error as one line; the system's own begin with the file that they are about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, TYPED_ERRORS):
        return f"{kind}: {text} (MINRNN_DEBUG=1 shows where)"
    return text or kind


def _flush() -> int:
    """Write out what is buffered; return the status where that fails, and let the exit of Python succeed."""
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            status = status or BROKEN_PIPE
            _discard(stream)
        except (OSError, ValueError) as error:  # a full disk; a stream that is closed
            _discard(stream)
            status = status or _complain(error, FAILURE)
    return status


def _discard(stream: IO[str]) -> None:
    """Let what a stream holds, and whatever else is written to it, go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
