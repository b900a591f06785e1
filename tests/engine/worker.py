"""One process of the engine tests: runs every check of a plan and writes what it saw as JSON and tensors.

python -m tests.engine.worker PLAN DIRECTORY, with torchrun's variables set or none of them.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from align.config import EngineConfig
from align.engine.deepspeed import DeepSpeedEngine, load_deepspeed
from align.engine.files import file_name
from align.engine.loading import load_sharded
from align.engine.world import World, join, leave
from align.models.policy import Policy, lora
from align.models.pretrained import from_hub
from tests.engine import cases

STEPS = 3


def train(world: World, out: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Losses and norms of some steps; the weights after them into a file."""
    precision = getattr(torch, case.get("precision", "float32"))
    own = cases.engine(case["network"], case["stage"], world, case.get("offload", ""), precision, "small" in case)
    seen = [cases.step(own, number) for number in range(STEPS)]
    weights = {name: value.detach().clone() for name, value in own.weights()}
    if world.lead:
        save_file(weights, out / f"{case['id']}.safetensors")
    return {"steps": seen, "names": list(weights), "parameters": list(own.parameters)}


def resume(world: World, out: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a checkpoint, one more step and its checkpoint; and the last step again by one that read the first."""
    torch.manual_seed(7 + world.rank)
    straight = cases.engine(case["network"], case["stage"], world)
    for number in range(2):
        cases.step(straight, number)
    places = {name: out / f"{case['id']}-{name}" for name in ("two", "three", "again")}
    if world.lead:
        for place in places.values():
            place.mkdir()
    world.barrier()
    straight.write(places["two"])
    first = cases.step(straight, 2)
    straight.write(places["three"])
    world.barrier()
    torch.manual_seed(99)  # not where the first one was
    again = cases.engine(case["network"], case["stage"], world)
    cases.step(again, 3)  # whatever it was before
    again.read(places["two"])
    second = cases.step(again, 2)
    again.write(places["again"])
    return {"steps": [first, second]}


def take_over(world: World, out: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One step after another engine's checkpoint, and the weights after it."""
    own = cases.engine(case["network"], case["stage"], world)
    own.read(Path(case["from"]) if case["from"].startswith("/") else out / case["from"])
    seen = cases.step(own, 2)
    weights = {name: value.detach().clone() for name, value in own.weights()}
    draw = float(torch.rand(()))
    if world.lead:
        save_file(weights, out / f"{case['id']}.safetensors")
    return {"steps": [seen], "draw": draw}


def non_finite(world: World, out: Path, case: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """A gradient that is infinite on the last process only: what is told, and whether weights moved."""
    own = cases.engine(case["network"], case["stage"], world, case.get("offload", ""))
    cases.step(own, 0)
    before = {name: value.detach().clone() for name, value in own.weights()}
    norms = []
    for bad in (math.inf, math.nan):
        norms.append(cases.accumulate(own, 1, bad if world.rank == world.size - 1 else 1.0)[1])
    same = all(torch.equal(value, before[name]) for name, value in own.weights())
    return {"finite": [math.isfinite(norm) for norm in norms], "same": same}


def full_disk(world: World, out: Path, case: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint for which the last process has no room, and one for which it has."""
    own = cases.engine(case["network"], case["stage"], world)
    cases.step(own, 0)
    place, later = out / f"{case['id']}-disk", out / f"{case['id']}-later"
    if world.lead:
        place.mkdir()
        later.mkdir()
        for stem in ("model", "optimizer"):
            (place / file_name(stem, world.size - 1, world.size)).symlink_to("/dev/full")
    world.barrier()
    try:
        own.write(place)
        error = None
    except OSError as raised:
        error = type(raised).__name__
    own.write(later)
    return {"error": error, "later": (later / file_name("model", world.rank, world.size)).stat().st_size > 1000}


def load(world: World, out: Path, case: dict[str, Any]) -> dict[str, Any]:
    """A saved model into shards: resident memory on the way and after it; its weights, if it is small, into a file."""
    pretrained = from_hub(case["directory"], None, False, False, None, "auto")
    settings = EngineConfig(3, False, False, 60.0, {})
    said: list[str] = []
    load_deepspeed(world, 60.0)
    AutoConfig.from_pretrained(case["directory"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _resident("VmRSS")
    model = load_sharded(pretrained, settings, cases.optimizer(), world, not case["rank"], said.append)
    seen = {"peak": _resident("VmHWM") - before, "after": _resident("VmRSS") - before, "said": said}
    if sum(p.ds_numel for p in model.parameters()) > 10**6:
        return seen
    if case["rank"]:
        model = lora(model, rank=case["rank"], alpha=8.0, dropout=0.0, targets="all-linear", seed=3)
    policy = Policy(model, "packed").train()
    own = DeepSpeedEngine(policy, cases.optimizer(), settings, torch.float32, world)
    weights = {name: value.detach().clone() for name, value in own.weights()}
    if world.lead:
        save_file(weights, out / f"{case['id']}.safetensors")
    return seen | {"steps": [cases.step(own, 0)]}


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def die(world: World, out: Path, case: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """The last process is killed between two steps."""
    own = cases.engine(case["network"], case["stage"], world)
    cases.step(own, 0)
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    cases.step(own, 1)
    return {}


CHECKS = {f.__name__: f for f in (train, resume, take_over, non_finite, full_disk, load, die)}


def main(plan: Path, out: Path) -> None:
    """Run the plan; an error is written down and ends it."""
    torch.set_num_threads(1)
    world = join(60.0)
    seen: dict[str, Any] = {}
    target = out / f"rank{world.rank}.json"
    try:
        for case in json.loads(plan.read_text()):
            seen[case["id"]] = CHECKS[case["check"]](world, out, case)
    except BaseException as error:
        seen["error"] = {"type": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
        raise
    finally:
        target.write_text(json.dumps(seen))
        leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
