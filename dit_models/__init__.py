"""Diffusion transformers on ``moe_kernels``: DiT, DiT-MoE and EC-DiT, with training and sampling.

Models by name: ``dit_models.models.build_model``. Commands: ``python -m dit_models.train``,
``dit_models.sample``, ``dit_models.evaluate`` and ``dit_models.models``, each with ``--help``.
"""
