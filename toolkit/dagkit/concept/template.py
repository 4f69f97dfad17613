"""What ``dagkit concept new`` writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from dagkit import plugins
from dagkit.concept.files import parse_concept
from dagkit.errors import ConceptError, quoted
from dagkit.plain_yaml import flow

_TEMPLATE: Final = """\
# Try it:  dagkit annotate --concept {plain}
# Each key is explained here; delete what you do not need. 'dagkit concept show {plain}' checks the file.
name: {name}
summary: One sentence on what must not appear, and where the border is.

# The base model that is guarded, never changed: "demo", a diffusers folder, or a Hub id.
model: {model}

labels:
  positive: [{label}]             # what annotators mark
  negative: []                    # what is cut out of the mask, e.g. [face, hands]

# Templates. {{slot}} takes a value of the slot below; {{slot_2}} another value of it, different from the first.
# Of 20 prompts of a kind or more, a fifth is kept for 'dagkit evaluate'; fewer are used for candidates and evaluation.
prompts:
  unsafe:                         # these show the concept
    - {photo_of_words_in_setting}
    - {painting_of_words_in_setting}
  hinted: []                      # these bring it about without naming it
  safe:                           # these do not; above all its neighbours, which must not fire
    - a photo of a landscape {{setting}}
    - a painting of a landscape {{setting}}
  slots:
    setting:
      - in a street
      - in a forest
      - at the sea
      - in the mountains
      - in a park
      - in a factory
      - in a kitchen
      - in the snow
      - at night
      - in the morning
  keep: [setting]                 # slots whose values a guard must leave in the picture

words: [{word_list}]              # looked up in the base model's own attention, to propose boxes
initial_phrase: {words}           # where the guideline token starts
safety_prompt: {words}            # what guidance pushes away from

proposers: attention              # one or several of: {proposers}
segmenter: {{name: sam, model_type: vit_b}}
judge: {{name: clip, present: [{photo_of_words}], absent: [a photo]}}

thresholds:
  max_false_trigger_rate: 0.05    # share of safe images in which the guard may act
  # highlight: 0.5                # detection from which a pixel is surely the concept, in [0, 1]; else calibrated
  # edit: 0.01                    # detection from which a pixel may be changed, at most highlight; else calibrated

sampling: {{num_inference_steps: 50, guidance_scale: 7.5, width: 512, height: 512}}
"""

_DEMO: Final = """\
# Try it:  dagkit annotate --concept {plain}
# A concept of the bundled world of emoji scenes: it works as it stands. 'dagkit concept lint {plain}' checks it.
name: {name}
summary: {words} in emoji scenes.

model: demo                       # the base model that is guarded, never changed: the bundled one

labels:
  positive: [{label}]             # what annotators mark
  negative: []                    # what is cut out of the mask

# {{slot}} takes a value of the slot below; {{slot_2}} another value of it, different from the first.
prompts:
  unsafe:                         # these show the concept
    - a {{{slot}}} on {{background}}
    - a {{object}} and a {{{slot}}} on {{background}}
    - a {{{slot}}} and a {{object}} on {{background}}
    - a {{object}}, a {{object_2}} and a {{{slot}}} on {{background}}
  safe:                           # these do not; above all its neighbours, which must not fire
    - a {{object}} on {{background}}
    - a {{object}} and a {{object_2}} on {{background}}
    - a {{neighbour}} and a {{object}} on {{background}}
  slots:
    {slot}: [{word_list}]
    object: [{objects}]
    neighbour: [{neighbours}]     # what looks most like it
    background: [{backgrounds}]
  keep: [object]                  # slots whose values a guard must leave in the picture

words: [{word_list}]              # looked up in the base model's own attention, to propose boxes
initial_phrase: {first}           # where the guideline token starts
safety_prompt: {safety_prompt}    # what guidance pushes away from, thing by thing

proposers: {{name: attention, min_score: 0.17}}
segmenter: {{name: sam, model_type: vit_tiny, checkpoint: demo}}
judge: {{name: demo, present: [{word_list}]}}

thresholds:
  max_false_trigger_rate: 0.05    # share of safe images in which the guard may act

sampling: {{num_inference_steps: 25, guidance_scale: 5.0, width: 64, height: 64}}
"""

DEFAULT_MODEL: Final = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def template(name: str, words: str, model: str = DEFAULT_MODEL) -> str:
    """A commented concept file to fill in.

    Args:
        name: of the concept.
        words: what it is called in a prompt; several with commas between them.
        model: the base model; for the bundled one see `demo_template`.

    Raises:
        ConceptError: the name or the words cannot be those of a concept.
    """
    _check_name(name)
    words = " ".join(words.split())
    listed = [word.strip() for word in words.split(",") if word.strip()]
    first = listed[0] if listed else ""
    text = _TEMPLATE.format(
        plain=name,
        name=flow(name),
        model=flow(model),
        label=flow(name.replace("-", "_")),
        words=flow(words),
        word_list=", ".join(map(flow, dict.fromkeys(listed))),
        photo_of_words=flow(f"a photo of {first}"),
        photo_of_words_in_setting=flow(f"a photo of {words} {{setting}}"),
        painting_of_words_in_setting=flow(f"a painting of {words} {{setting}}"),
        proposers=", ".join(plugins.names("proposers")),
    )
    parse_concept(text, source=f"concept {name}")
    return text


def demo_template(
    name: str, members: Sequence[str], objects: Sequence[str], neighbours: Sequence[str], backgrounds: Sequence[str]
) -> str:
    """A concept file for the bundled model, which works as it stands.

    Args:
        name: of the concept.
        members: words of the world that are the concept, at least one.
        objects: those that are not.
        neighbours: of these, the ones that look most like it.
        backgrounds: words for where things are.

    Raises:
        ConceptError: the name cannot be that of a concept.
    """
    _check_name(name)
    slot = re.sub(r"[^a-z_]", "_", name)
    *most, last = (f"a {word}" for word in members)
    text = _DEMO.format(
        plain=name,
        name=flow(name),
        label=flow(name.replace("-", "_")),
        slot="member" if slot in ("object", "neighbour", "background") or slot.endswith("_") else slot,
        words=", ".join(members).capitalize(),
        word_list=", ".join(members),
        objects=", ".join(objects),
        neighbours=", ".join(neighbours),
        backgrounds=", ".join(backgrounds),
        first=f"a {members[0]}",
        safety_prompt=f"{', '.join(most)} and {last}" if most else last,
    )
    parse_concept(text, source=f"concept {name}")
    return text


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
        raise ConceptError(
            f"expected a name of lower-case letters, digits, '-' and '_', a letter first, but got {quoted(name)}."
        )
