"""The web page of `lowalign label`, on this machine only.

It listens on 127.0.0.1. A request needs the token of this start in its path, and a Host of this machine, so that no other page
can reach it under a name of its own (DNS rebinding); what changes something needs an Origin of this server too. The page loads
nothing from anywhere else.
"""

import hmac
import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lowalign.errors import UserError
from lowalign.labelling.agreement import figures
from lowalign.labelling.task import BadRequest, Labelling

HTML, CSS, JS = ("text/html; charset=utf-8", "text/css; charset=utf-8", "text/javascript; charset=utf-8")
FILES = {
    "": ("label.html", HTML),
    "agreement": ("agreement.html", HTML),
    "style.css": ("style.css", CSS),
    "label.js": ("label.js", JS),
    "agreement.js": ("agreement.js", JS),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address has the token
    "Cache-Control": "no-store",
}
LARGEST = 2**20  # bytes of a request


class LabelServer(ThreadingHTTPServer):
    """Serves one Labelling on 127.0.0.1 until `shutdown`."""

    daemon_threads = True

    def __init__(self, labelling: Labelling, port: int = 0) -> None:
        """port: 0 takes a free one. Raises UserError when it cannot be had."""
        self.labelling, self.token = labelling, secrets.token_urlsafe(18)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port} cannot be used ({error}); choose another, or leave it out") from error

    @property
    def address(self) -> str:
        """The address to open."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    @property
    def hosts(self) -> tuple[str, str]:
        """The names under which a browser of this machine reaches the server."""
        return f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closed its connection is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lowalign", ""
    timeout = 60

    def do_GET(self) -> None:
        path = self._path()
        if path is None:
            return
        if path in FILES:
            name, kind = FILES[path]
            self._send(HTTPStatus.OK, Path(__file__).with_name("page").joinpath(name).read_bytes(), kind)
        elif path == "start":
            self._json({"annotator": self.server.labelling.annotator})
        elif path == "figures":
            self._json(figures(self.server.labelling.items, self.server.labelling.judgements))
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        path = self._path()
        if path is None:
            return
        labelling = self.server.labelling
        actions = {"next": labelling.next, "judge": labelling.judge, "undo": labelling.undo}
        if self.headers.get("Origin") not in [f"http://{host}" for host in self.server.hosts]:
            self._refuse(HTTPStatus.FORBIDDEN)
        elif path not in actions:
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._act(actions[path])

    def _act(self, action: Any) -> None:
        try:
            self._json(action(self._body()))
        except BadRequest as error:
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except (UserError, OSError) as error:  # the disk is full
            self._json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _path(self) -> str | None:
        """The path below the token; None, and an answer, for a request that is not of this page."""
        _, _, rest = self.path.partition("/")
        token, slash, path = rest.partition("/")
        if self.headers.get("Host") not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN)
        elif not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            return path
        return None

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            self.close_connection = True
            raise BadRequest(f"a request has at most {LARGEST:,} bytes")
        raw = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            raise BadRequest("a request is JSON")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadRequest("a request is JSON") from error
        if not isinstance(body, dict):
            raise BadRequest("a request is a JSON object")
        return body

    def _json(self, value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # its body was not read
        self._send(status, status.phrase.encode(), "text/plain")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """No line for each request: the addresses have the token."""
