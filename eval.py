"""What are the thoughts worth?

    python eval.py --model runs/1/quiet_star                      the puzzles of the built-in corpus
    python eval.py --model FOLDER --text FILE                     perplexity, by difficulty
    python eval.py --model FOLDER --task gsm8k --data test.jsonl  the paper's questions
    python eval.py --model FOLDER --task csqa --data dev.jsonl

Puzzles are those held out of training, in lines that do not explain themselves. A text is read in
sequences of --context tokens, each on its own; every token but a sequence's first is predicted with
and without a greedy thought before it. Questions are answered zero-shot and at once, after the
authors' prompts (eval_helpers.py; python -m tools.chains lets chains of thought vote):

    Q: {question}\\nA: {number}\\n
    Q: {question}\\n(A) {choice}\\n ... (E) {choice}\\nA: {letter}\\n
"""

import argparse
import copy
import io
import math
import re
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from decimal import Decimal
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import KVCache, Mistral, check_at_least
from sample import entropy, generate, write
from support import corpus
from support.checkpoints import load
from support.device import DTYPES, pick_device
from support.files import read_json_lines
from support.results import about, answer_all, results_file
from support.terminal import execute, make_parser, show_status
from support.text import Tokens, read_documents, tokenize
from support.tokenizer import Tokenizer
from thoughts import Prediction, QuietStar

# ------------------------------------------------------------------------------------- the puzzles


class Puzzles(NamedTuple):
    """Held-out puzzles as prompts: three silent lines of training puzzles, then one up to "="."""

    ids: Tensor  # [n, T] int64
    answers: Tensor  # [n] int64, an index into candidates
    work: Tensor  # [n, ASIDE] int64, the aside that works
    candidates: Tensor  # [HOURS] int64, the tokens that an answer can be
    hum: int  # the token of an aside that hums


class Score(NamedTuple):
    """Of the answers: how many were right, how likely was the right one."""

    right: float  # share whose argmax among the candidates is the answer
    logp: float  # mean log p of the answer, over the whole vocabulary, in nats


def held_out_puzzles(tokenizer: Tokenizer, device: torch.device, repeats: int = 3) -> Puzzles:
    """Every held-out puzzle, `repeats` times after different lines."""
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
    """Score of the next token's logits [n, V] after the puzzles."""
    among = logits[:, puzzles.candidates]  # [n, HOURS]
    logp = torch.log_softmax(logits.float(), dim=-1)
    answer = puzzles.candidates[puzzles.answers]
    right = (among.argmax(-1) == puzzles.answers).float().mean().item()
    return Score(right, logp.gather(1, answer[:, None]).mean().item())


def aloud(
    model: Mistral, puzzles: Puzzles, tokenizer: Tokenizer, begun: bool
) -> tuple[Tensor, Tensor]:
    """Let a model write an aside, greedily, as text: its tokens [n, ASIDE], the answer's logits.

    begun: the first letter of an aside that works is given, so that the model cannot hum.
    """
    dashes = torch.full_like(puzzles.ids[:, :1], tokenizer.token_id("—"))
    opened = torch.cat([puzzles.ids, dashes, puzzles.work[:, : int(begun)]], dim=1)
    length = puzzles.work.shape[1]
    said = generate(model, opened, length - begun, temperature=0)
    return said[:, -length:], model(torch.cat([said, dashes], dim=1))[:, -1]


def thinking_once(model: QuietStar) -> QuietStar:
    """The same model with one thought a position, scored on one token: what evaluation needs."""
    once = copy.copy(model)  # shares all weights
    once.config = replace(model.config, n_thoughts=1, n_true=1)
    return once


def sampled_thoughts(model: QuietStar, ids: Tensor) -> Tensor:
    """A thought [n, K] after each text ids [n, T], sampled at temperature 1 as in training."""
    longer = torch.cat([ids, ids[:, :1]], dim=1)  # a position needs some target to think for
    last, generator = torch.tensor([ids.shape[1] - 1]), torch.Generator().manual_seed(0)
    return thinking_once(model)(longer, positions=last, generator=generator).thought_ids[:, 0, 0]


def predict_answers(model: QuietStar, puzzles: Puzzles, thought_ids: Tensor | None) -> Prediction:
    """What follows the puzzles after thoughts thought_ids [n, K]; None: after greedy ones."""
    cache = KVCache(model.model.config)
    model.model.run(model.model.embed_tokens(puzzles.ids[:, :-1]), cache)
    return model.think_last(puzzles.ids[:, -1], cache, thought_ids)


@torch.no_grad()
def puzzle_table(
    model: Mistral | QuietStar, tokenizer: Tokenizer, puzzles: Puzzles | None = None
) -> dict[str, Score]:
    """The scores of a model on puzzles, by what it does between "=" and the answer.

    Pause tokens are the start token K times; shuffled thoughts the greedy ones of other puzzles.
    Without puzzles these are the built-in corpus'.
    """
    text_model = model.model if isinstance(model, QuietStar) else model
    puzzles = puzzles or held_out_puzzles(tokenizer, text_model.embed_tokens.weight.device)
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
    for name, begun in (("writes an aside", False), ("writes one, begun right", True)):
        table[name] = score(aloud(text_model, puzzles, tokenizer, begun)[1], puzzles)
    return table


@torch.no_grad()
def asides(model: Mistral, puzzles: Puzzles, tokenizer: Tokenizer) -> tuple[float, float]:
    """Of a model's asides the share that hums, and of those begun right the share that ends so."""
    hums = (aloud(model, puzzles, tokenizer, begun=False)[0] == puzzles.hum).all(1)
    right = score(aloud(model, puzzles, tokenizer, begun=True)[1], puzzles).right
    return hums.float().mean().item(), right


@torch.no_grad()
def look_at_puzzles(
    model: Mistral | QuietStar, tokenizer: Tokenizer, puzzles: Puzzles | None = None
) -> tuple[str, bool, dict]:
    """Something to watch while a model trains on the puzzles, whether it is trained enough, and {}.

    A plain model is once it can work but does not: it hums in nearly all its asides, and one begun
    right ends in the right answer. Of a thinking one, answers after greedy thoughts, and a thought.
    """
    device = next(model.parameters()).device
    puzzles = puzzles or held_out_puzzles(tokenizer, device, repeats=1)
    if isinstance(model, Mistral):
        hums, right = asides(model, puzzles, tokenizer)
        line = (
            f"hums in {100 * hums:3.0f} % of its asides; begun right, {100 * right:3.0f} % end so"
        )
        return line, hums >= 0.99 and right == 1, {}
    prediction = predict_answers(model, puzzles, None)
    asked = tokenizer.decode(puzzles.ids[-1].tolist()).split("\n")[-1]
    thought = tokenizer.spell(prediction.thought_ids[-1].tolist())
    right = 100 * score(prediction.logits, puzzles).right
    return f"greedy thoughts {right:3.0f} % right; after {asked} it thinks {thought}", False, {}


def show_puzzles(tables: dict[str, dict[str, Score]]) -> str:
    """Tables of several models as lines of text that explain themselves."""
    lines = [
        "Answers to puzzles never trained on, each after what its line says; guessing gives 33 %.",
        "Thoughts: pause has no content, random is of random tokens, shuffled of another puzzle.",
        f"{'':38}  right   log p(answer)",
    ]
    for model, table in tables.items():
        for name, (right, logp) in table.items():
            lines.append(f"{model + ', ' + name:38}  {100 * right:5.1f} %  {logp:8.3f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- any text


@torch.no_grad()
def text_nll(
    model: QuietStar, ids: Tensor, is_target: Tensor, context: int
) -> tuple[Tensor, Tensor, Tensor]:
    """nll of every target of a text without and with a greedy thought, and the entropy without.

    ids [tokens], is_target [tokens] bool -> three tensors [targets] in nats, in text order.
    """
    once, base, talk, unsure = thinking_once(model), [], [], []
    starts = range(0, len(ids) - 1, context)  # a last sequence of one token has no target
    for count, start in enumerate(starts, 1):
        part = slice(start, start + context)
        output = once(ids[None, part], target_mask=is_target[None, part], temperature=0)
        valid = output.valid[0, 0]  # [J]
        logits = model.model(ids[None, part])[0, :-1].float()  # [J, V]
        unsure.append(entropy(logits)[valid].cpu())
        base.append(output.base_nll[0][valid].cpu())
        talk.append(output.talk_nll[0, 0, 0][valid].cpu())
        line = f"{min(start + context, len(ids))} of {len(ids)} tokens"
        show_status(line, count, len(starts), sys.stderr)
    if not sum(map(len, base)):
        raise ValueError(f"a text of {len(ids)} tokens has nothing to predict in it")
    return torch.cat(base), torch.cat(talk), torch.cat(unsure)


def text_look(held_out: Tokens, sequences: int, context: int, device: torch.device):
    """look(model) for train.train: metrics of held-out text, on the same sequences every time.

    It draws no random numbers, so the training is the same as without it.
    """
    count = max(1, min(sequences, len(held_out.ids) // context))
    ids, is_target = held_out.batch(0, count, context, 0, device)  # [count, T], from all of it

    def look(model: QuietStar) -> tuple[str, bool, dict]:
        with redirect_stderr(io.StringIO()):  # the status line is the training's
            *nlls, _ = text_nll(model, ids.flatten(), is_target.flatten(), context)
        init_nll, talk_nll = (nll.mean().item() for nll in nlls)
        line = f"held-out text: nll {init_nll:.4f} without thoughts, {talk_nll:.4f} with"
        return line, False, {"eval_init_nll": init_nll, "eval_talk_nll": talk_nll}

    return look


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
        without, thought = base[part].mean(), talk[part].mean()
        numbers = f"{len(part):9d}  {without:7.4f}  {thought:7.4f}  {without - thought:+7.4f}"
        lines.append(f"{easy:6.3f} .. {hard:6.3f}   {numbers}")
    return "\n".join(lines)


def show_think_above(base: Tensor, talk: Tensor, unsure: Tensor) -> str:
    """The loss and the share of tokens that think with --think-above H, as lines of text.

    base, talk, unsure [targets]: as returned by text_nll.
    """
    lines = ["think above (nats)   tokens that think       nll"]
    for H in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf):
        thinks = unsure >= H
        nll = torch.where(thinks, talk, base).mean()
        lines.append(f"{H:18.1f}   {100 * thinks.float().mean():15.1f} %   {nll:9.4f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- questions

LETTERS = "ABCDE"
SPELLED = {"gsm8k": ["0123456789"], "csqa": [*LETTERS]}  # answers that hold what can be in one
NUMBER = re.compile(r"-?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)")
SCORES = {
    "answer_probability": "probability of the answer among admissible tokens (the authors')",
    "greedy_accuracy": "accuracy of the number written greedily",
    "letter_accuracy": "accuracy of the likeliest letter",
}


class Question(NamedTuple):
    """A question and its answer."""

    number: int  # from 0
    text: str  # what follows "Q: ", choices included
    answer: str  # a number as the file spells it, or a letter


def number_in(text: str) -> Decimal | None:
    """The first number in a text, dollar signs and the commas between thousands left out."""
    match = NUMBER.search(text.replace("$", ""))
    return Decimal(match[0].replace(",", "")) if match else None


def gsm8k_question(record: dict) -> tuple[str, str]:
    """Text and answer of a line of GSM8K, which ends in #### and the number."""
    _, mark, number = record["answer"].rpartition("####")
    if not mark or number_in(number) is None:
        raise ValueError(f"the answer ends in {record['answer'][-30:]!r}, not #### and a number")
    return record["question"], number.strip()


def csqa_question(record: dict) -> tuple[str, str]:
    """Text and answer of CommonsenseQA, in its original layout or the flat one of later copies."""
    question, answer = record["question"], record["answerKey"]
    if isinstance(question, dict):
        choices = {choice["label"]: choice["text"] for choice in question["choices"]}
        question = question["stem"]
    else:
        choices = dict(zip(record["choices"]["label"], record["choices"]["text"], strict=True))
    if [*choices] != [*LETTERS] or answer not in choices:
        raise ValueError(f"choices and answerKey ({answer!r}) must be the letters {LETTERS}")
    return "\n".join([question, *(f"({k}) {v}" for k, v in choices.items())]), answer


TASKS = {"gsm8k": gsm8k_question, "csqa": csqa_question}


def read_questions(path: str | Path, task: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions in a data set's own JSON lines; ValueError names a bad line."""
    questions, records = [], read_json_lines(path)[:limit]
    if not records or (limit or 1) < 1:
        raise ValueError(f"{path} is without questions, or limit is {limit}: give at least one")
    for where, record in records:
        try:
            questions.append(Question(len(questions), *TASKS[task](record)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is no question of {task}: {error!r}") from None
    return questions


def encode_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], int]:
    """ids of prompt + answer, and the index of the first that is not the prompt's own.

    (A tokenizer may join the end of a prompt with the beginning of an answer.)
    """
    ids, before = (tokenizer.encode(s, bos=tokenizer.adds_bos) for s in (prompt + answer, prompt))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False))
    return ids, len(list(same))


def admissible_tokens(tokenizer: Tokenizer, task: str) -> dict[str, int]:
    """{character: id}: ten digits or five letters, and the end of line, as an answer spells them.

    A vocabulary may have several tokens of one character: Mistral's has " A", "A" and a byte
    piece. The one that counts is what the tokenizer makes of "A: A". ValueError if there is none.
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
def answer_logits(model: Mistral | QuietStar, ids: list[int], start: int) -> Tensor:
    """Logits [answer, V] of the tokens ids[start:], each after all before it as they truly are."""
    row = torch.tensor([ids], device=next(model.parameters()).device)
    if isinstance(model, Mistral):
        return model(row)[0, start - 1 : -1].float().cpu()
    cache = KVCache(model.model.config)
    model.model.run(model.model.embed_tokens(row[:, : start - 1]), cache)
    steps = [model.think_last(last, cache) for last in row[:, start - 1 : -1].unbind(1)]
    return torch.cat([prediction.logits for prediction in steps]).cpu()


def answer_probability(logits: Tensor, targets: list[int]) -> float:
    """The product over an answer's tokens of p(token), renormalised over the admissible ones.

    logits [tokens, admissible], targets [tokens] among them. Authors' code: compute_metrics. Ours:
    a number below 0 is scored by its digits, as any other, where theirs takes it for a letter.
    """
    p = torch.softmax(logits.double(), dim=-1)
    return p[range(len(targets)), targets].prod().item()


def answer_at_once(
    model: Mistral | QuietStar, question: Question, tokenizer: Tokenizer, admissible: dict[str, int]
) -> dict:
    """The scores of an answer right after "A:", and the answer given.

    The true answer is teacher-forced; its tokens that are not admissible (a space, a comma, a
    minus) are passed over. The number that is compared for greedy accuracy is written freely.
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


def ways_to_answer(model: Mistral | QuietStar) -> dict[str, Mistral | QuietStar]:
    """The model without thoughts, and with them if it has any."""
    if isinstance(model, Mistral):
        return {"without thoughts": model}
    return {"without thoughts": model.model, "with thoughts": model}


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values [questions], questions drawn anew."""
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def show_scores(title: str, results: list[dict], scores: dict[str, str]) -> str:
    """Means over questions with 95 % intervals, a row per score, a column per way to answer."""
    ways = [way for way, value in results[0].items() if isinstance(value, dict)]
    lines = [f"{f'{title}, {len(results)} questions':66}" + "".join(f"{way:>27}" for way in ways)]
    for score in [score for score in scores if score in results[0][ways[0]]]:
        line = f"{scores[score]:66}"
        for way in ways:
            percent = 100 * np.array([result[way][score] for result in results])
            low, high = bootstrap_interval(percent)
            line += f"{f'{percent.mean():.2f} % [{low:.2f}, {high:.2f}]':>27}"
        lines.append(line)
    return "\n".join([*lines, "In brackets: 95 % intervals, by drawing the questions anew."])


def answer_task(
    model: Mistral | QuietStar, tokenizer: Tokenizer, task: str, header: dict, out: Path
) -> list[dict]:
    """answer_all of a task's questions, those of data and limit in the header, at once."""
    questions = read_questions(header["data"], task, header["limit"])
    admissible = admissible_tokens(tokenizer, task)
    answer = partial(answer_at_once, tokenizer=tokenizer, admissible=admissible)
    return answer_all(ways_to_answer(model), questions, answer, out, header)


def run_task(model: Mistral | QuietStar, tokenizer: Tokenizer, options) -> None:
    """Answer a task's questions in every way, and print the scores."""
    out = results_file(options, options.task)
    results = answer_task(model, tokenizer, options.task, about(options), out)
    print(show_scores(options.task, results, SCORES))
    print(f"a line for each question is in {out}")


# ------------------------------------------------------------------------------ the command line


def run(options: argparse.Namespace) -> None:
    """Load, evaluate, print."""
    of = {"context": "text", "max_tokens": "text", "data": "task", "limit": "task", "out": "task"}
    for name in [name for name in of if getattr(options, name) is not None]:
        if getattr(options, of[name]) is None:
            raise ValueError(f"--{name.replace('_', '-')} means nothing without --{of[name]}")
    if options.task and (options.data is None or options.text):
        raise ValueError("--task needs --data, the file of its questions, and no --text")
    check_at_least(options, context=2, max_tokens=2, limit=1)
    device, dtype = pick_device(options.device), options.dtype and DTYPES[options.dtype]
    model, tokenizer = load(options.model, device, dtype)
    if options.task:
        run_task(model, tokenizer, options)
    elif options.text is None:
        if tokenizer.vocab_size != corpus.VOCAB:
            raise ValueError(
                f"{options.model} is not of the built-in corpus: give --text or --task"
            )
        print(show_puzzles({"model": puzzle_table(model, tokenizer)}))
    elif not isinstance(model, QuietStar):
        raise ValueError(f"{options.model} is a plain model; --text compares with thoughts")
    else:
        tokens = tokenize(read_documents([options.text]), tokenizer)
        ids, mask = (x[: options.max_tokens].to(device) for x in (tokens.ids, tokens.is_target))
        base, talk, unsure = text_nll(model, ids, mask, options.context or 256)
        print(show_text(base, talk))
        print(show_think_above(base, talk, unsure))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder")
    add("--text", metavar="FILE", help="text or .jsonl file; none: the built-in corpus' puzzles")
    add("--context", type=int, help="--text: tokens in a sequence (256)")
    add("--max-tokens", type=int, help="--text: tokens to read; none: all")
    add("--task", choices=TASKS, help="questions to answer, with and without thoughts")
    add("--data", metavar="FILE", help="--task: its questions, JSON lines of the data set")
    add("--limit", type=int, help="--task: the first questions only; none: all")
    add("--out", metavar="FILE", help="--task: of results, continued if there; none: in runs/")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add("--dtype", choices=DTYPES, help="precision; none: the file's, on a CPU float32 if it fits")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
