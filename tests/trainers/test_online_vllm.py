"""The online loop with a real vLLM engine on a CPU: repeated, killed, with an engine that dies, deaf or hoarding."""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
from pathlib import Path

import pytest

from align.cli import main
from tests.killer import Ended, Hook, leftovers, shared
from tests.trainers.online_runs import left, rows_of, words_of
from tests.trainers.vllm_rollouts import engines_of
from tests.variants import variant

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("online_vllm")]

ROLLOUTS = "tests.trainers.vllm_rollouts"
WATCHED = f"{ROLLOUTS}:Watched."
VLLM = "align.rollout.vllm:VLLMRollout."
STEP = "align.engine.local:LocalEngine.step"
END_SECONDS = 30  # in which an engine ends whose trainer was killed
TOLERANCE = 1e-4  # nats; float32 on both sides, differences measured below 2e-6
COUNTERS = ("rollout/restarts", "rollout/resent")

ALGORITHM = ("objective=policy_gradient", "advantage=remax", "trainer.kl_in_reward=0.05")
KINDS = {"full": ("lora.rank=0",), "lora": ("lora.rank=4",)}


def words(base: Path, run: Path, *more: str) -> list[str]:
    """Words of a run of 4 steps; heads of 32, the smallest that vLLM computes on a CPU."""
    if not (base / "prompts.jsonl").exists():
        # one that is longer than a block of the engine's cache (128 tokens on a CPU), at every other step
        texts = [f"{i} {'ab' * (i % 4)}" for i in range(7)] + ["long " * 32]
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
        (base / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (base / "heldout.jsonl").write_text('{"prompt": "what now?"}\n{"prompt": "and then"}\n')
    settings = words_of(
        base, f"run.dir={run}", "model.hidden_size=128", "trainer.max_steps=4", "trainer.micro_batch_tokens=1024",
        *variant("rollout", "vllm", f"{ROLLOUTS}.Watched"), "rollout.max_model_len=512",
        "rollout.cpu_kv_cache_gib=0.25", "rollout.threads=1", *ALGORITHM, *more,
    )  # fmt: skip
    return ["train", *settings]


def engines_ended(run: Path) -> bool:
    """Whether all engines of a run end within END_SECONDS."""
    for pid in engines_of(run):
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([process], [], [], END_SECONDS)[0]:
                return False
        finally:
            os.close(process)
    return True


def files_of(run: Path) -> list[str]:
    """What a run leaves of its rollout, but for what Watched wrote."""
    return sorted(p.name for p in (run / "rollout").iterdir() if p.name not in ("engines", "scratch"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def straight(base):
    """A function: kind -> the directory of the run that nothing happens to."""
    done: dict[str, Path] = {}

    def run_of(kind: str) -> Path:
        if kind not in done:
            run = base / f"straight-{kind}"
            ended = shared().run(words(base, run, *KINDS[kind]))
            assert ended.code == 0, ended.said
            done[kind] = run
        return done[kind]

    return run_of


@pytest.mark.parametrize("kind", KINDS)
def test_engine_and_trainer_agree_at_each_step(straight, kind):
    run = straight(kind)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["rollout/engine_logp_diff_max"] < TOLERANCE for row in rows)
    assert all(row["rollout/logp_diff_mean"] < TOLERANCE for row in rows)  # of what was drawn
    assert all(row["optimizer/gradient_norm"] > 0 for row in rows)
    assert [row["rollout/syncs"] for row in rows] == [1, 2, 3, 4]
    assert {row[name] for row in rows for name in COUNTERS} == {0}
    assert len(engines_of(run)) == 1
    assert engines_ended(run)
    assert leftovers(run) == []
    assert files_of(run) == ["engine.log"]
    if kind == "full":
        assert not Path((run / "rollout" / "scratch").read_text()).exists()


# kind -> where the trainer is killed, one after the other; generate: the answers before, steps 1 and 2, the answers
# at 2, step 3. Checkpoints are of steps 2 and 4.
DEATHS = {
    "full": [
        Hook(f"{VLLM}_update", 1),  # weights are written and the engine does not know of them
        Hook(f"{WATCHED}waiting_for_generate", 5),
        Hook(STEP, 2),
    ],
    "lora": [Hook(f"{WATCHED}waiting_for_adapt", 3)],
}


@pytest.mark.parametrize("kind", DEATHS)
def test_killed_trainer_goes_on_as_if_nothing_had_happened(base, straight, tmp_path, kind):
    """Bit for bit, metrics too: the same requests in the same batches, computed by one thread."""
    run = tmp_path / "run"
    command = words(base, run, *KINDS[kind])
    for number, hook in enumerate(DEATHS[kind], start=1):
        killed = shared().run(command, [hook])
        assert killed.code == -9, killed.said
        assert len(engines_of(run)) == number
        assert engines_ended(run)
        if hook.target == f"{VLLM}_update":
            # weights lay there; the next run of anyone, this one's included, removes them
            orphan = Path((run / "rollout" / "scratch").read_text())
    done = shared().run(command)
    assert done.code == 0, done.said
    assert left(run) == left(straight(kind))
    assert engines_ended(run)
    assert files_of(run) == ["engine.log"]
    if kind == "full":
        assert not orphan.exists()


def test_killed_engine_is_replaced_and_the_run_is_the_same(base, straight, tmp_path):
    run = tmp_path / "run"
    done = shared().run(words(base, run, *KINDS["full"], f"rollout._target_={ROLLOUTS}.Mortal"))
    assert done.code == 0, done.said
    assert done.said.count("starting another") == 2
    assert len(engines_of(run)) == 3
    assert engines_ended(run)
    ours, theirs = left(run), left(straight("full"))
    counted = [[row.pop(name) for name in COUNTERS] for row in ours["rows"]]
    for row in theirs["rows"]:
        for name in COUNTERS:
            del row[name]
    # step 2: two completions and a greedy one of each of four prompts; a transfer of weights is no request
    assert counted == [[0, 0], [1, 12], [2, 12], [2, 12]]
    assert ours == theirs


def _stopped(ended: Ended, step: int) -> None:
    assert ended.code == 1, ended.said
    assert "Traceback" not in ended.said
    (line,) = [line for line in ended.said.splitlines() if line.startswith("stopped: ")]
    assert f"step {step}: the engine's log-probs differ from the trainer's" in line
    assert "likely the weights did not reach the engine whole, or it kept what it had computed with older" in line


def test_a_sync_that_does_nothing_stops_the_run(base, tmp_path):
    run = tmp_path / "run"
    _stopped(shared().run(words(base, run, *KINDS["lora"], f"rollout._target_={ROLLOUTS}.Deaf")), 2)
    assert [row["step"] for row in rows_of(run)] == [1]
    assert engines_ended(run)


def test_a_prefix_cache_that_is_not_emptied_stops_the_run(base, tmp_path):
    """With full weights: adapters have numbers of their own, under which the cache holds nothing at first."""
    run = tmp_path / "run"
    _stopped(shared().run(words(base, run, *KINDS["full"], f"rollout._target_={ROLLOUTS}.Hoarding")), 1)
    assert engines_ended(run)


def _refused(ended: Ended, *said: str) -> None:
    assert ended.code == 2, ended.said
    assert "Traceback" not in ended.said
    (line,) = [line for line in ended.said.splitlines() if line.startswith("align: ")]
    assert all(part in line for part in said), line


def test_a_prompt_longer_than_the_engine_takes_is_refused_before_anything_is_drawn(base, tmp_path):
    """The longest of them is among those that engine and trainer are compared on."""
    run = tmp_path / "run"
    refused = shared().run(words(base, run, *KINDS["lora"], "rollout.max_model_len=100"))
    _refused(refused, "rollout.max_model_len")
    assert not (run / "heldout-before.jsonl").exists()


def test_a_release_that_was_not_tested_is_refused(base, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.99.1")
    code = main(words(base, tmp_path / "run", *KINDS["lora"]))
    _refused(Ended(code, "".join(capfd.readouterr()), 0.0), "vLLM 0.99.1", "rollout.allow_untested_version=true")
