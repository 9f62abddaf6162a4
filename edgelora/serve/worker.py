"""One thread that owns the model, and the requests that wait for it, first come, first served.

A decoder session holds one cache, so answers are written one after the other; a prompt that begins like the last one finds its
beginning in the cache. Texts to classify that wait together are computed together.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.config import GenerateConfig
from edgelora.run.generate import Answer
from edgelora.run.model import Model
from edgelora.serve.refusal import Refusal
from edgelora.serve.replies import Written

TEXTS_AT_ONCE = 64  # of requests that are put together
STOPPING = "the server is stopping"


@dataclass(eq=False)
class Job:
    """Work for the thread. What comes of it is put into `events`, on the loop of the request that waits there."""

    adapter: str | None

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[str | Written | list[Any] | Exception] = asyncio.Queue()
        self.cancelled = False  # nobody waits any longer

    def put(self, event: str | Written | list[Any] | Exception) -> None:
        """Hand over an event from another thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass(eq=False)
class WriteJob(Job):
    """A prompt to be answered. Events: pieces of text, then Written, or an exception."""

    prompt: list[int]
    config: GenerateConfig


@dataclass(eq=False)
class ClassifyJob(Job):
    """Rows to be answered at once. One event: the answer to each, or an exception."""

    rows: Sequence[Mapping[str, Any]]


class Worker:
    """Takes jobs until it is stopped; `limit` of them may wait."""

    def __init__(self, model: Model, limit: int) -> None:
        self.model, self.limit = model, limit
        self.waiting: deque[Job] = deque()
        self.current: list[Job] = []
        self.stopping = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="edgelora-worker", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue. Raises Refusal where that is full or the server stops."""
        with self.changed:
            if self.stopping or not self.thread.is_alive():
                raise Refusal(503, STOPPING, code="stopping")
            if len(self.waiting) >= self.limit:
                message = f"{len(self.waiting)} requests wait already, which is the limit; try again later"
                raise Refusal(429, message, code="queue_full")
            self.waiting.append(job)
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job: it leaves the queue, or stops at its next piece of text."""
        job.cancelled = True
        with self.changed:
            if job in self.waiting:
                self.waiting.remove(job)

    def stop(self) -> None:
        """Refuse what waits and end what is being written; `thread` ends soon after."""
        with self.changed:
            self.stopping = True
            for job in [*self.waiting, *self.current]:
                job.cancelled = True
                job.put(Refusal(503, STOPPING, code="stopping"))
            self.waiting.clear()
            self.changed.notify()

    def _work(self) -> None:
        while jobs := self._next():
            try:
                self._do(jobs)
            except Exception as error:  # whatever it is, the next request is another one
                self._fail(jobs, error)

    def _next(self) -> list[Job]:
        """Wait for work and return the first job, with those behind it that can be computed with it; [] at the end."""
        with self.changed:
            self.current = []
            self.changed.wait_for(lambda: self.waiting or self.stopping)
            if self.stopping:
                return []
            self.current = [first := self.waiting.popleft()]
            if isinstance(first, ClassifyJob):
                num_texts = len(first.rows)
                while self.waiting and isinstance(other := self.waiting[0], ClassifyJob) and other.adapter == first.adapter:
                    if num_texts + len(other.rows) > TEXTS_AT_ONCE:
                        break
                    num_texts += len(other.rows)
                    self.current.append(self.waiting.popleft())
            return list(self.current)

    def _do(self, jobs: Sequence[Job]) -> None:
        if self.model.adapter != jobs[0].adapter:
            self.model.use(jobs[0].adapter)
        if isinstance(jobs[0], WriteJob):
            self._write(jobs[0])
            return
        batch = [job for job in jobs if isinstance(job, ClassifyJob)]
        answers = self.model.answers([row for job in batch for row in job.rows])
        for job in batch:
            mine, answers = answers[: len(job.rows)], answers[len(job.rows) :]
            job.put(mine)

    def _write(self, job: WriteJob) -> None:
        generator = self.model.generator
        answer = Answer(generator, job.prompt, job.config)
        for piece in answer:
            if job.cancelled:
                return
            job.put(piece)
        job.put(Written(answer.finish, len(job.prompt), len(answer.tokens), answer.reused))

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Tell the request that its job failed. Of several, each is tried alone: one may have failed the others."""
        if len(jobs) > 1:
            for job in jobs:
                try:
                    self._do([job])
                except Exception as own:
                    self._fail([job], own)
            return
        if isinstance(jobs[0], WriteJob):
            self.model.generator.forget()  # the cache may hold half a step
        jobs[0].put(error)
