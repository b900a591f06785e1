"""`align generate`: the prompts of data.train answered by a model, a line a sample, with rewards if some are named.

FILE.partial/key.json  FILE.partial/00000.jsonl ...  then FILE, whole or not there
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from align import build
from align.config import Config
from align.data.chat import prompt_ids
from align.data.pairs import write_lines
from align.data.prompts import PromptRow, load_prompts, prompts_fingerprint
from align.evaluate.passk import mean_reward_interval, pass_at_k_interval
from align.jsons import Json, Tokenizer
from align.models.device import pick_device, pick_precision
from align.models.policy import Policy, weights_hash
from align.models.weights import check_tokens
from align.rewards.base import Conversation
from align.rewards.build import RewardHost, Rewards, components
from align.rollout.base import Completion, EngineFailed, Host, Rollout, Sampling, check_request
from align.trainers.signals import Signals, Stopped

# Prompts whose samples are written together: a kill loses so many at most. Draws depend on it, see _Work.chunk.
CHUNK_PROMPTS = 64
# Columns of a prompt's row that speak of an answer it came with; a sample's line would say them of the sample.
_OF_ANOTHER = (
    *("chosen", "rejected", "prompt_chosen", "prompt_rejected", "chosen_finished", "rejected_finished"),
    *("completions", "text", "messages", "spans", "label", "numbers", "rationale", "origin"),
)

Line = Json


def generate(config: Config, out: Path, say: Callable[[str], None]) -> int:
    """Draw config.sampling.n completions of each prompt of data.train and write them to `out`; returns the exit code.

    What a stopped or killed command left behind is gone on from if it was made with the same settings, weights and
    prompts, and begun anew otherwise; the file comes out the same either way. Raises ValueError for what the user
    can cure.
    """
    sampling, n = build.sampling(config), config.sampling.n
    check_request([], sampling, n, False)
    if out.suffix != ".jsonl":
        raise ValueError(f"out={out}: must end in .jsonl")
    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    pretrained = build.pretrained(config)
    tokenizer = pretrained.tokenizer()
    # every row of data.train is a prompt: nothing is learnt, so nothing is held out
    data = replace(config.data, heldout=None, heldout_fraction=0.0)
    prompts = load_prompts(data, tokenizer, config.sampling.max_new_tokens, config.seed)
    say(prompts.audit.lines()[0])
    try:
        with Signals() as signals:
            model = pretrained.model()
            size = model.get_input_embeddings().weight.shape[0]
            check_tokens(f"model {pretrained.name}", tokenizer, size, (row.token_ids for row in prompts.train))
            work = _Work(config, out, model, tokenizer, prompts.train, sampling, signals.check, say)
            try:
                work.run()
            finally:
                work.close()
    except Stopped as stop:
        say(f"{stop}; what is done is kept, the same command goes on (exit code {stop.code})")
        return stop.code
    except EngineFailed as error:
        say(f"stopped: {error}")
        return 1
    for line in work.summary().lines():
        say(line)
    say(f"written {out}")
    return 0


class _Work:
    """The chunks of one file."""

    def __init__(
        self,
        config: Config,
        out: Path,
        model: Any,
        tokenizer: Tokenizer,
        prompts: Sequence[PromptRow],
        sampling: Sampling,
        check: Callable[[], None],
        say: Callable[[str], None],
    ):
        self.config = config
        self.out = out
        self.partial = out.with_name(f"{out.name}.partial")
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.sampling = sampling
        self.check = check
        self.say = say
        self._rollout: Rollout | None = None
        self._rewards: Rewards | None = None

    def run(self) -> None:
        """Every chunk that is not there yet, then the file."""
        precision = self._begin()
        paths = [self.partial / f"{i:05d}.jsonl" for i in range(-(-len(self.prompts) // CHUNK_PROMPTS))]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        if len(missing) < len(paths):
            self.say(f"going on: {len(paths) - len(missing)} of {len(paths)} parts are there")
        if missing:
            self._start(precision)
        start = shown = time.monotonic()
        for done, i in enumerate(missing):
            now = time.monotonic()
            if done and now - shown > 10:
                shown = now
                left = (now - start) / done * (len(missing) - done)
                self.say(f"part {i} of {len(paths)}, {left:.0f} s left")
            self.check()
            write_lines(paths[i], map(_json, self.chunk(i)))
        write_lines(self.out, (line for path in paths for line in path.read_text(encoding="utf-8").splitlines()))
        self.close()
        shutil.rmtree(self.partial)

    def chunk(self, number: int) -> Iterator[Line]:
        """The lines of the prompts of a chunk. Its draws depend on its number and the place of a prompt in it, so that
        what is done again comes out the same."""
        assert self._rollout is not None
        rows = self.prompts[number * CHUNK_PROMPTS : (number + 1) * CHUNK_PROMPTS]
        ids = [row.token_ids for row in rows]
        groups = self._rollout.generate(ids, self.sampling.at(number), self.config.sampling.n)
        samples = [(row, k, c) for row, group in zip(rows, groups, strict=True) for k, c in enumerate(group)]
        texts = [self.tokenizer.decode(c.token_ids, skip_special_tokens=True) for _, _, c in samples]
        scores = self._score(samples, texts)
        for place, ((row, k, completion), text) in enumerate(zip(samples, texts, strict=True)):
            yield self._line(row, k, completion, text, None if scores is None else scores[place])

    def close(self) -> None:
        """End the engine and the rewards' processes."""
        rollout, rewards, self._rollout, self._rewards = self._rollout, self._rewards, None, None
        try:
            if rollout is not None:
                rollout.close()
        finally:
            if rewards is not None:
                rewards.close()

    def summary(self) -> Summary:
        """What stands in the file."""
        with self.out.open(encoding="utf-8") as stream:
            return summarise(map(json.loads, stream))

    def _begin(self) -> torch.dtype:
        """Keep the parts of the same work, forget those of other work; returns the precision. What auto found at the
        first start holds: a second measurement may come out otherwise."""
        tree = OmegaConf.to_container(self.config.tree, resolve=True)
        assert isinstance(tree, dict)
        sources = hashlib.sha256("\n".join(row.source for row in self.prompts).encode()).hexdigest()
        key = {
            "weights": weights_hash(self.model),
            "prompts": prompts_fingerprint(self.prompts),
            "sources": sources,
            "chunk_prompts": CHUNK_PROMPTS,
            **{name: tree.get(name) for name in ("seed", "sampling", "rollout", "reward")},
            "precision": self.config.trainer.precision,
        }
        key = json.loads(json.dumps(key, default=str))
        path = self.partial / "key.json"
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if old["key"] == key:
                return getattr(torch, old["found_precision"])
            self.say(f"{self.partial} was made with other settings, weights or prompts; it is begun anew")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        precision, _ = pick_precision(self.config.trainer.precision, pick_device())
        found = {"key": key, "found_precision": str(precision).removeprefix("torch.")}
        write_lines(path, [json.dumps(found, indent=1)])
        return precision

    def _start(self, precision: torch.dtype) -> None:
        device = pick_device()
        model = self.model.to(device)
        # a model that is kept in bfloat16 computes in float32 only with weights in it
        policy = Policy(model.float() if precision == torch.float32 else model, "padded")
        policy.eval()

        def autocast() -> torch.autocast:
            return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)

        if self.config.reward:
            node = OmegaConf.to_container(self.config.reward, resolve=True)
            assert isinstance(node, dict)
            self._rewards = components(
                {str(name): part for name, part in node.items()},
                RewardHost(
                    policy=policy,
                    tokenizer=self.tokenizer,
                    device=device,
                    autocast=autocast,
                    micro_batch_tokens=self.config.trainer.micro_batch_tokens,
                    check=self.check,
                    say=self.say,
                ),
            )
        directory = self.partial / "rollout"
        directory.mkdir(exist_ok=True)
        host = Host(
            policy,
            self.tokenizer,
            directory,
            str(precision).removeprefix("torch."),
            autocast=autocast,
            check=self.check,
            say=self.say,
        )
        self._rollout = build.rollout(self.config, host)

    def _score(
        self, samples: Sequence[tuple[PromptRow, int, Completion]], texts: Sequence[str]
    ) -> Sequence[np.ndarray] | None:
        """Rewards [N, K] of the samples, None if there are none to be had."""
        if self._rewards is None:
            return None
        conversations = [
            Conversation(
                prompt=row.text,
                completion=text,
                finished=completion.finished,
                messages=row.messages,
                prompt_ids=row.token_ids,
                token_ids=completion.token_ids,
                fields=row.fields,
            )
            for (row, _, completion), text in zip(samples, texts, strict=True)
        ]
        return list(self._rewards.score(conversations))

    def _line(self, row: PromptRow, k: int, completion: Completion, text: str, rewards: np.ndarray | None) -> Line:
        line: Line = {
            "source": row.source,
            "prompt": self._prompt(row),
            "prompt_ids": list(row.token_ids),
            "sample": k,
            "completion": text,
            "token_ids": list(completion.token_ids),
            "stop": completion.stop,
            "finished": completion.finished,
            "logps": None if completion.logps is None else [_number(x) for x in completion.logps],
        }
        if rewards is not None:
            assert self._rewards is not None
            line["rewards"] = dict(zip(self._rewards.names, map(_number, rewards), strict=True))
            # a sum in which a part is missing is missing
            line["score"] = _number(float(rewards @ self._rewards.weights))
        return line | {key: v for key, v in row.fields.items() if key not in line and key not in _OF_ANOTHER}

    def _prompt(self, row: PromptRow) -> Any:
        """The prompt as data sets write it; of a row that came as tokens the text of these."""
        if row.messages is not None:
            return list(row.messages)
        if row.text and tuple(prompt_ids(self.tokenizer, row.text)) == row.token_ids:
            return row.text
        return self.tokenizer.decode(row.token_ids, skip_special_tokens=False)


@dataclass(frozen=True)
class Summary:
    """What came of it: rewards by component, and "score", each a list over prompts of lists over samples."""

    num_prompts: int
    num_samples: int
    num_finished: int
    num_tokens: int
    rewards: Mapping[str, list[list[float | None]]]

    def lines(self) -> list[str]:
        """For people."""
        out = [
            f"generated {self.num_samples} samples of {self.num_prompts} prompts: "
            f"{self.num_finished / self.num_samples:.1%} finished, {self.num_tokens / self.num_samples:.1f} tokens each"
        ]
        for name, groups in self.rewards.items():
            values = [value for group in groups for value in group]
            missing = values.count(None)
            if missing == len(values):
                out.append(f"{name}: every one is missing")
                continue
            line = f"{name}: mean {mean_reward_interval(groups)}"
            if set(values) <= {0, 1}:
                right = [[value == 1 for value in group] for group in groups]
                most = min(map(len, groups))
                line += "".join(f", pass@{k} {pass_at_k_interval(right, k)}" for k in dict.fromkeys((1, most)))
            out.append(line + (f", {missing} of {len(values)} missing" if missing else ""))
        return out


def summarise(lines: Iterator[Line]) -> Summary:
    """The summary of the lines of a file, the samples of a prompt together."""
    counts = {"num_prompts": 0, "num_samples": 0, "num_finished": 0, "num_tokens": 0}
    rewards: dict[str, list[list[float | None]]] = {}
    for line in lines:
        first = line["sample"] == 0
        counts["num_prompts"] += first
        counts["num_samples"] += 1
        counts["num_finished"] += line["finished"]
        counts["num_tokens"] += len(line["token_ids"])
        if "score" not in line:
            continue
        values = {f"reward {name}": value for name, value in line["rewards"].items()} | {"score": line["score"]}
        for name, value in values.items():
            groups = rewards.setdefault(name, [])
            if first:
                groups.append([])
            groups[-1].append(value)
    return Summary(rewards=rewards, **counts)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _json(line: Line) -> str:
    # what has no JSON form, such as a date of a parquet file, is written in its words
    return json.dumps(line, default=str)
