"""An OpenAI-compatible server on loopback whose answers are a function of the request, for tests and benchmarks.

It speaks ``/v1/chat/completions`` and ``/v1/completions`` without streaming, and can fail as real servers do. It adds
no latency of its own.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """Says what the server does with one request."""

    text: str | None = None
    """The answer."""
    finish_reason: str | None = "stop"
    usage: bool = True
    """Whether tokens are reported: a token is a word here."""
    status: int = 200
    """Anything else is an error response."""
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """Sent as the body instead of JSON."""
    hang: bool = False
    """Answer nothing while the server lives."""
    cut: bool = False
    """Close the connection in the middle of the body."""


Script = Callable[[Body], Scripted]


class ScriptedServer:
    """Serves while it is entered; ``requests`` lists the bodies received, in order.

    Args:
        script: from the request's JSON body to what is done with it; called in several threads.
    """

    def __init__(self, script: Script, port: int = 0) -> None:
        self.script = script
        self.requests: list[Body] = []
        self.closing = threading.Event()
        self._http = _Http(("127.0.0.1", port), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that is gone, which is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # One packet an answer: a header on its own would wait for the client's delayed acknowledgement.
        wbufsize = -1
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(body)
            scripted = server.script(body)
            if scripted.hang:
                server.closing.wait()
                self.close_connection = True
                return
            content = _content(scripted, body, chat=self.path.endswith("/chat/completions"))
            self.send_response(scripted.status)
            for name, value in {"Content-Type": "application/json", **scripted.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if scripted.cut else content)
            self.close_connection = scripted.cut

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler


def _content(scripted: Scripted, body: Body, *, chat: bool) -> bytes:
    if scripted.raw is not None:
        return scripted.raw
    if scripted.status != 200:
        return json.dumps({"error": {"message": f"scripted {scripted.status}"}}).encode()
    answer = {"message": {"role": "assistant", "content": scripted.text}} if chat else {"text": scripted.text}
    content: Body = {
        "id": "scripted",
        "object": "chat.completion" if chat else "text_completion",
        "model": body.get("model"),
        "choices": [{"index": 0, "finish_reason": scripted.finish_reason, **answer}],
    }
    if scripted.usage:
        prompt = " ".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
        counts = len(prompt.split()), len((scripted.text or "").split())
        content["usage"] = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
    return json.dumps(content).encode()
