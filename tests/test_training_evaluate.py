"""The evaluation: its statistics, its measurements on cases with a known answer, and the whole command on a tiny checkpoint."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from training_parts import write_parts

from flux_lab import FluxPipeline
from flux_lab.checkpoints import save_model
from flux_lab.latents import pack_latents
from flux_lab.training import behaviour, captions, card, curve, evaluate, export, quality, reader, report, world
from flux_lab.training.grow import with_gates
from flux_lab.training.report import Tally


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    export.export(**write_parts(folder), out=folder / "mini", dtype=torch.float32, vae_dtype=torch.float32)
    return folder / "mini"


@pytest.fixture(scope="module")
def pipe(model):
    return FluxPipeline.from_pretrained(model)


# ---- statistics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(90, 100, 0.8256, 0.9448), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (140, 200, 0.6332, 0.7592)],
)
def test_wilson_interval(right, count, low, high):
    assert Tally(right, count).interval == pytest.approx((low, high), abs=1e-4)


def test_only_what_is_stated_counts():
    scores = [{"count": True, "color": True}, {"count": True, "color": False, "floor": True}, {"count": True}]
    table = evaluate.tally(scores)
    assert table == {"count": Tally(3, 3), "color": Tally(1, 2), "floor": Tally(1, 1), "all": Tally(2, 3)}
    assert list(table) == [name for name in evaluate.ORDER if name in table]


# ---- prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_are_held_out_and_their_seed_alone_decides():
    scenes = evaluate.sample_scenes(20, seed=3)
    assert all(world.held_out(scene) for scene in scenes)
    assert scenes == evaluate.sample_scenes(20, seed=3)
    assert scenes != evaluate.sample_scenes(20, seed=4)
    assert not any(world.held_out(scene) for scene in evaluate.sample_scenes(20, which="train"))


def test_prompts_state_what_is_true_of_their_scene():
    scenes = evaluate.sample_scenes(20)
    for scene, caption in zip(scenes, evaluate.sample_captions(scenes), strict=True):
        ways = [captions.everything(way) for way in (scene, scene.swapped())]
        assert any(all(evaluate.score(caption.stated, way).values()) for way in ways)


# ---- the autoencoder ----------------------------------------------------------------------------------------------------


def test_ssim_of_known_pictures():
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 256, (3, 20, 17, 3), dtype=np.uint8)
    flat = np.full((1, 20, 17, 3), 100, np.uint8)
    assert quality.ssim(noisy, noisy) == pytest.approx([1, 1, 1])
    assert (abs(quality.ssim(noisy, noisy[::-1].copy())[[0, 2]]) < 0.2).all()
    # Without structure only the means count: (2 a b + c1) / (a^2 + b^2 + c1).
    expected = (2 * 100 * 150 + 2.55**2) / (100**2 + 150**2 + 2.55**2)
    assert quality.ssim(flat, flat + 50) == pytest.approx([expected])
    # One picture's score does not depend on the others, nor on the order of the two.
    shifted = np.clip(noisy.astype(int) + 20, 0, 255).astype(np.uint8)
    assert quality.ssim(noisy, shifted)[1:2] == pytest.approx(quality.ssim(shifted[1:2], noisy[1:2]))


def test_psnr_of_a_known_error():
    images = np.full((2, 4, 6, 3), 100, np.uint8)
    others = images.copy()
    others[0] += 10
    others[1, :, :3] += 20
    masks = np.zeros((2, 4, 6), bool)
    masks[:, :, :3] = True
    assert quality.psnr(images, others) == pytest.approx([20 * np.log10(25.5), 20 * np.log10(255 / 20 * 2**0.5)])
    assert quality.psnr(images, others, masks) == pytest.approx([20 * np.log10(25.5), 20 * np.log10(255 / 20)])
    assert np.isfinite(quality.psnr(images, images)).all()


def test_masks_cover_the_objects_and_nothing_else():
    scenes = evaluate.sample_scenes(6)
    before = pictures_of(scenes)
    masks = quality.object_masks(scenes, 64)
    # Another colour of an object changes all pixels of the mask, and hardly any other: reflections are of the sky alone.
    recolored = [
        dataclasses.replace(scene, objects=tuple(dataclasses.replace(each, color=other(each.color)) for each in scene.objects))
        for scene in scenes
    ]
    changed = (before != pictures_of(recolored)).any(axis=-1)
    assert changed[masks].mean() > 0.98
    assert (changed & ~masks).mean() < 0.03
    assert 0.01 < masks.mean() < 0.4


def pictures_of(scenes):
    return evaluate.render(scenes, 64)


def other(color):
    return world.COLORS[(world.COLORS.index(color) + 3) % len(world.COLORS)]


def test_reconstructions_and_latents_are_the_autoencoders(pipe):
    images = evaluate.render(evaluate.sample_scenes(3), 128)
    decoded, latents = quality.reconstruct(pipe.vae, images, batch_size=2)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        # In the same batches: convolutions of others are summed in another order.
        mode = torch.cat([pipe.vae.encode(some).mode() for some in pixels.split(2)])
        expected = pipe.image_processor.postprocess(pipe.vae.decode(mode))
    assert np.abs(decoded.astype(int) - np.stack([np.asarray(each) for each in expected])).max() <= 1
    torch.testing.assert_close(latents, (mode - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)
    # What the pipeline does before it decodes undoes this scaling.
    again = np.stack([np.asarray(each) for each in pipe.decode(pack_latents(latents), 128, 128)])
    assert np.abs(decoded.astype(int) - again).max() <= 1


# ---- generating ---------------------------------------------------------------------------------------------------------


def test_a_picture_depends_on_its_prompt_and_number_alone(pipe):
    prompts = ["red cube", "blue ball", "cone"]
    together = evaluate.generate(pipe, prompts, num_inference_steps=2)
    apart = evaluate.generate(pipe, prompts, num_inference_steps=2, batch_size=1)
    assert together.shape == (3, 128, 128, 3)
    assert np.abs(together.astype(int) - apart).max() <= 1
    pipe.set_progress_bar_config(disable=True)
    (second,) = pipe(prompts[1], num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images
    assert np.abs(together[1].astype(int) - np.asarray(second)).max() <= 1
    swapped = evaluate.generate(pipe, prompts, prompts_2=prompts[::-1], num_inference_steps=2)
    differs = [np.abs(swapped[index].astype(int) - together[index]).max() > 1 for index in range(3)]
    assert differs == [True, False, True]


def test_obedience_is_what_the_reader_sees(pipe, monkeypatch):
    scenes = evaluate.sample_scenes(4)
    stated = evaluate.sample_captions(scenes)
    shown = [captions.everything(scene) for scene in scenes]
    shown[3] = dataclasses.replace(shown[3], objects=())
    monkeypatch.setattr(evaluate, "read_attributes", lambda reader, images: shown)
    result = evaluate.obedience_of(pipe, None, stated, num_inference_steps=1)
    assert [all(each.values()) for each in result.scores] == [True, True, True, False]
    assert result.table["all"] == result.table["count"] == Tally(3, 4)


def test_a_block_without_gates_has_no_effect_and_all_others_have_one(pipe, monkeypatch):
    transformer = copy.deepcopy(pipe.transformer)
    transformer.single_transformer_blocks[1] = with_gates(transformer.single_transformer_blocks[1], 0.0)
    monkeypatch.setattr(pipe, "transformer", transformer)
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    effects = behaviour.block_effects(pipe, ["red cube", "cone"], latents, guidance=3.5)
    assert list(effects) == ["double 00", "double 01", "single 00", "single 01", "single 02"]
    assert effects.pop("single 01") == [0.0] * len(behaviour.SIGMAS)
    assert all(0 < value < 10 for each in effects.values() for value in each)
    # Afterwards nothing is taken out any more.
    assert behaviour.block_effects(pipe, ["red cube", "cone"], latents, guidance=3.5)["double 00"] == effects["double 00"]


def test_conflict_counts_whose_facts_the_pictures_show(monkeypatch):
    scenes = evaluate.sample_scenes(3)
    stated = [captions.Caption("", captions.everything(scene)) for scene in scenes]
    following = [each.stated for each in [*stated[1:], stated[0]]]
    monkeypatch.setattr(behaviour, "read_attributes", lambda reader, images: following)
    found = behaviour.conflict(lambda prompts, prompts_2: np.zeros((3, 8, 8, 3), np.uint8), None, stated)
    assert (found["right"]["prompt_2"], found["wins"], found["ties"]) == (1.0, {"prompt": 0, "prompt_2": 3}, 0)
    assert found["right"]["prompt"] < 1


def test_diversity_is_how_often_seeds_differ_in_what_the_prompt_leaves_open():
    def scene(size, floor):
        cube = captions.StatedObject(shape="cube", color="red", size=size, material="shiny")
        return captions.Stated(objects=(cube,), floor=floor)

    cube = captions.StatedObject(shape="cube", color="red", material="matte")
    open_floor = captions.Caption("", captions.Stated(objects=(cube,)))
    on_grass = captions.Caption("", captions.Stated(objects=(cube,), floor="grassy"))
    seeds = [scene("small", "gray"), scene("small", "sandy"), scene("large", "gray")]
    assert behaviour.diversity([open_floor], [seeds]) == 4 / 6
    assert behaviour.diversity([on_grass], [seeds]) == 2 / 3
    assert behaviour.diversity([open_floor], [seeds[:1] * 3]) == 0
    everything = captions.Caption("", scene("small", "gray"))
    assert behaviour.diversity([everything], [seeds]) is None
    assert behaviour.diversity([everything, on_grass], [seeds, seeds]) == 2 / 3


# ---- the command, its report and the model card -------------------------------------------------------------------------


def write_run(folder, steps=(1.0, 2.0, 1.5), batch_size=4):
    folder.mkdir(parents=True)
    settings = {"steps": len(steps), "batch_size": batch_size, "learning_rate": 0.001, "decay": 0.3, "ema": 0.99}
    save_file({"model.x": torch.zeros(1)}, folder / "checkpoint.safetensors", {"step": "3", "settings": json.dumps(settings)})
    lines = [json.dumps({"step": step, "loss": 3.0 - step, "seconds": seconds}) for step, seconds in enumerate(steps)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.fixture(scope="module")
def evaluated(model, tmp_path_factory, monkeypatch_module):
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "reader").mkdir()
    reader.save_reader(reader.Reader(), folder / "reader")
    write_run(folder / "runs" / "vae")
    write_run(folder / "runs" / "deepened", steps=(60.0, 7200.0))
    (folder / "runs" / "scenes").mkdir()
    (folder / "runs" / "scenes" / "settings.json").write_text(json.dumps({"count": 32000, "seed": 7, "captions": 8}))
    (folder / "runs" / "deepened" / "transformer").mkdir()
    (folder / "runs" / "deepened" / "transformer" / "config.json").write_text((model / "transformer" / "config.json").read_text())
    for name, small in {"GUIDANCES": (1.0, 4.0), "STEPS": (1, 2), "SIGMAS": (1.0, 0.5)}.items():
        monkeypatch_module.setattr(evaluate.behaviour, name, small)
    monkeypatch_module.setattr(evaluate, "BLOCK_PICTURES", 2)
    sizes = ["--prompts", "3", "--scenes", "2", "--steps", "1", "--batch", "2", "--behaviour", "2", "--true-cfg", "2", "--device", "cpu"]
    folders = ["--model", str(model), "--reader", str(folder / "reader"), "--out", str(folder / "out"), "--runs", str(folder / "runs")]
    evaluate.main([*sizes, *folders, "--card", str(folder / "README.md"), "--trained-on", "two cores"])
    return folder


def test_the_command_writes_its_report(evaluated):
    written = json.loads((evaluated / "out" / "report.json").read_text())
    assert written["obedience"]["count"]["count"] == 3
    assert set(written["reader"]) == {"rendered", "reconstructed"}
    assert written["reader"]["rendered"]["relation"]["count"] == 2
    assert written["vae"]["psnr"] > 0
    text = (evaluated / "out" / "report.md").read_text()
    assert text == "# Evaluation\n\n" + report.to_markdown(written)
    for word in (
        "| attribute",
        "| relation",
        "PSNR inside the objects",
        "3 prompts (held-out combinations), 1 steps, guidance 3.5, true CFG 2",
        "for 5 of 5 blocks",
        "| guidance | facts right | diversity |",
        "`prompt_2` has more in",
    ):
        assert word in text
    with Image.open(evaluated / "out" / "samples.png") as sheet:
        assert sheet.format == "PNG"
    with Image.open(evaluated / "out" / "blocks.png") as bars:
        assert bars.format == "PNG"
    assert not list(evaluated.rglob("*.tmp"))


def test_the_card_says_how_it_was_made(evaluated):
    text = (evaluated / "README.md").read_text()
    for line in (
        "| autoencoder, 64-pixel crops",
        "guidance distillation, 2 + 3 blocks",
        "Computed on two cores.",
        "python -m flux_lab.training.scenes --count 32000 --seed 7 --out runs/scenes",
        "python -m flux_lab.training.vae --steps 3 --batch 4 --rate 0.001",
        "python -m flux_lab.training.export --transformer runs/deepened/transformer",
        "## Limits",
        "it has never seen; below each, what is not right](samples.png)",
        "when a block is taken out](blocks.png)",
    ):
        assert line in text
    assert (evaluated / "samples.png").read_bytes() == (evaluated / "out" / "samples.png").read_bytes()
    assert str(evaluated) not in text
    assert "{" not in text


def test_the_card_can_be_written_again(evaluated, model):
    folders = ["--model", str(model), "--runs", str(evaluated / "runs"), "--evaluation", str(evaluated / "out")]
    before = (evaluated / "README.md").read_text()
    card.main([*folders, "--out", str(evaluated / "README.md"), "--trained-on", "two cores"])
    assert (evaluated / "README.md").read_text() == before


def test_a_run_that_was_stopped_counts_all_its_time(tmp_path):
    write_run(tmp_path / "run", steps=(10.0, 20.0, 30.0, 5.0, 15.0, 2.0))
    run = card.read_run(tmp_path / "run")
    assert run.seconds == 30 + 15 + 2
    assert (run.steps, run.samples) == (6, 24)
    assert card.read_run(tmp_path) is None


@pytest.mark.parametrize(("option", "value"), [("--prompts", "0"), ("--steps", "-1"), ("--batch", "0"), ("--scenes", "0")])
def test_bad_arguments_are_named(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([option, value])
    assert stopped.value.code == 2
    assert f"{option} must be at least 1, got {value}" in capsys.readouterr().err


def test_a_missing_report_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        card.main(["--evaluation", str(tmp_path)])
    assert "run python -m flux_lab.training.evaluate first" in capsys.readouterr().err


def write_checkpoint(file, transformer, step, batch_size):
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"average.transformer.{name}": tensor.clone() for name, tensor in transformer.state_dict().items()}
    save_file(tensors, file, {"step": str(step), "settings": json.dumps({"batch_size": batch_size})})


def test_the_curve_counts_samples_over_runs_and_measures_each_once(evaluated, model, pipe, tmp_path, monkeypatch):
    for name, steps in {"flow": (2,), "flow2": (1, 3)}.items():
        save_model(pipe.transformer, tmp_path / name / "transformer")
        first = {"step": 0, "loss": 1.0, "flow_loss": 1.0, "seconds": 1.0} | ({"layout_loss": 1.0} if name == "flow2" else {})
        (tmp_path / name / "log.jsonl").write_text(json.dumps(first) + "\n")
        for step in steps:
            write_checkpoint(tmp_path / name / "kept" / f"{step:06}.safetensors", pipe.transformer, step, 10)
    write_checkpoint(tmp_path / "flow" / "checkpoint.safetensors", pipe.transformer, 4, 10)
    write_checkpoint(tmp_path / "flow2" / "checkpoint.safetensors", pipe.transformer, 3, 10)
    measured = []
    monkeypatch.setattr(curve, "obedience_of", lambda *args, **kwargs: measured.append(0) or evaluate.obedience_of(*args, **kwargs))
    runs = ["--runs", str(tmp_path / "flow"), str(tmp_path / "flow2"), "--out", str(evaluated / "runs" / "curve"), "--device", "cpu"]
    folders = ["--model", str(model), "--reader", str(evaluated / "reader"), "--prompts", "2", "--steps", "1"]
    curve.main([*runs, *folders])
    curve.main([*runs, *folders])
    found = json.loads((evaluated / "runs" / "curve" / "curve.json").read_text())
    assert [(point["samples"], point["layout"]) for point in found["points"]] == [(20, False), (40, False), (50, True), (70, True)]
    assert len(measured) == 4 + len(curve.SCALES)
    assert (found["scales"]["samples"], list(found["scales"]["obedience"])) == (70, ["1", "2", "3.5", "5"])
    with Image.open(evaluated / "runs" / "curve" / "curve.png") as figure:
        assert figure.format == "PNG"
    with pytest.raises(SystemExit):
        curve.main([*runs, *folders, "--true-cfg", "2"])
    section = card.curve_section(evaluated / "runs")
    assert "| samples seen | layout asked | count |" in section
    assert "| true CFG | count |" in section
    assert f"to {found['points'][-1]['samples']:,} samples" in section
    assert card.curve_section(tmp_path) == ""
