"""Sites: reading and overriding inner tensors."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import SiteError
from apportion.core.site import Probe

DOUBLE = torch.float64


class Net(nn.Module):
    """Reuses a module, works in place, and gives tuples and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.act = nn.ReLU(inplace=True)
        self.pair = Pair()
        self.record = Record()
        self.alias = self.first

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        low, high = self.pair(y)
        out = self.record(low, high)
        return self.act(self.first(out["sum"])) + out["product"]


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x - 1, x * 2


class Record(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"sum": a + b, "product": a * b, "name": "record"}


@pytest.fixture
def net() -> Net:
    return Net().double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, dtype=DOUBLE)


def steps(net: Net, x: Tensor) -> dict[str, Tensor]:
    s = {"linear": net.first(x)}
    s["relu"] = F.relu(s["linear"])
    s["low"], s["high"] = s["relu"] - 1, s["relu"] * 2
    s["sum"], s["product"] = s["low"] + s["high"], s["low"] * s["high"]
    s["again"] = net.first(s["sum"])
    s["out"] = F.relu(s["again"]) + s["product"]
    return {k: v.detach() for k, v in s.items()}


SITES: list[tuple[ap.Site, str]] = [
    (ap.At("first", 0), "linear"),  # the in-place ReLU after it must not be seen
    (ap.At("first", 1), "again"),
    (ap.At("alias", 1), "again"),
    (ap.At("act", 0), "relu"),
    (ap.At("act", 0, end="input"), "linear"),
    (ap.At("pair", index=0), "low"),
    (ap.At("pair", index=1), "high"),
    (ap.At("pair", end="input"), "relu"),
    (ap.At("record", index="sum"), "sum"),
    (ap.At("record", index="product"), "product"),
    (ap.At("record", end="input"), "low"),
    (ap.At("record", end="input", index=1), "high"),
    (ap.At("first", 1, end="input"), "sum"),
    (ap.At(""), "out"),
    (ap.AtOp("linear", 0), "linear"),
    (ap.AtOp("relu", 0), "relu"),
]


@pytest.mark.parametrize(("site", "name"), SITES, ids=str)
def test_read(net: Net, x: Tensor, site: ap.Site, name: str) -> None:
    want = steps(net, x)
    with Probe(net, read=[site]) as probe:
        out = net(x)
    assert torch.equal(probe.values[site], want[name])
    assert torch.equal(out, want["out"])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(("site", "name"), SITES, ids=str)
def test_override(net: Net, x: Tensor, site: ap.Site, name: str) -> None:
    """Overriding with what was there changes nothing; with something else, what follows."""
    want = steps(net, x)
    with Probe(net, override={site: want[name]}):
        assert torch.equal(net(x), want["out"])
    held = want[name] + 1
    before = held.clone()
    with Probe(net, read=[site], override={site: held}) as probe:
        changed = net(x)
    assert torch.equal(probe.values[site], held)
    assert not torch.equal(changed, want["out"])
    assert torch.equal(held, before)  # in-place steps after it work on a copy


@pytest.mark.parametrize(("site", "name"), SITES, ids=str)
def test_gradient_at_a_site(net: Net, x: Tensor, site: ap.Site, name: str) -> None:
    """Against finite differences of overriding."""
    q = ap.Field(net, lambda z: (z**2).sum(1)).bind(x)
    _, taps = q.tap(x, torch.arange(4), [site])
    grad = taps[site].grad
    assert grad is not None
    assert torch.equal(taps[site].value, steps(net, x)[name])
    direction, h = torch.randn_like(grad), 1e-6

    def at(t: float) -> Tensor:
        with Probe(net, override={site: taps[site].value + t * direction}):
            return (net(x) ** 2).sum(1).detach()

    assert torch.allclose((at(h) - at(-h)) / (2 * h), (grad * direction).sum(1), atol=1e-6)


def test_resuming_from_a_site_equals_the_whole(net: Net, x: Tensor) -> None:
    whole = ap.Field(net).bind(x, target=1)
    for site, name in SITES:
        q = ap.Field(net, site=site).bind(x, target=1)
        assert torch.equal(q.x, steps(net, x)[name])
        assert torch.equal(q.value(q.x, torch.arange(4)), whole.fx)
        rows = q.x[[2, 0]]
        assert torch.equal(q.value(rows, torch.tensor([2, 0])), whole.fx[[2, 0]])


def test_several_sites_in_one_pass(net: Net, x: Tensor) -> None:
    q = ap.Field(net).bind(x, target=0)
    wanted = [site for site, _ in SITES]
    value, taps = q.tap(x, torch.arange(4), wanted, grad=False)
    assert torch.equal(value, q.fx)
    for site, name in SITES:
        assert torch.equal(taps[site].value, steps(net, x)[name])
        assert taps[site].grad is None
    cost = ap.Gradient().explain(q).cost
    assert cost.forward.tolist() == [2] * 4  # the tap and the gradient


def test_named_tuples_keep_their_type(x: Tensor) -> None:
    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.largest = Largest()

        def forward(self, x: Tensor) -> Tensor:
            return self.largest(x).values

    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.max(x, 1)

    top, site = Top(), ap.At("largest", index=0)
    with Probe(top, read=[site]) as probe:
        assert torch.equal(top(x), x.amax(1))
    assert torch.equal(probe.values[site], x.amax(1))
    with Probe(top, override={site: x[:, 0]}):
        assert torch.equal(top(x), x[:, 0])


def test_override_of_another_shape(net: Net, x: Tensor) -> None:
    with pytest.raises(SiteError, match=r"\(4, 2\)"), Probe(net, override={ap.At("pair", index=0): x[:, :2]}):
        net(x)


def test_hooks_are_removed_after_an_exception(net: Net, x: Tensor) -> None:
    site = ap.At("pair", index=0)
    with pytest.raises(ZeroDivisionError), Probe(net, read=[site]):
        raise ZeroDivisionError
    with pytest.raises(SiteError), Probe(net, read=[site, ap.At("nothing")]):
        pass
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_sites_are_listed_with_their_calls(net: Net, x: Tensor) -> None:
    found = ap.Field(net).sites(x)
    assert [(s.site, s.kind, s.shape) for s in found] == [
        (ap.At("first", 0), "Linear", (1, 3)),
        (ap.At("act", 0), "ReLU", (1, 3)),
        (ap.At("pair", 0, index=0), "Pair", (1, 3)),
        (ap.At("pair", 0, index=1), "Pair", (1, 3)),
        (ap.At("record", 0, index="sum"), "Record", (1, 3)),
        (ap.At("record", 0, index="product"), "Record", (1, 3)),
        (ap.At("first", 1), "Linear", (1, 3)),
        (ap.At("act", 1), "ReLU", (1, 3)),
    ]
    for info in found:
        ap.Field(net, site=info.site).bind(x, target=0)


def test_softmax_inside_scaled_dot_product_attention() -> None:
    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x * 2, x + 1).sum(1)

    x = torch.randn(2, 5, 4, dtype=DOUBLE)
    want = torch.softmax(x @ (2 * x).transpose(1, 2) / 2, -1)
    q = ap.Field(Attend(), site=ap.AtOp("softmax")).bind(x, target=0)
    assert torch.allclose(q.x, want, atol=1e-14)
    assert torch.allclose(q.fx, Attend()(x)[:, 0], atol=1e-13)
    even = torch.full_like(q.x, 1 / 5)
    assert torch.allclose(q.value(even, torch.arange(2)), 5 * (x[:, :, 0] + 1).mean(1), atol=1e-13)


def test_embeddings_of_integers() -> None:
    """Token ids have no gradient; their embeddings do, and a baseline may be given as tokens."""
    net = nn.Sequential(OrderedDict(words=nn.Embedding(9, 4), flat=nn.Flatten(), top=nn.Linear(12, 2))).double()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    field = ap.Field(net, site=ap.At("words"))
    a = ap.IntegratedGradients(ap.baselines.AtInput(ap.baselines.Zero()))(field, ids, target=1)
    start = net.words(torch.zeros_like(ids))  # pyright: ignore[reportCallIssue]
    want = (net.words(ids) - start) * net.top.weight[1].reshape(3, 4)  # pyright: ignore
    assert torch.allclose(a.values, want.detach(), atol=1e-13)
    assert a.gap is not None
    assert float(a.gap.abs().max()) < 1e-13
    assert torch.allclose(a.references.rows[:, 0], start.detach())  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
def test_torchscript_takes_no_hooks() -> None:
    x, net = torch.zeros(2, 1, 4, 4), nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    for model in (torch.jit.script(net), torch.jit.trace(net, x)):
        for ask in (ap.GradCAM(), ap.GradCAM(ap.At("0"))):
            with pytest.raises(SiteError, match="TorchScript"):
                ask(ap.Field(model), x, target=0)
        with pytest.raises(SiteError, match="TorchScript"):
            ap.Field(model).sites(x)
