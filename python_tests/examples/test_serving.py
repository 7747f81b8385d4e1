"""The serving example over a model that is played: batches, budgets, limits, and a load it cannot carry."""

import asyncio
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient

from examples.serving.app import Answer, make_app
from examples.serving.batcher import Batcher, Full, Limits
from examples.serving.load_test import ROWS, Outcome, draw, send_load

SMALL = Limits(batch_rows=4, wait=0.02, queue_rows=12, request_rows=8, idle_rows=4, busy_rows=12)


class Player:
    """Answers each row with itself, and notes its batches and budgets. ``seconds``: for a row at budget 1."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.batches, self.budgets = seconds, [], []

    def __call__(self, rows, budget):
        if "fail" in rows:
            raise ValueError("told to fail")
        time.sleep(self.seconds * len(rows) * budget)
        self.batches.append(list(rows))
        self.budgets.append(budget)
        return [Answer(label=row, probability=1.0, layers=round(6 * budget)) for row in rows]


def batched(work, player, limits=SMALL, budget=None):
    async def main():
        async with Batcher(player, limits, budget) as batcher:
            return await work(batcher)

    return asyncio.run(asyncio.wait_for(main(), 20))


def labels(answers):
    return [answer.label for answer in answers]


def test_rows_share_batches_and_come_back_in_order():
    async def work(batcher):
        return await asyncio.gather(
            batcher.answer(["a", "b", "c"]), batcher.answer(["d"]), batcher.answer(["e"])
        )

    player = Player()
    assert [labels(answers) for answers in batched(work, player)] == [["a", "b", "c"], ["d"], ["e"]]
    assert player.batches == [["a", "b", "c", "d"], ["e"]]


def test_a_batch_waits_no_longer_than_its_deadline():
    async def work(batcher):
        start = time.perf_counter()
        await batcher.answer(["a"])
        return time.perf_counter() - start

    assert batched(work, Player(), Limits(wait=0.1)) >= 0.1
    player = Player()
    batched(lambda batcher: batcher.answer(["a"] * 4), player, Limits(batch_rows=4, wait=1000.0))
    assert player.batches == [["a"] * 4]


def test_the_budget_falls_with_the_queue_and_rises_again():
    async def work(batcher):
        await asyncio.gather(*(batcher.answer(["x"] * 4) for _ in range(3)))
        await batcher.answer(["x"])

    player = Player()
    batched(work, player)
    assert player.budgets == [0.5, 0.75, 1.0, 1.0]  # 12, 8, 4 and 1 rows waiting
    player = Player()
    batched(work, player, budget=0.7)
    assert player.budgets == [0.7] * 4
    limits = Limits()
    found = [limits.budget(waiting) for waiting in range(limits.queue_rows)]
    assert found == sorted(found, reverse=True) and (found[0], found[-1]) == (1.0, limits.floor)


def test_a_full_queue_refuses_and_keeps_what_it_has():
    async def work(batcher):
        first = asyncio.gather(*(batcher.answer(["x"] * 6) for _ in range(2)))
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await batcher.answer(["y"])
        return await first

    assert [len(answers) for answers in batched(work, Player())] == [6, 6]


def test_a_failed_batch_leaves_the_next_ones_alone():
    async def work(batcher):
        with pytest.raises(ValueError, match="told to fail"):
            await batcher.answer(["fail", "a"])
        return await batcher.answer(["b"])

    assert labels(batched(work, Player())) == ["b"]


def test_nobody_works_for_who_has_gone_and_what_waits_at_the_end_is_answered():
    player = Player(0.02)

    async def work(batcher):
        gone = asyncio.create_task(batcher.answer(["gone"] * 4))
        stays = asyncio.create_task(batcher.answer(["stays"] * 2))
        await asyncio.sleep(0)
        gone.cancel()
        return stays

    async def main():
        async with Batcher(player, SMALL) as batcher:
            stays = await work(batcher)
        assert labels(await stays) == ["stays"] * 2
        with pytest.raises(Full):
            await batcher.answer(["late"])

    asyncio.run(main())
    assert player.batches == [["stays"] * 2]


def test_limits_that_make_no_sense_are_refused():
    for wrong, words in (
        ({"floor": 0.0}, "floor: expected a budget above 0"),
        ({"idle_rows": 96}, "0 <= idle_rows < busy_rows <= queue_rows, got 96, 96, 256"),
        ({"request_rows": 257}, "request_rows: expected at most queue_rows 256, got 257"),
    ):
        with pytest.raises(ValueError, match=words):
            Limits(**wrong)


def test_what_the_server_takes():
    limits = Limits(request_rows=2, queue_rows=96, row_characters=10, body_bytes=100)
    with TestClient(make_app(Player(), limits), raise_server_exceptions=False) as client:
        assert client.get("/health").json() == {"status": "ok", "waiting": 0, "budget": 1.0}
        reply = client.post("/predict", json={"rows": ["a", "b"]})
        assert reply.status_code == 200 and [answer["label"] for answer in reply.json()["answers"]] == [
            "a",
            "b",
        ]
        for rows in ([], ["a"] * 3, ["a" * 11], [1], "a"):
            assert client.post("/predict", json={"rows": rows}).status_code == 422
        assert client.post("/predict", json={"rows": ["a" * 200]}).status_code == 413

        def chunks():
            yield b'{"rows": ["' + b"a" * 60
            yield b"a" * 60 + b'"]}'

        assert client.post("/predict", content=chunks()).status_code == 413  # no length said
        assert client.post("/predict", json={"rows": ["fail"]}).status_code == 500
        assert client.get("/health").status_code == 200


@pytest.fixture
def served():
    """A server on the loopback that can do 50 rows a second at budget 1, 100 at its floor."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = Limits(batch_rows=16, wait=0.005, queue_rows=64, request_rows=8, idle_rows=16, busy_rows=64)
    player = Player(0.02)
    server = uvicorn.Server(uvicorn.Config(make_app(player, limits), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", player
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_beyond_its_capacity_nothing_is_lost_and_nothing_hangs(served):
    """Four times what it can do at budget 1: the budget falls to its floor, the rest is refused at once."""
    url, player = served
    reviews = [(f"row {i}", f"row {i}") for i in range(64)]
    outcome = asyncio.run(send_load(url, Outcome("moving", 4.0, 200.0), reviews, seconds=2.0))
    assert outcome.sent == 2 * 200 / ROWS
    assert (outcome.hung, outcome.lost) == (0, 0)
    assert len(outcome.seconds) + outcome.refused == outcome.sent
    assert outcome.refused > 0 and outcome.answered > 0
    assert outcome.score == 1.0  # each answer went to its own row
    assert min(player.budgets) < 0.6
    assert httpx.get(f"{url}/health").json()["waiting"] == 0
    reply = httpx.post(f"{url}/predict", json={"rows": ["calm"]})
    assert reply.json()["budget"] == 1.0


def test_the_picture(tmp_path):
    outcomes = [Outcome(name, load, 100 * load, [0.1, 0.2], 2, 7, 8) for name in "ab" for load in (0.5, 1, 2)]
    draw(outcomes, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert outcomes[0].latency(0.5) == pytest.approx(150) and outcomes[0].score == 7 / 8
