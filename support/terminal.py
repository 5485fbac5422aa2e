"""The command line: options, exit codes, the status line."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO


class StoppedError(Exception):
    """A run was asked to stop, and did so in good order. The message says how to continue."""


shown = [0.0]  # when the last status line was printed to what is no terminal


def paint(text: str, gain: float) -> str:
    """The text in blue if its thought raised log p by 0.03 nats or more, orange if it lowered it.

    Unpainted unless standard output is a terminal; NO_COLOR turns it off (no-color.org).
    """
    if abs(gain) < 0.03 or os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\x1b[38;5;{33 if gain > 0 else 208}m{text}\x1b[0m"


def show_status(line: str, done: int, total: int, file: TextIO, keep: bool = False) -> None:
    """Renew the status line of long work; where it is no terminal, print one every tenth of it.

    And at least one a minute. keep: a line to stay.
    """
    keep, now = keep or done == total, time.monotonic()
    if file.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}", end="\n" if keep else "", file=file, flush=True)
    elif keep or done % max(total // 10, 1) == 0 or now - shown[0] > 60:
        print(line, file=file, flush=True)
        shown[0] = now


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help begins with the description as it stands."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}; see --help\n")
    return parser


def execute(parser: argparse.ArgumentParser, run: Callable, arguments: list[str] | None) -> None:
    """Run a command; a bad input is one line on standard error and exit code 2."""
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except RuntimeError as error:  # a GPU says "out of memory", a CPU "can't allocate memory"
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        parser.exit(2, f"{parser.prog}: error: {str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    except StoppedError as stopped:
        parser.exit(130, f"{parser.prog}: stopped and {stopped}\n")
