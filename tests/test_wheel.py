"""The built wheel carries configs, recipes and the shipped data, and works from any directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_installed_wheel_finds_configs_recipes_and_data(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    quiet = {"capture_output": True, "text": True, "check": True}
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)], **quiet
    )
    (wheel,) = tmp_path.glob("align_rlhf-*.whl")
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], **quiet)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = "import align, sys; print(align.__file__); from align.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(target)}
    checked = ["data", "check", "recipe=wpo", "model=tiny", "data.max_tokens=2048"]
    for words in (["check", "recipe=wpo"], ["recipes"], checked):
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, *words],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(target))  # not the checkout's align
