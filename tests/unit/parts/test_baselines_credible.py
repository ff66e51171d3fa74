"""Credible baselines: δ away in every element, near in logits, and no farther than they started."""

import json

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core import tree
from apportion.core.config import from_config, to_config
from apportion.core.errors import BaselineError, ConfigError
from apportion.parts.baselines import Blurred, Constant, Credible, Several

DOUBLE = torch.float64


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 5)
    )
    return net.double().eval()


def pictures(count: int = 6) -> Tensor:
    torch.manual_seed(2)
    x = torch.rand(count, 3, 6, 6, dtype=DOUBLE)
    x[0] = 0.4  # constant: a blur of it is itself
    x[1] = x[1].round()  # at both ends of the range
    return x


def linear(x: Tensor) -> Tensor:
    return torch.stack([x.sum(1), 0 * x[:, 0]], 1)


def pushed(x: Tensor, init: Tensor, base: Credible) -> Tensor:
    """Write the start down once more, one element after another."""
    out = init.clone().flatten()
    for i, (a, p) in enumerate(zip(x.flatten().tolist(), init.flatten().tolist(), strict=True)):
        p = min(max(p, 0.0), 1.0)
        if abs(p - a) < base.delta - 1e-12:
            sign = 1 if p >= a else -1
            if 0 <= a + sign * base.delta <= 1:
                p = min(max(p + sign * base.delta, 0.0), 1.0) if base.push == "by" else a + sign * base.delta
            else:
                p = a - sign * base.delta
        out[i] = p
    return out.reshape(x.shape)


@pytest.mark.parametrize("descend", ["cross_entropy", "distance"])
@pytest.mark.parametrize("push", ["by", "to"])
def test_what_holds_for_every_baseline(descend, push) -> None:
    net, x = network(), pictures()
    base = Credible(Several((Blurred(1.0), Blurred(3.0))), eps=0.02, max_iter=30, descend=descend, push=push)
    field = ap.Field(net, bounds=(0, 1))
    q = field.bind(x)
    rows = base(q)
    assert rows.shape == (6, 2, 3, 6, 6)
    assert base.draws == 2
    assert bool(((rows >= 0) & (rows <= 1)).all())
    assert float((rows - x[:, None]).abs().min()) >= base.delta - 1e-12
    z = net(x).detach()
    far = (net(rows.flatten(0, 1)).detach().unflatten(0, (6, 2)) - z[:, None]).norm(dim=2)
    start = base.init(q)
    for i in range(6):
        for k in range(2):
            first = net(pushed(x[i], start[i, k], base)[None]).detach()
            assert float(far[i, k]) <= float((first - z[i]).norm()) + 1e-12
    assert torch.allclose(base.distance(q), far, atol=1e-12)
    if descend == "distance":  # it goes for the distance, and so comes near
        assert float(far.median()) < 0.1


def test_the_start_alone() -> None:
    """Near enough from the start: the body of the loop never runs, and δ holds all the same."""
    x = pictures()
    for push in ("by", "to"):
        base = Credible(Blurred(2.0), eps=1e6, push=push)
        q = ap.Field(network(), bounds=(0, 1)).bind(x)
        rows, start = base(q), base.init(q)
        for i in range(6):
            assert torch.allclose(rows[i, 0], pushed(x[i], start[i, 0], base), atol=1e-12)
    assert not torch.allclose(rows, start), "an unpushed blur would be wrong"


def test_constant_pictures_move() -> None:
    x = torch.tensor([0.0, 0.4, 0.99, 1.0], dtype=DOUBLE)[:, None, None, None].expand(4, 1, 5, 5)
    rows = Credible(Blurred(2.0), eps=1e6, delta=0.02)(ap.Field(lambda x: linear(x.flatten(1)), bounds=(0, 1)).bind(x))
    want = torch.tensor([0.02, 0.42, 0.97, 0.98], dtype=DOUBLE)
    assert torch.allclose(rows[:, 0], want[:, None, None, None].expand_as(x), atol=1e-12)


def test_clipping_does_not_undo_the_push() -> None:
    """x = .999 and a start of 1: pushed away upwards and clipped, it would stay at .001."""
    x = torch.tensor([[0.999, 0.001, 0.5]], dtype=DOUBLE)
    start = ap.baselines.Given(torch.tensor([[1.0, 0.0, 0.5]], dtype=DOUBLE))
    for eps in (1e6, 1e-9):
        base = Credible(start, eps=eps, delta=0.02, eta=0.001, max_iter=5)
        rows = base(ap.Field(linear, bounds=(0, 1)).bind(x, target=0))
        assert float((rows[0] - x).abs().min()) >= 0.02 - 1e-12
    rows = Credible(start, eps=1e6, delta=0.02)(ap.Field(linear, bounds=(0, 1)).bind(x, target=0))
    assert torch.allclose(rows[0, 0], torch.tensor([0.979, 0.021, 0.52], dtype=DOUBLE), atol=1e-12)


def test_steps_follow_the_sign_of_the_loss_by_hand() -> None:
    """Logits (s, 0) with s the sum: the loss of the top class 0 falls upwards, so all elements step by +η."""
    x = torch.tensor([[0.6, 0.5]], dtype=DOUBLE)
    q = ap.Field(linear, bounds=(0, 1)).bind(x, target=0)
    rows = Credible(Constant(0.1), eps=0.31, eta=0.05, delta=0.02)(q)
    # distance 1.1 - 2 (0.1 + .05 n) is .3 at n = 6, the first at most .31
    assert torch.allclose(rows[0, 0], torch.tensor([0.4, 0.4], dtype=DOUBLE), atol=1e-12)
    other = Credible(Constant(0.1), eps=0.31, eta=0.05, delta=0.02, descend="distance")(q)
    assert torch.allclose(other, rows, atol=1e-12)
    # from above the loss still falls upwards, away from x; the distance does not
    high = Credible(Constant(0.9), eps=0.31, eta=0.05, delta=0.02, max_iter=8)
    assert torch.allclose(high(q)[0, 0], torch.tensor([0.9, 0.9], dtype=DOUBLE)), "the best point met is the start"
    down = Credible(Constant(0.9), eps=0.31, eta=0.05, delta=0.02, descend="distance")(q)
    assert torch.allclose(down[0, 0], torch.tensor([0.7, 0.7], dtype=DOUBLE), atol=1e-12)


def test_push_by_and_to() -> None:
    x = torch.tensor([[0.5, 0.5]], dtype=DOUBLE)
    start = ap.baselines.Given(torch.tensor([[0.51, 0.485]], dtype=DOUBLE))
    q = ap.Field(linear).bind(x, target=0)
    by = Credible(start, eps=1e6, delta=0.02)(q)
    to = Credible(start, eps=1e6, delta=0.02, push="to")(q)
    assert torch.allclose(by[0, 0], torch.tensor([0.53, 0.465], dtype=DOUBLE), atol=1e-12)
    assert torch.allclose(to[0, 0], torch.tensor([0.52, 0.48], dtype=DOUBLE), atol=1e-12)


def test_pushed_elements_rest() -> None:
    """Elements at δ, give or take the rounding, are not pushed again and again."""
    x = torch.rand(3, 50, dtype=torch.float32)
    base = Credible(ap.baselines.Given(x), eps=1e-6, eta=1e-9, max_iter=20)
    model = lambda x: torch.stack([x.sum(1), 0 * x[:, 0]], 1)  # noqa: E731
    rows = base(ap.Field(model, bounds=(0, 1)).bind(x, target=0))
    assert float((rows[:, 0] - x).abs().max()) < base.delta * 1.01


def test_what_does_not_converge_is_told() -> None:
    net, x = network(), pictures()
    a = ap.IntegratedGradients(Credible(Blurred(2.0), eps=1e-9, max_iter=3))(ap.Field(net, bounds=(0, 1)), x)
    (warning,) = a.warnings
    assert "6 of 6 credible baseline(s)" in warning
    assert "after 3 steps" in warning
    assert "0, 1, 2, 3, 4, 5" in warning
    assert not ap.IntegratedGradients(Credible(Blurred(2.0), eps=1e6))(ap.Field(net, bounds=(0, 1)), x).warnings


def test_batch_and_chunks_change_nothing() -> None:
    net, x = network(), pictures()
    base = Credible(Several((Blurred(1.0), ap.baselines.Noise(0.2, 0.5))), eps=0.3, max_iter=20)
    whole = base(ap.Field(net, bounds=(0, 1)).bind(x))
    assert float((whole - base(ap.Field(net, bounds=(0, 1), batch_size=5).bind(x))).abs().max()) < 1e-12
    assert float((whole - base(ap.Field(net, bounds=(0, 1)).bind(x.flip(0))).flip(0)).abs().max()) < 1e-12
    assert float((whole[4] - base(ap.Field(net, bounds=(0, 1)).bind(x[4:5]))[0]).abs().max()) < 1e-12
    assert torch.equal(whole, base(ap.Field(net, bounds=(0, 1)).bind(x)))


def test_cost_is_within_what_it_says() -> None:
    net, x = network(), pictures()
    base = Credible(Several((Blurred(1.0), Blurred(4.0))), eps=0.3, max_iter=20)
    assert (base.rows, base.backward_rows, base.exact) == (1 + 2 * 21, 40, False)
    method = ap.GradientTimesInput(base)
    a, said = method(ap.Field(net, bounds=(0, 1)), x, target=0), method.passes()
    assert not said.exact
    assert (a.cost.forward <= said.forward + said.once).all()
    assert (a.cost.backward <= said.backward + said.once_backward).all()
    assert (a.cost.backward < said.once_backward).any(), "searches that are near enough cost no more"
    assert (a.cost.at_x <= said.at_x).all()
    assert Credible(base).rows == base.rows + 1 + 2 * 101


def test_trees_and_inner_sites() -> None:
    x = {"a": torch.rand(2, 3, dtype=DOUBLE), "b": (torch.rand(2, dtype=DOUBLE),)}
    q = ap.Field(lambda a, b: linear(torch.cat([a, b[0][:, None]], 1)), bounds=(0, 1)).bind(x)
    rows = Credible(ap.baselines.Zero(), eps=0.2, eta=0.01)(q)
    assert tree.names(rows) == tree.names(x)
    net = network()
    q = ap.Field(net, site=ap.At("1"), bounds=(0, 1)).bind(pictures())
    rows = Credible(ap.baselines.AtInput(Blurred(1.0)), eps=0.5, eta=0.05)(q)
    assert float((rows - q.x[:, None]).abs().min()) >= 5 / 255 - 1e-12
    with pytest.raises(BaselineError, match=r"AtInput\(Credible\)"):
        ap.baselines.AtInput(Credible())(q)


def test_bad_input() -> None:
    with pytest.raises(BaselineError, match=r"at most half their range, 0\.5"):
        Credible(delta=0.51)(ap.Field(network(), bounds=(0, 1)).bind(pictures()))
    with pytest.raises(BaselineError, match="Credible on outputs"):
        Credible()(ap.Field(lambda x: x[:, 0], ap.Custom(lambda out: out.sum((1, 2)))).bind(pictures()))
    with pytest.raises(BaselineError, match="differentiable question"):
        Credible()(ap.Field(network()).bind(pictures().requires_grad_(), differentiable=True))
    for name in ("eps", "eta", "delta", "max_iter"):
        with pytest.raises(ConfigError, match=name):
            Credible(**{name: 0})  # pyright: ignore[reportArgumentType]


def test_one_number_is_come_near_to() -> None:
    field = ap.Field(lambda x: (x.flatten(1) * torch.linspace(-1, 2, x[0].numel()).to(x)).sum(1), bounds=(0, 1))
    q = field.bind(pictures())
    short, long = (Credible(eps=1e-6, delta=0.05, eta=0.003, max_iter=n) for n in (1, 40))
    assert float((long(q)[:, 0] - q.x).abs().min()) >= 0.05 - 1e-12
    assert bool((long.distance(q) <= short.distance(q)).all())
    assert float(long.distance(q).sum()) < 0.8 * float(short.distance(q).sum())


@pytest.mark.usefixtures("as_users_run")
def test_names_of_options() -> None:
    with pytest.raises(ConfigError, match="descend"):
        Credible(descend="loss")  # pyright: ignore[reportArgumentType]


def test_configuration_comes_back() -> None:
    base = Credible(Several((Blurred(1.0), Blurred(2.0))), eps=0.3, eta=0.01, delta=0.03, push="to")
    again = from_config(json.loads(json.dumps(to_config(base))))
    assert again == base
    q = ap.Field(network(), bounds=(0, 1)).bind(pictures())
    assert torch.equal(again(q), base(q))
