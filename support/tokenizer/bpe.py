"""The base class of all tokenizers, and what the file formats share."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import tiktoken

from support.files import short

# Unicode's white space. str.strip() without an argument would also remove \x1c to \x1f.
WHITE_SPACE = "".join(char for char in map(chr, [*range(28), *range(32, 0x3001)]) if char.isspace())
Pieces = dict[bytes, tuple[int, ...]]  # see Tokenizer


class Added(NamedTuple):
    """A token that is cut out of the text before BPE."""

    token: int
    special: bool = True  # found on request only
    late: bool = False  # searched for in the normalised text
    lstrip: bool = False  # the white space before it is removed
    rstrip: bool = False  # the white space after it is removed


def _pattern(texts: Iterable[str]) -> re.Pattern | None:
    """A group that matches any of the texts, longer ones first; None if there are no texts."""
    any_text = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return re.compile(f"({any_text})") if any_text else None


class Tokenizer:
    """A byte-level BPE tokenizer.

    words     regular expression; merges stay inside its matches
    pieces    {bytes: ids}: the 256 single bytes, then the merged tokens in merge order. A byte
              string that is not a token of the model stands for several ids or for none.
    bytes_of  {id: bytes} for decoding; b"" for special tokens
    added     {text: Added}
    """

    decode_errors = "replace"
    sha256 = ""  # hash of the tokenizer's file
    names = ("", "")  # texts of bos and eos, if the file gives them
    template: list[int] | None = None  # ids before every text, if the file has a template
    nfc = False  # whether text is normalised to NFC
    adds_bos = False  # whether texts begin with bos_id
    bos_id: int | None = None
    eos_id: int | None = None

    def __init__(self, words: str, pieces: Pieces, bytes_of: dict, added: dict[str, Added]):
        if {*map(type, bytes_of)} != {int} or sorted(bytes_of) != list(range(len(bytes_of))):
            raise ValueError(f"the ids of its {len(bytes_of)} tokens are not 0, 1, 2 and so on")
        if b"" in pieces or "" in added:
            raise ValueError("a token is empty")
        # tiktoken's regular expressions store every match of \s in these alternatives and panic at
        # a million. Steps of a hundred store one match each and change no word.
        for end in (r"\s+(?!\S)", r"\s+(?![^\s\p{N}])"):
            words = words.replace(f"|{end}", rf"|(?:(?>\s{{100}})(?=\s))++(?:{end})?|{end}")
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self._bpe = tiktoken.Encoding("", pat_str=words, mergeable_ranks=ranks, special_tokens={})
        self._pieces, self._ids_of_rank = pieces, list(pieces.values())
        self._bytes_of, self.vocab_size, self.added = bytes_of, len(bytes_of), added
        early = {text: token for text, token in added.items() if not token.late}
        ordinary = (text for text, token in early.items() if not token.special)
        self._early = {True: _pattern(early), False: _pattern(ordinary)}  # by encode's `special`
        self._late = _pattern(added.keys() - early.keys())

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """The ids of a text.

        bos: put bos_id in front, unless the ids begin with it. Raises ValueError if it is None.
        special: replace special tokens that are spelled out in the text by their ids.
        """
        if bos and self.bos_id is None:
            raise ValueError("bos=True, but this tokenizer has no bos token")
        ids: list[int] = []
        for i, part in enumerate(self._cut(self._early[special], text)):
            if isinstance(part, str):
                for some in self._cut(self._late, self._normalize(part, i == 0)):
                    ids += self._merge(some) if isinstance(some, str) else [some]
            else:
                ids.append(part)
        return [self.bos_id, *ids] if bos and ids[:1] != [self.bos_id] else ids

    def _cut(self, pattern: re.Pattern | None, text: str) -> list[Any]:
        """Split a text at its added tokens: text, id, text and so on."""
        parts: list[Any] = pattern.split(text) if pattern else [text]
        for i in range(1, len(parts), 2):
            parts[i], _, _, lstrip, rstrip = self.added[parts[i]]
            parts[i - 1] = parts[i - 1].rstrip(WHITE_SPACE) if lstrip else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip(WHITE_SPACE) if rstrip else parts[i + 1]
        return parts

    def _normalize(self, text: str, first: bool) -> str:
        """Normalise a part of a text before BPE. first: whether the text begins with it."""
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def _merge(self, text: str) -> Iterator[int]:
        try:
            ranks = self._bpe.encode_ordinary(text)
        except BaseException as error:  # tiktoken's PanicException is not an Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer's regular expression fails: {error}") from None
        return chain.from_iterable(map(self._ids_of_rank.__getitem__, ranks))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special tokens. Invalid UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return b"".join(map(self._bytes, ids)).decode("utf-8", self.decode_errors)

    def spell(self, ids: Iterable[int]) -> str:
        r"""The ids as text for display. A leading space is kept.

        Invalid bytes become \xe2 and so on; special tokens and unknown ids become ⟨id⟩.
        """
        pieces = (self._bytes_of.get(token) or f"⟨{token}⟩".encode() for token in ids)
        return b"".join(pieces).decode("utf-8", "backslashreplace")

    def identity(self) -> list:
        """A value that is equal for tokenizers with the same file, bos, eos and adds_bos."""
        return [self.sha256, self.adds_bos, self.bos_id, self.eos_id]

    def token_id(self, piece: str) -> int:
        """The id of the ordinary token with this text. Raises ValueError if there is none."""
        ids = self._pieces.get(piece.encode(), ())
        if len(ids) != 1:
            raise ValueError(
                f"this tokenizer has no single token of exactly the text {short(piece)}"
            )
        return ids[0]

    def _bytes(self, token: int) -> bytes:
        if int(token) not in self._bytes_of:
            raise ValueError(f"id {token} is not a token; ids are 0 to {self.vocab_size - 1}")
        return self._bytes_of[int(token)]


# A text to test regular expressions on: characters of many kinds, each beside all of ASCII.
PROBE = "".join(char + chr(code) for char in "aQ7 .'\n\té中\u0301\u3000😀" for code in range(128))


def covering(regex: Any) -> str:
    r"""A regular expression that also matches the text between the matches of `regex`.

    tiktoken drops this text, and the character after an empty match. Raises ValueError if `regex`
    is not a string, has \G, \K or ^, or has an empty match in PROBE.
    """
    if not isinstance(regex, str):
        raise ValueError(f"its regular expression is {short(regex)}; it must be a string")
    without = re.sub(r"\\[^GK]|\[(?:\\.|[^\]\\])*\]", "", regex)  # other escapes, and classes
    if found := re.search(r"\\[GK]|\^", without):
        raise ValueError(f"its regular expression {short(regex)} has {found[0]}: not supported")
    # A character, after which there is an empty match: the same text follows character and match.
    empty = rf"[\s\S](?=(?:{regex})(?P<rest>[\s\S]*)\z)(?=(?P=rest)\z)"
    ranks = {bytes([byte]): byte for byte in range(256)}
    probe = tiktoken.Encoding("", pat_str=empty, mergeable_ranks=ranks, special_tokens={})
    text = PROBE + regex
    if any(probe.encode_ordinary(text[at : at + 16]) for at in range(0, len(text), 8)):
        raise ValueError(f"its regular expression {short(regex)} matches an empty text")
    return rf"(?:{regex})|(?:(?!{regex})[\s\S])+"
