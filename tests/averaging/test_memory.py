"""Averaging real checkpoints: memory stays below a bound that no tensor sets, and the result is exact."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.averaging.build import ulps
from tests.bench.average import checkpoints, measured


@pytest.mark.slow
def test_three_smollm2_checkpoints_in_a_gibibyte_and_to_the_last_bit(tmp_path):
    paths = checkpoints(tmp_path)
    found = measured([*map(str, paths), f"out={tmp_path / 'out'}"])
    assert found["peak_mib"] < 1024
    files = [safe_open(path / "model.safetensors", "pt") for path in (*paths, tmp_path / "out")]
    farthest = 0
    for key in files[0].keys():  # noqa: SIM118
        *xs, got = (file.get_tensor(key) for file in files)
        assert torch.equal(got, torch.stack(xs).double().mean(0).float())
        # a sum in float32 is at most a few places away from it, counted at the largest of the three
        gap = (torch.stack(xs).mean(0) - got).abs() / torch.stack(xs).abs().amax(0).clamp(min=1e-30)
        assert float(gap.max()) <= 2 * torch.finfo(torch.float32).eps
        farthest = max(farthest, ulps(got, xs[0]))
    assert farthest > 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path):
    """One tensor of 480 MB a model, three of them, in the two methods that need most: below a GiB as well."""
    from tests.averaging.build import model

    paths = [model(tmp_path / str(i), i, tokenizer=False) for i in range(3)]
    for i, path in enumerate(paths):
        big = torch.full((30_000, 4_000), float(i + 1))
        save_file({"model.embed_tokens.weight": big}, path / "model.safetensors", {"format": "pt"})
    del big
    tuned, base = [str(path) for path in paths[1:]], f"base={paths[0]}"
    for words in (["method=stock"], ["method=localize", "density=0.1"]):
        found = measured([*tuned, base, f"out={tmp_path / words[0]}", *words])
        assert found["peak_mib"] < 1024
    with safe_open(tmp_path / "method=stock" / "model.safetensors", "pt") as file:
        # offsets 1 and 2 in one direction: cosine 1, the mean of 2 and 3
        assert torch.equal(file.get_slice("model.embed_tokens.weight")[-2:], torch.full((2, 4_000), 2.5))
