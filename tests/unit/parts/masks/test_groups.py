"""Groups: partitions of the elements into players."""

import torch

import apportion as ap


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
