"""Asks other nodes, and waits for what comes of it.

Each question is sent twice at most, a second apart, each with a nonce of its own that nobody can
guess. A kernel's protocol unreachable is no answer yet: the kernel of a node that does answer sends
it, too, and sooner.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from tundp.backend.peers import Asked, Outcome
from tundp.errors import TooBusy
from tundp.lease.model import Peer
from tundp.wire import peer_bodies, peer_message
from tundp.wire.peer_bodies import Refused
from tundp.wire.peer_message import Arrived, Kind, Malformed, Message

ATTEMPTS: Final = 2
ATTEMPT_S: Final = 0.95
"""Each is waited for so long: both together less than two seconds."""
ASKING_MAX: Final = 256
"""Questions that are under way at once."""
UNREACHABLE: Final = (
    "its kernel answers that it knows no such protocol: a stock flanneld runs there, or tundp with"
    " --peer-tools=off, or one before 0.2.0"
)
SILENCE: Final = (
    "neither tundp nor the kernel there answered: it is down, or filters UDP or IP protocol 253, or"
    " holds the lease no more: tundp status"
)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Question:
    """One that is under way."""

    peer: Peer
    done: asyncio.Event = field(default_factory=asyncio.Event)
    sent: dict[int, tuple[int, float]] = field(default_factory=dict)
    """By nonce: Unix time in ns, and time.monotonic()."""
    refused_after_s: float | None = None
    answer: tuple[Message, int, int, float] | None = None
    """The answer, Unix times of question and answer, and the time between them in seconds."""


class PeerAsks:
    """See the module. Every method is called on the event loop's thread."""

    def __init__(self, send: Callable[[Peer, Message], str]) -> None:
        """send: a question; why it could not be sent, empty if it was."""
        self._send = send
        self._asked: dict[int, _Question] = {}
        """By nonce."""
        self._count = 0

    def arrived(self, what: Arrived, now_ns: int) -> None:
        """An answer, or a kernel's refusal. now_ns: Unix time it was read."""
        nonce = what.message.nonce if what.message is not None else what.refused_nonce
        question = None if nonce is None else self._asked.get(nonce)
        if question is None or nonce is None:
            return
        if what.source != int(question.peer.subnet.network_address):
            return
        asked_ns, asked_at = question.sent[nonce]
        after_s = time.monotonic() - asked_at
        if what.message is None:
            question.refused_after_s = after_s
        elif what.message.is_answer and question.answer is None:
            question.answer = (what.message, asked_ns, now_ns, after_s)
            question.done.set()

    async def ask(
        self, peer: Peer, kind: Kind, body: bytes, parse: Callable[[bytes], T]
    ) -> Asked[T]:
        """Ask a peer. TooBusy while too many are asked."""
        if self._count >= ASKING_MAX:
            raise TooBusy(f"{ASKING_MAX} questions to other nodes are under way already")
        question = _Question(peer)
        self._count += 1
        try:
            for _ in range(ATTEMPTS):
                if error := self._ask_once(question, kind, body):
                    return Asked(outcome=Outcome.NOT_SENT, detail=error)
                try:
                    async with asyncio.timeout(ATTEMPT_S):
                        await question.done.wait()
                except TimeoutError:
                    continue
                break
        finally:
            self._count -= 1
            for nonce in question.sent:
                self._asked.pop(nonce, None)
        return _outcome(question, kind, parse)

    def tell(self, peer: Peer, kind: Kind, body: bytes) -> None:
        """Send a message that has no answer."""
        self._send(peer, _message(kind, body))

    def _ask_once(self, question: _Question, kind: Kind, body: bytes) -> str:
        message = _message(kind, body)
        self._asked[message.nonce] = question
        question.sent[message.nonce] = (time.time_ns(), time.monotonic())
        return self._send(question.peer, message)


def _message(kind: Kind, body: bytes) -> Message:
    return Message(secrets.randbits(64), peer_message.VERSION, kind, False, body)


def _outcome(question: _Question, kind: Kind, parse: Callable[[bytes], T]) -> Asked[T]:
    if question.answer is None:
        if question.refused_after_s is not None:
            return Asked(
                outcome=Outcome.UNREACHABLE, detail=UNREACHABLE, rtt_s=question.refused_after_s
            )
        return Asked(outcome=Outcome.SILENCE, detail=SILENCE)
    message, asked_ns, answered_ns, rtt_s = question.answer
    detail, answer = "", None
    try:
        if message.version != peer_message.VERSION:
            detail = _other_version(message.version)
        elif message.kind == Kind.REFUSED:
            refusal = peer_bodies.parse_refusal(message.body)
            is_unknown = refusal.why == Refused.UNSUPPORTED
            detail = f"it cannot answer that: {refusal.text}" if is_unknown else refusal.text
        elif message.kind != kind:
            detail = f"it answered something else (kind {message.kind})"
        else:
            answer = parse(message.body)
    except Malformed as error:
        detail = f"its answer cannot be read: {error}"
    return Asked(
        outcome=Outcome.ANSWER,
        detail=detail or "tundp answers",
        rtt_s=rtt_s,
        asked_ns=asked_ns,
        answered_ns=answered_ns,
        answer=answer,
    )


def _other_version(version: int) -> str:
    return (
        f"it speaks version {version} of the messages between nodes, this node version"
        f" {peer_message.VERSION}: the older one of both needs an update"
    )
