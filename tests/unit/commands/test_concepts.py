"""concept new for the bundled model, and concept lint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dagkit import demo
from dagkit.cli import command
from dagkit.concept import load_concept
from dagkit.demo import world
from dagkit.errors import ConceptError, DagkitError
from dagkit.judges import build_judge

NEW = ("concept", "new", "animal", "--model", "demo")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str, typed: str | None = None) -> Result:
    result = CliRunner().invoke(command, arguments, input=typed)
    if result.exception and not isinstance(result.exception, DagkitError | SystemExit):
        raise result.exception
    return result


def test_a_concept_of_the_world_works_as_it_stands():
    done = invoke(*NEW, "--words", "cat, dog,duck")
    where = "annotation_configs/animal.yaml"
    assert done.output == f"concept: written to {where}. It works as it stands; check it: dagkit concept lint animal\n"
    concept = load_concept("animal")
    assert (concept.model, concept.members, concept.words) == ("demo", ["cat", "dog", "duck"], ["cat", "dog", "duck"])
    assert concept.safety_prompt == "a cat, a dog and a duck"
    assert set(concept.prompts.slots["object"]) == set(world.CLASSES) - {"cat", "dog", "duck"}
    assert invoke("concept", "lint", "animal").output == "concept lint: 0 errors, 0 warnings\n"
    judge = build_judge(concept)
    scenes = [("dog", "bomb"), ("bomb", "knife"), ("fish",)]
    said = judge.judge(
        [Image.fromarray(world.render_scene(np.random.default_rng(i), one).image) for i, one in enumerate(scenes)]
    )
    assert [one.is_present for one in said] == [True, False, False]
    assert said[0].score == said[0].labels["dog"]
    assert judge.concept_labels == ("cat", "dog", "duck")
    assert judge.settings["present"] == ["cat", "dog", "duck"]
    assert isinstance(invoke(*NEW, "--words", "cat").exception, ConceptError)  # never overwritten


def test_words_are_asked_for_where_they_are_not_given():
    asked = invoke(*NEW, typed="fish\n")
    assert "The bundled world has these objects: cat, dog, " in asked.output
    assert "Which of them are the concept: " in asked.output
    assert load_concept("animal").safety_prompt == "a fish"
    assert load_concept("animal").summary == "Fish in emoji scenes."
    assert (
        "Which of them are the concept [cat]: " in invoke("concept", "new", "cat", "--model", "demo", typed="\n").output
    )
    assert load_concept("cat").words == ["cat"]
    assert load_concept("cat").prompts.slots["cat"] == ["cat"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cat, dgo", "--words: 'dgo' is no object of the bundled world. Did you mean 'dog'? It has cat, dog, "),
        ("unicorn", "--words: 'unicorn' is no object of the bundled world. It has cat"),
        (", ", "--words: ', ' is no object of the bundled world"),
        (",".join(world.CLASSES[1:]), "expected at least two objects that are not the concept"),
    ],
)
def test_words_that_the_world_does_not_have_are_named(words: str, said: str):
    error = invoke(*NEW, "--words", words).exception
    assert isinstance(error, ConceptError)
    assert said in str(error)
    assert not Path("annotation_configs").exists()


@pytest.mark.parametrize("name", ["object", "background", "neighbour", "a-b", "a1", "x_"])
def test_any_name_makes_a_valid_file(name: str):
    assert invoke("concept", "new", name, "--model", "demo", "--words", "axe, knife").exit_code == 0
    assert load_concept(name).members == ["axe", "knife"]


def test_a_file_for_another_model_names_it_and_its_judge_takes_it():
    for name, model in {"graffiti": None, "rust": "acme/model-xl", "moss": "./my model: 1"}.items():
        line = ["concept", "new", name, "--words", "graffiti, a tag", *(["--model", model] if model else [])]
        assert "Fill it in, then: dagkit concept show" in invoke(*line).output
        assert load_concept(name).model == (model or "stable-diffusion-v1-5/stable-diffusion-v1-5")
        assert invoke("concept", "show", name).exit_code == 0


def test_neighbours_look_alike():
    assert world.neighbours(["knife"], 3)
    assert not {"knife", "axe"} & set(world.neighbours(["knife", "axe"], 18))
    assert len(world.neighbours(world.WEAPONS, 16)) == 16


def written(**changes: str) -> str:
    """The file of an animal, with some lines changed: the key that they begin with -> all of them."""
    assert invoke(*NEW, "--words", "cat, dog").exit_code == 0
    path = Path("annotation_configs/animal.yaml")
    lines = path.read_text().splitlines()
    for key, new in changes.items():
        [index] = [index for index, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        lines[index] = new
    path.write_text("\n".join(lines) + "\n")
    return path.read_text()


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        (
            {"safety_prompt": "safety_prompt: a cat and a house"},
            1,
            "error: safety_prompt: it names house, which must be kept",
        ),
        (
            {"words": "words: [cat, unicorn]"},
            1,
            "error: words: the bundled model never saw unicorn and draws something",
        ),
        (
            {"judge": "judge: demo"},
            1,
            "error: judge: it looks for bomb, knife, axe, dynamite, but the concept is cat, dog",
        ),
        (
            {"judge": "judge: {name: demo, presnt: [cat]}"},
            1,
            "error: plugins: concept 'animal': judge demo: unknown option",
        ),
        ({"model": "model: nowhere at all"}, 1, "error: model: 'nowhere at all' is no folder, and no Hub id"),
        ({"background": "    background: [grass]"}, 0, "warning: prompts.slots.background: it has one value, 'grass'"),
        (
            {
                "object": "    object: [cup, ball]",
                "background": "    background: [sand, snow]",
                "neighbour": "    neighbour: [axe]",
            },
            0,
            "are too few to be split",
        ),
        ({"keep": "  keep: []"}, 0, "warning: prompts.keep: it is empty: evaluate cannot tell what else stays"),
        ({"keep": "  keep: [neighbour]"}, 0, "warning: prompts.keep: no unsafe prompt uses 'neighbour'"),
        ({"neighbour": "    neighbour: [cup]"}, 0, "warning: prompts.safe: only cup stand in safe prompts alone"),
        ({"initial_phrase": "initial_phrase: 7"}, 1, "error: file: annotation_configs/animal.yaml: line"),
        ({"keep": "  unused: [cup]"}, 1, "error: file: "),
        (
            {"model": "model: acme/elsewhere"},
            0,
            "warning: model: the tokenizer of 'acme/elsewhere' is not on this machine",
        ),
    ],
)
def test_lint_says_what_to_do(changes: dict[str, str], status: int, said: str):
    written(**changes)
    done = invoke("concept", "lint", "animal")
    assert said in done.output
    assert done.exit_code == status, done.output


def test_a_slot_that_nothing_uses_is_an_error_and_a_concept_that_is_not_there_too():
    path = Path("annotation_configs/animal.yaml")
    text = written()
    path.write_text(text.replace("    background:", "    colour: [red]\n    background:"))
    done = invoke("concept", "lint", "animal", "--json")
    assert done.exit_code == 1
    found = json.loads(done.output)
    assert (found["errors"], found["warnings"], len(found["remarks"])) == (1, 0, 1)
    said = "prompts.slots.colour: no template uses it. Write {colour} in a template, or remove the slot."
    assert said in found["remarks"][0]["message"]
    assert "'wepon' is not a concept. Did you mean 'weapon'" in str(invoke("concept", "lint", "wepon").exception)


def test_words_in_pieces_are_told_where_the_tokenizer_is(tmp_path: Path):
    shutil.copytree(demo.model_path() / "tokenizer", tmp_path / "model" / "tokenizer")
    written(model="model: ./model", words="words: [cat, zebra]", judge="judge: {name: demo, present: [cat, dog]}")
    done = invoke("concept", "lint", "animal")
    assert "warning: words: the tokenizer cuts zebra (z e br a) to pieces, so no row of attention is" in done.output
    assert done.exit_code == 0


def test_the_shipped_concepts_have_no_errors():
    for name in ("weapon", "nudity", "violence"):
        found = json.loads(invoke("concept", "lint", name, "--json").output)
        assert [one for one in found["remarks"] if one["is_error"] and one["where"] != "plugins"] == []
    assert json.loads(invoke("concept", "lint", "weapon", "--json").output)["errors"] == 0
