"""A W&B server on loopback that records what a real client sends, or misbehaves on request. For tests only."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KEY = "0123456789abcdef" * 2 + "01234567"  # any 40 characters pass the client's own check


class LoopbackWandb:
    """Answers the GraphQL and file-stream calls of the wandb client on 127.0.0.1 and keeps every request.

    `behaviour`: "ok", "slow" (answers after a second), "500", "401", "html" (a captive portal's page), "cut" (closes
    connections unanswered), "torn" (in the middle of the answer) or "hang" (answers when the server is closed only); may
    be changed while clients talk to it. `history` holds (seconds since start, run id, row) as they arrive.
    """

    def __init__(self, behaviour: str = "ok") -> None:
        self.behaviour = behaviour
        self.history: list[tuple[float, str, dict[str, Any]]] = []
        self.summary: dict[str, dict[str, Any]] = {}
        self.upserts: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.uploads: dict[str, bytes] = {}
        self.operations: list[str] = []
        self.exits: dict[str, int] = {}
        self.projects: list[str] = ["p"]
        self.views: dict[str, dict[str, Any]] = {}
        self.released = threading.Event()
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """A run's history as the server has it: by line, a line that was sent again replacing the earlier one."""
        with self._lock:
            return [row for _, row in sorted(self.lines.get(run_id, {}).items())]

    def run(self, run_id: str) -> dict[str, Any]:
        """What was last said of a run: displayName, groupName, jobType, tags, and its config by key."""
        with self._lock:
            said = [upsert for upsert in self.upserts if upsert.get("name") == run_id]
        known = {key: value for upsert in said for key, value in upsert.items() if value is not None}
        config = json.loads(known.get("config") or "{}")
        return known | {"config": {key: item["value"] for key, item in config.items() if key != "_wandb"}}

    @property
    def run_ids(self) -> list[str]:
        """The runs that were announced, in order."""
        with self._lock:
            return list(dict.fromkeys(upsert["name"] for upsert in self.upserts if upsert.get("name")))

    def wait_for_rows(self, run_id: str, count: int, seconds: float) -> bool:
        """Whether at least `count` history rows of the run arrive within `seconds`."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if len(self.rows(run_id)) >= count:
                return True
            time.sleep(0.05)
        return False

    def answer_graphql(self, body: dict[str, Any]) -> dict[str, Any]:
        query, variables = body.get("query", ""), body.get("variables") or {}
        with self._lock:
            self.operations.append(query.strip().split("(")[0].split("{")[0].strip())
        if "upsertBucket" in query:
            return self._upsert(variables)
        if "upsertView" in query:
            return self._upsert_view(variables)
        if "allViews" in query:
            return self._all_views(variables)
        if "ProjectInternalId" in query:
            return {"data": {"project": {"id": "p1", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}}
        if "models(" in query:
            return self._all_projects()
        if "createRunFiles" in query:
            return self._run_files(variables)
        if "createArtifact(" in query:
            return self._artifact(variables)
        if "createArtifactManifest" in query:
            return self._manifest(variables)
        if "createArtifactFiles" in query:
            return self._artifact_files(variables)
        if "commitArtifact" in query:
            return {"data": {"commitArtifact": {"artifact": {"id": "artifact", "digest": "digest"}}}}
        if "viewer" in query:
            return {
                "data": {
                    "viewer": {
                        "id": "1",
                        "entity": "tester",
                        "username": "tester",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            }
        if "RunResumeStatus" in query or "RunStatus" in query:
            model = {"id": "1", "name": "p", "entity": {"id": "1", "name": "tester"}}
            return {"data": {"model": model | {"bucket": self._bucket(str(variables.get("name")))}}}
        return {"errors": [{"message": "not known to the loopback server"}]}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        """What a client is told that wants to go on with a run; None for one that the server does not have."""
        if name not in self.run_ids:
            return None
        rows, known = self.rows(name), self.run(name)
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": known.get("displayName"),
            "summaryMetrics": json.dumps(self.summary.get(name, {})),
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps({key: {"value": value} for key, value in known["config"].items()}),
            "tags": known.get("tags") or [],
            "notes": None,
            "wandbConfig": '{"t": 1}',  # without it the client takes the run for one that never began
        }

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self.upserts.append(variables)
        name = variables.get("name") or "run"
        project = {
            "id": "p1",
            "name": variables.get("project") or "p",
            "entity": {"id": "e1", "name": "tester"},
        }
        bucket = {
            "id": f"id-{name}",
            "name": name,
            "displayName": variables.get("displayName") or name,
            "description": "",
            "config": "{}",
            "sweepName": None,
            "historyLineCount": 0,
            "project": project,
        }
        return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}

    def _upsert_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        """A saved workspace view (type project-view) or a report (type runs)."""
        with self._lock:
            view = dict(variables) | {"id": variables.get("id") or f"view{len(self.views)}"}
            inserted = view["id"] not in self.views
            self.views[view["id"]] = view
        project = {"id": "p1", "name": view["projectName"], "entityName": view["entityName"]}
        return {"data": {"upsertView": {"view": view | {"project": project}, "inserted": inserted}}}

    def _all_views(self, variables: dict[str, Any]) -> dict[str, Any]:
        if (variables.get("project") or variables.get("projectName")) not in self.projects:
            return {"data": {"project": None}}
        kind, name = variables.get("viewType") or "runs", variables.get("viewName")
        found = [v for v in self.views.values() if v["type"] == kind and name in (None, v["name"])]
        edges = [{"node": view, "cursor": view["id"]} for view in found]
        page = {"endCursor": None, "hasNextPage": False}
        return {"data": {"project": {"allViews": {"edges": edges, "pageInfo": page}}}}

    def _all_projects(self) -> dict[str, Any]:
        common = {"entityName": "tester", "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
        nodes = [{"id": name, "name": name, **common} for name in self.projects]
        page = {"endCursor": None, "hasNextPage": False}
        return {"data": {"models": {"edges": [{"node": node} for node in nodes], "pageInfo": page}}}

    def _run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        names = variables.get("files") or []
        files = [{"name": n, "uploadUrl": f"{self.url}/upload/{variables.get('run')}/{n}"} for n in names]
        return {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}}

    def _artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = {
            "id": "artifact",
            "state": "PENDING",
            "artifactSequence": {"id": "sequence", "latestArtifact": None},
        }
        return {"data": {"createArtifact": {"artifact": artifact}}}

    def _manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        file = {
            "id": "file",
            "name": "wandb_manifest.json",
            "displayName": "wandb_manifest.json",
            "uploadUrl": f"{self.url}/upload/artifact/wandb_manifest.json",
            "uploadHeaders": [],
        }
        return {"data": {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}}

    def _artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {
                "node": {
                    "id": "f",
                    "name": spec["name"],
                    "displayName": spec["name"],
                    "storagePath": spec["name"],
                    "uploadUrl": f"{self.url}/upload/artifact/{spec['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": "artifact"},
                }
            }
            for spec in (variables.get("input") or {}).get("artifactFiles") or []
        ]
        return {"data": {"createArtifactFiles": {"files": {"edges": edges}}}}

    def take_stream(self, run_id: str, body: dict[str, Any]) -> None:
        files = body.get("files") or {}
        now = time.monotonic() - self._began
        with self._lock:
            history = files.get("wandb-history.jsonl", {})
            for number, line in enumerate(history.get("content", []), start=int(history.get("offset") or 0)):
                self.history.append((now, run_id, json.loads(line)))
                self.lines.setdefault(run_id, {})[number] = json.loads(line)
            for line in files.get("wandb-summary.json", {}).get("content", []):
                self.summary[run_id] = json.loads(line)
            if body.get("complete"):
                self.exits[run_id] = int(body.get("exitcode") or 0)


def _handler(server: LoopbackWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _reply(self, status: int, body: dict[str, Any]) -> None:
            self._send(status, "application/json", json.dumps(body).encode())

        def _send(self, status: int, kind: str, data: bytes, promised: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(promised or len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _misbehaves(self) -> bool:
            match server.behaviour:
                case "hang":
                    server.released.wait()
                    self.close_connection = True
                    return True
                case "cut":
                    self.close_connection = True
                    return True
                case "slow":
                    time.sleep(1.0)
                case "html":
                    self._send(200, "text/html", b"<html><body>Please accept the terms of this network</body></html>")
                    return True
                case "torn":
                    self._send(200, "application/json", b'{"data": {"upsertBu', promised=400)
                    self.close_connection = True
                    return True
                case "500" | "401" as status:
                    self._reply(int(status), {"errors": [{"message": f"loopback {status}"}]})
                    return True
            return False

        def do_POST(self) -> None:
            raw = self._body()
            server.bodies.append(raw)
            if self._misbehaves():
                return
            try:
                body = json.loads(raw or b"{}")
            except ValueError:  # the client's telemetry, in a binary form
                self._reply(200, {})
                return
            if self.path.endswith("/file_stream"):
                server.take_stream(self.path.split("/")[-2], body)
                self._reply(200, {"exitcode": None, "limits": {}})
            else:
                self._reply(200, server.answer_graphql(body))

        def do_GET(self) -> None:
            if not self._misbehaves():
                self._reply(200, {})

        def do_PUT(self) -> None:
            raw = self._body()
            server.bodies.append(raw)
            if self._misbehaves():
                return
            server.uploads[self.path] = raw
            self.send_response(200)
            self.send_header("ETag", base64.b64encode(hashlib.md5(raw).digest()).decode())
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler
