"""The command line: options, exit codes, the status line."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO


class StoppedError(Exception):
    """A run was stopped on request and saved. The message says how to continue it."""


shown = [0.0]  # time of the last status line that was printed to a file or a pipe


def paint(text: str, gain: float) -> str:
    """Color a text on a terminal: blue if its thought raised log p by 0.03 nats or more, orange if
    it lowered it as much. NO_COLOR turns colors off (no-color.org).
    """
    if abs(gain) < 0.03 or os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\x1b[38;5;{33 if gain > 0 else 208}m{text}\x1b[0m"


def show_status(line: str, done: int, total: int, file: TextIO, keep: bool = False) -> None:
    """Update the status line of a long task, of which done / total is finished.

    A terminal shows one line, which is overwritten unless `keep` is True. A file or a pipe gets a
    line per tenth of the task, and at least one per minute.
    """
    keep, now = keep or done == total, time.monotonic()
    if file.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}", end="\n" if keep else "", file=file, flush=True)
    elif keep or done % max(total // 10, 1) == 0 or now - shown[0] > 60:
        print(line, file=file, flush=True)
        shown[0] = now


def one_line(message: object) -> str:
    """A message on one line of at most 1,000 characters, all of which can be printed."""
    return "".join(char if char.isprintable() else " " for char in str(message)[:1000])


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help begins with the description, line by line as it is written."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    prefix = f"{parser.prog}: error: "
    parser.error = lambda message: parser.exit(2, f"{prefix}{one_line(message)}; see --help\n")
    return parser


def execute(parser: argparse.ArgumentParser, run: Callable, arguments: list[str] | None) -> None:
    """Run a command. A bad input is one line on standard error and exit code 2."""
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    except RuntimeError as error:  # of CUDA; of the CPU; of pathlib, for a loop of symbolic links
        known = "out of memory", "allocate memory", "Symlink loop"
        if not any(text in str(error) for text in known):
            raise
        parser.exit(2, f"{parser.prog}: error: {str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    except StoppedError as stopped:
        parser.exit(130, f"{parser.prog}: stopped and {stopped}\n")
