"""Notices about a job: by a command, or by a webhook on loopback."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from sft.launch import notice


@pytest.mark.seconds
def test_a_webhook_gets_the_event_as_json(monkeypatch, capsys):
    bodies = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if "broken" in self.path else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/s3cret"
        monkeypatch.setenv("SFT_ON_EVENT", address)
        assert notice.main(["failure", "x", "train", "17", "exit status 137"]) == 0
        monkeypatch.setenv("SFT_ON_EVENT", address + "/broken")
        assert notice.main(["end", "x", "train", "17"]) == 0
        server.shutdown()
    assert bodies[0] == {"text": "olmo-sft: train of x: failure (job 17, exit status 137)", "event": "failure", "run": "x",
                         "stage": "train", "job": "17", "detail": "exit status 137"}  # fmt: skip
    out = capsys.readouterr().out
    assert out.startswith("warning: the notice of end was not sent: HTTPError") and "s3cret" not in out


@pytest.mark.parametrize(
    "target", ["https://example.org/s3 cret", "https://[s3cret/", """echo 's3 cret' "x" >/dev/null; sleep 9"""]
)
def test_what_cannot_be_sent_is_a_warning_without_the_address(monkeypatch, capsys, target):
    monkeypatch.setattr(notice, "TIMEOUT_S", 0.2)
    monkeypatch.setenv("SFT_ON_EVENT", target)
    assert notice.main(["end", "x", "train", "17"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("warning: the notice of end was not sent: ") and "cret" not in out


def test_a_command_gets_the_event_and_its_failure_is_a_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SFT_ON_EVENT", f'echo "$SFT_EVENT $SFT_EVENT_JOB" >{tmp_path}/told; exit 3')
    assert notice.main(["start", "x; rm", "train", "$(17)"]) == 0
    assert (tmp_path / "told").read_text() == "start $(17)\n" and "exit status 3" in capsys.readouterr().out
    monkeypatch.delenv("SFT_ON_EVENT")
    assert notice.main(["start", "x", "train", "17"]) == 0
    with pytest.raises(SystemExit, match="2"):
        notice.main(["started", "x", "train", "17"])
    assert "'started' is not one of" in capsys.readouterr().err
