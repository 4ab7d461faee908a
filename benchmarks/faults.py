"""kill -9 of a site, of a site's job, of the server, at random moments: does a run end with the same bits?

    python benchmarks/faults.py 20 [FOLDER]  # needs the extra nvflare; a server and three sites on this machine

Experiments follow each other until so many kills were made. What was killed is started again within a second,
as a service manager would. Each experiment is compared with the same one in one process.
"""

import random
import sys
import tempfile
import threading
import time
from pathlib import Path

SITES = ("kyiv", "oslo", "rome")
METHODS = ("fedavg", "feddlp")
ROUNDS = 20
SEED = 0
WITHIN = 5.0  # seconds after a round has ended since the last kill


def main(kills: int, kept: Path | None) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from consortium import SERVER, Consortium, squares

    from fedloom.deploy.submit import Consortium as Sites
    from fedloom.deploy.submit import run_across
    from fedloom.events import Ended, Event, Note
    from fedloom.recipe import load
    from fedloom.runs import run
    from fedloom.store import Store
    from fedloom.tensors import same

    rng, made, moved = random.Random(SEED), [], threading.Event()

    def strike(one: Consortium) -> None:
        while len(made) < kills:
            moved.wait()  # so that a slow machine has more than beginnings
            time.sleep(rng.uniform(0, WITHIN))
            if not moved.is_set():
                continue
            what = rng.choice((SERVER, *SITES))
            if whole := rng.random() < 0.6:
                one.kill(what)
            elif not one.kill_job(what):
                continue
            moved.clear()
            made.append(f"{what}" if whole else f"{what}'s job")
            print(f"{time.strftime('%H:%M:%S')} kill -9 of {made[-1]} ({len(made)})", flush=True)

    def watch(event: Event) -> None:
        if isinstance(event, Ended):
            moved.set()
        if isinstance(event, Note):
            print(f"{time.strftime('%H:%M:%S')} {event.text}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = kept or Path(scratch)
        manifests = squares(folder / "data", SITES)
        policy = f'methods = {list(METHODS)}\ntasks = ["classification"]'
        (folder / "squares.toml").write_text(
            f'[data]\nsource = "{manifests[""]}"\n[backbone]\nname = "clip-small"\n'
            '[task]\nkind = "classification"\nlabels = ["blue", "green", "red"]\n[method]\nname = "fedavg"\n'
            "[reference]\nrows = []\n[training]\nbatch = 4\n"
            f"[federation]\nrounds = {ROUNDS}\ndeadline = 300.0\n"
        )
        with Consortium(folder, "clip-small", {name: manifests[name] for name in SITES}, policy) as one:
            threading.Thread(target=strike, args=(one,), daemon=True).start()
            for i in range(kills):
                if len(made) >= kills:
                    break
                recipe = load(folder / "squares.toml", {"method.name": METHODS[i % 2], "federation.seed": i})
                before, began = len(made), time.monotonic()
                far = run_across(recipe, Sites(one.project, 300.0), folder / f"far-{i}", False, watch)
                moved.clear()
                seconds = time.monotonic() - began
                near = run(recipe, folder / f"near-{i}")
                equal = same(Store(far.folder / "server").before(ROUNDS)[1], near.shared)
                whole = all(len(line["answered"]) == len(SITES) for line in far.summary["roster"])
                print(
                    f"{METHODS[i % 2]}, seed {i}: {len(made) - before} kills, {seconds:.0f} s, "
                    f"same bits: {equal}, everyone in every round: {whole}",
                    flush=True,
                )
    print(f"{len(made)} kills: {sorted(made)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
