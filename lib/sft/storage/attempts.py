"""Repeats requests to Google's storage until they succeed, are refused for good, or their own deadline has passed.

In:  a call of google-cloud-storage (made without the client's retries and checksums) and a deadline scaled to its bytes.
Out: its result; `PermanentError` for an answer that another attempt does not change; SftError when the deadline has passed or the
     credentials are of no use. No signed URL, upload session or token is ever part of a message.
"""

from __future__ import annotations

import http.client
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

T = TypeVar("T")
TIMEOUT_S = (10.0, 60.0)  # to connect, and without a byte
DEADLINE_S = 300.0  # for one file, plus its bytes at SLOWEST
SLOWEST = 1e6  # bytes per second
PAUSES_S = (0.5, 32.0)  # first and longest pause between attempts
RETRIED = {408, 429, 500, 502, 503, 504}
BROKEN = (
    requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError, TimeoutError,
    TransportError,
)  # fmt: skip
HINTS = {
    0: "obstore did not understand the answer; next: SFT_OBSTORE=0 makes Google's client do its work",
    401: "the credentials were not accepted; next: gcloud auth application-default login",
    403: "no permission; next: ask for access to the bucket, or use other credentials",
    404: "no such bucket or object; next: correct the name",
}


class PermanentError(Exception):
    """An answer that another attempt does not change."""

    def __init__(self, status: int, words: str):
        super().__init__(f"{status or ''} {words}".strip())
        self.status = status

    def error(self, what: str) -> SftError:
        return SftError(f"{what}: {redact(str(self))}: {HINTS.get(self.status, 'next: run it again')}")


class Answer(Exception):
    """An answer of the bucket that is no success, from whichever client."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class Deadline:
    """Our own, over all attempts and waits: the client's counts only some of them."""

    def __init__(self, count: int, stop: threading.Event | None = None):
        self.seconds = DEADLINE_S + count / SLOWEST
        self.stop = stop or threading.Event()
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def check(self) -> None:
        if self.stop.is_set():
            raise SftError("cancelled")
        if self.left() <= 0:
            raise SftError(f"not done within {self.seconds:.0f} s; next: run it again to continue")


def attempt(what: str, call: Callable[[], T], deadline: Deadline, reached: Callable[[], int] = lambda: 0) -> T:
    """Calls until it succeeds. `reached` tells how far it came: new bytes make the pauses short again."""
    pause, seen = PAUSES_S[0], reached()
    while True:
        deadline.check()
        try:
            return call()
        except (Answer, GoogleAPICallError, InvalidResponse) as e:
            status = _status(e)
            words = redact(str(getattr(e, "message", "") or e))[:300]
            if status == 401 or status == 403:
                raise PermanentError(status, words).error(what) from None
            if status not in RETRIED:
                raise PermanentError(status, words) from None
            why = f"{status} {words}"
        except BROKEN as e:
            why = f"{type(e).__name__}: {redact(str(e))}"
        except GoogleAuthError as e:
            raise SftError(
                f"{what}: the credentials were not accepted: {redact(str(e))}; next: gcloud auth application-default login"
            ) from None
        if reached() > seen:
            pause, seen = PAUSES_S[0], reached()
        wait = pause * random.uniform(0.5, 1.0)
        if deadline.left() < wait:
            raise SftError(
                f"{what}: not done within {deadline.seconds:.0f} s; last: {why}; next: run it again to continue"
            )
        deadline.stop.wait(wait)
        pause = min(2 * pause, PAUSES_S[1])


def _status(error: Answer | GoogleAPICallError | InvalidResponse) -> int:
    if isinstance(error, Answer):
        return error.status
    return int(error.response.status_code if isinstance(error, InvalidResponse) else error.code or 0)


def redact(words: str) -> str:
    """Without the parts of URLs that give access: signatures, tokens, upload sessions."""
    return re.sub(r"(?i)((?:upload_id|signature|token|credential|key)[^=&\s]*=)[^&\s\"']+", r"\1…", words)
