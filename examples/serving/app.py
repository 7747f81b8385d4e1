"""The server: rows in, labels out, over a :class:`~examples.serving.batcher.Batcher`."""

from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field, StringConstraints

from examples.serving.batcher import Batcher, Full, Limits


class Answer(BaseModel):
    """label: of the row; probability: of the label; layers: that were run, of all the model has."""

    label: str
    probability: float
    layers: int


def make_app(
    run: Callable[[list[str], float], Sequence[Answer]],
    limits: Limits | None = None,
    budget: float | None = None,
) -> FastAPI:
    """``POST /predict`` with ``{"rows": ["...", ...]}`` gives ``{"answers": [...], "budget": ...}``.

    Rows that are too many or too long are refused with 422, bodies too large with 413; while the queue is
    full the answer is 503, to be tried again after a second. ``GET /health`` says what is waiting.
    """
    limits = limits or Limits()
    Row = Annotated[str, StringConstraints(max_length=limits.row_characters)]

    class Question(BaseModel):
        rows: Annotated[list[Row], Field(min_length=1, max_length=limits.request_rows)]

    class Reply(BaseModel):
        answers: list[Answer]
        budget: float

    @asynccontextmanager
    async def life(app: FastAPI):
        async with Batcher(run, limits, budget) as batcher:
            app.state.batcher = batcher
            yield

    app = FastAPI(title="dynplan serving example", lifespan=life)

    @app.get("/health")
    async def health() -> dict:
        batcher = app.state.batcher
        return {"status": "ok", "waiting": batcher.waiting, "budget": batcher.budget}

    @app.post("/predict")
    async def predict(question: Question) -> Reply:
        batcher = app.state.batcher
        try:
            answers = await batcher.answer(question.rows)
        except Full as full:
            raise HTTPException(503, "the queue is full", {"Retry-After": "1"}) from full
        return Reply(answers=answers, budget=batcher.budget)

    app.add_middleware(BodyLimit, most=limits.body_bytes)
    return app


class BodyLimit:
    """Refuses a body of more than ``most`` bytes before it is held in memory, whatever its length is said to
    be.
    """

    def __init__(self, app, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages, size = [], 0
        said = dict(scope["headers"]).get(b"content-length", b"0")
        more = not (said.isdigit() and int(said) > self.most)
        too_large = not more
        while more:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            too_large = size > self.most
            more = message["type"] == "http.request" and message.get("more_body", False) and not too_large
        if too_large:
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"detail": "the body is too large"}'})
            return
        held = iter(messages)

        async def replay():
            return next(held, None) or await receive()

        await self.app(scope, replay, send)
