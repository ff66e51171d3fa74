"""What makes one pass fast: folding, channels last, memory that stays, fewer digits; and what a field adds.

`OMP_NUM_THREADS=1 python -m benchmarks.passes` prints processor milliseconds per row, medians of interleaved
rounds, and page faults per pass.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import apportion as ap
from apportion.core import fast, frozen
from apportion.core.fast import Learning
from apportion.core.frozen import Frozen
from benchmarks import models, peers


def bare(model: nn.Module, x: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Callable[[], Tensor]:
    """Give the loop one would write: rows, a forward pass, one gradient."""
    model.requires_grad_(False)

    def run() -> Tensor:
        leaf = x.clone(memory_format=layout).requires_grad_()
        return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]

    return run


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """Fold batch-norms for good and lay weights out channels last: the best bare loop we know."""
    model.requires_grad_(False)
    learning = Learning([*model.parameters(), *model.buffers()])
    with Frozen(), learning:
        learned = learning.plan([model(x[:1].clone().requires_grad_())])
    convs = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Conv2d)}
    norms = {id(m.running_mean): name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    made = [(weight, fold.norm[0], fold.make()) for (weight, _), fold in learned.folds.items()]
    for weight, mean, (w, b) in made:
        conv = convs[weight]
        conv.weight, conv.bias = nn.Parameter(w, requires_grad=False), nn.Parameter(b, requires_grad=False)
        parent, _, name = norms[id(mean)].rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def timed(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Take processor seconds and page faults of each variant, in turns."""
    spent: dict[str, list[tuple[float, int]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            before = resource.getrusage(resource.RUSAGE_SELF)
            run()
            after = resource.getrusage(resource.RUSAGE_SELF)
            seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            if turn:
                spent[name].append((seconds, after.ru_minflt - before.ru_minflt))
    return {k: (statistics.median(s for s, _ in v), statistics.median(f for _, f in v)) for k, v in spent.items()}


def networks(rounds: int) -> None:
    """Compare passes of 16 pictures."""
    x, owner = torch.rand(16, 3, 224, 224), torch.arange(16)
    for make in (models.lite0, models.resnet18):
        model = make()
        fields = {
            "field": ap.Field(model, batch_size=16),
            "field, fast=False": ap.Field(model, batch_size=16, fast=False),
            "field, bf16": ap.Field(model, batch_size=16, precision="bf16"),
        }
        bound = {name: f.bind(x, target=0, ids=range(16)) for name, f in fields.items()}
        variants: dict[str, Callable[[], Any]] = {
            "bare, as it is": bare(make(), x),
            "bare, folded and channels last": bare(folded(make(), x), x, torch.channels_last),
            **{name: lambda q=q: q.value_and_grad(q.x, owner) for name, q in bound.items()},
            "ap.Gradient()(field, x)": lambda f=fields["field"]: ap.Gradient()(f, x, target=0, ids=range(16)),
        }
        print(make.__name__, fields["field"].engine, fields["field, bf16"].engine["deviation"])
        for kept in (False, True):
            memory = "kept" if kept else "usual"
            with ap.keep_memory() if kept else contextlib.nullcontext():
                for name, (seconds, faults) in timed(variants, rounds).items():
                    print(f"  {memory:6} {name:32} {1000 * seconds / 16:6.1f} ms {faults:8.0f} faults")


def exactness(rounds: int) -> None:
    """Say how far maps and single gradients are from float64, eager and through a field, over several pictures.

    Errors of single gradients are of two kinds: rounding, and units that rounding moved over their kink. The median
    shows the first, the root mean square the second.
    """
    del rounds
    nodes, weights = ap.quadrature.Gauss(16).rule()
    at, weights = nodes.view(-1, 1, 1, 1), weights.view(-1, 1, 1, 1)
    x = torch.cat([torch.rand(16, 3, 96, 96, generator=torch.Generator().manual_seed(s)) for s in (1, 3)])
    owner = torch.zeros(len(nodes), dtype=torch.long)
    for make in (models.lite0, models.resnet18):
        net, exact = make(), make().double()
        q = ap.Field(net, batch_size=len(nodes)).bind(x[:1], target=0)
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "float64": lambda z, exact=exact: bare(exact, z)(),
            "eager": lambda z, net=net: bare(net, z.float())(),
            "field": lambda z, q=q: q.value_and_grad(z.float(), owner)[1],
        }
        found = {n: torch.stack([way(at * picture) for picture in x]).double() for n, way in ways.items()}
        maps = {n: (weights * g).sum(1) * x for n, g in found.items()}
        for name in ("eager", "field"):
            print(make.__name__, name, "map", _distances(maps, name, 1), "gradient", _distances(found, name, 2))


def _distances(found: dict[str, Tensor], name: str, axes: int) -> str:
    """Give the distances from float64, over all but the first axes, as root mean square, median and largest."""
    off, size = (t.flatten(axes).norm(dim=axes) for t in (found[name] - found["float64"], found["float64"]))
    far = (off / size).flatten()
    return f"rms {float(far.square().mean().sqrt()):.1e} median {float(far.median()):.1e} most {float(far.amax()):.1e}"


def rows(rounds: int) -> None:
    """Compare numbers of rows in a pass."""
    x, owner = torch.rand(64, 3, 224, 224), torch.arange(64)
    for make in (models.lite0, models.resnet18):
        bound = {n: ap.Field(make(), batch_size=n).bind(x, target=0, ids=range(64)) for n in (8, 16, 32, 64)}
        asked = {str(n): lambda q=q: q.value_and_grad(q.x, owner) for n, q in bound.items()}
        chosen = ap.Field(make())
        chosen.bind(x[:1])
        each = {n: round(1000 * s / 64, 1) for n, (s, _) in timed(asked, rounds).items()}
        print(f"{make.__name__}: ms per row by rows in a pass {each}; chosen: {chosen.chunk}")


def fixed(rounds: int) -> None:
    """Compare a network so small that all else shows."""
    x, owner, ids = torch.randn(10_000, 20), torch.arange(10_000), range(10_000)
    field = ap.Field(models.tiny_mlp(), batch_size=10_000)
    q = field.bind(x, target=0, ids=ids)
    variants = {
        "bare": bare(models.tiny_mlp(), x),
        "bound question": lambda: q.value_and_grad(q.x, owner),
        "ap.Gradient()(field, x)": lambda: ap.Gradient()(field, x, target=0, ids=ids),
    }
    with ap.keep_memory():
        found = timed(variants, 10 * rounds)
    print("MLP 20-32-3, 10,000 rows:", {k: f"{1000 * s:.2f} ms" for k, (s, _) in found.items()})


class _Operations(TorchDispatchMode):
    """Takes the processor time of every operation, and the settings of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.convolutions: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = time.thread_time()
        out = func(*args, **(kwargs or {}))
        self.seconds[func.overloadpacket.__name__] += time.thread_time() - before
        if func is torch.ops.aten.convolution.default:
            self.convolutions.append((args[0].shape, *args[1:6]))
        return out


def floor(rounds: int) -> None:
    """Say what the convolutions of ResNet-18 take alone: forward, and back to their inputs, in the faster layout.

    Layers that sum 500 products and more run channels first, as in a field; those before run either way, and the
    gradient of the first by phase. What else a pass does comes on top: it is told by operation.
    """
    x = torch.rand(16, 3, 224, 224)
    net = bare(models.resnet18(), x)
    q = ap.Field(models.resnet18(), batch_size=16).bind(x, target=0, ids=range(16))
    passes: dict[str, Callable[[], Any]] = {"eager": net, "field": lambda: q.value_and_grad(q.x, torch.arange(16))}
    with ap.keep_memory():
        for run in passes.values():
            run()
        with _Operations() as seen:
            net()
        alone = {}
        for i, (shape, weight, _, stride, padding, dilation) in enumerate(seen.convolutions):
            either = [torch.contiguous_format, torch.channels_last]
            for layout in either[:1] if fast.is_long(weight) else either:
                rows = torch.rand(shape).contiguous(memory_format=layout)
                setting = ([*stride], [*padding], [*dilation], 1)
                leaf = rows.requires_grad_()
                with torch.enable_grad():
                    alone[i, layout] = partial(_one_convolution, leaf, weight, setting)
        spent: dict[str, list[dict[str, float]]] = {name: [] for name in passes}
        least: dict[Any, float] = {}
        for _ in range(rounds):
            for name, run in passes.items():
                with _Operations() as seen:
                    run()
                spent[name].append(seen.seconds)
            for key, run in alone.items():
                least[key] = min(run(), least.get(key, math.inf))
    each = {i: min(s for (j, _), s in least.items() if j == i) for i, _ in least}
    limit = sum(each.values())
    print(f"ResNet-18, ms per row: {len(each)} convolutions alone {1000 * limit / 16:.1f}")
    for name, found in spent.items():
        best = min(found, key=lambda each: sum(each.values()))
        total = sum(best.values())
        told = {n: round(1000 * s / 16, 1) for n, s in sorted(best.items(), key=lambda named: -named[1])[:9]}
        print(f"  {name}: {1000 * total / 16:.1f}, {total / limit:.2f} times as long; {told}")


def _one_convolution(leaf: Tensor, weight: Tensor, setting: tuple[Any, ...]) -> float:
    """Take the processor time of a convolution and of its gradient with respect to the input."""
    with _Operations() as seen:
        out = frozen.run(torch.nn.functional.conv2d, (leaf, weight, None, *setting), {}, by_phase=True)
    with _Operations() as back:
        torch.autograd.grad(out, leaf, torch.empty_like(out).fill_(1e-3))
    names = ("convolution", "convolution_backward")
    return sum(s.seconds[n] for s in (seen, back) for n in names)


def main() -> None:
    """Print everything, or one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["networks", "rows", "fixed", "floor", "exactness"])
    given = parser.parse_args()
    torch.manual_seed(0)
    peers.make_torchvision_importable()
    for part in (fixed, networks, rows, floor, exactness):
        if given.only in (None, part.__name__):
            part(given.rounds)


if __name__ == "__main__":
    main()
