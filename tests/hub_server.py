"""A Hugging Face hub of data sets in this process, for tests without a network."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(http.server.ThreadingHTTPServer):
    """Serves the folders in `repositories`, whose commit is a hash of their content."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, Path] = {}
        self.asked: list[str] = []
        """The requests so far."""
        self.is_failing = False
        """Whether files are not delivered."""
        self.is_silent = False
        """Whether nothing is answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        """Return the newest commit of a repository."""
        digest = hashlib.sha1()
        for path in files_of(self.repositories[name]):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def delivered(self) -> list[str]:
        """Return the names of the data files that were asked for since the last call."""
        names = [line.rpartition("/")[2] for line in self.asked if line.startswith("GET /datasets/")]
        self.asked.clear()
        return [name for name in names if name != "README.md"]


def files_of(folder: Path) -> list[Path]:
    """Return the files below a folder in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers what the packages datasets and huggingface_hub ask when a data set is streamed."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.is_silent:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"(/api)?/datasets/([^/]+/[^/]+)(?:/(\w[\w-]*)/([^/]+)(?:/(.*))?)?", path)
        if match is None or match[2] not in self.server.repositories:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        is_api, name, verb, revision, place = match.groups()
        commit, folder = self.server.commit(name), self.server.repositories[name]
        if revision not in (None, "main", commit):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif self.server.is_failing and self.command == "GET" and verb == "resolve":
            self.answer(403, b"{}", {})
        elif is_api and verb in (None, "revision"):
            self.json({"id": name, "sha": commit, "private": False, "disabled": False, "tags": []})
        elif is_api and verb == "tree":
            top = folder / (place or ".")
            inside = top.rglob("*") if "recursive=true" in self.path.lower() else top.glob("*")
            self.json([about(folder, path) for path in sorted(inside)])
        elif is_api and verb == "paths-info":
            paths = [folder / each for each in parse_qs(sent.decode())["paths"]]
            self.json([about(folder, path) for path in paths if path.exists()])
        elif verb == "resolve" and (folder / place).is_file():
            self.file(folder / place, commit)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_POST = do_GET  # noqa: N815  # names that http.server looks for

    def file(self, path: Path, commit: str) -> None:
        content, status = path.read_bytes(), 200
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.answer(status, content, headers)

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Keep the tests quiet."""


def about(folder: Path, path: Path) -> dict[str, object]:
    """Return what the hub says of a file or folder."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    content = path.read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve until the block ends."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
