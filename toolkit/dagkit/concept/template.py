"""What ``dagkit concept new`` writes."""

from __future__ import annotations

import re
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
model: stable-diffusion-v1-5/stable-diffusion-v1-5

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


def template(name: str, words: str) -> str:
    """A commented concept file to fill in.

    Args:
        name: of the concept.
        words: what it is called in a prompt; several with commas between them.

    Raises:
        ConceptError: the name or the words cannot be those of a concept.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
        raise ConceptError(
            f"expected a name of lower-case letters, digits, '-' and '_', a letter first, but got {quoted(name)}."
        )
    words = " ".join(words.split())
    listed = [word.strip() for word in words.split(",") if word.strip()]
    first = listed[0] if listed else ""
    text = _TEMPLATE.format(
        plain=name,
        name=flow(name),
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
