"""Text to token ids and back: SentencePiece BPE and byte-level BPE, both run by tiktoken.

tiktoken cuts text into words with a regular expression and, inside each word, merges the adjacent
pair of tokens whose joined bytes have the lowest rank until no such pair is left. A tokenizer here
is therefore a regular expression plus byte strings in their order of merging. Two files are read:

    tokenizer.model   SentencePiece BPE with byte fallback (Mistral 7B v0.1, Llama 2)
    tokenizer.json    byte-level BPE of Hugging Face's tokenizers (GPT-2, SmolLM2, Llama 3)

The ids are those of the sentencepiece and tokenizers libraries, with one difference: special
tokens are never produced from text. A text that contains "</s>" is just text, whoever wrote it.
"""

import codecs
import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import tiktoken

SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of SentencePiece's pieces
UNKNOWN_TEXT = " \u2047 ".encode()

Pieces = dict[bytes, tuple[int, ...]]  # see Tokenizer
BosEos = tuple[int | None, int | None]

# No piece has a newline in it or a space after another character (checked when a file is read),
# so no merge crosses these cuts; they only keep the words short.
SENTENCEPIECE_WORDS = r"\n| +[^ \n]*|[^ \n]+"
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
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 2:
            size, at = _varint(message, at)
        if size is None:
            raise ValueError(f"it is not a SentencePiece model (wire type {key & 7})")
        if at + size > len(message):
            raise ValueError("it is cut off, or not a SentencePiece model")
        yield key >> 3, message[at : at + size]
        at += size


class Tokenizer:
    """A byte-level BPE; the base of the SentencePiece one.

    words    regular expression; merges stay inside its matches
    pieces   {bytes: ids}, all 256 bytes first, then what merging makes, in order of merging.
             A byte string that is no token of the model stands for several ids, or for none.
    bytes_of {id: bytes} for decoding; b"" for special tokens
    """

    decode_errors = "replace"
    sha256 = ""  # of the file that it was read from
    adds_bos = False  # whether text begins with bos_id; a tokenizer.json has no common rule for it

    def __init__(self, words: str, pieces: Pieces, bytes_of: dict[int, bytes], special: BosEos):
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self._bpe = tiktoken.Encoding("", pat_str=words, mergeable_ranks=ranks, special_tokens={})
        self._pieces, self._ids_of_rank = pieces, list(pieces.values())
        self._bytes_of = bytes_of
        self.vocab_size = 1 + max(bytes_of)
        self.bos_id, self.eos_id = special

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of the text, with bos_id in front if asked (ValueError if there is none)."""
        ranks = self._bpe.encode_ordinary(text)
        ids = list(chain.from_iterable(map(self._ids_of_rank.__getitem__, ranks)))
        if not bos:
            return ids
        if self.bos_id is None:
            raise ValueError("bos=True, but this tokenizer has no token for a beginning")
        return [self.bos_id, *ids]

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

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return super().encode(text and " " + text.replace(SPACE, " "), bos)

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        text = super().decode(ids)
        first = next((token for token in ids if self._bytes(token)), None)
        # Only a piece of text gives its space back: not the byte piece <0x20>, not " \u2047 ".
        if first is not None and self._pieces.get(self._bytes(first)) == (int(first),):
            return text.removeprefix(" ")
        return text

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


def _merge_order(normal: dict[str, tuple[float, int]], byte_ids: list[int]) -> Pieces:
    """The `pieces` of a Tokenizer from {text: (score, id)} and the ids of the 256 byte pieces.

    SentencePiece merges characters and tiktoken bytes. So that the bytes of a character come
    together before anything else happens, the proper prefixes of every character and then the
    character itself lead the order; where they are left over they stand for byte pieces.
    """
    pieces: Pieces = {bytes([byte]): (byte_ids[byte],) for byte in range(256)}
    for char in sorted(set("".join(normal))):
        encoded = char.encode()
        for end in range(1, len(encoded) + 1):
            pieces.setdefault(encoded[:end], tuple(byte_ids[byte] for byte in encoded[:end]))
    # Runs of spaces share one score and SentencePiece takes the leftmost pair, which makes the
    # run at the left longer and longer: longest first is the same.
    order = sorted(normal, key=lambda text: (-normal[text][0], -len(text)))
    for text, following in pairwise(text for text in order if len(text) > 1):
        if normal[text][0] == normal[following][0] and (text + following).strip():
            raise ValueError(f"pieces {text!r} and {following!r} have the same score")
    for text in order:
        if re.search(r"\n|[^ ] ", text):
            raise ValueError(f"piece {text!r} has a newline or an inner space: not supported")
        pieces[text.encode()] = (normal[text][1],)  # a single byte keeps its place in the order
    return pieces


def _read_sentencepiece(path: Path) -> Tokenizer:
    """sentencepiece_model.proto: pieces 1 {text 1, score 2, type 3}, trainer 2, normalizer 3."""
    normal: dict[str, tuple[float, int]] = {}
    control: dict[str, int] = {}
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
        if kind == NORMAL:
            normal[text] = (struct.unpack("<f", fields[2])[0], token)
            bytes_of[token] = text.encode()
        elif kind == BYTE:  # "<0x0A>"
            byte_ids[int(text[3:5], 16)] = token
            bytes_of[token] = bytes([int(text[3:5], 16)])
        elif kind in (UNKNOWN, CONTROL):
            control[text] = token
            bytes_of[token] = UNKNOWN_TEXT if kind == UNKNOWN else b""
        else:
            raise ValueError(f"piece {text!r} is of type {kind}; 1, 2, 3 and 6 are supported")
    if not bytes_of:
        raise ValueError("it is not a SentencePiece model (it has no pieces)")
    _check_sentencepiece(settings[2], settings[3])
    if len(byte_ids) != 256:
        raise ValueError(f"it has {len(byte_ids)} byte pieces; 256 are needed")
    pieces = _merge_order(normal, [byte_ids[byte] for byte in range(256)])
    special = control.get("<s>"), control.get("</s>")
    return SentencePieceTokenizer(SENTENCEPIECE_WORDS, pieces, bytes_of, special)


def _words(pre_tokenizer: Any) -> str:
    """The regular expression that cuts as a tokenizer.json's pre_tokenizer does, or ValueError."""
    is_sequence = pre_tokenizer and pre_tokenizer["type"] == "Sequence"
    *before, last = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer or {}]
    if last.get("type") == "ByteLevel" and last.get("add_prefix_space", True) is False:
        match before, last.get("use_regex", True):
            case [], True:
                return GPT2_WORDS
            case [{"type": "Digits", "individual_digits": True}], True:
                return GPT2_WORDS_BETWEEN_DIGITS
            case [
                {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} as split
            ], False if not split.get("invert"):
                # What lies between two matches is a word too; tiktoken would drop it.
                return rf"(?:{regex})|(?:(?!{regex})[\s\S])+"
    raise ValueError(
        f"pre_tokenizer is {pre_tokenizer}; supported are ByteLevel without add_prefix_space, "
        "alone or in a Sequence after Digits (individual_digits) or after Split (Regex, Isolated)"
    )


def _load_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{path.name} is not JSON: {error}") from error


def _check_json(document: dict[str, Any]) -> None:
    """ValueError unless the tokenizer.json is a plain byte-level BPE."""
    model = document["model"]
    kind = model.get("type", "BPE")  # GPT-2's file does not say
    names = "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    extras = {name: model[name] for name in names if model.get(name)}
    if kind != "BPE" or extras or document.get("normalizer"):
        raise ValueError(
            f"model type {kind}, {extras or 'no extras'}, normalizer {document.get('normalizer')}: "
            "only byte-level BPE without extras and normalizer is supported (Mistral and Llama 2: "
            "use their tokenizer.model)"
        )


def _special_ids(config_path: Path) -> BosEos:
    """bos_token_id and eos_token_id of the model's config.json; None where it says none."""
    config = _load_json(config_path) if config_path.is_file() else {}
    bos_id, eos_id = config.get("bos_token_id"), config.get("eos_token_id")
    return bos_id, eos_id[0] if isinstance(eos_id, list) else eos_id  # Llama 3 lists several


def _read_json(path: Path) -> Tokenizer:
    document = _load_json(path)
    _check_json(document)
    model, added = document["model"], document.get("added_tokens", [])
    vocab: dict[str, int] = model["vocab"]
    ordinary = vocab.keys() - {token["content"] for token in added}
    spelled = {text: bytes(BYTE_OF[char] for char in text) for text in ordinary}
    bytes_of = {vocab[text]: piece for text, piece in spelled.items()}
    for token in added:
        bytes_of[token["id"]] = b"" if token["special"] else token["content"].encode()
    # A byte without a token is dropped from texts, as the tokenizers library does: SmolLM2 lacks
    # some control characters. (Unlike there, what stood at its two sides is not merged.)
    pieces: Pieces = {
        bytes([byte]): (vocab[char],) if char in vocab else () for byte, char in CHAR_OF.items()
    }
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pieces.setdefault(spelled[left + right], (vocab[left + right],))
    if model.get("ignore_merges"):  # a word that is a token needs no merges to become it
        for text in sorted(ordinary, key=vocab.__getitem__):
            pieces.setdefault(spelled[text], (vocab[text],))
    words, special = _words(document["pre_tokenizer"]), _special_ids(path.with_name("config.json"))
    return Tokenizer(words, pieces, bytes_of, special)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Read a tokenizer.model or tokenizer.json, or the first of them in a checkpoint's folder.

    ValueError if there is none, it is damaged, or it does something that is not supported here.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "tokenizer.model"
        path = path if path.is_file() else path.with_name("tokenizer.json")
        if not path.is_file():
            raise ValueError(f"folder {source} has neither a tokenizer.model nor a tokenizer.json")
    elif not path.is_file():
        raise ValueError(f"{source} does not exist; give a tokenizer file or a folder with one")
    try:
        tokenizer = _read_json(path) if path.suffix == ".json" else _read_sentencepiece(path)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
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
