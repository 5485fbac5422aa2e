"""tekken.json, byte-level BPE of later Mistral models: {config, vocab, special_tokens}."""

import base64
from pathlib import Path

from support.files import json_object, read_utf8
from support.tokenizer.bpe import Added, Tokenizer, covering

SPECIAL = (  # the special tokens of a tekken.json that does not list them
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
)


def read_tekken(path: Path) -> Tokenizer:
    """Read a tekken.json. load_tokenizer turns the errors of damaged files into ValueError."""
    document = json_object(read_utf8(path), path.name)
    config, special = document["config"], document.get("special_tokens")
    size, front = config["default_vocab_size"], config["default_num_special_tokens"]
    names = [token["token_str"] for token in special] if special else SPECIAL.split()
    vocab = document["vocab"][: max(size - front, 0)]  # the file has more entries than are used
    pieces = {base64.b64decode(entry["token_bytes"]): (front + entry["rank"],) for entry in vocab}
    if (
        not len(set(names)) == len(names) <= front < 10_000
        or len(pieces) != size - front
        or [entry["rank"] for entry in vocab] != list(range(len(vocab)))
        or {*map(len, list(pieces)[:256])} != {1}
    ):
        raise ValueError("its ranks, bytes or special tokens are incomplete or out of order")
    bytes_of = dict.fromkeys(range(front), b"")  # the first ids are special tokens
    bytes_of |= {token: piece for piece, (token,) in pieces.items()}
    added = {name: Added(token) for token, name in enumerate(names)}
    tokenizer = Tokenizer(covering(config["pattern"]), pieces, bytes_of, added)
    tokenizer.adds_bos, tokenizer.names = True, ("<s>", "</s>")
    return tokenizer
