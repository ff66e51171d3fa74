"""Networks that foretell what a model loses without each player; Schwab and Karlen 2019."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.write import read_tensors, write_tensors
from apportion.parts.subsets.trainer import Trainer, Weights, network, perceptron, saved_moments


def shares(growth: Float[Tensor, "B P"], present: Bool[Tensor, "B P"] | None = None) -> Float[Tensor, "B P"]:
    """Give max(Δε, 0) / Σ max(Δε, 0), equal shares of those present where nothing grows; Schwab and Karlen 2019.

    >>> shares(torch.tensor([[3.0, 1.0, -2.0], [-1.0, 0.0, 0.0]])).tolist()
    [[0.75, 0.25, 0.0], [0.3333333432674408, 0.3333333432674408, 0.3333333432674408]]
    """
    present = torch.ones_like(growth) if present is None else present.to(growth)
    grown = growth.clamp(min=0) * present
    total = grown.sum(1, keepdim=True)
    return torch.where(total > 0, grown / torch.where(total > 0, total, 1.0), present / present.sum(1, keepdim=True))


def among(logits: Float[Tensor, "B P"], present: Bool[Tensor, "B P"] | None) -> Float[Tensor, "B P"]:
    """Leave nothing to players an example does not have."""
    return logits if present is None else logits.masked_fill(~present, -1e9)  # finite: 0 times it is 0


@dataclass(frozen=True)
class CausalTraining(Configurable):
    """How `CausalNetworks` are trained.

    Attributes:
        networks: how many, each on a bootstrap sample of the data; one is trained on all of it.
        width: of their two hidden layers.
        trainer: the training itself.
    """

    _positive = ("networks", "width")

    networks: int = 5
    width: int = 64
    trainer: Trainer = Trainer(epochs=60, batch=32, lr=0.003)


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class CausalNetworks(Configurable):
    """Networks that foretell the players' shares; from `CXPlain.fit`.

    Attributes:
        weights: of each, by the number of the network and the name of the parameter.
        networks: how many.
        shape: of an example.
        players: how many.
        width: of the hidden layers.
        mean: of each element over the data, taken off before the networks see it.
        std: by which it is then divided.
    """

    weights: dict[str, Tensor]
    networks: int
    shape: tuple[int, ...]
    players: int
    width: int
    mean: Tensor
    std: Tensor

    def __call__(self, x: Float[Tensor, "B *shape"], present: Bool[Tensor, "B P"] | None = None) -> Tensor:
        """Foretell shares of the players present, by each network, [B, M, P]."""
        net = network(lambda: perceptron(x[0].numel(), self.players, self.width))
        x = (x - self.mean.to(x)) / self.std.to(x)
        with torch.no_grad():
            told = [among(net(self._of(i, x), x), present).softmax(1) for i in range(self.networks)]
        return torch.stack(told, 1)

    def _of(self, number: int, like: Tensor) -> Weights:
        head = f"{number}/"
        return {k.removeprefix(head): w.to(like) for k, w in self.weights.items() if k.startswith(head)}

    def save(self, path: str | Path) -> None:
        """Write weights and sizes to a safetensors file.

        Raises:
            OutputError: that fails.
        """
        names = ("networks", "shape", "players", "width")
        kept = {**self.weights, "mean": self.mean, "std": self.std}
        write_tensors(path, kept, {"causal networks": {n: getattr(self, n) for n in names}})

    @classmethod
    def load(cls, path: str | Path) -> CausalNetworks:
        """Read such a file.

        Raises:
            ConfigError: it is another, or of an earlier version.
        """
        record, weights = read_tensors(path, "causal networks", "CausalNetworks.save")
        seen = saved_moments(weights, path)
        return cls(weights, **{**record, **seen, "shape": tuple(record["shape"])})
