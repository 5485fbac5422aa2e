"""The thoughts of a text, to look at: one HTML page that needs nothing but a browser.

    python -m tools.page --model FOLDER --text FILE --html out.html

read_thoughts lets a model think after every token of a text, as in training; render colours each
token by what its thoughts did to the next token's log-probability. page.html is the page, with a
$name wherever render puts something in. Whatever a model or a text has said is escaped there, or
stands in json_block, from where the page's script takes it as text, never as markup.
"""

import argparse
import html
import json
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import NamedTuple

import torch

from support.checkpoints import load
from support.device import pick_device
from support.files import write_text
from support.terminal import execute, make_parser, show_status
from support.text import Tokens, read_documents, tokenize
from support.tokenizer import Tokenizer
from thoughts import Output, QuietStar, ThoughtConfig, reward

# Nats at which a colour begins, also in page.html's legend: 1.03, 1.1, 1.3, 2.7 times as likely
BOUNDS = (0.03, 0.1, 0.3, 1.0)
LISTED = 5  # thoughts in each of the summary's lists


class Thought(NamedTuple):
    """A sampled thought and what it did."""

    text: str
    reward: float | None  # r_j of the paper in nats; None where one of the A targets is missing
    weight: float  # the mixing weight w for the next token
    logp: float  # of the next token after this thought, in nats


class Record(NamedTuple):
    """A token of the text and its thoughts about the next one."""

    text: str
    logp: float | None  # of the next token without a thought, in nats; None: it is no target
    thoughts: list[Thought]  # N, or none where nothing is to be predicted

    def gain(self, thought: Thought) -> float:
        """By how much this thought raised the log p of the next token, in nats."""
        return thought.logp - self.logp

    def mean_gain(self) -> float | None:
        """The mean of the gains, which is the token's colour; None without thoughts."""
        gains = [self.gain(thought) for thought in self.thoughts]
        return sum(gains) / len(gains) if gains else None


# ------------------------------------------------------------------------------------- the records


def records_of(output: Output, ids: list[int], tokenizer: Tokenizer) -> Iterator[Record]:
    """A Record for each position of a forward pass over one text ids [T]."""
    r = reward(output.talk_nll, output.base_nll, output.positions, output.valid)  # [1, N, J]
    numbers = torch.stack([r[0], output.weight[0, 0], -output.talk_nll[0, 0]])  # [3, N, J]
    columns = zip(
        output.positions.tolist(),
        output.valid[:, 0].T.tolist(),  # [J, A]
        (-output.base_nll[0, output.positions]).tolist(),  # [J]
        output.thought_ids[0].transpose(0, 1).tolist(),  # [J, N, K]
        numbers.permute(2, 1, 0).tolist(),  # [J, N, 3]
        strict=True,
    )
    for j, valid, base_logp, thoughts, rows in columns:
        shown = [
            Thought(tokenizer.spell(thought), r_j if all(valid) else None, w, logp)
            for thought, (r_j, w, logp) in zip(thoughts, rows, strict=True)
        ]
        is_target, text = valid[0], tokenizer.spell([ids[j]])
        yield Record(text, base_logp, shown) if is_target else Record(text, None, [])


@torch.no_grad()
def read_thoughts(
    model: QuietStar, tokenizer: Tokenizer, text: Tokens, context: int, generator: torch.Generator
) -> Iterator[Record]:
    """A Record for every token of a text, thoughts sampled at temperature 1.

    The text is read in sequences of `context` tokens, each on its own. The last A tokens of one are
    the first of the next, so that every thought has its A targets, but for those at the text's end.
    ValueError if a sequence has no room for a token and its A targets.
    """
    A, length = model.config.n_true, len(text.ids)
    if context <= A:
        raise ValueError(
            f"context is {context}; it must be at least {A + 1}: a token and the {A} that "
            "its thought is scored on"
        )
    start = 0
    while start < length - 1:
        ids, is_target = text.ids[start : start + context], text.is_target[start : start + context]
        thinking = len(ids) - (1 if start + context >= length else A)
        positions = torch.arange(thinking)
        output = model(ids[None], None, positions, is_target[None], generator=generator)
        yield from records_of(output, ids.tolist(), tokenizer)
        start += thinking
    yield Record(tokenizer.spell(text.ids[-1:].tolist()), None, [])


# ---------------------------------------------------------------------------------------- the page


def visible(text: str) -> str:
    r"""The text with \x07 and the like for what is neither printable nor a new line or tab."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def escaped(text: str) -> str:
    """The text on one line as HTML."""
    return html.escape(visible(text).replace("\n", "↵").replace("\t", "⇥"))


def signed(nats: float) -> str:
    """A number with its sign, a minus that screen readers do not pass over."""
    return f"{nats:+.3f}".replace("-", "−")


def level(gain: float | None) -> int:
    """The colour of a gain in nats: 1 .. 4 raised, -1 .. -4 lowered, 0 neither (or None)."""
    size = bisect_right(BOUNDS, abs(gain or 0.0))
    return size if (gain or 0.0) > 0 else -size


def color_class(gain: float | None) -> str:
    """The attribute that colours a token or number by its gain; none for no colour."""
    size = level(gain)
    return f' class="{"raised" if size > 0 else "lowered"}{abs(size)}"' if size else ""


def token_span(index: int, record: Record, linked: set[int]) -> str:
    """A token as HTML: blanks are marked, and still blanks to whoever copies the text."""
    text = html.escape(visible(record.text))
    for blank, mark in (("\n", "<b></b>\n"), (" ", "<i> </i>"), ("\t", "<i>\t</i>")):
        text = text.replace(blank, mark)
    name = f' id="t{index}"' if index in linked else ""
    return f"<span{name}{color_class(record.mean_gain())}>{text}</span>"


def json_block(records: list[Record]) -> str:
    """The records as JSON that no text in it can end: [logp, [[text, reward, w, logp], ...]]."""

    def short(number: float | None) -> float | None:
        return None if number is None else round(number, 4)

    rows = [
        [short(record.logp), [[visible(t.text), *map(short, t[1:])] for t in record.thoughts]]
        for record in records
    ]
    return json.dumps(rows, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def extremes(records: list[Record], sign: int) -> list[tuple[int, Thought]]:
    """The thoughts that raised (sign 1) or lowered (-1) the next token's log p most.

    One of a token, at most LISTED, the most extreme first, with the index of their token.
    """

    def size(entry: tuple[int, Thought]) -> float:
        return sign * records[entry[0]].gain(entry[1])

    thinking = [(i, record.thoughts) for i, record in enumerate(records) if record.thoughts]
    each = [max(((i, thought) for thought in thoughts), key=size) for i, thoughts in thinking]
    return [entry for entry in sorted(each, key=size, reverse=True)[:LISTED] if size(entry) > 0]


def summary(entries: list[tuple[int, Thought]], records: list[Record]) -> str:
    """Thoughts as the items of a list, each linked to its token."""
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


def figures(records: list[Record]) -> dict[str, str]:
    """What the thoughts of all tokens did together; ValueError if no token has any."""
    gains = [gain for record in records if (gain := record.mean_gain()) is not None]
    if not gains:
        raise ValueError("the text has nothing to predict; it needs at least two tokens")
    without = sum(r.logp for r in records if r.logp is not None) / len(gains)
    change = sum(gains) / len(gains)
    return {
        "predicted": f"{len(gains):,}",
        "without": signed(without),
        "with": signed(without + change),
        "change": f"<em{color_class(change)}>{signed(change)}</em>",
        "raised": f"{100 * sum(level(gain) > 0 for gain in gains) / len(gains):.1f}",
        "lowered": f"{100 * sum(level(gain) < 0 for gain in gains) / len(gains):.1f}",
    }


def render(
    records: list[Record], title: str, config: ThoughtConfig, seed: int, context: int
) -> str:
    """The page of a text's records as HTML; ValueError if no token of the text has a thought."""
    strongest, worst = extremes(records, 1), extremes(records, -1)
    linked = {index for index, _ in strongest + worst}
    siblings = config.n_thoughts > 1
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return page.substitute(  # in one pass: a $name that a text holds stays as it is
        figures(records) | asdict(config),
        title=escaped(title),
        usual="the token's thoughts do on average" if siblings else "they are without a thought",
        seed=seed,
        context=context,
        strongest=summary(strongest, records),
        worst=summary(worst, records),
        bounds=list(BOUNDS),
        tokens="".join(token_span(i, record, linked) for i, record in enumerate(records)),
        records=json_block(records),
    )


# ------------------------------------------------------------------------------ the command line


def run(options: argparse.Namespace) -> None:
    """Let a model think about a text and write the page."""
    out = Path(options.html)
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--html {out}: its folder does not exist; make it first")
    if out.is_dir():
        raise ValueError(f"--html {out} is a folder; give the name of a file")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed is {options.seed}; it must be a whole number from 0 to 2**63 - 1")
    device = pick_device(options.device)
    model, tokenizer = load(options.model, device)
    if not isinstance(model, QuietStar):
        raise ValueError(
            f"{options.model} is a plain model: it has no thoughts to show; give a thinking one"
        )
    text = tokenize(read_documents([options.text]), tokenizer)
    text = Tokens(text.ids.to(device), text.is_target.to(device))
    generator = torch.Generator().manual_seed(options.seed)
    records, count = [], len(text.ids)
    for record in read_thoughts(model, tokenizer, text, options.context, generator):
        records.append(record)
        show_status(f"{len(records)} of {count} tokens", len(records), count, sys.stderr)
    title = f"Thoughts of {options.model} on {options.text}"
    page = render(records, title, model.config, options.seed, options.context)
    write_text(out, page)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="checkpoint folder of a thinking model")
    add("--text", required=True, metavar="FILE", help="text or .jsonl file to think about")
    add("--html", required=True, metavar="FILE", help="page to write")
    add("--context", type=int, default=256, help="tokens in a sequence (256)")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
