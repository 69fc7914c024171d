"""A server on loopback that does to a client whatever a hostile, broken or badly configured one can, byte by byte.

Which of ``BEHAVIOURS`` it shows stands in the last message. Each comes with the outcome that its attempt must have.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import html
import json
import threading
import urllib.parse
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

KEY = 'sk-Hostile+/="x&1234567'
ANSI = "\x1b]0;owned\x07\x1b[2J\x1b]52;c;cm0gLXJm\x07\x9b31m\u202e\r"

Play = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Behaviour:
    """What the server does with a request."""

    outcome: str
    """What the attempt came to."""
    play: Play
    text: str | None = None
    """The answer, where there is one."""


def chat(content: Any = "forty-two", **more: Any) -> dict[str, Any]:
    """A sound reply, but for what is given."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage(3, 2), **more}


def usage(prompt: Any, completion: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 5}


def choice(**more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "forty-two"}
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": message, **more}], "usage": usage(3, 2)}


def response(body: bytes | str | object, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    kind = "" if "content-type" in headers.lower() else "Content-Type: application/json\r\n"
    size = len(content) if length is None else length
    return f"HTTP/1.1 {status}\r\n{kind}{headers}Content-Length: {size}\r\n\r\n".encode("latin-1") + content


def sends(content: bytes) -> Play:
    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()

    return play


def drips(head: bytes, part: bytes, pause: float = 0.05) -> Play:
    """Send ``part`` for ever."""

    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)

    return play


async def says_nothing(request: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def resets(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def resets_after(content: bytes) -> Play:
    async def play(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()
        writer.transport.abort()

    return play


async def echoes_everything(request: bytes, writer: asyncio.StreamWriter) -> None:
    """The request, key and all, in headers, address and body of an error."""
    head = request.partition(b"\r\n\r\n")[0].decode("latin-1")
    body = html.escape(head) + urllib.parse.quote(KEY) + json.dumps({"error": head}) + spellings(KEY)
    writer.write(
        response(body, "400 Bad", f"X-Echo: {KEY}\r\nLocation: http://other/?key={urllib.parse.quote(KEY)}\r\n")
    )
    await writer.drain()


def spellings(key: str) -> str:
    escaped = "".join(f"\\u{ord(char):04x}" for char in key)
    entities = "".join(f"&#{ord(char)};" for char in key)
    return " ".join(
        [key, json.dumps(key), json.dumps(json.dumps(key)), repr(key), escaped, entities, html.escape(key)]
        + [urllib.parse.quote(key, safe=""), urllib.parse.quote_plus(key), urllib.parse.quote(urllib.parse.quote(key))]
        + [base64.b64encode(prefix + key.encode()).decode() for prefix in (b"", b"a", b"Bearer ", b"ab")]
        + [base64.urlsafe_b64encode(key.encode()).decode(), key.encode().hex(), key.upper()]
    )


def chunked(*chunks: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


def packed(body: bytes, encoding: str) -> bytes:
    return response(body, headers=f"Content-Encoding: {encoding}\r\n")


def bomb() -> bytes:
    """64 MiB in 64 KiB."""
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return b"".join([*(stream.compress(bytes(1 << 20)) for _ in range(64)), stream.flush()])


GOOD = json.dumps(chat()).encode()
_CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_LATIN = json.dumps(chat("caf\xe9"), ensure_ascii=False).encode("latin-1")
_BIG = b"9" * 10_000


def _ok(body: object, text: str | None = "forty-two", headers: str = "") -> Behaviour:
    return Behaviour("ok", sends(response(body, headers=headers)), text)


def _bad(body: object, headers: str = "") -> Behaviour:
    return Behaviour("bad json", sends(response(body, headers=headers)))


def _status(outcome: str, status: str, headers: str = "", body: object = "no") -> Behaviour:
    return Behaviour(outcome, sends(response(body, status, headers)))


BODIES = {
    "sound": _ok(chat()),
    "null": _bad("null"),
    "number": _bad("1e999"),
    "list": _bad("[]"),
    "nothing at all": _bad(b""),
    "cut in a string": _bad(GOOD[:-40]),
    "two values": _bad(GOOD * 2),
    "choices missing": _bad({}),
    "choices null": _bad(chat(choices=None)),
    "choices empty": _bad(chat(choices=[])),
    "choices an object": _bad(chat(choices={"0": 1})),
    "choices a string": _bad(chat(choices="abc")),
    "choices of strings": _bad(chat(choices=["a"])),
    "message null": _bad(choice(message=None)),
    "message a list": _bad(choice(message=["content"])),
    "content a list": _bad(chat([{"type": "text", "text": "a"}])),
    "content a number": _bad(chat(5)),
    "content true": _bad(chat(True)),
    "content null": Behaviour("empty", sends(response(chat(None)))),
    "content blank": Behaviour("empty", sends(response(chat(" \n\t")))),
    "finish_reason a number": _ok(choice(finish_reason=17)),
    "finish_reason a list": _ok(choice(finish_reason=["stop"])),
    "finish_reason an object": _ok(choice(finish_reason={})),
    "finish_reason hostile": _ok(choice(finish_reason=ANSI * 1000)),
    "fingerprint an object": _ok(chat(system_fingerprint={"a": 1})),
    "fingerprint huge": _ok(chat(system_fingerprint="x" * 1_000_000)),
    "logprobs not finite": _ok(json.dumps(choice(logprobs=[float("-inf"), float("nan")], id=float("inf")))),
    "usage null": _ok(chat(usage=None)),
    "usage a list": _ok(chat(usage=[3, 2])),
    "usage negative": _ok(chat(usage=usage(-3, -2))),
    "usage one negative": _ok(chat(usage=usage(3, -1_000_000))),
    "usage not a number": _ok(json.dumps(chat(usage=usage(float("nan"), 2)))),
    "usage infinite": _ok(json.dumps(chat(usage=usage(float("inf"), float("-inf"))))),
    "usage 1e999": _ok(json.dumps(chat(usage=usage(0.5, 2))).replace("0.5", "1e999")),
    "usage huge": _ok(chat(usage=usage(10**30, 10**30))),
    "usage of 10,000 digits": _ok(json.dumps(chat(usage=usage("D", 2))).encode().replace(b'"D"', _BIG)),
    "usage strings": _ok(chat(usage=usage("3", "2"))),
    "usage booleans": _ok(chat(usage=usage(True, False))),
    "usage a fraction": _ok(chat(usage=usage(2.5, 1))),
    "usage missing a part": _ok(chat(usage={"total_tokens": 5})),
    "an integer of 10,000 digits": _ok(json.dumps(chat(created="D")).encode().replace(b'"D"', _BIG)),
    "keys twice": _ok(b'{"choices": 1, "usage": 2, ' + GOOD[1:]),
    "nested 100,000 deep": _bad("[" * 100_000),
    "objects 100,000 deep": _bad('{"choices":' * 100_000),
    "lone surrogates": _ok(chat("a\ud800b\udfffc"), "a\ud800b\udfffc"),
    "control characters": _ok(chat(ANSI + "\x00"), ANSI + "\x00"),
    "key in the answer": _ok(chat(f"use {KEY} and {urllib.parse.quote(KEY)}"), "use <api key> and <api key>"),
    "utf-16": _ok(json.dumps(chat("caf\xe9")).encode("utf-16"), "caf\xe9"),
    "utf-32": _ok(json.dumps(chat()).encode("utf-32-le")),
    "utf-8 with BOM": _ok(b"\xef\xbb\xbf" + GOOD),
    "latin-1 as declared": _ok(_LATIN, "caf\xe9", "Content-Type: application/json; charset=latin-1\r\n"),
    "latin-1 undeclared": _bad(_LATIN),
    "charset unknown": _ok(GOOD, headers="Content-Type: application/json; charset=klingon\r\n"),
    "charset of a codec that is no charset": _bad(b"\xff", "Content-Type: application/json; charset=zlib\r\n"),
    "no utf-8": _bad(b"\xff\xfe\xfa\xc3"),
    "html": _bad("<html>busy</html>", "Content-Type: text/html\r\n"),
    "html type, sound JSON": _ok(GOOD, headers="Content-Type: text/html\r\n"),
    "event stream": _bad("data: {}\n\ndata: [DONE]\n\n", "Content-Type: text/event-stream\r\n"),
    "escape sequences": _bad(ANSI * 100),
}
COMPRESSED = {
    "gzip": Behaviour("ok", sends(packed(gzip.compress(GOOD), "gzip")), "forty-two"),
    "gzip twice": Behaviour("ok", sends(packed(gzip.compress(gzip.compress(GOOD)), "gzip, gzip")), "forty-two"),
    "deflate": Behaviour("ok", sends(packed(zlib.compress(GOOD), "deflate")), "forty-two"),
    "gzip bomb": Behaviour("too long", sends(packed(bomb(), "gzip"))),
    "gzip bomb in a gzip": Behaviour("too long", sends(packed(gzip.compress(bomb()), "gzip, gzip"))),
    "gzip bomb in an error": _status("server error", "500 No", "Content-Encoding: gzip\r\n", bomb()),
    "gzip of many members": Behaviour("bad json", sends(packed(gzip.compress(b"") * 100_000, "gzip"))),
    "gzip cut short": Behaviour("bad json", sends(packed(gzip.compress(GOOD)[:-9], "gzip"))),
    "gzip that is none": Behaviour("bad json", sends(packed(GOOD, "gzip"))),
    "brotli unasked": Behaviour("bad json", sends(packed(GOOD, "br"))),
    "encoding unknown": Behaviour("bad json", sends(packed(GOOD, KEY))),
    "encodings without end": Behaviour("bad json", sends(packed(GOOD, ", ".join(["gzip"] * 1000)))),
    "endless chunks": Behaviour("too long", drips(_CHUNKED_HEAD, b"100000\r\n" + b" " * 0x100000 + b"\r\n", 0)),
    "20 MB": Behaviour("too long", sends(response(b" " * 20_000_000))),
}
CONNECTION = {
    "reset at once": Behaviour("connection", resets),
    "reset in the status line": Behaviour("connection", resets_after(b"HTTP/1.1 20")),
    "reset in the headers": Behaviour("connection", resets_after(b"HTTP/1.1 200 OK\r\nContent-Le")),
    "reset in the body": Behaviour("connection", resets_after(response(GOOD)[:-20])),
    "closed without a word": Behaviour("connection", sends(b"")),
    "length too large": Behaviour("connection", sends(response(GOOD, length=len(GOOD) + 100))),
    "length too small": Behaviour("bad json", sends(response(GOOD, length=len(GOOD) - 10))),
    "length negative": Behaviour("connection", sends(response(GOOD, length=-1))),
    "length enormous": Behaviour("connection", sends(response(GOOD, length=10**30))),
    "lengths that differ": Behaviour("connection", sends(response(GOOD, headers="Content-Length: 3\r\n"))),
    "chunked": Behaviour("ok", sends(chunked(GOOD[:9], GOOD[9:], b"")), "forty-two"),
    "chunk cut short": Behaviour("connection", sends(chunked(GOOD[:9], GOOD[9:])[:-30])),
    "chunk size is no number": Behaviour("connection", sends(_CHUNKED_HEAD + b"xyz\r\n")),
    "no HTTP": Behaviour("connection", sends(b"SSH-2.0-OpenSSH_9.6\r\n")),
    "binary noise": Behaviour("connection", sends(bytes(range(256)) * 9)),
    "a header without end": Behaviour("connection", drips(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 100_000, 0)),
    "a header of 1 MB": Behaviour("connection", sends(response(GOOD, headers=f"X: {'x' * 1_000_000}\r\n"))),
    "10,000 headers": Behaviour("connection", sends(response(GOOD, headers="X-Long-Name: value\r\n" * 10_000))),
    "a header with control characters": Behaviour("connection", sends(response(GOOD, headers="X: a\x00b\x1b[2J\r\n"))),
    "a folded header": Behaviour("ok", sends(response(GOOD, headers="X: a\r\n b\r\n")), "forty-two"),
    "cookies": Behaviour("ok", sends(response(GOOD, headers="Set-Cookie: a=b; Expires=never\r\n" * 500)), "forty-two"),
    "hangs": Behaviour("timeout", says_nothing),
    "one byte now and then": Behaviour("timeout", drips(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" ")),
    "headers now and then": Behaviour("timeout", drips(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")),
    "informational responses for ever": Behaviour("timeout", drips(b"", b"HTTP/1.1 102 Processing\r\n\r\n")),
    "an informational response": Behaviour("ok", sends(b"HTTP/1.1 100 Continue\r\n\r\n" + response(GOOD)), "forty-two"),
}
STATUS = {
    "201": Behaviour("ok", sends(response(GOOD, "201 Created")), "forty-two"),
    "204": Behaviour("bad json", sends(b"HTTP/1.1 204 No Content\r\n\r\n")),
    "206": _status("bad json", "206 Partial Content", body=GOOD[:20]),
    "299": _status("bad json", "299 Odd"),
    "a redirect to elsewhere": _status("not found", "307 No", "Location: http://127.0.0.1:9/v1\r\n"),
    "a redirect with the key": _status("not found", "308 No", f"Location: http://x/?k={urllib.parse.quote(KEY)}\r\n"),
    "a redirect to itself": _status("not found", "302 No", "Location: /\r\n"),
    "a redirect to nowhere": _status("not found", "301 No"),
    "400": _status("bad request", "400 No"),
    "401": _status("not authorised", "401 No"),
    "402": _status("not authorised", "402 No"),
    "403": _status("not authorised", "403 No"),
    "404": _status("not found", "404 No"),
    "408": _status("server error", "408 No"),
    "409": _status("server error", "409 No"),
    "413": _status("bad request", "413 No"),
    "418 in escape sequences": _status("bad request", "418 No", body=ANSI * 50),
    "422": _status("bad request", "422 No"),
    "429": _status("rate limited", "429 No"),
    "500": _status("server error", "500 No"),
    "504": _status("server error", "504 No"),
    "599": _status("server error", "599 No", body=bytes(range(256))),
    "600": _status("server error", "600 No"),
    "999": _status("server error", "999 No"),
    "1000": Behaviour("connection", sends(b"HTTP/1.1 1000 No\r\n\r\n")),
    "000": Behaviour("connection", sends(b"HTTP/1.1 000 No\r\n\r\n")),
    "usage in an error": _status("server error", "500 No", body=chat(usage=usage(-1, float("inf")))),
    "everything echoed": Behaviour("bad request", echoes_everything),
    "key in the reason": _status("bad request", f"400 {KEY}", body=f"<b>{KEY}</b>"),
    "key as an answer's field": _bad(chat([{"type": spellings(KEY)}])),
    "key as finish_reason": _ok(choice(finish_reason=spellings(KEY))),
}
RETRY_AFTER = {
    f"Retry-After {value!r}": _status("rate limited", "429 No", f"Retry-After: {value}\r\n")
    for value in (
        *("-1", "nan", "inf", "-inf", "1e999", "9" * 5000, "soon", "", "1_0", "\xa0", "0x10"),
        *("Thu, 01 Jan 1970 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "Thu, 99 Foo 99999999999 99:99:99 GMT"),
    )
}
BEHAVIOURS: dict[str, Behaviour] = {**BODIES, **COMPRESSED, **CONNECTION, **STATUS, **RETRY_AFTER}


class HostileServer:
    """Serves in a thread of its own; ``requests`` has the bytes of each request.

    Args:
        behaviour: from the request's JSON body to what is done with it.
    """

    def __init__(self, behaviour: Callable[[dict[str, Any]], Behaviour]) -> None:
        self.behaviour = behaviour
        self.requests: list[bytes] = []
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._stop: asyncio.Event | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            async for request in _requests(reader):
                self.requests.append(request)
                behaviour = self.behaviour(json.loads(request.partition(b"\r\n\r\n")[2]))
                await behaviour.play(request, writer)
                if behaviour.outcome != "ok":
                    break
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            writer.close()
            await writer.wait_closed()

    @contextlib.contextmanager
    def running(self) -> Iterator[HostileServer]:
        """Serve meanwhile."""
        started = threading.Event()
        thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(started),), daemon=True)
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            assert self._stop is not None
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()
            self._loop.close()


def named(body: dict[str, Any]) -> Behaviour:
    """The behaviour that the last message asks for."""
    return BEHAVIOURS[body["messages"][-1]["content"]]


async def _requests(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    first = await reader.read(1)
    if first == b"\x16":
        # A client that expects TLS is left alone.
        return
    while True:
        try:
            head = first + await reader.readuntil(b"\r\n\r\n")
            first = b""
        except asyncio.IncompleteReadError:
            return
        lines = head.lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
        yield head + await reader.readexactly(length)
