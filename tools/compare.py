"""What thoughts bring a pretrained model, against as much training without them.

    python -m tools.compare --checkpoint SmolLM2 --data maths.txt train.jsonl --out runs/smollm2 \\
        --gsm8k test.jsonl --csqa dev.jsonl -- --steps 200 --positions 64

The last tenth of every text is held out. Quiet-STaR (OUT/thoughts) and a control (OUT/none: the
same steps on the same batches, with the language-model loss only) train on the rest; options behind
-- are train.py's, for both. OUT/report.md compares them with each other and with the model before:
loss on held-out text, the gain by difficulty, twenty thoughts as they came, and scores of eval.py's
tasks. Started again, it continues what was stopped.
"""

import argparse
import io
import json
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

import data
import eval as evaluation
import train
from data import add_settings, write_text
from model import KVCache
from sample import DTYPES, describe_thought, execute, load, make_parser, pick_device
from thoughts import QuietStar, ThoughtConfig
from tokenizer import Tokenizer, load_tokenizer
from tools.experiments import EXPERIMENTS, same_settings

HELD_OUT = 10  # one in so many
THOUGHTS = 20  # shown, one in each of the first held-out sequences read
RUNS = {"thoughts": EXPERIMENTS["full"], "none": EXPERIMENTS["none"]}  # folder: what is trained
MODELS = ("before", "trained on without thoughts", "Quiet-STaR")  # what is compared


def split_text(files: list[str]) -> tuple[list[str], list[str]]:
    """The documents of the files, and their last tenth, held out.

    Of several documents the last ones, of a single one the last lines.
    """
    known: list[str] = []
    held_out: list[str] = []
    for file in files:
        documents = data.read_documents([file])
        single = len(documents) == 1
        parts = documents[0].splitlines(keepends=True) if single else documents
        cut = len(parts) - len(parts) // HELD_OUT
        for side, part in ((known, parts[:cut]), (held_out, parts[cut:])):
            side += ["".join(part)] if single else part
    if not any(held_out):
        raise ValueError(
            f"{', '.join(files)}: fewer than {HELD_OUT} lines; nothing can be held out"
        )
    return known, held_out


def training_options(arguments: list[str]) -> dict:
    """Options of train.py as make_settings takes them; ValueError for those that are set here."""
    parser, own = make_parser(None), ("out", "resume", "device", "checkpoint", "data")
    for name in own[:3]:
        parser.add_argument(f"--{name}", nargs="?", default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=train.PRESETS, default=argparse.SUPPRESS)
    add_settings(parser, train.Settings, {})
    add_settings(parser, ThoughtConfig, {})
    given = vars(parser.parse_args(arguments))
    for name in own:
        if name in given:
            raise ValueError(f"--{name} behind -- is set by this script; leave it out")
    return train.PRESETS.get(given.pop("preset", None), {}) | given


# ------------------------------------------------------------------------------------- the report


@torch.no_grad()
def show_thoughts(model: QuietStar, tokenizer: Tokenizer, ids: Tensor) -> str:
    """What is thought in the middle of each of the sequences ids [n, T], a line each.

    The last words of the text, the true next token, the thought, w, and log p of the true token
    without and with it.
    """
    j, cache, lines = ids.shape[1] // 2, KVCache(model.model.config), []
    model.model.run(model.model.embed_tokens(ids[:, : j - 1]), cache)
    prediction = model.think_last(ids[:, j - 1], cache)
    for row, tokens in enumerate(ids.tolist()):
        text, _ = describe_thought(prediction, row, tokens[j], tokenizer)
        before, true = tokenizer.spell(tokens[max(j - 8, 0) : j]), tokenizer.spell([tokens[j]])
        lines.append(f"{before!r} -> {true!r}  {text}")
    return "\n".join(lines)


def text_report(
    folders: list[Path], ids: Tensor, mask: Tensor, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Losses of the models before, of the control and of Quiet-STaR on held-out text, and thoughts.

    ids, target mask [n, T]; dtype of all computation. Returns the titles and texts of a report.
    """

    def nll(model: QuietStar) -> tuple[Tensor, Tensor]:
        return evaluation.text_nll(model, ids.flatten(), mask.flatten(), ids.shape[1])

    base, tokenizer = load(folders[0], device, dtype)
    if not isinstance(base, QuietStar):
        base = QuietStar(base, ThoughtConfig(n_thoughts=1, thought_length=0))
    plain, _ = nll(base)
    control, _ = nll(load(folders[1], device, dtype)[0])
    model, _ = load(folders[2], device, dtype)
    without, with_thought = nll(model)
    losses = {
        "before": plain,
        "trained on without thoughts": control,
        "Quiet-STaR, no thoughts": without,
        "Quiet-STaR, greedy thoughts": with_thought,
    }
    shown, by = ids[:THOUGHTS], "By the loss before training,"
    return {
        f"Held-out text, {len(plain)} tokens; loss in nats a token:": "\n".join(
            f"{name:30}{loss.mean():8.4f}" for name, loss in losses.items()
        ),
        f"{by} Quiet-STaR without and with thoughts:": evaluation.show_text(
            without, with_thought, by=plain
        ),
        f"{by} the control and Quiet-STaR with thoughts:": evaluation.show_text(
            control, with_thought, by=plain
        ),
        f"Thoughts in the middle of {len(shown)} of the sequences, as they came:": show_thoughts(
            model, tokenizer, shown
        ),
    }


def task_report(task: str, file: str, folders: list[Path], out: Path, more: list[str]) -> dict:
    """What eval.py says of a task, with `more` options, for each model: titles and texts."""
    texts = {}
    for label, folder in zip(MODELS, folders, strict=True):
        results = out / task / f"{label.split()[0]}.jsonl"
        files = ["--model", str(folder), "--task", task, "--data", file, "--out", str(results)]
        with redirect_stdout(io.StringIO()) as said:
            evaluation.main([*files, *more])
        texts[f"{task}, {label}:"] = said.getvalue().strip()
    return texts


# -------------------------------------------------------------------------------- the command line


def prepare(options: argparse.Namespace, out: Path) -> tuple[dict, data.Tokens]:
    """Options of train.py for both runs, and the held-out tokens.

    Both sides of the text are written. What cannot work fails here, with a ValueError.
    """
    for name in ("sequences", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    for file in filter(None, (options.gsm8k, options.csqa)):
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file}")
    training = training_options(options.training)
    training |= {"checkpoint": options.checkpoint, "data": [out / "train.jsonl"]}
    settings, _ = train.make_settings(training)
    for name in RUNS:
        same_settings(out / name / "settings.json", training)
    known, held_out = split_text(options.data)
    tokens = data.tokenize(held_out, load_tokenizer(options.checkpoint))
    tokens.batch(0, 1, settings.context, 0, torch.device("cpu"))  # fails here if it is too short
    out.mkdir(parents=True, exist_ok=True)
    for path, documents in ((out / "train.jsonl", known), (out / "held_out.jsonl", held_out)):
        text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        if not path.exists():
            write_text(path, text)
        elif data.read_utf8(path) != text:
            raise ValueError(f"{path} is of other --data than {options.data}; give another --out")
    return training, tokens


def run(options: argparse.Namespace) -> None:
    """Split, train twice, compare."""
    out, device = Path(options.out), pick_device(options.device)
    training, tokens = prepare(options, out)
    settings, thoughts = train.make_settings(training)
    for name, experiment in RUNS.items():
        print(f"run {out / name} on {device}")
        train.train_thoughts(settings, thoughts, out / name, device, experiment.loss)
    trained = [out / name / "quiet_star" for name in ("none", "thoughts")]
    folders = [Path(options.checkpoint), *trained]  # of MODELS
    count = min(options.sequences, len(tokens.ids) // settings.context)
    ids, mask = tokens.batch(0, count, settings.context, 0, device)  # [n, T], drawn from all
    report = text_report(folders, ids, mask, device, DTYPES[settings.dtype])
    more = ["--dtype", settings.dtype, "--device", str(device)]
    more += ["--limit", str(options.limit)] if options.limit else []
    for task in ("gsm8k", "csqa"):
        if file := getattr(options, task):
            report |= task_report(task, file, folders, out, more)
    text = "".join(f"{t}\n\n{textwrap.indent(x, '    ')}\n\n" for t, x in report.items())
    write_text(out / "report.md", text)
    print(text, end="")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="a pretrained model")
    add("--data", required=True, nargs="+", metavar="FILE", help="text to train on and hold out")
    add("--out", required=True, metavar="FOLDER", help="folder of the comparison")
    add("--gsm8k", metavar="FILE", help="GSM8K's test questions, to be answered before and after")
    add("--csqa", metavar="FILE", help="CommonsenseQA's questions, likewise")
    add("--limit", type=int, metavar="N", help="of these, the first N only; none: all")
    add("--sequences", type=int, default=200, help="of held-out text to read (200)")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add("training", nargs="*", metavar="-- ...", help="options of train.py")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
