"""Files of UTF-8 text, JSON and JSON lines."""

import json
import os
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def read_utf8(path: Path) -> str:
    """The text of a regular file, without a byte order mark. Raises ValueError if there is none."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as UTF-8 text: {error}") from None


def json_object(text: str, where: str | Path) -> dict:
    """The JSON object in a text. Raises ValueError, which begins with `where`, if it is not one."""
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
        reason = short(value)
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{where} is not a JSON object: {reason}")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError if the file is missing or has no object."""
    return json_object(read_utf8(path), path)


def read_json_lines(path: str | Path) -> list[tuple[str, dict]]:
    """The objects in a file of JSON lines, each with "file, line number" for error messages."""
    lines = enumerate(read_utf8(Path(path)).split("\n"), 1)  # not splitlines: U+2028 is no end
    places = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    if places and places[0][1].lstrip().startswith("["):
        raise ValueError(f"{places[0][0]} begins a JSON array; write one JSON object per line")
    return [(where, json_object(line, where)) for where, line in places]


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file and rename it to `path`, or to the target of a symbolic link.

    A failure keeps the old file and raises OSError. Raises ValueError for a folder or a device.
    """
    path = Path(os.path.realpath(path))
    if path.is_symlink() or (path.exists() and not path.is_file()):  # a loop of links, a device
        raise ValueError(f"{path} is not a regular file, so it is not replaced; give another name")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    except Exception as error:  # torch.save raises RuntimeError, in the context of an OSError
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.__context__ or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file with write_file."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object with write_file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def short(value: object) -> str:
    """The repr of a value for an error message: one line, cut if it is long."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 100
    shown.maxdict = 8
    return shown.repr(value)


def hub_hint(path: str | Path) -> str:
    """What an error message adds to a path that may be the name of a model on Hugging Face."""
    is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)) and not Path(path).exists()
    return f"; to download it: hf download {path} --local-dir FOLDER" if is_name else ""
