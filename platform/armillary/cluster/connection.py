"""Which cluster, and the way to it: address, reachability, token; every failure as a message that says what to do."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from armillary.spec.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DASHBOARD_PORT = 8265
PROBE_SECONDS = 5.0
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_DEFAULT_PORTS = {"http": 80, "https": 443, "ray": 10001}

# Ray's clients tell every step of an upload on standard error.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray.util.client.worker",
    "ray.client_builder",
)

ADDRESS_FORMS = "http://HOST:8265 (the dashboard's port), ray://HOST:10001, HOST:6379 or auto"
START_HINT = (
    "start a cluster with `ray start --head` in an activated environment and take http://127.0.0.1:8265, "
    "or forward the port of another one: ssh -L 8265:127.0.0.1:8265 HOST"
)
TOKEN_HINT = (
    "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, "
    "or in ~/.ray/auth_token"
)


def resolve_address(
    option: str | None, job_address: str | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """The cluster's address: the command line's, else the job's ``cluster.address``, else the environment's.

    Args:
        option: what ``--address`` says.
        job_address: the job's ``cluster.address``.
        environment: where ``RAY_API_SERVER_ADDRESS`` and ``RAY_ADDRESS`` are looked up, in this order.

    Raises:
        UserError: none of them names a cluster.
    """
    environment = os.environ if environment is None else environment
    candidates = (option, job_address, *(environment.get(name) for name in _ADDRESS_VARIABLES))
    for candidate in candidates:
        if candidate and candidate.strip():
            return candidate.strip().rstrip("/")
    raise UserError(
        "no cluster is named",
        key="--address",
        allowed=f"{ADDRESS_FORMS}; also as cluster.address in the job, or in RAY_ADDRESS",
        hint=START_HINT,
    )


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's Jobs API, after proof that it answers and takes our token.

    Raises:
        UserError: nothing listens there, what listens is no Ray dashboard, or the token is missing or wrong.
    """
    _probe(address)
    use_token_if_there()
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    with explained(address), _chosen_address_only():
        return JobSubmissionClient(address)


def use_token_if_there() -> None:
    """Turns token authentication on when a token exists and ``RAY_AUTH_MODE`` does not say otherwise.

    ``ray start`` does the same for the cluster, Ray's job client does not. It counts only before Ray is imported.
    """
    stored = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_MODE" not in os.environ and (os.environ.get("RAY_AUTH_TOKEN") or stored.is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turns what Ray and its transport raise about a connection into a ``UserError`` without a token in it."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise _refused(address, str(error)) from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise UserError(
            f"the connection to {address} failed: {type(error).__name__}", key="--address", hint=START_HINT
        ) from None


def server_version(client: JobSubmissionClient) -> str:
    """The version of Ray that the cluster runs, as it told the client on connecting."""
    return str(client._server_ray_version)  # the client has no public name for it


def token_mode() -> str:
    """Where this process takes its cluster token from, in words; never the token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if not is_token_auth_enabled():
        return "off (RAY_AUTH_MODE is not token)"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "on, token from RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return f"on, token from {path}"
    return "on, token from ~/.ray/auth_token"


def _refused(address: str, reason: str) -> UserError:
    # Ray keeps the HTTP status out of the exception; these words come from the cluster's own answer.
    wrong = "Invalid authentication token" in reason or "invalid or incorrect" in reason
    problem = "does not accept the token given" if wrong else "wants a token, and none was given"
    return UserError(f"the cluster at {address} {problem}", key="--address", hint=TOKEN_HINT)


def _probe(address: str) -> None:
    """Fails within seconds where nothing listens; Ray itself would try for a minute or end the process."""
    if address == "auto":
        return
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no cluster answers at {address} ({error.strerror or error})", key="--address", hint=START_HINT
        ) from None


def _host_and_port(address: str) -> tuple[str, int]:
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    try:
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        port = None
    if not parts.hostname or port is None or parts.scheme not in {*_DEFAULT_PORTS, "gcs"}:
        raise UserError(f"{address!r} is no cluster address", key="--address", allowed=ADDRESS_FORMS)
    return parts.hostname, port


@contextmanager
def _chosen_address_only() -> Iterator[None]:
    """Hides Ray's address variables while a client is made: Ray would let them win over ``--address``."""
    hidden: dict[str, Any] = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
