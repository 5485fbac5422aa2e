"""Measure a model without and with thoughts: on puzzles, on a text, on questions.

    python eval.py --model runs/1/quiet_star                      puzzles of the built-in corpus
    python eval.py --model FOLDER --text FILE                     perplexity, by difficulty
    python eval.py --model FOLDER --task gsm8k --data test.jsonl  questions of the paper
    python eval.py --model FOLDER --task csqa --data dev.jsonl

Puzzles are held out of training. A text is read in independent sequences of --context tokens; every
token except the first of a sequence is predicted without a thought and with a greedy one. Questions
are answered zero-shot, right after "A:", with the prompts of the authors' code (eval_helpers.py).
For a vote of written chains of thought, see python -m tools.chains.

    Q: {question}\\nA: {number}\\n
    Q: {question}\\n(A) {choice}\\n ... (E) {choice}\\nA: {letter}\\n
"""

import argparse
import copy
import itertools
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import support  # noqa: F401 - before torch: sets OMP_WAIT_POLICY, read when torch is imported

# isort: split
import numpy as np
import torch
from torch import Tensor

from model import Mistral, check_range
from sample import Model, check_finite, entropy, generate, predict, read_ids, write
from support import corpus
from support.checkpoints import load
from support.device import DTYPES, pick_device
from support.questions import LETTERS, TASKS, Question, number_in, read_questions
from support.results import about, answer_all, results_file, show_scores
from support.terminal import execute, make_parser, show_status
from support.text import Tokens, read_tokens
from support.tokenizer import Tokenizer
from thoughts import Prediction, QuietStar

# ------------------------------------------------------------------------------------- the puzzles


class Puzzles(NamedTuple):
    """Held-out puzzles as prompts: three training puzzles with answers, then one up to "=".

    An aside is the text between two em dashes, before the answer. It works if it solves the puzzle
    step by step; it hums if it consists of the letter m only, and so holds no work.
    """

    ids: Tensor  # [n, T] int64
    answers: Tensor  # [n] int64, an index into candidates
    work: Tensor  # [n, ASIDE] int64, the aside that works
    candidates: Tensor  # [HOURS] int64, the tokens of the possible answers
    hum: int  # the token of an aside that hums


class Score(NamedTuple):
    """The score of answers to puzzles."""

    right: float  # share with the answer as the most likely candidate
    logp: float  # mean log p of the answer, over the whole vocabulary, in nats


def held_out_puzzles(tokenizer: Tokenizer, device: torch.device, repeats: int = 3) -> Puzzles:
    """Every held-out puzzle, `repeats` times after different training puzzles."""
    rng = np.random.default_rng(0)
    known = corpus.all_puzzles(held_out=False)
    rows, answers, work = [], [], []
    for moves in np.tile(corpus.all_puzzles(held_out=True), (repeats, 1)):
        before = "".join(corpus.puzzle_line(known[i]) for i in rng.integers(len(known), size=3))
        asked, answer = corpus.puzzle_line(moves).strip().split("=")
        rows.append(tokenizer.encode("\n" + before + asked + "="))
        answers.append(corpus.ANSWERS.index(answer))
        work.append(tokenizer.encode(corpus.explanation(moves)))
    candidates = [tokenizer.token_id(answer) for answer in corpus.ANSWERS]
    tensors = (torch.tensor(x, device=device) for x in (rows, answers, work, candidates))
    return Puzzles(*tensors, tokenizer.token_id(corpus.HUM[0]))


def score(logits: Tensor, puzzles: Puzzles) -> Score:
    """Score of the logits [n, V] after the puzzles. Raises ValueError if they are not finite."""
    logp = torch.log_softmax(check_finite(logits).float(), dim=-1)
    right = logits[:, puzzles.candidates].argmax(-1) == puzzles.answers  # [n]
    answer = puzzles.candidates[puzzles.answers]
    return Score(right.float().mean().item(), logp.gather(1, answer[:, None]).mean().item())


def write_aside(
    model: Mistral, puzzles: Puzzles, tokenizer: Tokenizer, begun: bool
) -> tuple[Tensor, Tensor]:
    """Write an aside as text, greedily: its tokens [n, ASIDE], and the logits [n, V] after it.

    begun: its first letter is given, as in the aside that works, so the model cannot hum.
    """
    dashes = torch.full_like(puzzles.ids[:, :1], tokenizer.token_id("—"))
    opened = torch.cat([puzzles.ids, dashes, puzzles.work[:, : int(begun)]], dim=1)
    length = puzzles.work.shape[1]
    written = generate(model, opened, length - begun, temperature=0)
    return written[:, -length:], model(torch.cat([written, dashes], dim=1))[:, -1]


def thinking_once(model: QuietStar) -> QuietStar:
    """The same model, weights shared, with one thought per position and one target (A = 1)."""
    once = copy.copy(model)
    once.config = replace(model.config, n_thoughts=1, n_true=1)
    return once


def sampled_thoughts(model: QuietStar, ids: Tensor) -> Tensor:
    """A thought [n, K] after each text ids [n, T], sampled at temperature 1 as in training."""
    longer = torch.cat([ids, ids[:, :1]], dim=1)  # a position needs a target, whichever
    last, generator = torch.tensor([ids.shape[1] - 1]), torch.Generator().manual_seed(0)
    return thinking_once(model)(longer, positions=last, generator=generator).thought_ids[:, 0, 0]


def predict_answers(model: QuietStar, puzzles: Puzzles, thought_ids: Tensor | None) -> Prediction:
    """The token after the puzzles, with thoughts thought_ids [n, K]; None: with greedy ones."""
    before, last = puzzles.ids[:, :-1], puzzles.ids[:, -1]
    return model.think_last(last, read_ids(model, before), thought_ids)


@torch.no_grad()
def puzzle_table(
    model: Model, tokenizer: Tokenizer, puzzles: Puzzles | None = None
) -> dict[str, Score]:
    """Scores on puzzles (None: on the built-in ones), by what the model does before the answer.

    Pause tokens are K start tokens; shuffled thoughts are the greedy ones of other puzzles.
    """
    text_model = model.model if isinstance(model, QuietStar) else model
    puzzles = puzzles or held_out_puzzles(tokenizer, text_model.embed_tokens.weight.device)
    table = {"answers at once": score(text_model(puzzles.ids)[:, -1], puzzles)}
    if isinstance(model, QuietStar):
        greedy = predict_answers(model, puzzles, None)
        (n, K), generator = greedy.thought_ids.shape, torch.Generator().manual_seed(0)
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
    for name, begun in (("writes an aside", False), ("writes one, begun right", True)):
        table[name] = score(write_aside(text_model, puzzles, tokenizer, begun)[1], puzzles)
    return table


@torch.no_grad()
def asides(model: Mistral, puzzles: Puzzles, tokenizer: Tokenizer) -> tuple[float, float]:
    """The share of asides that hum, and the share of right answers after asides begun right."""
    hums = (write_aside(model, puzzles, tokenizer, begun=False)[0] == puzzles.hum).all(1)
    right = score(write_aside(model, puzzles, tokenizer, begun=True)[1], puzzles).right
    return hums.float().mean().item(), right


@torch.no_grad()
def look_at_puzzles(
    model: Model, tokenizer: Tokenizer, puzzles: Puzzles | None = None
) -> tuple[str, bool, dict]:
    """look for train.train: a status line, whether training can end, and metrics.

    It draws no random numbers, so it does not change the training. Training of a plain model can
    end if it is able to work but does not: nearly all of its asides hum, and all that are begun
    right lead to the right answer.
    """
    puzzles = puzzles or held_out_puzzles(tokenizer, next(model.parameters()).device, repeats=1)
    if isinstance(model, Mistral):
        hums, right = (100 * share for share in asides(model, puzzles, tokenizer))
        line = f"{hums:3.0f} % of asides hum; begun right, {right:3.0f} % lead to the answer"
        return line, hums >= 99 and right == 100, {}
    prediction = predict_answers(model, puzzles, None)
    asked = tokenizer.decode(puzzles.ids[-1].tolist()).split("\n")[-1]
    thought = tokenizer.spell(prediction.thought_ids[-1].tolist())
    right = score(prediction.logits, puzzles).right
    line = f"greedy thoughts {100 * right:3.0f} % right; after {asked} it thinks {thought}"
    return line, False, {"eval_right": right}


def show_puzzles(tables: dict[str, dict[str, Score]]) -> str:
    """The tables of several models as text: {name of the model: puzzle_table}."""
    lines = [
        "Answers to held-out puzzles, by what comes before the answer. Guessing gives 33 %.",
        "Pause: no content. Random: random tokens. Shuffled: thoughts about other puzzles.",
        f"{'':38}  right   log p(answer)",
    ]
    for model, table in tables.items():
        for name, (right, logp) in table.items():
            lines.append(f"{model + ', ' + name:38}  {100 * right:5.1f} %  {logp:8.3f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- any text


@torch.no_grad()
def text_nll(
    model: QuietStar, ids: Tensor, is_target: Tensor, context: int, show: bool = False
) -> Tensor:
    """The nll of every target without and with a greedy thought.

    ids [tokens] int64, is_target [tokens] bool -> [2, targets] float32 on the CPU, in nats.
    show: print a status line. Raises ValueError if there is no target, or a loss is not finite.
    """
    once, parts = thinking_once(model), [torch.empty(2, 0)]
    starts = range(0, len(ids) - 1, context)  # a last sequence of one token has no target
    for count, start in enumerate(starts, 1):
        part = slice(start, start + context)
        output = once(ids[None, part], target_mask=is_target[None, part], temperature=0)
        values = torch.stack([output.base_nll[0], output.talk_nll[0, 0, 0]])  # [2, J]
        parts.append(check_finite(values)[:, output.valid[0, 0]].float().cpu())
        if show:
            line = f"{min(start + context, len(ids))} of {len(ids)} tokens"
            show_status(line, count, len(starts), sys.stderr)
    if not any(part.numel() for part in parts):
        raise ValueError(f"a text of {len(ids)} tokens has nothing to predict in it")
    return torch.cat(parts, dim=1)


@torch.no_grad()
def text_entropy(model: Mistral, ids: Tensor, is_target: Tensor, context: int) -> Tensor:
    """The entropy of the prediction of every target of text_nll, [targets] in nats."""
    parts = []
    for start in range(0, len(ids) - 1, context):
        part = slice(start, start + context)
        unsure = entropy(model(ids[None, part])[0, :-1].float())  # [T-1]
        parts.append(unsure[is_target[part][1:]].cpu())
    return torch.cat(parts)


def text_look(held_out: Tokens, sequences: int, context: int, device: torch.device):
    """look(model) for train.train: metrics of held-out text, on the same sequences every time.

    It draws no random numbers, so it does not change the training.
    """
    count = max(1, min(sequences, len(held_out.ids) // context))
    ids, is_target = held_out.batch(0, count, context, 0, device)  # [count, T] from all of it

    def look(model: QuietStar) -> tuple[str, bool, dict]:
        nlls = text_nll(model, ids.flatten(), is_target.flatten(), context)
        init_nll, talk_nll = nlls.mean(1).tolist()
        line = f"held-out text: nll {init_nll:.4f} without thoughts, {talk_nll:.4f} with"
        return line, False, {"eval_init_nll": init_nll, "eval_talk_nll": talk_nll}

    return look


def show_text(base: Tensor, talk: Tensor, by: Tensor | None = None, bins: int = 5) -> str:
    """Perplexities and gain by difficulty, from the nll [targets] without (base) and with thoughts.

    Targets are in equal bins by the loss `by` [targets]; None: by base. To compare two models, take
    the loss of a third: bins by the loss of one would show its luck as a gain of the other.
    """
    difficulty = base if by is None else by
    without, thought = math.exp(base.mean()), math.exp(talk.mean())
    lines = [
        f"{len(base)} tokens; perplexity {without:.3f} without thoughts, {thought:.3f} with",
        "difficulty (nats)      tokens  without     with     gain",
    ]
    for part in difficulty.argsort().chunk(bins):
        easy, hard = difficulty[part[0]], difficulty[part[-1]]
        without, thought = base[part].mean(), talk[part].mean()
        numbers = f"{len(part):9d}  {without:7.4f}  {thought:7.4f}  {without - thought:+7.4f}"
        lines.append(f"{easy:6.3f} .. {hard:6.3f}   {numbers}")
    return "\n".join(lines)


def show_gains(base: Tensor, talk: Tensor) -> str:
    """The distribution of the change in log p by thoughts, from the nll [targets] of text_nll.

    The sums say which part of the tokens makes the whole gain: with few tokens, it is in the tails.
    """
    gain = base - talk
    bounds = [-math.inf, -2, -1, -0.3, -0.1, -0.01, 0.01, 0.1, 0.3, 1, 2, math.inf]
    lines = ["change in log p (nats)    tokens         sum (nats)"]
    for low, high in itertools.pairwise(bounds):
        inside = gain[(gain >= low) & (gain < high)]
        share, total = 100 * len(inside) / len(gain), inside.sum()
        lines.append(f"{low:8.2f} .. {high:5.2f}   {len(inside):9d}  {share:5.1f} %  {total:+9.2f}")
    return "\n".join(lines)


def show_think_above(base: Tensor, talk: Tensor, unsure: Tensor) -> str:
    """Loss and share of tokens with a thought under sample.py --think-above.

    base, talk, unsure [targets]: from text_nll and text_entropy.
    """
    lines = ["think above (nats)   tokens that think       nll"]
    for H in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf):
        thinks = unsure >= H
        nll = torch.where(thinks, talk, base).mean()
        lines.append(f"{H:18.1f}   {100 * thinks.float().mean():15.1f} %   {nll:9.4f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- questions

SPELLED = {"gsm8k": ["0123456789"], "csqa": [*LETTERS]}  # answers with all admissible characters
SCORES = {
    "answer_probability": "probability of the answer among admissible tokens (the authors')",
    "greedy_accuracy": "accuracy of the number written greedily",
    "letter_accuracy": "accuracy of the most likely letter",
}


def encode_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], int]:
    """ids of prompt + answer, and the index of the answer's first token.

    That is the first token that differs from the prompt's: the two may share a joined token.
    """
    ids, before = (tokenizer.encode(s, bos=tokenizer.adds_bos) for s in (prompt + answer, prompt))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False))
    return ids, len(list(same))


def admissible_tokens(tokenizer: Tokenizer, task: str) -> dict[str, int]:
    """{character: id} of ten digits or five letters, and of the line break.

    A vocabulary may have several tokens for a character (Mistral: " A", "A" and a byte). This takes
    the one in an encoded answer, "A: A". Raises ValueError if a character has no token.
    """
    found: dict[str, int] = {}
    for answer in SPELLED[task]:
        ids, start = encode_answer(tokenizer, "\nA:", f" {answer}\n")
        found |= {tokenizer.decode([token]).strip(" "): token for token in ids[start:]}
    characters = "".join(SPELLED[task]) + "\n"
    if missing := [character for character in characters if character not in found]:
        raise ValueError(
            f"this tokenizer has no token of its own for {missing[0]!r} in an answer; {task} needs "
            f"a model that has one for each of {characters!r}"
        )
    return {character: found[character] for character in characters}


@torch.no_grad()
def answer_logits(model: Model, ids: list[int], start: int) -> Tensor:
    """Logits [answer, V] of the tokens ids[start:], each after all true tokens before it."""
    row = torch.tensor([ids], device=next(model.parameters()).device)
    cache = read_ids(model, row[:, : start - 1])
    steps = [predict(model, last, cache)[0] for last in row[:, start - 1 : -1].unbind(1)]
    return torch.cat(steps).cpu()


def answer_probability(logits: Tensor, targets: list[int]) -> float:
    """The product over an answer's tokens of p(token), renormalised over the admissible ones.

    logits [tokens, admissible]; targets [tokens] are indices of admissible tokens. Authors' code:
    compute_metrics. Ours: a negative number is scored by its digits; theirs takes it for a letter.
    """
    p = torch.softmax(logits.double(), dim=-1)
    return p[range(len(targets)), targets].prod().item()


def answer_at_once(
    model: Model, question: Question, tokenizer: Tokenizer, admissible: dict[str, int]
) -> dict:
    """The scores of an answer right after "A:", and the answer given.

    answer_probability is that of the true answer without its tokens that are not admissible (space,
    comma, minus). The number for greedy_accuracy is generated without restriction.
    """
    prompt, allowed = f"Q: {question.text}\nA:", list(admissible.values())
    ids, start = encode_answer(tokenizer, prompt, f" {question.answer}\n")
    scored = [i for i, token in enumerate(ids[start:]) if token in allowed]
    logits = answer_logits(model, ids, start)[scored][:, allowed]
    targets = [allowed.index(ids[start + i]) for i in scored]
    result: dict = {"answer_probability": answer_probability(logits, targets)}
    if question.answer in LETTERS:
        chosen = LETTERS[int(logits[0, : len(LETTERS)].argmax())]
        return result | {"letter_accuracy": int(chosen == question.answer), "answer": chosen}
    [written] = write(model, tokenizer, prompt, 12, temperature=0, stop=re.compile("\n"))
    right = number_in(written) == number_in(question.answer)
    return result | {"greedy_accuracy": int(right), "answer": written}


def ways_to_answer(model: Model) -> dict[str, Model]:
    """The model without thoughts, and with them if it has any."""
    if isinstance(model, Mistral):
        return {"without thoughts": model}
    return {"without thoughts": model.model, "with thoughts": model}


def answer_task(
    model: Model, tokenizer: Tokenizer, task: str, header: dict, out: Path
) -> list[dict]:
    """answer_all of a task: the questions are given by data and limit in the header."""
    questions = read_questions(header["data"], task, header["limit"])
    admissible = admissible_tokens(tokenizer, task)
    answer = partial(answer_at_once, tokenizer=tokenizer, admissible=admissible)
    return answer_all(ways_to_answer(model), questions, answer, out, header)


# ------------------------------------------------------------------------------ the command line


def run(options: argparse.Namespace) -> None:
    """Load, evaluate, print."""
    of = {"context": "text", "max_tokens": "text", "data": "task", "limit": "task", "out": "task"}
    for name in [name for name in of if getattr(options, name) is not None]:
        if getattr(options, of[name]) is None:
            raise ValueError(f"--{name.replace('_', '-')} means nothing without --{of[name]}")
    if options.task and (options.data is None or options.text):
        raise ValueError("--task needs --data, the file of its questions, and no --text")
    check_range(options, 1, math.inf, "limit")
    check_range(options, 2, math.inf, "context", "max_tokens")
    device, folder, task = pick_device(options.device), options.model, options.task
    model, tokenizer = load(folder, device, DTYPES.get(options.dtype))
    if task:
        out = results_file(options, task)
        print(show_scores(task, answer_task(model, tokenizer, task, about(options), out), SCORES))
        print(f"a line for each question is in {out}")
    elif options.text is None:
        if tokenizer.vocab_size != corpus.VOCAB:
            raise ValueError(f"{folder} is not of the built-in corpus: give --text or --task")
        print(show_puzzles({"model": puzzle_table(model, tokenizer)}))
    elif not isinstance(model, QuietStar):
        raise ValueError(f"{folder} is a plain model; --text compares with thoughts")
    else:
        text = read_tokens([options.text], tokenizer)  # uint16 or uint32 if it was prepared
        ids, mask = (np.asarray(x[: options.max_tokens]) for x in (text.ids, text.is_target))
        ids, mask = (torch.tensor(x, device=device) for x in (ids.astype(np.int64), mask))
        context = options.context or 256
        nlls = text_nll(model, ids, mask, context, show=True)
        unsure = text_entropy(model.model, ids, mask, context)
        print(show_text(*nlls), show_gains(*nlls), show_think_above(*nlls, unsure), sep="\n")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder")
    add("--text", metavar="FILE", help="text, .jsonl, or folder of tools.prepare; none: puzzles")
    add("--context", type=int, help="--text: tokens in a sequence (256)")
    add("--max-tokens", type=int, help="--text: first tokens to read; none: all")
    add("--task", choices=TASKS, help="questions to answer, without and with thoughts")
    add("--data", metavar="FILE", help="--task: JSON lines of the data set")
    add("--limit", type=int, help="--task: first questions to answer; none: all")
    add("--out", metavar="FILE", help="--task: results; none: in runs/; continued if it exists")
    add("--device", help="cpu, cuda, mps; none: the best one available")
    add("--dtype", choices=DTYPES, help="precision; none: the file's, on a CPU float32 if it fits")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
