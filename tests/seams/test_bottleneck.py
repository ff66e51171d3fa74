"""An information bottleneck at an inner site, optimized through `value_and_grad` and the chain rule alone."""

import torch
from torch import Tensor, nn

import apportion as ap

BETA = 0.05
COPIES = 3


def model() -> nn.Sequential:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 25, 3)).double().eval()


def blend(alpha: Tensor, r: Tensor, noise: Tensor, owner: Tensor) -> Tensor:
    """z = λ r + (1 - λ) ε with λ = sigmoid(α), one row per noise copy."""
    gate = alpha.sigmoid()[owner]
    return gate * r[owner] + (1 - gate) * noise


def information(alpha: Tensor, r: Tensor) -> Tensor:
    """KL of N(λ r', (1 - λ)²) from N(0, 1), the mean over features, per example; r' is standardized r."""
    gate = alpha.sigmoid()
    variance = (1 - gate) ** 2
    return (-0.5 * (1 + variance.log() - (gate * r) ** 2 - variance)).flatten(1).mean(1)


def optimize(steps: int, wrong: bool = False) -> tuple[list[float], list[float], list[float]]:
    """Give the loss, and how far value and gradient lie from direct autograd, step by step."""
    net = model()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    field = ap.Field(net, ap.LogProbability(), ap.At("1"), batch_size=4)
    q = field.bind(x, target=[2, 0])
    r, owner = q.x, torch.arange(2).repeat_interleave(COPIES)
    torch.testing.assert_close(r, net[:2](x).detach())
    alpha = torch.full_like(r, 2.0).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=0.3)
    losses, value_gaps, grad_gaps = [], [], []
    for _ in range(steps):
        noise = q.stream("bottleneck").normal(r, owner, torch.arange(COPIES).repeat(2)) * r.std() + r.mean()
        z = blend(alpha, r, noise, owner)
        value, g = q.value_and_grad(z, owner)  # knows nothing of alpha
        kl = BETA * information(alpha, r).sum()
        (own,) = torch.autograd.grad(z, alpha, -g / COPIES)
        (rest,) = torch.autograd.grad(kl, alpha)
        grad = own if wrong else own + rest
        loss = (kl.detach() - value.sum() / COPIES).item()

        z = blend(alpha, r, noise, owner)
        logits = net[2:](z).log_softmax(1)[torch.arange(len(owner)), torch.tensor([2, 0])[owner]]
        direct = BETA * information(alpha, r).sum() - logits.sum() / COPIES
        (expected,) = torch.autograd.grad(direct, alpha)
        value_gaps.append(abs(loss - direct.item()))
        grad_gaps.append((grad - expected).abs().max().item())
        losses.append(loss)
        alpha.grad = grad
        optimizer.step()
    return losses, value_gaps, grad_gaps


def test_equal_to_direct_autograd_and_the_loss_falls():
    losses, value_gaps, grad_gaps = optimize(12)
    assert max(value_gaps) <= 1e-12
    assert max(grad_gaps) <= 1e-12
    assert losses[-1] < losses[0] - 0.05


def test_a_dropped_term_is_noticed():
    _, _, grad_gaps = optimize(1, wrong=True)
    assert grad_gaps[0] > 1e-5


def test_known_information():
    """KL(.3, 1.7) of the authors' code: .231725 nats; at r' = 0 and λ = sigmoid(5) 4.5067."""
    logit = float(torch.logit(torch.tensor(0.3, dtype=torch.float64)))
    for alpha, r, expected in ((logit, 1.7, 0.231725), (5.0, 0.0, 4.5067)):
        a, b = (torch.full((1, 1), v, dtype=torch.float64) for v in (alpha, r))
        assert abs(float(information(a, b)) - expected) < 5e-5


def test_the_users_model_keeps_no_gradient():
    net = model()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    q = ap.Field(net, ap.LogProbability(), ap.At("1")).bind(x)
    alpha = torch.zeros_like(q.x).requires_grad_()
    z = alpha.sigmoid() * q.x
    _, g = q.value_and_grad(z, torch.arange(2))
    assert not g.requires_grad
    z.backward(g)
    assert alpha.grad is not None
    assert all(p.grad is None for p in net.parameters())
