"""Mean and standard deviation of every unit of a layer, over data in batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.core import tree
from apportion.core.config import Configurable, from_config, to_config
from apportion.core.errors import ConfigError, InputError, SiteError, kind_of
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.site import Site
from apportion.core.tree import Tree
from apportion.core.write import read_tensors, write_tensors
from apportion.parts.batches import batches, is_labelled
from apportion.parts.feature_maps import named
from apportion.parts.grids import input_size
from apportion.parts.subsets.explained import whole_output
from apportion.parts.subsets.pictures import map_layers


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class LayerStatistics(Configurable):
    """What a layer of pictures usually holds, from `LayerStatistics.fit`.

    Attributes:
        layer: where.
        mean: of each unit, [K, h, w], or [N, K] of tokens.
        std: likewise, with n - 1.
        active: in which share of the examples the unit is not 0.
        examples: how many there were.
    """

    layer: Site
    mean: Tensor
    std: Tensor
    active: Tensor
    examples: int

    @classmethod
    @torch.inference_mode(False)
    def fit(cls, field: Field, data: Tree | Iterable[Tree], layer: Site | nn.Module | str = "auto") -> LayerStatistics:
        """Go over data once, one forward pass for each example, and merge the moments of batches in float64.

        Args:
            field: the model; the score does not matter.
            data: examples; or a list or iterator of batches, of which one is in memory at a time. Labels beside them
                are passed over.
            layer: a site, a module, or "auto" for the last layer that everything passes and whose maps have at least
                an eighth of the picture's rows. Besides maps [B, K, h, w] a layer named here may hold tokens,
                [B, N, K], as the blocks of a transformer do.

        Raises:
            ConfigError: a model that is not in a field, or a layer that is none of these.
            InputError: fewer than two examples, or of several sizes.
            SiteError: a layer that is neither, or no layer [B, K, h, w] that everything passes to choose.

        >>> import apportion as ap
        >>> net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(4, 2))
        >>> x = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
        >>> s = LayerStatistics.fit(ap.Field(net), x, ap.At("0"))
        >>> s.mean[0, 0].tolist(), round(float(s.std[0, 0, 0]), 4)
        ([2.0, 2.0], 1.4142)
        """
        if not isinstance(field, Field):
            raise ConfigError(
                f"LayerStatistics.fit of {kind_of(field)}", "a field", "write LayerStatistics.fit(ap.Field(model), x)"
            )
        asked = Field(
            field.model,
            whole_output,
            extra=field.extra,
            bounds=field.bounds,
            normalize=field.normalize,
            precision=field.precision,
            batch_size="auto" if field.is_automatic else field.chunk,
        )
        site: Site | None = None
        moments: _Moments | None = None
        dtype = torch.float32
        for batch in batches(data, "LayerStatistics.fit(field, x)"):
            q = asked.bind(batch[0] if is_labelled(batch) else batch)
            site = _place(q, layer) if site is None else site
            for part in torch.arange(len(q), device=q.device).split(q.field.chunk):
                value = q.tap(tree.index(q.x, part), part, [site], grad=False)[1][site].value
                if value.ndim not in (3, 4):
                    raise SiteError(
                        f"{site} has shape {tuple(value.shape)}",
                        "[B, K, h, w] or tokens [B, N, K]",
                        "choose a convolutional layer, or a block of a transformer",
                    )
                if moments is not None and value.shape[1:] != moments.mean.shape:
                    raise InputError(
                        f"{site} of shape {tuple(value.shape[1:])} after {tuple(moments.mean.shape)}",
                        "examples of one size, whose units are the same",
                        "bring them to one size first",
                    )
                dtype, more = value.dtype, _Moments.of(value.double())
                moments = more if moments is None else moments.joined(more)
        if moments is None or moments.count < 2 or site is None:
            count = 0 if moments is None else moments.count
            raise InputError(f"{count} example(s)", "at least two, better thousands", "give more of the data")
        std = (moments.squares / (moments.count - 1)).sqrt()
        share = moments.active / moments.count
        return cls(site, moments.mean.to(dtype), std.to(dtype), share.to(dtype), moments.count)

    def save(self, path: str | Path) -> None:
        """Keep them as one safetensors file.

        Raises:
            OutputError: it cannot be written there.
        """
        record = {"version": 1, "layer": to_config(self.layer), "examples": self.examples}
        write_tensors(path, {n: getattr(self, n) for n in ("mean", "std", "active")}, {"layer statistics": record})

    @classmethod
    def load(cls, path: str | Path) -> LayerStatistics:
        """Read what `save` wrote; nothing in it is executed.

        Raises:
            ConfigError: it is not such a file.
        """
        record, tensors = read_tensors(path, "layer statistics", "LayerStatistics.save")
        return cls(from_config(record["layer"]), **tensors, examples=record["examples"])


@dataclass
class _Moments:
    """Count, mean and sum of squared differences from it; and how often a unit is not 0."""

    count: int
    mean: Float[Tensor, "*unit"]
    squares: Float[Tensor, "*unit"]
    active: Float[Tensor, "*unit"]

    @classmethod
    def of(cls, x: Float[Tensor, "R *unit"]) -> _Moments:
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).square().sum(0), (x != 0).sum(0).double())

    def joined(self, other: _Moments) -> _Moments:
        """Merge two sets of examples (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart.square() * (self.count * other.count / count)
        return _Moments(count, self.mean + apart * (other.count / count), squares, self.active + other.active)


def _place(q: Question, layer: Any) -> Site:
    if isinstance(layer, Site):
        return layer
    if isinstance(layer, nn.Module):
        return named(q, layer)
    if layer != "auto":
        name = layer if isinstance(layer, str) else "2"
        raise ConfigError(f"layer={layer!r}", 'a site, a module of the model, or "auto"', f"write ap.At({name!r})")
    size = input_size(q)
    maps = map_layers(q)
    least = 0 if size is None else min(size) / 8
    fine = [s for s in maps if min(s.shape[2:]) >= least] or maps
    for info in reversed(fine):
        if q.is_passed_by_all(info.site):
            return info.site
    raise SiteError(
        "no layer of shape [B, K, h, w] that everything passes on its way to the score",
        "a layer without a way around it",
        "name one, layer=ap.At(...): what goes around it is not held back",
    )
