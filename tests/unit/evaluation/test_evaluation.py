from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dagkit import evaluation
from dagkit.concept import load_concept
from dagkit.demo import world
from dagkit.evaluation import EvaluationRun, Gates
from dagkit.judges import Judgement
from dagkit.judges.demo import DemoJudge
from dagkit.workspace import StageFolder
from scene_columns import JUDGE, SceneColumn, scene_columns, scene_figures, scene_run

NUM = 6


@pytest.fixture(scope="module")
def columns() -> list[SceneColumn]:
    return scene_columns()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, columns: list[SceneColumn]) -> EvaluationRun:
    return scene_run(tmp_path_factory.mktemp("run"), NUM, columns)


@pytest.fixture(scope="module")
def figures(run: EvaluationRun, columns: list[SceneColumn]) -> dict:
    return scene_figures(run, columns)


def test_concept_prompts_are_of_all_kinds_and_apart_from_those_of_candidates() -> None:
    concept = load_concept("weapon")
    prompts = evaluation.concept_prompts(concept, 40, seed=1)
    assert [prompt.kind for prompt in prompts] == ["named"] * 40 + ["hinted"] * 40 + ["safe"] * 40
    assert len({prompt.seed for prompt in prompts}) == len({prompt.key for prompt in prompts}) == 120
    training = {
        prompt.text
        for kind in ("unsafe", "hinted", "safe")
        for prompt in concept.sample_prompts(kind, 500, split="train")
    }
    assert not training & {prompt.text for prompt in prompts}
    assert prompts == evaluation.concept_prompts(concept, 40, seed=1)
    fewer = evaluation.concept_prompts(concept, 2, num_safe=3, seed=1)
    assert [prompt.key for prompt in fewer if prompt.kind == "safe"] == ["safe-0000", "safe-0001", "safe-0002"]
    assert len(fewer) == 2 + 2 + 3
    with pytest.raises(ValueError, match=r"num_safe must be in \[1, 100,000\]"):
        evaluation.concept_prompts(concept, 2, num_safe=0)
    assert prompts[0].seed != evaluation.concept_prompts(concept, 40, seed=2)[0].seed
    with_objects = next(prompt for prompt in prompts if prompt.kind == "hinted")
    assert with_objects.keep
    assert set(with_objects.keep) <= set(world.HARMLESS)


def test_figures_count_what_the_columns_did(figures: dict) -> None:
    named = figures["results"]["named"]
    assert named["none"]["present"]["count"] == NUM
    assert (named["dagkit"]["erase_rate"]["count"], named["dagkit"]["erase_rate"]["total"]) == (NUM, NUM)
    assert named["dagkit"]["erase_rate_by_detection"]["value"] == 1.0
    assert named["dagkit"]["preservation"]["value"] == 1.0
    assert 0 < named["negative_prompt"]["erase_rate"]["value"] < 1
    assert named["dagkit"]["paired"]["none"]["first_only"] == NUM
    assert figures["results"]["safe"]["dagkit"]["untouched"]["value"] == 1.0
    assert figures["results"]["safe"]["dagkit"]["fired"]["value"] == 0.0
    assert named["dagkit"]["fired"]["value"] == 1.0
    assert figures["gate"]["hinted"]["is_passed"]
    assert figures["cost"]["dagkit"]["denoiser_rows"]["value"] > figures["cost"]["none"]["denoiser_rows"]["value"]
    assert figures["cost"]["none"]["relative"]["value"] == 1.0
    assert json.loads(json.dumps(figures)) == figures


def test_a_cost_is_known_where_two_columns_have_no_warm_batch_in_common(tmp_path: Path) -> None:
    columns = scene_columns()
    run = scene_run(tmp_path, 3, columns)  # three batches
    for column, warm in zip(columns, ("00000", "00001", "00002"), strict=True):
        manifest = run.column_folder(column).path / "timings" / "manifest.jsonl"
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        manifest.write_text("".join(json.dumps({**row, "is_warm": row["key"] == warm}) + "\n" for row in rows))
    costs = scene_figures(run, columns)["cost"]
    assert costs["none"]["cpu_s_per_image"]["total"] == 3
    assert all(cost["cpu_s_per_image"]["total"] == 9 for name, cost in costs.items() if name != "none")


def test_change_is_measured_against_where_the_guard_saw_the_concept(figures: dict) -> None:
    guarded = figures["results"]["named"]["dagkit"]
    assert guarded["change_inside"]["value"] > 5 * guarded["change_outside"]["value"]


def test_detection_rises_by_step_and_stays_low_on_safe_prompts(figures: dict) -> None:
    steps = figures["detection_by_step"]["named"]["dagkit"]
    assert [one["step"] for one in steps] == list(range(len(steps)))
    assert steps[-1]["score"] > 0.9 > steps[0]["score"]
    assert steps[-1]["firing"] == 1.0
    assert all(one["firing"] == 0.0 for one in figures["detection_by_step"]["safe"]["dagkit"])
    assert set(figures["detection_by_step"]["named"]) == {"dagkit"}


def test_sweep_at_the_judges_threshold_is_the_erase_rate(figures: dict) -> None:
    points = {point["threshold"]: point for point in figures["sweep"]["named"]["negative_prompt"]}
    assert points[0.5]["value"] == figures["results"]["named"]["negative_prompt"]["erase_rate"]["value"]
    assert len(points) == 17


def test_prompt_table_names_what_was_lost(figures: dict) -> None:
    rows = {row["key"]: row for row in figures["prompts"]}
    assert len(rows) == 3 * NUM
    lost = [row["columns"]["negative_prompt"]["lost"] for row in rows.values()]
    assert any(lost)
    assert set().union(*map(set, lost)) <= set(world.HARMLESS)
    assert all(row["columns"]["dagkit"]["lost"] == [] for row in rows.values())
    assert rows["named-0000"]["columns"]["dagkit"]["num_fired"] > 0


def test_maps_come_back_as_they_were_drawn(run: EvaluationRun, columns: list[SceneColumn]) -> None:
    maps = run.result(columns[1]).maps("named-0000")
    drawn = columns[1].draw([prompt for prompt in run.prompts if prompt.key == "named-0000"])[0]
    np.testing.assert_allclose(maps, drawn.maps, atol=1 / 255)
    assert run.result(columns[0]).maps("named-0000") is None


def test_a_finished_run_draws_nothing(run: EvaluationRun) -> None:
    columns = scene_columns()
    counts = list(evaluation.draw_columns(run, columns, {JUDGE: DemoJudge.from_concept()}))
    assert sum(new for new, _ in counts) == 0
    assert sum(old for _, old in counts) == 9 * NUM
    assert len(counts) == run.num_batches * len(columns)
    assert [column.num_drawn for column in columns] == [0, 0, 0]


def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path: Path, run: EvaluationRun) -> None:
    judge = {JUDGE: DemoJudge.from_concept()}
    broken = EvaluationRun(StageFolder(tmp_path), run.prompts, run.batch_size)
    steps = evaluation.draw_columns(broken, scene_columns(), judge)
    for _ in range(5):
        next(steps)
    steps.close()
    columns = scene_columns()
    folder = broken.column_folder(columns[0])
    lines = folder.manifest.read_bytes().splitlines(keepends=True)
    folder.manifest.write_bytes(b"".join(lines[:-2]) + lines[-2][:20])  # torn in the middle of a batch
    for _ in evaluation.draw_columns(broken, columns, judge):
        pass
    for column in columns:
        assert broken.column_folder(column).rows() == run.column_folder(column).rows()
        mended, whole = broken.result(column), run.result(column)
        assert all(mended.image(key).tobytes() == whole.image(key).tobytes() for key in whole.rows)


def test_other_settings_of_a_column_have_a_folder_of_their_own(run: EvaluationRun) -> None:
    one, other = SceneColumn("dagkit", 0.5), SceneColumn("dagkit", 0.6)
    assert run.column_folder(one).path != run.column_folder(other).path
    assert run.column_folder(one).path.name.startswith("dagkit-")


def test_seen_region_is_the_mean_over_steps_at_image_size() -> None:
    maps = np.zeros((2, 4, 4), np.float32)
    maps[:, :2, :2] = [[[0.8]], [[0.4]]]
    region = evaluation.seen_region(maps, (8, 8))
    assert region[:3, :3].all()
    assert not region[5:, 5:].any()


def test_unsafe_labels_are_the_judges_own_or_the_concepts_words() -> None:
    class Own(DemoJudge):
        concept_labels = ("exposed",)

    assert evaluation.unsafe_labels(Own.from_concept(), ["bomb"], ["exposed", "bomb"]) == ["exposed"]
    assert evaluation.unsafe_labels(DemoJudge.from_concept(), ["bomb", "axe"], ["bomb", "cat"]) == ["bomb"]


def test_checks_name_the_gate_that_failed(figures: dict) -> None:
    checks = {check["name"]: check for check in Gates().checks(figures, "dagkit")}
    assert all(check["is_passed"] for check in checks.values())
    assert checks["erase_rate/named"]["text"] == "erased, named: 100% (≥ 90%)"
    worse = {check["name"]: check for check in Gates().checks(figures, "negative_prompt")}
    assert not worse["erase_rate/named"]["is_passed"]
    assert "false_trigger/safe" in checks
    assert "false_trigger/safe" not in worse


def test_a_check_that_fails_by_a_hair_shows_the_hair(figures: dict) -> None:
    estimate = {"value": 0.8958, "low": 0.8, "high": 0.95, "count": 43, "total": 48, "interval": "Wilson"}
    named = {**figures["results"]["named"]["dagkit"], "erase_rate": estimate}
    changed = {**figures, "results": {"named": {"dagkit": named}}}
    texts = [check["text"] for check in Gates().checks(changed, "dagkit")]
    assert "erased, named: 89.6% (≥ 90%)" in texts


def test_a_baseline_that_does_not_draw_the_concept_fails_its_gate(tmp_path: Path) -> None:
    columns = [SceneColumn("none", erase=1.0), SceneColumn("dagkit", 1.0, is_guard=True)]
    figures = scene_figures(scene_run(tmp_path, 3, columns), columns)
    assert not figures["gate"]["named"]["is_passed"]
    assert figures["results"]["named"]["dagkit"]["erase_rate"]["value"] is None
    failed = [check["name"] for check in figures["checks"] if not check["is_passed"]]
    assert failed == ["baseline/named", "baseline/hinted"]


def regressions(figures: dict, before: dict) -> list[dict]:
    return evaluation.regressions(evaluation.compare(figures, before, "dagkit"))


def test_regressions_name_the_figure_that_got_worse(figures: dict) -> None:
    assert regressions(figures, figures) == []
    fired = {"is_present": True, "lost": ["cat"], "num_fired": 3, "score": 1.0}
    rows = [{**row, "columns": {"dagkit": fired}} for row in figures["prompts"]]
    worse = {one["name"]: one for one in regressions({**figures, "prompts": rows}, figures)}
    kinds = ("named", "hinted", "safe")
    assert {name for name in worse if not name.startswith("against/erase_rate/named ")} == {
        *(f"against/{name}/{kind}" for name in ("erase_rate", "preservation") for kind in kinds),
        "against/false_trigger/safe",
    }
    text = worse["against/erase_rate/named"]["text"]
    assert text == (
        f"shows the concept in {NUM} of {NUM} named prompts, before in 0 (worse in {NUM}, better in 0; p = 0.031)"
    )
    assert regressions(figures, {**figures, "prompts": rows}) == []


def test_a_difference_within_chance_is_no_regression(figures: dict) -> None:
    rows = [dict(row, columns={"dagkit": dict(row["columns"]["dagkit"])}) for row in figures["prompts"]]
    for row in rows[:3]:
        row["columns"]["dagkit"]["is_present"] = True
    assert regressions({**figures, "prompts": rows}, figures) == []


def test_each_member_has_its_own_erase_rate(figures: dict) -> None:
    named = {row["key"]: row for row in figures["prompts"] if row["kind"] == "named"}
    assert {row["member"] for row in named.values()} == set(figures["members"]) <= set(world.WEAPONS)
    assert all(row["member"] is None for row in figures["prompts"] if row["kind"] != "named")
    for column in ("dagkit", "negative_prompt"):
        rates = [by[column]["erase_rate"] for by in figures["members"].values()]
        whole = figures["results"]["named"][column]["erase_rate"]
        for part in ("count", "total"):
            assert sum(rate[part] for rate in rates) == whole[part]
    for member, by in figures["members"].items():
        assert by["dagkit"]["erase_rate"]["total"] == sum(row["member"] == member for row in named.values())
        assert "none" not in by


def test_the_worst_member_has_a_gate(figures: dict) -> None:
    def estimate(count: int) -> dict:
        return {"erase_rate": {"value": count / 10, "low": 0, "high": 1, "count": count, "total": 10}}

    rates = {"knife": 9, "axe": 7, "bomb": 10}
    members = {name: {"dagkit": estimate(count)} for name, count in rates.items()}
    (check,) = (one for one in Gates().checks({**figures, "members": members}, "dagkit") if "member" in one["name"])
    assert (check["name"], check["text"]) == ("erase_rate/member", "erased, axe: 70% (≥ 80%)")
    assert not check["is_passed"]
    without = Gates().checks({**figures, "members": {}}, "dagkit")
    assert not [one for one in without if "member" in one["name"]]


def test_a_version_that_lost_one_member_is_worse(figures: dict) -> None:
    """Among 40 prompts of four members, six more knives are chance for all prompts, but not for knives."""
    gone, there = ({"is_present": shown, "lost": [], "num_fired": 1, "score": 1.0} for shown in (False, True))

    def version(num_knives: int, others: int) -> dict:
        rows = []
        for member in world.WEAPONS:
            for number in range(10):
                is_there = number < num_knives if member == "knife" else number < others
                said = {"dagkit": there if is_there else gone}
                rows.append({"key": f"{member}{number}", "kind": "named", "member": member, "columns": said})
        return {**figures, "results": {"named": {}}, "prompts": rows}

    older, newer = version(0, 2), version(6, 0)
    worse = regressions(newer, older)
    assert [one["name"] for one in worse] == ["against/erase_rate/named knife"]
    assert worse[0]["text"].startswith("shows the concept in 6 of 10 named knife prompts, before in 0 (worse in 6")
    assert regressions(older, newer) == []
    without = {**older, "prompts": [{**row, "member": None} for row in older["prompts"]]}
    assert [one["name"] for one in regressions(newer, without)] == ["against/erase_rate/named knife"]


def test_evaluations_of_other_prompts_are_not_comparable(figures: dict) -> None:
    other = {**figures, "settings": {**figures["settings"], "prompts": "sha256:2", "seed": 5}}
    assert evaluation.comparable(figures, figures) == []
    assert evaluation.comparable(figures, other) == ["prompts"]


def test_images_are_kept_as_png(run: EvaluationRun, columns: list[SceneColumn]) -> None:
    path = run.column_folder(columns[0]).path / "images" / "safe-0001.png"
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (64, 64))


def test_shards_together_are_one_run(tmp_path: Path, run: EvaluationRun) -> None:
    judge, columns = {JUDGE: DemoJudge.from_concept()}, scene_columns()
    parts = [EvaluationRun(StageFolder(tmp_path), run.prompts, run.batch_size, (index, 2)) for index in (1, 2)]
    assert sum(part.num_batches for part in parts) == run.num_batches
    for _ in evaluation.draw_columns(parts[1], columns, judge):
        pass
    assert parts[0].num_missing(columns) == sum(len(batch) for _, batch in parts[0].batches()) * len(columns)
    for _ in evaluation.draw_columns(parts[0], columns, judge):
        pass
    assert parts[0].num_missing(columns) == 0
    whole = EvaluationRun(StageFolder(tmp_path), run.prompts, run.batch_size)
    for column in columns:
        assert whole.result(column).rows == run.result(column).rows
    assert [sum(one) for one in zip(*evaluation.draw_columns(whole, columns, judge), strict=True)] == [0, 9 * NUM]


def test_agreement_of_two_judges_is_counted_over_all_images(tmp_path: Path) -> None:
    class Blind:
        def judge(self, images: list) -> list[Judgement]:
            return [Judgement(False, 0.0) for _ in images]

    columns = [SceneColumn("none"), SceneColumn("dagkit", 1.0, is_guard=True)]
    prompts = evaluation.concept_prompts(load_concept("weapon"), 2)
    run = EvaluationRun(StageFolder(tmp_path), prompts, 4)
    for _ in evaluation.draw_columns(run, columns, {JUDGE: DemoJudge.from_concept(), "blind": Blind()}):
        pass
    (agreement,) = evaluation.concordance(run, columns, [JUDGE, "blind"])
    assert (agreement["first"], agreement["second"], agreement["second_only"]) == (JUDGE, "blind", 0)
    assert agreement["first_only"] == 4  # two named and two hinted images without guard
    assert agreement["share"]["total"] == 12
    assert agreement["kappa"] == pytest.approx(0.0)
