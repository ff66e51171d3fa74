"""Other networks that are the user's as a function: reordered, rescaled, with batch-norms folded, with input shifted.

Which layers' channels belong together is read off a trace of the forward pass: a residual sum ties its branches, a
gate its two factors, a depthwise convolution its input to its output.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from apportion.core.errors import InputError, ModelError
from apportion.core.score import main_output
from apportion.core.twin import copied
from apportion.planted.grids import trace
from apportion.planted.problem import Pair, seeded

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = tuple(
    getattr(nn, f"{kind}{d}d")
    for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
    for d in (1, 2, 3)
)
# f(s x) = s f(x) for s > 0, channel by channel
_HOMOGENEOUS: set[Any] = {
    *_POOLS, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.Upsample, F.relu, F.relu_, torch.relu, torch.relu_, F.leaky_relu, F.dropout, F.dropout2d, F.interpolate,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    "relu", "relu_", "contiguous", "clone",
}  # fmt: skip
_ELEMENTWISE: set[Any] = {
    nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Softsign, F.relu6, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus,
    F.hardtanh, F.hardswish, F.hardsigmoid, F.softsign, F.sigmoid, F.tanh, torch.sigmoid, torch.tanh, torch.exp,
    torch.abs, torch.clamp, "sigmoid", "tanh", "exp", "abs", "clamp",
}  # fmt: skip
_SUMS: set[Any] = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub", "sub_"}
_PRODUCTS: set[Any] = {
    operator.mul,
    operator.imul,
    operator.truediv,
    torch.mul,
    torch.div,
    "mul",
    "mul_",
    "div",
    "div_",
}
_MEANS: set[Any] = {torch.mean, "mean", torch.sum, "sum"}
_SHAPES: set[Any] = {getattr, "size", "dim", operator.getitem, operator.floordiv}
_FLAT: set[Any] = {nn.Flatten, torch.flatten, torch.reshape, "flatten", "view", "reshape"}
# numbers stay as they are, wherever they go
_MOVES: set[Any] = {
    *_FLAT, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.PixelUnshuffle,
    torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, getattr, operator.getitem,
    "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone", "size", "dim",
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Variant(Pair):
    """The user's model and another that is the same function: other(x + shift) = model(x).

    Attributes:
        shift: what the input is shifted by; 0 except from `shifted`.
        changed: the layers that differ.
        left: the layers that could have been changed and were not, each with the reason.
        difference: how far outputs were apart on `x`, by the largest output of the example.
    """

    shift: Tensor | float = 0.0
    changed: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    difference: float = 0.0


class _Units(NamedTuple):
    """Where a tensor has the units of a group: along `axis`, each `repeat` times in a row."""

    group: int
    axis: int
    repeat: int


class _Groups:
    """Which channels are the same units, and what keeps them as they are."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.parent: list[int] = []
        self.size: list[int] = []
        self.order: dict[int, str] = {}
        self.scale: dict[int, str] = {}
        self.made: dict[str, int] = {}
        self.read: dict[str, _Units] = {}
        self.along: dict[str, int] = {}
        self.skipped: dict[str, str] = {}
        self.at: dict[fx.Node, _Units | None] = {}
        for node in traced.graph.nodes:
            self.at[node] = self._walk(node)
        self._tied()

    def root(self, group: int) -> int:
        while self.parent[group] != group:
            group = self.parent[group]
        return group

    def new(self, size: int) -> int:
        self.parent.append(len(self.parent))
        self.size.append(size)
        return len(self.parent) - 1

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        self.parent[b] = a
        for fixed in (self.order, self.scale):
            if b in fixed:
                fixed.setdefault(a, fixed[b])

    def fix(self, units: _Units | None, why: str, order: bool = True) -> None:
        if units is None:
            return
        at = self.root(units.group)
        self.scale.setdefault(at, why)
        if order:
            self.order.setdefault(at, why)

    def _walk(self, node: fx.Node) -> _Units | None:
        inputs = [self.at[n] for n in node.all_input_nodes]
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "output":
            for units in inputs:
                self.fix(units, "its units are the model's outputs")
            return None
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return self._module(node, str(node.target), module, inputs[0] if inputs else None)
        return self._operation(node, node.target, inputs)

    def _module(self, node: fx.Node, name: str, module: nn.Module, given: _Units | None) -> _Units | None:
        kind = type(module)
        if is_parametrized(module) or module._forward_pre_hooks or module._forward_hooks:
            self.fix(given, f"'{name}' has a parametrization or hooks")
            self.skipped[name] = "it has a parametrization or hooks"
            return None
        if isinstance(module, (*_CONVS, nn.Linear)):
            return self._linear(node, name, module, given)
        if isinstance(module, _NORMS):
            if given is None:
                return None
            if given.repeat != 1 or given.axis != 1 or module.running_mean is None:
                self.fix(given, f"'{name}' normalizes with statistics of the batch, or along another axis")
                return given
            return self._through(name, given)
        if isinstance(module, nn.PReLU) and given is not None:
            if module.num_parameters > 1:
                if given.repeat != 1 or given.axis != 1:
                    self.fix(given, f"'{name}' has a slope for each entry of axis 1")
                    return given
                return self._through(name, given)
            return given
        if kind is nn.Flatten:
            return self._flat(node, given)
        return self._operation(node, kind, [given])

    def _through(self, name: str, given: _Units) -> _Units:
        if name in self.along:
            self.join(self.along[name], given.group)
        self.along[name] = given.group
        return given

    def _linear(self, node: fx.Node, name: str, module: Any, given: _Units | None) -> _Units | None:
        convolution = isinstance(module, _CONVS)
        axis = 1 if convolution else len(node.meta["shape"]) - 1
        inside, outside = (
            (module.in_channels, module.out_channels) if convolution else (module.in_features, module.out_features)
        )
        groups = module.groups if convolution else 1
        depthwise = groups > 1 and groups == inside == outside
        if given is not None and (given.axis != axis or self.size[given.group] * given.repeat != inside):
            self.fix(given, f"'{name}' reads them along another axis")
            given = None
        if depthwise and given is not None and given.repeat == 1:
            return self._through(name, given)
        if name not in self.made:
            self.made[name] = self.new(outside)
        if groups > 1:
            why = f"'{name}' has {groups} groups of channels"
            self.fix(given, why)
            self.fix(_Units(self.made[name], axis, 1), why)
        elif given is not None:
            before = self.read.get(name)
            if before is not None and before.repeat != given.repeat:
                self.fix(given, f"'{name}' reads two inputs of different make")
                self.fix(before, f"'{name}' reads two inputs of different make")
            elif before is not None:
                self.join(before.group, given.group)
            self.read[name] = given
        return _Units(self.made[name], axis, 1)

    def _operation(self, node: fx.Node, kind: Any, inputs: list[_Units | None]) -> _Units | None:
        tracked = [u for u in inputs if u is not None]
        if not tracked or kind in _SHAPES:
            return None
        first = tracked[0]
        if kind in _FLAT:
            return self._flat(node, first)
        if kind in _HOMOGENEOUS or (kind in _MEANS and self._over_places(node, first)):
            return first if self._keeps_axis(node, first) else self._unknown(node, tracked)
        if kind in _ELEMENTWISE:
            self.fix(first, f"{_name(node)} is not positively homogeneous", order=False)
            return first
        if kind in _SUMS or kind in _PRODUCTS:
            return self._binary(node, kind, tracked)
        return self._unknown(node, tracked)

    def _unknown(self, node: fx.Node, tracked: list[_Units]) -> None:
        for units in tracked:
            self.fix(units, f"{_name(node)} may mix or move them")

    def _keeps_axis(self, node: fx.Node, units: _Units) -> bool:
        shape = node.meta["shape"]
        return shape is not None and len(shape) > units.axis and shape[units.axis] == self._length(units)

    def _length(self, units: _Units) -> int:
        return self.size[units.group] * units.repeat

    def _over_places(self, node: fx.Node, units: _Units) -> bool:
        """Tell whether a mean or sum is over axes behind the units' own."""
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        rank = len(node.all_input_nodes[0].meta["shape"])
        given = axes if isinstance(axes, list | tuple) else [axes]
        return all(isinstance(a, int) and a % rank > units.axis for a in given)

    def _flat(self, node: fx.Node, units: _Units | None) -> _Units | None:
        if units is None:
            return None
        before, after = node.all_input_nodes[0].meta["shape"], node.meta["shape"]
        if before == after:
            return units
        whole = len(after) == 2 and after[0] == before[0] and units.axis == 1
        if not whole:
            return self._unknown(node, [units])
        places = after[1] // before[1]
        return _Units(units.group, 1, units.repeat * places)

    def _binary(self, node: fx.Node, kind: Any, tracked: list[_Units]) -> _Units | None:
        first = tracked[0]
        if len(tracked) == 2:
            ranks = {len(n.meta["shape"]) for n in node.all_input_nodes}
            alike = tracked[0][1:] == tracked[1][1:] and self._length(tracked[0]) == self._length(tracked[1])
            if len(ranks) > 1 or not alike:
                return self._unknown(node, tracked)
            self.join(tracked[0].group, tracked[1].group)
            if kind in _PRODUCTS:
                self.fix(first, f"{_name(node)} multiplies them by others", order=False)
        elif len(node.all_input_nodes) > 1:
            return self._unknown(node, tracked)
        else:
            numbers = sum(not isinstance(a, fx.Node) for a in node.args)
            if not (kind in _PRODUCTS and numbers == 1 and isinstance(node.args[0], fx.Node)):
                self.fix(first, f"{_name(node)} is not positively homogeneous in them", order=False)
        return first if self._keeps_axis(node, first) else self._unknown(node, tracked)

    def _tied(self) -> None:
        """Keep what shares a parameter with another layer."""
        owners: dict[int, str] = {}
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                other = owners.setdefault(id(parameter), name)
                if other != name:
                    for layer in (name, other):
                        why = f"'{other}' and '{name}' share a weight"
                        for group in (self.made.get(layer), self.along.get(layer)):
                            self.fix(None if group is None else _Units(group, 1, 1), why)
                        self.fix(self.read.get(layer), why)

    def free(self, fixed: dict[int, str]) -> tuple[dict[int, list[str]], dict[str, str]]:
        """Give the groups that nothing keeps, with the layers that make them, and the other layers with the reason."""
        found: dict[int, list[str]] = {}
        left = dict(self.skipped)
        readers = {self.root(u.group) for u in self.read.values()}
        for name, group in self.made.items():
            at = self.root(group)
            if at in fixed:
                left[name] = fixed[at]
            elif at not in readers or self.size[group] < 2:
                left[name] = "no linear layer reads its units" if at not in readers else "it has one unit"
            else:
                found.setdefault(at, []).append(name)
        return found, left


def _name(node: fx.Node) -> str:
    if node.op == "call_module" and node.graph.owning_module is not None:
        kind = type(node.graph.owning_module.get_submodule(str(node.target))).__name__
        return f"'{node.target}' ({kind})"
    target = node.target
    return f"'{target}'" if isinstance(target, str) else f"'{getattr(target, '__name__', target)}'"


def _refuse(what: str, left: Mapping[str, str]) -> ModelError:
    reasons = "; ".join(f"'{name}': {why}" for name, why in left.items()) or "it has no linear layer or convolution"
    return ModelError(
        f"a network in which no {what} ({reasons})",
        "a convolution or linear layer whose units only linear layers read, through operations on single channels",
        "test this invariance on `planted.same_function` or another planted pair",
    )


def permuted(model: nn.Module, x: Tensor, seed: int = 0, tolerance: float = 1e-5) -> Variant:
    """Put hidden channels in a random order, with the inputs of the layers that read them.

    Args:
        model: the user's; it is copied.
        x: inputs on which outputs are compared.
        seed: of the orders.
        tolerance: for outputs, by the largest of the example.

    Raises:
        ModelError: no channels may be permuted (it says why, layer by layer), the forward pass cannot be traced, or
            outputs differ by more than the tolerance.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> v = permuted(net, torch.rand(2, 1, 4, 4))
    >>> v.changed, v.left, torch.allclose(v.other(v.x), net(v.x), atol=1e-6)
    (('0',), {'3': "its units are the model's outputs"}, True)
    """
    groups = _Groups(trace(model, x))
    free, left = groups.free(groups.order)
    if not free:
        raise _refuse("channels may be permuted", left)
    generator = seeded(seed)
    orders = {}
    for at in free:
        order = torch.randperm(groups.size[at], generator=generator)
        same = torch.equal(order, torch.arange(len(order)))
        orders[at] = order.roll(1) if same else order

    def reorder(module: nn.Module, order: Tensor, repeat: int, axis: int) -> None:
        if axis == 1:
            places = (order[:, None] * repeat + torch.arange(repeat)).flatten()
            _put(module, "weight", lambda w: w[:, places.to(w.device)])
            return
        for name in ("weight", "bias", "running_mean", "running_var"):
            _put(module, name, lambda w: w[order.to(w.device)])

    return _made(model, x, groups, orders, reorder, free, left, tolerance)


def rescaled(model: nn.Module, x: Tensor, seed: int = 0, tolerance: float = 1e-5) -> Variant:
    """Multiply hidden units by positive factors and undo it in the layers that read them, ReLUs and pools in between.

    The factors are 1/4, 1/2, 2 and 4, which change no rounding.

    Args:
        model: yours, of which a copy is changed.
        x: where outputs are compared.
        seed: of the factors.
        tolerance: as for `permuted`.

    Raises:
        ModelError: no unit may be rescaled: between any two layers stands an operation with f(2x) ≠ 2 f(x), say.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    >>> v = rescaled(net, torch.rand(2, 3))
    >>> v.changed, sorted(v.left)
    (('0',), ['2', '4'])
    """
    groups = _Groups(trace(model, x))
    free, left = groups.free(groups.scale)
    if not free:
        raise _refuse("units may be rescaled", left)
    generator = seeded(seed)
    choices = torch.tensor([0.25, 0.5, 2.0, 4.0])
    factors = {at: choices[torch.randint(4, (groups.size[at],), generator=generator)] for at in free}

    def scale(module: nn.Module, factor: Tensor, repeat: int, axis: int) -> None:
        def times(w: Tensor, dim: int, by: Tensor) -> Tensor:
            return w * by.to(w).reshape(*[-1 if d == dim else 1 for d in range(w.ndim)])

        if axis == 1:
            _put(module, "weight", lambda w: times(w, 1, 1 / factor.repeat_interleave(repeat)))
            return
        if axis == 0:
            _put(module, "weight", lambda w: times(w, 0, factor))
        # a norm, a depthwise convolution: their weights act on each unit alone
        for name in ("bias", "running_mean"):
            _put(module, name, lambda w: times(w, 0, factor))

    return _made(model, x, groups, factors, scale, free, left, tolerance)


def folded(model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> Variant:
    """Fold batch-norms into the convolution or linear layer before them; an identity takes their place.

    Args:
        model: one with batch-norms; its copy is taken in eval mode.
        x: inputs to compare outputs on.
        tolerance: as for `permuted`.

    Raises:
        ModelError: no batch-norm directly follows a layer that nothing else reads.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
    >>> folded(net, torch.rand(2, 1, 4, 4)).other[1]
    Identity()
    """
    traced = trace(model, x)
    modules = dict(traced.named_modules())
    calls: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    other = copied(model).eval()
    changed, left = [], {}
    for node in traced.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], _NORMS):
            continue
        name, before = node.target, node.args[0]
        layer = modules.get(str(before.target)) if before.op == "call_module" else None
        if not isinstance(layer, (*_CONVS, nn.Linear)):
            left[name] = f"it follows {_name(before)}, which is no convolution or linear layer"
        elif len(before.users) > 1 or calls[name] > 1 or calls[before.target] > 1:
            left[name] = f"'{before.target}' or the norm itself is used more than once"
        elif modules[name].running_mean is None:
            left[name] = "it has no running statistics"
        else:
            norm = other.get_submodule(name)
            linear = other.get_submodule(before.target)
            fuse = fuse_linear_bn_eval if isinstance(linear, nn.Linear) else fuse_conv_bn_eval
            _replace(other, before.target, fuse(linear, norm))  # pyright: ignore[reportArgumentType]
            _replace(other, name, nn.Identity())
            changed.append(name)
    if not changed:
        reasons = "; ".join(f"'{name}': {why}" for name, why in left.items()) or "it has none"
        raise ModelError(f"a network of which no batch-norm can be folded ({reasons})", "convolution, then batch-norm")
    return _checked(model, other, x, 0.0, changed, left, tolerance)


def shifted(model: nn.Module, x: Tensor, shift: Tensor | float, tolerance: float = 1e-5) -> Variant:
    """Make the network that takes x + shift for x: its first layer's bias takes the shift off again.

    Where the first layer pads with zeros, or the shift is a picture, what it adds differs from place to place; a map is
    then subtracted behind that layer, and inputs must be of the size of `x`.

    Args:
        model: its first layers must be linear in x: convolutions, linear layers or batch-norms. Before them numbers
            may be moved, as by `nn.Flatten`.
        x: inputs for which outputs are compared, without the shift.
        shift: a number, or a tensor that broadcasts to one example.
        tolerance: as for `permuted`.

    Raises:
        ModelError: something that is not linear comes first; it is named.
        InputError: a shift that does not broadcast.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    >>> v = shifted(net, torch.rand(2, 1, 4, 4), 0.5)
    >>> torch.allclose(v.other(v.x + 0.5), net(v.x), atol=1e-5)
    True
    """
    amount = torch.as_tensor(shift, dtype=x.dtype, device=x.device)
    try:
        amount = amount.broadcast_to(x[:1].shape).expand(x.shape).double()
    except RuntimeError as error:
        raise InputError(
            f"a shift of shape {tuple(amount.shape)}", f"one that broadcasts to {tuple(x[0].shape)}"
        ) from error
    traced = trace(model, x)
    given = _Shift(traced).follow(traced.graph, amount)
    twice = [n for n in given if sum(m.target == n for m in traced.graph.nodes) > 1]
    if twice:
        raise ModelError(f"{twice[0]!r}, which reads the input and is called again", "a first layer of its own")
    other = copied(model).eval()
    for name, here in given.items():
        here = here[:1] if len(here) == len(x) else here
        layer = other.get_submodule(name)
        exact = copy.deepcopy(layer).double()
        with torch.no_grad():
            added = exact(here) - exact(torch.zeros_like(here))
        _replace(other, name, _less(layer, added))
    return _checked(model, other, x, shift, list(given), {}, tolerance)


class _Shift(fx.Interpreter):
    """Follow a shift of the input to the first layers that compute, through what but moves numbers."""

    def follow(self, graph: fx.Graph, shift: Tensor) -> dict[str, Tensor]:
        """Give what is added to the input of each of these layers, by name."""
        given, moved = {}, set()
        for node in graph.nodes:
            if node.op == "placeholder":
                self.env[node] = shift
                moved.add(node)
                continue
            if not moved.intersection(node.all_input_nodes):
                shape = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
                if node.op == "get_attr" or (shape and all(n in self.env for n in node.all_input_nodes)):
                    self.env[node] = self.run_node(node)
                continue
            layer = self.submodules.get(str(node.target)) if node.op == "call_module" else None
            affine = isinstance(layer, (*_CONVS, nn.Linear))
            if affine or (isinstance(layer, _NORMS) and layer.running_mean is not None):
                given[str(node.target)] = self.env[node.args[0]]
            elif (node.target if layer is None else type(layer)) in _MOVES:
                self.env[node] = self.run_node(node)
                if isinstance(self.env[node], Tensor):
                    moved.add(node)
            else:
                raise ModelError(
                    f"a network in which {_name(node)} reads the input",
                    "a convolution, linear layer or batch-norm first, whose bias can take a shift off",
                    "split off what comes before it, and give its results as data",
                )
        return given


class _Minus(nn.Module):
    """Subtract a map."""

    amount: Tensor

    def __init__(self, amount: Tensor) -> None:
        super().__init__()
        self.register_buffer("amount", amount)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.amount


def _less(layer: Any, added: Tensor) -> nn.Module:
    """Give the layer less what it adds, in its bias where that is the same everywhere."""
    axis = added.ndim - 1 if isinstance(layer, nn.Linear) else 1
    each = added.movedim(axis, -1).flatten(0, -2)
    norm = isinstance(layer, _NORMS)
    like = layer.running_mean if norm else layer.weight
    if bool(((each - each[:1]).abs() <= 1e-12 * each.abs().amax()).all()) and (not norm or layer.bias is not None):
        bias = -each[0] if layer.bias is None else layer.bias.detach().double() - each[0]
        layer.bias = nn.Parameter(bias.to(like), requires_grad=False)
        return layer
    return nn.Sequential(layer, _Minus(added.to(like)))


def _put(module: nn.Module, name: str, make: Callable[[Tensor], Tensor]) -> None:
    value = getattr(module, name, None)
    if isinstance(value, Tensor) and value.ndim > 0:
        with torch.no_grad():
            value.copy_(make(value).clone())


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, by)


def _made(
    model: nn.Module,
    x: Tensor,
    groups: _Groups,
    of: Mapping[int, Tensor],
    edit: Callable[[nn.Module, Tensor, int, int], None],
    free: Mapping[int, list[str]],
    left: Mapping[str, str],
    tolerance: float,
) -> Variant:
    """Edit a copy: axis 0 of what makes units, axis 1 of what reads them, -1 for what acts on each unit alone."""
    other = copied(model).eval()
    for names, axis in ((groups.made, 0), (groups.along, -1)):
        for name, group in names.items():
            if groups.root(group) in of:
                edit(other.get_submodule(name), of[groups.root(group)], 1, axis)
    for name, units in groups.read.items():
        if groups.root(units.group) in of:
            edit(other.get_submodule(name), of[groups.root(units.group)], units.repeat, 1)
    return _checked(model, other, x, 0.0, [n for names in free.values() for n in names], left, tolerance)


def _checked(
    model: nn.Module,
    other: nn.Module,
    x: Tensor,
    shift: Tensor | float,
    changed: list[str],
    left: Mapping[str, str],
    tolerance: float,
) -> Variant:
    """Compare outputs, and say which layers were changed where they differ."""
    with torch.no_grad():
        wanted = main_output(copied(model).eval()(x.clone()))
        found = main_output(other(x + shift))
    size = wanted.flatten(1).abs().amax(1).clamp(min=torch.finfo(wanted.dtype).tiny)
    difference = float(((found - wanted).flatten(1).abs().amax(1) / size).max())
    if not difference <= tolerance:
        raise ModelError(
            f"outputs that differ by {difference:.2g} of the largest after {', '.join(changed)} were changed",
            f"at most {tolerance:.2g}",
            "compare in float64, or raise `tolerance` if the network is deep and the difference is rounding",
        )
    zero = torch.zeros_like(x[:1])
    return Variant(
        model=model,
        other=other,
        x=x,
        other_x=x + shift,
        baseline=zero,
        other_baseline=zero + shift,
        shift=shift,
        changed=tuple(changed),
        left=dict(left),
        difference=difference,
    )
