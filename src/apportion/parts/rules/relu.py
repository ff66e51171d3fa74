"""Rules that replace what a ReLU sends back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.parts.rules.rule import Call, Plain, Rule, Signals, to_first
from apportion.parts.rules.table import POOLS, Rules


@dataclass(frozen=True)
class Guided(Rule):
    """ReLU: relu(R) where z > 0 (Springenberg et al. 2014)."""

    def back(self, call: Call, signal: Any) -> Signals:
        return to_first(call, signal.clamp(min=0) * (call.inputs[0] > 0))


@dataclass(frozen=True)
class Deconv(Rule):
    """ReLU: relu(R), whatever z (Zeiler and Fergus 2014)."""

    def back(self, call: Call, signal: Any) -> Signals:
        return to_first(call, signal.clamp(min=0))


@dataclass(frozen=True)
class SoftplusReLU(Rule):
    """ReLU replaced by log(1 + exp(β z)) / β, forward and backward, so that second derivatives exist.

    Attributes:
        beta: sharpness β; the larger, the nearer to the ReLU.
    """

    beta: float = 10.0

    @property
    def surrogate(self) -> bool:
        return True

    def _smooth(self, z: Tensor) -> Tensor:
        return F.softplus(z, beta=self.beta, threshold=1e4)

    def forward(self, call: Call) -> Any:
        return self._smooth(call.inputs[0])

    def back(self, call: Call, signal: Any) -> Signals:
        return to_first(call, signal * torch.sigmoid(self.beta * call.inputs[0]))


def guided_backprop() -> Rules:
    """Guided backpropagation (Springenberg et al. 2014): refuses networks with other activations than ReLU."""
    return Rules((("relu", Guided()), *POOLS))


def deconvnet() -> Rules:
    """Deconvnet (Zeiler and Fergus 2014)."""
    return Rules((("relu", Deconv()), *POOLS))


def softplus(beta: float = 10.0) -> Rules:
    """The gradient of the network whose ReLUs are softplus."""
    return Rules((("relu", SoftplusReLU(beta)),), otherwise=Plain())
