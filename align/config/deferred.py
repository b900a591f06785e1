"""torch, imported when something of it is first used: checking settings makes parts whose modules name it and, until
they compute, need nothing of it; its import takes longer than all checks."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any


class _Module(ModuleType):
    """Stands for a module: the first attribute that is not known here imports torch."""

    def __init__(self, name: str, spec: ModuleSpec):
        super().__init__(name)
        self.__spec__ = spec  # asked by others whether the package is there
        self.__path__: list[str] = []

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked by Python itself, as of any module
            raise AttributeError(attribute)
        _load()
        return getattr(sys.modules[self.__name__], attribute)


class _Tensor:
    """Stands for torch.Tensor: in annotations for nothing; what asks, calls or inherits it gets the class."""

    def __call__(self, *args: Any, **keys: Any) -> Any:
        return _load().Tensor(*args, **keys)

    def __instancecheck__(self, thing: object) -> bool:
        return "torch" in sys.modules and isinstance(thing, _load().Tensor)

    def __subclasscheck__(self, kind: type) -> bool:
        return issubclass(kind, _load().Tensor)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type]:  # noqa: ARG002
        return (_load().Tensor,)

    def __or__(self, other: Any) -> Any:
        return _load().Tensor | other

    def __ror__(self, other: Any) -> Any:
        return other | _load().Tensor

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(_load().Tensor, attribute)


class _NoGrad:
    """Stands for torch.no_grad(), which decorates estimators and composers: torch is imported when they are called."""

    def __init__(self) -> None:
        self._entered: list[Any] = []

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def without_gradient(*args: Any, **keys: Any) -> Any:
            with _load().no_grad():
                return function(*args, **keys)

        return without_gradient

    def __enter__(self) -> None:
        self._entered.append(_load().no_grad())
        self._entered[-1].__enter__()

    def __exit__(self, *error: object) -> None:
        self._entered.pop().__exit__(*error)


class _Finder(MetaPathFinder):
    """Sees torch being imported, whoever does so, and gives it to the modules that hold stand-ins."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Of torch itself: its own, but for the loader. Of its other modules, while it is deferred: themselves."""
        if name == "torch":
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, found), None)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)
            return spec
        if name.startswith("torch.") and isinstance(sys.modules.get("torch"), _Module):
            _load()
            return spec_from_loader(name, _Given(importlib.import_module(name)))
        return None


class _Loader(Loader):
    """Loads torch as its own loader does, and replaces the stand-ins."""

    def __init__(self, own: Loader, finder: _Finder):
        self._own, self._finder = own, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As its own loader."""
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As its own loader; then the modules that hold a stand-in get what it stood for."""
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._own
        self._own.exec_module(module)
        sys.meta_path.remove(self._finder)
        _replace(module)


class _Given(Loader):
    """Of a module that is there: nothing is executed again."""

    def __init__(self, module: ModuleType):
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002
        """The module."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Its own spec, which Python has overwritten."""
        module.__spec__ = self._spec


_STAND_INS: dict[str, _Module] = {}  # one set for all checks of a process, by the name of the module
_TENSOR = _Tensor()


def _stand_ins() -> dict[str, _Module]:
    """Of what modules name beside torch itself: `from torch import Tensor, nn`, `import torch.nn.functional as F`."""
    if not _STAND_INS:
        found = find_spec("torch")
        assert found is not None
        for name in ("torch", "torch.nn", "torch.nn.functional"):
            _STAND_INS[name] = _Module(name, found if name == "torch" else ModuleSpec(name, None))
        torch, nn, functional = _STAND_INS.values()
        vars(torch).update(nn=nn, Tensor=_TENSOR, no_grad=_NoGrad)
        vars(nn).update(functional=functional)
        sys.meta_path.insert(0, _Finder())
    return _STAND_INS


def _withdraw() -> None:
    for name, stand_in in _STAND_INS.items():
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def _load() -> Any:
    """torch itself."""
    _withdraw()
    return importlib.import_module("torch")


def _replace(torch: ModuleType) -> None:
    """Gives every module that holds a stand-in what it stood for."""
    real = {id(stand_in): sys.modules[name] for name, stand_in in _STAND_INS.items()}
    real |= {id(_TENSOR): torch.Tensor, id(_NoGrad): torch.no_grad}
    for stand_in in _STAND_INS.values():
        vars(stand_in).update({k: v for k, v in vars(sys.modules[stand_in.__name__]).items() if k[:2] != "__"})
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__ != __name__:
            for name, value in list(vars(module).items()):
                if id(value) in real:
                    setattr(module, name, real[id(value)])


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, `import torch` binds a stand-in, which is replaced when it is used or torch is imported after.

    Without effect once torch is imported.
    """
    if "torch" in sys.modules or find_spec("torch") is None:
        yield
        return
    sys.modules.update(_stand_ins())
    try:
        yield
    finally:
        _withdraw()
