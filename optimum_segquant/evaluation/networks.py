"""The pretrained networks behind LPIPS, FID and the CLIP score: where they come from, and why one can't be had.

``weights`` is a directory (or a mapping from a metric's name to a path, a module or a hub name). What it may hold:

===========================================  ==========  ==============================================================
``lpips.pt``, ``lpips.pt2``                  LPIPS       TorchScript or torch.export: (images, reference), (N, 3, H, W)
                                                         in [-1, 1], to N distances; needs nothing else
``alexnet-owt-7be5be79.pth``                 LPIPS       torchvision's own file; needs torchvision
``inception.pt``, ``inception.pt2``          FID         (N, 3, H, W) uint8 to (N, D) features; needs nothing else
``inception-2015-12-05.pt``                  FID         NVIDIA's TorchScript Inception, asked for its features
``weights-inception-2015-12-05-6726825d.pth``  FID       torch-fidelity's own file; needs torch-fidelity
``clip/``                                    CLIP score  what ``save_pretrained`` of a CLIPModel and its processor wrote
===========================================  ==========  ==============================================================

What is not there is looked for in the caches of torch and Hugging Face, and then downloaded. A network that none of
them gives raises :class:`Unavailable`, whose message becomes the metric's entry; a file that is there but damaged is an
error of its own, raised before anything is sampled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

NETWORK_METRICS = ("lpips", "fid", "clip_score")
"""The metrics that need a pretrained network."""

FILES: Mapping[str, tuple[str, ...]] = {
    "lpips": ("lpips.pt", "lpips.pt2", "alexnet-owt-7be5be79.pth"),
    "fid": (
        "inception.pt",
        "inception.pt2",
        "inception-2015-12-05.pt",
        "weights-inception-2015-12-05-6726825d.pth",
    ),
    "clip_score": ("clip",),
}
"""What a weights directory may hold for a metric; the first that is there is taken."""

CLIP_NAME = "openai/clip-vit-large-patch14"
"""The CLIP model that is taken from the hub: the one published scores are mostly of."""

_HUB_TIMEOUT = 10.0  # seconds for one look whether the hub answers

Weights: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | None"


class Unavailable(Exception):  # noqa: N818 (no error of anybody: the metric is skipped)
    """A network can't be had on this machine; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A loaded network.

    Attributes:
        module: what computes: for LPIPS a function of (images, reference), both (N, 3, H, W) float32 in [0, 1], to N
            distances; for FID an ``nn.Module`` from (N, 3, H, W) uint8 to (N, D); for CLIP (model, processor).
        source: where it came from, for the reader of a number.
    """

    module: Any
    source: str


def find_weights(weights: Weights) -> dict[str, Any]:
    """The source of each network that ``weights`` names; nothing is loaded.

    Raises:
        FileNotFoundError: no such path.
        ValueError: a directory that holds none of :data:`FILES`, or a mapping with unknown keys.
    """
    if weights is None:
        return {}
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) - set(NETWORK_METRICS))
        if unknown:
            raise ValueError(f"weights: {unknown[0]!r} is no metric with a network; use {', '.join(NETWORK_METRICS)}")
        return {name: _checked(name, source) for name, source in weights.items() if source is not None}
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"weights: there is no directory {folder}; it should hold {_expected()}")
    found = {
        name: next((folder / file for file in files if (folder / file).exists()), None) for name, files in FILES.items()
    }
    if not any(found.values()):
        raise ValueError(f"weights: {folder} holds none of {_expected()}")
    return {name: path for name, path in found.items() if path is not None}


def _expected() -> str:
    return ", ".join(file + ("/" if name == "clip_score" else "") for name, files in FILES.items() for file in files)


def _checked(name: str, source: Any) -> Any:
    """A mapping's entry: modules as they are, hub names of CLIP as they are, anything else is a path."""
    if not isinstance(source, str | os.PathLike):
        return source
    path = Path(source).expanduser()
    if path.exists():
        return path
    if (
        name == "clip_score"
        and isinstance(source, str)
        and source.count("/") <= 1
        and not source.startswith((".", "~"))
    ):
        return source
    raise FileNotFoundError(f"weights for {name}: there is no {source}")


def load_network(name: str, source: Any = None, device: torch.device | str = "cpu") -> Network:
    """Load the network of a metric.

    Args:
        name: one of :data:`NETWORK_METRICS`.
        source: from :func:`find_weights`; None for the caches and the hub.
        device: where it computes.

    Raises:
        Unavailable: a package is missing, or there is neither a file nor a network to get it from.
        ValueError: a given file is damaged or of another kind.
    """
    loaders: dict[str, Callable[[Any, torch.device], Network]] = {
        "lpips": _lpips,
        "fid": _inception,
        "clip_score": _clip,
    }
    with torch.no_grad():
        return loaders[name](source, torch.device(device))


# -- LPIPS -------------------------------------------------------------------------------------------------------------


def _lpips(source: Any, device: torch.device) -> Network:
    if source is None or (isinstance(source, Path) and source.suffix == ".pth"):
        return _lpips_of_torchmetrics(source, device)
    module = _module(source, device)

    def distance(images: Tensor, reference: Tensor) -> Tensor:
        return module(2 * images - 1, 2 * reference - 1).reshape(-1)

    return Network(distance, _name(source))


def _lpips_of_torchmetrics(backbone: Path | None, device: torch.device) -> Network:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    # Its heads are part of torchmetrics; torchvision gets the backbone through torch.hub.
    with _reasons("torchvision", "lpips.pt or alexnet-owt-7be5be79.pth"), _found_by_torchvision(backbone):
        metric = LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True).to(device)

    def distance(images: Tensor, reference: Tensor) -> Tensor:
        try:
            metric.update(images, reference)
            return metric.compute().reshape(-1)
        finally:
            metric.reset()

    return Network(distance, f"AlexNet of {'torchvision' if backbone is None else backbone.name}, torchmetrics")


@contextlib.contextmanager
def _found_by_torchvision(backbone: Path | None) -> Iterator[None]:
    """Inside, torchvision takes AlexNet's weights from this file, if one is given."""
    if backbone is None:
        yield
        return
    from torchvision.models import AlexNet_Weights

    with _cached_by_hub(backbone, AlexNet_Weights.DEFAULT.url.rpartition("/")[2]):
        yield


@contextlib.contextmanager
def _cached_by_hub(path: Path, name: str) -> Iterator[None]:
    """Inside, torch.hub finds ``path`` in its cache, as the file ``name``."""
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        (checkpoints / name).symlink_to(path.resolve())
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


# -- FID ---------------------------------------------------------------------------------------------------------------


class _Features(nn.Module):
    """NVIDIA's Inception gives logits unless asked for features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, return_features=True)


def _inception(source: Any, device: torch.device) -> Network:
    if source is None or (isinstance(source, Path) and source.suffix == ".pth"):
        return _inception_of_torchmetrics(source, device)
    module = _module(source, device)
    if isinstance(module, torch.jit.ScriptModule):
        forward: Any = module.forward
        arguments = [argument.name for argument in forward.schema.arguments]
        module = _Features(module) if "return_features" in arguments else module
    return Network(module, _name(source))


def _inception_of_torchmetrics(path: Path | None, device: torch.device) -> Network:
    from torchmetrics.image.fid import FrechetInceptionDistance

    with _reasons("torch-fidelity", "inception.pt or weights-inception-2015-12-05-6726825d.pth"):
        metric = FrechetInceptionDistance(feature_extractor_weights_path=None if path is None else str(path))
    return Network(metric.inception.to(device), "Inception v3 of torch-fidelity, torchmetrics")


# -- CLIP --------------------------------------------------------------------------------------------------------------


def _clip(source: Any, device: torch.device) -> Network:
    if not isinstance(source, str | Path | None):
        model, processor = source
        return Network((model.to(device).eval(), processor), type(model).__name__)
    try:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor
    except ImportError as error:
        raise Unavailable("transformers is not installed: pip install 'optimum-segquant[eval]'") from error
    local = isinstance(source, Path)
    name = CLIP_NAME if source is None else str(source)
    if not local:
        _require_hub(name)
    try:
        # Not CLIPProcessor.from_pretrained, whose newer image processor needs torchvision.
        processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name))
        model = CLIPModel.from_pretrained(name)
    except Exception as error:
        if not local:
            raise Unavailable(
                f"{name} could not be downloaded ({_first_line(error)}): put clip/ into a weights directory"
            ) from error
        raise ValueError(
            f"{name} holds no CLIP model ({_first_line(error)}): save both with CLIPModel.save_pretrained and "
            "CLIPProcessor.save_pretrained"
        ) from error
    return Network((model.to(device).eval(), processor), _name(source) if local else name)


def _require_hub(name: str) -> None:
    """Make sure that a model is cached or that the hub answers: its client would retry for more than a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except Exception as error:
        raise Unavailable(
            f"{name} is not in the Hugging Face cache and the hub can't give it ({type(error).__name__}): put clip/ "
            "into a weights directory, or run once with a network"
        ) from error


# -- shared ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reasons(package: str, files: str) -> Iterator[None]:
    """Turn what torchmetrics raises where a package or a download is missing into :class:`Unavailable`."""
    remedy = f"put {files} into a weights directory"
    try:
        yield
    except ImportError as error:
        raise Unavailable(
            f"{package} is not installed: pip install 'optimum-segquant[perceptual]', or {remedy}"
        ) from error
    except OSError as error:  # URLError and timeouts are
        raise Unavailable(f"its weights could not be downloaded ({_first_line(error)}): {remedy}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"the weights for {package} are damaged or of another network ({_first_line(error)}): copy {files} again"
        ) from error


def _module(source: Any, device: torch.device) -> nn.Module:
    """A module, or the TorchScript or torch.export file at a path."""
    if isinstance(source, nn.Module):
        return source.to(device).eval()
    if not isinstance(source, Path):
        raise ValueError(f"weights: expected a path or a torch.nn.Module, got {type(source).__name__}")
    try:
        if source.suffix == ".pt2":
            return torch.export.load(source).module().to(device)  # in eval mode for good
        return torch.jit.load(str(source), map_location=device).eval()
    except Exception as error:
        raise ValueError(
            f"{source} is damaged or no TorchScript file ({_first_line(error)}): write one with "
            "torch.jit.trace(module, example).save(path)"
        ) from error


def _name(source: Any) -> str:
    return source.name if isinstance(source, Path) else type(source).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
