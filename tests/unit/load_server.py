"""Rollout servers without a model that answer at a set speed: many ports in one process, for load and for faults.

usage: load_server.py [--port P ...] [--ports N] [--tokens-per-s S] [--version V] [--fault KIND --every K]

A response of n tokens takes n / S seconds, whatever else runs. Its first token is the first of the prompt, so that a
test can tell whose it is. It prints its ports as a JSON list once it listens, and ends when its standard input does.

Faults hit every K-th request of a port, retries included: `error` (500), `drop` (the connection ends, in turn
before and in the middle of the body), `slow` (the body comes in eight pieces), `wrong` (of another weight version),
`truncated` (half the JSON), `nan` (one logprob), `forever` (never answered).
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

SLOW_PIECES, SLOW_S = 8, 0.05


class Port:
    """One server: its version and its faults."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.version = args.version
        self.requests = 0
        self.firsts: set[int] = set()  # first tokens of prompts
        self.rids: list[str] = []
        self.aborted: list[str] = []

    def control(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path in ("/update_weights_from_disk", "/update_weight_version"):
            self.version = body.get("weight_version") or body["new_version"]
        if path == "/abort_request":
            self.aborted.append(body["rid"])
        seen = {"requests": self.requests, "firsts": list(self.firsts), "rids": self.rids, "aborted": self.aborted}
        return {"success": True, "weight_version": self.version, **seen}

    def fault(self, body: dict[str, Any]) -> str:
        """What goes wrong with this request."""
        self.requests += 1
        self.firsts |= {ids[0] for ids in body["input_ids"]}
        self.rids += [body["rid"]] if "rid" in body else []
        return self.args.fault if self.args.fault and self.requests % self.args.every == 0 else ""


class Connection(asyncio.Protocol):
    def __init__(self, port: Port) -> None:
        self._port, self._buffer = port, b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        length = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        self._answer(head.split(b" ", 2)[1].decode(), json.loads(rest[:length] or b"{}"))

    def _answer(self, path: str, body: dict[str, Any]) -> None:
        if path != "/generate":
            return self._send(200, json.dumps(self._port.control(path, body)).encode())
        fault = self._port.fault(body)
        sampling = body["sampling_params"]  # one of all prompts, or one of each
        each = sampling if isinstance(sampling, list) else [sampling] * len(body["input_ids"])
        lengths = [s["max_new_tokens"] for s in each]
        done = functools.partial(self._generated, body["input_ids"], lengths, fault)
        if fault == "error":
            self._send(500, b'{"error": {"message": "scripted"}}')
        elif fault != "forever":
            asyncio.get_running_loop().call_later(max(lengths) / self._port.args.tokens_per_s, done)

    def _generated(self, prompts: list[list[int]], lengths: list[int], fault: str) -> None:
        version = "wrong" if fault == "wrong" else self._port.version
        answers = [answer(ids[0], n, version) for ids, n in zip(prompts, lengths, strict=True)]
        body = b"[" + b",".join(answers) + b"]"
        if fault == "nan":
            body = body.replace(b"[-0.5,", b"[NaN,", 1)
        elif fault == "truncated":
            body = body[: len(body) // 2]
        if fault == "drop":
            if self._port.requests // self._port.args.every % 2:
                self._transport.write(head(200, len(body)) + body[: len(body) // 2])
            self._transport.close()
        elif fault == "slow":
            size = -(-len(body) // SLOW_PIECES)
            pieces = [head(200, len(body)), *(body[i : i + size] for i in range(0, len(body), size))]
            for i, piece in enumerate(pieces):
                asyncio.get_running_loop().call_later(i * SLOW_S, self._write(piece))
        else:
            self._send(200, body)

    def _write(self, piece: bytes) -> Callable[[], None]:
        return lambda: self._transport.write(piece)

    def _send(self, status: int, body: bytes) -> None:
        self._transport.write(head(status, len(body)) + body)


def head(status: int, length: int) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, length)


@functools.cache
def tails(length: int) -> tuple[bytes, bytes]:
    """The ids and the logprobs after the first token: numbers as long as a server's."""
    ids = [(7919 * i) % 90_000 for i in range(1, length)]
    logprobs = [-((i * 0.6180339887498949) % 1) for i in range(1, length)]
    pairs = b"".join(b",[%a,%d,null]" % (p, t) for p, t in zip(logprobs, ids, strict=True))
    return b"".join(b",%d" % t for t in ids), pairs


def answer(first: int, length: int, version: str) -> bytes:
    ids, pairs = tails(length)
    return (
        b'{"text":"","output_ids":[%d%b],"meta_info":{"finish_reason":{"type":"length","length":%d},'
        b'"completion_tokens":%d,"weight_version":"%b","output_token_logprobs":[[-0.5,%d,null]%b]}}'
    ) % (first, ids, length, length, version.encode(), first, pairs)


async def serve(args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    ports = []
    for number in args.port or [0] * args.ports:
        port = Port(args)
        make = functools.partial(Connection, port)
        server = await loop.create_server(make, "127.0.0.1", number, backlog=1024)
        ports.append(server.sockets[0].getsockname()[1])
    print(json.dumps(ports), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--port", type=int, action="append")
    p.add_argument("--ports", type=int, default=1)
    p.add_argument("--tokens-per-s", type=float, default=1000.0)
    p.add_argument("--version", default="7")
    p.add_argument("--fault", default="")
    p.add_argument("--every", type=int, default=1)
    asyncio.run(serve(p.parse_args()))
