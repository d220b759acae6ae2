"""The peers by name, and how one is started."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.figures import Report
from benchmarks.peers.child import Child
from benchmarks.peers.environments import TORCH, check_libraries, interpreter

_MODULES = "benchmarks.peers"
_START_S = 180.0


@dataclass(frozen=True)
class Variant:
    """One way to use a peer: a class that answers commands, with its arguments, and the batches it can move.

    finds       whether its reader has to ask what there is
    latencies   whether it answers `put_samples`, `put_together`, `fill`, `draw` and `empty`
    """

    label: str
    module: str
    kind: str
    workloads: tuple[str, ...]
    arguments: tuple[tuple[str, object], ...] = ()
    finds: bool = False
    latencies: bool = False


@dataclass(frozen=True)
class PeerKind:
    """What can be asked for by name. Without a package it runs in the environment of this process."""

    name: str
    variants: tuple[Variant, ...]
    package: str | None = None
    version: str | None = None  # None: the newest
    libraries: tuple[str, ...] = ()

    def label(self, variant: Variant) -> str:
        return variant.label if self.version is None else f"{variant.label} {self.version}"

    @contextlib.contextmanager
    def running(self, variant: Variant, report: Report) -> Iterator[Child]:
        """Start a variant and end it; the report is told its versions. Raises `Unavailable`."""
        check_libraries(self.libraries)
        arguments = (f"{_MODULES}.{variant.module}", variant.kind, json.dumps(dict(variant.arguments)))
        print(f"starting {self.label(variant)} ...", flush=True)
        with Child(self._python(), arguments) as child:
            report.peer(self.label(variant), versions=child.call("open", timeout_s=_START_S))
            yield child

    def _python(self) -> Path:
        if self.package is None:
            return Path(sys.executable)
        pinned = self.package if self.version is None else f"{self.package}=={self.version}"
        name = self.name if self.version is None else f"{self.name}-{self.version}"
        return interpreter(name, [pinned, TORCH, "tensordict>=0.7", "numpy>=1.26"])


_STORE = ("object_store", "ObjectStore")

PEERS = {
    kind.name: kind
    for kind in (
        PeerKind(
            "ray",
            (
                Variant("ray", *_STORE, ("dense", "ragged", "small"), (("arrays", False),)),
                Variant("ray-numpy", *_STORE, ("dense",), (("arrays", True),)),
            ),
        ),
        PeerKind(
            "transferqueue",
            (
                Variant(
                    "transferqueue",
                    "published_queue",
                    "PublishedQueue",
                    ("dense", "ragged", "small"),
                    finds=True,
                    latencies=True,
                ),
            ),
            package="TransferQueue",
            version="0.1.11",
        ),
        PeerKind(
            "mooncake",
            (Variant("mooncake", "mooncake_store", "MooncakeStore", ("dense",)),),
            package="mooncake-transfer-engine-non-cuda",
            libraries=("libibverbs.so.1", "librdmacm.so.1", "libnuma.so.1", "liburing.so.2"),
        ),
    )
}


def chosen(text: str) -> PeerKind:
    """`name` or `name==version`. Raises `ValueError` that lists the names, or if the peer has no package."""
    name, _, version = text.strip().partition("==")
    if name not in PEERS:
        raise ValueError(f"no peer {name!r}; known: {', '.join(PEERS)} (`transferqueue` may carry `==version`)")
    kind = PEERS[name]
    if not version:
        return kind
    if kind.package is None:
        raise ValueError(f"{name} is used in the version that is installed: it takes no `=={version}`")
    return replace(kind, version=version)
