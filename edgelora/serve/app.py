"""The routes: each reads its request, hands a job to the worker and answers; every error has OpenAI's form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgelora.config import ServeConfig
from edgelora.run.generate import fixed_tokens, prompt_ids
from edgelora.serve import admit, requests
from edgelora.serve.fields import parse, shown
from edgelora.serve.follow import ClientGone, EventStream, followed, stream
from edgelora.serve.log import Logged
from edgelora.serve.refusal import Refusal, as_refusal, wrong
from edgelora.serve.replies import TextReply, Written, classified, embedded
from edgelora.serve.worker import ClassifyJob, WriteJob
from edgelora.tasks import get_task

if TYPE_CHECKING:
    from edgelora.run.model import Model
    from edgelora.serve.requests import Models, TextRequest
    from edgelora.serve.worker import Worker

Handler = Callable[[Request], Awaitable[Response]]
JOIN_S = 10.0  # for the worker to end the step that it is in

WRITES, EMBEDS, ANSWERS, NOTHING = "text-generation", "sentence-similarity", "another task on texts", "none of these"
PATHS = {
    "/v1/chat/completions": WRITES, "/v1/completions": WRITES, "/v1/embeddings": EMBEDS, "/v1/classify": ANSWERS,
}  # fmt: skip


class Service:
    """What the handlers share: the model, its worker, the names that requests may use, and the settings."""

    def __init__(self, model: Model, worker: Worker, models: Models, config: ServeConfig, *, local: bool) -> None:
        self.model, self.worker, self.models, self.config, self.local = model, worker, models, config, local
        self.created = int((model.bundle.folder / "edgelora.json").stat().st_mtime)

    def app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.answered(self.chat), methods=["POST"]),
            Route("/v1/completions", self.answered(self.complete), methods=["POST"]),
            Route("/v1/classify", self.answered(self.classify), methods=["POST"]),
            Route("/v1/embeddings", self.answered(self.embed), methods=["POST"]),
            Route("/v1/models", self.answered(self.list_models)),
            Route("/v1/models/{name:path}", self.answered(self.one_model)),
            Route("/health", self.answered(self.health)),
        ]
        app = Starlette(routes=routes, lifespan=self.lifespan, exception_handlers={HTTPException: no_route})
        app.add_middleware(Logged)
        return app

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.worker.stop()
        await asyncio.to_thread(self.worker.thread.join, JOIN_S)

    def answered(self, handler: Handler) -> Handler:
        """Return a handler that admits the request first and whose errors are answers."""

        async def handle(request: Request) -> Response:
            try:
                admit.check(request, None if request.url.path == "/health" else self.config.api_key, local=self.local)
                return await handler(request)
            except (ClientGone, ClientDisconnect):
                return Response(status_code=499)  # nobody reads it; the log does
            except Exception as error:
                return refused(as_refusal(error))

        return handle

    async def body(self, request: Request) -> dict[str, Any]:
        """Return the JSON object of a request that this bundle can answer."""
        if PATHS.get(request.url.path) not in (None, kind_of(self.model.task)):
            paths = " and ".join(path for path, task in PATHS.items() if task == kind_of(self.model.task))
            message = f"this server's bundle is for {self.model.task}; it answers {paths}"
            raise Refusal(404, message, code="not_this_bundle")
        return parse(await admit.read_body(request, self.config.max_body))

    async def chat(self, request: Request) -> Response:
        asked = requests.chat_request(await self.body(request), self.models)
        if self.model.generator.tokenizer.chat_template is None:
            raise Refusal(404, "this bundle has no chat template; it answers /v1/completions", code="no_chat_template")
        return await self.write(request, asked)

    async def complete(self, request: Request) -> Response:
        return await self.write(request, requests.completion_request(await self.body(request), self.models))

    async def write(self, request: Request, asked: TextRequest) -> Response:
        """Answer a chat or a text, whole or streamed."""
        prompt = await asyncio.to_thread(self.tokens, asked)
        chat: Any = asked.prompt if asked.kind == requests.CHAT else ""
        fixed = await asyncio.to_thread(fixed_tokens, self.model.generator.tokenizer, chat, prompt)
        job, reply = WriteJob(asked.adapter, prompt, asked.config, fixed), TextReply(asked)
        if asked.stream:
            parts = self.parts(request, job, reply)
            return EventStream(await anext(parts), parts)
        pieces: list[str] = []
        async with followed(self.worker, job, request.receive, self.config.timeout) as found:
            async for item in found:
                if isinstance(item, Written):
                    note_tokens(request, item)
                    return JSONResponse(reply.whole("".join(pieces), item))
                pieces.append(item)
        raise AssertionError("the events of a job have no end")

    async def parts(self, request: Request, job: WriteJob, reply: TextReply) -> AsyncGenerator[bytes, None]:
        async with followed(self.worker, job, request.receive, self.config.timeout) as found:
            async for part in stream(reply, found, lambda written: note_tokens(request, written)):
                yield part

    def tokens(self, asked: TextRequest) -> list[int]:
        """Return the tokens of a prompt, as `edgelora run` has them. Raises Refusal where they are none or too many."""
        generator, prompt, limit = self.model.generator, asked.prompt, self.model.bundle.max_length
        param = "messages" if asked.kind == requests.CHAT else "prompt"
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            ids = [token for token in prompt if isinstance(token, int)]
            if (largest := max(ids)) >= generator.decoder.vocab_size:
                raise wrong("prompt", f"has the token {largest}; allowed: 0 to {generator.decoder.vocab_size - 1}")
        else:
            ids = prompt_ids(generator.tokenizer, prompt, asked.config)  # type: ignore[arg-type]  # text or messages
        if not ids:
            raise wrong(param, "is empty: there is nothing to continue")
        if len(ids) > limit:
            problem = f"has {len(ids)} tokens; this bundle takes at most {limit}, those of the answer included"
            raise wrong(param, problem, code="context_length_exceeded")
        return ids

    async def classify(self, request: Request) -> Response:
        body = await self.body(request)
        asked = requests.classify_request(body, self.models, self.model.classifier.task.asked)
        return JSONResponse(classified(asked, await self.answers(request, ClassifyJob(asked.adapter, asked.rows))))

    async def embed(self, request: Request) -> Response:
        body = await self.body(request)
        asked = requests.embed_request(body, self.models, int(self.model.bundle.config["hidden_size"]))
        answers = await self.answers(request, ClassifyJob(asked.adapter, [{"text": text} for text in asked.texts]))
        encode = self.model.classifier.processor.encode
        tokens = sum(len(encode(text, add_special_tokens=True)) for text in asked.texts)
        return JSONResponse(embedded(asked, answers, tokens))

    async def answers(self, request: Request, job: ClassifyJob) -> list[Any]:
        """Return the answers to the rows of a job."""
        async with followed(self.worker, job, request.receive, self.config.timeout) as found:
            answers: list[Any] = await anext(found)
        return answers

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.described(name) for name in self.models]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self.described(requests.known_model(request.path_params["name"], self.models)))

    def described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "edgelora"}

    async def health(self, request: Request) -> Response:
        """Tell whether requests are taken, and how many wait; without the key, so that watchdogs can ask."""
        good = self.worker.thread.is_alive() and not self.worker.stopping
        found = {"status": "ok" if good else "stopping", "task": self.model.task, "waiting": len(self.worker.waiting)}
        return JSONResponse(found, status_code=200 if good else 503)


def kind_of(task: str) -> str:
    """Return what a task's bundle does, of PATHS. What reads files does nothing: the paths in a request are not followed."""
    if task in (WRITES, EMBEDS):
        return task
    return ANSWERS if get_task(task).asked and not get_task(task).file_columns else NOTHING


def note_tokens(request: Request, written: Written) -> None:
    """Leave a line for the log."""
    cached = f" ({written.cached_tokens} cached)" if written.cached_tokens else ""
    request.scope["edgelora"] = f"{written.prompt_tokens}{cached} + {written.completion_tokens} tokens"


def refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers())


async def no_route(request: Request, error: Exception) -> Response:
    """Answer paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        refusal = Refusal(405, f"{request.method} is not allowed for {request.url.path}; allowed: {allowed}")
        response = refused(refusal)
        response.headers["Allow"] = allowed
        return response
    if error.status_code == 404:
        known = ", ".join([*PATHS, "/v1/models", "/health"])
        return refused(Refusal(404, f"there is no {shown(request.url.path)}; there are {known}", code="unknown_url"))
    return refused(Refusal(error.status_code, error.detail))
