"""The GPU bench runs as a whole on a CPU in float32, counts FLOP as by hand, and refuses what is not the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from align.types import Row
from tests.bench import gpu_vs_trl
from tests.bench.worker import Mismatch
from tests.conftest import pair_of


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "cpu", "--shape", "8b", "--lora", "16"], []])
def test_without_a_gpu_it_says_so_in_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_vs_trl.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "needs a GPU; --device cpu --shape nano" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "objective"), [(0, "wpo"), (2, "dpo")])
def test_all_of_it_runs_on_a_cpu(rank, objective, tmp_path, capsys):
    pytest.importorskip("trl")
    out = tmp_path / "figures.json"
    command = ["--device", "cpu", "--shape", "nano", "--pairs", "3", "--rounds", "1", "--lora", str(rank)]
    command += ["--trl-batch", "2", "--micro-batch-tokens", "200", "--json", str(out), "--objectives", objective]
    assert gpu_vs_trl.main(command) == 0
    (result,) = json.loads(out.read_text())["results"].values()
    assert list(result["variants"]) == [*gpu_vs_trl.TRL, *gpu_vs_trl.ALIGN]
    # with a policy equal to its reference DPO is ln 2 whatever the log-probs are: nothing would be compared
    assert abs(result["variants"]["align"]["found"][0] - np.log(2)) > 1e-4
    for variant in result["variants"].values():
        assert max(variant["apart"]) < 1e-4  # float32; TRL splits the pairs 2 + 1, align by tokens
        assert len(variant["seconds"]) == 1
        assert variant["seconds"][0] > 0
    printed = capsys.readouterr().out
    assert f"python -m tests.bench.gpu_vs_trl {' '.join(command)}" in printed
    assert "Written without a GPU" in printed
    assert "the figures say nothing about a GPU" in printed


def test_flop_by_hand():
    # nano: 3 layers of 128 * 128 (q), 2 * 128 * 64 (k, v), 128 * 128 (o), 3 * 128 * 344 weights: 181248; A = 128;
    # V H = 4096 * 128 = 524288. Prompt of 3, completions of 2 and 4: rows of 5 and 7, padded to 7.
    rows = [Row(np.arange(n, dtype=np.int32) + k * (np.arange(n) >= 3), np.arange(n) >= 3) for k, n in ((0, 5), (9, 7))]
    pairs = [pair_of(*rows)]
    shape = gpu_vs_trl.SHAPES["nano"]
    real = 2 * 3 * (181_248 * 12 + 128 * (25 + 49))
    padded = 2 * 3 * (181_248 * 14 + 128 * (49 + 49))
    shared = 2 * 3 * (181_248 * 9 + 128 * (25 + 49 - 9))
    head = 2 * 524_288 * 6

    def count(variant: str, rank: int = 0) -> tuple[int, int]:
        return gpu_vs_trl.flops(shape, rank, variant, pairs, 8)

    plain = 4 * (real + head)  # forward, backward as two, reference
    assert count("trl default") == (plain, 5 * padded + 5 * head)  # all layers again, and all logits
    assert count("trl no recompute") == (plain, 4 * padded + 5 * head)
    assert count("trl best") == (plain, 3 * padded + 4 * head)
    assert count("align packed") == (plain, 3 * real + 4 * head)
    assert count("align") == count("align selective") == (plain, 3 * shared + 4 * head)
    assert count("align full") == (plain, 4 * shared + 4 * head)
    # frozen weights have no gradient, and the gradient of a frozen head is formed with its logits
    assert count("trl best", rank=2) == (3 * (real + head), 2 * padded + 3 * head)
    assert count("align", rank=2) == (3 * (real + head), 2 * shared + 2 * head)


def test_other_losses_and_gradients_are_refused():
    assert gpu_vs_trl.compared("align", (0.505, 2.0), (0.5, 2.0), (0.02, 0.05)) == pytest.approx([0.01, 0.0])
    for found in ((0.52, 2.0), (0.5, 2.2), (float("nan"), 2.0)):
        with pytest.raises(Mismatch, match="align"):
            gpu_vs_trl.compared("align", found, (0.5, 2.0), (0.02, 0.05))
