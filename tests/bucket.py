"""A stand-in for Google Cloud Storage: so much of its JSON API as TensorStore and gcsfs speak, served from memory.

Objects appear as a whole and at once, listings are never stale, and there is no rename, as in the real one.
"""

import base64
import contextlib
import email
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)")
OBJECTS = re.compile(r"/storage/v1/b/([^/]+)/o")
UPLOAD = re.compile(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)")


class FakeGcs:
    """Buckets, made by the first write to them.

    Attributes:
        objects: {(bucket, name): content}; tests read it, and change it to do damage.
        refuse: asked before everything in `log` whether it is to fail, (method, name) -> HTTP status or None.
        log: (method, name) of every write and removal.
    """

    def __init__(self, port: int):
        self.url = f"http://localhost:{port}"
        self.objects: dict[tuple[str, str], bytes] = {}
        self.refuse: Callable[[str, str], int | None] = lambda method, name: None
        self.log: list[tuple[str, str]] = []
        self._generations: dict[tuple[str, str], int] = {}
        self._next, self._lock = itertools.count(1_700_000_000_000_000), threading.Lock()
        self._uploads: dict[str, tuple[str, str, bytearray, dict]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What makes both libraries talk to it, without credentials and without gRPC."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.url, "STORAGE_EMULATOR_HOST": self.url, "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }  # fmt: skip

    def names(self, prefix: str = "", bucket: str = "bucket") -> list[str]:
        return sorted(name for where, name in self.objects if where == bucket and name.startswith(prefix))

    def flip(self, name: str, bit: int = 5, bucket: str = "bucket") -> None:
        """Change one bit of an object."""
        content = bytearray(self.objects[bucket, name])
        content[bit // 8] ^= 1 << bit % 8
        self.objects[bucket, name] = bytes(content)

    def put(self, bucket: str, name: str, content: bytes, query: dict[str, str]) -> tuple[int, dict]:
        with self._lock:
            if (status := self.refuse("write", name)) is not None:
                return status, {"error": {"code": status, "message": "refused"}}
            if not self._matches(bucket, name, query):
                return 412, {"error": {"code": 412, "message": "conditionNotMet"}}
            self.log.append(("write", name))
            self.objects[bucket, name] = content
            self._generations[bucket, name] = next(self._next)
            return 200, self.resource(bucket, name)

    def delete(self, bucket: str, name: str, query: dict[str, str]) -> tuple[int, dict]:
        with self._lock:
            if (status := self.refuse("remove", name)) is not None:
                return status, {"error": {"code": status, "message": "refused"}}
            if (bucket, name) not in self.objects:
                return 404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}}
            if not self._matches(bucket, name, query):
                return 412, {"error": {"code": 412, "message": "conditionNotMet"}}
            self.log.append(("remove", name))
            del self.objects[bucket, name]
            return 204, {}

    def list(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        names = [name for name in self.names(prefix, bucket) if name >= start and (not end or name < end)]
        cut = lambda name: name.find(delimiter, len(prefix)) if delimiter else -1
        prefixes = sorted({name[: cut(name) + 1] for name in names if cut(name) >= 0})
        items = [self.resource(bucket, name) for name in names if cut(name) < 0]
        return {"kind": "storage#objects"} | {"prefixes": prefixes} | {"items": items}

    def resource(self, bucket: str, name: str) -> dict:
        content = self.objects[bucket, name]
        crc = base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(content)), "crc32c": crc,
            "generation": str(self.generation(bucket, name)), "metageneration": "1",
            "contentType": "application/octet-stream", "storageClass": "STANDARD",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def generation(self, bucket: str, name: str) -> int:
        return self._generations.get((bucket, name), 0) if (bucket, name) in self.objects else 0

    def begin_upload(self, bucket: str, name: str, query: dict[str, str]) -> str:
        key = str(next(self._next))
        self._uploads[key] = bucket, name, bytearray(), query
        return f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"

    def more(self, key: str, content: bytes, content_range: str) -> tuple[int, dict, int]:
        """Return status, resource and bytes so far of a resumable upload, which ends with the byte before its total."""
        bucket, name, so_far, query = self._uploads[key]
        so_far += content
        if not content_range or content_range.endswith(f"/{len(so_far)}"):
            return *self.put(bucket, name, bytes(so_far), query), len(so_far)
        return 308, {}, len(so_far)

    def _matches(self, bucket: str, name: str, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == self.generation(bucket, name)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gcs: FakeGcs

    def log_message(self, format, *args):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            super().handle_one_request()
            return
        self.close_connection = True

    def do_GET(self):
        path, query, _ = self._request()
        if match := OBJECT.fullmatch(path):
            bucket, name = match[1], urllib.parse.unquote(match[2])
            if (bucket, name) not in self.gcs.objects:
                return self._json(404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})
            if query.get("alt") != "media":
                return self._json(200, self.gcs.resource(bucket, name))
            return self._media(bucket, name, query)
        if match := OBJECTS.fullmatch(path):
            return self._json(200, self.gcs.list(match[1], query))
        if match := BUCKET.fullmatch(path):
            return self._json(200, {"kind": "storage#bucket", "name": match[1], "storageClass": "STANDARD"})
        return self._json(501, {"error": {"code": 501, "message": f"the fake does not know GET {path}"}})

    def do_POST(self):
        path, query, body = self._request()
        match, kind = UPLOAD.fullmatch(path), query.get("uploadType")
        if match and kind == "media":
            return self._json(*self.gcs.put(match[1], query["name"], body, query))
        if match and kind == "multipart":
            message = email.message_from_bytes(
                f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body, policy=email.policy.HTTP
            )
            said, content = message.get_payload()
            # What lies between the blank line and the closing boundary, because the parser changes line ends.
            start = body.index(b"\n\n", body.index(b"\n\n") + 2) + 2
            content = body[start : body.rindex(b"\n--")]
            return self._json(*self.gcs.put(match[1], json.loads(said.get_payload())["name"], content, query))
        if match and "upload_id" in query:
            return self._more(query, body)
        if match and kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            return self._json(200, {}, {"Location": self.gcs.begin_upload(match[1], name, query)})
        return self._json(501, {"error": {"code": 501, "message": f"the fake does not know POST {path} {query}"}})

    def do_PUT(self):
        _, query, body = self._request()
        self._more(query, body)

    def _more(self, query: dict[str, str], body: bytes):
        status, said, size = self.gcs.more(query["upload_id"], body, self.headers.get("Content-Range", ""))
        self._json(status, said, {"Range": f"bytes=0-{size - 1}"} if status == 308 else {})

    def do_DELETE(self):
        path, query, _ = self._request()
        match = OBJECT.fullmatch(path)
        assert match, path
        self._json(*self.gcs.delete(match[1], urllib.parse.unquote(match[2]), query))

    def _request(self) -> tuple[str, dict[str, str], bytes]:
        url = urllib.parse.urlsplit(self.path)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return url.path, dict(urllib.parse.parse_qsl(url.query)), body

    def _chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def _media(self, bucket: str, name: str, query: dict[str, str]):
        content, generation = self.gcs.objects[bucket, name], self.gcs.generation(bucket, name)
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
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._reply(206, content[start:stop], headers)

    def _json(self, status: int, said: dict, headers: dict[str, str] = {}):  # noqa: B006
        self._reply(status, json.dumps(said).encode() if status != 204 else b"", headers)

    def _reply(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, text in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serve() -> Iterator[FakeGcs]:
    """A fake of its own for the block, on a free port of this machine."""
    handler = type("Handler", (Handler,), {})
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        server.daemon_threads = True
        handler.gcs = FakeGcs(server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler.gcs
        server.shutdown()
