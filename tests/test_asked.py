"""What is asked is what runs: goals, overrides, hardware words, other trainers' names and clusters' names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import REPO
from sft.common.errors import SftError
from sft.recipe import clusters, other_names, recipe, schema, typed
from sft.recipe.options import names_of
from sft.runner import asked, make_words

LOCAL = schema.Cluster(storage="s")
JOBS = schema.Cluster(storage="s", launcher="slurm", stages=("train", "evaluate"))
GOALS = asked.known_goals(REPO / "Makefile")


def resolve(goals: str, *fields: str, cluster: schema.Cluster = LOCAL, watches: bool = False) -> list[str]:
    return asked.Asked(goals.split(), cluster, "c", watches=watches).resolve(fields)


def refused(goals: str, *fields: str, cluster: schema.Cluster = LOCAL) -> str:
    with pytest.raises(SftError) as error:
        resolve(goals, *fields, cluster=cluster)
    return str(error.value)


@pytest.mark.parametrize(
    ("goal", "meant"),
    [
        ("evalaute", "did you mean 'evaluate'?"), ("trian", "did you mean 'train'?"), ("finetune", "did you mean 'train'?"),
        ("lr:1e-4", "a field is set with '=': lr=1e-4"), ("lr", "a field is set with '=': lr=…"),
        ("gsm8k", "did you mean RECIPE=gsm8k?"), ("runs/x/train", "<runs>/<run>/<stage>/manifest.json"),
        ("bench-pakc", "did you mean 'bench-pack'?"),
    ],
)  # fmt: skip
def test_a_word_that_is_no_goal_is_refused_with_what_was_meant(goal: str, meant: str) -> None:
    with pytest.raises(SftError, match="next: correct it; make help") as error:
        asked.check_goals(["train", goal], GOALS, ["gsm8k"])
    assert f"no goal {goal!r}; " in str(error.value) and meant in str(error.value)


def test_every_goal_of_the_makefile_is_known_and_every_answer_is_a_goal() -> None:
    asked.check_goals([*GOALS, "runs/x/sync/manifest.json", ".venv/ready-0"], GOALS, [])
    assert {"train", "smoke", "bench-pack", "slurm-up", "push-hub"} <= set(GOALS)
    assert set(asked._VERBS.values()) | set(asked.NO_FIELDS) <= set(GOALS)
    assert {*asked.LAST} <= set(GOALS)


@pytest.mark.parametrize(
    ("goals", "override", "table"),
    [
        ("train", "max_length=256", "evaluate"), ("train", "batch_size=8", "evaluate"), ("train", "convert.dtype=float32", "convert"),
        ("prepare", "lr=1e-4", "train"), ("prepare sync", "steps=3", "train"), ("sync", "steps=3", "train"), ("preview", "lr=1", "train"),
        ("convert", "limit=3", "evaluate"), ("steps", "limit=3", "evaluate"),
    ],
)  # fmt: skip
def test_an_override_that_no_asked_stage_reads_is_refused_with_its_table(goals: str, override: str, table: str) -> None:
    message = refused(goals, override)
    assert f"override '{override}': [{table}] has this field" in message and f"make {goals} does not" in message


def test_where_another_trainers_name_is_a_field_of_another_table_ours_is_reported() -> None:
    assert "here it is 'seq_len' in [train]" in refused("train", "max_length=256")
    assert "here it is 'global_batch_tokens' in [train]" in refused("train", "batch_size=8")


@pytest.mark.parametrize(
    ("goals", "override"),
    [
        ("train", "lr=1"), ("evaluate", "lr=1"), ("all", "limit=1"), ("report", "limit=1"), ("fetch", "limit=1"), ("sync", "base=x"), ("sync train", "steps=3"),
        ("train", "every=10"), ("train", "evaluate.best=x"), ("show", "lr=1"), ("to-hf", "dtype=float32"), ("steps", "seq_len=8"),
    ],
)  # fmt: skip
def test_what_a_goal_reads_is_taken(goals: str, override: str) -> None:
    assert resolve(goals, override) == [override]


def test_training_that_evaluates_its_checkpoints_reads_the_fields_of_evaluation() -> None:
    assert resolve("train", "limit=1", "every=10") and resolve("train", "limit=1", watches=True)
    assert "does not" in refused("train", "limit=1")


@pytest.mark.parametrize("goal", ["verify", "cp", "jobs", "setup", "bench-pack"])
def test_goals_without_a_recipe_take_no_field(goal: str) -> None:
    assert f"make {goal}: it reads no recipe, so 'lr=3' would do nothing" in refused(goal, "lr=3")


@pytest.mark.parametrize(
    ("goals", "word", "resolved"),
    [
        ("evaluate", "cpus=8", "evaluate.cpus=8"), ("train", "memory_gb=64", "train.memory_gb=64"),
        ("evaluate", "compile=never", "train.compile=never"), ("prepare", "cache_gb=3", "prepare.cache_gb=3"),
        ("train", "evaluate", ""),
    ],
)  # fmt: skip
def test_a_hardware_word_is_that_of_the_asked_stage(goals: str, word: str, resolved: str) -> None:
    assert resolve(goals, word, cluster=JOBS) == [resolved or word]


def test_a_hardware_word_of_no_or_several_stages_is_refused() -> None:
    assert "write train.time=1:0 or evaluate.time=1:0" in refused("train evaluate", "time=1:0", cluster=JOBS)
    assert "train reads it, and make prepare does not" in refused("prepare", "microbatch_tokens=8")
    assert "prepare is no job with CLUSTER=c, whose file has stages = train, evaluate" in refused(
        "prepare", "cpus=8", cluster=JOBS
    )
    for goal in ("doctor", "show", "report"):
        assert "for which stage? next: write evaluate.cpus=8" in refused(goal, "cpus=8", cluster=JOBS)
    assert resolve("doctor", "evaluate.cpus=8", cluster=JOBS) == ["evaluate.cpus=8"]
    assert "make train does not reach evaluate" in refused("train", "evaluate.cpus=8", cluster=JOBS)
    assert "prepare does not read it, train would" in refused("train", "prepare.nodes=2")


def test_every_other_name_has_a_field_of_ours() -> None:
    fields = {t: set(names_of(cls)) for t, cls in schema.TABLES.items()}
    for word, text in other_names.OTHER_NAMES.items():
        for place in filter(None, text.partition(":")[0].split(" or ")):
            table, _, name = place.rpartition(".")
            stages = typed.HARDWARE_FIELDS[name].metadata["stages"] or schema.STAGES if table.startswith("on.") else ()
            assert table[3:] in stages if stages else name in fields[table], f"{word}: {place}"
    assert len(other_names.OTHER_NAMES) >= 40


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("learning_rate", "'lr' in [train]"), ("num_train_epochs", "'epochs' in [train]"), ("base_model", "'base' in [model]"),
        ("val_set_size", "'validation_fraction' in [prepare]"), ("--learning-rate", "'lr' in [train]"),
        ("step_scheduler.global_batch_size", "'global_batch_tokens' in [train]"), ("optimizer.lr", "'lr' in [train]"),
        ("gradient_checkpointing", "'recompute' in [on.<cluster>.train]"), ("lora_r", "'lora_rank' in [train]"),
        ("workspace", "it is a field of env/mine.toml, not of a recipe"),
        ("lora_dora", "DoRA (arXiv 2402.09353) is not supported"), ("train.use_dora", "DoRA (arXiv 2402.09353) is not supported"),
    ],
)  # fmt: skip
def test_names_of_other_trainers_are_answered_from_the_table_not_by_their_spelling(name: str, ours: str) -> None:
    problems: list[str] = []
    assert recipe.locate(name, "mine", problems) is None and ours in problems[0]
    assert "did you mean" not in problems[0]


def test_other_names_in_a_recipes_file_are_answered_too(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(
        '[train]\nlearning_rate = 1\ncpus = 3\n[prepare]\ntokenizer = "t"\nsources = []\n[evaluate]\ntasks = ["t"]\n'
    )
    with pytest.raises(SftError) as error:
        recipe.load(file)
    assert "no field 'learning_rate' in [train]; here it is 'lr' in [train]" in str(error.value)
    assert "no field 'cpus' in [train]; it belongs to [on.<cluster>.train]" in str(error.value)


@pytest.mark.parametrize(
    "name", ["ai2/jupiter-cirrascale-2", "ai2/jupiter", "jupiter", "ai2_jupiter", "jupiter-cirrascale-2"]
)
def test_a_clusters_name_in_beaker_is_answered_with_ours(name: str) -> None:
    with pytest.raises(SftError, match="did you mean CLUSTER=ai2-jupiter"):
        clusters.find_cluster(REPO / "env", name)
    assert clusters.find_cluster(REPO / "env", "ai2-jupiter").is_file()


@pytest.mark.seconds
def test_make_refuses_before_anything_runs(workspace) -> None:
    for words, message in (
        (["train", "evalaute"], "no goal 'evalaute'; did you mean 'evaluate'?"),
        (["train", "lr:1e-4"], "a field is set with '='"),
        (["train", "max_length=256"], "[evaluate] has this field"),
        (["train", "recipe=x"], "did you mean RECIPE=x?"),
        (["dry-run", "STAGE=nope"], "no such stage; next: one of prepare"),
        (["delete", "RUN=x", "YES=no"], "nothing here reads RECIPE=x"),
    ):
        assert message in workspace.make(*words, "RECIPE=x", ok=False).stderr
    noted = workspace.make("-n", "train", "RECIPE=x", "NCCL_DEBUG=INFO").stderr
    assert "note: NCCL_DEBUG=INFO is no variable of this Makefile" in noted
    for goal in ("show", "why", "doctor", "extend", "sweep", "new"):
        told = workspace.make(goal, ok=False).stderr
        assert (
            f"make {goal}: " in told and "next: make " + goal in told and told.endswith("*** nothing was run.  Stop.\n")
        )
    assert workspace.ran() == []


def test_a_time_that_sbatch_would_refuse_and_numbers_of_a_job_that_is_none_are_refused_first(workspace) -> None:
    refused = workspace.make("train", "RECIPE=x", "CLUSTER=slurm", "time=24h", ok=False).stderr
    assert "time = '24h': no time limit of Slurm" in refused and "nothing was run" in refused
    refused = workspace.make("to-hf", "SRC=a", "DST=b", "cpus=4", ok=False).stderr
    assert "override 'cpus=4': to-hf is no job with CLUSTER=local; next: remove it" in refused


@pytest.mark.seconds
def test_make_alone_prints_the_goals(workspace) -> None:
    assert workspace.make().stdout == workspace.make("help").stdout != ""


@pytest.mark.parametrize(
    ("words", "message"),
    [("soup", "make soup: STEPS= and DST= are missing; next: make soup RUN=x"), ("cp SRC=a", "make cp: DST= is missing"),
     ("export RECIPE=x", "make export: DST= is missing"), ("diff A=x", "make diff: B= is missing"), ("serve", "make serve: RUN= or MODEL= is missing"),
     ("to-core DST=x", "make to-core: SRC= is missing")],
    ids=["soup", "cp", "export", "diff", "serve", "to-core"],
)  # fmt: skip
def test_a_goal_without_a_variable_that_it_needs_is_refused_before_anything_runs(words: str, message: str) -> None:
    goal, *given = words.split()
    with pytest.raises(SftError, match=re.escape(message)):
        make_words.check_needs(" ".join(given), [goal])
    every = ("A=x", "B=y", "SRC=a", "DST=b", "STEPS=1", "RUN=x", "MODEL=y")
    read = [word for word in every if goal in make_words.READERS[word.partition("=")[0]] or word.startswith("MODEL")]
    make_words.check_needs(" ".join(read), [goal])


@pytest.mark.parametrize(
    ("goals", "words", "message"),
    [("why", "RECIPE=x STAGE=train", "make why: nothing here reads STAGE=train; next: remove it (it is for make dry-run, fetch, soak)"),
     ("train", "RECIPE=x CHECK=1", "reads CHECK=1"), ("jobs", "RECIPE=x", "nothing here reads RECIPE=x"), ("chat", "RECIPE=x RUN=x", "next: RUN=, the name of a run"),
     ("runs", "CLUSTER=slurm", "reads CLUSTER=slurm"), ("sweep", "RECIPE=x DETACH=1", "reads DETACH=1"), ("verify", "RUN=x YES=1", "reads YES=1"),
     ("delete", "RUN=x YES=0", "YES=0: 1 is expected; next: YES=1, or leave it out"), ("fetch", "RECIPE=x PUSH=no", "1 or public is expected"),
     ("to-hf", "SRC=a DST=b RECIPE=x", "reads RECIPE=x")],
)  # fmt: skip
def test_a_variable_that_no_goal_reads_and_a_flag_that_is_not_1_are_refused(
    goals: str, words: str, message: str
) -> None:
    with pytest.raises(SftError, match=re.escape(message)):
        make_words.check_needs(words, goals.split())


def test_a_variable_that_one_of_the_goals_reads_is_taken() -> None:
    make_words.check_needs("RECIPE=x CLUSTER=slurm DATA=d RUNS=r CHECK=1 DETACH=1", ["sync", "train"])
    make_words.check_needs("PUSH=public REPO=a/b RECIPE=x", ["push-hub"])
    assert {goal for goals in make_words.READERS.values() for goal in goals} <= set(GOALS)


def test_words_with_dashes_are_fields_and_none_is_passed_over() -> None:
    assert make_words.split_overrides("--learning_rate=1 -lr=2 .lr=3 _x=4") == ["learning_rate=1", "lr=2", "lr=3"]


def test_variables_are_read_as_make_reads_them() -> None:
    text = r"TESTS=a\ MODEL=hf://q/r DETACH:=1 SRC=my\ folder DST=a$$b"
    assert make_words.given(text, "MODEL") == "" and make_words.given(text, "TESTS") == "a MODEL=hf://q/r"
    assert make_words.given(text, "DETACH") == "1" and make_words.given(text, "SRC") == "my folder"
    assert make_words.given(text, "DST") == "a$b"
    assert make_words.with_model("MODEL:=hf://a/b", ["evaluate"], [], Path("runs")) == ["convert.model=hf://a/b"]


@pytest.mark.parametrize("value", ["`touch x`", "$(touch x)", "a b", "a'b", 'a"b', "a;b", "a&b"])
def test_what_a_shell_would_read_otherwise_is_no_override(value: str) -> None:
    with pytest.raises(SftError, match="only letters, digits"):
        make_words.check_characters([f"dtype={value}"])
    with pytest.raises(SftError, match=r"MODEL=.*only letters, digits .*next: name a link to it"):
        make_words.with_model(f"MODEL={value}".replace(" ", r"\ "), ["evaluate"], [], Path("runs"))
    make_words.check_characters(["lr=1e-4", "convert.model=hf://org/name@rev", "tasks=a,b"])


def test_a_sweep_reads_no_model() -> None:
    with pytest.raises(SftError, match="make sweep: it reads no MODEL="):
        make_words.with_model("MODEL=hf://a/b", ["sweep"], [], Path("runs"))
