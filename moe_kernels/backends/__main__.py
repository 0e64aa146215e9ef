"""``python -m moe_kernels.backends``: which backend serves what here, and why others do not."""

from moe_kernels.backends.capabilities import explain

if __name__ == "__main__":
    print(explain())
