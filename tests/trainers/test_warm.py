"""recipe=warm: what its members share and differ in, killed anywhere, one member at a time, baklava."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from align.cli import main
from tests.killer import Hook, shared
from tests.trainers.test_reward_model import pairs, scored, write

STEP = "align.engine.local:LocalEngine.step"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("warm")
    write(base / "train.jsonl", pairs(24))
    write(base / "heldout.jsonl", pairs(8, 100))
    return base


def words(base: Path, run: Path, *more: str) -> list[str]:
    return ["train", "recipe=warm", "model=tiny", f"data.train={base}/train.jsonl", "lora.rank=0",
            f"data.heldout={base}/heldout.jsonl", f"run.dir={run}", "trainer.max_steps=3", "trainer.batch_size=4",
            "trainer.precision=float32", "trainer.save_every=1", "trainer.probe_steps=2", *more]  # fmt: skip


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def straight(base) -> Path:
    assert main(words(base, base / "straight")) == 0
    return base / "straight"


def test_the_average_is_the_mean_of_members_that_began_with_one_head(straight):
    probe, final = weights(straight / "probe" / "final"), weights(straight / "final")
    members = [weights(straight / f"member-{k}" / "final") for k in (1, 2, 3)]
    for name, value in final.items():
        mean = torch.stack([m[name] for m in members]).double().mean(0).float()
        assert torch.equal(value, mean), name
        assert len({m[name].numpy().tobytes() for m in members}) == 3, name
    settings = [yaml.safe_load((straight / f"member-{k}" / "config.yaml").read_text()) for k in (1, 2, 3)]
    assert len({s["seed"] for s in settings}) == 3
    assert [s["optimizer"]["lr"] for s in settings] == [1e-4, 2e-4, 4e-4]
    assert [s["head"]["dropout"] for s in settings] == [0.0, 0.05, 0.1]
    assert {s["head"]["path"] for s in settings} == {str(straight / "probe" / "final")}
    assert {s["head"]["only"] for s in settings} == {False}
    # three steps of Adam at 4e-4 cannot go further from the head that all began with
    for member in members:
        assert (member["score.weight"] - probe["score.weight"]).abs().max() < 3 * 4e-4 * 1.5
    assert (members[0]["score.weight"] - members[1]["score.weight"]).abs().max() > 0


def test_the_summary_compares_members_their_ensemble_and_the_average(base, straight, tmp_path):
    found = json.loads((straight / "summary.json").read_text())["heldout"]
    rows = {
        name: scored(straight / path, f"{base}/heldout.jsonl", tmp_path / f"{name}.jsonl")
        for name, path in (("average", "final"), *((f"{k}", f"member-{k}/final") for k in (1, 2, 3)))
    }
    margins = {n: np.array([r["score_chosen"] - r["score_rejected"] for r in listed]) for n, listed in rows.items()}
    assert found["members"] == [np.mean(margins[str(k)] > 0) for k in (1, 2, 3)]
    assert found["average"] == np.mean(margins["average"] > 0)
    assert found["ensemble"] == np.mean(sum(margins[str(k)] for k in (1, 2, 3)) > 0)
    assert found["average_minus_ensemble"]["mean"] == pytest.approx(found["average"] - found["ensemble"])


@pytest.mark.parametrize(
    "hook",
    [Hook(STEP, 1), Hook(STEP, 4), Hook(STEP, 9), Hook("align.averaging.engine:average", 1),
     Hook("align.averaging.engine:average", 1, when="after"), Hook("align.checkpoint:save", 2, when="after")],
    ids=str,
)  # fmt: skip
def test_killed_anywhere_it_goes_on_to_the_same_average(base, straight, tmp_path, hook):
    run = tmp_path / "run"
    killed = shared().run(words(base, run), [hook])
    assert killed.code == -signal.SIGKILL, killed.said
    done = shared().run(words(base, run))
    assert done.code == 0, done.said
    one, other = weights(straight / "final"), weights(run / "final")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    again = shared().run(words(base, run))
    assert "is complete" in again.said


def test_members_one_at_a_time_make_the_same_average(base, straight, tmp_path):
    run = tmp_path / "run"
    for part in (0, 3, 1, 2):
        assert main(words(base, run, f"trainer.only={part}")) == 0
        assert not (run / "final").exists()
    assert main(words(base, run)) == 0
    one, other = weights(straight / "final"), weights(run / "final")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_other_data_or_settings_are_another_run(base, straight, tmp_path, capsys):
    other = write(tmp_path / "other.jsonl", pairs(23))
    assert main(words(base, straight, "optimizer.lr=0.1")) == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert main([*words(base, straight), f"data.train={other}"]) == 2
    assert "data.train" in capsys.readouterr().err


def test_baklava_takes_its_starts_in_turn_and_lora_is_merged(base, tmp_path):
    from align.models.pretrained import tiny

    starts = []
    for seed in (0, 1):
        found = tiny(seed, 64, 2)
        found.model().save_pretrained(tmp_path / f"start-{seed}")
        found.tokenizer().save_pretrained(tmp_path / f"start-{seed}")
        starts.append(tmp_path / f"start-{seed}")
    run = tmp_path / "run"
    more = [f"trainer.starts=[{starts[0]},{starts[1]}]", "lora.rank=2", "trainer.members=3", "trainer.max_steps=1"]
    assert main(words(base, run, *more)) == 0
    norm = "model.norm.weight"
    embed = "model.embed_tokens.weight"  # LoRA leaves them alone
    given = [weights(start) for start in starts]
    for k, start in ((1, 0), (2, 1), (3, 0)):
        member = weights(run / f"member-{k}" / "final")
        assert torch.equal(member[norm], given[start][norm])
        assert torch.equal(member[embed], given[start][embed])
    mean = (2 * given[0][embed].double() + given[1][embed].double()) / 3
    assert torch.equal(weights(run / "final")[embed], mean.float())
