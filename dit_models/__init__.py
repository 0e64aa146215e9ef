"""Diffusion transformers on ``moe_kernels``: DiT, DiT-MoE and EC-DiT, with training and sampling.

Models by name: ``dit_models.models.build_model``; diffusers pipelines: ``dit_models.pipelines``.
Commands, each with ``--help``: ``python -m dit_models.train``, ``sample``, ``evaluate``,
``analyze``, ``precompute``, ``convert``, ``export``, ``models``, ``routing``, ``ablation``.
"""
