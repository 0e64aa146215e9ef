"""What is here, which backends work, and what to do about the rest.

``python -m moe_kernels.doctor`` prints it, ``--json`` as JSON; ``diagnose()`` returns it.
"""

from moe_kernels.doctor.diagnosis import Diagnosis, Problem, diagnose
from moe_kernels.doctor.self_test import Check

__all__ = ["Check", "Diagnosis", "Problem", "diagnose"]
