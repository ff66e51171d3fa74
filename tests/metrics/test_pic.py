"""Performance information curves: the definition step by step, planted answers, ties, and what is undefined."""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.interpolate import griddata, interp1d
from skimage.metrics import structural_similarity
from torch import Tensor

import apportion as ap
from apportion.adapters.bundled import picture
from apportion.adapters.image import CenterCrop
from apportion.core.config import from_config
from apportion.core.errors import ConfigError, InputError
from apportion.metrics import AIC, PNG, SIC, MultiScaleSSIM, Subject, WebP, Zlib
from apportion.metrics.ablation import pic

THRESHOLDS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.13, 0.21, 0.34, 0.5, 0.75)
SIDE = 24


def pictures(n: int = 2) -> Tensor:
    drawn = torch.randint(0, 256, (n, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    return drawn.double() / 255


def rough(x: Tensor) -> Tensor:
    """One number: how rough the upper left quarter is."""
    return 40 * x[..., :12, :12].diff(dim=3).abs().mean((1, 2, 3)) - 8


def knowing(x: Tensor) -> Tensor:
    """A map without ties that knows where the model looks."""
    noise = 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).double()
    noise[..., :12, :12] += 1
    return noise


def by_the_book(
    x: Tensor,
    values: Tensor,
    *,
    id: str,
    decide: bool,
    monotone: bool = True,
    model: Callable[[Tensor], Tensor] = rough,
) -> float:
    """One example as the authors' code goes: 8-bit pictures, one threshold after the other."""
    image = np.round(x.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    saliency = values.sum(0).numpy()
    known = np.zeros(saliency.size, dtype=bool)
    q = ap.Field(model).bind(x[None], ids=[id])
    zero = torch.zeros(1, dtype=torch.long)
    drawn = q.stream("known pixels").uniform(torch.zeros(1, saliency.size), zero, zero)[0]
    known[np.argsort(drawn.numpy())[: int(saliency.size * 0.01)]] = True
    known = known.reshape(saliency.shape)

    def blurred(mask: np.ndarray) -> np.ndarray:
        mask = mask.copy()
        mask[[0, 0, -1, -1], [0, -1, 0, -1]] = True
        out = image.astype(float)
        for channel in range(3):
            points, unknown = np.argwhere(mask), np.argwhere(~mask)
            filled = griddata(points, image[..., channel][mask], unknown, method="linear")
            out[..., channel][~mask] = filled
        return np.round(out).astype(np.uint8)

    def entropy(picture: np.ndarray) -> int:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="webp", lossless=True, quality=100)
        return len(file.getvalue())

    def predict(picture: np.ndarray) -> float:
        z = model(torch.from_numpy(picture).permute(2, 0, 1)[None].to(x.dtype) / 255)
        return float(z > 0) if decide else float(z.sigmoid())

    start = blurred(known)
    size0, size1, p0, p1 = entropy(start), entropy(image), predict(start), predict(image)
    if p1 < 0.8 or p0 >= p1 or size0 >= size1:
        return float("nan")
    points, best = [], 0.0
    for t in THRESHOLDS:
        one = blurred(known | (saliency >= np.quantile(saliency, 1 - t)))
        at = min(max((entropy(one) - size0) / (size1 - size0), 0.0), 1.0)
        height = min(max((predict(one) - p0) / (p1 - p0), 0.0), 1.0)
        best = max(best, height)
        points.append((at, best if monotone else height))
    xs, ys = zip(*points, (0.0, 0.0), (1.0, 1.0), strict=True)
    grid = np.linspace(0, 1, 1000, endpoint=False)
    heights = np.append(interp1d(xs, ys)(grid), 1.0)
    grid = np.append(grid, 1.0)
    return float(sum((b - a) * (v + w) / 2 for a, b, v, w in zip(grid, grid[1:], heights, heights[1:], strict=False)))


@pytest.mark.parametrize(("metric", "decide"), [(SIC(), False), (AIC(), True)])
def test_it_is_the_authors_definition(metric: SIC | AIC, decide: bool) -> None:
    x = pictures()
    found = metric(ap.Field(rough), x, knowing(x), ids=["a", "b"])
    wanted = [by_the_book(one, m, id=i, decide=decide) for one, m, i in zip(x, knowing(x), "ab", strict=True)]
    assert all(0.5 < w < 1 for w in wanted)
    torch.testing.assert_close(found.values, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert found.statistic == "median curve"
    assert found.curves["pic"].y.shape == (2, 1001)
    assert "libwebp" in found.curves["pic"].x_label


def test_a_bundled_picture_is_judged_as_by_the_definition() -> None:
    """A cat's face, by a model that looks at how rough the picture is."""
    x = CenterCrop(48)(picture("chelsea"))[None].double()

    def model(x: Tensor) -> Tensor:
        return 400 * x.diff(dim=3).abs().mean((1, 2, 3)) - 8

    values = x.diff(dim=3, append=x[..., -1:]).abs() + 1e-3 * knowing(x)
    found = SIC()(ap.Field(model), x, values, ids=["cat"])
    wanted = by_the_book(x[0], values[0], id="cat", decide=False, model=model)
    assert found.values.item() == pytest.approx(wanted, abs=1e-9)
    assert 0 < wanted < 1


def test_a_curve_that_may_fall_is_another_number() -> None:
    x = pictures(1)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)).double()
    rising, free = (SIC(monotone=m)(ap.Field(rough), x, noise, ids=["a"]).values.item() for m in (True, False))
    assert free == pytest.approx(by_the_book(x[0], noise[0], id="a", decide=False, monotone=False), abs=1e-9)
    assert rising == pytest.approx(by_the_book(x[0], noise[0], id="a", decide=False), abs=1e-9)
    assert free < rising


def test_a_map_that_knows_beats_one_that_does_not_and_chance() -> None:
    x = pictures()
    right = SIC()(ap.Field(rough), x, knowing(x), controls=[ap.controls.Random()])
    wrong = SIC()(ap.Field(rough), x, -knowing(x))
    chance = right.controls["Random"].values
    assert bool((right.values > chance + 0.3).all())
    assert bool((wrong.values < chance).all())


def test_sizes_by_other_programs_and_likeness_agree_on_who_is_better() -> None:
    x = pictures(1)
    for information in (PNG(), Zlib(), MultiScaleSSIM()):
        right, wrong = (
            SIC(information=information)(ap.Field(rough), x, m).values.item() for m in (knowing(x), -knowing(x))
        )
        assert right > wrong + 0.3
    raw = (x[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()[None]
    assert Zlib(level=6)(raw, raw[0]).tolist() == [len(zlib.compress(raw.tobytes(), 6))]


def test_ties_are_drawn_or_revealed_together() -> None:
    """Most of a CAM is 0: by its quantile the share shown is stuck at all or at little, whatever was asked."""
    x = pictures(1)
    cam = knowing(x)[:, :1]
    cam[..., 12:, :] = 0
    drawn, together = (SIC(together=t)(ap.Field(rough), x, cam) for t in (False, True))
    count = SIDE * SIDE
    asked = torch.tensor([(1 + int((count - 1) * t + 1e-9)) / count for t in THRESHOLDS], dtype=torch.float64)
    torch.testing.assert_close(drawn.parts["shown"][0], asked)
    assert together.parts["shown"][0, -2:].tolist() == [asked[-2].item(), 1.0]
    flat = torch.ones_like(x)
    assert SIC(together=True)(ap.Field(rough), x, flat).values.item() == pytest.approx(0.5)
    at_random = SIC()(ap.Field(rough), x, flat)
    assert at_random.values.item() < 0.4
    assert any("half of the pixels" in w for w in at_random.warnings)


def test_maps_of_an_example_start_from_the_same_pixels() -> None:
    x = pictures()
    q, again = ap.Field(rough).bind(x, ids=["a", "b"]), ap.Field(rough).bind(x[1:], ids=["b"])
    one, other = (SIC().revealed(q, Subject(m)).pictures for m in (knowing(x), torch.rand_like(x)))
    assert torch.equal(one[:, 0], other[:, 0])
    assert not torch.equal(one[:, 1], other[:, 1])
    assert torch.equal(SIC().revealed(again, Subject(knowing(x)[1:])).pictures[0], one[1])
    reseeded = ap.Field(rough).bind(x, ids=["a", "b"], seed=1)
    assert not torch.equal(SIC().revealed(reseeded, Subject(knowing(x))).pictures[:, 0], one[:, 0])
    whole = (x * 255).round().to(torch.uint8)
    assert torch.equal(one[:, -1], whole)
    for a, b in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.equal(one[..., a, b], whole[:, None, :, a, b].expand(-1, 15, -1))


def test_a_plane_is_interpolated_without_error() -> None:
    down, across = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    x = torch.stack([3 * down + 7 * across, 2 * down, 9 * across])[None].double() / 255
    found = SIC()(ap.Field(lambda x: x.sum((1, 2, 3))), x, knowing(pictures(1))[..., :16, :16])
    assert found.values.isnan().all()
    assert set(found.undefined) == {pic._NO_RISE, pic._NO_INFORMATION}
    q = ap.Field(lambda x: x.sum((1, 2, 3))).bind(x)
    made = SIC().revealed(q, Subject(x)).pictures
    assert int((made.int() - made[:, -1:].int()).abs().max()) == 0


def test_examples_that_do_not_count_say_why() -> None:
    x = pictures()
    unsure = SIC()(ap.Field(lambda x: 0.01 * rough(x)), x, knowing(x))
    assert list(unsure.undefined) == [pic._LOW]
    smooth = SIC()(ap.Field(lambda x: 9 - rough(x)), x, knowing(x))
    assert pic._NO_RISE in smooth.undefined
    recognized = AIC()(ap.Field(lambda x: 20 + rough(x)), x, knowing(x))
    assert list(recognized.undefined) == [pic._NO_RISE]
    assert all(s.values.isnan().all() for s in (unsure, smooth, recognized))
    assert unsure.curves["pic"].y.isnan().all()


def test_curves_pass_their_points_as_interp1d_does() -> None:
    """Also where several pictures take as many bytes."""
    x = torch.tensor([[0.0, 0.4, 0.2, 0.4, 1.0], [0.0, 0.0, 0.0, 0.3, 1.0]]).double()
    y = torch.tensor([[0.1, 0.3, 0.3, 0.7, 0.8], [0.5, 0.6, 0.6, 0.7, 0.9]]).double()
    grid, height = pic._curve(x, y, 50)
    for i in range(2):
        joined: Any = interp1d([*x[i].tolist(), 0, 1], [*y[i].tolist(), 0, 1])
        np.testing.assert_allclose(height[i, :-1].numpy(), joined(np.arange(50) / 50), atol=1e-12)
    assert grid[-1] == height[0, -1] == 1


def test_curves_of_one_map_share_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    made, inner = [], pic.reveal
    monkeypatch.setattr(pic, "reveal", lambda *a, **k: made.append(1) or inner(*a, **k))
    x = pictures(1)
    q, subject = ap.Field(rough).bind(x), Subject(knowing(x))
    for metric in (SIC(), AIC(), SIC(monotone=False), SIC(information=Zlib())):
        metric.judge(q, subject)
    assert len(made) == 1


def test_likeness_is_ssim_for_pictures_of_one_scale_and_one_for_the_original() -> None:
    generator = np.random.default_rng(0)
    original = generator.integers(0, 256, (20, 21, 1), dtype=np.uint8)
    other = np.clip(original + generator.integers(0, 30, original.shape), 0, 255).astype(np.uint8)
    wanted: Any = structural_similarity(
        original[..., 0] / 255,
        other[..., 0] / 255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
    )
    found = MultiScaleSSIM()(np.stack([other, original]), original)
    np.testing.assert_allclose(found, [wanted, 1], atol=1e-9)
    large = generator.integers(0, 256, (1, 176, 176, 3), dtype=np.uint8)
    assert MultiScaleSSIM()(large, large[0]).tolist() == [1.0]
    with pytest.raises(InputError, match="11"):
        MultiScaleSSIM()(original[None, :8], original[:8])


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = pictures(1)
    with pytest.raises(InputError, match=r"Normalize"):
        SIC()(ap.Field(rough), 2 * x - 1, knowing(x))
    with pytest.raises(InputError, match="at the model's input"):
        SIC()(ap.Field(lambda x: x.sum(1)), x[0, 0], x[0, 0])
    with pytest.raises(ConfigError, match="shares"):
        SIC(thresholds=(0.5, 1.0))
    with pytest.raises(ConfigError, match="share up to 1"):
        AIC(fraction=1.5)
    with pytest.raises(ConfigError, match="1 to 9"):
        Zlib(level=0)
    with pytest.raises(ConfigError, match=r"asks for Pillow 1\.0"):
        SIC(information=WebP("Pillow 1.0, libwebp 0.1"))(ap.Field(rough), x, knowing(x))
    with pytest.raises(InputError, match="Zlib"):
        WebP()(np.zeros((1, 4, 4, 2), np.uint8), np.zeros((4, 4, 2), np.uint8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match="Pillow is not installed"):
        SIC()(ap.Field(rough), x, knowing(x))
    monkeypatch.setitem(sys.modules, "scipy.interpolate", None)
    with pytest.raises(ConfigError, match="SciPy is not installed"):
        SIC()(ap.Field(rough), x, knowing(x))


def test_pictures_are_summed_up_by_the_curve_of_medians() -> None:
    """Not by the median of areas; written out, within its interval, without what is undefined."""
    x = torch.cat([pictures(), pictures().flip(3), pictures().flip(2)])
    g = torch.Generator().manual_seed(5)
    maps = knowing(x) + 0.5 * torch.randn(knowing(x).shape, generator=g)
    found = SIC()(ap.Field(rough), x, maps, ids=range(len(x)))
    curve = found.curves["pic"]
    known = ~found.values.isnan()
    wanted = np.trapezoid(np.median(curve.y[known].numpy(), 0), curve.x.numpy())
    center, low, high = found.median()
    assert center == pytest.approx(wanted)
    assert low <= center <= high
    assert center != pytest.approx(np.median(found.values[known].numpy()), abs=1e-6)


@pytest.mark.parametrize("measure", [WebP(), PNG(), Zlib()])
def test_results_of_two_encoders_do_not_mix(measure: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The record has the program that was there; other versions are other metrics, also to a run that goes on."""
    x, field = pictures(), ap.Field(rough)
    metric = SIC(thresholds=(0.1, 0.5), information=measure)
    here = metric(field, x, knowing(x))
    named = here.metric["information"]["encoder"]
    assert named in here.curves["pic"].x_label
    pinned = from_config(here.metric)
    assert pinned(field, x, knowing(x)).metric == here.metric
    run: Any = ["gradient"], field, x, {"s": metric}
    assert ap.evaluate(*run, quiet=True, out=tmp_path).scores["gradient"]["s"].metric == here.metric
    monkeypatch.setattr(type(measure), "_installed", lambda self: "another 0.1")
    other = metric(field, x, knowing(x))
    with pytest.raises(InputError, match="settings"):
        here.against(other)
    with pytest.raises(InputError, match="one configuration"):
        type(here).join([here, other])
    with pytest.raises(ConfigError, match=r"another 0\.1, where"):
        pinned(field, x, knowing(x))
    with pytest.raises((ConfigError, InputError)):
        ap.evaluate(*run, quiet=True, out=tmp_path)
