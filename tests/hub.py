"""A hub of a few data sets on this machine: what `datasets` and `huggingface_hub` ask of one, and no more."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@contextlib.contextmanager
def serving(repos: Mapping[str, list[Files]]) -> Iterator[str]:
    """Give the address of a hub with these data sets.

    Args:
        repos: {owner/name: files of every commit}; the last is the branch main, and `commit` gives the hash of each.
    """
    handler = type("Handler", (_Handler,), {"repos": repos})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def commit(files: Files) -> str:
    """Return the 40 hex digits that a commit of these files has."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    repos: Mapping[str, list[Files]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(json.loads(body).get("paths") if body.startswith(b"{") else None)

    def _answer(self, paths: list[str] | None = None) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        owner, name, *rest = parts[1 + api :] if "datasets" in parts[: 1 + api] else ["", ""]
        commits = self.repos.get(f"{owner}/{name}", [])
        wanted = rest[1] if len(rest) > 1 else "main"
        files = commits[-1] if commits and wanted == "main" else {commit(c): c for c in commits}.get(wanted)
        if files is None:
            code = "RepoNotFound" if not commits else "RevisionNotFound"
            self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"})
        elif not api:
            self._file(files, "/".join(rest[2:]))
        elif rest[:1] in (["tree"], ["paths-info"]):
            folder = "".join(f"{part}/" for part in rest[2:])
            listed = {name for name in files if name.startswith(folder)} if paths is None else files.keys() & {*paths}
            if paths is None and "recursive=true" not in self.path.lower():
                listed = {folder + name.removeprefix(folder).partition("/")[0] for name in listed}
            self._json([_entry(name, files.get(name)) for name in sorted(listed)])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": f"{owner}/{name}", "sha": commit(files), "siblings": siblings, "tags": []})

    def _file(self, files: Files, name: str) -> None:
        if name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit(files)})
            return
        start, end = 0, len(files[name])
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else end
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}
        if span:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(files[name])}"
        self._send(206 if span else 200, files[name][start:end], headers)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(name: str, content: bytes | None) -> dict[str, object]:
    if content is None:
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
