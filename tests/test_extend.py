"""docs/extend.md: each snippet is written to a folder outside the repository and its command is run there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.cli import main

pytestmark = pytest.mark.xdist_group("extend")  # some look at the runs of others

PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text()
SECTIONS = re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
SMALL = ["model.hidden_size=16", "model.num_layers=1", "trainer.batch_size=2", "log.tensorboard=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the page's files and its data, in which one stands."""
    path = tmp_path_factory.mktemp("own")
    pairs = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
    arena = [
        {"question": f"{i}?", "answers": ["a", "bc"], "winner": ("first", "second", "tie")[i % 3]} for i in range(9)
    ]
    prompts = [{"prompt": f"{i}?"} for i in range(6)]
    for name, rows in (("pairs", pairs), ("arena", arena), ("prompts", prompts)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in re.findall(r"^```python\n# (\w+\.py)\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL):
        (path / name).write_text(text)
    before, known, found = Path.cwd(), list(sys.path), set(sys.modules)
    os.chdir(path)
    yield path
    os.chdir(before)
    sys.path[:] = known
    for name in [n for n in sys.modules if n.startswith("my_") and n not in found]:
        del sys.modules[name]


def command(text: str) -> list[str]:
    (line,) = re.findall(r"^    align (train .+)$", text, re.MULTILINE)
    return [*line.split(), *(word for word in SMALL if word.partition("=")[0] not in line)]


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("title, text", SECTIONS, ids=[title for title, _ in SECTIONS])
def test_a_part_of_the_page_trains(folder, title, text, capfd):
    words = command(text)
    assert main(["check", *words[1:]]) == 0, capfd.readouterr().err
    assert main(words) == 0, capfd.readouterr().err
    run = folder / next(word for word in words if word.startswith("run.dir=")).removeprefix("run.dir=")
    (path,) = set(re.findall(r"(?:_target_|format|loader|vowels|watch)=(my_\w+\.\w+)", " ".join(words)))
    assert path in (run / "config.yaml").read_text()
    assert any("loss/total" in row for row in rows_of(run))
    assert (run / "final").is_dir()
    if title == "A data format":
        assert json.loads((run / "audit.json").read_text())["dropped"] == {"left_out": 3}
    if title == "A callback":
        assert [line.split()[0] for line in (folder / "losses.txt").read_text().splitlines()] == ["1", "2", "end"]
    if title == "A rollout":
        assert "drawn: 2 prompts" in "".join(capfd.readouterr())


def test_every_group_that_takes_a_class_is_on_the_page():
    assert {title for title, _ in SECTIONS} >= {
        "A loss", "An objective", "An estimator", "A composer", "A reward", "A rollout", "A data format", "A loader",
        "An optimiser", "A callback",
    }  # fmt: skip


def test_a_process_of_its_own_finds_the_file_beside_it(folder):
    """The installed script's sys.path has neither this folder nor the one beside the configs."""
    (folder / "elsewhere" / "configs" / "recipes").mkdir(parents=True)
    (folder / "elsewhere" / "beside.py").write_text("from my_loss import logistic\n")
    (folder / "elsewhere" / "configs" / "recipes" / "own.yaml").write_text("objective:\n  beta: 0.3\n")
    program = (
        "import sys; sys.path = [p for p in sys.path if p]; from align.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["check", "recipe=own", "data.train=pairs.jsonl", "--config-dir", "elsewhere/configs"]
    own = ["objective.loss._target_=beside.logistic"]
    done = subprocess.run([sys.executable, "-c", program, *words, *own], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words, text",
    [
        (["optimizer._target_=my_optimizer.Lyon"], "optimizer._target_=my_optimizer.Lyon: cannot be imported"),
        (["optimizer._target_=my_optimizer.Lion", "optimizer.beta3=1"], "unexpected keyword argument 'beta3'"),
        (["optimizer._target_=my_optimizer.Lion", "engine=zero2"], "use engine=local"),
        (["optimizer._target_=my_optimizer.Lion", "optimizer.lr=-1"], "optimizer.lr=-1.0: must be greater than 0"),
        (["data.format=my_format.nosuch"], "data.format=my_format.nosuch: cannot be imported"),
        (["data.loader=nosuch.load"], "data.loader=nosuch.load: cannot be imported"),
        (["objective._target_=my_objective.PerToken", "objective.bta=1"], "bta"),
        (["objective.loss._target_=my_loss.nosuch"], "my_loss.nosuch"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_does_not_fit_is_refused_without_a_model(words, text, capfd):
    assert main(["check", "recipe=dpo", "model=tiny", "data.train=pairs.jsonl", *words]) == 2
    error = capfd.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_a_format_that_fails_names_the_row_and_is_part_of_what_the_run_is(folder, capfd):
    (folder / "my_faulty.py").write_text("def faulty(record):\n    return {'prompt': record['nothing']}\n")
    words = ["train", "recipe=dpo", "model=tiny", "data.train=pairs.jsonl", *SMALL, "trainer.max_steps=2"]
    assert main([*words, "data.format=my_faulty.faulty", "run.dir=runs/faulty"]) == 2
    assert "pairs.jsonl:1: data.format=my_faulty.faulty failed: KeyError: 'nothing'" in capfd.readouterr().err
    assert main([*words, "data.format=my_faulty.faulty", "run.dir=runs/loss"]) == 2
    assert "run.dir" in capfd.readouterr().err


def test_a_saved_run_of_ones_own_optimiser_is_read(folder):
    saved = yaml.safe_load((folder / "runs" / "optimizer" / "config.yaml").read_text())
    ours = {"lr", "max_grad_norm", "schedule", "warmup_ratio", "min_lr_ratio", "decay_ratio"}
    assert saved["optimizer"].keys() - ours == {"_target_", "beta2"}
    assert (saved["optimizer"]["lr"], saved["optimizer"]["beta2"]) == (1e-4, 0.95)
    assert main(["evaluate", "run.dir=runs/optimizer"]) == 0


def test_a_killed_run_of_ones_own_optimiser_goes_on_bit_for_bit(folder):
    """Two steps and two more are the four of one run, momentum and all."""
    words = ["train", "recipe=dpo", "model=tiny", "data.train=pairs.jsonl", *SMALL, "trainer.save_every=2"]
    words += ["optimizer._target_=my_optimizer.Lion", "optimizer.lr=1e-2", "trainer.schedule_steps=4"]
    assert main([*words, "trainer.max_steps=4", "run.dir=runs/whole"]) == 0
    assert main([*words, "trainer.max_steps=2", "run.dir=runs/halves"]) == 0
    assert main([*words, "trainer.max_steps=4", "run.dir=runs/halves"]) == 0
    finals = [folder / "runs" / name / "final" for name in ("whole", "halves")]
    whole, halves = ({p.name: p.read_bytes() for p in path.glob("*.safetensors")} for path in finals)
    assert whole
    assert whole == halves


def test_a_format_is_for_data_that_are_given_and_not_for_rows_that_align_writes(folder, capfd):
    (folder / "my_prompts.py").write_text(
        "def ask(record):\n    assert record.keys() == {'prompt'}\n"
        "    return {'question': record['prompt'] + '!', 'answer': '#### 1'}\n"
    )
    own = "data.format=my_prompts.ask"
    assert main(["check", "recipe=multiturn_dpo", "model=tiny", own]) == 2
    assert "data.format has no effect: collect=... writes its rows itself" in capfd.readouterr().err
    words = ["recipe=online_dpo", "model=tiny", "data.train=prompts.jsonl", *SMALL, own, "data.form=gsm8k"]
    words += ["trainer.rounds=1"]
    words += ["sampling.max_new_tokens=4", "sampling.n=4", "reward.vowels=my_reward.vowels", "run.dir=runs/rounds"]
    assert main(["train", *words, "trainer.prompts_per_round=4", "trainer.epochs=1"]) == 0, capfd.readouterr().err
