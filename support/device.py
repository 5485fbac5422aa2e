"""Devices, their free memory, and the dtypes of a model."""

import os
import re
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or CUDA, MPS or the CPU, whichever is there first."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None


def free_memory(device: torch.device) -> float | None:
    """Bytes that are free on the device (on a CPU without /proc: that it has); None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and (meminfo := Path("/proc/meminfo")).exists():
        return 1024.0 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
