"""C++ kernels with OpenMP (``csrc/cpu``): the CPU kernels of the ops."""

from moe_kernels.backends.cpu import activation, experts, losses, products, route, rows
from moe_kernels.backends.stages import Stages

# Importing these has given the ops their CPU kernels.
KERNELS = (activation, experts, losses, route, rows)

IMPLEMENTATIONS = Stages("cpu", has_fp64=True).implementations()

# For the backends table.
describe = products.describe
