"""Continue a prompt with a plain or a thinking model, and look at its thoughts.

    python sample.py --model FOLDER --prompt "The capital of France is" --greedy
    python sample.py --model runs/1/quiet_star --prompt "122010=" --greedy --show-thoughts

A thinking model thinks before every token that it writes. Only the last position thinks; the text's
key/value cache never holds a thought, so what was thought cannot be looked up later.
(python -m tools.page draws a page of the thoughts about a text.)
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model import KVCache, Mistral
from support.checkpoints import load
from support.device import DTYPES, pick_device
from support.terminal import execute, make_parser, paint
from support.tokenizer import Tokenizer
from thoughts import Prediction, QuietStar, sample_tokens, token_logits, widen


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits [B, V] with all but the likeliest tokens that hold probability top_p at -inf.

    The token that carries the sum over top_p stays in (Holtzman et al. 2020).
    """
    if top_p >= 1:
        return logits
    p, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    outside = p.cumsum(-1) - p >= top_p  # [B, V] what stands before a token already suffices
    return logits.masked_fill(outside.gather(-1, order.argsort(-1)), -math.inf)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits [..., V]) -> [...]."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def predict(
    model: Mistral | QuietStar, last: Tensor, cache: KVCache, think_above: float
) -> tuple[Tensor, Prediction | None]:
    """Logits [B, V] after the text's next token last [B], and the Prediction if the model thinks.

    Ours: a QuietStar thinks only where the entropy of its prediction without a thought is at least
    think_above, in nats. At 0 it always thinks.
    """
    if isinstance(model, Mistral):
        return model(last[:, None], cache)[:, -1].float(), None
    if think_above == 0:
        prediction = model.think_last(last, cache)
        return prediction.logits, prediction
    length = cache.length
    h_init = model.model.run(model.model.embed_tokens(last[:, None]), cache)[:, -1]  # [B, D]
    logits = token_logits(widen(h_init), model.model.lm_head.weight, model.excluded)  # [B, V]
    thinks = entropy(logits) >= think_above  # [B]
    if not thinks.any():
        return logits, None
    cache.truncate(length)  # `last` is read again, together with start
    prediction = model.think_last(last, cache)
    return torch.where(thinks[:, None], prediction.logits, logits), prediction


@torch.no_grad()
def generate_steps(
    model: Mistral | QuietStar,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    think_above: float = 0.0,
) -> Iterator[tuple[Tensor, Prediction | None]]:
    """Continue ids [B, T] step by step: tokens [B], and the Prediction if the model thought."""
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
    text_model = model.model if isinstance(model, QuietStar) else model
    cache, last = KVCache(text_model.config), ids[:, -1]
    if ids.shape[1] > 1:
        text_model.run(text_model.embed_tokens(ids[:, :-1]), cache)
    for _ in range(max_new_tokens):
        logits, prediction = predict(model, last, cache, think_above)
        if not logits.isfinite().all():
            raise ValueError(
                "the logits are not finite: weights are broken, or their dtype too small"
            )
        if temperature == 0:
            last = logits.argmax(-1)
        else:
            uniform = torch.rand(len(ids), generator=generator).to(ids.device)
            last = sample_tokens(nucleus(logits / temperature, top_p), uniform)
        yield last, prediction


def generate(
    model: Mistral | QuietStar,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    think_above: float = 0.0,
) -> Tensor:
    """Continue ids [B, T] int64 -> [B, T + max_new_tokens].

    temperature 0 is greedy. top_p keeps the likeliest tokens that together have this probability.
    generator (on the CPU) makes the result repeatable. A QuietStar thinks greedily before every
    token, or only where the prediction has an entropy of at least think_above nats (see predict).
    Raises ValueError for an empty prompt, a setting out of range, or logits that are not finite.
    """
    sampling = temperature, top_p, generator, think_above
    steps = generate_steps(model, ids, max_new_tokens, *sampling)
    return torch.cat([ids, *(token[:, None] for token, _ in steps)], dim=1)


def write(
    model: Mistral | QuietStar, tokenizer: Tokenizer, prompt: str, max_new_tokens: int,
    samples: int = 1, stop: re.Pattern | None = None, watch: Callable | None = None,
    special: bool = False, **sampling
) -> list[str]:  # fmt: skip
    """What a model writes after a prompt, `samples` times; sampling: as for generate.

    Each text ends before a match of `stop`, at eos, or at an embedding that is no token.
    watch(row, token, prediction) is called for every token that is written. special: the prompt's
    special tokens are meant.
    """
    prompt_ids = tokenizer.encode(prompt, tokenizer.adds_bos, special)
    before, device = tokenizer.decode(prompt_ids), next(model.parameters()).device
    ids = torch.tensor([prompt_ids] * samples, dtype=torch.long, device=device)
    rows = {row: list(prompt_ids) for row in range(samples)}  # those that are still written
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
    """The thought of a sequence, its w and log p of a token without and with it, and the gain.

    Returns the text, and by how many nats the thought raised log p.
    """
    without, with_thought = (
        torch.log_softmax(logits[row], dim=-1)[token].item()
        for logits in (prediction.base_logits, prediction.logits)
    )
    thought = tokenizer.spell(prediction.thought_ids[row].tolist())
    gain, weight = with_thought - without, prediction.weight[row].item()
    logp = f"log p {without:.3f} -> {with_thought:.3f} ({gain:+.3f})"
    return f"thought {thought!r}  w {weight:.3f}  {logp}", gain


# ------------------------------------------------------------------------------ the command line


def run(options: argparse.Namespace) -> None:
    """Continue a prompt and print the thoughts, if asked, and the texts."""
    if options.samples < 1 or not 0 <= options.seed < 2**63:
        raise ValueError("--samples must be at least 1 and --seed a whole number from 0")
    dtype = options.dtype and DTYPES[options.dtype]
    model, tokenizer = load(options.model, pick_device(options.device), dtype)
    if options.show_thoughts and not isinstance(model, QuietStar):
        raise ValueError(f"{options.model} is a plain model: it has no thoughts to show")

    def show(row: int, token: int, prediction: Prediction | None) -> None:
        text, gain = "no thought", 0.0
        if prediction:
            text, gain = describe_thought(prediction, row, token, tokenizer)
        shown = paint(f"{tokenizer.spell([token])!r:>12}", gain)
        print(f"sample {row + 1}  {shown}  {text}", flush=True)

    texts = write(
        model,
        tokenizer,
        options.prompt,
        options.max_new_tokens,
        options.samples,
        watch=show if options.show_thoughts else None,
        special=options.special,
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        generator=torch.Generator().manual_seed(options.seed),
        think_above=options.think_above,
    )
    for text in texts:
        print(options.prompt + text)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder, plain or thinking")
    add("--prompt", required=True, help="the text to continue")
    add("--special", action="store_true", help="special tokens spelled in the prompt are meant")
    add("--max-new-tokens", type=int, default=16, help="tokens to write (16)")
    add("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy (1.0)")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest tokens only (1.0)")
    add("--greedy", action="store_true", help="the same as --temperature 0")
    add("--samples", type=int, default=1, help="continuations at once (1)")
    add(
        "--think-above", type=float, default=0.0, metavar="NATS",
        help="think only where the entropy of the next token is at least this (0: always)",
    )  # fmt: skip
    add("--show-thoughts", action="store_true", help="print the thought before every token")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--dtype", choices=DTYPES, help="precision; none: the file's, on a CPU float32 if it fits")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
