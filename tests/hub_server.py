"""The parts of the Hugging Face Hub's interface that its client asks for data sets, on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

MISSING = {"X-Error-Code": "RepoNotFound"}


class Hub(ThreadingHTTPServer):
    """Serves ``revisions``: (repository, branch or commit) -> files by path. ``broken``: paths that are not sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.revisions: dict[tuple[str, str], dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.broken: set[str] = set()
        self.gated: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def publish(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make ``files`` the newest commit of ``branch``; return the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.revisions[repository, branch] = self.revisions[repository, commit] = files
        return commit


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path.strip("/")
        words = [unquote(word) for word in path.split("/")]
        repository = "/".join(words[2:4] if words[0] == "api" else words[1:3])
        known = {name for name, _ in self.server.revisions}
        if repository not in known or repository in self.server.gated:
            code = "GatedRepo" if repository in known else "RepoNotFound"
            return self._send(403 if repository in known else 404, b"{}", {"X-Error-Code": code}, with_body)
        revision = (words[5] if len(words) > 5 else "main") if words[0] == "api" else words[4]
        files = self.server.revisions.get((repository, revision))
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if words[0] == "api":
            self.server.asked.append(f"list {revision}")
            siblings = [{"rfilename": name} for name in files]
            content = json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
            return self._send(200, content, {"Content-Type": "application/json"}, with_body)
        name = "/".join(words[5:])
        if with_body:
            self.server.asked.append(name)
        if name in self.server.broken:
            return self._send(403, b"", {}, with_body)  # the client asks again after a 500, for half a minute
        content = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        return self._send(200, content, headers, with_body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass
