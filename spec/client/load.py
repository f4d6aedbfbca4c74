#!/usr/bin/env python3
"""Many clients at once against a server that computes: python3 load.py [options] -- COMMAND

COMMAND prints "URL serves NAME", as `bin/moonlet serve DIR --port 0` does. First every request is
made alone; then, for so many seconds, so many connections make the same requests, read them
slowly, leave in the middle of them, and send what is none. Every reply that is read whole must be
the one of the quiet run. In the end nothing may be running or waiting, no connection may be left,
the quiet run must give the same again, memory must have stopped growing, and the server must end
when told to. Exits 1, saying why, where that does not hold.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time

# ---- requests that have one right answer -----------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "get_weather",
          "description": "Get the current weather in a city.",
          "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                         "required": ["city"]}}}]
QUESTIONS = ["What is the capital of France?", "Tell me a story.", "What is 3 + 4?",
             "Write a poem about the sea.", "Who are you?", "Name three colours: rot, grün, 青い."]
LONG = "The cat sat on the mat. " * 60


def chat(text, **more):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24,
            **more}


def cases():
    """(path, body, whether it can be streamed)"""
    for i, text in enumerate(QUESTIONS):
        yield "/v1/chat/completions", chat(text), True
        yield "/v1/chat/completions", chat(text, temperature=0.8, seed=i, n=1 + i % 3), True
        yield "/v1/chat/completions", chat(text, enable_thinking=True, max_tokens=40), True
        yield "/v1/completions", {"prompt": text, "temperature": 0, "max_tokens": 16}, True
        yield "/v1/responses", {"input": text, "temperature": 0, "max_output_tokens": 24}, True
        yield "/v1/messages", chat(text), True
        yield "/v1/embeddings", {"input": [text, "Hello"], "encoding_format": "base64"}, False
        yield "/tokenize", {"prompt": text}, False
        yield "/v1/messages/count_tokens", {"messages": chat(text)["messages"]}, False
    yield "/v1/chat/completions", chat("What is the weather in Paris?", tools=TOOLS), True
    yield "/v1/chat/completions", chat(LONG + "How is the cat?", logprobs=True), True
    yield "/v1/messages", chat(LONG * 2 + "What did the cat do?", stop_sequences=["the"]), True
    yield "/v1/responses", {"input": LONG + "Why?", "temperature": 0, "max_output_tokens": 8}, True
    yield "/v1/completions", {"prompt": [LONG, "One more"], "temperature": 0, "max_tokens": 8}, True
    yield "/v1/completions", {"prompt": LONG, "echo": True, "logprobs": 1, "max_tokens": 0}, False
    yield "/detokenize", {"tokens": list(range(40, 90))}, False
    for path in ("/v1/models", "/version", "/health", "/openapi.json", "/"):
        yield path, None, False


def bad_requests():
    """(bytes, what the status begins with; None where the connection may just be closed)"""
    def post(path, body, **fields):
        return request_bytes(path, body, fields)
    yield post("/v1/chat/completions", b'{"messages": ['), "400"
    yield post("/v1/chat/completions", b"\xff\x00"), "400"
    yield post("/v1/chat/completions", {"messages": "x"}), "400"
    yield post("/v1/chat/completions", chat("x", n=1000)), "400"
    yield post("/v1/chat/completions", chat("x", response_format={"type": "json_object"})), "400"
    yield post("/v1/chat/completions", chat(LONG * 40)), "400"
    yield post("/v1/completions", {"prompt": ""}), "400"
    yield post("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}), "400"
    yield post("/v1/messages", {"max_tokens": 5, "messages": [{"role": "x", "content": 1}]}), "400"
    yield post("/v1/embeddings", {"input": [[-1]]}), "400"
    yield post("/detokenize", {"tokens": [1 << 40]}), "400"
    yield post("/v1/nothing", {}), "404"
    yield request_bytes("/v1/messages", None), "405"
    yield post("/v1/completions", {"prompt": "x"}, Host="evil.example"), "403"
    yield post("/v1/completions", b"a=b", **{"Content-Type": "text/plain"}), "415"
    yield b"nonsense\r\n\r\n", None
    yield b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 80000, None
    yield b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n{", None
    yield bytes(range(256)), None


def request_bytes(path, body, fields=None):
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    head = {"Host": "localhost", "Content-Type": "application/json",
            "Content-Length": len(data or b""), **(fields or {})}
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in head.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (data or b"")


# ---- what a reply says, streamed or whole ----------------------------------------------------

VOLATILE = {"id", "created", "created_at", "completed_at", "system_fingerprint", "item_id",
            "call_id", "cached_tokens", "cache_read_input_tokens", "input_tokens"}


def stable(value):
    """Without what differs from one reply to the next."""
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if k not in VOLATILE}
    return [stable(v) for v in value] if isinstance(value, list) else value


def events(body):
    out = []
    for block in body.decode().split("\n\n"):
        data = [line[6:] for line in block.split("\n") if line.startswith("data: ")]
        if data and data[0] != "[DONE]":
            out.append(json.loads(data[0]))
    return out


def of_chunks(list_):
    """Chat and text completions: per choice its texts, calls and reason."""
    choices = collections.defaultdict(lambda: collections.defaultdict(str))
    for chunk in list_:
        for choice in chunk["choices"]:
            mine = choices[choice["index"]]
            delta = choice.get("delta") or choice.get("message") or choice
            for name in ("content", "reasoning_content", "text"):
                mine[name] += delta.get(name) or ""
            for call in delta.get("tool_calls") or []:
                mine["calls"] += call["function"].get("name", "") + call["function"]["arguments"]
            mine["logprobs"] += "".join(
                e["token"] for e in (choice.get("logprobs") or {}).get("content") or [])
            mine["reason"] += choice.get("finish_reason") or ""
    return {index: {k: v for k, v in c.items() if v} for index, c in sorted(choices.items())}


def of_messages(list_):
    texts, reason = collections.defaultdict(str), None
    for event in list_:
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            kind = {"text_delta": "text", "thinking_delta": "thinking",
                    "input_json_delta": "partial_json"}.get(delta["type"])
            if kind:
                texts[event["index"]] += delta[kind]
        elif event["type"] == "message_delta":
            reason = event["delta"]["stop_reason"]
    return {"texts": list(texts.values()), "reason": reason}


def meaning(path, streamed, body):
    if path in ("/", "/openapi.json", "/health"):
        return body.decode()
    if not streamed:
        whole = json.loads(body)
        if path == "/v1/messages":
            return {"texts": [b.get("text") or b.get("thinking") or json.dumps(b.get("input"))
                              for b in whole["content"]], "reason": whole["stop_reason"]}
        if path in ("/v1/chat/completions", "/v1/completions") and "max_tokens" not in whole:
            if (whole["choices"][0].get("logprobs") or {}).get("top_logprobs"):
                return stable(whole)
            return of_chunks([whole])
        return stable(whole)
    list_ = events(body)
    if path == "/v1/responses":
        last = list_[-1]
        assert last["type"] in ("response.completed", "response.incomplete"), last
        return stable(last["response"])
    if path == "/v1/messages":
        assert list_[-1]["type"] == "message_stop", list_[-1]
        return of_messages(list_)
    assert body.rstrip().endswith(b"data: [DONE]"), body[-200:]
    return of_chunks(list_)


# ---- connections -----------------------------------------------------------------------------

class Left(Exception):
    """We have closed the connection, on purpose."""


class Closed(Exception):
    """The server has."""


class Connection:
    def __init__(self, port):
        self.port, self.reader, self.writer = port, None, None

    async def open(self, small=False):
        if self.writer and not self.writer.is_closing() and not small:
            return
        self.close()
        sock = socket.socket()
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        self.reader, self.writer = await asyncio.open_connection(sock=sock)

    def close(self, reset=False):
        if not self.writer:
            return
        if reset:
            self.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort() if reset else self.writer.close()
        self.writer = None

    async def send(self, data):
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, on_piece=None):
        """Status and body; on_piece(bytes so far) may wait or raise Left."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status = int(head.split(" ", 2)[1])
        fields = dict(re.findall(r"(?m)^([\w-]+): (.*?)\r$", head.lower()))
        body = b""
        if "content-length" in fields:
            body = await self.reader.readexactly(int(fields["content-length"]))
        elif fields.get("transfer-encoding") == "chunked":
            while True:
                size = int(await self.reader.readuntil(b"\r\n"), 16)
                body += (await self.reader.readexactly(size + 2))[:-2]
                if size == 0:
                    break
                if on_piece:
                    await on_piece(body)
        if fields.get("connection") == "close":
            self.close()
        return status, body


# ---- the load --------------------------------------------------------------------------------

class Load:
    def __init__(self, port, seed):
        self.port, self.end, self.random = port, 0, random.Random(seed)
        self.cases, self.bad = list(cases()), list(bad_requests())
        self.expected, self.counts, self.problems = {}, collections.Counter(), []

    def is_over(self):
        return time.monotonic() > self.end or len(self.problems) > 10

    def check(self, what, condition, detail):
        if not condition:
            self.problems.append(f"{what}: {detail}")

    async def ask(self, connection, i, streamed, on_piece=None):
        """Makes request i; None if the server is busy."""
        path, body, _ = self.cases[i]
        if streamed:
            body = {**body, "stream": True}
        await connection.send(request_bytes(path, body))
        status, reply = await connection.reply(on_piece)
        if status == 429:
            self.counts["429"] += 1
            return None
        assert status == 200, (path, status, reply[:500])
        return meaning(path, streamed, reply)

    async def quiet(self):
        """What each request is answered when nothing else happens, whole and streamed."""
        connection, answers = Connection(self.port), {}
        for i, (path, _, can_stream) in enumerate(self.cases):
            for streamed in (False, True) if can_stream else (False,):
                await connection.open()
                answers[i, streamed] = await self.ask(connection, i, streamed)
        connection.close()
        return answers

    async def correct(self, connection, slow):
        i = self.random.randrange(len(self.cases))
        streamed = self.cases[i][2] and (slow or self.random.random() < 0.5)

        async def on_piece(_):
            await asyncio.sleep(0.02)
        await connection.open(small=slow)
        got = await self.ask(connection, i, streamed, on_piece if slow else None)
        if got is None:
            return await asyncio.sleep(0.1)
        self.counts["slow" if slow else "read"] += 1
        want = self.expected[i, streamed]
        self.check(self.cases[i][:2], got == want, f"\n  {got}\nnot\n  {want}")

    async def leaving(self, connection):
        """Leaves while sending, while the prompt is read, or while the answer comes."""
        path = self.random.choice(["/v1/chat/completions", "/v1/messages", "/v1/responses",
                                   "/v1/completions"])
        text = f"{self.random.random()} " + LONG * self.random.choice([0, 1, 3])
        body = {"ignore_eos": True, "temperature": 0, "max_tokens": 200, "max_output_tokens": 200,
                "prompt": text, "input": text, "messages": chat(text)["messages"],
                "stream": self.random.random() < 0.7, "n": self.random.choice([1, 1, 3])}
        if path in ("/v1/messages", "/v1/responses"):
            del body["n"]
        data, when = request_bytes(path, body), self.random.choice(["send", "read", "answer"])
        await connection.open()
        try:
            if when == "send":
                await connection.send(data[:self.random.randrange(len(data))])
                await asyncio.sleep(self.random.random() * 0.05)
            elif when == "answer" and body["stream"]:
                enough = self.random.randrange(200, 8000)

                async def on_piece(so_far):
                    if len(so_far) > enough:
                        raise Left
                await connection.send(data)
                await connection.reply(on_piece)
            else:
                await connection.send(data)
                await asyncio.sleep(self.random.random() * 0.3)
        except Left:
            pass
        finally:
            connection.close(reset=self.random.random() < 0.5)
        self.counts["left, " + when] += 1

    async def refused(self, connection):
        data, status = self.random.choice(self.bad)
        await connection.open()
        try:
            await connection.send(data)
            got, reply = await connection.reply()
            if got == 429:  # a full queue refuses what it has not read
                self.counts["429"] += 1
                return
            self.check(data[:200], str(got)[0] == "4" and (status or str(got)) == str(got),
                       f"{got} {reply[:200]}")
        except (ConnectionError, asyncio.IncompleteReadError):
            self.check(data[:200], status is None, "closed")
        finally:
            connection.close()
        self.counts["bad"] += 1

    async def client(self):
        connection = Connection(self.port)
        while not self.is_over():
            what = self.random.random()
            try:
                if what < 0.02:
                    await self.gauges()
                elif what < 0.5:
                    await self.correct(connection, slow=False)
                elif what < 0.6:
                    await self.correct(connection, slow=True)
                    connection.close()
                elif what < 0.85:
                    await self.leaving(connection)
                else:
                    await self.refused(connection)
            except Exception as problem:  # whatever it is, the run goes on and tells
                self.problems.append(repr(problem))
                connection.close()
        connection.close()

    async def gauges(self):
        connection = Connection(self.port)
        await connection.open()
        await connection.send(request_bytes("/metrics", None))
        status, body = await connection.reply()
        connection.close()
        assert status == 200, (status, body)
        return [int(re.search(rf"(?m)^vllm:num_requests_{name}{{.*}} (\d+)$", body.decode())[1])
                for name in ("running", "waiting")]

    async def run(self, n, seconds, server):
        """Returns what memory the server had, twice a second."""
        self.expected = await self.quiet()
        before = len(server.descriptors())  # the quiet run's connection among them
        self.end = time.monotonic() + seconds
        clients = [asyncio.create_task(self.client()) for _ in range(n)]
        samples = []
        while not all(task.done() for task in clients):
            samples.append(server.rss())
            await asyncio.sleep(0.5)
        for _ in range(600):
            if await self.gauges() == [0, 0] and len(server.descriptors()) <= before:
                break
            await asyncio.sleep(0.1)
        self.check("at the end", await self.gauges() == [0, 0], "the engine is not idle")
        self.check("at the end", len(server.descriptors()) <= before,
                   f"{server.descriptors()}, {before} at the beginning")
        again = await self.quiet()
        for key, want in self.expected.items():
            self.check(f"again {self.cases[key[0]][:2]}", again[key] == want,
                       f"\n  {again[key]}\nnot\n  {want}")
        return samples


class Server:
    def __init__(self, command):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        match = re.match(r"http://[\d.]+:(\d+) serves", line)
        if not match:
            sys.exit(f"the server did not start: {line}")
        self.port = int(match[1])

    def rss(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmRSS:\s*(\d+) kB", file.read())[1]) / 1024

    def descriptors(self):
        folder = f"/proc/{self.process.pid}/fd"
        return [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--growth", type=float, default=16,
                        help="MiB by which the second half may exceed the first one's maximum")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    server, started = Server(args.command), time.monotonic()
    load = Load(server.port, args.seed)
    try:
        rss = asyncio.run(load.run(args.connections, args.seconds, server))
    except BaseException:
        server.process.kill()
        raise
    half = len(rss) // 2
    load.check("memory", max(rss[half:]) <= max(rss[:half]) + args.growth,
               f"{max(rss[:half]):.0f} MiB, then {max(rss[half:]):.0f}")
    status = server.end()
    load.check("at the end", status == 0, f"the server ended with {status}")
    for problem in load.problems:
        print(problem[:3000], file=sys.stderr)
    print(f"{time.monotonic() - started:.0f} s, {len(load.expected)} right answers;",
          ", ".join(f"{name} {n}" for name, n in sorted(load.counts.items())))
    tenth = max(1, len(rss) // 10)
    print("MiB, a tenth of the time each:",
          " ".join(f"{max(rss[i:i + tenth]):.0f}" for i in range(0, len(rss), tenth)))
    print("ok" if not load.problems else f"{len(load.problems)} problems")
    sys.exit(bool(load.problems))


if __name__ == "__main__":
    main()
