"""Batches, guidance, shown images and stopping."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_models.analyze.collect import NOBODY, collect
from dit_models.analyze.tables import tables_of

from .plans import Oracle, assert_same, rows_of
from .stub import EXPERTS, GRID, LAYERS, STEPS, TOKENS, StubArtist, subjects

IMAGES, SEED = 7, 20


def oracle_of(artist: StubArtist, images: int) -> Oracle:
    oracle = Oracle(LAYERS, STEPS, 3, TOKENS, EXPERTS)
    for image in range(images):
        oracle.images_by_group[image % 3] += 1
        for step in range(STEPS):
            for layer in range(LAYERS):
                oracle.add(step, layer, artist.plan([SEED + image], step, layer), [image % 3])
    return oracle


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("guided", [False, True])
def test_counts_do_not_depend_on_the_batch(guided, router):
    artist = StubArtist(guided, router)
    oracle = oracle_of(artist, IMAGES)
    for batch_size in (1, 3, IMAGES):
        analysis = collect(artist, subjects(IMAGES), seed=SEED, batch_size=batch_size)
        assert_same(analysis.counts, oracle)
        assert analysis.complete
        assert analysis.noise_levels == [1.0, 0.8, 0.6, 0.4]
        assert analysis.timesteps == [10.0, 8.0, 6.0, 4.0]


def test_maps_of_the_first_images_are_those_of_their_plans():
    artist = StubArtist()
    analysis = collect(
        artist, subjects(IMAGES), seed=SEED, batch_size=2, shown=3, shown_steps=2
    )  # two batches
    maps = analysis.maps
    assert maps.steps == [0, 3]
    assert maps.experts_per_token.shape == (2, LAYERS, 3, *GRID)
    assert analysis.titles == ["red", "green", "blue"]
    torch.testing.assert_close(
        analysis.images[:, 0, 0, 0], torch.tensor([0.20, 0.21, 0.22]), rtol=0, atol=1e-7
    )
    nobody = 0
    for shown, step in enumerate(maps.steps):
        for layer in range(LAYERS):
            for image in range(3):
                plan = artist.plan([SEED + image], step, layer)
                own: list[dict[int, float]] = [{} for _ in range(TOKENS)]
                for token, expert, weight in rows_of(plan):
                    if token < TOKENS:
                        own[token][expert] = weight
                where = (shown, layer, image)
                held = maps.experts_per_token[where].flatten().tolist()
                assert held == [len(each) for each in own]
                best = [max(each, key=each.get) if each else NOBODY for each in own]
                assert maps.top_expert[where].flatten().tolist() == best
                nobody += best.count(NOBODY)
                probs = plan.router_logits[:TOKENS].double().softmax(1)
                entropy = -(probs * probs.log()).sum(1)
                np.testing.assert_allclose(maps.entropy[where].flatten(), entropy, atol=1e-6)
    assert nobody  # the case is there


def test_only_shown_latents_are_decoded():
    seen: list[int] = []

    def decode(latents):
        seen.append(len(latents))
        return -latents

    artist = StubArtist(decode=decode)
    analysis = collect(artist, subjects(IMAGES), seed=SEED, batch_size=2, shown=3)
    assert seen == [2, 1]
    torch.testing.assert_close(
        analysis.images[:, 0, 0, 0], torch.tensor([-0.20, -0.21, -0.22]), rtol=0, atol=1e-7
    )
    assert analysis.counts.num_images == IMAGES


def test_a_stop_counts_whole_batches_only():
    artist = StubArtist()
    asked = iter([False] * (2 * STEPS + 2) + [True])  # in the third batch
    analysis = collect(
        artist, subjects(IMAGES), seed=SEED, batch_size=2, stopping=lambda: next(asked)
    )
    assert not analysis.complete
    assert analysis.counts.num_images == 4
    assert_same(analysis.counts, oracle_of(artist, 4))
    assert len(analysis.images) == 4
    assert collect(artist, subjects(2), stopping=lambda: True) is None


def test_progress_adds_up_to_all_steps_of_all_images():
    seen: list[int] = []
    collect(StubArtist(), subjects(IMAGES), batch_size=3, progress=seen.append)
    assert sum(seen) == IMAGES * STEPS
    assert len(seen) == 3 * STEPS


def test_a_dense_model_is_refused_at_its_first_step():
    class Dense(StubArtist):
        def draw(self, prompts, seeds, callback):
            callback(0, 1.0, torch.zeros(1, 1, 4, 6), SimpleNamespace(plans=()))
            raise AssertionError("went on")

    with pytest.raises(ValueError, match="dense: it has no MoE layers"):
        collect(Dense(), subjects(1))


@pytest.mark.parametrize("name", ["batch_size", "shown", "shown_steps"])
def test_numbers_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name}=0; expected at least 1"):
        collect(StubArtist(), subjects(1), **{name: 0})
    with pytest.raises(ValueError, match="nothing to draw"):
        collect(StubArtist(), subjects(0))
    with pytest.raises(ValueError, match="expected 0 to 4294967295"):
        collect(StubArtist(), subjects(1), seed=2**32)


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_tables_follow_their_formulae(router):
    artist = StubArtist(router=router)
    analysis = collect(artist, subjects(IMAGES), seed=SEED)
    oracle = oracle_of(artist, IMAGES)
    tables = tables_of(analysis)
    rows = tables["class_by_expert"]["rows_share"]
    assert rows[1, 2, 3] == oracle.rows_by_group[1, 2, 3] / oracle.rows_by_group[1, 2].sum()
    position = tables["position_by_expert"]["probability"]
    assert position.shape == (LAYERS, *GRID, EXPERTS)
    assert position[1, 1, 2, 4] == oracle.rows_by_position[1, 5, 4] / (IMAGES * STEPS)
    weight = tables["timestep_by_expert"]["weight_share"][3, 0]
    expected = oracle.weight_by_step[3, 0] / oracle.weight_by_step[3, 0].sum()
    np.testing.assert_allclose(weight, expected, rtol=1e-12)
    mean = tables["experts_per_token"]["mean"]
    assert mean[2, 1, 1, 0] == oracle.experts_by_position[2, 1, 3] / IMAGES
    together = tables["co_selection"]["probability"]
    for i, j in ((1, 2), (2, 1), (0, 4)):
        assert together[0, i, j] == oracle.pairs[0, i, j] / oracle.rows_by_step[:, 0, i].sum()
    if router == "token_choice":
        assert together[0, 1, 2] != together[0, 2, 1]
    np.testing.assert_array_equal(np.diagonal(together, axis1=1, axis2=2), 1)
    coverage = tables["coverage"]
    histogram = oracle.tokens_by_count[1, 0]
    assert coverage["unrouted_share"][1, 0] == histogram[0] / (IMAGES * TOKENS)
    assert coverage["most_experts_share"][1, 0] == max(np.flatnonzero(histogram)) / EXPERTS
    np.testing.assert_allclose(coverage["histogram"].sum(1), 1, rtol=1e-12)
    entropy = [
        np.mean([
            analysis_entropy(SEED + image, 2, layer) for image in range(IMAGES)
        ]) for layer in range(LAYERS)
    ]  # fmt: skip
    np.testing.assert_allclose(tables["entropy"]["entropy"][2], entropy, rtol=1e-6)


def analysis_entropy(seed: int, step: int, layer: int) -> float:
    logits = StubArtist(guided=False).plan([seed], step, layer).router_logits.double()
    probs = logits.softmax(1)
    return float(-(probs * probs.log()).sum(1).mean())
