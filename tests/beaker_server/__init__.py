"""A small Beaker on 127.0.0.1 for tests. It speaks to the real client (gRPC with TLS, and HTTP) and runs jobs as local processes.

In:  `with Server(folder) as s:` and os.environ.update(s.environment); s.fault("GetWorkload", "unavailable", times=2)
Out: s.experiments (name -> Experiment with its spec as it was sent), s.runs, s.datasets, s.requests

Every replica of a task is one process in a session of its own. There are no containers: where an argument or the value of a
variable is a mount's path or begins with it, the folder that stands for the mount replaces it; Weka bucket `b` is
folder/weka/b. Like the real Beaker it refuses a name that is taken, and an unknown workspace, budget, cluster, image or secret.

Faults: `unavailable` (a call is refused before anything is done; times < 0 = always), `break` (a log's stream ends after
`after` lines), `lost` (the experiment is created, the answer is not sent), `dropped` (neither), or an HTTP status for `create`.

`state` holds what all parts know; `account`, `datasets`, `experiments` are the calls of the API, `http` those over HTTP, and
`jobs` runs the processes.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer

import grpc
import trustme
import yaml
from beaker import beaker_pb2 as pb2
from beaker import beaker_pb2_grpc

from beaker_server.account import AccountCalls
from beaker_server.experiments import ExperimentCalls
from beaker_server.http import Handler
from beaker_server.state import BUDGET, ORG, TOKEN, USER, now

__all__ = ["BUDGET", "TOKEN", "USER", "Server", "now"]
AUTHORITY = trustme.CA()  # one for all servers: gRPC reads its roots once in a process


class Server(AccountCalls, ExperimentCalls, beaker_pb2_grpc.BeakerServicer):
    """The server; it runs inside a `with` block."""

    def __enter__(self) -> Server:
        certificate = AUTHORITY.issue_cert("localhost")
        AUTHORITY.cert_pem.write_to_path(str(self.folder / "ca.pem"))
        self._rpc = grpc.server(ThreadPoolExecutor(max_workers=16))
        beaker_pb2_grpc.add_BeakerServicer_to_server(self, self._rpc)
        key, chain = certificate.private_key_pem.bytes(), b"".join(p.bytes() for p in certificate.cert_chain_pems)
        port = self._rpc.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
        self._rpc.start()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"beaker": self}))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # clients that are killed
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        (self.folder / "beaker.yml").write_text(yaml.safe_dump({
            "agent_address": self.url, "rpc_address": f"localhost:{port}", "user_token": TOKEN, "default_org": ORG}))  # fmt: skip
        self.environment = {
            "BEAKER_CONFIG": str(self.folder / "beaker.yml"),
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(self.folder / "ca.pem"),
        }
        return self

    def __exit__(self, *_: object) -> None:
        for run in list(self.runs.values()):
            self._stop(run, "the test is over", pb2.CancelationCode.CANCELATION_CODE_MANUAL)
        for thread in self._threads:
            thread.join(20)
        self._http.shutdown()
        self._http.server_close()
        self._rpc.stop(0).wait()
