"""For all tests: one thread, and runs of train.py that count no memory before they begin."""

import pytest
import torch

import train

torch.set_num_threads(1)  # the tensors are so small that a second one only gets in the way


@pytest.fixture(autouse=True, scope="session")
def without_plan():
    """The plan takes far longer than a small run. test_train.py has a test of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "check_memory", lambda *_: None)
        yield
