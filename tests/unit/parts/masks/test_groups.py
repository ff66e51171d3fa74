"""Groups: partitions of the elements into players."""

import sys
from typing import Any, cast

import numpy as np
import pytest
import torch

import apportion as ap
from apportion.core.attribution import Groups
from apportion.core.errors import ConfigError, InputError

DOUBLE = torch.float64


def test_elements_are_numbered_through_all_inputs() -> None:
    like = {"a": torch.zeros(5, 2, 2), "b": torch.zeros(5), "c": torch.zeros(5, 3)}
    labels = ap.groups.Elements().labels(like)
    assert labels["a"].tolist() == [[[0, 1], [2, 3]]]
    assert labels["b"].tolist() == [4]
    assert labels["c"].tolist() == [[5, 6, 7]]


def test_pixels_share_their_channels() -> None:
    labels = ap.groups.Pixels().labels((torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 5)))
    assert labels[0].tolist() == [[[[0, 1], [2, 3]]]]
    assert labels[1].tolist() == [[[4, 5, 6, 7, 8]]]


def test_labels_broadcast() -> None:
    like = torch.zeros(2, 3, 4)
    shared = torch.tensor([[0, 0, 1, 1]] * 3)
    assert torch.equal(ap.groups.Labels(shared).labels(like)[0], shared)
    assert torch.equal(ap.groups.Labels(shared[None]).labels(like)[0], shared)
    each = torch.stack([shared, 1 - shared])
    assert torch.equal(ap.groups.Labels(each).labels(like), each)
    columns = torch.tensor([[[0, 1, -1, 2]]], dtype=torch.int8)
    found = ap.groups.Labels(columns).labels(like)
    assert found.shape == (1, 1, 4)
    assert found.dtype == torch.int64


def test_one_input_may_have_no_player() -> None:
    like = (torch.zeros(1, 2), torch.zeros(1, 3))
    value = (torch.tensor([0, 1]), torch.tensor([-1, -1, -1]))
    assert ap.groups.Labels(value).labels(like)[1].tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.tensor([0, -2, 1]), "a group label of -2"),
        (torch.tensor([0.0, 1.0, 1.0]), r"group labels of torch.float32[\s\S]*labels.long\(\)"),
        (torch.tensor([True, False, True]), r"group labels of torch.bool[\s\S]*mask.long\(\)"),
        ([0, 1, 1], "int as group labels|group labels of"),
        (torch.tensor([0, 1]), r"group labels of shape \(1, 2\)"),
        (torch.zeros(0, 3).long(), r"group labels of shape \(0, 3\)"),
    ],
)
def test_labels_that_are_none(value: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        ap.groups.Labels(value).labels(torch.zeros(2, 3))


# -- windows that overlap -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size", "stride"),
    [((6, 7), 3, 1), ((6, 7), 3, 2), ((6, 7), (2, 4), (2, 3)), ((5, 5), 5, 1), ((9,), 4, 3), ((9,), 2, None)],
)
def test_patches_against_a_loop(shape: tuple[int, ...], size: Any, stride: Any) -> None:
    """Windows by hand: where they start, and which elements they are over."""
    like = torch.zeros(2, 3, *shape)
    each = size if isinstance(size, tuple) else (size,) * len(shape)
    steps = each if stride is None else stride if isinstance(stride, tuple) else (stride,) * len(shape)
    starts = []
    for length, s, step in zip(shape, each, steps, strict=True):
        at = [i for i in range(length) if i % step == 0 and i + s <= length]
        starts.append(at if at[-1] + s == length else [*at, length - s])
    corners = [(i,) for i in starts[0]] if len(shape) == 1 else [(i, j) for i in starts[0] for j in starts[1]]
    patches = ap.groups.Patches(size, stride)
    assert patches.count(like) == len(corners)
    gone = torch.rand(4, len(corners)) < 0.3
    kept = patches.kept(~gone, like).expand(4, 3, *shape)
    values = torch.randn(2, len(corners), dtype=DOUBLE)
    total = patches.total(values, like)
    want_kept, want = torch.ones(4, 3, *shape, dtype=torch.bool), torch.zeros(2, 3, *shape, dtype=DOUBLE)
    for p, corner in enumerate(corners):
        at = tuple(slice(i, i + s) for i, s in zip(corner, each, strict=True))
        for r in range(4):
            if gone[r, p]:
                want_kept[(r, slice(None), *at)] = False
        for b in range(2):
            want[(b, slice(None), *at)] += values[b, p]
    assert torch.equal(kept, want_kept)
    assert torch.allclose(total, want, atol=1e-12)
    assert bool((patches.total(torch.ones_like(values), like) >= 1).all())


def test_patches_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="patches of 4 on an axis of 3"):
        ap.groups.Patches(4).count(torch.zeros(1, 1, 3, 9))
    with pytest.raises(InputError, match="one number, or 1"):
        ap.groups.Patches((2, 2)).count(torch.zeros(1, 1, 9))
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        ap.groups.Patches(2).count(torch.zeros(1, 9))
    with pytest.raises(ConfigError, match="stride=0"):
        ap.groups.Patches(2, 0)
    with pytest.raises(InputError, match="at a stride of 3"):
        ap.groups.Patches(2, 3).count(torch.zeros(1, 1, 9))
    q = ap.Field(lambda x: x.flatten(1).sum(1)).bind(torch.rand(1, 1, 4))
    game = ap.Game(q, ap.groups.Patches(2, 1), ap.fills.Baselines())
    with pytest.raises(InputError, match="soft masks of windows"):
        game.value(torch.full((1, 3), 0.5))


# -- superpixels --------------------------------------------------------------------------------


def blocks() -> torch.Tensor:
    """Two pictures of four plain quarters."""
    x = torch.zeros(2, 3, 24, 24, dtype=DOUBLE)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=DOUBLE)
    for i, c in enumerate(colours):
        x[0, :, 12 * (i // 2) :, 12 * (i % 2) :] = c[:, None, None]
    x[1] = x[0].flip(-1)
    return x


SEGMENTS: dict[str, Groups] = {
    "slic": ap.groups.Superpixels(4, compactness=1.0),
    "felzenszwalb": ap.groups.Felzenszwalb(scale=1.0, sigma=0.1),
    "quickshift": ap.groups.QuickShift(kernel=2.0, farthest=8.0, ratio=0.9),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_superpixels_follow_the_picture(name: str) -> None:
    x = blocks()
    labels = SEGMENTS[name].labels(x)
    assert labels.shape == (2, 1, 24, 24)
    for picture, found in zip(x, labels[:, 0], strict=True):
        for segment in found.unique():
            inside = picture[:, found == segment]
            assert bool((inside == inside[:, :1]).all())  # no segment crosses an edge
        assert found.unique().tolist() == list(range(int(found.max()) + 1))
    assert torch.equal(SEGMENTS[name].labels(x[1:]), labels[1:])  # alone as in the batch
    assert torch.equal(SEGMENTS[name].labels(3 * x - 7), labels)  # whatever the range of the input
    q = ap.Field(lambda x: x.flatten(1).sum(1)).bind(x)
    assert ap.Game(q, SEGMENTS[name], ap.fills.Baselines(ap.baselines.Constant(0.5))).players >= 4


def test_superpixels_of_one_channel_and_of_no_picture() -> None:
    assert ap.groups.Superpixels(4).labels(torch.rand(1, 1, 16, 16)).max() > 1
    with pytest.raises(InputError, match="3 channels"):
        ap.groups.QuickShift().labels(torch.rand(1, 1, 16, 16))
    with pytest.raises(InputError, match="superpixels of input"):
        ap.groups.Superpixels(4).labels(torch.rand(1, 16))


def test_superpixels_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(ConfigError, match=r"apportion\[image\]"):
        ap.groups.Superpixels(4).labels(torch.rand(1, 3, 16, 16))


# -- tokens, words, columns, several inputs -----------------------------------------------------


def test_tokens_leave_padding_out() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    x = torch.randn(2, 4, 3, dtype=DOUBLE)
    labels = ap.groups.RealTokens(mask.bool()).labels(x)
    assert labels[..., 0].tolist() == [[0, 1, 2, -1], [0, 1, -1, -1]]
    game = ap.Game(ap.Field(lambda x: x.sum((1, 2))).bind(x), ap.groups.RealTokens(mask.bool()), ap.fills.Baselines())
    assert game.sizes.tolist() == [3, 2]
    assert torch.allclose(game.value(torch.zeros(1, 3)), (x * (1 - mask[..., None])).sum((1, 2))[:, None])
    assert ap.groups.RealTokens().labels(x).flatten().tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"shape \(2, 4\) for input \(2, 5\)"):
        ap.groups.RealTokens(mask.bool()).labels(torch.zeros(2, 5))
    with pytest.raises(InputError, match="embedding"):
        ap.groups.RealTokens().labels(torch.zeros(2, 5, 5, 5))


def test_words_of_several_tokens() -> None:
    words = ap.groups.Words.of([[None, 7, 7, 9, None], [0, 1, 1, 1, 3]])
    assert words.labels(torch.zeros(2, 5)).tolist() == [[-1, 0, 0, 1, -1], [0, 1, 1, 1, 2]]


def test_columns() -> None:
    assert ap.groups.Columns((2, 1)).labels(torch.zeros(3, 3)).tolist() == [[0, 0, 1]]
    with pytest.raises(InputError, match="blocks of 3 columns"):
        ap.groups.Columns((2, 1)).labels(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="widths from 1"):
        ap.groups.Columns((2, 0))


def test_correlated_columns_are_scipys_clusters() -> None:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    for seed in range(5):
        rng = np.random.default_rng(seed)
        base = rng.normal(size=(300, 4))
        data = base @ rng.normal(size=(4, 9)) + rng.normal(size=(300, 9)) * rng.uniform(0.1, 2, 9)
        apart = 1 - np.abs(np.corrcoef(data.T))
        np.fill_diagonal(apart, 0)
        for closest in (0.2, 0.5, 0.8):
            want = fcluster(linkage(squareform(apart, checks=False), "average"), closest, "distance")
            found = ap.groups.Correlated.fit(torch.from_numpy(data), closest).cluster.numpy()
            assert ((want[:, None] == want) == (found[:, None] == found)).all()
    constant = torch.randn(50, 3)
    constant[:, 1] = 5
    assert ap.groups.Correlated.fit(constant, 0.9).cluster[1].item() == 1
    with pytest.raises(InputError, match="shape"):
        ap.groups.Correlated.fit(torch.zeros(1, 3))


def test_groups_of_each_input() -> None:
    x = (torch.rand(2, 1, 4, 4), torch.rand(2, 3))
    ragged = ap.groups.Labels(torch.tensor([[0, 0, 1, 1]] * 4 + [[0] * 4] * 4).reshape(2, 1, 4, 4))
    labels = ap.groups.PerInput((ragged, ap.groups.Elements())).labels(x)
    assert labels[1].tolist() == [[2, 3, 4], [1, 2, 3]]
    q = ap.Field(lambda a, b: a.flatten(1).sum(1) + b.sum(1)).bind(x)
    game = ap.Game(q, ap.groups.PerInput((ragged, ap.groups.Elements())), ap.fills.Baselines())
    assert game.sizes.tolist() == [5, 4]
    both = ap.Game(q, ap.groups.EachInput(), ap.fills.Baselines())
    assert torch.allclose(both.value(torch.eye(2))[:, 1], x[1].sum(1))
    with pytest.raises(InputError, match="2 groups for 1 input"):
        ap.groups.PerInput((ragged, ragged)).labels(x[0])
    with pytest.raises(InputError, match="partitions"):
        ap.groups.PerInput((cast(Any, ap.groups.Patches(2)), ragged)).labels(x)
