"""Runs what a rendered chart would run in containers as processes of this host.

What a container sees is kept: its command, arguments and environment, its ConfigMaps, Secrets and empty volumes, an
unprivileged user, a working directory that it cannot write to. What differs: paths of volumes become folders below a
temporary one, ports become free ones, names of services become 127.0.0.1, and there is no image: the tree itself stands
for /app, and a scheduler's lease is longer.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.adapter_store.redis_server import free_port
from tests.chart.rendering import NAMESPACE, RELEASE, Manifest, pod_templates
from tests.checkout import ROOT

READY_SECONDS = 100.0
NOBODY = 65534
_SCHEDULER = f"{RELEASE}-loraplex-scheduler"
_PORTS = (50051, 50052, 50053, 50060, 9151, 9152, 9153, 9160, 9251, 9252, 9253, 9260, 6379)


@dataclass
class Host:
    """The processes of one release. `folder` must be one that everybody may enter."""

    manifests: list[Manifest]
    folder: Path
    # Those that the chart refers to and does not make.
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ports: dict[tuple[str, int], int] = field(default_factory=dict)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(self) -> None:
        """Starts every container but the test's, once; of two schedulers both."""
        for name, pod in self._pods().items():
            for container in pod["spec"]["containers"]:
                self.processes[name] = self._spawn(name, pod["spec"], container)

    def await_ready(self) -> None:
        """By each container's own readiness probe."""
        deadline = time.monotonic() + READY_SECONDS
        pods = self._pods()
        for name, process in self.processes.items():
            (container,) = pods[name]["spec"]["containers"]
            while not self._is_ready(name, container["readinessProbe"]):
                assert process.poll() is None, f"{name} ended: {self.log(name)}"
                assert time.monotonic() < deadline, f"{name} is not ready: {self.log(name)}"
                time.sleep(0.1)

    def await_line(self, name: str, text: str) -> None:
        """Until the log of a process holds the text."""
        deadline = time.monotonic() + READY_SECONDS
        while text not in self.log(name):
            assert time.monotonic() < deadline, f"{name} does not say {text}: {self.log(name)}"
            time.sleep(0.1)

    def run_test(self, **replaced: str) -> "subprocess.CompletedProcess[str]":
        """The command of the `helm test` pod; `replaced` changes arguments by their flag."""
        name = f"{RELEASE}-loraplex-test"
        pod = deepcopy(pod_templates(self.manifests)[name]["spec"])
        (container,) = pod["containers"]
        container["args"] = [
            f"--{flag}={replaced[flag]}" if (flag := argument[2:].split("=")[0]) in replaced else argument
            for argument in container["args"]
        ]
        process = self._spawn(name, pod, container)
        process.wait(timeout=READY_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, self.log(name))

    def stop(self) -> dict[str, int]:
        """SIGTERM to all, as the kubelet does; exit codes by name."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        codes = {}
        for name, process in self.processes.items():
            try:
                codes[name] = process.wait(timeout=READY_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        return codes

    def _pods(self) -> dict[str, Manifest]:
        """By name; the standby's is a copy of the scheduler's."""
        pods = {name: pod for name, pod in pod_templates(self.manifests).items() if not name.endswith("-test")}
        if self._has_standby:
            pods[f"{_SCHEDULER}-1"] = pods[_SCHEDULER]
        return pods

    @property
    def _has_standby(self) -> bool:
        return bool(self._object("Deployment", _SCHEDULER)["spec"]["replicas"] == 2)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")

    def _spawn(self, name: str, pod: Manifest, container: Manifest) -> "subprocess.Popen[bytes]":
        mounts = self._mount(name, pod, container)
        program, *words = [self._here(name, word, mounts) for word in [*container["command"], *container["args"]]]
        environment = self._environment(name, container, mounts)
        if "/tmp" in mounts:
            environment["TMPDIR"] = str(mounts["/tmp"])
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [*unprivileged(), sys.executable if program == "python" else program, *words],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _environment(self, name: str, container: Manifest, mounts: Mapping[str, Path]) -> dict[str, str]:
        """As the container's: nothing of ours but the path, and where Python and the tree are."""
        environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        environment["GRPC_ENABLE_FORK_SUPPORT"] = "0"
        # A scheduler that a busy machine keeps waiting must not lose its lease for that.
        environment["LORAPLEX_LEASE_SECONDS"] = "10"
        for source in container.get("envFrom", []):
            environment |= self._object("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container.get("env", []):
            path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            known = {"status.podIP": "127.0.0.1", "metadata.name": f"{name}-0"}
            text = known[path] if path else variable["value"]
            environment[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], text)
        return {key: self._here(name, value, mounts, key) for key, value in environment.items()}

    def _mount(self, name: str, pod: Manifest, container: Manifest) -> dict[str, Path]:
        """Mount path -> folder with what the volume holds."""
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: self.folder / name / mount["name"] for mount in container.get("volumeMounts", [])}
        for mount in container.get("volumeMounts", []):
            folder, volume = mounts[mount["mountPath"]], volumes.get(mount["name"], {})
            folder.mkdir(parents=True, exist_ok=True)
            files: dict[str, str] = {}
            if "configMap" in volume:
                files = self._object("ConfigMap", volume["configMap"]["name"])["data"]
            elif "secret" in volume:
                files = self._secret(volume["secret"])
            for file, text in files.items():
                (folder / file).write_text(self._here(name, text, mounts), encoding="utf-8")
            if not files and os.getuid() == 0:
                os.chown(folder, NOBODY, NOBODY)
        return mounts

    def _secret(self, volume: Manifest) -> dict[str, str]:
        """File -> text."""
        name = volume["secretName"]
        held = self.secrets[name] if name in self.secrets else self._object("Secret", name)["stringData"]
        items = volume.get("items", [{"key": key, "path": key} for key in held])
        return {item["path"]: held[item["key"]] for item in items}

    def _here(self, name: str, text: str, mounts: Mapping[str, Path], key: str = "") -> str:
        """A word of the container in the terms of this host."""
        if key in ("LORAPLEX_PORT", "LORAPLEX_METRICS_PORT", "LORAPLEX_HEALTH_PORT"):
            return str(self.port(name, int(text)))
        places = {**mounts, "/app": ROOT}
        pattern = "|".join(re.escape(path) for path in sorted(places, key=len, reverse=True))
        text = re.sub(rf"(?<![\w/.-])({pattern})(?=/|\s|$)", lambda match: str(places[match[1]]), text)
        text = re.sub(r"(?m)^port (\d+)$", lambda match: f"port {self.port(name, int(match[1]))}", text)
        # A pod of a StatefulSet, by its own name below the Service's.
        text = re.sub(rf"{RELEASE}-loraplex-[a-z-]+-0\.({RELEASE}-loraplex-[a-z-]+)\.{NAMESPACE}\.svc:", r"\1:", text)
        text = re.sub(
            rf"({RELEASE}-loraplex-[a-z-]+):(\d+)", lambda match: self._address(match[1], int(match[2])), text
        )
        return re.sub(r"127\.0\.0\.1:(\d+)", lambda match: self._own(name, int(match[1])), text)

    def _address(self, name: str, port: int) -> str:
        if name == _SCHEDULER and port == 50052 and self._has_standby:
            # What the headless service's name resolves to.
            both = ",".join(f"127.0.0.1:{self.port(pod, port)}" for pod in (name, f"{name}-1"))
            return f"ipv4:{both}"
        return f"127.0.0.1:{self.port(name, port)}"

    def _own(self, name: str, port: int) -> str:
        return self._address(name, port) if port in _PORTS else f"127.0.0.1:{port}"

    def port(self, name: str, port: int) -> int:
        return self.ports.setdefault((name, port), free_port())

    def password(self) -> str:
        """Of the bundled Redis."""
        (secret,) = [manifest for manifest in self.manifests if manifest["kind"] == "Secret"]
        return str(secret["stringData"]["password"])

    def _object(self, kind: str, name: str) -> Manifest:
        (found,) = [m for m in self.manifests if m["kind"] == kind and m["metadata"]["name"] == name]
        return found

    def _is_ready(self, name: str, probe: Manifest) -> bool:
        if "tcpSocket" in probe:
            return _listens(self.port(name, 6379))
        with grpc.insecure_channel(f"127.0.0.1:{self.port(name, probe['grpc']['port'])}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
                serving = stub.Check(request, timeout=5).status == health_pb2.HealthCheckResponse.SERVING
            except grpc.RpcError:
                return False
            return bool(serving)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def unprivileged() -> list[str]:
    """What to put before a command to run it as nobody; whoever is not root has no privilege to give up.

    Where a stranger may not even read the interpreter (it may stand in root's home), nobody may read, and no more.
    """
    if os.getuid() != 0:
        return []
    plain = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
    bare = [*plain, "--bounding-set=-all"]
    asked = [*bare, sys.executable, "-c", "import sys; print(sys.version, sys.prefix)"]
    if subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip() == f"{sys.version} {sys.prefix}":
        return bare
    read_only = "-all,+dac_read_search"
    return [*plain[:-1], f"--inh-caps={read_only}", f"--ambient-caps={read_only}", f"--bounding-set={read_only}"]
