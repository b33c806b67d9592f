"""An engine on two processes, as on two hosts that hold the model together."""

import json

from tests.support.engine import alone
from tests.support.local_processes import ROOT, Processes, free_address
from tests.support.lockstep_worker import CONSTRAINED


def test_two_hosts_answer_as_one():
    """Requests arrive at the first host alone; sampled, constrained, cancelled and failed ones."""
    worker, address = str(ROOT / "tests" / "support" / "lockstep_worker.py"), free_address()
    lines = [[worker, address, str(number)] for number in range(2)]
    with Processes(lines, devices=2) as processes:
        ended = processes.end(300)
    assert [process.status for process in ended] == [0, 0], "\n----\n".join(
        process.out for process in ended
    )
    first, second = (json.loads(process.out.splitlines()[-1]) for process in ended)
    *greedy, sampled, constrained, broken, cancelled, left = first["answers"]
    for index, answer in enumerate(greedy):
        assert answer == {"ids": alone(index, 20)[:12], "finish": "length"}
    assert sampled["ids"] == alone(1, 20, 4, temperature=1.0)[:12]
    assert constrained == {"ids": CONSTRAINED, "finish": "length"}
    assert broken == {"ids": CONSTRAINED, "finish": "error"}
    assert cancelled["finish"] == left["finish"] == "cancelled"
    assert len(left["ids"]) < 200
    assert first["finished"] == second["finished"] == 9
