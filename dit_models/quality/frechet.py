"""Fréchet distance between two sets of features, each taken as a Gaussian."""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and unbiased covariance (d, d) of a set of features, in fp64 on the CPU."""

    mean: Tensor
    covariance: Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets.

    |μ1 - μ2|² + Tr(Σ1 + Σ2 - 2·(Σ1^½ Σ2 Σ1^½)^½), in fp64, with unbiased covariances. The trace of
    the last root is the sum of the singular values of Σ1^½ Σ2^½, which stays exact to rounding
    where a covariance is singular, as it is with fewer samples than features.

    This is **not FID**, and no figure of it compares with a published one: FID is this distance on
    features of an Inception network, and this package feeds it features of its own small
    classifiers. It is also biased upwards for few samples: compare at equal sample counts only.

    Args:
        features: (n, d) of any float dtype.
        reference: (m, d).

    Returns:
        The distance, at least 0; what rounding takes below 0 is returned as 0.

    Raises:
        ValueError: not two matrices of one width, fewer than two rows, or a NaN or infinity.

    Source: Dowson and Landau 1982 (the closed form for Gaussians).
    """
    for name, value in (("features", features), ("reference", reference)):
        if value.ndim != 2 or value.shape[0] < 2:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected (n, d) with at least 2 rows"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity; look at the samples it was made from")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features has {features.shape[1]} columns and reference {reference.shape[1]}; "
            "both must come from one feature extractor"
        )
    return frechet_of_moments(moments(features), moments(reference))


def frechet_of_moments(first: Moments, second: Moments) -> float:
    """The distance of ``frechet_distance``, from the moments of both sets.

    Args:
        first, second: moments of one width d.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: a NaN or infinity, which would else come out as the best distance of all.
    """
    for part in (first.mean, first.covariance, second.mean, second.covariance):
        if not bool(part.isfinite().all()):
            raise ValueError("the moments hold NaN or infinity; look at what they were made from")
    cross = torch.linalg.svdvals(_root(first.covariance) @ _root(second.covariance)).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2.0 * cross
    return max(0.0, float(distance))


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance of (n, d) features, summed in fp64."""
    features = features.detach().cpu()
    count, width = features.shape
    mean = features.sum(0, dtype=torch.float64) / count
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for rows in features.split(_ROWS_AT_A_TIME):  # a copy of them all in fp64 would be large
        centred = rows.double() - mean
        covariance += centred.T @ centred
    return Moments(mean, covariance / (count - 1))


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
