"""The command line: `flux-lab generate`, `doctor`, `parity`, `plan`, `bench` and `progress`; `python -m flux_lab` is the same.

Nothing heavy is imported before a command runs, so that `--help` answers at once. A mistake of the user's is one line on stderr and exit
code 2.
"""

import argparse
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flux_lab import __version__, data_dir

if TYPE_CHECKING:
    from PIL import Image
    from tqdm import tqdm

    from flux_lab.pipeline import FluxPipeline

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
# Columns of a film strip, and the longest side of a frame in pixels.
STRIP_STEPS, STRIP_FRAME, STRIP_MARGIN, STRIP_CAPTION = 8, 144, 6, 16
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; a mistake in the arguments raises SystemExit(2)."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"flux-lab: {message}", file=sys.stderr)
            return arguments.run(arguments)
    except KeyboardInterrupt:
        print("flux-lab: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        # Bad values, CheckpointError and unwritable files: each says what was expected.
        parser.error(str(error))


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, in place of the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def build_parser() -> Parser:
    parser = Parser(prog="flux-lab", description="FLUX.1, taken apart: draw pictures, look at the machine, compare with the reference.")
    parser.add_argument("--version", action="version", version=f"flux-lab {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_generate(commands.add_parser("generate", help="draw what a prompt says", description="Draw what a prompt says, as PNG files."))
    doctor = commands.add_parser("doctor", help="print versions, hardware and what can run here, for a bug report")
    doctor.set_defaults(run=run_doctor)
    parity = commands.add_parser("parity", help="compare every component with diffusers and transformers")
    parity.add_argument("--model", type=Path, metavar="FOLDER", help="checkpoint for the tokenizers and the whole pipeline (the miniature)")
    parity.add_argument("--json", type=Path, metavar="FILE", help="also write the table here")
    parity.set_defaults(run=run_parity)
    add_plan(commands.add_parser("plan", help="say how much memory a picture needs, before anything is downloaded"))
    add_bench(commands.add_parser("bench", help="time ours, the fast path and diffusers side by side"))
    progress = commands.add_parser("progress", help="show which exercises were solved here; nothing is sent anywhere")
    form = progress.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print it as JSON, to be shared: no names, no paths")
    form.add_argument("--reset", action="store_true", help="begin anew; the old file is renamed")
    progress.set_defaults(run=run_progress)
    return parser


def add_generate(parser: Parser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw")
    parser.add_argument("--prompt-2", metavar="TEXT", help="another prompt for T5; PROMPT then goes to CLIP alone")
    parser.add_argument("--negative", metavar="TEXT", help="what not to draw; needs --true-cfg")
    parser.add_argument("--true-cfg", type=number(1), default=1.0, metavar="SCALE", help="above 1: a second pass with --negative (1)")
    parser.add_argument("--guidance", type=number(0), default=3.5, metavar="SCALE", help="guidance scale, an input of the network (3.5)")
    parser.add_argument("--steps", type=whole(1, 1000), metavar="N", help="denoising steps (28; 4 without guidance embedding: schnell)")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="seed of the first picture (0)")
    parser.add_argument("--count", type=whole(1), default=1, metavar="N", help="pictures, with seeds SEED, SEED + 1, ... (1)")
    parser.add_argument("--width", type=whole(1), metavar="PIXELS", help="a multiple of 16 (the checkpoint's own)")
    parser.add_argument("--height", type=whole(1), metavar="PIXELS", help="a multiple of 16 (the checkpoint's own)")
    parser.add_argument("--model", metavar="PATH", help="a folder in the diffusers layout, a hub id, or flux-mini-schnell (flux-mini)")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="PATH", help="a folder, or a file name in .png (outputs)")
    parser.add_argument(
        "--filmstrip", nargs="?", type=png_name, const=True, metavar="FILE", help="also write a strip of the steps, beside the picture"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (auto: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="precision (auto: float32 for the miniature and on the CPU, else bfloat16)"
    )
    parser.set_defaults(run=run_generate)


def add_plan(parser: Parser) -> None:
    parser.add_argument("--model", choices=("dev", "schnell", "mini"), default="dev", help="whose sizes to take (dev)")
    parser.add_argument(
        "--size", type=size, default=(None, None), metavar="PIXELS", help="such as 1024 or 1024x768, width first (the model's own)"
    )
    parser.add_argument("--batch", type=whole(1), default=1, metavar="N", help="pictures at once (1)")
    parser.add_argument("--steps", type=whole(1, 1000), default=28, metavar="N", help="denoising steps (28)")
    parser.add_argument("--bits", type=int, choices=(32, 16, 8, 4), default=16, help="bits for a weight of T5 and the transformer (16)")
    parser.add_argument("--negative", action="store_true", help="with a negative prompt and true CFG")
    parser.add_argument("--stream", action="store_true", help="read T5 and the transformer from disk, block by block")
    parser.add_argument("--budget", metavar="SIZE", help="such as 16GB (the memory of the device)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="whose memory it has to fit into (auto: a GPU if there is one)")
    parser.set_defaults(run=run_plan)


def add_bench(parser: Parser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: a look, not a measurement")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="these cases alone, such as step, end-to-end, vae, blocks-bf16"
    )
    parser.add_argument("--compile", action="store_true", help="also the fast path compiled, which needs a C++ compiler")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute (cpu)")
    parser.set_defaults(run=run_bench)


def size(text: str) -> tuple[int, int]:
    """An argument type: width and height in pixels, one number for both."""
    found = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size such as 1024 or 1024x768, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argument type: a whole number in a range."""
    expected = f"a whole number of at least {minimum}" if maximum is None else f"a whole number from {minimum} to {maximum}"

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or int(text) < minimum or (maximum is not None and int(text) > maximum):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return int(text)

    return parse


def number(minimum: float) -> Callable[[str], float]:
    """An argument type: a finite number of at least `minimum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not minimum <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number of at least {minimum}, got {text!r}")
        return value

    return parse


def png_name(text: str) -> Path:
    """An argument type: a file name in .png. A prompt right after `--filmstrip` would be taken for one."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"expected no value or a file name in .png, got {text!r}; put the prompt first")
    return Path(text)


def run_doctor(arguments: argparse.Namespace) -> int:
    from flux_lab.instruments.doctor import report

    print(report())
    return 0


def run_parity(arguments: argparse.Namespace) -> int:
    from flux_lab.instruments.parity import main as compare

    return compare(arguments.model, arguments.json)


def run_plan(arguments: argparse.Namespace) -> int:
    from flux_lab.inference.memory import report

    names = ("batch", "bits", "steps", "stream", "negative")
    settings = {name: getattr(arguments, name) for name in names} | dict(zip(("width", "height"), arguments.size, strict=True))
    # With a budget the device need not be here: the plan is for another machine.
    device = arguments.device if arguments.budget else choose_device(arguments.device)
    return report(arguments.model, device, arguments.budget, **settings)


def run_bench(arguments: argparse.Namespace) -> int:
    from flux_lab.inference.benchmark import main as benchmark

    device = choose_device(arguments.device)
    return benchmark(arguments.only, arguments.json, quick=arguments.quick, compile=arguments.compile, device=device)


def run_progress(arguments: argparse.Namespace) -> int:
    import json

    from flux_lab.exercises import LESSONS, progress

    file = progress.progress_file()
    if file is None:
        raise ValueError("FLUX_LAB_PROGRESS: it is set to nothing, so no progress is kept; unset it or name a file")
    if arguments.reset:
        print(f"renamed to {progress.set_aside(file, 'old')}" if file.exists() else "there was no progress to forget")
        return 0
    summary = progress.summary(LESSONS, progress.read(file))
    print(json.dumps(summary, indent=2) if arguments.json else "\n".join([*progress.lines(summary), f"kept in {file}"]))
    return 0


# ---- generate -----------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """One column of a film strip: what one step, from `sigma` to `sigma_next`, aimed at and where it arrived."""

    step: int
    sigma: float
    sigma_next: float
    x0: "Image.Image"
    latents: "Image.Image"


def run_generate(arguments: argparse.Namespace) -> int:
    """Draw the pictures one after the other, each from a generator of its own: a seed gives the same picture whatever `--count` is."""
    if (arguments.true_cfg > 1) != (arguments.negative is not None):
        raise ValueError("--negative and --true-cfg above 1 go together: one has no effect without the other")
    files = {seed: files_for(arguments, seed) for seed in range(arguments.seed, arguments.seed + arguments.count)}
    for file in {file for pair in files.values() for file in pair if file is not None}:
        file.parent.mkdir(parents=True, exist_ok=True)
    pipe = load(arguments)
    arguments.steps = arguments.steps or (28 if pipe.transformer.config.guidance_embeds else 4)
    from tqdm import tqdm

    with tqdm(total=arguments.count * arguments.steps, unit="step", disable=None) as bar:
        for seed, (file, strip) in files.items():
            picture, frames = draw(pipe, arguments, seed, bar)
            save_png(picture, file, metadata(arguments, seed, picture, pipe))
            if strip is not None:
                save_png(film_strip(frames), strip, metadata(arguments, seed, picture, pipe))
            bar.write("\n".join(str(written) for written in (file, strip) if written is not None))
    return 0


def load(arguments: argparse.Namespace) -> "FluxPipeline":
    import torch

    from flux_lab.pipeline import MINIATURES, FluxPipeline

    device, dtype, model = choose_device(arguments.device), arguments.dtype, arguments.model or MINIATURES["dev"]
    bundled = model in MINIATURES.values() and not Path(model).exists()
    if dtype == "auto":
        dtype = "float32" if bundled or device == "cpu" else "bfloat16"
    return FluxPipeline.from_pretrained(data_dir() / model if bundled else model, dtype=getattr(torch, dtype), device=device)


def choose_device(name: str) -> str:
    """The device of that name; for "auto" a GPU if there is one. Raises ValueError for one that is not there."""
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in present.items() if there)
    if not present[name]:
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no such device here; `flux-lab doctor` says what there is")
    return name


def draw(pipe: "FluxPipeline", arguments: argparse.Namespace, seed: int, bar: "tqdm") -> tuple["Image.Image", list[Frame]]:
    """One picture, and the frames of its film strip if one is wanted."""
    import torch

    frames, wanted = [], strip_steps(arguments.steps) if arguments.filmstrip else []
    states = pipe.steps(
        arguments.prompt,
        arguments.prompt_2,
        negative_prompt=arguments.negative,
        true_cfg_scale=arguments.true_cfg,
        guidance_scale=arguments.guidance,
        num_inference_steps=arguments.steps,
        height=arguments.height,
        width=arguments.width,
        generator=torch.Generator().manual_seed(seed),
    )
    for state in states:
        bar.update()
        if state.index in wanted:
            frames.append(Frame(state.index + 1, state.sigma, state.sigma_next, state.image("x0"), state.image("latents")))
    return state.image("latents"), frames


def strip_steps(steps: int) -> list[int]:
    """Which steps a film strip shows: all, or as many as it has columns, evenly spaced, the first and the last among them."""
    columns = min(steps, STRIP_STEPS)
    return [round(column * (steps - 1) / max(columns - 1, 1)) for column in range(columns)]


def film_strip(frames: Sequence[Frame]) -> "Image.Image":
    """Two rows: the picture that each step aimed at (x0), and the latents that it arrived at, decoded."""
    from PIL import Image, ImageDraw, ImageFont

    scale = min(1, STRIP_FRAME / max(frames[0].x0.size))
    width, height = (round(side * scale) for side in frames[0].x0.size)
    cell_width, cell_height = max(width, STRIP_FRAME) + STRIP_MARGIN, height + STRIP_CAPTION + STRIP_MARGIN
    strip = Image.new("RGB", (len(frames) * cell_width + STRIP_MARGIN, 2 * cell_height + STRIP_MARGIN), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(size=11)
    for column, frame in enumerate(frames):
        x0 = f"step {frame.step}: x0 at sigma {frame.sigma:.2f}", frame.x0
        latents = f"latents at sigma {frame.sigma_next:.2f}", frame.latents
        for row, (caption, picture) in enumerate((x0, latents)):
            left, top = STRIP_MARGIN + column * cell_width, STRIP_MARGIN + row * cell_height
            pen.text((left, top), caption, fill="black", font=font)
            strip.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top + STRIP_CAPTION))
    return strip


def metadata(arguments: argparse.Namespace, seed: int, picture: "Image.Image", pipe: "FluxPipeline") -> dict[str, str]:
    """What the picture was made from, under the names of the pipeline's arguments. Of a model's folder only the last name."""
    parameter = next(pipe.transformer.parameters())
    local = arguments.model is not None and Path(arguments.model).is_dir()
    values = {
        "Software": f"flux_lab {__version__}",
        "prompt": arguments.prompt,
        "prompt_2": arguments.prompt_2,
        "negative_prompt": arguments.negative,
        "true_cfg_scale": arguments.true_cfg,
        "guidance_scale": arguments.guidance,
        "num_inference_steps": arguments.steps,
        "seed": seed,
        "width": picture.width,
        "height": picture.height,
        "model": Path(arguments.model).resolve().name if local else arguments.model or "flux-mini",
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def files_for(arguments: argparse.Namespace, seed: int) -> tuple[Path, Path | None]:
    """Where the picture of this seed goes, and its film strip if one is wanted. Names end with the seed where there are several."""
    out, strip = arguments.out, arguments.filmstrip
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"):
        raise ValueError(f"--out: expected a folder or a file name in .png, got {str(out)!r}")
    if out.suffix.lower() == ".png" and not out.is_dir():
        file = numbered(out, seed) if arguments.count > 1 else out
    else:
        file = out / f"{slug(arguments.prompt)}_{seed}.png"
    if isinstance(strip, Path):
        strip = numbered(strip, seed) if arguments.count > 1 else strip
        if strip.resolve() == file.resolve():
            raise ValueError(f"--filmstrip: expected another file than the picture's, got {str(strip)!r}")
        return file, strip
    return file, file.with_stem(f"{file.stem}_steps") if strip else None


def numbered(file: Path, seed: int) -> Path:
    return file.with_stem(f"{file.stem}_{seed}")


def slug(prompt: str) -> str:
    """The prompt as a file name: letters and digits joined by hyphens, at most 48 characters."""
    return re.sub(r"\W+", "-", prompt.lower())[:48].strip("-_") or "picture"


def save_png(picture: "Image.Image", file: Path, text: dict[str, str]) -> None:
    """Write a PNG with `text` in it, under a temporary name first."""
    from PIL.PngImagePlugin import PngInfo

    from flux_lab.files import replacing

    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    with replacing(file) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


if __name__ == "__main__":
    sys.exit(main())
