"""Dataclasses of settings: read from JSON, and given as options on the command line."""

import argparse
import inspect
import re
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from support.files import short


def fits(value: object, kind) -> bool:
    """Whether a value from a file has the type of a field. A bool is not a number, nor is NaN."""
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_args(kind):  # list[int], tuple[str, ...]
        return type(value) in (list, tuple) and all(fits(item, get_args(kind)[0]) for item in value)
    if type(value) in (int, float):
        in_range = abs(value) < (1e300 if type(value) is float else 2**63)  # False for NaN
        return in_range and kind in (type(value), float)
    return type(value) is kind


def settings_from(kind: type, values: dict, path: Path):
    """A settings dataclass from the values in a file. Raises ValueError that names a wrong one."""
    types = {field.name: field.type for field in fields(kind)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{path}: {short(name)} is not a field of {kind.__name__}")
        if not fits(value, types[name]):
            wanted = getattr(types[name], "__name__", types[name])
            raise ValueError(f"{path}: {name} is {short(value)}; it must be {wanted}")
    try:
        return kind(**values)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from None


def comments(settings: type) -> dict[str, str]:
    """The comment after each field of a dataclass, which is the help text of its option."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(settings), re.MULTILINE))


def whole_number(text: str) -> int:
    """The int of an option, which torch has to take. Raises an error of argparse from 2**63 on."""
    if not fits(number := int(text), int):
        raise argparse.ArgumentTypeError(f"{short(text)} is too large; it must be below 2**63")
    return number


def add_settings(parser: argparse.ArgumentParser, settings: type, built_in: dict) -> None:
    """Add an option for each field of a dataclass. An option that is not given has no value.

    built_in: defaults on the built-in corpus, for the help text.
    """
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
        text = help_texts.get(field.name, "") + (f" ({'; '.join(values)})" if values else "")
        options: dict = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"nargs": "+", "metavar": "FILE"}
        else:
            types = {int: (whole_number, "N"), float: (float, "X"), str: (str, "NAME")}
            options["type"], options["metavar"] = types[kind]
        group.add_argument("--" + field.name.replace("_", "-"), **options)
