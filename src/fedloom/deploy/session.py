"""The coordinator's connection to the server, which comes back by itself when the server does."""

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedloom.deploy.kits import needs_nvflare
from fedloom.engines.messages import TOPIC
from fedloom.errors import DeployError, LinkError

T = TypeVar("T")


class Session:
    """A context: connects when it is first used, and again after the server was away."""

    def __init__(self, kit: Path, patience: float = 120.0) -> None:
        needs_nvflare()
        if not (kit / "startup" / "fed_admin.json").is_file():
            raise DeployError(f"'{kit}' is no coordinator's kit: fedloom deploy init makes one.")
        self.kit, self.patience = kit.resolve(), patience
        self._flare: Any = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def submit(self, job: Path) -> str:
        """Submit a job: its id."""
        return str(self._asked(lambda flare: flare.submit_job(str(job))))

    def ask(self, job: str, question: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a running job answers; None where it is not running."""
        from nvflare.fuel.flare_api.api_spec import InternalError, JobNotFound, JobNotRunning, NoReply

        def asked(flare: Any) -> dict[str, Any] | None:
            try:
                answer: dict[str, Any] = flare.do_app_command(job, TOPIC, dict(question))
                return answer
            except (JobNotFound, JobNotRunning, NoReply, InternalError):
                return None

        return self._asked(asked)

    def status(self, job: str) -> str:
        """What FLARE calls the state of a job."""
        return str(self._asked(lambda flare: flare.get_job_status(job)))

    def abort(self, job: str) -> None:
        """End a job, if it has not ended."""

        def ending(flare: Any) -> None:
            with contextlib.suppress(Exception):  # of a job that has ended, FLARE says so in many ways
                flare.abort_job(job)

        self._asked(ending)

    def end(self, job: str) -> None:
        """End a job, and wait until nobody works on it."""
        self.abort(job)
        until = time.monotonic() + self.patience
        while self.ask(job, {}) is not None and time.monotonic() < until:
            time.sleep(0.5)

    def sites(self) -> dict[str, float]:
        """The sites that are connected, and when the server last heard of each, by its clock."""
        info = self._asked(lambda flare: flare.get_system_info())
        return {client.name: float(client.last_connect_time) for client in info.client_info}

    def _asked(self, question: Callable[[Any], T]) -> T:
        from nvflare.fuel.flare_api.api_spec import (
            AuthenticationError,
            AuthorizationError,
            InvalidJobDefinition,
            NoConnection,
            SessionClosed,
        )

        until = time.monotonic() + self.patience
        while True:
            try:
                return question(self._connected())
            except (NoConnection, SessionClosed, AuthenticationError, ConnectionError) as e:
                self._close()
                if time.monotonic() > until:
                    raise LinkError(f"the server did not answer within {self.patience:g} s ({e}).") from None
                time.sleep(1)
            except (AuthorizationError, InvalidJobDefinition) as e:
                raise DeployError(f"the server refused: {e}.") from None

    def _connected(self) -> Any:
        if self._flare is None:
            from nvflare.fuel.flare_api.flare_api import new_secure_session

            from fedloom.deploy.kits import admin_of

            logging.getLogger("nvflare").setLevel(logging.CRITICAL)
            # FLARE says that it connects, and that it does not in many ways.
            with _inside(self.kit), contextlib.redirect_stdout(io.StringIO()):
                try:
                    self._flare = new_secure_session(admin_of(self.kit), str(self.kit), timeout=10.0)
                except Exception as e:
                    raise ConnectionError(str(e)) from e
        return self._flare

    def _close(self) -> None:
        if self._flare is not None:
            with contextlib.suppress(Exception):
                self._flare.close()
            self._flare = None


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """FLARE makes its folders for transfers in the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
