"""Google's network under Beaker's ai2/augusta: NCCL's variables, the order of the nodes and the choice of hosts.

The oracles are OLMo-core's: the variables of `init_distributed`, `reorder_ranks_in_gcp` and `select_beaker_hosts`.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import pytest
import requests
import yaml
from beaker import beaker_pb2 as pb2

from beaker_place import place
from beaker_server import now
from conftest import REPO
from sft.common.errors import SftError
from sft.launch import job
from sft.launch.beaker import harnesses, hosts, node_order, scheduler
from sft.launch.exchange import exchange

__all__ = ["place"]  # the fixture
pytestmark = pytest.mark.server

# --- NCCL's variables -------------------------------------------------------------------------------------------------


def sourced(folder, given: dict[str, str], gpus: int = 8, profile: str = "") -> subprocess.CompletedProcess[str]:
    """The environment after `source env/tcpxo.sh` in a shell that has only `given`."""
    if profile:
        (folder / "nccl-env-profile.sh").write_text(profile)
    line = f'set -euo pipefail; source env/tcpxo.sh "{folder}" {gpus} >&2; env'
    env = {"PATH": os.environ["PATH"], **given}
    return subprocess.run(["bash", "-c", line], cwd=REPO, env=env, capture_output=True, text=True)


def variables(text: str) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in text.splitlines())


def olmo_cores(monkeypatch) -> dict[str, str]:
    """NCCL's variables that OLMo-core sets on a node of ai2/augusta."""
    from olmo_core.distributed import utils

    before = dict(os.environ)
    try:
        for name in [n for n in os.environ if n.startswith(("NCCL_", "CUDA_VISIBLE"))]:
            del os.environ[name]
        os.environ["BEAKER_NODE_HOSTNAME"] = "augusta-h100-17.reviz.ai2.in"
        monkeypatch.setattr(utils.dist, "init_process_group", lambda *_, **__: None)
        utils.init_distributed(backend="gloo")
        return {n: v for n, v in os.environ.items() if n.startswith(("NCCL_", "CUDA_VISIBLE"))}
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_nccls_variables_are_those_of_olmo_core(tmp_path, monkeypatch):
    wanted = olmo_cores(monkeypatch)
    assert len(wanted) > 20
    found = variables(sourced(tmp_path, {"LD_LIBRARY_PATH": "/usr/lib"}).stdout)
    assert found.pop("LD_LIBRARY_PATH") == f"{tmp_path}:/usr/lib"
    assert found.pop("NCCL_LIB_DIR") == str(tmp_path)  # gantry sets it: the profile reads it
    ours = {n: v.replace(str(tmp_path), "/var/lib/tcpxo/lib64") for n, v in found.items()}
    assert {n: v for n, v in ours.items() if n.startswith(("NCCL_", "CUDA_VISIBLE"))} == wanted
    assert variables(sourced(tmp_path, {}, gpus=2).stdout)["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_the_jobs_own_variables_come_before_the_profiles_and_those_before_ours(tmp_path):
    profile = 'echo "$NOT_SET"; export NCCL_FASTRAK_CTRL_DEV="eth-$(basename "$NCCL_LIB_DIR")" NCCL_BUFFSIZE=1 NCCL_PROTO=LL\n'
    done = sourced(tmp_path, {"NCCL_BUFFSIZE": "a 'b'", "NCCL_DEBUG": "INFO"}, profile=profile)
    found = variables(done.stdout)
    assert done.returncode == 0, done.stderr
    assert found["NCCL_FASTRAK_CTRL_DEV"] == f"eth-{tmp_path.name}"
    assert (found["NCCL_BUFFSIZE"], found["NCCL_DEBUG"]) == ("a 'b'", "INFO")
    assert found["NCCL_PROTO"] == "Simple,LL128"  # as gantry sets it after the profile


def test_a_node_without_the_folder_ends_a_job_of_several_nodes(tmp_path):
    done = sourced(tmp_path / "none", {"BEAKER_REPLICA_COUNT": "2"})
    assert done.returncode == 1 and "this node has no such folder" in done.stderr and "next: correct it" in done.stderr
    alone = sourced(tmp_path / "none", {})
    assert alone.returncode == 0 and "NCCL is not set up for other nodes" in alone.stderr
    assert "NCCL_PROTO" not in alone.stdout


def test_gantry_sets_the_same_after_a_profile(tmp_path):
    """The lines of gantry's own entrypoint, where it is installed: pip install beaker-gantry==3.7.0."""
    gantry = pytest.importorskip("gantry", reason="beaker-gantry is not installed", exc_type=ImportError)
    text = (type(REPO)(gantry.__file__).parent / "entrypoint.sh").read_text()
    lines = text[text.index('export NCCL_LIB_DIR="/var/lib') :]
    lines = lines[: lines.index("log_info")].replace("/var/lib/tcpxo/lib64", str(tmp_path))
    profile = "export NCCL_FASTRAK_CTRL_DEV=eth0 NCCL_PROTO=LL\n"
    found = variables(sourced(tmp_path, {"LD_LIBRARY_PATH": "/usr/lib"}, profile=profile).stdout)
    env = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": "/usr/lib"}
    theirs = subprocess.run(["bash", "-c", f"{lines}\nenv"], env=env, capture_output=True, text=True, check=True)
    wanted = {n: v for n, v in variables(theirs.stdout).items() if n.startswith(("NCCL_", "LD_"))}
    assert len(wanted) == 6 and {n: found[n] for n in wanted} == wanted


# --- the order of the nodes -------------------------------------------------------------------------------------------


class Store(dict):
    """A store that has every node's answer already."""

    def wait(self, names):
        assert all(name in self or name.endswith("_done") for name in names)

    def get(self, name):
        return self[name].encode()

    def set(self, name, value):
        self[name] = value


def olmo_cores_order(places: list[str], monkeypatch, capsys) -> list[int]:
    """The numbers that OLMo-core's module prints, as Beaker's numbers in their order."""
    from olmo_core.launch import reorder_ranks_in_gcp as theirs

    store = Store({f"node_{n}_hostid": p for n, p in enumerate(places)})
    monkeypatch.setattr(theirs.dist, "TCPStore", lambda **_: store)
    final = {}
    for rank, mine in enumerate(places):
        monkeypatch.setattr(
            theirs.requests, "get", lambda *_, mine=mine, **__: SimpleNamespace(status_code=200, text=mine)
        )
        monkeypatch.setattr(sys, "argv", ["x", str(rank), str(len(places)), "localhost"])
        theirs.main()
        final[int(capsys.readouterr().out)] = rank
    return [final[n] for n in range(len(places))]


def test_nodes_are_ordered_as_olmo_core_orders_them(monkeypatch, capsys):
    draw = random.Random(5)
    for count in (2, 5, 16):
        places = [f"/b{n % 3}/s{draw.randrange(4)}/m{n}" for n in draw.sample(range(99), count)]
        assert node_order.order(places) == olmo_cores_order(places, monkeypatch, capsys)
    assert node_order.order(["/b/s/m", "", "/a/s/m"]) == [0, 1, 2]


@contextmanager
def served(answer) -> Iterator[str]:
    """host:port of an HTTP server on 127.0.0.1 whose answers are answer(handler)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = answer(self)
            self.send_response(200 if body is not None else 404)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_each_node_learns_its_number_from_the_places_of_all(monkeypatch):
    path = "/computeMetadata/v1/instance/attributes/physical_host"

    def metadata(request):
        asked = (request.path, request.headers["Metadata-Flavor"])
        return "/b/s/m\n" if asked == (path, "Google") else None

    with served(metadata) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        assert node_order.place() == "/b/s/m"
        monkeypatch.setattr(node_order, "PATH", "/other")
        assert node_order.place() == ""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{free.getsockname()[1]}"
    places = ["/b1/s/0", "/b2/s/1", "/b1/s/2"]
    with ThreadPoolExecutor(3) as pool:
        seen = list(pool.map(lambda rank: exchange(rank, 3, head, places[rank], 60), range(3)))
    assert seen == [places] * 3 and node_order.order(places) == [0, 2, 1]


# --- the choice of hosts ----------------------------------------------------------------------------------------------


def test_hosts_are_chosen_as_olmo_core_chooses_them(monkeypatch):
    for name in ("", ".services", ".services.instances", ".services.instances.client"):
        module = ModuleType(f"google.cloud.compute_v1{name}")
        module.InstancesClient = None
        monkeypatch.setitem(sys.modules, module.__name__, module)  # it asks Google; not among the packages here
    from olmo_core.launch import select_beaker_hosts as theirs

    draw, both = random.Random(3), {"chosen": 0, "refused": 0}
    for _ in range(300):
        names = {f"h{n}": f"b{draw.randrange(4)}" for n in range(draw.randrange(1, 24))}
        free = {h for h in names if draw.random() < 0.7} or {"h0"}
        together = draw.choice([1, 2, 3, 4])
        nodes = together * draw.choice([1, 2, 3])
        facts = {h: theirs.HostMetadata(b, "", "") for h, b in names.items()}
        try:
            (wanted,) = theirs.get_hostname_constraints(facts, nodes // together, nodes, 1, set(names) - free)
        except (theirs.BeakerInsufficientResourcesError, ValueError):
            wanted = None
        try:
            found = hosts.choose(names, free, nodes, together)
        except SftError:
            found = None
        assert found == wanted
        both["refused" if found is None else "chosen"] += 1
    assert min(both.values()) > 30
    with pytest.raises(SftError, match="0 of 2 hosts found"):
        hosts.choose({"h": "b"}, set(), 2, 2)


def parsed(*words: str) -> job.Job:
    return job.Job.parse(
        ["runs/x", "train", "bash", "-c", "exit 3", "runs/x", "--cluster", "beaker-test", *words], strict=False
    )


@pytest.fixture
def google(monkeypatch):
    """google({instance: block}): what Google lists, one instance on a page."""

    def start(instances: dict[str, str]) -> None:
        names = list(instances)

        def page(request):
            at = int(request.path.partition("pageToken=")[2] or 0)
            topology = {"physicalHostTopology": {"block": instances[names[at]]}}
            item = {"name": names[at], "status": "RUNNING", "resourceStatus": topology}
            return json.dumps({"items": [item], "nextPageToken": str(at + 1) if at + 1 < len(names) else ""})

        monkeypatch.setattr(hosts, "COMPUTE", "http://" + stack.enter_context(served(page)))
        monkeypatch.setattr(hosts, "_session", lambda _: requests.Session())

    with ExitStack() as stack:
        yield start


def constraints(place) -> dict:
    return place.experiment.body["tasks"][0]["constraints"]


def test_a_job_of_two_nodes_gets_hosts_of_the_block_with_the_most_free_ones(place, google):
    place.edit('clusters = ["ai2/jupiter"]', 'clusters = ["ai2/jupiter"]\ngpus_per_node = 8\ngoogle_zone = "p/z-1"')
    google({"a1": "A", "a2": "A", "a3": "A", "a4": "A", "b1": "B", "b2": "B", "b3": "B", "else": "A"})
    place.server.nodes = {f"{n}.example": "ai2/jupiter" for n in ("a1", "a2", "a3", "a4", "b1", "b2", "b3")}
    place.server.nodes["other"] = "ai2/ceres"
    place.server.cordoned = {"a1.example"}
    busy = pb2.Job(id="01BUSY")  # another user's, which may not be preempted
    busy.status.started.CopyFrom(now())
    busy.assignment_details.node_id = "01NODE-a2.example"
    busy.assignment_details.resource_assignment.assigned_slots_count = 8
    busy.system_details.priority = pb2.JobPriority.JOB_PRIORITY_HIGH
    place.server.runs["busy"] = SimpleNamespace(message=busy, task=SimpleNamespace(message=pb2.Task()), process=None, cancelled=("x", 0))  # fmt: skip
    made = parsed("nodes=2")
    scheduler.BeakerScheduler(made.folder, made.cluster).submit(made)
    assert constraints(place) == {"hostname": ["b1.example", "b2.example", "b3.example"]}
    busy.system_details.priority = pb2.JobPriority.JOB_PRIORITY_LOW
    again = parsed("nodes=2", "priority=high")
    assert hosts.allowed(scheduler.BeakerScheduler(again.folder, again.cluster).client, again)[0] == "a1.example"
    alone = parsed()
    assert hosts.allowed(scheduler.BeakerScheduler(alone.folder, alone.cluster).client, alone) == ()
    many = parsed("nodes=8")
    with pytest.raises(
        SftError, match=r"env/beaker-test.toml: google_zone: .*, with each 8 in one block; .*next: fewer"
    ):
        hosts.allowed(scheduler.BeakerScheduler(many.folder, many.cluster).client, many)


def test_google_refusing_to_list_its_instances_is_reported(monkeypatch):
    with served(lambda _: None) as address:
        monkeypatch.setattr(hosts, "COMPUTE", f"http://{address}")
        monkeypatch.setattr(hosts, "_session", lambda _: requests.Session())
        with pytest.raises(
            SftError, match=r"google_zone = 'p/z': .*\(404 Not Found\); next: ask for compute.instances.list"
        ):
            list(hosts.blocks("p/z"))


def test_a_node_that_failed_twice_is_no_host_of_the_next_job(place):
    place.server.nodes = {"n1": "ai2/jupiter", "n2": "ai2/jupiter", "n3": "ai2/ceres"}
    made = parsed()
    made.folder.mkdir(parents=True)
    (made.folder / "failed-nodes").write_text("n1 01JOB1 exit 137\nn2 01JOB2 exit 137\nn1 01JOB3 exit 137\n")
    scheduler.BeakerScheduler(made.folder, made.cluster).submit(made)
    assert constraints(place) == {"hostname": ["n2"]}
    (made.folder / "failed-nodes").write_text("n1 j\nn1 k\nn2 j\nn2 k\n")
    with pytest.raises(SftError, match=r"n1, n2 failed twice, and ai2/jupiter has 0 other nodes for 1; next: delete"):
        hosts.allowed(scheduler.BeakerScheduler(made.folder, made.cluster).client, made)


# --- the job ----------------------------------------------------------------------------------------------------------


def test_a_job_with_gpus_uses_the_hosts_network_also_on_one_node(place):
    def task(*words: str) -> dict:
        made = parsed(*words)
        return yaml.safe_load(scheduler.BeakerScheduler(made.folder, made.cluster).render(made).partition("\n")[2])[
            "tasks"
        ][0]

    place.edit('clusters = ["ai2/jupiter"]', 'clusters = ["ai2/jupiter"]\ngpus_per_node = 8')
    assert task()["hostNetworking"] is False
    place.edit("gpus_per_node = 8", 'gpus_per_node = 8\ntcpxo = "/var/lib/tcpxo/lib64"')
    made = task()
    assert made["hostNetworking"] is True and "replicas" not in made
    assert {"name": "SFT_TCPXO", "value": "/var/lib/tcpxo/lib64"} in made["envVars"]
    assert "SFT_TCPXO" not in str(task("gpus=0")["envVars"]) and task("nodes=2")["hostNetworking"] is True


def test_the_lines_of_install_run_in_the_shell_that_runs_the_stage(place):
    lines = 'install = ["export FROM_LINE=1; cd /; set +e", "twice() { echo \\"$FROM_LINE $# $PWD\\"; }", "twice", "export -f twice"'
    place.edit('install = ["ln -s', lines + ', "cd - >/dev/null", "ln -s')
    assert place.launch('twice a; [ "$FROM_LINE" = 1 ] && [ -d lib/sft ] && exit 3') == 3
    said = b"".join(line for run in place.server.runs.values() for _, line in run.lines).decode().splitlines()
    assert said[0] == "1 0 /" and said[-1].startswith("1 1 /") and said[-1].endswith("/olmo-sft")


def test_the_lines_of_a_harness_run_in_the_shell_that_becomes_it(tmp_path):
    words = ["3", "export X='a b'", "cd /", 'echo "$# $PWD"', "bash", "-c", 'echo "$X $PWD $0"', "; exit 9"]
    done = subprocess.run(
        ["bash", "-c", harnesses.INSTALL, "install", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["0 /", f"a b {tmp_path} ; exit 9"] and done.returncode == 0
    words = ["1", "false", "echo", "not reached"]
    done = subprocess.run(["bash", "-c", harnesses.INSTALL, "install", *words], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
