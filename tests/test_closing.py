"""Whatever is closed may be closed again: a run closes parts where it is done with them, and all of them at its end.

Of parts that need an engine: tests/rollout/test_vllm_client.py and test_server_client.py.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from align.config import LogConfig, shipped_root
from align.engine.files import TensorWriter
from align.engine.world import World
from align.models.policy import Policy, lora
from align.models.pretrained import byte_tokenizer, tiny
from align.report.log import Log
from align.rewards.base import Component, Conversation
from align.rewards.build import RewardHost, Rewards, components
from align.rollout.base import Host
from align.rollout.hf import HFRollout
from align.rollout.transfer import Scratch
from align.trainers.generation import LeadRollout
from tests.killer import shared
from tests.rewards import test_ensemble as ensembles
from tests.rewards import test_process as processes
from tests.rewards.test_model import lm, saved
from tests.test_rundir import open_run
from tests.trainers.online_runs import REMAX, ready, words_of

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("option", ["model", "ensemble"])
def test_an_online_run_on_reward_models_ends_well(tmp_path, option):
    paths = [saved(tmp_path / str(number)) for number in range(2)]
    named = {"model": f"path={paths[0]}", "ensemble": f"members=[{','.join(paths)}]"}[option]
    words = words_of(tmp_path, f"run.dir={tmp_path / 'run'}", "recipe=grpo", f"reward={option}",
                     f"reward.preference.{named}", "trainer.max_steps=1", "trainer.num_samples=0")  # fmt: skip
    ended = shared().run(["train", *words])
    assert ended.code == 0, ended.said
    assert (tmp_path / "run" / "summary.json").is_file()


# ---------------------------------------------------------------------- every part


def policy() -> Policy:
    return Policy(lora(lm(), rank=2, alpha=4.0, dropout=0.0, targets="all-linear", seed=0), "padded")


def component(option: str, host: RewardHost | None = None, **keys: Any) -> Any:
    """The part of an option of configs/reward."""
    node = OmegaConf.load(shipped_root() / "configs" / "reward" / f"{option}.yaml")
    ((name, settings),) = OmegaConf.to_container(node).items()  # type: ignore[union-attr]
    return components({str(name): settings | keys}, host or RewardHost(tokenizer=TOKENIZER))._parts[name]


def base(at: Path) -> str:
    lm().save_pretrained(at / "base")
    TOKENIZER.save_pretrained(at / "base")
    return str(at / "base")


def adapter(at: Path, network: Policy) -> Any:
    (path,) = ensembles.adapters(at, base(at), 1)
    return component("adapter", RewardHost(network, TOKENIZER), path=path)


def hf(at: Path) -> HFRollout:
    return HFRollout(Host(Policy(tiny(0, 16, 1).model(), "shared"), TOKENIZER, at, "float32"), batch_size=1)


def judge(at: Path) -> Any:
    return component("judge_model", path=base(at), max_new_tokens=8, max_tokens=256)


MODELS: dict[str, Callable[[Path], Any]] = {
    "model": lambda at: component("model", path=saved(at)),
    "ensemble of models": lambda at: component("ensemble", members=ensembles.whole(at, 2)),
    "ensemble of adapters": lambda at: component("ensemble", members=ensembles.adapters(at, base(at), 2)),
    "ensemble of heads": lambda at: component("ensemble", members=ensembles.heads(at, 2), base=base(at)),
    "process": lambda at: component("process", path=processes.saved(at)),
    "judge of a model": judge,
}
OTHERS: dict[str, Callable[[Path], Any]] = {
    "adapter": lambda at: adapter(at, policy()),
    "function": lambda _: component("finished"),
    "function of steps": lambda _: component("steps", function="tests.rewards.step_functions.known"),
    "server": lambda _: component("remote", url="http://127.0.0.1:1/score"),
    "judge": lambda _: component("judge", url="http://127.0.0.1:1/v1", model="wise"),
    "rollout": hf,
    "rollout of several": lambda at: LeadRollout(hf(at), World()),
    "scratch": lambda at: Scratch(at, 1),
    "tensors": lambda at: TensorWriter(at / "empty", {}),
    "log": lambda at: Log(at, LogConfig(1, True, "off", "align"), {}),
    "run directory": open_run,
    "online run": lambda at: ready(at, *REMAX),
}


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_a_part_may_be_closed_twice(tmp_path, name):
    part = (MODELS | OTHERS)[name](tmp_path)
    part.close()
    part.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_closed_part_gives_up_its_model(tmp_path, name):
    earlier = {id(found) for found in gc.get_objects() if isinstance(found, torch.nn.Module)}
    part = MODELS[name](tmp_path)
    networks = [weakref.ref(o) for o in gc.get_objects() if isinstance(o, torch.nn.Module) and id(o) not in earlier]
    assert networks
    part.close()
    gc.collect()
    assert [network() for network in networks if network() is not None] == []
    assert not any(part.counts.values())  # which are read until the run's last line


# ---------------------------------------------------------------------- what came afterwards is left alone


def test_the_adapter_that_has_got_the_name_since_stays(tmp_path):
    network = policy()
    (path,) = ensembles.adapters(tmp_path, base(tmp_path), 1)
    first, second = (RewardHost(network, TOKENIZER) for _ in range(2))
    gone = component("adapter", first, path=path)
    gone.close()
    there = component("adapter", second, path=path)
    assert there.adapter == gone.adapter
    before = there([Conversation("Why?", "Because.", True)])
    gone.close()
    assert there([Conversation("Why?", "Because.", True)]) == before


def test_a_tracker_is_finished_once(tmp_path):
    log, finished = Log(tmp_path, LogConfig(1, False, "off", "align"), {}), []
    log.mirrors.append(("tracker", lambda row: None, lambda: finished.append(1)))
    log.close()
    log.close()
    assert finished == [1]


class Fragile(Component):
    """A reward of a user's, in the trainer's process, whose close fails."""

    in_process = True

    def __init__(self, name: str, said: list[str]):
        self.name, self.said = name, said
        self.counts: dict[str, int] = {}

    def close(self) -> None:
        self.said.append(self.name)
        raise RuntimeError(f"{self.name} cannot be closed")


def test_rewards_close_each_part_once_whatever_the_others_do():
    said: list[str] = []
    rewards = Rewards({name: Fragile(name, said) for name in ("a", "b")}, [1.0, 1.0])  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match="cannot be closed"):
        rewards.close()
    rewards.close()
    assert sorted(said) == ["a", "b"]
