"""What an installed wheel must do: `python -I wheel_smoke.py --extension` or `--no-extension` in an empty folder."""

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch

import clp_engine
import clp_kernels


def check_operator(has_extension: bool) -> None:
    """Compare mixed_linear's default back-end and the C++ one with the float64 reference, with gradients."""
    reason = clp_kernels.available_backends()["cpp"]
    assert (reason is None) == has_extension, f"the C++ back-end's state is {reason or 'available'}"
    generator = torch.Generator().manual_seed(0)
    x_MD, base_ND, deltas_NKD, c_MK = (
        torch.randn(shape, generator=generator) for shape in ((5, 33), (7, 33), (7, 2, 33), (5, 2))
    )
    expected_MN = clp_kernels.mixed_linear_ref(x_MD.double(), base_ND.double(), deltas_NKD.double(), c_MK.double())
    for name in ("auto", "reference", *(["cpp"] if has_extension else [])):
        deltas = deltas_NKD.clone().requires_grad_()
        y_MN = clp_kernels.mixed_linear(x_MD, base_ND, deltas, c_MK, backend=name)
        y_MN.sum().backward()
        # float32 sums of 33 * 3 products of order 1.
        torch.testing.assert_close(y_MN.double(), expected_MN, rtol=1e-5, atol=1e-4)
        assert deltas.grad is not None
        assert torch.isfinite(deltas.grad).all()


def check_backend_names(has_extension: bool) -> None:
    """Ask for the C++ back-end by name where there is none: the error must say so."""
    if has_extension:
        return
    message = "backend='cpp' ran without an extension"
    try:
        clp_kernels.mixed_linear(torch.ones(1, 4), None, torch.ones(2, 1, 4), torch.ones(1, 1), backend="cpp")
    except RuntimeError as error:
        message = str(error)
    assert "CLP_SKIP_EXTENSION" in message, message


def main() -> None:
    """Run every check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--extension", action=argparse.BooleanOptionalAction, required=True)
    has_extension = parser.parse_args().extension
    assert Path(clp_engine.__file__).is_relative_to(sys.prefix), f"{clp_engine.__file__} is not the installed package"
    check_operator(has_extension)
    check_backend_names(has_extension)
    help_text = subprocess.run(
        [str(Path(sys.prefix) / "bin" / "clp"), "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "generate" in help_text, help_text
    print(f"clp_engine {importlib.metadata.version('clp_engine')}: backends {clp_kernels.available_backends()}")


if __name__ == "__main__":
    main()
