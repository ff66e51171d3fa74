"""Streams: distributions, independence, and that a row depends on its own key alone."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.core import tree
from apportion.core.streams import Stream, content_ids, key_of

N = 1_000_000
"""Draws; a statistic with standard error s is held to 5 s, which chance breaks once in two million runs."""

FEW = torch.zeros(1, 1000)


def long(stream: Stream, kind: str, width: int = 1000) -> Tensor:
    """A million draws of one example: rows of `width`, in float64."""
    draw = torch.arange(N // width)
    return getattr(stream, kind)(torch.zeros(1, width), torch.zeros_like(draw), draw).double()


def kolmogorov_smirnov(sample: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and the right one, sorted."""
    n = len(sample)
    step = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(step[1:] - cdf, cdf - step[:-1]).max())


@pytest.fixture(scope="module")
def stream() -> Stream:
    return Stream.of(0, ["a"], "test")


@pytest.fixture(scope="module")
def normal(stream: Stream) -> Tensor:
    return long(stream, "normal")


@pytest.fixture(scope="module")
def uniform(stream: Stream) -> Tensor:
    return long(stream, "uniform")


def test_normal_moments(normal: Tensor) -> None:
    z = normal.flatten()
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10170)], start=1):
        assert abs(float((z**power).mean()) - moment) < 5 * math.sqrt(variance / N), power


def test_uniform_moments(uniform: Tensor) -> None:
    u = uniform.flatten()
    for power in range(1, 7):
        variance = 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        assert abs(float((u**power).mean()) - 1 / (power + 1)) < 5 * math.sqrt(variance / N), power
    assert float(u.min()) > 0
    assert float(u.max()) < 1


def test_kolmogorov_smirnov(normal: Tensor, uniform: Tensor) -> None:
    """Above 2.5 with probability 2 exp(-2 · 2.5²) = 7e-6."""
    z = normal.flatten().sort().values
    assert kolmogorov_smirnov(z, torch.special.ndtr(z)) < 2.5
    u = uniform.flatten().sort().values
    assert kolmogorov_smirnov(u, u) < 2.5
    assert kolmogorov_smirnov(u, u**1.01) > 2.5  # it would see an error of a hundredth in the exponent


def test_chi_square_of_pairs(uniform: Tensor) -> None:
    """Neighbours fill the square evenly: 32 × 32 cells."""
    u = uniform.flatten()
    for a, b in [(u[:-1], u[1:]), (u[:-2], u[2:]), (u[: N // 2], u[N // 2 :])]:
        cell = (a * 32).long() * 32 + (b * 32).long()
        count = torch.bincount(cell, minlength=1024).double()
        expected = len(a) / 1024
        chi = float(((count - expected) ** 2 / expected).sum())
        assert abs(chi - 1023) < 5 * math.sqrt(2 * 1023)


def test_integers_are_even() -> None:
    s = Stream.of(3, ["a"], "test")
    found = s.integers(7, torch.zeros(70, dtype=torch.long), torch.arange(70), 1000)
    assert found.shape == (70, 1000)
    count = torch.bincount(found.flatten(), minlength=7).double()
    assert len(count) == 7
    assert float(((count - 1e4) ** 2 / 1e4).sum()) < 6 + 5 * math.sqrt(12)


def correlation(a: Tensor, b: Tensor) -> float:
    """In units of its standard error."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a * b).mean() / (a.std() * b.std())) * math.sqrt(len(a))


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_no_correlation(kind: str, request: pytest.FixtureRequest) -> None:
    z = request.getfixturevalue(kind)
    for lag in (1, 2, 3, 499, 500):
        assert abs(correlation(z[:, :-lag], z[:, lag:])) < 5, f"elements {lag} apart"
    for lag in (1, 2, 64):
        assert abs(correlation(z[:-lag], z[lag:])) < 5, f"draws {lag} apart"
    draw = torch.arange(1000)
    many = Stream.of(0, list(range(1000)), "test")
    for name, other in {
        "purposes": long(Stream.of(0, ["a"], "other"), kind),
        "seeds": long(Stream.of(1, ["a"], "test"), kind),
        "ids": long(Stream.of(0, ["b"], "test"), kind),
        "examples": getattr(many, kind)(torch.zeros(1000, 1000), draw, torch.zeros_like(draw)).double(),
        "derived": long(Stream.of(0, ["a"], "test").derive(torch.tensor([0]), torch.tensor([0])), kind),
    }.items():
        assert abs(correlation(z, other)) < 5, name
        assert not bool((z == other).all(1).any()), name


def test_no_correlation_between_inputs(normal: Tensor) -> None:
    s = Stream.of(0, ["a"], "test")
    draw = torch.arange(1000)
    like = tuple(torch.zeros(1, 1000) for _ in range(4))
    flat = [t.double() for t in s.normal(like, torch.zeros_like(draw), draw)]
    assert torch.equal(flat[0], normal)
    for i in range(4):
        for j in range(i):
            assert abs(correlation(flat[i], flat[j])) < 5


def test_a_row_depends_on_its_key_and_draw_alone() -> None:
    like = {"a": torch.zeros(3, 5), "b": torch.zeros(3, 2, 2)}
    s = Stream.of(0, ["p", "q", "r"], "test")
    owner, draw = torch.tensor([2, 0, 1, 0, 2]), torch.tensor([7, 0, 3, 1, 7])
    for kind in ("normal", "uniform"):
        rows = getattr(s, kind)(like, owner, draw)
        assert torch.equal(rows["a"][0], rows["a"][4])
        for i in range(5):
            name = "pqr"[int(owner[i])]
            alone = getattr(Stream.of(0, [name], "test"), kind)(like, torch.tensor([0]), draw[i : i + 1])
            assert torch.equal(alone["a"][0], rows["a"][i])
            assert torch.equal(alone["b"][0], rows["b"][i])
        assert not torch.equal(rows["a"][1], rows["a"][3])


def test_wide_rows_are_filled_in_blocks_without_repeats() -> None:
    s = Stream.of(0, ["a"], "test")
    u = s.uniform(torch.zeros(1, 300_000), torch.tensor([0]), torch.tensor([0]))[0]
    assert len(u.view(-1, 2).unique(dim=0)) == 150_000
    shorter = s.uniform(torch.zeros(1, 1000), torch.tensor([0]), torch.tensor([0]))[0]
    assert torch.equal(shorter, u[:1000])


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_dtypes_are_casts_of_the_same_numbers(kind: str) -> None:
    s = Stream.of(0, ["a"], "test")
    at = torch.tensor([0]), torch.tensor([5])
    single = getattr(s, kind)(FEW, *at)
    assert single.dtype == torch.float32
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(getattr(s, kind)(FEW.to(dtype), *at), single.to(dtype))


def test_numbers_are_pinned() -> None:
    """The same on every machine and in every release: stored results can be repeated."""
    s = Stream.of(0, ["a"], "test")
    at = torch.tensor([0]), torch.tensor([0])
    assert key_of(0, "a", "test") == 13736479652738087080
    found = s.uniform(torch.zeros(1, 4), *at)[0]
    assert torch.equal((found.double() * 2**24).long(), torch.tensor([15789609, 10096247, 11112593, 15757941]))


def test_derive_keys_each_row() -> None:
    s = Stream.of(0, ["a", "b"], "test")
    owner, draw = torch.tensor([1, 0, 1]), torch.tensor([4, 4, 5])
    inner = s.derive(owner, draw)
    rows = inner.normal(torch.zeros(3, 100), torch.arange(3), torch.zeros(3, dtype=torch.long))
    alone = Stream.of(0, ["b"], "test").derive(torch.tensor([0]), torch.tensor([4]))
    again = alone.normal(torch.zeros(1, 100), torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(again[0], rows[0])
    assert len({tuple(r) for r in rows.tolist()}) == 3
    outer = s.normal(torch.zeros(2, 100), owner, draw)
    assert not bool((outer == rows).any())


def test_keys_tell_words_types_and_order_apart() -> None:
    keys = [key_of(0, "a"), key_of("0", "a"), key_of("a", 0), key_of(0, "a", ""), key_of("0a"), key_of(0.0, "a")]
    assert len(set(keys)) == len(keys)


@pytest.mark.usefixtures("as_users_run")
def test_ids_are_given_or_hashed() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    field = ap.Field(lambda x: x)

    def noise(x: Tensor, ids: object = None, seed: int = 0) -> Tensor:
        q = field.bind(x, target=0, ids=ids, seed=seed)  # pyright: ignore[reportArgumentType]
        return q.stream("p").normal(q.x, torch.arange(len(q)), torch.zeros(len(q), dtype=torch.long))

    plain = noise(x)
    assert torch.equal(noise(x.flip(0)), plain.flip(0))  # follows the content
    assert torch.equal(noise(x[1:2]), plain[1:2])
    assert not torch.equal(noise(x + 1e-9), plain)
    named = noise(x, ["u", "v", "w"])
    assert not torch.equal(named, plain)
    assert torch.equal(noise(x + 1, ["u", "v", "w"]), named)  # follows the name
    assert torch.equal(noise(x, ["w", "u", "v"]), named[[2, 0, 1]])
    assert not torch.equal(noise(x, ["u", "v", "w"], seed=1), named)
    whole = noise(x, [0, 1, 2])
    assert torch.equal(noise(x, range(3)), whole)
    assert torch.equal(noise(x, torch.arange(3)), whole)
    assert torch.equal(noise(x, np.arange(3)), whole)


def test_content_ids() -> None:
    x = {"a": torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]]), "b": torch.tensor([1, 1, 1])}
    first, second, third = content_ids(x)
    assert first == second != third
    wide = tree.apply(lambda t: t.double() if t.is_floating_point() else t, x)
    assert content_ids(wide) == [first, second, third]  # the same numbers in a wider dtype
    assert content_ids({"a": x["a"], "b": torch.tensor([1, 2, 1])})[1] != second
    assert len(set(content_ids(torch.tensor([0.0, 1.0, 2.0])))) == 3
    assert content_ids(torch.zeros(2, 3).bfloat16())[0] == content_ids(torch.zeros(2, 3))[0]


def test_precision_of_the_model_does_not_change_the_noise() -> None:
    x, net = torch.randn(2, 3), torch.nn.Linear(3, 1)
    rows = []
    for precision in (None, torch.float64):
        q = ap.Field(net, precision=precision).bind(x)
        rows.append(q.stream("p").normal(q.x, torch.arange(2), torch.zeros(2, dtype=torch.long)).double())
    assert torch.equal(*rows)
