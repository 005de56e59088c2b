"""Several machines on one: each node is a network, a host name and folders of its own.

    with Nodes(folder) as nodes:
        first = nodes.train(1, "--nnodes", "2", ...)      # falcon-qlora train, as typed on node1
        nodes.kill(2)

Nodes are Linux namespaces on a bridge, which an ordinary user may make where the system allows user
namespaces; `why_not` says why it cannot be done here. They share the disk, but each has its own working
folder, home and caches.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.integration import forks
from tests.integration.runs import ENVIRONMENT, each_once

REPOSITORY = Path(__file__).resolve().parents[2]
PORT = 29_400


@functools.cache
def why_not() -> str | None:
    """Why this machine cannot make nodes; None where it can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"nodes need {', '.join(missing)}"
    words = [
        "unshare",
        "-Urnm",
        "sh",
        "-c",
        "ip link add hub type bridge && ip link add v1 type veth peer name v2",
    ]
    tried = subprocess.run(words, capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()[:200]}" if tried.returncode else None


def address(node: int) -> str:
    return f"10.77.0.{node}"


class Nodes:
    """Nodes named node1, node2, …

    Args:
        folder: gets a folder for each, in which its commands run.
        count: how many.
    """

    def __init__(self, folder: Path, count: int = 3):
        self.folder = folder
        self._places: dict[int, int] = {}
        self._hub = self._holding(["unshare", "-Urnm"])
        self._in(self._hub.pid, "ip", "link", "add", "hub", "type", "bridge")
        self._in(self._hub.pid, "ip", "link", "set", "hub", "up")
        hosts = folder / "hosts"
        names = [f"{address(node)} node{node}\n" for node in range(1, count + 1)]
        hosts.write_text("".join(["127.0.0.1 localhost\n", *names]))
        self._held = [self._hub]
        for node in range(1, count + 1):
            (folder / f"node{node}").mkdir()
            held = self._holding([*_entering(self._hub.pid), "unshare", "-n", "-u", "-m"])
            self._held.append(held)
            self._places[node] = held.pid
            peer = ["peer", "name", "eth0", "netns", str(held.pid)]
            self._in(self._hub.pid, "ip", "link", "add", f"v{node}", "type", "veth", *peer)
            self._in(self._hub.pid, "ip", "link", "set", f"v{node}", "master", "hub", "up")
            for words in (
                ["ip", "addr", "add", f"{address(node)}/24", "dev", "eth0"],
                ["ip", "link", "set", "eth0", "up"],
                ["ip", "link", "set", "lo", "up"],
                ["hostname", f"node{node}"],
                ["mount", "--bind", str(hosts), "/etc/hosts"],
            ):
                self._in(held.pid, *words)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        for node in self._places:
            self.kill(node)
        for held in reversed(self._held):
            held.kill()
            held.wait()

    def at(self, node: int) -> Path:
        """The folder of a node."""
        return self.folder / f"node{node}"

    def start(self, node: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start ``python -m COMMAND`` on a node."""
        home = self.folder / f"home{node}"
        home.mkdir(exist_ok=True)
        given = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
        given |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")} | environment
        words = [sys.executable, "-m", *each_once(command)]
        options: dict[str, Any] = {
            "cwd": self.at(node),
            "env": given | {forks.NAMESPACES: str(self._places[node])},
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
        }
        if forks.can_fork(given):
            return forks.Popen(words, **options)
        inside = ["env", "-C", str(self.at(node)), *words]  # a folder that is entered before is another mount
        return subprocess.Popen([*_entering(self._places[node]), *inside], **options)

    def train(
        self, node: int, *words: str, module: str = "falcon_qlora", **environment: str
    ) -> subprocess.Popen[str]:
        """Start ``falcon-qlora train`` on a node, which meets the others at node1."""
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"node1:{PORT}", "--gpus", "1"]
        return self.start(node, module, "train", *meeting, *words, **environment)

    def clear(self) -> None:
        """Empty the folders of all nodes; what they have cached stays."""
        for folder in (self.folder / f"node{node}" for node in self._places):
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def cut(self, node: int, *, off: bool = True) -> None:
        """Cut a node off from the others, or not any longer."""
        self._in(self._hub.pid, "ip", "link", "set", f"v{node}", "down" if off else "up")

    def kill(self, node: int) -> None:
        """Kill everything that runs on a node, as a power cut would."""
        for process in self.running(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def running(self, node: int) -> list[int]:
        """The processes of a node."""
        network, found = os.readlink(f"/proc/{self._places[node]}/ns/net"), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                if int(process.name) != self._places[node] and os.readlink(process / "ns/net") == network:
                    found.append(int(process.name))
        return found

    def none_left(self, within_s: float = 5.0) -> bool:
        """Whether nothing runs on any node any more."""
        deadline = time.monotonic() + within_s
        while any(map(self.running, self._places)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not any(map(self.running, self._places))

    def _in(self, place: int, *words: str) -> None:
        subprocess.run([*_entering(place), *words], check=True, capture_output=True)

    @staticmethod
    def _holding(words: list[str]) -> subprocess.Popen[bytes]:
        """A process that holds new namespaces, once it has them; it ends with this one."""
        held = subprocess.Popen([*words, "cat"], stdin=subprocess.PIPE)
        while Path(f"/proc/{held.pid}/comm").read_text().strip() != "cat":
            assert held.poll() is None
            time.sleep(0.01)
        return held


def _entering(place: int) -> list[str]:
    return ["nsenter", "-t", str(place), "-U", "-n", "-u", "-m", "--preserve-credentials", "--"]
