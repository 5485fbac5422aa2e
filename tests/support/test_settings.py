"""Settings as options of a command line."""

import argparse
from dataclasses import dataclass

import pytest

import train
from support.settings import add_settings


@dataclass(frozen=True)
class Odd:
    """Settings whose comments are missing or hold a percent sign."""

    bare: int = 1
    share: float = 0.5  # 50 % of it (%s, %(x)s)
    flag: bool = False  # a switch


def test_a_field_without_a_comment_or_with_a_percent_sign(capsys):
    parser = argparse.ArgumentParser()
    add_settings(parser, Odd, {})
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--bare N (1)" in text
    assert "50 % of it (%s, %(x)s) (0.5)" in text
    options = parser.parse_args(["--bare", "3", "--flag"])
    assert vars(options) == {"bare": 3, "flag": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-masters"], "masters is off, which is for --dtype bfloat16"),
        (["--resume", "--steps", "5", "--lr", "1"], "leave out ['lr']"),
        (["--resume", "--preset", "mistral-7b"], "leave out ["),
        (["--resume", "--steps", "5"], "--resume needs --out"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    out = [] if "--steps 5" in message or "needs" in message else ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        train.main([*options, *out, "--device", "cpu"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
