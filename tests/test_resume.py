"""A run that is killed, damaged or starved of disk ends like one that was not; and what may change on a resume."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from align.config import compose
from align.rundir import RunDirectory
from tests.conftest import mostly_slow
from tests.killer import Hook, evidence, leftovers, rows_file, settings, shared

pytestmark = pytest.mark.xdist_group("resume")  # all are compared with the same undisturbed runs

SAVE = "align.checkpoint:"
ENGINE = "align.engine.local:LocalEngine."
CHECKPOINT_FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")

# Every one dies inside checkpoint.save: a file half of a set, flushed or not, hashed or not, renamed or not.
INSIDE_SAVE = [
    Hook("align.engine.local:save_file", 1),
    Hook("align.engine.local:save_file", 1, when="after"),
    Hook("align.engine.local:save_file", 6),
    Hook(SAVE + "_flush", 2),
    Hook(SAVE + "_flush", 16, when="after"),
    Hook(SAVE + "_sha256", 8),
    Hook("os:rename", 1),
    Hook("os:rename", 1, when="after"),
    Hook("os:rename", 4),  # the removal of the oldest
    Hook("os:unlink", 6, when="after"),
    Hook("os:rmdir", 1),
]


def _elsewhere() -> list[Hook]:
    seeded = random.Random(20)
    hooks = [Hook(ENGINE + "step", seeded.randint(1, 30), when=w) for w in ("before", "after") for _ in range(2)]
    hooks += [Hook(ENGINE + "backward", seeded.randint(1, 60)) for _ in range(2)]
    hooks += [Hook("align.models.policy:Policy.forward", seeded.randint(1, 60)) for _ in range(2)]
    hooks += [Hook("align.report.log:Log.row", seeded.randint(1, 30), when=w) for w in ("before", "after")]
    hooks += [Hook("os:fsync", seeded.randint(5, 80)) for _ in range(2)]
    hooks += [
        Hook("align.models.reference:ReferenceCache._write", 1, when="after"),
        Hook("align.trainers.trained:write_final", 1),
        Hook("align.trainers.trained:write_final", 1, when="after"),
    ]
    return hooks


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(base) -> Path:
    """The run that nothing happens to."""
    run = base / "whole"
    ended = shared().run(settings(base, f"run.dir={run}"))
    assert ended.code == 0, ended.said
    assert evidence(run)["steps"] == list(range(1, 31))
    return run


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A completed run of one's own."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def _name(value: Hook | str) -> str:
    return value if isinstance(value, str) else f"{value.target.split(':')[1]}-{value.when}-{value.n}"


@pytest.mark.parametrize("hook", mostly_slow(INSIDE_SAVE + _elsewhere(), 1, 6, 9, 12, 18, 26), ids=_name)
def test_killed_anywhere(base, whole, tmp_path, hook):
    # the pass over the reference is part of what is killed
    cache = tmp_path / "cache" if "reference" in hook.target else base / "cache"
    words = settings(base, f"run.dir={tmp_path / 'run'}", f"reference.cache_dir={cache}")
    killed = shared().run(words, [hook])
    assert killed.code == -9, killed.said
    done = shared().run(words)
    assert done.code == 0, done.said
    assert "damaged" not in done.said
    assert evidence(tmp_path / "run") == evidence(whole)
    assert leftovers(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_killed_again_and_again(base, tmp_path, layout):
    """From outside, at seeded times, until the run is complete; then once more."""
    more = ["lora.dropout=0" if layout == "shared" else "lora.dropout=0.2", "trainer.save_every=1"]
    straight = shared().run(settings(base, f"run.dir={tmp_path / 'straight'}", *more))
    assert straight.code == 0, straight.said
    assert f"layout {layout}" in straight.said
    words = settings(base, f"run.dir={tmp_path / 'run'}", *more)
    seeded = random.Random(layout)
    for _ in range(5):
        ended = shared().run(words, after_seconds=seeded.uniform(0.3, 0.9) * straight.seconds)
        assert ended.code in (0, -9), ended.said
    done = shared().run(words)
    assert done.code == 0, done.said
    assert evidence(tmp_path / "run") == evidence(tmp_path / "straight")


# ---------------------------------------------------------------------- the other objectives

# what differs from the WPO run of settings; the kind of data
FAMILY = {
    "kto": (["recipe=kto", "trainer.epochs=2", "trainer.max_steps=null"], "labelled"),
    "kto-all-weights": (["recipe=kto", "lora.rank=0", "lora.dropout=0", "reference.mode=model"], "labelled"),
    "sft": (["recipe=sft", "trainer.epochs=2", "trainer.max_steps=null"], "single"),
    "aot": (["recipe=", "objective=aot", "lora.rank=4"], "pair"),
    "inpo": (["recipe=inpo_offline"], "pair"),
    "mix": (["recipe=", "objective=mix", "lora.rank=4"], "pair"),
    "orpo": (["recipe=orpo"], "pair"),
}
# Where they die: in the pass over the reference, in a forward (of KTO's point or AOT's order too), in a step, in a
# save, in an evaluation, before and after final/ is written.
DEATHS = [
    Hook("align.models.reference:ReferenceCache._write", 1, when="after"),
    Hook("align.models.policy:Policy.forward", 9),
    Hook(ENGINE + "step", 5, when="after"),
    Hook("align.engine.local:save_file", 4),
    Hook("align.trainers.offline:evaluate", 2),
    Hook("align.trainers.trained:write_final", 1, when="after"),
]
CACHED = ("kto", "aot", "inpo", "mix")


def _family(base: Path, name: str, run: Path, *more: str) -> list[str]:
    words, kind = FAMILY[name]
    train, heldout = base / f"{kind}.jsonl", base / f"{kind}-heldout.jsonl"
    if not train.exists():
        rows_file(train, 2, 36, kind)
        rows_file(heldout, 3, 5, kind)
    if name == "inpo":
        words = [*words, f"reference.path={_second_model(base)}"]
    short = ["trainer.max_steps=8", "trainer.eval_every=4", f"data.train={train}", f"data.heldout={heldout}"]
    return settings(base, *short, *words, f"run.dir={run}", *more)


def _second_model(base: Path) -> Path:
    from align.models.pretrained import tiny

    where = base / "second"
    if not where.exists():
        second = tiny(7, 16, 1)
        second.model().save_pretrained(where)
        second.tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def straight(base):
    """A function name -> what the run of FAMILY that nothing happens to leaves."""
    done: dict[str, dict] = {}

    def evidence_of(name: str) -> dict:
        if name not in done:
            run = base / f"straight-{name}"
            ended = shared().run(_family(base, name, run))
            assert ended.code == 0, ended.said
            done[name] = evidence(run)
            assert len(done[name]["rows"]) >= 8
            assert {"model.safetensors", "optimizer.safetensors", "summary"} <= done[name].keys()
        return done[name]

    return evidence_of


# One loop saves for all of them: each kind dies at two places, each place sees two kinds or three, and one kind has no
# pass over a reference to die in.
ENDS = [(name, DEATHS[(k + k // 6 + 3 * j) % 6]) for k, name in enumerate(FAMILY) for j in range(2)]
ENDS.append(("orpo", DEATHS[0]))


@pytest.mark.parametrize("name, hook", mostly_slow(ENDS, 0, 5, 10), ids=_name)
def test_every_kind_of_objective_goes_on(base, straight, tmp_path, name, hook):
    whole = straight(name)
    of_cache = "reference" in hook.target
    if of_cache and name not in CACHED:
        words = _family(base, name, tmp_path / "run", f"reference.cache_dir={tmp_path / 'cache'}")
        assert shared().run(words, [hook]).code == 0  # there is no such pass to die in
        assert not (tmp_path / "cache").exists()
        return
    words = _family(base, name, tmp_path / "run", f"reference.cache_dir={(tmp_path if of_cache else base) / 'cache'}")
    killed = shared().run(words, [hook])
    assert killed.code == -9, killed.said
    done = shared().run(words)
    assert done.code == 0, done.said
    assert evidence(tmp_path / "run") == whole
    assert leftovers(tmp_path / "run") == []


@pytest.mark.slow
def test_runs_of_the_family_differ(straight):
    """The proof above is of each objective, not of one that ignores its settings."""
    rows = [json.dumps(straight(name)["rows"][-1]) for name in FAMILY]
    assert len(set(rows)) == len(FAMILY)
    assert "kl" in rows[0]


def test_loss_before_training_is_of_the_run_that_is_finished(base, straight, tmp_path):
    """Another model evaluates itself and dies before its first checkpoint."""
    words = _family(base, "orpo", tmp_path / "run")
    killed = shared().run([*words, "model.seed=5"], [Hook(ENGINE + "step", 1)])
    assert killed.code == -9, killed.said
    assert shared().run(words).code == 0
    assert evidence(tmp_path / "run") == straight("orpo")


def test_epochs_over_two_repeated_sources(base, tmp_path):
    """Half of 8 rows and twice 6 rows make 16 a pass: two steps of 8, the same rows in each pass, in another order."""
    a, b = rows_file(tmp_path / "a.jsonl", 4, 8, "single"), rows_file(tmp_path / "b.jsonl", 5, 6, "single")
    more = [f"data.train=[{a},{b}]", "data.repeat=[0.5,2]", "trainer.max_steps=null", "trainer.epochs=3"]

    def words(run: Path) -> list[str]:
        return _family(base, "sft", run, *more, "trainer.save_every=1")

    done = shared().run(words(tmp_path / "straight"))
    assert done.code == 0, done.said
    assert "plan 6 steps of 8 rows from 16" in done.said
    audit = json.loads((tmp_path / "straight" / "audit.json").read_text())["train"]
    assert (audit["rows_in"], audit["rows_kept"], audit["examples"]) == (14, 14, 16)
    assert audit["sources"] == [str(a), str(b)]
    whole = evidence(tmp_path / "straight")
    assert [row["data/epoch"] for row in whole["rows"]] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    targets = [row["tokens/targets"] for row in whole["rows"]]
    passes = [sum(targets[i : i + 2]) for i in (0, 2, 4)]
    assert passes == [audit["target_tokens"]] * 3
    assert len(set(targets)) > 2  # each pass is shuffled anew
    assert shared().run(words(tmp_path / "run"), [Hook(ENGINE + "step", 4)]).code == -9
    assert shared().run(words(tmp_path / "run")).code == 0
    assert evidence(tmp_path / "run") == whole


def test_other_repeats_are_other_data(base, tmp_path):
    assert shared().run(_family(base, "sft", tmp_path / "run", "data.repeat=[2]")).code == 0
    refused = shared().run(_family(base, "sft", tmp_path / "run"))
    assert refused.code == 2
    assert "data.repeat" in refused.said


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "bit":
        content[len(content) * 2 // 3] ^= 4
    else:
        content = content[: {"empty": 0, "half": len(content) // 2, "last byte": len(content) - 1}[how]]
    path.write_bytes(bytes(content))


# the manifest in every way, the files that it names, which are looked at alike, in each way once
DAMAGES = [(CHECKPOINT_FILES[0], how) for how in ("empty", "half", "last byte", "deleted", "bit")]
DAMAGES += [(CHECKPOINT_FILES[1 + k % 3], how) for k, (_, how) in enumerate(DAMAGES)]


@pytest.mark.parametrize("name, how", DAMAGES)
def test_damaged_newest_checkpoint(base, whole, copy, name, how):
    _damage(copy / "checkpoints" / "step-000030" / name, how)
    done = shared().run(settings(base, f"run.dir={copy}"))
    assert done.code == 0, done.said
    warning = next(line for line in done.said.splitlines() if "damaged" in line)
    assert "step-000030" in warning
    if (name, how) != ("manifest.json", "bit"):  # a wrong sum in the manifest looks like a wrong file
        assert name in warning
    assert "using step-000027" in warning
    assert "resumed" in done.said
    assert "step 27" in done.said
    assert evidence(copy) == evidence(whole)
    assert (copy / "checkpoints" / "damaged-step-000030").is_dir()


def test_all_checkpoints_damaged_is_never_a_silent_start(base, copy):
    for step in ("step-000027", "step-000030"):
        _damage(copy / "checkpoints" / step / "model.safetensors", "half")
    before = (copy / "metrics.jsonl").read_text()
    refused = shared().run(settings(base, f"run.dir={copy}"))
    assert refused.code == 2
    assert "no undamaged checkpoint" in refused.said
    assert "step-000027: model.safetensors has" in refused.said
    assert "remove" in refused.said
    assert (copy / "metrics.jsonl").read_text() == before
    assert (copy / "checkpoints" / "step-000030").is_dir()


def test_finished_run_whose_checkpoints_are_gone_is_not_overwritten(base, copy):
    shutil.rmtree(copy / "checkpoints")
    refused = shared().run(settings(base, f"run.dir={copy}"))
    assert refused.code == 2
    assert "without its checkpoints" in refused.said
    assert (copy / "final" / "adapter_model.safetensors").exists()


def _extended(base: Path, run: Path, steps: int) -> list[str]:
    return settings(base, f"run.dir={run}", f"trainer.max_steps={steps}", "trainer.schedule_steps=12")


def test_file_system_that_takes_no_more(base, tmp_path):
    """A limit on file sizes makes the write of the optimiser fail in the middle of a save."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert shared().run(_extended(base, straight, 12)).code == 0
    assert shared().run(_extended(base, run, 6)).code == 0
    size = (run / "checkpoints" / "step-000006" / "optimizer.safetensors").stat().st_size
    failed = shared().run(_extended(base, run, 12), file_limit=size // 2)
    _says_disk_full(failed, run)
    assert shared().run(_extended(base, run, 12)).code == 0
    ours, theirs = evidence(run), evidence(straight)
    assert [r for r in ours.pop("rows") if r["step"] != 6] == [r for r in theirs.pop("rows") if r["step"] != 6]
    assert ours == theirs


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs; needs the right to mount."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_full_disk(base, small_disk):
    run = small_disk / "run"
    assert shared().run(_extended(base, run, 6)).code == 0
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    size = sum(p.stat().st_size for p in (run / "checkpoints" / "step-000006").iterdir())
    ballast.write_bytes(bytes(free - size // 2))
    failed = shared().run(_extended(base, run, 12))
    _says_disk_full(failed, run)
    ballast.unlink()
    assert shared().run(_extended(base, run, 12)).code == 0
    assert evidence(run)["steps"] == list(range(1, 13))


def _says_disk_full(failed, run: Path) -> None:
    assert failed.code == 1, failed.said
    assert "Traceback" not in failed.said
    line = next(line for line in failed.said.splitlines() if "cannot be written" in line)
    assert "step-000009" in line
    assert "bytes needed" in line
    assert "bytes free" in line
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000003", "step-000006"]


# ---------------------------------------------------------------------- what may change


def test_complete_run_says_so(base, copy):
    before = evidence(copy)
    again = shared().run(settings(base, f"run.dir={copy}"))
    assert again.code == 0
    assert "complete at step 30" in again.said
    assert evidence(copy) == before


def test_more_steps_keep_the_schedule(base, whole, copy):
    done = shared().run(settings(base, f"run.dir={copy}", "trainer.max_steps=36"))
    assert done.code == 0, done.said
    rows = evidence(copy)["rows"]
    assert [row["step"] for row in rows] == list(range(1, 37))
    assert rows[:30] == evidence(whole)["rows"]
    assert {row["optimizer/lr"] for row in rows[29:]} == {rows[29]["optimizer/lr"]}
    assert rows[29]["optimizer/lr"] == pytest.approx(1e-4)
    assert json.loads((copy / "summary.json").read_text())["step"] == 36


def test_fewer_steps_than_done_are_refused_or_complete(base, copy):
    """summary.json never claims a step that the weights are not of."""
    (copy / "summary.json").unlink()
    ended = shared().run(settings(base, f"run.dir={copy}", "trainer.max_steps=20"))
    assert ended.code == 2, ended.said
    assert "trainer.max_steps=20" in ended.said


@pytest.mark.parametrize(
    "word", ["optimizer.lr=1e-4", "objective.beta=0.2", "lora.rank=4", "trainer.batch_size=4", "seed=1"]
)
def test_changed_setting_is_refused_by_name(base, copy, word):
    refused = shared().run(settings(base, f"run.dir={copy}", word))
    assert refused.code == 2
    assert word.split("=")[0] in refused.said
    assert "Traceback" not in refused.said


def test_changed_data_setting_is_refused_by_name(base, copy, tmp_path):
    other = rows_file(tmp_path / "other.jsonl", 5, 70)
    refused = shared().run(settings(base, f"run.dir={copy}", f"data.train={other}"))
    assert refused.code == 2
    assert "data.train" in refused.said


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_changed_data_content_is_refused(tmp_path, split):
    words = settings(tmp_path, f"run.dir={tmp_path / 'run'}", "trainer.max_steps=3")
    assert shared().run(words).code == 0
    lines = (tmp_path / f"{split}.jsonl").read_text().splitlines()
    lines[-1] = lines[-1].replace("question", "Question")
    (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    refused = shared().run([*words, "log.console_every=2"])
    assert refused.code == 2, refused.said
    assert f"data.{split}" in refused.said


def test_what_is_no_part_of_the_run_may_change(base, whole, tmp_path):
    run = tmp_path / "run"
    killed = shared().run(settings(base, f"run.dir={run}"), [Hook(ENGINE + "step", 8)])
    assert killed.code == -9
    more = ["log.console_every=5", "trainer.save_every=4", "trainer.keep_checkpoints=1", "launch.threads=1"]
    done = shared().run(settings(base, f"run.dir={run}", *more))
    assert done.code == 0, done.said
    assert "step 6" in done.said
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000030"]
    assert evidence(run) == evidence(whole)


def test_second_process_is_refused_by_host_and_pid(base, copy):
    words = settings(base, f"run.dir={copy}")
    held = RunDirectory(compose(words[1:]))
    try:
        refused = shared().run(words)
    finally:
        held.close()
    assert refused.code == 2
    assert f"process {os.getpid()} on {socket.gethostname()}" in refused.said
    assert refused.seconds < 5
    assert shared().run(words).code == 0


def test_start_that_failed_binds_nobody(base, whole, tmp_path):
    """Bad data, then other settings: nothing of the first start is left in the second."""
    run = tmp_path / "run"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 3}\n')
    failed = shared().run(settings(base, f"run.dir={run}", f"data.train={bad}", "optimizer.lr=1e-4"))
    assert failed.code == 2
    # another model writes its samples and dies before its first checkpoint
    words = settings(base, f"run.dir={run}", "model.seed=5", "trainer.num_samples=2", "trainer.sample_tokens=4")
    assert shared().run(words, [Hook(ENGINE + "step", 2)]).code == -9
    assert (run / "samples.jsonl").exists()
    done = shared().run(settings(base, f"run.dir={run}"))
    assert done.code == 0, done.said
    assert not (run / "samples.jsonl").exists()
    assert evidence(run) == evidence(whole)


def test_merge_of_a_complete_run(base, copy):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from align.models.pretrained import tiny

    adapted = PeftModel.from_pretrained(tiny(0, 16, 1).model(), copy / "final").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        with adapted.disable_adapter():
            assert float((adapted(ids).logits - expected).abs().max()) > 1e-3  # the adapter does something
    steps = evidence(copy)["rows"]
    done = shared().run(settings(base, f"run.dir={copy}", "merge=true"))
    assert done.code == 0, done.said
    assert not (copy / "final" / "adapter_model.safetensors").exists()
    plain = AutoModelForCausalLM.from_pretrained(copy / "final").eval()
    assert not hasattr(plain, "peft_config")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert evidence(copy)["rows"] == steps
    assert "complete" in shared().run(settings(base, f"run.dir={copy}", "merge=true")).said
