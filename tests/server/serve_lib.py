"""Starting the server, and talking to it over real sockets."""
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time

PROGRAM = ""
SOURCE = ""
# Seconds that something may take; instrumented builds are many times slower.
PATIENCE = int(os.environ.get("TWILIGHT_TEST_PATIENCE", 120))


def vesper():
    return os.path.join(SOURCE, "models", "vesper-19m")


class Server:
    """`twilight serve` on a free port, with its log in a file."""

    def __init__(self, *flags, model=None):
        self.log_file = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.process = subprocess.Popen(
            [PROGRAM, "serve", "--model", model or vesper(), "--port", "0", "--json",
             "--log-format", "json", *map(str, flags)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log_file)
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError("no server: " + self.log())
        self.port = json.loads(line)["port"]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        running = self.process.poll() is None
        status = self.stop()
        if kind is None and running and status != 0:  # e.g. what a sanitizer found
            raise AssertionError(f"the server ended with {status}: " + self.log())

    def stop(self, signum=signal.SIGTERM, patience=PATIENCE):
        """Exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(patience)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()

    def log(self):
        with open(self.log_file.name, encoding="utf-8") as file:
            return file.read()

    def records(self):
        return [json.loads(line) for line in self.log().splitlines()]

    def wait_record(self, accept, patience=PATIENCE):
        """The first log record that `accept` takes."""
        return wait_for(lambda: next((r for r in self.records() if accept(r)), None), patience)

    def connect(self, timeout=None, receive_buffer=None):
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(timeout or PATIENCE)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def request(self, method, path, body=None, headers=None):
        """(status, headers, parsed JSON or text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
            connection.request(method, path, data, headers or {})
            reply = connection.getresponse()
            text = reply.read().decode("utf-8")
            kind = reply.headers.get("Content-Type", "")
            return reply.status, reply.headers, json.loads(text) if "json" in kind else text

    def post(self, path, headers=None, **fields):
        return self.request("POST", path, fields, headers)

    def completion(self, prompt, **fields):
        status, _, body = self.post("/v1/completions", prompt=prompt, **fields)
        if status != 200:
            raise AssertionError(f"{status}: {body}")
        return body

    def stream(self, path, **fields):
        """All events of a stream, without the final [DONE], which must be there."""
        status, _, text = self.post(path, stream=True, **fields)
        assert status == 200, text
        parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
        assert parts[-1] == "[DONE]", parts[-1]
        return [json.loads(part) for part in parts[:-1]]

    def raw(self, data, half_close=True):
        """What comes back for these bytes until the server closes."""
        with contextlib.closing(self.connect(20)) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
            parts = []
            with contextlib.suppress(OSError):
                while part := sock.recv(65536):
                    parts.append(part)
            return b"".join(parts)

    def metric(self, name):
        for line in self.request("GET", "/metrics")[2].splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def idle(self):
        return self.metric("twilight_requests_running") == 0 and \
            self.metric("twilight_requests_queued") == 0 and \
            self.metric("twilight_requests_prefilling") == 0


def wait_for(condition, patience=PATIENCE):
    """The first true value of `condition()`."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def post_bytes(path, body):
    data = json.dumps(body).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n").encode() + data
