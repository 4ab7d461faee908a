"""What a round costs beyond FLARE's own exchange: both in one job, in turn, with updates of 4 KB, 10 MB and 100 MB.

    python benchmarks/overhead.py [FOLDER]   # needs the extra nvflare; a server and three sites on this machine

floor: the same bytes there and back, by FLARE alone, to all sites at once
round: RemoteEngine.round, the updates read, checked, written down and averaged; at the sites too, which do all of a
       round but train

Seconds are medians; those of CPU are of the jobs' processes, the server's and all sites', together, and mean something
also where other work shares the machine.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fedloom.deploy.audit import Audit
from fedloom.engines.messages import Message, sent
from fedloom.engines.nvflare import FlareLink, Leading, Listening, settled
from fedloom.engines.remote import Limits, RemoteEngine
from fedloom.federation import admit
from fedloom.methods import FedAvg
from fedloom.site import Answer, Update
from fedloom.tensors import Shared, to_bytes
from fedloom.wire import Wire

SITES = ("kyiv", "oslo", "rome")
SIZES = {"4 KB": 2**12, "10 MB": 10 * 2**20, "100 MB": 100 * 2**20}
TIMES = int(os.environ.get("FEDLOOM_TIMES", "3"))
ROUNDS = int(os.environ.get("FEDLOOM_ROUNDS", "20"))  # of 100 MB, whose memory is watched


class Echo(Listening):
    """A site that does not train."""

    def open(self, kit: Path) -> Callable[[Message], dict[str, Any]]:
        torch.set_num_threads(1)
        audit, wire = Audit(kit / "audit.log"), Wire()
        settled()

        def answer(message: Message) -> dict[str, Any]:
            reply = {"nonce": message.get("nonce", "")}
            match message.get("kind"):
                case "floor":
                    return {**reply, "frame": message["frame"]}
                case "round":
                    audit.frame("0" * 32, "came from the server", message["frame"])
                    shared = wire.given(message["frame"])
                    frame, _ = wire.send("", shared, shared, {})
                    audit.frame("0" * 32, "sent to the server", frame)
                    return {**reply, **sent(Update(Shared({}), 1.0, 1), frame)}
                case "cpu":
                    return {**reply, "cpu": time.process_time()}
            return reply

        return answer


class Measure(Leading):
    """A server that measures."""

    def told(self, question: dict[str, Any]) -> dict[str, Any]:
        return {}

    def lead(self, kit: Path, link: FlareLink, aborted: Callable[[], bool]) -> None:
        torch.set_num_threads(1)
        audit, method = Audit(kit / "audit.log"), FedAvg()
        engine = RemoteEngine(
            link, "0" * 32, method, limits=Limits(deadline=300), seen=lambda site, text: audit.note("0" * 32, text)
        )
        engine.ready(SITES)
        settled()
        figures: dict[str, Any] = {}
        for name, size in SIZES.items():
            shared = Shared({"0/A": torch.rand(size // 4)})
            frame = to_bytes(shared)

            def floor(frame: bytes = frame) -> None:
                with ThreadPoolExecutor(len(SITES)) as pool:
                    message = {"kind": "floor", "nonce": "0", "frame": frame}
                    list(pool.map(lambda site: len(link.ask(site, message, 300)["frame"]), SITES))

            def round(shared: Shared = shared) -> None:
                def answers() -> Any:
                    for reply in engine.round(0, shared, SITES):
                        assert isinstance(reply, Answer), reply
                        admit(reply, shared, method)
                        yield reply

                method.aggregate(shared, answers())

            def cpu() -> float:
                asked = {"kind": "cpu", "nonce": "0"}
                return time.process_time() + sum(link.ask(site, asked, 300)["cpu"] for site in SITES)

            seconds: dict[str, list[float]] = {key: [] for key in ("floor", "round", "floor, CPU", "round, CPU")}
            for i in range(TIMES + 1):
                for what, work in (("floor", floor), ("round", round)):
                    busy, began = cpu(), time.perf_counter()
                    work()
                    if i:  # the first of each warms up
                        seconds[what].append(time.perf_counter() - began)
                        seconds[f"{what}, CPU"].append(cpu() - busy)
            figures[name] = {what: statistics.median(times) for what, times in seconds.items()}
        memory: dict[str, list[int]] = {"peak": [], "after": []}
        for _ in range(ROUNDS):
            round()
            memory["peak"].append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
            memory["after"].append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20)
        (kit / "overhead.json").write_text(json.dumps({"seconds": figures, "mib_by_round": memory}))


def main(kept: Path | None) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from consortium import PROJECT, SERVER, Consortium, squares

    from fedloom.deploy.kits import command
    from fedloom.deploy.session import Session

    with tempfile.TemporaryDirectory() as scratch:
        folder = kept or Path(scratch)
        manifests = squares(folder / "data", SITES)
        policy = 'methods = ["fedavg"]\ntasks = ["classification"]'
        one = Consortium(folder, "clip-small", {name: manifests[name] for name in SITES}, policy)
        kits = {SERVER: one.project / "server", **{name: folder / name / "kit" for name in SITES}}
        for name, kit in kits.items():
            path = kit / "local" / "resources.json"
            listed = "overhead.Measure" if name == SERVER else "overhead.Echo"
            path.write_text(json.dumps({**json.loads(path.read_text()), "class_allow_list": [listed]}))
            one.commands[name] = command(kit, "server" if name == SERVER else "site")
        with one, Session(one.project / "coordinator", 300) as session:
            name = session.submit(_job(folder))
            while not (status := session.status(name)).startswith("FINISHED"):
                time.sleep(1)
            result = kits[SERVER] / "overhead.json"
            if not result.is_file():
                sys.exit(f"{PROJECT}: {status}\n{(folder / 'server.log').read_text()[-3000:]}")
            print(result.read_text())


def _job(folder: Path) -> Path:
    job = folder / "overhead"
    (job / "app" / "config").mkdir(parents=True, exist_ok=True)
    meta = {"name": "overhead", "resource_spec": {}, "min_clients": len(SITES), "deploy_map": {"app": ["@ALL"]}}
    (job / "meta.json").write_text(json.dumps(meta))
    executor = {"path": "overhead.Echo", "args": {}}
    parts = {
        "server": {"workflows": [{"id": "measure", "path": "overhead.Measure", "args": {}}]},
        "client": {"executors": [{"tasks": ["none"], "executor": executor}]},
    }
    for name, part in parts.items():
        path = job / "app" / "config" / f"config_fed_{name}.json"
        path.write_text(json.dumps({"format_version": 2, **part}))
    return job


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
