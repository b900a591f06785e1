"""What the two reports hold: read back as a program and as a browser would."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.config import cache_root
from align.models.smollm2 import smollm2_directory
from align.prepare import report
from align.prepare.check import check
from align.prepare.report import Texts, visible, write_html, write_json
from tests.data.test_check import (
    END,
    GOOD,
    TOKENIZER,
    beginning,
    chat,
    data,
    ids,
    labelled,
    pair,
    prompt_of,
    rendering,
    single,
)

VOID = {"meta", "br", "tr", "td", "th", "li"}  # the last four may stay open


class Page(HTMLParser):
    """Text by class, links, ids and attributes of a page; asserts that its tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tokens: list[tuple[str, bool, str]] = []  # role, target, text of each token
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open[-1][0] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1][0] == "i" and self.open[-2][0] == "span":
            classes = self.open[-2][1]["class"].split()
            self.tokens.append((classes[0], "target" in classes, data))
            self.titles.append(self.open[-1][1].get("title", ""))

    def shown(self, role: str | None = None, target: bool | None = None) -> str:
        """Text of the tokens after the legend."""
        return "".join(
            text
            for (r, t, text), title in zip(self.tokens, self.titles, strict=True)
            if title and role in (None, r) and target in (None, t)
        )


def html(tmp_path, loaded, **options) -> Page:
    write_html(tmp_path / "out.html", loaded, check(loaded, TOKENIZER), TOKENIZER, **options)
    return Page((tmp_path / "out.html").read_text(encoding="utf-8"))


def saved(tmp_path, loaded, tokenizer=TOKENIZER) -> dict:
    write_json(tmp_path / "out.json", loaded, check(loaded, tokenizer), tokenizer)
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2():
    return AutoTokenizer.from_pretrained(smollm2_directory(cache_root()))


# ---------------------------------------------------------------------- JSON


def test_json_holds_the_account_and_the_findings(tmp_path):
    out = saved(tmp_path, data([GOOD, replace(GOOD, source="pairs.jsonl:2")], dropped=[(3, "no_target", "empty")]))
    assert (out["rows_in"], out["rows_kept"], out["dropped"], out["failed"]) == (3, 2, {"no_target": 1}, True)
    assert out["train"]["rows_in"] == out["train"]["rows_kept"] + sum(out["train"]["dropped"].values()) == 3
    assert [(f["kind"], f["row"], f["file"], f["line"]) for f in out["findings"]] == [
        ("dropped", 3, "pairs.jsonl", 3),
        ("duplicate", 2, "pairs.jsonl", 2),
    ]
    assert out["findings"][0]["detail"] == "no_target: empty"
    assert out["figures"]["train"]["boundary_proof"]["proved"] == 4
    assert out["figures"]["train"]["lengths"]["ratio"] == 1
    assert len(out["rows"]) == out["rows_kept"]


def test_json_holds_tokens_spans_and_targets_of_a_pair(tmp_path):
    row = saved(tmp_path, data([GOOD]))["rows"][0]
    assert (row["split"], row["row"], row["file"], row["line"], row["kind"]) == ("train", 1, "pairs.jsonl", 1, "pair")
    chosen = row["chosen"]
    assert TOKENIZER.decode(chosen["token_ids"]) == (
        "<|im_start|>user\nName a fish.<|im_end|>\n<|im_start|>assistant\nCod.<|im_end|>"
    )
    assert chosen["targets"] == ["Cod.<|im_end|>"]
    assert row["rejected"]["targets"] == ["Oak.<|im_end|>"]
    assert [(s["role"], s["message"], s["target"], s["text"]) for s in chosen["spans"]] == [
        ("template", 0, False, "<|im_start|>user\n"),
        ("user", 0, False, "Name a fish."),
        ("template", 1, False, "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", 1, True, "Cod.<|im_end|>"),
    ]
    assert [chosen["spans"][i]["end"] for i in range(3)] == [chosen["spans"][i + 1]["start"] for i in range(3)]
    assert chosen["boundary_proved"]
    assert chosen["finished"]
    assert chosen["token_ids"][: chosen["prompt_length"]] == list(GOOD.examples[0].prompt.token_ids)


def test_both_reports_hold_a_ranked_list(tmp_path):
    answers = {f"rank_{i}": chat("Name a fish.", text) for i, text in enumerate(("Cod.", "Fish.", "Oak."), 1)}
    one = pair(1, *list(answers.values())[:2])
    prompts = {name: prompt_of(shown) for name, shown in answers.items()}
    ranked = replace(one, kind="ranked", renderings=answers, prompts=prompts, finished=dict.fromkeys(answers, True))
    loaded = data([ranked])
    write_json(tmp_path / "r.json", loaded, check(loaded, TOKENIZER), TOKENIZER)
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row[name]["targets"] for name in answers] == [["Cod." + END], ["Fish." + END], ["Oak." + END]]
    write_html(tmp_path / "r.html", loaded, [], TOKENIZER)
    assert "rank_3" in (tmp_path / "r.html").read_text()


def test_json_has_one_string_for_each_run_of_targets(tmp_path):
    r = rendering(
        ("<|im_start|>", "template", None, False),
        (f"1+1{END}", "assistant", 1, True),
        ("2", "tool", 2, False),
        (f"Two.{END}", "assistant", 3, True),
    )
    out = saved(tmp_path, data([single(4, r, True)]))["rows"][0]
    assert out["targets"] == ["1+1<|im_end|>", "Two.<|im_end|>"]
    assert (out["label"], out["kind"], out["line"]) == (True, "labelled", 4)


def test_json_has_the_weights(tmp_path):
    r = chat("Hi", "Yo")
    weighted = replace(r, row=replace(r.row, weights=np.full(len(r.row.targets), 0.5, np.float32)))
    row = saved(tmp_path, data([single(1, weighted)]))["rows"][0]
    assert row["weights"] == [0.5 if t else 0 for t in r.row.targets]
    assert "weights" not in saved(tmp_path, data([single(1, r)]))["rows"][0]


def test_json_has_the_targets_that_the_objective_trains_on(tmp_path):
    r, other = chat("Hi", "Yo"), chat("Hi", "Ya")
    late = replace(r.row, targets=r.row.targets & (np.arange(len(r.row.targets)) > r.prompt_length))
    row = pair(1, r, other)
    divergent = replace(row, examples=(replace(row.examples[0], rows=(late, other.row)),))
    chosen = saved(tmp_path, data([divergent]))["rows"][0]["chosen"]
    assert chosen["targets"] == ["o<|im_end|>"]
    assert [(s["text"], s["target"]) for s in chosen["spans"][-2:]] == [("Y", False), ("o<|im_end|>", True)]
    imitated = replace(row, examples=(replace(row.examples[0], rows=(r.row,)),))
    row = saved(tmp_path, data([imitated]))["rows"][0]
    assert (row["chosen"]["targets"], row["rejected"]["targets"]) == (["Yo<|im_end|>"], [])


def test_json_says_where_the_boundary_is_not_proved(tmp_path):
    row = single(1, chat("Hi", "Yo"))
    assert saved(tmp_path, data([row]))["rows"][0]["boundary_proved"]
    assert not saved(tmp_path, data([beginning(row, 1, 2)]))["rows"][0]["boundary_proved"]
    assert not saved(tmp_path, data([replace(row, prompts={"row": None})]))["rows"][0]["boundary_proved"]


def test_both_splits_are_in_the_reports(tmp_path):
    held = pair(1, chat("Name a bird.", "Owl."), chat("Name a bird.", "Elm."), file="held.jsonl")
    loaded = data([GOOD], heldout=[held])
    assert [(r["split"], r["file"]) for r in saved(tmp_path, loaded)["rows"]] == [
        ("train", "pairs.jsonl"),
        ("heldout", "held.jsonl"),
    ]
    assert "Owl." in html(tmp_path, loaded).shown()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for write, setting in ((write_json, "--json"), (write_html, "--html")):
        with pytest.raises(ValueError, match=f"{setting} .*file/out: cannot be written"):
            write(tmp_path / "file" / "out", data([GOOD]), [], TOKENIZER)


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    before = saved(tmp_path, data([GOOD]))
    monkeypatch.setattr(report, "_row", lambda *_: {}["gone"])
    with pytest.raises(KeyError):
        saved(tmp_path, data([GOOD]))
    assert json.loads((tmp_path / "out.json").read_text()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


# ---------------------------------------------------------------------- tokens as text


def test_pieces_of_bytes_and_whole_characters():
    tokens = np.array(ids("né🐟!"))
    assert list(Texts(TOKENIZER).pieces(tokens, 0, len(tokens))) == [
        (0, 1, "n"),
        (1, 3, "é"),
        (3, 7, "🐟"),
        (7, 8, "!"),
    ]


def test_pieces_of_bytes_that_are_no_text_end():
    """A cut character at the end of a span, and more stray bytes than a character has."""
    tokens = np.array(ids("a🐟"))[:-1]
    pieces = list(Texts(TOKENIZER).pieces(tokens, 0, len(tokens)))
    assert [(a, b) for a, b, _ in pieces] == [(0, 1), (1, 4)]
    strays = np.array([int(tokens[1])] * 20)
    pieces = list(Texts(TOKENIZER).pieces(strays, 0, 20))
    assert [a for a, _, _ in pieces] == [0, *(b for _, b, _ in pieces[:-1])]
    assert pieces[-1][1] == 20


def test_pieces_of_a_real_vocabulary_are_its_text(smollm2):
    text = "<|im_start|>user\nWie heißt der Fisch 🐠 auf 日本語?<|im_end|>\n  def f():\n\treturn 1\n"
    tokens = np.array(ids(text, smollm2))
    pieces = list(Texts(smollm2).pieces(tokens, 0, len(tokens)))
    assert "".join(piece for _, _, piece in pieces) == text
    assert [a for a, _, _ in pieces] == [0, *(b for _, b, _ in pieces[:-1])]
    assert "🐠" in "".join(p for _, _, p in pieces if "\ufffd" not in p)
    assert len(pieces) > len(text.split())


def test_text_of_a_span_keeps_the_space_it_begins_with():
    """A vocabulary that marks words, whose decoder drops the first mark of a text."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "▁the", "▁cat", "."])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokens = np.array([1, 2, 3])
    assert tokenizer.decode(tokens[1:].tolist()) == "cat."
    assert Texts(tokenizer).span(tokens, 1, 3) == " cat."
    assert list(Texts(tokenizer).pieces(tokens, 0, 3)) == [(0, 1, "the"), (1, 2, " cat"), (2, 3, ".")]


def test_json_of_a_real_tokenizer(tmp_path, smollm2):
    chosen, rejected = (chat("Name a fish.", a, tokenizer=smollm2) for a in ("Cod 🐟", "Oak"))
    row = saved(tmp_path, data([pair(1, chosen, rejected)]), smollm2)["rows"][0]
    assert row["chosen"]["targets"] == ["Cod 🐟<|im_end|>"]
    assert "".join(s["text"] for s in row["chosen"]["spans"]) == smollm2.decode(row["chosen"]["token_ids"])
    assert row["chosen"]["prompt_length"] == len(prompt_of(chosen))


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a b", "a·b"),
        ("\n\t\r", "↵⇥␍"),
        ("<b>&'\"", "&lt;b&gt;&amp;&#x27;&quot;"),
        ("\x1b[0m", "⟨U+001B⟩[0m"),
        ("a\u202eb\u200bc\u00a0d", "a⟨U+202E⟩b⟨U+200B⟩c⟨U+00A0⟩d"),
        ("👩\u200d🔬", "👩\u200d🔬"),
    ],
)
def test_what_cannot_be_seen_is_shown(text, shown):
    assert visible(text) == shown


# ---------------------------------------------------------------------- HTML


def test_html_shows_each_token_with_its_role_and_whether_it_is_a_target(tmp_path):
    page = html(tmp_path, data([GOOD]))
    assert page.shown("user") == "Name·a·fish." * 2
    assert page.shown(target=True) == "Cod.<|im_end|>Oak.<|im_end|>"
    assert "userName·a·fish." in page.text  # the role stands before the words, for those who see no colours
    assert page.shown("template").count("<|im_start|>user↵") == 2
    first = [title for (role, _, _), title in zip(page.tokens, page.titles, strict=True) if role == "user" and title][0]
    assert first == str(ids("N")[0])


def test_targets_are_marked_by_more_than_a_colour(tmp_path):
    html(tmp_path, data([GOOD]))
    style = re.search(r"\.target i \{([^}]*)\}", (tmp_path / "out.html").read_text())
    assert style is not None
    assert "font-weight: 700" in style[1]
    assert "border-bottom" in style[1]


def test_html_is_one_page_without_scripts_or_links_outwards(tmp_path):
    evil = chat(
        '<script src="https://x.example/a.js">alert(1)</script><img src=x onerror=alert(2)>', "</span></main>Yo"
    )
    row = pair(1, evil, chat("Hi", "Yo", notes=("context: <img src=y>",)), file='<b onclick="x">.jsonl')
    page = html(tmp_path, data([row]))
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert names <= {"lang", "charset", "name", "content", "class", "id", "title", "href"}
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert page.shown(target=True).startswith("</span></main>Yo")
    assert "@import" not in (tmp_path / "out.html").read_text()
    assert "url(" not in (tmp_path / "out.html").read_text()


def test_html_breaks_words_of_long_cells_only(tmp_path):
    """Where a cell may break anywhere its column can shrink to a letter: severity and kind are one word a line."""
    loaded = data([GOOD, pair(2, chat("Name a fish.", "Cod."), chat("Name a fish.", "Cod."))])
    write_html(tmp_path / "r.html", loaded, check(loaded, TOKENIZER), TOKENIZER)
    page = (tmp_path / "r.html").read_text()
    rules = dict(re.findall(r"^([^{}\n]+) \{([^}]*)\}", page.partition("<style>")[2], re.MULTILINE))
    assert [rule for rule, body in rules.items() if "overflow-wrap" in body] == [".long", ".sequence"]
    table = page.partition("<h2>Findings</h2>")[2].partition("</table>")[0]
    cells = re.findall(r"<td( class=\"[a-z]+\")?>(?:<a[^>]*>)?([^<]+)", table)
    assert [text for given, text in cells if given == ' class="long"'][0] == "pairs.jsonl:2"
    assert {text for given, text in cells if "long" not in given} <= {
        "error",
        "warning",
        "dead_pair",
        "duplicate",
        "train",
    }


def test_html_has_both_colour_schemes(tmp_path):
    html(tmp_path, data([GOOD]))
    text = (tmp_path / "out.html").read_text()
    used = set(re.findall(r"var\((--\w+)\)", text))
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    assert used
    for part in (light, dark.split("</style>")[0].partition("body {")[0]):
        assert used <= set(re.findall(r"(--\w+):", part))


def test_findings_link_to_the_rows_they_are_about(tmp_path):
    bad = pair(7, chat("Hi", "Cod", end=""), chat("Hi", "Oak"))
    page = html(tmp_path, data([GOOD, bad], dropped=[(9, "no_target", "empty")]))
    links = [value[1:] for name, value in page.attributes if name == "href"]
    places = [value for name, value in page.attributes if name == "id"]
    assert links == ["row-1"]
    assert set(links) <= set(places)
    assert "pairs.jsonl:9" in page.text
    section = page.text.partition("Rows\n")[2]
    assert "lost_terminator: chosen ends with" in section  # the row says it itself, too
    assert "no_target" not in section
    assert "4 of 4 sequences begin" in page.text.partition("Findings")[0]
    assert "data check failed" in " ".join(page.text.split()).lower()
    assert "1 no_target" in page.text


def test_html_shows_the_first_rows_and_all_with_findings(tmp_path):
    rows = [pair(i, chat(f"Q{i}", "Yes"), chat(f"Q{i}", "Nay")) for i in range(1, 9)]
    rows[6] = replace(rows[6], truncated=1)
    page = html(tmp_path, data(rows), rows=2)
    assert [value for name, value in page.attributes if name == "id"] == ["row-0", "row-1", "row-6"]
    assert "Shown: 3 of 8 rows, the first 2 and those with a finding." in page.text


def test_html_says_how_many_rows_it_leaves_out(tmp_path):
    rows = [replace(pair(i, chat(f"Q{i}", "Y"), chat(f"Q{i}", "N")), truncated=1) for i in range(1, 254)]
    page = html(tmp_path, data(rows), rows=50)
    assert sum(name == "id" for name, _ in page.attributes) == 250
    assert "3 more with a finding are only in the JSON report" in page.text


def test_html_says_how_many_findings_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_FINDINGS", 2)
    rows = [replace(pair(i, chat(f"Q{i}", "Y"), chat(f"Q{i}", "N")), truncated=1) for i in range(1, 4)]
    page = html(tmp_path, data(rows))
    assert "The first 2 are listed" in page.text
    assert [value for name, value in page.attributes if name == "href"] == ["#row-0", "#row-1"]
    assert "are listed" not in html(tmp_path, data(rows[:2])).text


def test_html_of_labelled_rows_and_weights(tmp_path):
    r = chat("Hi", "Yo")
    weighted = replace(r, row=replace(r.row, weights=np.full(len(r.row.targets), 0.5, np.float32)))
    page = html(tmp_path, data([single(1, weighted, False), *labelled(1, 0)]))
    assert "labelled, undesirable" in page.text
    assert any(
        value == "assistant, message 2, target of weight 0.5" for name, value in page.attributes if name == "title"
    )
    assert page.text.count("prompt ends") == 2
