"""The process of a peer, run by its own Python: `python -m benchmarks.peers.serving MODULE CLASS [OPTIONS]`.

A command is a line of JSON on standard input, `{"command": "put", "arguments": []}`; its answer is a line of JSON on
standard output, `{"value": 0.02}` or `{"error": "…"}`. The end of the input ends the process. What libraries print goes
to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import TextIO

from benchmarks.peers.peer import Peer


def serve(peer: Peer, commands: TextIO, answers: TextIO) -> None:
    """Answer until the input ends. The first command has to be `open`."""
    for line in commands:
        message = json.loads(line)
        try:
            answer = {"value": getattr(peer, message["command"])(*message["arguments"])}
        except Exception as error:  # the other side decides what a failure means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main(module: str, kind: str, options: str = "{}") -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    peer: Peer = getattr(importlib.import_module(module), kind)(**json.loads(options))
    try:
        serve(peer, sys.stdin, answers)
    finally:
        peer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
