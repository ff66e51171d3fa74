"""Regions: pieces counted exactly on networks whose pieces are known, whatever the spelling."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import BaselineError, ConfigError, InputError, ModelError, NonFiniteError
from apportion.regions import Regions, regions
from apportion.testing.trace import differences, snapshot

D = torch.float64


def total(outputs: Tensor) -> Tensor:
    return outputs.flatten(1).sum(1)


class Calls(nn.Module):
    """A function as a module, with the modules it calls."""

    def __init__(self, fn: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


def found(fn: Callable[[Tensor], Any], x: Tensor, baseline: Any, **options: Any) -> Regions:
    return regions(ap.Field(fn, total), x, baseline, **options)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=D)


# -- pieces that are known ------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    """Two inputs; first layer h = (x1, x2, x1 + x2 - 1), second g = (h1 - h2, h3 - 1) of what is left of h."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    with torch.no_grad():
        for layer, weight, bias in (
            (0, [[1, 0], [0, 1], [1, 1]], [0, 0, -1]),
            (2, [[1, -1, 0], [0, 0, 1]], [0, -1]),
            (4, [[1, 1]], [0]),
        ):
            net[layer].weight.copy_(torch.tensor(weight))  # pyright: ignore[reportCallIssue, reportArgumentType]
            net[layer].bias.copy_(torch.tensor(bias))  # pyright: ignore[reportCallIssue, reportArgumentType]
    return net


def test_a_network_of_relus_by_hand() -> None:
    # at (2, 1): h = (2, 1, 2), g = (1, 1), all on; at (-1, 1): h = (-1, 1, -1), g = (-1, -1), only h2 on
    # at (1, .5): h = (1, .5, .5), g = (.5, -.5): only g2 differs
    x = rows([2, 1], [2, 1])
    got = regions(ap.Field(mlp()), x, rows([-1, 1], [1, 0.5]))
    assert [o.label for o in got.operations] == ["1 relu", "3 relu"]
    assert [o.units for o in got.operations] == [3, 2]
    assert [o.changed.tolist() for o in got.operations] == [[[2], [0]], [[2], [1]]]
    assert [o.share.tolist() for o in got.operations] == [[[2 / 3], [0]], [[1], [0.5]]]
    assert got.share.tolist() == [[4 / 5], [1 / 5]]
    assert got.units == 5
    assert got.crossings is None
    assert got.crossings_per_unit is None
    assert got.piecewise_linear
    assert got.linear.tolist() == [[False], [False]]


def test_where_on_the_line_units_cross() -> None:
    # on (-1, 1) + t (3, 0): h1 on from t = 1/3, h3 = 3t - 1 from 1/3, g1 = relu(3t - 1) - 1 and g2 = 3t - 2 from 2/3
    got = regions(ap.Field(mlp()), rows([2, 1]), rows([-1, 1]), along=10)
    assert got.crossings is not None
    assert got.crossings.tolist() == [[[0, 0, 0, 2, 0, 0, 2, 0, 0, 0]]]
    assert got.crossings_per_unit is not None
    assert got.crossings_per_unit.tolist() == [[0.8]]
    assert got.share.tolist() == [[0.8]]


def test_a_unit_that_returns_is_seen_on_the_line_only() -> None:
    def bump(x: Tensor) -> Tensor:
        return torch.relu(1 - x.abs())  # on within (-1, 1)

    got = found(bump, rows([2.0]), rows([-2.0]), along=8)  # codes of the ReLU off, on, off; of the modulus once
    assert got.crossings is not None
    assert got.crossings.sum().item() == 3
    assert [o.changed.item() for o in got.operations] == [1, 0]
    assert found(bump, rows([2.0]), rows([-2.0])).share.item() == 0.5


def test_one_interval_is_the_comparison_of_the_ends() -> None:
    torch.manual_seed(1)
    x, b = torch.randn(2, 3, 2, dtype=D)
    got = regions(ap.Field(mlp()), x, b, along=1)
    assert got.crossings is not None
    assert torch.equal(got.crossings[..., 0].double() / got.units, got.share)


def test_equal_points_share_every_piece() -> None:
    x = torch.randn(4, 2, dtype=D)
    got = regions(ap.Field(mlp()), x, x, along=3)
    assert got.share.tolist() == [[0.0]] * 4
    assert got.crossings is not None
    assert not got.crossings.any()
    assert got.linear.all()


def test_a_share_of_0_means_that_the_score_is_affine_between() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 1)).double().eval()
    x = torch.randn(60, 2, dtype=D)
    b = x + 0.5 * torch.randn(60, 2, dtype=D)
    linear = regions(ap.Field(net), x, b).linear[:, 0]
    with torch.no_grad():
        t = torch.linspace(0, 1, 201, dtype=D)[:, None, None]
        f = net(b + t * (x - b))[..., 0]
        bend = (f - (f[:1] + t[..., 0] * (f[-1:] - f[:1]))).abs().amax(0)
    assert 5 < int(linear.sum()) < 55
    assert torch.equal(linear, bend < 1e-9)


def test_relu6_has_three_pieces() -> None:
    got = found(F.relu6, rows([7, 3, -1, 7, 3]), rows([3, -1, -1, -2, 4]), along=9)
    (op,) = got.operations
    assert (op.kind, op.changed.tolist()) == ("relu6", [[3]])
    assert got.crossings is not None
    assert got.crossings.sum().item() == 4  # from -2 to 7 it passes both kinks


def test_a_maximum_of_two() -> None:
    got = found(lambda x: torch.maximum(x[:, :1], x[:, 1:]), rows([1, 2], [2, 1]), rows([3, 1], [5, 0]))
    assert got.share.tolist() == [[1.0], [0.0]]
    assert got.operations[0].kind == "maximum"


def test_a_max_pool_by_its_winners() -> None:
    x = torch.arange(16, dtype=D).reshape(1, 1, 4, 4)
    other = x.clone()
    other[0, 0, 0, 0] = 99  # moves the winner of one window of four
    got = found(nn.MaxPool2d(2), x, other)
    assert (got.units, got.share.item()) == (4, 0.25)
    assert found(nn.MaxPool2d(2), x, x + 5).share.item() == 0


# -- spellings ------------------------------------------------------------------------------------

FIVE: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "relu": [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        Tensor.relu,
        lambda x: x.relu_(),
        lambda x: x.clamp(min=0),
        lambda x: F.threshold(x, 0, 0),
        lambda x: x.clamp_min_(0),
        lambda x: torch.max(x, torch.zeros((), dtype=x.dtype)),
        lambda x: x * (x > 0),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: x.masked_fill(x <= 0, 0),
        torch.ops.aten.relu.default,
        nn.LeakyReLU(0.1),
        nn.PReLU(dtype=D),
        nn.RReLU().eval(),
        torch.abs,
        lambda x: x.sign() * x,
    ],
    "relu6": [
        nn.ReLU6(),
        nn.ReLU6(inplace=True),
        F.relu6,
        nn.Hardtanh(0, 6),
        lambda x: F.hardtanh_(x, 0, 6),
        lambda x: x.clamp(0, 6),
        lambda x: torch.clip(x, max=6, min=0),
        lambda x: x.clip_(0.0, 6.0),
        lambda x: torch.clamp(x, torch.zeros_like(x), torch.full_like(x, 6)),
        lambda x: 6 * F.hardsigmoid(x - 3),
        lambda x: F.softshrink(x - 3, 3.0),
    ],
    "pool": [
        nn.MaxPool2d(2),
        lambda x: F.max_pool2d(x, 2, 2),
        lambda x: torch.max_pool2d(x, kernel_size=2),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        nn.AdaptiveMaxPool2d(3),
        lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True)[0],
        lambda x: x.unflatten(2, (3, 2)).unflatten(4, (3, 2)).amax((3, 5)),
        lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).max(4).values,
        lambda x: -(-x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)).min(4)[0],
    ],
    "maximum": [
        lambda x: torch.maximum(x[:, 0], x[:, 1]),
        lambda x: torch.max(x[:, 0], other=x[:, 1]),
        lambda x: x[:, 0].fmax(x[:, 1]),
        lambda x: -torch.minimum(-x[:, 1], -x[:, 0]),
        lambda x: x.amax(1),
        lambda x: x.max(1)[0],
        lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    ],
}


@pytest.mark.parametrize("family", FIVE)
def test_all_spellings_agree(family: str) -> None:
    torch.manual_seed(3)
    x, b = 4 * torch.randn(2, 3, 2, 6, 6, dtype=D) + 1
    want = found(FIVE[family][0], x, b, along=4)
    assert want.share.min() > 0
    for spelling in FIVE[family]:
        got = found(lambda x, fn=spelling: fn(x * 1), x, b, along=4)
        assert torch.equal(got.share, want.share), spelling
        assert got.crossings is not None
        assert want.crossings is not None
        assert torch.equal(got.crossings, want.crossings), spelling
        assert got.units == want.units
        assert not got.other


def test_the_kind_does_not_tell_the_spelling() -> None:
    for family, kind in (("relu", "relu"), ("relu6", "relu6")):
        for spelling in FIVE[family][:4]:
            assert found(spelling, rows([1.0]), rows([2.0])).operations[0].kind == kind


def test_a_reused_module_is_listed_by_call() -> None:
    net = Calls(lambda m, x: m.act(m.act(x) - 2), act=nn.ReLU(inplace=True)).eval()
    got = regions(ap.Field(net, total), rows([3, 1]), rows([1, -1]))
    assert [o.label for o in got.operations] == ["act relu", "act relu[1]"]
    assert [o.changed.item() for o in got.operations] == [1, 1]


def test_in_place_writing_is_followed() -> None:
    def writes(x: Tensor) -> Tensor:
        buffer = torch.zeros(len(x), 3, dtype=x.dtype)
        buffer[:, :2] = x
        buffer[:, 2:].copy_(x[:, :1])
        view = buffer[:, 1:]
        view.relu_()
        return buffer

    got = found(writes, rows([1, 1]), rows([-1, 2]))
    assert [(o.units, o.changed.item()) for o in got.operations] == [(2, 1)]


def test_writing_to_a_view_is_writing_to_the_whole() -> None:
    def writes(x: Tensor) -> Tensor:
        buffer = torch.zeros(len(x), 3, dtype=x.dtype)
        buffer.narrow(1, 0, 2).copy_(x)
        return torch.relu(buffer)

    got = found(writes, rows([1, 1]), rows([-1, 2]))
    assert [(o.units, o.changed.item()) for o in got.operations] == [(3, 1)]


def test_exported_and_traced_programs_are_as_the_module() -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU6(), nn.Linear(6, 4), nn.LeakyReLU(), nn.Linear(4, 2)).double().eval()
    x, b = torch.randn(2, 4, 3, dtype=D)
    want = regions(ap.Field(net), x, b, along=3)
    rows_axis = ({0: torch.export.Dim("rows")},)
    for other in (torch.fx.symbolic_trace(net), torch.export.export(net, (x,), dynamic_shapes=rows_axis).module()):
        got = regions(ap.Field(other), x, b, along=3)
        assert torch.equal(got.share, want.share)
        assert [o.kind for o in got.operations] == ["relu6", "leaky_relu"]
        assert not got.other


def test_what_does_not_depend_on_the_input_has_no_units() -> None:
    weight = torch.randn(2, 2, dtype=D)
    net = Calls(lambda m, x: m.act(x @ m.act(weight) + torch.relu(torch.zeros_like(x))), act=nn.ReLU()).eval()
    assert regions(ap.Field(net, total), rows([1, 1]), rows([0, 0])).units == 2


def test_units_before_an_inner_site_do_not_count() -> None:
    field = ap.Field(mlp(), site=ap.At("1"))
    got = regions(field, rows([2, 1]), rows([1, 0.5, 0.5]))
    assert [(o.label, o.changed.item()) for o in got.operations] == [("3 relu", 1)]


def test_the_score_may_have_pieces_of_its_own() -> None:
    got = regions(ap.Field(nn.Identity().eval(), lambda o: o.amax(1)), rows([1, 2]), rows([2, 1]))
    assert [(o.label, o.share.item()) for o in got.operations] == [("the score amax", 1.0)]


# -- what is not piecewise linear -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "named"),
    [
        (torch.sigmoid, {"sigmoid": 1}),
        (F.gelu, {"gelu": 1}),
        (lambda x: torch.softmax(torch.softmax(x, 1), 1), {"softmax": 2}),
        (lambda x: x * x, {"mul": 1}),
        (lambda x: F.layer_norm(x, (2,)), {"layer_norm": 1}),
        (torch.special.erfcx, {"special_erfcx": 1}),
        (lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), {"matmul": 2, "softmax": 1}),
    ],
)
def test_other_operations_are_named(fn: Callable[[Tensor], Tensor], named: dict[str, int]) -> None:
    x = rows([1, -2], [0.5, 1])
    got = found(lambda x: fn(torch.relu(x)), x, x)
    assert got.other == named
    assert not got.piecewise_linear
    assert not got.linear.any()
    assert all(name in got.note for name in named)
    assert "not regions of linearity" in repr(got)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * (x > 0) / 2,
        lambda x: F.pad(x, (1, 1)) - x.mean(1, keepdim=True),
        nn.BatchNorm1d(2, dtype=D).eval(),
        lambda x: F.dropout(x, training=False),
        lambda x: x.detach() + x,
    ],
)
def test_affine_operations_are_not_named(fn: Callable[[Tensor], Tensor]) -> None:
    x = rows([1, -2], [0.5, 1])
    assert found(fn, x, x).other == {}


def test_a_linear_model_has_no_units() -> None:
    got = found(lambda x: 2 * x, rows([1.0]), rows([2.0]), along=2)
    assert (got.units, got.share.item(), got.linear.item()) == (0, 0.0, True)
    assert got.crossings_per_unit is not None
    assert got.crossings_per_unit.item() == 0
    assert "0 units" in repr(got)


# -- rows, chunks, cost ---------------------------------------------------------------------------


def convolutional() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU6(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.LeakyReLU()
    ).eval()


def folds(m: Any, x: Tensor) -> Tensor:
    """Rows folded into another axis, and an axis before the rows."""
    h = torch.relu(x.flatten(0, 1) - 0.1).reshape(x.shape)
    return torch.relu(h.movedim(0, 2) - 0.2).sum((0, 1, 3))[:, None]


@pytest.mark.parametrize("make", [convolutional, lambda: Calls(folds).eval()])
def test_chunks_and_batches_change_nothing(make: Callable[[], nn.Module]) -> None:
    net = make()
    x = torch.randn(3, 2, 6, 6, dtype=D)
    made = ap.baselines.Noise(0.5, count=3)

    def ask(x: Tensor, ids: list[int], **options: Any) -> Regions:
        return regions(ap.Field(net, total, precision=D, **options), x, made, along=3, ids=ids, seed=5)

    want = ask(x, [0, 1, 2])
    assert want.share.shape == (3, 3)
    assert len(want.share.unique()) > 3
    for size in (1, 2, 4, 9):
        got = ask(x, [0, 1, 2], batch_size=size)
        assert torch.equal(got.share, want.share)
        assert got.crossings is not None
        assert want.crossings is not None
        assert torch.equal(got.crossings, want.crossings)
        assert torch.equal(got.cost.forward, want.cost.forward)
    alone = ask(x[1:2], [1])
    assert torch.equal(alone.share, want.share[1:2])


def test_an_axis_before_the_rows_needs_no_row_by_row_pass() -> None:
    seen: list[int] = []

    def sequence_first(x: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.relu(x.T).T

    x = torch.randn(5, 5, dtype=D)
    got = found(sequence_first, x, -x)
    assert seen[-2:] == [5, 5]
    assert got.share.tolist() == [[1.0]] * 5
    half = found(sequence_first, x, torch.where(torch.arange(5)[:, None] < 2, -x, x))
    assert half.share.tolist() == [[1.0]] * 2 + [[0.0]] * 3


@pytest.mark.parametrize(("along", "passes"), [(0, 3), (1, 3), (4, 6)])
def test_the_cost_is_what_the_docstring_says(along: int, passes: int) -> None:
    spent = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal spent
        spent += len(x)
        return torch.relu(x)

    got = found(counted, torch.randn(2, 3), ap.baselines.Noise(count=2), along=along)
    assert got.cost.forward.tolist() == [2 * passes] * 2
    assert got.cost.backward.tolist() == [0, 0]
    assert spent == int(got.cost.forward.sum() + got.cost.at_x.sum()) + got.cost.checks


def test_normalization_and_extra_arguments_hold() -> None:
    def shifted(x: Tensor, by: Tensor) -> Tensor:
        return torch.relu(x - by)

    field = ap.Field(shifted, total, extra=rows([0], [10]), normalize=ap.Normalize((1.0,), (0.5,)))
    got = regions(field, rows([2, 0], [2, 0]), ap.baselines.Constant(1.5))
    assert got.share.tolist() == [[0.5], [0.0]]


def test_several_inputs() -> None:
    field = ap.Field(lambda a, b: torch.relu(a + b), total)
    got = regions(field, (rows([1]), rows([1])), (rows([1]), rows([-3])))
    assert got.share.item() == 1


def test_the_model_is_untouched() -> None:
    net, x = convolutional(), torch.randn(2, 2, 6, 6)
    before, kept = snapshot(net), x.clone()
    regions(ap.Field(net), x, ap.baselines.Noise(), along=2)
    assert differences(before, snapshot(net)) == []
    assert torch.equal(x, kept)


# -- the result -----------------------------------------------------------------------------------


def test_the_result_is_plain_and_short() -> None:
    got = regions(ap.Field(mlp()), rows([2, 1]), rows([-1, 1]), along=10)
    told = json.loads(json.dumps(got.to_dict()))
    assert told["share"] == [[0.8]]
    assert told["operations"][0] == {"name": "1", "kind": "relu", "call": 0, "units": 3, "share": [[2 / 3]]}
    assert told["crossings"] == [[[0, 0, 0, 2, 0, 0, 2, 0, 0, 0]]]
    assert told["linear"] == [[False]]
    text = repr(got)
    assert len(text.splitlines()) <= 5
    assert "80 % of the units" in text
    assert "most in 3 relu: 100 %" in text
    assert "most in interval 3 of 10" in text
    with pytest.raises(AttributeError):
        got.units = 3  # pyright: ignore[reportAttributeAccessIssue]


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_told() -> None:
    field, x = ap.Field(mlp()), rows([2, 1])
    for along in (-1, 1.5, True, "3"):
        with pytest.raises(ConfigError, match="a whole number from 0"):
            regions(field, x, x, along=along)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"an ap\.Field"):
        regions(mlp(), x, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BaselineError, match=r"shape \(1, 2\)"):
        regions(field, x, rows([1, 2, 3]))
    with pytest.raises(BaselineError, match="as the input"):
        regions(field, x, x.float())
    for wrong in (ap.baselines.Zero, 0.0, None):
        with pytest.raises(BaselineError, match="Zero"):
            regions(field, x, wrong)
    with pytest.raises(InputError):
        regions(field, x.long(), x)
    with pytest.raises(NonFiniteError, match="example 0"):
        found(lambda x: 1 / torch.relu(x), rows([1]), rows([-1]), along=2)
    with pytest.raises(NonFiniteError, match="the score"):
        found(lambda x: 1 / x.abs(), rows([1]), rows([-1]), along=2)


def test_a_model_that_branches_is_refused() -> None:
    def branches(x: Tensor) -> Tensor:
        return torch.relu(x) if x.sum() > 0 else torch.relu(torch.sigmoid(x).abs())

    with pytest.raises(ModelError, match="change with the input"):
        regions(ap.Field(branches, total, batch_size=1), rows([1, 1]), rows([-1, -1]))


class Hidden(torch.autograd.Function):
    """A step through which nothing is seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().copy())


def test_operations_that_cannot_be_seen_are_refused() -> None:
    x = rows([1, 1])
    with pytest.raises(ModelError, match="could be seen"):
        found(Hidden.apply, x, x)
    with pytest.raises(ModelError, match=r"torch\.func"):
        found(torch.vmap(torch.relu), x, x)


# -- a pretrained network -------------------------------------------------------------------------


class Several(ap.baselines.Baseline):
    """Black, a blur, and two sizes of noise."""

    @property
    def draws(self) -> int:
        return 4

    def __call__(self, q: ap.Question) -> Tensor:
        noise = (
            torch.randn(q.x.shape, generator=torch.Generator().manual_seed(0)) / 2
        )  # in units of the network's input
        blurred = ap.baselines.Blurred(2.0)(q)[:, 0]
        return torch.stack([torch.zeros_like(q.x), blurred, q.x + 0.01 * noise, q.x + 0.001 * noise], 1)


def test_no_baseline_in_use_shares_the_region_of_a_picture() -> None:
    """The figures recorded for EfficientNet-Lite0; noise in units of its own input, twice those of the picture."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("skimage")
    from apportion.adapters import bundled, zoo

    net = zoo.load("efficientnet_lite0")
    x = net.see(bundled.picture("chelsea"), bundled.picture("coffee"))
    got = regions(ap.Field(net.model, normalize=net.normalize), x, Several())
    assert got.units == 6_157_536
    assert {o.kind for o in got.operations} == {"relu6"}
    assert got.piecewise_linear
    assert not got.linear.any()
    expected = [(0.235, 0.275), (0.095, 0.145), (0.0145, 0.0255), (0.00145, 0.00265)]
    for share, (low, high) in zip(got.share.T, expected, strict=True):
        assert low < share.min()
        assert share.max() < high
