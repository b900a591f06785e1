"""A CUDA device that is pretended on a CPU build of torch: tensors say cuda:0 and are computed on the host.

`install()` makes torch.cuda answer as an H200 and torch.autocast("cuda") be in effect. Every operation that mixes
tensors of host and device is told, every read of the device by the host and every copy is counted with the line of
align that asked for it, and the variable-length kernel is computed plainly. What real kernels refuse beyond
kernel.faults, streams, memory, speed, NCCL and engines are not pretended.

A process that installs it cannot take it back: run.py is one.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import tempfile
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention.varlen  # what it registers would not take pretended functions for torch's
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from tests.simulated_gpu import kernel

DEVICE = torch.device("cuda:0")
ROOT = str(Path(__file__).parents[2]) + "/"

# By phase of the run, kind and line.
OPERATIONS: Counter[tuple[str, str]] = Counter()
READS: Counter[tuple[str, str, str]] = Counter()
COPIES: Counter[tuple[str, str, str]] = Counter()
MIXED: Counter[tuple[str, str]] = Counter()
_phase = ["outside"]

# They wait for the device, because the shape of what they return or a number is wanted by the host.
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "is_nonzero", "equal", "bincount",
}  # fmt: skip
# They may be asked for tensors of both sides.
_CROSSING = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "lift_fresh", "set_"}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What is counted inside is counted below this name."""
    before, _phase[0] = _phase[0], name
    try:
        yield
    finally:
        _phase[0] = before


def line() -> str:
    """The innermost line of align, or of the library that it called where none of align's is on the stack."""
    frames = [f for f in reversed(traceback.extract_stack(limit=80)) if "/tests/simulated_gpu/" not in f.filename]
    own = next((f for f in frames if f.filename.startswith(ROOT + "align/")), None)
    if own is not None:
        return f"{own.filename.removeprefix(ROOT)}:{own.lineno}"
    return next((f"{f.filename}:{f.lineno}" for f in frames if "/torch/" not in f.filename), "?")


class OnDevice(torch.Tensor):
    """A tensor that says cuda:0; `held` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> OnDevice:
        out = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device("cpu"), requires_grad=requires_grad,
        )  # fmt: skip
        out.held = held
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # noqa: ARG003
        return dispatched(func, args, kwargs or {})

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, *, tensor_contents=None) -> str:  # noqa: ARG002
        return f"OnDevice({self.held})"

    def get_device(self) -> int:
        return 0

    def cpu(self, *_args, **_keys) -> torch.Tensor:
        return self.to("cpu")

    def cuda(self, *_args, **_keys) -> OnDevice:
        return self

    def to(self, *args, **keys) -> torch.Tensor:
        copy = keys.pop("copy", False)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **keys)
        out = self
        if dtype is not None and (dtype != self.dtype or copy):
            out = _plain_to(self, dtype, copy=True)
        elif copy:
            out = _plain_to(self, self.dtype, copy=True)
        if device is None or device.type != "cpu":
            return out
        READS[_phase[0], "to the host", line()] += 1
        if out.requires_grad and torch.is_grad_enabled():
            return _ToHost.apply(out)
        return out.detach().held.clone()

    def tolist(self) -> Any:
        READS[_phase[0], "tolist", line()] += 1
        return self.detach().held.tolist()

    def numpy(self, *_args, **_keys):
        raise TypeError(f"cannot convert a tensor of cuda:0 to numpy; asked by {line()}")

    __array__ = numpy

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or DEVICE, requires_grad=requires_grad)

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict) -> OnDevice:
        if id(self) not in memo:
            out = OnDevice(self.held.clone(), self.requires_grad)
            if getattr(self, "_is_param", False):
                out._is_param = True
            memo[id(self)] = out
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        raise RuntimeError(f"a tensor of cuda:0 is pickled by {line()}")


_plain_to = torch._C.TensorBase.to


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x: OnDevice) -> torch.Tensor:
        return x.detach().held.clone()

    @staticmethod
    def backward(_ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad if isinstance(grad, OnDevice) else OnDevice(grad)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _wrapped(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) else x


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def dispatched(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation of aten in which a tensor of the device takes part, or that makes one."""
    name = func._schema.name.split("::")[1]
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    own = [x for x in flat if isinstance(x, OnDevice)]
    others = [x for x in flat if not isinstance(x, OnDevice)]
    if own:
        OPERATIONS[_phase[0], f"{name} {str(own[0].dtype).removeprefix('torch.')}"] += 1
        _count(func, name, args, kwargs, others)
    if name == "_to_copy":
        return _copied(func, args, kwargs)
    if name == "copy_":
        return _copied_into(func, args, kwargs)
    if name == "_varlen_attn":
        return _varlen(args)
    if name == "_varlen_attn_backward":
        grad, q, k, v, _, _, cu_q, cu_k, _, _, _, _, scale, window = (_held(x) for x in args)
        return tuple(OnDevice(x) for x in kernel.backward(grad, q, k, v, cu_q, cu_k, scale, window))
    return _computed(func, name, args, kwargs, own)


def _count(func: Any, name: str, args: tuple, kwargs: dict, others: list[torch.Tensor]) -> None:
    pointwise = torch.Tag.pointwise in func.tags
    scalars = pointwise and all(x.dim() == 0 for x in others)
    if others and name not in _CROSSING and not scalars and not _in_decomposed_attention():
        MIXED[f"{func} of {[tuple(x.shape) for x in others]} of the host", line()] += 1
    if name in _WAITING:
        READS[_phase[0], name, line()] += 1
    if name == "repeat_interleave" and kwargs.get("output_size") is None and str(func).endswith("Tensor"):
        READS[_phase[0], name, line()] += 1
    if name in _INDEXING:
        indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            READS[_phase[0], "index by a mask", line()] += 1
        if any(not isinstance(i, OnDevice) for i in indices):
            COPIES[_phase[0], "index of the host", line()] += 1


def _in_decomposed_attention() -> bool:
    """Heads of two sizes are computed in parts, whose causal mask C++ puts where it believes the queries to be."""
    frames = (f.filename for f in reversed(traceback.extract_stack(limit=40)))
    outside = next(f for f in frames if "/torch/" not in f and "/tests/simulated_gpu/" not in f)
    return outside.endswith(("transformers/integrations/sdpa_attention.py", "align/models/attention.py"))


def _copied(func: Any, args: tuple, kwargs: dict) -> Any:
    """To another type, or from the host; OnDevice.to is what goes there."""
    (x,) = args
    arrives = not isinstance(x, OnDevice) and _is_gpu(kwargs.get("device"))
    if arrives:
        COPIES[_phase[0], "pinned" if kwargs.get("non_blocking") and _is_pinned(x) else "waiting", line()] += 1
    keys = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    out = func(_held(x), **keys)
    return OnDevice(out) if arrives or isinstance(x, OnDevice) else out


def _copied_into(func: Any, args: tuple, kwargs: dict) -> Any:
    to, of = args[:2]
    if isinstance(to, OnDevice) and not isinstance(of, OnDevice):
        COPIES[_phase[0], "waiting", line()] += 1
    if isinstance(of, OnDevice) and not isinstance(to, OnDevice):
        READS[_phase[0], "to the host", line()] += 1
    func(_held(to), _held(of), *args[2:], **kwargs)
    return to


def _varlen(args: tuple) -> tuple[OnDevice, OnDevice, OnDevice]:
    q, k, v, cu_q, cu_k, max_q, max_k = (_held(x) for x in args[:7])
    for fault in kernel.faults(q, k, v, cu_q, cu_k, max_q, max_k):
        MIXED[f"varlen_attn: {fault}", line()] += 1
    rest = [*args[7:], None, None, None]
    with torch.no_grad():
        out = kernel.forward(q, k, v, cu_q, cu_k, rest[1] or q.shape[-1] ** -0.5, rest[2] or (-1, -1))
    return OnDevice(out), OnDevice(torch.empty(q.shape[1], len(q))), OnDevice(torch.empty(2, dtype=torch.uint64))


def _computed(func: Any, name: str, args: tuple, kwargs: dict, own: list[OnDevice]) -> Any:
    """On the host, with what a CPU's kernels lack."""
    makes = _is_gpu(kwargs.get("device"))
    keys = dict(kwargs)
    if makes:
        keys["device"] = torch.device("cpu")
    if makes or own:
        keys.pop("pin_memory", None)
    inputs, keys = tree_map_only(OnDevice, _held, args), tree_map_only(OnDevice, _held, keys)
    if name in ("_fused_adamw_", "_fused_adam_") and any(not isinstance(count, OnDevice) for count in args[5]):
        MIXED[f"{name}: counts of steps on the host", line()] += 1
    if name == "histc" and not inputs[0].dtype.is_floating_point:
        out = func(inputs[0].float(), *inputs[1:], **keys).to(inputs[0].dtype)
    else:
        out = func(*inputs, **keys)
    if not own and not makes:
        return out
    if name in ("_local_scalar_dense", "is_nonzero", "equal"):
        return out
    if name.endswith("_") and not name.startswith(("_foreach", "_fused")) and isinstance(args[0], OnDevice):
        return args[0]  # in place
    if isinstance(kwargs.get("out"), OnDevice):
        return kwargs["out"]
    return tree_map(_wrapped, out)


_pinned: set[int] = set()  # storages


def _is_pinned(x: torch.Tensor) -> bool:
    return x.untyped_storage()._cdata in _pinned


class _Everything(TorchDispatchMode):
    """Operations that only make a tensor of the device, or pin one of the host, meet no OnDevice by themselves."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        kwargs = kwargs or {}
        if any(isinstance(x, OnDevice) for x in tree_flatten((args, kwargs))[0]) or _is_gpu(kwargs.get("device")):
            return dispatched(func, args, kwargs)
        if kwargs.get("pin_memory"):
            out = func(*args, **{k: v for k, v in kwargs.items() if k != "pin_memory"})
            _pinned.add(out.untyped_storage()._cdata)
            return out
        return func(*args, **kwargs)


class Properties:
    """Of an H200."""

    name = "NVIDIA H200 (pretended)"
    total_memory = 141 << 30
    major, minor = 9, 0
    uuid = "GPU-0"
    multi_processor_count = 132


class _Event:
    def __init__(self, *_args, **_keys) -> None:
        pass

    def record(self, *_args) -> None:
        pass

    def synchronize(self) -> None:
        READS[_phase[0], "synchronize", line()] += 1


class _Device(contextlib.nullcontext):
    def __init__(self, *_args) -> None:
        super().__init__()


def install(free: int = 130 << 30) -> None:
    """From here on this process has a GPU with `free` bytes."""
    ctypes.CDLL(_guard())

    def nothing(*_args, **_keys) -> None:
        pass

    def waits(*_args) -> None:
        READS[_phase[0], "synchronize", line()] += 1

    answers: dict[str, Any] = {
        "_lazy_init": nothing, "is_available": lambda: True, "is_initialized": lambda: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": nothing,
        "get_device_name": lambda *_: Properties.name, "get_device_properties": lambda *_: Properties,
        "get_device_capability": lambda *_: (9, 0), "mem_get_info": lambda *_: (free, 141 << 30),
        "is_bf16_supported": lambda *_, **__: True, "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing, "get_rng_state_all": lambda: [], "manual_seed": nothing, "manual_seed_all": nothing,
        "empty_cache": nothing, "synchronize": waits, "reset_peak_memory_stats": nothing, "ipc_collect": nothing,
        "max_memory_allocated": lambda *_: 0, "memory_allocated": lambda *_: 0, "device": _Device, "Event": _Event,
        "current_stream": lambda *_: types.SimpleNamespace(synchronize=waits, wait_stream=nothing),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.version.cuda = "13.0"
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.autograd.set_multithreading_enabled(False)
    _redirect()
    _Everything().__enter__()


def _redirect() -> None:
    """What torch decides before an operation is dispatched: factories with data, to(), autocast."""
    plain = torch.Tensor.to
    # `with torch.device("meta")` knows factories by the functions that they are when it first looks.
    torch.utils._device._device_constructors()

    def there(x: Any) -> Any:
        device = isinstance(x, (str, torch.device)) and not isinstance(x, torch.dtype)
        return DEVICE if device and str(x).startswith("cuda") else x

    def to(self, *args, **keys):
        return plain(self, *(there(x) for x in args), **{k: there(v) for k, v in keys.items()})

    torch.Tensor.to = to
    torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype = _by_device_and_type
    torch.Tensor.cuda = lambda self, *_args, **_keys: to(self, DEVICE)
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _factory(getattr(torch, name)))
    torch.autocast = torch.amp.autocast = torch.amp.autocast_mode.autocast = _autocast(torch.amp.autocast_mode.autocast)


def _by_device_and_type(lists: list[list[torch.Tensor]], *_args) -> dict:
    """What torch does in C++, where all these tensors are the host's."""
    (tensors,) = lists
    found: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for t in tensors:
        found.setdefault((t.device, t.dtype), []).append(t)
    return {key: ([group], []) for key, group in found.items()}


def _factory(made: Any) -> Any:
    def make(data, *args, device=None, requires_grad=False, **keys):
        if isinstance(data, OnDevice) and (device is None or _is_gpu(device)):
            return data if keys.get("dtype") in (None, data.dtype) else data.to(keys["dtype"])
        more = {"requires_grad": True} if requires_grad else {}
        if not _is_gpu(device):
            return made(data, *args, **keys, **more, **({} if device is None else {"device": device}))
        out = made(data, *args, **keys).to(DEVICE)
        return out.requires_grad_() if requires_grad else out

    return make


def _autocast(plain: Any) -> Any:
    class Autocast(plain):
        """Of the device by the host's autocast; both say that they are on."""

        def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
            self.gpu = _is_gpu(device_type)
            if self.gpu and dtype is None:
                dtype = torch.get_autocast_dtype("cuda")
            device = "cpu" if self.gpu else device_type
            super().__init__(device, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
            self.on = enabled

        def __enter__(self):
            if self.gpu:
                self.before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
                torch.set_autocast_enabled("cuda", self.on)
                torch.set_autocast_dtype("cuda", self.fast_dtype)
            return super().__enter__()

        def __exit__(self, *error):
            if self.gpu:
                torch.set_autocast_enabled("cuda", self.before[0])
                torch.set_autocast_dtype("cuda", self.before[1])
            return super().__exit__(*error)

    return Autocast


def _guard() -> str:
    """guard.cpp as a library, compiled once for a version of torch."""
    folder = Path(torch.__file__).parent
    out = Path(tempfile.gettempdir()) / f"simulated-gpu-{Path(__file__).stat().st_uid}-{torch.__version__}.so"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=out.parent) as work:
            made = Path(work) / out.name
            source = str(Path(__file__).with_name("guard.cpp"))
            words = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{folder / 'include'}", source]
            words += [f"-L{folder / 'lib'}", "-lc10", f"-Wl,-rpath,{folder / 'lib'}", "-o", str(made)]
            subprocess.run(words, check=True)
            made.replace(out)
    return str(out)
