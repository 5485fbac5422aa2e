"""GSM8K by chains of thought that are written out and vote: the paper's cot-maj@k.

    python -m tools.chains --model FOLDER --data test.jsonl

A question is answered after a chain of thought, several times, and the commonest number counts:

    Q: {question}\\nA: Let's think step by step. ... \\nTherefore, the answer (arabic numerals) is

Paper: section 5. The prompts and the vote are those of the authors' code (zero-shotcot-eval.py).
Ours: a chain ends at its first triple line break, where theirs ends at the second (or at "Q:"); a
number may have a sign and decimals, where theirs is a row of digits. (At once: eval.py --task.)
"""

import argparse
import re
from collections import Counter
from decimal import Decimal
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from eval import Question, number_in, read_questions, show_scores, ways_to_answer
from model import Mistral, check_at_least
from sample import write
from support.checkpoints import load
from support.device import DTYPES, pick_device
from support.results import about, answer_all, results_file
from support.terminal import execute, make_parser
from support.tokenizer import Tokenizer
from thoughts import QuietStar

STEP_BY_STEP = "\nA: Let's think step by step."
THEREFORE = "\nTherefore, the answer (arabic numerals) is"
ANSWER_TOKENS = 12  # at most, for the number
END_OF_CHAIN = re.compile(r"Q:|\n\n\n")  # where a model goes on with a question of its own
END_OF_NUMBER = re.compile(r"(?<=[0-9])[.,]?[^0-9.,]")
SCORES = {"majority_accuracy": "accuracy of the majority of the chains of thought"}


class Chains(NamedTuple):
    """The chains of thought about a question."""

    samples: int  # chains, which vote
    temperature: float  # of sampling; 0 is greedy
    max_new_tokens: int  # of a chain, at most
    seed: int  # of sampling


def majority(votes: list[Decimal | None]) -> Decimal | None:
    """The commonest vote, the first of several. None, no number written, is a vote like any other.

    Paper: cot-maj@k, and the authors' code where votes are equally common.
    """
    return Counter(votes).most_common(1)[0][0]


def answer_after_chains(
    model: Mistral | QuietStar, question: Question, tokenizer: Tokenizer, chains: Chains
) -> dict:
    """The score of the vote of some chains of thought, the answer that won, and the chains.

    Every question has randomness of its own: a restart changes nothing.
    """
    own_seed = np.random.default_rng([chains.seed, question.number]).integers(2**63)
    generator = torch.Generator().manual_seed(int(own_seed))
    write_on = partial(write, model, tokenizer, temperature=chains.temperature, generator=generator)
    prompt = f"Q: {question.text}{STEP_BY_STEP}"
    texts = write_on(prompt, chains.max_new_tokens, samples=chains.samples, stop=END_OF_CHAIN)
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
    """Answer the questions in every way, and print the score."""
    chains = Chains(options.samples, options.temperature, options.max_new_tokens, options.seed)
    check_at_least(chains, samples=1, temperature=0, max_new_tokens=1, seed=0)
    questions = read_questions(options.data, "gsm8k", options.limit)
    dtype = options.dtype and DTYPES[options.dtype]
    model, tokenizer = load(options.model, pick_device(options.device), dtype)
    answer = partial(answer_after_chains, tokenizer=tokenizer, chains=chains)
    out = results_file(options, "gsm8k-cot")
    results = answer_all(
        ways_to_answer(model), questions, answer, out, about(options) | chains._asdict()
    )
    print(show_scores("gsm8k", results, SCORES))
    print(f"a line for each question is in {out}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder, plain or thinking")
    add("--data", required=True, metavar="FILE", help="GSM8K's questions, JSON lines")
    add("--samples", type=int, default=8, help="chains of thought that vote on an answer (8)")
    add("--temperature", type=float, default=0.7, help="of sampling them; 0 is greedy (0.7)")
    add("--max-new-tokens", type=int, default=384, help="of one of them, at most (384)")
    add("--limit", type=int, help="the first questions only; none: all")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--out", metavar="FILE", help="of results, continued if it is there; none: in the model")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add("--dtype", choices=DTYPES, help="precision; none: the file's, on a CPU float32 if it fits")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
