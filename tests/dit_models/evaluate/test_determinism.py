"""The same seeds give the same images, whatever the batch size and the number of processes."""

import copy
from dataclasses import replace

import pytest
import torch

from dit_models.drawing import Artist, Prompts
from dit_models.evaluate.draw import draw_all, to_pixels
from moe_kernels.testing import assert_as_accurate

from .cases import tiny_artist

PER_IMAGE = ("expert choice", "token choice", "dense")


def in_fp64(artist: Artist) -> Artist:
    return replace(artist, model=copy.deepcopy(artist.model).double())


def draw(artist: Artist, batch_size: int, scale: float = 2.0) -> torch.Tensor:
    prompts = Prompts(torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), None)
    return draw_all(artist, prompts, 500, batch_size, guidance_scale=scale)


@pytest.mark.parametrize("kind", PER_IMAGE)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_changes_images_by_rounding_only(tmp_path, kind, batch_size):
    artist = tiny_artist(tmp_path, kind)
    together = draw(artist, 8)
    apart = draw(artist, batch_size)
    # Whatever a batch changes must not be worse than what fp32 costs in the first place.
    assert_as_accurate(apart, together, draw(in_fp64(artist), 8))
    assert torch.equal(draw(artist, batch_size), apart)
    difference = to_pixels(apart).astype(int) - to_pixels(together).astype(int)
    assert abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01
    assert to_pixels(together).std() > 20  # there is something to see


@pytest.mark.parametrize("kind", PER_IMAGE)
def test_an_image_does_not_depend_on_its_place_in_the_batch(tmp_path, kind):
    artist = tiny_artist(tmp_path, kind)
    labels, seeds = torch.tensor([3, 1, 4, 1, 5]), [500, 501, 502, 503, 504]
    order = [4, 2, 0, 1, 3]
    images = artist.draw(Prompts(labels, None), seeds)
    shuffled = artist.draw(Prompts(labels[order], None), [seeds[i] for i in order])
    exact = in_fp64(artist).draw(Prompts(labels[order], None), [seeds[i] for i in order])
    assert_as_accurate(shuffled, images[order], exact)


def test_a_pool_over_the_batch_does_depend_on_it(tmp_path):
    """So the tests above can fail."""
    artist = tiny_artist(tmp_path, "expert choice over the batch")
    difference = to_pixels(draw(artist, 8)).astype(int) - to_pixels(draw(artist, 1)).astype(int)
    assert abs(difference).max() > 3


def test_bf16_sampling_keeps_the_rule(tmp_path):
    artist = tiny_artist(tmp_path, "expert choice", "precision=bf16")
    together, apart = draw(artist, 8), draw(artist, 1)
    exact = draw(replace(in_fp64(artist), autocast=lambda: torch.autocast("cpu", enabled=False)), 8)
    assert_as_accurate(apart, together, exact)
