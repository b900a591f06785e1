"""Each kind of finding, on rows built by hand: what makes it, what does not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from align.data.audit import Audit, SplitAudit
from align.data.chat import Rendering, Span
from align.data.examples import Loaded
from align.data.load import Data, load
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from align.prepare.check import Finding, check, failed, lines, target_runs
from align.types import Example, Prompt, Row
from tests.data.helpers import settings

TOKENIZER = byte_tokenizer()
END = "<|im_end|>"


def ids(text: str, tokenizer=TOKENIZER) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def rendering(*parts: tuple[str, str, int | None, bool], notes=(), tokenizer=TOKENIZER) -> Rendering:
    """parts: text, role, message, target."""
    spans, tokens, targets = [], [], []
    for text, role, message, target in parts:
        part = ids(text, tokenizer)
        spans.append(Span(len(tokens), len(tokens) + len(part), role, message, target))
        tokens += part
        targets += [target] * len(part)
    row = Row(np.array(tokens, dtype=np.int32), np.array(targets, dtype=bool))
    prompt = int(np.argmax(row.targets)) if row.targets.any() else len(tokens)
    return Rendering(row, tuple(spans), prompt, tuple(notes))


def chat(question: str, answer: str, end: str = END, notes=(), tokenizer=TOKENIZER) -> Rendering:
    """A question and its answer in ChatML, the answer and its end of turn being targets."""
    return rendering(
        ("<|im_start|>user\n", "template", 0, False),
        (question, "user", 0, False),
        (f"{END}\n<|im_start|>assistant\n", "template", 1, False),
        (answer + end, "assistant", 1, True),
        notes=notes,
        tokenizer=tokenizer,
    )


def prompt_of(r: Rendering) -> tuple[int, ...]:
    return tuple(r.row.token_ids[: r.prompt_length].tolist())


def pair(line: int, chosen: Rendering, rejected: Rendering, file: str = "pairs.jsonl", **changes) -> Loaded:
    return replace(
        Loaded(
            source=f"{file}:{line}",
            kind="pair",
            renderings={"chosen": chosen, "rejected": rejected},
            finished={"chosen": True, "rejected": True},
            truncated=0,
            prompts={"chosen": prompt_of(chosen), "rejected": prompt_of(rejected)},
            examples=(Example((chosen.row, rejected.row), f"{file}:{line}", Prompt(prompt_of(chosen), "")),),
        ),
        **changes,
    )


def single(line: int, r: Rendering, label: bool | None = None, file: str = "rows.jsonl", **changes) -> Loaded:
    return replace(
        Loaded(
            source=f"{file}:{line}",
            kind="single" if label is None else "labelled",
            renderings={"row": r},
            finished={"row": True},
            truncated=0,
            prompts={"row": prompt_of(r)},
            examples=(Example((r.row,), f"{file}:{line}", Prompt(prompt_of(r), ""), label=label),),
        ),
        **changes,
    )


def beginning(loaded: Loaded, *prompt: int) -> Loaded:
    """The row as if its prompt, tokenised alone, were these tokens."""
    examples = tuple(replace(e, prompt=Prompt(prompt, "")) for e in loaded.examples)
    return replace(loaded, examples=examples, prompts=dict.fromkeys(loaded.prompts, prompt))


def split(rows: list[Loaded], dropped: list[tuple[int, str, str]] = (), file: str = "pairs.jsonl") -> SplitAudit:
    audit = SplitAudit(sources=[file], sha256=["0"], rows_in=len(rows) + len(dropped), rows_kept=len(rows))
    for line, reason, detail in dropped:
        audit.drop(f"{file}:{line}", reason, detail)
    return audit


def data(train: list[Loaded], heldout: list[Loaded] = (), dropped=()) -> Data:
    examples = [[e for row in rows for e in row.examples] for rows in (train, heldout)]
    return Data(*examples, Audit(split(train, dropped), split(heldout)), list(train), list(heldout))


def findings(*rows: Loaded, heldout: list[Loaded] = (), dropped=(), config=None) -> list[Finding]:
    """Findings without the figures."""
    found = check(data(list(rows), heldout, dropped), TOKENIZER, config)
    return [finding for finding in found if finding.severity != "figure"]


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, [(f.kind, f.detail) for f in found]
    return found[0]


def figure(found: list[Finding], kind: str, split: str = "train") -> Finding:
    return only([f for f in found if f.kind == kind and f.split == split and f.severity == "figure"])


GOOD = pair(1, chat("Name a fish.", "Cod."), chat("Name a fish.", "Oak."))


def test_good_rows_have_no_findings():
    other = pair(2, chat("Name a tree.", "Oak."), chat("Name a tree.", "Cod."))
    assert findings(GOOD, other) == []
    assert not failed(check(data([GOOD, other]), TOKENIZER))


# ---------------------------------------------------------------------- what is missing


def test_each_dropped_row_is_a_finding_with_its_reason():
    found = findings(GOOD, dropped=[(2, "prompt_too_long", "130 tokens"), (3, "invalid_json", "column 4")])
    assert [(f.kind, f.severity, f.line, f.detail) for f in found] == [
        ("dropped", "error", 2, "prompt_too_long: 130 tokens"),
        ("dropped", "error", 3, "invalid_json: column 4"),
    ]
    assert found[0].as_dict()["row"] == 2
    assert found[0].as_dict()["file"] == "pairs.jsonl"


@pytest.mark.parametrize("reason", ["identical", "dead_pair"])
def test_a_row_dropped_as_dead_is_also_a_dead_pair(reason):
    found = findings(GOOD, dropped=[(2, reason, "the same tokens")])
    assert [(f.kind, f.line) for f in found] == [("dropped", 2), ("dead_pair", 2)]


@pytest.mark.parametrize(
    "on_bad_row, overlong, fraction, reason, expected",
    [
        ("error", "error", 0.5, "invalid_json", ["dropped error"]),
        ("drop", "error", 0.5, "invalid_json", ["dropped warning"]),
        ("drop", "error", 0.4, "invalid_json", ["dropped_fraction error", "dropped warning"]),
        ("error", "error", 0.5, "too_long", ["dropped warning"]),
        ("error", "error", 0.4, "too_long", ["dropped_fraction error", "dropped warning"]),
        ("error", "drop", 0.0, "too_long", ["dropped warning"]),
        ("error", "truncate_turns", 0.0, "prompt_too_long", ["dropped warning"]),
        ("error", "error", 0.0, "undesirable", ["dropped note"]),
    ],
)
def test_the_settings_say_which_rows_may_be_dropped(on_bad_row, overlong, fraction, reason, expected):
    config = settings("pairs.jsonl", on_bad_row=on_bad_row, overlong=overlong, max_bad_fraction=fraction)
    found = findings(GOOD, dropped=[(2, reason, "why")], config=config)
    assert [f"{f.kind} {f.severity}" for f in found] == expected


def test_rows_kept_back_count_for_the_fraction_of_dropped_ones():
    """1 of 4 rows is dropped, 1 held out."""
    loaded = data([GOOD, replace(GOOD, source="pairs.jsonl:2")], [pair(3, chat("A", "B"), chat("A", "C"))])
    loaded.audit.train.drop("pairs.jsonl:4", "too_long", "why")
    loaded.audit.train.rows_in += 1
    for heldout, fraction, expected in ((None, 0.25, False), (None, 0.24, True), ("held.jsonl", 0.25, True)):
        config = settings("pairs.jsonl", heldout=heldout, max_bad_fraction=fraction)
        assert ("dropped_fraction" in [f.kind for f in check(loaded, TOKENIZER, config)]) == expected


def test_a_row_that_is_neither_kept_nor_dropped_is_an_error():
    loaded = data([GOOD, replace(GOOD, source="pairs.jsonl:2")])
    loaded.train_rows.pop()
    assert "conservation" in [f.kind for f in check(loaded, TOKENIZER) if f.severity == "error"]


def test_a_file_without_rows_is_an_error():
    assert [f.kind for f in findings()] == ["no_rows"]
    kept_back = data([GOOD])
    assert not failed(check(kept_back, TOKENIZER))
    kept_back.audit.heldout.sources = ["other.jsonl"]
    found = [f for f in check(kept_back, TOKENIZER) if f.severity == "error"]
    assert (only(found).kind, only(found).split) == ("no_rows", "heldout")


def test_cut_turns_are_a_warning():
    finding = only(findings(replace(GOOD, truncated=2)))
    assert (finding.kind, finding.severity, finding.line) == ("truncated", "warning", 1)
    assert finding.detail.startswith("2 turns were cut")


# ---------------------------------------------------------------------- pairs that teach nothing


def test_same_tokens_are_a_dead_pair():
    dead = pair(4, chat("Hi", "Cod."), chat("Hi", "Cod."))
    finding = only(findings(dead))
    assert (finding.kind, finding.severity, finding.line) == ("dead_pair", "error", 4)


def test_same_tokens_with_other_weights_are_not_dead_but_named():
    r = chat("Hi", "Cod.")
    heavy = replace(r, row=replace(r.row, weights=np.full(len(r.row.targets), 2, np.float32)))
    finding = only(findings(pair(1, r, heavy)))
    assert (finding.kind, finding.severity) == ("dead_pair", "warning")
    dead = only(findings(pair(1, heavy, replace(heavy, row=replace(heavy.row, weights=heavy.row.weights.copy())))))
    assert dead.severity == "error"


def trajectory(result: str) -> Rendering:
    return rendering(
        ("<|im_start|>user\nAdd", "user", 0, False),
        (f"{END}\n<|im_start|>assistant\n", "template", 1, False),
        (f"1+1{END}", "assistant", 1, True),
        (f"\n<|im_start|>tool\n{result}{END}\n<|im_start|>assistant\n", "tool", 2, False),
        (f"2{END}", "assistant", 3, True),
    )


def test_same_targets_around_other_tool_results_are_a_warning():
    finding = only(findings(pair(1, trajectory("2"), trajectory("3"))))
    assert (finding.kind, finding.severity) == ("dead_pair", "warning")
    assert "same targets" in finding.detail


def test_one_answer_to_two_prompts_is_a_pair():
    """Multi-instruction preference: the prompts differ and the targets are the same, on purpose."""
    assert findings(pair(1, chat("Name a fish.", "Cod."), chat("Name a tree.", "Cod."))) == []


# ---------------------------------------------------------------------- how turns end


def test_a_finished_completion_without_its_end_of_turn_is_an_error():
    cut = chat("Name a fish.", "Cod, and al", end="")
    finding = only(findings(pair(7, chat("Name a fish.", "Cod."), cut)))
    assert (finding.kind, finding.severity, finding.line) == ("lost_terminator", "error", 7)
    assert "rejected ends with ', and al'" in finding.detail
    assert END in finding.detail


def test_an_end_of_turn_that_is_no_target_is_lost():
    r = rendering(("<|im_start|>", "template", None, False), ("Hi", "text", None, True), (END, "template", None, False))
    assert only(findings(single(1, r))).kind == "lost_terminator"


def test_a_declared_cut_is_a_note():
    cut = chat("Name a fish.", "Cod, and al", end="")
    row = pair(1, chat("Name a fish.", "Cod."), cut, finished={"chosen": True, "rejected": False})
    finding = only(findings(row))
    assert (finding.kind, finding.severity) == ("unfinished", "note")
    assert "rejected_finished" in finding.detail
    assert not failed([finding])


def test_a_turn_in_the_middle_without_end_is_a_warning():
    r = trajectory("2")
    inner = [
        ("<|im_start|>user\nAdd", "user", 0, False),
        (f"{END}\n<|im_start|>assistant\n", "template", 1, False),
        ("1+1", "assistant", 1, True),
        (f"{END}\n<|im_start|>tool\n2{END}\n<|im_start|>assistant\n", "tool", 2, False),
        (f"2{END}", "assistant", 3, True),
    ]
    assert findings(single(1, r)) == []
    finding = only(findings(single(1, rendering(*inner))))
    assert (finding.kind, finding.severity) == ("lost_terminator", "warning")
    user = [*inner[:2], ("1+1" + END, "assistant", 1, True), ("\nMore", "user", 2, True), inner[3], inner[4]]
    assert findings(single(1, rendering(*user))) == []  # data.target_roles: what a user says has no end of turn
    # a control token is an end, as that of a call can be
    call = [*inner[:2], ("1+1<|pad|>", "assistant", 1, True), *inner[3:]]
    assert findings(single(1, rendering(*call))) == []
    # a part of a message that is no target is not its end
    inner[3] = ("quietly", "assistant", 1, False)
    assert findings(single(1, rendering(*inner))) == []


def test_an_end_of_turn_of_several_tokens_is_found():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '[END]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )

    def row(end: str) -> Loaded:
        return single(
            1, rendering(("user: Hi[END]\nassistant: ", "template", None, False), ("Yo" + end, "text", 1, True))
        )

    assert not failed(check(data([row("[END]")]), tokenizer))
    assert [f.kind for f in check(data([row("[EN")]), tokenizer) if f.severity == "error"] == ["lost_terminator"]


def test_no_targets_is_an_error():
    r = rendering(("<|im_start|>user\nHi", "user", 0, False))
    finding = only(findings(single(1, r)))
    assert (finding.kind, finding.severity) == ("no_targets", "error")


# ---------------------------------------------------------------------- where the prompt ends


def test_a_row_that_begins_otherwise_than_generation_is_an_error():
    row = single(3, chat("Hi", "Yo"))
    expected = prompt_of(row.renderings["row"])
    finding = only(findings(beginning(row, *expected[:-2], *ids("X"), expected[-1])))
    assert (finding.kind, finding.severity, finding.line) == ("boundary", "error", 3)
    assert f"from token {len(expected) - 1} the prompt alone is 'X\\n' and the row 't\\n'" in finding.detail
    longer = only(findings(beginning(row, *expected, *ids("<think>"))))
    assert f"from token {len(expected) + 1} the prompt alone is '<think>'" in longer.detail
    assert f"({len(expected) + 7} and {len(expected)} tokens)" in longer.detail


def test_the_proof_is_counted_and_each_sequence_has_its_own_prompt():
    as_tokens = pair(2, chat("A", "B"), chat("A", "C"), prompts={"chosen": None, "rejected": None})
    two_prompts = pair(3, chat("Name a fish.", "Cod."), chat("Name a tree.", "Cod."))
    proof = figure(check(data([GOOD, as_tokens, two_prompts]), TOKENIZER), "boundary_proof")
    assert dict(proof.numbers) == {"sequences": 6, "proved": 4, "given_as_tokens": 2}
    one_prompt = replace(two_prompts, prompts=dict.fromkeys(("chosen", "rejected"), two_prompts.prompts["chosen"]))
    proof = figure(check(data([one_prompt]), TOKENIZER), "boundary_proof")
    assert proof.numbers["proved"] == 1
    assert "rejected does not begin as generation would" in only(findings(one_prompt)).detail


def test_plain_text_without_a_prompt_begins_with_bos():
    r = rendering(("<|im_start|>", "template", None, False), (f"Once.{END}", "text", None, True))
    assert findings(beginning(single(1, r))) == []
    longer = rendering(("<|im_start|>So", "template", None, False), (f"Once.{END}", "text", None, True))
    assert only(findings(beginning(single(1, longer)))).kind == "boundary"


def test_targets_of_the_user_stand_inside_the_prompt():
    """data.target_roles=[user, assistant]: generation starts after the first target."""
    r = chat("Hi", "Yo")
    start = r.spans[1].start
    targets = r.row.targets.copy()
    targets[start : r.spans[1].end] = True
    spans = tuple(replace(s, target=s.target or s.role == "user") for s in r.spans)
    both = Rendering(replace(r.row, targets=targets), spans, start, ())
    assert findings(beginning(single(1, both), *prompt_of(r))) == []
    assert only(findings(beginning(single(1, both), *prompt_of(r)[:-1], 1))).kind == "boundary"


def test_bos_twice_is_an_error():
    r = chat("Hi", "Yo")
    doubled = Row(np.insert(r.row.token_ids, 0, TOKENIZER.bos_token_id), np.insert(r.row.targets, 0, False))
    spans = (Span(0, 1, "template", None, False), *(replace(s, start=s.start + 1, end=s.end + 1) for s in r.spans))
    finding = only(findings(single(1, Rendering(doubled, spans, r.prompt_length + 1, ()))))
    assert (finding.kind, finding.severity) == ("bos_twice", "error")


# ---------------------------------------------------------------------- rows compared with each other


def test_a_duplicate_names_the_earlier_row():
    finding = only(findings(GOOD, replace(GOOD, source="pairs.jsonl:9")))
    assert (finding.kind, finding.severity, finding.line) == ("duplicate", "warning", 9)
    assert "pairs.jsonl:1" in finding.detail


def test_the_same_tokens_with_other_targets_are_no_duplicate():
    r = trajectory("2")
    first_turn = r.row.targets.copy()
    first_turn[np.flatnonzero(np.diff(first_turn.astype(int)) == 1)[1] + 1 :] = False
    other = replace(r, row=replace(r.row, targets=first_turn))
    assert findings(single(1, r), single(2, other)) == []


def test_a_swapped_pair_contradicts():
    swapped = pair(5, GOOD.renderings["rejected"], GOOD.renderings["chosen"])
    finding = only(findings(GOOD, swapped))
    assert (finding.kind, finding.severity, finding.line) == ("contradiction", "error", 5)
    assert "pairs.jsonl:1" in finding.detail


def test_a_rejected_answer_may_be_chosen_against_a_worse_one():
    middle = GOOD.renderings["rejected"]
    assert findings(GOOD, pair(2, middle, chat("Name a fish.", "No."))) == []


def test_one_row_with_both_labels_contradicts():
    good, bad = single(1, chat("Hi", "Yo"), True), single(2, chat("Hi", "Yo"), False)
    assert only(findings(good, bad)).kind == "contradiction"
    assert sorted(f.kind for f in findings(good, replace(good, source="rows.jsonl:2"))) == [
        "duplicate",
        "label_imbalance",
    ]


def test_held_out_rows_and_prompts_that_are_trained_on_leak():
    held = pair(1, chat("Name a fish.", "Cod."), chat("Name a fish.", "Elm."), file="held.jsonl")
    finding = only(findings(GOOD, heldout=[held]))
    assert (finding.kind, finding.severity, finding.split, finding.file) == ("leak", "error", "heldout", "held.jsonl")
    assert "chosen is also trained on, at pairs.jsonl:1" in finding.detail
    prompt_only = pair(1, chat("Name a fish.", "Eel."), chat("Name a fish.", "Elm."), file="held.jsonl")
    finding = only(findings(GOOD, heldout=[prompt_only]))
    assert (finding.kind, finding.severity) == ("leak", "warning")
    other = pair(1, chat("Name a bird.", "Owl."), chat("Name a bird.", "Elm."), file="held.jsonl")
    assert findings(GOOD, heldout=[other]) == []


def test_rows_without_a_prompt_do_not_leak_by_it():
    def row(text: str, line: int) -> Loaded:
        r = rendering(("<|im_start|>", "template", None, False), (text + END, "text", None, True))
        return beginning(single(line, r))

    assert findings(row("Once.", 1), heldout=[row("Twice.", 2)]) == []


# ---------------------------------------------------------------------- the split as a whole


def pairs(lengths: list[tuple[int, int]]) -> list[Loaded]:
    """Pairs of that many target tokens, the end of turn being one of them; none like another."""
    return [pair(i, chat(f"Q{i}", "a" * (c - 1)), chat(f"Q{i}", "b" * (r - 1))) for i, (c, r) in enumerate(lengths, 1)]


def test_lengths_by_hand():
    """Ratios 4, 1, 1/2: their geometric mean is 2^(1/3)."""
    empty = pair(9, chat("Q", "", end=""), chat("Q", "b"))  # an error of its own; its ratio is no number
    numbers = figure(check(data([*pairs([(8, 2), (3, 3), (2, 4)]), empty]), TOKENIZER), "lengths").numbers
    assert numbers["pairs"] == 3
    assert (numbers["chosen_mean"], numbers["rejected_mean"]) == pytest.approx((13 / 3, 3.0))
    assert (numbers["chosen_median"], numbers["rejected_median"]) == (3, 3)
    assert numbers["chosen_longer"] == pytest.approx(1 / 3)
    assert numbers["ratio"] == pytest.approx(2 ** (1 / 3))
    assert 0.5 <= numbers["ratio_low"] < numbers["ratio"] < numbers["ratio_high"] <= 4


def test_longer_chosen_answers_are_a_warning():
    finding = only(findings(*pairs([(8, 4)] * 10)))
    assert (finding.kind, finding.severity, finding.line) == ("length_skew", "warning", None)
    assert (finding.numbers["ratio"], finding.numbers["ratio_low"], finding.numbers["ratio_high"]) == pytest.approx(
        (2, 2, 2)
    )
    assert "longer" in finding.detail
    assert "shorter than rejected" in only(findings(*pairs([(4, 8)] * 10))).detail


@pytest.mark.parametrize(
    "lengths",
    [
        [(8, 4)] * 9,  # too few for an interval
        [(11, 10)] * 10,  # certain and small
        [(64, 4)] + [(4, 4)] * 9,  # mean ratio 16^(1/10) = 1.32; without the one pair, 35 % of resamples, it is 1
        [(8, 4), (4, 8)] * 10,
    ],
)
def test_lengths_without_a_finding(lengths):
    assert findings(*pairs(lengths)) == []


def labelled(good: int, bad: int) -> list[Loaded]:
    return [single(i, chat(f"Q{i}", "A"), i <= good) for i in range(1, good + bad + 1)]


@pytest.mark.parametrize("good, bad", [(3, 3), (4, 3)])
def test_balanced_labels(good, bad):
    assert findings(*labelled(good, bad)) == []
    count = figure(check(data(labelled(good, bad)), TOKENIZER), "labels")
    assert dict(count.numbers) == {"desirable": good, "undesirable": bad}


@pytest.mark.parametrize(
    "good, bad, cure",
    [
        (2, 4, "desirable_weight from 2 to 2.67"),
        (8, 2, "from 0.25 to 0.333"),
        (3, 0, "no undesirable row"),
        (0, 3, "no desirable"),
    ],
)
def test_unbalanced_labels_are_a_warning(good, bad, cure):
    finding = only(findings(*labelled(good, bad)))
    assert (finding.kind, finding.severity) == ("label_imbalance", "warning")
    assert cure in finding.detail
    assert dict(finding.numbers) == {"desirable": good, "undesirable": bad}


def test_target_share():
    r = chat("Hi", "Yo")  # targets: Y, o, end of turn
    share = figure(check(data([single(1, r)]), TOKENIZER), "target_share")
    assert share.numbers["targets"] == 3
    assert share.numbers["share"] == 3 / len(r.row.token_ids)


def test_only_the_tokens_that_the_objective_trains_on_count():
    """data.targets=divergent, or an objective that reads only chosen: fewer targets than the renderings have."""
    r, other = chat("Hi", "Yo"), chat("Hi", "Ya")
    late = replace(r.row, targets=r.row.targets & (np.arange(len(r.row.targets)) > r.prompt_length))
    row = pair(1, r, other)
    divergent = replace(row, examples=(replace(row.examples[0], rows=(late, other.row)),))
    assert figure(check(data([divergent]), TOKENIZER), "target_share").numbers["targets"] == 2 + 3
    imitated = replace(row, examples=(replace(row.examples[0], rows=(r.row,)),))
    found = check(data([imitated]), TOKENIZER)
    assert figure(found, "target_share").numbers["targets"] == 3
    assert not failed(found)


def test_notes_of_the_renderer_are_findings():
    notes = (
        "context: message 2: other words",
        "dropped: message 1",
        "special_text: the user's <|im_end|>",
        "white_space: two spaces",
    )
    r = chat("Hi", "Yo", notes=notes)
    found = findings(single(1, r))
    assert [(f.kind, f.severity, f.detail) for f in found] == [
        ("context", "warning", "row: message 2: other words"),
        ("dropped_message", "warning", "row: message 1"),
        ("special_text", "warning", "row: the user's <|im_end|>"),
        ("white_space", "note", "row: two spaces"),
    ]


def test_a_note_on_what_both_sequences_share_is_one_finding():
    notes = ("special_text: message 1",)
    row = pair(1, chat("Hi", "Yo", notes=notes), chat("Hi", "Ya", notes=(*notes, "white_space: message 2")))
    assert [f.detail for f in findings(row)] == ["chosen and rejected: message 1", "rejected: message 2"]


def test_a_boundary_that_the_renderer_explains_is_a_warning():
    r = chat("Hi", "Yo", notes=("context: message 2: '<think>' is left out",))
    row = beginning(single(1, r), *prompt_of(r), *ids("<think>"))
    assert [(f.kind, f.severity) for f in findings(row)] == [("boundary", "warning"), ("context", "warning")]
    other = replace(r, notes=("context: message 4: '<think>' is left out",))
    assert ("boundary", "error") in [(f.kind, f.severity) for f in findings(replace(row, renderings={"row": other}))]


# ---------------------------------------------------------------------- the verdict


def test_the_terminal_gets_the_account_the_first_of_each_kind_and_the_verdict():
    loaded = data(
        [GOOD, *(replace(GOOD, source=f"pairs.jsonl:{i}") for i in range(2, 7))], dropped=[(7, "no_target", "x")]
    )
    found = check(loaded, TOKENIZER)
    said = lines(found, loaded.audit)
    assert said[0].startswith("data train: 7 rows in = 6 kept + 1 dropped (1 no_target)")
    assert "error dropped" in said
    assert "  pairs.jsonl:7: no_target: x" in said
    at = said.index("warning duplicate (5)")
    assert said[at + 1].startswith("  pairs.jsonl:2: ")
    assert said[at + 4] == "  and 2 more; --json FILE lists them all"
    assert said[-1] == "check failed: 1 error, 5 warnings, 0 notes"


def test_the_terminal_lists_three_of_a_kind():
    loaded = data([replace(GOOD, source=f"pairs.jsonl:{i}") for i in range(1, 5)])
    said = lines(check(loaded, TOKENIZER), loaded.audit)
    assert [line.split(": ")[0] for line in said if "same tokens" in line] == [f"  pairs.jsonl:{i}" for i in (2, 3, 4)]
    assert not any("more;" in line for line in said)
    assert said[-1] == "check passed: 0 errors, 3 warnings, 0 notes"


def test_only_errors_fail():
    severities = {s: Finding("x", s, "") for s in ("error", "warning", "note", "figure")}
    assert failed(severities.values())
    assert not failed(severities[s] for s in ("warning", "note", "figure"))


def test_errors_come_first():
    found = findings(replace(GOOD, truncated=1), pair(2, chat("Hi", "Cod."), chat("Hi", "Cod.")))
    assert [f.severity for f in found] == ["error", "warning"]


def test_target_runs():
    assert target_runs(np.array([False, True, True, False, True])) == [(1, 3), (4, 5)]
    assert target_runs(np.array([False, False])) == []


# ---------------------------------------------------------------------- from a file


def checked(tmp_path, records: list[dict], **changes) -> tuple[list[Finding], Data]:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    config = settings(file, **changes)
    loaded = load(config, TOKENIZER, keep=True, to_the_end=True)
    return check(loaded, TOKENIZER, config), loaded


def says(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def test_rows_are_not_dropped_in_silence(tmp_path):
    """TRL 1.16 keeps 1 of 4 such rows and says nothing but a progress bar's caption."""
    long = {"prompt": [says("user", "x" * 128)], "chosen": "Cod.", "rejected": "Oak."}
    found, loaded = checked(tmp_path, [long, long, {**long, "prompt": [says("user", "Hi")]}, long], overlong="drop")
    assert (loaded.audit.train.rows_in, loaded.audit.train.rows_kept) == (4, 1)
    assert [(f.kind, f.line) for f in found if f.kind == "dropped"] == [("dropped", 1), ("dropped", 2), ("dropped", 4)]
    assert "prompt_too_long" in found[0].detail
    stopping, _ = checked(tmp_path, [long, {**long, "prompt": [says("user", "Hi")]}], overlong="error")
    assert failed(stopping)


def test_pairs_that_truncation_makes_equal_are_named(tmp_path):
    """TRL 1.16 keeps 4 of 4 such pairs, and no sequence keeps its end of turn."""
    shared = [says("user", "Add"), says("assistant", "First."), says("user", "More"), says("assistant", "Yes.")]
    rows = [
        {
            "prompt": shared[:1],
            "chosen": [*shared[1:], says("user", "y" * 100), says("assistant", "A")],
            "rejected": [*shared[1:], says("user", "y" * 100), says("assistant", "B")],
        },
        {
            "prompt": shared[:1],
            "chosen": [*shared[1:], says("user", "y" * 100), says("assistant", "A")],
            "rejected": [*shared[1:3], says("assistant", "No.")],
        },
    ]
    found, loaded = checked(tmp_path, rows, overlong="truncate_turns", max_tokens=128)
    assert [(f.kind, f.line) for f in found if f.severity != "figure"] == [
        ("dropped", 1),
        ("dead_pair", 1),
        ("truncated", 2),
    ]
    kept = loaded.train_rows[0].renderings["chosen"].row
    assert TOKENIZER.decode(kept.token_ids[kept.targets]) == f"First.{END}Yes.{END}"


def test_every_bad_row_is_listed(tmp_path):
    good = {"prompt": "Name a fish.", "chosen": " Cod.", "rejected": " Oak."}
    found, _ = checked(tmp_path, [{"chosen": "x"}, good, {"prompt": 3, "chosen": "a", "rejected": "b"}])
    assert [(f.line, f.severity) for f in found if f.kind == "dropped"] == [(1, "error"), (3, "error")]


def test_rows_of_a_file_begin_as_generation_does(tmp_path):
    """A conversation, and one answer to two prompts: each sequence is compared with its own."""
    rows = [
        {"prompt": [says("user", "Name a fish.")], "chosen": "Cod.", "rejected": "Oak."},
        {"prompt_chosen": "Name a fish.", "prompt_rejected": "Name a tree.", "completion": " Cod."},
    ]
    found, _ = checked(tmp_path, rows)
    assert dict(figure(found, "boundary_proof").numbers) == {"sequences": 4, "proved": 4, "given_as_tokens": 0}
    assert not failed(found)


def test_one_prompt_is_an_error_where_the_objective_swaps_completions():
    row = single(1, chat("Hi", "Yo"), label=True)
    other = single(2, chat("Hi", "No"), label=False)
    third = single(3, chat("Ho", "No"), label=False)

    def kinds(*rows: Loaded, mismatched: bool = True) -> list[str]:
        return [f.kind for f in check(data(list(rows)), TOKENIZER, None, mismatched) if f.severity == "error"]

    assert kinds(row, other) == ["one_prompt"]
    assert kinds(row, third) == []
    assert kinds(row, other, mismatched=False) == []


def loaded_from(tmp_path, *rows: dict) -> list[Finding]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load(settings(path, max_tokens=1000), TOKENIZER, Wanted(kind=None), keep=True, to_the_end=True)
    return [f for f in check(found, TOKENIZER) if f.severity != "figure"]


def test_an_answer_of_weight_0_moves_where_generation_starts(tmp_path):
    """It is context, so the prompt that is compared ends after it."""
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["weight"] = 0
    assert loaded_from(tmp_path, {"messages": messages}) == []


def test_a_text_with_an_end_of_turn_inside_is_a_warning(tmp_path):
    """What follows it is learnt too."""
    talk = f"Cod.{END} That is a fish.{END}"
    finding = only(loaded_from(tmp_path, {"prompt": "Name a fish.", "completion": talk}))
    assert (finding.kind, finding.severity, finding.line) == ("control_token", "warning", 1)
    assert loaded_from(tmp_path, {"prompt": f"Name a fish.{END}", "completion": f"Cod.{END}"}) == []
