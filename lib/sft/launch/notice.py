"""Reports what happens to a job: python -m sft.launch.notice EVENT RUN STAGE JOB [DETAIL]

In:  SFT_ON_EVENT, which launchers set from `on_event` of the cluster's file: a command, or the address of a webhook.
Out: the command runs with SFT_EVENT, SFT_EVENT_RUN, SFT_EVENT_STAGE, SFT_EVENT_JOB and SFT_EVENT_DETAIL; a webhook gets them as
     JSON with a `text`, as Slack, Mattermost and Discord's /slack addresses read it. EVENT: start, end, failure, requeue.

A notice that fails prints a warning and never fails a job: the exit status is 0.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import urllib.request

import click

from sft.runner.cli import COMMAND, program

TIMEOUT_S = 20.0
EVENTS = ("start", "end", "failure", "requeue")


def send(target: str, event: str, run: str, stage: str, job: str, detail: str = "") -> str:
    """Sends a notice. Returns the problem, or ""."""
    facts = {"event": event, "run": run, "stage": stage, "job": job, "detail": detail}
    try:
        if target.startswith(("https://", "http://")):
            text = f"olmo-sft: {stage} of {run}: {event} (job {job}{', ' + detail if detail else ''})"
            body = json.dumps({"text": text, **facts}).encode()
            request = urllib.request.Request(target, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
            return ""
        variables = {"SFT_EVENT": event, **{f"SFT_EVENT_{k.upper()}": v for k, v in facts.items() if k != "event"}}
        done = subprocess.run(["bash", "-c", target], env={**os.environ, **variables}, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"the command did not end within {TIMEOUT_S:.0f} s"
    except (ValueError, http.client.HTTPException) as error:  # their words hold parts of the address, which is a secret
        return type(error).__name__
    except OSError as error:
        return f"{type(error).__name__}: {error}".replace(target, "on_event")
    return f"exit status {done.returncode}" if done.returncode else ""


@program("launch", "python -m sft.launch.notice", signals=False, settings=COMMAND)
@click.argument("event", type=click.Choice(EVENTS))
@click.argument("run")
@click.argument("stage")
@click.argument("job")
@click.argument("detail", default="")
def main(event: str, run: str, stage: str, job: str, detail: str) -> None:
    """Reports what happens to a job to the command or webhook in SFT_ON_EVENT."""
    target = os.environ.get("SFT_ON_EVENT", "")
    if target and (problem := send(target, event, run, stage, job, detail)):
        print(f"warning: the notice of {event} was not sent: {problem}; next: check on_event", flush=True)


if __name__ == "__main__":
    sys.exit(main())
