"""Continue prompts with a plain or a thinking model, and show the thoughts.

    python sample.py --model FOLDER --prompt "The capital of France is" --greedy
    python sample.py --model runs/1/quiet_star --prompt "122010=" --greedy --show-thoughts
    python sample.py --model FOLDER --prompt-file - < prompt.txt

A thinking model thinks before every token that it writes, at the last position only. The text's
key/value cache never holds a thought, so later tokens do not see earlier thoughts.
(python -m tools.page draws the thoughts about a given text.)
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import support  # noqa: F401 - before torch: sets OMP_WAIT_POLICY, read when torch is imported

# isort: split
import torch
from torch import Tensor

from model import KVCache, Mistral
from support.checkpoints import load
from support.device import DTYPES, pick_device
from support.files import read_utf8
from support.terminal import execute, make_parser, paint
from support.tokenizer import Tokenizer
from thoughts import Prediction, QuietStar, sample_tokens, token_logits, widen

Model = Mistral | QuietStar  # plain or thinking


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits [B, V] with -inf for all but the most likely tokens, which have probability top_p.

    The token with which their sum reaches top_p is kept (Holtzman et al. 2020).
    """
    if top_p >= 1:
        return logits
    p, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    outside = p.cumsum(-1) - p >= top_p  # [B, V] the tokens before this one suffice
    return logits.masked_fill(outside.gather(-1, order.argsort(-1)), -math.inf)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits [..., V]) -> [...]."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def check_finite(logits: Tensor) -> Tensor:
    """Return logits (or values computed from them). Raises ValueError if one is not finite."""
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite: weights are broken, or their dtype too small")
    return logits


def read_ids(model: Model, ids: Tensor) -> KVCache:
    """A cache that holds the text ids [B, T], T >= 0, without thoughts."""
    text_model = model.model if isinstance(model, QuietStar) else model
    cache = KVCache(text_model.config)
    if ids.shape[1] > 0:
        text_model.run(text_model.embed_tokens(ids), cache)
    return cache


def predict(
    model: Model, last: Tensor, cache: KVCache, think_above: float = 0.0
) -> tuple[Tensor, Prediction | None]:
    """Logits [B, V] float32 after the text's next token last [B], and the thought, if there is one.

    Ours: a QuietStar thinks only if the entropy of its prediction without a thought is at least
    think_above, in nats. At 0 it always thinks. Raises ValueError if the logits are not finite.
    """
    if isinstance(model, Mistral):
        return check_finite(model(last[:, None], cache)[:, -1].float()), None
    if think_above == 0:
        prediction = model.think_last(last, cache)
        return check_finite(prediction.logits), prediction
    length = cache.length
    h_init = model.model.run(model.model.embed_tokens(last[:, None]), cache)[:, -1]  # [B, D]
    logits = token_logits(widen(h_init), model.model.lm_head.weight, model.excluded)  # [B, V]
    thinks = entropy(check_finite(logits)) >= think_above  # [B]
    if not thinks.any():
        return logits, None
    cache.truncate(length)  # `last` is read again, together with start
    prediction = model.think_last(last, cache)
    return check_finite(torch.where(thinks[:, None], prediction.logits, logits)), prediction


@torch.no_grad()
def generate_steps(
    model: Model, ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
    generator: torch.Generator | None = None, think_above: float = 0.0,
) -> Iterator[tuple[Tensor, Prediction | None]]:  # fmt: skip
    """Continue ids [B, T] int64 step by step: tokens [B], and the Prediction if the model thought.

    temperature 0 is greedy. top_p samples among the most likely tokens only (see nucleus).
    generator (on the CPU) makes the result repeatable. A QuietStar thinks greedily before every
    token, or only if the prediction has an entropy of at least think_above nats (see predict).
    Raises ValueError for an empty prompt, a setting out of range, or logits that are not finite.
    """
    if ids.shape[1] < 1:
        raise ValueError("the prompt is empty; give at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if temperature != 0 and not 1e-3 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or at least 0.001")
    if not think_above >= 0:
        raise ValueError(f"think_above is {think_above}; it must be at least 0 nats")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    cache, last = read_ids(model, ids[:, :-1]), ids[:, -1]
    for _ in range(max_new_tokens):
        logits, prediction = predict(model, last, cache, think_above)
        if temperature == 0:
            last = logits.argmax(-1)
        else:
            uniform = torch.rand(len(ids), generator=generator).to(ids.device)
            last = sample_tokens(nucleus(logits / temperature, top_p), uniform)
        yield last, prediction


def generate(model: Model, ids: Tensor, max_new_tokens: int, **sampling) -> Tensor:
    """Continue ids [B, T] int64 -> [B, T + max_new_tokens]. sampling: as for generate_steps."""
    steps = generate_steps(model, ids, max_new_tokens, **sampling)
    return torch.cat([ids, *(token[:, None] for token, _ in steps)], dim=1)


def write(
    model: Model, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, samples: int = 1,
    stop: re.Pattern | None = None, watch: Callable | None = None, special: bool = False, **sampling
) -> list[str]:  # fmt: skip
    """Continue a prompt `samples` times. Returns the new texts. sampling: as for generate_steps.

    A text ends before a match of `stop`, an eos, or an embedding without a token.
    watch(row, token, prediction) is called for every new token. special: special tokens spelled in
    the prompt are read as such.
    """
    prompt_ids = tokenizer.encode(prompt, tokenizer.adds_bos, special)
    before, device = tokenizer.decode(prompt_ids), next(model.parameters()).device
    ids = torch.tensor([prompt_ids] * samples, dtype=torch.long, device=device)
    rows = {row: list(prompt_ids) for row in range(samples)}  # the unfinished ones
    texts = [""] * samples
    for tokens, prediction in generate_steps(model, ids, max_new_tokens, **sampling):
        for row in list(rows):
            token = int(tokens[row])
            if token == tokenizer.eos_id or token >= tokenizer.vocab_size:
                del rows[row]
                continue
            rows[row].append(token)
            if watch:
                watch(row, token, prediction)
            texts[row] = tokenizer.decode(rows[row]).removeprefix(before)
            if stop and (end := stop.search(texts[row])):
                texts[row] = texts[row][: end.start()]
                del rows[row]
        if not rows:
            break
    return texts


def describe_thought(
    prediction: Prediction, row: int, token: int, tokenizer: Tokenizer
) -> tuple[str, float]:
    """A line about the thought of a row, and the change of log p(token) by it, in nats."""
    without, with_thought = (
        torch.log_softmax(logits[row], dim=-1)[token].item()
        for logits in (prediction.base_logits, prediction.logits)
    )
    thought = tokenizer.spell(prediction.thought_ids[row].tolist())
    gain, weight = with_thought - without, prediction.weight[row].item()
    logp = f"log p {without:.3f} -> {with_thought:.3f} ({gain:+.3f})"
    return f"thought {thought!r}  w {weight:.3f}  {logp}", gain


# ------------------------------------------------------------------------------ the command line


def read_prompt(file: str) -> str:
    """The text of a file ("-": standard input) without the line break at its end.

    Raises ValueError if it cannot be read as UTF-8.
    """
    if file != "-":
        return read_utf8(Path(file)).removesuffix("\n")
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read standard input as UTF-8 text: {error}") from None


def run(options: argparse.Namespace) -> None:
    """Continue the prompts; print the thoughts, if asked, the texts, and the speed."""
    if options.samples < 1 or not 0 <= options.seed < 2**63:
        raise ValueError("--samples must be at least 1 and --seed a whole number from 0")
    prompts, written = options.prompt or [read_prompt(options.prompt_file)], []
    model, tokenizer = load(options.model, pick_device(options.device), DTYPES.get(options.dtype))
    if options.show_thoughts and not isinstance(model, QuietStar):
        raise ValueError(f"{options.model} is a plain model: it has no thoughts to show")

    def watch(row: int, token: int, prediction: Prediction | None) -> None:
        written.append(token)
        if options.show_thoughts:
            text, gain = "no thought", 0.0
            if prediction:
                text, gain = describe_thought(prediction, row, token, tokenizer)
            shown = paint(f"{tokenizer.spell([token])!r:>12}", gain)
            print(f"sample {row + 1}  {shown}  {text}", flush=True)

    how = {"temperature": 0.0 if options.greedy else options.temperature}
    names = "max_new_tokens", "samples", "special", "top_p", "think_above"
    how |= {name: getattr(options, name) for name in names}
    began = time.perf_counter()
    for prompt in prompts:
        seeded = torch.Generator().manual_seed(options.seed)  # so other prompts change nothing
        texts = write(model, tokenizer, prompt, watch=watch, generator=seeded, **how)
        print(*(prompt + text for text in texts), sep="\n", flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(written)} tokens, {len(written) / seconds:.1f} tokens/s", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add, either = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder, plain or thinking")
    either.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue, each alone")
    either.add_argument("--prompt-file", metavar="FILE", help="one text to continue; -: from stdin")
    add("--special", action="store_true", help="read special tokens spelled in the prompt as such")
    add("--max-new-tokens", type=int, default=16, help="tokens to write (16)")
    add("--temperature", type=float, default=1.0, help="of the sampling; 0: greedy (1.0)")
    add("--top-p", type=float, default=1.0, help="sample among the most likely tokens (1.0: all)")
    add("--greedy", action="store_true", help="the same as --temperature 0")
    add("--samples", type=int, default=1, help="continuations of a prompt (1)")
    think = "think only if the entropy of the next token is at least this (0: always)"
    add("--think-above", type=float, default=0.0, metavar="NATS", help=think)
    add("--show-thoughts", action="store_true", help="print the thought before every token")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--dtype", choices=DTYPES, help="precision; none: the file's, on a CPU float32 if it fits")
    add("--device", help="cpu, cuda, mps; none: the best one available")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
