"""Continue a prompt with a plain or a thinking model, or look at its thoughts about a text.

    python sample.py --model FOLDER --prompt "The capital of France is" --greedy
    python sample.py --model runs/1/quiet_star --prompt "122010=" --greedy --show-thoughts
    python sample.py --model runs/1/quiet_star --text FILE --html out.html --context 64

A thinking model thinks before every token that it writes. Only the last position thinks; the text's
key/value cache never holds a thought, so what was thought cannot be looked up later.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor

import data
from model import Cache, Mistral, load_mistral, read_config, write_text
from page import STRONG, level, read_thoughts, render
from thoughts import (
    Prediction,
    QuietStar,
    check_temperature,
    load_quiet_star,
    sample_tokens,
    thinks,
)
from tokenizer import Tokenizer, load_tokenizer


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits [B, V] with all but the likeliest tokens that hold probability top_p at -inf.

    The token that carries the sum over top_p stays in (Holtzman et al. 2020).
    """
    if top_p >= 1:
        return logits
    p, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    outside = p.cumsum(-1) - p >= top_p  # [B, V] what stands before a token already suffices
    return logits.masked_fill(outside.gather(-1, order.argsort(-1)), -math.inf)


class Step(NamedTuple):
    """One generated token of every sequence, and what a thinking model thought before it."""

    token: Tensor  # [B] int64
    prediction: Prediction | None  # None for a plain model


@torch.no_grad()
def generate_steps(
    model: Mistral | QuietStar,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """Continue ids [B, T] token by token; see generate. Ends after max_new_tokens tokens."""
    check_sampling(ids, max_new_tokens, temperature, top_p)
    thinking = isinstance(model, QuietStar)
    text_model = model.model if thinking else model
    room = model.config.thought_length + 2 if thinking else 0  # for the thought at the end
    B, T = ids.shape
    shared = B > 1 and bool((ids == ids[:1]).all())  # samples of one prompt: read it once
    cache = Cache(text_model, 1 if shared else B, T + max_new_tokens + room)
    text_model.hidden_states(
        text_model.embed_tokens(ids[:1, :-1] if shared else ids[:, :-1]), cache
    )
    if shared:
        cache.repeat(B)

    last = ids[:, -1]
    for _ in range(max_new_tokens):
        prediction = model.think_last(last, cache) if thinking else None
        logits = prediction.logits if prediction else model(last[:, None], cache)[:, -1].float()
        if temperature == 0:
            last = logits.argmax(-1)
        else:
            uniform = torch.rand(B, generator=generator).to(ids.device)
            last = sample_tokens(nucleus(logits / temperature, top_p), uniform)
        yield Step(last, prediction)


def generate(
    model: Mistral | QuietStar,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue ids [B, T] int64 -> [B, T + max_new_tokens].

    temperature 0 is greedy; top_p keeps the likeliest tokens that together hold this probability;
    generator (on the CPU) makes it repeatable. A QuietStar thinks greedily before every token.
    Raises ValueError for an empty prompt or a setting out of range.
    """
    steps = generate_steps(model, ids, max_new_tokens, temperature, top_p, generator)
    return torch.cat([ids, *(step.token[:, None] for step in steps)], dim=1)


def check_sampling(ids: Tensor, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """ValueError for a prompt or setting that cannot be sampled with."""
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(
            f"the prompt has shape {tuple(ids.shape)}; it must be [B, T] with at least one token"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    check_temperature(temperature)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


# ------------------------------------------------------------------------------ the command line


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or CUDA, MPS or the CPU, whichever is there first."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None
    return device


def check_belongs(tokenizer: Tokenizer, vocab_size: int, folder: Path) -> None:
    """ValueError if a model with vocab_size embeddings was not made for this tokenizer.

    A few rows more than tokens are common: padding to a round number, or appended meta tokens.
    """
    if not tokenizer.vocab_size <= vocab_size < tokenizer.vocab_size + 256:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{vocab_size}; put the tokenizer that belongs to the checkpoint into its folder"
        )


def load_any(
    folder: str | Path, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[Mistral | QuietStar, Tokenizer]:
    """The plain or thinking model in a folder, and its tokenizer.

    dtype None is that of the file, but float32 on a CPU. Raises ValueError if there is no model or
    the two do not belong together.
    """
    folder = Path(folder)
    vocab_size = read_config(folder).vocab_size
    tokenizer = load_tokenizer(folder)
    check_belongs(tokenizer, vocab_size, folder)
    if dtype is None and device.type == "cpu":  # bfloat16 is slow on most CPUs
        dtype = torch.float32
    return (load_quiet_star if thinks(folder) else load_mistral)(folder, dtype, device), tokenizer


def paint(text: str, gain: float) -> str:
    """The text in the colour that its gain in nats has on the page: blue raised, orange lowered.

    Unpainted unless standard output is a terminal; NO_COLOR turns it off (no-color.org).
    """
    size = level(gain)
    if not size or os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    style = "1;" if abs(size) >= STRONG else ""  # bold
    return f"\x1b[{style}38;5;{33 if size > 0 else 208}m{text}\x1b[0m"


def describe_thought(
    prediction: Prediction, index: tuple[int, ...], token: int, tokenizer: Tokenizer
) -> tuple[str, float]:
    """The thought at an index of a prediction, its w and log p of a token without and with it.

    Returns the text, and by how many nats the thought raised log p.
    """
    without, with_thought = (
        torch.log_softmax(logits[index], dim=-1)[token].item()
        for logits in (prediction.base_logits, prediction.logits)
    )
    thought = tokenizer.spell(prediction.thought_ids[index].tolist())
    weight = prediction.weight[index].item()
    text = f"thought {thought!r}  w {weight:.3f}  log p {without:.3f} -> {with_thought:.3f}"
    return text, with_thought - without


def show_thought(step: Step, row: int, tokenizer: Tokenizer) -> str:
    """A line on one generated token: its thought, w, and what the thought did to its log p."""
    token = step.token[row].item()
    text, gain = describe_thought(step.prediction, (row,), token, tokenizer)
    shown = f"{tokenizer.spell([token])!r:>12}"
    return f"{paint(shown, gain)}  {text} ({paint(f'{gain:+.3f}', gain)})"


def show_status(line: str, done: int, total: int, file: TextIO) -> None:
    """Renew the status line of long work; where it is no terminal, print one every tenth of it."""
    if file.isatty():
        print(f"\r{line:<100}", end="\n" if done == total else "", file=file, flush=True)
    elif done % max(total // 10, 1) == 0 or done == total:
        print(line, file=file, flush=True)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help begins with the description as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def execute(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    arguments: list[str] | None,
) -> None:
    """Run a command; a bad input is one line on standard error and exit code 2."""
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except RuntimeError as error:  # a GPU says "out of memory", a CPU "can't allocate memory"
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        parser.exit(2, f"{parser.prog}: error: {str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")


# What --prompt and --text take beside --seed and --device, with the defaults.
OF_PROMPT = {
    "max_new_tokens": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "greedy": False,
    "samples": 1,
    "show_thoughts": False,
}
OF_TEXT = {"html": None, "context": 256}


def check_options(options: argparse.Namespace) -> None:
    """ValueError for options that do not go together."""
    if (options.prompt is None) == (options.text is None):
        raise ValueError(
            "give either --prompt, to continue it, or --text, to see thoughts about it"
        )
    taken, other = ("--text", OF_PROMPT) if options.prompt is None else ("--prompt", OF_TEXT)
    odd = [name for name, default in other.items() if getattr(options, name) != default]
    if odd:
        raise ValueError(f"{taken} does not go with --{odd[0].replace('_', '-')}; leave one out")
    if options.text is not None and options.html is None:
        raise ValueError("--text needs --html, the file to write the page into")
    if options.html is not None and not Path(options.html).absolute().parent.is_dir():
        raise ValueError(f"--html {options.html}: its folder does not exist; make it first")
    if options.html is not None and Path(options.html).is_dir():
        raise ValueError(f"--html {options.html} is a folder; give the name of a file")
    if options.samples < 1 or not 0 <= options.seed < 2**63:
        raise ValueError("--samples must be at least 1 and --seed a whole number from 0")


def run(options: argparse.Namespace) -> None:
    """Load a model; write a page of its thoughts, or let it continue a prompt."""
    check_options(options)
    model, tokenizer = load_any(options.model, pick_device(options.device))
    if (options.text is not None or options.show_thoughts) and not isinstance(model, QuietStar):
        raise ValueError(f"{options.model} is a plain model: it has no thoughts to show")
    if isinstance(model, QuietStar) and options.text is not None:
        write_page(model, tokenizer, options)
    else:
        continue_prompt(model, tokenizer, options)


def write_page(model: QuietStar, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Let the model think about a text and write the page."""
    text = data.tokenize(data.read_documents([options.text]), tokenizer)
    text = data.Tokens(*(x.to(next(model.parameters()).device) for x in (text.ids, text.is_target)))
    generator = torch.Generator().manual_seed(options.seed)
    records, count = [], len(text.ids)
    for record in read_thoughts(model, tokenizer, text, options.context, generator):
        records.append(record)
        show_status(f"{len(records)} of {count} tokens", len(records), count, sys.stderr)
    config = model.config
    note = (
        f"{config.n_thoughts} thoughts of {config.thought_length} tokens after every token, "
        f"sampled at temperature 1 with seed {options.seed}; the text is read in sequences of "
        f"{options.context} tokens, each on its own."
    )
    page = render(records, f"Thoughts of {options.model} on {options.text}", note, config)
    write_text(Path(options.html), page)


def continue_prompt(
    model: Mistral | QuietStar, tokenizer: Tokenizer, options: argparse.Namespace
) -> None:
    """Continue a prompt and print the thoughts, if asked, and the texts."""
    prompt = tokenizer.encode(options.prompt, bos=tokenizer.adds_bos)
    device = next(model.parameters()).device
    ids = torch.tensor([prompt] * options.samples, dtype=torch.long, device=device)
    steps = generate_steps(
        model,
        ids,
        options.max_new_tokens,
        0.0 if options.greedy else options.temperature,
        options.top_p,
        torch.Generator().manual_seed(options.seed),
    )
    finished = torch.zeros(options.samples, dtype=torch.bool, device=device)
    eos_id = -1 if tokenizer.eos_id is None else tokenizer.eos_id
    written: list[list[int]] = [[] for _ in range(options.samples)]
    for step in steps:
        finished |= (step.token == eos_id) | (step.token >= tokenizer.vocab_size)  # no token
        if finished.all():
            break
        for row in (~finished).nonzero().flatten().tolist():
            written[row].append(step.token[row].item())
            if options.show_thoughts:
                print(f"sample {row + 1}  {show_thought(step, row, tokenizer)}", flush=True)
    for tokens in written:
        print(tokenizer.decode(prompt + tokens))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    parser.set_defaults(**OF_PROMPT, **OF_TEXT)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder, plain or thinking")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add = parser.add_argument_group("continue a prompt").add_argument
    add("--prompt", help="the text to continue")
    add("--max-new-tokens", type=int, help="tokens to write (16)")
    add("--temperature", type=float, help="of sampling; 0 is greedy (1.0)")
    add("--top-p", type=float, help="sample among the likeliest tokens only (1.0)")
    add("--greedy", action="store_true", help="the same as --temperature 0")
    add("--samples", type=int, help="continuations at once (1)")
    add("--show-thoughts", action="store_true", help="print the thought before every token")
    add = parser.add_argument_group("look at the thoughts about a text").add_argument
    add("--text", metavar="FILE", help="text or .jsonl file")
    add("--html", metavar="FILE", help="page to write")
    add("--context", type=int, help="tokens in a sequence (256)")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
