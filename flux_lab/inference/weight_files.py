"""Weights that stay in their safetensors files: any tensor of a model by its name, mapped into memory when it is asked for.

A safetensors file is 8 bytes with the length of the header, the header in json (name, dtype, shape, place), and the numbers. Mapping
shows a piece of the file as memory; a page of it is read when it is first touched. A tensor that is mapped costs nothing until then, and
its pages go when the tensor goes. Whoever reads a file larger than the memory, again and again, had better not map it: see `copy`.
"""

import errno
import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux_lab.checkpoints import CheckpointError, Component, dtype_of, weight_files_of

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}
# Tensors of these names are cast when another dtype is asked for; the scales of quantized weights are not.
CAST = ("weight", "bias")
# What the system reads ahead at one request, and how much of a page has to be touched.
READ_AHEAD, PAGE = 2**17, mmap.PAGESIZE
# What one request to the disk asks for, past the cache. Several at a time were slower: their threads hold up the products.
CHUNK = 2**24


class Entry(NamedTuple):
    """Where one tensor lies: bytes `start` to `stop` of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, Entry]:
    """Name -> place of every tensor of a safetensors file. Raises CheckpointError for a file that is none, or not whole."""
    if not file.is_file():
        raise CheckpointError(file, "a safetensors file", "nothing")
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
    """The tensors of a model's folder by name: those of its one file, or those that its index names. Other files may lie there.

    Nothing is read before a tensor is used. Raises CheckpointError for files or tensors that are not there.
    """

    def __init__(self, component: Component, folder: str | Path, dtype: torch.dtype | None = None):
        self.component, self.dtype = component, dtype
        self._entries: dict[str, Entry] = {}
        self._memory = ReusedMemory()
        for file, keys in weight_files_of(component, Path(folder)).items():
            header = read_header(file)
            for key in sorted(header if keys is None else keys):
                if key not in header:
                    raise CheckpointError(file, "a tensor, which the index says is here", "nothing", key=key)
                self._entries[component.tied.get(key, key)] = header[key]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterable[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

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

    def copy(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors in memory of their own, read past the system's cache of files: for what is read once, and then other tensors.

        All of them look at one piece of memory. It is used for later copies when none of them is left. Raises CheckpointError for a
        file that has become shorter.
        """
        entries = {name: self._entries[name] for name in names}
        spans = spans_of(entries.values())
        memory, places, end = self._memory.take(sum(span.size for span in spans)), {}, 0
        for span in spans:
            stop = span.start + read_past_cache(span.file, span.start, memory[end : end + span.size])
            if stop < span.entries[-1].stop:
                raise CheckpointError(span.file, f"{span.entries[-1].stop} bytes or more", f"{stop}, truncated since it was opened")
            places |= {entry: end + entry.start - span.start for entry in span.entries}
            end += span.size
        return {name: _look(memory, places[entry], entry).to(device).to(self._dtype(name)) for name, entry in entries.items()}

    def _dtype(self, name: str) -> torch.dtype:
        own = self._entries[name].dtype
        cast = self.dtype is not None and own.is_floating_point and name.split(".")[-1] in CAST
        return dtype_of(self.component, name, self.dtype if cast else own)


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


# ------------------------------------------------------------------------------------------------------- past the cache of files


class Span(NamedTuple):
    """A piece of a file from one page's start to another's, and what lies in it."""

    file: Path
    start: int
    size: int
    entries: list[Entry]


def spans_of(entries: Iterable[Entry]) -> list[Span]:
    """As few pieces as there are gaps of more than a page between the entries."""
    spans: list[Span] = []
    for entry in sorted(entries, key=lambda entry: (entry.file, entry.start)):
        start, stop = entry.start // PAGE * PAGE, -(-entry.stop // PAGE) * PAGE
        last = spans[-1] if spans else None
        if last and last.file == entry.file and start <= last.start + last.size:
            spans[-1] = Span(last.file, last.start, max(last.size, stop - last.start), [*last.entries, entry])
        else:
            spans.append(Span(entry.file, start, stop - start, [entry]))
    return spans


def read_past_cache(file: Path, start: int, memory: np.ndarray) -> int:
    """Fill `memory` with the file's bytes from `start`, both at the start of a page. Returns how many there were.

    The disk writes into `memory` itself, where the file system can do that: a copy in the system's cache would cost time that the
    products need, and push out other files, to no use when the whole file is larger than the cache.
    """
    try:
        return _fill(file, start, memory, getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return _fill(file, start, memory, 0)


def _fill(file: Path, start: int, memory: np.ndarray, flags: int) -> int:
    opener = (lambda path, own: os.open(path, own | flags)) if flags else None
    with open(file, "rb", buffering=0, opener=opener) as stream:
        stream.seek(start)
        read = 0
        while read < len(memory) and (count := stream.readinto(memory[read : read + CHUNK])):
            read += count
            if count % PAGE:  # the end of the file
                break
    return read


class ReusedMemory:
    """Pieces of memory that are used again. Memory that is new has to be cleared by the system, which takes as long as reading it full."""

    def __init__(self):
        self.free: list[mmap.mmap] = []

    def take(self, size: int) -> np.ndarray:
        """`size` bytes. They are free again when the last that looks at them is gone."""
        large_enough = [memory for memory in self.free if len(memory) >= size]
        if large_enough:
            memory = min(large_enough, key=len)
            self.free.remove(memory)
        else:
            self.free.clear()
            memory = mmap.mmap(-1, max(size, 1))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
        taken = np.frombuffer(memory, np.uint8, size)
        weakref.finalize(taken, self.free.append, memory).atexit = False
        return taken


def _look(memory: np.ndarray, place: int, entry: Entry) -> Tensor:
    count = math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=place).view(entry.shape)
