"""Models by name: from the zoo, from other packages, from a file of one's own, and exported programs.

A model file may hold a pickle, and reading a pickle runs whatever it says. Here weights are read as
safetensors or with `weights_only=True`; what needs more than that is refused, with how to convert it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from apportion.adapters import zoo
from apportion.adapters.image import LARGEST, CenterCrop
from apportion.adapters.zoo import PictureModel
from apportion.core.errors import ApportionError, ConfigError, ModelError, RegistryError, kind_of, nearest
from apportion.core.field import Normalize

ASSUMED_SIZE = 224
"""The side of the pictures for a model that does not say, in pixels."""

FORMS = "zoo:NAME, hf:NAME, torchvision:NAME, timm:NAME, module:CALLABLE, file.py:CALLABLE or program.pt2"
"""What a model may be called."""


def load(
    spec: str,
    *,
    size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> PictureModel:
    """Load a network for pictures, with the crop and the normalization it expects.

    | spec | is |
    |---|---|
    | `zoo:efficientnet_lite0` | a network that installs as a package |
    | `hf:google/vit-base-patch16-224`, `hf:some/directory` | a transformers image classifier with its processor |
    | `torchvision:resnet50`, `torchvision:resnet50:weights.pth` | published weights, or those of a file |
    | `timm:resnet50`, `timm:resnet50:weights.safetensors` | likewise |
    | `package.module:name`, `file.py:name` | a module, a `PictureModel`, or a function or class that makes one |
    | `program.pt2` | what `torch.export.save` wrote, with a dynamic batch |

    Modules in the current directory can be imported. Modules made here are put in eval mode.

    Args:
        spec: which network.
        size: the side of the pictures, for a module of one's own; 224 unless given. Programs know theirs.
        mean: per channel, of pictures in [0, 1], for modules of one's own and programs; 0 unless given. All three
            also serve a transformers classifier that has no image processor beside it.
        std: likewise; 1 unless given.

    Raises:
        RegistryError: an unknown name, with the nearest.
        ConfigError: a package that is missing or cannot be imported, a file that cannot be read safely, an
            option for a network that brings its own.
        ModelError: an exported program with a fixed batch.

    >>> load("torch.nn:Flatten", size=8).crop
    CenterCrop(size=8, share=1.0)
    """
    given = {name: value for name, value in (("size", size), ("mean", mean), ("std", std)) if value is not None}
    if size is not None and size * size > LARGEST:
        raise ConfigError(f"size {size}", f"a picture of at most {LARGEST:,} pixels", "give a smaller size")
    head, colon, rest = spec.partition(":")
    if colon and head in _LOADERS:
        if head == "hf" and rest:
            return _hugging_face(rest, given)
        if given:
            raise ConfigError(
                f"{', '.join(given)} for {spec}",
                "none: this network brings its own size and normalization",
                "leave them out",
            )
        if not rest:
            raise ConfigError(f"{spec!r} as model, without a name", f"{head}:NAME", f"write {head}: and a name")
        return _LOADERS[head](rest)
    normalize = _normalize(mean, std)
    if spec.endswith(".pt2"):
        return _program(Path(spec), size, normalize)
    if colon and rest:
        return _own(spec, size, normalize, given)
    raise _unknown(spec)


def _unknown(spec: str) -> ApportionError:
    if Path(spec).suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pkl", ".pickle"):
        return ConfigError(
            f"{spec} as model: a file of weights is no network",
            "the code of the network, or an exported program",
            "write a function that builds it and loads the weights, and say file.py:function; "
            "or torch.export.save it to a .pt2",
        )
    if Path(spec).suffix == ".py":
        return _without_function(Path(spec))
    if Path(spec).is_dir():
        return ConfigError(f"the directory {spec} as model", FORMS, f"write hf:{spec} for a transformers model")
    names = [f"zoo:{name}" for name in zoo.zoo()]
    prefixed = {name.partition(":")[2]: name for name in names}
    if spec in prefixed:
        return RegistryError(f"no model {spec!r}", f"{prefixed[spec]!r}", f"write {prefixed[spec]}")
    return RegistryError(f"no model {spec!r}", nearest(spec, names), f"write one of: {FORMS}")


def _without_function(path: Path) -> ConfigError:
    """Say what is missing, with what the file has to offer; the file is read and not run."""
    found = []
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        body = ast.parse(path.read_bytes()).body
        found = [b.name for b in body if isinstance(b, ast.FunctionDef | ast.ClassDef) and b.name[0] != "_"]
    there = f"one of {', '.join(found[:8])}" if found else "the name of a function or class in it"
    return ConfigError(
        f"{path} as model, without what in it makes the network",
        f"{path}: and {there}",
        f"write {path}:{found[0] if found else 'function'}",
    )


def _normalize(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Normalize:
    mean = (0.0,) * len(std or (0, 0, 0)) if mean is None else mean
    return Normalize(mean, (1.0,) * len(mean) if std is None else std)


def _line(error: BaseException) -> str:
    """Put an error's message on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


# -- weights --------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a network from a file, without running anything in it.

    A checkpoint's `state_dict` or `model` entry is taken, and the prefix `module.` of wrapped training taken off.

    Args:
        path: a safetensors file, or one that `torch.save` wrote.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ConfigError: not there, damaged, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no file {path}", "a file of weights", "check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = _tensors(path)
    except pickle.UnpicklingError as error:
        raise _refused(path) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} cannot be read as weights: {_line(error)}",
            "a whole .safetensors file, or one that torch.save wrote",
            "download or write it again",
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()):
        raise ConfigError(
            f"{path} holds {kind_of(held)} that is no table of tensors",
            "what model.state_dict() gives",
            "torch.save(model.state_dict(), path)",
        )
    wrapped = bool(held) and all(str(k).startswith("module.") for k in held)
    return {str(k).removeprefix("module.") if wrapped else str(k): v for k, v in held.items()}


def _tensors(source: Any) -> Any:
    """Read what `torch.save` wrote, where that is tensors and plain containers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about pickles it will refuse or read all the same
        return torch.load(source, map_location="cpu", weights_only=True)


def _refused(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is a pickle with more in it than tensors; reading it could run any code, so it was not read",
        "a .safetensors file, or weights that torch.load(..., weights_only=True) takes",
        "where you trust its origin, convert it once: "
        "torch.save(torch.load(path, weights_only=False).state_dict(), 'weights.pth')",
    )


def _no_program(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is not what torch.export.save writes: it holds a pickle with more in it than tensors, as TorchScript "
        "and whole modules are saved; reading it could run any code, so it was not read",
        "an exported program, or a function that builds the network",
        "write a function that builds the network and loads its weights, and say file.py:function "
        "or package.module:function",
    )


def _fill(model: nn.Module, path: str) -> None:
    """Load weights into a network that expects exactly those."""
    held = read_weights(path)
    try:
        model.load_state_dict(held)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights in {path} do not fit: {_line(error)}",
            "the weights of this very network",
            "check the name of the network, and its number of classes",
        ) from error


# -- packages -------------------------------------------------------------------------------------


def _package(name: str) -> Any:
    """Import a package that a network comes from."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise ConfigError(
            f"{missing} is not installed",
            f"{name}, which the network comes from",
            f"pip install -c constraints.txt {missing.partition('.')[0]}, so that torch stays as it is",
        ) from error
    except Exception as error:  # a package that does not fit this torch fails in ways of its own
        raise ConfigError(
            f"{name} is installed but cannot be imported: {_line(error)}",
            f"a {name} made for torch {torch.__version__}",
            f"install the version of {name} that belongs to this torch, or use another source of models",
        ) from error


def _zoo(name: str) -> PictureModel:
    return zoo.load(name)


def _hugging_face(name: str, given: Mapping[str, Any]) -> PictureModel:
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") != 1):  # names there are owner/model
        beside = [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise ConfigError(
            f"no directory {name}",
            nearest(str(folder), beside) if beside else "what model.save_pretrained wrote",
            "check the path, or write hf:OWNER/MODEL",
        )
    transformers = _package("transformers")
    where = str(folder) if local else name
    with _quiet(transformers):
        try:
            model, report = transformers.AutoModelForImageClassification.from_pretrained(
                where, local_files_only=local, output_loading_info=True, trust_remote_code=False, weights_only=True
            )
        except pickle.UnpicklingError as error:
            raise _unsafe(where, local) from error
        except Exception as error:  # one of many, by what is missing where
            raise ConfigError(
                f"hf:{name} cannot be loaded: {_line(error)}",
                "an image classifier saved by transformers, with its image processor beside it",
                "save both with save_pretrained(directory)"
                if local
                else "check the name and the connection, or give a directory",
            ) from error
        crop, normalize = _shown(transformers, name, where, local, model.config, given)
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ConfigError(
            f"hf:{name} lacks the weights {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}",
            "a model that was trained as a classifier",
            "choose a checkpoint with a classifier, or save the whole model",
        )
    names = getattr(model.config, "id2label", None) or {}
    classes = tuple(str(names[i]) for i in range(len(names))) if sorted(names) == list(range(len(names))) else ()
    return PictureModel(f"hf:{name}", model.eval(), crop, normalize, classes)


def _unsafe(where: str, local: bool) -> ConfigError:
    path = Path(where) / "pytorch_model.bin" if local else f"pytorch_model.bin of {where}"
    return ConfigError(
        f"{path} is a pickle with more in it than tensors; reading it could run any code, so it was not read",
        "weights in model.safetensors",
        "where you trust its origin, load it in Python and save it again with "
        "model.save_pretrained(directory, safe_serialization=True)",
    )


def _shown(
    transformers: Any, name: str, where: str, local: bool, config: Any, given: Mapping[str, Any]
) -> tuple[CenterCrop, Normalize]:
    """Say how pictures are shown: as the image processor does or, where there is none, as given."""
    size = given.get("size", getattr(config, "image_size", None))
    options = "none beside it: give --size, --mean and --std"
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            where, local_files_only=local, trust_remote_code=False
        )
    except Exception as error:  # as above
        if isinstance(size, int) and "mean" in given and "std" in given:
            return CenterCrop(size, 1.0), _normalize(given["mean"], given["std"])
        raise ConfigError(
            f"hf:{name} has no image processor that can be loaded: {_line(error)}",
            "the image processor saved beside the model",
            f"save it with save_pretrained(directory); if there is {options}"
            if local
            else f"check the name and the connection; if there is {options}",
        ) from error
    if given:
        raise ConfigError(
            f"{', '.join(given)} for hf:{name}",
            "none: its image processor says size and normalization",
            "leave them out",
        )
    return _processing(processor, name)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep a package's remarks and progress bars off standard error for a while."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    log.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            log.enable_progress_bar()


def _processing(processor: Any, name: str) -> tuple[CenterCrop, Normalize]:
    """Say crop and normalization as a transformers processor does them."""

    def sides(of: Any) -> dict[str, int]:
        items = of.items() if isinstance(of, Mapping) else vars(of or object).items() if of else ()
        return {k: int(v) for k, v in items if isinstance(v, int | float)}

    sized, cropped = sides(getattr(processor, "size", None)), sides(getattr(processor, "crop_size", None))
    shorter = sized.get("shortest_edge", sized.get("height"))
    if not shorter or sized.get("width", shorter) != shorter:
        raise ConfigError(
            f"hf:{name} takes pictures of size {sized or 'unknown'}", "squares", "choose a model for square pictures"
        )
    if getattr(processor, "do_center_crop", False) and cropped:
        side = cropped.get("height", shorter)
        crop = CenterCrop(side, min(1.0, side / shorter))
    elif "shortest_edge" in sized and (share := getattr(processor, "crop_pct", None)) and shorter < 384:
        crop = CenterCrop(shorter, float(share))  # ConvNeXt: resized to size / share, then cropped
    else:
        crop = CenterCrop(shorter, 1.0)
    factor = float(getattr(processor, "rescale_factor", 1 / 255)) if getattr(processor, "do_rescale", True) else 1.0
    bright = 255 * factor  # what white is before normalization
    mean, std = (0.0,) * 3, (1.0,) * 3
    if getattr(processor, "do_normalize", True):
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return crop, Normalize(tuple(m / bright for m in mean), tuple(s / bright for s in std))


def _torchvision(rest: str) -> PictureModel:
    name, _, file = rest.partition(":")
    models = _package("torchvision").models
    _known(name, models.list_models(module=models), "torchvision")
    published = models.get_model_weights(name)["DEFAULT"]
    model = models.get_model(name, weights=None)
    if file:
        _fill(model, file)
    else:
        try:
            model.load_state_dict(published.get_state_dict(progress=False, check_hash=True, weights_only=True))
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise _not_fetched(f"torchvision:{name}", error) from error
    shown = published.transforms()
    size = int(shown.crop_size[0])
    names = tuple(str(c) for c in published.meta.get("categories", ()))
    return PictureModel(
        f"torchvision:{name}",
        model.eval(),
        CenterCrop(size, min(1.0, size / int(shown.resize_size[0]))),
        Normalize(tuple(shown.mean), tuple(shown.std)),
        names,
    )


def _timm(rest: str) -> PictureModel:
    name, _, file = rest.partition(":")
    timm = _package("timm")
    _known(name.partition(".")[0], timm.list_models(), "timm")
    try:
        model = timm.create_model(name, pretrained=not file)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise _not_fetched(f"timm:{name}", error) from error
    if file:
        _fill(model, file)
    shown = timm.data.resolve_model_data_config(model)
    return PictureModel(
        f"timm:{name}",
        model.eval(),
        CenterCrop(int(shown["input_size"][-1]), min(1.0, float(shown.get("crop_pct", 1.0)))),
        Normalize(tuple(shown["mean"]), tuple(shown["std"])),
        zoo.imagenet_names() if getattr(model, "num_classes", 0) == 1000 else (),
    )


def _known(name: str, names: Iterable[str], package: str) -> None:
    names = list(names)
    if name not in names:
        raise RegistryError(
            f"{package} has no network {name!r}", nearest(name, names), f"list them with {package}'s list_models()"
        )


def _not_fetched(spec: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"the published weights of {spec} could not be had: {_line(error)}",
        "a connection, or the weights in a file",
        f"write {spec}:weights.pth",
    )


_LOADERS: dict[str, Callable[[str], PictureModel]] = {
    "zoo": _zoo,
    "hf": lambda name: _hugging_face(name, {}),
    "torchvision": _torchvision,
    "timm": _timm,
}


# -- a module of one's own ------------------------------------------------------------------------


def _own(spec: str, size: int | None, normalize: Normalize, given: Mapping[str, Any]) -> PictureModel:
    where, _, name = spec.rpartition(":")
    with _from_here():
        try:
            found: Any = _module(where)
            for part in name.split("."):
                if not hasattr(found, part):
                    raise RegistryError(
                        f"{where} has no {name!r}",
                        nearest(part, [n for n in vars(found) if not n.startswith("_")]),
                        "name a module, or a function or class that makes one",
                    )
                found = getattr(found, part)
            made = found if isinstance(found, nn.Module | PictureModel) else found()
        except ApportionError:
            raise
        except Exception as error:  # the user's code may fail in any way
            raise ConfigError(
                f"{spec} failed with {type(error).__name__}: {_line(error)}",
                "a module, or a function or class that makes one when called without arguments",
                f"try it in Python: from {Path(where).stem if where.endswith('.py') else where} import {name}",
            ) from error
    if isinstance(made, PictureModel):
        if given:
            raise ConfigError(
                f"{', '.join(given)} for {spec}, which makes a PictureModel",
                "none: it says its own size and normalization",
                "leave them out",
            )
        return made
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"{spec} gives {kind_of(made)}", "a torch.nn.Module or a PictureModel", "return the network itself"
        )
    notes = []
    if size is None:
        notes.append(f"{spec} does not say the size of its pictures: {ASSUMED_SIZE} assumed; --size gives another")
    if "mean" not in given and "std" not in given:
        notes.append(f"{spec} is shown pictures in [0, 1] as they are; --mean and --std give a normalization")
    crop = CenterCrop(ASSUMED_SIZE if size is None else size, 1.0)
    return PictureModel(spec, made.eval(), crop, normalize, notes=tuple(notes))


def _module(where: str) -> Any:
    """Import a module by its dotted name or its file."""
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            others = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
            raise ConfigError(f"no file {where}", nearest(path.name, others) if others else "a file", "check the path")
        made = importlib.util.spec_from_file_location(path.stem, path.resolve())
        assert made is not None  # the suffix is one that Python loads
        assert made.loader is not None
        module = importlib.util.module_from_spec(made)
        made.loader.exec_module(module)
        return module
    try:
        importlib.invalidate_caches()
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not (where == error.name or where.startswith(error.name + ".")):
            raise  # something that the module itself imports
        names = [*(p.stem for p in Path().glob("*.py")), *_LOADERS]
        raise RegistryError(
            f"no module {where!r}", nearest(where, names), f"check the name, or write one of: {FORMS}"
        ) from error


@contextlib.contextmanager
def _from_here() -> Iterator[None]:
    """Let modules in the current directory be imported."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


# -- exported programs ----------------------------------------------------------------------------


def _program(path: Path, size: int | None, normalize: Normalize) -> PictureModel:
    if not path.is_file():
        others = [str(p) for p in path.parent.glob("*.pt2")] if path.parent.is_dir() else []
        expected = nearest(str(path), others) if others else "what torch.export.save wrote"
        raise ConfigError(f"no file {path}", expected, "check the path")
    _check_program(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about torch
            program = torch.export.load(path)
    except Exception as error:  # of many kinds, by what is damaged
        raise ConfigError(
            f"{path} cannot be read as an exported program: {_line(error)}",
            "a whole file written by torch.export.save",
            "write it again, with this version of torch",
        ) from error
    shape = _shape(program)
    if not shape or len(shape) != 4:
        raise ModelError(
            f"{path} takes {'no tensor' if shape is None else f'an input of {len(shape)} axes'}",
            "a batch of pictures [batch, 3, height, width]",
            "export a model that takes pictures first",
        )
    if isinstance(shape[0], int):
        raise ModelError(
            f"{path} was exported for batches of {shape[0]}",
            "a dynamic batch",
            "torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},)), with two rows in x",
        )
    high, wide = (side if isinstance(side, int) else None for side in shape[2:])
    if high != wide:
        raise ModelError(f"{path} takes pictures of {high} x {wide}", "squares", "export it for square pictures")
    if size is not None and high is not None and size != high:
        raise ConfigError(f"size {size} for {path}", f"{high}, for which it was exported", "leave the size out")
    side = high or size or ASSUMED_SIZE
    notes = () if high or size else (f"{path} takes any size: {side} assumed; --size gives another",)
    return PictureModel(path.name, program.module(), CenterCrop(side, 1.0), normalize, notes=notes)


def _shape(program: Any) -> tuple[Any, ...] | None:
    inputs = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        if inputs and node.name == inputs[0]:
            value = node.meta.get("val")
            return tuple(value.shape) if isinstance(value, Tensor) else None
    return None


_PLAIN = ("archive_format", "archive_version", "byteorder", "version", "serialization_id")


def _check_program(path: Path) -> None:
    """Refuse an exported program with pickles in it that hold more than tensors.

    `torch.export.load` reads such parts with `weights_only=False`, so they are looked at before.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise _no_program(path)  # two readers may see different files under one name
            raw, pickled = _payloads(archive, names)
            for name in names:
                held = archive.read(name)
                if held and (name in pickled or not (name in raw or _is_text(name, held))):
                    _tensors(io.BytesIO(held))
    except pickle.UnpicklingError as error:
        raise _no_program(path) from error
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, RuntimeError, EOFError, AttributeError) as error:
        if isinstance(error, ApportionError):
            raise
        raise ConfigError(
            f"{path} is no exported program: {_line(error)}",
            "a whole file written by torch.export.save",
            "write it with torch.export.save(program, path)",
        ) from error


def _is_text(name: str, held: bytes) -> bool:
    """Tell whether a file in the archive is read as text, and is text: names alone do not say."""
    if name.rsplit("/", 1)[-1] in _PLAIN or "extra" in name.split("/")[:-1]:
        return True
    try:
        json.loads(held)
    except ValueError:
        return False
    return name.endswith(".json")


def _payloads(archive: zipfile.ZipFile, names: list[str]) -> tuple[set[str], set[str]]:
    """Tell the files read as plain bytes from those read as pickles, by the tables in the archive."""
    raw: set[str] = set()
    pickled: set[str] = set()
    for table in (n for n in names if n.endswith("_config.json")):
        folder = table.rsplit("/", 1)[0]
        for entry in json.loads(archive.read(table)).get("config", {}).values():
            file = f"{folder}/{entry['path_name']}"
            plain = not entry["use_pickle"] and entry["path_name"].startswith(("weight_", "tensor_"))
            (raw if plain else pickled).add(file)
    return raw, pickled
