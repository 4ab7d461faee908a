"""Starting a server or a site in the foreground, as a service manager wants it."""

import os
from pathlib import Path
from typing import NoReturn

import tomli_w

from fedloom.backbones.devices import device
from fedloom.data import read
from fedloom.deploy.kits import REFUSED_LOG, Kind, command, environment, lock
from fedloom.deploy.look import answered, sound
from fedloom.deploy.overheard import listener
from fedloom.deploy.policy import SiteConfig, fingerprint, load_limits, load_site
from fedloom.errors import DeployError
from fedloom.store import write
from fedloom.tables import plain

PATIENCE = 30.0  # seconds for a server that begins at the same moment


def site(path: Path) -> SiteConfig:
    """Check a site's own file and all that it names, and lock its kit; raises a FedloomError, in one sentence."""
    config = load_site(path)
    kit = Path(config.kit)
    lock(kit, "site")
    if (own := command(kit, "site")[-3].partition("=")[2]) != config.name:
        raise DeployError(f"{path} is of the site '{config.name}', and the certificate in '{kit}' of '{own}'.")
    for name, backbone in config.policy.backbones.items():
        if (found := fingerprint(backbone.folder or name)) != backbone.sha256:
            raise DeployError(f"the backbone '{name}' here has the SHA-256 {found}; {path} says {backbone.sha256}.")
    device(config.device)
    read(config.data.source)
    sound(kit)
    answered(kit, PATIENCE)
    # What a job's process reads is a copy inside the kit, its paths absolute.
    write(kit / "local" / "site.toml", tomli_w.dumps(plain(config)).encode())
    return config


def server(kit: Path, limits: Path | None) -> None:
    """Check and lock a server's kit, and write the limits of a file into it."""
    lock(kit, "server")
    sound(kit)
    if limits is not None:
        load_limits(limits, 1.0)
        write(kit / "local" / "server.toml", limits.read_bytes())


def become(kit: Path, kind: Kind) -> NoReturn:
    """This process turns into FLARE's."""
    start = command(kit, kind)
    if kind == "server":
        os.dup2(listener(kit / REFUSED_LOG, environment())[0], 2)
    os.chdir(kit)
    os.execve(start[0], start, dict(environment()))
