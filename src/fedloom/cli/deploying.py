"""deploy, server, site: a federation across real sites."""

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.app import app
from fedloom.errors import DeployError

deploy = typer.Typer(no_args_is_help=True, help="Certificates and kits of a federation across real sites.")
server = typer.Typer(no_args_is_help=True, help="The server of a federation across real sites.")
site = typer.Typer(no_args_is_help=True, help="One site of a federation across real sites.")
for name, commands in {"deploy": deploy, "server": server, "site": site}.items():
    app.add_typer(commands, name=name)

Project = Annotated[Path, typer.Option("--project", metavar="DIR", help="The coordinator's folder.")]
Fingerprint = Annotated[
    str | None, typer.Option("--fingerprint", metavar="HEX", help="As the other side read it out; asked for if absent.")
]


@deploy.command(epilog="Example: fedloom deploy init consortium --host fl.example.org")
def init(
    project: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, of the coordinator's.")],
    host: Annotated[str, typer.Option("--host", metavar="NAME", help="Under which name sites reach the server.")],
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The one port that is open to sites.")] = 8002,
    title: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Else the folder's name.")] = None,
) -> None:
    """At the coordinator: the project, its certificate authority, the server's kit and the coordinator's own."""
    from fedloom.deploy.kits import init as begin

    fingerprint = begin(project, title or project.resolve().name, host, port)
    print(f"Server: fedloom server start --project {project}")
    print(f"Tell every site, over the telephone:\n  project      {title or project.resolve().name}")
    print(f"  fingerprint  {fingerprint}")


@deploy.command(epilog="Example: fedloom deploy join oslo --project-name consortium")
def join(
    name: Annotated[str, typer.Argument(metavar="NAME", help="This site's name, in the roster and in every figure.")],
    project: Annotated[str, typer.Option("--project-name", metavar="NAME", help="As the coordinator said.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="A new folder; else ./NAME.")] = None,
) -> None:
    """At a site: a key, which stays here, and a request to send to the coordinator."""
    from fedloom.deploy.kits import join as ask

    request, fingerprint = ask(name, project, out or Path(name))
    print(f"Send {request} to the coordinator, and read out to them:\n  {fingerprint}")


@deploy.command(epilog="Example: fedloom deploy approve oslo.request.zip --project consortium")
def approve(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="What the site sent.")],
    project: Project = Path(),
    fingerprint: Fingerprint = None,
) -> None:
    """At the coordinator: sign a site's request."""
    from fedloom.deploy.kits import approve as sign

    signed = sign(request, project, fingerprint or typer.prompt("The request's fingerprint, as the site reads it out"))
    print(f"Send {signed} back to the site.")


@deploy.command(epilog="Example: fedloom deploy package oslo.signed.zip --in oslo")
def package(
    signed: Annotated[Path, typer.Argument(metavar="SIGNED", help="What the coordinator sent back.")],
    folder: Annotated[Path, typer.Option("--in", metavar="DIR", help="Where `fedloom deploy join` put the key.")],
    fingerprint: Fingerprint = None,
) -> None:
    """At a site: the kit, locked: it starts no code but fedloom's own."""
    from fedloom.deploy.kits import package as make

    asked = fingerprint or typer.prompt("The project's fingerprint, as the coordinator reads it out")
    print(f"{make(signed, folder, asked)}")
    print(f"Fill in {folder / 'site.toml'}, then: fedloom site start --config {folder / 'site.toml'}")


@deploy.command(epilog="Example: fedloom deploy fingerprint vilt-small")
def fingerprint(
    backbone: Annotated[str, typer.Argument(metavar="BACKBONE", help="One that comes with fedloom, or a folder.")],
) -> None:
    """The SHA-256 of a backbone's files, as a site's policy names it."""
    from fedloom.deploy.policy import fingerprint as measured

    print(measured(backbone))


@deploy.command(epilog="Example: fedloom deploy status --project consortium")
def status(project: Project = Path()) -> None:
    """At the coordinator: the sites, when they were last seen, their versions, and whether their data changed."""
    from fedloom.deploy.look import status as lines

    for line in lines(project):
        print(line)


@deploy.command(epilog="Example: fedloom deploy doctor oslo/kit")
def doctor(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="A server's, a site's or a coordinator's.")],
) -> None:
    """Look for what would stand in the way: port, certificates and their days, versions, disk, clock."""
    from fedloom.deploy.look import doctor as findings

    found = list(findings(kit))
    for one in found:
        print(f"{'good' if one.good else 'BAD '}  {one.text}")
    if bad := sum(not one.good for one in found):
        raise DeployError(f"{bad} of {len(found)} findings are bad.")


@server.command("start", epilog="Example: fedloom server start --project consortium")
def start_server(
    project: Project = Path(),
    limits: Annotated[
        Path | None, typer.Option("--limits", metavar="FILE", help="TOML: beat, patience, bytes, norm.")
    ] = None,
) -> None:
    """Start the server, in the foreground."""
    from fedloom.deploy.start import become, server

    kit = (project / "server").resolve()
    server(kit, limits)
    become(kit, "server")


@site.command("start", epilog="Example: fedloom site start --config site.toml")
def start_site(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="This site's own file.")],
) -> None:
    """Check and lock this site, and start it, in the foreground."""
    from fedloom.deploy.start import become
    from fedloom.deploy.start import site as locked

    become(Path(locked(config).kit), "site")
