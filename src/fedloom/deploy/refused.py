"""What FLARE refuses, in a log that a person reads: by itself it writes some of it among all else, and some nowhere.

Part of a server and of each site, by their kits' resources.json and log_config.json (`kits.lock`). No job can name it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.sec.authz import AuthorizationService

from fedloom.deploy.audit import Audit
from fedloom.errors import StoreError

MOST = 400  # letters of what FLARE says
TOLD = ("ClientManager", "FederatedServer", "JobRunner", "worker_process")  # which of its parts refuse something


class Refused(FLComponent):  # type: ignore[misc]
    """Writes down who asked for what they may not do."""

    def __init__(self, log: str) -> None:
        super().__init__()
        self._audit = Audit(Path(log))

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_BOOTSTRAP and (rights := AuthorizationService.get_authorizer()):
            AuthorizationService.the_authorizer = _Rights(rights, self._audit)


@dataclass(frozen=True)
class _Rights:
    """FLARE's own, listened to."""

    rights: Any
    audit: Audit

    def authorize(self, ctx: Any) -> tuple[bool, str]:
        allowed, why = self.rights.authorize(ctx)
        if not allowed:
            self.audit.note("", f"refused: '{ctx.right}' of {ctx.user.name} ({ctx.user.role or 'no role'}): {why}")
        return allowed, why


class Errors(logging.Handler):
    """Writes down errors of the parts that refuse: a name that is not the certificate's, a class that is not listed."""

    def __init__(self, log: str) -> None:
        super().__init__(logging.ERROR)
        self._audit = Audit(Path(log))

    def emit(self, record: logging.LogRecord) -> None:
        part = record.name.rpartition(".")[2]
        if part not in TOLD:
            return
        try:
            self._audit.note("", f"{part}: {record.getMessage()[:MOST]}")
        except (StoreError, TypeError, ValueError):  # a full disk, or arguments that do not fit: told on stderr, as by
            self.handleError(record)  # every handler, and no reason to end what is being told of
