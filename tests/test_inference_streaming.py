"""flux_lab.inference.streaming: the same result with few blocks in memory at once."""

import contextlib
import mmap
from concurrent.futures import wait
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomize_
from test_inference_hoisting import conditioning_of
from test_transformer import make_inputs
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from flux_lab.checkpoints import save_model
from flux_lab.config import TINY, TINY_T5
from flux_lab.inference import streaming, weight_files
from flux_lab.inference.quantization import SCHEMES, quantize, save_quantized
from flux_lab.inference.streaming import blocks_of, offloaded, streamed
from flux_lab.inference.weight_files import PAGE, ReusedMemory, WeightFiles, read_past_cache
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

MAKERS = {"transformer": lambda: FluxTransformer2DModel(TINY), "t5": lambda: T5EncoderModel(TINY_T5)}
EVERY_MODEL = pytest.mark.parametrize("name", MAKERS)


def make(name="transformer", seed=0):
    return randomize_(MAKERS[name](), seed)


def inputs_of(name):
    return make_inputs(TINY) if name == "transformer" else {"input_ids": torch.randint(0, TINY_T5.vocab_size, (2, 7))}


def block_bytes(model):
    return [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks_of(model).values()]


def fixed_bytes(model):
    return sum(parameter.nbytes for parameter in model.parameters()) - sum(block_bytes(model))


class Resident:
    """Bytes of all that a streamer has fetched and that is still alive, looked at after every fetch."""

    def __init__(self, read):
        self.read, self.alive, self.peak, self.reads = read, {}, 0, 0

    def __call__(self, names):
        tensors = self.read(names)
        self.reads += 1
        self.alive |= {StorageWeakRef(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return tensors


@pytest.fixture
def resident(monkeypatch):
    """Every streamer's reads are watched; the list of watchers."""
    watchers, init = [], streaming.Streamer.__init__

    def watched(self, model, read, *arguments):
        watchers.append(Resident(read))
        watchers[-1].streamer = self
        init(self, model, watchers[-1], *arguments)

    monkeypatch.setattr(streaming.Streamer, "__init__", watched)
    return watchers


@EVERY_MODEL
@pytest.mark.parametrize("mode", ["streamed", "offloaded"])
def test_same_result_two_blocks_at_a_time(name, mode, tmp_path, resident):
    model, inputs = make(name), inputs_of(name)
    exact, largest, fixed = model(**inputs), max(block_bytes(model)), fixed_bytes(model)
    save_model(model, tmp_path)
    budget = fixed + 2 * largest + 100
    with streamed(tmp_path, budget) if mode == "streamed" else offloaded(model, "cpu", budget) as ready:
        for _ in range(3):
            assert torch.equal(ready(**inputs), exact)
        assert all(
            parameter.is_meta for block in blocks_of(ready).values() for key, parameter in block.named_parameters() if "bias" not in key
        )
    (watcher,) = resident
    assert watcher.reads >= 1 + 3 * len(block_bytes(model))
    assert largest < watcher.peak <= budget
    if mode == "offloaded":
        assert torch.equal(model(**inputs), exact), "its weights are back"


def test_a_larger_budget_holds_more_blocks(tmp_path, resident):
    model = make()
    save_model(model, tmp_path)
    exact, inputs = fixed_bytes(model) + 4 * max(block_bytes(model)), inputs_of("transformer")
    with streamed(tmp_path, exact) as ready:
        first = next(iter(blocks_of(ready).values()))
        # However slow the thread is: the first block computes when all that may be there is there.
        first.register_forward_pre_hook(lambda *_: wait(resident[0].streamer.fetched.values()) and None)
        ready(**inputs)
    assert fixed_bytes(model) + 2 * max(block_bytes(model)) < resident[0].peak <= exact


@EVERY_MODEL
def test_too_small_a_budget(name, tmp_path):
    model = make(name)
    save_model(model, tmp_path)
    needed = fixed_bytes(model) + 2 * max(block_bytes(model))
    with (
        pytest.raises(ValueError, match=rf"memory_budget: expected at least .* to stream {type(model).__name__} .*, got"),
        streamed(tmp_path, needed - 1000),
    ):
        pass
    with pytest.raises(ValueError, match="memory_budget"), offloaded(model, "cpu", needed - 1000):
        pass
    inputs = inputs_of(name)
    assert torch.equal(model(**inputs), make(name)(**inputs)), "its weights are back"


# ------------------------------------------------------------------------------------------------------------- planted bugs


def other_blocks_weights(monkeypatch):
    """The second block gets the first one's weights."""
    read = WeightFiles.copy

    def bug(self, names, device="cpu"):
        names = list(names)
        tensors = read(self, [name.replace("transformer_blocks.1.", "transformer_blocks.0.") for name in names], device)
        return dict(zip(names, tensors.values(), strict=True))

    monkeypatch.setattr(WeightFiles, "copy", bug)


def memory_used_again_too_early(monkeypatch):
    """The next block is read over the one that computes. Without the thread, so that it is not a matter of luck."""
    memory = np.frombuffer(mmap.mmap(-1, 2**24), np.uint8)
    monkeypatch.setattr(ReusedMemory, "take", lambda self, size: memory[:size])
    monkeypatch.setattr(streaming, "ThreadPoolExecutor", SameThread)


class SameThread:
    def __init__(self, **_):
        pass

    def submit(self, call, *arguments):
        result = call(*arguments)
        return SimpleNamespace(result=lambda: result)

    def shutdown(self, **_):
        pass


def one_number_less_is_read(monkeypatch):
    """The last page of what is read stays what it was."""

    def bug(file, start, memory):
        read_past_cache(file, start, memory[:-PAGE])
        return len(memory)

    monkeypatch.setattr(weight_files, "read_past_cache", bug)


@pytest.mark.parametrize("bug", [None, other_blocks_weights, memory_used_again_too_early, one_number_less_is_read])
def test_planted_bugs_are_noticed(bug, tmp_path, monkeypatch):
    model, inputs = make(), inputs_of("transformer")
    save_model(model, tmp_path)
    exact = model(**inputs)
    if bug is not None:
        bug(monkeypatch)
    with streamed(tmp_path) as ready:
        assert torch.equal(ready(**inputs), exact) == (bug is None)


@pytest.mark.parametrize("freed", [True, False])
def test_a_block_that_is_not_freed_is_noticed(freed, tmp_path, monkeypatch, resident):
    model = make()
    save_model(model, tmp_path)
    budget = fixed_bytes(model) + 2 * max(block_bytes(model)) + 100
    if not freed:
        monkeypatch.setattr(streaming.Streamer, "_take_away", lambda self, index: None)
    with streamed(tmp_path, budget) as ready:
        ready(**inputs_of("transformer"))
    assert (resident[0].peak <= budget) == freed


@EVERY_MODEL
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized(name, scheme, tmp_path):
    model, inputs = make(name), inputs_of(name)
    save_quantized(quantize(model, scheme), tmp_path)
    exact = model(**inputs)
    with streamed(tmp_path) as ready:
        assert torch.equal(ready(**inputs), exact)


def test_hoisted(tmp_path):
    model, inputs = make(), make_inputs(TINY)
    save_model(model, tmp_path)
    with streamed(tmp_path, conditionings=[conditioning_of(inputs)]) as ready:
        assert torch.equal(ready(**inputs), model(**inputs))
        assert not any("norm1.linear" in key for key in ready.state_dict())


def test_an_error_inside_a_block_leaves_nothing_behind(tmp_path):
    save_model(make(), tmp_path)
    inputs = make_inputs(TINY)
    with contextlib.ExitStack() as stack:
        ready = stack.enter_context(streamed(tmp_path))
        with pytest.raises(ValueError, match="img_ids"):
            ready(**inputs | {"img_ids": torch.zeros(16, 3)})
        ready(**inputs)
    assert all(parameter.is_meta for parameter in ready.parameters())


def test_a_device_that_is_not_there(tmp_path):
    save_model(make(), tmp_path)
    with pytest.raises(ValueError, match="device: expected one that is here, got 'cuda:77'"), streamed(tmp_path, device="cuda:77"):
        pass
    model = make()
    with pytest.raises(ValueError, match="device: expected one that is here, got 'cuda:77'"), offloaded(model, "cuda:77"):
        pass
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_another_model_has_no_blocks():
    with pytest.raises(ValueError, match=r"model: expected one of \['FluxTransformer2DModel', 'T5EncoderModel'\], got Linear"):
        blocks_of(nn.Linear(3, 4))
