"""For all tests: one thread, and what slows down many small runs of train.py."""

from functools import cache

import pytest
import torch

import train
from support import settings

torch.set_num_threads(1)  # the tensors are so small that a second one only gets in the way


@pytest.fixture(autouse=True, scope="session")
def quick_starts():
    """No run counts its memory, but in test_train.py; help texts are read from the source once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "check_memory", lambda *_: None)
        patch.setattr(settings, "comments", cache(settings.comments))
        yield
