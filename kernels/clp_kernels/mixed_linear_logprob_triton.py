"""Launchers of the Triton kernels of `mixed_linear_logprob`: back-end "triton".

Shapes: M rows, D in, V vocabulary, C tokens of one chunk of it, K copies, S distinct weightings, P splits.

The forward never writes a logit: each program walks its tokens with an online softmax, and what the programs of a row
found is merged in a fixed order. The backward goes over the vocabulary in chunks: one kernel makes the logits of a
chunk again and leaves the gradient of the head's output, float32 [M, C], in a scratch buffer, from which the kernels of
`mixed_linear` form every gradient. One kernel for all would make the logits anew for every tile of D or add by atomics.
The gradient is never rounded to 16 bits: beside 16-bit operands it is multiplied in TF32, which has float32's range.

As in `mixed_linear_triton`: any strides, no copy of the head, no value read on the host, no atomics, the same bits on
every run; a row's bits do not depend on its neighbours' values.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from clp_kernels.launch_triton import (
    Tile,
    check_tensors,
    choose_tile,
    on_device,
    product_arguments,
    select_product_tile,
)
from clp_kernels.mixed_linear_logprob_arguments import Head, Logits, Needs, Targets
from clp_kernels.mixed_linear_logprob_triton_kernels import (
    output_gradient_kernel,
    softmax_kernel,
    softmax_partials_kernel,
)
from clp_kernels.mixed_linear_reference import sum_by_weighting
from clp_kernels.mixed_linear_triton import backward_x, compute_coefficients_gradient, write_deltas_gradient

# Programs of the forward, where the vocabulary has as many tiles: several for each of a large GPU's processors (132).
_PROGRAMS = 1024
# Elements of the backward's scratch buffer: 32 MiB of float32, which a large GPU's L2 cache holds (40 or 50 MB). Over
# 65536 rows it is 512 bytes a row.
_CHUNK_ELEMENTS = 2**23
_SMALLEST_CHUNK = 128
_MERGED_ROWS = 128


def forward(
    hidden_MD: Tensor, head: Head, targets: Targets, by: Logits, needs_entropy: bool, forms_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor, None]:
    """Returns logprob_M, entropy_M or None, normalizer_M2 (largest logit, log of the sum of exp over it), None.

    The gradient of hidden is never formed here: backward makes the logits again. Rows without a target hold 0.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    check_tensors({"hidden": hidden_MD, "base": head.base, "deltas": head.deltas})
    M, V = hidden_MD.shape[0], head.deltas.shape[0]
    logprob_M, normalizer_M2 = (torch.empty(size, dtype=torch.float32, device=hidden_MD.device) for size in (M, (M, 2)))
    entropy_M = torch.empty_like(logprob_M) if needs_entropy else None
    if M == 0:
        return logprob_M, entropy_M, normalizer_M2, None
    tile = _choose_tile("mixed_linear_logprob", hidden_MD, head, lambda: select_product_tile(M, hidden_MD.dtype))
    row_blocks = triton.cdiv(M, tile.rows)
    tiles_per_split = triton.cdiv(triton.cdiv(V, tile.outs) * row_blocks, _PROGRAMS)
    tokens_per_split = tiles_per_split * tile.outs
    P = triton.cdiv(V, tokens_per_split)
    partials_P4M = torch.empty((P, 4, M), dtype=torch.float32, device=hidden_MD.device)
    tensors, strides, constants = _head_arguments(hidden_MD, head, tile)
    numbers, has_softcap = _logit_numbers(by)
    with on_device(hidden_MD):
        softmax_partials_kernel[(row_blocks, P)](
            *(*tensors, targets.ids, partials_P4M),
            *(M, V, hidden_MD.shape[1], head.deltas.shape[1], tokens_per_split, targets.ignore_index),
            *(*strides, *targets.ids.stride(), *numbers),
            HAS_SOFTCAP=has_softcap,
            NEEDS_ENTROPY=needs_entropy,
            **constants,
        )
        softmax_kernel[(triton.cdiv(M, _MERGED_ROWS),)](
            *(partials_P4M, targets.ids, logprob_M, entropy_M, normalizer_M2),
            *(M, P, targets.ignore_index, *targets.ids.stride()),
            NEEDS_ENTROPY=needs_entropy,
            BLOCK_M=_MERGED_ROWS,
        )
    return logprob_M, entropy_M, normalizer_M2, None


def backward(
    hidden_MD: Tensor,
    head: Head,
    targets: Targets,
    by: Logits,
    normalizer_M2: Tensor,
    entropy_M: Tensor | None,
    d_logprob_M: Tensor,
    d_entropy_M: Tensor | None,
    needs: Needs,
    main_grad: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of hidden, base, deltas, c, bias and bias_deltas, None where not needed.

    d_logits = d_logprob (onehot - p) - d_entropy p (log p + entropy); the rest are those of mixed_linear, by chunks.
    The gradient of the deltas is added to `main_grad` [V, K, D] float32 where that is given, and not returned.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    check_tensors({"hidden": hidden_MD, "base": head.base, "deltas": head.deltas})
    of_rows = tuple(None if t is None else t.contiguous() for t in (normalizer_M2, entropy_M, d_logprob_M, d_entropy_M))
    # Zeros where there is no target: what lies in these rows must not reach the products over rows.
    rows_MD = torch.where((targets.ids != targets.ignore_index)[:, None], hidden_MD, 0.0)
    gradients = _Gradients(rows_MD, head, needs, main_grad)
    M, V = hidden_MD.shape[0], head.deltas.shape[0]
    size = max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS // max(M, 1) // _SMALLEST_CHUNK * _SMALLEST_CHUNK)
    scratch = rows_MD.new_empty(M * min(size, V), dtype=torch.float32)
    tile = _choose_tile("mixed_linear_logprob.backward", rows_MD, head, lambda: select_output_gradient_tile(rows_MD))
    for begin in range(0, V, size):
        end = min(begin + size, V)
        dy_MC = scratch[: M * (end - begin)].view(M, end - begin)
        _launch_output_gradient(rows_MD, head.columns(begin, end), targets, by, of_rows, begin, dy_MC, tile)
        gradients.take(dy_MC, begin, end)
    return gradients.finished(hidden_MD.dtype)


class _Gradients:
    """The gradients that are asked for, formed chunk by chunk of the vocabulary.

    Those of the head's parameters are written once, those of hidden and of the coefficients are sums in float32.
    """

    def __init__(self, rows_MD: Tensor, head: Head, needs: Needs, main_grad: Tensor | None) -> None:
        self.rows_MD, self.head, self.main_grad = rows_MD, head, main_grad
        self.hidden = rows_MD.new_zeros(rows_MD.shape, dtype=torch.float32) if needs.hidden else None
        self.c = head.c.new_zeros(head.c.shape) if needs.c else None
        self.base, self.deltas, self.bias, self.bias_deltas = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed and t is not None else None
            for t, needed in (
                (head.base, needs.base),
                (head.deltas, needs.deltas),
                (head.bias, needs.bias),
                (head.bias_deltas, needs.bias_deltas),
            )
        )
        self.one_11, self.same_M = head.c.new_ones(1, 1), torch.zeros_like(head.row_map)
        self.c_MK = head.c.index_select(0, head.row_map)

    def take(self, dy_MC: Tensor, begin: int, end: int) -> None:
        """Adds or writes what follows from dy, the gradient of the head's output, of the tokens [begin, end)."""
        at, part, rows_MD = slice(begin, end), self.head.columns(begin, end), self.rows_MD
        weighting = (part.c, part.row_map)
        if self.hidden is not None:
            products = (dy_MC, part.base, part.deltas, *weighting)
            backward_x(*products, adds_to=self.hidden, rows_dtype=rows_MD.dtype)
        if self.base is not None:  # a copy of coefficient 1 in every row
            write_deltas_gradient(dy_MC, rows_MD, self.one_11, self.same_M, self.base[at][:, None], adds=False)
        if self.main_grad is not None:
            write_deltas_gradient(dy_MC, rows_MD, *weighting, self.main_grad[at], adds=True)
        elif self.deltas is not None:
            write_deltas_gradient(dy_MC, rows_MD, *weighting, self.deltas[at], adds=False)
        if self.c is not None:
            self.c += compute_coefficients_gradient(dy_MC, rows_MD, part.deltas, *weighting)
        # The bias terms are small reductions, in plain torch as in mixed_linear.
        if self.bias is not None:
            self.bias[at] = dy_MC.sum(0)
        if self.bias_deltas is not None:
            self.bias_deltas[at] = dy_MC.T @ self.c_MK
        if self.c is not None and part.bias_deltas is not None:
            bias_deltas_CK = part.bias_deltas.float().contiguous()  # BLAS takes no strides beyond 32 bits
            self.c += sum_by_weighting(dy_MC @ bias_deltas_CK, part.row_map, self.c.shape[0])

    def finished(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Returns them in the order of `Needs`, that of hidden in its dtype."""
        d_hidden = None if self.hidden is None else self.hidden.to(dtype)
        return d_hidden, self.base, self.deltas, self.c, self.bias, self.bias_deltas


def select_output_gradient_tile(rows_MD: Tensor) -> Tile:
    """Chooses the tile of the kernel that makes the logits of a chunk again, from the rows alone."""
    tile = select_product_tile(len(rows_MD), rows_MD.dtype)
    return replace(tile, num_stages=min(tile.num_stages, 3))  # with a fourth, 3 rows of float32 spill registers


def _choose_tile(kernel: str, rows_MD: Tensor, head: Head, heuristic: Callable[[], Tile]) -> Tile:
    V, K, D = head.deltas.shape
    return choose_tile(kernel, rows_MD, head.base, head.deltas, (K, V, D), heuristic)


def _launch_output_gradient(
    hidden_MD: Tensor,
    head: Head,
    targets: Targets,
    by: Logits,
    of_rows: tuple[Tensor | None, ...],
    first_token: int,
    dy_MC: Tensor,
    tile: Tile,
) -> None:
    """Writes the gradient of the head's output; `head` is that of the chunk, of_rows as the kernel takes them."""
    if dy_MC.numel() == 0:
        return
    M, C = dy_MC.shape
    tensors, strides, constants = _head_arguments(hidden_MD, head, tile)
    numbers, has_softcap = _logit_numbers(by)
    with on_device(hidden_MD):
        output_gradient_kernel[(triton.cdiv(M, tile.rows), triton.cdiv(C, tile.outs))](
            *(*tensors, targets.ids, *of_rows, dy_MC),
            *(M, C, hidden_MD.shape[1], head.deltas.shape[1], first_token, targets.ignore_index),
            *(*strides, *targets.ids.stride(), *numbers),
            HAS_SOFTCAP=has_softcap,
            HAS_ENTROPY_GRAD=of_rows[3] is not None,
            **constants,
        )


def _head_arguments(
    hidden_MD: Tensor, head: Head, tile: Tile
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    return product_arguments(
        hidden_MD,
        *head,
        base_strides=(0, 0) if head.base is None else head.base.stride(),
        deltas_strides=head.deltas.stride(),
        tile=tile,
        rows_dtype=hidden_MD.dtype,
    )


def _logit_numbers(by: Logits) -> tuple[tuple[float, float, float], bool]:
    """Returns dz/dy without a cap, the factor of y into the cap, that of tanh out of it; whether there is a cap."""
    slope = by.logit_scale / by.temperature
    if by.softcap is None:
        return (slope, 0.0, 0.0), False
    return (slope, by.logit_scale / by.softcap, by.softcap / by.temperature), True
