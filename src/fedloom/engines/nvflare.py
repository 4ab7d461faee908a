"""NVIDIA FLARE carries the messages of `fedloom.engines.remote`, as auxiliary messages, pushed to one site each.

FLARE's own part is kept small: who is who (mutual TLS), starting a job's process at every site, and bytes. A message is
one table of numbers, texts and a safetensors frame; FLARE is asked to serialise no object of another kind.

Written for nvflare 2.9.
"""

import gc
import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedloom.engines.messages import TOPIC, Message
from fedloom.errors import LinkError

PAYLOAD = "message"
LARGE = 2**24  # bytes of a frame whose memory is not left to chance


@dataclass(frozen=True)
class FlareLink:
    """A link from a job's process at the server to the same job's process at each site."""

    engine: Any
    context: FLContext

    def ask(self, site: str, message: Message, seconds: float) -> Message:
        request = Shareable()
        request[PAYLOAD] = dict(message)
        with self.engine.new_context() as context:
            replies = self.engine.send_aux_request([site], TOPIC, request, seconds, context, optional=True)
        _freed(message)
        reply = (replies or {}).get(site)
        if not isinstance(reply, Shareable):
            raise LinkError("it is not in this job")
        if (code := reply.get_return_code()) != ReturnCode.OK:
            raise LinkError(f"it cannot be reached ({code})")
        payload = reply.get(PAYLOAD)
        if not isinstance(payload, dict):
            raise LinkError("its reply is no message")
        _freed(payload)
        return payload


def settled() -> None:
    """What is loaded now stays, and is not looked through each time that a large frame has crossed."""
    gc.collect()
    gc.freeze()


def _freed(message: Any) -> None:
    """What FLARE still holds of large frames that have crossed: a task and its future hold each other, and the bytes,
    until Python looks for such circles, which it does by the number of objects, whatever their size."""
    frame = message.get("frame") if isinstance(message, dict) else None
    if isinstance(frame, bytes) and len(frame) > LARGE:
        gc.collect()


class Listening(Executor):  # type: ignore[misc]
    """A site's end: hands every message to what `open` gives, and its reply back."""

    @abstractmethod
    def open(self, kit: Path) -> Callable[[Message], dict[str, Any]]:
        """What answers messages at the site of this kit."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            engine = fl_ctx.get_engine()
            self._answer = self.open(Path(engine.get_workspace().get_root_dir()))
            engine.register_aux_message_handler(TOPIC, self._heard)

    def _heard(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        message = request.get(PAYLOAD)
        _freed(message)
        reply = make_reply(ReturnCode.OK)
        reply[PAYLOAD] = self._answer(message if isinstance(message, dict) else {})
        return reply

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Nothing is asked for as a task."""
        return make_reply(ReturnCode.TASK_UNKNOWN)


class Leading(Controller):  # type: ignore[misc]
    """The server's end: runs `lead`, and answers the coordinator's questions while it goes on."""

    @abstractmethod
    def lead(self, kit: Path, link: FlareLink, aborted: Callable[[], bool]) -> None:
        """All that the job does."""

    @abstractmethod
    def told(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question of the coordinator's."""

    def start_controller(self, fl_ctx: FLContext) -> None:
        fl_ctx.get_engine().register_app_command(TOPIC, lambda topic, data, context: self.told(data or {}))

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        kit = Path(engine.get_workspace().get_root_dir())
        # A thread of its own, so that an abort need not wait for a round.
        work = threading.Thread(
            target=self.lead, args=(kit, FlareLink(engine, fl_ctx), lambda: bool(abort_signal.triggered)), daemon=True
        )
        work.start()
        while work.is_alive() and not abort_signal.triggered:
            work.join(0.1)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        pass
