"""A stand-in for the Hugging Face hub's HTTP API: what pushing and fetching a model ask of it, and no more."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

TOKEN = "hf_good"


class Hub(ThreadingHTTPServer):
    """`files`: repository -> {path: content}; `requests`: what was asked, in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.blobs, self.requests = {}, {}, []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def sha(self, name: str) -> str:
        """The commit that a repository is at."""
        return hashlib.sha1(repr(sorted(self.files[name].items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.requests.append(f"{self.command} {self.path}")
        given = self.headers.get("Authorization", f"Bearer {TOKEN}")
        if self.command in ("POST", "PUT") and given != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        for pattern, method in self.ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {self.path.partition('?')[0]}"):
                return method(self, body, *match.groups())
        return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.server.files.setdefault(name, {})
        self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})

    def preupload(self, body, name):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith("s") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def lfs(self, body, name):
        objects = json.loads(body)["objects"]
        for one in objects:
            one["actions"] = {"upload": {"href": f"{self.server.address}/blob/{one['oid']}", "header": {}}}
        self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def blob(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.answer({})

    def commit(self, body, name):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[name][value["path"]] = self.server.blobs[value["oid"]]
        sha = self.server.sha(name)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.address}/{name}/commit/{sha}"})

    def info(self, body, name):
        if name not in self.server.files:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": path} for path in self.server.files[name]]
        return self.answer({"id": name, "modelId": name, "sha": self.server.sha(name), "siblings": siblings})

    def tree(self, body, name):
        files = self.server.files[name].items()
        self.answer([{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files])

    def file(self, body, name, path):
        content = self.server.files.get(name, {}).get(path)
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(content, ETag=tag, X_Repo_Commit=self.server.sha(name))

    ROUTES: ClassVar = {
        r"POST /api/repos/create": create,
        r"POST /api/validate-yaml": lambda self, body: self.answer({"errors": [], "warnings": []}),
        r"POST /api/models/(.+)/preupload/main": preupload,
        r"POST /(.+)\.git/info/lfs/objects/batch": lfs,
        r"PUT /blob/(.+)": blob,
        r"POST /api/models/(.+)/commit/main": commit,
        r"GET /api/models/(.+)/revision/main": info,
        r"GET /api/models/(.+)/tree/[^/]+": tree,
        r"GET /api/models/([^/]+/[^/]+)": info,
        r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/[^/]+/(.+)": file,
    }
