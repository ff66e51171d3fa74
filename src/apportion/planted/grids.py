"""Grids of pictures: heads that see one cell only, so that nothing outside it may be important."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, fx, nn

from apportion.core.errors import ConfigError, InputError, ModelError
from apportion.core.site import At
from apportion.planted.problem import Planted, seeded


@dataclass(frozen=True, eq=False, kw_only=True)
class CellGrid(Planted):
    """Pictures laid out in a square grid, and a model of the whole; `truth` is the cell that is to be found.

    Attributes:
        truth: [n, H, W], True in the cell that the explained output belongs to.
        side: cells in a row.
        joint: where the feature map of the whole grid is, for methods that read a layer; None where there is none.
    """

    truth: Bool[Tensor, "n H W"]
    side: int
    joint: At | None = None

    @property
    def chance(self) -> float:
        """The share of the picture that a cell is."""
        return 1 / self.side**2


def tile(cells: Shaped[Tensor, "n cells C h w"]) -> Shaped[Tensor, "n C H W"]:
    """Lay cells out row by row in a square.

    Raises:
        InputError: their number is no square.

    >>> tile(torch.arange(4.0).reshape(1, 4, 1, 1, 1))
    tensor([[[[0., 1.],
              [2., 3.]]]])
    """
    n, count, c, h, w = cells.shape
    side = round(count**0.5)
    if side * side != count:
        raise InputError(f"{count} cells", "a square number: 4, 9, ...", "give [n, side², C, h, w]")
    return cells.reshape(n, side, side, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(n, c, side * h, side * w)


def untile(pictures: Shaped[Tensor, "n C H W"], side: int) -> Shaped[Tensor, "n cells C h w"]:
    """Cut pictures into side² cells, row by row: the inverse of `tile`.

    Raises:
        InputError: height or width is no multiple of the side.
    """
    n, c, height, width = pictures.shape
    if height % side or width % side:
        raise InputError(f"maps of {height} × {width} in a grid of {side} × {side}", "multiples of the side")
    cut = pictures.reshape(n, c, side, height // side, side, width // side)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


class Disconnected(nn.Module):
    """One head for each cell of a grid, [R, C, H, W] -> [R, cells · classes]; head k is outputs k · classes and up.

    `joint` is an identity that the features of the whole grid pass through. With `apart` the features of a cell are
    made from that cell (DiFull), else from the whole grid (DiPart); a head sees its own cell of them in both.
    """

    def __init__(self, features: nn.Module, head: nn.Module, side: int, apart: bool) -> None:
        super().__init__()
        self.features, self.head, self.joint = features, head, nn.Identity()
        self.side, self.apart = side, apart

    def forward(self, x: Float[Tensor, "R C H W"]) -> Float[Tensor, "R outputs"]:
        count = self.side**2
        if self.apart:
            maps = self.features(untile(x, self.side).flatten(0, 1))
            maps = tile(maps.reshape(-1, count, *maps.shape[1:]))
        else:
            maps = self.features(x)
        cells = untile(self.joint(maps), self.side).flatten(0, 1)
        return self.head(cells).reshape(len(x), -1)


def split(model: nn.Module, x: Float[Tensor, "n C h w"], layer: str | None = None) -> tuple[nn.Module, nn.Module]:
    """Take a network apart after a layer with feature maps: features, and the head that sees nothing else.

    Args:
        model: what `torch.fx` can trace; it is copied.
        x: a picture or more, to learn shapes from.
        layer: the module to cut after; by default the last operation whose output [n, K, h, w] has several positions
            and is all that the rest reads.

    Raises:
        ModelError: it cannot be traced, no such place exists, or what follows the layer also reads what precedes it.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    >>> features, head = split(net, torch.zeros(1, 1, 6, 6))
    >>> features(torch.zeros(1, 1, 6, 6)).shape, head(torch.zeros(1, 2, 4, 4)).shape
    (torch.Size([1, 2, 4, 4]), torch.Size([1, 3]))
    """
    traced = trace(model, x)
    nodes = list(traced.graph.nodes)
    maps = [at for at, node in enumerate(nodes) if _is_map(node)]
    if layer is not None:
        maps = [at for at in maps if nodes[at].op == "call_module" and nodes[at].target == layer]
        if len(maps) != 1:
            raise ModelError(
                f"layer {layer!r}, which gives maps {len(maps)} times",
                "a module that is called once and gives [n, K, h, w] with several positions",
                f"take one of {[n.target for n in nodes if n.op == 'call_module' and _is_map(n)]}",
            )
    around = {at: _reads_around(nodes, at) for at in maps}
    cuts = [at for at in maps if around[at] is None]
    if not cuts:
        which = f"layer {layer!r}" if layer else "any layer with feature maps"
        reason = f": {around[maps[-1]]} reads what precedes it" if maps else ": none was found"
        raise ModelError(
            f"a network that cannot be cut after {which}{reason}",
            "a place that everything passes through",
            "give another `layer`, or `(features, head)` of your own",
        )
    return _part(traced, nodes[: cuts[-1] + 1]), _part(traced, nodes[cuts[-1] :], whole=False)


def trace(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """Trace a copy of a model symbolically and note each node's output shape.

    Raises:
        ModelError: `torch.fx` cannot follow it, or it takes more than one input.
    """
    try:
        copied = copy.deepcopy(model).eval()
        traced = fx.GraphModule(copied, _Tracer().trace(copied))
    except Exception as error:
        raise ModelError(
            f"a {type(model).__name__} that torch.fx cannot trace: {error}",
            "a forward pass without branches on values",
            "give the parts yourself, or wrap what cannot be traced with torch.fx.wrap",
        ) from error
    inputs = [node.target for node in traced.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ModelError(f"a model of inputs {inputs}", "a single input", "wrap it in a module that takes x alone")
    with torch.no_grad():
        _Shapes(traced).run(x.clone())  # some networks write to their input
    return traced


class _Tracer(fx.Tracer):
    """Leave convolutions and linear layers whole that packages derive from torch's, as those that pad by themselves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        out = super().run_node(n)
        n.meta["shape"] = tuple(out.shape) if isinstance(out, Tensor) else None
        return out


def _is_map(node: fx.Node) -> bool:
    shape = node.meta["shape"]
    made = node.op in ("call_module", "call_function", "call_method")
    return made and shape is not None and len(shape) == 4 and shape[2] * shape[3] > 1


def _reads_around(nodes: list[fx.Node], at: int) -> fx.Node | None:
    """Find a node behind `at` that reads one before it, other than a parameter or the number of rows."""
    before = {n for n in nodes[:at] if n.op != "get_attr" and not _counts_rows(n)}
    return next((n for n in nodes[at + 1 :] if before & set(n.all_input_nodes) and not _counts_rows(n)), None)


def _counts_rows(node: fx.Node) -> bool:
    """Tell whether a node is x.size(0), x.size()[0] or x.shape[0], the same everywhere, or a step on the way to it."""
    args = list(node.args)
    if node.op == "call_method" and node.target == "size" and len(args) > 1:
        return bool(args[1] == 0)
    if node.target is operator.getitem:
        return bool(args[1] == 0) and isinstance(args[0], fx.Node) and _is_shape(args[0])
    return _is_shape(node) and all(_counts_rows(user) for user in node.users)


def _is_shape(node: fx.Node) -> bool:
    args = list(node.args)
    return (node.target == "size" and len(args) == 1) or (node.target is getattr and args[1] == "shape")


def _part(traced: fx.GraphModule, nodes: list[fx.Node], whole: bool = True) -> nn.Module:
    """Make a module of consecutive nodes; the first is its input, and the last its output unless it says so."""
    graph, made = fx.Graph(), {}
    made[nodes[0]] = graph.placeholder("x")
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            made[node] = graph.node_copy(node)
        elif not whole and _counts_rows(node):  # a shape itself is then read by nobody
            made[node] = graph.call_method("size", (made[nodes[0]], 0))
    for node in nodes[1:]:
        if node not in made:
            made[node] = graph.node_copy(node, made.__getitem__)
    if whole:
        graph.output(made[nodes[-1]])
    part = fx.GraphModule(traced, graph)
    part.graph.eliminate_dead_code()  # parameters that the other part reads
    part.recompile()
    return part


def noise_cells(
    shape: tuple[int, int, int], examples: int = 2, side: int = 2, seed: int = 0
) -> Float[Tensor, "n cells C h w"]:
    """Draw cells of standard normal noise in float32, for a network that was never trained.

    Args:
        shape: (C, h, w) of a cell.
        examples: n.
        side: of the grid, which has side² cells.
        seed: of the noise.
    """
    return torch.randn(examples, side * side, *shape, generator=seeded(seed))


def di_full(
    model: nn.Module | tuple[nn.Module, nn.Module],
    cells: Float[Tensor, "n cells C h w"],
    cell: int = 0,
    classes: int | Int[Tensor, " n"] = 0,
    layer: str | None = None,
) -> CellGrid:
    """Give each cell of a grid its own copy of a network, wholly apart from the others (DiFull; Rao et al. 2022).

    Truth: the cell whose output is explained. All else has no influence, whatever the weights, so the share of
    positive attribution inside is 1 for the gradient, gradient × input, integrated gradients, guided backpropagation
    and occlusion. Grad-CAM at `joint` weighs the channels of all cells alike and gets about 1 / cells.

    Args:
        model: any convolutional network, trained or not, or a pair (features, head) of yours; see `split`.
        cells: side² pictures for each example.
        cell: which of them is explained; the authors take the first and the last.
        classes: which output of its head, one or one per example.
        layer: where to take the network apart.

    Raises:
        InputError: no square number of cells, a cell or a class that is not there.
        ModelError: the network cannot be taken apart.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> p = di_full(net, noise_cells((1, 6, 6)), cell=3)
    >>> p.x.shape, p.target, p.truth[0].nonzero()[0].tolist()
    (torch.Size([2, 1, 12, 12]), tensor([9, 9]), [6, 6])
    >>> import apportion as ap
    >>> a = ap.Gradient()(ap.Field(p.model), p.x, target=p.target)
    >>> bool((a.values[~p.truth[:, None]] == 0).all())
    True
    """
    return _disconnected(model, cells, cell, classes, layer, apart=True)


def di_part(
    model: nn.Module | tuple[nn.Module, nn.Module],
    cells: Float[Tensor, "n cells C h w"],
    cell: int = 0,
    classes: int | Int[Tensor, " n"] = 0,
    layer: str | None = None,
) -> CellGrid:
    """Run the features on the whole grid and give each head its own cell of them (DiPart; Rao et al. 2022).

    Truth: the cell whose output is explained, up to a margin: features near its borders see some of the neighbors, as
    far as receptive fields reach. At `joint` it is exact.

    Args:
        model: a network whose features can be computed on larger pictures, or a pair (features, head) of yours.
        cells: side² pictures for each example.
        cell: which of them is explained.
        classes: which output of its head.
        layer: where the network is cut, as for `split`.

    Raises:
        InputError: a cell's feature map in the grid is of another size than alone.
        ModelError: no cut was found.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> p = di_part(net, noise_cells((1, 6, 6)))
    >>> p.model(p.x).shape
    torch.Size([2, 16])
    """
    return _disconnected(model, cells, cell, classes, layer, apart=False)


def _disconnected(
    model: nn.Module | tuple[nn.Module, nn.Module],
    cells: Float[Tensor, "n cells C h w"],
    cell: int,
    classes: int | Int[Tensor, " n"],
    layer: str | None,
    apart: bool,
) -> CellGrid:
    x = tile(cells)
    count = cells.shape[1]
    side = round(count**0.5)
    if not -count <= cell < count:
        raise InputError(f"cell {cell} of {count}", f"0 to {count - 1}, or negative from the end")
    if isinstance(model, tuple):
        if layer is not None:
            raise ConfigError(f"layer={layer!r} beside (features, head)", "one of the two", "leave `layer` out")
        features, head = copy.deepcopy(model)
    else:
        features, head = split(model, cells[:1, 0], layer)
    whole = Disconnected(features, head, side, apart).eval()
    with torch.no_grad():
        alone, outputs = features(cells[:1, 0]).shape, whole(x[:1]).shape[1]
        maps = None if apart else features(x[:1]).shape
    if maps is not None and tuple(maps[2:]) != (side * alone[2], side * alone[3]):
        raise InputError(
            f"features of {tuple(maps[2:])} for the grid, {tuple(alone[2:])} for a cell",
            f"{side} times as many along each axis",
            "take cells whose sides are multiples of the network's stride, and padded convolutions",
        )
    per_head = outputs // count
    chosen = torch.as_tensor(classes).expand(len(x))
    if bool(((chosen < 0) | (chosen >= per_head)).any()):
        raise InputError(f"class {classes}", f"0 to {per_head - 1}")
    truth = torch.zeros((*cells.shape[:2], 1, *cells.shape[3:]), dtype=torch.bool)
    truth[:, cell] = True
    return CellGrid(
        model=whole,
        x=x,
        truth=tile(truth)[:, 0],
        baseline=torch.zeros_like(x[:1]),
        target=chosen + (cell % count) * per_head,
        side=side,
        joint=At("joint"),
    )
