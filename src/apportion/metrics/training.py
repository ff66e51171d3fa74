"""Metrics that train networks: training sets, trainers, and trainings that are done once for all batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.core.config import Configurable, digest
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.question import Question
from apportion.core.sharing import is_key
from apportion.core.streams import key_of
from apportion.metrics.metric import Metric
from apportion.parts.subsets.trainer import Trainer, perceptron


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class TrainingSet(Configurable):
    """What models are trained on.

    Attributes:
        x: [n, ...] as the examples to be judged.
        y: [n] classes, whole numbers from 0.

    Raises:
        ConfigError: no tensors, no class for each example, or none at all.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("x", "y"):
            if not isinstance(given := getattr(self, name), Tensor):
                raise ConfigError(f"{kind_of(given)} as {name} of a TrainingSet", "a tensor", "use torch.as_tensor")
        if self.y.ndim != 1 or len(self.y) != len(self.x) or not len(self.y) or self.y.is_floating_point():
            raise ConfigError(
                f"classes {tuple(self.y.shape)} of {self.y.dtype} for {len(self.x)} example(s)",
                "one whole number each, and an example at least",
                "give class indices",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingSet) and self._bits == other._bits

    def __hash__(self) -> int:
        return hash(self._bits)

    @cached_property
    def _bits(self) -> tuple[str, str]:
        return digest(self.x), digest(self.y)


@dataclass(frozen=True)
class SmallNetwork(Configurable):
    """Trains a small network from scratch: two convolutions for pictures, two hidden layers for everything else.

    Convolutions of 3 × 3 with `width` and 2 `width` channels, ReLUs, means over 4 × 4 fields of the picture and a
    linear layer; or `width` times 4 units in each hidden layer. Inputs are standardized by channel.

    Attributes:
        trainer: of the weights; its seed is replaced by that asked for.
        width: of the layers.

    >>> x, y = torch.tensor([[-1.0], [1.0]]).repeat(8, 1), torch.tensor([0, 1]).repeat(8)
    >>> SmallNetwork(Trainer(epochs=30, lr=0.05))(x, y, 0)(x[:2]).argmax(1)
    tensor([0, 1])
    """

    _positive = ("width",)

    trainer: Trainer = Trainer(epochs=20, lr=3e-3)
    width: int = 16

    def __call__(self, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"], seed: int) -> nn.Module:
        """Train on examples and their classes."""
        wide = x.double().transpose(0, 1).flatten(1)
        shape = (1, -1, *[1] * (x.ndim - 2))
        std = wide.std(1, correction=0)
        mean, std = (t.to(x.dtype).reshape(shape) for t in (wide.mean(1), torch.where(std > 0, std, 1)))
        classes = 1 + int(y.max())

        def make() -> nn.Module:
            if x.ndim != 4:
                return perceptron(x[0].numel(), classes, 4 * self.width)
            first = nn.Conv2d(x.shape[1], self.width, 3, padding=1)
            second = nn.Conv2d(self.width, 2 * self.width, 3, padding=1)
            last = nn.Linear(32 * self.width, classes)
            pool = nn.AdaptiveAvgPool2d(4)
            return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), pool, nn.Flatten(), last)

        weights = replace(self.trainer, seed=seed).run(
            make, ((x - mean) / std, y), lambda net, batch, _: F.cross_entropy(net(batch[0]), batch[1]), "a network"
        )
        with torch.device("meta"):
            net = make()
        net.load_state_dict(weights, assign=True)
        return nn.Sequential(_Standard(mean, std), net).eval()


class _Standard(nn.Module):
    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("mean")) / self.get_buffer("std")


@dataclass(frozen=True)
class FromScratch(Configurable):
    """Trains a network of a given architecture on classes, from newly drawn weights.

    Cross-entropy, with every parameter free and the network in training mode; it comes back in evaluation mode.

    Attributes:
        network: a module, which is copied and whose modules draw their parameters anew by `reset_parameters`; or a
            function without arguments that builds one.
        trainer: epochs, rate and size of batches; whoever calls says which seed.

    Raises:
        ConfigError: a module with parameters that cannot draw them anew, or something that builds no module.

    >>> x, y = torch.tensor([[-1.0], [1.0]]).repeat(8, 1), torch.tensor([0, 1]).repeat(8)
    >>> learned = FromScratch(nn.Linear(1, 2), Trainer(epochs=30, lr=0.1))(x, y, 0)
    >>> learned(x[:2]).argmax(1)
    tensor([0, 1])
    """

    network: Callable[..., nn.Module]
    trainer: Trainer = Trainer(epochs=100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.network):
            raise ConfigError(
                f"{kind_of(self.network)} as network", "a module, or what builds one", "give your network"
            )

    def __call__(self, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"], seed: int) -> nn.Module:
        """Train on examples and their classes."""
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            net = self._begun().train().requires_grad_(True)
            replace(self.trainer, seed=seed).fit(
                dict(net.named_parameters()), net, (x, y), lambda n, b, _: F.cross_entropy(n(b[0]), b[1]), "a network"
            )
        return net.eval()

    def _begun(self) -> nn.Module:
        if not isinstance(self.network, nn.Module):
            net = self.network()
            if not isinstance(net, nn.Module):
                raise ConfigError(f"{kind_of(net)} from a function", "a torch.nn.Module", "return the network")
            return net
        net = copy.deepcopy(self.network)
        for name, module in net.named_modules():
            if callable(again := getattr(module, "reset_parameters", None)):
                again()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ConfigError(
                    f"{name or 'the network'}, a {type(module).__name__} with parameters and no reset_parameters()",
                    "modules that can draw their parameters anew",
                    "give a function that builds the network: FromScratch(lambda: MyNetwork())",
                )
        return net


@dataclass(frozen=True, kw_only=True)
class Training(Metric):
    """Base of the metrics that train networks, each once for all examples, batches and explainers it serves.

    Attributes:
        train: the data they are trained on.
        trainer: takes examples, classes and a seed, and gives a trained module; `FromScratch` of the model explained
            if None.
        seeds: how often each network is trained.
    """

    _positive = ("seeds",)

    train: TrainingSet
    trainer: Callable[[Tensor, Tensor, int], nn.Module] | None = None
    seeds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainer is not None and not (callable(self.trainer) and is_key(self.trainer)):
            raise ConfigError(
                f"{kind_of(self.trainer)} as trainer",
                "a function of x, y and a seed that can be hashed, so that it is known again",
                "leave it out for the supplied",
            )

    def fitted(self, q: Question, x: Tensor, y: Tensor, seed: tuple[str | int, ...], what: str) -> nn.Module:
        """Train a network; torch's own random numbers are seeded for it, and put back.

        Args:
            q: says which seed.
            x: examples.
            y: their classes.
            seed: names this training's.
            what: it is trained on, for errors.
        """
        number, trainer = key_of(q.seed, *seed) % 2**31, self.trainer
        if trainer is None:
            if not isinstance(q.field.model, nn.Module):
                raise ConfigError(
                    f"{kind_of(q.field.model)} to be trained anew", "a module", "give trainer=FromScratch(your builder)"
                )
            trainer = FromScratch(q.field.model)
        with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.enable_grad():
            torch.manual_seed(number)
            try:
                net = trainer(x, y.to(x.device), number)
            except ConfigError:
                raise
            except Exception as error:  # for no batch of examples would it do better
                raise ConfigError(
                    f"{type(error).__name__} in the trainer on {what}: {error}",
                    "a trained network",
                    "try the trainer alone",
                ) from error
        if not isinstance(net, nn.Module):
            raise ConfigError(f"{kind_of(net)} from the trainer on {what}", "a torch.nn.Module", "return the model")
        return net.eval()

    @staticmethod
    def right(net: nn.Module, x: Tensor, y: Tensor, what: str) -> Float[Tensor, " n"]:
        """Tell which examples a network classifies rightly."""
        with torch.no_grad():
            seen = torch.cat([net(rows) for rows in x.split(512)])
        if not isinstance(seen, Tensor) or seen.ndim != 2:
            raise InputError(
                f"outputs {tuple(seen.shape)} of a model trained on {what}", "[B, classes]", "train a classifier"
            )
        return (seen.argmax(1) == y.to(seen.device)).double()
