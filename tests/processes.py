"""Processes that need not import torch: a server has done so once, and forks them."""

import multiprocessing


def quick_context():
    """The multiprocessing context of such processes, where there is one."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    # torch._dynamo is what the first step of an optimiser imports.
    context.set_forkserver_preload(["torch._dynamo", "pytest", "numpy"])
    return context
