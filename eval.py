"""What are the thoughts worth?

    python eval.py --model runs/1/quiet_star       the puzzles of the embedded corpus, as a table
    python eval.py --model FOLDER --text FILE      perplexity with and without thoughts
    python eval.py --model FOLDER --task gsm8k --data test.jsonl       the paper's questions
    python eval.py --model FOLDER --task csqa --data dev.jsonl         (questions.py)

The puzzles are those held out of training, in lines that do not explain themselves. A text is read
in sequences of --context tokens, each on its own; every token but a sequence's first is predicted
with and without a thought before it, in parallel over positions.
"""

import argparse
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import questions
from model import Cache, Mistral
from sample import (
    DTYPES,
    execute,
    generate,
    load_any,
    make_parser,
    pick_device,
    show_status,
)
from thoughts import Prediction, QuietStar, thinking_once
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------- the puzzles


class Puzzles(NamedTuple):
    """Held-out puzzles as prompts: three silent lines of training puzzles, then one up to "="."""

    ids: Tensor  # [n, T] int64
    answers: Tensor  # [n] int64, an index into candidates
    candidates: Tensor  # [HOURS] int64, the tokens that an answer can be


class Score(NamedTuple):
    """Of the answers: how many were right, how likely was the right one."""

    right: float  # share whose argmax among the candidates is the answer
    logp: float  # mean log p of the answer, over the whole vocabulary, in nats


def held_out_puzzles(tokenizer: Tokenizer, device: torch.device, repeats: int = 3) -> Puzzles:
    """Every held-out puzzle, `repeats` times after different lines."""
    rng = np.random.default_rng(0)
    known = data.all_puzzles(held_out=False)
    rows, answers = [], []
    for moves in np.tile(data.all_puzzles(held_out=True), (repeats, 1)):
        before = "".join(data.puzzle_line(known[i]) for i in rng.integers(len(known), size=3))
        asked, answer = data.puzzle_line(moves).strip().split("=")
        rows.append(tokenizer.encode("\n" + before + asked + "="))
        answers.append(data.ANSWERS.index(answer))
    candidates = [tokenizer.token_id(answer) for answer in data.ANSWERS]
    return Puzzles(*(torch.tensor(x, device=device) for x in (rows, answers, candidates)))


def score(logits: Tensor, puzzles: Puzzles) -> Score:
    """Score of the next token's logits [n, V] after the puzzles."""
    among = logits[:, puzzles.candidates]  # [n, HOURS]
    logp = torch.log_softmax(logits.float(), dim=-1)
    answer = puzzles.candidates[puzzles.answers]
    return Score(
        right=(among.argmax(-1) == puzzles.answers).float().mean().item(),
        logp=logp.gather(1, answer[:, None]).mean().item(),
    )


def aloud(model: Mistral, puzzles: Puzzles, dash: int) -> Tensor:
    """Logits [n, V] of the answer after the model has written an aside, greedily, as text."""
    dashes = torch.full_like(puzzles.ids[:, :1], dash)
    opened = torch.cat([puzzles.ids, dashes], dim=1)
    said = generate(model, opened, data.ASIDE, temperature=0)
    return model(torch.cat([said, dashes], dim=1))[:, -1]


def sampled_thoughts(model: QuietStar, ids: Tensor) -> Tensor:
    """A thought [n, K] after each text ids [n, T], sampled at temperature 1 as in training."""
    T = ids.shape[1]
    longer = torch.cat([ids, ids[:, :1]], dim=1)  # a position needs some target to think for
    generator = torch.Generator().manual_seed(0)
    with thinking_once(model):
        output = model(longer, positions=torch.tensor([T - 1]), generator=generator)
    return output.thought_ids[:, 0, 0]


def predict_answers(model: QuietStar, puzzles: Puzzles, thought_ids: Tensor | None) -> Prediction:
    """What follows the puzzles after thoughts thought_ids [n, K]; None: after greedy ones."""
    room = model.config.thought_length + 2
    cache = Cache(model.model, len(puzzles.ids), puzzles.ids.shape[1] + room)
    model.model.hidden_states(model.model.embed_tokens(puzzles.ids[:, :-1]), cache)
    return model.think_last(puzzles.ids[:, -1], cache, thought_ids)


@torch.no_grad()
def puzzle_table(model: Mistral | QuietStar, tokenizer: Tokenizer) -> dict[str, Score]:
    """The scores of a model on the held-out puzzles, by what it does between "=" and the answer.

    Shuffled thoughts are the greedy ones, each given to a puzzle drawn by lot.
    """
    text_model = model.model if isinstance(model, QuietStar) else model
    puzzles = held_out_puzzles(tokenizer, text_model.embed_tokens.weight.device)
    dash = tokenizer.token_id("—")
    table = {"answers at once": score(text_model(puzzles.ids)[:, -1], puzzles)}
    if isinstance(model, QuietStar):
        greedy = predict_answers(model, puzzles, None)
        n, K = greedy.thought_ids.shape
        generator = torch.Generator().manual_seed(0)
        V, others = text_model.config.vocab_size, torch.randperm(n, generator=generator)
        thoughts = {
            "pause tokens": puzzles.ids.new_full((n, K), model.start_id),
            "random thoughts": torch.randint(V, (n, K), generator=generator).to(puzzles.ids),
            "shuffled thoughts": greedy.thought_ids[others.to(puzzles.ids.device)],
            "sampled thoughts": sampled_thoughts(model, puzzles.ids),
        }
        for name, thought in thoughts.items():
            table[name] = score(predict_answers(model, puzzles, thought).logits, puzzles)
        table["greedy thoughts"] = score(greedy.logits, puzzles)
    table["writes its aside"] = score(aloud(text_model, puzzles, dash), puzzles)
    return table


def show_puzzles(tables: dict[str, dict[str, Score]]) -> str:
    """Tables of several models as lines of text."""
    lines = [f"{'':38}  right   log p(answer)"]
    for model, table in tables.items():
        lines += [
            f"{model + ', ' + name:38}  {100 * s.right:5.1f} %  {s.logp:8.3f}"
            for name, s in table.items()
        ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- any text


@torch.no_grad()
def text_nll(
    model: QuietStar, ids: Tensor, is_target: Tensor, context: int
) -> tuple[Tensor, Tensor]:
    """nll in nats of every target of a text, without and with a greedy thought before it.

    ids [tokens], is_target [tokens] bool -> two tensors [targets] in the order of the text.
    """
    base, talk = [], []
    with thinking_once(model):
        starts = range(0, len(ids) - 1, context)  # a last sequence of one token has no target
        for count, start in enumerate(starts, 1):
            row = ids[None, start : start + context]
            mask = is_target[None, start : start + context]
            output = model(row, target_mask=mask, temperature=0)
            valid = output.valid[0, 0]  # [J]
            base.append(output.base_nll[0][valid].cpu())
            talk.append(output.talk_nll[0, 0, 0][valid].cpu())
            line = f"{min(start + context, len(ids))} of {len(ids)} tokens"
            show_status(line, count, len(starts), sys.stderr)
    if not sum(map(len, base)):
        raise ValueError(f"a text of {len(ids)} tokens has nothing to predict in it")
    return torch.cat(base), torch.cat(talk)


def show_text(base: Tensor, talk: Tensor, by: Tensor | None = None, bins: int = 5) -> str:
    """Perplexities, and the gain by difficulty: targets in equal bins by their loss.

    base, talk, by: nll [targets] in nats, without, with, and the loss that says how hard a target
    is (none: base). Two models are compared by a third one's: bins of one's own loss would show its
    luck as the other's gain.
    """
    difficulty = base if by is None else by
    lines = [
        f"{len(base)} tokens; perplexity {math.exp(base.mean()):.3f} without thoughts, "
        f"{math.exp(talk.mean()):.3f} with",
        "difficulty (nats)      tokens  without     with     gain",
    ]
    for part in difficulty.argsort().chunk(bins):
        easy, hard = difficulty[part[0]], difficulty[part[-1]]
        without, with_thought = base[part].mean(), talk[part].mean()
        lines.append(
            f"{easy:6.3f} .. {hard:6.3f}   {len(part):9d}  {without:7.4f}  {with_thought:7.4f}  "
            f"{without - with_thought:+7.4f}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------ the command line

# Options that mean nothing without another one; None where they are not given.
TASK_OPTIONS = ("data", "out", "limit", "seed", "shard", "skip_malformed", "chain_of_thought")
TEXT_OPTIONS = ("context", "max_tokens")
CHAIN_OPTIONS = ("samples", "temperature", "max_new_tokens")


def check_together(options: argparse.Namespace) -> None:
    """ValueError for an option that would be ignored, or --task without what it needs."""
    needs = {"text": TEXT_OPTIONS, "task": TASK_OPTIONS, "chain_of_thought": CHAIN_OPTIONS}
    for needed, names in needs.items():
        for name in names:
            if getattr(options, name) is not None and getattr(options, needed) is None:
                name, needed = (x.replace("_", "-") for x in (name, needed))
                raise ValueError(f"--{name} is for --{needed}; give both or neither")
    if options.task is not None and options.data is None:
        raise ValueError("--task needs --data, the file of its questions")
    if options.task is not None and options.text is not None:
        raise ValueError("--task and --text are two evaluations; give one of them")


def load_model(options: argparse.Namespace) -> tuple[Mistral | QuietStar, Tokenizer]:
    """The model that is asked for."""
    dtype = DTYPES[options.dtype] if options.dtype else None
    return load_any(options.model, pick_device(options.device), dtype)


def run_task(options: argparse.Namespace) -> None:
    """Answer the questions of a shard; print the table once all shards are complete."""

    def given(*names: str) -> dict:
        values = {name: getattr(options, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    chains = questions.Chains(**given(*CHAIN_OPTIONS)) if options.chain_of_thought else None
    settings = questions.Settings(**given("task", "limit", "seed", "skip_malformed"), chains=chains)
    shard = re.fullmatch(r"(\d+)/(\d+)", options.shard or "1/1")
    if shard is None:
        raise ValueError(f"--shard is {options.shard!r}; it must be i/n, such as 1/4")
    model, tokenizer = load_model(options)
    answer = questions.answerer(model, tokenizer, settings)
    i, n = map(int, shard.groups())
    about = {"model": options.model, "weights": questions.fingerprint(model)}
    name = f"{Path(options.model).resolve().name}-{about['weights']}"
    data_file, out = Path(options.data), Path(options.out or Path("runs") / "eval" / name)
    summary = questions.evaluate(answer, about, data_file, out, settings, (i, n))
    if summary:
        print(questions.show_summary(summary))
    else:
        print(f"shard {i}/{n} is complete; the last of the {n} to be so prints the summary")
    print(f"results are in {out}")


def run(options: argparse.Namespace) -> None:
    """Load, evaluate, print."""
    check_together(options)
    if options.task is not None:
        run_task(options)
        return
    model, tokenizer = load_model(options)
    if options.text is None:
        print(show_puzzles({"model": puzzle_table(model, tokenizer)}))
        return
    if not isinstance(model, QuietStar):
        raise ValueError(f"{options.model} is a plain model; --text compares with thoughts")
    context = 256 if options.context is None else options.context
    if context < 2 or (options.max_tokens is not None and options.max_tokens < 2):
        raise ValueError("--context and --max-tokens must be at least 2")
    tokens = data.tokenize(data.read_documents([options.text]), tokenizer)
    device = next(model.parameters()).device
    ids, is_target = (x[: options.max_tokens].to(device) for x in (tokens.ids, tokens.is_target))
    print(show_text(*text_nll(model, ids, is_target, context)))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true", default=None)
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder")
    add("--text", metavar="FILE", help="text or .jsonl file; none: the embedded corpus' puzzles")
    add("--context", type=int, help="tokens of the text in a sequence (256)")
    add("--max-tokens", type=int, help="tokens of the text to read; none: all")
    add("--task", choices=questions.PARSERS, help="questions to answer, with and without thoughts")
    add("--data", metavar="FILE", help="the task's questions: JSON lines of its data set")
    add("--out", metavar="FOLDER", help="of results, continued if there are; none: runs/eval/...")
    add("--limit", type=int, help="the first questions only; none: all")
    add("--seed", type=int, help="of sampling and intervals (0)")
    add("--shard", metavar="I/N", help="every N-th question from the I-th on, of all (1/1)")
    flag("--skip-malformed", help="leave out lines that are no question; else they stop it")
    flag("--chain-of-thought", help="gsm8k: think step by step in words, then vote")
    add("--samples", type=int, help="chains of thought that vote on an answer (8)")
    add("--temperature", type=float, help="of sampling them; 0 is greedy (0.7)")
    add("--max-new-tokens", type=int, help="of one of them, at most (384)")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add("--dtype", choices=DTYPES, help="of the computation; none: the file's, float32 on a CPU")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
