"""Baselines out of a data set: drawn, averaged, and neighbours by logits."""

import json

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import apportion as ap
from apportion.core.config import from_config, to_config
from apportion.core.errors import BaselineError
from apportion.parts.baselines import Data, DataMean, Neighbours, k_means

DOUBLE = torch.float64


def total(*xs):
    return sum(x.flatten(1).sum(1) for x in xs)


def asked(x, seed: int = 0, **options):
    return ap.Field(total, **options).bind(x, seed=seed)


def there_and_back(base: ap.baselines.Baseline) -> ap.baselines.Baseline:
    tensors: dict[str, Tensor] = {}
    config = json.loads(json.dumps(to_config(base, tensors)))
    again = from_config(config, load(save({k: v.contiguous() for k, v in tensors.items()})))
    assert to_config(again) == to_config(base)
    return again


# -- drawn ----------------------------------------------------------------------------------------


def test_all_rows() -> None:
    data = torch.randn(5, 3, dtype=DOUBLE)
    base = Data(data)
    assert (base.draws, base.rows, base.backward_rows, base.exact) == (5, 0, 0, True)
    rows = base(asked(torch.randn(2, 3, dtype=DOUBLE)))
    assert torch.equal(rows, data.expand(2, 5, 3))
    assert rows.untyped_storage().nbytes() == data.untyped_storage().nbytes()


def test_draws_without_replacement() -> None:
    data, x = torch.arange(20, dtype=DOUBLE)[:, None], torch.randn(40, 1, dtype=DOUBLE)
    rows = Data(data, 7)(asked(x))[..., 0]
    assert rows.shape == (40, 7)
    assert all(len(set(r)) == 7 for r in rows.tolist())
    assert torch.equal(Data(data, 3)(asked(x))[..., 0], rows[:, :3])
    assert torch.equal(Data(data, 7)(asked(x[8:9]))[0, :, 0], rows[8])
    assert not torch.equal(Data(data, 7)(asked(x, seed=1))[..., 0], rows)
    assert sorted(Data(data, 20)(asked(x))[0, :, 0].tolist()) == list(range(20))
    # each row is as likely as any other: 280 draws of 20, and of the first place alone
    counts = torch.bincount(Data(data, 7)(asked(torch.randn(2000, 1)[:, :1].double())).long().flatten(), minlength=20)
    assert float((counts - 700).abs().max()) < 5 * (700 * 0.65) ** 0.5


def test_equal_examples_with_other_names_draw_other_rows() -> None:
    x = torch.zeros(2, 1, dtype=DOUBLE)
    q = ap.Field(total).bind(x, ids=["a", "b"])
    rows = Data(torch.arange(50, dtype=DOUBLE)[:, None], 5)(q)
    assert not torch.equal(rows[0], rows[1])


def test_expected_gradients_of_a_linear_model() -> None:
    """w ⊙ (x - mean r), whatever the quadrature."""
    data, x = torch.randn(6, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE)
    w = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    a = ap.IntegratedGradients(Data(data))(ap.Field(lambda x: x @ w), x)
    assert torch.allclose(a.values, w * (x - data.mean(0)), atol=1e-12)
    assert not torch.allclose(a.values, w * x, atol=1e-3)


def test_data_for_trees() -> None:
    x = {"a": torch.randn(2, 3, dtype=DOUBLE), "b": (torch.randn(2, dtype=DOUBLE),)}
    data = {"b": (torch.arange(4, dtype=DOUBLE),), "a": torch.arange(4, dtype=DOUBLE)[:, None].expand(4, 3)}
    rows = Data(data, 2)(ap.Field(lambda a, b: a.sum(1) + b[0]).bind(x))
    assert torch.equal(rows["a"][..., 0], rows["b"][0])
    rows = Data(data)(ap.Field(lambda a, b: a.sum(1) + b[0]).bind(x))
    assert rows["b"][0].tolist() == [[0, 1, 2, 3]] * 2


def test_bad_data() -> None:
    data, x = torch.zeros(3, 2), torch.zeros(1, 2)
    with pytest.raises(BaselineError, match="count=4 of 3 row"):
        Data(data, 4)
    with pytest.raises(BaselineError, match="count=0 of 3 row"):
        Data(data, 0)
    with pytest.raises(BaselineError, match="a float as baseline data"):
        Data([0.5])
    with pytest.raises(BaselineError, match="2 and 3 rows"):
        Data((torch.zeros(2, 1), torch.zeros(3, 1)))
    with pytest.raises(BaselineError, match="with 0 rows"):
        Data(data[:0])
    with pytest.raises(BaselineError, match="NaN or infinite"):
        Data(data / 0)
    with pytest.raises(BaselineError, match=r"shape \(2,\) each for input \(1, 4\)"):
        Data(data)(asked(torch.zeros(1, 4)))
    with pytest.raises(BaselineError, match=r"baseline data of torch.float64\nExpected: torch.float32"):
        Data(data.double())(asked(x))
    for other in ((data, data), [data], {"a": data}):
        with pytest.raises(BaselineError, match="named"):
            Data(other)(asked(x))
    rows = Data(data.double())(ap.Field(total, precision=torch.float32).bind(x.double()))
    assert rows.dtype == torch.float32


# -- averaged -------------------------------------------------------------------------------------


def test_mean_of_the_data() -> None:
    data = torch.randn(10, 3, 4, dtype=DOUBLE)
    want = data.mean(0)
    for batches in (data, [data], data.split(3), (b for b in data.split(4))):
        mean = DataMean.fit(batches)
        assert torch.allclose(mean.value, want, atol=1e-15)
    rows = mean(asked(torch.randn(2, 3, 4, dtype=DOUBLE)))
    assert rows.shape == (2, 1, 3, 4)
    assert torch.equal(rows[1, 0], mean.value)
    assert not torch.allclose(rows, ap.baselines.Mean()(asked(torch.randn(2, 3, 4, dtype=DOUBLE))))


def test_sums_are_kept_in_float64() -> None:
    batches = [torch.full((1000, 1), 0.1)] * 300 + [torch.full((1, 1), 1e6)]
    want = (300_000 * float(torch.tensor(0.1)) + 1e6) / 300_001
    mean = DataMean.fit(batches)
    assert mean.value.dtype == torch.float32
    assert abs(float(mean.value) - want) < 1e-6 * want


def test_mean_of_trees() -> None:
    mean = DataMean.fit([{"a": torch.ones(2, 3), "b": torch.zeros(2)}, {"a": torch.zeros(2, 3), "b": torch.ones(2)}])
    assert mean.value["a"].tolist() == [0.5] * 3
    assert mean.value["b"].item() == 0.5


def test_bad_batches() -> None:
    with pytest.raises(BaselineError, match="no batches to average"):
        DataMean.fit([])
    with pytest.raises(BaselineError, match="batches of one structure, shape and dtype"):
        DataMean.fit([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(BaselineError, match="batches of one structure, shape and dtype"):
        DataMean.fit([torch.zeros(2, 3), torch.zeros(2, 3).double()])
    with pytest.raises(BaselineError, match="NaN or infinite"):
        DataMean.fit([torch.full((2, 3), torch.nan)])
    with pytest.raises(BaselineError, match="the data's mean of shape"):
        DataMean(torch.zeros(3))(asked(torch.zeros(1, 2)))


def test_fitted_parts_come_back() -> None:
    x = torch.randn(3, 4, dtype=DOUBLE)
    data = torch.randn(9, 4, dtype=DOUBLE)
    for base in (Data(data, 2), DataMean.fit(data), ap.baselines.Several((Data(data), DataMean.fit(data)))):
        assert torch.equal(there_and_back(base)(asked(x)), base(asked(x)))


# -- k-means --------------------------------------------------------------------------------------


def blobs(centres: Tensor, each: int, spread: float = 0.05) -> Tensor:
    torch.manual_seed(3)
    return (centres[:, None] + spread * torch.randn(len(centres), each, centres.shape[1], dtype=DOUBLE)).flatten(0, 1)


def test_k_means_finds_blobs() -> None:
    where = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [7.0, 7.0]], dtype=DOUBLE)
    points = blobs(where, 25)
    for seed in range(5):
        centres, label = k_means(points, 4, seed=seed)
        order = torch.cdist(where, centres).argmin(1)
        assert sorted(order.tolist()) == [0, 1, 2, 3]
        assert torch.equal(label, order.repeat_interleave(25))
        assert torch.allclose(centres[order], points.unflatten(0, (4, 25)).mean(1), atol=1e-12)


def test_k_means_is_at_rest() -> None:
    """Every centre is the mean of its rows, every row is with its nearest centre."""
    torch.manual_seed(0)
    points = torch.rand(200, 3, dtype=DOUBLE)
    centres, label = k_means(points, 7, rounds=1000)
    assert torch.equal(label, torch.cdist(points, centres).argmin(1))
    for c in range(7):
        assert torch.allclose(points[label == c].mean(0), centres[c], atol=1e-12)
    assert torch.equal(k_means(points, 7, rounds=1000)[0], centres)
    assert not torch.equal(k_means(points, 7, seed=1, rounds=1000)[0], centres)
    state = torch.get_rng_state()
    k_means(points, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_k_means_agrees_with_another_implementation() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(1)
    points = torch.rand(120, 4, dtype=DOUBLE)
    start = points[:5]
    theirs = cluster.KMeans(5, init=start.numpy(), n_init=1, tol=0, max_iter=500, algorithm="lloyd").fit(points.numpy())
    ours = min(float(_inertia(points, k_means(points, 5, seed=s, rounds=500)[0])) for s in range(8))
    assert ours <= theirs.inertia_ * 1.02


def _inertia(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres).amin(1).square().sum()


def test_k_means_of_equal_points() -> None:
    centres, label = k_means(torch.ones(4, 2), 3)
    assert centres.eq(1).all()
    assert label.eq(0).all()


# -- neighbours -----------------------------------------------------------------------------------

CENTRES = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 6.0]], dtype=DOUBLE)


def identity(x: Tensor) -> Tensor:
    return x * 1


def test_references_of_the_nearest_cluster() -> None:
    data = blobs(CENTRES, 20)
    field = ap.Field(identity)
    near = Neighbours.fit(field, data, clusters=3, count=4)
    assert (near.draws, near.rows, near.backward_rows, near.exact) == (4, 1, 0, True)
    x = CENTRES[[2, 0, 0, 1]] * 0.7
    q = field.bind(x)
    rows = near(q)
    assert rows.shape == (4, 4, 2)
    assert torch.equal(rows[1], rows[2])
    group = torch.cdist(rows.flatten(0, 1), CENTRES).argmin(1).unflatten(0, (4, 4))
    assert group.tolist() == [[2] * 4, [0] * 4, [0] * 4, [1] * 4]
    known = {tuple(r) for r in data.tolist()}
    assert all(tuple(r) in known for r in rows.flatten(0, 1).tolist())
    assert len({tuple(r) for r in rows[0].tolist()}) == 4
    assert torch.equal(near(field.bind(x[1:2]))[0], rows[1])
    assert torch.equal(near(ap.Field(identity, batch_size=1).bind(x)), rows)
    a = ap.IntegratedGradients(near)(field, x, target=0)
    assert a.cost.forward.tolist()[0] == ap.IntegratedGradients(near).passes().forward + 4 + 1


def test_weights_are_shares_of_the_cluster() -> None:
    """Three places in one cluster, of 6, 3 and 1 rows: the rows chosen stand for .6, .3 and .1."""
    places = torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)
    line = places.repeat_interleave(torch.tensor([6, 3, 1]))[:, None]
    data = torch.cat([line, line + 100])
    near = Neighbours.fit(ap.Field(lambda x: torch.cat([x, -x], 1)), data, clusters=2, count=3)
    assert torch.allclose(near.density.sum(1), torch.ones(2, dtype=DOUBLE))
    for c in range(2):
        order = near.references[c, :, 0].argsort()
        assert (near.references[c, order, 0] % 100).tolist() == [0, 1, 2]
        assert torch.allclose(near.density[c, order], torch.tensor([0.6, 0.3, 0.1], dtype=DOUBLE))
    q = ap.Field(lambda x: torch.cat([x, -x], 1)).bind(torch.tensor([[90.0]], dtype=DOUBLE))
    weights = near.density[near.nearest(q)]
    mean = (weights * near(q)[..., 0]).sum(1)
    assert torch.allclose(mean, data[10:].mean(0))
    assert not torch.allclose(near(q)[..., 0].mean(1), mean), "equal weights are another average"


def test_small_clusters_repeat_their_rows() -> None:
    data = torch.tensor([[0.0], [0.1], [50.0]], dtype=DOUBLE)
    near = Neighbours.fit(ap.Field(lambda x: torch.cat([x, -x], 1)), data, clusters=2, count=3)
    c = int(near.references[:, 0, 0].argmax())
    assert near.references[c].flatten().tolist() == [50, 50, 50]
    assert torch.allclose(near.density[c], torch.full((3,), 1 / 3, dtype=DOUBLE))
    assert near.references[1 - c].flatten().tolist() == [0, 0.1, 0]
    assert torch.allclose(near.density[1 - c], torch.tensor([0.25, 0.5, 0.25], dtype=DOUBLE))


def test_neighbours_go_by_logits_not_by_inputs() -> None:
    net = lambda x: torch.stack([x[:, 0] * 0 + x[:, 1], -x[:, 1]], 1)  # noqa: E731
    data = torch.tensor([[100.0, 1.0], [0.0, 1.1], [0.0, -1.0], [100.0, -1.1]], dtype=DOUBLE)
    near = Neighbours.fit(ap.Field(net), data, clusters=2, count=2)
    rows = near(ap.Field(net).bind(torch.tensor([[100.0, 0.9]], dtype=DOUBLE)))
    assert (rows[0, :, 1] > 0).all()


def test_neighbours_at_an_inner_site() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = torch.randn(30, 2, dtype=DOUBLE)
    near = Neighbours.fit(ap.Field(net, site=ap.At("1")), data, clusters=4, count=2)
    at_input = Neighbours.fit(ap.Field(net), data, clusters=4, count=2)
    assert torch.allclose(near.references, net[:2](at_input.references).detach(), atol=1e-12)
    q = ap.Field(net, site=ap.At("1")).bind(data[:3])
    assert near(q).shape == (3, 2, 4)
    with pytest.raises(BaselineError, match=r"AtInput\(Neighbours\)"):
        ap.baselines.AtInput(at_input)(q)


def test_fitting_is_repeatable() -> None:
    data = blobs(CENTRES, 20, spread=2.0)
    one = Neighbours.fit(ap.Field(identity, batch_size=7), data, clusters=5, count=3, seed=4)
    two = Neighbours.fit(ap.Field(identity), data, clusters=5, count=3, seed=4)
    other = Neighbours.fit(ap.Field(identity), data, clusters=5, count=3, seed=5)
    assert to_config(one) == to_config(two)
    assert to_config(one) != to_config(other)
    x = torch.randn(3, 2, dtype=DOUBLE)
    again = there_and_back(one)
    assert torch.equal(again(ap.Field(identity).bind(x)), one(ap.Field(identity).bind(x)))


def test_bad_neighbours() -> None:
    data = torch.randn(4, 2, dtype=DOUBLE)
    field = ap.Field(identity)
    with pytest.raises(BaselineError, match="clusters=5 and count=1 for 4 row"):
        Neighbours.fit(field, data, clusters=5, count=1)
    with pytest.raises(BaselineError, match="count=0"):
        Neighbours.fit(field, data, clusters=2, count=0)
    near = Neighbours.fit(field, data, clusters=2, count=1)
    with pytest.raises(BaselineError, match="3 outputs for centres of 2"):
        near(ap.Field(lambda x: torch.cat([x, x[:, :1]], 1)).bind(data))
    with pytest.raises(BaselineError, match="fit"):
        Neighbours(near.centres, near.references[:1], near.density)
    with pytest.raises(BaselineError, match="one vector each"):
        Neighbours.fit(ap.Field(lambda x: x[:, :, None] * 1, target_free()), data, clusters=1, count=1)
    with pytest.raises(BaselineError, match="neighbours of shape"):
        near(ap.Field(lambda x: x[:, :2] * 1, allow_unused=True).bind(torch.randn(2, 3, dtype=DOUBLE)))


def target_free():
    return lambda outputs: outputs.flatten(1).sum(1)


@pytest.mark.usefixtures("as_users_run")
def test_fitting_to_what_cannot_be_fitted_is_told() -> None:
    data, net = torch.rand(4, 2), torch.nn.Linear(2, 2)
    with pytest.raises(BaselineError, match="a Linear as field"):
        Neighbours.fit(net, data, clusters=1, count=1)  # pyright: ignore[reportArgumentType]
    for options in ({"clusters": 1.5}, {"count": "2"}, {"seed": 0.5}, {"rounds": None}):
        with pytest.raises(BaselineError, match="a whole number"):
            Neighbours.fit(ap.Field(net), data, **{"clusters": 1, "count": 1, **options})  # pyright: ignore[reportArgumentType]
    listed = Neighbours.fit(ap.Field(net), [data], clusters=2, count=1)
    with pytest.raises(BaselineError, match="one structure"):
        ap.LPI(listed)(ap.Field(net), data, target=0)
    with pytest.raises(BaselineError, match="without labels"):
        DataMean.fit([(data, torch.zeros(4, dtype=torch.long))])
    for batches in (None, 5, "abc"):
        with pytest.raises(BaselineError, match="an iterable of batches"):
            DataMean.fit(batches)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("as_users_run")
def test_rows_of_another_structure_are_told() -> None:
    data = torch.zeros(3, 2)
    for other in ([data], (data, data), {"a": data}):
        with pytest.raises(BaselineError, match="one structure"):
            Data(other)(asked(data[:1]))
