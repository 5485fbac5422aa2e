"""Generation, with and without thoughts, against recomputing everything at every step."""

import io
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_ids, think_slowly, tiny_mistral, tiny_quiet_star

import sample
from model import KVCache, Mistral, MistralConfig, save_mistral
from sample import entropy, generate, generate_steps, nucleus
from support import checkpoints, device, terminal
from support.tokenizer import save_byte_tokenizer
from thoughts import save_quiet_star, token_logits


@pytest.mark.parametrize("window", [None, 4])
def test_plain_generation_equals_recomputation(window):
    model, ids = tiny_mistral(window=window), random_ids(2, 5)
    text = generate(model, ids, 6, temperature=0)
    assert torch.equal(text[:, :5], ids)
    for t in range(5, 11):
        assert torch.equal(model(text[:, :t])[:, -1].argmax(-1), text[:, t])


@pytest.mark.parametrize("K", [0, 1, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_thinking_generation_equals_recomputation(K, window):
    """Every step's thought, mixing weight and log p against a thought had the slow way."""
    model = tiny_quiet_star(window=window, thought_length=K, n_true=1, n_thoughts=1)
    ids = random_ids(2, 4)
    steps = list(generate_steps(model, ids, 5, temperature=0))
    text = torch.cat([ids, *(token[:, None] for token, _ in steps)], 1)
    for i, (token, prediction) in enumerate(steps):
        for b in range(2):
            read = text[b, : 4 + i + 1]  # the text so far and the token that was chosen
            slow = think_slowly(model, read, 3 + i, None)
            logp = torch.log_softmax(prediction.logits[b], -1)
            assert prediction.thought_ids[b].tolist() == slow["ids"]
            assert abs(logp[token[b]] + slow["nll"][0]) < 1e-5
            assert abs(prediction.weight[b] - slow["weight"][0]) < 1e-5
            assert token[b] == logp.argmax()
            base = torch.log_softmax(model.model(read[None, :-1])[0, -1], -1)
            without = torch.log_softmax(prediction.base_logits[b], -1)
            assert (without - base).abs().max() < 1e-5


@pytest.mark.parametrize("meta", [{}, {"start_id": 3, "end_id": 4}])
def test_thinking_only_where_the_prediction_is_unsure(meta, monkeypatch):
    """At 0 as ever, at infinity as the plain model; between, by the entropy of each row."""
    model, ids = tiny_quiet_star(**meta), random_ids(2, 6)
    always = generate(model, ids, 8, temperature=0)
    assert torch.equal(generate(model, ids, 8, temperature=0, think_above=0.0), always)
    assert torch.equal(generate(model, ids, 8, temperature=0, think_above=1e-9), always)
    never = generate(model, ids, 8, temperature=0, think_above=float("inf"))
    if not meta:
        assert torch.equal(never, generate(model.model, ids, 8, temperature=0))
    assert not torch.equal(never, always)

    cache, base = KVCache(model.model.config), model.model
    h_init = base.run(base.embed_tokens(ids), cache)[:, -1]
    logits = token_logits(h_init, base.lm_head.weight, model.excluded)
    low, high = entropy(logits).sort().values.tolist()
    [(_, prediction)] = generate_steps(model, ids, 1, temperature=0, think_above=high + 1e-4)
    assert prediction is None
    cache.truncate(5)
    mixed, prediction = sample.predict(model, ids[:, -1], cache, (low + high) / 2)
    thinks = entropy(logits) > (low + high) / 2
    assert thinks.sum() == 1
    assert torch.allclose(mixed[thinks], prediction.logits[thinks])
    assert torch.allclose(mixed[~thinks], logits[~thinks], atol=1e-5)
    assert cache.length == 6
    monkeypatch.setattr(sample, "entropy", lambda _: torch.tensor([1.0, 2.0]))
    cache.truncate(5)
    mixed, prediction = sample.predict(model, ids[:, -1], cache, 2.0)  # as unsure as is asked for
    assert torch.allclose(mixed, torch.stack([logits[0], prediction.logits[1]]), atol=1e-5)
    with pytest.raises(ValueError, match="think_above is -1"):
        generate(model, ids, 1, think_above=-1.0)


def test_logits_without_a_thought_are_float32_for_bfloat16_weights():
    """The head is evaluated in float32, as it is for logits with a thought."""
    model, ids = tiny_quiet_star().bfloat16(), random_ids(2, 6)
    logits, _ = sample.predict(model, ids[:, -1], sample.read_ids(model, ids[:, :-1]), 1e9)
    assert (logits.bfloat16() != logits).any()


def test_entropy_by_hand():
    assert entropy(torch.zeros(5)).item() == pytest.approx(1.6094379)
    assert entropy(torch.tensor([100.0, 0.0])).item() == pytest.approx(0, abs=1e-6)


def test_the_cache_never_holds_a_thought():
    """After a thinking step it holds what reading the text alone would have put there."""
    model, ids = tiny_quiet_star(), random_ids(2, 5)
    thinking, plain = KVCache(model.model.config), KVCache(model.model.config)
    model.model(ids[:, :4], thinking)
    model.think_last(ids[:, 4], thinking)
    model.model(ids, plain)
    assert thinking.length == plain.length == 5
    for there, expected in zip(thinking.layers, plain.layers, strict=True):
        for a, b in zip(there, expected, strict=True):
            assert (a - b).abs().max() < 1e-6


def test_greedy_samples_of_one_prompt_are_equal():
    model, ids = tiny_quiet_star(), random_ids(1, 5)
    together = generate(model, ids.expand(3, 5), 4, temperature=0)
    assert torch.equal(together, generate(model, ids, 4, temperature=0).expand(3, 9))


def test_a_seed_repeats_and_another_does_not():
    model, ids = tiny_mistral(), random_ids(1, 3)

    def run(seed):
        return generate(model, ids, 20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.6)])
def test_sampling_follows_temperature_and_nucleus(temperature, top_p):
    """How often each token follows a prompt in 20,000 samples, against its probability."""
    model, ids = tiny_mistral(V=5), random_ids(1, 3, 5)
    generator = torch.Generator().manual_seed(0)
    how = {"temperature": temperature, "top_p": top_p, "generator": generator}
    drawn = generate(model, ids.expand(20000, 3), 1, **how)[:, -1]
    logits = model(ids)[0, -1:].detach() / temperature
    expected = torch.softmax(nucleus(logits, top_p), -1)[0]
    shares = torch.bincount(drawn, minlength=5) / 20000
    assert (shares - expected).abs().max() < 0.018  # five standard deviations


def test_nucleus_by_hand():
    """Probabilities 0.5, 0.3, 0.15, 0.05: 0.79 needs two tokens, 0.81 three."""
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    kept = [nucleus(logits, p)[0].isfinite().tolist() for p in (0.01, 0.79, 0.81, 1.0)]
    assert kept == [
        [False, True, False, False],
        [False, True, False, True],
        [False, True, True, True],
        [True, True, True, True],
    ]
    assert nucleus(torch.zeros(1, 2), 0.5).isfinite().sum() == 1  # one token reaches it exactly


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 1e-40}, "temperature is 1e-40; it must be 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"think_above": math.nan}, "think_above is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
    ],
)
def test_bad_settings(arguments, message):
    given = {"ids": random_ids(1, 3), "max_new_tokens": 2} | arguments
    with pytest.raises(ValueError, match=message):
        generate(tiny_mistral(), **given)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("thinking", [False, True])
def test_logits_that_are_not_finite(temperature, value, thinking):
    """Broken weights are an error, not a text of token 0."""
    model = tiny_quiet_star() if thinking else tiny_mistral()
    torch.nn.init.constant_(
        model.get_parameter("model.norm.weight" if thinking else "norm.weight"), value
    )
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, random_ids(1, 3), 1, temperature=temperature)


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


def test_command_line(folders, capsys):
    plain, thinking = map(str, folders)
    sample.main(["--model", plain, "--prompt", "12=", "--greedy", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("12=")
    options = ["--prompt", "12=", "--samples", "2", "--max-new-tokens", "3", "--show-thoughts"]
    sample.main(["--model", thinking, *options, "--device", "cpu"])
    lines = capsys.readouterr().out.split("\n")
    shown = [line for line in lines if " thought " in line]
    assert len(shown) == 6
    assert all("log p" in line and " w " in line for line in shown)


def test_prompts_with_one_load(folders, capsys, monkeypatch):
    """Every prompt is continued as if it were alone; the speed is printed once, for all."""
    load, loads = sample.load, []
    monkeypatch.setattr(sample, "load", lambda *given: loads.append(given) or load(*given))

    def texts(*prompts):
        options = ["--samples", "2", "--max-new-tokens", "4", "--device", "cpu"]
        sample.main(["--model", str(folders[1]), *options, "--prompt", *prompts])
        return capsys.readouterr()

    first, second, both = texts("12="), texts("One", "12="), texts("12=", "One")
    assert len(loads) == 3
    assert both.out.startswith(first.out)
    assert both.out.removeprefix(first.out) == second.out.removesuffix(first.out) != ""
    number, speed = re.fullmatch(r"(\d+) tokens, (\d+\.\d) tokens/s\n", both.err).groups()
    assert 0 < int(number) <= 16
    assert float(speed) > 0


def test_speed_counts_the_tokens_that_were_written(folders, capsys, monkeypatch):
    """Five tokens in two seconds; an embedding without a token is not written."""

    def steps(*_, **__):
        yield from (
            (torch.tensor(pair), None) for pair in ([65, 66], [67, 68], [258, 69], [0, 258])
        )

    times = iter([3.0, 5.0])
    monkeypatch.setattr(sample, "generate_steps", steps)
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(times))
    options = ["--model", str(folders[0]), "--prompt", "x", "--samples", "2", "--device", "cpu"]
    sample.main(options)
    assert capsys.readouterr() == ("xAC\nxBDE\n", "5 tokens, 2.5 tokens/s\n")


def test_a_prompt_from_a_file_or_standard_input(folders, tmp_path, capsys, monkeypatch):
    """The whole text, without the line break at its end."""
    options = ["--model", str(folders[0]), "--greedy", "--device", "cpu"]
    sample.main([*options, "--prompt", "\n12=0\n2—="])
    expected = capsys.readouterr().out
    (tmp_path / "prompt.txt").write_text("\n12=0\n2—=\n", encoding="utf-8")
    for file in (str(tmp_path / "prompt.txt"), "-"):
        typed = io.BytesIO("\n12=0\n2—=\n".encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, "ascii", "surrogateescape"))
        sample.main([*options, "--prompt-file", file])
        assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    for wrong, message in (
        (["--prompt-file", "-"], "cannot read standard input as UTF-8 text"),
        (["--prompt-file", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--prompt-file", "-", "--prompt", "x"], "not allowed with argument --prompt-file"),
        ([], "one of the arguments --prompt --prompt-file is required"),
    ):
        with pytest.raises(SystemExit) as stopped:
            sample.main([*options, *wrong])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_options_of_sampling_are_heard(folders, capsys):
    """Greedy text has no seed; sampled text has; a small --top-p is greedy again."""

    def text(*options):
        sample.main(["--model", str(folders[1]), "--prompt", "12=", "--device", "cpu", *options])
        return capsys.readouterr().out

    greedy = text("--greedy")
    assert greedy == text("--greedy", "--seed", "1") == text("--temperature", "0")
    assert greedy == text("--top-p", "1e-9", "--seed", "2")
    assert text() != text("--seed", "1")
    assert text("--show-thoughts", "--think-above", "1e9").count("  no thought\n") == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "nowhere"], "nowhere is not a checkpoint"),
        (["--prompt", ""], "at least one token"),
        (["--top-p", "2"], "top_p is 2.0"),
        (["--show-thoughts"], "no thoughts to show"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--seed", "-1"], "--seed a whole number from 0"),
        (["--device", "abacus"], "--device abacus cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folders, capsys, change, message):
    options = ["--model", str(folders[0]), "--prompt", "x", "--device", "cpu", *change]
    with pytest.raises(SystemExit) as stopped:
        sample.main(options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_thought_is_described_by_hand(folders):
    """The second of two sequences, for token 1: log 1/4 without, log 1/2 with its thought."""
    p = torch.full((2, 258), 1e-9)
    without, with_thought = p.clone(), p.clone()
    without[1, :4], with_thought[1, 1:3] = 1 / 4, 1 / 2
    ids = torch.tensor([list(b"no"), list(b"ye")])
    weight = torch.tensor([0.125, 0.75])
    prediction = sample.Prediction(with_thought.log(), without.log(), ids, weight)
    _, tokenizer = checkpoints.load(folders[1], torch.device("cpu"))
    text, gain = sample.describe_thought(prediction, 1, 1, tokenizer)
    assert text == "thought 'ye'  w 0.750  log p -1.386 -> -0.693 (+0.693)"
    assert abs(gain - 0.6931) < 1e-3


def test_colors_are_for_terminals(monkeypatch):
    """Blue where a thought raised log p, orange where it lowered it, plain below 0.03 nats."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert terminal.paint("x", 0.1) == "\x1b[38;5;33mx\x1b[0m"
    assert terminal.paint("x", -0.1) == "\x1b[38;5;208mx\x1b[0m"
    assert terminal.paint("x", 0.02) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.paint("x", 0.1) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert terminal.paint("x", 0.1) == "x"


@pytest.mark.parametrize(
    ("kept", "asked", "share", "taken"),
    [
        (torch.bfloat16, None, 1.2, torch.float32),
        (torch.bfloat16, None, 0.6, torch.bfloat16),
        (torch.bfloat16, None, 0.5, None),
        (torch.bfloat16, torch.float32, 0.6, None),
        (torch.float32, None, 1.2, torch.float32),
        (torch.float32, None, 1.0, None),
        (torch.float32, torch.bfloat16, 0.6, torch.bfloat16),
    ],
)
def test_dtype_on_a_cpu(tmp_path, monkeypatch, capsys, kept, asked, share, taken):
    """By the share of the weights in float32 that is free: a tenth more than the weights is needed.

    One line says it where another dtype is taken, or where none fits.
    """
    model = Mistral(MistralConfig(258, 1000, 3000, 1, 10, 10)).to(kept)
    save_mistral(model, tmp_path)
    save_byte_tokenizer(tmp_path)
    size = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: size * share)
    options = [
        "--model",
        str(tmp_path),
        "--prompt",
        "x",
        "--max-new-tokens",
        "0",
        "--device",
        "cpu",
    ]
    options += ["--dtype", str(asked).removeprefix("torch.")] if asked else []
    if taken is None:
        with pytest.raises(SystemExit):
            sample.main(options)
    else:
        sample.main(options)
        loaded, _ = checkpoints.load(tmp_path, torch.device("cpu"), asked)
        assert loaded.lm_head.weight.dtype == taken
    said = capsys.readouterr().err.replace("0 tokens, 0.0 tokens/s\n", "").splitlines()
    assert len(said) == (1 if taken is None else 2 * (asked is None and taken == torch.bfloat16))
    for line in said:
        assert re.search(r"needs 0\.\d GB in .* and 0\.\d GB of memory are free", line)


def test_a_file_of_several_dtypes_has_that_of_its_largest_tensor(tmp_path, monkeypatch):
    """Of 11 numbers; a tenth more than their 22 bytes in bfloat16 is needed."""
    tensors = {"a": torch.zeros(2), "b": torch.zeros(9, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: 25)
    assert checkpoints.dtype_that_fits(tmp_path, None) == torch.bfloat16
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: 24)
    with pytest.raises(ValueError, match="GB of memory are free"):
        checkpoints.dtype_that_fits(tmp_path, None)


def test_free_memory_is_what_is_available(tmp_path, monkeypatch):
    """Not what is unused: the system gives caches back. Its kB are 1024 bytes."""
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 3 kB\nMemAvailable:   5 kB\n")
    monkeypatch.setattr(device, "Path", lambda path: tmp_path / "meminfo")
    assert device.free_memory(torch.device("cpu")) == 5 * 1024


def test_special_tokens_of_a_prompt(tmp_path, monkeypatch):
    save_byte_tokenizer(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["added_tokens"] = [{"id": 258, "content": "<|end|>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    save_mistral(tiny_mistral(V=259), tmp_path)
    seen = []
    model, tokenizer = checkpoints.load(tmp_path, torch.device("cpu"))
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    for special in (False, True):
        sample.write(model, tokenizer, "<|end|>", 1, special=special, temperature=0)
    assert seen == [[[ord(">")]], [[258]]]
    monkeypatch.setattr(sample, "load", lambda *_: (model, tokenizer))
    options = ["--model", str(tmp_path), "--prompt", "<|end|>", "--device", "cpu", "--special"]
    sample.main([*options, "--max-new-tokens", "1"])
    assert seen[2:] == [[[258]]]


def test_tokenizer_of_another_model(folders, tmp_path, capsys):
    save_byte_tokenizer(tmp_path)
    save_mistral(tiny_mistral(V=258 + 512), tmp_path)
    checkpoints.load(tmp_path, torch.device("cpu"))
    for V in (257, 258 + 513):
        save_mistral(tiny_mistral(V=V), tmp_path)
        with pytest.raises(SystemExit):
            sample.main(["--model", str(tmp_path), "--prompt", "x"])
        assert f"the tokenizer has 258 tokens and the model {V}" in capsys.readouterr().err


def test_out_of_memory_is_one_line_and_another_bug_is_not_hidden(capsys):
    def run(options):
        raise RuntimeError(options.message + "\nwhere it happened")

    parser = sample.make_parser("")
    parser.add_argument("message")
    with pytest.raises(SystemExit) as stopped:
        sample.execute(parser, run, ["CUDA out of memory."])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: CUDA out of memory.\n")
    with pytest.raises(RuntimeError):
        sample.execute(parser, run, ["CUDA error: an illegal memory access"])
