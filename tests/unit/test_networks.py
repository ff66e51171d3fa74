"""The networks that tests and benchmarks explain: repeatable, not degenerate, the same however a ReLU is spelled."""

from __future__ import annotations

import pytest
import torch
from benchmarks.networks import CLASSES, NETWORKS, OWN, RELU_ONLY, RELUS, Spelled, make, respell

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "lite0"])
def test_networks_are_repeatable_and_not_degenerate(name: str) -> None:
    before = torch.random.get_rng_state()
    net, again, single = make(name), make(name), make(name, torch.float32, rows=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(m.training for m in net.model.modules())
    x = net.x.clone().requires_grad_()
    out = net.model(x)
    assert torch.equal(out, again.model(again.x))
    assert out.shape[1] >= CLASSES
    torch.testing.assert_close(single.model(single.x), out[:1].float().detach(), atol=1e-4, rtol=1e-3)
    slopes = torch.stack([torch.autograd.grad(out[:, c].sum(), x, retain_graph=True)[0] for c in (0, 1)])
    assert (out[0] - out[1]).abs().max() > 0.01  # examples differ
    assert out[0].std() > 0.1  # classes differ
    assert slopes.norm() > 0.1
    assert (slopes == 0).double().mean() < 0.1
    assert torch.nn.functional.cosine_similarity(*slopes.flatten(1), dim=0) < 0.95
    other = make(name, seed=1)
    assert not torch.allclose(other.model(net.x), out, atol=1e-3)


def test_real_weights() -> None:
    net = make("lite0", torch.float32, rows=1)
    assert net.model(net.x)[0].topk(5).indices.tolist().count(285) == 1  # Egyptian cat


@pytest.mark.parametrize("name", [n for n in RELU_ONLY if n in OWN])
def test_spellings_are_the_same_network(name: str) -> None:
    net = make(name)
    out = net.model(net.x.clone())
    for act in RELUS.values():
        assert torch.equal(make(name, act=act).model(net.x.clone()), out)
        assert torch.equal(respell(make(name).model, lambda act=act: Spelled(act))(net.x.clone()), out)
