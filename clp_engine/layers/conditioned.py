"""What every conditioned layer has in common: it stays the layer it was, and its class gains the copies.

A layer is conditioned in place: its class becomes a subclass of (the family's layer, its own class), so it keeps its
parameters, names, hooks and device, and its own forward is one `super()` away.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from clp_engine.conditioning import ActiveConditioning, Conditioning
from clp_kernels.select import OperatorCall, resolve


@dataclass(frozen=True)
class LayerContext:
    """A conditioned layer's place in its model.

    Attributes:
        active: the record of the forward that is running, one object for the whole model.
        path: the layer's module path.
        copy_names: names of its copies, in the order of their coefficients.
        shared: whether it is trained once for all weightings: one copy, whose coefficient is lambda.
    """

    active: ActiveConditioning
    path: str
    copy_names: tuple[str, ...]
    shared: bool = False


class FrontedModule(nn.Module):
    """A module whose class is its own with another one, the family, in front.

    Attributes:
        clp: its place in the model.
        plain_class: the class that it had before.
        family: the class that was put in front.
        added: names of the parameters that conditioning may add.
        settings: names of its other attributes.
        keeps_name: whether its class is named as its own was: libraries find decoder layers by that name to shard them.
    """

    clp: LayerContext
    plain_class: ClassVar[type]
    family: ClassVar[type[FrontedModule]]
    added: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    keeps_name: ClassVar[bool] = False

    @classmethod
    def bases(cls, plain: type) -> tuple[type, ...]:
        """Bases of the class of a conditioned `plain` layer: this family's forward first, its own by `super()`."""
        return cls, plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the two classes, since the class itself is made on the fly."""
        return _new_layer, (self.plain_class, self.family), self.__dict__


class CLPLayer(FrontedModule):
    """A layer whose output depends on the weighting of each row; every family is a subclass.

    Attributes:
        operator: the operator that it calls.
    """

    operator: ClassVar[str]

    def record(self, device: torch.device) -> Conditioning:
        """The record of the running forward, on `device`: a device_map may put layers on several.

        Raises:
            RuntimeError: called outside the conditioned model's forward, where no weighting is known.
        """
        record = self.clp.active.record
        if record is None:
            raise RuntimeError(
                f"{self.clp.path} was called outside the conditioned model's forward, so its weighting is unknown: "
                "call the model that get_clp_model returned, not one of its parts"
            )
        return record.to(device)

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that conditioning added, by name."""
        own = dict(self.named_parameters(recurse=False))
        return {name: own[name] for name in self.added if name in own}

    def auto_backend(self) -> str:
        """The operators' back-end that "auto" takes for this layer."""
        parameters = self.added_parameters()
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        device = next(iter(parameters.values())).device
        return resolve("auto", OperatorCall(self.operator, device.type, dtypes))

    def is_batch_invariant(self) -> bool:
        """Whether the operators, or torch row by row, make all of its output: then `batch_invariant` holds for it."""
        return True

    def check_batch_invariant(self, backend: str) -> None:
        """Refuse what cannot keep a row's bits whatever else is in the batch.

        Raises:
            NotImplementedError: the layer's own forward has part in its output.
            ValueError: the operator runs on the reference back-end.
        """
        torch_does_not = "torch's GEMM sums a row in an order that depends on the number of rows"
        if not self.is_batch_invariant():
            raise NotImplementedError(
                f"batch_invariant=True: {self.clp.path} ({self.plain_class.__name__}) runs its own forward beside the "
                f"copies, and {torch_does_not}; it holds for copies of nn.Linear, embeddings and norms"
            )
        if backend == "reference":
            raise ValueError(
                f"batch_invariant=True: {self.operator}, which {self.clp.path} calls, runs on the reference back-end "
                f"here, and {torch_does_not}; leave it out, or choose a device and dtype that another back-end takes"
            )

    def copies(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Views of everything that conditioning added, by their names on disk (`weight.helpful`, `lora_A.short`).

        Args:
            parameters: tensors to take instead of the layer's own, by parameter name.
        """
        raise NotImplementedError

    def collapsed(self, c_K: torch.Tensor, lambda_1: torch.Tensor) -> dict[str, torch.Tensor]:
        """The plain layer's parameters under the coefficients c_K and lambda, in their own dtype, added in float32.

        Raises:
            NotImplementedError: no plain layer computes what this one does.
        """
        raise NotImplementedError


class DeltaLayer(CLPLayer):
    """A layer whose copies are full differences of its weight and, where `bias_deltas` is one, of its bias.

    The copies are dim 1 of both: `deltas` [N, K, D] of a matrix or [D, K] of a vector, `bias_deltas` [N, K].
    """

    deltas: nn.Parameter
    bias_deltas: nn.Parameter | None
    added = ("deltas", "bias_deltas")

    def copies(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """`weight.<copy>` and, where the bias has copies, `bias.<copy>`, each in its parameter's shape."""
        own = self.added_parameters() if parameters is None else parameters
        views = {f"weight.{name}": own["deltas"][:, k] for k, name in enumerate(self.clp.copy_names)}
        if "bias_deltas" in own:
            views |= {f"bias.{name}": own["bias_deltas"][:, k] for k, name in enumerate(self.clp.copy_names)}
        return views


def condition(module: nn.Module, family: Any, context: LayerContext) -> FrontedModule:
    """Turn `module` into a layer of `family` in place; the caller adds the copies."""
    plain: Any = type(module)
    layer: Any = module
    layer.__class__ = conditioned_class(plain, family)
    layer.clp = context
    if "_old_forward" in vars(layer):  # accelerate's hooks keep the forward that they wrap
        layer._old_forward = types.MethodType(type(layer).forward, layer)
    return layer


def release(layer: FrontedModule) -> nn.Module:
    """Turn a conditioned layer back into the layer it was; its copies are dropped."""
    module: Any = layer
    for name in (*layer.added, *layer.settings, "clp"):
        module._parameters.pop(name, None)
        vars(module).pop(name, None)
    module.__class__ = layer.plain_class
    if "_old_forward" in vars(module):
        module._old_forward = types.MethodType(type(module).forward, module)
    return module


@functools.cache
def conditioned_class(plain: Any, family: Any) -> type:
    """The class of a `plain` layer conditioned as `family`."""
    namespace = {"plain_class": plain, "family": family, "__module__": __name__}
    name = plain.__name__ if family.keeps_name else f"CLP{plain.__name__}"
    return type(name, family.bases(plain), namespace)


def conditioned_layers(model: nn.Module) -> dict[str, CLPLayer]:
    """The conditioned layers of `model` by module path, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CLPLayer)}


def named_copies(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """What the copies of `model` hold, by name: `<module path>.<parameter>.<copy name>` -> a view into a parameter.

    Writing into a view changes the model, unseen by autograd. What tied layers share appears under the first's path.

    Args:
        model: a conditioned model.
        state_dict: tensors to view instead of the model's own parameters, as `model.state_dict()` names them.

    Raises:
        ValueError: `state_dict` lacks a conditioned layer's parameter.
    """
    copies: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for path, layer in conditioned_layers(model).items():
        own = {id(parameter) for parameter in layer.added_parameters().values()}
        if not own <= seen:
            views = layer.copies(None if state_dict is None else _of_layer(state_dict, path, layer))
            copies.update({f"{path}.{key}": view.detach() for key, view in views.items()})
        seen |= own
    return copies


def _of_layer(state_dict: Mapping[str, torch.Tensor], path: str, layer: CLPLayer) -> dict[str, torch.Tensor]:
    if missing := [f"{path}.{name}" for name in layer.added_parameters() if f"{path}.{name}" not in state_dict]:
        raise ValueError(f"state_dict lacks {min(missing)}: give the model's whole state dict, or none")
    return {name: state_dict[f"{path}.{name}"] for name in layer.added_parameters()}


def _new_layer(plain: Any, family: Any) -> Any:
    return object.__new__(conditioned_class(plain, family))


def zero_copies(shape: tuple[int, ...], beside: torch.Tensor) -> nn.Parameter:
    """New copies of a parameter: zeros where it lies, float32, or float64 beside float64."""
    dtype = torch.promote_types(beside.dtype, torch.float32)
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=beside.device))


def added_up(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`base + delta` in the wider dtype of the two, rounded to base's; `delta` is float32 at least."""
    dtype = torch.promote_types(base.dtype, delta.dtype)
    return (base.to(dtype) + delta.to(dtype)).to(base.dtype)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32 at least: sums of copies are rounded once, at their end."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def copies_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of copies beside a layer: float32, or float64 beside float64."""
    dtypes = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def device_of(module: nn.Module) -> torch.device:
    """Where a layer's tensors lie; the CPU for a quantised format that keeps them to itself."""
    tensors: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
