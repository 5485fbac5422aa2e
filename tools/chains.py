"""Answer GSM8K by a vote of written chains of thought: the paper's cot-maj@k.

    python -m tools.chains --model FOLDER --data test.jsonl

Every question is answered several times after a chain of thought, and the commonest number counts:

    Q: {question}\\nA: Let's think step by step. ... \\nTherefore, the answer (arabic numerals) is

Paper: section 5. The prompts and the vote are those of the authors' code (zero-shotcot-eval.py).
Ours: a chain ends at its first triple line break, not at the second (or at "Q:"), and a number may
have a sign and decimals. (eval.py --task answers without chains.)
"""

import argparse
import math
import re
from collections import Counter
from decimal import Decimal
from functools import partial

import numpy as np
import torch

from eval import ways_to_answer
from model import Mistral, check_range
from sample import write
from support.checkpoints import load
from support.device import DTYPES, pick_device
from support.questions import Question, number_in, read_questions
from support.results import about, answer_all, results_file, show_scores
from support.terminal import execute, make_parser
from support.tokenizer import Tokenizer
from thoughts import QuietStar

STEP_BY_STEP = "\nA: Let's think step by step."
THEREFORE = "\nTherefore, the answer (arabic numerals) is"
ANSWER_TOKENS = 12  # for the number, at most
END_OF_CHAIN = re.compile(r"Q:|\n\n\n")  # where a model goes on with another question
END_OF_NUMBER = re.compile(r"(?<=[0-9])[.,]?[^0-9.,]")
SCORES = {"majority_accuracy": "accuracy of the majority of the chains of thought"}


SETTINGS = ("samples", "temperature", "max_new_tokens", "seed")  # options of the chains


def majority(votes: list[Decimal | None]) -> Decimal | None:
    """The most common vote, or the first of equally common ones. None (no number) is a vote too."""
    return Counter(votes).most_common(1)[0][0]


def answer_after_chains(
    model: Mistral | QuietStar, question: Question, tokenizer: Tokenizer, settings
) -> dict:
    """Whether the vote of the chains is right, the answer that won, and the chains.

    settings: an object with the SETTINGS. Every question has its own random numbers, so that a
    restart does not change the results.
    """
    own_seed = np.random.default_rng([settings.seed, question.number]).integers(2**63)
    generator, heat = torch.Generator().manual_seed(int(own_seed)), settings.temperature
    write_on = partial(write, model, tokenizer, temperature=heat, generator=generator)
    prompt = f"Q: {question.text}{STEP_BY_STEP}"
    texts = write_on(prompt, settings.max_new_tokens, samples=settings.samples, stop=END_OF_CHAIN)
    answers = []
    for text in texts:  # one by one: they differ in length
        asked = (prompt + text).rstrip() + THEREFORE
        answers += write_on(asked, ANSWER_TOKENS, stop=END_OF_NUMBER)
    winner = majority([number_in(answer) for answer in answers])
    return {
        "majority_accuracy": int(winner == number_in(question.answer)),
        "answer": None if winner is None else str(winner),
        "chains": [text + THEREFORE + answer for text, answer in zip(texts, answers, strict=True)],
    }


def run(options: argparse.Namespace) -> None:
    """Answer the questions without thoughts and with them, and print the scores."""
    check_range(options, 1, math.inf, "samples", "max_new_tokens")
    check_range(options, 0, math.inf, "temperature", "seed")
    questions = read_questions(options.data, "gsm8k", options.limit)
    dtype = options.dtype and DTYPES[options.dtype]
    model, tokenizer = load(options.model, pick_device(options.device), dtype)
    answer = partial(answer_after_chains, tokenizer=tokenizer, settings=options)
    out = results_file(options, "gsm8k-cot")
    header = about(options) | {name: getattr(options, name) for name in SETTINGS}
    results = answer_all(ways_to_answer(model), questions, answer, out, header)
    print(show_scores("gsm8k", results, SCORES))
    print(f"a line for each question is in {out}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder, plain or thinking")
    add("--data", required=True, metavar="FILE", help="questions of GSM8K, JSON lines")
    add("--samples", type=int, default=8, help="chains that vote on an answer (8)")
    add("--temperature", type=float, default=0.7, help="of the sampling; 0: greedy (0.7)")
    add("--max-new-tokens", type=int, default=384, help="tokens in a chain (384)")
    add("--limit", type=int, help="first questions to answer; none: all")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--out", metavar="FILE", help="results; none: runs/RUN-MODEL-gsm8k-cot.jsonl; continued")
    add("--device", help="cpu, cuda, mps; none: the best one available")
    add("--dtype", choices=DTYPES, help="precision; none: the file's, on a CPU float32 if it fits")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
