"""Pair construction: each rule by hand and by the vectors, what is dropped and counted, what is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from hydra.utils import instantiate

import align
from align.data.formats import Dialogue, Tokenised, parse
from align.data.pairs import (
    AllPairs,
    Candidates,
    MaxMin,
    MinOfK,
    OneEach,
    RandomRejected,
    SweetSpot,
    Threshold,
    WpoV2,
    build_pairs,
    nearest,
    pairs_of,
)
from align.data.scored import Sample, Scored
from align.data.sources import locate, read

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "direct_public.json").read_text())
ENTRIES = [e for e in VECTORS if e["algorithm"] == "sweet_spot"]
ABCD = [{"text": text, "score": score} for score, text in enumerate("abcd")]
OPTIONS = sorted((Path(align.__file__).parent.parent / "configs" / "pairs").glob("*.yaml"))


def candidates(scores, lengths=None, seed=0) -> Candidates:
    return Candidates(np.array(scores, dtype=float), np.array(lengths or [1] * len(scores)), ("",) * len(scores), seed)


def scored(scores, texts=None, prompt="Q", **more) -> Scored:
    texts = texts or [f"answer {i}" for i in range(len(scores))]
    return Scored(prompt, tuple(Sample(s, t, **more) for s, t in zip(scores, texts, strict=True)))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_vector(entry):
    given, expected = candidates(entry["inputs"]["rewards"]), entry["expected"]
    assert given.scores.mean() == pytest.approx(expected["mu"], rel=1e-12)
    assert {a: nearest(given.scores, a) for a in expected["positions"]} == expected["positions"]
    for chosen, rejected in (("max", "mu-2sigma"), ("mu+sigma", "mu"), ("mu", "min")):
        expected_pick = (expected["positions"][chosen], expected["positions"][rejected])
        assert SweetSpot(chosen, rejected)(given) == [expected_pick]
    rule = expected["scalable_rule"]
    assert MinOfK(5)(given) == [(rule["chosen"], rule["rejected"])]


def test_three_vectors_were_found():
    assert len(ENTRIES) == 3


def test_sweet_spot_takes_the_first_of_equally_near():
    """Scores 0, 2, 0, 2: mu 1, sigma 1. mu is as far from all; mu-sigma is 0 and stands at 0 and 2."""
    given = candidates([0, 2, 0, 2])
    assert [nearest(given.scores, a) for a in ("mu", "mu-sigma", "mu+sigma", "max")] == [0, 0, 1, 1]


def test_sigma_is_the_populations():
    """0, 0, 3, 4, 4.9: mu 2.38, population sigma 2.03, sample sigma 2.27.

    mu + sigma is 4.41, nearest to 4; with the sample's sigma it would be 4.65, nearest to 4.9.
    """
    assert nearest(np.array([0.0, 0.0, 3.0, 4.0, 4.9]), "mu+sigma") == 3


def test_max_min_takes_the_first_of_ties():
    assert MaxMin()(candidates([1, 3, 0, 3, 0])) == [(1, 2)]


def test_min_of_k_sees_only_the_first_k_for_the_rejected():
    given = candidates([2, 1, 3, 0, 9])
    assert MinOfK(3)(given) == [(4, 1)]
    assert MinOfK(4)(given) == [(4, 3)]
    assert MinOfK(99)(given) == MaxMin()(given)


def test_threshold_and_all_pairs_by_hand():
    given = candidates([3, 1, 2, 1])
    assert AllPairs()(given) == [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)]  # the tie of 1 and 3 is no pair
    assert Threshold(2, "all")(given) == [(0, 1), (0, 3)]
    assert Threshold(2, "best")(given) == [(0, 1)]
    assert Threshold(2.5, "all")(given) == Threshold(2.5, "best")(given) == []


def test_threshold_counts_a_margin_that_binary_arithmetic_misses():
    assert 0.3 - 0.2 < 0.1
    assert Threshold(0.1, "all")(candidates([0.3, 0.2])) == [(0, 1)]


def test_random_rejected_never_draws_the_chosen_and_draws_all_others():
    drawn = {RandomRejected()(candidates([1, 5, 2, 3], seed=s))[0] for s in range(60)}
    assert drawn == {(1, 0), (1, 2), (1, 3)}


def test_wpo_v2_breaks_ties_by_length():
    """Top: samples 0 and 2, the shorter is 2 (10). Bottom: 1, 3, 4 of lengths 30, 12, 7: 12 is closest to 10."""
    assert WpoV2()(candidates([9, 1, 9, 1, 1], [20, 30, 10, 12, 7])) == [(2, 3)]
    assert WpoV2()(candidates([9, 1, 1], [10, 8, 12])) == [(0, 1)]  # equally close: the first


def test_one_each_draws_from_both_sides():
    drawn = {OneEach(0.5)(candidates([1, 0, 0.5, 0.2], seed=s))[0] for s in range(60)}
    assert drawn == {(0, 1), (0, 3), (2, 1), (2, 3)}
    assert OneEach(0.5)(candidates([1, 1])) == OneEach(0.5)(candidates([0, 0])) == []


@pytest.mark.parametrize("rule", [MaxMin(), SweetSpot("max", "mu-2sigma"), AllPairs(), WpoV2(), Threshold(1.0, "all")])
def test_scores_may_be_shifted(rule, rng):
    """A judge's zero means nothing."""
    for _ in range(20):
        scores = rng.integers(0, 5, 8).astype(float)
        assert rule(candidates(scores)) == rule(candidates(scores - 7))


def test_the_rules_of_the_paper_are_different_strategies(rng):
    """Standard normal scores: how bad the rejected sample is when 5 or 400 samples are drawn.

    Expected minimum of 5: -1.163. The expected minimum of 400 is -2.97, so max/min goes on to worse rejected samples
    as n grows; the worst of the first 5 does not; mu-2sigma converges to -2, which is not -1.16.
    """
    means = {}
    for n in (5, 400):
        draws = rng.normal(size=(4000, n))
        for rule in (MaxMin(), MinOfK(5), SweetSpot("max", "mu-2sigma")):
            picked = [scores[rule(candidates(scores))[0][1]] for scores in draws]
            means[type(rule).__name__, n] = np.mean(picked)
    # the standard deviation of a minimum is below 0.7, so four standard errors of 4000 draws are below 0.045
    assert means["MaxMin", 5] == pytest.approx(-1.163, abs=0.045)
    assert means["MinOfK", 400] == pytest.approx(-1.163, abs=0.045)
    assert means["MaxMin", 400] == pytest.approx(-2.97, abs=0.045)
    assert means["SweetSpot", 400] == pytest.approx(-2.0, abs=0.045)


# ---------------------------------------------------------------------- dropping and counting


def test_row_by_hand():
    rows, account = pairs_of(
        [Scored("Q", (Sample(0.5, "no", origin="on_policy", finished=False), Sample(2.0, "yes", origin="off_policy")))],
        MaxMin(), None, 0,
    )  # fmt: skip
    assert rows == [
        {"prompt": "Q", "chosen": "yes", "rejected": "no", "chosen_score": 2.0, "rejected_score": 0.5,
         "origin": "mixed", "rejected_finished": False}
    ]  # fmt: skip
    assert account.origins == {"mixed": 1}


@pytest.mark.parametrize(
    "first, second, origin",
    [("on_policy", "on_policy", "on_policy"), ("off_policy", "on_policy", "mixed"), ("on_policy", "", "mixed"),
     ("", "", None)],
)  # fmt: skip
def test_origin_of_a_pair(first, second, origin):
    prompt = Scored("Q", (Sample(1.0, "a", origin=first), Sample(0.0, "b", origin=second)))
    assert pairs_of([prompt], MaxMin(), None, 0)[0][0].get("origin") == origin


@pytest.mark.parametrize(
    "prompt, rule, reason",
    [
        (scored([1.0]), MaxMin(), "fewer_than_two_scores"),
        (scored([]), MaxMin(), "fewer_than_two_scores"),
        (scored([1.0, None]), MaxMin(), "fewer_than_two_scores"),
        (scored([1.0, 0.0], ["yes", " "]), MaxMin(), "fewer_than_two_scores"),
        (scored([1.0, 1.0]), MaxMin(), "same_sample"),
        (scored([1.0, 1.0]), RandomRejected(), "equal_score"),
        (scored([1.0, 0.0], ["yes", "yes"]), MaxMin(), "equal_text"),
        (scored([1.0, 0.0], ["yes", [{"role": "assistant", "content": "yes"}]]), MaxMin(), "equal_text"),
        (scored([1.0, 1.0]), OneEach(0.5), "no_pair_by_rule"),
    ],
)
def test_prompt_without_a_pair(prompt, rule, reason):
    rows, account = pairs_of([prompt], rule, None, 0)
    assert rows == []
    assert account.as_dict()["prompts_dropped"] == {reason: 1}


def test_missing_score_is_neither_zero_nor_a_sample():
    """Were the missing score a 0, it would be the worst."""
    rows, account = pairs_of([scored([2.0, None, 1.0])], MaxMin(), None, 0)
    assert (rows[0]["chosen"], rows[0]["rejected"]) == ("answer 0", "answer 2")
    assert account.samples_unused == {"missing_score": 1}


def test_account_adds_up():
    prompts = [
        scored([3.0, 1.0, 2.0], prompt="a"),  # three pairs, one over the cap of two
        scored([1.0, 0.0, 0.0], ["x", "y", "y"], prompt="b"),  # one pair twice
        scored([1.0, None], prompt="c"),
        scored([2.0, 1.0], ["z", "z"], prompt="d"),
    ]
    rows, account = pairs_of(prompts, AllPairs(), 2, 0)
    assert len(rows) == 3
    told = account.as_dict()
    assert (told["prompts_in"], told["prompts_used"], told["pairs_proposed"], told["pairs_out"]) == (4, 2, 6, 3)
    assert told["prompts_dropped"] == {"fewer_than_two_scores": 1, "equal_text": 1}
    assert told["pairs_dropped"] == {"over_max_per_prompt": 1, "duplicate": 1, "equal_text": 1}
    assert account.lines()[1:] == [
        "pairs samples: 10 in = 9 used + 1 dropped (1 missing_score)",
        "pairs prompts: 4 in = 2 with pairs + 2 dropped (1 equal_text, 1 fewer_than_two_scores)",
        "pairs: 6 by the rule = 3 written + 3 dropped (1 duplicate, 1 equal_text, 1 over_max_per_prompt)",
    ]


def test_cap_and_draws_depend_on_seed_and_prompt_alone(rng):
    prompts = [scored(rng.normal(size=6).tolist(), prompt=f"Q{i}") for i in range(12)]
    for rule in (AllPairs(), RandomRejected()):
        forward = pairs_of(prompts, rule, 2, 5)[0]
        backward = pairs_of(prompts[::-1], rule, 2, 5)[0]
        assert sorted(map(json.dumps, forward)) == sorted(map(json.dumps, backward))
        assert pairs_of(prompts[3:4], rule, 2, 5)[0] == [r for r in forward if r["prompt"] == "Q3"]
        assert pairs_of(prompts, rule, 2, 6)[0] != forward
    for cap in (1, 2, 15, 99):
        assert len(pairs_of(prompts[:1], AllPairs(), cap, 0)[0]) == min(cap, 15)
    with pytest.raises(ValueError, match="at least 1, or null"):
        pairs_of(prompts, AllPairs(), 0, 0)


def test_prompts_of_one_run_do_not_share_their_draws():
    """One generator per prompt must not mean the same generator for each."""
    prompts = [scored([9.0, *range(8)], prompt=f"Q{i}") for i in range(20)]
    assert len({row["rejected"] for row in pairs_of(prompts, RandomRejected(), None, 0)[0]}) > 3


def test_lengths_are_tokens_only_if_all_samples_know_them():
    """Tokens say the second is shorter, characters the first."""

    def sample(text: str, tokens: int) -> Sample:
        ids = {"token_ids": [0] * (tokens + 1), "spans": [["user", 0, 1, False], ["assistant", 1, tokens + 1, True]]}
        return Sample(1.0, text, ids)

    worse = Sample(0.0, "worse", sample("", 3).tokens)
    tied = (sample("ab", 9), sample("abcdefgh", 4))
    rows, _ = pairs_of([Scored("Q", (*tied, worse))], WpoV2(), None, 0)
    assert len(rows[0]["chosen"]["token_ids"]) == 5
    rows, _ = pairs_of([Scored("Q", (*tied, Sample(0.0, "worse")))], WpoV2(), None, 0)
    assert rows[0]["chosen"] == "ab"  # a sample without tokens: all are read as text


def test_samples_that_share_no_form_are_dropped():
    only_tokens = {"token_ids": [1, 2], "spans": [["user", 0, 1, False], ["assistant", 1, 2, True]]}
    rows, account = pairs_of([Scored("Q", (Sample(1.0, "text"), Sample(0.0, tokens=only_tokens)))], MaxMin(), None, 0)
    assert rows == []
    assert account.pairs_dropped == {"different_forms": 1}


@dataclass(frozen=True)
class Backwards:
    """Somebody's own rule, with the order the wrong way round."""

    def __call__(self, candidates: Candidates) -> list[tuple[int, int]]:
        return [(int(candidates.scores.argmin()), candidates.best)]


def test_own_rule_that_prefers_the_worse_is_refused():
    with pytest.raises(ValueError, match=r"Backwards.*chose score 0.0 over 1.0"):
        pairs_of([scored([1.0, 0.0])], Backwards(), None, 0)


# ---------------------------------------------------------------------- files


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_file_to_file_and_every_row_is_a_preference_row(tmp_path):
    """Text, conversation, exact tokens and tools; each is read back by the parser of preference data."""
    tool_call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    tool_turns = [tool_call, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Three."}]
    spans = [["user", 0, 2, False], ["assistant", 2, 4, True]]
    chat = [{"role": "user", "content": "Sum?"}]
    name = write(
        tmp_path / "scored.jsonl",
        [
            {"prompt": "Q1", "completions": [{"text": "a", "score": 1}, {"text": "b", "score": 0, "finished": False}]},
            {"prompt": chat, "tools": [{"name": "add"}], "completions": [
                {"messages": tool_turns, "score": 5.0, "origin": "on_policy"}, {"text": "Four.", "score": -1}]},
            {"prompt": "Q3", "completions": [
                {"token_ids": [5, 6, 7, 8], "spans": spans, "score": 1.5, "finished": False},
                {"token_ids": [5, 6, 9, 8], "spans": spans, "text": "read me", "score": 0.5}]},
        ],
    )  # fmt: skip
    out = tmp_path / "new" / "pairs.jsonl"
    account = build_pairs([name], SweetSpot("max", "mu-2sigma"), out, 1, 0)
    assert (account.prompts_in, account.pairs_out) == (3, 3)
    rows = [row for _, row in read(locate(str(out)))]
    records = [parse(row) for row in rows]
    assert [(r["chosen_score"], r["rejected_score"]) for r in rows] == [(1, 0), (5, -1), (1.5, 0.5)]
    assert records[0].sides == {"chosen": Dialogue("Q1", "a"), "rejected": Dialogue("Q1", "b", finished=False)}
    assert records[1].origin == "mixed"
    assert records[1].sides["chosen"].completion == tuple(tool_turns)
    assert records[1].sides["chosen"].tools == ({"name": "add"},)
    assert records[1].sides["rejected"].completion == ({"role": "assistant", "content": "Four."},)
    assert records[2].sides["chosen"] == Tokenised((5, 6, 7, 8), tuple(map(tuple, spans)), "Q3", finished=False)
    assert records[2].sides["rejected"] == Tokenised((5, 6, 9, 8), tuple(map(tuple, spans)), "Q3")
    saved = json.loads((tmp_path / "new" / "pairs.account").read_text())
    assert saved == account.as_dict()
    assert saved["rule"] == "SweetSpot(chosen='max', rejected='mu-2sigma')"
    assert len(saved["sha256"][0]) == 64


def test_hybrid_data_from_two_files(tmp_path):
    """WPO's hybrid: samples of the policy and an answer of another model, scored together."""
    own = write(
        tmp_path / "own.jsonl",
        [{"prompt": p, "completions": [{"text": f"{p}{i}", "score": i} for i in range(3)]} for p in "ab"],
    )
    other = write(
        tmp_path / "other.jsonl",
        [{"prompt": "a", "completion": "strong", "score": 9}, {"prompt": "b", "completion": "weak", "score": -9}],
    )
    out = tmp_path / "pairs.jsonl"
    account = build_pairs([f"{own}@on_policy", f"{other}@off_policy"], WpoV2(), out, None, 0)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["chosen"], r["rejected"], r["origin"]) for r in rows] == [
        ("strong", "a0", "mixed"),
        ("b2", "weak", "mixed"),
    ]
    assert account.origins == {"mixed": 2}
    rows = pairs_of_file(own, tmp_path)
    assert [r["origin"] for r in rows] == ["on_policy", "on_policy"]


def pairs_of_file(name: str, directory: Path) -> list[dict]:
    out = directory / "again.jsonl"
    build_pairs([f"{name}@on_policy"], MaxMin(), out, None, 0)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_directory_of_the_output_is_a_data_set(tmp_path, monkeypatch):
    """The account beside the rows is not taken for one of them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    name = write(tmp_path / "s.jsonl", [{"prompt": "Q", "completions": ABCD}])
    build_pairs([name], AllPairs(), tmp_path / "new" / "pairs.jsonl", None, 0)
    assert len(list((tmp_path / "new").iterdir())) == 2
    assert [row["prompt"] for _, row in read(locate(str(tmp_path / "new")))] == ["Q"] * 6


def test_nothing_is_written_when_nothing_can_be_used(tmp_path):
    name = write(tmp_path / "s.jsonl", [{"prompt": "Q", "completions": [{"text": "a", "score": None}]}])
    out = tmp_path / "pairs.jsonl"
    out.write_text("before")
    with pytest.raises(ValueError, match=r"no pair from 1 prompts \(1 dropped \(1 fewer_than_two_scores\)\)"):
        build_pairs([name], MaxMin(), out, None, 0)
    assert out.read_text() == "before"


def test_output_is_whole_or_not_there(tmp_path, monkeypatch):
    name = write(tmp_path / "s.jsonl", [{"prompt": "Q", "completions": ABCD}])
    out = tmp_path / "pairs.jsonl"
    out.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(ValueError, match="No space left on device"):
            build_pairs([name], MaxMin(), out, None, 0)
    assert out.read_text() == "before"


def test_output_names_that_are_refused(tmp_path):
    name = write(tmp_path / "s.jsonl", [{"prompt": "Q", "completions": []}])
    with pytest.raises(ValueError, match="must end in .jsonl"):
        build_pairs([name], MaxMin(), tmp_path / "pairs.json", None, 0)
    with pytest.raises(ValueError, match="one of the files to read"):
        build_pairs([f"{name}@on_policy"], MaxMin(), Path(name), None, 0)


def test_every_option_makes_its_rule(tmp_path):
    name = write(tmp_path / "s.jsonl", [{"prompt": "Q", "completions": ABCD}])
    rules = {}
    for path in OPTIONS:
        rules[path.stem] = instantiate(yaml.safe_load(path.read_text()))
        assert build_pairs([name], rules[path.stem], tmp_path / "o.jsonl", None, 0).pairs_out >= 1
    assert {name: type(rule) for name, rule in rules.items()} == {
        "max_min": MaxMin, "sweet_spot": SweetSpot, "min_of_k": MinOfK, "threshold": Threshold, "all_pairs": AllPairs,
        "random_rejected": RandomRejected, "wpo_v2": WpoV2, "one_each": OneEach,
    }  # fmt: skip
    assert rules["sweet_spot"] == SweetSpot("max", "mu-2sigma")
    assert rules["min_of_k"] == MinOfK(5)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: SweetSpot("max", "mu-3sigma"), "pairs.rejected=mu-3sigma: must be one of min, mu-2sigma"),
        (lambda: SweetSpot("mu", "mu+sigma"), "pairs.chosen=mu: must be above"),
        (lambda: SweetSpot("mu", "mu"), "must be above"),
        (lambda: MinOfK(0), "pairs.k=0: must be at least 1"),
        (lambda: Threshold(0, "all"), "greater than 0"),
        (lambda: Threshold(float("nan"), "all"), "greater than 0"),
        (lambda: Threshold(1, "some"), "pairs.which=some"),
    ],
)
def test_impossible_setting(make, text):
    with pytest.raises(ValueError, match=text.replace("+", r"\+")):
        make()
