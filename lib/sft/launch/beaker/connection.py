"""The connection to Beaker: its client, how long the client's own retries are waited for, and its errors as ours.

The client retries failed requests, without end where a connection is lost. After PATIENCE_S of failures this module raises
LostConnection out of it; sft.launch.job.retried then reports that and tries again.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
from collections.abc import Iterator

import grpc
from beaker import Beaker
from beaker.config import Config
from beaker.exceptions import BeakerConfigurationError, BeakerError, BeakerServerError, HTTPError, RequestException

from sft.common.errors import SftError
from sft.launch.job import LostConnection

PATIENCE_S = 20.0
RECOVERED_S = 60.0  # a retry this long after the one before belongs to another failure
RETRY_MESSAGE = "Request failed with retriable error"


class RetryLimit(logging.Handler):
    """Reads the client's log of its retries, and raises LostConnection once they have failed for PATIENCE_S."""

    began = last = -1e9

    def emit(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith(RETRY_MESSAGE):
            return
        now = time.monotonic()
        if now - self.last > RECOVERED_S:
            self.began = now
        self.last = now
        if now - self.began >= PATIENCE_S:
            self.last = -1e9
            raise LostConnection(record.getMessage().partition("\n")[0].partition(": ")[2])


def has_token() -> bool:
    """Whether this machine is configured for Beaker."""
    return "BEAKER_TOKEN" in os.environ or Config.find_config() is not None


def connect(workspace: str) -> Beaker:
    """Beaker's client; an empty workspace is the account's default. Raises SftError without a token."""
    logger = logging.getLogger("beaker")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # it logs what it sends and receives
    if not any(isinstance(h, RetryLimit) for h in logger.handlers):
        logger.addHandler(RetryLimit())
    try:
        options = {"default_workspace": workspace} if workspace else {}
        client = Beaker.from_env(check_for_upgrades=False, user_agent="olmo-sft", **options)
    except (BeakerConfigurationError, OSError, TypeError) as e:
        raise SftError(
            f"Beaker: {e}; next: BEAKER_TOKEN=…, or `beaker configure`, with the token of https://beaker.org/user"
        ) from None
    atexit.register(client.close)  # an open channel of gRPC can keep Python from ending
    return client


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """Turns the client's errors into SftError (a person can fix it) or LostConnection (may be retried)."""
    try:
        yield
    except (BeakerServerError, HTTPError) as e:
        raise LostConnection(str(e)) from None
    except RequestException as e:
        raise LostConnection(f"{type(e).__name__}: {e}") from None
    except BeakerError as e:
        raise SftError(f"Beaker: {e or type(e).__name__}") from None
    except grpc.RpcError as e:
        text = e.details() if isinstance(e, grpc.Call) else e
        raise SftError(f"Beaker: {text}; next: check BEAKER_TOKEN and the addresses in ~/.beaker/config.yml") from None
