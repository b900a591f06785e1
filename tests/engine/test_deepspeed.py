"""DeepSpeedEngine in two real processes: the numbers of one process, checkpoints that outlive sizes and stages."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.engine.files import TensorFiles, saved_files
from align.engine.world import World
from align.models.policy import lora
from tests.conftest import tiny_model
from tests.engine import cases
from tests.engine.worker import STEPS

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("engine")]

ROOT = Path(__file__).parents[2]
OFFLOADS = [(1, "o"), (2, "o"), (3, "o"), (3, "op")]
EQUAL = [(name, stage, "") for stage in range(4) for name in ("tied", "adapters", "scorer")]
EQUAL += [("untied", 2, ""), ("untied", 3, ""), ("recomputed", 3, ""), ("valued", 1, ""), ("valued", 3, "")]
EQUAL += [("tied", stage, offload) for stage, offload in OFFLOADS]
RESUMED = [("tied", 0), ("dropout", 1), ("valued", 2), ("dropout", 3)]
NON_FINITE = [(0, ""), (1, ""), (2, ""), (2, "o"), (3, ""), (3, "op")]
# how a model was saved, LoRA's rank
LOADED = [("one file", 0), ("one file", 4), ("index", 0)]
# (network, stage and size of the writer, stage and size of the reader); stage None: LocalEngine
MOVES = [
    ("valued", 2, 2, 1, 2),
    ("valued", 2, 2, 3, 1),
    ("valued", 2, 2, None, 1),
    ("dropout", 3, 2, 1, 2),
    ("tied", 0, 2, 3, 2),
    ("tied", 0, 2, 2, 1),
    ("tied", None, 1, 0, 2),
    ("tied", None, 1, 1, 2),
    ("tied", None, 1, 2, 2),
    ("tied", None, 1, 3, 2),
    ("tied", None, 1, 3, 1),
]


def start(plan: list[dict[str, Any]], out: Path, size: int, **more: str) -> list[subprocess.Popen[str]]:
    """The processes of a plan, told where they meet."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(plan))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"} | more
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    started = []
    for rank in range(size):
        own = dict(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.engine.worker", str(out / "plan.json"), str(out)],
                cwd=ROOT,
                env=env | (own | {"MASTER_PORT": str(port)} if size > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(started: list[subprocess.Popen[str]], out: Path, seconds: float = 400) -> list[dict[str, Any] | None]:
    """What each process saw; None from one that was killed."""
    end = time.monotonic() + seconds
    try:
        for process in started:
            process.said = process.communicate(timeout=max(1.0, end - time.monotonic()))[0]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
    found = []
    for rank in range(len(started)):
        path = out / f"rank{rank}.json"
        found.append(json.loads(path.read_text()) if path.exists() else None)
    return found


def run(plan: list[dict[str, Any]], out: Path, size: int) -> list[dict[str, Any]]:
    """What each process saw, none of which may fail."""
    started = start(plan, out, size)
    found = finish(started, out)
    for process in started:
        assert process.returncode == 0, process.said[-3000:]
    return found


def equal_id(name: str, stage: int, offload: str) -> str:
    return f"{name}{stage}{offload}"


def resumed_id(name: str, stage: int | None, size: int) -> str:
    return f"resumed-{name}-{stage}-{size}"


def moved_id(move: tuple) -> str:
    return "moved-" + "-".join(map(str, move))


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, Any]:
    """One process with LocalEngine: steps and weights of each network, and a checkpoint after two steps of one."""
    out: dict[str, Any] = {}
    for name in {name for name, _, _ in EQUAL} | {"narrow_base"}:
        own = cases.engine(name, None, World())
        steps = [cases.step(own, number) for number in range(STEPS)]
        out[name] = steps, {key: value.clone() for key, value in own.weights()}
    own = cases.engine("tied", None, World())
    for number in range(2):
        cases.step(own, number)
    for name, tied, size in (("one file", True, "1GB"), ("index", False, "30KB")):
        out[name] = tmp_path_factory.mktemp("saved")
        model = tiny_model("llama", torch.float32, tie_word_embeddings=tied)
        model.save_pretrained(out[name], max_shard_size=size)
    out["checkpoint"] = tmp_path_factory.mktemp("local")
    own.write(out["checkpoint"])
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory, local) -> tuple[Path, list[dict[str, Any]]]:
    """Everything that two processes do, in one start of them."""
    plan: list[dict[str, Any]] = [
        dict(id=equal_id(*c), check="train", network=c[0], stage=c[1], offload=c[2]) for c in EQUAL
    ]
    plan += [dict(id="small-buckets", check="train", network="tied", stage=3, small=True)]
    plan += [dict(id=f"bfloat16-{s}", check="train", network="tied", stage=s, precision="bfloat16") for s in (0, 3)]
    plan += [dict(id="narrow_base", check="train", network="narrow_base", stage=3)]
    plan += [dict(id=resumed_id(n, s, 2), check="resume", network=n, stage=s) for n, s in RESUMED]
    plan += [dict(id=f"bad{s}{o}", check="non_finite", network="tied", stage=s, offload=o) for s, o in NON_FINITE]
    plan += [dict(id="full", check="full_disk", network="tied", stage=3)]
    plan += [dict(id=f"load-{name}-{r}", check="load", directory=str(local[name]), rank=r) for name, r in LOADED]
    for move in MOVES:
        if move[4] == 2:
            plan.append(take_over_of(move, local["checkpoint"]))
    out = tmp_path_factory.mktemp("two")
    return out, run(plan, out, 2)


def take_over_of(move: tuple, checkpoint: Path, base: Path | None = None) -> dict[str, Any]:
    name, wrote, size, stage, _ = move
    source = str(checkpoint) if wrote is None else f"{resumed_id(name, wrote, size)}-two"
    if base is not None and wrote is not None:
        source = str(base / source)
    return dict(id=moved_id(move), check="take_over", network=name, stage=stage, **{"from": source})


@pytest.fixture(scope="module")
def one(tmp_path_factory, local, two) -> tuple[Path, list[dict[str, Any]]]:
    """DeepSpeed in one process, which finds no launcher."""
    plan = [dict(id=f"one{stage}", check="train", network="tied", stage=stage) for stage in (0, 2, 3)]
    for move in MOVES:
        if move[4] == 1 and move[3] is not None:
            plan.append(take_over_of(move, local["checkpoint"], two[0]))
    out = tmp_path_factory.mktemp("one")
    return out, run(plan, out, 1)


def same_steps(found: list[list[float]], expected: list[tuple[float, float]], tolerance: float = 1e-5) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance, abs=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance, abs=tolerance)


def same_weights(path: Path, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name, stage, offload", EQUAL)
def test_numbers_of_one_process(two, local, name, stage, offload):
    """Weights to a hundredth of a step: AdamW divides by the gradient's own size, rounding noise included."""
    out, ranks = two
    steps, weights = local[name]
    case = equal_id(name, stage, offload)
    assert ranks[0][case]["steps"] == ranks[1][case]["steps"]
    same_steps(ranks[0][case]["steps"], steps)
    assert ranks[0][case]["names"] == list(weights)
    same_weights(out / f"{case}.safetensors", weights, cases.LR / 100)


def test_small_buckets_change_nothing(two, local):
    """Several sub-groups of shards, no weight kept whole."""
    same_steps(two[1][0]["small-buckets"]["steps"], local["tied"][0])
    same_weights(two[0] / "small-buckets.safetensors", local["tied"][1], cases.LR / 100)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_in_one_process(one, local, stage):
    same_steps(one[1][0][f"one{stage}"]["steps"], local["tied"][0])
    same_weights(one[0] / f"one{stage}.safetensors", local["tied"][1], cases.LR / 100)


def test_bfloat16_is_of_products_not_of_weights(two):
    """Both stages round the same products: stage 3 as stage 0 to what the order of sums leaves of them."""
    first, third = (two[1][0][f"bfloat16-{stage}"]["steps"] for stage in (0, 3))
    exact = two[1][0][equal_id("tied", 3, "")]["steps"]
    assert first[0] == pytest.approx(third[0], rel=1e-3)
    assert first[0] != pytest.approx(exact[0], rel=1e-4)
    assert first[0] == pytest.approx(exact[0], rel=0.1)
    assert all(value.dtype == torch.float32 for value in load_file(two[0] / "bfloat16-3.safetensors").values())


def test_base_in_bfloat16_stays_as_it_is(two, local):
    found, expected = load_file(two[0] / "narrow_base.safetensors"), local["narrow_base"][1]
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        if "lora_" not in name:
            assert torch.equal(found[name], value)
    assert two[1][0]["narrow_base"]["steps"][0] == pytest.approx(local["narrow_base"][0][0], rel=1e-3)


@pytest.mark.parametrize("name, stage", RESUMED)
def test_resume_is_bit_equal(two, name, stage):
    out, ranks = two
    case = resumed_id(name, stage, 2)
    for rank in ranks:
        first, again = rank[case]["steps"]
        assert first == again
    for stem in ("model", "optimizer"):
        straight, resumed = (TensorFiles(saved_files(out / f"{case}-{part}", stem)) for part in ("three", "again"))
        assert sorted(straight.names()) == sorted(resumed.names())
        for key in straight.names():
            assert torch.equal(straight.read(key), resumed.read(key)), key
    before, after = (TensorFiles(saved_files(out / f"{case}-{part}", "model")) for part in ("two", "again"))
    assert any(not torch.equal(before.read(key), after.read(key)) for key in before.names())


def test_files_are_dealt_and_named_as_those_of_one_process(two, local):
    case = two[0] / f"{resumed_id('tied', 0, 2)}-two"
    assert sorted(p.name for p in case.iterdir()) == [
        f"{stem}-0000{i}-of-00002.safetensors" for stem in ("model", "optimizer") for i in (1, 2)
    ]
    sizes = [p.stat().st_size for p in sorted(case.glob("model-*"))]
    assert max(sizes) < 1.3 * min(sizes)
    for stem, more in (("model", set()), ("optimizer", {"rng|cpu|0", "rng|cpu|1"})):
        ours = set(TensorFiles(saved_files(case, stem)).names())
        theirs = set(load_file(local["checkpoint"] / f"{stem}.safetensors")) - {"rng|cpu"}
        assert ours == theirs | more
        for path in case.glob(f"{stem}-*"):  # safetensors' own reader takes them
            assert all(value.dtype in (torch.float32, torch.uint8) for value in load_file(path).values())


@pytest.mark.parametrize("move", MOVES, ids=moved_id)
def test_going_on_with_another_size_or_stage(two, one, local, move):
    name, wrote, _, stage, size = move
    if stage is None:
        own = cases.engine(name, None, World())
        own.read(two[0] / f"{resumed_id(name, wrote, 2)}-two")
        steps, weights = [cases.step(own, 2)], dict(own.weights())
    else:
        out, ranks = (two, one)[size == 1]
        steps, weights = ranks[0][moved_id(move)]["steps"], load_file(out / f"{moved_id(move)}.safetensors")
    if wrote is None:
        expected, after = local["tied"][0][2], local["tied"][1]
    else:
        case = resumed_id(name, wrote, 2)
        expected = two[1][0][case]["steps"][0]
        files = TensorFiles(saved_files(two[0] / f"{case}-three", "model"))
        after = {key: files.read(key) for key in files.names()}
    same_steps(steps, [expected], 1e-6 if wrote is not None else 1e-5)
    for key, value in after.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-6 if wrote is not None else 2e-5, atol=2e-5, msg=key)


def test_generators_are_seeded_anew_for_another_size(two, one):
    """Of seed, step and rank alone: processes differ from each other, and not from run to run."""
    grown = moved_id(("tied", None, 1, 2, 2))
    draws = [rank[grown]["draw"] for rank in two[1]]
    assert draws[0] != draws[1]
    assert draws == [rank[moved_id(("tied", None, 1, 3, 2))]["draw"] for rank in two[1]]
    shrunk = one[1][0][moved_id(("tied", 0, 2, 2, 1))]["draw"]
    assert shrunk == draws[0]  # of the same step, by rank 0


@pytest.mark.parametrize("stage, offload", NON_FINITE)
def test_non_finite_gradient_of_one_process_is_told_to_all(two, stage, offload):
    for rank in two[1]:
        assert rank[f"bad{stage}{offload}"] == {"finite": [False, False], "same": True}


def test_full_disk_of_one_process_leaves_no_other_waiting(two):
    """Writing to /dev/full, and a whole checkpoint elsewhere afterwards."""
    assert [rank["full"]["error"] for rank in two[1]] == [None, "OSError"]
    assert all(rank["full"]["later"] for rank in two[1])


def test_checkpoint_of_another_model_is_refused(two):
    source = two[0] / f"{resumed_id('dropout', 3, 2)}-two"
    own = cases.engine("tied", None, World())
    before = {key: value.clone() for key, value in own.weights()}
    with pytest.raises(ValueError, match="another model"):
        own.read(source)
    assert all(torch.equal(value, before[key]) for key, value in own.weights())


@pytest.mark.parametrize("stage", [1, 3])
def test_survivor_of_a_killed_process_ends(tmp_path, stage):
    started = start([dict(id="dead", check="die", network="tied", stage=stage)], tmp_path, 2)
    found = finish(started, tmp_path, 120)
    assert started[1].returncode == -9
    assert started[0].returncode == 1
    assert found[0]["error"]["type"] == "PeerLost"
    assert "another process of the run died" in found[0]["error"]["text"]


@pytest.mark.parametrize("name, rank", LOADED)
def test_loading_into_shards(two, local, name, rank):
    """What from_pretrained gives, with LoRA's start of the same seed; and it trains."""
    from transformers import AutoModelForCausalLM

    case = f"load-{name}-{rank}"
    model = AutoModelForCausalLM.from_pretrained(local[name])
    if rank:
        model = lora(model, rank=rank, alpha=8.0, dropout=0.0, targets="all-linear", seed=3)
    expected = {f"model.{key}": value for key, value in model.state_dict().items()}
    found = load_file(two[0] / f"{case}.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    for seen in two[1]:
        assert seen[case]["said"] == []


@pytest.mark.slow
def test_no_process_holds_the_whole_model(tmp_path, monkeypatch):
    """320 MB over two processes: a shard of each, and the largest weight (12 MB) once or twice while it is read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # what is let go goes back at once: else the allocator's habits are measured
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    config = LlamaConfig(
        vocab_size=2000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=7, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    del model
    found = run([dict(id="load", check="load", directory=str(tmp_path / "model"), rank=0)], tmp_path / "out", 2)
    assert size > 300 * 2**20
    for seen in found:
        assert seen["load"]["peak"] < 0.75 * size
        assert 0.45 * size < seen["load"]["after"] < 0.7 * size
