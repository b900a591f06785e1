"""`align front` whole, on a tiny model: with a killed run, called again, read again, and with a run that fails."""

from __future__ import annotations

import json

import pytest

from align.cli import main
from align.pareto.arguments import parse
from align.pareto.plan import planned, write_plan
from tests.killer import Hook, leftovers, shared
from tests.trainers.online_runs import rows_of, words_of
from tests.trainers.test_composing import RLOO_WORDS


def words(tmp_path, *more):
    base = (*RLOO_WORDS, "lora.rank=4", "trainer.max_steps=2", "trainer.eval_every=1", "trainer.save_every=1")
    return [*words_of(tmp_path, *base), f"out={tmp_path / 'out'}", *more]


def stamps(out):
    """When each file of the runs was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(out.glob("*/**/*")) if path.is_file()}


@pytest.mark.slow
def test_a_front_is_trained_gone_on_with_and_read_again(tmp_path, capfd):
    out, asked = tmp_path / "out", words(tmp_path, "composers=fixed,tchebycheff_smooth", "weights=0.25/0.75")
    # as a call that was killed within its second run
    plan, elements = planned(parse(asked), None, None, lambda line: None)
    write_plan(out, plan)
    killed = shared().run(["train", *elements[1].words], [Hook("align.engine.local:LocalEngine.step", 2)])
    assert killed.code == -9, killed.said
    assert len(rows_of(out / elements[1].name)) == 1

    assert main(["front", *asked]) == 0
    assert "".join(f"resumed {out / elements[1].name} at step 1".split()) in "".join(capfd.readouterr().err.split())
    data = json.loads((out / "front.json").read_text())
    assert [entry["state"] for entry in data["runs"]] == ["done"] * 2
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    for entry in data["runs"]:
        rows = rows_of(out / entry["name"])
        assert [e["step"] for e in entry["evaluations"]] == [1, 2]
        assert entry["final"] == {name: rows[-1][f"heldout/{name}"] for name in ("mixed", "coin")}
        assert entry["completions"] == 2 * 4 * 2
        assert entry["tokens"] == pytest.approx(8 * sum(row["rollout/tokens"] for row in rows))
        assert leftovers(out / entry["name"]) == []
    weights = [json.loads(json.dumps(entry["weights"])) for entry in data["runs"]]
    assert weights == [{"mixed": 0.25, "coin": 0.75}] * 2

    before = stamps(out)
    assert main(["front", *asked]) == 0
    said = capfd.readouterr().out
    assert "2 of 2 runs are complete" in said
    assert "step 1/2" not in said
    assert stamps(out) == before

    (out / "front.png").unlink()
    low = ("reference_point.mixed=-1", "reference_point.coin=-1")
    assert main(["front", f"out={out}", "report_only=true", *low]) == 0
    wide = json.loads((out / "front.json").read_text())["families"]["fixed"]["hypervolume"]["mean"]
    assert wide > 0
    assert main(["front", f"out={out}", "report_only=true", "spans.mixed=0.5"]) == 0
    data = json.loads((out / "front.json").read_text())
    assert data["families"]["fixed"]["hypervolume"]["mean"] == pytest.approx(2 * wide)  # half a span, twice as far
    assert (out / "front.png").exists()
    assert stamps(out) == before


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, capfd):
    """What no setting shows: a pattern that matches no weight of the model."""
    bad = ("composers=bad:gradient,fixed", "composers.bad.parameters=nothing", "weights=0.5/0.5")
    assert main(["front", *words(tmp_path, *bad)]) == 2
    said = capfd.readouterr()
    assert "bad_mixed-0.5_coin-0.5_seed-0: exit code 2" in said.out
    assert "fixed_mixed-0.5_coin-0.5_seed-0: done" in said.out
    assert "composer.parameters=nothing: matches no" in " ".join(said.err.split())
    data = json.loads((tmp_path / "out" / "front.json").read_text())
    assert [entry["state"] for entry in data["runs"]] == ["missing", "done"]
    assert data["families"]["fixed"]["hypervolume_less_first"] is None
    assert "in no front: bad_mixed-0.5_coin-0.5_seed-0 (missing)" in (tmp_path / "out" / "front.md").read_text()
