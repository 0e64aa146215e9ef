"""The ablation that no paper printed: routing and capacity at equal activated compute.

``python -m dit_models.ablation --help``.
"""
