"""Making the hosts know ``quant_method: "segquant"``, without importing them.

``import optimum_segquant`` must be cheap, and hosts may be missing or imported later. So what is to be done to a module
of a host is done right after that module is imported: at once if it is there already, else by a finder on
``sys.meta_path`` that steps in for these few modules only.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from ..checkpoints.config import QUANT_METHOD

logger = logging.getLogger(__name__)


def register() -> None:
    """Register with every host, now or when it is imported. Calling it again changes nothing."""
    for name, action in _ACTIONS.items():
        if name in _DONE:
            continue
        module = sys.modules.get(name)
        if module is not None and not _is_initializing(module):
            _run(name, module, action)
    if _FINDER not in sys.meta_path and any(name not in _DONE for name in _ACTIONS):
        sys.meta_path.insert(0, _FINDER)


def _register_with_diffusers(auto: ModuleType) -> None:
    from .config import SegQuantConfig
    from .diffusers_quantizer import SegQuantDiffusersQuantizer

    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SegQuantDiffusersQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SegQuantConfig


def _register_with_transformers(auto: ModuleType) -> None:
    from .config import SegQuantConfig
    from .transformers_quantizer import SegQuantHfQuantizer

    auto.register_quantization_config(QUANT_METHOD)(SegQuantConfig)
    auto.register_quantizer(QUANT_METHOD)(SegQuantHfQuantizer)


def _save_diffusers_models_packed(modeling: ModuleType) -> None:
    _wrap_save(modeling.ModelMixin, "diffusers_quantizer")


def _save_transformers_models_packed(modeling: ModuleType) -> None:
    _wrap_save(modeling.PreTrainedModel, "transformers_quantizer")


def _wrap_save(host: type, attached: str) -> None:
    """Let ``save_pretrained`` of models with packed Linears write segquant checkpoints; others are left alone.

    Args:
        host: class to change.
        attached: name of what :mod:`.saving` has for it; nothing heavy is imported before a packed model is saved.
    """
    original = vars(host)["save_pretrained"]

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_packed(self):
            return original(self, save_directory, *args, **kwargs)
        from ..checkpoints.save import save_staged
        from . import saving

        if saving.adapters_only(self):
            return original(self, save_directory, *args, **kwargs)
        named = saving.named_arguments(original, args, kwargs)
        carrying = functools.partial(getattr(saving, attached), self)
        return save_staged(functools.partial(original, self), carrying, save_directory, named)

    host.save_pretrained = save_pretrained  # type: ignore[attr-defined]


def _refuse_to_fuse_lora(peft: ModuleType) -> None:
    """Adapters can't be added to codes; PEFT's own attempt fails halfway, or with ``safe_fusing`` does nothing."""
    host = peft.PeftAdapterMixin
    original = vars(host)["fuse_lora"]

    @functools.wraps(original)
    def fuse_lora(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_packed(self):
            raise ValueError(
                "LoRA adapters can't be fused into packed Linears, whose weights are codes: leave them on top, as they "
                "are, or call model.dequantize() first"
            )
        return original(self, *args, **kwargs)

    host.fuse_lora = fuse_lora


def _is_packed(model: Any) -> bool:
    """Whether a model has packed Linears; without this package's other half imported nothing has."""
    packing = sys.modules.get("modelopt_ext")
    return packing is not None and any(isinstance(module, packing.PackedLinear) for module in model.modules())


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.quantizers.auto": _register_with_diffusers,
    "transformers.quantizers.auto": _register_with_transformers,
    "diffusers.models.modeling_utils": _save_diffusers_models_packed,
    "transformers.modeling_utils": _save_transformers_models_packed,
    "diffusers.loaders.peft": _refuse_to_fuse_lora,
}
_DONE: set[str] = set()
_LOCK = threading.RLock()


def _run(name: str, module: ModuleType, action: Callable[[ModuleType], None]) -> None:
    with _LOCK:
        if name in _DONE:
            return
        _DONE.add(name)
        try:
            action(module)
        except BaseException:
            _DONE.discard(name)
            raise
    logger.debug("segquant: registered with %s", name)


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, then runs the action."""

    def __init__(self, name: str, loader: Any) -> None:
        self._name = name
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            _run(self._name, module, _ACTIONS[self._name])
        except Exception:  # a host that changed must stay usable for everything else
            logger.exception(
                "segquant could not be registered with %s, whose version this release of optimum-segquant does not "
                "know: packed models can't be loaded or saved with it",
                self._name,
            )

    def __getattr__(self, name: str) -> Any:  # get_source, get_data and the like
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of :data:`_ACTIONS` where everyone finds them, and wraps their loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _ACTIONS or fullname in _DONE:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(fullname, spec.loader)
                return spec
        return None


_FINDER = _Finder()
