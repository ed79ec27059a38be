"""The captions of a folder of scenes as token ids, in a file beside it, so that every stage reads the same."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int16
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from flux_lab.clip_tokenizer import CLIPTokenizer
from flux_lab.files import replacing
from flux_lab.t5_tokenizer import T5Tokenizer
from flux_lab.training.captions import standard
from flux_lab.training.scenes import read_captions


class CaptionIds(NamedTuple):
    """`clip` and `t5`: the ids of every scene's captions. `target`: T5's ids of the same statements in the standard wording."""

    clip: Int16[Tensor, "scenes captions clip_length"]
    t5: Int16[Tensor, "scenes captions t5_length"]
    target: Int16[Tensor, "scenes captions t5_length"]


def caption_ids(scenes: Path, tokenizers: Path) -> CaptionIds:
    """Read the ids from `scenes/ids.safetensors`; tokenize first where they are missing or from other tokenizers or captions."""
    path = scenes / "ids.safetensors"
    made_from = _fingerprint(scenes, tokenizers)
    if path.exists():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made_from") == made_from:
                return CaptionIds(*(file.get_tensor(name) for name in CaptionIds._fields))
    ids = _tokenize(scenes, tokenizers)
    with replacing(path) as file:
        save_file(ids._asdict(), file, {"made_from": made_from})
    return ids


def _tokenize(scenes: Path, tokenizers: Path) -> CaptionIds:
    clip, t5 = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer"), T5Tokenizer.from_pretrained(tokenizers / "tokenizer_2")
    rows = []
    for captions in tqdm(read_captions(scenes), desc="tokenizing", mininterval=5):
        texts, targets = [each.text for each in captions], [standard(each.stated) for each in captions]
        rows.append((clip(texts).short(), t5(texts).short(), t5(targets).short()))
    return CaptionIds(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _fingerprint(scenes: Path, tokenizers: Path) -> str:
    files = [scenes / "scenes.jsonl", tokenizers / "tokenizer" / "merges.txt", tokenizers / "tokenizer_2" / "spiece.model"]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
