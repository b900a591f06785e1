"""docs/scale.md holds what the formulas say, and the formulas say what comes out by hand."""

from __future__ import annotations

import pytest

from tests.bench import scale_table
from tests.bench.scale_table import GIB, RANK, SHAPES

ONE, EIGHT, _ = SHAPES


def cell(title: str, row: list[str], column: str) -> str:
    """A cell of the table below a title, by the beginning of its row and the name of its column."""
    lines = scale_table.lines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"**{title}")) + 2
    table = [[word.strip() for word in line.split("|")[1:-1]] for line in lines[start : lines.index("", start)]]
    return next(line for line in table if line[: len(row)] == row)[table[0].index(column)]


def test_the_page_holds_what_the_script_prints():
    page = scale_table.PAGE.read_text()
    assert scale_table.written(page) == page
    assert scale_table.BEGIN + "\n" + "\n".join(scale_table.lines()) + scale_table.END in page


def test_a_page_without_a_place_for_the_tables_is_refused():
    with pytest.raises(ValueError, match="has no lines"):
        scale_table.written("nothing here")


def test_weights_and_adapters_are_those_of_llama_3():
    # 32 layers of q, o 2 * 4096^2, k, v 2 * 4096 * 1024, MLP 3 * 4096 * 14336, norms 2 * 4096: 218112000 each;
    # a last norm of 4096; embeddings and head 2 * 128256 * 4096 = 1050673152
    assert EIGHT.weights() == 32 * 218_112_000 + 4096 + 1_050_673_152 == 8_030_261_248
    # tied: 16 layers of 2 * 2048^2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048 = 60821504; 2048; 128256 * 2048
    assert ONE.weights() == 16 * 60_821_504 + 2048 + 262_668_288 == 1_235_814_400
    # inputs + outputs of q 4096, k and v 2560 each, o 4096, gate and up 10240 each, down 10240: 44032 a layer
    assert ONE.adapter(RANK) == 16 * 16 * 44_032


def test_bytes_on_a_gpu_by_hand():
    # 8B on 4 GPUs, float32 weights 4, their bfloat16 copies 2, gradients 4, moments 8; zero1: 10 + (4 + 8) / 4 = 13,
    # 104393396224 bytes = 97.2 GiB; zero2: 6 + 16 / 4 = 10, 74.8 GiB; zero3 on 8: 16 / 8 = 2, 15.0 GiB
    states = "Weights, gradients and optimiser"
    assert cell(states, ["8B", "zero1"], "4 GPUs") == "97"
    assert cell(states, ["8B", "zero2"], "4 GPUs") == "75"
    assert cell(states, ["8B", "zero3"], "8 GPUs") == "15"
    # local: 18 bytes a weight, 134.6 GiB; LoRA: 2 of the model, 18 of the adapter's 41943040 weights: 15.7 GiB
    assert cell(states, ["8B", "local, zero0"], "1 GPU") == "135"
    assert EIGHT.adapter(RANK) == 41_943_040
    assert cell(states, ["8B", "local, zero0, LoRA 16"], "1 GPU") == "16"


def test_activations_and_fewest_gpus_by_hand():
    # 1B, full: boundaries 16 * 2 * 2048 = 65536 bytes a token; one layer 133120, which is
    # 2 * (4 * 2048 + 3 * 2048 + 3 * 1024 + 4 * 8192) + 16 * 2048; 8192 tokens of 198656 bytes: 1627389952 = 1.52 GiB
    assert ONE.activations("full", 8192) == 1_627_389_952
    assert cell("Activations", ["1B"], "full") == "1.5"
    # of 24 GiB 19.2 are used; a byte a weight is 1.151 GiB. zero2 on 2 GPUs: 6 + 16 / 2 = 14 bytes, 16.1 GiB, fit with
    # the activations' 1.5; on one 22 bytes, 25.3 GiB, do not. zero3 on one: 16 bytes, 18.4 GiB, do not with 1.5
    assert cell("Fewest", ["zero2"], "1B, 24 GiB") == "2"
    assert cell("Fewest", ["zero3"], "1B, 24 GiB") == "2"
    # 70B needs 6 bytes a weight in whole copies under zero2, however many GPUs there are: 394 GiB
    assert cell("Fewest", ["zero2"], "70B, 139 GiB") == "-"


def test_traffic_by_hand():
    # 8B on 8 GPUs: 7/8 of 3 * 4 bytes for 8030261248 weights is 84317743104 bytes; at 450 GB/s 0.187 s
    sent = "What each GPU sends"
    assert scale_table.traffic(3, EIGHT.weights(), 0, 8, 1) == 84_317_743_104
    assert cell(sent, ["8B", "zero3, each micro-batch"], "8 GPUs, GB") == "84"
    assert cell(sent, ["8B", "zero3, each micro-batch"], "NVLink, s") == "0.19"
    # 4 micro-batches: zero2 reduces 4 times and gathers once, 5 * 4 bytes; zero3 does everything 4 times
    assert scale_table.traffic(2, 100, 0, 2, 4) == 20 * 100 / 2
    assert scale_table.traffic(3, 100, 0, 2, 4) == 48 * 100 / 2
    # LoRA: frozen weights in bfloat16 are gathered twice, those of the adapter as any other
    assert scale_table.traffic(3, 10, 100, 2, 1) == (2 * 2 * 100 + 12 * 10) / 2
    # one GPU has nobody to send to
    assert scale_table.traffic(3, 100, 100, 1, 4) == 0


def test_tokens_that_hide_the_traffic_take_as_long_as_it():
    # of n weights, 6 FLOP each a token at 346.15 TFLOP/s against 12 bytes each at 50 GB/s: 13846 tokens
    tokens = scale_table.hiding_tokens(scale_table.ONE_LINK)
    assert tokens == pytest.approx(13846)
    assert 6 * tokens / scale_table.SPEED == pytest.approx(12 / scale_table.ONE_LINK)


def test_host_memory_of_a_node_is_that_of_its_processes():
    # 70B, both offloaded on 16 GPUs: 24 bytes a weight, of which a node of 8 holds half: 12 * 70553706496 bytes
    assert SHAPES[2].weights() == 70_553_706_496
    assert cell("Host memory", ["70B"], "16 GPUs") == f"{846_644_477_952 / GIB:.0f}" == "788"
