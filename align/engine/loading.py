"""A model into shards, tensor by tensor, from its safetensors files: no process ever holds all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.config import EngineConfig, OptimizerConfig
from align.engine.files import TensorFiles
from align.engine.world import World
from align.models.device import pick_device
from align.models.pretrained import Pretrained
from align.models.weights import WrongWeights, check_finite


def load_sharded(
    pretrained: Pretrained,
    settings: EngineConfig,
    optimizer: OptimizerConfig,
    world: World,
    trained_whole: bool,
    say: Callable[[str], None],
) -> Any:
    """The model of a run for stage 3, in shards on this process's device.

    trained_whole: all weights are trained, in float32, and not adapters on them. A model that has no safetensors
    files, or other names in them than in memory, is loaded whole by every process; `say` is told so.
    """
    plan, why = None, "it has no safetensors files"
    if pretrained.files is not None:
        plan, why = shard_plan(pretrained, torch.float32 if trained_whole else None)
    if plan is None:
        say(f"model {pretrained.name} is loaded whole by every process before it is sharded: {why}")
        model = pretrained.model()
        return (model.float() if trained_whole else model).to(pick_device())
    from align.engine.deepspeed import Sharder

    fill(plan, Sharder(settings, optimizer, world), world)
    return plan.model


@dataclass(frozen=True)
class ShardPlan:
    """A model without weights, and where they are."""

    name: str  # of the model, for messages
    model: Any
    files: TensorFiles
    sources: dict[str, str]  # name in the model -> name in the files
    dtype: torch.dtype | None  # None: as the model's config says


def shard_plan(pretrained: Pretrained, dtype: torch.dtype | None) -> tuple[ShardPlan | None, str]:
    """What to read for a model; None, and why, if its files do not name its weights."""
    assert pretrained.files is not None
    directory = pretrained.files()
    paths = weight_files(directory)
    if not paths:
        return None, f"{directory} holds no safetensors files"
    model = pretrained.skeleton(directory, dtype)
    files = TensorFiles(paths)
    sources, missing = match(model, files)
    if missing:
        return None, f"its files do not hold {missing} under that name"
    unread = unmatched(model, files, sources)
    if unread:
        return None, f"its files hold {unread}, which the model has not under that name"
    return ShardPlan(pretrained.name, model, files, sources, dtype), ""


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a saved model: one, or those that its index names."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
    single = directory / "model.safetensors"
    return [single] if single.is_file() else []


def match(model: Any, files: TensorFiles) -> tuple[dict[str, str], str]:
    """Names of weights and saved buffers -> names in the files; and the first that is in no file, or "".

    A weight that stands in several places of the model may be saved under any of its names. A trunk that was saved
    alone has its names without the model's prefix, and the other way round.
    """
    prefix = f"{model.base_model_prefix}."
    places: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        places.setdefault(id(value), []).append(name)
    sources = {}
    for names in places.values():
        saved = [(n, m) for n in names for m in (n, n.removeprefix(prefix), prefix + n) if m in files]
        if not saved or tuple(state[names[0]].shape) != files.shape(saved[0][1]):
            return {}, names[0]
        sources[names[0]] = saved[0][1]
    return sources, ""


def unmatched(model: Any, files: TensorFiles, sources: dict[str, str]) -> str:
    """The first name in the files that is none of the model's and that transformers would not pass over, or ""."""
    prefix = f"{model.base_model_prefix}."
    known = {*sources.values(), *(m for n in model.state_dict() for m in (n, n.removeprefix(prefix), prefix + n))}
    passed = model._keys_to_ignore_on_load_unexpected or ()
    odd = (n for n in sorted(files.names()) if n not in known and not any(re.search(p, n) for p in passed))
    return next(odd, "")


def fill(plan: ShardPlan, sharder: Callable[[nn.Parameter], None], world: World) -> None:
    """Give the model its weights: the lead reads each, all take their shard of it, and it is let go.

    Raises WrongWeights, on all processes, for one that is not finite.
    """
    model = plan.model
    places = _places(model)
    fault: WrongWeights | None = None
    with torch.no_grad():
        for name, source in plan.sources.items():
            tensor = places[name][0]
            dtype = tensor.dtype
            if isinstance(tensor, nn.Parameter):
                full = plan.files.read(source).to(dtype) if world.lead else torch.empty(tensor.shape, dtype=dtype)
                if world.lead and fault is None:
                    fault = _fault(plan.name, source, full)
                shard = nn.Parameter(full, requires_grad=tensor.requires_grad)
                del full
                sharder(shard)
                for module, attribute in places[name][1]:
                    module._parameters[attribute] = shard
            else:
                for module, attribute in places[name][1]:
                    module._buffers[attribute] = plan.files.read(source).to(pick_device(), dtype)
    fault = world.share(fault)
    if fault is not None:
        raise fault
    for module in model.modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[attribute] = buffer.to(pick_device())


def _fault(name: str, source: str, weight: Tensor) -> WrongWeights | None:
    """What check_finite has against a weight; told at the end, so that no process waits for one that has left."""
    try:
        check_finite(name, [(source, weight)])
    except WrongWeights as error:
        return error
    return None


def _places(model: nn.Module) -> dict[str, tuple[Tensor, list[tuple[nn.Module, str]]]]:
    """Each tensor of the state by its first name, with all modules and attributes that hold it."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules():
        for attribute, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                holders.setdefault(id(value), []).append((module, attribute))
                first.setdefault(id(value), (f"{path}.{attribute}" if path else attribute, value))
    return {name: (value, holders[key]) for key, (name, value) in first.items()}
