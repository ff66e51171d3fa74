"""Training of small networks that explain; the global random state is neither used nor changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError, NonFiniteError
from apportion.core.progress import tick
from apportion.core.tree import Tree

Weights = dict[str, Tensor]
"""Parameters of a network by name, as a fitted part keeps them."""


def network(make: Callable[[], nn.Module]) -> Callable[..., Any]:
    """Build a network without parameters of its own: called with weights, then its arguments.

    >>> net = network(lambda: nn.Linear(1, 1))
    >>> net({"weight": torch.tensor([[2.0]]), "bias": torch.zeros(1)}, torch.ones(1, 1))
    tensor([[2.]])
    """
    with torch.device("meta"):
        module = make()
    return lambda weights, *given: functional_call(module, weights, given, strict=True)


def started(make: Callable[[], nn.Module], seed: int, like: Tensor) -> Weights:
    """Draw weights to start from: normal with variance 2 / inputs, biases 0.

    Args:
        make: builds the network.
        seed: of the numbers.
        like: whose dtype and device they get.

    >>> sorted(started(lambda: nn.Linear(3, 2), 0, torch.zeros(1)))
    ['bias', 'weight']
    """
    with torch.device("meta"):
        module = make()
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    for name, p in module.named_parameters():
        drawn = torch.zeros(p.shape, dtype=torch.float64)
        if p.ndim > 1:
            drawn.normal_(generator=generator).mul_((2 / p[0].numel()) ** 0.5)
        found[name] = drawn.to(like.device, like.dtype)
    return found


@dataclass(frozen=True)
class Trainer(Configurable):
    """Adam on batches in random order.

    Attributes:
        epochs: times all of the data is gone through.
        batch: examples a step, where data are given at once, and one more in the last where one would be left; batches
            that are given are taken as they are.
        lr: the rate.
        weight_decay: of the parameters, decoupled.
        seed: of the weights to start from, the order, and what a loss draws.

    >>> x = torch.linspace(-1, 1, 32)[:, None]
    >>> fit = Trainer(epochs=200, batch=32, lr=0.05).run(
    ...     lambda: nn.Linear(1, 1), x, lambda net, rows, generator: (net(rows) - 3 * rows).square().mean(), "a line"
    ... )
    >>> round(float(fit["weight"]), 2)
    3.0
    """

    _positive = ("epochs", "batch", "lr")
    _not_negative = ("weight_decay",)

    epochs: int = 10
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0

    def run(
        self,
        make: Callable[[], nn.Module],
        data: Any,
        loss: Callable[[Callable[..., Any], Any, torch.Generator], Tensor],
        what: str,
        like: Tensor | None = None,
    ) -> Weights:
        """Train a network.

        Args:
            make: builds it; without buffers.
            data: a tree of tensors with examples first, or a list or loader of batches.
            loss: of the network, called with its arguments, a batch, and a generator of its own random numbers.
            what: is trained, for progress.
            like: whose dtype and device the weights get; the data's first tensor unless given.

        Returns:
            The weights.

        Raises:
            InputError: no data, or an iterator that is spent after the first epoch.
            NonFiniteError: weights that have become NaN or infinite.
        """
        with torch.inference_mode(False):
            return self._run(make, data, loss, what, like)

    def _run(
        self,
        make: Callable[[], nn.Module],
        data: Any,
        loss: Callable[[Callable[..., Any], Any, torch.Generator], Tensor],
        what: str,
        like: Tensor | None,
    ) -> Weights:
        given = not isinstance(data, Tensor | dict | tuple)
        first = like if like is not None else next(iter(tree.tensors(data if not given else next(iter(data)))))
        net = network(make)
        weights = {k: w.requires_grad_() for k, w in started(make, self.seed, first).items()}
        self.fit(weights, lambda *a: net(weights, *a), data, loss, what)
        return {k: w.detach() for k, w in weights.items()}

    def fit(
        self,
        weights: Weights,
        net: Callable[..., Any],
        data: Any,
        loss: Callable[[Callable[..., Any], Any, torch.Generator], Tensor],
        what: str,
    ) -> None:
        """Train weights where they are.

        Args:
            weights: by name; all of them require gradient.
            net: what the loss is called with.
            data: as for `run`.
            loss: likewise.
            what: is trained.

        Raises:
            InputError: as there.
            NonFiniteError: as there.
        """
        given = not isinstance(data, Tensor | dict | tuple)
        optimizer = torch.optim.AdamW(list(weights.values()), lr=self.lr, weight_decay=self.weight_decay)
        generator = torch.Generator().manual_seed(self.seed)
        done, total = 0, 0 if given else self.epochs * len(self._sizes(tree.rows(data)))
        for epoch in range(self.epochs):
            before = done
            for batch in data if given else self._batches(data, generator):
                with torch.enable_grad():
                    value = loss(net, batch, generator)
                    grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for w, g in zip(weights.values(), grads, strict=True):
                    w.grad = g
                optimizer.step()
                done += 1
                tick(f"training {what}, steps", done, max(done, total))
            if done == before:
                raise InputError(
                    f"no batch in epoch {epoch + 1}",
                    "data that can be gone through again",
                    "give a tensor, a list of batches or a DataLoader; an iterator is spent after one use",
                )
        if not all(bool(w.isfinite().all()) for w in weights.values()):
            raise NonFiniteError(
                f"weights of {what} that are NaN or infinite after {done} step(s)",
                "a training that converges",
                "lower the trainer's lr, or bring the data to a scale of about 1",
            )

    def _batches(self, data: Tree, generator: torch.Generator) -> Iterator[Tree]:
        order = torch.randperm(tree.rows(data), generator=generator)
        for rows in order.split(self._sizes(len(order))):
            yield tree.index(data, rows.to(tree.leaves(data)[0].device))

    def _sizes(self, count: int) -> list[int]:
        """Cut data into batches; a single last example goes with those before it, since batch norm needs two."""
        sizes = [min(self.batch, count - at) for at in range(0, count, self.batch)]
        return [*sizes[:-2], sizes[-2] + 1] if len(sizes) > 1 and sizes[-1] == 1 < self.batch else sizes


def moments(x: Float[Tensor, "n *shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Give mean and standard deviation of each element over data; 1 where it is constant to rounding.

    >>> [t.tolist() for t in moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))]
    [[2.0, 5.0], [1.0, 1.0]]
    """
    wide = x.double()
    mean, std = wide.mean(0), wide.std(0, correction=0)
    constant = std <= 10 * torch.finfo(x.dtype).eps * wide.abs().amax(0)
    return mean.to(x.dtype), torch.where(constant, 1, std).to(x.dtype)


def saved_moments(tensors: dict[str, Tensor], path: str | Path) -> Weights:
    """Take `mean` and `std` out of what was read from a file.

    Raises:
        ConfigError: they are not there.
    """
    if not {"mean", "std"} <= tensors.keys():
        raise ConfigError(f"{path} has no moments of the training data", "a file of this version", "train anew")
    return {name: tensors.pop(name) for name in ("mean", "std")}


def perceptron(inputs: int, outputs: int, width: int, layers: int = 2) -> nn.Sequential:
    """Build linear layers with ReLUs between them; of pictures and the like, flattened."""
    sizes = [inputs, *[width] * layers]
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], outputs))


def gathered(parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Join batches of several tensors each.

    >>> gathered([(torch.zeros(1), torch.ones(1)), (torch.zeros(2), torch.ones(2))])[1]
    tensor([1., 1., 1.])
    """
    return tuple(map(torch.cat, zip(*parts, strict=True)))
