"""Text to token ids and back: SentencePiece BPE and byte-level BPE, both run by tiktoken.

tiktoken splits text into words with a regular expression. In each word it merges the adjacent pair
of tokens whose joined bytes have the lowest rank, until no pair has a rank. A tokenizer is thus a
regular expression and a list of byte strings in merge order. Three files are read:

    tokenizer.model   SentencePiece BPE with byte fallback (Mistral 7B, Llama 2); also .model.v3
    tekken.json       byte-level BPE of later Mistral models (Nemo, Ministral)
    tokenizer.json    BPE of Hugging Face's tokenizers: byte-level (GPT-2, SmolLM2, Llama 3, Qwen),
                      or with SentencePiece's spaces and byte fallback (Llama 2, TinyLlama)

The ids are those of sentencepiece, mistral-common and tokenizers. Ours: special tokens, which
include SentencePiece's user-defined pieces, are found in text only on request; by default "</s>"
is ordinary text. Added tokens that are not special ("<think>") are always found.

Whether texts begin with bos is decided as in transformers: by the template in tokenizer.json, or
by add_bos_token in tokenizer_config.json if there is no template or the tokenizer class is one of
Llama's. If neither is given, texts begin with bos unless the file is a byte-level tokenizer.json.
"""

import hashlib
import struct
from pathlib import Path

from support.files import hub_hint, json_object, read_utf8, short
from support.tokenizer.bpe import Tokenizer
from support.tokenizer.sentencepiece import read_sentencepiece
from support.tokenizer.tekken import read_tekken
from support.tokenizer.tokenizer_json import read_tokenizer_json, save_byte_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "save_byte_tokenizer"]


def _frame(tokenizer: Tokenizer, folder: Path) -> None:
    """Set bos_id, eos_id and adds_bos of a tokenizer.

    bos and eos are those of the first source that gives them: the template (bos only),
    tokenizer_config.json (null: none), the names in the tokenizer's file, config.json.
    """
    files, template = (folder / "tokenizer_config.json", folder / "config.json"), tokenizer.template
    settings, model = (json_object(read_utf8(x), x.name) if x.is_file() else {} for x in files)
    for name, own in zip(("bos", "eos"), tokenizer.names, strict=True):
        text = settings.get(f"{name}_token", own if own in tokenizer.added else None)
        text = text["content"] if isinstance(text, dict) else text
        if text is not None and text not in tokenizer.added:
            raise ValueError(f"{name}_token {short(text)} is not an added token")
        token = model.get(f"{name}_token_id") if f"{name}_token" not in settings else None
        token = token[0] if isinstance(token, list) and token else token  # Llama 3 lists several
        token = tokenizer.added[text].token if text is not None else token
        token = template[0] if name == "bos" and template else token
        if token is not None and not (type(token) is int and 0 <= token < tokenizer.vocab_size):
            raise ValueError(f"{name}_token_id is {short(token)}; it must be a token or several")
        setattr(tokenizer, f"{name}_id", token)
    adds = tokenizer.adds_bos if template is None else bool(template)
    if template is None or "Llama" in settings.get("tokenizer_class", ""):
        adds = settings.get("add_bos_token", adds)
    tokenizer.adds_bos = bool(adds) and tokenizer.bos_id is not None


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer from its file or from the folder of a checkpoint.

    Of a folder, the first of these is read: tokenizer.model, tokenizer.model.v* (the last of them),
    tekken.json, tokenizer.json. Raises ValueError if there is no such file or it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        files = [path / "tokenizer.model", *sorted(path.glob("tokenizer.model.v*"), reverse=True)]
        files += [path / "tekken.json", path / "tokenizer.json"]
        path = next(filter(Path.is_file, files), path)
        if path.is_dir():
            raise ValueError(f"{source} has no tokenizer.model, tekken.json or tokenizer.json")
    elif not path.is_file():
        hint = hub_hint(source) or "; give a tokenizer file or a folder with one"
        raise ValueError(f"{source} does not exist{hint}")
    read = read_tokenizer_json if path.suffix == ".json" else read_sentencepiece
    read = read_tekken if path.name.startswith("tekken") else read
    try:
        tokenizer = read(path)
        _frame(tokenizer, path.parent)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, struct.error) as error:
        raise ValueError(f"cannot read {path}: unexpected contents ({short(error)})") from error
    tokenizer.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return tokenizer
