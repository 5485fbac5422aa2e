"""Show the thoughts of a model about a text on one HTML page.

    python -m tools.page --model FOLDER --text FILE --html out.html

read_thoughts lets the model think after every token of the text, as in training. render colours
each token by the change of the next token's log-probability. page.html is the template. Text and
thoughts are escaped there, or are in json_block, which the script reads as text, never as markup.
"""

import argparse
import html
import json
import math
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
import torch

from model import check_range
from support.checkpoints import load
from support.device import pick_device
from support.files import write_text
from support.terminal import execute, make_parser, show_status
from support.text import Tokens, read_tokens
from support.tokenizer import Tokenizer
from thoughts import Output, QuietStar, ThoughtConfig, reward

# Nats at which a colour begins, also in page.html's legend: 1.03, 1.1, 1.3, 2.7 times as likely
BOUNDS = (0.03, 0.1, 0.3, 1.0)
LISTED = 5  # thoughts in each list of the summary


class Thought(NamedTuple):
    """A sampled thought and its effect."""

    text: str
    reward: float | None  # r_j in nats; None if one of the A targets is missing
    weight: float  # the mixing weight w for the next token
    logp: float  # of the next token after this thought, in nats


class Record(NamedTuple):
    """A token of the text and its thoughts."""

    text: str
    logp: float | None  # of the next token without a thought, in nats; None if it is no target
    thoughts: list[Thought]  # N, or none if there is no target

    def gain(self, thought: Thought) -> float:
        """The change of the next token's log p by a thought, in nats."""
        return thought.logp - self.logp

    def mean_gain(self) -> float | None:
        """The mean gain of the thoughts, which sets the token's colour. None without thoughts."""
        gains = [self.gain(thought) for thought in self.thoughts]
        return sum(gains) / len(gains) if gains else None


def records_of(output: Output, ids: list[int], tokenizer: Tokenizer) -> Iterator[Record]:
    """A Record for each position of a forward pass over one text ids [T]."""
    output = Output(*(x.cpu() for x in output))
    r = reward(output.talk_nll, output.base_nll, output.positions, output.valid)  # [1, N, J]
    numbers = torch.stack([r[0], output.weight[0, 0], -output.talk_nll[0, 0]])  # [3, N, J]
    for i, j in enumerate(output.positions.tolist()):
        text, valid = tokenizer.spell([ids[j]]), output.valid[:, 0, i].tolist()  # [A]
        thoughts = [
            Thought(tokenizer.spell(thought), r_j if all(valid) else None, w, logp)
            for thought, (r_j, w, logp) in zip(
                output.thought_ids[0, :, i].tolist(), numbers[:, :, i].T.tolist(), strict=True
            )
        ]
        base_logp = -output.base_nll[0, j].item()
        yield Record(text, base_logp, thoughts) if valid[0] else Record(text, None, [])


@torch.no_grad()
def read_thoughts(
    model: QuietStar, tokenizer: Tokenizer, text: Tokens, context: int, generator: torch.Generator
) -> Iterator[Record]:
    """A Record for every token of a text, with thoughts sampled at temperature 1.

    Each sequence of `context` tokens begins with the last A tokens of the one before, so that all
    thoughts but the last have A targets. Raises ValueError if context is too small for this.
    """
    A, length, start = model.config.n_true, len(text.ids), 0
    if context <= A:
        raise ValueError(f"context is {context}; it must be at least {A + 1}: a token and {A} more")
    while start < length - 1:
        ids, is_target = text.ids[start : start + context], text.is_target[start : start + context]
        thinking = len(ids) - (1 if start + context >= length else A)
        positions = torch.arange(thinking)
        output = model(ids[None], None, positions, is_target[None], generator=generator)
        yield from records_of(output, ids.tolist(), tokenizer)
        start += thinking
    yield Record(tokenizer.spell(text.ids[-1:].tolist()), None, [])


def visible(text: str) -> str:
    r"""The text with escapes like \x07 for unprintable characters except newlines and tabs."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def escaped(text: str) -> str:
    """The text as HTML on one line."""
    return html.escape(visible(text).replace("\n", "↵").replace("\t", "⇥"))


def signed(nats: float) -> str:
    """A number with its sign. Screen readers read this minus."""
    return f"{nats:+.3f}".replace("-", "−")


def color_class(gain: float | None) -> str:
    """The HTML attribute for the colour of a gain in nats; empty for None and for no colour."""
    size = bisect_right(BOUNDS, abs(gain or 0.0))
    return f' class="{"raised" if gain > 0 else "lowered"}{size}"' if size else ""


def token_span(index: int, record: Record, linked: set[int]) -> str:
    """A token as HTML. White space is marked, and copied as white space."""
    text = html.escape(visible(record.text))
    for blank, mark in (("\n", "<b></b>\n"), (" ", "<i> </i>"), ("\t", "<i>\t</i>")):
        text = text.replace(blank, mark)
    name = f' id="t{index}"' if index in linked else ""
    return f"<span{name}{color_class(record.mean_gain())}>{text}</span>"


def json_block(records: list[Record]) -> str:
    """The records as JSON: [logp, [[text, reward, w, logp], ...]] each, without "<"."""

    def short(*numbers: float | None) -> list[float | None]:
        return [number and round(number, 4) for number in numbers]

    rows = [
        [*short(record.logp), [[visible(t.text), *short(*t[1:])] for t in record.thoughts]]
        for record in records
    ]
    return json.dumps(rows, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def extremes(records: list[Record], sign: int) -> list[tuple[int, Thought]]:
    """(index, thought) of the LISTED tokens with the largest gains (sign 1) or losses (-1)."""

    def size(entry: tuple[int, Thought]) -> float:
        return sign * records[entry[0]].gain(entry[1])

    tokens = [[(i, x) for x in record.thoughts] for i, record in enumerate(records)]
    each = [max(entries, key=size) for entries in tokens if entries]  # one thought per token
    return [entry for entry in sorted(each, key=size, reverse=True)[:LISTED] if size(entry) > 0]


def summary(entries: list[tuple[int, Thought]], records: list[Record]) -> str:
    """Thoughts as the items of an HTML list, each with a link to its token."""
    items = []
    for index, thought in entries:
        gain = records[index].gain(thought)
        before = "".join(record.text for record in records[max(index - 11, 0) : index + 1])
        r = "" if thought.reward is None else f", reward {signed(thought.reward)}"
        items.append(
            f'<li><a href="#t{index}"><em{color_class(gain)}>{signed(gain)}</em></a> '
            f"after <code>{escaped(before[-16:])}</code> "
            f"thought <code>{escaped(thought.text)}</code>, "
            f"next <code>{escaped(records[index + 1].text)}</code>"
            f"<small>w {thought.weight:.3f}{r}</small></li>"
        )
    return "\n".join(items) or "<li>none</li>"


def distribution(gains: list[float]) -> str:
    """Rows of an HTML table, one for each colour: bar, tokens, share, sum of gains in nats."""
    edges, rows = [-math.inf, *(-bound for bound in reversed(BOUNDS)), *BOUNDS, math.inf], []
    for low, high in pairwise(edges):
        color = color_class(high if high < 0 else max(low, 0.0))
        inside = [gain for gain in gains if color_class(gain) == color]
        share, label = 100 * len(inside) / len(gains), f"{low:+g} .. {high:+g}"
        label = label.replace("-inf ..", "up to").replace(".. +inf", "or more").replace("-", "−")
        rows.append(
            f'<tr><th>{label}</th><td><div{color} style="width: {share:.2f}%"></div></td>'
            f"<td>{len(inside):,}</td><td>{share:.1f} %</td><td>{signed(sum(inside))}</td></tr>"
        )
    return "\n".join(rows)


def figures(records: list[Record], heard: bool) -> dict[str, str]:
    """Numbers over all tokens. Raises ValueError if no token has a thought."""
    gains = [gain for record in records if (gain := record.mean_gain()) is not None]
    if not gains:
        raise ValueError("the text has nothing to predict; it needs at least two tokens")
    without = sum(r.logp for r in records if r.logp is not None) / len(gains)
    change, colors = sum(gains) / len(gains), "".join(map(color_class, gains))
    shown = f"<em{color_class(change)}>{signed(change)}</em>"
    return {
        "predicted": f"{len(gains):,}",
        "without": signed(without),
        "with": signed(without + change),
        "change": shown if heard else "none: all w = 1, so thoughts are not heard yet",
        "raised": f"{100 * colors.count('raised') / len(gains):.1f}",
        "lowered": f"{100 * colors.count('lowered') / len(gains):.1f}",
        "distribution": distribution(gains),
    }


def render(
    records: list[Record], title: str, config: ThoughtConfig, seed: int, context: int
) -> str:
    """The page of a text's records as HTML. Raises ValueError if no token has a thought."""
    heard = any(thought.weight != 1 for record in records for thought in record.thoughts)
    strongest, worst = (extremes(records, sign) if heard else [] for sign in (1, -1))
    linked, siblings = {index for index, _ in strongest + worst}, config.n_thoughts > 1
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return page.substitute(  # in one pass: a $name in the text stays as it is
        figures(records, heard) | asdict(config),
        title=escaped(title),
        usual="the token's thoughts did on average" if siblings else "without a thought",
        seed=seed,
        context=context,
        strongest=summary(strongest, records),
        worst=summary(worst, records),
        bounds=list(BOUNDS),
        tokens="".join(token_span(i, record, linked) for i, record in enumerate(records)),
        records=json_block(records),
    )


def run(options: argparse.Namespace) -> None:
    """Let a model think about a text, and write the page."""
    out = Path(options.html)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--html is {out}; it must be a file in a folder that exists")
    check_range(options, 2, math.inf, "max_tokens")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed is {options.seed}; it must be a whole number from 0 to 2**63 - 1")
    device = pick_device(options.device)
    model, tokenizer = load(options.model, device)
    if not isinstance(model, QuietStar):
        raise ValueError(f"{options.model} is a plain model: it has no thoughts to show")
    text, part = read_tokens([options.text], tokenizer), slice(options.max_tokens)
    ids, is_target = (np.asarray(x[part]) for x in (text.ids, text.is_target))
    ids, is_target = ids.astype(np.int64), is_target.astype(bool)  # copies, not maps of the disk
    text = Tokens(*(torch.from_numpy(x).to(device) for x in (ids, is_target)))
    generator, records = torch.Generator().manual_seed(options.seed), []
    for record in read_thoughts(model, tokenizer, text, options.context, generator):
        records.append(record)
        line = f"{len(records)} of {len(ids)} tokens"
        show_status(line, len(records), len(ids), sys.stderr)
    title = f"Thoughts of {options.model} on {options.text}"
    write_text(out, render(records, title, model.config, options.seed, options.context))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder of a thinking model")
    add("--text", required=True, metavar="FILE", help="text, .jsonl, or folder of tools.prepare")
    add("--html", required=True, metavar="FILE", help="page to write")
    add("--context", type=int, default=256, help="tokens in a sequence (256)")
    add("--max-tokens", type=int, help="first tokens of the text to read; none: all")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--device", help="cpu, cuda, mps; none: the best one available")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
