"""The thoughts of a text, to look at: one HTML page that needs nothing but a browser.

    python sample.py --model FOLDER --text FILE --html out.html

read_thoughts lets a model think after every token of a text, as in training, and render draws the
page: the text, its tokens coloured by what their thoughts did to the next token's log-probability.
A reader without JavaScript has the text, its colours and the summary; the script adds a panel with
all thoughts of the token that is pointed at or focused.

Everything that a model or a text has said goes through `escaped` into the page, or through
`json_block`, from where the script puts it in place as text, never as markup.
"""

import html
import json
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch

from data import Tokens
from thoughts import Output, QuietStar, ThoughtConfig, reward
from tokenizer import Tokenizer

BOUNDS = (0.03, 0.1, 0.3, 1.0)  # nats at which a colour begins: 1.03, 1.1, 1.3, 2.7 times as likely
STRONG = 3  # level from which a token is underlined too
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
        assert self.logp is not None  # only such records have thoughts
        return thought.logp - self.logp

    def mean_gain(self) -> float | None:
        """The mean of the gains, which is the token's colour."""
        if not self.thoughts:
            return None
        return sum(map(self.gain, self.thoughts)) / len(self.thoughts)


def level(gain: float | None) -> int:
    """The colour of a gain in nats: 1 .. 4 raised, -1 .. -4 lowered, 0 neither (or None)."""
    size = bisect_right(BOUNDS, abs(gain or 0.0))
    return size if (gain or 0.0) > 0 else -size


# ------------------------------------------------------------------------------------- the records


def records_of(output: Output, ids: list[int], tokenizer: Tokenizer) -> list[Record]:
    """A Record for each position of a forward pass over one text ids [T]."""
    r = reward(output.talk_nll, output.base_nll, output.positions, output.valid)  # [1, N, J]
    columns = zip(
        output.positions.tolist(),
        output.valid[0, 0].tolist(),  # whether the next token is a target
        output.valid[:, 0].all(0).tolist(),  # whether all A are
        (-output.base_nll[0, output.positions]).tolist(),
        output.thought_ids[0].transpose(0, 1).tolist(),  # [J, N, K]
        *(x.T.tolist() for x in (r[0], output.weight[0, 0], -output.talk_nll[0, 0])),  # [J, N]
        strict=True,
    )
    records = []
    for j, is_target, is_rewarded, logp, thoughts, rewards, weights, logps in columns:
        rows = zip(thoughts, rewards, weights, logps, strict=True) if is_target else ()
        shown = [
            Thought(tokenizer.spell(thought), r_j if is_rewarded else None, w, logp_thought)
            for thought, r_j, w, logp_thought in rows
        ]
        records.append(Record(tokenizer.spell([ids[j]]), logp if is_target else None, shown))
    return records


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
        is_last = start + context >= length
        thinking = len(ids) - (1 if is_last else A)
        output = model(
            ids[None],
            positions=torch.arange(thinking),
            target_mask=is_target[None],
            generator=generator,
        )
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

    def row(thought: Thought) -> list:
        return [visible(thought.text), *map(short, thought[1:])]

    rows = [[short(record.logp), [*map(row, record.thoughts)]] for record in records]
    return json.dumps(rows, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def extremes(records: list[Record]) -> tuple[list[tuple[int, Thought]], list[tuple[int, Thought]]]:
    """The thoughts that raised the next token's log p most, and those that lowered it most.

    One of a token, at most LISTED of each, the most extreme first, with the index of their token.
    """
    thinking = [(i, record) for i, record in enumerate(records) if record.thoughts]

    def gain(entry: tuple[int, Thought]) -> float:
        return records[entry[0]].gain(entry[1])

    best = sorted(((i, max(r.thoughts, key=r.gain)) for i, r in thinking), key=gain, reverse=True)
    worst = sorted(((i, min(r.thoughts, key=r.gain)) for i, r in thinking), key=gain)
    return [e for e in best[:LISTED] if gain(e) > 0], [e for e in worst[:LISTED] if gain(e) < 0]


def summary_item(index: int, thought: Thought, records: list[Record]) -> str:
    """A thought in the summary, linked to its token."""
    gain = records[index].gain(thought)
    before = "".join(record.text for record in records[max(index - 11, 0) : index + 1])
    r = "" if thought.reward is None else f", reward {signed(thought.reward)}"
    return (
        f'<li><a href="#t{index}"><em{color_class(gain)}>{signed(gain)}</em></a> '
        f"after <code>{escaped(before[-16:])}</code> thought <code>{escaped(thought.text)}</code>, "
        f"next <code>{escaped(records[index + 1].text)}</code>"
        f"<small>w {thought.weight:.3f}{r}</small></li>"
    )


def summary_list(title: str, entries: list[tuple[int, Thought]], records: list[Record]) -> str:
    """One of the summary's lists."""
    items = "\n".join(summary_item(*entry, records) for entry in entries) or "<li>none</li>"
    return f"<section><h2>{title}</h2>\n<ol>{items}</ol></section>"


def figures(records: list[Record]) -> str:
    """What the thoughts of all tokens did together; ValueError if no token has any."""
    gains = [gain for record in records if (gain := record.mean_gain()) is not None]
    if not gains:
        raise ValueError("the text has nothing to predict; it needs at least two tokens")
    without = sum(r.logp for r in records if r.logp is not None) / len(gains)
    change = sum(gains) / len(gains)
    raised = sum(level(gain) > 0 for gain in gains)
    lowered = sum(level(gain) < 0 for gain in gains)
    cells = {
        "tokens predicted": f"{len(gains):,}",
        "mean log p without thoughts": signed(without),
        "with thoughts": signed(without + change),
        "change": f"<em{color_class(change)}>{signed(change)}</em>",
        "tokens raised": f"{100 * raised / len(gains):.1f} %",
        "lowered": f"{100 * lowered / len(gains):.1f} %",
    }
    pairs = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cells.items())
    return f'<dl class="figures">{pairs}</dl>'


def legend(config: ThoughtConfig) -> str:
    """What colours and numbers mean."""
    shades = [-bound for bound in reversed(BOUNDS)] + list(BOUNDS)
    swatches = "".join(
        f"<li{color_class(shade)}>{f'{shade:+g}'.replace('-', '−')}</li>" for shade in shades
    )
    siblings = config.n_thoughts > 1
    usual = "the token's thoughts do on average" if siblings else "they are without a thought"
    return f"""<ul class="legend"><li>lowered</li>{swatches}<li>raised</li></ul>
<p>A token's colour is the change of log p that its thoughts brought to <strong>the next
token</strong>: with minus without the thought, in nats, mean over the token's thoughts. From
+0.1 on the next token is 1.1 times as likely, from +1 on 2.7 times. Underlined: raised by
{BOUNDS[STRONG - 1]} or more; wavy: lowered as much. The <strong>reward</strong> is by how many nats
a thought made the next {config.n_true} tokens together likelier than {usual}.
The <strong>mixing weight</strong> w is that of the prediction without the thought: at 1 the thought
is not heard.</p>"""


def render(records: list[Record], title: str, note: str, config: ThoughtConfig) -> str:
    """The page of a text's records as HTML; note: how they were made, in a sentence.

    ValueError if no token of the text has a thought.
    """
    strongest, worst = extremes(records)
    linked = {index for index, _ in strongest + worst}
    tokens = "".join(token_span(i, record, linked) for i, record in enumerate(records))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escaped(title)}</h1>
<p>{escaped(note)}</p>
{figures(records)}
</header>
<main>
<div class="columns">
{summary_list("Strongest thoughts", strongest, records)}
{summary_list("Worst thoughts", worst, records)}
</div>
<h2>The text</h2>
{legend(config)}
<div class="reading">
<div id="text" lang="" data-bounds="{list(BOUNDS)}">{tokens}</div>
<aside id="details" aria-label="Thoughts of a token" aria-live="polite" aria-atomic="true">
<p>Point at a token to see its thoughts; or reach the text with Tab and move with the arrow keys,
Home and End.</p>
<noscript><p>This needs JavaScript; without it there are the colours and the lists.</p></noscript>
</aside>
</div>
</main>
<script type="application/json" id="records">{json_block(records)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f5f6f8; --line: #d5d9de;
  --ink: #16191d; --soft: #565d66; --link: #0b57a4;
  --raised1: #e4effa; --raised2: #c3dcf5; --raised3: #93c0ec; --raised4: #5b9fde;
  --lowered1: #fdeede; --lowered2: #fbd7b0; --lowered3: #f6b26b; --lowered4: #e98a2e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --line: #383f47;
    --ink: #f1f3f5; --soft: #a9b1bb; --link: #8fc1f5;
    --raised1: #17304a; --raised2: #1a4268; --raised3: #1d578c; --raised4: #226cb0;
    --lowered1: #3e2a14; --lowered2: #593811; --lowered3: #78480e; --lowered4: #97590d;
  }
}
* { box-sizing: border-box; }
html { scroll-padding: 3rem 0 45vh; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 1.5rem 0 .5rem; font-size: 1.1rem; }
h3 { margin: 1rem 0 .25rem; font-size: .85rem; color: var(--soft); }
p { margin: .25rem 0; max-width: 60rem; }
header p, .legend + p, small { color: var(--soft); font-size: .875rem; }
a { color: var(--link); }
code, #text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { padding: 0 .25em; border: 1px solid var(--line); border-radius: 3px; font-size: .875em;
  white-space: pre-wrap; overflow-wrap: anywhere; box-decoration-break: clone; }
em { padding: .1em .3em; border-radius: 3px; color: var(--ink); font-style: normal; }
.columns em { text-decoration: none; }
.columns small { display: block; }
dd em { margin-right: -.3em; }
em, dd { font-variant-numeric: tabular-nums; }
dl, dd { margin: 0; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin-top: .75rem; }
.figures dt { font-size: .8rem; color: var(--soft); }
.figures dd { font-size: 1.15rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 0 2rem; }
ol { margin: 0; padding-left: 1.5rem; }
li { margin: .2rem 0; }
.legend { display: flex; flex-wrap: wrap; margin: .5rem 0; padding: 0; list-style: none; }
.legend li { min-width: 4rem; margin: 0; padding: .15rem .5rem; border: solid var(--line);
  border-width: 1px 0; text-align: center; font-size: .85rem; }
.legend li:not([class]) { border-color: transparent; }
.reading { display: grid; grid-template-columns: minmax(0, 1fr) 22rem; gap: 1.5rem;
  align-items: start; margin-top: 1rem; }
#text { line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
#text > span { padding: .15em 0; border-radius: 3px; box-shadow: inset -1px 0 var(--page); }
#text > span:hover { outline: 1px solid var(--ink); }
#text > span:focus { outline: 2px solid var(--ink); outline-offset: 1px; }
#text i { background: radial-gradient(circle, var(--soft) 1px, transparent 1.5px); }
#text b::before { content: "↵"; color: var(--soft); font-weight: normal; }
#text [class] b::before { color: inherit; }
#details { position: sticky; top: 1rem; max-height: calc(100vh - 2rem); overflow: auto;
  padding: .75rem 1rem 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
#details h2 { margin: 0; }
#details dl { display: grid; grid-template-columns: 1fr auto; gap: 0 1rem; font-size: .9rem; }
#details dd { text-align: right; }
@media (max-width: 52rem) {
  .reading { grid-template-columns: 1fr; }
  #details { position: sticky; top: auto; bottom: 0; max-height: 42vh; }
}
.raised1 { background: var(--raised1); } .lowered1 { background: var(--lowered1); }
.raised2 { background: var(--raised2); } .lowered2 { background: var(--lowered2); }
.raised3 { background: var(--raised3); } .lowered3 { background: var(--lowered3); }
.raised4 { background: var(--raised4); } .lowered4 { background: var(--lowered4); }
.raised3, .raised4 { text-decoration: underline; text-underline-offset: .2em; }
.lowered3, .lowered4 { text-decoration: underline wavy 1px; text-underline-offset: .2em; }
"""

SCRIPT = r"""
const records = JSON.parse(document.getElementById("records").textContent);
const text = document.getElementById("text"), panel = document.getElementById("details");
const tokens = [...text.children], bounds = JSON.parse(text.dataset.bounds);
let current = 0, shown = -1;  // the one token that Tab reaches; the one in the panel

const number = x => x.toFixed(3).replace("-", "−");
const signed = x => (x < 0 ? "" : "+") + number(x);
const oneLine = said => said.replaceAll("\n", "↵").replaceAll("\t", "⇥");
const tokenText = i => oneLine(tokens[i].textContent).replaceAll(" ", "␣");

function element(tag, ...children) {  // strings become text, never markup
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

function colored(gain) {
  const made = element("em", signed(gain));
  const size = bounds.filter(bound => bound <= Math.abs(gain)).length;
  if (size) made.className = (gain > 0 ? "raised" : "lowered") + size;
  return made;
}

function pairs(entries) {
  return element("dl", ...entries.flatMap(([name, value]) =>
    [element("dt", name), element("dd", value)]));
}

function meanGain(i) {
  const [without, thoughts] = records[i];
  return thoughts.reduce((sum, thought) => sum + thought[3] - without, 0) / thoughts.length;
}

function show(i) {
  shown = i;
  panel.scrollTop = 0;
  const [without, thoughts] = records[i];
  const title = element("h2", "After ", element("code", tokenText(i)));
  if (!thoughts.length) {
    panel.replaceChildren(title, element("p", "No thought: nothing is predicted here."));
    return;
  }
  const cards = thoughts.flatMap(([said, reward, weight, logp], n) => [
    element("h3", `Thought ${n + 1} of ${thoughts.length}`),
    element("p", element("code", oneLine(said))),
    pairs([
      ["log p with it", number(logp)],
      ["change", colored(logp - without)],
      ["reward", reward === null ? "– (text ends)" : signed(reward)],
      ["mixing weight w", number(weight)],
    ]),
  ]);
  panel.replaceChildren(
    title,
    element("p", "Next comes ", element("code", tokenText(i + 1))),
    pairs([["log p without a thought", number(without)], ["mean change", colored(meanGain(i))]]),
    ...cards);
}

function select(i) {
  tokens[current].tabIndex = -1;
  tokens[current].removeAttribute("aria-selected");
  current = i;
  const said = tokens[i].textContent;
  const name = said.trim() || { " ": "space", "\n": "new line" }[said] || "blanks";
  tokens[i].tabIndex = 0;
  tokens[i].setAttribute("aria-selected", "true");
  tokens[i].ariaLabel = records[i][1].length ? `${name}: ${signed(meanGain(i))} nats` : name;
  show(i);
}

function line(i, step) {  // the nearest token in the line above or below
  const box = j => tokens[j].getClientRects()[0], from = box(i);
  let best = i;
  for (let j = i + step; tokens[j]; j += step) {
    if (Math.abs(box(j).top - from.top) < 4) continue;
    if (best !== i && Math.abs(box(j).top - box(best).top) > 4) break;
    const nearer = Math.abs(box(j).left - from.left) < Math.abs(box(best).left - from.left);
    if (best === i || nearer) best = j;
  }
  return best;
}

const moves = {
  ArrowLeft: i => i - 1, ArrowRight: i => i + 1, Home: () => 0, End: () => tokens.length - 1,
  ArrowUp: i => line(i, -1), ArrowDown: i => line(i, 1),
};

text.setAttribute("role", "listbox");
text.ariaLabel = "Tokens of the text";
for (const token of tokens) {
  token.tabIndex = -1;
  token.setAttribute("role", "option");
}
tokens[0].tabIndex = 0;
text.addEventListener("focusin", event => select(tokens.indexOf(event.target)));
text.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || !moves[event.key]) return;
  event.preventDefault();
  tokens[moves[event.key](current)]?.focus();
});
text.addEventListener("pointermove", event => {  // not pointerover: scrolling is no pointing
  const token = event.target.closest("#text > span");
  if (token && token !== tokens[shown]) show(tokens.indexOf(token));
});
text.addEventListener("pointerleave", () => {
  if (tokens[current] === document.activeElement) show(current);
});
document.getElementById(location.hash.slice(1))?.focus();
"""
