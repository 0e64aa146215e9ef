"""Fréchet distance between two sets of features, each taken as a Gaussian."""

import torch
from torch import Tensor


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
    mean, covariance = _moments(features)
    reference_mean, reference_covariance = _moments(reference)
    cross = torch.linalg.svdvals(_root(covariance) @ _root(reference_covariance)).sum()
    traces = covariance.trace() + reference_covariance.trace()
    distance = (mean - reference_mean).square().sum() + traces - 2.0 * cross
    return max(0.0, float(distance))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) in fp64."""
    features = features.detach().to("cpu", torch.float64)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (features.shape[0] - 1)


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
