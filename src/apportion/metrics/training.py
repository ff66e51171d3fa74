"""Metrics that train networks: training sets, trainers, and trainings that are done once for all batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.core.attribution import Groups
from apportion.core.config import Configurable, digest
from apportion.core.errors import ApportionError, ConfigError, InputError, TargetError, kind_of
from apportion.core.field import Field
from apportion.core.game import Game, Weighted
from apportion.core.question import Question
from apportion.core.sharing import is_key
from apportion.core.site import Input
from apportion.core.streams import key_of
from apportion.core.twin import copied
from apportion.metrics.metric import Metric
from apportion.metrics.ranking import cells
from apportion.parts.baselines import NetworkZero
from apportion.parts.masks.fills import Baselines, Fill
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
        if not self.y.is_floating_point() and not self.y.is_complex():
            object.__setattr__(self, "y", self.y.long())
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
        net = copied(self.network)
        for name, module in net.named_modules():
            if callable(again := getattr(module, "reset_parameters", None)):
                for p in module.parameters(recurse=False):
                    p.data.fill_(torch.nan)
                again()
                for own, p in module.named_parameters(recurse=False):
                    if bool(p.isnan().any()):
                        raise ConfigError(
                            f"{name}.{own} of {type(module).__name__}, which its reset_parameters() does not draw",
                            "modules that draw all their parameters anew, as under weight_norm they do not",
                            "give a function that builds the network: FromScratch(lambda: MyNetwork())",
                        )
            elif next(module.parameters(recurse=False), None) is not None:
                raise ConfigError(
                    f"{name or 'the network'}, a {type(module).__name__} with parameters and no reset_parameters()",
                    "modules that can draw their parameters anew",
                    "give a function that builds the network: FromScratch(lambda: MyNetwork())",
                )
        return net


@dataclass(frozen=True)
class InDomain(Configurable):
    """Fine-tunes a copy of a model on examples some of which have lost cells, so that a hole is nothing new to it.

    In each step an example is left whole with probability 1 - `probability`; otherwise `count` of its cells, drawn
    anew, are replaced by the fill. Cross-entropy with the classes, by the trainer's Adam. The copy trains in training
    mode, so that dropout drops and batch norm's running statistics follow the data with holes; parameters that require
    no gradient stay as they are, unless none requires any: then all are trained. It comes back in evaluation mode; the
    model given is not touched.

    The source's code deletes one of 4 × 4 cells from half of the images, in training mode, with every parameter free:
    30 epochs of SGD with momentum .9, rate .001, divided by 10 every 10 epochs, weight decay 1e-4 and batches of 256,
    of which the weights that do best on whole validation images are kept. Here it is Adam, one rate, and the last
    weights.

    Attributes:
        groups: the cells; 4 × 4 of pictures, single elements of everything else, unless given.
        fill: what stands where a cell was; of several draws one by chance.
        count: cells that go, or the share of them if below 1.
        probability: of an example to lose any.
        trainer: how long, at which rate and in which batches; its seed is not used.
        statistics: whether batch norm's running statistics move; else its layers stay in evaluation mode.
        anew: whether weights are drawn anew first, as `FromScratch` does: then every parameter is free.

    Raises:
        ConfigError: a count or probability out of range; a model that is no module; a field with extra arguments or at
            an inner site; an error while the copy trains.
        ModelError: a model that cannot be copied.
        InputError: outputs that are no classes, or examples with fewer cells than are to go.
        NonFiniteError: a training that diverges.

    Source: Hesse et al. (2024), by their code. F-Fidelity (Zheng et al. 2025) also trains with deletions, of a share of
    the input, by its summary, which is all that was read of it; its removals at random are not done.

    >>> import apportion as ap
    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> train, field = TrainingSet(x, (x[:, 0] > 0).long()), ap.Field(nn.Linear(3, 2))
    >>> tuned = InDomain(trainer=Trainer(epochs=30, lr=0.1))(field, train)
    >>> ap.metrics.SingleDeletion()(field.with_model(tuned), x[:2], ap.GradientTimesInput()).values.tolist()
    [1.0, 1.0]
    """

    _positive = ("count",)

    groups: Groups | None = None
    fill: Fill = Baselines(NetworkZero())
    count: float = 1
    probability: float = 0.5
    trainer: Trainer = Trainer(epochs=30, lr=1e-4, weight_decay=1e-4)
    statistics: bool = True
    anew: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count >= 1 and self.count != int(self.count):
            raise ConfigError(f"InDomain(count={self.count})", "a whole number of cells, or a share below 1", "write 1")
        if not 0 < self.probability <= 1:
            raise ConfigError(f"InDomain(probability={self.probability})", "above 0, at most 1", "write .5")
        if self.groups is not None and (isinstance(self.groups, type) or not isinstance(self.groups, Groups)):
            raise ConfigError(
                f"{kind_of(self.groups)} as groups of InDomain",
                "an instance of groups that do not overlap",
                "write groups=ap.groups.Cells(4)",
            )

    def __call__(self, field: Field, train: TrainingSet, seed: int = 0) -> nn.Module:
        """Train a copy of a field's model.

        Args:
            field: the model, and the normalization between examples and what it reads.
            train: examples in the units of the field's x, and their classes.
            seed: of the order, the cells, the fill, and torch's own numbers, which are put back.
        """
        with torch.inference_mode(False):  # whose tensors could not be trained
            return self._trained(field, train, seed)

    def _trained(self, field: Field, train: TrainingSet, seed: int) -> nn.Module:
        net = self._copied(field, train)
        game = self._game(field, train, seed)

        def loss(run: Callable[..., Tensor], batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
            rows, y = batch
            return F.cross_entropy(_classes(run(self._holes(game, rows, generator, self.probability))), y)

        device = game.question.device
        data = torch.arange(len(train.x), device=device), train.y.to(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            if self.anew:
                net = self._drawn(net)
            for module in net.train().modules():
                if not self.statistics and isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
            if not any(p.requires_grad for p in net.parameters()):  # frozen to be explained, not to stay
                net.requires_grad_(True)
            free: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if p.requires_grad}
            if not free:
                raise ConfigError(
                    f"a {type(net).__name__} without parameters", "some to train", "leave this training out"
                )
            try:
                replace(self.trainer, seed=seed).fit(free, net, data, loss, "an in-domain network")
            except ApportionError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"{type(error).__name__} while a {type(net).__name__} was trained with deleted cells: {error}",
                    "a module that runs in training mode on batches of examples",
                    "train it yourself, and judge Field(trained) by SingleDeletion",
                ) from error
        return net.eval()

    def accuracy(self, field: Field, train: TrainingSet, nets: Sequence[nn.Module], seed: int = 0) -> list[float]:
        """Tell what share of a set each network gets right where every example has lost cells, the same for all.

        Args:
            field: as for the training.
            train: what it was trained on, or other examples.
            nets: the networks.
            seed: of the cells.
        """
        game, generator = self._game(field, train, seed), torch.Generator().manual_seed(seed)
        x = self._holes(game, torch.arange(len(train.x), device=game.question.device), generator, 1.0)
        return [float(Training.right(net, x, train.y, "deleted cells").mean()) for net in nets]

    def _copied(self, field: Field, train: TrainingSet) -> nn.Module:
        for given, wanted in ((field, Field), (train, TrainingSet)):
            if not isinstance(given, wanted):
                raise ConfigError(
                    f"{kind_of(given)} to InDomain", f"a {wanted.__name__}", "write InDomain()(field, train)"
                )
        if not isinstance(field.model, nn.Module):
            raise ConfigError(f"{kind_of(field.model)} to be trained", "a torch.nn.Module", "train what it calls")
        if field.extra or not isinstance(field.site, Input):
            raise ConfigError(
                "a field with extra arguments or at an inner site", "a model of x alone", "train it with holes yourself"
            )
        return copied(field.model)

    def _drawn(self, net: nn.Module) -> nn.Module:
        try:
            return FromScratch(net)._begun().requires_grad_(True)
        except ConfigError as error:
            do = "build the network, leave anew out, and train Field(network)"
            raise ConfigError(error.given, error.expected, do) from error

    def _game(self, field: Field, train: TrainingSet, seed: int) -> Game:
        """Set up the cells of all training examples."""
        asked = Field(field.model, normalize=field.normalize, bounds=field.bounds)
        device = next((p.device for p in field.model.parameters()), train.x.device)
        ids = [f"training {i}" for i in range(len(train.x))]
        try:
            q = asked.bind(train.x.to(device), target=train.y.to(device), ids=ids, seed=seed)
        except TargetError as error:
            raise InputError(
                f"a TrainingSet of classes {int(train.y.min())} to {int(train.y.max())} ({error.given})",
                "classes that the model has",
                "give indices of its outputs",
            ) from error
        game = Game(q, cells(q, self.groups), self.fill)
        if self.count >= 1 and int(game.sizes.min()) < self.count:
            raise InputError(
                f"{int(self.count)} cell(s) to delete of an example that has {int(game.sizes.min())}",
                "as many at least",
                "give finer groups, or count=.25 for a quarter",
            )
        return game

    def _holes(self, game: Game, rows: Tensor, generator: torch.Generator, probability: float) -> Tensor:
        """Delete cells of some examples, and give what the network reads."""
        q, own, size = game.question, game.own[rows.cpu()], game.sizes[rows.cpu()]
        count = (self.count * size).round().clamp(min=1) if self.count < 1 else torch.full_like(size, int(self.count))
        first = torch.rand(own.shape, generator=generator).masked_fill(~own, 2).argsort(1).argsort(1)
        some = torch.rand(len(rows), generator=generator) < probability
        keep = (first >= count[:, None]) | ~some[:, None]
        draw = torch.randint(1 << 62, (len(rows),), generator=generator)
        assert isinstance(q.x, Tensor)
        element = game.elements(keep.to(q.device), rows)
        filled = game.fill(q, element, rows, draw)
        points, weight = (filled.rows, filled.weight) if isinstance(filled, Weighted) else (filled, None)
        assert isinstance(q.x, Tensor)
        assert isinstance(points, Tensor)
        chance = torch.ones(points.shape[:2]) if weight is None else weight.cpu()
        one = torch.multinomial(chance, 1, generator=generator)[:, 0].to(q.device)
        x = torch.where(element, q.x[rows], points[torch.arange(len(rows), device=q.device), one])
        return x if q.field.normalize is None else q.field.normalize(x)


def _classes(out: Any) -> Tensor:
    if not isinstance(out, Tensor) or out.ndim != 2:
        shape = tuple(out.shape) if isinstance(out, Tensor) else kind_of(out)
        raise InputError(f"outputs {shape} of a model to be trained on classes", "[B, classes]", "train it yourself")
    return out


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
