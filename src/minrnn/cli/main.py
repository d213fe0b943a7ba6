"""The entry point: run a command, and turn errors into one line and an exit status."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import FrameType
from typing import IO, NamedTuple, TextIO

from minrnn.files import nearest


class Command(NamedTuple):
    """A command: the module with its function `run(args) -> int`, and its line in the help."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "demo": Command("minrnn.cli.demo", "train a small model, compare it with a baseline, and sample from it"),
    "train": Command("minrnn.cli.train", "train a model from a recipe, or resume a run"),
    "sample": Command("minrnn.cli.sample", "generate text with a trained model"),
    "evaluate": Command("minrnn.cli.evaluate", "evaluate a trained model on its validation split"),
    "act": Command("minrnn.cli.act", "run a trained policy in its environment, and record a video"),
    "export": Command(
        "minrnn.cli.export", "write a trained model for ONNX, ExecuTorch, AOTInductor or transformers"
    ),
    "make-data": Command("minrnn.cli.make_data", "train a policy in an environment and record its episodes"),
    "engines": Command("minrnn.cli.engines", "list the engines and their devices"),
    "plan": Command("minrnn.cli.plan", "compute what training on many GPUs would cost"),
    "bench": Command("minrnn.cli.bench", "time and check engines and layers against other implementations"),
    "reproduce": Command("minrnn.cli.reproduce", "reproduce the paper's tables and figures"),
}

ENVIRONMENT = {
    "MINRNN_ENGINE": "portable or reference: use PyTorch's own operations instead of the compiled engines",
    "MINRNN_ISA": "baseline, avx2 or avx512: use a narrower instruction set than the processor has",
    "MINRNN_DATA": "folder to search for data sets before downloading",
    "MINRNN_CACHE": "folder for downloads and tokenized corpora (default: the user's cache)",
    "MINRNN_DEBUG": "1: show the traceback of an error",
}

FAILURE, USAGE = 1, 2  # exit statuses; for a signal 128 + its number, as in shells
BROKEN_PIPE = 128 + 13  # SIGPIPE, which Windows does not have

ENDING_SIGNALS = ("SIGTERM", "SIGHUP")
"""Signals that end a command like Ctrl-C, unless a run handles them; Windows has no SIGHUP."""

USAGE_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)
"""Exceptions for invalid arguments and files, whose message is sufficient."""

FAILURES = (RuntimeError, OSError, ImportError, subprocess.SubprocessError, EOFError, BufferError)
"""Exceptions for failures, whose message is sufficient; torch's out-of-memory error is a RuntimeError."""

TYPED_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError)
"""Exceptions whose type is shown too, as their message alone is not sufficient."""

MIN_COLUMNS = 60
"""Minimum width of help and tables, in columns."""


class Ended(KeyboardInterrupt):
    """A signal ends the command; locks, partial files and the terminal are cleaned up.

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
    with _ended_by_signals(), _warnings_in_one_line():
        status = _main(list(sys.argv[1:] if argv is None else argv))
        lost = _flush()
        return status or lost


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
    except BrokenPipeError:  # the reader has gone, as `head` does: no message
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
    """Open closed ones of the descriptors 0 to 2 on devnull, as the next opened file would get their number.

    Characters that stdout and stderr cannot encode are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        with contextlib.suppress(AttributeError):  # in a test or a notebook
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _widen_terminal() -> None:
    """Set a minimum width for tables and help, which would be cut off in a narrow terminal."""
    width = shutil.get_terminal_size().columns  # from COLUMNS, the terminal, or the default
    if width < MIN_COLUMNS or os.environ.get("COLUMNS") == "0":
        os.environ["COLUMNS"] = str(max(width, MIN_COLUMNS))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise Ended for signals that would end the process; signals that are ignored (nohup) stay ignored.

    Output errors of other threads, such as one that redraws a progress bar, are not printed: the main thread
    raises the same error.
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


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print each warning to stderr once, in one line; MINRNN_DEBUG=1 shows where it comes from instead."""
    if _debugging():
        yield
        return
    told: set[str] = set()
    stderr = sys.stderr  # options are parsed with another

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in told:
            told.add(text)
            _tell("warning", text, stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _tell(kind: str, text: str, stderr: TextIO) -> None:
    with contextlib.suppress(OSError):  # the reader has gone
        print(f"minrnn: {kind}: {text}", file=stderr, flush=True)


def _complain(error: Exception, status: int) -> int:
    """Print an error to stderr in one line and return the status, or raise it if MINRNN_DEBUG is set."""
    if _debugging():
        raise error
    _tell("error", _describe(error), sys.stderr)
    return status


def _debugging() -> bool:
    return os.environ.get("MINRNN_DEBUG") == "1"


def _describe(error: Exception) -> str:
    """Return an error as one line; an error of the operating system starts with its file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, TYPED_ERRORS):
        return f"{kind}: {text} (MINRNN_DEBUG=1 shows where)"
    return text or kind


def _flush() -> int:
    """Flush stdout and stderr; return 0, or the status of a failure, whose output is discarded."""
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            status = status or BROKEN_PIPE
            _discard(stream)
        except (OSError, ValueError) as error:  # a full disk; a closed stream
            _discard(stream)
            status = status or _complain(error, FAILURE)
    return status


def _discard(stream: IO[str]) -> None:
    """Redirect a stream, with its buffered data, to devnull."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
