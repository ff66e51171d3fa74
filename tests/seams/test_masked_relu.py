"""ReLUs written with masks, indices and maxima: they follow the rule of the ReLU or are refused, never passed over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import RuleError
from apportion.parts.rules import Plain, Rules

ZERO = torch.zeros((), dtype=torch.float64)
ROW = torch.zeros(8, dtype=torch.float64)


def by_index(h: Tensor) -> Tensor:
    order = h.argsort(-1, descending=True)
    return h.gather(-1, order)[:, :4]


def in_place_mask(h: Tensor) -> Tensor:
    mask = torch.ones_like(h)
    mask.view(-1)[(h < 0).view(-1)] = 0
    return h * mask


def filled(h: Tensor) -> Tensor:
    mask = torch.ones_like(h)
    mask.view(-1).masked_fill_((h < 0).view(-1), 0)
    return h * mask


def without_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        mask = (h > 0).to(h)
    return h * mask


def overwritten_without_grad(h: Tensor) -> Tensor:
    h = h.clone()
    with torch.no_grad():
        h.clamp_(min=0)
    return h


def overwritten_by_function(h: Tensor) -> Tensor:
    h = h.clone()
    with torch.no_grad():
        F.relu(h, inplace=True)
    return h


AS_RELU: dict[str, Callable[[Tensor], Tensor]] = {
    "maximum of a number": lambda h: torch.maximum(h, ZERO),
    "maximum on the left": lambda h: torch.maximum(ROW, h),
    "maximum of zeros like it": lambda h: torch.maximum(h, torch.zeros_like(h)),
    "max": lambda h: torch.max(h, ROW),
    "max by name": lambda h: torch.max(h, other=h.new_zeros(h.shape)),
    "method max": lambda h: h.max(ROW),
    "fmax": lambda h: torch.fmax(h, ROW),
    "threshold": lambda h: F.threshold(h, 0, 0),
    "clip": lambda h: h.clip(0),
    "times a comparison": lambda h: h * (h > 0),
    "times a float mask": lambda h: h * (h > 0).to(h),
    "times a detached copy's": lambda h: h * (h.detach() > 0),
    "where": lambda h: torch.where(h > 0, h, 0),
    "where with zeros": lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
    "masked_fill": lambda h: h.masked_fill(h < 0, 0),
    "mask made without grad": without_grad,
    "greater or equal": lambda h: h * (h >= 0),
    "zero where negative": lambda h: torch.where(h <= 0, 0.0, h),
    "method where": lambda h: h.where(h > 0, 0.0),
    "its own in place": lambda h: (g := h.clone()).mul_(g > 0),
    "masked_fill_": lambda h: (g := h.clone()).masked_fill_(g < 0, 0),
    "amax of a stack": lambda h: torch.stack([h, torch.zeros_like(h)]).amax(0),
    "max of a stack": lambda h: torch.stack([h.new_zeros(h.shape), h], -1).max(-1).values,
    "minimum": lambda h: -torch.minimum(-h, ZERO),
}
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "times its data's": lambda h: h * (h.data > 0),
    "times its own in place": lambda h: h.clone().mul_(h > 0),
    "masked_fill_ by another's": lambda h: h.clone().masked_fill_(h < 0, 0),
    "where of a copy": lambda h: torch.where(h > 0, h.clone(), 0.0),
    "mask of what was then changed": lambda h: (g := h.clone(), m := g > 0, g.sub_(1), g * m)[-1],
    "mask that was then changed": lambda h: (m := h > 0, m.logical_not_(), h * m)[-1],
    "where not": lambda h: torch.where(h > 0, 0.0, h),
    "times not": lambda h: h * (h < 0),
    "a step at 1": lambda h: h * (h > 1),
    "leaky": lambda h: torch.where(h > 0, h, 0.1 * h),
    "gather": by_index,
    "getitem": lambda h: h[torch.arange(len(h))[:, None], h.topk(4, -1).indices],
    "argmax": lambda h: h.gather(-1, h.argmax(-1, keepdim=True)),
    "mask filled in place": in_place_mask,
    "mask filled by a method": filled,
    "einsum": lambda h: torch.einsum("bi,bi->bi", h, (h > 0).to(h)),
    "quotient": lambda h: h / (1 + 1e9 * (h.detach() < 0)),
    "added": lambda h: h - h.detach().clamp(max=0),
    "sign": lambda h: h * ((h.sign() + 1) / 2),
    "overwritten without grad": overwritten_without_grad,
    "overwritten by a function": overwritten_by_function,
    "maximum of two": lambda h: torch.maximum(h, -h),
    "maximum of another number": lambda h: torch.maximum(h, ROW + 0.1),
    "maximum of a detached copy": lambda h: torch.maximum(h, 0 * h.detach()),
}


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(width, 8), nn.Linear(8, 3)
        self.act = act
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.act(self.a(x))).relu())


def width(act: Callable[[Tensor], Tensor]) -> int:
    return act(torch.randn(2, 8, dtype=torch.float64)).shape[1]


def points() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sent(net: nn.Module, rules: Rules, reference: Tensor | None = None, **options: Any) -> Any:
    x = points()
    return ap.Field(net).bind(x, target=1).backward(x, torch.arange(5), rules, reference, **options)


def guided_by_hand(net: Net) -> Tensor:
    x = points()
    first = net.a(x)
    second = net.b(first.relu())
    s = net.c.weight[1].expand(5, 8).clamp(min=0) * (second > 0)
    return ((s @ net.b.weight).clamp(min=0) * (first > 0)) @ net.a.weight


@pytest.mark.parametrize("name", AS_RELU)
@pytest.mark.parametrize("record", [False, True])
def test_guided_as_by_hand(name: str, record: bool) -> None:
    net = Net(AS_RELU[name])
    got = sent(net, ap.rules.guided_backprop(), record=record).signal
    torch.testing.assert_close(got, guided_by_hand(net).detach(), rtol=1e-13, atol=1e-15)
    x = points()
    plain = ap.Field(net).bind(x, target=1).value_and_grad(x, torch.arange(5))[1]
    assert (got - plain).abs().max() > 1e-2  # the two can be told apart


@pytest.mark.parametrize("name", AS_RELU)
def test_deep_lift_complete(name: str) -> None:
    done = sent(Net(AS_RELU[name]), ap.rules.deep_lift_rescale(), points().flip(0))
    assert (done.relevance.sum(1) - done.value + done.reference_value).abs().max() <= 1e-12


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("make", ["guided_backprop", "deconvnet", "deep_lift_rescale", "epsilon"])
def test_refused(name: str, make: str) -> None:
    net = Net(REFUSED[name], width(REFUSED[name]))
    if name.startswith("maximum") and make == "epsilon":
        return  # there a maximum passes on to the winner, as a ReLU does
    if name in ("sign", "maximum of two", "maximum of another number") and make == "deep_lift_rescale":
        done = sent(net, ap.rules.deep_lift_rescale(), points().flip(0))
        assert (done.relevance.sum(1) - done.value + done.reference_value).abs().max() <= 1e-12
        return
    with pytest.raises(RuleError, match=r"depends on the input|has no rule"):
        sent(net, getattr(ap.rules, make)(), points().flip(0) if make == "deep_lift_rescale" else None)


@pytest.mark.parametrize(
    "act",
    [
        lambda h: torch.maximum(h, 2 * h.detach()),
        lambda h: h / (1 + h.detach().abs()),
    ],
)
def test_deep_lift_refuses_constants_that_differ_at_the_reference(act: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuleError, match="depends on the input"):
        sent(Net(act), ap.rules.deep_lift_rescale(), points().flip(0))


def test_the_refusal_names_operation_and_cause() -> None:
    with pytest.raises(RuleError, match=r"where in the top module \(Net\) takes a mask, index or factor that depends"):
        sent(Net(REFUSED["leaky"]), ap.rules.guided_backprop())


@pytest.mark.parametrize("name", [n for n in REFUSED if "overwritten" not in n])
@pytest.mark.parametrize("record", [False, True])
def test_otherwise_takes_the_derivative(name: str, record: bool) -> None:
    net = Net(REFUSED[name], width(REFUSED[name]))
    if record and "in place" in name:
        return
    x = points()
    plain = ap.Field(net).bind(x, target=1).value_and_grad(x, torch.arange(5))[1]
    for rules in (ap.rules.gradient(), Rules((("where", Plain()), ("mul", Plain())), otherwise=Plain())):
        torch.testing.assert_close(sent(net, rules, record=record).signal, plain)


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach aside": lambda h: (h.detach(), h.relu())[1],
    "argmax aside": lambda h: (h.argmax(-1), h.sum(-1).detach() > 0, h.relu())[2],
    "shape and size": lambda h: h.relu().view(h.shape[0], h.size(1)) * h.shape[1],
    "constant mask": lambda h: h.relu() * torch.ones(8, dtype=torch.bool).to(h),
    "mask brought to its type": lambda h: h.relu() * torch.ones(8).type_as(h).expand_as(h),
    "mask of zeros like it": lambda h: h.relu() + torch.zeros_like(h) * h.new_ones(1) + torch.full_like(h, 0.0),
    "type of a detached copy": lambda h: h.relu().type_as(h.detach()).view_as(h.detach()),
    "constant index": lambda h: h.relu().gather(1, torch.arange(8).expand(len(h), 8)),
    "statistics without grad": lambda h: (without_grad_statistics(h), h.relu())[1],
}


def without_grad_statistics(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.std() + h.softmax(-1).sum()


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("differentiable", [False, True])
def test_what_does_not_mask_is_not_refused(name: str, differentiable: bool) -> None:
    net = Net(HARMLESS[name])
    done = sent(net, ap.rules.deep_lift_rescale(), points().flip(0), differentiable=differentiable)
    assert (done.relevance.sum(1) - done.value + done.reference_value).abs().max() <= 1e-11
    sent(net, ap.rules.guided_backprop(), differentiable=differentiable)


def test_constant_attention_mask_and_batch_norm() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mask = nn.BatchNorm1d(6), torch.ones(6, 6, dtype=torch.bool).tril()

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)[:, :, None]
            return F.scaled_dot_product_attention(h, h, h, attn_mask=self.mask.to(h.device)).flatten(1)

    done = sent(Attends().double().eval(), ap.rules.deep_lift_rescale(), points().flip(0))
    assert (done.relevance.sum(1) - done.value + done.reference_value).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["grid_sample", "batch_norm"])
def test_what_is_affine_in_the_first_only(name: str) -> None:
    def forward(x: Tensor) -> Tensor:
        if name == "batch_norm":
            return F.batch_norm(x, torch.zeros(6).to(x), torch.ones(6).to(x), weight=x[0])
        picture = x[:, None, :4].reshape(-1, 1, 2, 2)
        return F.grid_sample(picture, x[:, None, None, 4:], align_corners=True).flatten(1).repeat(1, 2)

    with pytest.raises(ap.ApportionError, match=f"{name} .*has no rule|batch"):
        sent(forward, ap.rules.deep_lift_rescale(), points().flip(0))  # pyright: ignore[reportArgumentType]


def test_vmap_is_refused_by_name() -> None:
    net = Net(torch.relu)
    for rules in (ap.rules.guided_backprop(), ap.rules.gradient()):
        with pytest.raises(RuleError, match="rules cannot see into vmap"):
            sent(torch.vmap(net), rules)  # pyright: ignore[reportArgumentType]


def test_vmap_of_constants_is_not() -> None:
    net = Net(torch.relu)

    def forward(x: Tensor) -> Tensor:
        return net(x) * torch.vmap(lambda i: i + 1)(torch.arange(3))

    sent(forward, ap.rules.guided_backprop())  # pyright: ignore[reportArgumentType]
