"""Other libraries, asked for the same work as ours: what is imported stands inside the functions that use it.

Every function takes a network and gives a callable that makes one map. A library that is not installed, or does not
run on this network, raises, and its row says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Make, Net

PEERS = ("captum", "zennit", "grad-cam", "shap", "torchvision", "transformers")
"""Whose versions are reported."""

_OPERATORS = (
    "nms qnms roi_align qroi_align _roi_align_backward ps_roi_align _ps_roi_align_backward roi_pool "
    "_roi_pool_backward ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward"
)
_held: list[torch.library.Library] = []


def make_torchvision_importable() -> None:
    """Declare the compiled operators of torchvision where they do not load, as beside a CPU build of torch.

    Zennit, pytorch-grad-cam and transformers import torchvision and call none of these operators; without their
    names the import itself fails.
    """
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS.split():
            library.define(f"{name}() -> ()")
        _held.append(library)


# -- Captum -----------------------------------------------------------------------------------------


def captum(method: str, *, of_model: Callable[[Any], Any] | None = None, **options: Any) -> Make:
    """Make a method of Captum.

    Args:
        method: the name of its class.
        of_model: makes what the class is given, for wrappers; the model unless given.
        options: of `attribute`; functions are called with the network.
    """

    def peer(net: Net) -> Callable[[], Any]:
        import captum.attr

        made = getattr(captum.attr, method)(net.model if of_model is None else of_model(net.model))
        given = {k: v(net) if callable(v) else v for k, v in options.items()}

        def run() -> Any:
            found = made.attribute(net.x.clone().requires_grad_(), target=net.target, **given)
            return found[0] if given.get("return_convergence_delta") else found

        return run

    return peer


def noise_tunnel(samples: int) -> Make:
    """Make SmoothGrad of Captum."""

    def inner(model: Any) -> Any:
        import captum.attr

        return captum.attr.Saliency(model)

    options = {"nt_type": "smoothgrad", "nt_samples": samples, "stdevs": 0.15, "abs": False}
    return captum("NoiseTunnel", of_model=inner, nt_samples_batch_size=1, **options)


def lime(samples: int, batch: int, labels: Callable[[Net], Tensor]) -> Make:
    """Make LIME of Captum with ridge and cosine kernel, as its paper's code has them, in batches."""

    def peer(net: Net) -> Callable[[], Any]:
        from captum._utils.models.linear_model import SkLearnRidge
        from captum.attr import Lime
        from captum.attr._core.lime import get_exp_kernel_similarity_function

        made = Lime(net.model, SkLearnRidge(alpha=1.0), get_exp_kernel_similarity_function("cosine", 0.25))
        options = {"n_samples": samples, "perturbations_per_eval": batch, "feature_mask": labels(net)}
        return lambda: made.attribute(net.x, target=net.target, **options)

    return peer


# -- Zennit -----------------------------------------------------------------------------------------


def zennit(composite: str, **options: Any) -> Make:
    """Make relevance under a composite of Zennit, with batch-norms merged into the layers before them."""

    def peer(net: Net) -> Callable[[], Tensor]:
        from zennit import attribution, canonizers, composites

        made = getattr(composites, composite)(canonizers=[canonizers.SequentialMergeBatchNorm()], **options)

        def start(scores: Tensor) -> Tensor:
            out = torch.zeros_like(scores)
            out[:, net.target] = scores[:, net.target]
            return out.detach()

        def run() -> Tensor:
            with attribution.Gradient(model=net.model, composite=made) as attributor:
                return attributor(net.x, start)[1]

        return run

    return peer


# -- pytorch-grad-cam -------------------------------------------------------------------------------


def grad_cam(method: str) -> Make:
    """Make a class activation map of pytorch-grad-cam: relu, resized to the picture, scaled to [0, 1]."""

    def peer(net: Net) -> Callable[[], Tensor]:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        cam = getattr(pytorch_grad_cam, method)(net.model, [net.model.get_submodule(net.layer)])
        targets = [ClassifierOutputTarget(net.target)] * len(net.x)
        cam.batch_size = len(net.x)
        x = net.x.clone().requires_grad_()  # it differentiates towards the input or the weights, whichever asks
        return lambda: torch.from_numpy(cam(x, targets))

    return peer


# -- shap -------------------------------------------------------------------------------------------


def shap(method: str, background: Callable[[Net], Tensor], **options: Any) -> Make:
    """Make an explainer of shap, for the class alone."""

    def peer(net: Net) -> Callable[[], Tensor]:
        import shap

        class One(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = net.model

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x)[:, net.target : net.target + 1]

        made = getattr(shap, method)(One(), background(net))
        return lambda: torch.as_tensor(made.shap_values(net.x, **options)).squeeze(-1)

    return peer
