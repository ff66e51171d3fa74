"""A network that draws masks from what a classifier sees, and its training; Dabkowski and Gal 2017."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.core.config import Configurable, from_config, to_config
from apportion.core.errors import ConfigError, InputError, SiteError
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.score import Logit, main_output, pick
from apportion.core.site import Site
from apportion.core.tree import Tree
from apportion.core.write import read_tensors, write_tensors
from apportion.parts.baselines.simple import blur
from apportion.parts.batches import as_integers, batches, is_labelled
from apportion.parts.subsets.explained import same_field, whole_output
from apportion.parts.subsets.pictures import map_layers, pictures
from apportion.parts.subsets.trainer import Trainer, network

_ANEW = "train another with ap.subsets.Masker.fit(field, data)"


@dataclass(frozen=True)
class Margin(Logit):
    """z_c - max over the other classes; Carlini and Wagner 2017.

    >>> Margin()(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0]]))
    tensor([1.])
    """

    def _of_class(self, z: Tensor, target: Tensor) -> Tensor:
        others = z.scatter(1, target, -torch.inf)
        return pick(z, target) - others.amax(1)


@dataclass(frozen=True)
class Backgrounds(Configurable):
    """What stands where the mask is 0 in training: one random color with noise, or now and then the blurred picture.

    Attributes:
        noise: standard deviation, as a share of half the pictures' range.
        color: the farthest a color is from the middle of the range, as such a share.
        blurred: how often the picture itself, blurred.
        sigma: of that blur, in pixels.
    """

    _not_negative = ("noise", "color", "blurred")
    _positive = ("sigma",)

    noise: float = 0.11
    color: float = 0.66
    blurred: float = 0.5
    sigma: float = 11.0

    def __call__(self, x: Float[Tensor, "B C H W"], generator: torch.Generator) -> Float[Tensor, "B C H W"]:
        """Draw one for each picture."""
        low, high = x.aminmax()
        half, middle = (high - low) / 2, (high + low) / 2

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64).to(x)

        color = middle + half * self.color * (2 * uniform(len(x), x.shape[1], 1, 1) - 1)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        flat = color + half * self.noise * noise
        return torch.where(uniform(len(x), 1, 1, 1) < self.blurred, blur(x, self.sigma), flat)


@dataclass(frozen=True)
class MaskerTraining(Configurable):
    """How a `Masker` is trained: what the loss weighs, as the authors' script has it, and the steps.

    The loss is destroyed + `preserve` · preserved + `area` · mean (m + .0005)^`power` + `smooth` · Σ|∇m|²/2 + whether
    the class is there; the first two are max(0, κ - margin) and the like, for the picture without and within the mask.

    Attributes:
        area: weight of the mask's area.
        power: of the mask in it; below 1 it prefers masks of ones and zeros.
        smooth: weight of the mask's roughness.
        preserve: weight of what is seen within the mask.
        kept: κ, by how much the class is to win within it.
        gone: κ, by how much it is to lose without.
        fake: how often a picture is shown with a class it does not have; the mask is then to be empty.
        backgrounds: what stands where the mask is 0.
        scales: the finest layers used, from the coarsest up.
        width: channels of the masking network.
        trainer: the training itself; the authors take 3,000 steps of 64 pictures after 8,500 for the class selector.
    """

    _positive = ("power", "scales", "width")
    _not_negative = ("area", "smooth", "preserve", "kept", "gone", "fake")

    area: float = 8.0
    power: float = 0.3
    smooth: float = 0.005
    preserve: float = 0.3
    kept: float = 1.0
    gone: float = 5.0
    fake: float = 0.3
    backgrounds: Backgrounds = Backgrounds()
    scales: int = 4
    width: int = 32
    trainer: Trainer = Trainer(epochs=5, batch=64)


class MaskNetwork(nn.Module):
    """From the coarsest maps, filtered by the class, up to the finest, joined by skips; mask = |a| / (|a| + |b|)."""

    def __init__(self, channels: tuple[int, ...], classes: int, width: int) -> None:
        """Build it.

        Args:
            channels: of the classifier's layers, from fine to coarse.
            classes: how many there are.
            width: its own channels.
        """
        super().__init__()
        self.select = nn.Embedding(classes, channels[-1])
        now, up = channels[-1], []
        for skip in reversed(channels[:-1]):
            up.append(nn.Conv2d(now + skip, width, 3, padding=1))
            now = width
        self.up, self.out = nn.ModuleList(up), nn.Conv2d(now, 2, 1)

    def forward(self, maps: list[Tensor], target: Int[Tensor, " R"]) -> tuple[Float[Tensor, "R 1 h w"], Tensor]:
        """Draw masks, and say how sure the class is there, in log-odds."""
        now = maps[-1]
        found = (now * self.select(target)[:, :, None, None]).sum(1, keepdim=True)
        now = now * found.sigmoid()
        for conv, skip in zip(self.up, reversed(maps[:-1]), strict=True):
            now = conv(torch.cat([F.interpolate(now, skip.shape[2:]), skip], 1)).relu()
        a, b = self.out(now).abs().unbind(1)
        total = a + b
        mask = torch.where(total == 0, torch.full_like(a, 0.5), a / torch.where(total == 0, torch.ones_like(a), total))
        return mask[:, None], found.mean((1, 2, 3))


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Masker(Configurable):
    """A trained masking network, from `Masker.fit`.

    Attributes:
        weights: of the network.
        layers: the classifier's, from fine to coarse.
        sizes: by which each layer is divided.
        channels: of each layer.
        classes: of the classifier.
        width: of the network.
    """

    weights: dict[str, Tensor]
    layers: tuple[Site, ...]
    sizes: tuple[float, ...]
    channels: tuple[int, ...]
    classes: int
    width: int

    @classmethod
    @torch.inference_mode(False)
    def fit(cls, field: Field, data: Tree | Iterable[Tree], training: MaskerTraining | None = None) -> Masker:
        """Train a masker for a classifier, which stays as it is: four passes forward and two back a picture and step.

        Args:
            field: the classifier; the score does not matter.
            data: pictures; or a list or loader of batches. Labels beside them are the classes; else the top class is.
            training: how.

        Raises:
            ConfigError: a model with fewer than two classes.
            SiteError: a model without layers of shape [B, K, h, w].
        """
        how = MaskerTraining() if training is None else training
        asked = same_field(field, "Masker.fit", Logit())
        given = batches(data, "Masker.fit(field, x)")
        first = next(iter(given), None)
        if first is None:
            raise InputError("Masker.fit without data", "at least one batch", "give pictures")
        q = asked.bind(first[0] if is_labelled(first) else first)
        x = pictures(q, "a masker")
        told = main_output(q.outputs(x[:1], torch.zeros(1, dtype=torch.long, device=x.device)))
        if told.ndim != 2 or told.shape[1] < 2:
            raise ConfigError(f"outputs of shape {tuple(told.shape)}", "[B, classes]", "masks are drawn for classes")
        layers = _scales(q, how.scales)
        maps = _maps(q, layers)
        sizes = tuple(max(float(m.square().mean().sqrt()), 1e-12) for m in maps)
        channels, classes = tuple(m.shape[1] for m in maps), told.shape[1]

        def loss(net: Any, batch: Any, generator: torch.Generator) -> Tensor:
            labelled = is_labelled(batch)
            target = as_integers(batch[1]) if labelled else None
            return _loss(net, asked.bind(batch[0] if labelled else batch, target=target), how, layers, sizes, generator)

        rows = data if isinstance(data, Tensor) else given
        weights = how.trainer.run(lambda: MaskNetwork(channels, classes, how.width), rows, loss, "a masker", like=x)
        return cls(weights, layers, sizes, channels, classes, how.width)

    def __call__(self, q: Question, target: Int[Tensor, " B"]) -> Float[Tensor, "B 1 h w"]:
        """Draw a mask of each example for a class; one row forward.

        Raises:
            ConfigError: a classifier with other classes, or layers with other channels, than it was trained for.
        """

        def classes(outputs: Any) -> Tensor:
            given = tuple(main_output(outputs).shape[1:])
            if given != (self.classes,):
                raise ConfigError(
                    f"outputs [B, {', '.join(map(str, given))}]", f"[B, {self.classes}], as the masker was trained for",
                    _ANEW,
                )  # fmt: skip
            return whole_output(outputs)

        found = _maps(q, self.layers, classes)
        channels = tuple(m.shape[1] if m.ndim == 4 else 0 for m in found)
        if channels != self.channels:
            raise ConfigError(
                f"layers of {channels} channels", f"{self.channels}, as the masker was trained for", _ANEW
            )
        maps = [m / s for m, s in zip(found, self.sizes, strict=True)]
        net = network(lambda: MaskNetwork(self.channels, self.classes, self.width))
        with torch.no_grad():
            return net({k: w.to(maps[0]) for k, w in self.weights.items()}, maps, target)[0]

    def save(self, path: str | Path) -> None:
        """Put weights and layers into a safetensors file.

        Raises:
            OutputError: there is no room, or no such place.
        """
        record = {"layers": [to_config(s) for s in self.layers]}
        record |= {n: getattr(self, n) for n in ("sizes", "channels", "classes", "width")}
        write_tensors(path, self.weights, {"masker": record})

    @classmethod
    def load(cls, path: str | Path) -> Masker:
        """Get a masker back.

        Raises:
            ConfigError: what is there is no masker.
        """
        record, weights = read_tensors(path, "masker", "Masker.save")
        layers = tuple(from_config(s) for s in record["layers"])
        sizes, channels = (tuple(record[n]) for n in ("sizes", "channels"))
        return cls(weights, layers, sizes, channels, record["classes"], record["width"])


def _scales(q: Question, count: int) -> tuple[Site, ...]:
    """Choose the last layer of each size, from fine to coarse, the coarsest few."""
    last: dict[tuple[int, ...], Site] = {}
    for s in map_layers(q):
        last[s.shape[2:]] = s.site
    if not last:
        raise SiteError(
            "a model without layers of shape [B, K, h, w]", "a convolutional network", "take another method"
        )
    order = sorted(last, key=lambda size: -size[0] * size[1])
    return tuple(last[size] for size in order[-count:])


def _maps(q: Question, layers: tuple[Site, ...], score: Any = None) -> list[Tensor]:
    _, taps = q.tap(q.x, torch.arange(len(q), device=q.device), layers, grad=False, score=score)
    return [taps[s].value for s in layers]


def _loss(
    net: Any,
    q: Question,
    how: MaskerTraining,
    layers: tuple[Site, ...],
    sizes: tuple[float, ...],
    generator: torch.Generator,
) -> Tensor:
    """Give the loss of a batch; its gradient goes through the classifier by the chain rule."""
    x, count = pictures(q, "a masker"), len(q)
    own = q.target
    assert isinstance(own, Tensor)  # a class each
    owner = torch.arange(count, device=x.device)
    classes = int(main_output(q.outputs(x[:1], owner[:1])).shape[1])
    real = torch.rand(count, generator=generator, dtype=torch.float64).to(x.device) >= how.fake
    other = (own[:, 0] + torch.randint(1, classes, (count,), generator=generator).to(x.device)) % classes
    maps = [m / s for m, s in zip(_maps(q, layers), sizes, strict=True)]
    small, there = net(maps, torch.where(real, own[:, 0], other))
    mask = F.interpolate(small, x.shape[2:], mode="bilinear", align_corners=False)
    behind = how.backgrounds(x, generator)
    rows = torch.cat([mask * x + (1 - mask) * behind, (1 - mask) * x + mask * behind])
    margin, slope = q.value_and_grad(rows, owner.repeat(2), Margin())
    wins = torch.where(real, 1.0, -1.0).to(x.dtype)  # within the mask of a class that is there, its class should win
    sign = torch.cat([wins, -wins])
    least = torch.cat([x.new_full((count,), how.kept), torch.where(real, how.gone, 1.0).to(x.dtype)])
    weight = torch.cat([x.new_full((count,), how.preserve), x.new_ones(count)]) / count
    short = (least - sign * margin).clamp(min=0)
    pull = -sign * (short > 0) * weight
    through = (rows * (pull[:, None, None, None] * slope)).sum()
    missed = (short * weight).sum()
    rough = sum(mask.diff(dim=axis).square().sum() for axis in (2, 3)) / (2 * count)
    is_there = F.binary_cross_entropy_with_logits(there, real.to(x.dtype))
    area = (mask + 5e-4).pow(how.power).mean()
    return through + (missed - through).detach() + how.area * area + how.smooth * rough + is_there
