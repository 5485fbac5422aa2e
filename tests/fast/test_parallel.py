"""Two processes do what one does: this file starts itself with torchrun, once, and compares.

Below are the tests, then what two processes do for them.
"""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import random_ids, tiny_mistral, tiny_quiet_star

pytest.importorskip("fast")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

import fast
import train
from model import Mistral, save_mistral
from support import runs
from support.tokenizer import save_byte_tokenizer
from thoughts import QuietStar, load_quiet_star, quiet_star_loss

CASES = [  # tied, checkpointing, micro_batch: every pair of values
    (False, False, None),
    (False, True, 1),
    (True, False, 1),
    (True, True, None),
]
RUN = "--fast --device cpu --steps 4 --save-every 2 --batch-size 4 --context 16 --thought-length 2 "
RUN += "--n-true 2 --positions 6 --lr 1e-3 --mixing-lr 1e-2 --warmup 1 --embedding-scale 1 "
RUN += "--policy-weight 1"
EXACT = {"rel": 1e-6, "abs": 1e-6}


def torchrun(*arguments):
    """Start this file in two processes."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command += [__file__, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | paths, cwd=root, text=True, capture_output=True)


def options(folder):
    return f"{RUN} --checkpoint {folder / 'pretrained'} --data {folder / 'text.txt'}".split()


def metrics(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k not in ("stage", "tokens_per_second")} for line in lines
    ]


class KilledError(Exception):
    pass


def run_and_die(*arguments):
    """A run that is killed in its last step, two steps after its checkpoint."""
    whole, steps = train.batch_gradient, iter(range(4))

    def gradient_or_die(*batch):
        if next(steps) == 3:
            raise KilledError
        return whole(*batch)

    train.batch_gradient = gradient_or_die
    try:
        train.main([*arguments])
    except KilledError:
        return
    finally:
        train.batch_gradient = whole
    raise AssertionError("the run was not killed")


def gradient_of(tied, checkpointing, micro_batch, gradient_of_several=None):
    """Metrics, gradients and thoughts of one batch, some of whose tokens are no targets."""
    mistral = tiny_mistral()
    mistral = Mistral(replace(mistral.config, tie_word_embeddings=tied))
    mistral.load_state_dict(tiny_mistral().state_dict() if not tied else mistral.state_dict())
    model = QuietStar(mistral, tiny_quiet_star().config)
    torch.nn.init.normal_(model.mixing_head[4].weight)
    fast.apply(model, checkpointing=checkpointing)
    ids, mask, thoughts = random_ids(4, 12), torch.ones(4, 12, dtype=torch.bool), []
    mask[0, 3] = mask[2, 7:] = False

    def loss_of(model, ids, targets, positions, counts, generator):
        output = model(ids, positions=positions, target_mask=targets, generator=generator)
        thoughts.append(output.thought_ids)
        return quiet_star_loss(output, model.config, counts)

    gradient, settings = train.batch_gradient, train.Settings(micro_batch=micro_batch, positions=5)
    if gradient_of_several:
        optimizer = torch.optim.AdamW(model.parameters())
        gradient = gradient_of_several(model, optimizer, gradient)
    generator = torch.Generator().manual_seed(7)
    values = gradient(model, loss_of, ids, mask, settings, 2, generator)
    whole = {
        name: p.grad.full_tensor() if gradient_of_several else p.grad
        for name, p in model.named_parameters()
    }
    return dict(values), whole, thoughts, generator.get_state()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of what two processes and one have made, and how the two ended: see work."""
    folder = tmp_path_factory.mktemp("parallel")
    shape = replace(tiny_mistral(V=258).config, num_hidden_layers=1)
    save_mistral(Mistral(shape), folder / "pretrained")
    save_byte_tokenizer(folder / "pretrained")
    (folder / "text.txt").write_text("Two and two is four. " * 20)
    train.main([*options(folder), "--out", str(folder / "one")])
    run_and_die(*options(folder), "--out", str(folder / "one-two"))
    done = torchrun(folder)
    assert all((folder / f"{rank}.json").exists() for rank in "01"), done.stderr
    return folder, done


@pytest.fixture(scope="module")
def folder(done):
    return done[0]


@pytest.fixture(scope="module", params=CASES, ids=str)
def both(request, folder):
    """What gradient_of gives in one process, and in each of two."""
    case = str(request.param)
    return gradient_of(*request.param), *(torch.load(folder / f"{rank}.pt")[case] for rank in "01")


def test_metrics_are_those_of_the_whole_batch(both):
    one, *two = both
    for values, *_ in two:
        assert values == pytest.approx(one[0], **EXACT)


def test_gradients_are_those_of_the_whole_batch(both):
    one, *two = both
    for _, gradients, *_ in two:
        assert gradients.keys() == one[1].keys()
        for name, whole in one[1].items():
            assert (gradients[name] - whole).abs().max() < 1e-6 * (1 + whole.abs().max()), name


def test_thoughts_are_those_of_one_process(both):
    """Every micro-batch is cut in two; afterwards the generators stand where one's does."""
    one, *two = both
    parts = zip(two[0][2], two[1][2], strict=True)
    assert torch.equal(torch.cat([x for part in parts for x in part]), torch.cat(one[2]))
    assert all(torch.equal(generator, one[3]) for *_, generator in two)


@pytest.mark.parametrize("name", ["two", "one-two", "two-one"])
def test_a_run_goes_on_with_another_number_of_processes(folder, name):
    """With the losses, and to the weights, of one process that was never killed."""
    if name == "two-one":
        train.main(["--out", str(folder / name), "--resume", "--device", "cpu"])
    found, expected = metrics(folder / name), metrics(folder / "one")
    assert len(found) == len(expected) == 4
    for line, whole in zip(found, expected, strict=True):
        assert line == pytest.approx(whole, rel=1e-5, abs=1e-5)
    weights, whole = (load_quiet_star(folder / x / "quiet_star") for x in (name, "one"))
    for a, b in zip(weights.parameters(), whole.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4  # a tenth of one step of Adam, which divides noise by it
    states = [
        torch.load(folder / x / "quiet_star" / runs.STATE, weights_only=True) for x in (name, "one")
    ]
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
    assert torch.equal(states[0]["generator"], states[1]["generator"])


@pytest.mark.parametrize("name", ["masters", "no-masters"])
def test_bfloat16_trains_and_goes_on_alone(folder, name):
    """Killed after step 3 of 4, as above; the weights moved, also by steps below their grid."""
    state = torch.load(folder / name / "quiet_star" / runs.STATE, weights_only=True)
    moments = [values["exp_avg"] for values in state["optimizer"]["state"].values()]
    dtype = torch.float32 if name == "masters" else torch.bfloat16
    assert {moment.dtype for moment in moments} == {dtype, torch.float32}  # of the mixing head
    assert sum(moment.numel() for moment in moments) == sum(
        parameter.numel()
        for parameter in load_quiet_star(folder / name / "quiet_star").parameters()
    )
    train.main(["--out", str(folder / name), "--resume", "--device", "cpu"])
    assert [line["step"] for line in metrics(folder / name)] == [1, 2, 3, 4]
    model = load_quiet_star(folder / name / "quiet_star")
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    for line, whole in zip(metrics(folder / name), metrics(folder / "one"), strict=True):
        assert line["talk_nll"] == pytest.approx(whole["talk_nll"], rel=0.02)


def test_what_is_wrong_is_told_once(folder):
    """At once by the first process. The other waits; torchrun ends it meanwhile, as below.

    A RuntimeError waits longer.
    """
    line = "train.py: error: batch_size is 3; 2 processes need a multiple of 2\n"
    for rank, waits in enumerate(([0, 5], [5, 10])):
        told = json.loads((folder / f"{rank}.json").read_text())
        assert told == {"code": 2, "slept": waits, "error": line}
    assert not (folder / "odd").exists()


def test_an_error_in_one_process_ends_both(done):
    """The last of what they do."""
    assert done[1].returncode
    error = done[1].stderr
    assert error.count("error: only here\n") == error.count("error:") == 1
    assert "Traceback" not in error.split("only here")[0]


# ------------------------------------------------------------------------ in each of two processes


def work(folder):
    """Gradients, then runs: whole, resumed, to be resumed, in bfloat16; wrong ones at the end."""
    from fast import parallel

    rank = parallel.RANK
    results = {}
    settings = train.Settings(data=("some",), batch_size=2, fast=True)
    parallel.start(settings, "cpu", first=list)
    for case in CASES:
        results[str(case)] = gradient_of(*case, gradient_of_several=parallel.gradient_of)
    torch.save(results, folder / f"{rank}.pt")
    # One meeting does for all runs: gloo cannot meet again in the same place.
    dist.init_process_group = dist.destroy_process_group = lambda **options: None
    train.main([*options(folder), "--out", str(folder / "two")])
    train.main(["--out", str(folder / "one-two"), "--resume", "--device", "cpu"])
    slept, sleep = [], parallel.time.sleep
    parallel.time.sleep = slept.append
    for name, extra in {
        "two-one": "--checkpointing",
        "masters": "--dtype bfloat16",
        "no-masters": "--dtype bfloat16 --no-masters",
    }.items():
        run_and_die(*options(folder), *extra.split(), "--out", str(folder / name))
    slept.clear()
    told = odd_batch(folder) | {"slept": slept}
    with pytest.raises(RuntimeError):
        parallel.together(is_gone)(None)
    (folder / f"{rank}.json").write_text(json.dumps(told))
    parallel.time.sleep = sleep
    fail(folder)


def odd_batch(folder):
    """How train.py, as torchrun starts it, ends with a batch that two cannot share."""
    sys.argv = ["train.py", *options(folder), "--batch-size", "3", "--out", str(folder / "odd")]
    with redirect_stderr(io.StringIO()) as error:
        try:
            runpy.run_path("train.py", run_name="__main__")
        except SystemExit as stopped:
            return {"code": stopped.code, "error": error.getvalue()}


def is_gone(options):
    raise RuntimeError("the other process is gone")


def fail(folder):
    """One process cannot read what the other one reads."""
    from fast import parallel

    def read(files, tokenizer):
        raise ValueError("only here")

    if parallel.RANK:
        train.read_tokens = read
        parallel.time.sleep = lambda seconds: None
    train.main([*options(folder), "--out", str(folder / "fails")])


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
