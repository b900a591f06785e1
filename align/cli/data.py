"""align data check, align data forms, align data cache, align data pairs, align data judgements."""

from __future__ import annotations

import json
import time
from pathlib import Path

from align.cli.parse import Call, refuse_plugs_of_data
from align.cli.show import show


def check(call: Call) -> int:
    """1 if rows are wrong, else 0."""
    from align.config import compose
    from align.config.validate import check_inputs

    config = compose(call.settings, call.config_dir)
    check_inputs(config, heldout=True)
    from align.build import check_margins, objective, tokenizer
    from align.data.load import load
    from align.data.wanted import Wanted
    from align.prepare.check import check, failed, lines
    from align.prepare.report import write_html, write_json

    # rows are shown as an objective gets them if one is chosen, else as what they are
    chosen = any(word.split("=")[0] in ("recipe", "objective") for word in call.settings)
    wanted = Wanted(kind=None)
    if chosen:
        reader = objective(config)
        check_margins(config, reader)
        wanted = Wanted.by(reader)
    tokens = tokenizer(config)
    data = load(config.data, tokens, wanted, config.seed, keep=True, to_the_end=True)
    findings = check(data, tokens, config.data, wanted.mismatched)
    for line in lines(findings, data.audit):
        show(line)
    for option, write in (("--json", write_json), ("--html", write_html)):
        if option in call.options:
            write(call.options[option], data, findings, tokens)
            show(f"written {call.options[option]}")
    return 1 if failed(findings) else 0


def forms(call: Call) -> int:
    """Each form, or those that are named: what it reads and rows that it would read."""
    from align.data.forms import FORMS, named

    chosen = [named(word, word) for word in call.words] or list(FORMS.values())
    for form in chosen:
        show(f"data.form={form.name}: {form.line}")
        for row in form.example:
            show(f"  {json.dumps(row, ensure_ascii=False)}")
    if "--json" in call.options:
        told = [
            {"name": form.name, "line": form.line, "columns": form.columns, "example": form.example} for form in chosen
        ]
        from align.prepare.report import write_atomic

        write_atomic(
            call.options["--json"], "--json", lambda stream: json.dump(told, stream, ensure_ascii=False, indent=1)
        )
        show(f"written {call.options['--json']}")
    return 0


def cache(call: Call) -> int:
    """What lies in the cache of rendered data; what is removed."""
    from align.config import cache_root
    from align.data.cache import clear, listed

    root, wanted = Path(call.own.get("dir") or cache_root() / "data"), call.own.get("clear")
    if wanted is not None:
        if wanted != "all" and not wanted.isdecimal():
            raise ValueError(f"clear={wanted}: must be all or a number of days; use clear=30")
        count, freed = clear(root, 0.0 if wanted == "all" else float(wanted) * 86400)
        show(f"removed {count} sets, {freed / 2**20:.1f} MiB of {root}")
    kept = listed(root)
    for one in kept:
        day = time.strftime("%Y-%m-%d", time.localtime(one.used))
        fault = f", damaged: {one.fault}" if one.fault else ""
        size = f"{one.bytes / 2**20:8.1f} MiB"
        show(f"{one.path.name}  {size}  {one.examples} examples of {one.sources}, read {day}{fault}")
    show(f"{len(kept)} sets, {sum(one.bytes for one in kept) / 2**20:.1f} MiB in {root}; clear=all removes them")
    return 0


def pairs(call: Call) -> int:
    """Pairs of scored samples by a rule, or of the steps of search trees."""
    scored, trees, out, limit = (call.own.get(key, "") for key in ("scored", "trees", "out", "max_per_prompt"))
    if bool(scored) == bool(trees) or not out:
        raise ValueError("give scored=FILE (or trees=FILE) and out=FILE; several files as scored=A.jsonl,B.jsonl")
    refuse_plugs_of_data(call)
    if trees:
        from align.prepare.search import build_step_pairs

        if call.settings or limit:
            raise ValueError("trees=FILE takes out=FILE only: its pairs are the steps of each tree")
        told = build_step_pairs(_names(trees), Path(out))
        show(f"pairs: {told['pairs_out']} steps from {told['trees_in']} trees, skipped {told['steps_skipped']}")
        return 0
    if limit and not limit.isdecimal():
        raise ValueError(f"max_per_prompt={limit}: must be a whole number")
    rule = [] if any(word.startswith("pairs=") for word in call.settings) else ["pairs=max_min"]
    from align.config import compose

    config = compose([*call.settings, *rule], call.config_dir)
    from align.build import pair_rule
    from align.data.pairs import build_pairs

    account = build_pairs(_names(scored), pair_rule(config), Path(out), int(limit) if limit else None, config.seed)
    for line in account.lines():
        show(line)
    return 0


def judgements(call: Call) -> int:
    """See align.prepare.judgements."""
    from align.prepare.judgements import run

    return run(call.words, show)


def _names(value: str) -> list[str]:
    """A.jsonl, A.jsonl,B.jsonl or [A.jsonl,B.jsonl]"""
    return [name.strip() for name in value.removeprefix("[").removesuffix("]").split(",")]
