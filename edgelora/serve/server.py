"""`edgelora serve BUNDLE`: the sockets, uvicorn around the app, and a clean end."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from edgelora import console
from edgelora.config import ServeConfig
from edgelora.errors import MachineError, SettingsError, UserError
from edgelora.run.model import Model, load
from edgelora.serve.app import NOTHING, Service, kind_of
from edgelora.serve.requests import Models
from edgelora.serve.worker import Worker

GRACE_S = 12  # for requests to be told that the server stops


class Server(uvicorn.Server):
    """uvicorn, which when it stops first ends the requests that it would wait for."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.stop()
        await super().shutdown(sockets)


def serve(
    bundle: Path,
    config: ServeConfig | None = None,
    *,
    threads: int | None = None,
    started: Callable[[Server, str], None] | None = None,
) -> dict[str, Any]:
    """Answer requests until Ctrl-C or SIGTERM; return {"url": …, "requests": …}.

    `started` is given the server, whose `should_exit` ends it, and its URL. Raises SettingsError where the address is open to
    others without an API key, MachineError where it is taken, UserError for a bundle of another task.
    """
    config = config or ServeConfig()
    listening = listen(config)
    with listening:
        model = load(bundle, threads=threads)
        models = names(model)
        worker = Worker(model, config.queue)
        local = is_loopback(listening.getsockname()[0])
        service = Service(model, worker, models, config, local=local)
        settings = uvicorn.Config(
            service.app(), log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S,
            lifespan="on", proxy_headers=False, ws="none",
        )  # fmt: skip
        server = Server(settings, worker)
        url = address(listening)
        console.say(f"{model.task} at {url}/v1 for {', '.join(models)}. Ctrl-C ends it.")
        if started is not None:
            started(server, url)
        try:
            asyncio.run(server.serve(sockets=[listening]))
        except KeyboardInterrupt:  # uvicorn raises the signal again when all is closed
            console.say("Stopped.")
        finally:
            worker.stop()
    return {"url": url, "task": model.task, "requests": server.server_state.total_requests}


def names(model: Model) -> Models:
    """Return the names that requests may give as `model`: the bundle's folder, then its adapters."""
    if kind_of(model.task) == NOTHING:
        raise UserError(
            f"{model.bundle.folder} is for the task {model.task}; allowed: tasks that read text or chats",
            hint=f"edgelora run {model.bundle.folder} --help",
        )
    own, adapters = model.bundle.folder.resolve().name, list(model.bundle.manifest.get("adapters") or {})
    if own in adapters:
        raise UserError(f'the bundle\'s folder and one of its adapters are both named "{own}"', hint="rename the folder")
    return {own: None, **{adapter: adapter for adapter in adapters}}


def listen(config: ServeConfig) -> socket.socket:
    """Return a socket that listens at the address of the settings.

    Other addresses than loopback's need a key: whoever reaches them could use the machine, and a warning would scroll away.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise SettingsError(f'"{config.host}" is no address of this machine: {error}', hint="--host 127.0.0.1") from None
    family, _, _, _, place = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # IPv4 where a name has both
    if config.api_key == "":
        raise SettingsError("the API key is empty", hint="leave it away, or give one")
    if config.api_key is None and not is_loopback(str(place[0])):
        message = f"{config.host} can be reached from other machines; that needs an API key"
        raise SettingsError(message, hint="export EDGELORA_API_KEY=…, or --host 127.0.0.1 and a tunnel")
    try:
        return socket.create_server(place[:2], family=family, backlog=2048)
    except OSError as error:
        raise MachineError(f"cannot listen at {config.host}:{config.port}: {error.strerror}", hint="--port 0") from None


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
