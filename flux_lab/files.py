"""Writing files so that nothing is lost: under a temporary name first, which is renamed when all of it is there."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`, a file or a new folder, which takes its place when the block ends without an error.

    It is removed otherwise. Raises OSError where safetensors cannot write, which has an error of its own for that.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except SafetensorError as error:
        raise OSError(f"{target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, values: Any) -> None:
    write_text(file, json.dumps(values, indent=2) + "\n")
