"""Commands with bad input."""

import pytest


def refused(capsys, main, *arguments, **named) -> str:
    """Run a command that ends with exit code 2. Returns its one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(*arguments, **named)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error
