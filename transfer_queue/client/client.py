"""The client: every operation once, with a blocking and an awaitable face."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from transfer_queue.client import (
    awaiting,
    changing,
    checkpoint,
    core,
    introducing,
    keys,
    leasing,
    reading,
    status,
    writing,
)
from transfer_queue.client.acking import Acknowledger, Behind
from transfer_queue.client.core import ClientCore, Defaults
from transfer_queue.client.drivers import arun, awaitable, blocking, run
from transfer_queue.client.transfer import Transfer
from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.messages import UnitInfo
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.peer import AnyPeer


class Connector(Protocol):
    """How a client reaches the servers of a session."""

    def controller(self, client_id: str) -> AnyPeer: ...

    def unit(self, client_id: str, info: UnitInfo) -> AnyPeer: ...


class SocketConnector:
    """A Unix socket where the server's folder can be read, ZeroMQ over TCP elsewhere or if `transport` is "tcp"."""

    def __init__(self, info: ZMQServerInfo, transport: str = "auto") -> None:
        self._info = info
        self._transport = transport

    def controller(self, client_id: str) -> AnyPeer:
        info = self._info
        place = (info.local_address, info.folder, info.nonce, info.to_addr("request"))
        return self._peer(place, client_id, info.curve_key)

    def unit(self, client_id: str, info: UnitInfo) -> AnyPeer:
        place = (info.local_address, info.folder, info.nonce, info.address)
        return self._peer(place, client_id, info.curve_key)

    def _peer(self, place: tuple[str, str, str, str], client_id: str, curve_key: str) -> Peer:
        token, transport = self._info.token, self._transport
        return Peer(*place, token=token, client_id=client_id, transport=transport, curve_key=curve_key)


class TransferQueueClient:
    """Reads and writes one queue. One object serves all threads and event loops of a process, also after a fork.

    client_id        names the caller in explanations and audits; need not be unique
    controller_info  what `get_zmq_server_info` of the controller returns, or `conf.controller.zmq_info` of a session

    checksums        what this client puts has checksums, which `get_data(verify=True)` and every recovery look at
    layout, strict, allow_pickle, polling_mode, get_meta_timeout_s
                     as in the configuration; `None`, also for `checksums`: as in that of the session

    Every call waits at most its `timeout` and then raises: 60 s by default, 20 s if it asks about the state, and
    TQ_SIMPLE_STORAGE_SEND_RECV_TIMEOUT, where that is set, if it puts or gets data. Each `x` has an `async_x` with the
    same arguments. A call that raised changed nothing, except that after `ConnectionLost` its outcome may be open:
    `resend` tells.
    """

    def __init__(
        self,
        client_id: str,
        controller_info: ZMQServerInfo,
        *,
        transport: str = "auto",
        layout: str | None = None,
        strict: bool | None = None,
        allow_pickle: bool | None = None,
        polling_mode: bool | None = None,
        get_meta_timeout_s: float | None = None,
        checksums: bool | None = None,
        connector: Connector | None = None,
        **zmq_options: Any,
    ) -> None:
        if controller_info is None:
            raise InvalidArgument("controller_info is None: pass what get_zmq_server_info of the controller returns")
        if not isinstance(controller_info, ZMQServerInfo):
            raise WrongType(f"controller_info must be a ZMQServerInfo, not {type(controller_info).__name__}")
        if not isinstance(client_id, str):
            raise WrongType(f"client_id must be a str, not {client_id!r}")
        unknown = [name for name in zmq_options if not name.startswith("zmq_")]
        if unknown:
            raise WrongType(f"TransferQueueClient takes no argument {unknown[0]!r}")
        connector = connector or SocketConnector(controller_info, transport)
        self._transport = transport
        self.storage_manager: introducing.StorageManager | None = None
        self.client_id = client_id
        self.controller_info = controller_info
        defaults = Defaults.of(
            controller_info.defaults,
            layout=layout,
            strict=strict,
            allow_pickle=allow_pickle,
            polling_mode=polling_mode,
            get_meta_timeout_s=get_meta_timeout_s,
            checksums=checksums,
        )
        peer = connector.controller(client_id)
        acks = Acknowledger(peer)
        controller = Behind(peer, acks)
        self._core = ClientCore(
            client_id=client_id,
            controller=controller,
            acks=acks,
            transfer=Transfer(
                controller,
                lambda info, local: connector.unit(client_id, info),
                transport=transport,
                checksums=defaults.checksums,
            ),
            defaults=defaults,
        )

    def __repr__(self) -> str:
        return f"<TransferQueueClient {self.client_id!r} of {self.controller_info!r}>"

    def __enter__(self) -> TransferQueueClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self, timeout: float = 5.0) -> None:
        """End all connections; calls under way end with `ConnectionLost`. May be called twice.

        Acknowledgements that nobody waits for are waited for here, at most `timeout` seconds.
        """
        run(leasing.settled(self._core, timeout))
        self._close()

    async def async_close(self, timeout: float = 5.0) -> None:
        """As `close`, letting the event loop run while acknowledgements are waited for."""
        await arun(leasing.settled(self._core, timeout))
        self._close()

    def _close(self) -> None:
        self._core.transfer.close()
        self._core.controller.close()
        self._core.acks.close()

    @property
    def late_acks(self) -> int:
        """Samples whose acknowledgement nobody waited for, and which failed: each may be handed out again."""
        return self._core.acks.late

    def initialize_storage_manager(self, manager_type: str, config: Mapping[str, Any]) -> None:
        """Make storage units that were started by hand known to the controller; sets `storage_manager`.

        manager_type   "SimpleStorage", or "AsyncSimpleStorageManager", which is the same
        config         its "zmq_info" or "storage_unit_infos" is what `process_zmq_server_info` returned for the units

        Needless in a session that `init` started. Raises `UnknownName`, `WrongType`, `InvalidArgument` if a unit
        belongs to another controller.
        """

        def connect(info: ZMQServerInfo) -> AnyPeer:
            return SocketConnector(info, self._transport).controller(self.client_id)

        self.storage_manager = run(introducing.introduce(self.controller_info, connect, manager_type, config))

    def leased(
        self,
        data_fields: Sequence[str],
        batch_size: int,
        partition_id: str | int | None = None,
        *,
        lease: float = 60.0,
        fields: Sequence[str] | None = None,
        renew: bool = False,
        wait: bool = True,
        **draw: Any,
    ) -> leasing.LeasedBatch:
        """Draw under a lease and read the data; what comes of the samples is decided by how the block ends.

            with client.leased(["responses"], 8, "train_0", task_name="reward") as (meta, data):
                client.put({"rewards": score(data)}, metadata=meta)

        At its end the samples are acknowledged; if it raises they are released, and that error goes on (with a note if
        they could not be released). `fields` are those to read, None: `data_fields`; `draw` holds further arguments of
        `get_meta`. With `renew` a thread keeps the lease while the block runs, however long.

        Raises `LeaseExpired` at the end of the block if the lease ran out in it: the samples may have been handed out
        again, and the work of the block may be done twice. With `wait=False` the block does not wait for the answer to
        its acknowledgement, and that is logged and counted instead, as by `ack`.
        """
        operation = functools.partial(
            reading.get_meta, self._core, data_fields, batch_size, partition_id, lease=lease, **draw
        )
        return leasing.LeasedBatch(self._core, operation, lease, fields, renew, wait)

    async_leased = leased  # what it returns is for `with` and for `async with`

    def kv_watch(
        self,
        partition_id: str,
        *,
        where: Mapping[str, Any] | None = None,
        since: str = "",
        timeout: float | None = None,
    ) -> awaiting.KeyWatch:
        """The changes of a partition's keys after a cursor, as they come; of those keys whose tags match `where`.

            for delta in client.kv_watch("train", where={"status": "finished"}):
                buffer.update(delta.changed.get("train", {}))

        Also for `async for`. Ends with `GetMetaTimeout` when nothing changes for `timeout` seconds.
        """
        return awaiting.KeyWatch(self._core, partition_id, where=where, since=since, timeout=timeout)

    async_kv_watch = kv_watch  # what it returns is for `for` and for `async for`

    get_meta, async_get_meta = blocking(reading.get_meta), awaitable(reading.get_meta)
    get_data, async_get_data = blocking(reading.get_data), awaitable(reading.get_data)
    put, async_put = blocking(writing.put), awaitable(writing.put)
    ack, async_ack = blocking(leasing.ack), awaitable(leasing.ack)
    release, async_release = blocking(leasing.release), awaitable(leasing.release)
    renew, async_renew = blocking(leasing.renew), awaitable(leasing.renew)
    drop, async_drop = blocking(leasing.drop), awaitable(leasing.drop)
    resend, async_resend = blocking(core.resend), awaitable(core.resend)
    set_custom_meta = blocking(changing.set_custom_meta)
    async_set_custom_meta = awaitable(changing.set_custom_meta)
    seal_group, async_seal_group = blocking(changing.seal_group), awaitable(changing.seal_group)
    abort_group, async_abort_group = blocking(changing.abort_group), awaitable(changing.abort_group)
    set_policy_version = blocking(changing.set_policy_version)
    async_set_policy_version = awaitable(changing.set_policy_version)
    clear, async_clear = blocking(changing.clear), awaitable(changing.clear)
    clear_partition, async_clear_partition = blocking(changing.clear_partition), awaitable(changing.clear_partition)
    clear_samples, async_clear_samples = blocking(changing.clear_samples), awaitable(changing.clear_samples)
    reset_consumption = blocking(changing.reset_consumption)
    async_reset_consumption = awaitable(changing.reset_consumption)
    kv_retrieve_meta, async_kv_retrieve_meta = blocking(reading.kv_retrieve_meta), awaitable(reading.kv_retrieve_meta)
    kv_retrieve_keys, async_kv_retrieve_keys = blocking(reading.kv_retrieve_keys), awaitable(reading.kv_retrieve_keys)
    kv_put, async_kv_put = blocking(keys.kv_put), awaitable(keys.kv_put)
    kv_batch_put, async_kv_batch_put = blocking(keys.kv_batch_put), awaitable(keys.kv_batch_put)
    kv_batch_get, async_kv_batch_get = blocking(keys.kv_batch_get), awaitable(keys.kv_batch_get)
    kv_batch_get_by_meta = blocking(keys.kv_batch_get_by_meta)
    async_kv_batch_get_by_meta = awaitable(keys.kv_batch_get_by_meta)
    kv_list, async_kv_list = blocking(keys.kv_list), awaitable(keys.kv_list)
    kv_clear, async_kv_clear = blocking(keys.kv_clear), awaitable(keys.kv_clear)
    kv_wait, async_kv_wait = blocking(awaiting.kv_wait), awaitable(awaiting.kv_wait)
    get_partition_list = blocking(reading.get_partition_list)
    async_get_partition_list = awaitable(reading.get_partition_list)
    get_production_status = blocking(status.get_production_status)
    async_get_production_status = awaitable(status.get_production_status)
    get_consumption_status = blocking(status.get_consumption_status)
    async_get_consumption_status = awaitable(status.get_consumption_status)
    check_production_status = blocking(status.check_production_status)
    async_check_production_status = awaitable(status.check_production_status)
    check_consumption_status = blocking(status.check_consumption_status)
    async_check_consumption_status = awaitable(status.check_consumption_status)
    check_production_completed = blocking(status.check_production_completed)
    async_check_production_completed = awaitable(status.check_production_completed)
    check_stream_drained = blocking(status.check_stream_drained)
    async_check_stream_drained = awaitable(status.check_stream_drained)
    audit, async_audit = blocking(status.audit), awaitable(status.audit)
    admission, async_admission = blocking(status.admission), awaitable(status.admission)
    explain, async_explain = blocking(status.explain), awaitable(status.explain)
    register_sampler, async_register_sampler = blocking(status.register_sampler), awaitable(status.register_sampler)
    save_checkpoint = blocking(checkpoint.save_checkpoint)
    async_save_checkpoint = awaitable(checkpoint.save_checkpoint)
    load_checkpoint = blocking(checkpoint.load_checkpoint)
    async_load_checkpoint = awaitable(checkpoint.load_checkpoint)
    storage_infos, async_storage_infos = blocking(status.storage_infos), awaitable(status.storage_infos)
