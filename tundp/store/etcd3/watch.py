"""A watch on a range of keys: one stream in a task of its own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from grpclib.client import StreamStreamMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tundp.errors import (
    Compacted,
    StoreUnavailable,
)
from tundp.store.access import (
    REQUEST_TIMEOUT_S,
    Endpoint,
)
from tundp.store.etcd3.channel import EtcdChannel
from tundp.store.etcd3.connection import SERVICE, Connection
from tundp.store.etcd3.words import FAILURES, AuthAnswer, auth_answer, words
from tundp.store.etcd3rpc import tundp_etcd3_pb2 as rpc

RESUME_AFTER_S: Final = 1.0
"""A stream that lived so long and is ended by the other side is begun again where it was."""


class _EndedError(Exception):
    """A stream was ended by the other side, and may be begun again at the same endpoint."""


class Watch:
    """A watch stream, read by a task of its own into a queue.

    Proxies end streams that are idle, or when they restart, and servers a connection with more
    pings than they want. Then the stream is resumed at the same endpoint, without a gap and
    without a word in the log; only when that fails has the watch failed.
    """

    def __init__(
        self, connection: Connection, prefix: bytes, after: int, cluster_id: int | None
    ) -> None:
        self.revision = after
        self._connection = connection
        self._prefix = prefix
        self._cluster_id = cluster_id
        self._complete = after
        """The revision up to which everything is in the queue."""
        self._resumes_at: Endpoint | None = None
        self._why = ""
        self._queue: asyncio.Queue[rpc.WatchResponse | Exception] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run())

    async def next(self) -> list[rpc.WatchResponse]:
        """Wait for responses; return all queued ones, at least one, and advance `revision`."""
        found = [await self._queue.get()]
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        taken: list[rpc.WatchResponse] = []
        for answer in found:
            if isinstance(answer, Exception):
                if taken:
                    self._queue.put_nowait(answer)
                    break
                raise answer
            taken.append(answer)
        self.revision = max(self.revision, *map(_revision_of, taken))
        return taken

    async def close(self) -> None:
        """Cancel the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while True:
                with contextlib.suppress(_EndedError):
                    await self._connection.use(self._pump)
        except Exception as error:  # noqa: BLE001  (raised again by `next`)
            self._queue.put_nowait(error)

    async def _pump(self, channel: EtcdChannel, metadata: dict[str, str]) -> None:
        if self._resumes_at not in (None, channel.endpoint):
            # Another one answers now: a snapshot comes first.
            raise StoreUnavailable(self._why)
        began = asyncio.get_running_loop().time()
        method = StreamStreamMethod(
            channel, f"{SERVICE}Watch/Watch", rpc.WatchRequest, rpc.WatchResponse
        )
        create = rpc.WatchCreateRequest(
            key=self._prefix,
            range_end=after_prefix(self._prefix),
            start_revision=self._complete + 1,
            progress_notify=True,
        )
        async with method.open(metadata=metadata) as stream:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await stream.send_message(rpc.WatchRequest(create_request=create))
                created = await stream.recv_message()
            if created is not None:
                self._check_created(created)
            why = "the watch was ended by etcd"
            try:
                while (answer := await stream.recv_message()) is not None:
                    self._check(answer)
                    if not answer.created:
                        self._complete = max(self._complete, _revision_of(answer))
                        self._queue.put_nowait(answer)
            except FAILURES as error:
                why = f"the watch broke: {words(error)}"
        self._why = why
        lived_s = asyncio.get_running_loop().time() - began
        if not channel.is_hung and (lived_s > RESUME_AFTER_S or channel.is_told_to_calm_down):
            self._resumes_at = channel.endpoint
            self._connection.resume(channel)
            raise _EndedError
        # Do not go on at the next endpoint: a snapshot comes first.
        self._connection.lost(channel, why)
        raise StoreUnavailable(why)

    def _check_created(self, answer: rpc.WatchResponse) -> None:
        self._check(answer)
        header = answer.header
        # 0 is "not told": etcd's grpc-proxy leaves these fields out in a stream.
        if self._cluster_id and header.cluster_id not in (0, self._cluster_id):
            raise Compacted("another etcd cluster answers: its data was replaced")
        if 0 < header.revision < self._complete:
            raise Compacted(
                f"the store is at revision {header.revision}, below {self._complete}:"
                " its data was replaced, or this member lags"
            )

    def _check(self, answer: rpc.WatchResponse) -> None:
        if answer.compact_revision:
            raise Compacted(f"events up to revision {answer.compact_revision} are compacted")
        if answer.canceled:
            refusal = GRPCError(Status.UNKNOWN, answer.cancel_reason)
            match auth_answer(refusal):
                case AuthAnswer.LOG_IN:
                    raise refusal
                case AuthAnswer.DENIED:
                    raise GRPCError(
                        Status.PERMISSION_DENIED,
                        f"{answer.cancel_reason}: the role needs to read all keys under"
                        f" {self._prefix.decode()}",
                    )
            raise StoreUnavailable(
                f"etcd cancelled the watch: {answer.cancel_reason or 'no reason'}"
            )


def _revision_of(answer: rpc.WatchResponse) -> int:
    """The revision up to which a response is complete: its last event's, not its header's."""
    if answer.events:
        return int(answer.events[-1].kv.mod_revision)
    return int(answer.header.revision)


def after_prefix(prefix: bytes) -> bytes:
    """The end of the range of all keys that start with `prefix`, which ends in a slash."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
