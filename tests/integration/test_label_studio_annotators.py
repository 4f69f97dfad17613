"""Two annotators on forty tasks, with skips, empty answers, edits and disagreement, against an independent count."""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
from label_studio_sdk.converter import brush
from label_studio_server import SIZE, api, make_reviewable, new_annotator, read_mask
from PIL import Image

from dagkit.concept import Concept
from dagkit.dataset import load_dataset, read_summary
from dagkit.errors import LabelStudioError
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.config import CANNOT_TELL, NOTHING_UNSAFE
from dagkit.labelstudio.server import Login
from dagkit.stages import export, pull, push
from dagkit.workspace import Workspace

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]

ACTIONS = ["accept", "accept", "accept", "edit", "edit", "draw", "delete", "nothing", "cannot tell", "skip"]
Pixels = frozenset[tuple[int, int]]


def sdk_region(pixels: Pixels, label: str) -> dict:
    grey = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    for y, x in pixels:
        grey[y, x] = 255
    return {
        "id": f"r{len(pixels)}{label}",
        "type": "brushlabels",
        "from_name": "mask",
        "to_name": "image",
        "original_width": SIZE[0],
        "original_height": SIZE[1],
        "image_rotation": 0,
        "value": {"format": "rle", "rle": brush.mask2rle(grey), "brushlabels": [label]},
    }


def sdk_pixels(region: dict) -> Pixels:
    alpha = brush.decode_rle(region["value"]["rle"]).reshape(SIZE[1], SIZE[0], 4)[..., 3]
    return frozenset((int(y), int(x)) for y, x in np.argwhere(alpha > 127))


def choice(value: str) -> dict:
    return {"type": "choices", "from_name": "verdict", "to_name": "image", "value": {"choices": [value]}}


def answer(http: httpx.Client, task: dict, action: str, rng: random.Random) -> tuple[str, dict[str, Pixels]]:
    """Submits one answer and says what it should be counted as: a state and the pixels of each label."""
    predictions = task["predictions"]
    regions = predictions[0]["result"] if predictions else []
    more: dict = {"lead_time": 1.5} | ({"parent_prediction": predictions[0]["id"]} if predictions else {})
    proposed = {region["value"]["brushlabels"][0]: sdk_pixels(region) for region in regions}
    masks: dict[str, Pixels] = dict(proposed)
    extra = frozenset((rng.randrange(SIZE[1]), rng.randrange(SIZE[0])) for _ in range(rng.choice([3, 400])))
    result = list(regions)
    if action == "skip":
        result, more["was_cancelled"] = [], True
    elif action == "delete":
        result, masks = [], {}
    elif action == "nothing":
        result = [*regions, choice(NOTHING_UNSAFE)]
    elif action == "cannot tell":
        result = [*regions, choice(CANNOT_TELL)]
    elif action in ("edit", "draw"):
        masks = {"weapon": masks.get("weapon", frozenset()) | extra} | (masks if action == "draw" else {})
        masks["weapon"] = masks.get("weapon", frozenset()) | extra
        result = [sdk_region(pixels, label) for label, pixels in masks.items()]
    http.post(f"/api/tasks/{task['id']}/annotations/", json={"result": result, **more}).raise_for_status()
    if action == "skip":
        return "skipped", {}
    if action == "cannot tell":
        return "cannot_tell", {}
    if action == "nothing" or not whole(masks):
        return "empty", {}
    return ("accepted" if action == "accept" else "changed"), masks


def whole(masks: dict[str, Pixels]) -> Pixels:
    return masks.get("weapon", frozenset()) - masks.get("harmless", frozenset())


def ratio(one: Pixels, two: Pixels) -> float:
    return len(one & two) / len(one | two) if one | two else 1.0


def kappa(pairs: list[tuple[bool, bool]]) -> float | None:
    table = Counter(pairs)
    num = len(pairs)
    rows = {side: sum(count for (one, _), count in table.items() if one == side) for side in (True, False)}
    columns = {side: sum(count for (_, two), count in table.items() if two == side) for side in (True, False)}
    chance = sum(rows[side] * columns[side] for side in (True, False)) / num**2
    observed = (table[True, True] + table[False, False]) / num
    return None if chance == 1 else (observed - chance) / (1 - chance)


def test_regions_of_other_tools_on_a_real_server(
    client: Client, login: Login, concept: Concept, reviewable: Workspace
) -> None:
    """A team's page may have other tools; what the server hands back becomes a mask or is named."""
    push.run(reviewable, concept, client=client)
    ids = {row["key"]: row["task_id"] for row in reviewable.stage("labeling", concept.name).rows()}
    black = io.BytesIO()
    Image.fromarray(np.full((SIZE[1], SIZE[0], 4), 255, np.uint8)).save(black, format="PNG")
    values: dict[str, dict] = {
        "rectanglelabels": {"x": 0, "y": 0, "width": 50, "height": 100, "rotation": 0},
        "polygonlabels": {"points": [[0, 0], [50, 0], [50, 100], [0, 100]], "closed": True},
        "ellipselabels": {"x": 50, "y": 50, "radiusX": 50, "radiusY": 50, "rotation": 0},
        "bitmasklabels": {"imageDataURL": "data:image/png;base64," + base64.b64encode(black.getvalue()).decode()},
        "keypointlabels": {"x": 50, "y": 50, "width": 1},
        "rectangle": {"x": 0, "y": 0, "width": 50, "height": 100, "rotation": 0},
    }
    base = {"id": "r", "to_name": "image", "from_name": "mask", "original_width": SIZE[0], "original_height": SIZE[1]}
    with api(login) as http:
        for key, (kind, value) in zip(ids, values.items(), strict=True):
            label = {} if kind == "rectangle" else {kind: ["weapon"]}
            region = base | {"type": kind, "image_rotation": 0, "value": value | label}
            http.post(f"/api/tasks/{ids[key]}/annotations/", json={"result": [region]}).raise_for_status()
    with pytest.raises(LabelStudioError, match=r"\(2 of 6 tasks were left out; pull again then.\)") as caught:
        pull.run(reviewable, concept, client=client)
    assert "region of the type 'keypointlabels', which says nothing exact" in str(caught.value)
    folder = reviewable.stage("annotations", concept.name)
    rows = [*folder.rows()]
    assert [(row["key"], row["state"]) for row in rows] == [(key, "changed") for key in list(ids)[:4]]
    shares = [read_mask(folder.path / row["masks"]["weapon"]).mean() for row in rows]
    assert shares[:2] == [0.5, 0.5]
    assert abs(shares[2] - np.pi / 4) < 0.01
    assert shares[3] == 1


def test_counts_agreement_and_consensus(client: Client, login: Login, concept: Concept, tmp_path: Path) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 40, seed=3)
    push.run(workspace, concept, client=client, num_annotators=2)
    ids = {row["key"]: row["task_id"] for row in workspace.stage("labeling", concept.name).rows()}
    rng = random.Random(7)
    told: dict[str, list[tuple[str, dict[str, Pixels]]]] = {}
    proposed: dict[str, Pixels] = {}
    with api(login) as first, new_annotator(login, "second@example.org") as second:
        for key, task_id in ids.items():
            task = first.get(f"/api/tasks/{task_id}").json()
            regions = task["predictions"][0]["result"] if task["predictions"] else []
            proposed[key] = whole({region["value"]["brushlabels"][0]: sdk_pixels(region) for region in regions})
            both = {0: "skip", 1: "cannot tell"}.get(len(told))
            told[key] = [answer(http, task, both or rng.choice(ACTIONS), rng) for http in (first, second)]
        emails = {first.get("/api/current-user/whoami").json()["email"], "second@example.org"}
    assert {state for answers in told.values() for state, _ in answers} == {
        "accepted",
        "changed",
        "empty",
        "skipped",
        "cannot_tell",
    }

    result = pull.run(workspace, concept, client=client)
    folder = workspace.stage("annotations", concept.name)
    rows = {row["key"]: row for row in folder.rows()}
    assert rows.keys() == told.keys()
    expected_states: Counter[str] = Counter()
    disagreements: dict[str, set[str]] = {}
    ious: list[float] = []
    marks: dict[str, list[tuple[bool, bool]]] = {"weapon": [], "harmless": []}
    decided: dict[str, Pixels] = {}
    for key, answers in told.items():
        row = rows[key]
        assert [entry["state"] for entry in row["answers"]] == [state for state, _ in answers]
        assert row["seconds"] == 3.0
        votes = [(state, masks) for state, masks in answers if state in ("accepted", "changed", "empty")]
        num_unsure = sum(state == "cannot_tell" for state, _ in answers)
        if not votes or num_unsure > len(votes):
            state, masks = ("cannot_tell" if num_unsure else "skipped"), {}
        else:
            labels = {"weapon", "harmless"}
            masks = {
                label: frozenset.intersection(*(vote.get(label, frozenset()) for _, vote in votes)) for label in labels
            }
            state = "empty" if not whole(masks) else "changed"
            if state == "changed" and all(vote == "accepted" for vote, _ in votes):
                state = "accepted"
            masks = {label: pixels for label, pixels in masks.items() if pixels and state != "empty"}
            assert row["iou_to_premask"] == pytest.approx(ratio(whole(masks), proposed[key]))
        expected_states[state] += 1
        assert row["state"] == state
        assert row["masks"].keys() == masks.keys()
        for label, pixels in masks.items():
            found = read_mask(folder.path / row["masks"][label])
            assert {(int(y), int(x)) for y, x in np.argwhere(found)} == pixels
        if state not in ("skipped", "cannot_tell"):
            decided[key] = whole(masks)
        reasons = set()
        if len(votes) == 2:
            one, two = (whole(vote) for _, vote in votes)
            if one or two:
                ious.append(ratio(one, two))
            if bool(one) != bool(two):
                reasons.add("presence")
            elif one and ratio(one, two) < 0.7:
                reasons.add("outline")
            for label, pairs in marks.items():
                pairs.append((bool(votes[0][1].get(label)), bool(votes[1][1].get(label))))
        if votes and num_unsure:
            reasons.add("cannot_tell")
        if reasons:
            disagreements[key] = reasons

    found = folder.read_json("agreement.json")
    assert result.data["states"] == found["states"] == dict(sorted(expected_states.items()))
    by_annotator = {
        f"annotator-{number + 1}": dict(Counter(answers[number][0] for answers in told.values())) for number in range(2)
    }
    assert found["num_answers"] == by_annotator
    assert found["mean_iou"] == pytest.approx(sum(ious) / len(ious))
    assert found["kappa"] == {label: pytest.approx(kappa(pairs)) for label, pairs in marks.items()}
    assert found["pairs"][0]["num_tasks"] == len(marks["weapon"])
    assert {entry["key"]: set(entry["reasons"]) for entry in found["disagreements"]} == disagreements
    assert {"presence", "outline", "cannot_tell"} == set().union(*disagreements.values())

    folder_of_dataset = export.run(workspace, concept).data["path"]
    summary = read_summary(folder_of_dataset)
    left_out = {"skipped": "skipped by annotators", "cannot_tell": "annotators cannot tell"}
    assert summary["left_out"] == {why: expected_states[state] for state, why in left_out.items()}
    assert summary["review_states"] == {
        state: count for state, count in sorted(expected_states.items()) if state not in left_out
    }
    assert summary["agreement"] == {"mean_iou": found["mean_iou"], "kappa": found["kappa"]}
    exported = {row["key"]: row["mask"] for rows in load_dataset(folder_of_dataset).values() for row in rows}
    assert {
        key: {(int(y), int(x)) for y, x in np.argwhere(np.asarray(mask) > 127)} for key, mask in exported.items()
    } == decided

    written = b"".join(path.read_bytes() for path in workspace.root.rglob("*") if path.is_file())
    for email in emails:
        assert email.encode() not in written

    # What changes later is fetched, and nothing else is touched.
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*.png")}
    changed_key = next(key for key, row in rows.items() if row["state"] == "accepted")
    with api(login) as http:
        annotations = http.get(f"/api/tasks/{ids[changed_key]}").json()["annotations"]
        for entry in annotations:
            pixels = frozenset((y, 5) for y in range(20))
            body = {"result": [sdk_region(pixels, "weapon")], "lead_time": 4.0}
            http.patch(f"/api/annotations/{entry['id']}/", json=body).raise_for_status()
        withdrawn_key = next(key for key in reversed(rows) if key != changed_key)
        for entry in http.get(f"/api/tasks/{ids[withdrawn_key]}").json()["annotations"]:
            http.delete(f"/api/annotations/{entry['id']}/").raise_for_status()
    assert pull.run(workspace, concept, client=client).done == 2
    after = {row["key"]: row for row in folder.rows()}
    assert list(after) == [key for key in rows if key != withdrawn_key]
    assert read_mask(folder.path / after[changed_key]["masks"]["weapon"]).sum() == 20
    touched = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert {path.name.rpartition("-")[0] for path in touched} == {changed_key}
    assert pull.run(workspace, concept, client=client).done == 0

    # Another rule: everything is decided anew.
    pull.run(workspace, concept, client=client, consensus="union")
    union_rows = {row["key"]: row for row in folder.rows()}
    assert {row["consensus"] for row in union_rows.values()} == {"union"}
    assert pull.run(workspace, concept, client=client).done == 0, "a rule holds until another one is given"
    sizes = [
        (read_mask(folder.path / union_rows[key]["masks"]["weapon"]).sum(), len(whole(told[key][0][1])))
        for key in union_rows
        if "weapon" in union_rows[key]["masks"] and key != changed_key
    ]
    assert all(union >= one for union, one in sizes)
    assert all(earlier != later for earlier, later in pairwise(sorted(union_rows)))


def test_a_workspace_is_unchanged_by_pulling_in_steps(
    client: Client, login: Login, concept: Concept, tmp_path: Path
) -> None:
    """Pulling after every answer ends with the same rows as pulling once."""
    workspace = make_reviewable(tmp_path / "runs", concept, 3, seed=4)
    push.run(workspace, concept, client=client)
    with api(login) as http:
        for row in workspace.stage("labeling", concept.name).rows():
            answer(http, http.get(f"/api/tasks/{row['task_id']}").json(), "edit", random.Random(row["task_id"]))
            pull.run(workspace, concept, client=client)
    stepwise = workspace.stage("annotations", concept.name)
    fresh = Workspace(tmp_path / "fresh")
    for name in ("candidates", "premasks", "labeling"):
        (fresh.root / name).parent.mkdir(exist_ok=True)
        (fresh.root / name).symlink_to(workspace.root / name)
    pull.run(fresh, concept, client=client)
    assert fresh.stage("annotations", concept.name).rows() == stepwise.rows()


def test_disagreements_go_to_review_and_the_reviewer_decides(
    client: Client, login: Login, concept: Concept, tmp_path: Path
) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 4, seed=12)
    push.run(workspace, concept, client=client, num_annotators=2)
    folder = workspace.stage("annotations", concept.name)
    ids = {row["key"]: row["task_id"] for row in workspace.stage("labeling", concept.name).rows()}
    left = frozenset((y, x) for y in range(30) for x in range(20))
    right = frozenset((y, x) for y in range(30) for x in range(15, 40))
    disputed, agreed = list(ids)[:2], list(ids)[2:]
    with api(login) as first, new_annotator(login, "third@example.org") as second:
        for key, task_id in ids.items():
            for http, pixels in ((first, left), (second, right if key in disputed else left)):
                body = {"result": [sdk_region(pixels, "weapon")]}
                http.post(f"/api/tasks/{task_id}/annotations/", json=body).raise_for_status()

        result = pull.run(workspace, concept, client=client, review=True)
        assert (result.data["num_disagreements"], result.data["num_sent_to_review"]) == (2, 2)
        assert pull.run(workspace, concept, client=client, review=True).data["num_sent_to_review"] == 0
        title = workspace.stage("labeling", concept.name).read_json("project.json")["title"]
        (review_id,) = client.find_projects(f"{title} review")
        page = first.get("/api/tasks", params={"project": review_id, "fields": "all"}).json()
        tasks = {task["data"]["key"]: task for task in page["tasks"]}
        assert sorted(tasks) == disputed
        for task in tasks.values():
            versions = {made["model_version"]: sdk_pixels(made["result"][0]) for made in task["predictions"]}
            assert versions == {"annotator-1": left, "annotator-2": right}
            assert first.get(task["data"]["image"]).content[:4] == b"\x89PNG"

        chosen = tasks[disputed[0]]["predictions"][1]
        body = {"result": chosen["result"], "parent_prediction": chosen["id"]}
        review = first.post(f"/api/tasks/{tasks[disputed[0]]['id']}/annotations/", json=body).raise_for_status().json()
        assert pull.run(workspace, concept, client=client).done == 1
        rows = {row["key"]: row for row in folder.rows()}
        row = rows[disputed[0]]
        assert (row["state"], row["reasons"], row["reviewed"]["annotator"]) == ("changed", [], "annotator-1")
        found = read_mask(folder.path / row["masks"]["weapon"])
        assert {(int(y), int(x)) for y, x in np.argwhere(found)} == right
        assert rows[disputed[1]]["reasons"] == ["outline"]
        assert [rows[key]["reviewed"] for key in agreed] == [None, None]
        assert pull.run(workspace, concept, client=client).data["num_disagreements"] == 1

        first.delete(f"/api/annotations/{review['id']}/").raise_for_status()
        assert pull.run(workspace, concept, client=client).data["num_disagreements"] == 2
