"""The command `transfer-queue`: serve a queue without Ray, and look at one that runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from transfer_queue import __version__, config
from transfer_queue.errors import InvalidArgument, TransferQueueError
from transfer_queue.messages import GetAudit, GetExplanation, ListPartitions, ListUnits, Names, Report, Units
from transfer_queue.runtime.endpoint import EndpointFile
from transfer_queue.runtime.processes import ProcessesRuntime
from transfer_queue.wire.channel import Peer

_EXAMPLES = """examples:
  transfer-queue serve --address ~/queue.json --units 2 --capacity 8GiB
  transfer-queue status --address ~/queue.json
  transfer-queue explain --address ~/queue.json --partition train_0 --task actor_update --fields responses,rewards

In Python: transfer_queue.init({"address": "~/queue.json"}). Instead of --address, set TQ_ADDRESS.
"""
_PATIENCE_S = 5.0
_SIZES = {"k": 10, "m": 20, "g": 30, "t": 40}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except TransferQueueError as error:
        print(f"transfer-queue: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transfer-queue",
        description="The queue between the stages of RL post-training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"transfer_queue {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_serve(commands)
    found = argparse.ArgumentParser(add_help=False)
    found.add_argument("--address", metavar="FILE", help="endpoint file of the session (default: $TQ_ADDRESS)")
    status = commands.add_parser("status", parents=[found], help="processes and partitions of a session")
    status.set_defaults(run=_status)
    audit = commands.add_parser("audit", parents=[found], help="where every sample is, as JSON")
    audit.add_argument("--partition", metavar="NAME", help="of this partition alone")
    audit.set_defaults(run=_audit)
    explain = commands.add_parser("explain", parents=[found], help="why a draw is not served")
    explain.add_argument("--partition", metavar="NAME", required=True)
    explain.add_argument("--task", metavar="NAME", required=True)
    explain.add_argument("--fields", metavar="A,B", required=True, help="the fields that the draw asks for")
    explain.add_argument("--batch-size", metavar="N", type=int, default=1, help="samples asked for (default: 1)")
    explain.set_defaults(run=_explain)
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="run controller and storage units until SIGTERM or Ctrl-C",
        description="Run controller and storage units as child processes, started again when they die.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "--address", metavar="FILE", help="write the endpoint file here (default: $TQ_ADDRESS, else new)"
    )
    serve.add_argument("--units", metavar="N", type=int, help="number of storage units (default: 1)")
    serve.add_argument("--capacity", metavar="SIZE", type=_size, help="bytes of each unit, e.g. 8GiB")
    serve.add_argument("--host", metavar="ADDRESS", help="interface of the TCP sockets (default: 127.0.0.1)")
    serve.add_argument("--journal", metavar="FOLDER", help="folder of the journal (default: in /dev/shm)")
    serve.add_argument("--config", metavar="FILE", help="YAML file with what differs from the packaged config.yaml")
    serve.set_defaults(run=_serve)


def _size(text: str) -> int:
    """Read "8GiB", "512M" or "1048576"; units are powers of 1024."""
    number = text.lower().removesuffix("b").removesuffix("i")
    shift = _SIZES.get(number[-1:], 0)
    try:
        return int(float(number[:-1] if shift else number) * (1 << shift))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write e.g. 8GiB") from None


def _serve(options: argparse.Namespace) -> int:
    settings = _settings(options)
    with _asked_to_stop() as asked, contextlib.ExitStack() as stack:
        if settings.address is not None:
            file = EndpointFile(settings.address)
            stack.enter_context(file.starting(settings.attach_timeout_s))
            if file.find() is not None:
                raise InvalidArgument(f"a session with the endpoint file {file.path} is running already")
        with contextlib.closing(ProcessesRuntime(settings)) as runtime:
            stack.close()
            print(f"serving; attach with transfer_queue.init({{'address': {runtime.address!r}}})", flush=True)
            if runtime.info.metrics_endpoint is not None:
                print(f"metrics at http://{runtime.info.metrics_endpoint}/metrics", flush=True)
            select.select([asked], [], [])
            print("stopping", flush=True)
    return 0


def _settings(options: argparse.Namespace) -> config.Settings:
    """Check the options and --config; what YAML or OmegaConf says of a bad file becomes one line."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]  # what OmegaConf reads files with

    try:
        return config.settings(config.merged(_conf(options)))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InvalidArgument(f"cannot read --config: {' '.join(str(error).split())}") from error


def _conf(options: argparse.Namespace) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    storage = {"num_data_storage_units": options.units, "capacity_bytes": options.capacity}
    given = {
        "runtime": "processes",
        "address": options.address,
        "controller": _given({"host": options.host}),
        "journal": _given({"path": options.journal}),
        "backend": {"SimpleStorage": _given(storage)},
    }
    conf: Any = {}
    if options.config is not None:
        try:
            conf = OmegaConf.load(options.config)
        except OSError as error:
            raise InvalidArgument(f"cannot read --config: {error}") from error
        if not isinstance(conf, DictConfig):
            raise InvalidArgument(f"cannot read --config: {options.config} is a list, not a mapping of keys")
    merged = OmegaConf.to_container(OmegaConf.merge(conf, _given(given)))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[int]:
    """Yield a descriptor that becomes readable at SIGTERM or SIGINT."""
    outlet, inlet = os.pipe()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: os.write(inlet, b"!"))
    try:
        yield outlet
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(outlet)
        os.close(inlet)


def _status(options: argparse.Namespace) -> int:
    file = _file(options)
    processes = file.status()
    print(f"session    {file.read().session_id} at {file.path}")
    for name, process in processes.items():
        print(f"{name:10} process {process['pid']}, {process['state']}, started again {process['restarts']} times")
    if not processes:
        print("processes  in the process that started the session")
    with _controller(file) as controller:
        units = controller.begin(ListUnits(timeout_s=0.0)).result(_PATIENCE_S)
        partitions = controller.begin(ListPartitions()).result(_PATIENCE_S)
    assert isinstance(units, Units) and isinstance(partitions, Names)
    print(f"units      {len(units.units)} announced")
    print(f"partitions {', '.join(partitions.names) or 'none'}")
    return 0 if all(process["state"] == "running" for process in processes.values()) else 1


def _audit(options: argparse.Namespace) -> int:
    with _controller(_file(options)) as controller:
        report = controller.begin(GetAudit(partition_id=options.partition)).result(_PATIENCE_S)
    assert isinstance(report, Report)
    print(json.dumps(report.entries, indent=2, default=str))
    return 0


def _explain(options: argparse.Namespace) -> int:
    request = GetExplanation(
        partition_id=options.partition,
        global_step=None,
        task_name=options.task,
        fields=tuple(options.fields.split(",")),
        batch_size=options.batch_size,
    )
    with _controller(_file(options)) as controller:
        report = controller.begin(request).result(_PATIENCE_S)
    assert isinstance(report, Report)
    print(report.entries["text"])
    return 0


def _file(options: argparse.Namespace) -> EndpointFile:
    settings = config.settings(config.merged({"address": options.address}))
    if settings.address is None:
        raise InvalidArgument("which session? give --address FILE, or set TQ_ADDRESS")
    return EndpointFile(settings.address)


@contextlib.contextmanager
def _controller(file: EndpointFile) -> Iterator[Peer]:
    """A connection without a client: that one would load torch first."""
    info = file.read()
    place = (info.local_address, info.folder, info.nonce, info.to_addr("request"))
    peer = Peer(*place, token=info.token, client_id="transfer-queue command", curve_key=info.curve_key)
    with contextlib.closing(peer):
        yield peer


if __name__ == "__main__":
    sys.exit(main())
