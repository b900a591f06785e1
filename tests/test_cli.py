"""The command line as a user meets it: exit codes, one line, and no waiting for torch."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib import metadata

import pytest

from align.cli import main
from align.config import keys_with_help, recipes
from align.pretrained import byte_tokenizer

ROW = {"prompt": "What is red?", "chosen": "A colour.", "rejected": "A fruit."}
# In the same process: the command's answer, and whether torch was imported for it.
WITHOUT_TORCH = """
import sys
from align.cli import main
code = main(sys.argv[1:])
assert not {"torch", "transformers", "datasets"} & set(sys.modules), "heavy import"
sys.exit(code)
"""


def align(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "align.cli", *words], capture_output=True, text=True)


def light(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True)


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("align: ")
    return done.stderr


def test_help_takes_less_than_a_second_of_cpu():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = align("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "align train recipe=NAME" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("words", [[], ["train", "--help"], ["--version"], ["recipes"], ["check", "--keys"]])
def test_light_commands_load_nothing_heavy(words):
    done = light(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version_is_the_installed_one():
    assert light("--version").stdout == f"align {metadata.version('align')}\n"


@pytest.mark.parametrize(
    "words, text",
    [
        (["train", "recipe=wpo", "objective.bta=1"], "did you mean objective.beta?"),
        (["train", "recipe=wpoo"], "did you mean wpo?"),
        (["check", "model=tinny"], "did you mean tiny?"),
        (["data", "check", "trainer.batchsize=1"], "did you mean trainer.batch_size?"),
        (["train", "optimizer.lr=-1"], "must be greater than 0"),
        (["train", "model=hub"], "model.path is required"),
        (["tran", "recipe=wpo"], "did you mean `align train`?"),
        (["data", "chek"], "say align data check"),
        (["data", "check", "--json"], "--json: give a file to write"),
        (["data", "pairs", "out=x.jsonl"], "give scored=FILE"),
        (["evaluate", "run.dir=/no/such"], "run.dir=DIR is needed"),
        (["xyzzy"], "see `align --help`"),
        (["recipes", "seed=1"], "takes no settings"),
        (["check", "--config-dir"], "give an existing directory"),
        (["check", "--config-dir", "/no/such"], "give an existing directory"),
    ],
)
def test_refusal_is_one_line_without_torch(words, text):
    assert text in one_line(light(*words))


def test_check_ok():
    done = align("check", "recipe=wpo", "model=tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "ok: data=everyday, engine=local, launch=local, log=default, model=tiny, objective=wpo, "
        "objective/loss=sigmoid, optimizer=adamw, recipe=wpo, rollout=hf, trainer=offline\n"
    )


@pytest.mark.parametrize(
    "words, text",
    [
        (["data.train=nosuch.jsonl"], "nosuch.jsonl: no such file"),
        (["data.train=5"], "data.train=5: must be a file"),
        (["data.gold=align.no.such"], "data.gold=align.no.such: cannot be imported"),
        (["model=hub", "model.path=x", "model.dtype=float8"], "model.dtype=float8: must be one of"),
        (["objective.beta=-1"], "objective.beta"),
        (["objective._target_=os.system"], "objective"),
    ],
)
def test_check_refuses_what_would_fail_later(capfd, words, text):
    assert main(["check", *words]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert text in err


def test_check_keys_prints_every_key():
    assert light("check", "--keys").stdout == "\n".join(keys_with_help()) + "\n"


def test_recipes_lists_shipped_and_own(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# My numbers.\nseed: 3\n")
    (tmp_path / "recipes" / "empty.yaml").write_text("")
    lines = light("recipes", "--config-dir", str(tmp_path)).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*recipes(), "empty", "mine"]
    assert lines[-1].split(None, 1)[1] == "My numbers."


def test_data_reports_a_small_file(tmp_path, capfd):
    """20 rows, of which a twentieth, one prompt, is kept back. Targets: 2 x (bytes + end of turn) a row."""
    rows = [ROW | {"prompt": f"Question {i}?"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["data", "check", "model=tiny", f"data.train={tmp_path / 'rows.jsonl'}"]) == 0
    targets = len("A colour.") + 1 + len("A fruit.") + 1
    assert capfd.readouterr().out.splitlines()[:2] == [
        f"data train: 19 rows in = 19 kept + 0 dropped (none); {19 * targets} target tokens",
        f"data held-out: 1 rows in = 1 kept + 0 dropped (none); {targets} target tokens",
    ]


def test_template_error_is_one_line(tmp_path, capfd):
    """A template that raises a message of several lines."""
    template = "{{ raise_exception('first line\nsecond line') }}"
    (tmp_path / "t.jinja").write_text(template)
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row))
    byte_tokenizer().save_pretrained(tmp_path / "tok")
    (tmp_path / "tok" / "config.json").write_text('{"model_type": "llama"}')
    words = ["model=hub", f"model.path={tmp_path / 'tok'}", f"model.chat_template={tmp_path / 't.jinja'}"]
    assert main(["data", "check", f"data.train={rows}", *words]) == 1
    assert f"  {rows}:1: template: the chat template refuses the conversation: first line second line" in (
        capfd.readouterr().out
    )
