"""Evaluation: draw many images, write them for others to judge, and judge them.

``python -m dit_models.evaluate --help`` is the command; docs/evaluation.md explains the figures.
"""

from dit_models.evaluate.scenes import scene_geneval, scene_geneval_table
from dit_models.evaluate.sweep import evaluate, why_not_evaluated

__all__ = ["evaluate", "scene_geneval", "scene_geneval_table", "why_not_evaluated"]
