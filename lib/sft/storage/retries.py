"""Retries requests to a bucket until they succeed, fail permanently, or pass their deadline.

In:  a call of the service's client without the client's own retries and checksums, and a deadline scaled to its bytes.
Out: the call's result; `PermanentError` for a status that another attempt does not change; SftError for a passed deadline or
     unusable credentials. Messages never contain signed URLs, upload sessions or tokens.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import requests
import urllib3
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud.storage.exceptions import InvalidResponse

from sft.common.errors import SftError
from sft.common.paths import STORAGE_WAIT

T = TypeVar("T")
TIMEOUT_S = (10.0, 60.0)  # to connect, and between two bytes
DEADLINE_S = 300.0  # for one file, plus its bytes at MIN_BYTES_PER_S
MIN_BYTES_PER_S = 1e6
BACKOFF_S = (0.5, 32.0)  # first and longest pause between attempts
RETRIED_STATUSES = {408, 429, 500, 502, 503, 504}
CONNECTION_ERRORS = (
    requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError, TimeoutError,
    TransportError,
)  # fmt: skip
LOGIN = {"gs": "gcloud auth application-default login", "s3": "aws configure, or aws sso login"}
HINTS = {
    0: "obstore did not understand the response; next: set SFT_OBSTORE=0 to use Google's client instead",
    401: "the credentials were not accepted; next: {login}",
    403: "no permission; next: ask for access to the bucket, or use other credentials",
    404: "no such bucket or object; next: correct the name",
}


class PermanentError(Exception):
    """A response that another attempt does not change."""

    def __init__(self, status: int, text: str):
        super().__init__(f"{status or ''} {text}".strip())
        self.status = status

    def error(self, what: str) -> SftError:
        """The SftError to raise for it; `what` names the object."""
        return SftError(f"{what}: {redact(str(self))}: {_hint(what, self.status)}")


def _hint(what: str, status: int) -> str:
    return HINTS.get(status, "next: run it again").format(login=LOGIN.get(what.partition("://")[0], LOGIN["gs"]))


class StatusError(Exception):
    """A response of the bucket with an error status. 0 stands for a response that the client did not understand."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def wait_s() -> float:
    """Seconds for which this process waits for a bucket that is away, beyond DEADLINE_S: `storage_wait_s` of the cluster's file."""
    return float(os.environ.get(STORAGE_WAIT, 0))


class Deadline:
    """A deadline over all attempts and pauses for `count` bytes, and `wait_s` more for a bucket that is away. (The client's own
    deadlines cover only some of them.)

    Setting `stop` cancels the attempts.
    """

    def __init__(self, count: int, stop: threading.Event | None = None, wait_s: float = 0.0):
        self.seconds = DEADLINE_S + wait_s + count / MIN_BYTES_PER_S
        self.stop = stop or threading.Event()
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._end - time.monotonic()

    def check(self) -> None:
        """Raises SftError after a cancellation or after the deadline."""
        if self.stop.is_set():
            raise SftError("cancelled")
        if self.left() <= 0:
            raise SftError(f"not done within {self.seconds:.0f} s; next: run it again to continue")


def retry(what: str, call: Callable[[], T], deadline: Deadline, progress: Callable[[], int] = lambda: 0) -> T:
    """Calls until it succeeds. `progress` returns the bytes so far: new bytes reset the pause to the shortest one."""
    pause, seen = BACKOFF_S[0], progress()
    while True:
        deadline.check()
        try:
            return call()
        except (StatusError, GoogleAPICallError, InvalidResponse) as e:
            status = _status(e)
            text = redact(str(getattr(e, "message", "") or e))[:300]
            if status == 401 or status == 403:
                raise PermanentError(status, text).error(what) from None
            if status not in RETRIED_STATUSES:
                raise PermanentError(status, text) from None
            why = f"{status} {text}"
        except CONNECTION_ERRORS as e:
            why = f"{type(e).__name__}: {redact(str(e))}"
        except GoogleAuthError as e:
            raise SftError(
                f"{what}: the credentials were not accepted: {redact(str(e))}; next: gcloud auth application-default login"
            ) from None
        if progress() > seen:
            pause, seen = BACKOFF_S[0], progress()
        wait = pause * random.uniform(0.5, 1.0)
        if deadline.left() < wait:
            raise SftError(
                f"{what}: not done within {deadline.seconds:.0f} s; last error: {why}; next: run it again to continue"
            )
        deadline.stop.wait(wait)
        pause = min(2 * pause, BACKOFF_S[1])


def _status(error: StatusError | GoogleAPICallError | InvalidResponse) -> int:
    if isinstance(error, StatusError):
        return error.status
    return int(error.response.status_code if isinstance(error, InvalidResponse) else error.code or 0)


def redact(text: str) -> str:
    """The text without the parts of URLs that grant access: signatures, tokens, upload sessions."""
    return re.sub(r"(?i)((?:upload_id|signature|token|credential|key)[^=&\s]*=)[^&\s\"']+", r"\1…", text)
