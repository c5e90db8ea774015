"""A small hub on this machine, with the addresses that huggingface_hub asks for."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse

NAME = r"([\w-]+/[\w-]+)"
REVISION = r"(refs/convert/\w+|\w+)"


class DatasetHub:
    """repos: {"owner/name": {revision: folder}}.

    break_after: the number of bytes of .parquet files after which every other answer breaks off."""

    def __init__(self, repos, break_after=None):
        hub = self
        self.break_after, self.breaks = break_after, 0
        self.names = repos.keys()
        self.found = {}  # {(name, revision or its commit): (folder, commit)}
        for name, revisions in repos.items():
            for revision, folder in revisions.items():
                commit = hashlib.sha1(revision.encode()).hexdigest()
                self.found[name, revision] = self.found[name, commit] = folder, commit

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                code, data, headers = hub.answer(self.path, self.headers, body)
                self.send_response(code)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.close_connection = hub.breaks_off(self.path, len(data))
                    self.wfile.write(data[: len(data) // 2] if self.close_connection else data)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{server.server_port}"

    def breaks_off(self, path, size):
        if not self.break_after or not path.endswith(".parquet") or size <= self.break_after:
            return False
        self.breaks += 1
        return self.breaks % 2 == 1

    def answer(self, path, headers, body):
        """The answer to a request: (status, data, headers)."""
        path = urllib.parse.unquote(path.split("?")[0])
        resolve = re.fullmatch(rf"/(?:datasets/)?{NAME}/resolve/{REVISION}/(.*)", path)
        api = re.fullmatch(
            rf"/api/\w+/{NAME}(?:/(revision|tree|paths-info)/{REVISION}/?(.*))?", path
        )
        if resolve:
            name, revision, inside = resolve.groups()
        elif api:
            name, what, revision, inside = api.groups()
        if not (resolve or api) or name not in self.names:
            return missing("RepoNotFound")
        if (name, revision or "main") not in self.found:
            return missing("RevisionNotFound")
        folder, commit = self.found[name, revision or "main"]
        target = folder / (inside or "")
        if resolve:
            return self.send_file(target, commit, headers)
        if what == "tree":
            return as_json([describe(p, folder) for p in sorted(target.rglob("*"))])
        if what == "paths-info":
            asked = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            return as_json([describe(folder / p, folder) for p in asked if (folder / p).exists()])
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        siblings = [{"rfilename": str(p.relative_to(folder))} for p in files]
        return as_json({"id": name, "sha": commit, "siblings": siblings})

    def send_file(self, path, commit, headers):
        if not path.is_file():
            return missing("EntryNotFound")
        data = path.read_bytes()
        extra = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        extra |= {"Accept-Ranges": "bytes"}
        code = 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            extra["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            code, data = 206, data[first : last + 1]
        return code, data, extra


def missing(what):
    return 404, b"", {"X-Error-Code": what}


def as_json(value):
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def describe(path, folder):
    kind, size = "directory" if path.is_dir() else "file", path.stat().st_size
    return {"type": kind, "path": str(path.relative_to(folder)), "size": size, "oid": "1" * 40}
