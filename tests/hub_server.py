"""A Hugging Face hub on loopback, as far as pushing and loading a model need one."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]

#: Some of the words that the hub takes for a licence.
LICENSES = ("apache-2.0", "cc-by-4.0", "mit", "other")


class Hub:
    """Repositories, each a list of commits: the files that it then has."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[Files]] = {}
        self.asked: list[str] = []  # method and path of each request

    def oid(self, name: str, number: int) -> str:
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def at(self, name: str, revision: str) -> tuple[str, Files]:
        """The commit that a revision names, and its files. KeyError: there is none."""
        commits = self.repositories[name]
        oids = [self.oid(name, number) for number in range(len(commits))]
        number = (
            len(commits) - 1
            if revision == "main"
            else {oid: at for at, oid in enumerate(oids)}[revision]
        )
        return oids[number], commits[number]


def troubles(card: str) -> list[str]:
    """What a hub has against the head of a card, as far as that is known outside of it.

    Its check runs on its servers, and no schema of it is published: here its package reads the
    head, which raises for what its documentation (modelcard.md) requires and the head lacks.
    """
    from huggingface_hub import ModelCard

    try:
        license = ModelCard(card).data.license
    except ValueError as error:
        return [str(error)]
    return [] if license in LICENSES else [f'"license" must be one of [{", ".join(LICENSES)}]']


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def say(self, content: object, status: int = 200) -> None:
            self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

        def refuse(self, code: str) -> None:
            self.answer(404, b"{}", X_Error_Code=code, X_Error_Message=code)

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            try:
                if parts[:2] == ["api", "models"]:
                    name = "/".join(parts[2:4])
                    oid, files = hub.at(name, parts[5] if len(parts) > 5 else "main")
                    if parts[4:5] == ["tree"]:
                        self.say([{"type": "file", "path": path, "size": len(content), "oid": oid}
                                  for path, content in files.items()])  # fmt: skip
                    else:
                        listed = [{"rfilename": path} for path in files]
                        self.say({"id": name, "sha": oid, "siblings": listed})
                else:  # ORG/NAME/resolve/REVISION/FILE
                    oid, files = hub.at("/".join(parts[:2]), parts[3])
                    content = files["/".join(parts[4:])]
                    etag = hashlib.sha256(content).hexdigest()
                    self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=oid)
            except (KeyError, IndexError) as error:  # also of paths that are no file's
                missing = parts[3] if len(parts) > 3 and str(error) == repr(parts[3]) else ""
                self.refuse("RevisionNotFound" if missing else "RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = urlsplit(self.path).path.strip("/").split("/")
            name = "/".join(parts[2:4])
            if parts[1:] == ["repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                url = f"http://{self.headers['Host']}/{name}"
                status = 409 if name in hub.repositories else 200
                hub.repositories.setdefault(name, [{}])
                self.say({"url": url, "name": name}, status)
            elif parts[1:] == ["validate-yaml"]:
                wrong = [{"message": trouble} for trouble in troubles(json.loads(body)["content"])]
                self.say({"errors": wrong, "warnings": []}, 400 if wrong else 200)
            elif parts[4] == "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                self.say({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False}
                                    for path in paths]})  # fmt: skip
            else:  # commit: a JSON value per line
                rows = [json.loads(line) for line in body.splitlines()]
                new = {row["value"]["path"]: base64.b64decode(row["value"]["content"])
                       for row in rows if row["key"] == "file"}  # fmt: skip
                commits = hub.repositories[name]
                commits.append(commits[-1] | new)
                oid = hub.oid(name, len(commits) - 1)
                url = f"http://{self.headers['Host']}/{name}/commit/{oid}"
                self.say({"success": True, "commitOid": oid, "commitUrl": url})

    return Handler


@contextlib.contextmanager
def running() -> Iterator[tuple[Hub, str]]:
    """A hub and its address."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(hub)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
