"""The command line as a user meets it: exit codes, one line, and no waiting for torch."""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import subprocess
import sys
from importlib import import_module, metadata

import pytest
import yaml
from omegaconf import OmegaConf

from align.cli import main, table
from align.cli.complete import candidates
from align.config import compose, keys_with_help, recipes
from align.models.pretrained import byte_tokenizer

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
    assert light("--version").stdout == f"align {metadata.version('align-rlhf')}\n"


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


@pytest.mark.parametrize("command", table.COMMANDS, ids=lambda c: c.name)
def test_each_command_has_a_page_of_help(command, capfd):
    """With its usage, its own words and options, two examples or one that says it all, and exit codes."""
    assert main([*command.name.split(), "--help"]) == 0
    page = capfd.readouterr().out
    assert page.startswith(f"align {command.name}")
    for word in command.arguments:
        assert f"\n  {word.key}={word.value}" in page
    for option in command.all_options():
        assert f"\n  {option.name}" in page
    examples = page.partition("\nExamples\n")[2].partition("\n\n")[0].splitlines()
    assert examples
    assert all(table.find(shlex.split(line, comments=True)[1:]) for line in examples if line.startswith("  align "))
    assert "\nExit codes\n  0 " in page
    assert all(len(line) <= 120 for line in page.splitlines())
    module, _, name = command.run.partition(":")
    assert callable(getattr(import_module(module), name))


def test_the_overview_names_every_command_and_a_group_its_own(capfd):
    assert main(["--help"]) == 0
    overview = capfd.readouterr().out
    assert all(f"\n  align {command.name}" in overview for command in table.COMMANDS)
    assert all(len(line) <= 120 for line in overview.splitlines())
    assert main(["data", "--help"]) == 0
    group = capfd.readouterr().out
    assert "align data check" in group
    assert "align train" not in group
    assert main(["help", "evaluate", "pairs"]) == 0
    assert capfd.readouterr().out.startswith("align evaluate pairs ")


@pytest.mark.parametrize(
    "words, text",
    [
        (["train", "--cfg", "job"], "`align show recipe=NAME` prints the composed settings"),
        (["train", "--dryrun"], "did you mean --dry-run?"),
        (["train", "--learning-rate=1e-5"], "settings are written key=value; here it is optimizer.lr"),
        (["train", "--xyzzy"], "it has -m, --multirun, --dry-run, --config-dir; settings are written key=value"),
        (["average", "a", "b", "--chek"], "did you mean --check?"),
        (["doctor", "--xyzzy"], "it has --json"),
        (["doctor", "--config-dir", "."], "align doctor has no configs; leave --config-dir out"),
        (["chat"], "`align generate`"),
        (["dpo"], "did you mean `align train recipe=dpo`?"),
        (["GRPO", "model=tiny"], "did you mean `align train recipe=grpo`?"),
        (["evaluat"], "did you mean `align evaluate`?"),
        (["completion", "tcsh"], "say align completion bash, zsh or fish"),
        (["check", "--keys", "seed=1"], "leave seed=1 out"),
        (["score", "out=x", "data.train=y", "data.format=a.b"], "data.format has no effect in align score"),
        (["evaluate", "pairs", "out=x", "data.train=y", "data.loader=a.b"], "has no effect in align evaluate pairs"),
        (
            ["score", "out=x", "data.train=y", "data.columns.prompt=q"],
            "data.columns.prompt has no effect in align score",
        ),
        (["data", "pairs", "out=x", "scored=y", "data.form=scored"], "data.form has no effect in align data pairs"),
    ],
)
def test_wrong_commands_and_options_send_the_user_the_right_way(words, text):
    assert text in one_line(light(*words))


def test_show_prints_what_is_composed(capfd, monkeypatch):
    monkeypatch.setenv("ALIGN_TEST_SECRET", "hunter2")
    words = ["recipe=wpo", "model=tiny", "objective.beta=0.3", "log.wandb_project=${oc.env:ALIGN_TEST_SECRET}"]
    assert main(["show", *words]) == 0
    shown = capfd.readouterr().out
    assert yaml.safe_load(shown)["objective"]["beta"] == 0.3
    assert OmegaConf.create(shown) == compose(words).tree
    assert "hunter2" not in shown


def test_values_of_files_may_begin_with_a_tilde(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [ROW | {"prompt": f"Question {i}?"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["data", "check", "model=tiny", f"data.train={tmp_path}/rows.jsonl", "--json=~/out.json"]) == 0
    assert (tmp_path / "out.json").is_file()
    assert main(["data", "judgements", "pairs=~/rows.jsonl", "out=~/prompts.jsonl"]) == 0
    assert (tmp_path / "prompts.jsonl").is_file()
    capfd.readouterr()


# ---------------------------------------------------------------------- completion


@pytest.mark.parametrize(
    "line, wanted, unwanted",
    [
        ("align tr", ["train"], ["check"]),
        ("align data ", ["check", "forms", "pairs", "judgements"], ["train", "recipe="]),
        ("align evaluate ", ["pairs", "overoptimisation", "run.dir="], ["recipe="]),
        ("align train --d", ["--dry-run"], ["--json"]),
        ("align train recipe=dp", ["recipe=dpo", "recipe=dpa"], ["recipe=wpo"]),
        ("align train recipe=paper/wpo", ["recipe=paper/wpo_zephyr_7b"], ["recipe=wpo"]),
        ("align check objective/loss=s", ["objective/loss=sigmoid"], ["objective/loss=hinge"]),
        ("align check optimizer.", ["optimizer.lr=", "optimizer.betas="], ["optimizer.", "optimizer="]),
        ("align check ", ["trainer.", "trainer=", "recipe=", "seed="], ["trainer.epochs=", "recipes."]),
        ("align check objective.l", ["objective.loss."], ["objective.loss.label_smoothing="]),
        ("align average ", ["out=", "method="], ["recipe=", "seed="]),
        ("align completion ", ["bash", "zsh", "fish"], []),
        ("align train data.form=s", ["data.form=scored", "data.form=safer"], ["data.form=hh"]),
        ("align data.train=", [], ["data.train="]),
        ("align train data.train=", [], ["data.train="]),  # the shell offers files
        ("align nonsense ", [], ["recipe="]),
    ],
)
def test_completion_offers(line, wanted, unwanted):
    offered = candidates(line)
    assert set(wanted) <= set(offered)
    assert not set(unwanted) & set(offered)
    assert all(word.startswith(line.rpartition(" ")[2]) for word in offered)


def test_completion_knows_ones_own_recipes(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("seed: 3\n")
    assert "recipe=mine" in candidates(f"align train --config-dir {tmp_path} recipe=m")


BASH = """
PATH={bin}:$PATH
eval "$(align completion bash)"
complete -p align
COMP_LINE={line} COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_align align "${{COMP_WORDS[COMP_CWORD]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    "line, words, wanted",  # words: the line as bash cuts it, at = too
    [
        ("align tra", "align tra", ["train"]),
        ("align train recipe=onli", "align train recipe = onli", ["online_dpo", "online_wpo"]),
        ("align check objective/loss=sigmoid_", "align check objective/loss = sigmoid_", ["sigmoid_norm"]),
        ("align check optimizer.max", "align check optimizer.max", ["optimizer.max_grad_norm="]),
    ],
)
def test_completion_in_a_real_bash(tmp_path, line, words, wanted):
    (tmp_path / "align").write_text(f'#!/bin/sh\nexec {sys.executable} -m align.cli "$@"\n')
    (tmp_path / "align").chmod(0o755)
    program = BASH.format(bin=tmp_path, line=shlex.quote(line), words=words)
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *offered = done.stdout.splitlines()
    assert first.endswith("-F _align align")
    assert offered == wanted


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_the_shells_own(shell, capfd):
    """Read by the shell itself where it is installed."""
    assert main(["completion", shell]) == 0
    script = capfd.readouterr().out
    assert "align complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n", "/dev/stdin"], input=script, text=True, check=True)
