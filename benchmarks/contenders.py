"""The methods that benchmarks of metrics judge, with settings that fit a budget; defaults wherever nothing is said."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import apportion as ap
from apportion.core.explainer import Explainer

B, Q = ap.baselines, ap.quadrature

UNSUITED = {
    "CXPlain, L2X, RealTimeSaliency": "a network that explains is trained first, on many examples",
    "CLIME": "it fits a slope to every element, and needs as many samples",
    "SAGE, LossSHAP": "they explain a loss, SAGE over a data set",
    "ACE": "it asks for vectors, and sets one feature for a whole data set",
    "Semivalue": "its default is Occlusion; Shapley and Banzhaf are two of it",
}
"""Methods that are nowhere in the tables, with why."""


@dataclass(frozen=True)
class Room:
    """What methods are set up for.

    Attributes:
        field: the model's.
        data: examples that are not judged, as background and to learn from; none for methods that need neither.
        grey: x', where the network reads nothing.
        players: what methods of removal remove.
        steps: on a path.
        budget: rows of methods that sample, about.
        convolutional: whether there are feature maps.
        optimized: steps of methods that search a mask.
        sampled: noisy copies.
    """

    field: ap.Field
    data: Tensor | None
    grey: Any
    players: Any
    steps: int
    budget: int
    convolutional: bool = True
    optimized: int = 100
    sampled: int = 8


def _gradient(r: Room) -> dict[str, Explainer]:
    n, noise = r.sampled, ap.noise.Gaussian(0.15)
    return {
        "Gradient": ap.Gradient(),
        "GradientTimesInput": ap.GradientTimesInput(r.grey),
        "SmoothGrad": ap.SmoothGrad(samples=n, noise=noise),
        "SmoothGrad of GradientTimesInput": ap.SmoothGrad(ap.GradientTimesInput(r.grey), samples=n, noise=noise),
        "SmoothGradSquared": ap.SmoothGradSquared(samples=n, noise=noise),
        "VarGrad": ap.VarGrad(samples=n, noise=noise),
    }


def _path(r: Room) -> dict[str, Explainer]:
    n, half, attack = r.steps, max(4, r.steps // 2), B.NearestAdversarial(steps=10)
    out: dict[str, Explainer] = {
        "IntegratedGradients": ap.IntegratedGradients(r.grey, Q.Gauss(n)),
        "IntegratedGradients from black": ap.IntegratedGradients(B.Zero(), Q.Gauss(n)),
        "IDGI": ap.IDGI(ap.paths.Straight(quadrature=Q.Left(n), baseline=r.grey)),
        "GuidedIG": ap.GuidedIG(r.grey, steps=n),
        "SplitIG": ap.SplitIG(r.grey, Q.Gauss(n)),
        "IG2": ap.IG2(r.grey, steps=n),
        "AGI": ap.AGI(iterations=max(2, n // 4), topk=4),
        "BIG": ap.BIG(attack, quadrature=Q.Gauss(n)),
        "BoundarySaliency": ap.BoundarySaliency(attack),
        "CrediblePath": ap.CrediblePath(replace(ap.CrediblePath().baseline, max_iter=20), total=3 * max(2, n // 3)),
        "LPI": ap.LPI(B.Noise(0.5, 0.5, count=max(2, n // 4), uniform=True), Q.MonteCarlo(4)),
        "NeFLAG": ap.NeFLAG(points=4, steps=max(2, n // 4)),
        "SAMP": ap.SAMP(r.grey, size=1 / n),
        "SPI": ap.SPI(r.grey, paths=4, quadrature=Q.Midpoint(half), pieces=half),
        "SPIProbability": ap.SPIProbability(
            r.grey, paths=4, quadrature=Q.Midpoint(max(4, n // 2)), pieces=max(4, n // 2)
        ),
    }
    if r.convolutional:
        out["BlurIG"] = ap.BlurIG(sigma_max=8.0, quadrature=Q.Gauss(n))
    if r.data is not None:
        out["ExpectedGradients"] = ap.ExpectedGradients(B.Data(r.data, n))
    return out


def _backward(r: Room) -> dict[str, Explainer]:
    out: dict[str, Explainer] = {
        "GuidedBackprop": ap.GuidedBackprop(),
        "Deconvnet": ap.Deconvnet(),
        "RectGrad": ap.RectGrad(),
        "DeepLIFT": ap.DeepLIFT(r.grey),
        "DeepLIFT, RevealCancel": ap.DeepLIFT(r.grey, ap.rules.deep_lift_reveal_cancel()),
        "LRP-0": ap.LRP(),
        "LRP, epsilon plus": ap.LRP(ap.rules.epsilon_plus()),
        "LRP, alpha 2 beta 1": ap.LRP(ap.rules.alpha_beta()),
        "LRP, gamma and box": ap.LRP(ap.rules.epsilon_gamma_box(0.0, 1.0)),
        "DeepTaylor": ap.DeepTaylor(),
        "ExcitationBackprop": ap.ExcitationBackprop(),
        "ContrastiveExcitationBackprop": ap.ContrastiveExcitationBackprop(),
        "FullGrad": ap.FullGrad(),
        "FullGradSaliency": ap.FullGradSaliency(),
    }
    if r.data is not None:
        out["DeepSHAP"] = ap.DeepSHAP(B.Data(r.data, 8))
        out["PatternNet"], out["PatternAttribution"] = ap.PatternNet(), ap.PatternAttribution()
    return out


def _cam(r: Room) -> dict[str, Explainer]:
    if not r.convolutional:
        return {}
    some = [ap.CAM(), ap.GradCAM(), ap.GradCAMPlusPlus(), ap.SmoothGradCAMPlusPlus(), ap.XGradCAM(), ap.HiResCAM()]
    some += [ap.LayerCAM(), ap.ScoreCAM(baseline=r.grey), ap.EigenCAM(), ap.GuidedGradCAM()]
    return {type(m).__name__: ap.Resized(m) for m in some}


def _removal(r: Room) -> dict[str, Explainer]:
    game: dict[str, Any] = {"groups": r.players, "fill": ap.fills.Baselines(r.grey)}
    out: dict[str, Explainer] = {
        "Occlusion": ap.Occlusion(**game),
        "Shapley": ap.Shapley(**game, budget=r.budget),
        "Banzhaf": ap.Banzhaf(**game, budget=r.budget),
        "KernelSHAP": ap.KernelSHAP(**game, budget=r.budget),
        "LIME": ap.LIME(**game, samples=r.budget // 2),
        "GLIME": ap.GLIME(**game, samples=r.budget // 2),
        "OptiLIME": ap.OptiLIME(**game, samples=r.budget // 2),
        "BayLIME": ap.BayLIME(**game, samples=r.budget // 2),
        "SLIME": ap.SLIME(**game, samples=r.budget // 4, most=r.budget // 2),
    }
    if r.convolutional and r.data is not None:
        wide = min(r.data.shape[-2:]) // 7
        fill = ap.fills.ConditionalGaussian.fit(r.data, side=wide + 4, patches=5000, samples=4)
        out["PredictionDifference"] = ap.PredictionDifference(groups=ap.groups.Patches(wide, wide), fill=fill)
    if r.convolutional:
        out["RISE"] = ap.RISE(budget=r.budget, fill=ap.fills.Baselines(r.grey), centred=True)
    return out


def _subset(r: Room) -> dict[str, Explainer]:
    if not r.convolutional or r.data is None:
        return {}
    n = r.optimized
    side = min(r.data.shape[-2:])
    blur = side / 11
    mask = ap.subsets.SmoothMask(max(2, side // 32), sigma=blur)
    return {
        "ExtremalPerturbation": ap.ExtremalPerturbation(
            mask=mask, steps=n, growth=1.0035 ** (800 / n), sigma=blur, margin=False
        ),
        "MeaningfulPerturbation": ap.MeaningfulPerturbation(
            steps=n, cell=max(2, side // 28), sigma=max(1.0, side / 45), jitter=max(1, side // 56)
        ),
        "InformationBottleneck": ap.Resized(ap.InformationBottleneck()),
    }


def contenders(r: Room) -> dict[str, dict[str, Explainer]]:
    """Give every method by the family it stands in."""
    return {
        "gradient": _gradient(r),
        "path": _path(r),
        "backward": _backward(r),
        "CAM": _cam(r),
        "removal": _removal(r),
        "subset": _subset(r),
    }


def fitted(methods: dict[str, dict[str, Explainer]], r: Room) -> dict[str, dict[str, Explainer]]:
    """Let methods that learn from data do so; what cannot is left as it is, and says why when it is asked."""
    if r.data is None:
        return methods
    out: dict[str, dict[str, Explainer]] = {}
    for family, some in methods.items():
        out[family] = {}
        for name, method in some.items():
            try:
                out[family][name] = method.fitted(r.field, r.data)
            except ap.ApportionError:
                out[family][name] = method
    return out
