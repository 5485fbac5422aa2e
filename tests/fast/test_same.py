"""Every test of thoughts.py again, on the fast path: the same results for less."""

import pytest
from test_lookahead import *  # noqa: F403
from test_meta_tokens import *  # noqa: F403
from test_mixing import *  # noqa: F403
from test_official import *  # noqa: F403
from test_padding import *  # noqa: F403
from test_parallel_thoughts import *  # noqa: F403
from test_reinforce import *  # noqa: F403

import fast
from thoughts import QuietStar


@pytest.fixture(autouse=True, scope="module")
def fast_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuietStar, "thought_cache", fast.FastThoughtCache)
        patch.setattr(QuietStar, "token_logits", staticmethod(fast.token_logits))
        patch.setattr(QuietStar, "token_logp", staticmethod(fast.token_logp))
        yield
