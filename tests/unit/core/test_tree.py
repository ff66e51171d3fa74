"""Trees of tensors, and tensors inside a model's outputs."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apportion.core import tree

Pair = namedtuple("Pair", "left right")


@dataclass
class Outputs:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    name: str = "n"


@dataclass(frozen=True)
class Frozen:
    logits: Tensor


class Record(OrderedDict[str, Any]):
    """As in transformers: a dict whose entries are attributes as well."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


def nested() -> Any:
    return {"b": torch.ones(2, 3), "a": [torch.zeros(2), Pair(torch.ones(2, 1), torch.zeros(2, 2))]}


def test_apply_keeps_structure_and_types() -> None:
    out = tree.apply(lambda t: t + 1, nested())
    assert list(out) == ["b", "a"]
    assert isinstance(out["a"], list)
    assert isinstance(out["a"][1], Pair)
    assert torch.equal(out["a"][1].left, torch.full((2, 1), 2.0))


def test_order_of_leaves_names_and_rebuild_agrees() -> None:
    x = nested()
    assert tree.names(x) == ["x['b']", "x['a'][0]", "x['a'][1][0]", "x['a'][1][1]"]
    assert [tuple(t.shape) for t in tree.leaves(x)] == [(2, 3), (2,), (2, 1), (2, 2)]
    again = tree.rebuild(x, tree.leaves(x))
    assert all(a is b for a, b in zip(tree.leaves(again), tree.leaves(x), strict=True))
    assert tree.rows(x) == 2


def test_rest_is_matched_by_key_not_by_order() -> None:
    out = tree.apply(torch.sub, {"a": torch.ones(1), "b": torch.zeros(1)}, {"b": torch.ones(1), "a": torch.zeros(1)})
    assert out["a"].item() == 1
    assert out["b"].item() == -1


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 3),
        (torch.zeros(2),),
        (torch.zeros(2),) * 3,
        {"a": torch.zeros(2), "b": torch.zeros(2)},
    ],
)
def test_apply_refuses_other_structures(other: Any) -> None:
    with pytest.raises(TypeError, match="differ"):
        tree.apply(torch.add, (torch.zeros(2), torch.zeros(2)), other)


@pytest.mark.parametrize("other", [{"a": torch.zeros(1)}, (torch.zeros(1),), torch.zeros(2)])
def test_apply_refuses_other_keys(other: Any) -> None:
    with pytest.raises(TypeError, match="differ"):
        tree.apply(torch.add, {"a": torch.zeros(1), "b": torch.zeros(1)}, other)


def test_total_and_add_rows() -> None:
    x = (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0]))
    assert tree.total(x).tolist() == [13, 27]
    into = tree.apply(torch.zeros_like, x)
    owner, weight = torch.tensor([1, 1, 0]), torch.tensor([1.0, 2.0, 3.0])
    tree.add_rows(into, owner, tree.index(x, torch.tensor([0, 1, 0])), weight)
    assert into[0].tolist() == [[3, 6], [7, 10]]
    assert into[1].tolist() == [30, 50]


def test_all_finite() -> None:
    assert tree.all_finite((torch.ones(2), torch.tensor([1])))
    assert not tree.all_finite((torch.ones(2), torch.tensor([1.0, torch.nan])))


@pytest.mark.parametrize(
    "held",
    [
        torch.ones(2),
        {"logits": torch.ones(2), "n": 3},
        Record(logits=torch.ones(2)),
        Pair(torch.ones(2), "text"),
        [torch.ones(2), None],
        Outputs(torch.ones(2), (torch.ones(2),)),
        Frozen(torch.ones(2)),
        SimpleNamespace(logits=torch.ones(2)),
        torch.ones(2, 1).max(1),
    ],
    ids=lambda h: type(h).__name__,
)
def test_outputs_keep_their_type(held: Any) -> None:
    new = tree.map_tensors(lambda a, b: a + b, held, held)
    assert type(new) is type(held)
    before, after = tree.tensors(held), tree.tensors(new)
    assert len(before) == len(after) > 0
    assert all(torch.equal(b, 2 * a) for a, b in zip(before, after, strict=True))
    if hasattr(held, "logits"):
        assert new.logits.tolist() == [2, 2]
        assert held.logits.tolist() == [1, 1]


def test_tensors_inside_outputs() -> None:
    found = tree.tensors({"a": (torch.ones(1), {"b": torch.zeros(1)}), "c": "text"})
    assert [t.item() for t in found] == [1, 0]
    for held in (nn.Linear(1, 1), "text", None, 3, {}):
        assert tree.tensors(held) == []
    read_only = tree.map_tensors(lambda t: t + 1, MappingProxyType({"a": torch.ones(1)}))
    assert read_only["a"].item() == 2


def test_self_reference_ends() -> None:
    loop: dict[str, Any] = {"a": torch.ones(1)}
    loop["self"] = loop
    assert len(tree.tensors(loop)) == 4
    assert tree.map_tensors(lambda t: t + 1, loop)["self"]["a"].item() == 2


def test_ordinary() -> None:
    with torch.inference_mode():
        x = torch.ones(1)
    y = tree.ordinary(x)
    assert x.is_inference()
    assert not y.is_inference()
    assert tree.ordinary(y) is y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_either_is_where(dtype: torch.dtype) -> None:
    """Bit by bit, whatever the numbers are and however they lie."""
    odd = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 3e38, -3e38]).to(dtype)
    x = odd[torch.randint(6, (5, 1, 3, 4, 4))].to(memory_format=torch.preserve_format)
    other = odd[torch.randint(6, (1, 2, 3, 4, 4))].expand(5, -1, -1, -1, -1)
    mask = (torch.rand(5, 1, 1, 4, 4) > 0.5).expand(-1, -1, 3, -1, -1)
    found, plain = tree.either(mask, x, other), torch.where(mask, x, other)
    same = (found == plain) | (found.isnan() & plain.isnan()) if dtype.is_floating_point else found == plain
    assert found.dtype == dtype
    assert bool(same.all())
    assert not dtype.is_floating_point or torch.equal(found.signbit(), plain.signbit())
    assert found.is_contiguous()


def test_either_keeps_graphs() -> None:
    x = torch.ones(1, 3, requires_grad=True)
    tree.either(torch.tensor([[True, False, True]]), x, torch.zeros(1, 3)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 0, 1]]
