"""What is compared: every row of the benchmark, by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import apportion as ap
from apportion.core.explainer import Explainer
from apportion.parts.masks.sampled import SampledMethod
from apportion.parts.quadrature import Adaptive, Gauss, Midpoint, Power
from benchmarks import models, networks, peers
from benchmarks.harness import Judged, Make, Net, Passes, Ratio, Row, Told, Variant, told

BATCHED, SEQUENTIAL = 1.3, 1.6
"""Goals: a method's time over its declared passes times the bare pass."""
STEP_BY_STEP = {"agi", "big", "boundary_saliency", "credible_path", "guided_ig", "ig2", "ne_flag", "samp"}
"""Methods whose next pass depends on the one before."""
REASONS: dict[str, str] = {
    "contrastive_excitation_backprop": "each layer runs a second time, with its positive weights, for two signals",
    "deep_lift": "each operation goes through Python in the rules' mode, on two tracks",
    "deep_shap": "each operation goes through Python in the rules' mode, on two tracks",
    "deep_taylor": "each layer runs again, with parts of its weights",
    "eigen_cam": "a singular value decomposition",
    "excitation_backprop": "each layer runs a second time, with its positive weights",
    "full_grad": "maps of every operation are resized and added",
    "full_grad_saliency": "maps of every operation are resized and added",
    "guided_grad_cam": "a pass that finds the layer; each operation goes through Python in the rules' mode",
    "lrp": "layers are folded as they run, and each operation goes through Python in the rules' mode",
    "pattern_attribution": "each layer runs a second time, with its pattern",
    "pattern_net": "each layer runs a second time, with its pattern",
    "rect_grad": "a selection by rank in every ReLU",
}
"""Methods known to miss their goal, and why."""
LAYERS = {"resnet18": "model.resnet.encoder.stages.3", "lite0": "_blocks.15", "small": "model.resnet.encoder.stages.1"}
STANDINS = {"lite0": "residual", "resnet18": "residual", "small": "residual", "vgg11": "vgg"}
STANDINS |= {"vit_s": "vit", "bert_base": "bert"}
"""Small networks of the same make, for the short form."""


@dataclass(frozen=True)
class Setting:
    """Where it runs, and whether only to see that it does."""

    device: torch.device = torch.device("cpu")
    short: bool = False

    def net(self, name: str, rows: int, size: int = 224) -> Callable[[], Net]:
        """Say how a network and its examples are made; sequences have as many words as pictures have pixels a side."""

        def made() -> Net:
            if self.short:
                small = networks.make(STANDINS[name], torch.float32, rows=min(rows, 2))
                model, x = small.model, small.x.sigmoid()
            elif name == "small":
                wide = {"embedding_size": 32, "hidden_sizes": [32, 64]}
                small = networks.make("resnet", torch.float32, rows=rows, shape=(3, size, size), **wide)
                model, x = small.model, small.x.sigmoid()
            else:
                options = {"size": size} if name == "vit_s" else {}
                model = getattr(models, name)(**options).requires_grad_(False)
                shape = (rows, size, 768) if name == "bert_base" else (rows, 3, size, size)
                x = pictures(rows, size) if name == "lite0" else _rand(*shape, seed=1)
            return Net(
                model.to(self.device), x.to(self.device), layer="shorten" if self.short else LAYERS.get(name, "")
            )

        return made


def pictures(rows: int, size: int) -> Tensor:
    """Cut two real pictures as EfficientNet-Lite sees them, again and again, each time a little noisier."""
    x = networks.pictures((3, size, size), 2).float().repeat(-(-rows // 2), 1, 1, 1)[:rows]
    noise = torch.arange(rows).div(2, rounding_mode="floor").view(-1, 1, 1, 1) / 50
    return x + noise * (_rand(*x.shape, seed=1) - 0.5)


def _rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def rows(setting: Setting) -> list[Row]:
    """List everything."""
    return [
        *overhead(setting),
        *integrated(setting),
        *forward_only(setting),
        *against(setting),
        *limes(setting),
        *of_methods(setting),
        *scaling(setting),
    ]


def mine(explain: Explainer, examples: int | None = None, **options: Any) -> Make:
    """Give a method of ours, on some examples or all; its field is kept from call to call, as a user would."""

    def make(net: Net) -> Variant:
        field = ap.Field(net.model, **{"batch_size": len(net.x), **options})
        ready = explain.fitted(field, net.x)
        return lambda: ready(field, net.x[:examples], target=net.target)

    return make


def only(net: Net) -> Variant:
    """Give the bare forward and backward pass."""
    return net.gradient


def only_forward(net: Net) -> Variant:
    """Give the bare forward pass."""
    return net.forward


# -- over the bare loop -----------------------------------------------------------------------------


def overhead(setting: Setting) -> Iterator[Row]:
    """Compare the gradient through a field with bare passes: as users write them, and the best we know."""

    exact = lambda net: net.double().gradient  # noqa: E731

    def users(net: Net) -> Variant:
        net.model.requires_grad_(True)
        return net.gradient

    def best(net: Net) -> Variant:
        model, x = folded(net), net.x
        if x.ndim == 4:
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        return Net(model, x).gradient

    made = {"apportion": mine(ap.Gradient()), "frozen": only, "user's": users, "best": best}

    def ratios(goal: float, passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        ours = {"apportion": 1.0}
        return [
            Ratio("over the best bare pass", ours, {"best": 1}, at_most=goal),
            Ratio("over the bare pass, weights frozen", ours, {"frozen": 1}),
            Ratio("over the bare pass as users write it", ours, {"user's": 1}),
        ]

    for name, count, size in (("lite0", 16, 224), ("resnet18", 16, 224), ("vit_s", 4, 224), ("bert_base", 4, 64)):
        yield Row(
            f"overhead/{name}", setting.net(name, count, size), made, partial(ratios, 1.05), True, exact, seconds=25
        )
    mlp = lambda: Net(  # noqa: E731
        models.tiny_mlp().requires_grad_(False).to(setting.device),
        torch.randn(10_000, 20, generator=torch.Generator().manual_seed(0)).to(setting.device),
    )
    yield Row("overhead/mlp, 10,000 rows", mlp, made, partial(ratios, 1.10), True, exact, seconds=10)


def folded(net: Net) -> nn.Module:
    """Fold each batch-norm into the convolution whose output it is given, in place."""
    model = net.model
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (module, output)  # kept, so that no other tensor gets its id
        elif isinstance(module, nn.BatchNorm2d) and id(args[0]) in made:
            pairs[module] = made[id(args[0])][0]

    handles = [m.register_forward_hook(see) for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    with torch.no_grad():
        model(net.x[:1])
    for handle in handles:
        handle.remove()
    for norm, conv in pairs.items():
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        parent, _, last = next(n for n, m in model.named_modules() if m is norm).rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity())
    return model.requires_grad_(False)


# -- integrated gradients ---------------------------------------------------------------------------

STEPS, INNER, DEFAULT = 48, 16, 50
"""Steps, rows a pass, and the steps Captum takes unless told otherwise."""
NODES = (26, 28, 32, 36, 40)
"""Of ours, of which the fewest that reach Captum's error count."""


def integrated(setting: Setting) -> Iterator[Row]:
    """Compare integrated gradients with Captum's: the same steps, the time to the same error, and in bfloat16."""

    def both(steps: int) -> tuple[dict[str, Make], Make]:
        ours = ap.IntegratedGradients(quadrature=Gauss(steps))
        made = {"apportion": mine(ours, batch_size=INNER), "captum": captum_ig(steps)}
        return made, lambda net: mine(ours, batch_size=INNER)(net.double())

    same, exact = both(4 if setting.short else STEPS)
    few, few_exact = both(4 if setting.short else INNER)

    def faster(goal: float | None, passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        return [Ratio("times faster than Captum", {"captum": 1}, {"apportion": 1}, at_least=goal)]

    def as_near(passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        if not {"apportion", "captum"} <= judged.keys():
            return faster(None, passes, judged)
        far = judged["apportion"]["from float64"] / judged["captum"]["from float64"]
        return [*faster(None, passes, judged), told("distance from float64 over Captum's", far, at_most=1.2)]

    for name, goal in (("lite0", 1.6), ("resnet18", 1.4)):
        one, many = setting.net(name, 1), setting.net(name, 16, 96)
        yield Row(f"ig/{name}", one, same, partial(faster, goal), judged=True, exact=exact, seconds=30)
        kept = {n: keeping(make) for n, make in same.items()}
        yield Row(f"ig/{name}, memory kept", one, kept, partial(faster, None), seconds=15)
        yield Row(f"ig/{name}, 16 pictures", many, few, as_near, judged=True, exact=few_exact, seconds=1)

    def same_error(passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        limit = judged.get("captum", {}).get("from float64", 0.0)
        out: list[Told] = []
        for rule in ("Power", "Adaptive"):
            reached = [n for n in judged if rule in n and judged[n]["from float64"] <= limit]
            if fewest := min(reached, key=lambda n: passes[n], default=None):
                out.append(Ratio(f"times faster with {fewest}", {"captum": 1}, {fewest: 1}, at_least=2.5))
        return out

    sizes = NODES[:1] if setting.short else NODES
    rules = {f"apportion, Power {n}": Power(base=Midpoint(n)) for n in sizes}
    rules |= {  # the first nodes fill a pass
        f"apportion, Adaptive {n}": Adaptive(tolerance=1e9, map_tolerance=0, max_passes=n, first=INNER) for n in sizes
    }
    sought = {n: mine(ap.IntegratedGradients(quadrature=r), batch_size=INNER) for n, r in rules.items()}
    true = mine(ap.IntegratedGradients(quadrature=Power(base=Midpoint(1024))), batch_size=INNER)
    known = {**sought, "captum": captum_ig(4 if setting.short else DEFAULT)}
    net = setting.net("lite0", 1, 112)
    yield Row("ig/lite0, to Captum's error", net, known, same_error, judged=True, exact=true, seconds=20)

    ours = ap.IntegratedGradients(quadrature=Gauss(4 if setting.short else STEPS))
    half = {"apportion, bf16": mine(ours, batch_size=INNER, precision="bf16"), **same}

    def in_half(passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        return [
            Ratio("times faster than float32", {"apportion": 1}, {"apportion, bf16": 1}),
            Ratio("times faster than Captum", {"captum": 1}, {"apportion, bf16": 1}),
        ]

    for name in ("resnet18", "lite0"):
        yield Row(f"ig/{name}, bf16", setting.net(name, 1, 112), half, in_half, judged=True, exact=exact, seconds=10)


def keeping(make: Make) -> Make:
    """Run a variant where glibc keeps freed memory, and gives it back at the end of each run."""

    def kept(net: Net) -> Variant:
        run = make(net)

        def inside() -> Any:
            with ap.keep_memory():
                return run()

        return inside

    return kept


def captum_ig(steps: int) -> Make:
    """Make Captum's, in batches as large as ours."""
    return peers.captum("IntegratedGradients", n_steps=steps, internal_batch_size=INNER)


# -- passes without gradient ------------------------------------------------------------------------


def forward_only(setting: Setting) -> Iterator[Row]:
    """Compare Score-CAM with passes compiled, as by default, and as the model says; compiling is not timed."""

    def ratios(passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        default, others = {"apportion": 1.0}, ("apportion, compiled", "apportion, fast=False")
        return [
            Ratio("times faster than by default", default, {others[0]: 1}),
            Ratio("times faster than as the model says", {others[1]: 1}, {others[0]: 1}),
        ]

    for name, size in (("small", 32),) if setting.short else (("lite0", 96), ("resnet18", 96)):
        explain = ap.ScoreCAM() if setting.short else ap.ScoreCAM(layer=ap.At(LAYERS[name]))
        options: dict[str, dict[str, Any]] = {
            "apportion": {},
            "apportion, compiled": {"compile": not setting.short},
            "apportion, fast=False": {"fast": False},
        }
        made = {k: mine(explain, batch_size=INNER, **o) for k, o in options.items()}
        exact = lambda net, explain=explain: mine(explain, batch_size=INNER)(net.double())  # noqa: E731
        yield Row(f"compile/{name}, Score-CAM", setting.net(name, 1, size), made, ratios, True, exact, seconds=60)


# -- other libraries --------------------------------------------------------------------------------


def background(net: Net) -> Tensor:
    """Give a few other examples."""
    return _rand(5, *net.x.shape[1:], seed=2).to(net.x)


def mapped(kind: Callable[..., Explainer]) -> Make:
    """Give a class activation map of ours as pytorch-grad-cam does: resized to the picture, scaled to [0, 1]."""

    def peer(net: Net) -> Variant:
        run = mine(kind(layer=ap.At(net.layer)))(net)

        def resized() -> tuple[Any, Tensor]:
            a = run()
            low = a.values - a.values.amin((1, 2), keepdim=True)
            low = low / (1e-7 + low.amax((1, 2), keepdim=True))
            return a, F.interpolate(low[:, None], net.x.shape[2:], mode="bilinear")[:, 0]

        return resized

    return peer


def over_background(kind: Callable[..., Explainer]) -> Make:
    """Give a method of ours with the background of shap as baselines."""
    return lambda net: mine(kind(baseline=ap.baselines.Data(background(net))))(net)


REMOVED = 16
"""Rows a pass, ours and theirs, where parts are removed."""


def part_of(net: Net) -> int:
    """Give the side of what is removed at once, an eighth of the picture's."""
    return max(1, net.x.shape[-1] // 8)


def without_parts(windows: bool) -> Make:
    """Give occlusion of ours as Captum gives it: on every channel of every pixel."""

    def peer(net: Net) -> Variant:
        side = part_of(net)
        groups = ap.groups.Patches(2 * side, side) if windows else ap.groups.Squares(side)
        run = mine(ap.Occlusion(groups), batch_size=REMOVED)(net)

        def spread() -> tuple[Any, Tensor]:
            a = run()
            return a, a.spread().values

        return spread

    return peer


def _windows(scale: int) -> Callable[[Net], tuple[int, ...]]:
    return lambda net: (net.x.shape[1], scale * part_of(net), scale * part_of(net))


def _at_once(net: Net) -> int:
    return max(1, REMOVED // len(net.x))


def _squares(net: Net) -> Tensor:
    return ap.groups.Squares(part_of(net)).labels(net.x)


SAMPLES = 8
ORDERS, KERNEL = 4, 256
"""Of Shapley value sampling and of KernelSHAP."""


def squares(net: Net) -> ap.groups.Squares:
    """Give players: 4 × 4 squares of small pictures, 7 × 7 of others."""
    width = net.x.shape[-1]
    return ap.groups.Squares(-(-width // (4 if width <= 64 else 7)))


def labels(net: Net) -> Tensor:
    """Give the same players as a mask of features."""
    return squares(net).labels(net.x)


def of_orders(net: Net) -> Variant:
    """Give Shapley values from as many orders as Captum takes."""
    players = int(labels(net).max()) + 1
    explain = ap.Shapley(sampler=ap.samplers.Permutations(), groups=squares(net), budget=ORDERS * (players - 1))
    return on_elements(mine(explain, batch_size=INNER)(net))


def of_coalitions(net: Net) -> Variant:
    """Give KernelSHAP from as many coalitions as Captum takes."""
    return on_elements(mine(ap.KernelSHAP(groups=squares(net), budget=KERNEL), batch_size=INNER)(net))


def on_elements(run: Variant) -> Variant:
    """Give a map of the picture, as Captum does."""

    def spread() -> tuple[Any, Tensor]:
        a = run()
        return a, a.spread().values

    return spread


BOTH: dict[str, tuple[Make, str, Make]] = {
    "occlusion": (
        without_parts(windows=True),
        "captum",
        peers.captum(
            "Occlusion", sliding_window_shapes=_windows(2), strides=_windows(1), perturbations_per_eval=_at_once
        ),
    ),
    "feature ablation": (
        without_parts(windows=False),
        "captum",
        peers.captum("FeatureAblation", feature_mask=_squares, perturbations_per_eval=_at_once),
    ),
    "saliency": (mine(ap.Gradient()), "captum", peers.captum("Saliency", abs=False)),
    "integrated gradients": (
        mine(ap.IntegratedGradients(quadrature=Gauss(SAMPLES))),
        "captum",
        peers.captum(  # with its delta, as ours comes with its gap
            "IntegratedGradients",
            n_steps=SAMPLES,
            internal_batch_size=lambda net: len(net.x),
            return_convergence_delta=True,
        ),
    ),
    "smoothgrad": (mine(ap.SmoothGrad(samples=SAMPLES)), "captum", peers.noise_tunnel(SAMPLES)),
    "deeplift": (mine(ap.DeepLIFT()), "captum", peers.captum("DeepLift")),
    "guided backprop": (mine(ap.GuidedBackprop()), "captum", peers.captum("GuidedBackprop")),
    "lrp": (mine(ap.LRP()), "captum", peers.captum("LRP")),
    "lrp epsilon-plus": (mine(ap.LRP(ap.rules.epsilon_plus())), "zennit", peers.zennit("EpsilonPlus")),
    "lrp epsilon-plus-flat": (mine(ap.LRP(ap.rules.epsilon_plus_flat())), "zennit", peers.zennit("EpsilonPlusFlat")),
    "lrp epsilon-gamma-box": (
        mine(ap.LRP(ap.rules.epsilon_gamma_box(-3.0, 3.0))),
        "zennit",
        peers.zennit("EpsilonGammaBox", low=-3.0, high=3.0),
    ),
    "lrp alpha2-beta1": (
        mine(ap.LRP(ap.rules.epsilon_alpha2_beta1())),
        "zennit",
        peers.zennit("EpsilonAlpha2Beta1"),
    ),
    "grad-cam": (mapped(ap.GradCAM), "grad-cam", peers.grad_cam("GradCAM")),
    "grad-cam++": (mapped(ap.GradCAMPlusPlus), "grad-cam", peers.grad_cam("GradCAMPlusPlus")),
    "layercam": (mapped(ap.LayerCAM), "grad-cam", peers.grad_cam("LayerCAM")),
    "eigen-cam": (mapped(ap.EigenCAM), "grad-cam", peers.grad_cam("EigenCAM")),
    "score-cam": (mapped(ap.ScoreCAM), "grad-cam", peers.grad_cam("ScoreCAM")),
    "expected gradients": (
        over_background(ap.ExpectedGradients),
        "shap",
        peers.shap("GradientExplainer", background, nsamples=5),
    ),
    "deepshap": (
        over_background(ap.DeepSHAP),
        "shap",
        peers.shap("DeepExplainer", background, check_additivity=False),
    ),
    "shapley value sampling": (
        of_orders,
        "captum",
        peers.captum(
            "ShapleyValueSampling",
            n_samples=ORDERS,
            feature_mask=labels,
            perturbations_per_eval=lambda net: INNER // len(net.x),
        ),
    ),
    "kernel shap": (
        of_coalitions,
        "captum",
        peers.captum("KernelShap", n_samples=KERNEL, feature_mask=labels, perturbations_per_eval=INNER),
    ),
}
"""Methods that others have too: ours, whose, theirs."""
SAMPLED = ("shapley value sampling", "kernel shap")
COALITIONAL = ("occlusion", "feature ablation", *SAMPLED)
RANDOM = {"smoothgrad", "expected gradients", *SAMPLED}
"""Those whose maps differ by their random numbers, so that only time is compared."""
AT_LEAST = dict.fromkeys(COALITIONAL, 1.5)
"""Goals, where there are any."""
MISSED = dict.fromkeys(
    [("small", n) for n in ("shapley value sampling", "occlusion", "feature ablation")],
    "Captum takes little longer there than the bare passes do",
)
EVERYWHERE = ("saliency", "integrated gradients", "smoothgrad")
PICTURES = ("grad-cam", "grad-cam++", "layercam", "eigen-cam")
ON = {
    "vgg11": (64, 2, tuple(n for n in BOTH if "cam" not in n and n not in COALITIONAL)),
    "resnet18": (96, 2, tuple(n for n in BOTH if n not in ("lrp epsilon-plus-flat", "score-cam", *COALITIONAL))),
    "lite0": (96, 2, (*EVERYWHERE, *PICTURES, "deeplift", "lrp epsilon-plus", "deepshap", *COALITIONAL)),
    "vit_s": (224, 1, (*EVERYWHERE, "deeplift")),
    "bert_base": (32, 1, (*EVERYWHERE, "deeplift")),
    "small": (32, 4, ("score-cam", *COALITIONAL)),
}
"""On which networks, at which size, on how many examples."""


def against(setting: Setting) -> Iterator[Row]:
    """Compare with other libraries on the same work."""

    def ratios(whose: str, goal: float | None, why: str, passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        return [Ratio("times faster", {whose: 1}, {"apportion": 1}, at_least=goal, why=why)]

    for name, (size, count, named) in ON.items():
        for what in named:
            ours, whose, theirs = BOTH[what]
            made = {"apportion": ours, whose: theirs}
            net, judged = setting.net(name, count, size), what not in RANDOM
            yield Row(
                f"peers/{name}/{what}",
                net,
                made,
                partial(ratios, whose, AT_LEAST.get(what), MISSED.get((name, what), "")),
                judged,
                seconds=4,
            )


# -- local surrogates -------------------------------------------------------------------------------

SEGMENTS = 7
"""Squares a side, which make 49 players."""
COALITIONS = 16
"""Rows a pass, ours and theirs."""


def limes(setting: Setting) -> Iterator[Row]:
    """Compare LIME with Captum's: as many samples of the same players, as many rows a pass, ridge and cosine kernel.

    Re-runs are left out, which Captum has not; samples are random, so that only time is compared.
    """
    samples = 8 if setting.short else 128

    def squares(net: Net) -> ap.groups.Squares:
        return ap.groups.Squares(-(-net.x.shape[-1] // SEGMENTS))

    def ours(net: Net) -> Variant:
        alone = ap.surrogates.Trust(reruns=0)
        return mine(ap.LIME(groups=squares(net), samples=samples, trust=alone), batch_size=COALITIONS)(net)

    theirs = peers.lime(samples, COALITIONS, lambda net: squares(net).labels(net.x))

    def ratios(why: str, passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        return [Ratio("times faster", {"captum": 1}, {"apportion": 1}, at_least=1.5, why=why)]

    slow = "the passes alone take two thirds of Captum's time on this network, and ours run no faster than bare ones"
    for name, size, why in (("small", 56, slow), ("lite0", 112, "")):
        made = {"apportion": ours, "captum": theirs}
        yield Row(f"peers/{name}/lime", setting.net(name, 1, size), made, partial(ratios, why), seconds=10)


# -- every method over its own passes ---------------------------------------------------------------


def of_methods(setting: Setting) -> Iterator[Row]:
    """Compare every registered method with the bare passes it declares."""

    def ratios(name: str, count: int, passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        if "apportion" not in passes:
            return []
        forward, backward = passes["apportion"]
        own = {"bare": backward / count, "bare forward": (forward - backward) / count}
        goal = SEQUENTIAL if name in STEP_BY_STEP else BATCHED
        return [Ratio("over its own passes", {"apportion": 1}, own, at_most=goal, why=REASONS.get(name, ""))]

    for net, size in (("small", 32),) if setting.short else (("small", 32), ("lite0", 64)):
        for name, card in ap.methods().items():
            if ap.Need.VECTORS in card.needs:  # these networks see pictures
                continue
            explain, passes = _of_moderate_cost(ap.method(name), setting.short)
            if hasattr(explain, "layer") and not setting.short and (net == "small" or name == "score_cam"):
                explain = replace(explain, layer=ap.At(LAYERS[net]))  # pyright: ignore[reportCallIssue]
            count = 2 if setting.short else 16 if net == "small" else 2 if name in STEP_BY_STEP else 8
            examples = count if net == "small" or name in STEP_BY_STEP else max(1, -(-count // passes))
            options: dict[str, Any] = {"score": ap.Loss()} if ap.Need.LOSS in explain.card.needs else {}
            ours = mine(_of_few_players(explain, size), examples=examples, bounds=(-4, 4), **options)
            made = {"apportion": ours, "bare": only, "bare forward": only_forward}
            make = setting.net(net, count, size)
            yield Row(f"methods/{net}/{name}", make, made, partial(ratios, name, count), seconds=2)


def _of_few_players(explain: Explainer, size: int) -> Explainer:
    """Give methods that estimate from coalitions a grid of four by four squares, and few coalitions."""
    if isinstance(explain, ap.Semivalue | SampledMethod):
        explain = replace(explain, groups=ap.groups.Squares(-(-size // 4)))
    if isinstance(explain, SampledMethod):
        explain = replace(explain, budget=64, fill=ap.fills.Baselines())
    return explain


def _of_moderate_cost(kind: type[Explainer], short: bool) -> tuple[Explainer, int]:
    """Give a method as it is by default, or smaller where that takes more than 200 passes; and its passes."""
    try:
        default = kind().passes()
        smaller = sum(default) > 200
    except ap.ApportionError:  # they depend on the network: as many as a layer has channels
        return kind.variants()[0] if short else kind(), 100
    explain = kind.variants()[0] if short or smaller else kind()
    return explain, max(1, explain.passes().backward)


# -- scaling ----------------------------------------------------------------------------------------


def scaling(setting: Setting) -> Iterator[Row]:
    """Let one size grow at a time, with integrated gradients on a small network."""
    axes: dict[str, Sequence[int]] = {
        "steps": (8, 32, 128, 512),
        "rows a pass": (1, 4, 16, 64, 256),
        "examples": (1, 4, 16, 64),
        "pixels a side": (16, 32, 64, 128),
    }

    def made(steps: int, batch: int) -> dict[str, Make]:
        return {
            "apportion": mine(ap.IntegratedGradients(quadrature=Gauss(steps)), batch_size=batch),
            "captum": peers.captum("IntegratedGradients", n_steps=steps, internal_batch_size=batch),
            "bare": lambda net: bare(net, steps, batch),
        }

    def ratios(passes: Mapping[str, Passes], judged: Judged) -> list[Told]:
        return [
            Ratio("over the bare passes", {"apportion": 1}, {"bare": 1}),
            Ratio("times faster than Captum", {"captum": 1}, {"apportion": 1}),
        ]

    for axis, values in axes.items():
        for value in values[:1] if setting.short else values:
            size = {"steps": 32, "rows a pass": 16, "examples": 1, "pixels a side": 32} | {axis: value}
            make = setting.net("small", size["examples"], size["pixels a side"])
            variants = made(size["steps"], size["rows a pass"])
            yield Row(f"scaling/{axis}/{value}", make, variants, ratios, seconds=3)


def bare(net: Net, steps: int, batch: int) -> Variant:
    """Give the passes of integrated gradients alone: same rows, same batches, nothing made of the gradients."""
    at = torch.linspace(0, 1, steps).to(net.x).view(-1, *[1] * (net.x.ndim - 1))

    def run() -> Tensor:
        total = net.x.new_zeros(())
        for x in net.x:
            for part in (at * x).split(batch):
                total = total + net.gradient(part).sum()
        return total

    return run
