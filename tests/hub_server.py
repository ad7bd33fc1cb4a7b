"""A Hub on this machine to upload to: what huggingface_hub's `create_repo`, `create_branch` and `upload_folder` call.

It knows one token and one user, keeps the commits of each branch, and serves the files again. Large files arrive by
Git LFS or by Xet. Of Xet, only the protocol's outside is here: the server takes the parts of files, and knows a file by
the SHA-256 in the commit.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from urllib.parse import unquote

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

TOKEN, USER = "hf_secret", "me"
PIPELINE_TAGS = {
    "text-classification", "token-classification", "question-answering", "fill-mask", "feature-extraction",
    "sentence-similarity", "multiple-choice",
}  # fmt: skip
"""Those among the Hub's task names that concern this package."""


@dataclass
class Commit:
    summary: str
    files: dict[str, bytes | str]
    """The content of each file that the commit adds; the SHA-256 of a file that came by Xet."""


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    def files(self, branch="main"):
        return {name: content for commit in self.branches[branch] for name, content in commit.files.items()}


def problems(content: str) -> list[str]:
    """What is wrong with the metadata of a card, by the rules that the Hub documents and huggingface_hub has."""
    try:
        data = ModelCard(content).data
    except (ValueError, yaml.YAMLError) as error:
        return [str(error)]
    found = []
    if data.pipeline_tag is not None and data.pipeline_tag not in PIPELINE_TAGS:
        found.append(f'"pipeline_tag" is {data.pipeline_tag!r}')
    for name in ("base_model", "datasets"):
        for value in _listed(data.get(name)):
            try:
                validate_repo_id(value)
            except ValueError:
                found.append(f'"{name}" must be an id of the Hub, not {value!r}')
    for language in _listed(data.language):
        if not isinstance(language, str) or not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
            found.append(f'"language" must be an ISO 639 code, not {language!r}')
    if data.license is not None and not re.fullmatch(r"[a-z0-9.+-]+", str(data.license)):
        found.append(f'"license" is {data.license!r}')
    for result in data.eval_results or ():
        for name in ("task_type", "dataset_type", "dataset_name", "metric_type"):
            if not isinstance(getattr(result, name), str) or not getattr(result, name):
                found.append(f'"model-index": {name} is {getattr(result, name)!r}')
        if not isinstance(result.metric_value, int | float) or result.metric_value != result.metric_value:
            found.append(f'"model-index": the value {result.metric_value!r} is not a number')
    return found


def _listed(value):
    return [] if value is None else value if isinstance(value, list) else [value]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: dict[str, Repository]
    large: dict[str, bytes]
    requests: list[str]
    url: str

    def handle_any(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].strip("/")
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return action(self, *map(unquote, match.groups()))
        return self.answer({"error": f"no such route: {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may_write(self, owner=USER):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif owner != USER:
            self.answer({"error": f"You don't have the rights to create a model under the namespace {owner}"}, 403)
        else:
            return True
        return False

    def validate(self):
        found = problems(json.loads(self.body)["content"])
        self.answer({"errors": [{"message": text} for text in found], "warnings": []}, 400 if found else 200)

    def create(self):
        given = json.loads(self.body)
        owner = given["organization"] or USER
        if self.may_write(owner):
            id = f"{owner}/{given['name']}"
            exists = id in self.repositories
            self.repositories.setdefault(id, Repository(given.get("visibility") == "private"))
            self.answer({"url": f"{self.url}/{id}"}, 409 if exists else 200)

    def info(self, id):
        if id not in self.repositories:
            return self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        repository = self.repositories[id]
        number = len(repository.branches["main"])
        return self.answer({"id": id, "private": repository.private, "sha": f"{number:040x}"})

    def branch(self, id, branch):
        if self.may_write():
            branches = self.repositories[id].branches
            exists = branch in branches
            branches.setdefault(branch, list(branches["main"]))
            self.answer({}, 409 if exists else 200)

    def preupload(self, id, revision):
        if revision not in self.repositories[id].branches:
            return self.answer({"error": "Invalid rev id"}, 404, **{"X-Error-Code": "RevisionNotFound"})
        files = [
            {"path": entry["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if entry["path"].endswith((".safetensors", ".png")) else "regular"}
            for entry in json.loads(self.body)["files"]
        ]  # fmt: skip
        return self.answer({"files": files})

    def batch(self, id):
        if self.may_write():
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}}
                for entry in json.loads(self.body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.large[oid] = self.body
        self.answer({})

    def commit(self, id, revision):
        if not self.may_write():
            return None
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                files[value["path"]] = self.large.get(value["oid"], value["oid"])
        commits = self.repositories[id].branches[revision]
        commits.append(Commit(header["value"]["summary"], files))
        oid = f"{len(commits):040x}"
        return self.answer({"commitUrl": f"{self.url}/{id}/commit/{oid}", "commitOid": oid})

    def xet_token(self, id):
        self.answer({"accessToken": "t", "casUrl": f"{self.url}/cas", "exp": 2**40})

    def xet_part(self):
        self.answer({"was_inserted": True, "result": 1})

    def resolve(self, id, revision, name):
        repository = self.repositories[id]
        content = repository.files(revision if revision in repository.branches else "main").get(name)
        commit = {"X-Repo-Commit": "a" * 40}
        if not isinstance(content, bytes):
            return self.answer({}, 404, **commit, **{"X-Error-Code": "EntryNotFound"})
        return self.answer(content, **commit, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    def log_message(self, *_):
        pass


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST api/validate-yaml", Handler.validate),
    (r"POST api/repos/create", Handler.create),
    (rf"GET api/models/{ID}", Handler.info),
    (rf"POST api/models/{ID}/branch/(.+)", Handler.branch),
    (rf"POST api/models/{ID}/preupload/(.+)", Handler.preupload),
    (rf"POST {ID}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT lfs/(\w+)", Handler.store),
    (rf"POST api/models/{ID}/commit/(.+)", Handler.commit),
    (rf"GET api/models/{ID}/xet-write-token/.+", Handler.xet_token),
    (r"POST cas/(?:v1/xorbs/.+|v1/shards|shards)", Handler.xet_part),
    (rf"(?:GET|HEAD) {ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextlib.contextmanager
def running():
    """A server that runs; its `url`, `repositories` and `requests`."""
    handler = type("Running", (Handler,), {"repositories": {}, "large": {}, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
