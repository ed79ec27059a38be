"""Reads `spiece.model`, the file of the library sentencepiece: a protocol-buffers message, of which three fields matter to us.

A message is a series of fields: a varint `number << 3 | wire type`, then the value: a varint (type 0), 8 bytes (1), a varint length and
so many bytes (2), or 4 bytes (5). Source: `sentencepiece_model.proto` and the protocol-buffers encoding guide.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNIGRAM = 1


class Piece(NamedTuple):
    """One piece of the vocabulary. `score` is its log-probability; `type` NORMAL, UNKNOWN, CONTROL, USER_DEFINED or one we do not use."""

    text: str
    score: float
    type: int


class SentencePieceModel(NamedTuple):
    """The vocabulary in the order of its ids, and the compiled character map of the normaliser, if there is one."""

    pieces: list[Piece]
    charsmap: bytes | None


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a unigram model. Raises FileNotFoundError, and ValueError for a file that is no sentencepiece model or one of another kind."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    pieces, charsmap, model_type = [], None, UNIGRAM
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                model_type = dict(_fields(value)).get(3, UNIGRAM)
            elif number == 3:
                charsmap = dict(_fields(value)).get(2)
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise ValueError(f"{path}: not a sentencepiece model: {error}") from None
    if model_type != UNIGRAM or not pieces:
        raise ValueError(f"{path}: expected a unigram model, got model type {model_type} with {len(pieces)} pieces")
    return SentencePieceModel(pieces, charsmap or None)


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    return Piece(fields.get(1, b"").decode("utf-8"), struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, NORMAL))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of one message."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, place = _varint(message, place)
        elif wire_type in (1, 2, 5):
            size, place = _varint(message, place) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], place)
            value, place = message[place : place + size], place + size
            if place > len(message):
                raise ValueError("the file ends inside a field")
        else:
            raise ValueError(f"unknown wire type {wire_type}")
        yield number, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A whole number, 7 bits a byte, lowest first; a byte below 128 ends it. Returns the number and the place after it."""
    number, shift = 0, 0
    while True:
        byte = message[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
