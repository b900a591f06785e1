"""In how many places a thing stands: each is added from outside, and nothing else of the package is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from align.vocabulary import shipped_root

ROOT = Path(__file__).parents[1]

LOSS = """from torch.nn.functional import softplus

class Shifted:
    def __init__(self, shift):
        if shift < 0:
            raise ValueError(f"objective.loss.shift={shift}: must be at least 0")
        self.shift = shift

    def __call__(self, ratios, beta):
        return softplus(self.shift - beta * (ratios.chosen - ratios.rejected))
"""
ESTIMATOR = """from align.advantages.base import Estimate

class Scores:
    columns = frozenset({"advantages"})

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, episodes):
        raise AssertionError("not asked by a check")
"""
COMMANDS = """import sys
from align.cli import main
for line in sys.stdin.read().splitlines():
    print(line, main(line.split()), flush=True)
"""


def said(folder: Path, path: Path, *commands: str) -> list[str]:
    """What a fresh process that stands in `folder`, with the package of `path`, prints of each command and returns."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(commands),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_setting_stands_in_the_schema_and_in_yaml(tmp_path):
    for name in ("align", "configs", "recipes"):
        shutil.copytree(shipped_root() / name if name != "align" else ROOT / name, tmp_path / name)
    schema, yaml = tmp_path / "align/config/schema.py", tmp_path / "configs/trainer/offline.yaml"
    field = "    num_samples: Annotated[int, at_least(0)]\n"
    assert schema.read_text().count(field) == 1
    schema.write_text(schema.read_text().replace(field, f"{field}    knob: Annotated[int, at_least(1), resumable]\n"))
    yaml.write_text(yaml.read_text() + "# Turned by nobody, >= 1.\nknob: 3\n")
    lines = said(
        tmp_path,
        tmp_path,
        "check recipe=dpo model=tiny trainer.knob=0",
        "check recipe=grpo model=tiny trainer.knob=4",
        "check recipe=dpo model=tiny trainer.knbo=4",
        "check --keys",
        "show recipe=wpo",
    )
    assert "align: trainer.knob=0: must be at least 1" in lines
    assert "check recipe=grpo model=tiny trainer.knob=4 0" in lines
    assert any("trainer.knbo" in line and "trainer.knob?" in line for line in lines)
    assert "  trainer.knob=3  Turned by nobody, >= 1. [at least 1]" in lines
    assert "  knob: 3" in lines


def test_a_loss_and_an_estimator_are_a_file_and_its_yaml_and_a_format_is_a_file(tmp_path):
    own = tmp_path / "configs"
    for place, text, file, code in (
        ("objective/loss/shifted.yaml", "_target_: my_loss.Shifted\nshift: 0.5\n", "my_loss.py", LOSS),
        ("advantage/scores.yaml", "_target_: my_estimator.Scores\nscale: 2\n", "my_estimator.py", ESTIMATOR),
    ):
        (own / place).parent.mkdir(parents=True)
        (own / place).write_text(text)
        (tmp_path / file).write_text(code)
    (tmp_path / "my_format.py").write_text("def read(row):\n    return row\n")
    dpo, grpo = "recipe=dpo model=tiny", "recipe=rloo model=tiny"
    lines = said(
        tmp_path,
        ROOT,
        f"check --config-dir configs {dpo} objective/loss=shifted",
        f"check --config-dir configs {dpo} objective/loss=shifted objective.loss.shift=-1",
        f"check --config-dir configs {grpo} advantage=scores",
        f"check --config-dir configs {grpo} advantage=scores advantage.scal=3",
        f"check {dpo} data.format=my_format.read",
        f"check {dpo} data.format=my_format.raed",
    )
    codes = [int(line.rpartition(" ")[2]) for line in lines if line.startswith("check ")]
    assert codes == [0, 2, 0, 2, 0, 2], lines
    told = [line for line in lines if line.startswith("align: ")]
    assert "objective.loss.shift=-1: must be at least 0" in told[0]
    assert "advantage.scal" in told[1]
    assert "data.format=my_format.raed: cannot be imported" in told[2]
