"""Devices, their free memory, and the dtypes of a model."""

import os
import re
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str | None) -> torch.device:
    """The device of this name, or if None CUDA, MPS or the CPU. Raises ValueError if not there."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=name).tolist()  # fails on the meta device, which holds no numbers
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = re.split(r"\. |\n", str(error))[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None


def free_memory(device: torch.device) -> float | None:
    """Free bytes on the device, or all bytes of a CPU without /proc. None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and (meminfo := Path("/proc/meminfo")).exists():
        return 1024.0 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
