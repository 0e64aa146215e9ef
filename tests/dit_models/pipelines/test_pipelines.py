"""Pipelines: the same images as the run, saved and loaded offline, and what they refuse."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_models import train
from dit_models.atomic import sha256_of
from dit_models.convert import Choices, convert
from dit_models.drawing import Prompts
from dit_models.export import export
from dit_models.export import main as export_main
from dit_models.pretrained import load_pretrained, read_pretrained
from dit_models.run_folder import load_run
from dit_models.sample import main as sample_main
from moe_kernels.testing import relative_error

from ..convert.sources import XL_LIKE, state_of
from ..training import tiny_config

diffusers = pytest.importorskip("diffusers")
pipelines = pytest.importorskip("dit_models.pipelines")

SEEDS = [11, 12, 13]
# Two computations of one image differ by the rounding of a few steps.
ROUNDING = 1e-5
RECIPES = {
    "ec": ("digits", ("sampling.sampler=euler",)),
    "moe": ("digits-token-choice", ("sampling.sampler=euler", "sampling.guidance_scale=2.0")),
    "ddpm": ("digits-token-choice", ("objective.kind=ddpm", "sampling.sampler=ddpm",
                                     "sampling.num_steps=5", "sampling.clip_range=1.0")),
    "text": ("digit-scenes", ("sampling.sampler=euler", "model_options.num_kv_heads=1")),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind, stopped after two steps, made when first asked for: name -> folder."""
    made = {}

    def run(name):
        if name not in made:
            recipe, options = RECIPES[name]
            folder = tmp_path_factory.mktemp("runs") / name
            config = tiny_config(
                folder, "stop_at=2", "save_every=2", *options,
                recipe=recipe,
            )  # fmt: skip
            assert train.train(config) == 0
            shake(folder)
            made[name] = folder
        return made[name]

    return run


def shake(run_dir):
    """Give the averaged model random weights: after two steps it still predicts almost 0."""
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    path, manifest_path = checkpoint / "ema.safetensors", checkpoint / "manifest.json"
    state = load_file(path)
    for index, value in enumerate(state.values()):
        generator = torch.Generator().manual_seed(index)
        if value.is_floating_point():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    save_file(state, path)
    manifest = json.loads(manifest_path.read_text())
    manifest["sha256"][path.name] = sha256_of(path)
    manifest_path.write_text(json.dumps(manifest))


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pipeline_of(run_dir, tmp_path, **options):
    export(run_dir, tmp_path / "model")
    described = read_pretrained(tmp_path / "model")
    family = described.model.family
    kind = pipelines.ECDiTPipeline if family == "ec_dit" else pipelines.DiTMoEPipeline
    pipeline = kind.from_pretrained(tmp_path / "model", **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CAPTIONS = ["a red 3", "a blue 5 left of a green 2", ""]
PROMPTS = {
    "text": (Prompts(None, CAPTIONS), {"prompt": CAPTIONS}),
    "classes": (Prompts(torch.tensor([0, 4, 9]), None), {"class_labels": [0, 4, 9]}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_images_of_the_run(runs, tmp_path, name):
    pipeline = pipeline_of(runs(name), tmp_path)
    artist = load_run(runs(name), "cpu").artist
    prompts, arguments = PROMPTS["text" if name == "text" else "classes"]
    expected = artist.draw(prompts, SEEDS)
    if name == "ddpm":
        # The cumulative products of diffusers' schedulers are fp32, and off by up to 5e-4.
        pipeline.scheduler.alphas_cumprod = artist.objective.alphas_cumprod
    images = pipeline(**arguments, generator=generators(), output_type="pt").images
    assert relative_error(images * 2 - 1, expected) < ROUNDING
    assert expected.std() > 0.1
    # And an image does not depend on its batch.
    one = {name: value[1:2] for name, value in arguments.items()}
    alone = pipeline(**one, generator=generators()[1], output_type="pt").images
    assert relative_error(alone[0], images[1]) < ROUNDING


LOADER = """
import json, sys, numpy, torch
import dit_models.pipelines
for folder, kind, arguments in json.loads(sys.argv[1]):
    pipeline = getattr(dit_models.pipelines, kind).from_pretrained(folder)
    generators = [torch.Generator().manual_seed(seed) for seed in (11, 12, 13)]
    result = pipeline(**arguments, generator=generators, output_type="np")
    numpy.save(folder + ".npy", result.images)
"""


def test_saved_and_loaded_in_a_fresh_process_without_network(runs, tmp_path):
    jobs, expected = [], {}
    for name in ("ec", "moe", "text"):
        pipeline = pipeline_of(runs(name), tmp_path / name)
        _, arguments = PROMPTS["text" if name == "text" else "classes"]
        images = pipeline(**arguments, generator=generators(), output_type="np").images
        folder = str(tmp_path / f"saved-{name}")
        expected[folder] = images
        pipeline.save_pretrained(folder)
        jobs.append((folder, type(pipeline).__name__, arguments))
    offline = {
        "HF_HUB_OFFLINE": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(jobs)],
        env=os.environ | offline, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for folder, images in expected.items():
        np.testing.assert_array_equal(np.load(f"{folder}.npy"), images)


def test_names_of_classes_and_images_of_each(runs, tmp_path):
    names = dict(enumerate(["zero", "one", "two", "three", "four"]))
    export(runs("moe"), tmp_path / "unnamed")
    with pytest.raises(ValueError, match="5 class names for 10 classes"):
        export(runs("moe"), tmp_path / "x", id2label=names)
    pipeline = pipelines.DiTMoEPipeline.from_pretrained(tmp_path / "unnamed")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(id2label={str(index): word for index, word in names.items()})
    assert pipeline.label_ids(["three", 7, "zero"]) == [3, 7, 0]
    noise = torch.randn(4, 1, 16, 16)
    images = pipeline(["three", 7], num_images_per_label=2, latents=noise, output_type="pt").images
    apart = pipeline([3, 3, 7, 7], latents=noise, output_type="pt").images
    assert torch.equal(images, apart)
    with pytest.raises(ValueError, match=r"'eleven'; expected 0 to 9, or one of zero, one"):
        pipeline("eleven")


def test_guidance_reaches_the_model(runs, tmp_path):
    pipeline = pipeline_of(runs("moe"), tmp_path)
    batches = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    noise = torch.randn(1, 1, 16, 16)

    def draw(**options):
        batches.clear()
        return pipeline(3, latents=noise, num_inference_steps=4, output_type="pt", **options).images

    plain = draw(guidance_scale=1.0)
    assert batches == [1, 1, 1, 1]
    guided = draw(guidance_scale=3.0)
    assert batches == [2, 2, 2, 2]
    part = draw(guidance_scale=3.0, guidance_interval=(0.3, 0.8))
    assert batches == [1, 2, 2, 1]
    assert not torch.equal(plain, guided)
    assert not torch.equal(part, guided)


def test_callback_progress_and_outputs(runs, tmp_path, capsys):
    pipeline = pipeline_of(runs("ec"), tmp_path)
    seen = []

    def callback(this, step, timestep, tensors):
        assert this is pipeline
        seen.append((step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    options = {"generator": torch.Generator().manual_seed(1), "num_inference_steps": 2}
    result = pipeline(
        class_labels=3, output_type="latent", callback_on_step_end=callback, **options
    )
    assert seen == [(0, 1000.0, (1, 1, 16, 16)), (1, 500.0, (1, 1, 16, 16))]
    assert torch.equal(result.images, torch.zeros(1, 1, 16, 16))
    (images,) = pipeline(class_labels=3, return_dict=False, **options)
    assert images[0].size == (16, 16)
    assert pipeline(class_labels=3, output_type="np", **options).images.shape == (1, 16, 16, 1)
    assert pipeline(class_labels=3, output_type="np", height=32, width=24, **options).images.shape[
        1:3
    ] == (
        32,
        24,
    )
    pipeline.set_progress_bar_config(disable=False)
    capsys.readouterr()
    pipeline(class_labels=3, **options)
    assert "2/2" in capsys.readouterr().err


def test_schedulers_of_diffusers(runs, tmp_path):
    pipeline = pipeline_of(runs("ec"), tmp_path / "flow")
    noise = torch.randn(1, 1, 16, 16)

    def draw(scheduler):
        pipeline.scheduler = scheduler
        return pipeline(
            class_labels=3, latents=noise, num_inference_steps=60, output_type="pt"
        ).images

    euler = draw(diffusers.FlowMatchEulerDiscreteScheduler())
    heun = draw(diffusers.FlowMatchHeunDiscreteScheduler())
    solver = draw(
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        )
    )
    # The same path, walked by other rules: close after 60 steps, not equal.
    for other in (heun, solver):
        assert 0 < (other - euler).abs().max() < 0.05
    ddpm = pipeline_of(runs("ddpm"), tmp_path / "ddpm")
    for scheduler in (diffusers.DDIMScheduler(), diffusers.DPMSolverMultistepScheduler()):
        ddpm.scheduler = scheduler
        images = ddpm(3, latents=noise, num_inference_steps=5, output_type="pt").images
        assert torch.isfinite(images).all()
    for kind, scheduler, words in (
        ("flow", diffusers.DDIMScheduler(), "DDIMScheduler does not fit .* trained with flow"),
        ("ddpm", diffusers.FlowMatchEulerDiscreteScheduler(), "does not fit .* with ddpm"),
        ("ddpm", diffusers.DDIMScheduler(prediction_type="v_prediction"), "epsilon"),
    ):
        family = pipelines.ECDiTPipeline if kind == "flow" else pipelines.DiTMoEPipeline
        with pytest.raises(ValueError, match=words):
            family.from_pretrained(tmp_path / kind / "model", scheduler=scheduler)


def test_a_converted_model_of_latents_with_its_vae(tmp_path):
    torch.save(state_of(XL_LIKE), tmp_path / "source.pt")
    convert(tmp_path / "source.pt", tmp_path / "ours", choices=Choices())
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        scaling_factor=0.5,
    )
    vae.save_pretrained(tmp_path / "vae")
    pipeline = pipelines.DiTMoEPipeline.from_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="has no VAE; load it with vae=FOLDER"):
        pipeline(1)
    pipeline = pipelines.DiTMoEPipeline.from_pretrained(tmp_path / "ours", vae=tmp_path / "vae")
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "latents": torch.randn(2, 4, 8, 8)}
    images = pipeline([1, 2], output_type="pt", **options).images
    latents = pipeline([1, 2], output_type="latent", **options).images
    with torch.no_grad():
        expected = vae.decode(latents / 0.5).sample.clamp(-1, 1)
    assert images.shape == (2, 3, 16, 16)
    assert relative_error(images * 2 - 1, expected) < ROUNDING
    assert pipeline([1, 2], height=32, width=16, generator=generators([1, 2])).images[0].size == (
        16,
        32,
    )
    # The same through the command, which draws from its own seeds.
    out = tmp_path / "grid.png"
    arguments = [str(tmp_path / "ours"), "--count", "2", "--steps", "2", "--out", str(out)]
    for extra, status in (([], 2), (["--vae", str(tmp_path / "vae")], 0)):
        with pytest.raises(SystemExit) as stop:
            sample_main([*arguments, *extra])
        assert (stop.value.code or 0) == status
        assert out.exists() == (status == 0)
    with pytest.raises(ValueError, match="its folder names no VAE"):
        load_run(tmp_path / "ours", "cpu").artist.draw(Prompts(torch.tensor([1]), None), [1])
    # Named once, the VAE serves every command and the pipeline.
    convert(tmp_path / "source.pt", tmp_path / "named", vae=str(tmp_path / "vae"))
    run = load_run(tmp_path / "named", "cpu")
    assert run.artist.draw(Prompts(torch.tensor([1]), None), [1]).shape == (1, 3, 16, 16)
    assert pipelines.DiTMoEPipeline.from_pretrained(tmp_path / "named").vae is not None
    (tmp_path / "vae").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"no VAE at .* from_pretrained\(..., vae=FOLDER\)"):
        pipelines.DiTMoEPipeline.from_pretrained(tmp_path / "named")
    torch.nn.init.ones_(vae.decoder.conv_in.weight)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="the latents were made with"):
        pipelines.DiTMoEPipeline.from_pretrained(tmp_path / "named")


def test_what_does_not_fit_is_refused(runs, tmp_path):
    pipeline = pipeline_of(runs("ec"), tmp_path)
    for arguments, words in (
        ({"class_labels": 10}, "class label 10; expected 0 to 9"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": "three"}, "class label 'three'"),
        ({"prompt": "a three"}, "this model has classes"),
        ({"class_labels": [1, 2], "generator": generators()}, "3 generators for 2 images"),
        ({"class_labels": 1, "latents": torch.randn(1, 4, 16, 16)}, r"expected \(1, 1, 16, 16\)"),
        ({"class_labels": 1, "output_type": "jpg"}, "output_type='jpg'"),
        ({"class_labels": 1, "height": 15}, "height=15; expected a positive multiple of 2"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline(**arguments)
    with pytest.raises(ValueError, match="use ECDiTPipeline"):
        pipelines.DiTMoEPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"safety: the folder of a model takes vae"):
        pipelines.ECDiTPipeline.from_pretrained(tmp_path / "model", safety=True)
    encoder = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="text_dim 0"):
        pipelines.ECDiTPipeline(pipeline.transformer, pipeline.scheduler, text_encoder=encoder)


def test_export_of_a_run_is_read_by_every_command(runs, tmp_path):
    run_dir, folder = runs("text"), tmp_path / "model"
    described = export(run_dir, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "text_encoder.safetensors",
    ]  # fmt: skip
    run, loaded = load_run(run_dir, "cpu"), load_run(folder, "cpu")
    assert (loaded.config, loaded.info, loaded.step) == (run.config, run.info, run.step)
    for name, value in run.artist.model.state_dict().items():
        assert torch.equal(loaded.artist.model.state_dict()[name], value), name
    prompts = Prompts(None, CAPTIONS)
    assert torch.equal(loaded.artist.draw(prompts, SEEDS), run.artist.draw(prompts, SEEDS))
    card = (folder / "README.md").read_text()
    assert "EC-DiT (expert choice)" in card
    assert f"| training steps | {described.step} |" in card


def test_buffers_of_routers_survive(tmp_path):
    """Thresholds, biases and the stage of a schedule are in buffers, of dtypes of their own."""
    stages = "{routing_options: {capacity_by_stage: [[0.0, 2.0], [0.5, 1.0]]}}"
    for recipe, options in (
        ("digits-diffmoe", ()),
        ("digits-loss-free", ()),
        ("digits", (f"model_options={stages}", "steps=40")),
    ):
        run_dir, folder = tmp_path / f"run-{recipe}", tmp_path / recipe
        sizes = ("stop_at=2", "save_every=2", *options)
        assert train.train(tiny_config(run_dir, *sizes, recipe=recipe)) == 0
        shake(run_dir)
        export(run_dir, folder, dtype="bf16")
        run, loaded = (load_run(path, "cpu").artist.model.backbone for path in (run_dir, folder))
        state = run.state_dict(keep_vars=True)
        buffers = {n: v for n, v in state.items() if not isinstance(v, torch.nn.Parameter)}
        assert buffers
        for name, value in buffers.items():
            other = loaded.state_dict()[name]
            assert (other.dtype, other.tolist()) == (value.dtype, value.tolist()), name
        tokens = torch.randn(2, 1, 16, 16), torch.rand(2), torch.tensor([1, 2])
        pipeline = pipeline_of(run_dir, tmp_path / f"again-{recipe}")
        pipeline.save_pretrained(tmp_path / f"saved-{recipe}")
        again = type(pipeline).from_pretrained(tmp_path / f"saved-{recipe}").transformer.backbone
        with torch.no_grad():
            expected, actual = run(*tokens), again(*tokens)
        assert torch.equal(actual.sample, expected.sample)
        rows = [plan.tokens_per_expert.tolist() for plan in loaded(*tokens).plans]
        if recipe == "digits":  # the first stage, twice the capacity of a finished run
            assert rows == [[2 * 64] * 4]


def command(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        export_main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_export_command(runs, tmp_path, capsys):
    assert command(runs("ec"), tmp_path / "half", "--dtype", "bf16") == 0
    model = load_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (
        load_run(tmp_path / "half", "cpu")
        .artist.draw(Prompts(torch.tensor([1]), None), [1])
        .isfinite()
        .all()
    )
    assert command(runs("ec"), tmp_path / "pipeline", "--pipeline") == 0
    assert "ECDiTPipeline, step 2" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "pipeline").iterdir()) == [
        "README.md", "model_index.json", "scheduler", "transformer",
    ]  # fmt: skip
    pipelines.ECDiTPipeline.from_pretrained(tmp_path / "pipeline")
    for arguments, words in (
        ((runs("ec"), tmp_path / "half"), "half exists; choose another name"),
        ((tmp_path / "half", tmp_path / "x"), "is an exported or converted model already"),
        ((runs("ec"), tmp_path / "x", "--dtype", "int8"), "--dtype int8; expected one of fp32"),
        ((tmp_path, tmp_path / "x"), "config.yaml does not exist"),
        ((tmp_path, tmp_path / "x", "--pipeline"), "config.yaml does not exist"),
    ):
        capsys.readouterr()
        assert command(*arguments) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("model"), "'model'"),
        (lambda c: c.update(format_version=2), "format version 2; this program reads 1"),
        (lambda c: c["model"].update(depth=3), r"missing tensors: blocks\.2\."),
        (lambda c: c["model"].update(num_classes=11), r"\[11, 32\]; the configuration asks"),
        (lambda c: c["train"].update(colour="red"), "colour"),
    ],
)
def test_a_damaged_model_folder(runs, tmp_path, change, words):
    export(runs("ec"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        load_run(tmp_path / "model", "cpu")
