"""A dataclass of settings from a JSON file, and as options of a command line."""

import argparse
import inspect
import re
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from support.files import short


def fits(value: object, kind) -> bool:
    """Whether a value from a file is of a field's type; no bool is a number, nor is NaN."""
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_args(kind):  # list[int], tuple[str, ...]
        return type(value) in (list, tuple) and all(fits(item, get_args(kind)[0]) for item in value)
    if type(value) in (int, float):
        wide = abs(value) < (1e300 if type(value) is float else 2**63)  # NaN is not
        return wide and kind in (type(value), float)
    return type(value) is kind


def settings_from(kind: type, values: dict, path: Path):
    """A settings dataclass from the values in a file; ValueError names the file, and the value."""
    if not isinstance(values, dict):
        raise ValueError(f"{path}: settings are {short(values)}; they must be an object")
    for field in fields(kind):
        if field.name in values and not fits(values[field.name], field.type):
            wanted = getattr(field.type, "__name__", field.type)
            raise ValueError(
                f"{path}: {field.name} is {short(values[field.name])}; it must be {wanted}"
            )
    try:
        return kind(**values)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from None


def comments(settings: type) -> dict[str, str]:
    """The comment behind each field of a dataclass: it is the option's help text."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(settings), re.MULTILINE))


def add_settings(parser: argparse.ArgumentParser, settings: type, built_in: dict) -> None:
    """One option per field of a dataclass; absent from the result unless it was given."""
    group = parser.add_argument_group(settings.__name__, settings.__doc__)
    help_texts = comments(settings)
    for field in fields(settings):
        if field.name.endswith("_id"):  # looked up in the tokenizer, or outside the vocabulary
            continue
        optional = isinstance(field.type, UnionType)
        kind = get_args(field.type)[0] if optional else get_origin(field.type) or field.type
        values = [str(field.default)] if field.default not in (None, ()) else []
        if field.name in built_in:
            values.append(f"built-in corpus: {built_in[field.name]}")
        options: dict = {"default": argparse.SUPPRESS, "help": help_texts.get(field.name, "")}
        options["help"] += f" ({'; '.join(values)})" if values else ""
        options["help"] = options["help"].replace("%", "%%")  # argparse formats it
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"nargs": "+", "metavar": "FILE"}
        else:
            options |= {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        group.add_argument("--" + field.name.replace("_", "-"), **options)
