"""Models by name, each from what a stranger would have; and what is never read."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import apportion as ap
from apportion.adapters import models
from apportion.adapters.image import CenterCrop
from apportion.core.errors import ConfigError, ModelError, RegistryError

pytest.importorskip("PIL")

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")  # torch's, of itself

OWN = """
import torch
from apportion.adapters.zoo import PictureModel
from apportion.adapters.image import CenterCrop
import apportion as ap

def make():
    import beside  # a sibling, found while the factory runs
    torch.manual_seed(beside.SEED)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 5),
    )

instance = make()
whole = lambda: PictureModel("w", instance, CenterCrop(9), ap.Normalize((0.5,), (0.5,)), ("a", "b"))

class Net(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))

def needs(something): ...
def nothing(): return 3
"""


class Planted:
    """Pickled, it would leave a trace where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "stranger.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("SEED = 3\n")
    (tmp_path / "broken.py").write_text("import torch\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("stranger", "beside", "broken"):
        sys.modules.pop(name, None)


# -- a module of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["stranger:make", "stranger.py:make", "stranger:instance", "stranger:Net"])
def test_own_module(own: Path, spec: str) -> None:
    before = list(sys.path)
    net = models.load(spec, size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert sys.path == before
    assert not net.model.training
    assert net.crop == CenterCrop(16, 1.0)
    assert net.normalize == ap.Normalize((0.5,) * 3, (0.25,) * 3)
    assert net.notes == ()
    assert ap.Gradient()(net.field(), torch.rand(2, 3, 16, 16)).values.shape == (2, 3, 16, 16)


def test_what_is_assumed_is_said(own: Path) -> None:
    net = models.load("stranger:Net")
    assert net.crop.size == models.ASSUMED_SIZE
    assert [("224 assumed" in n, "--mean" in n) for n in net.notes] == [(True, False), (False, True)]


def test_own_picture_model(own: Path) -> None:
    assert models.load("stranger:whole").label(1) == "b (1)"
    with pytest.raises(ConfigError, match="makes a PictureModel"):
        models.load("stranger:whole", size=8)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("strangr:make", RegistryError, "'stranger'"),
        ("strangr.py:make", ConfigError, "'stranger.py'"),
        ("stranger:mak", RegistryError, "'make'"),
        ("stranger:needs", ConfigError, "TypeError"),
        ("stranger:nothing", ConfigError, "gives an int"),
        ("broken:make", ConfigError, "ZeroDivisionError"),
        ("efficientnet_lite0", RegistryError, "zoo:efficientnet_lite0"),
        ("zoo:efficientnet_lite9", RegistryError, "nearest"),
        ("zoo:", ConfigError, "without a name"),
        ("resnet", RegistryError, "zoo:NAME"),
        ("weights.pth", ConfigError, "a file of weights is no network"),
        (".", ConfigError, "hf:"),
        ("program.pt2", ConfigError, "no file"),
        ("hf:./absent", ConfigError, "no directory"),
        ("hf:absent", ConfigError, "OWNER/MODEL"),
    ],
)
def test_mistakes(own: Path, spec: str, error: type[ap.ApportionError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        models.load(spec)
    assert caught.value.given
    assert caught.value.expected
    assert caught.value.do


def test_options_are_for_own_models() -> None:
    with pytest.raises(ConfigError, match="brings its own size"):
        models.load("zoo:efficientnet_lite0", size=100)


# -- weights --------------------------------------------------------------------------------------


def test_weights_are_read(tmp_path: Path) -> None:
    held = nn.Linear(2, 3).state_dict()
    torch.save(held, tmp_path / "a.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in held.items()}, "epoch": 3}, tmp_path / "b.pth")
    save_file(held, tmp_path / "c.safetensors")
    for name in ("a.pth", "b.pth", "c.safetensors"):
        found = models.read_weights(tmp_path / name)
        assert found.keys() == held.keys()
        assert torch.equal(found["weight"], held["weight"])


def test_no_pickle_is_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save(Planted(trace), tmp_path / "a.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "b.pth")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(Planted(trace)))
    for name in ("a.pth", "b.pth", "c.pkl"):
        with pytest.raises(ConfigError, match=r"was not read[\s\S]*safetensors[\s\S]*convert it once"):
            models.read_weights(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_damaged_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00" * 40)
    with pytest.raises(ConfigError):
        models.read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="no table of tensors"):
        models.read_weights(tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="no file"):
        models.read_weights(tmp_path / "absent.pth")


# -- torchvision and timm, in the shape they have -------------------------------------------------

PACKAGE = """
import torch
class models:
    @staticmethod
    def list_models(module=None): return ["resnet18", "resnet50"]
    @staticmethod
    def get_model(name, weights=None): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    @staticmethod
    def get_model_weights(name):
        class Published:
            meta = {"categories": ["cat", "dog"]}
            def get_state_dict(self, **options):
                assert options["weights_only"]
                raise OSError("no connection")
            def transforms(self):
                class Shown: crop_size, resize_size, mean, std = [2], [4], [.5] * 3, [.25] * 3
                return Shown
        return {"DEFAULT": Published()}
"""


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "torchvision.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    yield tmp_path
    sys.modules.pop("torchvision", None)


def test_torchvision(torchvision: Path) -> None:
    weights = {"1.weight": torch.ones(2, 12), "1.bias": torch.zeros(2)}
    torch.save(weights, torchvision / "w.pth")
    net = models.load(f"torchvision:resnet18:{torchvision / 'w.pth'}")
    assert net.crop == CenterCrop(2, 0.5)
    assert net.normalize == ap.Normalize((0.5,) * 3, (0.25,) * 3)
    assert net.label(1) == "dog (1)"
    assert torch.equal(net.model.get_parameter("1.weight"), weights["1.weight"])
    with pytest.raises(RegistryError, match="'resnet50'"):
        models.load("torchvision:resnet51")
    with pytest.raises(ConfigError, match="no connection"):
        models.load("torchvision:resnet18")
    torch.save({"1.bias": torch.zeros(2)}, torchvision / "w.pth")
    with pytest.raises(ConfigError, match="do not fit"):
        models.load(f"torchvision:resnet18:{torchvision / 'w.pth'}")


def test_packages_that_do_not_import(torchvision: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (torchvision / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(ConfigError, match=r"torchvision is installed but cannot be imported: operator"):
        models.load("torchvision:resnet18")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints\.txt timm"):
        models.load("timm:resnet18")


# -- transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8, num_labels=3, id2label={0: "cat", 1: "dog", 2: "cup"},
    )  # fmt: skip
    with models._quiet(transformers):
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    about = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder


def test_vit_from_a_directory(vit: Path, capfd: pytest.CaptureFixture[str]) -> None:
    net = models.load(f"hf:{vit}")
    assert net.crop == CenterCrop(32, 1.0)
    assert net.normalize.std == pytest.approx((0.25,) * 3)
    assert net.classes == ("cat", "dog", "cup")
    x = torch.rand(2, 3, 32, 32)
    a = ap.GradientTimesInput()(net.field(), x)
    assert a.values.shape == x.shape
    with torch.no_grad():
        assert torch.allclose(a.value, net.model((x - 0.5) / 0.25).logits.amax(1), atol=1e-5)
    assert not capfd.readouterr().err


def test_vit_without_processor(vit: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((vit / name).read_bytes())
    net = models.load(f"hf:{tmp_path}", mean=(0.5,) * 3, std=(0.25,) * 3)
    assert net.crop == CenterCrop(32, 1.0)  # as the configuration says
    assert net.normalize.std == (0.25,) * 3
    with pytest.raises(ConfigError, match="leave them out"):
        models.load(f"hf:{vit}", size=32)


def test_vit_lacking_parts(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((vit / "config.json").read_text())
    with pytest.raises(ConfigError, match="cannot be loaded"):
        models.load(f"hf:{tmp_path}")
    held = {k: v for k, v in models.read_weights(vit / "model.safetensors").items() if not k.startswith("classifier")}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="--size, --mean and --std"):
        models.load(f"hf:{tmp_path}")
    (tmp_path / "preprocessor_config.json").write_text((vit / "preprocessor_config.json").read_text())
    with pytest.raises(ConfigError, match=r"lacks the weights classifier"):
        models.load(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("options", "crop", "mean"),
    [
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
         CenterCrop(224, 0.875), 0.5),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, CenterCrop(224, 0.875), 0.5),
        ({"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}, CenterCrop(32, 1.0), 0.25),
        ({"size": {"height": 32, "width": 32}, "do_normalize": False}, CenterCrop(32, 1.0), 0.0),
    ],
)  # fmt: skip
def test_processors(options: dict[str, Any], crop: CenterCrop, mean: float) -> None:
    made: Any = type("Processor", (), {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **options})()
    found, normalize = models._processing(made, "x")
    assert found == crop
    assert normalize.mean == pytest.approx((mean,) * 3)
    made.size = {"height": 32, "width": 48}
    with pytest.raises(ConfigError, match="squares"):
        models._processing(made, "x")


# -- exported programs ----------------------------------------------------------------------------


def exported(path: Path, *, dynamic: bool = True, side: int = 12) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(net, (torch.rand(2, 3, side, side),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def test_exported_program(tmp_path: Path) -> None:
    path = exported(tmp_path / "net.pt2")
    net = models.load(str(path), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert net.crop == CenterCrop(12, 1.0)
    assert ap.Gradient()(net.field(), torch.rand(3, 3, 12, 12)).values.shape == (3, 3, 12, 12)
    with pytest.raises(ConfigError, match="leave the size out"):
        models.load(str(path), size=13)


def test_exported_for_one_batch_size(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"batches of 2[\s\S]*dynamic_shapes"):
        models.load(str(exported(tmp_path / "net.pt2", dynamic=False)))


@pytest.mark.parametrize("where", ["sample", "constant", "weight", "legacy", "twice"])
def test_no_pickle_in_a_program_is_read(tmp_path: Path, where: str) -> None:
    whole, bad, trace = exported(tmp_path / "net.pt2"), tmp_path / "bad.pt2", tmp_path / "trace"
    buffer = io.BytesIO()
    torch.save((Planted(trace),), buffer)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if where == "sample" and "sample_inputs" in name:
                data = buffer.getvalue()
            elif where == "constant" and name.endswith("constants_config.json"):
                meta = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
                data = json.dumps({"config": {"c": meta}}).encode()
                new.writestr(name.rsplit("/", 1)[0] + "/custom_obj_0", pickle.dumps(Planted(trace)))
            elif where in ("weight", "twice") and name.endswith("weights_config.json"):
                table = json.loads(data)
                first = next(iter(table["config"].values()))
                table["config"]["more"] = {**first, "use_pickle": True}
                if where == "weight":
                    first["use_pickle"] = True
                data = json.dumps(table).encode()
            elif where in ("weight", "twice") and name.endswith("/weight_0"):
                data = buffer.getvalue()
            new.writestr(name, data)
        if where == "legacy":
            new.writestr("serialized_state_dict.json", buffer.getvalue())
    with pytest.raises(ConfigError, match="was not read"):
        models.load(str(bad))
    assert not trace.exists()


def test_no_program(tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="no exported program"):
        models.load(str(tmp_path / "a.pt2"))
