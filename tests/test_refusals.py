"""What `align train` refuses without a model, `align check` refuses in the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from align.cli import main

SLURM = ["recipe=dpo", "launch=slurm"]
FOUR = ["recipe=dpo", "model=hub", "model.path=nosuch", "model.four_bit=true"]
MODEL, ADAPTER, ENSEMBLE = (["recipe=grpo", f"reward={name}"] for name in ("model", "adapter", "ensemble"))
ADAPTER = [*ADAPTER, "reward.preference.path=tables"]
JUDGE = ["recipe=grpo", "reward=judge", "reward.judge.url=http://x"]
STREAM = ["data.streaming=true", "trainer.max_steps=9"]
PROCESS = ["recipe=grpo", "advantage=pure", "reward=process"]

# words, and what the sentence must hold
REFUSED = [
    # values
    (["recipe=dpo", "optimizer.lr=-1"], "optimizer.lr=-1.0: must be greater than 0"),
    (["recipe=dpo", "optimizer.schedule=cosin"], "one of cosine, linear, wsd, rex, constant; did you mean cosine?"),
    (["recipe=dpo", "optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: must be two numbers in [0, 1)"),
    (["recipe=dpo", "trainer.epochs=many"], "trainer.epochs=many"),
    (["recipe=dpo", "seed=true"], "seed=true: must be an integer"),
    (["recipe=dpo", "lora.targets=5"], "lora.targets=5: must be all-linear or a list of names"),
    (["recipe=dpo", "lora.rank=8", "lora.dropout=0.1", "trainer.layout=shared"], "use trainer.layout=packed"),
    (["recipe=dpo", "lora.rank=0", "lora.dropout=0.1"], "lora.dropout has no effect with lora.rank=0"),
    (["recipe=dpo", "lora.rank=0", "merge=true"], "merge=true has no effect with lora.rank=0"),
    (["recipe=dpo", "lora.rank=0", "reference.mode=adapter"], "reference.mode=adapter needs LoRA"),
    (["recipe=dpo", "data.repeat=x"], "data.repeat=x: must be a list of numbers"),
    (["recipe=dpo", "data.margins=x"], "data.margins=x: must be names of components"),
    (["recipe=dpo", "data.target_roles=[robot]"], "must be a list of system, user, assistant, tool"),
    (["recipe=dpo", "data=collected"], "data.train=collected and collect=... belong together"),
    # parts by their dotted paths
    (["recipe=dpo", "objective.beta=-1"], "objective"),
    (["recipe=dpo", "objective._target_=os.system"], "objective (os.system)"),
    (["recipe=dpo", "data.gold=align.no.such"], "data.gold=align.no.such: cannot be imported"),
    (["recipe=dpo", "data.margins.a=align.no.such"], "data.margins.a has no effect: objective=dpo reads no margins"),
    (["recipe=grpo", "advantage=reinforce_pp", "advantage.gamma=2"], "gamma"),
    # models
    (["recipe=dpo", "model=hub", "model.path=/nowhere"], "model.path=/nowhere: no such directory"),
    (["recipe=dpo", "reference.path=./nowhere"], "reference.path=./nowhere: no such directory"),
    (["recipe=warm", "trainer.starts=[./nowhere]"], "trainer.starts[0]=./nowhere: no such directory"),
    (["recipe=dpo", "model=hub", "model.path=x", "model.dtype=float8"], "model.dtype=float8: must be one of"),
    ([*FOUR, "lora.rank=0"], "weights of 4 bits cannot be trained; set lora.rank=16"),
    ([*FOUR, "lora.rank=4", "merge=true"], "merge=true would round the adapter to 4 bits"),
    ([*FOUR, "lora.rank=4", "engine=zero3"], "engine=zero3 cannot shard weights of 4 bits"),
    ([*FOUR, "lora.rank=4", "reference.mode=model"], "reference.mode=model would hold the model twice"),
    # data
    (["recipe=dpo", "data.train=nosuch.jsonl"], "nosuch.jsonl: no such file"),
    (["recipe=dpo", "data.train=5"], "data.train=5: must be a file"),
    (["recipe=dpo", "data.heldout=./nosuch"], "./nosuch: no such file"),
    (["recipe=grpo", "data.train=align:nosuch.jsonl"], "no such data file ships with the package"),
    (["recipe=grpo", "data.train=gym:nosuchtask"], "gym:nosuchtask: how many problems?"),
    (["recipe=grpo", "data.train=gym:chain_sums/size:4"], "has no task chain_sums; did you mean chain_sum?"),
    (["recipe=multiturn_dpo", "collect.task=nosuch"], "collect.task=nosuch: reasoning-gym has no task nosuch"),
    (["recipe=grpo", "data.train=gym:chain_sum/size:4/min_term:2"], "got an unexpected keyword argument 'min_term'"),
    (["recipe=grpo", "data.train=gym:chain_sum/size:4/min_terms:9"], "max_terms must be >= min_terms"),
    (["recipe=dpo", "data.heldout=gym:gcd/size:4/min_numbers:1"], "gym:gcd/size:4/min_numbers:1 with task_settings="),
    (["recipe=multiturn_dpo", "collect.task_settings={min_terms: 9}"], "collect.task=chain_sum with task_settings="),
    (["recipe=multiturn_dpo", "collect=reasoning_python", "collect.task=gcd", "collect.task_settings=5"],
     "task_settings=5: must be settings of the task, or null"),
    (["recipe=multiturn_dpo", "collect.tool.seconds=0"], "collect.tool"),
    # rows as they come
    ([*STREAM, "recipe=grpo"], "data.streaming=true: must be false with trainer.kind=online"),
    ([*STREAM, "recipe=multiturn_dpo"], "data.streaming=true: must be false with collect=..."),
    ([*STREAM, "recipe=warm"], "data.streaming=true: must be false with trainer.kind=warm"),
    (["data.streaming=true", "recipe=dpo", "trainer.epochs=2"],
     "trainer.max_steps=null: must be given with data.streaming=true"),
    ([*STREAM, "recipe=dpo", "data.heldout=null", "data.heldout_fraction=0.1"],
     "data.heldout_fraction=0.1: must be 0 with data.streaming=true"),
    ([*STREAM, "recipe=kto"], "data.streaming=true: must be false with objective=kto"),
    ([*STREAM, "recipe=dpo", "data.repeat=[2]"], "data.repeat has no effect with data.streaming=true"),
    ([*STREAM, "recipe=dpo", "data.columns.weight=w"], "data.columns.weight has no effect with data.streaming=true"),
    ([*STREAM, "recipe=dpo", "data.train=[rows.parquet,saved]", "data.heldout_fraction=0"],
     "use data.mixture=schedule data.mixture_shares=[[0,[1,1]]]"),
    ([*STREAM, "recipe=dpo", "data.train=[rows.parquet,saved]", "data.heldout=saved", "data.mixture=temperature"],
     "data.mixture=temperature: must be schedule with data.streaming=true"),
    ([*STREAM, "recipe=dpo", "data.max_tokens=4096"],
     "trainer.micro_batch_tokens=4096: must be at least 8192 with data.streaming=true"),
    ([*STREAM, "recipe=dpo", "data.shuffle_buffer=0"], "data.shuffle_buffer=0: must be at least 1"),
    # offline
    (["recipe=dpo", "reward=topic"], "reward has no effect with trainer.kind=offline"),
    (["objective=policy_gradient"], "objective=policy_gradient learns from rollouts: use trainer=online"),
    (["recipe=dpo", "advantage=rloo"], "advantage has no effect with trainer.kind=offline"),
    (["recipe=dpo", "composer=fixed"], "composer has no effect with trainer.kind=offline"),
    (["recipe=dpo", "head.only=true"], "head has no effect: objective=dpo trains no reward model"),
    (["recipe=reward_model", "trainer.num_samples=4"], "a reward model writes no answers; set 0"),
    (["recipe=reward_model", "data=collected", "collect=chain_sum"], "collect has no effect: a reward model writes no"),
    (["recipe=reward_model", "head.only=true", "lora.rank=4"], "lora.rank=4 has no effect with head.only=true"),
    # warm
    (["recipe=dpo", "trainer=warm"], "objective=dpo: trainer=warm averages reward models only"),
    (["recipe=warm", "head.path=x"], "head.path has no effect with trainer.probe_steps above 0"),
    (["recipe=warm", "head.only=true"], "head.only has no effect with trainer=warm"),
    (["recipe=warm", "trainer.only=9"], "trainer.only=9: there are trainer.members="),
    (["recipe=warm", "trainer.only=0", "trainer.probe_steps=0"], "says that there is none to train"),
    # online
    (["recipe=dpo", "trainer=online"], "trainer=online needs an estimator of advantages"),
    (["trainer=online", "advantage=rloo", "reward=topic", "objective=dpo"], "learns from data: use trainer=offline"),
    (["recipe=grpo", "reward=[]"], "trainer=online needs a reward"),
    (["recipe=remax", "lora.dropout=0.1"], "lora.dropout must be 0 with trainer=online"),
    (["recipe=grpo", "sampling.n=1"], "sampling.n=1: advantage=grpo compares the completions of a prompt"),
    *(
        (["recipe=grpo", "sampling.n=1", f"advantage={name}"], f"sampling.n=1: advantage={name} compares")
        for name in ("dr_grpo", "rloo", "reinforce_pp_baseline", "copo")
    ),
    (["recipe=grpo", "sampling.stop=['']"], "stop: an empty text would end every completion at once"),
    (["recipe=online_dpo", "sampling.stop=['']"], "stop: an empty text would end every completion at once"),
    (["recipe=grpo", "rollout.batch_size=0"], "rollout.batch_size=0: must be at least 1"),
    (["recipe=grpo", "rollout.batch_size=many"], "rollout.batch_size=many: Value 'many'"),
    (["recipe=grpo", "rollout=vllm", "rollout.dtype=float16"], "rollout.dtype=float16: must be one of auto, float32"),
    (["recipe=grpo", "rollout=vllm", "rollout.sleep=maybe"], "rollout.sleep=maybe: must be one of auto, true, false"),
    (["recipe=grpo", "rollout=vllm", "rollout.sync_seconds=0"], "rollout.sync_seconds=0.0: must be greater than 0"),
    (["recipe=grpo", "rollout=vllm_server", "rollout.retries=-1"], "rollout.retries=-1: must be at least 0"),
    (["recipe=grpo", "rollout=vllm_server", "rollout.urls=[127.0.0.1:8000]"], "rollout.urls: 127.0.0.1:8000 is not"),
    (["recipe=grpo", "rollout._target_=no.such"], "rollout._target_=no.such: cannot be imported"),
    (["recipe=grpo", "rollout._target_=textwrap.dedent", "rollout.x=1"], "rollout (textwrap.dedent): got an"),
    (["recipe=grpo", "sampling.temperature=0"], "sampling.temperature=0: all completions of a prompt would be the"),
    (["recipe=grpo", "advantage=ppo"], "advantage=ppo needs a value head: set objective.value_coefficient"),
    (["recipe=ppo", "advantage=rloo"], "objective.value_coefficient has no effect: advantage=rloo uses no values"),
    (["recipe=grpo", "trainer.batch_size=2", "trainer.num_minibatches=3"], "trainer.num_minibatches=3: the trainer"),
    (["recipe=grpo", "trainer.pass_component=x"], "trainer.pass_component=x: must be one of"),
    (["recipe=grpo", "trainer.kl_in_reward=0", "trainer.kl_target=1"], "trainer.kl_target=1 has no effect with"),
    (["recipe=grpo", "data.gold=align.rewards.functions.everyday_gold", "data=files", "data.train=align:nosuch.jsonl"],
     "no such data file ships"),
    # rewards
    (["recipe=grpo", "reward.everyday_gld.weight=2"], "did you mean reward.everyday_gold?"),
    (["recipe=grpo", "reward.x._target_=no.such.function"], "reward.x._target_=no.such.function: cannot be imported"),
    (["recipe=grpo", "reward.x._target_=align.rewards.functions.nosuch"], "cannot be found"),
    (["recipe=grpo", "reward.x._target_=nodots"], "is not a dotted path such as my.module.function"),
    (["recipe=grpo", "reward.x._target_=math.atan2"], "reward.x._target_=math.atan2: cannot be called with"),
    (["recipe=grpo", "reward.everyday_gold.wieght=2"], "takes other keys: wieght"),
    (["recipe=grpo", "reward.everyday_gold.weight=x"], "reward.everyday_gold.weight=x: must be a finite number"),
    (["recipe=grpo", "reward.everyday_gold.seconds=0"], "seconds=0: must be a finite number greater than 0"),
    (["recipe=grpo", "reward=numeric"], "asks for the column answer, which no row of data.train has"),
    (["recipe=grpo", "reward=numeric", "data.train=rows.parquet"], "of data.train has; there are prompt, solution"),
    (["recipe=grpo", "reward=numeric", "data.train=tables"], "of data.train has; there are prompt, solution"),
    (["recipe=grpo", "reward=numeric", "data.train=saved"], "of data.train has; there are prompt, solution"),
    (["recipe=grpo", "reward=unit_tests", "data.train=gym:gcd/size:4"], "there are answer, completion, entry, prompt"),
    (["recipe=grpo", "reward=numeric", "reward.correct.tolerance=-1"], "must be 0 or greater"),
    ([*MODEL, "reward.preference.path=/nowhere"], "reward.preference: path=/nowhere: no such directory"),
    ([*MODEL, "reward.preference.path=tables"], "path=tables: holds no model (no config.json)"),
    ([*MODEL, "reward.preference.path=adapter"], "path=adapter: is an adapter without reward_model.json"),
    ([*MODEL, "reward.preference.path=two"], "the model has outputs good, kind; choose one with output=NAME"),
    ([*MODEL, "reward.preference.path=x", "reward.preference.dtype=int8"], "dtype=int8: must be one of auto, float32"),
    ([*MODEL, "reward.preference.path=x", "reward.preference.max_tokens=0"], "max_tokens=0: must be at least 1"),
    ([*ADAPTER, "lora.rank=0"], "an adapter on the policy's weights needs a policy with LoRA: set lora.rank"),
    ([*ADAPTER, "lora.rank=4"], "path=tables: there is no adapter_config.json in it"),
    ([*ENSEMBLE, "reward.preference.members=[x]"], "an ensemble has at least two; use reward=model for one"),
    ([*ENSEMBLE, "reward.preference.members=[x,x]"], "members: x stands twice; name each model once"),
    ([*ENSEMBLE, "reward.preference.members=[x,adapter]"], "members: x is a whole and adapter a adapter; give"),
    ([*ENSEMBLE, "reward.preference.members=[x,y]", "reward.preference.combine=most"], "combine=most: must be one of"),
    ([*JUDGE, "reward.judge.pattern=x"], "pattern=x: has 0 groups; one must give A, B or C"),
    ([*JUDGE, "reward.judge.template=nosuch.txt"], "template=nosuch.txt: neither a text with {answer_a} nor a file"),
    ([*JUDGE, "reward.judge.max_opponents=1"], "max_opponents=1: must be at least 2, or null for all"),
    ([*JUDGE, "reward.judge.concurrency=0"], "concurrency=0: must be at least 1"),
    ([*JUDGE, "reward.judge.url=x"], "url=x/chat/completions: must begin with http:// or https://"),
    (["recipe=grpo", "reward=judge_model", "reward.judge.path=x", "reward.judge.max_tokens=9"],
     "max_tokens=9: must be greater than max_new_tokens="),
    ([*PROCESS, "reward.process.path=x", "reward.process.template=html"], "template=html: must be plain or chat"),
    ([*PROCESS, "reward.process.path=x", "reward.process.step_end=''"], "step_end is empty: give the text behind"),
    (["recipe=grpo", "advantage=pure", "reward=steps", "reward.steps.function=no.such"],
     "reward.steps: function=no.such: cannot be imported"),
    (["recipe=grpo", "reward=remote", "reward.preference.url=ftp://x"], "url=ftp://x: must begin with http:// or https://"),
    (["recipe=grpo", "reward=remote", "reward.preference.url=http://x", "reward.preference.token_variable=NO_SUCH"],
     "token_variable=NO_SUCH: there is no such environment variable"),
    (["recipe=grpo", "reward=model", "reward.preference.path=x", "reward.preference.seconds=3"],
     "reward.preference.seconds has no effect: RewardModel runs in the trainer's process"),
    (["recipe=grpo", "reward=model", "reward.preference.path=x", "reward.preference.pth=x"], "argument 'pth'"),
    (["recipe=grpo", "reward.everyday_gold.weight=0"], "reward: no component has a weight, so nothing can be learnt"),
    (["recipe=grpo", "advantage=pure"], "advantage=pure needs rewards of steps, which no component of reward gives"),
    (["recipe=grpo", "reward=[topic,steps]", "reward.steps.function=align.rewards.functions.everyday_gold"],
     "reward.steps has no effect"),
    # composers
    (["recipe=constrained_mu", "reward.topic.weight=2"], "reward.topic.weight=2 has no effect with composer="),
    (["recipe=grpo", "composer=fixed"], "1 component with a weight, nothing to compose"),
    (["recipe=constrained_mu", "trainer.kl_in_reward=0"], "which trainer.kl_in_reward=0 leaves empty"),
    (["recipe=constrained_mu", "composer.thresholds.nosuch=1"], "composer.thresholds.nosuch"),
    (["recipe=dynamic_gradient", "composer.parameters='('"], "composer.parameters=(: is no regular expression"),
    # rounds
    (["recipe=online_dpo", "trainer.select=labelled"], "trainer.select=labelled gives no rows for objective=dpo"),
    (["trainer=iterate", "reward=topic", "objective=policy_gradient"], "learns from rollouts: use trainer=online"),
    (["recipe=online_dpo", "reward=[]"], "trainer=iterate needs a reward"),
    (["recipe=online_dpo", "trainer.eval_every=5"], "trainer.eval_every has no effect with trainer=iterate"),
    (["recipe=online_dpo", "sampling.n=1", "trainer.greedy=false"], "sampling.n=1: trainer.select=pairs compares"),
    (["recipe=online_dpo", "trainer.offline_data=nosuch.jsonl"], "nosuch.jsonl: no such file"),
    (["recipe=online_dpo", "trainer.reference=updated", "reference.path=x"], "has no effect with trainer.reference=up"),
    (["recipe=online_dpo", "trainer.select=collect"], "trainer.select=collect and collect=... belong together"),
    (["recipe=multiturn_dpo_iterated", "collect.num_problems=1"], "need 3 prompts, collect.num_problems has 1"),
    (["recipe=best_of_n", "reward=[topic,brief]", "composer=fixed"], "composes what an online step learns from"),
    (["recipe=best_of_n", "trainer.heldout_n=2", "trainer.pass_component=x"], "trainer.pass_component=x: must be one"),
    # engines and launch
    (["recipe=online_dpo", "trainer.keep_best=heldout/total_greedy", "trainer.num_samples=0"], "needs evaluations"),
    (["recipe=dpo", "engine.offload_optimizer=true"], "needs ZeRO stage 1, 2 or 3: use engine=zero2"),
    (["recipe=dpo", "engine=zero2", "engine.deepspeed.fp16=x"], "engine.deepspeed.fp16 is set by align"),
    (["recipe=dpo", "launch.processes=2"], "launch.processes=2: engine=local is one process"),
    (["recipe=dpo", "launch.port=2000"], "launch.port has no effect on one process"),
    ([*SLURM, "launch.name=a/b"], "launch.name='a/b': letters, digits and . _ - only"),
    ([*SLURM, "launch.nodes=2"], "launch.nodes=2: engine=local is one process"),
    ([*SLURM, "launch.time=soon"], "launch.time=soon: must be minutes, HH:MM:SS or D-HH:MM:SS"),
    ([*SLURM, "launch.options=['-J x']"], "the template sets -J; its setting is launch.name"),
]  # fmt: skip


def test_there_are_many_and_none_stands_twice():
    assert len({tuple(words) for words, _ in REFUSED}) == len(REFUSED) >= 60


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """A folder with rows that have prompt and solution, in each form that is no JSON; and with what reward models are
    told by."""
    folder = tmp_path_factory.mktemp("tables")
    rows = Dataset.from_list([{"prompt": "1 + 1", "solution": "2"}])
    rows.to_parquet(folder / "rows.parquet")
    rows.save_to_disk(folder / "saved")
    (folder / "tables").mkdir()
    rows.to_csv(folder / "tables" / "part.csv", index=False)
    for name, file, text in (
        ("adapter", "adapter_config.json", "{}"),
        ("two", "config.json", "{}"),
        ("two", "reward_model.json", '{"kind": "attributes", "outputs": ["good", "kind"]}'),
    ):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text(text)
    return folder


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_check_and_train_refuse_alike(tables, tmp_path, capsys, monkeypatch, words, sentence):
    def loaded(*_):
        raise AssertionError("training began")

    monkeypatch.chdir(tables)
    monkeypatch.setattr("align.launch.command._here", loaded)
    monkeypatch.setattr("align.launch.several._start", loaded)
    own = [*words, *([] if any(w.startswith("model=") for w in words) else ["model=tiny"])]
    said = []
    for command in ("check", "train"):
        assert main([command, *own, f"run.dir={tmp_path / 'run'}"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        said.append(err)
    assert said[0] == said[1]
    assert sentence in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("own", ["data.format=builtins.dict", "data.loader=builtins.iter", "data.form=math"])
def test_columns_that_only_the_users_own_functions_know_are_not_asked_for(tables, capsys, monkeypatch, own):
    monkeypatch.chdir(tables)
    assert main(["check", "recipe=grpo", "model=tiny", "reward=numeric", "data.train=rows.parquet", own]) == 0
    assert "ok: " in capsys.readouterr().out


# words of an input, and the commands that read such a one: all say what training says
INPUTS = [
    (["data.train=nosuch.jsonl"], ["data check", "generate", "score", "evaluate pairs", "evaluate overoptimisation"]),
    (["data.train=gym:gcd/size:4/min_numbers:1"], ["data check", "generate", "score", "evaluate pairs"]),
    (["model=hub", "model.path=/nowhere"], ["data check", "generate", "score", "evaluate pairs"]),
    (["model=hub", "model.path=x", "model.dtype=float8"], ["data check", "generate", "score", "evaluate pairs"]),
    (["data.heldout=./nosuch"], ["data check"]),
    (["data.format=no.such"], ["data check", "generate"]),
    (["data.loader=no.such"], ["data check", "generate"]),
    (["reward.x._target_=no.such"], ["generate"]),
    (["reward=numeric"], ["generate"]),
    (["reward=remote", "reward.preference.url=x"], ["generate"]),
    (["reward=adapter", "reward.preference.path=x", "lora.rank=0"], ["generate"]),
    (["sampling.stop=['']"], ["generate"]),
    (["rollout._target_=no.such"], ["generate"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "commands"), INPUTS, ids=[" ".join(words) for words, _ in INPUTS])
def test_commands_that_do_not_train_refuse_their_inputs_in_the_same_words(tmp_path, capsys, words, commands):
    recipe = ["recipe=grpo", *([] if words[0].startswith("model=") else ["model=tiny"])]
    assert main(["check", *recipe, *words]) == 2
    said = capsys.readouterr().err
    for command in commands:
        data = [] if words[0].startswith("data.train=") else ["data.train=align:everyday/train.jsonl"]
        model = [] if words[0].startswith("model=") or "over" in command else ["model=tiny"]
        out = [f"out={tmp_path / 'out.jsonl'}"] if command != "data check" else []
        assert main([*command.split(), *model, *data, *words, *out]) == 2
        assert capsys.readouterr().err == said, command


def test_an_evaluation_needs_nothing_that_only_training_reads(tmp_path, capsys):
    """Here the rows and the variable of the run are gone; it is refused for what it lacks itself, its final model."""
    run = tmp_path / "run"
    run.mkdir()
    assert main(["show", "recipe=dpo", "model=tiny", "data.train=gone.jsonl", "data.heldout=gone.jsonl"]) == 0
    settings = capsys.readouterr().out.replace("gone.jsonl", "${oc.env:NO_SUCH_VARIABLE}/gone.jsonl", 1)
    (run / "config.yaml").write_text(settings)
    assert main(["evaluate", f"run.dir={run}", "data.train=nosuch.jsonl"]) == 2
    assert "nosuch.jsonl: no such file" in capsys.readouterr().err
    assert main(["evaluate", f"run.dir={run}"]) == 2
    assert "holds no final model" in capsys.readouterr().err
