"""Which modules a config conditions, found by structure, and what each of them becomes.

The layers of a variant, or those that PEFT's grammar names, get the family of the config's parameterization; with
`train_shared` everything else gets one copy that all weightings share.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from clp_engine.conditioning import ActiveConditioning
from clp_engine.config import CLPConfig
from clp_engine.layers.conditioned import CLPLayer, LayerContext, condition
from clp_engine.layers.decoder import fuse_decoders
from clp_engine.layers.embedding import DeltaEmbedding, PerSequenceBias, RelativeBiasEmbedding
from clp_engine.layers.linear import DeltaLinear, contiguous_rows, features, has_float_weight, is_linear
from clp_engine.layers.low_rank import LoRALinear, PBLoRALinear, SVDLinear
from clp_engine.layers.norm import DeltaNorm, is_norm, norm_arithmetic
from clp_engine.layers.soft_tokens import SoftTokenAttention

SHARED_COPY = "shared"


def condition_modules(model: nn.Module, config: CLPConfig, active: ActiveConditioning) -> list[str]:
    """Condition the modules of `model` that `config` names, in place; the paths of the conditioned ones.

    Everything that can be refused is refused before the first module changes.

    Raises:
        ValueError: nothing matches; the message lists the nearest names, or says why a module is out of reach.
        NotImplementedError: a module that cannot carry such copies, by path and class.
    """
    chosen = find_targets(model, config)
    shared = [path for path in _parameterised(model) if path not in chosen] if config.train_shared else []
    modules = dict(model.named_modules())
    for path in chosen:
        _check(path, modules[path], config)
    for path in shared:
        _check_delta(path, modules[path])
    for path in (*chosen, *shared):
        _check_not_offloaded(modules[path], path)
    model.requires_grad_(False)
    tied: dict[tuple[int, bool], nn.Parameter] = {}
    for path in chosen:
        _adopt(model, path, config, LayerContext(active, path, config.copy_names), tied)
    for path in shared:
        _adopt_delta(model, path, LayerContext(active, path, (SHARED_COPY,), shared=True), True, tied)
    fuse_decoders(model, active)
    if (head := _output_head(model)) is not None:
        head.register_forward_pre_hook(contiguous_rows)
    return [*chosen, *shared]


def find_targets(model: nn.Module, config: CLPConfig) -> list[str]:
    """Paths of the modules that `config` conditions with a copy per reward, in module order.

    Raises:
        ValueError: nothing matches, or nothing matches one of several suffixes.
    """
    modules = dict(model.named_modules())
    linears = [path for path, module in modules.items() if is_linear(module)]
    head = _output_head(model)
    if config.target_modules is not None:
        known = [path for path, module in modules.items() if _carries_delta(module)]
        found = _matching(linears, known, config, modules, head)
        wanted = f"target_modules={config.target_modules!r}"
    elif config.variant == "logit":
        found = [path for path in linears if modules[path] is head]
        wanted = 'variant="logit" (the linear output head)'
    elif config.variant == "full":
        found, wanted = _parameterised(model), 'variant="full" (every parameter)'
    else:
        inside = [path for path, module in modules.items() if "Attention" in type(module).__name__]
        within = [path for path in linears if any(path.startswith(f"{parent}.") for parent in inside)]
        blocks = [path for path in inside if not any(other.startswith(f"{path}.") for other in inside)]
        found = blocks if config.parameterization == "soft_tokens" else within
        wanted = 'variant="attn" (linear layers inside attention modules)'
    targets = config.target_modules
    if not found:
        raise ValueError(f"{wanted} matches no layer of {type(model).__name__}{_hint(linears, targets)}")
    for target in targets if isinstance(targets, list) else ():
        if not any(_is_suffix(target, path) for path in found):
            near = _hint(linears, [target])
            raise ValueError(f"{target!r} of {wanted} matches no layer of {type(model).__name__}{near}")
    return found


def _output_head(model: nn.Module) -> Any:
    return getattr(model, "get_output_embeddings", lambda: None)()


def _matching(
    linears: Sequence[str], known: Sequence[str], config: CLPConfig, modules: dict[str, nn.Module], head: Any
) -> list[str]:
    targets = config.target_modules
    if targets == "all-linear":
        return [path for path in linears if modules[path] is not head]
    if isinstance(targets, str):
        pattern = targets
        named: Callable[[str], bool] = lambda path: re.fullmatch(pattern, path) is not None  # noqa: E731
    else:
        suffixes: list[str] = targets or []
        named = lambda path: any(_is_suffix(target, path) for target in suffixes)  # noqa: E731
    able = set(known if config.parameterization == "delta" else linears)
    found = [path for path in modules if path in able and named(path)]
    for path, module in modules.items():
        if path and named(path) and path not in able and list(module.parameters(recurse=False)):
            _refuse(path, module, config.parameterization)
    return found


def _is_suffix(target: str, path: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _parameterised(model: nn.Module) -> list[str]:
    """Paths of all modules that hold parameters themselves, one path for a module that has several."""
    return [path for path, module in model.named_modules() if list(module.parameters(recurse=False))]


def _carries_delta(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, nn.Embedding) or is_norm(module)


def _check(path: str, module: nn.Module, config: CLPConfig) -> None:
    if config.parameterization == "delta":
        _check_delta(path, module)
    elif config.parameterization != "soft_tokens" and not is_linear(module):
        _refuse(path, module, config.parameterization)


def _check_delta(path: str, module: nn.Module) -> None:
    if not _carries_delta(module):
        _refuse(path, module, "delta")
    if is_norm(module):
        norm_arithmetic(module, path)
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise NotImplementedError(f"{path} has max_norm={module.max_norm}: it changes its own table")
    if is_linear(module) and not has_float_weight(module):
        raise NotImplementedError(
            f"{path} ({type(module).__name__}) is quantised: full deltas need floating-point weights; "
            'parameterization="lora", "svd" or "pblora" works beside any linear layer'
        )


def _check_not_offloaded(module: nn.Module, name: str) -> None:
    hook: Any = getattr(module, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))):
        raise NotImplementedError(
            f"{name} is offloaded: its weights come to the device for each forward only; choose a device_map that "
            "leaves conditioned layers on a device"
        )


def _refuse(path: str, module: nn.Module, parameterization: str) -> None:
    shapes = {name: list(p.shape) for name, p in module.named_parameters(recurse=False)}
    experts = " (fused experts are no linear layers)" if any(len(shape) == 3 for shape in shapes.values()) else ""
    able = "linear layers, embeddings and norms" if parameterization == "delta" else "linear layers"
    raise NotImplementedError(
        f"{path} ({type(module).__name__}) holds {shapes}{experts}: {parameterization} copies are built for {able}; "
        "choose others with target_modules"
    )


def _adopt(
    model: nn.Module, path: str, config: CLPConfig, context: LayerContext, tied: dict[tuple[int, bool], nn.Parameter]
) -> CLPLayer:
    module = model.get_submodule(path)
    if config.parameterization == "lora":
        return LoRALinear.adopt(module, context, config.ranks, config.scalings)
    if config.parameterization == "svd":
        return SVDLinear.adopt(module, context, config.rank)
    if config.parameterization == "pblora":
        return PBLoRALinear.adopt(module, context, config.rank)
    if config.parameterization == "soft_tokens":
        width = next(_widths(module))
        return SoftTokenAttention.adopt(module, context, width, config.num_virtual_tokens)
    return _adopt_delta(model, path, context, config.variant == "full", tied)


def _widths(attention: nn.Module) -> Iterator[int]:
    return (features(module)[1] for module in attention.modules() if is_linear(module))


def _adopt_delta(
    model: nn.Module, path: str, context: LayerContext, with_bias: bool, tied: dict[tuple[int, bool], nn.Parameter]
) -> CLPLayer:
    module = model.get_submodule(path)
    if is_norm(module):
        return DeltaNorm.adopt(module, context)
    key = (id(module.weight), context.shared)
    deltas = tied.get(key)
    if isinstance(module, nn.Embedding):
        owner = model.get_submodule(path.rpartition(".")[0])
        relative = hasattr(owner, "compute_bias") and path.endswith("relative_attention_bias")
        if relative:
            condition(owner, PerSequenceBias, LayerContext(context.active, path.rpartition(".")[0], ()))
        family = RelativeBiasEmbedding if relative else DeltaEmbedding
        layer: Any = family.adopt(module, context, deltas)
    else:
        layer = DeltaLinear.adopt(module, context, with_bias, deltas)
    tied[key] = layer.deltas
    return layer


def _hint(linears: Sequence[str], targets: Sequence[str] | str | None) -> str:
    suffixes = sorted({path.rsplit(".", 1)[-1] for path in linears})
    wanted = re.findall(r"\w+", targets) if isinstance(targets, str) else targets or []
    near = sorted({match for target in wanted for match in difflib.get_close_matches(target, suffixes, n=3)})
    grammar = "; a string is a regular expression of the whole path" if isinstance(targets, str) else ""
    return (f"; near names: {near}" if near else f"; its linear layers end in {suffixes}") + grammar
