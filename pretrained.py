"""What thoughts bring a pretrained model, against as much training without them.

    python pretrained.py --checkpoint SmolLM2 --data maths.txt train.jsonl --out runs/smollm2 \\
        --gsm8k test.jsonl --csqa dev.jsonl -- --steps 200 --positions 64

The last tenth of every text is held out. Quiet-STaR (OUT/thoughts) and a control (OUT/none: the
same steps on the same batches, --thoughts none) train on the rest; options behind -- go to train.py
for both. OUT/report.md compares them with each other and with the model before: loss on held-out
text, the gain by difficulty, twenty thoughts as they came, and scores of eval.py's tasks. Started
again, it continues what was stopped.
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
from model import load_mistral, read_json, write_json, write_text
from sample import DTYPES, describe_thought, execute, load_any, make_parser, pick_device
from thoughts import QuietStar, ThoughtConfig
from tokenizer import Tokenizer, load_tokenizer

HELD_OUT = 10  # one in so many
THOUGHTS = 20  # shown, one in each of the first held-out sequences read


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


def write_documents(path: Path, documents: list[str]) -> None:
    """One document a line, as train.py reads them."""
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    write_text(path, lines)


def check_begun(path: Path, given: dict) -> None:
    """ValueError if the comparison was begun with other settings than those given."""
    if path.exists() and read_json(path) != given:
        raise ValueError(f"{path} has other settings: {read_json(path)}; give another --out")


def training_arguments(out: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """What train.py is called with for Quiet-STaR and for the control, begun or to be continued.

    ValueError for options that it refuses, or that belong to this script.
    """
    own = ("--out", "--resume", "--checkpoint", "--data", "--thoughts", "--device")
    for option in options.training:
        if option.partition("=")[0] in own:
            raise ValueError(f"{option} behind -- is set by this script; leave it out")
    source = ["--checkpoint", options.checkpoint, "--data", str(out / "train.jsonl")]
    control = ["--thoughts", "none", "--policy-weight", "0"]
    calls = {}
    for name, more in (("thoughts", []), ("none", control)):
        begun = (out / name / "settings.json").exists()
        call = ["--resume"] if begun else [*source, *options.training, *more]
        calls[name] = ["--out", str(out / name), *call]
    return calls


def training_settings(arguments: list[str]) -> train.Settings:
    """What train.py makes of its arguments; ValueError for what it refuses."""
    given = vars(train.command_line().parse_args(arguments))
    given.pop("device")
    return train.start_run(given)[0]


# ------------------------------------------------------------------------------------- the report


def show_thoughts(model: QuietStar, tokenizer: Tokenizer, ids: Tensor) -> str:
    """What is thought in the middle of each of the sequences ids [n, T], a line each.

    The last words of the text, the true next token, the thought, w, and log p of the true token
    without and with it.
    """
    j, lines = ids.shape[1] // 2, []
    prediction = model.think_at(ids[:, :j], torch.tensor([j - 1]))
    for row, tokens in enumerate(ids.tolist()):
        text, gain = describe_thought(prediction, (row, 0), tokens[j], tokenizer)
        before, true = tokenizer.spell(tokens[max(j - 8, 0) : j]), tokenizer.spell([tokens[j]])
        lines.append(f"{before!r} -> {true!r}  {text} ({gain:+.3f})")
    return "\n".join(lines)


def section(title: str, text: str) -> str:
    """A title, and a text as a Markdown block under it."""
    return f"{title}\n\n{textwrap.indent(text, '    ')}\n\n"


def text_report(
    checkpoint: str,
    out: Path,
    tokens: data.Tokens,
    count: int,
    device: torch.device,
    settings: train.Settings,
) -> str:
    """Losses on `count` sequences of held-out tokens before and after, by difficulty; thoughts."""
    tokenizer = load_tokenizer(Path(checkpoint))
    context, dtype = settings.context, DTYPES[settings.dtype]  # the same for all that is compared
    count = min(count, len(tokens.ids) // context)
    ids, mask = tokens.batch(0, count, context, 0, device)  # [n, T], drawn from all of them

    def nll(model: QuietStar) -> tuple[Tensor, Tensor]:
        return evaluation.text_nll(model, ids.flatten(), mask.flatten(), context)

    base = load_mistral(checkpoint, dtype, device)
    plain, _ = nll(QuietStar(base, ThoughtConfig(n_thoughts=1, thought_length=0)))
    control, _ = nll(load_any(out / "none" / "quiet_star", device, dtype)[0])
    model, _ = load_any(out / "thoughts" / "quiet_star", device, dtype)
    without, with_thought = nll(model)
    losses = {
        "before": plain,
        "trained on without thoughts": control,
        "Quiet-STaR, no thoughts": without,
        "Quiet-STaR, greedy thoughts": with_thought,
    }
    shown = ids[: min(count, THOUGHTS)]
    return (
        section(
            f"Held-out text, {len(plain)} tokens; loss in nats a token:",
            "\n".join(f"{name:30}{loss.mean():8.4f}" for name, loss in losses.items()),
        )
        + section(
            "By the loss before training, Quiet-STaR without and with thoughts:",
            evaluation.show_text(without, with_thought, by=plain),
        )
        + section(
            "By the loss before training, the control and Quiet-STaR with thoughts:",
            evaluation.show_text(control, with_thought, by=plain),
        )
        + section(
            f"Thoughts in the middle of {len(shown)} of the sequences, as they came:",
            show_thoughts(model, tokenizer, shown),
        )
    )


def task_report(name: str, file: str, checkpoint: str, out: Path, options: list[str]) -> str:
    """What eval.py says of a task, for the model before, the control, and Quiet-STaR."""
    folders = {
        "before": checkpoint,
        "trained on without thoughts": str(out / "none" / "quiet_star"),
        "Quiet-STaR": str(out / "thoughts" / "quiet_star"),
    }
    text = ""
    for label, folder in folders.items():
        results = str(out / name / label.split()[0])
        with redirect_stdout(io.StringIO()) as said:
            evaluation.main(
                ["--model", folder, "--task", name, "--data", file, "--out", results, *options]
            )
        text += section(f"{name}, {label}:", said.getvalue().strip())
    return text


# -------------------------------------------------------------------------------- the command line


def run(options: argparse.Namespace) -> None:
    """Split, train twice, compare."""
    out = Path(options.out)
    for name in ("sequences", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    for file in filter(None, (options.gsm8k, options.csqa)):
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file}")
    given = {name: getattr(options, name) for name in ("checkpoint", "data", "training")}
    check_begun(out / "comparison.json", given)
    known, held_out = split_text(options.data)
    calls = training_arguments(out, options)
    settings, _ = (training_settings(call) for call in calls.values())  # both fail here or not
    tokens = data.tokenize(held_out, load_tokenizer(Path(options.checkpoint)))
    tokens.batch(0, 1, settings.context, 0, torch.device("cpu"))  # fails here if it is too short
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "comparison.json", given)
    write_documents(out / "train.jsonl", known)
    write_documents(out / "held_out.jsonl", held_out)
    device = ["--device", options.device] if options.device else []
    for call in calls.values():
        train.main([*call, *device])
    torch_device = pick_device(options.device)
    text = text_report(options.checkpoint, out, tokens, options.sequences, torch_device, settings)
    more = ["--dtype", settings.dtype, *(["--limit", str(options.limit)] if options.limit else [])]
    for task in ("gsm8k", "csqa"):
        file = getattr(options, task)
        if file:
            text += task_report(task, file, options.checkpoint, out, [*device, *more])
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
