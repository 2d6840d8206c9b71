"""MODEL=, disks that only jobs see, shared stages, and to-hf and to-core, as jobs of a cluster: Beaker's own client against tests/beaker_server."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from beaker_place import Place, place
from sft.formats import manifest
from sft.formats.job import JobRecord

__all__ = ["place"]  # the fixture
pytestmark = pytest.mark.server
ON = "CLUSTER=beaker-test"


def stage(place: Place, name: str, line: str) -> None:
    """Gives a stage of the place a first line in its body, and pushes it."""
    file = place.root / f"stages/{name}.py"
    text = file.read_text()
    file.write_text(text.replace("def body(stage):\n", f"def body(stage):\n    {line}\n"))
    place.push()


def jobs(place: Place) -> list[str]:
    """The stages of the experiments so far, sorted: several are made at once."""
    return [
        re.sub(r"-[0-9a-f]{10}.*", "", e.message.name).rpartition("-")[2] for e in place.server.experiments.values()
    ]


def test_another_model_on_a_disk_of_the_cluster_is_one_job_and_found_there(place: Place) -> None:
    stage(
        place,
        "evaluate",
        "from sft.runner import models; p = stage.place; print('scores', models.folder(stage.recipe, p.runs, p.roots, stage.cluster, p.cluster, 'evaluate'))",
    )
    place.workspace.make("prepare", "RECIPE=x", ON)
    count = len(place.server.experiments)
    words = ("evaluate", "RECIPE=x", ON, "MODEL=weka://oe-test/m")
    told = place.workspace.make(*words, ok=False)
    assert "/m is no folder; next: correct MODEL=" in told.stdout + told.stderr  # said by the job
    (Path(place.weka) / "m").mkdir()
    (Path(place.weka) / "m/config.json").write_text("{}")
    count = len(place.server.experiments)
    made = place.workspace.make(*words)
    assert f"scores {place.weka}/m" in made.stdout and "checked in the job of evaluate" in made.stderr
    assert len(place.server.experiments) == count + 1
    run = next((place.root / "runs").glob("x_model-*"))
    assert manifest.is_whole(run / "evaluate") and not (run / "train").exists() and (run / "prepare").is_symlink()
    place.workspace.make(*words)
    assert len(place.server.experiments) == count + 1


def test_a_base_that_only_jobs_see_is_planned_by_name_and_checked_in_the_job(place: Place) -> None:
    place.workspace.recipe("z", 'preset = "olmo3-tiny"', 'preset = "olmo3-tiny"\nbase = "weka://oe-test/b"')
    stage(place, "sync", "print('copies', stage.find(stage.recipe.model.base, \"'base' in [model]\"))")
    told = place.workspace.make("dry-run", "RECIPE=z", ON, "STAGE=sync")
    assert (
        "note: recipes/z.toml" not in told.stderr
        and "'base' in [model] = 'weka://oe-test/b': checked in the job of sync" in told.stderr
    )
    doctor = place.workspace.make("doctor", "RECIPE=z", ON, ok=None).stdout
    assert re.search(r"base weights +weka://oe-test/b: checked in the job", doctor), doctor
    (Path(place.weka) / "b").mkdir()  # also here, where it is not looked for
    assert f"copies {place.weka}/b" in place.workspace.make("sync", "RECIPE=z", ON).stdout
    here = place.workspace.make("sync", "RECIPE=z", ok=False).stderr
    assert "on none of the mounts in env/local.toml" in here
    place.edit("shared_disk = false", 'stages = ["train"]\nshared_disk = false')
    shutil.rmtree(place.root / "runs/z/sync")  # what is done needs no disk
    assert (
        "sync runs on this machine; next: put 'sync' among stages"
        in place.workspace.make("sync", "RECIPE=z", ON, ok=False).stderr
    )


@pytest.mark.slow
def test_a_sibling_on_the_cluster_makes_only_what_is_new(place: Place) -> None:
    place.edit("shared_disk = false", 'stages = ["train", "evaluate"]\nshared_disk = false')
    place.workspace.make("evaluate", "RECIPE=x", ON)
    assert len(place.server.experiments) == 2
    assert "x_limit-10/train: reuses runs/x/train" in place.workspace.make("why", "RECIPE=x", ON, "limit=10").stdout
    made = place.workspace.make("evaluate", "RECIPE=x", ON, "limit=10")
    assert "[train] reuses runs/x/train" in made.stdout and len(place.server.experiments) == 3
    run, there = place.root / "runs/x_limit-10", Path(place.weka) / "ann/runs/x_limit-10"
    assert manifest.is_whole(run / "evaluate") and manifest.is_whole(there / "evaluate")
    assert (run / "train").is_symlink() and (there / "train").is_symlink()


def test_to_hf_is_one_job_that_is_found_again_and_refuses_disks_of_this_machine(place: Place) -> None:
    (place.root / "stages/to_hf.py").write_text(
        "import sys\nfrom pathlib import Path\nPath(sys.argv[2]).mkdir()\nprint('made', *sys.argv[1:])\n"
    )
    place.push()
    words = ("to-hf", ON, "SRC=weka://oe-test/step7", "DST=weka://oe-test/out", "dtype=float32", "cpus=2")
    made = place.workspace.make(*words)
    assert f"made {place.weka}/step7 {place.weka}/out dtype=float32" in made.stdout
    assert len(place.server.experiments) == 1 and (Path(place.weka) / "out").is_dir()
    record = next((place.root / "runs/.tools").glob("to-hf-*/.jobs/to-hf.json"))
    assert JobRecord.read(record).ended == "done"
    assert "to-hf" in place.workspace.make("jobs").stdout
    here = place.workspace.make("to-core", ON, "SRC=/tmp/x", "DST=gs://b/x", ok=False).stderr
    assert "SRC=/tmp/x: jobs on beaker-test do not see it; next: gs://, s3://, or a path on a mount" in here
    assert "SRC= and DST= are missing" in place.workspace.make("to-core", ON, ok=False).stderr
