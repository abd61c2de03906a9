"""A predecessor that goes wrong at one step of a handover. argv: socket path, step, JSON.

The JSON has the members of an Offer, and `fds`: names to descriptors this process was given.
It listens, says it is there, and answers one successor. Steps: after which message it dies
(`die-MESSAGE`), hangs (`hang-MESSAGE`), withdraws, talks nonsense, or closes and lives on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import NoReturn

from tundp.daemon.handover.protocol import (
    Attached,
    Decoder,
    Message,
    Offer,
    Paused,
    Ready,
    Withdrawn,
    encode,
    send_offer,
)
from tundp.observe.codec import from_json

path, step, text = sys.argv[1:]
document = json.loads(text)
fds: dict[str, int] = document.pop("fds")


def end(at: str) -> None:
    """Do what the step says, if this is it."""
    what, _, when = step.partition("-")
    if when != at:
        return
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(1000)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "close":
        conn.shutdown(socket.SHUT_RDWR)
        time.sleep(1000)
    if what == "garbage":
        conn.sendall(b"\0\0\0\2{]")
        time.sleep(1000)
    if what == "withdraw":
        conn.sendall(encode(Withdrawn(why="the test says so")))
        time.sleep(1000)


def hear(kind: type[Message]) -> None:
    decoder = Decoder()
    while (message := decoder.next()) is None:
        data = conn.recv(65536)
        if not data:
            leave()
        decoder.feed(data)
    assert isinstance(message, kind), message


def leave() -> NoReturn:
    time.sleep(1000)
    raise SystemExit


offer = from_json(Offer, document | {"pid": os.getpid(), "names": list(fds)})
admin = socket.socket(fileno=os.dup(fds["admin"]))
admin.setblocking(True)
admin.listen()
print("listening", flush=True)
head = b""
while not head.startswith(b"POST"):
    # Whoever asked the daemon before and was not answered comes first.
    conn, _ = admin.accept()
    head = b""
    while not head.endswith(b"\r\n\r\n") and (byte := conn.recv(1)):
        head += byte
    print(head[:40], flush=True)
conn.recv(int(head.lower().partition(b"content-length:")[2].split()[0]), socket.MSG_WAITALL)
if step == "refuse":
    conn.sendall(b'HTTP/1.1 409 Conflict\r\n\r\n{"error": "the test says so"}')
    conn.close()
    leave()
if step == "old":
    conn.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n404: Not Found")
    conn.close()
    leave()
end("request")
conn.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
send_offer(conn, offer, list(fds.values()))
end("offer")
hear(Ready)
end("ready")
conn.sendall(
    encode(Paused(counters=offer.counters, lease=offer.lease, since_ns=time.monotonic_ns()))
)
end("paused")
hear(Attached)
end("attached")
leave()
