"""bench: how fast, and against what."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fedloom.cli.app import app
from fedloom.errors import RunError

if TYPE_CHECKING:
    from fedloom.bench.shapes import Size


@app.command(epilog="Example: fedloom bench lora-step feddlp-step --size small --out bench.json")
def bench(
    workloads: Annotated[
        list[str] | None, typer.Argument(metavar="[WORKLOAD]...", help="See --list; else all.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show every workload.")] = False,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="small, base (ViT-B/32) or both.")] = "both",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often each variant of a step runs.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the figures as JSON too.")] = None,
) -> None:
    """Measure this machine: each workload against its peers, as a ratio, with its goal and its floor."""
    from fedloom.bench import WORKLOADS, Options, table
    from fedloom.bench import bench as measure
    from fedloom.progress import watching
    from fedloom.store import write

    if listed:
        for name, workload in WORKLOADS.items():
            print(f"{name:<14} {(workload.__doc__ or '').splitlines()[0]}")
        return
    if size not in ("small", "base", "both"):
        raise RunError(f"there is no size '{size}'; expected small, base or both.")
    sizes = cast("tuple[Size, ...]", ("small", "base") if size == "both" else (size,))
    with watching() as watch:
        measured = measure(Options(tuple(workloads or WORKLOADS), sizes, repeats), watch)
    for line in table(measured.lines):
        print(line)
    for sentence in measured.left_out:
        print(sentence)
    if out is not None:
        write(out, measured.json().encode())
        print(f"\nFigures: {out}")
    if not measured.lines:
        raise RunError("nothing was measured.")
