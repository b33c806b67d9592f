"""An engine on two processes, as on two hosts that hold the model together."""

import json

from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.engine.request import Request
from internvl3_jax.inference.generator import Generator
from tests.support.engine import alone, ask
from tests.support.generation import RAGGED
from tests.support.local_processes import ROOT, Processes, free_address
from tests.support.lockstep_worker import CONSTRAINED
from tests.support.tiny_checkpoint import FLASH, random_params


def run(kind):
    """What two hosts print; see lockstep_worker.py."""
    worker, address = str(ROOT / "tests" / "support" / "lockstep_worker.py"), free_address()
    lines = [[worker, address, str(number), kind] for number in range(2)]
    with Processes(lines, devices=2) as processes:
        ended = processes.end(300)
    assert [process.status for process in ended] == [0, 0], "\n----\n".join(
        process.out for process in ended
    )
    return [json.loads(process.out.splitlines()[-1]) for process in ended]


def test_two_hosts_answer_as_one():
    """Requests arrive at the first host alone; sampled, constrained, cancelled and failed ones."""
    first, second = run("plain")
    *greedy, sampled, constrained, broken, cancelled, left = first["answers"]
    for index, answer in enumerate(greedy):
        assert answer == {"ids": alone(index, 20)[:12], "finish": "length"}
    assert sampled["ids"] == alone(1, 20, 4, temperature=1.0)[:12]
    assert constrained == {"ids": CONSTRAINED, "finish": "length"}
    assert broken == {"ids": CONSTRAINED, "finish": "error"}
    assert cancelled["finish"] == left["finish"] == "cancelled"
    assert len(left["ids"]) < 200
    assert first["finished"] == second["finished"] == 9


def test_two_hosts_compress_the_same_tiles():
    first, second = run("flash")
    engine = Engine(Generator(FLASH, random_params(FLASH)), rows=3)
    tickets = ask(engine, *(Request(prompt, max_new_tokens=12) for prompt in RAGGED))
    assert first["answers"] == [
        {"ids": ticket.ids, "tokens": len(ticket.request.prompt.tokens)} for ticket in tickets
    ]
    assert 0 < engine.stats.compressed_tiles < engine.stats.tiles
    assert first["finished"] == second["finished"] == len(RAGGED)
