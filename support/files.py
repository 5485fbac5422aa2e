"""Files that are read and written: UTF-8 text, JSON, JSON lines."""

import json
import os
import reprlib
from collections.abc import Callable
from pathlib import Path


def read_utf8(path: Path) -> str:
    """The text of a file without its byte order mark; ValueError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"cannot read {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as UTF-8 text: {error}") from None


def json_object(text: str, where: str | Path) -> dict:
    """The object that a JSON text is; ValueError says where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object: {text[:40]!r}")
    return value


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if it is missing, broken or no object."""
    return json_object(read_utf8(path), path)


def read_json_lines(path: str | Path) -> list[tuple[str, dict]]:
    """The objects in a file of JSON lines, each with "file, line number" for messages about it."""
    records = []
    for number, line in enumerate(read_utf8(Path(path)).split("\n"), 1):  # not at U+2028
        if line.strip():
            where = f"{path}, line {number}"
            records.append((where, json_object(line, where)))
    return records


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, then rename it: never half of a file.

    A link is followed. ValueError for what is no file (a folder, a device); OSError if it fails.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file and is not replaced; give another name")
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # of any new file here; safetensors' are for the owner only
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except Exception as error:  # of whichever library wrote
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def short(value: object) -> str:
    """The repr of a value for a message, on one line and not long whatever it is."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 100
    shown.maxdict = 8
    return shown.repr(value)
