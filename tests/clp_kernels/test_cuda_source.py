"""The CUDA decode kernels of mixed_linear: compiled without a spill, their arithmetic run on the host, all on a GPU.

The first two parts need nvcc (the first what it built) and no GPU. The arithmetic of the kernels is host-and-device
code, which a small program (mixed_linear_sm80_host.cu) runs: the scalar form for one lane after the other, joined in
the kernel's butterfly; the tensor cores' for whole warps, with asynchronous copies that land early or late and the
instruction's fragments by its definition. It is compared with float64 here. Only the instructions themselves and the
launch are left to the third part, which needs a GPU and the built extension.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

import clp_kernels

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
BUILT = Path(clp_kernels.__file__).with_name("_cuda.abi3.so")
needs_build = pytest.mark.skipif(not BUILT.exists(), reason="the CUDA part was not built")
ARCHITECTURES = ("sm_80", "sm_90")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
CUDA_MISSING = clp_kernels.available_backends()["cuda"]
needs_extension = pytest.mark.skipif(CUDA_MISSING is not None, reason=f"no CUDA back-end: {CUDA_MISSING}")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]
DTYPE_IDS = [f"{x}-deltas-{deltas}".replace("torch.", "") for x, deltas in DTYPES]
# The launcher's choices in the scalar form: rows and features of a warp, and whether it loads 16 bytes at a time.
VARIANTS = [(1, 1, True), (4, 1, True), (8, 2, True), (4, 1, False)]
# On the tensor cores: rows of a block.
MMA_ROWS = (8, 16, 32, 64)
MMA_DTYPES = [i for i, (x, deltas) in enumerate(DTYPES) if x == deltas != F32]


def compile_with_nvcc(*arguments: str | Path) -> str:
    assert NVCC is not None
    command = [NVCC, "-std=c++17", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@needs_build
def test_built_kernels_have_no_spill() -> None:
    resources = r"Function \S*mixed_linear_decode\S*:\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+) "
    found = re.findall(resources, dump("-res-usage"))
    kernels = len(DTYPES) * len(VARIANTS) + len(MMA_DTYPES) * len(MMA_ROWS)
    assert len(found) == kernels * len(ARCHITECTURES)
    assert set(found) == {("0", "0")}


@needs_build
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_built_kernels_copy_past_the_registers(architecture: str, tmp_path: Path) -> None:
    """The tensor cores' kernels copy 16 bytes at a time past the registers, and keep nothing in local memory."""
    dump("-xelf", f"{architecture}.cubin", folder=tmp_path)
    (cubin,) = tmp_path.iterdir()
    functions = dump("-sass", of=cubin).split("Function : ")[1:]
    decoding = [text for text in functions if "mixed_linear_decode_mma" in text[:80]]
    assert len(decoding) == len(MMA_DTYPES) * len(MMA_ROWS)
    for text in decoding:
        copies = re.findall(r"LDGSTS\S*", text)
        assert copies
        assert all(copy.startswith("LDGSTS.E.BYPASS") and ".128" in copy.replace("LTC128B", "") for copy in copies)
        assert re.search(r"HMMA\.16816\.F32", text)
        assert not re.search(r"\b(LDL|STL)\b", text)


def dump(*what: str, of: Path = BUILT, folder: Path | None = None) -> str:
    """What cuobjdump says of the built shared object, or of a part of it."""
    program = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, *what, of], capture_output=True, text=True, check=True, cwd=folder).stdout


@pytest.fixture(scope="module")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("host") / "host.so"
    source = Path(__file__).with_name("mixed_linear_sm80_host.cu")
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


def compute(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> Tensor:
    """Computes the operator in one dtype throughout, stream by stream."""
    x, deltas, bias, bias_deltas, c = (
        inputs[name].to(dtype) for name in ("x", "deltas", "bias", "bias_deltas", "coefficients")
    )
    c_MK = c[inputs["row_map"].long()]
    y = bias + c_MK @ bias_deltas.T
    if inputs["base"] is not None:
        y = y + x @ inputs["base"].to(dtype).T
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
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in inputs.values()]
    pointers = (ctypes.c_void_p * 8)(*addresses, y.data_ptr())
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


@needs_nvcc
@pytest.mark.parametrize("dtypes", MMA_DTYPES, ids=[DTYPE_IDS[i] for i in MMA_DTYPES])
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
@pytest.mark.parametrize(("M", "D", "N", "K"), [(1, 8, 16, 1), (9, 264, 17, 2), (33, 1160, 30, 3), (70, 576, 48, 16)])
def test_tensor_cores_on_the_host(
    host_library: ctypes.CDLL, M: int, D: int, N: int, K: int, with_base: bool, dtypes: int
) -> None:
    inputs = make_inputs(M, D, N, K, *DTYPES[dtypes])
    if not with_base:
        inputs["base"] = None
    results = [run_on_host(host_library, inputs, dtypes, 10 + variant) for variant in range(2 * len(MMA_ROWS))]
    assert_within_budget(results[0], inputs)
    for y in results:
        assert torch.equal(y, results[0]), "a row's bits must not depend on the variant, and so on M"


@needs_extension
@pytest.mark.parametrize(("x", "deltas"), DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("M", "D", "N", "K"),
    [(1, 264, 7, 2), (5, 33, 3, 1), (18, 576, 129, 5), (40, 64, 65, 2), (9, 4096, 256, 4), (130, 1160, 50, 3)],
)
def test_values_on_a_gpu(M: int, D: int, N: int, K: int, x: torch.dtype, deltas: torch.dtype) -> None:
    inputs = {name: tensor.cuda() for name, tensor in make_inputs(M, D, N, K, x, deltas).items()}
    y = clp_kernels.mixed_linear(**inputs, backend="cuda")
    assert_within_budget(y, inputs)
    first = {**inputs, "x": inputs["x"][:1], "row_map": inputs["row_map"][:1]}
    assert torch.equal(clp_kernels.mixed_linear(**first, backend="cuda")[0], y[0]), "bits depend on the batch"


@needs_extension
@pytest.mark.parametrize("N", [9, 24], ids=["scalar", "tensor-cores"])
def test_unaligned_rows_on_a_gpu(N: int) -> None:
    inputs = {name: tensor.cuda() for name, tensor in make_inputs(5, 64, N, 2, BF16, BF16).items()}
    expected = clp_kernels.mixed_linear(**inputs, backend="cuda")
    storage = torch.empty(5 * 64 + 1, dtype=BF16, device="cuda")
    shifted = storage[1:].view(5, 64).copy_(inputs["x"])
    assert torch.equal(clp_kernels.mixed_linear(**{**inputs, "x": shifted}, backend="cuda"), expected)
