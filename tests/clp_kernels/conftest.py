"""Fixtures of the kernel tests: each instruction set of this processor, and poisoned memory."""

from __future__ import annotations

import ctypes

import pytest
import torch
from mixed_linear_support import ISAS

from clp_kernels import extension

M_PERTURB = -6  # of glibc's mallopt: fill what malloc hands out with the complement of a byte


@pytest.fixture(scope="module")
def poisoned_memory():
    """Fills memory that nothing has written with NaN or 3e38: a value that a kernel forgot to write shows.

    torch's own switch reaches what its operators allocate, glibc's what the extension allocates.
    """
    libc = ctypes.CDLL(None)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_PERTURB, 0x80)
    yield
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_PERTURB, 0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request):
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa("best")
