"""Broken frames harm nobody; requests with a field less, or one of another type, are refused by name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import pytest

from tests.fuzz.attack import Attack
from tests.fuzz.servers import ROOT, Servers
from tests.fuzz.traffic import REQUESTS, Traffic, canary_pickle
from tests.unit.serving import BareClient, draw, put
from transfer_queue.errors import EncodeError
from transfer_queue.messages import ONE_WAY, Admit, GetAudit, GetUnitStats, Report
from transfer_queue.wire.codec import encode_message
from transfer_queue.wire.values import SET

FRAMES = 100_000


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with Servers() as running:
        yield running


@pytest.mark.timeout(120)
def test_broken_frames_harm_nobody(tmp_path: Path) -> None:
    """100 000 of them, as stranger and as client, over Unix sockets and TCP, against controller and unit."""
    with Servers() as servers:
        before = servers.descriptors()
        report = Attack(servers, 2026, tmp_path).run(FRAMES)
        assert report.wrong == []
        assert report.good > 1000
        for counted in servers.counters().values():
            assert counted["malformed"] > 1000
            assert counted["auth_failures"] > 100
            assert counted["failures"] == 0
        assert servers.descriptors() < before + 50


def test_the_same_seed_sends_the_same_frames() -> None:
    """So that what was found can be sent again."""
    first, second = (Traffic(Random(3), "/nowhere") for _ in range(2))
    assert [first.broken(n) for n in range(300)] == [second.broken(n) for n in range(300)]


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """The smuggled pickle does what it is to do where pickles are loaded; in the servers it never is."""
    path = tmp_path / "canary"
    code = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, canary_pickle(str(path)).hex()], check=True)
    assert path.exists()


def test_longer_runs_tell_what_they_did() -> None:
    """The command prints seed, counts and what was wrong."""
    command = [sys.executable, "-m", "tests.fuzz", "--frames", "600", "--seed", "5"]
    printed = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=50).stdout)
    assert (printed["seed"], printed["wrong"]) == (5, [])


def encodable(traffic: Traffic, cls: type[Any]) -> list[Any]:
    """A well-formed message of this type."""
    while True:
        try:
            return encode_message(traffic.message(cls), 7, 1)
        except EncodeError:
            continue


FIELDS = [(cls, field.name) for cls in REQUESTS for field in dataclasses.fields(cls)]


@pytest.mark.parametrize("server", ["controller", "unit"])
@pytest.mark.parametrize("change", ["removed", "of another type"])
def test_a_request_with_a_wrong_field_is_refused_by_name(servers: Servers, server: str, change: str) -> None:
    """Each field of each request type in turn; the next request over the same connection is served."""
    traffic = Traffic(Random(1), "/nowhere")
    good = GetAudit(partition_id=None) if server == "controller" else GetUnitStats()
    with BareClient(servers.addresses[server, "unix"], f"{change}/1", servers.token) as client:
        client.introduce()
        for number, (cls, name) in enumerate(FIELDS, start=1):
            header, body, *frames = encodable(traffic, cls)
            values = msgpack.unpackb(body, unicode_errors="surrogatepass")
            position = [field.name for field in dataclasses.fields(cls)].index(name)
            if change == "removed":
                del values[position]
            else:
                values[position] = msgpack.ExtType(SET, msgpack.packb([1]))
            client.send_frames(header, msgpack.packb(values, unicode_errors="surrogatepass"), *frames)
            answered, reply = client.receive()
            assert (answered, reply.name) == (7, "DecodeError"), f"{cls.__name__}.{name}"
            assert cls.__name__ in reply.message
            assert type(client.ask(good, 1000 + number, 7)) is Report


@pytest.mark.parametrize("server", ["controller", "unit"])
def test_every_request_of_the_other_server_is_refused(servers: Servers, server: str) -> None:
    """Well-formed and meant for another one: an error that says so, and no one-way message does harm."""
    traffic = Traffic(Random(1), "/nowhere")
    good = GetAudit(partition_id=None) if server == "controller" else GetUnitStats()
    foreign = [cls for cls in REQUESTS if (cls.__module__.endswith("unit")) == (server == "controller")]
    with BareClient(servers.addresses[server, "tcp"], "foreign/1", servers.token) as client:
        client.introduce()
        for number, cls in enumerate(foreign, start=1):
            one_way = issubclass(cls, ONE_WAY)
            frames = encodable(traffic, cls)
            client.send_frames(frames[0] if not one_way else frames[0][:3] + bytes(16), *frames[1:])
            if not one_way:
                assert client.receive()[1].name in {"ProtocolMismatch", "WrongType"}
            assert type(client.ask(good, 1000 + number, 7)) is Report


@pytest.mark.parametrize("count", [(1 << 22) + 1, 1 << 31, 1 << 62])
def test_numbers_of_rows_that_lie_claim_no_memory(servers: Servers, count: int) -> None:
    """A few bytes that ask for more rows than one request can be about are refused at once."""
    before = servers.resident_bytes()
    requests = [
        dataclasses.replace(put(), num_rows=count),
        dataclasses.replace(draw(), batch_size=count, fields=("x",)),
        Admit(partition_id="p", global_step=None, num_rows=count, keys=None, size_bytes=1, timeout_s=0.1),
    ]
    with BareClient(servers.addresses["controller", "unix"], f"{count}/1", servers.token) as client:
        client.introduce()
        for number, request in enumerate(requests, start=1):
            reply = client.ask(request, number)
            assert (reply.name, str(count) in reply.message) == ("InvalidArgument", True)
    assert servers.resident_bytes() - before < 8 << 20
