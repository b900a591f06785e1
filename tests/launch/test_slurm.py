"""Scripts for Slurm without a Slurm: what they say, that no value is read as shell, what they do with exit codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from align.cli import main
from align.config import compose, quoted, shipped_root
from align.launch import slurm, sweep

WORDS = ["train", "recipe=wpo", "model=tiny", "launch=slurm"]
TWO = ["launch.nodes=2", "engine=zero3"]
SERVED = ["recipe=remax", "rollout=vllm_server"]
# Each would leave a file, or end the word, in a shell that reads it.
NASTY = ["$(touch canary)", "`touch canary`", "a;touch canary", "a b", "it's", 'say "x"', "a\nb", "$HOME", "b\\slash",
         "'; touch canary; '", "tab\there", "end\\", "&& touch canary", "# no comment", "é"]  # fmt: skip

# What the scripts call, on a machine that has no Slurm: they write down how they are called.
PROGRAMS = {
    "srun": """
printf '%s\\n' "$*" >> "$LOG/srun"
env > "$LOG/environment"
while [[ $1 == -* ]]; do shift; done
"$@" || exit
exit "$(cat "$LOG/code")"
""",
    "scontrol": """
[ "$1 $2" = "show hostnames" ] && { printf 'node07\\nnode08\\n'; exit; }
printf '%s\\n' "$*" >> "$LOG/scontrol"
""",
    "sbatch": """
printf '%s\\n' "$*" >> "$LOG/sbatch"
n=$(wc -l < "$LOG/sbatch")
[ "$n" -lt "${FAIL_AT:-99}" ] || { echo "sbatch: error: you are over your limit" >&2; exit 1; }
echo "$((100 + n));cluster"
""",
    "recorder": """
for word in "$@"; do printf '%s\\0' "$word"; done > "$LOG/words.$(ls "$LOG" | grep -c words)"
case "$*" in *"launch check"*) exit "$(cat "$LOG/check")";; esac
""",
}


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A directory of what the scripts call, first on the PATH; calls are written below log/."""
    log, folder = tmp_path / "log", tmp_path / "bin"
    log.mkdir()
    folder.mkdir()
    (log / "code").write_text("0")
    (log / "check").write_text("0")
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.chdir(tmp_path)
    return folder


def dry(capsys, *words: str) -> str:
    assert main([*WORDS, *words, "--dry-run"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refusal(capsys, *words: str) -> str:
    assert main([*WORDS, *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def run_script(script: Path, **variables: str) -> subprocess.CompletedProcess:
    """The script under bash, as the first node of a simulated job."""
    job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[07-08]"}
    environment = os.environ | job | {"SLURM_CPUS_PER_TASK": "1"} | variables
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60)


def calls(programs: Path, name: str) -> list[str]:
    path = programs.parent / "log" / name
    return path.read_text().splitlines() if path.exists() else []


def words_of(programs: Path, number: int = 0) -> list[str]:
    return (programs.parent / "log" / f"words.{number}").read_bytes().decode().split("\0")[:-1]


def submitted(tmp_path: Path, name: str = "job") -> Path:
    (script,) = (tmp_path / "runs" / "slurm").glob(f"*/{name}.sbatch")
    return script


def shellcheck(*texts: str) -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    for text in texts:
        done = subprocess.run([program, "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_templates_and_what_becomes_of_them_pass_shellcheck(capsys):
    templates = sorted((shipped_root() / "launch").glob("*.sbatch"))
    assert [p.name for p in templates] == ["slurm.sbatch"]
    shellcheck(
        *(p.read_text() for p in templates),
        dry(capsys),
        dry(capsys, *TWO, "launch.container=[apptainer,exec,image.sif]", "launch.srun_options=['--mpi=none']"),
        dry(capsys, "-m", "seed=1,2").partition("# ---- ")[0],
        dry(capsys, 'launch.setup=["module load cuda","export A=1"]', "log.wandb_project='a b'"),
        dry(capsys, *SERVED, "launch.server_nodes=1", "launch.server_args=[--model,'/models/a b']"),
    )


def test_a_dry_run_shows_every_setting_and_submits_nothing(capsys, programs, tmp_path):
    text = dry(
        capsys, *TWO, "launch.gpus=8", "launch.cpus=4", "launch.time=2-12:00:00", "launch.save_before_s=600",
        "launch.partition='gpu,long'", "launch.account=team@lab", "launch.name=my.run", "launch.threads=3",
        'launch.options=["--mem=0","--comment=two words"]', 'launch.setup=["module load cuda"]', "launch.venv=env",
        "launch.max_restarts=7", "launch.port=23456",
    )  # fmt: skip
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --ntasks-per-node=1", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --job-name=my.run",
        "#SBATCH --nodes=2", "#SBATCH --cpus-per-task=32", "#SBATCH --time=2-12:00:00", "#SBATCH --signal=USR1@600",
        "#SBATCH --output=job-%j.log", "#SBATCH --gpus-per-node=8", "#SBATCH --partition=gpu,long",
        "#SBATCH --account=team@lab", "#SBATCH --mem=0", "#SBATCH '--comment=two words'",
    ]  # fmt: skip
    assert lines.index("module load cuda") < lines.index("trap '' USR1")
    assert {"MASTER_PORT=23456", "max_restarts=7"} <= set(lines)
    python = tmp_path / "env" / "bin" / "python"
    words = "recipe=wpo model=tiny engine=zero3 launch=local launch.processes=8 launch.threads=3"
    assert f"{python} -m align.cli train {words}\n" in text
    assert "__" not in text.replace("double underscores", "")
    assert not (tmp_path / "runs").exists()
    assert calls(programs, "sbatch") == []


def test_submission_tells_job_and_log(capsys, programs, tmp_path):
    assert main(WORDS) == 0
    script = submitted(tmp_path)
    assert capsys.readouterr().out == f"submitted job 101 (align); log {script.parent}/job-101.log\n"
    assert calls(programs, "sbatch") == ["--parsable job.sbatch"]
    again = main(WORDS)  # another directory, whatever the clock says
    assert again == 0
    assert len(list((tmp_path / "runs" / "slurm").glob("*/job.sbatch"))) == 2


def test_a_job_of_two_nodes(programs, tmp_path):
    """Simulated variables: both launchers get the words, the first node's address and the job's own port."""
    recorder = f"launch.container=[{programs / 'recorder'}]"
    assert main([*WORDS, *TWO, "launch.processes=4", recorder]) == 0
    done = run_script(submitted(tmp_path), RANK="7", WORLD_SIZE="9")
    assert done.returncode == 0, done.stderr
    check, train = calls(programs, "srun")
    assert "launch check dir=" in check
    assert train.startswith("--kill-on-bad-exit=1 --cpus-per-task=1 ")
    expected = ["python", "-m", "align.cli", "train", "recipe=wpo", "model=tiny", "engine=zero3"]
    assert words_of(programs, 1) == [*expected, "launch=local", "launch.processes=4"]
    environment = dict(line.split("=", 1) for line in calls(programs, "environment") if "=" in line)
    assert (environment["ALIGN_NODES"], environment["MASTER_ADDR"]) == ("2", "node07")
    assert environment["MASTER_PORT"] == str(12000 + 41234 % 20000)
    assert "RANK" not in environment
    assert "WORLD_SIZE" not in environment
    assert calls(programs, "scontrol") == []


def test_a_job_of_one_node_asks_for_no_port(programs, tmp_path):
    """Two clusters, or jobs 20000 numbers apart, would ask for the same one of a node that they share."""
    assert main([*WORDS, f"launch.container=[{programs / 'recorder'}]"]) == 0
    one = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node07"}
    done = run_script(submitted(tmp_path), **one)
    assert done.returncode == 0, done.stderr
    environment = dict(line.split("=", 1) for line in calls(programs, "environment") if "=" in line)
    assert (environment["ALIGN_NODES"], environment["MASTER_PORT"]) == ("1", "")


def test_nodes_that_serve(programs, tmp_path):
    """Of the job's two nodes the first trains and the second serves."""
    node = programs / "node"  # what trains goes on when what serves has been started
    node.write_text("""#!/bin/bash
case "$*" in *align.rollout.serve*) printf '%s\\0' "$@" > "$LOG/part"; mv "$LOG/part" "$LOG/serve"; exit;; esac
for _ in {1..500}; do [ -s "$LOG/serve" ] && break; sleep 0.02; done
printf '%s\\0' "$@" > "$LOG/train"
""")
    node.chmod(0o755)
    more = [*SERVED, "launch.server_nodes=1", "launch.server_port=8123", f"launch.container=[{node}]",
            "launch.server_args=[--model,'/models/a b']"]  # fmt: skip
    assert main([*WORDS, *more]) == 0
    assert "#SBATCH --nodes=2" in submitted(tmp_path).read_text()
    done = run_script(submitted(tmp_path))
    assert done.returncode == 0, done.stderr
    steps = {"rollout.serve" in line: line for line in calls(programs, "srun")}
    assert steps[True].startswith("--overlap --nodes=1 --ntasks=1 --relative=1 --kill-on-bad-exit=0 --cpus-per-task=1 ")
    assert "--nodes=1 --ntasks=1 --relative=0" in steps[False]
    serve, train = ((tmp_path / "log" / name).read_text().split("\0")[:-1] for name in ("serve", "train"))
    expected = ["python", "-m", "align.rollout.serve", "--host", "0.0.0.0", "--port", "8123", "--model", "/models/a b"]
    assert serve == expected
    assert train[-1] == "rollout.urls=[http://node08:8123]"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("rollout=hf", "launch.server_nodes=1"), "launch.server_nodes=1 has no effect without rollout=vllm_server"),
        (("launch.server_nodes=1",), "launch.server_args: say which model is served"),
        (("launch.server_args=[--model,m]",), "launch.server_args has no effect without launch.server_nodes"),
        (("launch.server_nodes=1", "launch.server_args=[--model,m,--port,1]"), "use launch.server_port"),
        (("-m", "seed=1,2", "launch.server_nodes=1", "launch.server_args=[--model,m]"), "is for one run"),
    ],
)
@pytest.mark.usefixtures("programs")
def test_servers_that_cannot_be(capsys, words, text):
    assert text in refusal(capsys, *SERVED, *words)


def test_a_failed_check_keeps_the_run_from_starting(programs, tmp_path):
    assert main([*WORDS, *TWO, f"launch.container=[{programs / 'recorder'}]"]) == 0
    (programs.parent / "log" / "check").write_text("1")
    assert run_script(submitted(tmp_path)).returncode == 1
    assert len(calls(programs, "srun")) == 1


@pytest.mark.parametrize(
    "code, restarts, requeued",
    [(0, "0", False), (1, "0", False), (2, "0", False), (85, "0", True), (85, "2", True), (85, "3", False),
     (138, "0", True), (130, "0", False), (137, "0", False)],
)  # fmt: skip
def test_what_an_exit_code_leads_to(programs, tmp_path, code, restarts, requeued):
    assert main([*WORDS, "launch.max_restarts=3", f"launch.container=[{programs / 'recorder'}]"]) == 0
    (programs.parent / "log" / "code").write_text(str(code))
    done = run_script(submitted(tmp_path), SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code
    assert calls(programs, "scontrol") == (["requeue 41234"] if requeued else [])
    assert ("launch.max_restarts=3" in done.stderr) == (code == 85 and restarts == "3")


def test_an_element_of_an_array_requeues_itself_alone(programs, tmp_path):
    """Also the one whose number is that of the whole array."""
    assert main(["train", "-m", *WORDS[1:], "seed=1,2", f"launch.container=[{programs / 'recorder'}]"]) == 0
    (programs.parent / "log" / "code").write_text("85")
    element = {"SLURM_ARRAY_JOB_ID": "41234", "SLURM_ARRAY_TASK_ID": "1"}
    done = run_script(submitted(tmp_path, "sweep"), **element)
    assert done.returncode == 85
    assert calls(programs, "scontrol") == ["requeue 41234_1"]
    assert "align: saved; job 41234_1 goes on" in done.stdout


def test_a_stop_is_told_by_a_file(programs, tmp_path):
    """The launchers of all nodes end with 0, so that srun ends none that is still leaving."""
    words = 'printf 85 > "$ALIGN_STOPPED"'
    (programs / "recorder").write_text(f"#!/bin/bash\n{words}\n")
    assert main([*WORDS, f"launch.container=[{programs / 'recorder'}]"]) == 0
    done = run_script(submitted(tmp_path), SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 85
    assert calls(programs, "scontrol") == ["requeue 41234"]
    assert list(tmp_path.glob(".stopped*")) == []


def test_no_value_is_read_as_shell(programs, tmp_path, monkeypatch):
    """In words, in the directory of submission and in its own configs; in a job and in an element of an array."""
    odd = tmp_path / 'it\'s $(touch canary) `touch canary` "x"'
    odd.mkdir()
    monkeypatch.chdir(odd)
    recorder = f"launch.container=[{programs / 'recorder'}]"
    configs = odd / "my $(touch canary) configs"
    configs.mkdir()
    word = f"sampling.stop=[{','.join(map(quoted, NASTY))}]"
    assert compose(["recipe=wpo", word]).sampling.stop == NASTY
    assert main([*WORDS, word, recorder, "--config-dir", str(configs)]) == 0
    done = run_script(submitted(odd))
    assert (done.returncode, done.stderr) == (0, "")
    assert words_of(programs)[6] == word
    assert words_of(programs)[-2:] == ["--config-dir", str(configs)]
    values = ["".join(NASTY[:7]), "".join(NASTY[7:])]
    swept = "log.wandb_project=" + ",".join(map(quoted, values))
    base = "run.dir=" + quoted("x $(touch canary) 'y'")
    assert main([*WORDS, "-m", swept, base, recorder, "launch.name=swept"]) == 0
    for number, value in enumerate(values):
        done = run_script(submitted(odd, "sweep"), SLURM_ARRAY_TASK_ID=str(number))
        assert (done.returncode, done.stderr) == (0, "")
        config = compose(words_of(programs, 1 + number)[4:])
        assert config.log.wandb_project == value
        assert str(config.run.dir).startswith("x $(touch canary) 'y'/wandb_project-")
    assert list(tmp_path.rglob("canary")) == []


@pytest.mark.parametrize("key", ["name", "partition", "account", "time"])
def test_what_sbatch_reads_itself_takes_no_odd_value(key):
    settings = compose([*WORDS[1:]])
    for value in NASTY:
        bad = replace(settings, launch=replace(settings.launch, **{key: value}))
        with pytest.raises(ValueError, match=f"^launch.{key}="):
            slurm.submit([sweep.Element("", (), bad)], None, True, print)


@pytest.mark.parametrize(
    "words, text",
    [
        (["launch.nodes=2"], "launch.nodes=2: engine=local is one process"),
        (["launch.gpus=2"], "launch.processes=2: engine=local is one process"),
        (["launch.template=nosuch"], "launch.template=nosuch: No such file or directory; shipped are: slurm"),
        (["launch.time=5", "launch.save_before_s=300"], "launch.time=5 is no longer than launch.save_before_s=300"),
        (["launch.time=soon"], "launch.time=soon: must be minutes"),
        (['launch.options=["--nodes=3"]'], "the template sets --nodes; its setting is launch.nodes"),
        (['launch.options=["-t 5"]'], "its setting is launch.time"),
        (['launch.options=["mem=3"]'], "each is one option of sbatch"),
        (['launch.options=["--a=b\\nrm"]', "launch.nodes=0"], "launch.nodes=0: must be at least 1"),
        (["launch.array_limit=0"], "launch.array_limit=0: must be at least 1"),
        (["optimizer.lr=-1"], "optimizer.lr=-1"),
        (["-m", "optimizer.lr=1e-6,-1"], "optimizer.lr=-1"),
        (["-m", "seed=1"], "-m is for several values"),
    ],
)
def test_refused_before_sbatch(capsys, programs, words, text):
    assert text in refusal(capsys, *words)
    assert calls(programs, "sbatch") == []


def test_own_template(capsys, tmp_path):
    own = tmp_path / "mine.sbatch"
    own.write_text("#!/bin/bash\n# __OPTIONS__\n__COMMAND__\n")
    text = dry(capsys, f"launch.template={own}")
    assert text.splitlines()[-1].endswith("align.cli train recipe=wpo model=tiny launch=local launch.processes=1")
    own.write_text("__COMAND__\n")
    assert f"{own}: __COMAND__ is not known; known are COMMAND, DIRECTORY" in refusal(capsys, f"launch.template={own}")


def test_no_sbatch_no_directory(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch is not found" in refusal(capsys, f"launch.log_dir={tmp_path}/logs")
    (tmp_path / "file").touch()
    err = refusal(capsys, f"launch.log_dir={tmp_path}/file/logs")
    assert f"launch.log_dir={tmp_path}/file/logs: cannot be made (Not a directory)" in err


WARM = ["train", "recipe=warm", "model=tiny", "launch=slurm", "trainer.members=3"]


def test_warm_is_a_head_an_array_of_members_and_an_average(capsys, programs, tmp_path):
    assert main([*WARM, "launch.array_limit=2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(";")[0] for line in out] == [
        "submitted job 101 (align, head)", "submitted array of 3 runs 102 (align, members)",
        "submitted job 103 (align, average)",
    ]  # fmt: skip
    after = "--kill-on-invalid-dep=yes"
    assert calls(programs, "sbatch") == [
        "--parsable head.sbatch", f"--parsable --dependency=afterok:101 {after} members.sbatch",
        f"--parsable --dependency=afterok:102 {after} average.sbatch",
    ]  # fmt: skip
    assert "#SBATCH --array=0-2%2\n" in submitted(tmp_path, "members").read_text()
    (commands,) = (tmp_path / "runs" / "slurm").glob("*/members.commands")
    assert [line.split("trainer.only=")[1][0] for line in commands.read_text().splitlines()] == ["1", "2", "3"]
    assert "trainer.only=0" in submitted(tmp_path, "head").read_text()
    assert "trainer.only" not in submitted(tmp_path, "average").read_text()


def test_one_member_is_a_job_and_no_head_is_asked_for_without_probe(capsys, programs):
    assert main([*WARM, "trainer.only=2"]) == 0
    assert main([*WARM, "trainer.probe_steps=0", "launch.name=other"]) == 0
    out = capsys.readouterr().out
    assert [line.split("(")[1].split(")")[0] for line in out.splitlines()] == [
        "align", "other, members", "other, average",
    ]  # fmt: skip
    assert len(calls(programs, "sbatch")) == 3


@pytest.mark.usefixtures("programs")
def test_sbatch_refusing_a_later_part_names_the_earlier(capsys, monkeypatch):
    monkeypatch.setenv("FAIL_AT", "2")
    assert main(WARM) == 2
    err = capsys.readouterr().err
    assert "sbatch: error: you are over your limit (submitted already: 101; scancel ends them)" in err


@pytest.mark.parametrize(
    "text, seconds",
    [("30", 1800), ("2:30", 150), ("1:00:00", 3600), ("1-0", 86400), ("1-2:30", 95400), ("2-01:02:03", 176523)],
)
def test_slurms_times(text, seconds):
    assert slurm.seconds(text) == seconds


def test_elements_of_a_sweep_have_directories_of_their_own():
    words = ["recipe=wpo", "model=tiny", "optimizer.lr=1e-6,1e-7", "seed=range(0,2)"]
    found = sweep.elements(words, None)
    names = ["lr-1e-06_seed-0", "lr-1e-06_seed-1", "lr-1e-07_seed-0", "lr-1e-07_seed-1"]
    assert [element.name for element in found] == names
    configs = [compose(element.words) for element in found]
    assert [(c.optimizer.lr, c.seed) for c in configs] == [(1e-6, 0), (1e-6, 1), (1e-7, 0), (1e-7, 1)]
    assert [c.run.dir for c in configs] == [f"runs/wpo-tiny-sweep/{name}" for name in names]
    own = sweep.elements([*words[:3], "run.dir=mine"], None)
    assert [compose(e.words).run.dir for e in own] == ["mine/lr-1e-06", "mine/lr-1e-07"]
    given = sweep.elements(["recipe=wpo", "run.dir=a,b"], None)
    assert [compose(e.words).run.dir for e in given] == ["a", "b"]


def test_elements_that_would_share_a_directory_are_refused():
    with pytest.raises(ValueError, match="would both be called wandb_project-a-b; give run.dir=A,B"):
        sweep.elements(["recipe=wpo", "log.wandb_project='a b','a?b'"], None)


def test_list_values_are_one_value():
    found = sweep.elements(["recipe=wpo", "optimizer.betas=[0.9,0.95],[0.9,0.99]"], None)
    assert [compose(e.words).optimizer.betas for e in found] == [[0.9, 0.95], [0.9, 0.99]]


def test_resuming_may_change_how_a_run_is_launched():
    from align.config import differences

    here = compose(["recipe=wpo", "engine=zero3"]).tree
    there = compose(["recipe=wpo", "engine=zero3", "launch=slurm", "launch.nodes=4", "launch.processes=8"]).tree
    assert differences(here, there) == {}


def test_submitting_needs_no_torch():
    code = "import sys; from align.cli import main; c = main(sys.argv[1:]); sys.exit(c or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *WORDS, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "srun --kill-on-bad-exit=1" in done.stdout
