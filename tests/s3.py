"""An S3 server on this machine, and a way to it that can be broken."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from helpers import free_port

BUCKET = "bucket"
SECRETS = [os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
START_SECONDS = 60
_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER with which a closed connection is reset, as that of a process that was killed."""


class Server:
    """moto's S3 server, which keeps objects in memory; to be used in a ``with`` block."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._log = folder / "s3.log"

    def __enter__(self) -> "Server":
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        bucket = urllib.request.Request(f"http://127.0.0.1:{self.port}/{BUCKET}", method="PUT")
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(bucket, timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise RuntimeError(f"no S3 server:\n{self._log.read_text()}") from None
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Answer nobody any more, and refuse nobody."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def uri(port: int, path: str) -> str:
    query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    return f"s3://{BUCKET}/{path}?{query}"


class Way:
    """A port that leads to a server, until the way is broken; to be used in a ``with`` block.

    Breaking it is what its clients see of a server that is killed: connections are reset, later
    ones refused.  What was stored outlives it.
    """

    def __init__(self, server: Server) -> None:
        self._server, self.port = server, free_port()
        self._trigger: bytes | None = None
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.broken = threading.Event()
        self._listener: socket.socket | None = None

    def __enter__(self) -> "Way":
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        self._break()

    def break_at(self, text: str) -> None:
        """Break in the middle of the next request that names ``text``."""
        self._trigger = text.encode()

    def mend(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        self.broken.clear()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _break(self) -> None:
        with self._lock:
            if self._listener is not None:
                # Else the thread in accept() keeps it alive.
                with contextlib.suppress(OSError):
                    self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
                self._listener = None
            for open_socket in self._sockets:
                with contextlib.suppress(OSError):
                    open_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                    open_socket.shutdown(socket.SHUT_RDWR)
                open_socket.close()
            self._sockets.clear()
        self.broken.set()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server.port))
                with self._lock:
                    self._sockets |= {client, server}
                for source, target in ((client, server), (server, client)):
                    requests = source is client
                    arguments = (source, target, requests)
                    threading.Thread(target=self._carry, args=arguments, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, requests: bool) -> None:
        before = b""
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if requests and self._trigger is not None and self._trigger in before + data:
                    self._trigger = None
                    target.sendall(data[: len(data) // 2])
                    self._break()
                    return
                before = data[-200:]
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            with self._lock:
                self._sockets.discard(end)
