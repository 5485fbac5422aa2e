"""Files that are read and written, options, devices: what is no usable input is one clear line."""

import json
import os

import pytest
import torch
from tiny import tiny_quiet_star

import eval as evaluation
import train
from support import runs
from support.checkpoints import read_config
from support.device import pick_device
from support.files import json_object, read_json_lines, read_utf8, short, write_text
from support.settings import add_settings
from support.terminal import execute, make_parser
from support.text import read_documents
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from thoughts import save_quiet_star


@pytest.fixture(params=["/dev/zero", "/dev/full", "pipe", "loop", "folder"])
def special(request, tmp_path):
    """The path of something that is not a regular file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    return tmp_path / request.param


def test_only_regular_files_are_read(special):
    """Not the endless zeros of a device, and nothing waits for a pipe."""
    for read in (read_utf8, lambda path: read_documents([path]), read_json_lines):
        with pytest.raises(ValueError, match=f"cannot read {special}"):
            read(special)


def test_only_regular_files_are_written(special):
    is_loop = special.is_symlink()
    with pytest.raises(ValueError, match=f"{special} is not a regular file"):
        write_text(special, "text")
    assert special.is_symlink() == is_loop
    assert not list(special.parent.glob("*.tmp"))


def test_special_files_as_options(tmp_path, special, capsys):
    """--data, --eval-data and --text, of a model that thinks."""
    save_quiet_star(tiny_quiet_star(V=258), tmp_path)
    save_byte_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("Two and two is four. " * 9)
    begin = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), "--context", "16"]
    for main, options in (
        (train.main, [*begin, "--data", str(special)]),
        (train.main, [*begin, "--data", str(tmp_path / "text.txt"), "--eval-data", str(special)]),
        (evaluation.main, ["--model", str(tmp_path), "--text", str(special)]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*options, "--device", "cpu"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"cannot read {special}" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_links_are_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == read_utf8(tmp_path / "link") == "text"


def test_absolute_paths_of_what_exists(tmp_path, monkeypatch):
    """A loop of links stays as it is, and so does the name of a model on the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").touch()
    (tmp_path / "loop").symlink_to("loop")
    given = {"checkpoint": "owner/name", "eval_data": "loop", "data": ("text", "loop"), "steps": 1}
    data = (str(tmp_path / "text"), "loop")
    assert runs.absolute(given) == given | {"data": data}


def test_a_json_array_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('\n [{"text": "one"},\n{"text": "two"}]\n')
    with pytest.raises(ValueError, match=r"line 2 begins a JSON array; write one JSON object per"):
        read_json_lines(path)


def test_messages_are_short():
    """What is wrong with a long or deep value is told in one line."""
    long = "x\n" * 20_000
    for value in (long, [long], {long: long}, {"a": [[[[[[[[long]]]]]]]]}, [1] * 10_000):
        assert len(short(value)) < 400
        assert "\n" not in short(value)
    for text in (json.dumps(long), json.dumps([long]), "[" * 10_000):
        with pytest.raises(ValueError) as refused:
            json_object(text, "here")
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("message", ["a\nb" * 10_000, "\x1b[31mred\r\u2028"])
def test_an_error_is_one_line(capsys, message):
    """Also where an option's own text, a path for example, has line ends or is very long."""

    def run(options):
        raise ValueError(message)

    for arguments in ([], [message]):
        with pytest.raises(SystemExit) as stopped:
            execute(make_parser(""), run, arguments)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert error[:-1].isprintable() and 20 < len(error) < 1200


def test_a_loop_of_links_is_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SystemExit) as stopped:
        execute(make_parser(""), lambda _: (tmp_path / "loop").resolve(), [])
    assert stopped.value.code == 2
    assert "Symlink loop" in capsys.readouterr().err


def test_whole_numbers_end_where_those_of_torch_end(capsys):
    """A seed of 2 ** 64 would end in a traceback."""
    parser = make_parser("")
    add_settings(parser, train.Settings, {})
    options = parser.parse_args(["--seed", str(2**63 - 1), "--lr", "1e30"])
    assert torch.Generator().manual_seed(options.seed).initial_seed() == 2**63 - 1
    large = "is too large; it must be below 2**63; see --help"
    for number, message in (
        (2**63, large),
        (-(2**64), large),
        ("1.5", "invalid"),
        ("x", "invalid"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([f"--seed={number}"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert "argument --seed: " in error and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["meta", "hpu", "abacus", "", "cuda:99", "a\nb"])
def test_devices_that_cannot_compute(name):
    with pytest.raises(ValueError, match=r"--device (.|\n)* cannot be used: ."):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


def test_the_name_of_a_model_on_the_hub_is_answered_with_a_download(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "HuggingFaceTB/SmolLM2-135M"
    download = f"hf download {name} --local-dir FOLDER"
    (tmp_path / "text.txt").write_text("text " * 100)
    for main, options in (
        (evaluation.main, ["--model", name]),
        (train.main, ["--checkpoint", name, "--data", "text.txt"]),
        (train.main, ["--checkpoint", name]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*options, "--device", "cpu"])
        assert stopped.value.code == 2
        assert download in capsys.readouterr().err
    with pytest.raises(ValueError, match=download):
        load_tokenizer(name)
    (tmp_path / name).mkdir(parents=True)
    for there in (name, "nowhere", "/owner/name", "../name", "a/b/c"):
        for load in (load_tokenizer, read_config):
            with pytest.raises(ValueError) as refused:
                load(there)
            assert "download" not in str(refused.value)
