"""A stand-in for Google Cloud Storage: what TensorStore and gcsfs speak of its JSON API, in a process of its own.

As in the real one objects appear as a whole and at once, listings are never stale and come in pages, and there is no
rename. Besides, it does what it is told to: answer by errors, and kill the process that asks.
"""

import base64
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c

BUCKET, CLOSED = "bucket", "closed"  # which there are; nothing can be written to the second
PAGE = 7  # entries of a listing, however many are asked for
OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)")
OBJECTS = re.compile(r"/storage/v1/b/([^/]+)/o")
UPLOAD = re.compile(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o")


class Refused(Exception):
    """What is answered instead."""

    def __init__(self, status: int, said: str):
        self.status, self.said = status, {"error": {"code": status, "message": said}}


class Store:
    def __init__(self):
        self.url, self.lock, self.numbers = "", threading.RLock(), itertools.count(1_700_000_000_000_000)
        self.reset()

    def reset(self):
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}  # content and generation
        self.uploads: dict[str, tuple[str, str, bytearray, dict]] = {}
        self.log: list[tuple[str, str]] = []  # ("write" or "remove", name)
        self.rules: list[dict] = []

    @contextlib.contextmanager
    def asked(self, what: str, bucket: str, name: str) -> Iterator[None]:
        """Note what is asked for, follow the rules that are about it, and do it inside.

        A rule {"what", "name" (a pattern), "nth", "times"} holds from its n-th request on, for so many. "status"
        answers by an error, "kill" ends a process: before it is done or, with "after", once it is.
        """
        with self.lock:
            if bucket not in (BUCKET, CLOSED):
                raise Refused(404, "The specified bucket does not exist.")
            if bucket == CLOSED and what != "read":
                raise Refused(403, "the account does not have storage.objects.create access")
            mine = [rule for rule in self.rules if re.search(rule["what"], what) and re.search(rule["name"], name)]
            for rule in mine:
                rule["seen"] = rule.get("seen", 0) + 1
            mine = [rule for rule in mine if rule["nth"] <= rule["seen"] < rule["nth"] + rule.get("times", 1)]
            for rule in mine:
                if "status" in rule:
                    raise Refused(rule["status"], "told to")
                if not rule.get("after"):
                    os.kill(rule["kill"], signal.SIGKILL)
                    raise Refused(503, "dead")
            if what != "read":
                self.log.append((what, name))
            yield
            for rule in mine:
                os.kill(rule["kill"], signal.SIGKILL)

    def found(self, bucket: str, name: str) -> tuple[bytes, int]:
        if (bucket, name) not in self.objects:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return self.objects[bucket, name]

    def check(self, bucket: str, name: str, query: dict):
        now = self.objects.get((bucket, name), (b"", 0))[1]
        if int(query.get("ifGenerationMatch", now)) != now:
            raise Refused(412, "conditionNotMet")

    def put(self, bucket: str, name: str, content: bytes, query: dict) -> dict:
        with self.asked("write", bucket, name):
            self.check(bucket, name, query)
            self.objects[bucket, name] = content, next(self.numbers)
            return self.resource(bucket, name)

    def delete(self, bucket: str, name: str, query: dict):
        self.found(bucket, name)
        with self.asked("remove", bucket, name):
            self.check(bucket, name, query)
            del self.objects[bucket, name]

    def resource(self, bucket: str, name: str) -> dict:
        content, generation = self.found(bucket, name)
        crc = base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(content)), "crc32c": crc,
            "generation": str(generation), "metageneration": "1", "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def list(self, bucket: str, query: dict) -> dict:
        prefix, delimiter, after = query.get("prefix", ""), query.get("delimiter"), query.get("pageToken", "")
        start, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        with self.asked("read", bucket, f"{prefix}?"):
            names = [n for b, n in self.objects if b == bucket and n.startswith(prefix) and start <= n < end]
            cut = lambda name: name.find(delimiter, len(prefix)) + 1 if delimiter else 0
            entries = sorted({name[: cut(name)] if cut(name) else name for name in names})
            entries = [entry for entry in entries if entry > after]
            page = entries[: min(PAGE, int(query.get("maxResults") or PAGE))]
            is_prefix = lambda entry: bool(delimiter) and entry.endswith(delimiter) and len(entry) > len(prefix)
            said = {"kind": "storage#objects", "prefixes": [entry for entry in page if is_prefix(entry)]}
            said["items"] = [self.resource(bucket, entry) for entry in page if not is_prefix(entry)]
            return said | ({"nextPageToken": page[-1]} if len(page) < len(entries) else {})

    def begin_upload(self, bucket: str, name: str, query: dict) -> str:
        self.uploads[key := str(next(self.numbers))] = bucket, name, bytearray(), query
        return f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"

    def more(self, key: str, content: bytes, content_range: str) -> tuple[int, dict, int]:
        """Return status, resource and bytes so far of a resumable upload, which ends with the byte before its total."""
        bucket, name, so_far, query = self.uploads[key]
        start, total = re.fullmatch(r"bytes (\d+|\*)(?:-\d+)?/(\d+|\*)", content_range or "bytes 0/*").groups()
        if start.isdigit() and int(start) == len(so_far):  # else it was sent again, or asks how far it is
            so_far += content
        if not content_range or total == str(len(so_far)):
            return 200, self.put(bucket, name, bytes(so_far), query), len(so_far)
        if len(so_far) % 2**18:
            raise Refused(400, "chunks but the last have to be multiples of 256 KiB")
        return 308, {}, len(so_far)


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 2**16
    store: Store

    def log_message(self, format, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:  # of a client that was killed
            self.close_connection = True

    def __getattr__(self, name: str):
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def _handle(self):
        url = urllib.parse.urlsplit(self.path)
        query, body = dict(urllib.parse.parse_qsl(url.query)), self._body()
        try:
            self._answer(url.path, query, body)
        except Refused as refused:
            self._json(refused.said, refused.status)

    def _answer(self, path: str, query: dict, body: bytes):
        store, kind = self.store, query.get("uploadType")
        if path == "/control":
            return self._json(control(store, json.loads(body)))
        if match := OBJECT.fullmatch(path):
            bucket, name = match[1], urllib.parse.unquote(match[2])
            if self.command == "DELETE":
                store.delete(bucket, name, query)
                return self._reply(204, b"", {})
            with store.asked("read", bucket, name):
                content, generation = store.found(bucket, name)
                store.check(bucket, name, query)
                said = store.resource(bucket, name)
            return self._media(content, generation, query) if query.get("alt") == "media" else self._json(said)
        if (match := OBJECTS.fullmatch(path)) and self.command == "GET":
            return self._json(store.list(match[1], query))
        match = UPLOAD.fullmatch(path)
        if match and "upload_id" in query:
            status, said, size = store.more(query["upload_id"], body, self.headers.get("Content-Range", ""))
            return self._json(said, status, {"Range": f"bytes=0-{size - 1}"} if status == 308 and size else {})
        if match and kind == "media":
            return self._json(store.put(match[1], query["name"], body, query))
        if match and kind == "multipart":
            boundary = b"\n--" + re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, said, content, _ = (b"\n" + body).split(boundary)
            said, content = (part.partition(b"\n\n")[2] for part in (said, content))
            return self._json(store.put(match[1], json.loads(said)["name"], content, query))
        if match and kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            return self._json({}, headers={"Location": store.begin_upload(match[1], name, query)})
        raise Refused(501, f"the stand-in does not know {self.command} {self.path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return b"".join(iter(self._chunk, b""))

    def _chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def _media(self, content: bytes, generation: int, query: dict):
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._reply(304, b"", {})
        headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(generation)}
        headers |= {"x-goog-stored-content-length": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or not content:
            return self._reply(200, content, headers)
        start = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
        stop = min(int(wanted[2]) + 1, len(content)) if wanted[1] and wanted[2] else len(content)
        if start >= len(content):
            return self._reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        return self._reply(
            206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        )

    def _json(self, said: dict, status: int = 200, headers: dict[str, str] = {}):  # noqa: B006
        self._reply(status, json.dumps(said).encode(), {"Content-Type": "application/json", **headers})

    def _reply(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)


def control(store: Store, told: dict) -> dict:
    with store.lock:
        if told.get("reset"):
            store.reset()
        store.rules = told.get("rules", store.rules)
        return {"log": store.log, "names": sorted(name for bucket, name in store.objects if bucket == BUCKET)}


class Bucket:
    """The bucket of a running stand-in, for tests to look into, change and disturb."""

    def __init__(self, url: str):
        self.url = url

    @property
    def environment(self) -> dict[str, str]:
        """What makes both libraries talk to it, without credentials and without gRPC."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.url, "STORAGE_EMULATOR_HOST": self.url, "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }  # fmt: skip

    def control(self, **told) -> dict:
        return json.loads(self._ask("/control", json.dumps(told).encode()))

    def rules(self, *rules: dict) -> None:
        self.control(rules=rules)

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self.control()["names"] if name.startswith(prefix)]

    def log(self) -> list[tuple[str, str]]:
        return [(what, name) for what, name in self.control()["log"]]

    def read(self, name: str) -> bytes:
        return self._ask(f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, '')}?alt=media")

    def write(self, name: str, content: bytes) -> None:
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        self._ask(f"/upload/storage/v1/b/{BUCKET}/o?{query}", content)

    def remove(self, name: str) -> None:
        self._ask(f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, '')}", method="DELETE")

    def _ask(self, path: str, body: bytes | None = None, method: str | None = None) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, body, method=method), timeout=60) as said:
            return said.read()


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    """A stand-in in a process of its own, on a free port of this machine."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Bucket(process.stdout.readline().strip())
        finally:
            process.kill()


def main():
    Handler.store = Store()
    with ThreadingHTTPServer(("localhost", 0), Handler) as server:
        server.daemon_threads = True
        Handler.store.url = f"http://localhost:{server.server_port}"
        print(Handler.store.url, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
