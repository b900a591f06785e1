"""torch, imported when something of it is first used.

Settings are checked by making objectives, estimators and composers, and reading the classes of rewards. Their modules
take torch from here: until they compute they need nothing of it, and its import takes longer than all checks. Nothing
else knows; `import torch` is what it always is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
else:

    class _Deferred(ModuleType):
        """A module's attributes, by the module itself: only the names of it stand here."""

        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith("__"):  # Python asks any module for those, and torch has none of them that we read
                raise AttributeError(attribute)
            return getattr(import_module(self.__name__), attribute)

    torch, nn, F = _Deferred("torch"), _Deferred("torch.nn"), _Deferred("torch.nn.functional")
    Tensor = Any  # for annotations; isinstance refuses it, torch.Tensor is the class


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """As @torch.no_grad(), which would import torch for the class whose method it decorates."""

    @functools.wraps(function)
    def without_gradient(*args: P.args, **keys: P.kwargs) -> R:
        with torch.no_grad():
            return function(*args, **keys)

    return without_gradient


__all__ = ["F", "Tensor", "nn", "no_grad", "torch"]
