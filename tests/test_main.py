"""The command line: what it writes, that a seed is a picture, and that a mistake is one line and exit code 2."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import randomize_
from PIL import Image

from flux_lab import __main__ as command_line
from flux_lab import __version__
from flux_lab.__main__ import Frame, film_strip, main, slug, strip_steps
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.clip import CLIPTextModel
from flux_lab.config import FLUX_DEV_SCHEDULER, TINY, TINY_CLIP, TINY_T5, TINY_VAE
from flux_lab.exercises import EXERCISES, LESSONS, check
from flux_lab.pipeline import FluxPipeline
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

ROOT = Path(__file__).parents[1]
PROMPT = "a red cube"


class Letters:
    """Stands in for both tokenizers: every character is an id."""

    model_max_length = 8

    def encode(self, text: str) -> list[int]:
        return [*(ord(letter) % 100 for letter in text[: self.model_max_length - 1]), 1]

    def __call__(self, texts: list[str], max_length: int) -> torch.Tensor:
        return torch.tensor([(self.encode(text) + [0] * max_length)[:max_length] for text in texts])


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    """Random and tiny: 32 pixels, three levels of noise are enough to see that steps are taken."""
    vae = dataclasses.replace(TINY_VAE, sample_size=32)
    clip = dataclasses.replace(TINY_CLIP, hidden_size=TINY.pooled_projection_dim)
    t5 = dataclasses.replace(TINY_T5, d_model=TINY.joint_attention_dim)
    return FluxPipeline(
        transformer=randomize_(FluxTransformer2DModel(TINY)),
        scheduler=FlowMatchEulerDiscreteScheduler(FLUX_DEV_SCHEDULER),
        vae=randomize_(AutoencoderKL(vae)),
        text_encoder=randomize_(CLIPTextModel(clip)),
        tokenizer=Letters(),
        text_encoder_2=randomize_(T5EncoderModel(t5)),
        tokenizer_2=Letters(),
    )


@pytest.fixture
def draw(pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., list[Path]]:
    """Run `flux-lab generate PROMPT ...` on the tiny pipeline in an empty folder; gives the files that it names."""
    monkeypatch.setattr(command_line, "load", lambda arguments: pipe)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> list[Path]:
        assert main(["generate", PROMPT, "--steps", "2", *arguments]) == 0
        return [Path(line) for line in capsys.readouterr().out.split("\n") if line]

    return run


# ---- generate -----------------------------------------------------------------------------------------------------------


def test_picture_is_the_pipelines(draw: Callable, pipe: FluxPipeline) -> None:
    (file,) = draw("--seed", "7", "--guidance", "2")
    generator = torch.Generator().manual_seed(7)
    pipe.set_progress_bar_config(disable=True)
    (expected,) = pipe(PROMPT, num_inference_steps=2, guidance_scale=2.0, generator=generator).images
    assert file == Path("outputs/a-red-cube_7.png")
    assert Image.open(file).tobytes() == expected.tobytes()


def test_every_option_reaches_the_pipeline(draw: Callable, pipe: FluxPipeline) -> None:
    options = ["--prompt-2", "blue", "--negative", "green", "--true-cfg", "2.5", "--width", "48", "--height", "16", "--seed", "3"]
    (file,) = draw(*options)
    expected = pipe(
        PROMPT,
        prompt_2="blue",
        negative_prompt="green",
        true_cfg_scale=2.5,
        width=48,
        height=16,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert Image.open(file).tobytes() == expected.tobytes()


def test_metadata(draw: Callable) -> None:
    (file,) = draw("--seed", "3", "--negative", "Ελλάς", "--true-cfg", "2")
    assert Image.open(file).text == {
        "Software": f"flux_lab {__version__}",
        "prompt": PROMPT,
        "negative_prompt": "Ελλάς",
        "true_cfg_scale": "2.0",
        "guidance_scale": "3.5",
        "num_inference_steps": "2",
        "seed": "3",
        "width": "32",
        "height": "32",
        "model": "flux-mini",
        "dtype": "float32",
        "device": "cpu",
    }


def test_the_bundled_sister_takes_four_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--model", "flux-mini-schnell", "--device", "cpu"]) == 0
    written = Image.open(tmp_path / "outputs" / "a-red-cube_0.png").text
    assert (written["num_inference_steps"], written["model"], written["dtype"]) == ("4", "flux-mini-schnell", "float32")


def test_metadata_names_no_folder_above_the_model(draw: Callable, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (file,) = draw("--model", str(tmp_path / "my-model"))
    assert Image.open(file).text["model"] == "my-model"


def test_count_gives_what_each_seed_gives_alone(draw: Callable) -> None:
    together = draw("--seed", "4", "--count", "2", "--out", "together")
    alone = [file for seed in ("4", "5") for file in draw("--seed", seed, "--out", "alone")]
    assert [file.name for file in together] == ["a-red-cube_4.png", "a-red-cube_5.png"]
    assert [file.read_bytes() for file in together] == [file.read_bytes() for file in alone]
    assert together[0].read_bytes() != together[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "new/folder"], ["new/folder/a-red-cube_0.png"]),
        (["--out", "x.png"], ["x.png"]),
        (["--out", "x.png", "--count", "2"], ["x_0.png", "x_1.png"]),
        (["--out", "x.png", "--filmstrip"], ["x.png", "x_steps.png"]),
        (["--out", "x.png", "--filmstrip", "deep/y.png"], ["x.png", "deep/y.png"]),
        (
            ["--filmstrip", "y.png", "--count", "2"],
            ["outputs/a-red-cube_0.png", "y_0.png", "outputs/a-red-cube_1.png", "y_1.png"],
        ),
    ],
)
def test_files(draw: Callable, arguments: list[str], expected: list[str], tmp_path: Path) -> None:
    assert draw(*arguments) == [Path(name) for name in expected]
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")) == sorted(map(Path, expected))


def test_failed_write_leaves_the_old_picture(draw: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (file,) = draw()
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(SystemExit, match="2"):
        main(["generate", PROMPT, "--steps", "1"])
    assert file.read_bytes() == before
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A large, shiny RED sphere!", "a-large-shiny-red-sphere"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "picture"),
        ("∎ …", "picture"),
        ("ein grüner Würfel", "ein-grüner-würfel"),
        ("a" * 47 + " b", "a" * 47),
    ],
)
def test_slug(prompt: str, name: str) -> None:
    assert slug(prompt) == name


# ---- the film strip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "shown"), [(1, [0]), (2, [0, 1]), (8, list(range(8))), (28, [0, 4, 8, 12, 15, 19, 23, 27])])
def test_strip_steps(steps: int, shown: list[int]) -> None:
    assert strip_steps(steps) == shown


@pytest.mark.parametrize("size", [(32, 32), (1024, 512)])
def test_film_strip_shows_both_rows(size: tuple[int, int]) -> None:
    frames = [Frame(step, 1.0, 0.5, Image.new("RGB", size, "red"), Image.new("RGB", size, "blue")) for step in (1, 2, 3)]
    strip = film_strip(frames)
    colours = {colour: count for count, colour in strip.getcolors(maxcolors=2**16)}
    longest = min(command_line.STRIP_FRAME, max(size))
    pixels = 3 * longest * longest * size[1] // size[0]
    assert (colours[255, 0, 0], colours[0, 0, 255]) == (pixels, pixels)
    assert colours[0, 0, 0] > 0


def test_strip_holds_the_pipelines_steps(draw: Callable, pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(command_line, "film_strip", lambda frames: seen.extend(frames) or film_strip(frames))
    draw("--filmstrip")
    states = list(pipe.steps(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)))
    assert [(frame.step, frame.sigma, frame.sigma_next) for frame in seen] == [(s.index + 1, s.sigma, s.sigma_next) for s in states]
    assert [frame.x0.tobytes() for frame in seen] == [state.image("x0").tobytes() for state in states]
    assert [frame.latents.tobytes() for frame in seen] == [state.image("latents").tobytes() for state in states]


# ---- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["generate"], "PROMPT"),
        (["generate", PROMPT, "--stepps", "3"], "--stepps"),
        (["generate", PROMPT, "--steps", "0"], "--steps: expected a whole number from 1 to 1000, got '0'"),
        (["generate", PROMPT, "--steps", "1.5"], "--steps"),
        (["generate", PROMPT, "--seed", "-1"], "--seed"),
        (["generate", PROMPT, "--seed", str(2**63)], "--seed"),
        (["generate", PROMPT, "--count", "none"], "--count"),
        (["generate", PROMPT, "--guidance", "nan"], "--guidance"),
        (["generate", PROMPT, "--guidance", "-1"], "--guidance: expected a number of at least 0, got '-1'"),
        (["generate", PROMPT, "--true-cfg", "inf"], "--true-cfg"),
        (["generate", PROMPT, "--true-cfg", "3"], "--negative"),
        (["generate", PROMPT, "--negative", "blue"], "--true-cfg"),
        (["generate", PROMPT, "--device", "tpu"], "tpu"),
        (["generate", PROMPT, "--out", "picture.jpg"], "--out"),
        (["generate", PROMPT, "--out", "a.png", "--filmstrip", "b/../a.png"], "--filmstrip: expected another file than the picture's"),
        (["generate", "--filmstrip", PROMPT], "put the prompt first"),
        (["parity", "--json"], "--json"),
        (["progress"], "FLUX_LAB_PROGRESS: it is set to nothing"),
        (["progress", "--json", "--reset"], "not allowed with argument --json"),
    ],
)
def test_mistake_is_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    assert_one_line_error(arguments, named, capsys)


def test_wrong_model_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(["generate", PROMPT, "--model", str(tmp_path)], "model_index.json", capsys)
    assert_one_line_error(["generate", PROMPT, "--model", "no such model"], "no such model", capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_device_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(["generate", PROMPT, "--device", "cuda"], "--device cuda", capsys)


def test_size_that_the_model_cannot_draw_is_one_line(draw: Callable, capsys: pytest.CaptureFixture) -> None:
    assert_one_line_error(["generate", PROMPT, "--width", "15"], "width", capsys)


def assert_one_line_error(arguments: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.startswith("flux-lab")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert named in err


def test_warning_is_one_line(draw: Callable, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", PROMPT, "--steps", "1", "--width", "40"]) == 0
    assert capsys.readouterr().err == "flux-lab: width: 40 is not a multiple of 16, using 32\n"


def test_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "run_doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "flux-lab: interrupted\n"


# ---- progress -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def progress_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUX_LAB_PROGRESS", str(tmp_path / "progress.json"))
    return tmp_path / "progress.json"


def test_progress_is_shown_shared_and_forgotten(progress_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["progress"]) == 0
    assert f"kept in {progress_file}" in capsys.readouterr().out
    assert not progress_file.exists()
    check("image_tokens", EXERCISES["image_tokens"].reference)
    capsys.readouterr()
    assert main(["progress"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"00 welcome: 1 of {len(LESSONS['00_welcome'])}"
    assert shown[-2] == f"1 of {len(EXERCISES)} exercises solved"
    assert main(["progress", "--json"]) == 0
    text = capsys.readouterr().out
    shared = json.loads(text)
    assert (shared["solved"], shared["exercises"], list(shared["lessons"])) == (1, len(EXERCISES), list(LESSONS))
    assert str(progress_file.parent) not in text
    assert main(["progress", "--reset"]) == 0
    assert main(["progress", "--reset"]) == 0
    assert capsys.readouterr().out == f"renamed to {progress_file}.old\nthere was no progress to forget\n"
    assert [path.name for path in progress_file.parent.iterdir()] == ["progress.json.old"]


@pytest.mark.filterwarnings("default")  # as in a terminal
def test_broken_progress_is_one_line(progress_file: Path, capsys: pytest.CaptureFixture) -> None:
    progress_file.write_text("{")
    assert main(["progress"]) == 0
    out, err = capsys.readouterr()
    assert f"0 of {len(EXERCISES)} exercises solved" in out
    assert err.startswith(f"flux-lab: {progress_file} is not a progress file")
    assert err.count("\n") == 1


# ---- starting -----------------------------------------------------------------------------------------------------------


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = run_python("-X", "importtime", "-m", "flux_lab", *arguments)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert imported & {"torch", "numpy", "PIL", "diffusers", "transformers", "matplotlib"} == set()
    assert "flux-lab" in done.stdout


def test_pipeline_imports_no_reference() -> None:
    heavy = ["diffusers", "transformers", "matplotlib", "huggingface_hub"]
    done = run_python("-c", f"import sys, flux_lab.pipeline; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout == "[]\n"


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"flux-lab {__version__}\n"


def test_commands_reach_their_modules(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from flux_lab.instruments import doctor, parity

    monkeypatch.setattr(doctor, "report", lambda: "all is well")
    monkeypatch.setattr(parity, "main", lambda folder, json_file: print(folder, json_file) or 1)
    assert main(["doctor"]) == 0
    assert main(["parity", "--model", "a", "--json", "b"]) == 1
    assert capsys.readouterr().out == "all is well\na b\n"
