"""The bottleneck at a block of a transformer: tokens as positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import InputError, SiteError
from apportion.methods.subset.information_bottleneck import information
from apportion.parts.subsets import LayerStatistics

F64 = torch.float64


class Block(nn.Module):
    """What a token adds to itself; tokens are not mixed, so that it is known where the score looks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Transformer(nn.Module):
    """Patches of 4 × 4 pixels and a class token; the answer is read off the first three tokens of the grid."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.block, self.head = Block(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.block(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1))
        return 4 * self.head(tokens[:, 1:4]).mean(1)


def asked() -> tuple[Transformer, ap.Field, Tensor]:
    torch.manual_seed(0)
    model = Transformer().double()
    return model, ap.Field(model), torch.randn(40, 1, 12, 16, dtype=F64)


def test_bits_of_tokens_are_those_of_the_paper_token_by_token() -> None:
    """λ* found by the same noise, plain autograd and Adam by hand, on the tokens as they lie."""
    model, field, x = asked()
    known = LayerStatistics.fit(field, x, ap.At("block"))
    assert known.mean.shape == (13, 6)
    a = ap.InformationBottleneck(known, steps=4, copies=2)(field, x[:1], target=1, seed=3)
    assert a.values.shape == (1, 13)
    inner: list[Tensor] = []
    hook = model.block.register_forward_hook(lambda module, given, out: inner.append(out.detach()))
    model(x)
    hook.remove()
    seen = inner[0]
    mean, std = seen.mean(0), seen.std(0).clamp(min=0.01)
    r = seen[0]
    eps = field.bind(x[:1], target=1, seed=3).stream("bottleneck")
    noise = eps.normal(seen[:1], torch.zeros(8, dtype=torch.long), torch.arange(8)).unflatten(0, (4, 2))
    alpha = torch.full_like(r, 5.0).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=1.0)
    for t in range(4):
        gate = alpha.sigmoid()
        lost = 10 * information(gate, (r - mean) / std).mean()
        for e in noise[t]:
            z = gate * r + (1 - gate) * (mean + std * e)
            lost = lost - (4 * model.head(z[None, 1:4]).mean(1)).log_softmax(1)[0, 1] / 2
        (alpha.grad,) = torch.autograd.grad(lost, alpha)
        optimizer.step()
    bits = information(alpha.detach().sigmoid(), (r - mean) / std).sum(1) / math.log(2)
    torch.testing.assert_close(a.values[0], bits, rtol=1e-8, atol=1e-10)


def test_bits_lie_on_the_tokens_that_are_read_and_where_they_are_on_the_picture() -> None:
    _, field, x = asked()
    known = LayerStatistics.fit(field, x, ap.At("block"))
    settings = {"beta": 0.3, "steps": 20, "copies": 4}
    a = ap.InformationBottleneck(known, **settings)(field, 2 * x[:2], target=1)
    read, rest = a.values[:, 1:4].mean(1), torch.cat([a.values[:, :1], a.values[:, 4:]], 1).mean(1)
    assert bool((read > 3 * rest).all())
    large = ap.InformationBottleneck(known, **settings, upsample=True)(field, 2 * x[:2], target=1)
    assert large.values.shape == (2, 12, 16)
    top = large.values[:, :4, :12].mean((1, 2))
    assert bool((top > 2 * large.values[:, 8:].mean((1, 2))).all())
    torch.testing.assert_close(large.parts["bits"], a.values.sum(1))


def test_what_has_no_place_or_no_one_size_is_refused() -> None:
    x = asked()[2]
    with pytest.raises(SiteError, match=r"tokens \[B, N, K\]"):
        LayerStatistics.fit(ap.Field(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()), x, ap.At("0"))
    net = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="one size"):
        LayerStatistics.fit(ap.Field(net), [x.float(), x[..., :8].float()], ap.At("0"))
