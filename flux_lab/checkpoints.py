"""Checkpoints: read and write the diffusers layout, read the original layout of Black Forest Labs.

Only safetensors are read. Reading goes in four steps, and only the last one touches the numbers: read the headers (names, shapes,
dtypes); give every tensor our name; build the model on the `meta` device, without memory, and compare; map the tensors from the
file and make them the parameters. So an error leaves nothing half-loaded, and no memory is allocated twice.
"""

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flux_lab.autoencoder import AutoencoderKL
from flux_lab.clip import CLIPTextModel
from flux_lab.config import AutoencoderKLConfig, CLIPTextConfig, Config, FluxTransformer2DConfig, T5Config
from flux_lab.files import replacing, write_json
from flux_lab.original_layout import AUTOENCODER_RENAMING, LINEAR, SPLIT, SWAP, TRANSFORMER_RENAMING, Renaming, rename
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel


class CheckpointError(ValueError):
    """A checkpoint cannot be read. Names the file, the key, what was expected and what was found."""

    def __init__(self, file: str | Path, expected: str, found: object = None, key: str | None = None):
        where = f"{file}: " if key is None else f"{file}: key {key!r}: "
        super().__init__(where + (expected if found is None else f"expected {expected}, found {found}"))


# ------------------------------------------------------------------------------------------------------ what each component needs


def _infer_transformer(shapes: dict[str, tuple[int, ...]]) -> FluxTransformer2DConfig:
    """Sizes off the tensors. No tensor tells how the head width is divided among the three axes: 1/8, 7/16, 7/16 as in FLUX.1."""
    inner_dim, in_channels = shapes["x_embedder.weight"]
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    side = 2 * (head_dim * 7 // 32)
    out_channels = shapes["proj_out.weight"][0]
    return FluxTransformer2DConfig(
        in_channels=in_channels,
        out_channels=None if out_channels == in_channels else out_channels,
        num_layers=_count(shapes, r"transformer_blocks\.(\d+)"),
        num_single_layers=_count(shapes, r"single_transformer_blocks\.(\d+)"),
        attention_head_dim=head_dim,
        num_attention_heads=inner_dim // head_dim,
        joint_attention_dim=shapes["context_embedder.weight"][1],
        pooled_projection_dim=shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        guidance_embeds="time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        axes_dims_rope=(head_dim - 2 * side, side, side),
    )


def _infer_autoencoder(shapes: dict[str, tuple[int, ...]]) -> AutoencoderKLConfig:
    """Sizes off the tensors. Groups, scaling factor, shift factor and sample size are in no tensor: FLUX.1's are taken."""
    if "quant_conv.weight" in shapes:
        raise ValueError("an autoencoder with quant convolutions is not FLUX.1's, so its scaling factor is unknown: give config=")
    levels = _count(shapes, r"encoder\.down_blocks\.(\d+)")
    return AutoencoderKLConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=tuple(shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)),
        layers_per_block=_count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)"),
    )


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the start of a name."""
    return 1 + max((int(found[1]) for found in (re.match(pattern, name) for name in names) if found), default=-1)


class _Uninitialized(TorchFunctionMode):
    """Inside, torch.nn.init does nothing: no numbers are drawn that a file's will replace. The first draw on `meta` takes a second."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Inside, models are made on the `meta` device: every shape is there, no number is."""
    with torch.device("meta"), _Uninitialized():
        yield


class Component(NamedTuple):
    """What there is to know about the files of one model.

    `ignored` keys are dropped, one of `prefixes` is stripped, `tied` keys are another name of the same tensor, `former` ones what older
    checkpoints call it; a file with `original_key` is in the original layout.
    """

    model: type[nn.Module]
    config: type[Config]
    folder: str
    weights: str
    prefixes: tuple[str, ...] = ()
    ignored: str = r"$^"
    tied: dict[str, str] = {}  # noqa: RUF012
    former: dict[str, str] = {}  # noqa: RUF012
    renaming: tuple[Renaming, ...] = ()
    original_key: str = ""
    infer: Callable[[dict[str, tuple[int, ...]]], Config] | None = None

    def empty(self, config: Config) -> nn.Module:
        """The model of this configuration, with `empty_weights`."""
        with empty_weights():
            return self.model(config)


# diffusers before 0.13 named the autoencoder's attention so, and checkpoints of that time, SD 1.5's for one, still do.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _old_attention_names() -> dict[str, str]:
    return {
        f"{side}.mid_block.attentions.0.{old}.{kind}": f"{side}.mid_block.attentions.0.{new}.{kind}"
        for side in ("encoder", "decoder")
        for old, new in OLD_ATTENTION.items()
        for kind in ("weight", "bias")
    }


TRANSFORMER = Component(
    model=FluxTransformer2DModel,
    config=FluxTransformer2DConfig,
    folder="transformer",
    weights="diffusion_pytorch_model",
    prefixes=("model.diffusion_model.",),
    renaming=TRANSFORMER_RENAMING,
    original_key="img_in.weight",
    infer=_infer_transformer,
)
AUTOENCODER = Component(
    model=AutoencoderKL,
    config=AutoencoderKLConfig,
    folder="vae",
    weights="diffusion_pytorch_model",
    prefixes=("first_stage_model.", "vae."),
    former=_old_attention_names(),
    renaming=AUTOENCODER_RENAMING,
    original_key="encoder.down.0.block.0.conv1.weight",
    infer=_infer_autoencoder,
)
CLIP = Component(
    model=CLIPTextModel,
    config=CLIPTextConfig,
    folder="text_encoder",
    weights="model",
    prefixes=("text_model.",),
    ignored=r"(text_model\.)?embeddings\.position_ids",
)
T5 = Component(
    model=T5EncoderModel,
    config=T5Config,
    folder="text_encoder_2",
    weights="model",
    ignored=r"(decoder|lm_head)\..*",
    tied={"encoder.embed_tokens.weight": "shared.weight"},
)
COMPONENTS = {component.folder: component for component in (TRANSFORMER, AUTOENCODER, CLIP, T5)}
# What model_index.json says: folder -> library and class. The first of several names is the one that we write.
PIPELINE_CLASS = "FluxPipeline"
PIPELINE_PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("transformers", "T5TokenizerFast", "T5Tokenizer"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


class PipelineLayout(NamedTuple):
    """One kind of pipeline: its class, its folders with library and class, and the components that are found in them.

    `unused`: entries of upstream's `model_index.json` for parts that we do without, and what is written there.
    """

    name: str
    parts: dict[str, tuple[str, ...]]
    components: dict[str, Component]
    unused: dict[str, Any] = {}  # noqa: RUF012


FLUX_LAYOUT = PipelineLayout(PIPELINE_CLASS, PIPELINE_PARTS, COMPONENTS)


# ----------------------------------------------------------------------------------------------------------------------- reading


def load_transformer(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", config: FluxTransformer2DConfig | None = None
) -> FluxTransformer2DModel:
    """Load a transformer from a diffusers folder, one safetensors file in either layout, a pipeline's folder, or a hub id.

    `dtype=None` keeps the file's. A lone file has no configuration: sizes are read off the tensors, and the three axes of a position
    get 1/8, 7/16 and 7/16 of the head width, which is (16, 56, 56) of 128; `config` overrides that. Raises CheckpointError.
    """
    return load_component(TRANSFORMER, path, dtype, device, config)


def load_autoencoder(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", config: AutoencoderKLConfig | None = None
) -> AutoencoderKL:
    """Load an autoencoder; as `load_transformer`.

    For a lone file the scaling and shift factor, the number of groups and the sample size are FLUX.1's unless `config` says otherwise.
    """
    return load_component(AUTOENCODER, path, dtype, device, config)


def load_clip(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> CLIPTextModel:
    """Load CLIP's text encoder from a transformers folder, with or without the `text_model.` prefix, a pipeline's folder, or a hub id."""
    return load_component(CLIP, path, dtype, device)


def load_t5(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> T5EncoderModel:
    """Load T5's encoder from a transformers folder, a pipeline's folder, or a hub id. In fp16 its `wo` layers are kept in fp32."""
    return load_component(T5, path, dtype, device)


def load_scheduler(path: str | Path, kinds: tuple[type, ...] = (FlowMatchEulerDiscreteScheduler,)) -> Any:
    """Read `scheduler_config.json` from its folder, a pipeline's, or a hub id.

    `kinds`: the classes that it may be of; the first where it does not say. Raises CheckpointError.
    """
    folder = local_folder(path, ["scheduler"])
    file = folder / "scheduler_config.json"
    if not file.is_file():
        file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise CheckpointError(folder, "scheduler_config.json", _listing(folder))
    values = _read_json(file)
    kind = next((kind for kind in kinds if kind.__name__ in _classes(values)), kinds[0])
    _check_class(file, values, kind.__name__)
    with _naming(file):
        return kind.from_config(values)


def read_model_index(folder: str | Path, layout: PipelineLayout = FLUX_LAYOUT) -> dict[str, str]:
    """Read a pipeline's `model_index.json`: the class of each of its folders.

    Raises CheckpointError for another pipeline than `layout`'s, and for an unknown, missing or other component.
    """
    file = Path(folder) / "model_index.json"
    if not file.is_file():
        raise CheckpointError(folder, "a pipeline in the diffusers layout with model_index.json", _listing(Path(folder)))
    values = _read_json(file)
    _check_class(file, values, layout.name)
    used = {name: entry for name, entry in values.items() if name not in layout.unused}
    found = {name: entry[1] for name, entry in used.items() if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None}
    for name in [*found, *layout.parts]:
        classes = layout.parts.get(name, ("", "null"))[1:]
        if found.get(name) not in classes:
            raise CheckpointError(file, f"class {classes[0]}", found.get(name, "nothing"), key=name)
    return found


def load_component(
    component: Component, path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", config: Any = None
) -> Any:
    """Load the model that `component` describes; `path`, `dtype` and `config` as for `load_transformer`.

    Raises CheckpointError, and ValueError for a device that is not there, before any file is looked for.
    """
    device = check_device(device)
    location = _locate(component, path)
    header = _read_header(component, location)
    pieces = _name_pieces(component, header)
    config = config or _read_config(component, location, pieces, header)
    with _naming(location):
        model = component.empty(config)
    names = list(model.state_dict())
    sources = _match(component, location, model, pieces, header)
    tensors = _read_tensors(component, sources, dtype, device)
    model.load_state_dict({name: tensors[component.tied.get(name, name)] for name in names}, strict=True, assign=True)
    return model.eval()


def check_device(device: torch.device | str) -> torch.device:
    """The device if it is there and holds numbers, which `meta` does not. Raises ValueError for any other."""
    try:
        found = torch.device(device)
        torch.zeros((), device=found).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected one that is here, got {str(device)!r} ({reason}); `flux-lab doctor` says what there is"
        ) from error
    return found


# ------------------------------------------------------------------------------------------------------------- 1. find the files


def _locate(component: Component, path: str | Path) -> Path:
    """The weights file, or the folder that holds weights and `config.json`."""
    if Path(path).is_file():
        _refuse_pickle(Path(path))
        return Path(path)
    folder = local_folder(path, [component.folder], {component.folder: component})
    for place in (folder, folder / component.folder):
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(folder, f"config.json and {component.weights}.safetensors", _listing(folder))


def local_folder(path: str | Path, parts: Iterable[str] = PIPELINE_PARTS, components: dict[str, Component] = COMPONENTS) -> Path:
    """`path` if it is a folder; else `path` is a hub id, whose files for `parts` are downloaded, or taken from the cache.

    Of a part that is one of `components` only the files that we read are, of any other all.

    Raises CheckpointError when it is neither, when there is no network, and when the model is gated.
    """
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)):
        raise CheckpointError(path, "a folder, a .safetensors file or a hub id such as 'owner/model'", "no such thing")
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=_download_patterns(parts, components)))
    except errors.GatedRepoError as error:
        how = f"this model is gated: accept its licence at https://huggingface.co/{path}, then log in with `hf auth login`"
        raise CheckpointError(path, how) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(path, "no such folder, and no such model on the hub, or it is private: `hf auth login`") from error
    except errors.HFValidationError as error:
        raise CheckpointError(path, f"no such folder, and no hub id ({error})") from error
    except OSError as error:
        raise CheckpointError(path, f"no such folder, nor in the hub's cache, and the hub cannot be reached ({error})") from error


def _download_patterns(parts: Iterable[str], components: dict[str, Component]) -> list[str]:
    """The files that we read: not the other copies of the weights that a hub repository may hold."""
    patterns = ["model_index.json"]
    for part in parts:
        if part not in components:
            patterns.append(f"{part}/*")
            continue
        weights = components[part].weights
        for file in ("config.json", f"{weights}.safetensors", f"{weights}.safetensors.index.json", f"{weights}-*-of-*.safetensors"):
            patterns += [f"{part}/{file}", file]
    return patterns


def weight_files_of(component: Component, location: Path) -> dict[Path, set[str] | None]:
    """The safetensors files, and the keys to take from each: None for all."""
    if location.is_file():
        return {location: None}
    single, index = (location / f"{component.weights}.safetensors{suffix}" for suffix in ("", ".index.json"))
    if single.is_file():
        return {single: None}
    if not index.is_file():
        for pickled in (file for file in sorted(location.iterdir()) if file.suffix in PICKLE_SUFFIXES):
            _refuse_pickle(pickled)
        raise CheckpointError(location, f"{single.name} or {index.name}", _listing(location))
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
        raise CheckpointError(index, "for each tensor a file of this folder", str(weight_map)[:80], key="weight_map")
    files: dict[Path, set[str] | None] = {}
    for key, name in weight_map.items():
        files.setdefault(location / name, set()).add(key)
    return files


PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def _refuse_pickle(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(3)
    # By its name, or a zip archive, or a pickle's first bytes: its protocol, then a dict or a frame.
    if file.suffix in PICKLE_SUFFIXES or start[:2] == b"PK" or re.match(rb"\x80[\x02-\x05][}\x95]", start):
        convert = "`Model.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)` of diffusers or transformers"
        raise CheckpointError(
            file, f"only safetensors are read: this is a pickle, which can run any code. If you trust it, convert it: {convert}"
        )


# ---------------------------------------------------------------------------------------------------------- 2. headers and names


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """One tensor of a file, not yet read."""

    file: Path
    key: str
    shape: tuple[int, ...]


class Piece(NamedTuple):
    """One tensor of a file and our names for it; more than one when its rows are split."""

    key: str
    ours: tuple[str, ...]
    note: str = ""


def _read_header(component: Component, location: Path) -> dict[str, Entry]:
    """Name and shape of every tensor that is ours, without the prefix."""
    entries = [entry for file, keys in weight_files_of(component, location).items() for entry in _read_file_header(component, file, keys)]
    for prefix in component.prefixes:
        if any(entry.key.startswith(prefix) for entry in entries):
            return {entry.key.removeprefix(prefix): entry for entry in entries if entry.key.startswith(prefix)}
    return {entry.key: entry for entry in entries}


def _read_file_header(component: Component, file: Path, keys: set[str] | None) -> list[Entry]:
    entries = []
    with contextlib.ExitStack() as stack:
        handle = _open(file, stack)
        present = set(handle.keys())
        for key in sorted(present if keys is None else keys):
            if key not in present:
                raise CheckpointError(file, "a tensor, which the index says is here", "nothing", key=key)
            if re.fullmatch(component.ignored, key):
                continue
            part = handle.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(file, f"numbers as {', '.join(DTYPES)}", f"{part.get_dtype()}, which is not supported", key=key)
            entries.append(Entry(file, key, tuple(part.get_shape())))
    return entries


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
    if not file.is_file():
        raise CheckpointError(file, "a safetensors file, which the index names", "nothing")
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except (SafetensorError, OSError) as error:
        _refuse_pickle(file)
        raise CheckpointError(file, "a whole safetensors file", f"{file.stat().st_size} bytes, truncated or corrupt ({error})") from error


def _name_pieces(component: Component, header: dict[str, Entry]) -> list[Piece]:
    """Our names for the tensors, in whichever of the layouts they are."""
    if component.original_key not in header:
        names = component.tied | component.former
        return [Piece(key, (names.get(key, key),)) for key in header]
    levels = _count(header, r"decoder\.up\.(\d+)")
    pieces = []
    for key, entry in header.items():
        renamed = rename(key, component.renaming, levels)
        if renamed is None:
            raise CheckpointError(entry.file, f"a name of {component.model.__name__}'s original layout", "another", key=entry.key)
        pieces.append(Piece(key, *renamed))
    return pieces


def _read_config(component: Component, location: Path, pieces: list[Piece], header: dict[str, Entry]) -> Config:
    """From `config.json`; for a lone file without its own beside it, from the shapes."""
    file = (location if location.is_dir() else location.parent) / "config.json"
    own = component.original_key not in header and file.is_file() and component.config.CLASS_NAME in _classes(_read_json(file))
    if location.is_dir() or own:
        values = _read_json(file)
        _check_class(file, values, component.config.CLASS_NAME)
        with _naming(file):
            return component.config.from_dict(values)
    if component.infer is None:
        raise CheckpointError(location, f"a folder with config.json, which {component.model.__name__} needs", "a lone file")
    try:
        with _naming(location):
            return component.infer({piece.ours[0]: header[piece.key].shape for piece in pieces})
    except KeyError as error:
        layouts = f"{component.model.__name__} in the diffusers or the original layout"
        raise CheckpointError(location, layouts, f"the keys {', '.join(list(header)[:3])}, ...", key=error.args[0]) from error


# -------------------------------------------------------------------------------------------------- 3. compare with the meta model


class Source(NamedTuple):
    """Where the numbers of one parameter come from: a tensor of a file, or its rows from `start` to `stop`."""

    entry: Entry
    note: str = ""
    start: int = 0
    stop: int | None = None


def _match(component: Component, location: Path, model: nn.Module, pieces: list[Piece], header: dict[str, Entry]) -> dict[str, Source]:
    """Parameter -> source. Raises CheckpointError for an extra key, a wrong shape, or a missing key."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in component.tied}
    sources: dict[str, Source] = {}
    for piece in pieces:
        entry = header[piece.key]
        if not expected.keys() >= set(piece.ours):
            nothing = f"no such key in a {component.model.__name__} of this configuration"
            raise CheckpointError(entry.file, nothing, f"one of shape {list(entry.shape)}", key=entry.key)
        rows = [expected[name][0] for name in piece.ours]
        shape = (sum(rows), *expected[piece.ours[0]][1:])
        if entry.shape != shape and not (piece.note == LINEAR and entry.shape == (*shape, 1, 1)):
            raise CheckpointError(entry.file, f"shape {list(shape)}", list(entry.shape), key=entry.key)
        ends = list(itertools.accumulate(rows))
        for name, size, end in zip(piece.ours, rows, ends, strict=True):
            sources[name] = Source(entry, piece.note, end - size, end)
    missing = [name for name in expected if name not in sources]
    if missing:
        found = f"nothing, and {len(missing) - 1} more are missing"
        raise CheckpointError(location, f"shape {list(expected[missing[0]])}", found, key=missing[0])
    return sources


# ------------------------------------------------------------------------------------------------------------- 4. read the numbers


def _read_tensors(component: Component, sources: dict[str, Source], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """The parameters. On the CPU they are the file itself, mapped into memory, unless the dtype changes."""
    tensors, entry, whole = {}, None, None
    with contextlib.ExitStack() as stack:
        files = {source.entry.file for source in sources.values()}
        handles = {file: stack.enter_context(safe_open(file, framework="pt", device=str(device))) for file in files}
        for name, source in sources.items():
            if source.entry != entry:
                entry, whole = source.entry, handles[source.entry.file].get_tensor(source.entry.key)
            tensors[name] = _take(whole, source).to(dtype_of(component, name, dtype or whole.dtype))
    return tensors


def _take(whole: Tensor, source: Source) -> Tensor:
    """One parameter out of a tensor of the file."""
    if source.note == SPLIT:
        return whole[source.start : source.stop]
    if source.note == SWAP:
        return torch.cat(whole.chunk(2)[::-1])
    if source.note == LINEAR and whole.ndim == 4:
        return rearrange(whole, "out_channels in_channels 1 1 -> out_channels in_channels")
    return whole


def dtype_of(component: Component, name: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but fp32 for the modules whose result is too large for fp16: T5 names them."""
    kept = getattr(component.model, "_keep_in_fp32_modules", ())
    return torch.float32 if dtype == torch.float16 and any(word in kept for word in name.split(".")) else dtype


# ------------------------------------------------------------------------------------------------------------------------- writing


def save_model(model: nn.Module, folder: str | Path, components: dict[str, Component] = COMPONENTS) -> None:
    """Write a model in the diffusers layout (the text encoders: transformers'): `config.json` and one safetensors file.

    Raises TypeError for a model that is none of `components`, otherwise as `write_model`.
    """
    component = component_of(model, components)
    write_model(component, model, folder, component.empty(model.config))


def component_of(model: nn.Module, components: dict[str, Component]) -> Component:
    """The one that describes `model`. Raises TypeError when none does."""
    for component in components.values():
        if component.model is type(model):
            return component
    names = [component.model.__name__ for component in components.values()]
    raise TypeError(f"model: expected one of {names}, got {type(model).__name__}")


def write_model(
    component: Component, model: nn.Module, folder: str | Path, expected: nn.Module, metadata: dict[str, str] | None = None
) -> Path:
    """Write `config.json` and one safetensors file, under temporary names first. Returns the safetensors file.

    `expected`: an empty model with the tensors that a reader will look for; `metadata` goes into the header of the file.
    Raises ValueError where `model` has others, CheckpointError where a sharded checkpoint lies, which would win over ours.
    """
    _check_tensors(model, expected)
    folder = Path(folder)
    file, index = (folder / f"{component.weights}.safetensors{suffix}" for suffix in ("", ".index.json"))
    if index.exists():
        raise CheckpointError(index, "a folder without a sharded checkpoint", "one")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in component.tied}
    with replacing(file) as new_file:
        save_file(tensors, new_file, metadata={"format": "pt"} | (metadata or {}))
        write_json(folder / "config.json", model.config.to_dict())
    return file


def _check_tensors(model: nn.Module, expected: nn.Module) -> None:
    """Raises ValueError for a tensor of another name or shape than in `expected`, or with whole numbers in the place of floating ones."""
    wanted, found = _kinds(expected), _kinds(model)
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            instead = "a quantized model is written by save_quantized, all of it in one scheme; of a hoisted one, save the original"
            raise ValueError(f"model: {name}: expected {wanted.get(name, 'nothing')}, got {found.get(name, 'nothing')}: {instead}")


def _kinds(model: nn.Module) -> dict[str, str]:
    """Name -> kind of number and shape of every tensor; one kind for all floating dtypes."""
    state = model.state_dict().items()
    return {name: f"{'float' if tensor.is_floating_point() else tensor.dtype} {list(tensor.shape)}" for name, tensor in state}


def write_pipeline(
    folder: str | Path,
    *,
    models: dict[str, nn.Module],
    scheduler: Any,
    tokenizers: dict[str, str | Path],
    layout: PipelineLayout = FLUX_LAYOUT,
) -> None:
    """Write a pipeline that diffusers reads, with its FluxPipeline unless `layout` says another.

    `models`: transformer, vae, text_encoder and text_encoder_2; `tokenizers`: the folders to copy to tokenizer and tokenizer_2.
    `model_index.json`, which makes the folder a pipeline, is written last. Raises ValueError when parts are missing, and as `save_model`.
    """
    folder = Path(folder)
    given, expected = {*models, *tokenizers, "scheduler"}, set(layout.parts)
    if given != expected:
        raise ValueError(f"models, tokenizers: expected {sorted(expected)} with the scheduler, got {sorted(given)}")
    for model in models.values():  # before any of them is written
        _check_tensors(model, component_of(model, layout.components).empty(model.config))
    for name, model in models.items():
        save_model(model, folder / name, layout.components)
    for name, source in tokenizers.items():
        if Path(source).resolve() != (folder / name).resolve():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler.config.to_dict())
    parts = {name: list(part[:2]) for name, part in layout.parts.items()}
    parts["scheduler"] = [layout.parts["scheduler"][0], type(scheduler).__name__]
    write_json(folder / "model_index.json", {"_class_name": layout.name, **parts, **layout.unused})


# ---------------------------------------------------------------------------------------------------------------------------- json


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(file, "json", f"something else ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(file, "a json object", type(values).__name__)
    return values


def _classes(values: dict[str, Any]) -> list[str]:
    """The classes that a configuration is for: diffusers says `_class_name`, transformers `architectures`."""
    return [values["_class_name"]] if "_class_name" in values else list(values.get("architectures") or [])


def _check_class(file: Path, values: dict[str, Any], expected: str) -> None:
    if expected not in (_classes(values) or [expected]):
        raise CheckpointError(file, f"class {expected}", f"{', '.join(_classes(values))}: another kind of model", key="_class_name")


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Put the file's name before the message of a configuration that we cannot honour."""
    try:
        yield
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(file, str(error)) from error


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"
