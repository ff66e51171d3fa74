"""Networks trained to explain: on planted answers they beat chance and training on the wrong thing, in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError, InputError, NonFiniteError
from apportion.core.write import write_tensors
from apportion.parts.subsets import Masker, MaskerTraining, Selector, SelectorTraining, Trainer
from apportion.parts.subsets.causal import CausalNetworks, CausalTraining, shares
from apportion.parts.subsets.masker import Backgrounds, Margin, MaskNetwork, _loss, _maps
from apportion.parts.subsets.trainer import moments, network, started
from apportion.planted.digits import DarkObjects, Pictures, dark_object_task

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the trainer --------------------------------------------------------------------------------------


def line(net, rows: Tensor, generator: torch.Generator) -> Tensor:
    return (net(rows) - 3 * rows + 1).square().mean()


def test_training_is_the_same_every_time_and_leaves_the_global_random_state():
    x = torch.linspace(-1, 1, 40, dtype=F64)[:, None]
    trainer = Trainer(epochs=20, batch=16, lr=0.1)
    before = torch.random.get_rng_state()
    first = trainer.run(lambda: nn.Linear(1, 1), x, line, "a line")
    assert torch.equal(before, torch.random.get_rng_state())
    second = trainer.run(lambda: nn.Linear(1, 1), x, line, "a line")
    other = Trainer(epochs=20, batch=16, lr=0.1, seed=1).run(lambda: nn.Linear(1, 1), x, line, "a line")
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["weight"], other["weight"])
    assert float(first["weight"]) == pytest.approx(3, abs=0.1)
    assert float(first["bias"]) == pytest.approx(-1, abs=0.1)
    assert first["weight"].dtype == F64
    assert not first["weight"].requires_grad


def test_batches_are_taken_as_given_and_a_spent_iterator_is_refused():
    x = torch.linspace(-1, 1, 40, dtype=F64)[:, None]
    seen: list[int] = []

    def loss(net, rows: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(len(rows))
        return line(net, rows, generator)

    Trainer(epochs=2).run(lambda: nn.Linear(1, 1), [x[:7], x[7:]], loss, "a line")
    assert seen == [7, 33, 7, 33]
    with pytest.raises(InputError, match="epoch 2"):
        Trainer(epochs=2).run(lambda: nn.Linear(1, 1), iter([x]), loss, "a line", like=x)  # pyright: ignore


# -- L2X ----------------------------------------------------------------------------------------------


def additive(x: Tensor) -> Tensor:
    """Two classes, of features 1, 4 and 7 alone."""
    z = 2 * ((3 * x[:, 1]).tanh() + (3 * x[:, 4]).tanh() - (3 * x[:, 7]).tanh())
    return torch.stack([z, -z], 1)


READ = {1, 4, 7}
HOW = SelectorTraining(k=3, width=32, temperature=0.3, trainer=Trainer(epochs=6, batch=100, lr=3e-3))


def recall(picked: Tensor) -> float:
    return float(picked[:, sorted(READ)].mean())


def test_l2x_picks_what_the_model_reads(tmp_path: Path):
    x, held = torch.randn(4000, 10, generator=seeded()), torch.randn(200, 10, generator=seeded(1))
    field = ap.Field(additive)
    selector = Selector.fit(field, x, HOW)
    a = ap.L2X(selector)(field, held)
    assert recall(a.parts["picked"]) > 0.9  # chance is .3
    assert selector.fidelity(field, held) > 0.8
    torch.testing.assert_close(a.values.sum(1), torch.ones(200))
    assert torch.equal(a.parts["picked"].sum(1), torch.full((200,), 3.0))
    assert int(a.cost.forward.max()) == 0

    order = torch.randperm(4000, generator=seeded(2))  # answers of other examples
    where = {tuple(row.tolist()): int(i) for row, i in zip(x, order, strict=True)}

    def shuffled(rows: Tensor) -> Tensor:
        found = [where.get(tuple(row.tolist())) for row in rows]
        return additive(torch.stack([rows[i] if j is None else x[j] for i, j in enumerate(found)]))

    wrong = Selector.fit(ap.Field(shuffled, batch_size=4000), x, HOW)
    assert recall(ap.L2X(wrong)(field, held).parts["picked"]) < 0.6

    selector.save(tmp_path / "s.safetensors")
    again = ap.L2X(Selector.load(tmp_path / "s.safetensors"))(field, held)
    assert torch.equal(again.values, a.values)


def test_l2x_relaxes_the_choice_as_the_paper_does():
    """k draws of softmax((log p + gumbel) / τ), their elementwise maximum times x; row by row."""
    from apportion.parts.subsets.selector import _Both

    def make() -> _Both:
        return _Both(4, 3, 8, 0.5)

    weights = started(make, 0, torch.zeros(1, dtype=F64))
    x, gumbel = torch.randn(2, 4, generator=seeded(), dtype=F64), torch.rand(2, 2, 4, generator=seeded(), dtype=F64)
    told = network(make)(weights, x, gumbel)

    def layer(name: str, v: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ v + weights[f"{name}.bias"]

    for r in range(2):
        z = layer("selecting.5", layer("selecting.3", layer("selecting.1", x[r]).relu()).relu())
        draws = [torch.softmax((z - z.logsumexp(0) + gumbel[j, r]) / 0.5, 0) for j in range(2)]
        kept = x[r] * torch.maximum(*draws)
        out = layer("answering.5", layer("answering.3", layer("answering.1", kept).relu()).relu())
        torch.testing.assert_close(told[r], out)


def test_what_l2x_refuses():
    field, x = ap.Field(additive), torch.randn(20, 10)
    with pytest.raises(ConfigError, match=r"Selector\.fit"):
        ap.L2X()(field, x)
    with pytest.raises(InputError, match="k=11"):
        Selector.fit(field, x, SelectorTraining(k=11))
    with pytest.raises(ConfigError, match=r"an int as training of Selector\.fit"):
        Selector.fit(field, x, 9)  # pyright: ignore[reportArgumentType]
    small = Selector.fit(field, x, SelectorTraining(k=2, width=4, trainer=Trainer(epochs=1)))
    with pytest.raises(InputError, match="as trained on"):
        ap.L2X(small)(field, torch.randn(2, 12))


# -- CXPlain ------------------------------------------------------------------------------------------


def test_shares_of_growth():
    growth = torch.tensor([[3.0, 1.0, -2.0], [-1.0, 0.0, -3.0]], dtype=F64)
    torch.testing.assert_close(shares(growth), torch.tensor([[0.75, 0.25, 0.0], [1 / 3] * 3], dtype=F64))


def test_growth_is_what_is_lost_by_one_player_at_a_time():
    net, x = planted.dense_net(), torch.randn(6, 5, generator=seeded(), dtype=F64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    _, growth = ap.CXPlain().grown(ap.Field(net), [(x, labels)])
    for b in range(6):
        full = net(x[b : b + 1]).log_softmax(1)[0, labels[b]]
        for i in range(5):
            less = x[b : b + 1].clone()
            less[0, i] = 0
            want = full - net(less).log_softmax(1)[0, labels[b]]
            assert float(growth[b, i]) == pytest.approx(float(want.detach()), abs=1e-12)


def test_cxplain_foretells_shares_of_examples_it_has_not_seen(tmp_path: Path):
    field = ap.Field(planted.dense_net().float())
    x, held = torch.randn(3000, 5, generator=seeded()), torch.randn(200, 5, generator=seeded(1))
    how = CausalTraining(3, 64, Trainer(epochs=20, batch=100, lr=3e-3))
    method = ap.CXPlain(networks=how).fitted(field, x)
    assert isinstance(method, ap.CXPlain)
    agreement = float(method.agreement(field, held).mean())
    mean = shares(method.grown(field, x)[1]).mean(0)  # one map for all: the best that ignores the example
    known = shares(method.grown(field, held)[1])
    apart, least = known - known.mean(1, keepdim=True), mean - mean.mean()
    control = float(((apart * least).sum(1) / (apart.norm(dim=1) * least.norm()).clamp(min=1e-9)).mean())
    assert agreement > 0.85
    assert agreement > control + 0.2
    wrong = ap.CXPlain(networks=how).fitted(ap.Field(planted.dense_net(seed=9).float()), x)  # of another model
    assert isinstance(wrong, ap.CXPlain)
    assert float(wrong.agreement(field, held).mean()) < agreement - 0.3

    a = method(field, held)
    assert bool((a.parts["low"] <= a.values).all())
    assert bool((a.values <= a.parts["high"]).all())
    assert float((a.parts["high"] - a.parts["low"]).mean()) > 1e-3
    networks = method.networks
    assert isinstance(networks, CausalNetworks)
    networks.save(tmp_path / "c.safetensors")
    again = ap.CXPlain(networks=CausalNetworks.load(tmp_path / "c.safetensors"))(field, held)
    assert torch.equal(again.values, a.values)


def test_cxplain_of_groups():
    x = torch.rand(40, 2, 8, 8, generator=seeded(), dtype=F64)
    field = ap.Field(planted.conv_net())
    how = CausalTraining(1, 8, Trainer(epochs=1))
    a = ap.CXPlain(groups=ap.groups.Squares(4), networks=how).fitted(field, x)(field, x[:3])
    assert a.values.shape == (3, 4)
    assert a.domain is ap.Domain.GROUPS
    torch.testing.assert_close(a.values.sum(1), torch.ones(3, dtype=F64))
    trained = ap.CXPlain(groups=ap.groups.Squares(4), networks=how).fitted(field, x)
    assert isinstance(trained, ap.CXPlain)
    finer = ap.CXPlain(groups=ap.groups.Squares(2), networks=trained.networks)
    with pytest.raises(InputError, match="players"):
        finer(field, x[:3])
    with pytest.raises(ConfigError, match="fitted"):
        ap.CXPlain()(field, x)


# -- real time saliency -------------------------------------------------------------------------------


class DarkNetwork(nn.Module):
    """`DarkObjects`, written as modules so that its layers can be read."""

    def __init__(self) -> None:
        super().__init__()
        stencils = DarkObjects().stencils
        self.look, self.fit = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 11, padding=5, bias=False)
        self.dark, self.pool = nn.ReLU(), nn.MaxPool2d(4)
        with torch.no_grad():
            self.look.weight.fill_(-1 / 3)
            assert self.look.bias is not None
            self.look.bias.fill_(0.25)
            self.fit.weight.copy_(stencils)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.fit(self.dark(self.look(x)))).amax((2, 3))


def inside(mask: Tensor, p: Pictures) -> tuple[float, float]:
    """Mean of the mask on the object, and off it."""
    return float(mask[p.masks].mean()), float(mask[~p.masks].mean())


def test_the_network_of_modules_is_the_planted_one():
    model, p = dark_object_task(8)
    torch.testing.assert_close(DarkNetwork()(p.x), model(p.x))


def test_real_time_saliency_draws_the_object(tmp_path: Path):
    _, p = dark_object_task(128)
    _, held = dark_object_task(32, seed=5)
    field = ap.Field(DarkNetwork())
    how = MaskerTraining(scales=2, width=8, trainer=Trainer(epochs=6, batch=32, lr=1e-2))
    masker = Masker.fit(field, p.x, how)
    a = ap.RealTimeSaliency(masker, upsample=True)(field, held.x)
    on, off = inside(a.values, held)
    assert on > 0.5
    assert on > 3 * off
    assert int(a.cost.forward.max()) == 1

    wrong = ap.RealTimeSaliency(
        Masker.fit(field, p.x, MaskerTraining(area=0.0, scales=2, width=8, trainer=how.trainer))
    )
    on, off = inside(wrong(field, held.x).values, held)
    assert on < 1.5 * off  # without a price of area the mask covers what it likes

    masker.save(tmp_path / "m.safetensors")
    again = ap.RealTimeSaliency(Masker.load(tmp_path / "m.safetensors"), upsample=True)(field, held.x)
    assert torch.equal(again.values, a.values)


def test_the_loss_of_the_masker_is_that_of_plain_autograd():
    """Through the classifier itself, example by example, as the authors' code adds it up."""
    net = planted.conv_net()
    field, x = ap.Field(net), torch.rand(6, 2, 8, 8, generator=seeded(), dtype=F64)
    how = MaskerTraining(scales=2, width=4, fake=0.5)
    q = field.bind(x)
    layers, sizes = (ap.At("stem"), ap.At("pool")), (1.0, 2.0)

    def make() -> MaskNetwork:
        return MaskNetwork((4, 4), 3, 4)

    weights = {k: w.requires_grad_() for k, w in started(make, 0, x).items()}
    run = network(make)
    found = _loss(lambda *a: run(weights, *a), q, how, layers, sizes, seeded(3))
    mine = torch.autograd.grad(found, list(weights.values()))

    generator = seeded(3)
    own = net(x).argmax(1)
    real = torch.rand(6, generator=generator, dtype=F64) >= 0.5
    other = (own + torch.randint(1, 3, (6,), generator=generator)) % 3
    behind = Backgrounds()(x, generator)
    maps = [m / s for m, s in zip(_maps(q, layers), sizes, strict=True)]
    total = torch.zeros((), dtype=F64)
    small, there = run(weights, maps, torch.where(real, own, other))
    masks = F.interpolate(small, (8, 8), mode="bilinear", align_corners=False)
    for b in range(6):
        m = masks[b]

        def margin(z: Tensor, b: int = b) -> Tensor:
            out = net(z[None])[0]
            rest = torch.cat([out[: own[b]], out[own[b] + 1 :]])
            return out[own[b]] - rest.max()

        kept, gone = (margin(m * x[b] + (1 - m) * behind[b]), margin((1 - m) * x[b] + m * behind[b]))
        if real[b]:
            total = total + 0.3 * (1 - kept).clamp(min=0) + (5 + gone).clamp(min=0)
        else:
            total = total + 0.3 * (1 + kept).clamp(min=0) + (1 - gone).clamp(min=0)
        total = total + 8 * (m + 5e-4).pow(0.3).mean()
        total = (
            total + 0.005 * ((m[:, 1:] - m[:, :-1]).square().sum() + (m[:, :, 1:] - m[:, :, :-1]).square().sum()) / 2
        )
        total = total - (there[b].sigmoid() if real[b] else 1 - there[b].sigmoid()).log()
    assert float(found.detach()) == pytest.approx(float(total.detach() / 6), rel=1e-10)
    plain = torch.autograd.grad(total / 6, list(weights.values()))
    for g, w in zip(mine, plain, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-12)
    assert 0 < int(real.sum()) < 6


def test_margin_and_empty_maps():
    z = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 1.0]])
    assert Margin()(z, torch.tensor([[0], [2]])).tolist() == [0.5, -3.0]

    def make() -> MaskNetwork:
        return MaskNetwork((2,), 2, 4)

    zeros = {k: torch.zeros_like(w) for k, w in started(make, 0, torch.zeros(1)).items()}
    mask, _ = network(make)(zeros, [torch.ones(1, 2, 3, 3)], torch.tensor([0]))
    assert bool((mask == 0.5).all())  # 0 / 0 says neither


def test_what_real_time_saliency_refuses():
    x = torch.rand(4, 2, 8, 8, dtype=F64)
    with pytest.raises(ConfigError, match=r"Masker\.fit"):
        ap.RealTimeSaliency()(ap.Field(planted.conv_net()), x)
    with pytest.raises(ConfigError, match="classes"):
        Masker.fit(ap.Field(planted.conv_net(1)), x)
    masker = Masker.fit(
        ap.Field(planted.conv_net()), x, MaskerTraining(scales=1, width=2, trainer=Trainer(epochs=1, batch=4))
    )
    with pytest.raises(ConfigError, match="Contrast"):
        ap.RealTimeSaliency(masker)(ap.Field(planted.conv_net(), ap.Contrast(0, 1)), x)


def test_padding_gets_no_share() -> None:
    x = torch.rand(60, 4, 1, dtype=F64, generator=torch.Generator().manual_seed(0)) + 1
    real = torch.ones(60, 4, dtype=torch.bool)
    real[::2, 2:] = False
    field = ap.Field(lambda x: torch.cat([x.sum(1), 0 * x.sum(1)], 1))
    how = CausalTraining(1, 8, Trainer(epochs=3, batch=20))
    method = ap.CXPlain(networks=how, groups=ap.groups.RealTokens(real)).fitted(field, x)
    a = method(field, x)
    assert float(a.values[::2, 2:].abs().max()) == 0
    torch.testing.assert_close(a.values.flatten(1).sum(1), torch.ones(60, dtype=F64))
    assert shares(torch.tensor([[-1.0, 0.0, 5.0]]), torch.tensor([[True, True, False]])).tolist() == [[0.5, 0.5, 0.0]]


def test_the_advice_of_an_untrained_explainer_can_be_followed() -> None:
    with pytest.raises(ConfigError, match=r"CXPlain\(\)\.fitted\(ap\.Field\(model\), data\)"):
        ap.CXPlain().fitted(ap.Field(nn.Sequential(nn.Linear(2, 2)), site=ap.At("0")), torch.ones(3, 2))
    with pytest.raises(ConfigError, match="beta"):
        ap.MeaningfulPerturbation(beta=0.5)
    with pytest.raises(InputError, match="without data"):
        ap.subsets.Masker.fit(ap.Field(torch.nn.Linear(2, 2)), [])


# -- units, passes, and what does not fit -------------------------------------------------------------


def test_the_unit_of_a_column_changes_nothing(tmp_path: Path) -> None:
    """A column in other units, with another zero: what is learned, told and saved is the same to rounding."""
    x, held = torch.randn(1500, 10, generator=seeded(), dtype=F64), torch.randn(100, 10, generator=seeded(1), dtype=F64)
    unit, zero = torch.ones(10, dtype=F64), torch.zeros(10, dtype=F64)
    unit[0], unit[4], zero[7] = 1e4, 1e-4, 1e3
    plain, scaled = ap.Field(additive), ap.Field(lambda z: additive((z - zero) / unit))
    selectors = [Selector.fit(f, z, HOW) for f, z in ((plain, x), (scaled, x * unit + zero))]
    first, second = (
        ap.L2X(s)(f, h) for s, f, h in zip(selectors, (plain, scaled), (held, held * unit + zero), strict=True)
    )
    torch.testing.assert_close(second.values, first.values, rtol=1e-3, atol=1e-4)
    assert recall(second.parts["picked"]) > 0.8
    assert selectors[1].fidelity(scaled, held * unit + zero) > 0.75
    selectors[1].save(tmp_path / "s")
    tensors = {k: torch.zeros(1) for k in ("selecting.a", "answering.a")}
    write_tensors(tmp_path / "old", tensors, {"selector": {"shape": [10], "outputs": 2, "k": 3, "width": 4}})
    with pytest.raises(ConfigError, match="train anew"):
        Selector.load(tmp_path / "old")
    assert torch.equal(ap.L2X(Selector.load(tmp_path / "s"))(scaled, held * unit + zero).values, second.values)

    fill = ap.fills.Baselines(ap.baselines.Constant(tuple(zero.tolist())))
    how = CausalTraining(2, 16, Trainer(epochs=4, batch=100, lr=3e-3))
    one = ap.CXPlain(networks=how).fitted(plain, x[:500])(plain, held)
    trained = ap.CXPlain(networks=how, fill=fill).fitted(scaled, x[:500] * unit + zero)
    assert isinstance(trained, ap.CXPlain)
    two = trained(scaled, held * unit + zero)
    torch.testing.assert_close(two.values, one.values, rtol=1e-3, atol=1e-4)
    assert isinstance(trained.networks, CausalNetworks)
    trained.networks.save(tmp_path / "c")
    again = ap.CXPlain(networks=CausalNetworks.load(tmp_path / "c"), fill=fill)(scaled, held * unit + zero)
    assert torch.equal(again.values, two.values)


def test_moments_leave_constants_alone() -> None:
    x = torch.tensor([[0.1, 1e-9], [0.1, 3e-9]]).repeat(50, 1)
    mean, std = moments(x)
    torch.testing.assert_close(mean, torch.tensor([0.1, 2e-9]))
    torch.testing.assert_close(std, torch.tensor([1.0, 1e-9]))


def test_the_range_of_pictures_does_not_change_what_a_masker_learns() -> None:
    """Layers are divided by their size, so pictures from 0 to 255 train as those from 0 to 1 do."""
    _, p = dark_object_task(8)
    how = MaskerTraining(scales=2, width=4, trainer=Trainer(epochs=1, batch=4))
    maps = []
    for unit in (1.0, 255.0):
        net = DarkNetwork()
        with torch.no_grad():
            net.look.weight.div_(unit)
        field = ap.Field(net)
        maps.append(ap.RealTimeSaliency(Masker.fit(field, unit * p.x, how))(field, unit * p.x).values)
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-3, atol=1e-3)


def test_rows_spent_on_training_are_as_declared() -> None:
    """L2X: one row forward for each example; CXPlain: players + 1; besides the few that check any model once."""
    rows: list[int] = []

    def net(z: Tensor) -> Tensor:
        rows.append(len(z))
        return additive(z)

    x = torch.randn(60, 10, generator=seeded())
    quick = SelectorTraining(2, 4, trainer=Trainer(epochs=1))
    ap.Field(lambda z: net(z).sum(1)).bind(x)
    checks, found = sum(rows), []
    for fit in (
        lambda: Selector.fit(ap.Field(net), x, quick),
        lambda: Selector.fit(ap.Field(net), [(x[:20], torch.full((20,), 7)), (x[20:], torch.zeros(40).long())], quick),
        lambda: ap.CXPlain(networks=CausalTraining(1, 4, Trainer(epochs=1))).fitted(ap.Field(net), x),
    ):
        rows.clear()
        fit()
        found.append(sum(rows) - checks)
    assert found == [60, 60, 660]


class Two(nn.Module):
    """A classifier whose classes and channels are asked for."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(2, channels, 3, padding=1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_a_trained_part_says_what_it_does_not_fit() -> None:
    x = torch.rand(4, 2, 8, 8, generator=seeded())
    how = MaskerTraining(scales=1, width=2, trainer=Trainer(epochs=1, batch=4))
    draw = ap.RealTimeSaliency(Masker.fit(ap.Field(Two(4, 5)), x, how))
    for classes in (2, 9):
        with pytest.raises(ConfigError, match=r"\[B, 5\], as the masker was trained for"):
            draw(ap.Field(Two(4, classes)), x, target=classes - 1)
    with pytest.raises(ConfigError, match="channels"):
        draw(ap.Field(Two(6, 5)), x)
    with pytest.raises(InputError, match="a dict of shapes"):
        Masker.fit(ap.Field(Two(4, 5)), {"x": x}, how)

    rows = torch.randn(20, 10, generator=seeded())
    s = Selector.fit(ap.Field(additive), rows, SelectorTraining(2, 4, trainer=Trainer(epochs=1)))
    with pytest.raises(InputError, match="as trained on"):
        s.fidelity(ap.Field(lambda z: z[:, :2]), rows[:, :4])
    with pytest.raises(InputError, match="3 outputs"):
        s.fidelity(ap.Field(lambda z: z[:, :3]), rows)
    with pytest.raises(NonFiniteError, match="lower the trainer's lr"):
        Selector.fit(ap.Field(additive), rows, SelectorTraining(2, 4, trainer=Trainer(epochs=3, lr=1e30)))
    for data, error in ((rows[:0], InputError), ([], InputError), (rows / 0 * 0, NonFiniteError)):
        for fit in (Selector.fit, s.fidelity, ap.CXPlain().fitted):
            with pytest.raises(error):
                fit(ap.Field(additive), data)


def test_training_works_where_no_gradients_are_recorded() -> None:
    x, rows = torch.rand(4, 2, 8, 8, generator=seeded()), torch.randn(20, 10, generator=seeded())
    brief = Trainer(epochs=1, batch=4)
    causal = ap.CXPlain(networks=CausalTraining(1, 4, brief))

    def weights(method: ap.Explainer) -> dict[str, Tensor]:
        assert isinstance(method, ap.CXPlain)
        assert isinstance(method.networks, CausalNetworks)
        return method.networks.weights

    fits = (
        lambda: Masker.fit(ap.Field(Two(4, 5)), x, MaskerTraining(scales=1, width=2, trainer=brief)).weights,
        lambda: Selector.fit(ap.Field(additive), rows, SelectorTraining(2, 4, trainer=brief)).selecting,
        lambda: weights(causal.fitted(ap.Field(additive), rows)),
    )
    for fit in fits:
        with torch.inference_mode():
            found = fit()
        assert not any(w.is_inference() for w in found.values())
