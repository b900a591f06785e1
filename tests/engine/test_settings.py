"""Engine settings: which of DeepSpeed's are taken, and what offloading is refused for."""

from __future__ import annotations

import pytest

from align.config import ConfigError, compose
from align.engine import settings
from align.engine.settings import offload_bytes, offload_problem

GIB = 1 << 30


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose(["data.train=x.jsonl", *words])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "words, told",
    [
        (["engine=zero3", "engine.deepspeed.zero_optimization.reduce_bucket_siz=1e8"], "reduce_bucket_size?"),
        (["engine=zero2", "engine.deepspeed.reduce_bucket_size=1e8"], "zero_optimization.reduce_bucket_size?"),
        (["engine=zero2", "engine.deepspeed.wal_clock_breakdown=true"], "engine.deepspeed.wall_clock_breakdown?"),
        (["engine=zero3", "engine.deepspeed.zero_optimization.stage=1"], "use engine=zero0 to engine=zero3"),
        (["engine=zero3", "engine.deepspeed.zero_optimization.offload_param.device=cpu"], "engine.offload_parameters"),
        (["engine=zero2", "engine.deepspeed.gradient_clipping=1"], "use optimizer.max_grad_norm"),
        (["engine=zero2", "engine.deepspeed.bf16.enabled=true"], "use trainer.precision"),
        (["engine=zero2", "engine.deepspeed.zero_optimization=3"], "must hold settings"),
        (["engine=zero2", "engine.deepspeed.nothing_like_it=3"], "is not a setting"),
        (["engine.deepspeed.wall_clock_breakdown=true"], "has no effect with engine=local"),
        (["engine.offload_optimizer=true"], "use engine=zero2"),
        (["engine=zero0", "engine.offload_optimizer=true"], "needs ZeRO stage 1, 2 or 3"),
        (["engine=zero2", "engine.offload_parameters=true"], "needs engine=zero3"),
        (["engine=zero2", "engine.timeout_s=0"], "must be greater than 0"),
        (["engine.stage=4"], "must be at least 0 and at most 3"),
    ],
)
def test_refused(words, told):
    assert told in refusal(*words)


def test_extra_settings_are_kept():
    word = "engine.deepspeed.zero_optimization.reduce_bucket_size=100000"
    found = compose(["data.train=x.jsonl", "engine=zero2", word]).engine
    assert (found.stage, found.deepspeed) == (2, {"zero_optimization": {"reduce_bucket_size": 100000}})


def test_names_are_deepspeeds_own(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    ours = {name.partition(".")[2] for name in settings._OURS if name.startswith("zero_optimization.")}
    assert set(settings._FREE_ZERO) | ours <= theirs
    assert not set(settings._FREE_ZERO) & ours
    words = {value for value in vars(constants).values() if isinstance(value, str)}
    elsewhere = {"comms_logger", "flops_profiler", "zero_optimization", "tensorboard", "wandb", "csv_monitor"}
    elsewhere |= {"checkpoint", "activation_checkpointing", "amp", "bf16", "data_types", "fp16", "torch_autocast"}
    top = {name for name in (*settings._FREE, *settings._OURS) if "." not in name}
    assert top - elsewhere <= words


def test_offloading_by_hand():
    # 8e9 weights trained over 16 processes, 8 of them here: half of 20 bytes each, and half of the 4-byte weights
    assert offload_bytes(3, True, True, 8 * 10**9, 8 * 10**9, 16, 8) == 96 * 10**9
    assert offload_bytes(3, False, True, 8 * 10**9, 0, 16, 8) == 16 * 10**9
    assert offload_bytes(2, True, False, 10**9, 10**6, 4, 4) == 24 * 10**6
    assert offload_bytes(1, True, False, 10**9, 10**9, 1, 1) == 24 * 10**9


def test_offloading_without_memory_is_refused():
    assert offload_problem(9 * GIB, 10 * GIB) == ""
    told = offload_problem(10 * GIB, 10 * GIB)
    assert "estimated 10.0 GiB" in told
    assert "10.0 GiB are free" in told
    assert "\n" not in told
