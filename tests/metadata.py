"""The metadata services of clouds, as a machine sees them, on the loopback address."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "token-of-the-metadata-service"


class Metadata:
    """Answers as AWS's service (version 2 only) and Google's do; to be used in a ``with`` block."""

    def __init__(self) -> None:
        self.end: float | None = None
        """Once set, the notice is there: unix time."""
        self.asked = threading.Event()
        """Somebody has looked for a notice."""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                known = self.path == "/latest/api/token"
                lasting = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
                self.answer(200 if known and lasting.isdigit() else 400, TOKEN)

            def do_GET(self) -> None:
                if self.path == "/latest/meta-data/spot/instance-action":
                    self.aws()
                elif self.path == "/computeMetadata/v1/instance/preempted":
                    flavored = self.headers.get("Metadata-Flavor") == "Google"
                    text = "TRUE" if service.end else "FALSE"
                    self.answer(200 if flavored else 403, text)
                else:
                    self.answer(404, "")
                service.asked.set()

            def aws(self) -> None:
                if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
                    self.answer(401, "")
                elif service.end is None:
                    self.answer(404, "")
                else:
                    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.end))
                    self.answer(200, json.dumps({"action": "terminate", "time": at}))

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Metadata":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
