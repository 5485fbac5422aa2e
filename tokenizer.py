"""Text to token ids and back: SentencePiece BPE and byte-level BPE, both run by tiktoken.

tiktoken cuts text into words with a regular expression and, inside each word, merges the adjacent
pair of tokens whose joined bytes have the lowest rank until no such pair is left. A tokenizer here
is therefore a regular expression plus byte strings in their order of merging. Three files are read:

    tokenizer.model   SentencePiece BPE with byte fallback (Mistral 7B, Llama 2); also .model.v3
    tekken.json       byte-level BPE of later Mistral models (Nemo, Ministral)
    tokenizer.json    BPE of Hugging Face's tokenizers: byte-level (GPT-2, SmolLM2, Llama 3, Qwen),
                      or with spaces and byte fallback as of SentencePiece (Llama 2, TinyLlama)

Ours: the ids are those of sentencepiece, mistral-common and tokenizers, but special tokens, among
them SentencePiece's user-defined pieces, come from text only if that is asked for. A text that
contains "</s>" is just text, whoever wrote it. Tokens that a tokenizer.json adds without calling
them special ("<think>") are always found.

Whether text begins with bos: what the template in a tokenizer.json puts in front is what
transformers puts there, so it decides; but for Llama's tokenizer classes, which make the template
anew, and where there is none, add_bos_token of tokenizer_config.json does. Where neither says
anything, SentencePiece and tekken begin with bos, a tokenizer.json does not.
"""

import base64
import codecs
import hashlib
import json
import math
import re
import struct
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken

SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of SentencePiece's pieces
UNKNOWN_TEXT = " \u2047 ".encode()
# White space as Unicode has it; Python's own would add \x1c to \x1f.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
WHITE_SPACE += "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
TEKKEN_SPECIAL = (  # of a tekken.json that does not list them
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
)

Pieces = dict[bytes, tuple[int, ...]]  # see Tokenizer

# No piece has a newline in it or a space after another character (checked when a file is read),
# so no merge crosses these cuts; they only keep the words short.
SENTENCEPIECE_WORDS = r"\n| +[^ \n]*|[^ \n]+"
METASPACE_WORDS = r"\n| [^ \n]*|[^ \n]+"  # where every space begins a word
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after every digit was cut out: the text before a digit ends there, so its last space
# does not wait for the digit and the look-ahead must take a digit for the end of the text.
GPT2_WORDS_BETWEEN_DIGITS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Decode error handler: one U+FFFD per invalid byte, as SentencePiece does."""
    assert isinstance(error, UnicodeDecodeError)  # only ever used for decoding
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("mark_each_byte", _mark_each_byte)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each of the 256 bytes: {character: byte}."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Protobuf's variable-length integer at an offset: (value, offset behind it)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it is cut off, or not a SentencePiece model")
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            return value, at
    raise ValueError(f"it is not a SentencePiece model (no integer at byte {at})")


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: an int, or the bytes of anything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind not in (0, 1, 2, 5):
            raise ValueError(f"it is not a SentencePiece model (wire type {kind})")
        value, at = _varint(message, at) if kind in (0, 2) else (8 if kind == 1 else 4, at)
        if kind == 0:
            yield number, value
            continue
        if at + value > len(message):
            raise ValueError("it is cut off, or not a SentencePiece model")
        yield number, message[at : at + value]
        at += value


class Added(NamedTuple):
    """A token that is cut out of the text before anything is merged."""

    token: int
    special: bool = True  # found only if asked for
    late: bool = False  # looked for in the normalised text
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False  # and after it


def _pattern(texts: Iterable[str]) -> re.Pattern | None:
    """A group that matches any of the texts, the longest first; None if there are none."""
    any_text = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return re.compile(f"({any_text})") if any_text else None


class Tokenizer:
    """A byte-level BPE; the base of the SentencePiece one.

    words    regular expression; merges stay inside its matches
    pieces   {bytes: ids}, all 256 bytes first, then what merging makes, in order of merging.
             A byte string that is no token of the model stands for several ids, or for none.
    bytes_of {id: bytes} for decoding; b"" for special tokens
    added    {text: Added}
    """

    decode_errors = "replace"
    sha256 = ""  # of the file that it was read from
    nfc = False  # whether text is normalised to Unicode's form C
    adds_bos = False  # whether text begins with bos_id
    bos_id: int | None = None
    eos_id: int | None = None

    def __init__(
        self, words: str, pieces: Pieces, bytes_of: dict[int, bytes], added: dict[str, Added]
    ):
        if {*map(type, bytes_of)} != {int} or sorted(bytes_of) != list(range(len(bytes_of))):
            raise ValueError(f"the ids of its {len(bytes_of)} tokens are not 0, 1, 2 and so on")
        if b"" in pieces or "" in added:
            raise ValueError("a token is empty")
        # The regular expression remembers every single match of \s here and panics at a million.
        # Steps of a hundred, where white space follows, change nothing else.
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
        """Ids of the text, with bos_id in front if asked (ValueError if there is none).

        special: special tokens that are spelled in the text become their ids, and a text that
        begins with bos gets no second one.
        """
        if bos and self.bos_id is None:
            raise ValueError("bos=True, but this tokenizer has no token for a beginning")
        ids: list[int] = []
        for i, part in enumerate(self._cut(self._early[special], text)):
            if isinstance(part, int):
                ids.append(part)
                continue
            for some in self._cut(self._late, self._normalize(part, i == 0)):
                ids += [some] if isinstance(some, int) else self._merge(some)
        return [self.bos_id, *ids] if bos and ids[:1] != [self.bos_id] else ids

    def _cut(self, pattern: re.Pattern | None, text: str) -> list[Any]:
        """The text between the added tokens in it, and their ids: text, id, text and so on."""
        parts: list[Any] = pattern.split(text) if pattern else [text]
        for i in range(1, len(parts), 2):
            parts[i], _, _, lstrip, rstrip = self.added[parts[i]]
            parts[i - 1] = parts[i - 1].rstrip(WHITE_SPACE) if lstrip else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip(WHITE_SPACE) if rstrip else parts[i + 1]
        return parts

    def _normalize(self, text: str, first: bool) -> str:
        """What is merged in the place of a text; first: it is the beginning of the whole."""
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def _merge(self, text: str) -> Iterator[int]:
        try:
            ranks = self._bpe.encode_ordinary(text)
        except BaseException as error:  # a panic of tiktoken is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer's regular expression gives up: {error}") from None
        return chain.from_iterable(map(self._ids_of_rank.__getitem__, ranks))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens left out; invalid UTF-8 becomes U+FFFD.

        ValueError for an id that is no token.
        """
        return b"".join(map(self._bytes, ids)).decode("utf-8", self.decode_errors)

    def spell(self, ids: Iterable[int]) -> str:
        r"""The ids as people can look at them, alone or together: nothing is left out or taken off.

        A byte that is no UTF-8 here becomes \xe2, a special token or an id without a token ⟨2⟩.
        """
        pieces = (self._bytes_of.get(token) or f"⟨{token}⟩".encode() for token in ids)
        return b"".join(pieces).decode("utf-8", "backslashreplace")

    def identity(self) -> list:
        """Equal for tokenizers of the same file that begin and end a text alike."""
        return [self.sha256, self.adds_bos, self.bos_id, self.eos_id]

    def token_id(self, piece: str) -> int:
        """Id of the one ordinary token that is exactly this text; ValueError if there is none."""
        ids = self._pieces.get(piece.encode(), ())
        if len(ids) != 1:
            raise ValueError(f"no single token of this tokenizer is exactly the text {piece!r}")
        return ids[0]

    def _bytes(self, token: int) -> bytes:
        piece = self._bytes_of.get(int(token))
        if piece is None:
            raise ValueError(f"id {token} is no token; ids go from 0 to {self.vocab_size - 1}")
        return piece


class SentencePieceTokenizer(Tokenizer):
    """Adds what SentencePiece does around the merging: a space in front, taken off again."""

    decode_errors = "mark_each_byte"
    adds_bos = True
    # Which parts between added tokens get a space: "first", "always" or "never". (Ours: a special
    # token at the beginning gets none, unlike a user-defined piece in sentencepiece.)
    prefix = "first"
    doubled = True  # also the parts that begin with a space

    def _normalize(self, text: str, first: bool) -> str:
        text = text.replace(SPACE, " ")
        asked = self.prefix == "always" or (self.prefix == "first" and first)
        return " " + text if asked and text and (self.doubled or text[0] != " ") else text

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        text = super().decode(ids)
        first = next((token for token in ids if self._bytes(token)), None)
        # Only a piece of text gives its space back: not the byte piece <0x20>, not " \u2047 ".
        if first is None or self._pieces.get(self._bytes(first)) != (int(first),):
            return text
        return text if self.prefix == "never" else text.removeprefix(" ")

    def token_id(self, piece: str) -> int:
        return super().token_id(piece.replace(SPACE, " "))


def _check_sentencepiece(trainer: dict[int, Any], normalizer: dict[int, Any]) -> None:
    """ValueError for a model that does something we do not; .get's second argument is protobuf's
    default for a field that is not there."""
    for name, found, supported in (
        ("model_type", trainer.get(3, 1), 2),  # 2: BPE
        ("byte_fallback", trainer.get(35, 0), 1),
        ("precompiled_charsmap", normalizer.get(2, b"")[:8], b""),
        ("add_dummy_prefix", normalizer.get(3, 1), 1),
        ("remove_extra_whitespaces", normalizer.get(4, 1), 0),
        ("escape_whitespaces", normalizer.get(5, 1), 1),
    ):
        if found != supported:
            raise ValueError(
                f"SentencePiece's {name} is {found!r}; only {supported!r} is supported"
            )


def _merge_order(order: dict[str, int], byte_ids: dict[int, int]) -> Pieces:
    """The `pieces` of a Tokenizer from {text: id} in order of merging and the 256 byte pieces.

    SentencePiece merges characters and tiktoken bytes. So that the bytes of a character come
    together before anything else happens, the proper prefixes of every character and then the
    character itself lead the order; where they are left over they stand for byte pieces.
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
            raise ValueError(f"piece {text!r} has a newline or an inner space: not supported")
        pieces[text.encode()] = (token,)  # a single character keeps its place in the order
    return pieces


def _by_score(normal: dict[str, tuple[float, int]]) -> dict[str, int]:
    """{text: id} in SentencePiece's order of merging, from {text: (score, id)}."""
    # Runs of spaces share one score and SentencePiece takes the leftmost pair, which makes the
    # run at the left longer and longer: longest first is the same.
    order = sorted(normal, key=lambda text: (-normal[text][0], -len(text)))
    for text, following in pairwise(text for text in order if len(text) > 1):
        if normal[text][0] == normal[following][0] and (text + following).strip():
            raise ValueError(f"pieces {text!r} and {following!r} have the same score")
    return {text: normal[text][1] for text in order}


def _read_sentencepiece(path: Path) -> Tokenizer:
    """sentencepiece_model.proto: pieces 1 {text 1, score 2, type 3}, trainer 2, normalizer 3."""
    normal: dict[str, tuple[float, int]] = {}
    added: dict[str, Added] = {}
    byte_ids: dict[int, int] = {}
    bytes_of: dict[int, bytes] = {}
    settings: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _fields(path.read_bytes()):
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
            raise ValueError(
                f"piece {text!r} is of type {kind}; supported are 1 with a finite score, 2, 3, 6, "
                "and 4 in [] or <>"
            )
    if not bytes_of:
        raise ValueError("it is not a SentencePiece model (it has no pieces)")
    if len(normal) + len(added) + len(byte_ids) != len(bytes_of):
        raise ValueError("it has a piece twice")
    _check_sentencepiece(settings[2], settings[3])
    pieces = _merge_order(_by_score(normal), byte_ids)
    tokenizer = SentencePieceTokenizer(SENTENCEPIECE_WORDS, pieces, bytes_of, added)
    bos, eos = settings[2].get(46, b"<s>"), settings[2].get(47, b"</s>")  # bos_piece, eos_piece
    return _frame(tokenizer, path.parent, bos.decode(), eos.decode())


def _covering(regex: str) -> str:
    """A published regular expression, with what lies between its matches as words too, which
    tiktoken would drop. ValueError if it matches nothing at the end of a text: tiktoken panics.
    """
    at_end = rf"[\s\S](?=(?:{regex})\z)"
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    probe = tiktoken.Encoding("", pat_str=at_end, mergeable_ranks=single_bytes, special_tokens={})
    if probe.encode_ordinary("a"):
        raise ValueError(f"its regular expression {regex!r} matches an empty text")
    return rf"(?:{regex})|(?:(?!{regex})[\s\S])+"


def _read_tekken(path: Path) -> Tokenizer:
    """{config, vocab [{rank, token_bytes}], special_tokens}; the special ids come first."""
    document = _load_json(path)
    config, special = document["config"], document.get("special_tokens")
    size, front = config["default_vocab_size"], config["default_num_special_tokens"]
    names = [token["token_str"] for token in special] if special else TEKKEN_SPECIAL.split()
    vocab = document["vocab"][: max(size - front, 0)]  # the file has more than are used
    pieces = {base64.b64decode(entry["token_bytes"]): (front + entry["rank"],) for entry in vocab}
    if (
        not len(set(names)) == len(names) <= front < 10_000
        or len(pieces) != size - front
        or [entry["rank"] for entry in vocab] != list(range(len(vocab)))
        or {*map(len, list(pieces)[:256])} != {1}
    ):
        raise ValueError("its ranks, bytes or special tokens are incomplete or out of order")
    bytes_of = dict.fromkeys(range(front), b"")
    bytes_of |= {token: piece for piece, (token,) in pieces.items()}
    added = {name: Added(token) for token, name in enumerate(names)}
    tokenizer = Tokenizer(_covering(config["pattern"]), pieces, bytes_of, added)
    tokenizer.adds_bos = True
    return _frame(tokenizer, path.parent, "<s>", "</s>")


def _load_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise ValueError(f"{path.name} is not JSON: {error}") from error


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre_tokenizer or post_processor: none, one or a Sequence."""
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


def _words(pre_tokenizer: Any) -> str:
    """The regular expression that cuts as a tokenizer.json's pre_tokenizer does, or ValueError."""
    *before, last = _steps(pre_tokenizer, "pretokenizers") or [{}]
    if last.get("type") == "ByteLevel" and last.get("add_prefix_space", True) is False:
        match before, last.get("use_regex", True):
            case [], True:
                return GPT2_WORDS
            case [{"type": "Digits", "individual_digits": True}], True:
                return GPT2_WORDS_BETWEEN_DIGITS
            case [
                {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} as split
            ], False if not split.get("invert"):
                return _covering(regex)
    raise ValueError(
        f"pre_tokenizer is {pre_tokenizer}; supported are ByteLevel without add_prefix_space, "
        "alone or in a Sequence after Digits (individual_digits) or after Split (Regex, Isolated)"
    )


def _merged(model: dict[str, Any]) -> Iterator[str]:
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left + right


def _byte_level(document: dict, ordinary: dict[str, int], bytes_of, added) -> Tokenizer:
    """Of a tokenizer.json that spells bytes in BYTE_OF; `ordinary` is its vocabulary."""
    model, normalizer = document["model"], _steps(document.get("normalizer"), "normalizers")
    if normalizer not in ([], [{"type": "NFC"}]):
        raise ValueError(f"normalizer is {normalizer}; a byte-level BPE may have NFC or none")
    if normalizer:
        late = {text: unicodedata.normalize("NFC", text) for text in added}
        added = {late[text] if of.late else text: of for text, of in added.items()}
    spelled = {text: bytes(BYTE_OF[char] for char in text) for text in ordinary}
    bytes_of |= {ordinary[text]: piece for text, piece in spelled.items()}
    # A byte without a token is dropped from texts, as the tokenizers library does: SmolLM2 lacks
    # some control characters. (Unlike there, what stood at its two sides is not merged.)
    pieces: Pieces = {
        bytes([byte]): (ordinary[char],) if char in ordinary else ()
        for byte, char in CHAR_OF.items()
    }
    if model.get("unk_token") and () in pieces.values():
        raise ValueError(f"unk_token is {model['unk_token']!r}, but not every byte has a token")
    for text in _merged(model):
        pieces.setdefault(spelled[text], (ordinary[text],))
    if model.get("ignore_merges"):  # a word that is a token needs no merges to become it
        for text in sorted(ordinary, key=ordinary.__getitem__):
            pieces.setdefault(spelled[text], (ordinary[text],))
    tokenizer = Tokenizer(_words(document["pre_tokenizer"]), pieces, bytes_of, added)
    tokenizer.nfc = bool(normalizer)
    return tokenizer


def _metaspace(document: dict, ordinary: dict[str, int], bytes_of, added) -> Tokenizer:
    """Of a tokenizer.json that writes spaces and bytes as SentencePiece does."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer, words = _steps(document.get("normalizer"), "normalizers"), SENTENCEPIECE_WORDS
    match _steps(document.get("pre_tokenizer"), "pretokenizers"):
        case [] if normalizer in ([replace], [prepend, replace]):
            prefix, doubled = "always" if prepend in normalizer else "never", True
            if any(token.late for token in added.values()):
                raise ValueError("an added token is normalized: not supported with Replace")
        case [{"type": "Metaspace", "replacement": "\u2581"} as step] if not normalizer:
            prefix, doubled = step.get("prepend_scheme", "always"), False
            prefix = prefix if step.get("add_prefix_space", True) else "never"
            words = METASPACE_WORDS if step.get("split", True) else words
            added = {text: token._replace(late=False) for text, token in added.items()}
        case other:
            raise ValueError(
                f"it has byte_fallback, normalizer {normalizer} and pre_tokenizer {other}; that is "
                "supported with Prepend and Replace, with Replace, or with Metaspace"
            )
    byte_ids = {byte: ordinary.pop(f"<0x{byte:02X}>") for byte in range(256)}
    ids = {text.replace(SPACE, " "): token for text, token in ordinary.items()}
    bytes_of |= {token: bytes([byte]) for byte, token in byte_ids.items()}
    bytes_of |= {token: text.encode() for text, token in ids.items()}
    merged = (text.replace(SPACE, " ") for text in _merged(document["model"]))
    order = {text: ids[text] for text in chain((text for text in ids if len(text) == 1), merged)}
    tokenizer = SentencePieceTokenizer(words, _merge_order(order, byte_ids), bytes_of, added)
    tokenizer.prefix, tokenizer.doubled = prefix, doubled
    return tokenizer


def _template(post_processor: Any) -> list[int] | None:
    """The ids that a tokenizer.json's template puts in front of a text; None: it has none."""
    for step in _steps(post_processor, "processors"):
        if step["type"] == "TemplateProcessing":
            front = takewhile(lambda part: "SpecialToken" in part, step["single"])
            texts = [part["SpecialToken"]["id"] for part in front]
            return [token for text in texts for token in step["special_tokens"][text]["ids"]]
        if step["type"] != "ByteLevel":
            raise ValueError(f"post_processor {step['type']} is not supported")
    return None


def _read_json(path: Path) -> Tokenizer:
    document = _load_json(path)
    model = document["model"]
    kind, vocab = model.get("type", "BPE"), model["vocab"]  # GPT-2's file does not say
    names = "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    extras = {name: model[name] for name in names if model.get(name)}
    if kind != "BPE" or extras:
        raise ValueError(f"model type {kind}, {extras}: only BPE without extras is supported")
    added = {}
    for token in document.get("added_tokens") or []:
        text, special = token["content"], bool(token["special"])
        if token.get("single_word") or vocab.get(text, token["id"]) != token["id"]:
            raise ValueError(f"added token {text!r} is single_word, or has another id in vocab")
        late = bool(token.get("normalized")) and not special
        strips = token.get("lstrip"), token.get("rstrip")
        added[text] = Added(token["id"], special, late, *map(bool, strips))
    ordinary = {text: token for text, token in vocab.items() if text not in added}
    bytes_of = {of.token: b"" if of.special else text.encode() for text, of in added.items()}
    read = _metaspace if model.get("byte_fallback") else _byte_level
    tokenizer = read(document, ordinary, bytes_of, added)
    if tokenizer.vocab_size != len(vocab.keys() | added.keys()):
        raise ValueError("two of its tokens have the same id")
    return _frame(tokenizer, path.parent, template=_template(document.get("post_processor")))


def _frame(tokenizer: Tokenizer, folder: Path, bos=None, eos=None, template=None) -> Tokenizer:
    """The tokenizer with its bos and eos. The first that says something decides: a template;
    tokenizer_config.json (null: none); the names in the tokenizer's file; config.json.
    """
    files = folder / "tokenizer_config.json", folder / "config.json"
    said, model = (_load_json(file) if file.is_file() else {} for file in files)
    for name, own in (("bos", bos), ("eos", eos)):
        text = said.get(f"{name}_token", own if own in tokenizer.added else None)
        text = text["content"] if isinstance(text, dict) else text
        if text is not None and text not in tokenizer.added:
            raise ValueError(f"tokenizer_config.json: {name}_token {text!r} is no added token here")
        token = model.get(f"{name}_token_id") if f"{name}_token" not in said else None
        token = token[0] if isinstance(token, list) else token  # Llama 3 lists several
        token = tokenizer.added[text].token if text is not None else token
        if name == "bos" and template:
            token, *more = template
            if more:
                raise ValueError(f"its template puts {len(template)} tokens in front, not one")
        if token is not None and (type(token) is not int or token not in tokenizer._bytes_of):
            raise ValueError(f"{name}_token_id {token!r} is no id of this tokenizer")
        setattr(tokenizer, f"{name}_id", token)
    adds = tokenizer.adds_bos if template is None else bool(template)
    if template is None or "Llama" in said.get("tokenizer_class", ""):
        adds = said.get("add_bos_token", adds)
    tokenizer.adds_bos = bool(adds) and tokenizer.bos_id is not None
    return tokenizer


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Read a tokenizer's file, or the first in a checkpoint's folder of tokenizer.model,
    tokenizer.model.v* (the last of them), tekken.json and tokenizer.json.

    ValueError if there is none, it is damaged, or it does something that is not supported here.
    """
    path = Path(source)
    if path.is_dir():
        files = [path / "tokenizer.model", *sorted(path.glob("tokenizer.model.v*"), reverse=True)]
        files += [path / "tekken.json", path / "tokenizer.json"]
        path = next(filter(Path.is_file, files), path)
        if path.is_dir():
            raise ValueError(
                f"folder {source} has no tokenizer.model, tekken.json or tokenizer.json"
            )
    elif not path.is_file():
        raise ValueError(f"{source} does not exist; give a tokenizer file or a folder with one")
    is_tekken = path.name.startswith("tekken")
    read = _read_json if path.suffix == ".json" else _read_sentencepiece
    try:
        tokenizer = _read_tekken(path) if is_tekken else read(path)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, struct.error) as error:
        raise ValueError(f"cannot read {path}: unexpected contents ({error!r})") from error
    tokenizer.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return tokenizer


def save_byte_tokenizer(folder: str | Path) -> None:
    """Write the tokenizer.json of the built-in corpus: 258 tokens, no special ones.

    Ids 0..255 are the bytes; 257 is the em dash, which the meta tokens start from; 256 is its
    first two bytes, because BPE merges in pairs.
    """
    first, second, third = (CHAR_OF[byte] for byte in "\u2014".encode())
    vocab = {CHAR_OF[byte]: byte for byte in range(256)}
    vocab |= {first + second: 256, first + second + third: 257}
    merges = [[first, second], [first + second, third]]
    document: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    path = Path(folder) / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
