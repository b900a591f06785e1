"""Online training as a user meets it: the order of prompts, what it leaves as evidence, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.cli import main
from align.data.prompts import PromptRow
from align.packing import micro_batches
from align.rollout.base import Completion, EngineFailed
from align.rollout.hf import HFRollout
from align.trainers.experience import Group, examples, reward_metrics
from tests.killer import Hook, evidence, shared
from tests.trainers.online_runs import FAMILY, REMAX, REWARDS, left, prompts_file, ready, rows_of, samples_of, words_of

STEP = "align.engine.local:LocalEngine.step"
SHORT = ("trainer.max_steps=2", "trainer.num_samples=0")


def trained(directory, *more, hooks=()):
    """`align train` on the words of an online run; how it ended."""
    return shared().run(["train", *words_of(directory, f"run.dir={directory / 'run'}", *more)], hooks)


def done(directory, *more):
    """The directory of a run that ended well."""
    ended = trained(directory, *more)
    assert ended.code == 0, ended.said
    return directory / "run"


def refused(directory, *more, code=2):
    """What a run says that does not begin or go on."""
    ended = trained(directory, *more)
    assert ended.code == code, ended.said
    assert "Traceback" not in ended.said
    return ended.said


def asked(run, steps):
    """Prompts of each step."""
    return [[line["source"].rpartition(":")[2] for line in samples_of(run, step)] for step in steps]


# ---------------------------------------------------------------------- order


def test_each_prompt_once_an_epoch_and_the_last_step_is_smaller(tmp_path):
    """11 prompts, twice, by 4: 22 = 5 * 4 + 2; a killed run asks the same."""
    words = (*REMAX, "trainer.max_steps=null", "trainer.epochs=2", "trainer.num_samples=0")
    assert trained(tmp_path, *words, hooks=[Hook(STEP, 4)]).code == -9
    run = done(tmp_path, *words)
    steps = asked(run, range(1, 7))
    assert [len(s) for s in steps] == [4, 4, 4, 4, 4, 2]
    flat = sum(steps, [])
    assert sorted(flat[:11]) == sorted(flat[11:]) == sorted(set(flat))
    assert flat[:11] != flat[11:]
    assert [row["data/epoch"] for row in rows_of(run)] == pytest.approx([4 / 11, 8 / 11, 12 / 11, 16 / 11, 20 / 11, 2])


def test_further_draws_go_on_in_the_order_and_into_the_next_pass(tmp_path):
    """As many steps as the epochs have without them, each with prompts enough; never the same prompt twice a pass."""
    run = done(tmp_path, *FAMILY["dynamic"], "trainer.epochs=1")
    rows = rows_of(run)
    assert len(rows) == 3
    flat = sum(asked(run, (1, 2, 3)), [])
    assert len(flat) > 11
    for first in range(0, len(flat), 11):
        part = flat[first : first + 11]
        assert len(set(part)) == len(part)
    assert [row["rollout/drawn_prompts"] for row in rows] == [len(samples_of(run, step)) for step in (1, 2, 3)]
    assert rows[-1]["data/epoch"] == pytest.approx(len(flat) / 11)
    for step, row in enumerate(rows, 1):
        taught = [len({s["score"] for s in line["samples"]}) > 1 for line in samples_of(run, step)]
        assert row["rollout/kept_prompts"] == sum(taught) <= (4, 4, 3)[step - 1]
        assert row["rollout/settled_prompts"] == pytest.approx(1 - np.mean(taught))


def test_repeated_prompts_are_prompts_of_their_own(tmp_path):
    prompts_file(tmp_path / "prompts.jsonl", 3)
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "what now?", "answer": 7}\n')
    run = done(tmp_path, *REMAX, "data.repeat=[2]", "trainer.batch_size=6", "trainer.max_steps=1")
    lines = samples_of(run, 1)
    assert sorted(line["source"].rpartition(":")[2] for line in lines) == ["1", "1", "2", "2", "3", "3"]
    texts = {tuple(s["completion"] for s in line["samples"]) for line in lines}
    assert len(texts) == 6


# ---------------------------------------------------------------------- evidence


@pytest.fixture(scope="module")
def remax(tmp_path_factory) -> Path:
    """A finished run of ReMax."""
    directory = tmp_path_factory.mktemp("remax")
    more = [
        f"reward.mixed._target_={REWARDS}mixed",
        "reward.mixed.weight=2",
        f"reward.answered._target_={REWARDS}answered",
    ]
    return done(directory, *REMAX, *more, "reward.answered.weight=-1")


PARTS = ("generate", "score", "reference", "update", "sync", "other")


def test_metrics(remax):
    for row in rows_of(remax):
        names = {"reward/mixed", "reward/mixed_greedy", "reward/answered", "reward/answered_greedy", "reward/total"}
        names |= {"kl/reference", "rollout/engine_logp_diff_max", "time/step_s", *(f"time/{p}_s" for p in PARTS)}
        assert names <= row.keys()
        assert sum(row[f"time/{part}_s"] for part in PARTS) == pytest.approx(row["time/step_s"], abs=1e-9)
        assert all(row[f"time/{part}_s"] >= 0 for part in PARTS)
        assert row["rollout/engine_logp_diff_max"] < 1e-4
        assert ("heldout/total_greedy" in row) == (row["step"] in (2, 4, 5))


def test_samples_agree_with_the_metrics(remax):
    for row in rows_of(remax):
        lines = samples_of(remax, row["step"])
        assert [line["step"] for line in lines] == [row["step"]] * 4
        every = [s for line in lines for s in line["samples"]]
        assert len(every) == 8
        for name in ("mixed", "answered"):
            assert row[f"reward/{name}"] == pytest.approx(np.mean([s["rewards"][name] for s in every]))
            greedy = [line["greedy"]["rewards"][name] for line in lines]
            assert row[f"reward/{name}_greedy"] == pytest.approx(np.mean(greedy))
        for s in every:
            assert s["score"] == pytest.approx(2 * s["rewards"]["mixed"] - s["rewards"]["answered"])
        assert row["reward/total"] == pytest.approx(np.mean([s["score"] for s in every]))
        assert row["rollout/tokens"] == np.mean([s["tokens"] for s in every])
        assert row["tokens/targets"] == sum(s["tokens"] for s in every)
        differences = [s["score"] - line["greedy"]["score"] for line in lines for s in line["samples"]]
        assert row["advantage/difference_mean"] == pytest.approx(np.mean(differences))


def test_held_out_answers_agree_with_the_summary(remax):
    summary = json.loads((remax / "summary.json").read_text())
    before, after = (
        [json.loads(line) for line in (remax / f"heldout-{phase}.jsonl").read_text().splitlines()]
        for phase in ("before", "after")
    )
    assert [line["step"] for line in before + after] == [0, 0, 5, 5]
    assert [line["prompt"] for line in before] == [line["prompt"] for line in after] == ["what now?", "and then"]
    for name, found in summary["rewards"].items():
        for phase, lines in (("before", before), ("after", after)):
            values = [g["score"] if name == "total" else g["rewards"][name] for g in (line["greedy"] for line in lines)]
            assert found[phase] == pytest.approx(np.mean(values))
    assert summary["rewards"].keys() == {"mixed", "answered", "total"}
    last = rows_of(remax)[-1]
    assert summary["metrics"]["heldout/mixed_greedy"] == last["heldout/mixed_greedy"]
    sampled = [s["rewards"]["mixed"] for line in after for s in line["samples"]]
    assert last["heldout/mixed"] == pytest.approx(np.mean(sampled))
    assert last["heldout/pass@1"] == np.mean([r >= 1 for r in sampled])


def test_metrics_are_those_of_all_that_was_drawn(tmp_path):
    """Prompts that taught nothing and were replaced are the policy's work too: else the reward looks better."""
    run = done(tmp_path, *FAMILY["dynamic"], "trainer.max_steps=3", "trainer.num_samples=0")
    for row in rows_of(run):
        scores = [s["score"] for line in samples_of(run, row["step"]) for s in line["samples"]]
        assert row["reward/coin"] == pytest.approx(np.mean(scores))


# ---------------------------------------------------------------------- a run that goes on


def test_second_command_says_complete_and_more_steps_extend(tmp_path):
    run = done(tmp_path, *REMAX, "trainer.max_steps=3")
    again = trained(tmp_path, *REMAX, "trainer.max_steps=3")
    assert again.code == 0
    assert "complete at step 3" in again.said
    assert "step 1/" not in again.said
    ended = trained(tmp_path, *REMAX, "trainer.max_steps=5")
    assert ended.code == 0, ended.said
    assert "steps after 3 keep the schedule's last learning rate" in ended.said
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5]
    assert json.loads((run / "heldout-after.jsonl").read_text().splitlines()[0])["step"] == 5
    assert "already has 5 steps" in refused(tmp_path, *REMAX, "trainer.max_steps=4")


def test_answers_after_are_of_the_step_the_run_ends_at(tmp_path):
    """A run of 3 steps was to be one of 5, died in step 5 and is ended at 4: step 4 was never evaluated."""
    save = ("trainer.save_every=1", "trainer.eval_every=0")
    run = done(tmp_path, *REMAX, *save, "trainer.max_steps=3")
    assert trained(tmp_path, *REMAX, *save, hooks=[Hook(STEP, 2)]).code == -9
    done(tmp_path, *REMAX, *save, "trainer.max_steps=4")
    assert [json.loads(line)["step"] for line in (run / "heldout-after.jsonl").read_text().splitlines()] == [4, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 4
    assert summary["metrics"]["heldout/total_greedy"] == pytest.approx(summary["rewards"]["mixed"]["after"])
    assert not (run / "samples" / "step-000005.jsonl").exists()


def test_other_prompts_are_refused(tmp_path):
    run = done(tmp_path, *REMAX, *SHORT)
    before = left(run)
    prompts_file(tmp_path / "prompts.jsonl", 12)
    assert "data.train has other rows" in refused(tmp_path, *REMAX, *SHORT)
    assert left(run) == before


def test_a_start_that_failed_leaves_nothing_to_the_next(tmp_path):
    """Died in step 2 with samples of step 1; the next start has other settings, and no samples at all."""
    assert trained(tmp_path, *REMAX, hooks=[Hook(STEP, 2)]).code == -9
    assert (tmp_path / "run" / "samples" / "step-000001.jsonl").exists()
    run = done(tmp_path, *REMAX, *SHORT, "trainer.samples_every=0", "seed=4")
    assert list(run.glob("samples/*")) == list(run.glob("heldout-*")) == []
    assert json.loads((run / "summary.json").read_text())["heldout"] == "0 prompts"


def test_lock_is_released_when_a_part_cannot_be_built(tmp_path, capsys):
    """In one process: first a model that is not there, then one that is."""
    words = words_of(tmp_path, *REMAX, *SHORT, f"run.dir={tmp_path / 'run'}")
    other = [w for w in words if not w.startswith("model")]
    assert main(["train", *other, "model=hub", f"model.path={tmp_path / 'nowhere'}"]) == 2
    assert main(["train", *words]) == 0
    assert "in use" not in capsys.readouterr().err


def test_failures_are_counted_over_resumptions(tmp_path):
    """The run that was stopped in its answers and killed later counts what the other one counts."""
    words = (*FAMILY["remax"], "trainer.eval_every=1")
    other = tmp_path / "other"
    other.mkdir()
    whole = rows_of(done(other, *words))
    assert trained(tmp_path, *words, hooks=[Hook("align.trainers.online.heldout:Heldout.answers", 3, 15)]).code == 85
    assert trained(tmp_path, *words, hooks=[Hook(STEP, 2)]).code == -9
    name = "reward/failed_flaky/raised"
    assert [row.get(name) for row in rows_of(done(tmp_path, *words))] == [row.get(name) for row in whole]
    assert whole[-1][name] > whole[0][name] > 0


# ---------------------------------------------------------------------- rewards that fail


@pytest.mark.parametrize(
    "name,reason",
    [("broken", "raised"), ("never", "none"), ("hanging", "timeout"), ("endless", "inf"), ("short_list", "")],
)
def test_rewards_that_fail_stop_the_run_and_say_how(tmp_path, name, reason):
    """More than a share of the step's completions, 8 and 4 greedy ones, has none."""
    more = [f"reward.bad._target_={REWARDS}{name}", "reward.bad.seconds=0.3", "trainer.max_missing_fraction=0.01"]
    said = refused(tmp_path, *REMAX, *more, "trainer.num_samples=0", "trainer.batch_size=4")
    line = next(line for line in said.splitlines() if "completions have no reward" in line)
    assert "of 12 completions" in line
    assert "trainer.max_missing_fraction=0.01" in line
    assert f"bad/{reason}" in line
    # nobody is bound to the settings of a run without a step
    done(tmp_path, *REMAX, *SHORT)


def test_steps_before_one_without_rewards_are_kept(tmp_path):
    """The rewards of later steps are lost: what was learnt is saved first, and goes on with the same command."""
    words = (*FAMILY["remax"], "trainer.save_every=100", "trainer.num_samples=0")
    whole = tmp_path / "whole"
    whole.mkdir()
    rows = rows_of(done(whole, *words))
    missing = [row["reward/missing"] / 12 for row in rows]
    first = next(i for i, m in enumerate(missing) if i and m > max(missing[:i]))  # the steps before it are below
    limit = f"trainer.max_missing_fraction={max(missing[:first]) + 0.001}"
    said = refused(tmp_path, *words, limit)
    assert f"step {first + 1}:" in said
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{first:06d}"]
    again = refused(tmp_path, *words, limit)
    assert f"resumed {tmp_path / 'run'} at step {first}" in again


@pytest.mark.parametrize("advantage", ["remax", "grpo", "reinforce_pp"])
def test_nothing_has_a_reward_and_that_is_allowed(tmp_path, advantage):
    run = done(
        tmp_path, "objective=policy_gradient", f"advantage={advantage}", f"reward.never._target_={REWARDS}never",
        "trainer.max_missing_fraction=1", "optimizer.weight_decay=0",
    )  # fmt: skip
    for row in rows_of(run):
        assert row["optimizer/gradient_norm"] == 0
        assert "reward/never" not in row
        assert "heldout/never" not in row
        assert None not in row.values()
    assert json.loads((run / "summary.json").read_text())["rewards"] == {}


def test_held_out_means_over_nothing_warn_of_nothing(tmp_path):
    ended = trained(
        tmp_path, *REMAX, *(f"reward.{n}._target_={REWARDS}{n}" for n in ("mixed", "never")), "reward.never.weight=0"
    )
    assert ended.code == 0, ended.said
    assert "Warning" not in ended.said
    assert "not finite" not in ended.said
    row = rows_of(tmp_path / "run")[-1]
    assert "heldout/mixed" in row
    assert "heldout/never" not in row


# ---------------------------------------------------------------------- settings that do not fit

REFUSED = {
    "objective of data": (("objective=dpo", "advantage=remax"), "objective=dpo learns from data: use trainer=offline"),
    "values without head": (("objective=clipped", "advantage=ppo"), "set objective.value_coefficient"),
    "head without values": (
        (*REMAX, "objective.value_coefficient=0.5"),
        "objective.value_coefficient has no effect: advantage=remax uses no values",
    ),
    "steps": (("objective=policy_gradient", "advantage=pure"), "needs rewards of steps"),
    "greedy": ((*REMAX, "sampling.temperature=0"), "sampling.temperature=0: all completions"),
    "dropout": ((*REMAX, "lora.dropout=0.1"), "lora.dropout must be 0 with trainer=online"),
    "gold": ((*REMAX, f"data.gold={REWARDS}mixed"), "data.gold has no effect with trainer=online"),
    "long prompts": ((*REMAX, "trainer.micro_batch_tokens=20"), "trainer.micro_batch_tokens=20: a prompt with"),
    "no reference": (
        ("objective=policy_gradient", "advantage=rloo", "reference.path=elsewhere"),
        "reference.path=elsewhere has no effect",
    ),
    "no such component": (
        (*REMAX, "trainer.pass_component=other"),
        "trainer.pass_component=other: must be one of",
    ),
    "pass of none": ((*REMAX, "trainer.pass_component=mixed", "trainer.heldout_n=0"), "has no effect with"),
    "inner batches": (
        (*REMAX, "trainer.num_minibatches=5"),
        "trainer.num_minibatches=5: the trainer.batch_size=4 prompts",
    ),
    "draws of one": (
        ("objective=policy_gradient", "advantage=reinforce", "sampling.n=1", "trainer.dynamic_sampling=1"),
        "use sampling.n=2 or more",
    ),
    "no weight": (
        (*REMAX, f"reward.mixed._target_={REWARDS}mixed", "reward.mixed.weight=0"),
        "no component has a weight",
    ),
    "not a reward": ((*REMAX, "reward.x._target_=nowhere.at_all"), "reward.x._target_=nowhere.at_all"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_fit_are_refused_in_one_line(tmp_path, name):
    words, expected = REFUSED[name]
    said = refused(tmp_path, *words)
    assert expected in said
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    if name == "long prompts":  # which the run itself meets: its directory is free, and binds nobody
        done(tmp_path, *REMAX, *SHORT)


def test_rollouts_are_not_for_offline_training(tmp_path):
    """trainer=offline with an objective of rollouts says which trainer it needs."""
    words = words_of(tmp_path, "trainer=offline", "objective=clipped", f"run.dir={tmp_path / 'run'}")
    kept = [w for w in words if w.split("=")[0] not in ("trainer.heldout_n", "trainer.max_missing_fraction")]
    ended = shared().run(["train", *(w for w in kept if not w.startswith("reward"))])
    assert ended.code == 2, ended.said
    assert "use trainer=online" in ended.said


def test_reference_of_another_vocabulary(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=99, **size)).save_pretrained(tmp_path / "other")
    said = refused(tmp_path, *REMAX, f"reference.path={tmp_path / 'other'}")
    assert "a vocabulary of 99 tokens" in said


def test_reference_of_another_model_is_used(tmp_path):
    """From the first token on the policy is not its reference."""
    from align.models.pretrained import tiny

    second = tiny(7, 16, 1)
    second.model().save_pretrained(tmp_path / "second")
    second.tokenizer().save_pretrained(tmp_path / "second")
    run = done(tmp_path, *REMAX, *SHORT, f"reference.path={tmp_path / 'second'}")
    assert abs(rows_of(run)[0]["kl/reference"]) > 1e-3


def test_prompts_too_long_for_data_max_tokens_are_dropped_or_refused(tmp_path):
    words_of(tmp_path)
    with (tmp_path / "prompts.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "long " * 100, "answer": 3}) + "\n")
    ended = trained(tmp_path, *REMAX, *SHORT, "data.max_tokens=100", "data.max_bad_fraction=0.2")
    assert ended.code == 0, ended.said
    assert "12 rows in = 11 kept + 1 dropped (1 prompt_too_long)" in ended.said


def test_prompts_of_one_token(tmp_path):
    """There is nothing to compare before the first completion; training goes on without the self-check."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": 1}) + "\n" for p in "abcde"))
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "f", "answer": 1}\n')
    ended = trained(tmp_path, *REMAX, *SHORT, "data.text=plain")
    assert ended.code == 0, ended.said
    assert "self-check left out: no prompt has two tokens" in ended.said
    assert rows_of(tmp_path / "run")[-1]["optimizer/gradient_norm"] > 0


# ---------------------------------------------------------------------- engines that differ from the trainer


def _wrong(by):
    """HFRollout.logps with an error."""
    inner = HFRollout.logps
    return lambda self, *args: [[x + by for x in row] for row in inner(self, *args)]


@pytest.mark.parametrize("by", [0.01, float("nan")])
def test_engine_with_other_weights_stops_the_run(tmp_path, monkeypatch, capsys, by):
    monkeypatch.setattr(HFRollout, "logps", _wrong(by))
    assert main(["train", *words_of(tmp_path, *REMAX, *SHORT, f"run.dir={tmp_path / 'run'}")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "step 0: the engine's log-probs differ from the trainer's by up to" in said
    assert "trainer.rollout_logp_tolerance 0.001" in said
    assert "the engine has other weights, another precision or another attention" in said


def test_tolerance_can_be_widened(tmp_path, monkeypatch):
    monkeypatch.setattr(HFRollout, "logps", _wrong(0.01))
    words = words_of(tmp_path, *REMAX, *SHORT, "trainer.rollout_logp_tolerance=0.1", f"run.dir={tmp_path / 'run'}")
    assert main(["train", *words]) == 0
    assert rows_of(tmp_path / "run")[0]["rollout/engine_logp_diff_max"] == pytest.approx(0.01, rel=0.01)


def test_weights_that_did_not_arrive_stop_the_run(tmp_path, monkeypatch, capsys):
    """The second sync is lost: the checkpoint before it is intact, and the run goes on from there."""
    inner, synced = HFRollout.sync, []

    def sync(self, policy):
        inner(self, policy)
        synced.append(1)
        if len(synced) == 2:
            monkeypatch.setattr(HFRollout, "logps", _wrong(0.01))

    monkeypatch.setattr(HFRollout, "sync", sync)
    words = words_of(tmp_path, *REMAX, "trainer.save_every=1", f"run.dir={tmp_path / 'run'}")
    assert main(["train", *words]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "step 2: the engine's log-probs differ" in said
    assert "the weights did not reach the engine whole" in said
    assert max(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == "step-000001"
    monkeypatch.undo()
    done(tmp_path, *REMAX, "trainer.save_every=1")
    other = tmp_path / "other"
    other.mkdir()
    done(
        other,
        *REMAX,
        "trainer.save_every=1",
        f"data.train={tmp_path / 'prompts.jsonl'}",
        f"data.heldout={tmp_path / 'heldout.jsonl'}",
    )
    ours, theirs = left(tmp_path / "run"), left(other / "run")
    assert ours == theirs


def test_engine_that_fails_loses_no_step(tmp_path, monkeypatch):
    """In the fourth drawing; the checkpoint is of the third step though only each hundredth is saved."""
    inner, calls = HFRollout.generate, []

    def generate(self, *args, **more):
        calls.append(1)
        if len(calls) == 4:
            raise EngineFailed("out of memory")
        return inner(self, *args, **more)

    more = ("trainer.save_every=100", "trainer.num_samples=0")
    monkeypatch.setattr(HFRollout, "generate", generate)
    assert main(["train", *words_of(tmp_path, *REMAX, *more, f"run.dir={tmp_path / 'run'}")]) == 1
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    monkeypatch.undo()
    run = done(tmp_path, *REMAX, *more)
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------- parts


def test_rewards_are_closed_before_the_model_is_saved(tmp_path, monkeypatch):
    """An adapter of a reward lives in the policy's model until then."""
    from align.rewards.build import Rewards
    from align.trainers import trained

    order = []
    close, write = Rewards.close, trained.write_final
    monkeypatch.setattr(Rewards, "close", lambda self: (order.append("close"), close(self))[1])
    monkeypatch.setattr("align.trainers.trained.write_final", lambda *a: (order.append("final"), write(*a))[1])
    assert main(["train", *words_of(tmp_path, *REMAX, *SHORT, f"run.dir={tmp_path / 'run'}")]) == 0
    assert order[:2] == ["close", "final"]


def _completion(ids, stop="end"):
    return Completion(tuple(ids), stop, tuple(-1.0 for _ in ids))


def _group(prompt, completions, scores, greedy_score=None):
    scores = np.array(scores, dtype=float)
    more = () if greedy_score is None else (_completion([9]), "", np.array([greedy_score]), greedy_score)
    return Group(prompt, tuple(completions), ("",) * len(completions), scores[:, None], scores, *more)


def test_empty_completions(tmp_path):
    """Only the end of the turn, and not even that: the first teaches one token, the second none."""
    t = ready(tmp_path, *REMAX, "sampling.n=3")
    try:
        groups = [
            _group(p, [_completion([257]), _completion([]), _completion([65, 257])], [1.0, 0.5, 0.0], 0.25)
            for p in t.train[:4]
        ]
        parts = examples(groups, "keep", t.engine.policy.layout, 4096)
        assert [int(row.targets.sum()) for row in parts[0].rows] == [1, 0, 2]
        parts, _ = t.learner.prepared(groups, parts)
        row = t.learner.update(1, parts, 4)
        assert row["tokens/targets"] == 12
        assert np.isfinite(row["optimizer/gradient_norm"])
        assert row["optimizer/gradient_norm"] > 0
    finally:
        t.close()


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_completions_of_different_lengths_fit_a_micro_batch_with_their_padding(layout):
    """Prompt of 3, completions of 1, 1, 1 and 9: 24 tokens in all, 48 with padding."""
    prompt = PromptRow("file:1", (5, 6, 7), "")
    group = _group(prompt, [_completion([9] * n) for n in (1, 1, 1, 9)], [1.0, 0.5, 0.0, 0.25])
    for budget, size in ((48, 4), (47, 2 if layout == "padded" else 4), (12, 4 if layout == "shared" else 1)):
        parts = examples([group], "keep", layout, budget)
        rows = [e.rows for e in parts]
        assert {len(part) for part in rows} == {size}
        assert sum(len(chosen) for chosen in micro_batches(rows, [""] * len(rows), layout, budget)) == len(rows)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT puts it right by itself for GPT-2
def test_only_dropout_that_was_asked_for(tmp_path):
    """A model that was made with dropout draws and learns as the same network: the ratio is 1."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from align.models.pretrained import byte_tokenizer

    tokenizer = byte_tokenizer()
    size = dict(n_embd=16, n_layer=1, n_head=2, n_positions=256, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    GPT2LMHeadModel(GPT2Config(**size, **ids)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = ("model=hub", f"model.path={tmp_path / 'gpt2'}", "model.hidden_size=", "model.num_layers=")
    t = ready(tmp_path, *REMAX, *model, "objective=clipped", "trainer.old_logps=trainer")
    try:
        assert t.task.step(1)["policy/kl_old"] == 0.0
    finally:
        t.close()


NAN = float("nan")


@pytest.mark.parametrize(
    "scores,greedy,zero_variance,missing",
    [
        ([1, 1], None, True, 0),
        ([1, 0], None, False, 0),
        ([1, NAN], None, True, 1),
        ([NAN, NAN], None, True, 2),
        ([1, 1], 1, True, 0),
        ([1, 1], 0, False, 0),  # the greedy completion is what they are compared with
        ([1, 0], NAN, True, 1),  # nothing to compare with
        ([1, NAN], 0, False, 1),
    ],
)
def test_prompts_that_teach_nothing(scores, greedy, zero_variance, missing):
    group = _group(None, [_completion([1])] * 2, scores, greedy)
    assert group.zero_variance == zero_variance
    assert group.missing == missing

    class Named:
        names = ("r",)

    row = reward_metrics([group], Named(), lambda g: g.zero_variance)
    assert row["reward/missing"] == missing
    assert row["rollout/settled_prompts"] == zero_variance
    known = [s for s in scores if s == s]
    assert row.get("reward/r") == (np.mean(known) if known else None)


def test_a_second_run_of_the_same_words_is_the_same(tmp_path):
    """Every number, whatever the directory is called."""
    other = tmp_path / "other"
    other.mkdir()
    a = done(tmp_path, *FAMILY["grpo"], "trainer.max_steps=2")
    same = (f"data.train={tmp_path / 'prompts.jsonl'}", f"data.heldout={tmp_path / 'heldout.jsonl'}")
    b = done(other, *FAMILY["grpo"], "trainer.max_steps=2", *same)
    assert evidence(a) == evidence(b)
