"""A network that picks features which tell of a model's answer, and its training; Chen et al. 2018."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.field import Field
from apportion.core.score import main_output
from apportion.core.tree import Tree
from apportion.core.write import read_tensors, write_tensors
from apportion.parts.subsets.explained import bound, one_tensor, same_field, whole_output
from apportion.parts.subsets.trainer import Trainer, Weights, gathered, moments, network, perceptron, saved_moments


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Selector(Configurable):
    """A network that picks features, and one that answers from them alone; from `Selector.fit`.

    Attributes:
        selecting: weights of the first.
        answering: of the second, which is asked for `fidelity` only.
        shape: of an example.
        outputs: how many the model has.
        k: how many features are picked.
        width: of the hidden layers; the second network's are twice as wide.
        mean: of each feature over the data; both networks see features standardized, so that one left out is there
            with its mean.
        std: likewise, 1 where a feature is constant.
    """

    selecting: dict[str, Tensor]
    answering: dict[str, Tensor]
    shape: tuple[int, ...]
    outputs: int
    k: int
    width: int
    mean: Tensor
    std: Tensor

    @classmethod
    @torch.inference_mode(False)
    def fit(cls, field: Field, data: Tree | Iterable[Tree], training: SelectorTraining | None = None) -> Selector:
        """Train on the model's answers to data, one forward pass for each example.

        Args:
            field: the model; the score does not matter.
            data: examples; or a list or iterator of batches. Labels beside them are passed over.
            training: how.

        Raises:
            InputError: fewer features than are to be picked, or no data.
            ConfigError: something else as `training`.
        """
        if not isinstance(training, SelectorTraining | None):
            raise ConfigError(
                f"{kind_of(training)} as training of Selector.fit", "a SelectorTraining", "write SelectorTraining(k=3)"
            )
        training = SelectorTraining() if training is None else training
        asked = same_field(field, "Selector.fit", whole_output)  # which has no class that a pass would have to find
        found = []
        for q in bound(asked, data, "Selector.fit", labels=False):
            told = main_output(q.outputs(q.x, torch.arange(len(q), device=q.device)))
            found.append((one_tensor(q.x, "Selector.fit"), told.reshape(len(q), -1)))
        x, z = gathered(found)
        d, outputs = x[0].numel(), z.shape[1]
        mean, std = moments(x)
        if training.k > d:
            raise InputError(f"k={training.k} of {d} features", "fewer", "lower k")
        known = z.softmax(1) if outputs > 1 else (z - z.mean()) / z.std().clamp(min=1e-12)

        def loss(net: Callable[..., Tensor], batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
            rows, answer = batch
            u = torch.rand(training.k, len(rows), d, generator=generator, dtype=torch.float64).to(rows)
            told = net(rows.flatten(1), -(-u.clamp(1e-20, 1 - 1e-7).log()).log())
            if outputs > 1:
                return -(answer * told.log_softmax(1)).sum(1).mean()
            return (answer - told).square().mean()

        weights = training.trainer.run(
            lambda: _Both(d, outputs, training.width, training.temperature),
            ((x - mean) / std, known),
            loss,
            "a selector",
        )
        return cls(*_split(weights), tuple(x.shape[1:]), outputs, training.k, training.width, mean, std)

    def scores(self, x: Float[Tensor, "B *shape"]) -> Float[Tensor, "B d"]:
        """Give log-odds of being picked, up to a constant.

        Raises:
            InputError: examples shaped unlike those of the training.
        """
        d = x[0].numel()
        weights = {k: w.to(x) for k, w in self.selecting.items()}
        return network(lambda: perceptron(d, d, self.width))(weights, self._seen(x))

    def _seen(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(
                f"examples of shape {tuple(x.shape[1:])}", f"{self.shape}, as trained on", "train another selector"
            )
        return (x - self.mean.to(x)) / self.std.to(x)

    def picked(self, scores: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """Mark the k highest."""
        return torch.zeros_like(scores).scatter_(1, scores.topk(self.k, 1).indices, 1.0)

    @torch.inference_mode(False)
    def fidelity(self, field: Field, data: Tree | Iterable[Tree]) -> float:
        """Tell how often the picked features alone lead the second network to the model's own class.

        Args:
            field: the model.
            data: examples that were not trained on.

        Raises:
            InputError: a model that gives one number, or as many as another one; examples of another shape.
        """
        if self.outputs < 2:
            raise InputError("a model that gives one number", "classes", "compare outputs by hand")
        right, count = 0, 0
        answer = network(lambda: perceptron(len(self.flat), self.outputs, 2 * self.width))
        asked = same_field(field, "Selector.fidelity", whole_output)
        for q in bound(asked, data, "Selector.fidelity", labels=False):
            x = one_tensor(q.x, "Selector.fidelity")
            kept = self._seen(x).flatten(1) * self.picked(self.scores(x))
            told = answer({k: w.to(x) for k, w in self.answering.items()}, kept)
            own = main_output(q.outputs(x, torch.arange(len(q), device=q.device))).reshape(len(q), -1)
            if own.shape[1] != self.outputs:
                raise InputError(
                    f"a model with {own.shape[1]} outputs", f"{self.outputs}, as trained on", "train another selector"
                )
            right, count = right + int((told.argmax(1) == own.argmax(1)).sum()), count + len(q)
        return right / count

    @property
    def flat(self) -> range:
        """The features, numbered."""
        return range(torch.Size(self.shape).numel())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file.

        Raises:
            OutputError: the place cannot be written to.
        """
        kept = {f"selecting.{k}": w for k, w in self.selecting.items()}
        kept |= {f"answering.{k}": w for k, w in self.answering.items()}
        kept |= {"mean": self.mean, "std": self.std}
        record = {"version": 1, "shape": self.shape, "outputs": self.outputs, "k": self.k, "width": self.width}
        write_tensors(path, kept, {"selector": record})

    @classmethod
    def load(cls, path: str | Path) -> Selector:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is none of these, or of an earlier version.
        """
        record, tensors = read_tensors(path, "selector", "Selector.save")
        seen = saved_moments(tensors, path)
        sizes = {name: record[name] for name in ("outputs", "k", "width")}
        return cls(*_split(tensors), tuple(record["shape"]), **sizes, mean=seen["mean"], std=seen["std"])


@dataclass(frozen=True)
class SelectorTraining(Configurable):
    """How a `Selector` is trained; the defaults are the authors' for tables.

    Attributes:
        k: how many features are picked.
        width: of the hidden layers of the picking network.
        temperature: of the relaxed choice.
        trainer: the training itself.
    """

    _positive = ("k", "width", "temperature")

    k: int = 4
    width: int = 100
    temperature: float = 0.1
    trainer: Trainer = Trainer(epochs=10, batch=128)


class _Both(nn.Module):
    """Picks by k draws of a relaxed choice, the largest of which counts, and answers; Chen et al. 2018."""

    def __init__(self, d: int, outputs: int, width: int, temperature: float) -> None:
        super().__init__()
        self.selecting, self.answering = perceptron(d, d, width), perceptron(d, outputs, 2 * width)
        self.temperature = temperature

    def forward(self, x: Float[Tensor, "R d"], gumbel: Float[Tensor, "k R d"]) -> Tensor:
        choice = ((gumbel + self.selecting(x).log_softmax(1)) / self.temperature).softmax(2).amax(0)
        return self.answering(x * choice)


def _split(weights: Weights) -> tuple[Weights, Weights]:
    """Tell the two networks' weights apart."""
    picks, answers = (
        {k.removeprefix(head): w for k, w in weights.items() if k.startswith(head)}
        for head in ("selecting.", "answering.")
    )
    return picks, answers
