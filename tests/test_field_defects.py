"""Defects that were found in other frameworks by running them; here none of them can come back unseen.

The same of WPO's weight is in tests/objectives/test_preference.py, of misspelt keys in tests/test_config.py.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from align.data.load import Data, load
from align.data.wanted import Wanted
from align.models.pretrained import smollm2
from tests.data.helpers import settings
from tests.data.test_templates import BEFORE, ENDS, TEMPLATES, of_family, target_texts, tokenizer_of

END = "<|im_end|>"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@cache
def real_tokenizer() -> Any:
    return smollm2().tokenizer()


def loaded(path, rows: list[dict], wanted: Wanted, **changes) -> Data:
    path.write_text("\n".join(map(json.dumps, rows)))
    return load(settings(path, **changes), real_tokenizer(), wanted)


def learnt(row) -> str:
    """What carries loss, as text."""
    return real_tokenizer().decode(row.token_ids[row.targets], skip_special_tokens=False)


TALK = [user("book a train"), assistant("sure, where?"), user("Paris please"), assistant("done")]
OTHER = [user("book a train"), assistant("no"), user("Paris please"), assistant("never")]


# ---------------------------------------------------------------------- whose words are learnt


@pytest.mark.parametrize("prompt", [0, 1])
def test_pairs_learn_none_of_the_users_words(tmp_path, prompt):
    """TRL 1.16's DPO gives loss to all after the prompt: "<|im_start|>user Paris please<|im_end|>" is learnt too."""
    row = {"chosen": TALK[prompt:], "rejected": OTHER[prompt:]} | ({"prompt": TALK[:1]} if prompt else {})
    (pair,) = loaded(tmp_path / "r.jsonl", [row], Wanted("pair")).train
    assert [learnt(row) for row in pair.rows] == [f"sure, where?{END}done{END}", f"no{END}never{END}"]


def test_labelled_rows_learn_none_of_the_users_words(tmp_path):
    """TRL 1.16's KTO does the same with a labelled conversation; here also where a pair serves as two labels."""
    rows = [{"messages": TALK, "label": True}, {"chosen": TALK, "rejected": OTHER}]
    examples = loaded(tmp_path / "r.jsonl", rows, Wanted("labelled")).train
    assert [(e.label, learnt(e.rows[0])) for e in examples] == [
        (True, f"sure, where?{END}done{END}"),
        (True, f"sure, where?{END}done{END}"),
        (False, f"no{END}never{END}"),
    ]


# ---------------------------------------------------------------------- what is too long


LONG = [{"prompt": [user("word " * n)], "chosen": "yes", "rejected": "no"} for n in (3, 200, 201, 202)]


def test_rows_that_are_too_long_do_not_vanish(tmp_path):
    """TRL 1.16 keeps 1 of these 4 rows at 128 tokens, and only a progress bar's caption says so."""
    path = tmp_path / "r.jsonl"
    with pytest.raises(ValueError, match="r.jsonl") as caught:
        loaded(path, LONG, Wanted("pair"), max_tokens=128)
    assert "3 of 4 rows are longer than data.max_tokens=128" in str(caught.value)
    assert "raise data.max_tokens, or set data.overlong=drop" in str(caught.value)
    assert f"The first: {path}:2: the prompt has 231 tokens" in str(caught.value)


def test_rows_that_are_left_out_on_demand_are_counted_by_line(tmp_path):
    """The same rows with data.overlong=drop."""
    path = tmp_path / "r.jsonl"
    audit = loaded(path, LONG, Wanted("pair"), max_tokens=128, overlong="drop").audit
    assert (audit.train.rows_in, audit.train.rows_kept, audit.train.dropped) == (4, 1, {"prompt_too_long": 3})
    assert [d["source"] for d in audit.train.dropped_rows] == [f"{path}:{line}" for line in (2, 3, 4)]


def test_no_pair_is_kept_whose_difference_was_cut_off(tmp_path):
    """TRL 1.16 cuts at max_length: 4 of 4 pairs became equal, without gradient and without a word."""
    head = [assistant("x " * 10), user("more")]
    rows = [
        {"prompt": [user(f"q{i}")], "chosen": [*head, assistant("yes " * 100)], "rejected": [*head, assistant("no")]}
        for i in range(4)
    ]
    rows.append({"prompt": [user("q")], "chosen": "yes", "rejected": "no"})
    # the second answer of chosen has to go; rejected fits, and is another
    data = loaded(tmp_path / "r.jsonl", rows, Wanted("pair"), overlong="truncate_turns")
    assert len(data.audit.train.truncated_rows) == 4
    for row in rows[:4]:
        row["rejected"] = [*head, assistant("no " * 100)]
    audit = loaded(tmp_path / "r.jsonl", rows, Wanted("pair"), overlong="truncate_turns").audit
    assert audit.train.dropped == {"dead_pair": 4}
    assert "raise data.max_tokens" in audit.train.dropped_rows[0]["detail"]


def test_a_shortened_conversation_ends_its_last_turn(tmp_path):
    """TRL 1.16 left 0 of 8 cut sequences their end of turn: the policy learns not to stop."""
    turns = [user("q"), assistant("a b"), user("r"), assistant("c d"), user("s"), assistant("e " * 100)]
    row = {"chosen": turns, "rejected": [user("q"), assistant("no"), user("r"), assistant("n " * 200)]}
    (pair,) = loaded(tmp_path / "r.jsonl", [row], Wanted("pair"), overlong="truncate_turns").train
    assert [learnt(row) for row in pair.rows] == [f"a b{END}c d{END}", f"no{END}"]
    # an answer that does not fit is never cut in the middle
    row = {"prompt": [user("q")], "chosen": "yes " * 200, "rejected": "no"}
    audit = loaded(
        tmp_path / "r.jsonl", [row, LONG[0]], Wanted("pair"), overlong="truncate_turns", max_bad_fraction=0.5
    ).audit
    assert audit.train.dropped == {"too_long": 1}


# ---------------------------------------------------------------------- where the prompt ends


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.endswith("_training")])
def test_the_whole_answer_is_learnt_whatever_the_template_writes_before_it(tmp_path, name):
    """OpenRLHF cuts the prompt off by its number of characters: of 40 templates 6 have the border elsewhere.

    With DeepSeek-R1's only "ur." and EOS of "It is four." are learnt, with four of Nemotron's ">" is missing.
    """
    tokenizer = tokenizer_of(name)
    row = {"messages": [user("What is 2 + 2?"), assistant("It is four.")]}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row))
    config = settings(path, max_tokens=5000)
    data = load(config, tokenizer, Wanted("single"), keep=True)
    (kept,) = data.train_rows
    rendering = kept.renderings["row"]
    (said,) = target_texts(tokenizer, rendering).values()
    end = of_family(name, ENDS) or tokenizer.eos_token
    assert said in [f"{before}It is four.{end}" for before in of_family(name, BEFORE)]
    assert np.array_equal(rendering.row.targets, np.arange(len(rendering.row.token_ids)) >= rendering.prompt_length)
    if name.startswith(("deepseek_r1", "our_deepseek_r1", "nemotron")):
        start = {"deepseek_r1": "", "our_deepseek_r1": "", "nemotron": "</think>"}
        assert said == of_family(name, start) + "It is four." + end


def test_the_templates_that_went_wrong_elsewhere_are_among_them():
    """Otherwise the test above proves less than it says."""
    assert len([name for name in TEMPLATES if name.startswith("nemotron") and not name.endswith("_training")]) >= 4
    assert "deepseek_r1_distill" in TEMPLATES
