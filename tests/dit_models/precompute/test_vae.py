"""The VAE's scaling, and what happens where it is not the right one."""

import json
import shutil
from dataclasses import asdict, replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_models.vae import VAE, decoder_of, describe_vae, why_no_vae

from ..tiny_models import save_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("models") / "pipeline" / "vae")


@pytest.mark.parametrize("shift", [0.1, None])
def test_latents_are_scaled_and_shifted_as_the_vae_says(tmp_path, shift):
    folder = save_vae(tmp_path / "vae", shift_factor=shift)
    vae, bare = VAE(str(folder)), diffusers.AutoencoderKL.from_pretrained(folder)
    images = torch.rand(2, 3, 16, 12) * 2 - 1
    mean, std = vae.encode(images)
    with torch.no_grad():
        moments = bare.encode(images).latent_dist
        expected = bare.decode(moments.mean).sample
    torch.testing.assert_close(mean, (moments.mean - (shift or 0)) * 0.5)
    torch.testing.assert_close(std, moments.std * 0.5)
    assert mean.shape == (2, 4, 8, 6)
    torch.testing.assert_close(vae.decode(mean), expected, rtol=0, atol=1e-5)
    assert (vae.info.latent_channels, vae.info.downscale) == (4, 2)
    with pytest.raises(ValueError, match=r"latents have 3 channels; .* decodes 4"):
        vae.decode(mean[:, :3])


def test_grey_images_are_read_as_rgb_and_others_refused(folder):
    vae = VAE(str(folder))
    grey = torch.rand(1, 1, 8, 8)
    assert torch.equal(vae.encode(grey)[0], vae.encode(grey.expand(-1, 3, -1, -1))[0])
    for shape in ((1, 3, 9, 8), (1, 2, 8, 8)):
        with pytest.raises(ValueError, match="reads 3 channels and sides that are multiples of 2"):
            vae.encode(torch.zeros(shape))


def test_decoding_finds_the_vae_checks_it_and_says_what_is_missing(folder, tmp_path):
    assert decoder_of(None) is None
    assert why_no_vae(None) is None
    vae = VAE(str(folder))
    info = asdict(vae.info)
    latents = torch.randn(9, 4, 4, 4)  # more than are decoded at once
    assert torch.equal(decoder_of(info)(latents), vae.decode(latents))
    # In a pipeline's folder, moved, and named by the option.
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder.parent, moved)
    away = asdict(replace(vae.info, path=str(tmp_path / "gone")))
    assert torch.equal(decoder_of(away, str(moved))(latents), vae.decode(latents))
    reason = why_no_vae(away)
    assert "no VAE at" in reason
    assert "Set data.vae" in reason
    with pytest.raises(ValueError, match="no VAE at"):
        decoder_of(away)(latents)
    other = save_vae(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="the latents were made with"):
        decoder_of(info, str(other))(latents)
    assert "the latents were made with" in why_no_vae(info, str(other))


def test_weights_that_cannot_be_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load the VAE"):
        VAE(str(tmp_path / "vae"))


def test_weights_that_lack_a_tensor_are_refused_and_not_drawn_at_random(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors: decoder\.conv_in"):
        VAE(str(tmp_path / "vae"))


def test_configurations_of_old_and_of_other_vaes(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]  # as in Stable Diffusion 1 and its fine-tuned decoders
    path.write_text(json.dumps(config))
    vae = VAE(str(tmp_path / "vae"))
    assert vae.info.scaling_factor == vae.model.config.scaling_factor == 0.18215
    path.write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="that of a VQModel"):
        describe_vae(str(tmp_path / "vae"))


def test_weights_of_the_older_kind_of_file_are_part_of_the_identity(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    found = set()
    for content in (b"one", b"two"):
        (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(content)
        found.add(describe_vae(str(tmp_path / "vae")).identity)
    assert len(found) == 2


def test_no_vae_in_the_folder(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of an AutoencoderKL"):
        VAE(str(tmp_path))
    with pytest.raises(ValueError, match="expected one of fp32"):
        VAE(str(tmp_path), dtype="int8")
