"""tokenizer.model: SentencePiece BPE with byte fallback."""

import codecs
import math
import re
import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from support.files import short
from support.tokenizer.bpe import Added, Pieces, Tokenizer

SPACE = "\u2581"  # stands for a space in SentencePiece's pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of SentencePiece's pieces
UNKNOWN_TEXT = " \u2047 ".encode()
# SentencePiece has no words. A piece contains no newline, and no space after another character
# (merge_order checks this), so no merge crosses these boundaries. Short words are fast.
WORDS = r"\n| +[^ \n]*|[^ \n]+"

# One U+FFFD per invalid byte. Python's "replace" makes one per invalid sequence.
codecs.register_error("mark_each_byte", lambda e: ("\ufffd" * (e.end - e.start), e.end))


class SentencePieceTokenizer(Tokenizer):
    """A Tokenizer that puts a space before the text, as SentencePiece does; decode removes it."""

    decode_errors = "mark_each_byte"
    adds_bos = True
    # Which parts between added tokens get a space: "first", "always" or "never". (Ours: a special
    # token at the start gets no space before it. In sentencepiece, a user-defined piece does.)
    prefix = "first"
    doubled = True  # whether a part that begins with a space gets a second one

    def _normalize(self, text: str, first: bool) -> str:
        text = text.replace(SPACE, " ")
        wanted = self.prefix == "always" or (self.prefix == "first" and first)
        return " " + text if wanted and text and (self.doubled or text[0] != " ") else text

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        text = super().decode(ids)
        first = next(filter(self._bytes, ids), None)
        # Only the space of a normal piece is removed, not <0x20> and not that of " \u2047 ".
        normal = first is not None and self._pieces.get(self._bytes(first)) == (int(first),)
        return text.removeprefix(" ") if normal and self.prefix != "never" else text

    def token_id(self, piece: str) -> int:
        return super().token_id(piece.replace(SPACE, " "))


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The protobuf variable-length integer at an offset: (value, offset after it)."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("it is cut off, or not a SentencePiece model")


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message. Values that are not integers stay bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        value, at = _varint(message, at) if kind in (0, 2) else (8 if kind == 1 else 4, at)
        if kind != 0:
            value, at = message[at : at + value], at + value
            if kind not in (1, 2, 5) or at > len(message):
                raise ValueError("it is cut off, or not a SentencePiece model")
        yield key >> 3, value


def merge_order(order: dict[str, int], byte_ids: dict[int, int]) -> Pieces:
    """The `pieces` of a Tokenizer, from {text: id} in merge order and {byte: id of its byte piece}.

    SentencePiece merges characters and tiktoken merges bytes. The order therefore begins with the
    prefixes of every character; a prefix that remains in the result stands for byte pieces. Raises
    ValueError for fewer than 256 byte pieces, and for a piece that crosses a word boundary.
    """
    if len(byte_ids) != 256:
        raise ValueError(f"it has {len(byte_ids)} byte pieces; 256 are needed")
    pieces: Pieces = {bytes([byte]): (byte_ids[byte],) for byte in range(256)}
    for char in sorted(set().union(*order)):
        encoded = char.encode()
        for end in range(1, len(encoded) + 1):
            pieces.setdefault(encoded[:end], tuple(byte_ids[byte] for byte in encoded[:end]))
    for text, token in order.items():
        if re.search(r"\n|[^ ] ", text):
            raise ValueError(f"piece {short(text)} has a newline or an inner space: not supported")
        pieces[text.encode()] = (token,)  # a single character keeps its place in the order
    return pieces


def read_sentencepiece(path: Path) -> Tokenizer:
    """Read a tokenizer.model. load_tokenizer turns the errors of damaged files into ValueError."""
    normal: dict[str, tuple[float, int]] = {}  # {text: (score, id)}
    added: dict[str, Added] = {}
    byte_ids: dict[int, int] = {}
    bytes_of: dict[int, bytes] = {}
    settings: dict[int, dict[int, Any]] = {2: {}, 3: {}}  # trainer, normalizer
    for number, value in _fields(path.read_bytes()):  # 1: a piece {text 1, score 2, type 3}
        if number in settings:
            settings[number] = dict(_fields(value))
        if number != 1:
            continue
        fields, token = dict(_fields(value)), len(bytes_of)
        text, kind = fields[1].decode().replace(SPACE, " "), fields.get(3, NORMAL)
        bytes_of[token] = text.encode()
        if kind == NORMAL and math.isfinite(score := struct.unpack("<f", fields[2])[0]):
            normal[text] = score, token
        elif kind == BYTE:  # "<0x0A>"
            byte_ids[int(text[3:5], 16)] = token
            bytes_of[token] = bytes([int(text[3:5], 16)])
        elif kind in (UNKNOWN, CONTROL):
            added[text] = Added(token)
            bytes_of[token] = UNKNOWN_TEXT if kind == UNKNOWN else b""
        elif kind == USER_DEFINED and re.fullmatch(r"\[\S+\]|<\S+>", text):  # [REF]
            added[text] = Added(token)
        else:
            raise ValueError(f"piece {short(text)} has unsupported type {kind} or no finite score")
    if not bytes_of:
        raise ValueError("it is not a SentencePiece model (it has no pieces)")
    if len(normal) + len(added) + len(byte_ids) != len(bytes_of):
        raise ValueError("it has a piece twice")
    trainer, normalizer = settings.values()
    for name, found, supported in (  # a field that is missing has its default
        ("model_type", trainer.get(3, 1), 2),  # 2: BPE
        ("byte_fallback", trainer.get(35, 0), 1),
        ("precompiled_charsmap", normalizer.get(2, b"")[:8], b""),
        ("add_dummy_prefix", normalizer.get(3, 1), 1),
        ("remove_extra_whitespaces", normalizer.get(4, 1), 0),
        ("escape_whitespaces", normalizer.get(5, 1), 1),
    ):
        if found != supported:
            raise ValueError(f"its {name} is {short(found)}; only {supported!r} is supported")
    # Pieces merge in the order of their scores. All runs of spaces have the same score;
    # SentencePiece merges the leftmost pair first, which equals merging longer runs first.
    order = sorted(normal, key=lambda text: (-normal[text][0], -len(text)))
    for text, following in pairwise(text for text in order if len(text) > 1):
        if normal[text][0] == normal[following][0] and (text + following).strip():
            raise ValueError(f"pieces {short(text)} and {short(following)} have the same score")
    pieces = merge_order({text: normal[text][1] for text in order}, byte_ids)
    tokenizer = SentencePieceTokenizer(WORDS, pieces, bytes_of, added)
    tokenizer.names = trainer.get(46, b"<s>").decode(), trainer.get(47, b"</s>").decode()
    return tokenizer
