"""GSM8K and CommonsenseQA, zero-shot, with and without thoughts.

A question is answered at once, after the authors' prompts, or in a chain of thought that is
written out first, several times, with a vote on the answer (the paper's cot-maj@k):

    Q: {question}\\nA: {number}\\n
    Q: {question}\\n(A) {choice}\\n ... (E) {choice}\\nA: {letter}\\n
    Q: {question}\\nA: Let's think step by step. ... \\nTherefore, the answer (arabic numerals) is

Questions are those of the data sets' own JSON lines. Results are JSON lines too, one a question
after a header that says what they are results of; a run that is killed continues where it was.

Paper: section 5. The prompts and the answer's probability are those of the authors' code
(eval_helpers.py, zero-shotcot-eval.py). Ours: questions are not cut to 256 tokens; a chain ends at
its first "Q:" or triple line break, where theirs ends at the second; a number may have a sign and
decimals, where theirs is a row of digits.
"""

import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import Mistral, write_json, write_text
from sample import generate_steps, show_status
from thoughts import QuietStar, check_settings
from tokenizer import Tokenizer

LETTERS = "ABCDE"
DIGITS = "0123456789"
STEP_BY_STEP = "\nA: Let's think step by step."
THEREFORE = "\nTherefore, the answer (arabic numerals) is"
ANSWER_TOKENS = 12  # at most, for a number that is written
NUMBER = re.compile(r"-?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)")
END_OF_LINE = re.compile(r"\n")
END_OF_CHAIN = re.compile(r"Q:|\n\n\n")  # where a model goes on with a question of its own
END_OF_NUMBER = re.compile(r"(?<=[0-9])[.,]?[^0-9.,]")

SCORES = {
    "answer_probability": "probability of the answer among admissible tokens (the authors')",
    "greedy_accuracy": "accuracy of the number written greedily",
    "letter_accuracy": "accuracy of the likeliest letter",
    "majority_accuracy": "accuracy of the majority of the chains of thought",
}


@dataclass(frozen=True)
class Chains:
    """Chains of thought that are written before an answer."""

    samples: int = 8  # chains per question, which vote
    temperature: float = 0.7  # of sampling; 0 is greedy
    max_new_tokens: int = 384  # of a chain, at most

    def __post_init__(self):
        allowed = {
            "samples": (self.samples >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0 (0 is greedy)"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
        }
        check_settings(self, allowed)


@dataclass(frozen=True)
class Settings:
    """What is asked, and how."""

    task: str  # gsm8k or csqa
    chains: Chains | None = None  # none: answer at once
    limit: int | None = None  # the first questions only; none: all
    skip_malformed: bool = False  # leave out lines that are no question; else they are refused
    seed: int = 0  # of sampling and of the bootstrap

    def __post_init__(self):
        allowed = {
            "task": (self.task in PARSERS, " or ".join(PARSERS)),
            "limit": (self.limit is None or self.limit >= 1, "at least 1"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        check_settings(self, allowed)
        if self.chains and self.task != "gsm8k":
            raise ValueError("chains of thought end in a number: they are for gsm8k only")


# ------------------------------------------------------------------------------------- questions


class Question(NamedTuple):
    """A question and its answer."""

    line: int  # in its file, from 1
    text: str  # what follows "Q: ", the choices included
    answer: str  # a number as the file spells it, or a letter


def gsm8k_question(record: dict) -> tuple[str, str]:
    """Question and number of a line of GSM8K; ValueError if it is none."""
    question, answer = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError('a line needs "question" and "answer" as strings')
    _, mark, number = answer.rpartition("####")
    if not mark or number_in(number) is None:
        raise ValueError(f"the answer ends in {answer[-30:]!r}; it must end in #### and a number")
    return question, number.strip()


def csqa_question(record: dict) -> tuple[str, str]:
    """Question with its choices, and letter, of a line of CommonsenseQA; ValueError if none.

    The original layout {"question": {"stem", "choices": [{"label", "text"}, ...]}, "answerKey"}
    or the flat one {"question", "choices": {"label": [...], "text": [...]}, "answerKey"}.
    """
    try:
        question, answer = record["question"], record["answerKey"]
        if isinstance(question, dict):
            choices = [(choice["label"], choice["text"]) for choice in question["choices"]]
            question = question["stem"]
        else:
            choices = list(zip(*(record["choices"][key] for key in ("label", "text")), strict=True))
        if [label for label, _ in choices] != list(LETTERS) or answer not in list(LETTERS):
            raise ValueError(f"choices and answerKey ({answer!r}) must be the letters {LETTERS}")
        return "\n".join([question, *(f"({label}) " + text for label, text in choices)]), answer
    except (KeyError, TypeError) as error:
        raise ValueError(f"neither layout of CommonsenseQA fits ({error!r})") from None


PARSERS: dict[str, Callable[[dict], tuple[str, str]]] = {
    "gsm8k": gsm8k_question,
    "csqa": csqa_question,
}


def read_questions(contents: bytes, name: str, task: str) -> tuple[list[Question], list[str]]:
    """The questions in a file of JSON lines, and what is wrong with each other line."""
    questions, problems = [], []
    for number, line in enumerate(contents.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("a line must be a JSON object")
            questions.append(Question(number, *PARSERS[task](record)))
        except ValueError as error:  # also what is no JSON or no UTF-8
            problems.append(f"{name}, line {number}: {error}")
    return questions, problems


# ------------------------------------------------------------------------------- numbers and votes


def number_in(text: str) -> Decimal | None:
    """The first number in a text, dollar signs and the commas between thousands left out."""
    match = NUMBER.search(text.replace("$", ""))
    return Decimal(match[0].replace(",", "")) if match else None


def majority(votes: list[Decimal | None]) -> Decimal | None:
    """The commonest vote, the first of several. None, no number written, is a vote like any other.

    Paper: cot-maj@k, and the authors' code where votes are equally common.
    """
    return Counter(votes).most_common(1)[0][0]


def bootstrap_interval(values: np.ndarray, seed: int, resamples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values [questions], questions drawn anew."""
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(resamples, len(values)))]
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


# ------------------------------------------------------------------------------ answering at once


def encode_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], int]:
    """ids of prompt + answer, and the index where the answer begins in them.

    That is where they first differ from the prompt's own ids: a tokenizer may join its end with
    the beginning of the answer.
    """
    ids, before = (
        tokenizer.encode(text, bos=tokenizer.adds_bos) for text in (prompt + answer, prompt)
    )
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False))
    return ids, len(list(same))


def admissible_tokens(tokenizer: Tokenizer, task: str) -> dict[str, int]:
    """{character: id}: ten digits or five letters, and the end of line, as an answer spells them.

    A vocabulary may have several tokens of one character: Mistral's has " A", "A" and a byte
    piece. The one that counts is what the tokenizer makes of "A: A". ValueError if there is none.
    """
    characters, answers = (LETTERS, list(LETTERS)) if task == "csqa" else (DIGITS, [DIGITS])
    found: dict[str, int] = {}
    for answer in answers:
        ids, start = encode_answer(tokenizer, "\nA:", f" {answer}\n")
        found |= {tokenizer.decode([token]).strip(" "): token for token in ids[start:]}
    missing = [character for character in characters + "\n" if character not in found]
    if missing:
        raise ValueError(
            f"this tokenizer has no token of its own for {missing[0]!r} in an answer; "
            f"{task} needs one for each of {characters!r} and the end of line"
        )
    return {character: found[character] for character in characters + "\n"}


def answer_probability(logits: Tensor, targets: list[int]) -> float:
    """The product over an answer's tokens of p(token), renormalised over the admissible ones.

    logits [tokens, admissible]; targets [tokens], each an index into the admissible.
    Authors' code: compute_metrics. Ours: a number below 0 is scored by its digits, as any other,
    where theirs takes it for a letter.
    """
    p = torch.softmax(logits.double(), dim=-1)
    return p[torch.arange(len(targets)), targets].prod().item()


def ways_to_answer(model: Mistral | QuietStar) -> dict[str, Mistral | QuietStar]:
    """The model without thoughts, and with them if it has any."""
    if isinstance(model, QuietStar):
        return {"without thoughts": model.model, "with thoughts": model}
    return {"without thoughts": model}


@torch.no_grad()
def next_logits(model: Mistral | QuietStar, ids: list[int], positions: list[int]) -> Tensor:
    """Logits [J, V] of what follows each of the positions in a text, on the CPU."""
    row = torch.tensor([ids], device=next(model.parameters()).device)
    if isinstance(model, QuietStar):
        return model.think_at(row, torch.tensor(positions)).logits[0].cpu()
    return model(row)[0, positions].float().cpu()


def write(
    model: Mistral | QuietStar,
    tokenizer: Tokenizer,
    prompt: str,
    stop: re.Pattern,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[str]:
    """What a model writes after a prompt, `samples` times.

    Each ends before a match of `stop`, or at eos, or at an embedding that is no token.
    """
    prompt_ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
    before = tokenizer.decode(prompt_ids)
    ids = torch.tensor([prompt_ids] * samples, device=next(model.parameters()).device)
    rows = [list(prompt_ids) for _ in range(samples)]
    texts, writing = [""] * samples, set(range(samples))
    for step in generate_steps(model, ids, max_new_tokens, temperature, generator=generator):
        for row, token in enumerate(step.token.tolist()):
            if row not in writing:
                continue
            if token == tokenizer.eos_id or token >= tokenizer.vocab_size:
                writing.remove(row)
                continue
            rows[row].append(token)
            texts[row] = tokenizer.decode(rows[row]).removeprefix(before)
            if end := stop.search(texts[row]):
                texts[row] = texts[row][: end.start()]
                writing.remove(row)
        if not writing:
            break
    return texts


def answer_at_once(
    model: Mistral | QuietStar, tokenizer: Tokenizer, question: Question, admissible: dict[str, int]
) -> dict:
    """The scores of one way of answering a question right after "A:", and the answer it gives.

    The true answer is teacher-forced; its tokens that are not admissible (a space, a comma, a
    minus) are passed over. The number that is compared for greedy accuracy is written freely.
    """
    prompt = f"Q: {question.text}\nA:"
    ids, start = encode_answer(tokenizer, prompt, f" {question.answer}\n")
    allowed = list(admissible.values())
    scored = [i for i in range(start, len(ids)) if ids[i] in allowed]
    logits = next_logits(model, ids, [i - 1 for i in scored])[:, allowed]
    probability = answer_probability(logits, [allowed.index(ids[i]) for i in scored])
    result: dict = {"answer_probability": probability}
    if question.answer in LETTERS:
        chosen = LETTERS[int(logits[0, : len(LETTERS)].argmax())]
        return result | {"letter_accuracy": int(chosen == question.answer), "answer": chosen}
    [written] = write(model, tokenizer, prompt, END_OF_LINE, ANSWER_TOKENS)
    right = number_in(written) == number_in(question.answer)
    return result | {"greedy_accuracy": int(right), "answer": written}


# ------------------------------------------------------------------------------ chains of thought


def answer_after_chains(
    model: Mistral | QuietStar, tokenizer: Tokenizer, question: Question, settings: Settings
) -> dict:
    """The score of one way of answering a question by a vote of chains of thought, and the votes.

    Every question has randomness of its own: neither shards nor a restart change it.
    """
    chains = settings.chains
    assert chains is not None
    own_seed = np.random.default_rng([settings.seed, question.line]).integers(2**63)
    generator = torch.Generator().manual_seed(int(own_seed))
    sample = partial(write, model, tokenizer, temperature=chains.temperature, generator=generator)
    prompt = f"Q: {question.text}{STEP_BY_STEP}"
    texts = sample(prompt, END_OF_CHAIN, chains.max_new_tokens, samples=chains.samples)
    answers = []
    for text in texts:  # one by one: they differ in length
        answers += sample((prompt + text).rstrip() + THEREFORE, END_OF_NUMBER, ANSWER_TOKENS)
    votes = [number_in(answer) for answer in answers]
    winner = majority(votes)
    return {
        "majority_accuracy": int(winner == number_in(question.answer)),
        "answer": None if winner is None else str(winner),
        "chains": [text + THEREFORE + answer for text, answer in zip(texts, answers, strict=True)],
    }


def fingerprint(model: Mistral | QuietStar) -> str:
    """A hash of samples of all weights: other weights in the same folder have other results."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        step = parameter.numel() // 1000 + 1
        digest.update(parameter.detach().flatten()[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def answerer(
    model: Mistral | QuietStar, tokenizer: Tokenizer, settings: Settings
) -> Callable[[Question], dict]:
    """The function that answers a question in every way: {way: its scores and answer}."""
    if settings.chains:
        answer = partial(answer_after_chains, settings=settings)
    else:
        answer = partial(answer_at_once, admissible=admissible_tokens(tokenizer, settings.task))
    ways = ways_to_answer(model)
    return lambda question: {
        way: answer(answering, tokenizer, question) for way, answering in ways.items()
    }


# ------------------------------------------------------------------------------- files of results


def read_results(path: Path, header: dict) -> dict[int, dict]:
    """The results in a file, by the line of their question; what a killed run half wrote is not.

    ValueError if the file has another header: these would be results of something else.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole, _, _ = text.rpartition("\n")
    if not whole:
        return {}
    try:
        found, *results = (json.loads(line) for line in whole.split("\n"))
        answered = {result["line"]: result for result in results}
        differing = [name for name in header | found if found.get(name) != header.get(name)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from None
    for name in differing:
        raise ValueError(
            f"{path} has results for {name} {found.get(name)!r}, not {header.get(name)!r}; "
            "give another --out, or delete the file"
        )
    return answered


def answer_all(
    questions: list[Question], answer: Callable[[Question], dict], path: Path, header: dict
) -> None:
    """Append the results of the questions that have none yet to a file, each at once."""
    done = read_results(path, header)
    text = "".join(json.dumps(line) + "\n" for line in [header, *done.values()])
    write_text(path, text)
    missing = [question for question in questions if question.line not in done]
    began = time.perf_counter()
    with path.open("a", encoding="utf-8") as file:
        for count, question in enumerate(missing, 1):
            record = {"line": question.line, "expected": question.answer}
            file.write(json.dumps(record | {"answers": answer(question)}) + "\n")
            file.flush()
            left = (time.perf_counter() - began) / count * (len(missing) - count)
            answered, total = len(done) + count, len(questions)
            line = f"{answered} of {total} questions  {left:.0f} s left"
            show_status(line, answered, total, sys.stderr)


def summarise(header: dict, results: list[dict]) -> dict:
    """The header, and of every way and score the mean over questions and its 95 % interval."""
    seed = header["settings"]["seed"]
    scores: dict[str, dict] = {}
    for way, first in results[0]["answers"].items():
        scores[way] = {}
        for score in [score for score in SCORES if score in first]:
            values = np.array([result["answers"][way][score] for result in results])
            low, high = bootstrap_interval(values, seed)
            scores[way][score] = {"mean": float(values.mean()), "low": low, "high": high}
    return header | {"scores": scores}


def show_summary(summary: dict) -> str:
    """A summary as a table."""
    ways = summary["scores"]
    title = f"{summary['settings']['task']}, {summary['questions']} questions"
    lines = [f"{title:66}" + "".join(f"{way:>27}" for way in ways)]
    for score in next(iter(ways.values())):
        cells = (
            f"{100 * s['mean']:.2f} % [{100 * s['low']:.2f}, {100 * s['high']:.2f}]"
            for s in (way[score] for way in ways.values())
        )
        lines.append(f"{SCORES[score]:66}" + "".join(f"{cell:>27}" for cell in cells))
    return "\n".join([*lines, "In brackets: 95 % intervals, by drawing the questions anew."])


def questions_to_answer(data_file: Path, settings: Settings) -> tuple[list[Question], dict]:
    """The questions in a file, and what the header of their results says about it.

    ValueError for a malformed line; if they may be skipped, a line on standard error for each.
    """
    contents = data_file.read_bytes()
    questions, problems = read_questions(contents, str(data_file), settings.task)
    if problems and not settings.skip_malformed:
        raise ValueError(
            f"{problems[0]}; malformed lines: {len(problems)}; mend them or give --skip-malformed"
        )
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    questions = questions[: settings.limit]
    return questions, {
        "data": str(data_file),
        "sha256": hashlib.sha256(contents).hexdigest(),
        "malformed_lines": len(problems),
        "questions": len(questions),
    }


def evaluate(
    answer: Callable[[Question], dict],
    about_model: dict,
    data_file: Path,
    out: Path,
    settings: Settings,
    shard: tuple[int, int],
) -> dict | None:
    """Answer what shard (i, n) has of the questions in a file; the summary if all n are complete.

    about_model: what the header of the results says of the model.

    Writes out/{name}-{i}-of-{n}.jsonl and, with the last shard, out/{name}-summary.json.
    ValueError for a malformed line, a shard without questions, and a folder with results of
    something else.
    """
    questions, about = questions_to_answer(data_file, settings)
    i, n = shard
    if not 1 <= i <= n <= len(questions):
        raise ValueError(
            f"shard {i}/{n} of {len(questions)} questions; allowed are 1/n to n/n, "
            "n at most the number of questions"
        )
    header = {**about_model, **about, "settings": asdict(settings)}
    name = settings.task + ("-cot" if settings.chains else "")
    files = [out / f"{name}-{part}-of-{n}.jsonl" for part in range(1, n + 1)]
    out.mkdir(parents=True, exist_ok=True)
    answer_all(questions[i - 1 :: n], answer, files[i - 1], header)

    results: dict[int, dict] = {}
    for file in files:
        results |= read_results(file, header)
    if len(results) < len(questions):
        return None
    summary = summarise(header, [results[question.line] for question in questions])
    write_json(out / f"{name}-summary.json", summary)
    return summary
