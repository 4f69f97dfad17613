import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dagkit.guard import StepRecord, Trace


def record(step: int, sample: int, *, run: int = 0, fires: bool = False, score: float = 0.1) -> StepRecord:
    reason = "concept found" if fires else "below threshold"
    return StepRecord(run, step, 900.0 - 300 * step, sample, "weapon@1.0.0", fires, reason, 0.02, float(fires), score)


@pytest.fixture
def trace() -> Trace:
    steps = [record(0, 0), record(0, 1), record(1, 0, fires=True, score=0.8), record(1, 1), record(0, 0, run=1)]
    maps = {(0, 0): torch.zeros(2, 4, 8), (0, 1): torch.ones(2, 4, 8)}
    return Trace(steps, maps)


def test_a_summary_tells_whether_when_and_how_surely(trace: Trace) -> None:
    assert trace.summary(0) == {
        "is_firing": True,
        "num_steps": 2,
        "num_firing": 1,
        "first_timestep": 600.0,
        "score": 0.8,
        "area": 0.02,
        "strength": 1.0,
        "change": 0.0,
        "is_blackened": False,
    }
    assert trace.summary(1)["is_firing"] is False
    assert trace.summary(1)["first_timestep"] is None
    assert trace.summary(0, run=1)["num_steps"] == 1


def test_a_summary_of_what_was_not_seen_is_an_error(trace: Trace) -> None:
    with pytest.raises(KeyError, match="no record of sample 7 in run 0; seen:"):
        trace.summary(7)


def test_a_cleared_trace_is_empty(trace: Trace) -> None:
    trace.clear()
    assert (trace.steps, trace.maps) == ([], {})


def test_json_holds_every_record(trace: Trace) -> None:
    value = json.loads(trace.to_json())
    assert value["schema_version"] == 1
    assert len(value["steps"]) == 5
    assert value["steps"][2]["reason"] == "concept found"


def test_the_strip_shows_the_maps_in_order(trace: Trace) -> None:
    strip = trace.strip(0, side=16)
    assert strip.size == (32 + 2 + 32, 16)
    assert strip.getpixel((0, 0)) == 0
    assert strip.getpixel((65, 15)) == 255
    with pytest.raises(KeyError, match="no detection maps of run 1 were kept; make the guard with keep_maps=True"):
        trace.strip(0, run=1)


def test_a_trace_is_saved_as_json_and_pictures(trace: Trace, tmp_path: Path) -> None:
    written = trace.save(tmp_path / "trace")
    assert [path.name for path in written] == ["trace.json", "run0-sample0.png", "run0-sample1.png"]
    assert json.loads(written[0].read_text())["steps"]
    assert Image.open(written[1]).size[1] == 64
