"""Engines with work that needs no models: order, errors, deaths, and that nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dagkit import engines
from dagkit.engines import Engine, Item
from dagkit.errors import CheckpointError, EngineError, PromptRefused
from engine_work import build, fail_to_build, work

SLOW_FIRST = [{"value": 0, "seconds": 0.5}, *({"value": value} for value in range(1, 20))]


@pytest.fixture(scope="module")
def two() -> Iterator[Engine]:
    with engines.open_engine(2) as engine:
        yield engine
    assert not multiprocessing.active_children()


def items(payloads: list[dict[str, Any]]) -> list[Item]:
    return [Item(f"item-{number}", payload) for number, payload in enumerate(payloads)]


def values(engine: Engine, payloads: list[dict[str, Any]]) -> list[Any]:
    return [result for _, result in engine.results(items(payloads), work, build)]


def test_results_come_in_the_order_of_the_plan_whatever_was_finished_first(two: Engine) -> None:
    with engines.open_engine(1) as one:
        assert values(two, SLOW_FIRST) == values(one, SLOW_FIRST) == list(range(20))
    assert values(two, []) == []


def test_workers_are_other_processes_with_one_thread_each(two: Engine) -> None:
    pids = set(values(two, [{"seconds": 0.05}] * 8))
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert values(two, [{"asks_for_threads": True}]) == ["1"]
    with engines.open_engine(1) as one:
        assert values(one, [{}]) == [os.getpid()]


def test_only_a_few_items_are_begun_before_the_first_is_finished(two: Engine) -> None:
    taken = []

    def source() -> Iterator[Item]:
        for item in items(SLOW_FIRST):
            taken.append(item.key)
            yield item

    with closing(two.results(source(), work, build)) as results:
        assert next(results)[1] == 0
        assert len(taken) <= 4


def test_an_error_is_the_same_from_every_engine_and_comes_after_what_stands_before_it(two: Engine) -> None:
    payloads = [{"value": 0, "seconds": 0.3}, {"value": 1}, {"error": "PromptRefused"}, *[{"value": 3}] * 20]
    with engines.open_engine(1) as one:
        for engine in (one, two):
            given = []
            with pytest.raises(PromptRefused, match=r"^said of a payload$"):  # noqa: PT012
                for item, _ in engine.results(items(payloads), work, build):
                    given.append(item.key)
            assert given == ["item-0", "item-1"]
            assert values(engine, [{"value": 7}]) == [7]  # it goes on with other work


def test_a_bug_keeps_its_traceback(two: Engine) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)failed at item-0:.*engine_work\.py.*KeyError: 'a bug'"):
        values(two, [{"is_bug": True}])


def test_a_killed_worker_is_named_and_the_others_finish_what_stands_before(two: Engine) -> None:
    given = []
    payloads = [{"value": 0, "seconds": 0.3}, {"is_killed": True}, {"value": 2, "seconds": 30}]
    words = r"worker \d of 2 was killed \(signal 9; .*\) while it worked on item-1\. What was finished before is kept"
    start = time.monotonic()
    with pytest.raises(EngineError, match=words):  # noqa: PT012
        for _, result in two.results(items(payloads), work, build):
            given.append(result)
    assert given == [0]
    assert time.monotonic() - start < 20  # nobody begins what is not wanted any more
    assert values(two, [{"value": 7}] * 2) == [7] * 2  # a new one takes its place


def test_what_cannot_be_made_elsewhere_is_said(two: Engine) -> None:
    with pytest.raises(CheckpointError, match="no such weights"):
        list(two.results(items([{}]), work, fail_to_build))
    with pytest.raises(EngineError, match="Use 1 worker"):
        list(two.results(items([{}]), work, None))


def test_warnings_are_given_here_and_once(two: Engine) -> None:
    with pytest.warns(UserWarning, match="unknown word") as said:
        values(two, [{"value": 1, "warnings": ["unknown word"]}])
    assert len(said) == 1


SCRIPT = """
import sys
from dagkit import engines
from engine_work import build, work

if __name__ == "__main__":
    with engines.open_engine(2) as engine:
        payloads = [{}, {}, *[{"seconds": 600}] * 4]
        for _, pid in engine.results([engines.Item(str(n), one) for n, one in enumerate(payloads)], work, build):
            print(pid, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_the_program(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C goes to all processes of a terminal, the others to one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    program = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], env=where, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert program.stdout is not None
    pids = {int(program.stdout.readline()) for _ in range(2)}
    if number == signal.SIGINT:
        os.killpg(program.pid, number)
    else:
        program.send_signal(number)
    _, said = program.communicate(timeout=120)  # the pipes end with the last process that has them
    assert program.returncode != 0
    assert said.count("Traceback") == (number == signal.SIGINT)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
