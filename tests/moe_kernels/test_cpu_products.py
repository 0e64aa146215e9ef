"""The product of bf16 operands that C++ does itself, where the processor multiplies pairs."""

import ctypes
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_kernels.backends import BACKENDS

if (reason := BACKENDS["cpu"].why_not("dispatch", "cpu")) is not None:
    pytest.skip(f"the cpu backend {reason}", allow_module_level=True)
native = importlib.import_module("moe_kernels.backends.cpu.native").native
products = importlib.import_module("moe_kernels.backends.cpu.products")

# Of rows, columns and terms: around tiles of 6 rows, vectors of 16, panels of 64 columns, blocks of
# 384 rows and 512 terms.
ROWS = (1, 5, 6, 7, 400)
COLUMNS = (1, 16, 17, 63, 65, 130)
TERMS = (1, 2, 31, 33, 512, 513, 1100)
NAN = float("nan")

Product = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def backend() -> str:
    return "cpu"


@pytest.fixture(scope="module")
def product() -> Product:
    """left (M, K) · right (K, N) + beta out, by the function that a BLAS would be called as."""
    address = native.gemm_bf16()
    if not address:
        pytest.skip("this processor, or the compiler, has no AVX512-BF16")
    gemm = ctypes.CFUNCTYPE(None, *(ctypes.c_void_p,) * 13)(address)

    def run(left: Tensor, right: Tensor, out: Tensor, beta: float = 0.0) -> Tensor:
        sizes = (right.shape[1], left.shape[0], left.shape[1])
        transposed = [matrix.stride(1) != 1 for matrix in (right, left)]
        words = [ctypes.c_char(b"T" if yes else b"N") for yes in transposed]
        numbers = [ctypes.c_int(size) for size in sizes]
        strides = [
            ctypes.c_int(matrix.stride(1 if yes else 0))
            for matrix, yes in zip((right, left), transposed, strict=True)
        ]
        factors, step = (ctypes.c_float(1.0), ctypes.c_float(beta)), ctypes.c_int(out.stride(0))
        by_address = [ctypes.addressof(part) for part in (*words, *numbers, factors[0])]
        gemm(
            *by_address,
            right.data_ptr(),
            ctypes.addressof(strides[0]),
            left.data_ptr(),
            ctypes.addressof(strides[1]),
            ctypes.addressof(factors[1]),
            out.data_ptr(),
            ctypes.addressof(step),
        )
        return out

    return run


def surrounded(rows: int, columns: int, turned: bool = False) -> Tensor:
    """A bf16 matrix whose neighbours in memory are NaN; ``turned`` lies column by column."""
    if turned:
        return surrounded(columns, rows).T
    memory = torch.full((rows + 2, columns + 3), NAN, dtype=torch.bfloat16)
    memory[1:-1, 1:-2] = torch.randn(rows, columns)
    return memory[1:-1, 1:-2]


def assert_sums(found: Tensor, left: Tensor, right: Tensor, start: Tensor | float = 0.0) -> None:
    """Every sum is within the bound of fp32 sums in any order."""
    left, right = left.double(), right.double()
    exact, size = left @ right + start, left.abs() @ right.abs() + abs(start)
    bound = (left.shape[1] + 2) * 2.0**-24 * size
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("right_turned", [False, True])
@pytest.mark.parametrize("left_turned", [False, True])
def test_all_sizes_and_layouts(left_turned, right_turned, product):
    for rows in ROWS:
        for columns in COLUMNS:
            for terms in TERMS:
                left = surrounded(rows, terms, left_turned)
                right = surrounded(terms, columns, right_turned)
                memory = torch.full((rows + 2, columns + 2), 7.0)
                memory[1:-1, 1:-1] = NAN  # which a product with beta = 0 must not read
                found = product(left, right, memory[1:-1, 1:-1])
                assert_sums(found, left, right)
                memory[1:-1, 1:-1] = 7.0
                assert (memory == 7.0).all(), "written outside of the result"


@pytest.mark.parametrize("beta", [1.0, -0.5])
def test_what_was_there_is_added(beta, product):
    for terms in (0, 3, 700):
        left, right = surrounded(9, max(terms, 1))[:, :terms], surrounded(max(terms, 1), 70)[:terms]
        before = torch.randn(9, 70)
        found = product(left, right, before.clone(), beta)
        assert_sums(found, left, right, beta * before.double())


def test_a_sum_without_terms_is_zero(product):
    left, right = surrounded(7, 1)[:, :0], surrounded(1, 20)[:0]
    assert torch.equal(product(left, right, torch.full((7, 20), NAN)), torch.zeros(7, 20))


def test_a_row_has_the_same_bits_among_others_and_alone(product):
    left, right = surrounded(401, 600), surrounded(600, 90)
    together = product(left, right, torch.empty(401, 90))
    for row in (0, 5, 6, 383, 384, 400):
        alone = product(left[row : row + 1], right, torch.empty(1, 90))
        assert torch.equal(alone[0], together[row])
    turned = product(left.T.contiguous().T, right.T.contiguous().T, torch.empty(401, 90))
    assert torch.equal(turned, together)


def test_what_a_product_before_left_in_memory_is_not_read(product):
    left, right = surrounded(9, 33), surrounded(33, 20)
    nan = torch.full((1024, 384), NAN, dtype=torch.bfloat16).T  # is packed, and fills that memory
    product(nan, torch.full((1024, 64), NAN, dtype=torch.bfloat16), torch.empty(384, 64))
    assert_sums(product(left, right, torch.empty(9, 20)), left, right)


def test_infinity_and_nan_stay_in_their_row_and_column(product):
    left, right = torch.ones(8, 33).bfloat16(), torch.ones(33, 20).bfloat16()
    left[2, 32], right[5, 7] = float("inf"), NAN
    found = product(left, right, torch.empty(8, 20))
    expected = left.float() @ right.float()
    assert torch.equal(found.nan_to_num(-1.0, 1e30), expected.nan_to_num(-1.0, 1e30))


def test_layers_multiply_by_it_where_mkl_would_convert(product):
    tiles = torch.cpu._is_amx_tile_supported()
    if products.PRODUCTS.reason or tiles:
        pytest.skip(products.PRODUCTS.reason or "MKL multiplies with tiles")
    assert products.PRODUCTS.bf16 == native.gemm_bf16()
    assert "bf16 multiplied as it is" in products.describe()
