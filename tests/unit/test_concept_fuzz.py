"""Concept files as they should not be: one error with lines, soon, and never a hang; what loads can be drawn from."""

import os
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from dagkit import plain_yaml
from dagkit.cli import command
from dagkit.concept import MAX_CHECKED, MAX_MISTAKES, PROMPT_KINDS, Concept, load_concept, parse_concept
from dagkit.errors import MAX_MESSAGE, ConceptError, DagkitError
from dagkit.stages.generate import plan_prompts

GOOD = """\
name: gore
summary: Blood.
model: demo
labels: {positive: [blood], negative: []}
prompts:
  unsafe: ["a {thing} {place}", "two {thing} and {thing_2}"]
  safe: [a wall]
  slots: {thing: [cut, wound], place: [here, there]}
  keep: [place]
words: [blood]
initial_phrase: blood
safety_prompt: blood
proposers: attention
judge: {name: clip, threshold: 0.5}
thresholds: {highlight: 0.5, edit: 0.1}
sampling: {num_inference_steps: 5, width: 64}
"""
SECONDS = 10
"""Within which any file is read; most take milliseconds."""


def read(text: str) -> Concept | str:
    """The concept, or what is wrong with it."""
    start = time.process_time()
    try:
        concept = parse_concept(text, source="gore.yaml")
        found: Concept | str = concept
    except DagkitError as error:
        found = str(error)
    assert time.process_time() - start < SECONDS
    assert not isinstance(found, str) or 0 < len(found) <= MAX_MESSAGE + 100
    return found


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


MISTAKES = {
    "no value": (changed("[here, there]", "[]"), "line 8: prompts.slots.place: value should have at least 1 item"),
    "too few values": (
        changed("[cut, wound]", "[cut]"),
        "line 6: prompts.unsafe.1: 'two {thing} and {thing_2}' needs 2 different values of 'thing', but the slot has 1",
    ),
    "equal values": (changed("[cut, wound]", "[cut, 'cut ']"), "line 8: prompts.slots.thing: 'cut' stands there twice"),
    "equal templates": (changed("[a wall]", "[a wall, a wall]"), "line 7: prompts.safe: 'a wall' stands there twice"),
    "equal labels": (changed("negative: []", "negative: [x, x]"), "line 4: labels.negative: 'x' stands there twice"),
    "two kinds": (changed("a wall", "a cut here"), "line 7: prompts.safe.0: 'a cut here' is made by prompts.unsafe"),
    "value with a slot": (changed("there]", "'{thing}']"), "line 8: prompts.slots.place.1: '{thing}' holds a brace"),
    "unused slot": (changed("slots: {", "slots: {time: [now], "), "line 8: prompts.slots.time: no template uses it"),
    "unusable slot": (changed("slots: {", "slots: {a-b: [x], "), "line 8: prompts.slots.a-b: expected lower-case"),
    "far too many prompts": (
        changed("a wall", f"'{{place}}{''.join(f'{{place_{n}}}' for n in range(2, 90))}'").replace(
            "[here, there]", str([f"p{n}" for n in range(100)])
        ),
        "makes over 1",
    ),
    "long prompts": (
        changed("a wall", f"'{'{place}' * 100}'").replace("there]", "t" * 900 + "]"),
        "makes prompts of 90,000 characters, but at most 1,000 are allowed",
    ),
    "date": (changed("name: gore", "name: 2020-13-45"), "line 1: name: expected lower-case letters"),
    "tag": (changed("name: gore", "name: !!bool maybe"), "line 1: not valid YAML here: tags are not allowed"),
    "set": (changed("[blood]", "!!set {blood}"), "line 4: not valid YAML here: tags are not allowed"),
    "long number": (changed("64", "9" * 6000), "line 16: not valid YAML here: a number of 6,000 characters"),
    "long number in quotes": (changed("64", f"'{'9' * 6000}'"), "line 16: sampling.width: unable to parse"),
    "nan": (changed("0.1", ".nan"), "line 15: not valid YAML here: expected a finite number, but got '.nan'"),
    "inf option": (changed("threshold: 0.5", "threshold: .inf"), "line 14: not valid YAML here: expected a finite"),
    "nan in quotes": (changed("0.1", "'nan'"), "line 15: thresholds.edit: input should be a finite number"),
    "percent in quotes": (changed("0.1", "'40'"), "line 15: thresholds.edit: input should be less than or equal to 1"),
    "overflow": (changed("0.1", "1.0e+999"), "expected a finite number"),
    "flag for a number": (changed("steps: 5", "steps: yes"), "sampling.num_inference_steps: expected a number"),
    "edit above highlight": (changed("0.1", "0.6"), "line 15: thresholds: edit (0.6) must not exceed highlight (0.5)"),
    "no in a list": (changed("words: [blood]", "words: [no]"), "line 10: words.0: ...Put it in quotes"),
    "deep flow": ("[" * 100_000, "line 1: "),
    "deep block": ("".join(f"{' ' * n}a:\n" for n in range(500)), "line 21: more than 20 levels"),
    "deep option": (changed("threshold: 0.5", "a: " + "[" * 50 + "]" * 50), "line 14: more than 20 levels"),
    "key twice": (GOOD + "name: other\n", "line 17: not valid YAML here: the key 'name' stands in line 1 already"),
    "inner key twice": (
        changed("labels: {", "labels: {positive: [x], "),
        "line 4: not valid YAML here: the key 'positive' stands in line 4 already",
    ),
    "option twice": (changed("name: clip", "name: clip, threshold: 1"), "the key 'threshold' stands in line 14"),
    "key that is a number": (GOOD + "1: 2\n", "line 17: not valid YAML here: the key '1' means a number"),
    "key that is a yes": (changed("slots: {", "slots: {yes: [a], "), "line 8: ...the key 'yes' means a yes or no"),
    "key that is nothing": (GOOD + "~: 2\n", "line 17: ...the key '~' means nothing"),
    "key that is a list": (GOOD + "? [a, b]\n: 2\n", "line 17: ...a key is a name, not a mapping, a list or an alias"),
    "merge key": (GOOD + "<<: {name: x}\n", "line 17: ...merge keys"),
    "anchor": (changed("[a wall]", "&a [a wall]"), "line 7: ...anchors"),
    "aliases that grow": ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n", "line 3: ...aliases"),
    "alias of itself": ("a: &a [*a]\n", "line 1: ...aliases"),
    "two documents": (f"{GOOD}---\n{GOOD}", "line 17: a second document begins here"),
    "NUL": (changed("Blood.", "a\0b"), r"line 2: the character '\x00' cannot stand in a text"),
    "NUL by escape": (changed("Blood.", r'"a\0b"'), r"line 2: ...the character '\x00' cannot stand in a text"),
    "escape sequence": (changed("Blood.", r'"\e[31m"'), r"line 2: ...the character '\x1b' cannot stand in a text"),
    "surrogate": (changed("Blood.", "\ud800"), r"line 2: the character '\ud800'"),
    "tab": (GOOD + "\tx: 1\n", "line 17: not valid YAML"),
    "nothing": ("# only a comment\n", "expected 'key: value' lines, but got nothing"),
    "plugin without a name": (changed("name: clip", "nme: clip"), "line 14: judge.name: missing"),
    "plugin that is a number": (changed("attention", "7"), "line 13: proposers.0: "),
    "long name": (changed("gore", "g" * 100_000), r"line 1: name: ...(100,000 characters)"),
    "50,000 keys": (GOOD + "".join(f"k{n}: 1\n" for n in range(50_000)), "50,000 mistakes:\n  line 17: k0: unknown"),
    "50,000 keys twice": ("a: 1\n" * 50_000, "49,999 mistakes:\n  line 2: "),
    "50,000 templates": (changed("[a wall]", f"[{','.join(f'w{n}' for n in range(50_000))}]"), "at most 2000 items"),
    "50,000 values": (changed("[here, there]", f"[{','.join(f'v{n}' for n in range(50_000))}]"), "at most 2000 items"),
    "50,000 slots": (
        changed("slots: {", "slots: {" + "".join(f"k{n}: [a], " for n in range(50_000))),
        "50,000 mistakes:\n  line 8: prompts.slots.k0: expected lower-case letters",
    ),
    "more than is checked": (
        changed("[a wall]", f"[{','.join(f'{n} ' + 'wall ' * 100 for n in range(400))}]"),
        f"characters, but at most {MAX_CHECKED:,} are allowed",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_with_its_line(name: str):
    text, expected = MISTAKES[name]
    message = read(text)

    assert isinstance(message, str), "it was taken"
    assert message.startswith("gore.yaml: ")
    assert len(message.splitlines()) <= MAX_MISTAKES + 2
    assert [part for part in expected.split("...") if part not in message] == []


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        changed("name: gore", "name:\tgore"),
        changed("Blood.", "2020-13-45"),
        changed("words: [blood]", "words: [12:30]"),
        changed("Blood.", ">\n  Blood\n  and more."),
        changed("Blood.", "🩸"),
    ],
)
def test_what_only_looks_wrong_is_taken(text: str):
    assert isinstance(read(text), Concept)


def test_a_python_without_libyaml_reads_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plain_yaml, "_LOADER", yaml.SafeLoader)
    assert read(GOOD) == parse_concept(GOOD, source="gore.yaml")
    for name in ("tag", "deep block", "key twice", "alias of itself", "NUL by escape", "tab", "two documents"):
        assert "line " in str(read(MISTAKES[name][0]))
    assert r"'\ud800' cannot stand" in str(read(changed("Blood.", r'"\ud800"')))


NASTY = (
    "[] {} ~ no .nan -.inf 0 -1 1e3 0x1F 1_0 2020-13-45 12:30 '' '{a}' '{thing}' '{thing_2}{place}' <<: *a &a !!int "
    "!x | > '\0' \"\x1b\" ? - : , # % @ ` {a: {b: [c]}} [[]] [a,a] [~] [1] {1: a} thing cut 🩸 é"
)
values = st.sampled_from(NASTY.split()) | st.text(max_size=6)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    lines = GOOD.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(lines) - 1))
        line, value = lines[number], draw(values)
        key, colon, rest = line.partition(": ")
        words = rest.split(" ")
        match draw(st.sampled_from(["value", "word", "cut", "repeat", "indent", "insert"])):
            case "value":
                lines[number] = f"{key}{colon}{value}"
            case "word":
                words[draw(st.integers(0, len(words) - 1))] = value
                lines[number] = f"{key}{colon}{' '.join(words)}"
            case "cut":
                lines[number] = line[: draw(st.integers(0, len(line)))]
            case "repeat":
                lines.insert(number, line)
            case "indent":
                lines[number] = " " * draw(st.integers(0, 4)) + line.lstrip()
            case "insert":
                position = draw(st.integers(0, len(line)))
                lines[number] = line[:position] + value + line[position:]
    return "\n".join(lines)


@given(damaged())
@seed(16)
@settings(max_examples=300, deadline=None, database=None)
def test_damage_is_named_or_harmless(text: str):
    concept = read(text)
    if isinstance(concept, str):
        return
    for kind in PROMPT_KINDS:
        distinct = [prompt.text for prompt in concept.all_prompts(kind)]
        assert len(set(distinct)) == len(distinct)
        for split in ("train", "test"):
            if distinct:
                assert len(concept.sample_prompts(kind, 30, split=split)) == 30
    assert len(plan_prompts(concept, 25, 0.4, 0.15, 0)) == 25


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "long"])
def test_path_that_is_no_file(kind: str, tmp_path: Path):
    path = tmp_path / "gore.yaml"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/full")
        case "long":
            path = tmp_path / f"{'x' * 5000}.yaml"
    for reference in (str(path), str(path).removesuffix(".yaml") + "\0.yaml"):
        with pytest.raises(ConceptError) as caught:
            load_concept(reference)
        assert len(str(caught.value)) < 500


def test_what_is_no_file_is_no_concept_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "annotation_configs" / "folder.yaml").mkdir(parents=True)
    os.mkfifo(tmp_path / "annotation_configs" / "pipe.yaml")
    (tmp_path / "annotation_configs" / "broken.yaml").write_text("name: [")
    (tmp_path / "annotation_configs" / "gore.yaml").write_text(GOOD)
    listed = CliRunner().invoke(command, ["concept", "list"])

    assert [line.split()[0] for line in listed.output.splitlines()] == ["gore", "nudity", "violence", "weapon"]
    assert "broken.yaml: line 2: not valid YAML" in str(listed.exception)
    for name in ("folder", "pipe", "x" * 5000, "a\0b"):
        shown = CliRunner().invoke(command, ["concept", "show", name])
        assert isinstance(shown.exception, ConceptError)
        assert "is not a concept" in str(shown.exception)
