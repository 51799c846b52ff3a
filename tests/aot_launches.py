"""Which calls of the launchers stand for everything that they can launch; for each kernel, the one that stands for it.

An operator has a function `record_<operator>` in OPERATORS, which calls its launchers as they are called, and its
kernels' properties in PROPERTIES. `hot` names the kernels of which a call is the hot one: the 16-bit rows that the
kernel is tuned for. Together the calls take every tile, dtype, form and option of the launchers, though not every
product of them: a dtype with every tile, an option once in every form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from aot_recorder import Launch, Recorder, Target

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of rows (and base) and deltas.
TRAINED = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32)]
OTHERS = [(F32, BF16), (F32, F16), (BF16, F16), (F16, BF16)]
# dot: multiplies matrices, which 16-bit rows do on the tensor cores. warpgroup: on Hopper by warpgroups, on Blackwell
# from tensor memory. wide: loads 16 bytes at a time; a kernel that multiplies, in decoding. asserts: about the ids.
PROPERTIES: dict[str, set[str]] = {
    "mixed_linear.mixed_product_kernel": {"dot", "wide"},
    "mixed_linear.deltas_gradient_kernel": {"dot"},
    "mixed_linear.row_coefficients_gradient_kernel": {"dot"},
    "mixed_linear.weighting_sum_kernel": set(),
    "mixed_linear_segments.segment_product_kernel": {"dot", "warpgroup"},
    "mixed_linear_segments.segment_gradient_kernel": {"dot", "warpgroup"},
    "mixed_linear_segments.run_ends_kernel": set(),
    "mixed_linear_panels.mix_panel_kernel": {"wide on CUDA"},
    "mixed_linear_panels.scale_into_copies_kernel": {"wide on CUDA"},
    "mixed_linear_logprob.softmax_partials_kernel": {"dot", "wide"},
    "mixed_linear_logprob.softmax_kernel": set(),
    "mixed_linear_logprob.output_gradient_kernel": {"dot"},
    "low_rank_linear.shrink_kernel": {"dot", "wide"},
    "low_rank_linear.expand_kernel": {"dot", "wide"},
    "low_rank_linear.factor_gradient_kernel": {"dot"},
    "mixed_embedding.mixed_embedding_kernel": {"wide", "asserts"},
    "mixed_embedding.position_sum_kernel": set(),
    "mixed_embedding.coefficient_terms_kernel": set(),
    "mixed_qkv.mixed_qkv_kernel": {"dot", "wide on CUDA"},
    "mixed_norm.mixed_norm_kernel": {"wide"},
    "mixed_norm.input_gradient_kernel": set(),
    "mixed_norm.coefficient_terms_kernel": set(),
    "mixed_norm.parameter_gradients_kernel": set(),
}


def short(*dtypes: torch.dtype) -> str:
    return "-".join({F32: "f32", F16: "f16", BF16: "bf16"}[dtype] for dtype in dtypes)


def record_launches(target: Target, only_hot: bool) -> list[Launch]:
    """Calls every operator's launchers as on a GPU of `target`; only_hot: one launch for each kernel."""
    recorder = Recorder(target, only_hot)
    for record in OPERATORS:
        record(recorder)
    return list(recorder.launches.values())


def record_mixed_linear(recorder: Recorder) -> None:
    """SmolLM2-135M's attention size: streams at every tile, segments and panels; each option in each form."""
    import clp_kernels.mixed_linear_segments_triton as segments
    import clp_kernels.mixed_linear_triton as launchers

    limits = (recorder.target.capability, recorder.target.shared_bytes - 4096)
    segments.device_limits = lambda device: limits

    def call(
        label: str,
        M: int,
        x: torch.dtype,
        deltas: torch.dtype,
        *,
        S: int = 0,
        K: int = 2,
        N: int = 576,
        D: int = 576,
        backward: bool = True,
        base: torch.dtype | None = None,
        bias: int = 0,
        exact: bool = True,
        main_grad: bool = False,
        hot: Iterable[str] = (),
        tf32: bool = False,
    ) -> None:
        def run() -> None:
            x_MD = torch.empty(M, D, dtype=x, device="meta")
            base_ND = None if "no base" in label else x_MD.new_empty(N, D, dtype=base or x)
            deltas_NKD = x_MD.new_empty(N, K, D, dtype=deltas)
            weighting = (x_MD.new_empty(S or M, K, dtype=F32), x_MD.new_empty(M, dtype=torch.int32))
            biases = (x_MD.new_empty(N) if bias else None, deltas_NKD.new_empty(N, K) if bias > 1 else None)
            y_MN = launchers.forward(x_MD, base_ND, deltas_NKD, *weighting, *biases, exact_delta=exact)
            if backward:
                launchers.backward_x(y_MN, base_ND, deltas_NKD, *weighting, exact_delta=exact)
                buffer = deltas_NKD.new_empty(N, K, D, dtype=F32) if main_grad else None
                launchers.backward_deltas(y_MN, x_MD, deltas_NKD, *weighting, True, True, main_grad=buffer)

        recorder.during(run, f"{label}, {short(x, deltas)}", x, K, hot, tf32)

    streams = ["mixed_product_kernel"]
    gradients = ["deltas_gradient_kernel"]
    of_segments = ["segment_product_kernel", "segment_gradient_kernel", "run_ends_kernel", "weighting_sum_kernel"]
    of_segments.append("row_coefficients_gradient_kernel")
    of_panels = ["mix_panel_kernel", "scale_into_copies_kernel"]
    for x, deltas in TRAINED:
        is_usual = (x, deltas) == (BF16, F32)  # what is trained, and decoded between steps
        call("decode", 16, x, deltas, backward=False, hot=streams if is_usual else ())
        call("small batch", 64, x, deltas, backward=x == BF16)
        call("training", 1024, x, deltas, hot=gradients if is_usual else ())
        call("one weighting", 2048, x, deltas, S=1, exact=False, hot=of_panels if (x, deltas) == (BF16, BF16) else ())
        if x != F32:
            call("segments", 2048, x, deltas, S=8, hot=of_segments if is_usual else ())
            call("segments, rounded", 2048, x, deltas, S=8, exact=False, backward=x == BF16)
    for x, deltas in OTHERS:
        call("decode", 16, x, deltas, backward=False)
        call("training", 1024, x, deltas)
    for label, M, S in (("decode", 16, 0), ("training", 1024, 0), ("segments", 2048, 8), ("panels", 2048, 1)):
        rest = {"S": S, "exact": label != "panels"}
        has_backward = label != "decode"
        call(f"{label}, no base", M, BF16, F32, **rest, backward=has_backward)
        call(f"{label}, bias", M, BF16, BF16, **rest, bias=1, backward=False)
        call(f"{label}, mixed bias", M, BF16, F32, **rest, bias=2, backward=False)
        call(f"{label}, odd", M + 1, BF16, F32, **rest, N=35, D=33, K=3, backward=has_backward)
        call(f"{label}, main_grad", M, BF16, F32, **rest, main_grad=True, backward=has_backward)
    for K in (1, 3, 4, 8):
        call(f"segments, K={K}", 2048, BF16, BF16, S=8, K=K)
        call(f"segments, K={K}", 2048, BF16, F32, S=8, K=K, backward=False)
        call(f"panels, K={K}", 2048, BF16, BF16, S=1, K=K, exact=False)
    call("training, base f32", 1024, BF16, F32, base=F32)
    call("decode, odd", 3, F32, F32, N=35, D=33)
    for M in (16, 1024):
        call(f"TF32, M={M}", M, F32, F32, tf32=True)


def record_mixed_linear_logprob(recorder: Recorder) -> None:
    """The head at SmolLM2-135M's size: every tile and option, and what it shares with mixed_linear."""
    import clp_kernels.mixed_linear_logprob_triton as launchers
    from clp_kernels.mixed_linear_logprob_arguments import Head, Logits, Needs, Targets

    def call(
        label: str,
        M: int,
        x: torch.dtype,
        deltas: torch.dtype,
        *,
        V: int = 49152,
        D: int = 576,
        K: int = 2,
        softcap: float | None = None,
        entropy: bool = True,
        bias: bool = False,
        hot: Iterable[str] = (),
        tf32: bool = False,
    ) -> None:
        def run() -> None:
            x_MD = torch.empty(M, D, dtype=x, device="meta")
            row_map_M, rows_M = x_MD.new_empty(M, dtype=torch.int32), x_MD.new_empty(M, dtype=F32)
            c_SK, ids_M = x_MD.new_empty(4, K, dtype=F32), x_MD.new_empty(M, dtype=torch.int64)
            base_VD = None if "no base" in label else x_MD.new_empty(V, D)
            deltas_VKD = x_MD.new_empty(V, K, D, dtype=deltas)
            biases = (x_MD.new_empty(V), deltas_VKD.new_empty(V, K)) if bias else (None, None)
            head = Head(base_VD, deltas_VKD, c_SK, row_map_M, *biases)
            arguments = (x_MD, head, Targets(ids_M, -100), Logits(0.7, 1.3, softcap))
            _, entropy_M, normalizer_M2, _ = launchers.forward(*arguments, entropy, False)
            needs = Needs(True, base_VD is not None, True, True, bias, bias)
            d_entropy_M = rows_M if entropy else None
            buffer = deltas_VKD.new_empty(V, K, D, dtype=F32) if "main_grad" in label else None
            launchers.backward(*arguments, normalizer_M2, entropy_M, rows_M, d_entropy_M, needs, buffer)

        recorder.during(run, f"{label}, {short(x, deltas)}", x, K, hot, tf32)

    every = ["softmax_partials_kernel", "softmax_kernel", "output_gradient_kernel"]
    for x, deltas in TRAINED:
        call("decode", 16, x, deltas)
        call("small batch", 64, x, deltas)
        call("training", 1024, x, deltas, hot=every if (x, deltas) == (BF16, F32) else ())
    call("training, capped", 1024, BF16, F32, softcap=30.0)
    call("training, capped", 1024, F32, F32, softcap=30.0)
    call("training, log-probs alone", 1024, BF16, F32, entropy=False)
    call("training, no base", 1024, BF16, F32)
    call("training, mixed bias, main_grad", 1024, BF16, F32, bias=True)
    call("odd", 3, F32, F32, V=35, D=33)
    call("odd", 259, BF16, BF16, V=35, D=33, K=3)
    call("TF32", 1024, F32, F32, tf32=True)


def record_low_rank_linear(recorder: Recorder) -> None:
    """A layer of 4096 features: every tile, block of ranks and option; beside a quantised base: none of its own."""
    import clp_kernels.low_rank_linear_triton as launchers

    def call(
        label: str,
        M: int,
        R: int,
        x: torch.dtype,
        factors: torch.dtype,
        *,
        D: int = 4096,
        backward: bool = True,
        bias: bool = False,
        hot: Iterable[str] = (),
        tf32: bool = False,
    ) -> None:
        def run() -> None:
            x_MD = torch.empty(M, D, dtype=x, device="meta")
            base_ND = None if "no base" in label else x_MD.new_empty(D, D)
            down_RD, up_NR = x_MD.new_empty(R, D, dtype=factors), x_MD.new_empty(D, R, dtype=factors)
            gates_SR, row_map_M = down_RD.new_empty(4, R, dtype=F32), x_MD.new_empty(M, dtype=torch.int32)
            rest = (base_ND, down_RD, up_NR, gates_SR, row_map_M)
            y_MN, shrink_MR = launchers.forward(x_MD, *rest, x_MD.new_empty(D) if bias else None, backward)
            if backward:
                launchers.backward(y_MN, shrink_MR, x_MD, *rest, (True, False, True, True, True))

        recorder.during(run, f"{label}, R={R}, {short(x, factors)}", x, 1, hot, tf32)

    for x, factors in TRAINED:
        is_usual = (x, factors) == (BF16, BF16)
        call("decode", 16, 64, x, factors, backward=False, hot=["shrink_kernel", "expand_kernel"] if is_usual else ())
        call("small batch", 64, 64, x, factors, backward=False)
        hot = ["factor_gradient_kernel"] if (x, factors) == (BF16, F32) else ()
        call("training", 4096, 64, x, factors, hot=hot)
    for R in (16, 32, 128):
        call("decode", 16, R, BF16, BF16, backward=False)
        call("small batch", 512, R, BF16, BF16, backward=False)
        call("training", 4096, R, BF16, F32)
    call("training, no base", 4096, 64, BF16, BF16)
    call("training, bias", 4096, 64, BF16, BF16, bias=True, backward=False)
    call("decode, odd", 3, 5, F32, F32, D=33)
    call("training, odd", 259, 5, BF16, F32, D=33)
    call("TF32", 1024, 16, F32, F32, tf32=True)


def record_mixed_embedding(recorder: Recorder) -> None:
    """Embeddings of every width of block, trained with and without `main_grad`, and one without a base."""
    import clp_kernels.mixed_embedding_triton as launchers

    def call(
        label: str, D: int, x: torch.dtype, deltas: torch.dtype, main_grad: bool = False, M: int = 2048, hot: Any = ()
    ) -> None:
        def run() -> None:
            ids_M = torch.empty(M, dtype=torch.int64, device="meta")
            base_VD = None if "no base" in label else ids_M.new_empty(512, D, dtype=x)
            deltas_VKD = ids_M.new_empty(512, 2, D, dtype=deltas)
            c_SK, row_map_M = deltas_VKD.new_empty(4, 2, dtype=F32), ids_M.new_empty(M, dtype=torch.int32)
            dy_MD = launchers.forward(ids_M, base_VD, deltas_VKD, c_SK, row_map_M)
            buffer = deltas_VKD.new_empty(deltas_VKD.shape, dtype=F32) if main_grad else None
            needs = (base_VD is not None, True, True)
            launchers.backward(dy_MD, ids_M, deltas_VKD, c_SK, row_map_M, 2, *needs, buffer)

        recorder.during(run, f"{label}, D={D}, {short(x, deltas)}", x, 2, hot)

    every = ["mixed_embedding_kernel", "position_sum_kernel", "coefficient_terms_kernel"]
    for x, deltas in TRAINED:
        call("training", 4096, x, deltas, hot=every if (x, deltas) == (BF16, F32) else ())
    for D in (64, 128, 256):
        call("training", D, BF16, F32)
    call("training, main_grad", 4096, BF16, F32, main_grad=True)
    call("training, no base", 4096, BF16, BF16)
    call("odd, no base", 33, F32, F32, M=17)


def record_mixed_norm(recorder: Recorder) -> None:
    """Norms of every width of block: Llama's, a head's, LayerNorm with a bias, an odd width, without a scale."""
    import clp_kernels.mixed_norm_triton as launchers

    def call(
        label: str,
        D: int,
        x: torch.dtype,
        deltas: torch.dtype,
        *,
        M: int = 4096,
        K: int = 4,
        layer: bool = False,
        casts: bool = False,
        hot: Iterable[str] = (),
    ) -> None:
        def run() -> None:
            x_MD = torch.empty(M, D, dtype=x, device="meta")
            weight_D = None if "no scale" in label else x_MD.new_empty(D)
            deltas_DK = x_MD.new_empty(D, K, dtype=deltas)
            c_SK, row_map_M = x_MD.new_empty(4, K, dtype=F32), x_MD.new_empty(M, dtype=torch.int32)
            parameters = (weight_D, deltas_DK, c_SK, row_map_M)
            bias_D, bias_deltas_DK = (x_MD.new_empty(D), deltas_DK) if layer else (None, None)
            settings = (1e-5, layer, 0.0, casts)
            dy_MD = launchers.forward(x_MD, *parameters, bias_D, bias_deltas_DK, *settings)
            needs = (True, weight_D is not None, True, layer, layer, True)
            launchers.backward(dy_MD, x_MD, *parameters, bias_deltas_DK, *settings, *needs)

        recorder.during(run, f"{label}, D={D}, {short(x, deltas)}", x, K, hot)

    every = ["mixed_norm_kernel", "input_gradient_kernel", "coefficient_terms_kernel", "parameter_gradients_kernel"]
    for x, deltas in TRAINED:
        call("rms", 4096, x, deltas, casts=True, hot=every if (x, deltas) == (BF16, F32) else ())
        call("layer", 2048, x, deltas, layer=True)
    for D in (128, 256, 576):
        call("rms", D, BF16, BF16)
    for K in (1, 2, 16):
        call(f"rms, K={K}", 4096, BF16, F32, K=K)
    call("rms, no scale", 4096, BF16, F32)
    call("layer, odd", 33, F32, F32, M=17, layer=True)


def record_mixed_qkv(recorder: Recorder) -> None:
    """A decode step of Qwen2.5-1.5B's attention, of Qwen3's with norms of heads, of SmolLM2's, and odd sizes."""
    import clp_kernels.mixed_qkv_triton as launchers

    def call(
        label: str,
        M: int,
        x: torch.dtype,
        deltas: torch.dtype,
        *,
        D: int,
        heads: tuple[int, int],
        E: int = 128,
        K: int = 2,
        biases: bool = False,
        norms: bool = False,
        hot: Iterable[str] = (),
        tf32: bool = False,
    ) -> None:
        def run() -> None:
            x_MD = torch.empty(M, D, dtype=x, device="meta")

            def projection(H: int) -> tuple[torch.Tensor | None, ...]:
                weights = (x_MD.new_empty(H * E, D), x_MD.new_empty(H * E, K, D, dtype=deltas))
                if not biases:
                    return (*weights, None, None)
                return (*weights, x_MD.new_empty(H * E), x_MD.new_empty(H * E, K, dtype=deltas))

            c_SK, row_map_M = x_MD.new_empty(4, K, dtype=F32), x_MD.new_empty(M, dtype=torch.int32)
            table_ME, norm_E = x_MD.new_empty(M, E), x_MD.new_empty(E) if norms else None
            q, k = projection(heads[0]), projection(heads[1])
            rows = (c_SK, row_map_M, table_ME, table_ME, norm_E, norm_E)
            launchers.forward(x_MD, x_MD.new_empty(D), *q, *k, *k, *rows, 1e-6, False)

        recorder.during(run, f"{label}, {short(x, deltas)}", x, K, hot, tf32)

    qwen2: Any = {"D": 1536, "heads": (12, 2), "biases": True}
    qwen3: Any = {"D": 2048, "heads": (16, 8), "norms": True}
    for x, deltas in TRAINED:
        call("norms", 16, x, deltas, **qwen3)
        call("64 rows, norms", 64, x, deltas, **qwen3)
    for x in (BF16, F16):
        call("decode, biases", 16, x, x, **qwen2, hot=["mixed_qkv_kernel"] if x == BF16 else ())
        call("biases", 16, x, F32, **qwen2)  # so few rows of x that they come in 8 bytes, beside 16 of the weights
    call("biases", 16, F32, F32, **qwen2)
    call("decode, heads of 64", 16, BF16, BF16, D=576, heads=(9, 3), E=64)
    call("K=4", 32, BF16, F32, D=576, heads=(9, 3), E=64, K=4)
    call("odd", 33, F32, F32, D=33, heads=(3, 1), E=34, biases=True, norms=True)
    call("TF32", 16, F32, F32, **qwen3, tf32=True)


OPERATORS: list[Callable[[Recorder], None]] = [
    record_mixed_linear,
    record_mixed_linear_logprob,
    record_low_rank_linear,
    record_mixed_embedding,
    record_mixed_norm,
    record_mixed_qkv,
]
