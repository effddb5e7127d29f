"""open_clip's vision transformer, from its own file: the rest of the library needs torchvision."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

_STAND_INS = ("torchvision", "torchvision.ops", "torchvision.ops.misc")


def _open_clip_transformer() -> ModuleType:
    """Import `open_clip.transformer` without `open_clip`'s own start, and leave no stand-in for others to find."""
    spec = find_spec("open_clip")
    assert spec is not None, "install requirements/oracles.txt with --no-deps"
    package = ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations or ())
    modules = {name: ModuleType(name) for name in _STAND_INS}
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("NeverUsed", (), {})  # type: ignore[attr-defined]
    sys.modules |= modules | {"open_clip": package}
    try:
        return import_module("open_clip.transformer")
    finally:
        for name in modules:
            del sys.modules[name]


_transformer = _open_clip_transformer()
VisionTransformer = _transformer.VisionTransformer
QuickGELU = _transformer.QuickGELU
