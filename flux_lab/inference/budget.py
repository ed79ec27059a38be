"""Amounts of memory: read from text, written as text, and what a device has."""

import re

import psutil
import torch

from flux_lab.checkpoints import check_device

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(size: int | str | None) -> int | None:
    """A number of bytes: itself, or such as "16GB" (10^9), "16 GiB" (2^30) or "900MB"; None stays None. Raises ValueError."""
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return size
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?B)\s*", str(size).upper())
    if not found or found[2] not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"memory_budget: expected a size such as '16GB' or '900MB', got {size!r}")
    return int(float(found[1]) * UNITS[found[2]])


def gb(count: int) -> str:
    """Bytes as text, in units of 10^9 or 10^6."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def device_memory(device: torch.device | str) -> int:
    """Bytes of memory that a device has altogether; for the CPU and Apple's GPU the machine's. Raises ValueError."""
    device = check_device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
