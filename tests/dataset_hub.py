"""A small hub of datasets on this machine, with the addresses that huggingface_hub asks for."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class DatasetHub:
    """repos: {"owner/name": {revision: folder}}. `asked` has the requests, as "GET /path".

    break_after: the number of bytes of .parquet files after which every other answer breaks off.
    """

    def __init__(self, repos, break_after=None):
        hub = self
        self.asked, self.break_after, self.breaks = [], break_after, 0
        self.folders = {
            (name, key): folder
            for name, revisions in repos.items()
            for revision, folder in revisions.items()
            for key in (revision, commit_of(revision))
        }
        self.commits = {
            (name, key): commit_of(revision)
            for name, revisions in repos.items()
            for revision in revisions
            for key in (revision, commit_of(revision))
        }

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(*hub.find(self.command, self.path, self.headers, self.body()))

            do_HEAD = do_POST = do_GET

            def body(self):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def answer(self, code, data, headers, breaks=False):
                self.send_response(code)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if breaks else data)
                    self.close_connection = breaks

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def find(self, command, path, headers, body):
        """The answer to a request: (status, data, headers, whether it breaks off)."""
        path = path.split("?")[0]
        self.asked.append(f"{command} {path}")
        missing = 404, b"", {"X-Error-Code": "EntryNotFound"}
        resolve = re.fullmatch(r"/datasets/([\w-]+/[\w-]+)/resolve/([^/]+)/(.*)", path)
        api = re.fullmatch(
            r"/api/datasets/([\w-]+/[\w-]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path
        )
        name, *rest = (resolve or api).groups() if resolve or api else [""]
        if not any(name == known for known, _ in self.folders):
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        what, revision, inside = ("resolve", *rest) if resolve else rest
        key = name, urllib.parse.unquote(revision or "main")
        if key not in self.folders:
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        folder, commit = self.folders[key], self.commits[key]
        target = folder / urllib.parse.unquote(inside or "")
        if what == "resolve":
            if not target.is_file():
                return missing
            return self.send_file(target, commit, headers)
        if what == "tree":
            return self.as_json([describe(p, folder) for p in sorted(target.rglob("*"))])
        if what == "paths-info":
            asked = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            found = [folder / p for p in asked if (folder / p).exists()]
            return self.as_json([describe(p, folder) for p in found])
        siblings = [{"rfilename": str(p.relative_to(folder))} for p in files_in(folder)]
        return self.as_json({"id": name, "sha": commit, "siblings": siblings})

    def as_json(self, value):
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}

    def send_file(self, path, commit, headers):
        data = path.read_bytes()
        extra = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        extra |= {"Accept-Ranges": "bytes"}
        code = 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            extra["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            code, data = 206, data[first : last + 1]
        breaks = False
        if self.break_after and path.suffix == ".parquet" and len(data) > self.break_after:
            self.breaks += 1
            breaks = self.breaks % 2 == 1
        return code, data, extra, breaks


def commit_of(revision):
    return hashlib.sha1(revision.encode()).hexdigest()


def files_in(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def describe(path, folder):
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    return {"type": kind, "path": str(path.relative_to(folder)), "size": size, "oid": "1" * 40}
