"""tokenizer.json: BPE of Hugging Face's tokenizers, byte-level or with SentencePiece's spaces."""

import json
import unicodedata
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from support.files import json_object, read_utf8, short
from support.tokenizer.bpe import Added, Pieces, Tokenizer, covering
from support.tokenizer.sentencepiece import SPACE, WORDS, SentencePieceTokenizer, merge_order

METASPACE_WORDS = r"\n| [^ \n]*|[^ \n]+"  # every space begins a word
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after a split at every digit: white space before a digit is one word, as at the end.
DIGIT_WORDS = GPT2_WORDS.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
# GPT-2's printable characters for the bytes: Latin-1 where it is printable, then U+0100 and up.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
CHAR_OF = {byte: chr(byte) for byte in _PRINTABLE}
CHAR_OF |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}
BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre_tokenizer or post_processor: none, one or a Sequence."""
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


def _words(pre_tokenizer: Any) -> str:
    """The regular expression of a byte-level pre_tokenizer. Raises ValueError if not supported."""
    *before, last = _steps(pre_tokenizer, "pretokenizers") or [{}]
    if last.get("type") == "ByteLevel" and last.get("add_prefix_space", True) is False:
        match before, last.get("use_regex", True):
            case [], True:
                return GPT2_WORDS
            case [{"type": "Digits", "individual_digits": True}], True:
                return DIGIT_WORDS
            case [
                {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} as split
            ], False if not split.get("invert"):
                return covering(regex)
    known = "ByteLevel without add_prefix_space, alone or after Digits or Split (Regex, Isolated)"
    raise ValueError(f"pre_tokenizer is {short(pre_tokenizer)}; supported is {known}")


def _merged(model: dict[str, Any]) -> Iterator[str]:
    """The results of the merges, in order."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left + right


def _byte_level(document: dict, vocab: dict, bytes_of: dict, added: dict) -> Tokenizer:
    """The tokenizer of a byte-level file, whose vocabulary is spelled in BYTE_OF."""
    model, normalizer = document["model"], _steps(document.get("normalizer"), "normalizers")
    if normalizer not in ([], [{"type": "NFC"}]):
        raise ValueError(f"normalizer is {short(normalizer)}; a byte-level BPE has NFC or none")
    if normalizer:
        late = {text: unicodedata.normalize("NFC", text) for text in added}
        added = {late[text] if of.late else text: of for text, of in added.items()}
    spelled = {text: bytes(BYTE_OF[char] for char in text) for text in vocab}
    bytes_of |= {vocab[text]: piece for text, piece in spelled.items()}
    # A byte without a token is dropped, as in the tokenizers library: SmolLM2 lacks some control
    # characters. (Ours: the text before such a byte and the text after it are not merged.)
    ids = {byte: (vocab[char],) if char in vocab else () for byte, char in CHAR_OF.items()}
    pieces: Pieces = {bytes([byte]): ids[byte] for byte in range(256)}
    if model.get("unk_token") and () in pieces.values():
        raise ValueError(f"unk_token is {short(model['unk_token'])}, but a byte has no token")
    # With ignore_merges, a word that is a token becomes this token without any merge.
    whole = sorted(vocab, key=vocab.__getitem__) if model.get("ignore_merges") else []
    for text in chain(_merged(model), whole):
        pieces.setdefault(spelled[text], (vocab[text],))
    tokenizer = Tokenizer(_words(document["pre_tokenizer"]), pieces, bytes_of, added)
    tokenizer.nfc = bool(normalizer)
    return tokenizer


def _metaspace(document: dict, vocab: dict, bytes_of: dict, added: dict) -> Tokenizer:
    """The tokenizer of a file that writes spaces and bytes as SentencePiece does."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer, words = _steps(document.get("normalizer"), "normalizers"), WORDS
    match _steps(document.get("pre_tokenizer"), "pretokenizers"):
        case [] if normalizer in ([replace], [prepend, replace]):
            prefix, doubled = "always" if prepend in normalizer else "never", True
            if any(token.late for token in added.values()):
                raise ValueError("an added token is normalized: not supported with Replace")
        case [{"type": "Metaspace", "replacement": "\u2581"} as step] if not normalizer:
            prefix, doubled = step.get("prepend_scheme", "always"), False
            if prefix not in ("first", "always", "never"):
                raise ValueError(f"prepend_scheme is {short(prefix)}; it is first, always or never")
            prefix = prefix if step.get("add_prefix_space", True) else "never"
            words = METASPACE_WORDS if step.get("split", True) else words
            added = {text: token._replace(late=False) for text, token in added.items()}
        case other:
            given = (
                f"byte_fallback, normalizer {short(normalizer)} and pre_tokenizer {short(other)}"
            )
            raise ValueError(f"it has {given}; supported is (Prepend and) Replace, or Metaspace")
    byte_ids = {byte: vocab.pop(f"<0x{byte:02X}>") for byte in range(256)}
    ids = {text.replace(SPACE, " "): token for text, token in vocab.items()}
    bytes_of |= {token: bytes([byte]) for byte, token in byte_ids.items()}
    bytes_of |= {token: text.encode() for text, token in ids.items()}
    merged = (text.replace(SPACE, " ") for text in _merged(document["model"]))
    order = {text: ids[text] for text in chain((text for text in ids if len(text) == 1), merged)}
    tokenizer = SentencePieceTokenizer(words, merge_order(order, byte_ids), bytes_of, added)
    tokenizer.prefix, tokenizer.doubled = prefix, doubled
    return tokenizer


def _template(post_processor: Any) -> list[int] | None:
    """The id before every text as [id] or []. None: there is no template."""
    for step in _steps(post_processor, "processors"):
        if step["type"] == "TemplateProcessing":
            if not isinstance(step["single"], list):
                raise ValueError(f"its template is {short(step['single'])}; it must be a list")
            front = takewhile(lambda part: "SpecialToken" in part, step["single"])
            texts = [part["SpecialToken"]["id"] for part in front]
            ids = [token for text in texts for token in step["special_tokens"][text]["ids"]]
            if len(ids) > 1:
                raise ValueError(f"its template begins with {len(ids)} tokens, not one")
            return ids
        if step["type"] != "ByteLevel":
            raise ValueError(f"post_processor {short(step['type'])} is not supported")
    return None


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Read a tokenizer.json. load_tokenizer turns the errors of damaged files into ValueError."""
    document = json_object(read_utf8(path), path.name)
    model = document["model"]
    kind, vocab = model.get("type", "BPE"), model["vocab"]  # GPT-2's file has no type
    names = "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    extras = {name: model[name] for name in names if model.get(name)}
    if kind != "BPE" or extras:
        raise ValueError(f"its model is {short({'type': kind} | extras)}; plain BPE is supported")
    added = {}
    for token in document.get("added_tokens") or []:
        text, special = token["content"], bool(token["special"])
        if token.get("single_word") or vocab.get(text, token["id"]) != token["id"]:
            raise ValueError(f"added token {short(text)} is single_word or has two ids")
        late, lstrip, rstrip = (bool(token.get(key)) for key in ("normalized", "lstrip", "rstrip"))
        added[text] = Added(token["id"], special, late and not special, lstrip, rstrip)
    ordinary = {text: token for text, token in vocab.items() if text not in added}
    bytes_of = {of.token: b"" if of.special else text.encode() for text, of in added.items()}
    build = _metaspace if model.get("byte_fallback") else _byte_level
    tokenizer = build(document, ordinary, bytes_of, added)
    if tokenizer.vocab_size != len(vocab.keys() | added.keys()):
        raise ValueError("two of its tokens have the same id")
    tokenizer.template = _template(document.get("post_processor"))
    return tokenizer


def save_byte_tokenizer(folder: str | Path) -> None:
    """Write the tokenizer.json of the built-in corpus: 258 tokens, none of them special.

    Ids 0 to 255 are the bytes; 256 is the first two bytes of the em dash and 257 the em dash, from
    which the meta tokens are initialised. Raises OSError if the file cannot be written.
    """
    a, b, c = (CHAR_OF[byte] for byte in "\u2014".encode())
    vocab = {CHAR_OF[byte]: byte for byte in range(256)} | {a + b: 256, a + b + c: 257}
    document: dict[str, Any] = {
        "added_tokens": [], "normalizer": None, "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [[a, b], [a + b, c]]},
    }  # fmt: skip
    path = Path(folder) / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
