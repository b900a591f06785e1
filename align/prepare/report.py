"""The findings and the tokens they are about, as JSON for programs and as one HTML page for people.

The page needs no script and no other file; what a text holds is shown, never interpreted.
"""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from align.files import atomic_writer
from align.jsons import Json, Tokenizer
from align.prepare.check import Finding, counted, failed, place, prompt_difference, target_runs, trained

if TYPE_CHECKING:
    from align.data.chat import Rendering
    from align.data.examples import Loaded
    from align.data.load import Data
    from align.types import Row

_FINDINGS = 1000  # lines of the table of findings


class Texts:
    """Tokens as text. Special tokens are shown; a token's text is the one it has after the token before it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._after = lru_cache(maxsize=1 << 16)(self._text_after)

    def span(self, ids: np.ndarray, start: int, end: int) -> str:
        """Text of ids[start:end]."""
        return self._text_after(int(ids[start - 1]) if start else None, tuple(ids[start:end].tolist()))

    def pieces(self, ids: np.ndarray, start: int, end: int) -> Iterator[tuple[int, int, str]]:
        """ids[start:end] as (start, end, text), a token each; tokens that share a character are one piece."""
        begin = start
        for i in range(start, end):
            text = self._after(int(ids[begin - 1]) if begin else None, tuple(ids[begin : i + 1].tolist()))
            # U+FFFD is what part of a character decodes to, and in bad text also itself: no character has 8 tokens
            if "\ufffd" not in text or i + 1 == end or i + 1 - begin >= 8:
                yield begin, i + 1, text
                begin = i + 1

    def _text_after(self, before: int | None, ids: tuple[int, ...]) -> str:
        if before is None:
            return self._decode(ids)
        # many tokenizers drop the first space of a text
        head, whole = self._decode((before,)), self._decode((before, *ids))
        if whole.startswith(head) and not head.endswith("\ufffd"):
            return whole[len(head) :]
        return self._decode(ids)

    def _decode(self, ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def write_json(path: str | Path, data: Data, findings: Sequence[Finding], tokenizer: Tokenizer) -> None:
    """All of it, row by row: memory does not grow with the data. Raises ValueError for a path that cannot be written.

    rows_in, rows_kept, dropped {reason: n}, train and heldout (their audits), failed, figures {split: {kind: ...}},
    findings [{kind, severity, split, row, file, line, detail}], rows. A row holds split, row, file, line, kind,
    label when it has one, and chosen and rejected, or rank_1, rank_2 and so on, or, flat, its one sequence: token_ids,
    prompt_length, boundary_proved, finished, spans [{start, end, role, message, target, text}] and targets, the decoded
    text of each unbroken run of targets; weights where tokens weigh otherwise than 1.
    """
    figures: dict[str, Json] = {"train": {}, "heldout": {}}
    for finding in findings:
        if finding.severity == "figure":
            figures[finding.split][finding.kind] = {"detail": finding.detail, **finding.numbers}
    head = data.audit.as_dict() | {"failed": failed(findings), "figures": figures}
    rest = [finding.as_dict() for finding in findings if finding.severity != "figure"]
    texts = Texts(tokenizer)

    def write(stream: TextIO) -> None:
        stream.write("{\n")
        for key, value in head.items():
            stream.write(f"{_json(key)}: {_json(value)},\n")
        _write_list(stream, "findings", rest)
        stream.write(",\n")
        _write_list(stream, "rows", (_row(split, loaded, texts) for split, loaded in _in_order(data)))
        stream.write("\n}\n")

    write_atomic(path, "--json", write)


def write_html(path: str | Path, data: Data, findings: Sequence[Finding], tokenizer: Tokenizer, rows: int = 50) -> None:
    """One page: the account, the findings, the tokens of the first `rows` rows and of up to 200 with findings.

    Raises ValueError for a path that cannot be written.
    """
    order = _in_order(data)
    by_row: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.file is not None:
            by_row.setdefault((finding.split, finding.where), []).append(finding)
    shown = [*range(min(rows, len(order)))]
    with_finding = [i for i in range(len(shown), len(order)) if (order[i][0], order[i][1].source) in by_row]
    shown += with_finding[:200]
    anchors = {(order[i][0], order[i][1].source): f"row-{i}" for i in shown}
    omitted = len(with_finding) - len(with_finding[:200])
    said = f"Shown: {len(shown)} of {len(order)} rows, the first {min(rows, len(order))} and those with a finding"
    said += f"; {omitted} more with a finding are only in the JSON report." if omitted else "."
    texts = Texts(tokenizer)

    def write(stream: TextIO) -> None:
        verdict = "failed" if failed(findings) else "passed"
        stream.write(_HEAD + f'<h1>Data check <b class="{verdict}">{verdict}</b></h1>\n')
        stream.writelines(_account(data))
        stream.writelines(_figures(findings))
        stream.writelines(_table(findings, anchors))
        stream.write(f"<h2>Rows</h2>\n<p>{said}</p>\n{_LEGEND}")
        for i in shown:
            split, loaded = order[i]
            stream.writelines(_section(f"row-{i}", split, loaded, by_row.get((split, loaded.source), []), texts))
        stream.write("</main></body></html>\n")

    write_atomic(path, "--html", write)


def _in_order(data: Data) -> list[tuple[str, Loaded]]:
    return [("train", loaded) for loaded in data.train_rows] + [("heldout", loaded) for loaded in data.heldout_rows]


# ---------------------------------------------------------------------- JSON


def _row(split: str, loaded: Loaded, texts: Texts) -> Json:
    file, line = place(loaded.source)
    out: Json = {"split": split, "row": line, "file": file, "line": line, "kind": loaded.kind}
    if loaded.kind == "labelled":
        out["label"] = loaded.examples[0].label
    if loaded.truncated:
        out["truncated_turns"] = loaded.truncated
    sequences = {name: _sequence(loaded, name, texts) for name in loaded.renderings}
    return out | sequences.get("row", sequences)


def _sequence(loaded: Loaded, name: str, texts: Texts) -> Json:
    rendering, row = loaded.renderings[name], _row_of(loaded, name)
    ids = row.token_ids
    out: Json = {
        "token_ids": ids.tolist(),
        "prompt_length": rendering.prompt_length,
        "boundary_proved": loaded.prompts[name] is not None and prompt_difference(loaded, name) is None,
        "finished": loaded.finished[name],
        "spans": [span | {"text": texts.span(ids, span["start"], span["end"])} for span in _spans(rendering, row)],
        "targets": [texts.span(ids, start, end) for start, end in target_runs(row.targets)],
    }
    if row.weights is not None:
        out["weights"] = np.where(row.targets, row.weights, 0).tolist()
    return out


def _row_of(loaded: Loaded, name: str) -> Row:
    """The row with the targets that the objective trains on, none if it does not read the sequence."""
    row = trained(loaded, name)
    if row is None:
        row = replace(loaded.renderings[name].row, targets=np.zeros_like(loaded.renderings[name].row.targets))
    return row


def _spans(rendering: Rendering, row: Row) -> Iterator[Json]:
    """The spans of the rendering, cut where an objective takes only some of a span's tokens as targets."""
    for span in rendering.spans:
        edges = np.flatnonzero(np.diff(row.targets[span.start : span.end])) + 1 + span.start
        bounds = [span.start, *edges.tolist(), span.end]
        for start, end in pairwise(bounds):
            target = bool(row.targets[start:end].any())
            yield {"start": start, "end": end, "role": span.role, "message": span.message, "target": target}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write_list(stream: TextIO, name: str, items: Any) -> None:
    stream.write(f"{_json(name)}: [")
    for number, item in enumerate(items):
        stream.write(("," if number else "") + "\n" + _json(item))
    stream.write("\n]")


def write_atomic(path: str | Path, setting: str, write: Callable[[TextIO], None]) -> None:
    """Under another name until it is whole: no reader meets half a report. Raises ValueError where none can be."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path) as stream:
            write(stream)
    except OSError as error:
        raise ValueError(f"{setting} {path}: cannot be written ({error.strerror}); give another path") from error


# ---------------------------------------------------------------------- HTML


def visible(text: str) -> str:
    """White space and characters without a shape as signs that can be seen, escaped for HTML."""
    signs = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
    out = []
    for c in text:
        if c in signs:
            out.append(signs[c])
        elif unicodedata.category(c) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs") and c != "\u200d":
            out.append(f"⟨U+{ord(c):04X}⟩")  # also those that turn the direction of the text round
        else:
            out.append(c)
    return html.escape("".join(out))


def _account(data: Data) -> Iterator[str]:
    yield '<div class="wide"><table>'
    yield "<tr><th>split<th>sources<th>rows in<th>kept<th>dropped<th>by reason<th>target tokens</tr>\n"
    for name, split in (("train", data.audit.train), ("heldout", data.audit.heldout)):
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(split.dropped.items())) or "none"
        cells = (
            split.rows_in,
            split.rows_kept,
            sum(split.dropped.values()),
            reasons,
            split.target_tokens,
        )
        yield f'<tr><td>{name}<td class="long">{html.escape(", ".join(split.sources))}'
        yield "".join(f"<td>{html.escape(str(cell))}" for cell in cells) + "</tr>\n"
    yield "</table></div>\n"


def _figures(findings: Sequence[Finding]) -> Iterator[str]:
    figures = [finding for finding in findings if finding.severity == "figure"]
    yield "<ul>\n"
    for finding in figures:
        yield f"<li>{finding.split}: {html.escape(finding.detail)}</li>\n"
    yield "</ul>\n"


def _table(findings: Sequence[Finding], anchors: dict[tuple[str, str], str]) -> Iterator[str]:
    rest = [finding for finding in findings if finding.severity != "figure"]
    yield f"<h2>Findings</h2>\n<p>{counted(findings)}."
    yield f" The first {_FINDINGS} are listed; the JSON report has all.</p>\n" if len(rest) > _FINDINGS else "</p>\n"
    if not rest:
        return
    yield '<div class="wide"><table>'
    yield "<tr><th>severity<th>kind<th>split<th>row<th>detail</tr>\n"
    for finding in rest[:_FINDINGS]:
        where = "all" if finding.file is None else html.escape(finding.where)
        anchor = anchors.get((finding.split, finding.where))
        link = f'<a href="#{anchor}">{where}</a>' if anchor else where
        yield (
            f'<tr><td class="{finding.severity}">{finding.severity}<td>{html.escape(finding.kind)}<td>{finding.split}'
            f'<td class="long">{link}<td class="long">{html.escape(finding.detail)}</tr>\n'
        )
    yield "</table></div>\n"


def _section(anchor: str, split: str, loaded: Loaded, findings: Sequence[Finding], texts: Texts) -> Iterator[str]:
    label = loaded.examples[0].label
    kind = loaded.kind if label is None else f"{loaded.kind}, {'desirable' if label else 'undesirable'}"
    yield f'<section id="{anchor}"><h3>{html.escape(loaded.source)} <small>{split}, {kind}</small></h3>\n'
    for finding in findings:
        text = html.escape(f"{finding.kind}: {finding.detail}")
        yield f'<p class="finding"><b class="{finding.severity}">{finding.severity}</b> {text}</p>\n'
    for name, rendering in loaded.renderings.items():
        row = _row_of(loaded, name)
        said = f"{len(row.token_ids)} tokens, {int(row.targets.sum())} targets, prompt of {rendering.prompt_length}"
        if not loaded.finished[name]:
            said += ", declared cut off"
        yield f'<h4>{name} <small>{said}</small></h4>\n<div class="sequence">'
        for span in _spans(rendering, row):
            yield from _span(span, rendering.prompt_length, row, texts)
        yield "</div>\n"
    yield "</section>\n"


def _span(span: Json, prompt_length: int, row: Row, texts: Texts) -> Iterator[str]:
    role, start, end = html.escape(span["role"]), span["start"], span["end"]
    title = role if span["message"] is None else f"{role}, message {span['message'] + 1}"
    if span["target"]:
        title += ", target" if row.weights is None else f", target of weight {row.weights[start]:g}"
    yield f'<span class="{role}{" target" if span["target"] else ""}" title="{title}">'
    if role != "template":
        yield f"<small>{role}</small>"
    for first, last, text in texts.pieces(row.token_ids, start, end):
        if first == prompt_length:
            yield '<em title="what stands before was not written by the policy">prompt ends</em>'
        ids = " ".join(map(str, row.token_ids[first:last].tolist()))
        yield f'<i title="{ids}">{visible(text)}</i>' + ("<br>" if "\n" in text else "")
    yield "</span>"


_LEGEND = """<p class="legend">Colours: <span class="template"><i>template</i></span>
<span class="system"><i>system</i></span> <span class="user"><i>user</i></span>
<span class="assistant"><i>assistant</i></span> <span class="tool"><i>tool</i></span>
<span class="text"><i>plain text</i></span>. Bold and underlined:
<span class="assistant target"><i>target</i></span>, a token that carries loss; all others are context. Each box is a
token, or tokens that share a character; pointing at it shows its number. <i>·</i> a space, <i>↵</i> a line break.</p>
"""

_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data check</title>
<style>
:root { color-scheme: light dark; --back: #ffffff; --fore: #1b1b1b; --faint: #5f5f5f; --line: #c4c4c4;
  --template: #e8e8e8; --system: #e9dcf7; --user: #d6e6fb; --assistant: #d8f0d9; --tool: #fbe3c6; --text: #d3eeee;
  --bad: #a40000; --warn: #7a4b00; --good: #0b6623; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --fore: #ececec; --faint: #a6a6a6; --line: #55585c;
  --template: #33363a; --system: #42325a; --user: #1f3d63; --assistant: #1f4a2a; --tool: #5a3c12; --text: #14494b;
  --bad: #ff8a80; --warn: #ffc966; --good: #7bdc8e; } }
body { background: var(--back); color: var(--fore); font: 15px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 75rem; margin: auto; padding: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: left; vertical-align: top; }
.wide { overflow-x: auto; }
.long { overflow-wrap: anywhere; min-width: 12rem; }
a { color: inherit; }
small { color: var(--faint); font-weight: 400; }
section { border-top: 1px solid var(--line); margin-top: 1.5rem; }
section:target { outline: 2px solid var(--warn); }
h4 { margin: .75rem 0 .25rem; }
.finding { margin: .25rem 0; }
.error, .failed { color: var(--bad); } .warning { color: var(--warn); } .passed { color: var(--good); }
.sequence { font: 13px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; }
.sequence small { margin: 0 .3em; }
.sequence em { background: var(--fore); color: var(--back); margin: 0 .3em; padding: 0 .3em; }
i { font-style: normal; font-family: ui-monospace, monospace; display: inline-block; max-width: 100%;
  border-left: 1px solid var(--line); }
.target i { font-weight: 700; border-bottom: 2px solid var(--fore); }
.template i { background: var(--template); } .system i { background: var(--system); }
.user i { background: var(--user); } .assistant i { background: var(--assistant); }
.tool i { background: var(--tool); } .text i { background: var(--text); }
</style></head><body><main>
"""
