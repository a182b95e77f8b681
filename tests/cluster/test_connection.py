from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from armillary.cluster.connection import connect, resolve_address, use_token_if_there
from armillary.spec.errors import UserError


def test_option_wins_over_job_and_job_over_environment() -> None:
    environment = {"RAY_ADDRESS": "http://c:3", "RAY_API_SERVER_ADDRESS": "http://d:4"}
    assert resolve_address("http://a:1", "http://b:2", environment) == "http://a:1"
    assert resolve_address(None, "http://b:2/", environment) == "http://b:2"
    assert resolve_address(None, None, environment) == "http://d:4"
    assert resolve_address("", None, {"RAY_ADDRESS": "auto"}) == "auto"


def test_no_address_says_where_one_may_stand_and_how_to_get_a_cluster() -> None:
    with pytest.raises(UserError, match="no cluster is named") as raised:
        resolve_address(None, None, {})
    assert "cluster.address" in str(raised.value)
    assert "ray start --head" in str(raised.value)


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:{}"])
def test_an_address_where_nothing_listens_is_reported_at_once(form: str, closed_port: int) -> None:
    address = form.format(closed_port)
    started = time.monotonic()
    with pytest.raises(UserError, match="no cluster answers") as raised:
        connect(address)
    assert time.monotonic() - started < 5
    assert address in str(raised.value)
    assert "ray start --head" in str(raised.value)


@pytest.mark.parametrize("address", ["http://", "ftp://host:1", "host", "host:port", "host:99999999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="no cluster address"):
        connect(address)


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port whose server hangs up on everyone, as something that is no dashboard may."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_a_server_that_is_no_dashboard_is_a_users_mistake(mute_port: int) -> None:
    with pytest.raises(UserError, match=r"the connection to .* failed"):
        connect(f"http://127.0.0.1:{mute_port}")


@pytest.mark.parametrize(
    ("mode", "stored", "expected"), [(None, True, "token"), (None, False, None), ("disabled", True, "disabled")]
)
def test_a_token_that_is_there_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, stored: bool, expected: str | None
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode or "")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    if stored:
        (tmp_path / "token").write_text("secret")
    use_token_if_there()
    assert os.environ.get("RAY_AUTH_MODE") == expected
