"""flux_lab.inference.stream_log: what is written down is what happened."""

from itertools import pairwise

import torch
from test_inference_streaming import block_bytes, inputs_of, make

from flux_lab.checkpoints import save_model
from flux_lab.inference.loading import open_model
from flux_lab.inference.stream_log import LoggedStreamer


def test_every_block_is_read_and_computed_once_in_a_pass(tmp_path):
    model, inputs = make(), inputs_of("transformer")
    save_model(model, tmp_path)
    empty, read = open_model(tmp_path, "cpu", None, mapped=False)
    streamer = LoggedStreamer(empty, read, "cpu")
    with streamer as ready:
        assert torch.equal(ready(**inputs), model(**inputs))
    blocks = len(block_bytes(model))
    done = [what for what, *_ in streamer.rows["computing thread"]]
    assert done == ["waiting", "computing"] * blocks
    assert blocks <= len(streamer.rows["reading thread"]) <= blocks + 1, "one more is read in advance for the next pass"
    for events in streamer.rows.values():
        assert all(0 <= start <= stop for _, start, stop in events)
        assert all(before[2] <= after[1] for before, after in pairwise(events)), "one thing at a time"
    largest = max(size for _, size in streamer.resident)
    assert max(block_bytes(model)) <= largest <= 2 * max(block_bytes(model))
