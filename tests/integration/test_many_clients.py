"""Two thousand clients at once, each with a connection of its own: all are served, in bounded time."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.fuzz.servers import ROOT, Servers

CLIENTS = 2000
PROCESSES = 8

CLIENT = """
import asyncio, json, resource, sys, time
from transfer_queue.messages import UNIT_SHIFT, ColumnSpec, Draw, ListPartitions, Put
from transfer_queue.wire.channel import Peer

resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
address, token, first, count = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
nothing = dict.fromkeys(("global_step", "indexes", "generations", "keys", "group_ids", "group_size"))
columns = (ColumnSpec(name="x", layout="dense", dtype="float32", shape=(4,)),)
draw = Draw(partition_id="p", global_step=None, task_name="t", fields=("x",), batch_size=1, get_n_samples=False,
            sampler_params={}, timeout_s=60.0)

def put(number):
    return Put(**nothing, partition_id="p", num_rows=1, tags=({"from": number},), block_id=(1 << UNIT_SHIFT) + number,
               columns=columns, timeout_s=60.0)

async def timed(peer, request):
    begin = time.perf_counter()
    reply = await peer.acall(request, 60.0)
    return time.perf_counter() - begin, reply

async def work():
    peers = [Peer.at(address, token=token, client_id=f"c{first + n}") for n in range(count)]
    met = await asyncio.gather(*(timed(peer, ListPartitions()) for peer in peers))
    print(json.dumps(["connected"]), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    puts = await asyncio.gather(*(timed(peer, put((first + n) << 16)) for n, peer in enumerate(peers)))
    draws = await asyncio.gather(*(timed(peer, draw) for peer in peers))
    rows = [int(reply.indexes[0]) for _, reply in draws]
    shown = {"connect": met, "put": puts, "draw": draws}
    print(json.dumps([{name: [s for s, _ in each] for name, each in shown.items()}, rows]), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for peer in peers:
        peer.close()

asyncio.run(work())
"""


def start(servers: Servers, address: str, first: int) -> subprocess.Popen[str]:
    arguments = [address, servers.token.hex(), str(first), str(CLIENTS // PROCESSES)]
    command = [sys.executable, "-c", CLIENT, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def told(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "a process of clients ended"
    return json.loads(line)


def tell(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go on\n")
        process.stdin.flush()


def percentile(seconds: list[float], share: float) -> float:
    return 1000 * sorted(seconds)[int(share * (len(seconds) - 1))]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_two_thousand_clients_put_and_draw(transport: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Connected at the same time, in 8 processes; the server starts with the usual limit of 1 024 descriptors."""
    with Servers("prlimit", "--nofile=1024:8192") as servers:
        before = servers.descriptors()
        address = servers.addresses["controller", transport]
        processes = [start(servers, address, first) for first in range(0, CLIENTS, CLIENTS // PROCESSES)]
        try:
            assert [told(process) for process in processes] == [["connected"]] * PROCESSES
            descriptors = servers.descriptors()
            tell(processes)
            results = [told(process) for process in processes]
            tell(processes)
            assert [process.wait(60) for process in processes] == [0] * PROCESSES
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        counters = servers.counters()["controller"]
    assert CLIENTS - 10 <= descriptors - before <= CLIENTS + 50
    assert sorted(row for _, rows in results for row in rows) == list(range(CLIENTS))
    assert counters == {"malformed": 0, "auth_failures": 0, "failures": 0}
    for name in ("connect", "put", "draw"):
        seconds = [second for shown, _ in results for second in shown[name]]
        with capsys.disabled():
            sys.stdout.write(
                f"\n{transport} {name}: {len(seconds)} clients, p50 {percentile(seconds, 0.5):.0f} ms, "
                f"p99 {percentile(seconds, 0.99):.0f} ms"
            )
        assert percentile(seconds, 0.99) < 20_000
    with capsys.disabled():
        sys.stdout.write(f"\n{transport}: the controller used {descriptors} descriptors, {before} of them before\n")
