"""What torch.compile made, kept with the run: who goes on with it compiles nothing again.

torch looks for compiled layers in a folder of the machine.  That folder is one for each run, in the
user's caches (``XDG_CACHE_HOME``; ``TORCHINDUCTOR_CACHE_DIR`` has no say); rank 0 packs it into the
run's folder, an archive for each kind of machine, and a machine that has nothing yet unpacks it.

Compiled layers are code, and checkpoints promise that loading one runs none.  So an archive is
signed with the token of the Ray cluster, whose holders may run code on its machines anyway, and
ignored if the signature is not right.  Without a token nothing leaves the machine.

What it gives up: kinds of machines that rank 0 has not.
"""

import hashlib
import hmac
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from raygpt import device as devices
from raygpt.storage import Folder, StorageError

FOLDER = "compiled"
_SIGNATURE_BYTES = hashlib.sha256().digest_size
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class CompiledLayers:
    """Of one run, on a device.

    Args:
        say: told if an archive is not used, or cannot be read or written.
    """

    def __init__(self, run: Folder, device: torch.device, say: Callable[[str], None]) -> None:
        self._folder, self._say = run.child(FOLDER), say
        kind = f"{devices.describe(device)}-torch-{torch.__version__}"
        self._name = re.sub(r"[^a-z0-9.]+", "-", kind.lower()) + ".tar"
        here = hashlib.sha256(f"{run.uri}/{self._name}".encode()).hexdigest()[:16]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        self._local = caches / "raygpt" / "compiled" / here
        self._kept = 0

    def fetch(self) -> None:
        """Let torch compile into the run's folder on this machine, with what others compiled.

        Where there cannot be one, torch uses its own, and nothing is kept.
        """
        try:
            self._prepare()
        except OSError as error:
            self._say(f"no compiled layers are kept: {error.strerror}: {self._local}")
        else:
            os.environ[_CACHE] = str(self._local)

    def _prepare(self) -> None:
        if not _token():
            self._say(
                "compiled layers stay on the machine, since Ray asks for no token to sign them"
            )
        if not self._local.exists():
            self._local.parent.mkdir(parents=True, exist_ok=True)
            unpacked = Path(tempfile.mkdtemp(dir=self._local.parent))
            try:
                self._unpack_into(unpacked)
                with suppress(OSError):  # another worker of this machine was first
                    unpacked.rename(self._local)  # an empty folder may be replaced
            finally:
                shutil.rmtree(unpacked, ignore_errors=True)

    def keep(self) -> None:
        """Store what was compiled, if there is more than was stored or fetched so far."""
        files = [path for path in sorted(self._local.rglob("*")) if path.is_file()]
        files = [path for path in files if path.suffix != ".tmp"]  # somebody writes it
        if len(files) <= self._kept or not _token():
            return
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path in files:
                with suppress(FileNotFoundError):  # others compile meanwhile
                    archive.add(path, str(path.relative_to(self._local)))
        data = packed.getvalue()
        try:
            self._folder.write_bytes(self._name, self._sign(data) + data)
        except StorageError as error:  # nothing is lost but time
            self._say(str(error))
        self._kept = len(files)

    def _unpack_into(self, folder: Path) -> None:
        if not _token():
            return
        try:
            data = self._folder.read_bytes(self._name)
        except FileNotFoundError:
            return
        except StorageError as error:
            self._say(f"{error}; layers are compiled again")
            return
        signature, data = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(data)):
            self._say(
                f"{self._folder.child(self._name)} was not written with this cluster's token, or "
                "is damaged: it is ignored, and layers are compiled again"
            )
            return
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(folder, filter="data")
            self._kept = len(archive.getmembers())

    def _sign(self, data: bytes) -> bytes:
        return hmac.digest(_token(), self._name.encode() + b"\0" + data, "sha256")


def _token() -> bytes:
    """Of this Ray cluster; empty if it asks for none."""
    token: str = AuthenticationTokenLoader.instance().get_raw_token() or ""
    return token.encode()
