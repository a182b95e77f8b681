"""Small stores made by the tests themselves."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from armillary.data.store import Dataset, Record, write_dataset

Make = Callable[..., Dataset]


def records(classes: int, per_class: int, *, size: int = 16, channels: int = 1, start: int = 0) -> Iterator[Record]:
    """Images of uniform noise, classes one after another."""
    rng = np.random.default_rng(classes * 1000 + per_class)
    for label in range(classes):
        for _ in range(per_class):
            yield Record(rng.integers(0, 256, (size, size, channels), dtype=np.uint8), label + start)


@pytest.fixture
def make() -> Make:
    def build(name: str = "small", classes: int = 10, per_class: int = 6, shard_rows: int = 4096) -> Dataset:
        names = [f"c{label}" for label in range(classes)]
        return write_dataset(name, records(classes, per_class), class_names=names, shard_rows=shard_rows)

    return build


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, ``s3://...``, that the usual environment variables lead to."""
    from pyarrow import fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    name = f"b{uuid.uuid4().hex[:12]}"
    fs.S3FileSystem(endpoint_override=s3_server, allow_bucket_creation=True).create_dir(name)
    return f"s3://{name}"
