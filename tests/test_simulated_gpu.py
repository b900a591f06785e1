"""align on a GPU that is pretended: nothing mixes devices, a step is read once and each of its batches crosses once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from align.models.pretrained import byte_tokenizer
from tests.conftest import tiny_model
from tests.trainers import online_runs

pytestmark = pytest.mark.xdist_group("simulated_gpu")


@dataclass(frozen=True)
class Seen:
    """What one run did."""

    said: str
    mixed: list[list[Any]]
    reads: Counter[str]  # by phase
    copies: Counter[str]
    where: dict[str, list[list[Any]]]
    batches: int  # of steps


class Gpu:
    """A process on the pretended device."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.simulated_gpu.run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip

    def run(self, *words: str, code: int = 0) -> Seen:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(words), file=self.process.stdin, flush=True)
        found = json.loads(self.process.stdout.readline())
        assert found["code"] == code, found["said"]
        by_phase = {name: Counter() for name in ("reads", "copies")}
        for name, counter in by_phase.items():
            for phase, _, _, number in found[name]:
                counter[phase] += number
        batches = sum(n for phase, name, n in found["operations"] if (phase, name) == ("step", "to_device"))
        return Seen(found["said"], found["mixed"], **by_phase, where=found, batches=batches)


@pytest.fixture(scope="session")
def gpu() -> Iterator[Gpu]:
    own = Gpu()
    yield own
    assert own.process.stdin is not None
    own.process.stdin.close()
    own.process.wait(60)


def words_of(directory: Path, *more: str) -> list[str]:
    rows = [
        {"prompt": f"question {i} {'x' * i}", "chosen": "good one " * (i % 3 + 1), "rejected": "bad " * (i % 4 + 1)}
        for i in range(8)
    ]
    train = directory / "pairs.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {
        "model": "tiny", "model.hidden_size": 32, "model.num_layers": 1, "data.train": train, "data.text": "plain",
        "trainer.max_steps": 2, "trainer.batch_size": 4, "trainer.micro_batch_tokens": 150, "trainer.num_samples": 0,
        "trainer.eval_every": 1, "run.dir": directory / "run", "log.tensorboard": "false",
    } | dict(word.split("=", 1) for word in more)  # fmt: skip
    return ["train", *(f"{key}={value}" for key, value in words.items() if value != "")]


def assert_ahead(seen: Seen) -> None:
    """The host never waits inside a step, and each micro-batch of it is one copy that it does not wait for."""
    assert seen.mixed == []
    assert seen.reads["step"] == 0, [row for row in seen.where["reads"] if row[0] == "step"]
    assert seen.batches > 0
    copies = [row for row in seen.where["copies"] if row[0] == "step"]
    assert seen.copies["step"] <= seen.batches, copies
    assert {kind for _, kind, _, _ in copies} <= {"pinned"}, copies


OFFLINE = [
    ("recipe=wpo", "lora.rank=0"),
    ("recipe=wpo", "lora.rank=4", "trainer.precision=float32"),
    ("recipe=dpo", "trainer.layout=packed"),
    ("recipe=dpo", "reference.mode=model", "trainer.activation_checkpointing=full"),
    ("recipe=dpo", "trainer.activation_checkpointing=selective", "lora.rank=0"),
    ("recipe=kto",),
    ("recipe=aot",),
    ("recipe=orpo",),
    ("recipe=simpo",),
    ("recipe=rpo",),
    ("recipe=sft",),
    ("recipe=reward_model",),
    ("recipe=gpm",),
]


def test_padded_rows_wait_for_what_transformers_asks_alone(gpu, tmp_path):
    """Its masks look on the device for signs of packed rows, once a forward; the rest is as ever."""
    seen = gpu.run(*words_of(tmp_path, "recipe=dpo", "trainer.layout=padded"))
    assert seen.mixed == []
    assert {row[2].partition(":")[0] for row in seen.where["reads"] if row[0] == "step"} == {"align/models/policy.py"}
    assert seen.copies["step"] == seen.batches


@pytest.mark.parametrize("words", OFFLINE, ids=" ".join)
def test_an_offline_step_never_waits_for_the_device(gpu, tmp_path, words):
    assert_ahead(gpu.run(*words_of(tmp_path, *words)))


def online_words(directory: Path, *more: str) -> list[str]:
    words = online_runs.words_of(
        directory, "trainer.max_steps=2", "trainer.precision=bfloat16", f"run.dir={directory / 'run'}", *more
    )
    return ["train", *words]


@pytest.mark.parametrize("name", online_runs.FAMILY)
def test_an_online_step_never_waits_for_the_device(gpu, tmp_path, name):
    words = dict(word.split("=", 1) for word in online_runs.FAMILY[name])
    words.pop("trainer.epochs", None)
    words["trainer.max_steps"] = "2"
    assert_ahead(gpu.run(*online_words(tmp_path, *(f"{k}={v}" for k, v in words.items()))))


def saved(family: str, directory: Path, **more: Any) -> Path:
    """A random model of a transformers class with the byte tokenizer, as a directory."""
    tokenizer = byte_tokenizer()
    model = tiny_model(family, torch.float32, vocab_size=len(tokenizer), **more)
    model.save_pretrained(directory / family)
    tokenizer.save_pretrained(directory / family)
    return directory / family


MLA = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "initializer_range": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("rank", [0, 2])
def test_heads_of_two_sizes_and_experts_are_what_the_kernels_take(gpu, tmp_path, rank):
    """Multi-head latent attention has wider queries than values; grouped products know nothing of autocast."""
    model = saved("deepseek_v3", tmp_path, **MLA)
    words = words_of(tmp_path, "recipe=wpo", "model=hub", f"model.path={model}", f"lora.rank={rank}",
                     "model.hidden_size=", "model.num_layers=")  # fmt: skip
    seen = gpu.run(*words)
    assert_ahead(seen)
    in_steps = {name for phase, name, _ in seen.where["operations"] if phase == "step"}
    assert any("varlen" in name for name in in_steps)
    assert {name for name in in_steps if "grouped_mm" in name} == {"_grouped_mm bfloat16"}


def test_a_resumed_run_is_the_whole_one(gpu, tmp_path):
    losses = []
    for name, stops in (("straight", [4]), ("resumed", [2, 4])):
        for steps in stops:
            run = tmp_path / name
            gpu.run(*words_of(tmp_path, "recipe=wpo", f"run.dir={run}", f"trainer.max_steps={steps}",
                              "trainer.schedule_steps=4"))  # fmt: skip
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([(row["loss/total"], row["optimizer/gradient_norm"]) for row in rows if "loss/total" in row])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
