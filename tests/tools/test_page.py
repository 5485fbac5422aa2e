"""The page of thoughts: its records against thinking slowly, and the contents of the HTML."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from test_prepare import InPlace
from tiny import random_ids, think_slowly, tiny_quiet_star

from model import save_mistral
from support.text import Tokens
from support.tokenizer import save_byte_tokenizer
from thoughts import ThoughtConfig, save_quiet_star
from tools import page, prepare
from tools.page import Record, Thought, extremes, read_thoughts, render, visible

HTML = Path(page.__file__).with_name("page.html").read_text(encoding="utf-8")


class Numbers:
    """A tokenizer that spells ids as their numbers: thoughts can be read back."""

    @staticmethod
    def spell(ids):
        return " ".join(map(str, ids))


def read(model, ids, context, is_target=None, seed=0):
    """The records of a text ids [T]."""
    is_target = torch.ones_like(ids, dtype=torch.bool) if is_target is None else is_target
    generator = torch.Generator().manual_seed(seed)
    return list(read_thoughts(model, Numbers, Tokens(ids, is_target), context, generator))


# ------------------------------------------------------------------------------------- the records


def check_record(record, model, sequence, j):
    """A record against the plain model and against each of its thoughts had the slow way."""
    assert record.text == str(int(sequence[j]))
    base = torch.log_softmax(model.model(sequence[None])[0, j], -1)[sequence[j + 1]]
    assert abs(record.logp - base) < 1e-5
    slow = [
        think_slowly(model, sequence, j, list(map(int, thought.text.split())))
        for thought in record.thoughts
    ]
    totals = [-sum(map(float, s["nll"])) for s in slow]
    for thought, s, total in zip(record.thoughts, slow, totals, strict=True):
        assert abs(thought.logp + s["nll"][0]) < 1e-5
        assert abs(thought.weight - s["weight"][0]) < 1e-5
        if len(s["nll"]) == model.config.n_true:
            assert abs(thought.reward - (total - sum(totals) / len(totals))) < 1e-5
        else:
            assert thought.reward is None


# Where sequences begin and how many of their positions think: a text of 11 tokens, A = 2.
@pytest.mark.parametrize(
    ("context", "sequences"),
    [(99, [(0, 10)]), (11, [(0, 10)]), (10, [(0, 8), (8, 2)]), (5, [(0, 3), (3, 3), (6, 4)])],
)
@torch.no_grad()
def test_records_equal_thinking_slowly(context, sequences):
    model, ids = tiny_quiet_star(), random_ids(1, 11)[0]
    records = read(model, ids, context)
    assert [record.text for record in records] == [str(int(token)) for token in ids]
    assert sum(thinking for _, thinking in sequences) == 10
    for start, thinking in sequences:
        for j in range(thinking):
            check_record(records[start + j], model, ids[start : start + context], j)
    assert records[10] == Record(str(int(ids[10])), None, [])
    with_reward = [all(t.reward is not None for t in record.thoughts) for record in records[:10]]
    assert with_reward == [True] * 9 + [False]  # the last position has one target, not two


def test_thoughts_are_the_models_own_and_a_seed_repeats_them():
    model, ids = tiny_quiet_star(), random_ids(1, 8)[0]
    output = model(ids[None], positions=torch.arange(7), generator=torch.Generator().manual_seed(5))
    records = read(model, ids, 8, seed=5)
    for j, record in enumerate(records[:7]):
        spelled = [Numbers.spell(thought.tolist()) for thought in output.thought_ids[0, :, j]]
        assert [thought.text for thought in record.thoughts] == spelled
    assert read(model, ids, 8, seed=5) == records
    assert read(model, ids, 8, seed=6) != records


def test_nothing_is_predicted_across_documents():
    model, ids = tiny_quiet_star(), random_ids(1, 7)[0]
    is_target = torch.tensor([False, True, True, True, False, True, True])
    records = read(model, ids, 7, is_target)
    assert [record.logp is None for record in records] == [False] * 3 + [True, False, False, True]
    assert [len(record.thoughts) for record in records] == [3, 3, 3, 0, 3, 3, 0]
    rewarded = [[t.reward is not None for t in record.thoughts] for record in records]
    assert rewarded == [[True] * 3, [True] * 3, [False] * 3, [], [True] * 3, [False] * 3, []]


def test_context_needs_room_for_the_targets():
    with pytest.raises(ValueError, match="context is 2; it must be at least 3"):
        read(tiny_quiet_star(), random_ids(1, 7)[0], 2)


# ------------------------------------------------------------------------------------- the summary


def record(text, *gains):
    """A record whose next token has log p -2 without a thought."""
    return Record(text, -2.0, [Thought(f"{text}{g}", 0.5, 0.75, g - 2.0) for g in gains])


LAST = Record("end", None, [])


def test_colors_by_hand():
    gains = [None, 0.0, 0.02, 0.03, 0.1, 0.25, 0.3, 1.0, 9.0, -0.02, -0.03, -0.5, -1.0]
    names = ["", "", "", *("raised" + size for size in "122344"), "", "lowered1", "lowered3"]
    expected = [f' class="{name}"' if name else "" for name in [*names, "lowered4"]]
    assert [page.color_class(gain) for gain in gains] == expected


def test_the_color_is_the_mean_of_the_next_tokens_gains():
    assert abs(record("a", 0.5, -0.25).mean_gain() - 0.125) < 1e-12
    assert LAST.mean_gain() is None


def test_extremes_by_hand():
    """One thought of a token in each list, in order, and only those that raise or lower."""
    records = [record("a", 0.5, 0.75), record("b", -0.5, 1.5), record("c", -1.0, -0.25), LAST]
    strongest, worst = extremes(records, 1), extremes(records, -1)
    assert [(i, thought.text) for i, thought in strongest] == [(1, "b1.5"), (0, "a0.75")]
    assert [(i, thought.text) for i, thought in worst] == [(2, "c-1.0"), (1, "b-0.5")]
    many = [record(str(i), i / 8) for i in range(1, 10)]
    assert [i for i, _ in extremes(many, 1)] == [8, 7, 6, 5, 4]
    assert extremes(many, -1) == []


def test_figures_by_hand():
    """Means over tokens of log p and gain; 0.02 is neither raised nor lowered."""
    records = [record("a", 0.5, 1.5), record("b", 0.02), record("c", -0.5), LAST]
    values = re.findall(r"<dd>(.*?)</dd>", draw(records))
    change = f"{(1.0 + 0.02 - 0.5) / 3:+.3f}"
    shown = [re.sub("<.*?>", "", value).replace("−", "-") for value in values]
    assert shown == ["3", "-2.000", f"{-2 + float(change):+.3f}", change, "33.3 %", "33.3 %"]
    with pytest.raises(ValueError, match="nothing to predict"):
        draw([LAST])


def test_distribution_by_hand():
    """A row for each colour: tokens with it, their share, the sum of their gains."""
    gains = (-1.0, -0.5, 0.0, 1 / 64, -1 / 128, 0.125, 1.5, 2.0)
    drawn = draw([*(record(str(gain), gain) for gain in gains), LAST])
    table = re.search(r"<table>(.*?)</table>", drawn, re.DOTALL)[1].split("\n")[2:-1]
    rows = [[cell for cell in re.split("<[^<]*>", row) if cell] for row in table]
    assert rows == [
        ["up to −1", "1", "12.5 %", "−1.000"],
        ["−1 .. −0.3", "1", "12.5 %", "−0.500"],
        ["−0.3 .. −0.1", "0", "0.0 %", "+0.000"],
        ["−0.1 .. −0.03", "0", "0.0 %", "+0.000"],
        ["−0.03 .. +0.03", "3", "37.5 %", "+0.008"],
        ["+0.03 .. +0.1", "0", "0.0 %", "+0.000"],
        ["+0.1 .. +0.3", "1", "12.5 %", "+0.125"],
        ["+0.3 .. +1", "0", "0.0 %", "+0.000"],
        ["+1 or more", "2", "25.0 %", "+3.500"],
    ]
    colors = [f"lowered{n}" for n in (4, 3, 2, 1)] + [None] + [f"raised{n}" for n in (1, 2, 3, 4)]
    for row, color, share in zip(table, colors, [r[2] for r in rows], strict=True):
        bar = re.search(r'<div(?: class="(\w+)")? style="width: (\d+\.\d)\d%">', row)
        assert (bar[1], f"{bar[2]} %") == (color, share)


# ---------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a browser would make of the HTML: elements, the tokens, and the records."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tokens, self.classes, self.ids = [], [], [], []
        self.json, self.said, self.depth, self.inside = "", "", 0, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.inside = attributes.get("id") if tag == "script" else None
        if tag == "span":  # only tokens are spans
            self.tokens.append("")
            self.classes.append(attributes.get("class"))
            self.ids.append(attributes.get("id"))
            self.depth += 1

    def handle_endtag(self, tag):
        self.inside = None
        self.depth -= tag == "span"

    def handle_data(self, data):
        if self.inside == "records":
            self.json += data
        elif self.depth:
            self.tokens[-1] += data
        else:
            self.said += data


def draw(records, title="title", **config):
    return render(records, title, ThoughtConfig(**config), seed=0, context=9)


NASTY = [
    "<script>alert(1)</script>",
    "</script>",
    "<!--",
    "&amp;",
    "\"'>",
    "a b\n",
    "\t",
    "\\n",
    "—é",
    "$title${records}$$",
]


def test_text_and_thoughts_are_escaped():
    """Whatever a text or thought says is text: no element more, and every character kept."""
    harmless = Page(draw([record("x", 0.5) for _ in NASTY] + [LAST]))
    records = [Record(n, -2.0, [Thought(n, 0.0, 0.9, -1.5)]) for n in NASTY] + [LAST]
    found = Page(draw(records, title=NASTY[0]))
    blanks = len("".join(NASTY)) - len(re.sub(r"\s", "", "".join(NASTY)))
    marks = found.tags.count("i") + found.tags.count("b")
    assert marks == blanks == 3
    assert sorted(found.tags) == sorted([*harmless.tags, "i", "i", "b"])
    assert found.tokens == [*NASTY, "end"]
    assert [row[1][0][0] for row in json.loads(found.json)[:-1]] == NASTY
    assert found.said.count(NASTY[0]) == 3  # title, heading, thought in the summary


def test_a_name_of_the_template_in_a_text_stays_as_it_is():
    drawn = draw([Record("$title", -2.0, [Thought("$records", 0.0, 1.0, -1.5)]), LAST], "$tokens")
    found = Page(drawn)
    assert found.tokens[0] == "$title"
    assert json.loads(found.json)[0][1][0][0] == "$records"
    assert found.said.count("$tokens") == 2  # title, heading
    names = set(re.findall(r"\$(\w+)", HTML))
    assert set(re.findall(r"\$(\w+)", drawn)) & names == {"title", "records", "tokens"}


def test_what_cannot_be_seen_is_spelled_out():
    text = "\x00\r\x1b\u2028\u202e\u200b\ufeff\xa0"
    assert visible(text) == r"\x00\r\x1b\u2028\u202e\u200b\ufeff\xa0"
    assert visible("a\n\t é—日🙂") == "a\n\t é—日🙂"
    found = Page(drawn := draw([Record(text, -2.0, [Thought(text, 0.0, 1.0, -1.5)]), LAST]))
    assert found.tokens[0] == json.loads(found.json)[0][1][0][0] == visible(text)
    assert not set(text) & set(drawn)


def test_tokens_in_order_with_colors_records_and_links():
    records = [record("12", 0.5, 1.5), record(" a", 0.0), record("\n", -0.02, -0.1), LAST]
    found = Page(draw(records))
    assert found.tokens == ["12", " a", "\n", "end"]
    assert found.classes == ["raised4", None, "lowered1", None]
    assert found.ids == ["t0", None, "t2", None]  # those in the summary
    rows = json.loads(found.json)
    assert rows[0] == [-2.0, [["120.5", 0.5, 0.75, -1.5], ["121.5", 0.5, 0.75, -0.5]]]
    assert rows[3] == [None, []]


def test_the_summary_shows_the_extremes_with_their_numbers():
    drawn = draw([record("1", 0.0), record("=", 1.5, -0.75), Record("\n", None, [])])
    strongest, worst = re.findall(r"<ol>(.*?)</ol>", drawn, re.DOTALL)
    for item, gain in ((strongest, "+1.500"), (worst, "−0.750")):
        said = re.sub("<.*?>", "", item)
        thought = gain.replace("−", "-").strip("+0")
        assert f"{gain} after 1= thought ={float(thought)}, next ↵w 0.750, reward +0.500" == said
        assert 'href="#t1"' in item


@pytest.mark.parametrize(("weight", "heard"), [(1.0, False), (0.99, True)])
def test_thoughts_that_are_not_heard_are_named_so(weight, heard):
    """At w = 1 everywhere a change is rounding only, and no thought is among the strongest."""
    thoughts = [Thought("t", 0.0, 1.0, -2.0 + 1e-7), Thought("t", 0.0, weight, -2.0 - 1e-7)]
    drawn = draw([Record("x", -2.0, thoughts), LAST])
    assert ("thoughts are not heard yet" in drawn) != heard
    assert drawn.count("<li>none</li>") == (0 if heard else 2)
    assert ('class="figures"' in drawn) and (">+0.000</em>" in drawn) == heard


def test_the_page_needs_nothing_else():
    drawn = draw([record("x", 0.5), LAST])
    assert not re.search(r"src=|<link|@import|url\(|https?:|fetch|import\(", drawn)


def test_the_legend_has_the_colors_of_all_levels():
    """From the most lowered to the most raised: each bound in the colour that begins there."""
    shades = re.findall(r'<li class="(\w+)">(.*?)</li>', HTML)
    assert [float(shade.replace("−", "-")) for _, shade in shades] == [
        *(-bound for bound in reversed(page.BOUNDS)),
        *page.BOUNDS,
    ]
    for name, shade in shades:
        assert page.color_class(float(shade.replace("−", "-"))) == f' class="{name}"'
    assert f"raised by\n{page.BOUNDS[2]} or more" in HTML  # where the underlined ones begin


def luminance(color):
    """Relative luminance of "#rrggbb" (WCAG 2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast(scheme):
    """WCAG AA, 4.5 to 1: the text on every colour, grey text and links where there is none."""
    block = re.findall(r":root \{(.*?)\}", HTML, re.DOTALL)[scheme]  # light, dark
    colors = dict(re.findall(r"--(\w+): (#\w{6})", block))

    def contrast(one, other):
        dark, light = sorted(luminance(colors[name]) for name in (one, other))
        return (light + 0.05) / (dark + 0.05)

    shades = [f"{way}{size}" for way in ("raised", "lowered") for size in range(1, 5)]
    for ground in ("page", "card", *shades):
        assert contrast("ink", ground) >= 4.5, ground
    for ground in ("page", "card"):
        assert contrast("soft", ground) >= 4.5
        assert contrast("link", ground) >= 4.5


# ------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain and a thinking checkpoint over the byte tokenizer."""
    plain, thinking = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("thinking")
    model = tiny_quiet_star(V=258, init_id=257)
    save_mistral(model.model, plain)
    save_quiet_star(model, thinking)
    for folder in (plain, thinking):
        save_byte_tokenizer(folder)
    return plain, thinking


def test_page_of_a_text(folders, tmp_path):
    """One span for each token of the file, the same page for the same seed."""
    text, first, second = (tmp_path / name for name in ("text.txt", "1.html", "2.html"))
    text.write_text("12=0\n12=é", encoding="utf-8")
    for file in (first, second):
        options = ["--text", str(text), "--html", str(file), "--context", "6", "--device", "cpu"]
        page.main(["--model", str(folders[1]), *options])
    drawn = first.read_text(encoding="utf-8")
    assert drawn == second.read_text(encoding="utf-8")
    assert drawn.count("<span") == 10
    assert r"\xc3</span>" in drawn  # a byte of é, which is no character
    assert "seed 0" in drawn
    assert "sequences of 6 tokens" in drawn


def test_a_prepared_folder_has_the_page_of_its_text(folders, tmp_path, monkeypatch):
    """But for the title; --max-tokens reads less of both."""
    text, prepared, drawn = tmp_path / "text.txt", tmp_path / "prepared", []
    text.write_text("12=0\n12=é", encoding="utf-8")
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", InPlace)
    files = ["--data", str(text), "--checkpoint", str(folders[1]), "--out", str(prepared)]
    prepare.main(files)
    for source, more in ((text, []), (prepared, []), (prepared, ["--max-tokens", "7"])):
        options = ["--text", str(source), "--html", str(tmp_path / "x.html"), *more]
        page.main(["--model", str(folders[1]), *options, "--context", "6", "--device", "cpu"])
        drawn.append((tmp_path / "x.html").read_text(encoding="utf-8").replace(str(source), ""))
    assert drawn[0] == drawn[1]
    assert drawn[2].count("<span") == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --text, --html"),
        (["--text", "TEXT"], "the following arguments are required: --html"),
        (["--html", "x.html"], "the following arguments are required: --text"),
        (["--text", "TEXT", "--html", "x.html", "--prompt", "x"], "unrecognized arguments"),
        (["--text", "TEXT", "--html", "nowhere/x.html"], "in a folder that exists"),
        (["--text", "TEXT", "--html", "."], "--html is .; it must be a file"),
        (["--text", "TEXT", "--html", "x.html", "--seed", "-1"], "must be a whole number"),
        (["--text", "TEXT", "--html", "x.html", "--context", "1"], "context is 1; it must be"),
        (["--text", "TEXT", "--html", "x.html", "--device", "abacus"], "--device abacus cannot"),
        (["--text", "SHORT", "--html", "x.html"], "nothing to predict"),
        (["--text", "TEXT", "--html", "x.html", "--max-tokens", "1"], "max_tokens is 1; it must"),
        (["--text", "nowhere.txt", "--html", "x.html"], "cannot read nowhere.txt"),
        (["--model", "PLAIN", "--text", "TEXT", "--html", "x.html"], "no thoughts to show"),
    ],
)
def test_bad_page_is_one_line_and_exit_code_2(
    folders, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text("12=0\n")
    (tmp_path / "short.txt").write_text("1")
    names = {"PLAIN": str(folders[0]), "TEXT": "long.txt", "SHORT": "short.txt"}
    given = ["--model", str(folders[1]), "--device", "cpu", *(names.get(o, o) for o in options)]
    with pytest.raises(SystemExit) as stopped:
        page.main(given)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.partition("error: ")[2].count("\n") == 1  # a status line may stand before
    assert not (tmp_path / "x.html").exists()
