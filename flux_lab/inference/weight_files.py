"""Weights that stay in their safetensors files: any tensor of a model by its name, mapped into memory when it is asked for.

A safetensors file is 8 bytes with the length of the header, the header in json (name, dtype, shape, place), and the numbers. Mapping
shows a piece of the file as memory; a page of it is read when it is first touched. A tensor that is mapped costs nothing until then, and
its pages go when the tensor goes.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flux_lab.checkpoints import CheckpointError
from flux_lab.t5 import T5EncoderModel

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}
# Tensors of these names are cast when another dtype is asked for; the scales of quantized weights are not.
CAST = ("weight", "bias")
# These keep to fp32 where all else is fp16: their results are too large for it.
WIDE = T5EncoderModel._keep_in_fp32_modules
# What the system reads ahead at one request, and how much of a page has to be touched.
READ_AHEAD, PAGE = 2**17, mmap.PAGESIZE


class Entry(NamedTuple):
    """Where one tensor lies: bytes `start` to `stop` of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, Entry]:
    """Name -> place of every tensor of a safetensors file. Raises CheckpointError for a file that is none, or not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
        text = stream.read(length) if length < size else b""
    try:
        header = json.loads(text)
        entries = {
            name: Entry(file, DTYPES[given["dtype"]], tuple(given["shape"]), *(8 + length + offset for offset in given["data_offsets"]))
            for name, given in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(file, f"a safetensors file with numbers as {', '.join(DTYPES)}", f"something else ({error!r})") from error
    for name, entry in entries.items():
        if entry.stop > size or entry.stop - entry.start != math.prod(entry.shape) * entry.dtype.itemsize:
            raise CheckpointError(file, f"{entry.stop} bytes or more", f"{size}, truncated or corrupt", key=name)
    return entries


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a model's folder by name. Nothing is read before a tensor is used."""

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None):
        self.dtype = dtype
        self._entries: dict[str, Entry] = {}
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise CheckpointError(folder, "a folder with safetensors files", "none")
        for file in files:
            self._entries |= read_header(file)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterable[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Tensor:
        return view(*_map(self._entries[name])).to(self._dtype(name))

    def empty(self, name: str) -> Tensor:
        """A tensor of that shape and dtype on `meta`."""
        return torch.empty(self._entries[name].shape, dtype=self._dtype(name), device="meta")

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors whose numbers are in memory when this returns, on the CPU still as pages of the file."""
        mapped = {name: _map(self._entries[name]) for name in names}
        for name in mapped:
            _read_ahead(self._entries[name])
        for entry, raw in mapped.values():
            if entry.stop > entry.start:
                raw[::PAGE].sum()
        return {name: view(*each).to(device).to(self._dtype(name)) for name, each in mapped.items()}

    def _dtype(self, name: str) -> torch.dtype:
        own, parts = self._entries[name].dtype, name.split(".")
        dtype = own if self.dtype is None or not own.is_floating_point or parts[-1] not in CAST else self.dtype
        return torch.float32 if dtype == torch.float16 and set(parts) & set(WIDE) else dtype


def _map(entry: Entry) -> tuple[Entry, Tensor]:
    """The bytes of one tensor as uint8, mapped. They are freed with the last tensor that looks at them."""
    ahead = entry.start % mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as stream:
        # A private copy would be made of a page that is written to: nobody can change the file through this.
        mapping = mmap.mmap(stream.fileno(), entry.stop - entry.start + ahead, offset=entry.start - ahead, access=mmap.ACCESS_COPY)
    return entry, torch.frombuffer(mapping, dtype=torch.uint8, offset=ahead)


def view(entry: Entry, raw: Tensor) -> Tensor:
    """Bytes as numbers of the entry's dtype and shape."""
    return raw.view(entry.dtype).view(entry.shape)


def _read_ahead(entry: Entry) -> None:
    """Ask the system for these pages, many requests at a time, without waiting. Where it cannot be asked, they are read when touched."""
    if not hasattr(os, "posix_fadvise"):
        return
    with entry.file.open("rb") as stream:
        for start in range(entry.start, entry.stop, READ_AHEAD):
            os.posix_fadvise(stream.fileno(), start, min(READ_AHEAD, entry.stop - start), os.POSIX_FADV_WILLNEED)
