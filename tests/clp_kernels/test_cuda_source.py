"""The CUDA decode kernel of mixed_linear: compiled without a spill, its arithmetic run on the host, the whole on a GPU.

The first two parts need nvcc and no GPU. The arithmetic of the kernel is host-and-device code: a small program calls it
for one lane after the other, joins the lanes in the kernel's butterfly, and is compared with float64 here. Only the
shuffle itself and the launch are left to the third part, which needs a GPU and the built extension.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import clp_kernels

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
CUDA_MISSING = clp_kernels.available_backends()["cuda"]
needs_extension = pytest.mark.skipif(CUDA_MISSING is not None, reason=f"no CUDA back-end: {CUDA_MISSING}")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]
DTYPE_IDS = [f"{x}-deltas-{deltas}".replace("torch.", "") for x, deltas in DTYPES]
# The launcher's choices: rows and features of a warp, and whether it loads 16 bytes at a time.
VARIANTS = [(1, 1, True), (4, 1, True), (8, 2, True), (4, 1, False)]

HOST_PROGRAM = r"""
#include "mixed_linear_sm80.cuh"
using namespace clp;

template <int ROWS, int FEATURES, bool ALIGNED, typename X, typename W>
void run(const DecodeArguments<X, W>& a) {
  for (int64_t row = 0; row < a.M; row += ROWS)
    for (int64_t feature = 0; feature < a.N; feature += FEATURES) {
      float total[kLanes][FEATURES][ROWS], next[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        sum_lane<ROWS, FEATURES, ALIGNED>(a, lane, row, feature, total[lane]);
      for (int f = 0; f < FEATURES; ++f)
        for (int r = 0; r < ROWS; ++r) {
          for (int distance = kLanes / 2; distance > 0; distance /= 2) {
            for (int lane = 0; lane < kLanes; ++lane) next[lane] = total[lane][f][r] + total[lane ^ distance][f][r];
            for (int lane = 0; lane < kLanes; ++lane) total[lane][f][r] = next[lane];
          }
          store_result(a, row + r, feature + f, total[f * ROWS + r][f][r]);
        }
    }
}

template <typename X, typename W>
int run_variant(int variant, void** p, const int64_t* n) {
  const DecodeArguments<X, W> a{(X*)p[0], (X*)p[1], (W*)p[2], (float*)p[3], (int32_t*)p[4], (X*)p[5], (W*)p[6],
                                (X*)p[7], n[0], n[1], n[2], n[3]};
  if (variant == 0) run<1, 1, true>(a);
  if (variant == 1) run<4, 1, true>(a);
  if (variant == 2) run<8, 2, true>(a);
  if (variant == 3) run<4, 1, false>(a);
  return 0;
}

extern "C" int run_on_host(int dtypes, int variant, void** p, const int64_t* n) {
  if (dtypes == 0) return run_variant<float, float>(variant, p, n);
  if (dtypes == 1) return run_variant<__half, __half>(variant, p, n);
  if (dtypes == 2) return run_variant<__half, float>(variant, p, n);
  if (dtypes == 3) return run_variant<__nv_bfloat16, __nv_bfloat16>(variant, p, n);
  return run_variant<__nv_bfloat16, float>(variant, p, n);
}
"""


def compile_with_nvcc(*arguments: str | Path) -> str:
    assert NVCC is not None
    command = [NVCC, "-std=c++17", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@needs_nvcc
def test_source_compiles_for_both_architectures_without_a_spill(tmp_path: Path) -> None:
    headers = Path(torch.__file__).parent / "include"
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    log = compile_with_nvcc(
        *("-O3", "-c", "-Xptxas", "-v", "--threads", "2", "-Xcompiler", "-fPIC", *architectures),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", f"-I{headers}"),
        *("-o", tmp_path / "mixed_linear.o", CSRC / "mixed_linear_sm80.cu"),
    )
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) == len(DTYPES) * len(VARIANTS) * len(architectures)
    assert set(spills) == {("0", "0", "0")}, log


@pytest.fixture(scope="module")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("host")
    source, library = folder / "host.cu", folder / "host.so"
    source.write_text(HOST_PROGRAM, encoding="utf-8")
    compile_with_nvcc("-O1", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC", f"-I{CSRC}", "-o", library, source)
    return ctypes.CDLL(str(library))


def make_inputs(M: int, D: int, N: int, K: int, x: torch.dtype, deltas: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(M * 31 + D)
    return {
        "x": torch.randn((M, D), generator=generator).to(x),
        "base": torch.randn((N, D), generator=generator).div(D**0.5).to(x),
        "deltas": torch.randn((N, K, D), generator=generator).div(D**0.5).to(deltas),
        "coefficients": torch.rand((3, K), generator=generator),
        "row_map": torch.randint(3, (M,), generator=generator, dtype=torch.int32),
        "bias": torch.randn(N, generator=generator).to(x),
        "bias_deltas": torch.randn((N, K), generator=generator).to(deltas),
    }


def compute(inputs: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Computes the operator in one dtype throughout, stream by stream."""
    x, base, deltas, bias, bias_deltas, c = (
        inputs[name].to(dtype) for name in ("x", "base", "deltas", "bias", "bias_deltas", "coefficients")
    )
    c_MK = c[inputs["row_map"].long()]
    y = x @ base.T + bias + c_MK @ bias_deltas.T
    for k in range(deltas.shape[1]):
        y = y + c_MK[:, k : k + 1] * (x @ deltas[:, k].T)
    return y


def assert_within_budget(y: Tensor, inputs: dict[str, Tensor]) -> None:
    """Twice torch's own error in the dtype, one rounding of the largest result, a float32 sum's walk of sqrt(D)."""
    walk = torch.finfo(F32).eps * inputs["x"].shape[1] ** 0.5
    exact = compute(inputs, torch.float64)
    error = (y.double() - exact).abs().max().item()
    own = (compute(inputs, y.dtype).double() - exact).abs().max().item()
    budget = 2 * own + torch.finfo(y.dtype).eps * exact.abs().max().item() + walk * exact.abs().mean().item()
    assert error <= budget, f"error {error:.3e}, budget {budget:.3e}, torch's own {own:.3e}"


def run_on_host(library: ctypes.CDLL, inputs: dict[str, Tensor], dtypes: int, variant: int) -> Tensor:
    (M, D), (N, K, _) = inputs["x"].shape, inputs["deltas"].shape
    y = torch.full((M, N), float("nan"), dtype=inputs["x"].dtype)
    pointers = (ctypes.c_void_p * 8)(*[tensor.data_ptr() for tensor in inputs.values()], y.data_ptr())
    sizes = (ctypes.c_int64 * 4)(M, N, D, K)
    assert library.run_on_host(dtypes, variant, pointers, sizes) == 0
    return y


@needs_nvcc
@pytest.mark.parametrize("dtypes", range(len(DTYPES)), ids=DTYPE_IDS)
@pytest.mark.parametrize(("M", "D", "N", "K"), [(1, 264, 7, 2), (5, 33, 3, 1), (18, 576, 9, 5)])
def test_arithmetic_on_the_host(host_library: ctypes.CDLL, M: int, D: int, N: int, K: int, dtypes: int) -> None:
    inputs = make_inputs(M, D, N, K, *DTYPES[dtypes])
    results = [
        run_on_host(host_library, inputs, dtypes, variant)
        for variant, (_, _, aligned) in enumerate(VARIANTS)
        if D % 8 == 0 or not aligned
    ]
    for y in results:
        assert_within_budget(y, inputs)
        assert torch.equal(y, results[0]), "a row's bits must not depend on the variant, and so on M"


@needs_extension
@pytest.mark.parametrize(("x", "deltas"), DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("M", "D", "N", "K"), [(1, 264, 7, 2), (5, 33, 3, 1), (18, 576, 129, 5), (40, 64, 65, 2)])
def test_values_on_a_gpu(M: int, D: int, N: int, K: int, x: torch.dtype, deltas: torch.dtype) -> None:
    inputs = {name: tensor.cuda() for name, tensor in make_inputs(M, D, N, K, x, deltas).items()}
    y = clp_kernels.mixed_linear(**inputs, backend="cuda")
    assert_within_budget(y, inputs)
    first = {**inputs, "x": inputs["x"][:1], "row_map": inputs["row_map"][:1]}
    assert torch.equal(clp_kernels.mixed_linear(**first, backend="cuda")[0], y[0]), "bits depend on the batch"


@needs_extension
def test_unaligned_rows_on_a_gpu() -> None:
    inputs = {name: tensor.cuda() for name, tensor in make_inputs(5, 64, 9, 2, BF16, BF16).items()}
    expected = clp_kernels.mixed_linear(**inputs, backend="cuda")
    storage = torch.empty(5 * 64 + 1, dtype=BF16, device="cuda")
    shifted = storage[1:].view(5, 64).copy_(inputs["x"])
    assert torch.equal(clp_kernels.mixed_linear(**{**inputs, "x": shifted}, backend="cuda"), expected)
