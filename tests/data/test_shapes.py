"""Rows as they come, by what stands in the rendered prompt and what is learnt; and rows that must never be learnt.

forms/ holds files in the shapes in which preference data come, and expected.json what each must become.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from align.data.load import load
from align.data.prompts import load_prompts
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from align.prepare.check import check, failed
from tests.data.helpers import settings

FORMS = Path(__file__).parent / "forms"
EXPECTED = json.loads((FORMS / "expected.json").read_text())
TOKENIZER = byte_tokenizer()
ASK, BIRD, IDEA = "What is heron?", "It is a bird.", "No idea."
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", ASK), ("assistant", BIRD), ("assistant", IDEA)))
HUMAN, GPT, POOR = ({"from": r, "value": c} for r, c in (("human", ASK), ("gpt", BIRD), ("gpt", IDEA)))


class Seen:
    """What data.train came out as: texts of prompts and targets, findings, or why it was refused."""

    def __init__(self, path: Path, kind: str | None = None, **changes: object):
        config = settings(path, **({"max_tokens": 4000, "text": "auto"} | changes))
        self.refused, self.prompts, self.targets, self.findings = "", [], [], []
        try:
            data = load(config, TOKENIZER, Wanted(kind), keep=True, to_the_end=True)
        except ValueError as error:
            self.refused = str(error)
            return
        self.findings = check(data, TOKENIZER, config)
        if failed(self.findings):
            self.refused = "\n".join(f.detail for f in self.findings if f.severity == "error")
        for loaded in data.train_rows:
            for rendering in loaded.renderings.values():
                ids, targets = rendering.row.token_ids, rendering.row.targets
                self.prompts.append(TOKENIZER.decode(ids[~targets]))
                self.targets.append(TOKENIZER.decode(ids[targets]).replace("<|im_end|>", "").strip())

    def of(self, kind: str) -> list:
        return [finding for finding in self.findings if finding.kind == kind]


def written(tmp_path: Path, *rows: dict, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def seen(tmp_path: Path, *rows: dict, **changes: object) -> Seen:
    return Seen(written(tmp_path, *rows), **changes)


@pytest.mark.parametrize("name", EXPECTED)
def test_files_are_read_as_they_are_meant_or_refused_with_the_cure(name):
    want, path = EXPECTED[name], FORMS / f"{name}.jsonl"
    kind = "single" if want.get("objective") == "nll" else None
    found = Seen(path, kind)
    if found.refused and want.get("columns"):
        assert "data.columns." in found.refused
        found = Seen(path, kind, columns=want["columns"])
    if "refuse" in want or want.get("refuse_or"):
        assert found.refused
        assert all(word in found.refused for word in want.get("refuse", ["data.form=hh"]))
        return
    assert not found.refused
    assert sorted(set(found.targets)) == sorted(set(want["targets"]))
    told = "\n".join(found.prompts)
    assert all(piece in told for piece in want["prompt_has"])
    assert [f.column for f in found.of("unread_column")] == want.get("says", []) + (["notes"] if "says" in want else [])
    assert "<|im_start|>user" in told


PAIRS = {
    "prompt as text, answers as messages": {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]},
    "prompt as text, one message each": {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    "prompt as one message": {"prompt": USER, "chosen": BIRD, "rejected": IDEA},
    "prompt as from and value": {"prompt": [HUMAN], "chosen": [GPT], "rejected": [POOR]},
    "conversation in the singular": {"conversation": [HUMAN], "chosen": GPT, "rejected": POOR},
    "conversations as whole answers": {"chosen": [HUMAN, GPT], "rejected": [HUMAN, POOR]},
    "messages say chosen again": {
        "prompt": ASK,
        "messages": [USER, GOOD],
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "score_chosen": 8.0,
        "score_rejected": 2,
    },
    "messages with the better answer": {"messages": [USER, GOOD], "chosen": BIRD, "rejected": IDEA},
    "prompt as the text of messages": {"prompt": json.dumps([USER]), "chosen": BIRD, "rejected": IDEA},
    "one message as text": {"prompt": ASK, "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)},
    "Python's own text": {"chosen": str([USER, GOOD]), "rejected": str([USER, BAD])},
    "from and value as text": {"conversations": json.dumps([HUMAN]), "chosen": str(GPT), "rejected": str(POOR)},
    "nulls beside": {"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "messages": None, "system": None, "label": None},
    "nulls in messages": {
        "prompt": [USER | {"tool_calls": None, "weight": None}],
        "chosen": [GOOD | {"tool_calls": None}],
        "rejected": [BAD | {"tool_calls": []}],
    },
    "empty columns": {"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "images": [], "tools": [], "system": ""},
    "the prompt twice": {
        "prompt": f"Q: {ASK}\nA: ",
        "chosen": f"Q: {ASK}\nA: {BIRD}",
        "rejected": f"Q: {ASK}\nA: {IDEA}",
    },
    "the prompt twice as messages": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "other role names": {
        "messages": [{"role": "human", "content": ASK}],
        "chosen": {"role": "chatgpt", "content": BIRD},
        "rejected": {"role": "bard", "content": IDEA},
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_need_no_setting(tmp_path, name):
    found = seen(tmp_path, PAIRS[name])
    assert (found.refused, found.targets, found.of("unread_column")) == ("", [BIRD, IDEA], [])
    assert all(prompt.count(ASK) == 1 and prompt.startswith("<|im_start|>user\n") for prompt in found.prompts)


SINGLES = {
    "completion as a message": {"prompt": ASK, "completion": GOOD},
    "completion repeats the prompt": {"prompt": ASK, "completion": f"{ASK} {BIRD}"},
    "completion repeats the messages": {"prompt": [USER], "completion": [USER, GOOD]},
    "messages and a completion": {"messages": [USER], "completion": BIRD},
    "messages and their prompt": {"prompt": ASK, "messages": [USER, GOOD]},
    "roles in capital letters": {"messages": [USER | {"role": "User"}, GOOD | {"role": "ASSISTANT"}]},
    "conversations as text": {"conversations": json.dumps([HUMAN, GPT])},
    "weight 0 as from and value": {"conversations": [HUMAN, POOR | {"weight": 0}, HUMAN, GPT]},
    "labelled": {"prompt": ASK, "completion": f"{ASK}\n{BIRD}", "label": "True"},
}


@pytest.mark.parametrize("name", SINGLES)
def test_single_rows_need_no_setting(tmp_path, name):
    found = seen(tmp_path, SINGLES[name])
    assert (found.refused, found.targets, found.of("unread_column")) == ("", [BIRD], [])
    assert ASK in found.prompts[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": BIRD, "rejected": IDEA},
        {"prompt": [USER], "chosen": BIRD, "rejected": IDEA},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": [HUMAN, GPT]},
        {"prompt": ASK, "completion": BIRD},
    ],
)
def test_a_system_column_opens_the_conversation(tmp_path, row):
    found = seen(tmp_path, {"system": "Be brief."} | row)
    assert not found.refused
    assert all(p.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user") for p in found.prompts)


def test_two_systems_and_a_system_beside_plain_text_are_refused(tmp_path):
    twice = {"system": "Be brief.", "messages": [{"role": "system", "content": "Be long."}, USER, GOOD]}
    assert "two things" in seen(tmp_path, twice).refused
    assert (
        "system has no place beside plain texts"
        in seen(tmp_path, {"system": "Be brief.", "prompt": ASK, "completion": BIRD}, text="plain").refused
    )


def test_a_call_as_a_role_is_a_call(tmp_path):
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    found = seen(tmp_path, {"conversations": [HUMAN, call, {"from": "observation", "value": "2"}, GPT]})
    assert not found.refused
    assert found.targets[0].endswith(BIRD)
    assert "add" in found.targets[0]
    assert (
        "function_call must say" in seen(tmp_path, {"conversations": [HUMAN, call | {"value": "add 1"}, GPT]}).refused
    )


# ---------------------------------------------------------------------- what nothing reads


def test_unread_columns_are_told_with_their_rows(tmp_path):
    pair = {"prompt": ASK, "chosen": BIRD, "rejected": IDEA}
    found = seen(tmp_path, pair | {"rating": 5, "note": ""}, pair | {"prompt": "Why?", "rating": None, "lang": "en"})
    assert not found.refused
    assert [f.as_dict() | {"detail": ""} for f in found.of("unread_column")] == [
        {"kind": "unread_column", "severity": "note", "split": "train", "row": None, "file": None, "line": None,
         "detail": "", "column": column, "rows": 1}
        for column in ("rating", "lang")
    ]  # fmt: skip
    found = seen(tmp_path, pair | {"id": 1, "chosen_score": 2.0, "rejected_score": 1.0})  # as they stand in public sets
    assert [f.column for f in found.of("unread_column")] == ["id", "chosen_score", "rejected_score"]
    data = load(settings(written(tmp_path, pair | {"rating": 5})), TOKENIZER)
    assert any("not read: rating (1 rows)" in line for line in data.audit.lines())


CONV = [{"speaker": "user", "text": ASK}, {"speaker": "bot", "text": BIRD}]


@pytest.mark.parametrize(
    "messages",
    [
        CONV,
        [{"author": "user", "content": ASK}, {"author": "assistant", "content": BIRD}],
        [{"role": "prompter", "content": ASK}, {"role": "assistant", "content": BIRD}],
        {"role": ["user", "assistant"], "content": [ASK, BIRD]},
        {"from": ["human", "gpt"], "value": [ASK, BIRD], "weight": [None, 1]},
    ],
)
def test_messages_of_other_names_are_the_same_messages(tmp_path, messages):
    expected = seen(tmp_path, {"messages": [USER, {"role": "assistant", "content": BIRD}]})
    found = seen(tmp_path, {"messages": messages})
    assert found.refused == expected.refused == ""
    assert (found.prompts, found.targets) == (expected.prompts, expected.targets)
    assert found.targets == [BIRD]


def test_an_answer_that_is_an_object_with_an_author_stays_a_text(tmp_path):
    row = {"prompt": ASK, "chosen": '{"author": "Bo", "text": "x"}', "rejected": IDEA}
    assert seen(tmp_path, row).refused == ""


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "image": "a.png"}, "column image"),
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "videos": ["a"]}, "column videos"),
        ({"messages": [USER, GOOD], "audio": {"path": "a"}}, "column audio"),
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "system_prompt": "x"}, "data.columns.system=system_prompt"),
        ({"prompt": [USER], "chosen": BIRD, "rejected": IDEA, "functions": "x"}, "data.columns.tools=functions"),
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "label": 1}, "column label"),
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "weight": 0.5}, "column weight"),
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "scores": [1, 2]}, "column scores"),
        ({"question": ASK, "chosen": BIRD, "rejected": IDEA}, "data.columns.prompt=question"),
        ({"instruction": ASK, "input": "x", "chosen": BIRD, "rejected": IDEA}, "data.columns.prompt=instruction"),
        ({"question": ASK, "chosen": [GOOD], "rejected": [BAD]}, "data.columns.prompt=question"),
        ({"what_was_asked": ASK, "chosen": BIRD, "rejected": IDEA}, "data.columns.prompt=what_was_asked"),
        ({"asked_for": ASK, "chosen": "It is so.", "rejected": "It is not."}, "data.columns.prompt=asked_for"),
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "history": [USER, GOOD]}, "column history"),
        ({"prompt": "Other?", "messages": [USER, GOOD]}, "column prompt"),
        ({"question": ASK, "answer": BIRD}, "data.columns.prompt=question data.columns.completion=answer"),
        ({"question": ASK, "preferred": BIRD, "dispreferred": IDEA}, "data.columns.chosen=preferred"),
        ({"a": ASK, "b": BIRD}, "columns a, b; use data.columns.NAME=COLUMN or data.format"),
        ({"prompt": ASK, "text": BIRD}, "column prompt"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}, GOOD]}, "data.form=blocks"),
        ({"prompt": ASK, "chosen": {"said": BIRD}, "rejected": {"said": IDEA}}, "found dict of said"),
        # other names, told by what stands there
        ({"conv": CONV[:1], "chosen": BIRD, "rejected": IDEA}, "data.columns.prompt=conv"),
        ({"conv": CONV}, "use data.columns.messages=conv"),
        ({"prompt": ASK, "chosen": [BIRD], "rejected": [IDEA]},
         "use data.columns.chosen=chosen.0 data.columns.rejected=rejected.0"),
        ({"chosen": [ASK, BIRD], "rejected": [ASK, IDEA]}, "use data.format=module.function"),
        ({"prompt": [ASK], "chosen": BIRD, "rejected": IDEA}, "use data.columns.prompt=prompt.0"),
        ({"prompt": ASK, "chosen": {"text": BIRD}, "rejected": {"text": IDEA}}, "data.columns.chosen=chosen.text"),
        ({"Prompt": ASK, "Chosen": BIRD, "Rejected": IDEA},
         "use data.columns.prompt=Prompt data.columns.chosen=Chosen"),
        ({"prompt": ASK, "win": BIRD, "lose": IDEA}, "use data.columns.chosen=win data.columns.rejected=lose"),
        ({"query": ASK, "pos": [BIRD], "neg": [IDEA]}, "data.columns.chosen=pos.0 data.columns.rejected=neg.0"),
        ({"prompt": ASK, "response": BIRD, "rejected": IDEA}, "use data.columns.chosen=response"),
        ({"prompt": ASK, "responses": [IDEA, BIRD], "preferred": 1}, "preferred; use data.form=comparison"),
        ({"data": {"prompt": ASK, "chosen": BIRD, "rejected": IDEA}},
         "use data.columns.prompt=data.prompt data.columns"),
        ({"request": {"messages": [USER]}, "response": BIRD},
         "use data.columns.prompt=request.messages data.columns.completion=response"),
        ({"prompt": ASK, "response": BIRD, "is_chosen": False},
         "use data.columns.completion=response data.columns.label=is_chosen"),
        ({"dialogue": [ASK, BIRD]}, "use data.columns.NAME=COLUMN or data.format=module.function"),
        ({"prompt": [1, 2], "chosen": [3], "rejected": [4]}, "use data.format=module.function"),
        ({"prompt": ASK, "chosen": 2, "rejected": 3}, "use data.format=module.function"),
        ({"prompt": ASK, "completion": BIRD, "label": 1}, "use data.format=module.function to say which values"),
        # what says who is right, who speaks, or what was said before
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "winner": "rejected"}, "column winner"),
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "preference": 0}, "column preference"),
        ({"text": ASK, "role": "prompter", "replies": []}, "column role"),
        ({"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "history": [[ASK, BIRD]]},
         "to put its turns before the prompt"),
        ({"prompt": ASK, "chosen": f"<|assistant|>{BIRD}", "rejected": IDEA}, "cut the answer before it"),
    ],
)  # fmt: skip
def test_columns_that_change_the_meaning_are_refused_with_the_cure(tmp_path, row, said):
    assert said in seen(tmp_path, row).refused
    with pytest.raises(ValueError, match=r"rows.jsonl:1: "):
        load(settings(written(tmp_path, row), max_tokens=4000), TOKENIZER, Wanted(None))


def test_a_column_that_is_known_not_to_be_read_says_nothing(tmp_path):
    row = {"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "image": "a.png", "rating": 5}
    found = seen(tmp_path, row, ignore=["image", "rating"])
    assert (found.refused, found.of("unread_column")) == ("", [])


def test_shapes_of_one_file_are_counted(tmp_path):
    found = seen(tmp_path, SINGLES["completion as a message"], {"messages": [USER, GOOD]}, {"messages": [USER, BAD]})
    (mixed,) = found.of("mixed_shapes")
    assert "2 messages as messages; 1 prompt, completion as messages" in mixed.detail


# ---------------------------------------------------------------------- prompts that are none


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "chosen": BIRD, "rejected": IDEA},
        {"prompt": " \n", "completion": BIRD},
        {"chosen": BIRD, "rejected": IDEA},
        {"prompt": [USER | {"content": " "}], "chosen": BIRD, "rejected": IDEA},
        {"prompt": "", "completion": BIRD, "label": True},
        {
            "chosen": {"token_ids": [256, 7], "spans": [["prompt", 0, 1, False], ["assistant", 1, 2, True]]},
            "rejected": {"token_ids": [256, 8], "spans": [["prompt", 0, 1, False], ["assistant", 1, 2, True]]},
        },
    ],
)
def test_answers_to_nothing_are_refused_unless_they_are_meant(tmp_path, row):
    assert TOKENIZER.bos_token_id == 256
    assert "data.empty_prompts=true" in seen(tmp_path, row).refused
    assert "prompt" not in seen(tmp_path, row, empty_prompts=True).refused


def test_a_text_to_imitate_has_no_prompt_by_nature(tmp_path):
    assert seen(tmp_path, {"text": BIRD}).targets == [BIRD]


# ---------------------------------------------------------------------- what the assistant did not say


PROSE = (
    "In HH the Human: role asks and the Assistant: role answers.",
    "The token <|im_start|>user opens a turn, [INST] another.",
    "Write this:\n```\nHuman: Hi\nAssistant: Hello\n```\nThen send it.",
    "Note: the user: field holds it.\nResponse: it depends.",
    "Assistants help. Human beings ask.",
    'Use `[{"role": "user", "content": "Hi"}]` as messages.',
)
LEAKS = (
    "Human: What else?",
    "Assistant: It is a bird.",
    "### Response:\nIt is a bird.",
    "It is a bird.\n\nHuman: And a crane?",
    "It is a bird.\nUser: And a crane?\nAssistant: The same.",
    "It is a bird.<|im_end|>\n<|im_start|>user\nAnd a crane?",
    "It is a bird.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd?",
    "[INST] And a crane? [/INST] The same.",
    "<|assistant|>\nIt is a bird.",
    "It is.\n\n### Instruction:\nSay more.",
    json.dumps([USER, GOOD]),
)


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("said", LEAKS)
def test_headers_of_roles_in_an_answer_are_refused(tmp_path, said, as_text):
    row = {"prompt": ASK, "completion": said} if as_text else {"messages": [USER, GOOD | {"content": said}]}
    found = seen(tmp_path, row, text="plain")
    if as_text and said.startswith("[{"):  # messages as text are messages: the answer alone is learnt
        assert found.targets in ([BIRD], [])
        return
    assert found.refused
    with pytest.raises(ValueError, match=r"rows.jsonl:1: "):
        load(settings(written(tmp_path, row), max_tokens=4000), TOKENIZER, Wanted(None))


@pytest.mark.parametrize("said", PROSE)
def test_prose_that_speaks_of_headers_is_learnt(tmp_path, said):
    found = seen(tmp_path, {"messages": [USER, GOOD | {"content": said}]})
    assert (found.refused, found.targets) == ("", [said])


def test_a_dialogue_that_was_asked_for_is_told_and_learnt_while_few_rows_hold_one(tmp_path):
    play = {"messages": [USER, GOOD | {"content": "User: Hi\nAssistant: Hello"}]}
    rows = [{"messages": [USER | {"content": f"{ASK} {i}"}, GOOD]} for i in range(120)]
    found = seen(tmp_path, *rows, play)
    assert not found.refused
    assert [(f.severity, f.line) for f in found.of("role_header")] == [("warning", 121)]
    data = load(settings(written(tmp_path, *rows, play), max_tokens=4000), TOKENIZER, Wanted(None))
    assert any("1 train rows may hold more than the assistant said" in line for line in data.audit.lines())
    assert [f.severity for f in seen(tmp_path, *rows[:50], play).of("role_header")] == ["error"]


def test_transcripts_as_texts_are_never_learnt(tmp_path):
    """Also where they part at the last answer, so that what is learnt holds no header."""
    said = "\n\nHuman: What is heron?\n\nAssistant:"
    for row in (
        {"chosen": f"{said} {BIRD}", "rejected": f"{said} {IDEA}"},
        {"prompt": said, "chosen": f" {BIRD}\n\nHuman: More\n\nAssistant: No.", "rejected": f" {IDEA}"},
        {"prompt": said, "chosen": f" {BIRD}", "rejected": f" {IDEA}"},
    ):
        assert "data.form=hh" in seen(tmp_path, row).refused
    assert not seen(tmp_path, {"prompt": said, "chosen": f" {BIRD}", "rejected": f" {IDEA}"}, text="plain").refused


def test_one_answer_that_repeats_the_prompt_is_refused(tmp_path):
    found = seen(tmp_path, {"prompt": ASK, "chosen": f"{ASK} {BIRD}", "rejected": IDEA})
    assert "chosen begins with the prompt" in found.refused
    assert not seen(tmp_path, {"prompt": "Hi", "chosen": "Hi there", "rejected": IDEA}).refused


# ---------------------------------------------------------------------- data.columns


def test_columns_are_mapped_joined_and_reached(tmp_path):
    row = {"meta": {"q": ASK, "left": 1}, "rules": "Be brief.", "out": [{"t": BIRD}, {"t": IDEA}], "a": 7.5, "b": "2"}
    columns = {"prompt": ["rules", "meta.q"], "chosen": "out.0.t", "rejected": "out.-1.t"}
    scores = {"score_chosen": "a", "score_rejected": "b"}
    found = seen(tmp_path, row, columns=columns | scores)
    assert (found.refused, found.targets) == ("", [BIRD, IDEA])
    assert "user\nBe brief.\n\nWhat is heron?<|im_end|>" in found.prompts[0]
    assert [f.column for f in found.of("unread_column")] == ["meta"]  # what is left of it
    part = seen(tmp_path, row, columns={"prompt": "rules", "completion": "out.0.t"}, ignore=["meta", "a", "b"])
    assert [f.column for f in part.of("unread_column")] == ["out"]
    (example,) = load(settings(tmp_path / "rows.jsonl", columns=columns | scores), TOKENIZER).train
    assert example.numbers == {"score_chosen": 7.5, "score_rejected": 2.0, "margin": 5.5}


def test_joined_columns_may_be_empty_but_not_unknown(tmp_path):
    rows = [{"i": "Say what it is.", "x": None, "c": BIRD}, {"i": "Say what it was.", "x": "heron", "c": IDEA}]
    found = seen(tmp_path, *rows, columns={"prompt": ["i", "x"], "completion": "c"})
    assert not found.refused
    assert "is.<|im_end|>" in found.prompts[0]
    assert "was.\n\nheron<|im_end|>" in found.prompts[1]
    refused = seen(tmp_path, *rows, columns={"prompt": ["i", "xs"], "completion": "c"}).refused
    assert "data.columns.prompt=[i,xs]: the rows have no column 'xs'" in refused
    assert "did you mean x?" in refused


def test_a_column_that_is_not_there_is_refused_with_the_nearest(tmp_path):
    row = {"question": ASK, "chosen": BIRD, "rejected": IDEA}
    refused = seen(tmp_path, row, columns={"prompt": "questions"}).refused
    assert (
        "data.columns.prompt=questions: the rows have no column 'questions', only question, chosen, rejected" in refused
    )
    assert "did you mean question?" in refused


# ---------------------------------------------------------------------- files


def test_packed_files_and_folders_are_read_like_jsonl(tmp_path):
    import pyarrow

    rows = [{"prompt": ASK, "chosen": BIRD, "rejected": IDEA, "at": "2024-01-01T00:00:00"}]
    plain = written(tmp_path, *rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pyarrow.output_stream(str(tmp_path / "rows.jsonl.zst"), compression="zstd") as stream:
        stream.write(plain.read_bytes())
    folder = tmp_path / "folder" / "data"
    folder.mkdir(parents=True)
    (folder / "train-00000.jsonl").write_bytes(plain.read_bytes())
    (folder / "test-00000.jsonl").write_text("{}\n")
    (folder.parent / "README.md").write_text("# Rows")
    for path in (plain, tmp_path / "rows.jsonl.gz", tmp_path / "rows.jsonl.zst", folder.parent):
        (row,) = load_prompts(settings(path, max_tokens=4000), TOKENIZER, 8).train
        assert (row.text, row.fields["at"]) == (ASK, "2024-01-01T00:00:00")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes())[:-9])
    with pytest.raises(ValueError, match=r"rows.jsonl.gz: cannot be unpacked .*copy it again"):
        load(settings(tmp_path / "rows.jsonl.gz"), TOKENIZER)
    (folder / "train-00000.jsonl").unlink()
    with pytest.raises(ValueError, match=r"folder: holds the splits test; give a file of it"):
        load(settings(folder.parent), TOKENIZER)


def test_csv_cells_are_texts(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,label,n\n"1,\n2?",007,true,\nWhy?,"So ""it"" is",False,5\n')
    found = Seen(path)
    assert (found.refused, found.targets) == ("", ["007", 'So "it" is'])
    assert "user\n1,\n2?<|im_end|>" in found.prompts[0]
    path.write_text("prompt,completion\na\n")
    assert "has 1 cells, the first line names 2 columns" in Seen(path).refused
    path.write_text('prompt,completion\n"a,b\n')
    assert "is no CSV" in Seen(path).refused


# ---------------------------------------------------------------------- data.text


def test_texts_become_messages_where_there_is_a_template_and_it_is_said(tmp_path):
    path = written(tmp_path, {"prompt": ASK, "chosen": f" {BIRD}", "rejected": IDEA})
    auto = load(settings(path, text="auto"), TOKENIZER)
    chat = load(settings(path, text="chat"), TOKENIZER)
    plain = load(settings(path), TOKENIZER)
    assert TOKENIZER.decode(auto.train[0].rows[0].token_ids) == (
        f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n{BIRD}<|im_end|>"
    )
    assert (auto.train[0].rows[0].token_ids == chat.train[0].rows[0].token_ids).all()
    assert TOKENIZER.decode(plain.train[0].rows[0].token_ids).startswith(ASK)
    assert sum("1 rows of texts are written by the chat template" in line for line in auto.audit.lines()) == 1
    assert not any("chat template" in line for line in plain.audit.lines())
    asked = load_prompts(settings(path, text="auto"), TOKENIZER, 8)
    assert asked.train[0].token_ids == auto.train[0].prompt.token_ids
    assert any("written by the chat template" in line for line in asked.audit.lines())


def test_a_base_model_reads_texts_as_they_stand(tmp_path):
    base = byte_tokenizer()
    base.chat_template = None
    path = written(tmp_path, {"prompt": ASK, "chosen": BIRD, "rejected": IDEA})
    (example,) = load(settings(path, text="auto"), base).train
    assert base.decode(example.rows[0].token_ids).startswith(ASK)
    with pytest.raises(ValueError, match=r"data.text=chat: the tokenizer has no chat template; use data.text=plain"):
        load(settings(path, text="chat"), base)


def test_a_text_that_a_template_has_written_is_not_written_again(tmp_path):
    row = {"prompt": f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n", "completion": BIRD}
    assert "use data.text=plain" in seen(tmp_path, row).refused
    assert seen(tmp_path, row, text="plain").targets == [BIRD]
    other = {"prompt": f"[INST] {ASK} [/INST]", "completion": BIRD}  # of another model's template
    assert "holds '[INST]', which a chat template has written" in seen(tmp_path, other).refused
    assert seen(tmp_path, other, text="plain").targets == [BIRD]


def test_a_cure_is_not_of_another_shape(tmp_path):
    """A label of 1 is no matter of blocks."""
    refused = seen(tmp_path, {"prompt": ASK, "completion": BIRD, "label": 1}).refused
    assert "label must be true or false, found 1" in refused
    assert "data.form=" not in refused
