"""How long a run waits for its data: rows a CPU second when they are rendered, and of a later start from the cache.

`python -m tests.bench.data_start ROWS CHARACTERS [text|chat] [workers]` writes pairs of that size below $TMPDIR and
measures each start in a process of its own: a first start, a second one, and `datasets.map` with the three tokenizer
calls of a pair (prompt, prompt and chosen, prompt and rejected) that TRL's DPO trainer makes of a batch of rows, of
which each mask follows. Tokenizer: SmolLM2's. The numbers of docs/benchmarks_data.md are its output.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_WORDS = 5000  # different words of the texts


def write_pairs(path: Path, rows: int, characters: int, kind: str) -> None:
    """Pairs of random words: three tenths of the characters are the prompt, the rest two unequal answers."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(_WORDS)]

    def text(size: float) -> str:
        return " ".join(rng.choices(words, k=max(1, round(size / 6.5))))

    with path.open("w") as file:
        for i in range(rows):
            prompt = f"Question {i}: {text(characters * 0.3)}"
            answers = [text(characters * 0.35 * rng.uniform(0.6, 1.4)) for _ in range(2)]
            row: dict[str, object] = {"prompt": prompt, "chosen": f" {answers[0]}", "rejected": f" {answers[1]}"}
            if kind == "chat":
                row = {"prompt": [{"role": "user", "content": prompt}]}
                row |= {
                    name: [{"role": "assistant", "content": said}]
                    for name, said in zip(("chosen", "rejected"), answers, strict=True)
                }
            file.write(json.dumps(row) + "\n")


def align_start(file: Path, kind: str, workers: int) -> int:
    """What a run does with its data before its first batch, and that batch; the number of examples."""
    from align.config import compose
    from align.data.cache import cached
    from align.data.stored import largest_tokens
    from align.data.wanted import Wanted
    from align.models.pretrained import smollm2
    from align.packing import pack
    from align.trainers.loop import token_plan

    words = ["recipe=dpo", f"data.train={file}", "data.max_tokens=8192", "data.heldout_fraction=0.01"]
    words += [f"data.workers={workers}", f"data.cache_dir={file.parent / 'cache'}"]
    words += ["data.text=plain"] if kind == "text" else []
    data = cached(compose(words).data, smollm2().tokenizer(), Wanted(), 0, lambda line: None)
    assert data.hashes["data.train"]
    for examples in (data.train, data.heldout):
        largest_tokens(examples)
        token_plan(examples, "shared", 1 << 20)
    pack(data.train[:32], "shared")
    return len(data.train) + len(data.heldout)


def datasets_map(file: Path, kind: str, workers: int) -> int:
    """The same rows by datasets.map without its cache, a batch of 1000 rows to a call."""
    import datasets

    from align.models.pretrained import smollm2

    tokenizer = smollm2().tokenizer()

    def texts(batch: dict[str, list]) -> list[tuple[str, str, str]]:
        rows = zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True)
        if kind == "text":
            return [(p, p + c, p + r) for p, c, r in rows]

        def said(messages: list, more: bool) -> str:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)

        return [(said(p, True), said(p + c, False), said(p + r, False)) for p, c, r in rows]

    def tokenised(batch: dict[str, list]) -> dict[str, list]:
        prompts, chosen, rejected = (tokenizer(list(part)).input_ids for part in zip(*texts(batch), strict=True))
        out: dict[str, list] = {"prompt_ids": prompts}
        for name, ids in (("chosen", chosen), ("rejected", rejected)):
            out[f"{name}_ids"] = [whole[len(head) :] for head, whole in zip(prompts, ids, strict=True)]
        return out

    data = datasets.Dataset.from_json(str(file), cache_dir=str(file.parent / "datasets"))
    made = data.map(tokenised, batched=True, num_proc=workers if workers > 1 else None, load_from_cache_file=False)
    return len(made)


def measured(what: str, file: Path, kind: str, workers: int) -> dict[str, float]:
    """CPU seconds of a process and its children, and the most memory that one of them had, GiB."""
    own = [sys.executable, "-m", "tests.bench.data_start", what, str(file), kind, str(workers)]
    done = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str]) -> None:
    """A line of the table for each way, or one way in this process."""
    ways = {"align": align_start, "datasets": datasets_map}
    if words[0] in ways:
        from align.models.pretrained import smollm2

        smollm2().tokenizer()  # converted once; not what is measured
        start, at = time.perf_counter(), _spent()
        count = ways[words[0]](Path(words[1]), words[2], int(words[3]))
        most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        told = {"rows": count, "cpu_s": _spent() - at, "wall_s": time.perf_counter() - start, "gib": most / 2**20}
        print(json.dumps(told), flush=True)
        return
    rows, characters = int(words[0]), int(words[1])
    kind, workers = (words[2:] + ["text"])[0], int((words[3:] + ["1"])[0])
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "pairs.jsonl"
        write_pairs(file, rows, characters, kind)
        for name, way in (("first start", "align"), ("second start", "align"), ("datasets.map", "datasets")):
            told = measured(way, file, kind, workers)
            rate = told["rows"] / told["cpu_s"]
            print(
                f"| {rows} | {characters} | {kind} | {workers} | {name} | {told['cpu_s']:.1f} | {rate:.0f} | "
                f"{told['wall_s']:.0f} | {told['gib']:.2f} |",
                flush=True,
            )


def _spent() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main(sys.argv[1:])
