"""The labelling page of a concept, as Label Studio's XML, and checks of what is sent to it.

The page hides the image until the annotator asks for it. Its controls are fixed: brush labels ``mask`` and choices
``verdict``, both on the object ``image``; what differs between concepts are the labels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from xml.sax.saxutils import quoteattr

from dagkit.concept import page_path, read_text
from dagkit.errors import LabelStudioError, brief
from dagkit.labelstudio import codec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from label_studio_sdk.label_interface import LabelInterface

    from dagkit.concept import Concept

MASK_CONTROL: Final = "mask"
VERDICT_CONTROL: Final = "verdict"
IMAGE_OBJECT: Final = "image"
NOTHING_UNSAFE: Final = "nothing unsafe here"
CANNOT_TELL: Final = "cannot tell"

_POSITIVE_COLOURS: Final = ("#d81b60", "#8e24aa", "#f4511e", "#6d4c41")
_NEGATIVE_COLOURS: Final = ("#1e88e5", "#00897b", "#3949ab", "#546e7a")
# Without the keys of the page itself (b, e, h, r, u, v) and of the two choices.
_HOTKEYS: Final = "123456789qwtyiop"

# The image is laid out, but not visible, until the panel is unfolded: inside the panel Label Studio would measure it
# while it has no size, and never fit it to the page. Should a later version rename the panel's class, it stays hidden.
_STYLE: Final = """\
    .dagkit-image, .dagkit-image img {visibility: hidden !important}
    .dagkit-page:has(.dagkit-reveal .ant-collapse-item-active) .dagkit-image {visibility: visible !important}
    .dagkit-reveal h4 {margin: 0; font-size: 13px; font-weight: normal}
    .lsf-table__cell img, .dm-table__cell img {filter: blur(12px) grayscale(1)}"""
_COMFORT: Final = "You may fold it away, skip the task or stop at any time."


def labelling_page(concept: Concept) -> str:
    """The XML of a concept's labelling page: the user's own ``<name>.xml`` where there is one, else a rendered one.

    Raises:
        ConceptError: the file cannot be read.
        LabelStudioError: it is no page from which answers for this concept can be read.
    """
    path = page_path(concept)
    if path is None:
        return labelling_config(concept)
    xml = read_text(path)
    check_page(xml, concept, brief(str(path)))
    return xml


def check_page(xml: str, concept: Concept, where: str) -> None:
    """Checks that a labelling page has what predictions and answers need.

    Args:
        xml: of the page.
        concept: whose labels it must offer.
        where: how to name it in an error.

    Raises:
        LabelStudioError: it is not valid, or lacks a control, a label or a choice.
    """
    if "<!DOCTYPE" in xml.upper() or "<!ENTITY" in xml.upper():
        raise LabelStudioError(f"{where}: a labelling page defines no entities of its own. Remove its DOCTYPE.")
    try:
        page = interface(xml)
    except LabelStudioError as error:
        raise LabelStudioError(f"{where}: {error}") from error
    labels = [*concept.labels.positive, *concept.labels.negative]
    for control, tag, wanted in (
        (MASK_CONTROL, "BrushLabels", labels),
        (VERDICT_CONTROL, "Choices", [NOTHING_UNSAFE, CANNOT_TELL]),
    ):
        found = next((one for one in page.controls if one.name == control), None)
        if found is None or found.tag != tag or list(found.to_name) != [IMAGE_OBJECT]:
            raise LabelStudioError(
                f'{where}: expected <{tag} name="{control}" toName="{IMAGE_OBJECT}">, which the answers are read from, '
                f"but {'there is none' if found is None else f'got <{found.tag}>'}. Add it."
            )
        lacking = [name for name in wanted if name not in found.labels]
        foreign = [name for name in found.labels if name not in wanted]
        if lacking or (foreign and control == MASK_CONTROL):
            what = f"lacks {', '.join(map(repr, lacking))}" if lacking else f"has {', '.join(map(repr, foreign))}"
            raise LabelStudioError(
                f"{where}: expected the values {brief(', '.join(wanted))} in <{tag}>, but it {brief(what)}. "
                "Mend the page, or the labels of the concept file."
            )
    image = next((one for one in page.objects if one.name == IMAGE_OBJECT), None)
    if image is None or image.tag != "Image" or image.value != f"${IMAGE_OBJECT}":
        raise LabelStudioError(
            f'{where}: expected <Image name="{IMAGE_OBJECT}" value="${IMAGE_OBJECT}"/>, the candidate. Add it.'
        )


def labelling_config(concept: Concept) -> str:
    """Renders the XML of the labelling page.

    Args:
        concept: its labels become brush labels, positive ones in warm colours, negative ones in cold.

    Returns:
        XML for a project's ``label_config``.
    """
    labels = [
        *zip(concept.labels.positive, _cycle(_POSITIVE_COLOURS, len(concept.labels.positive)), strict=True),
        *zip(concept.labels.negative, _cycle(_NEGATIVE_COLOURS, len(concept.labels.negative)), strict=True),
    ]
    hotkeys = list(_HOTKEYS)
    lines = [
        f"      <Label value={quoteattr(name)} background={quoteattr(colour)}"
        + (f' hotkey="{hotkeys.pop(0)}"' if hotkeys else "")
        + "/>"
        for name, colour in labels
    ]
    notes = [f"Mark every: {', '.join(concept.labels.positive)}"]
    if concept.labels.negative:
        notes.append(f"Cut out of it: {', '.join(concept.labels.negative)}")
    return f"""\
<View className="dagkit-page">
  <Style>
{_STYLE}
  </Style>
  <Header size="5" value={quoteattr(". ".join(notes) + ".")}/>
  <View style="display: flex; gap: 24px; flex-wrap: wrap">
    <BrushLabels name="{MASK_CONTROL}" toName="{IMAGE_OBJECT}" showInline="true">
{chr(10).join(lines)}
    </BrushLabels>
    <Choices name="{VERDICT_CONTROL}" toName="{IMAGE_OBJECT}" choice="single-radio" showInline="true">
      <Choice value="{NOTHING_UNSAFE}" hotkey="n"/>
      <Choice value="{CANNOT_TELL}" hotkey="c"/>
    </Choices>
  </View>
  <View className="dagkit-reveal">
    <Collapse>
      <Panel value="Show image">
        <Header size="6" value="{_COMFORT}"/>
      </Panel>
    </Collapse>
  </View>
  <View className="dagkit-image">
    <Image name="{IMAGE_OBJECT}" value="${IMAGE_OBJECT}" defaultZoom="fit" zoom="true" zoomControl="true"
           brightnessControl="true"/>
  </View>
</View>
"""


def _cycle(colours: Sequence[str], num: int) -> list[str]:
    return [colours[index % len(colours)] for index in range(num)]


@lru_cache(maxsize=4)
def interface(xml: str) -> LabelInterface:
    """The SDK's parsed view of a labelling page.

    Raises:
        LabelStudioError: the XML is not a valid labelling page.
    """
    from label_studio_sdk._legacy.exceptions import (
        LabelStudioValidationErrorSentryIgnored,
        LabelStudioXMLSyntaxErrorSentryIgnored,
        LSConfigParseException,
    )
    from label_studio_sdk.label_interface import LabelInterface

    invalid = (
        LabelStudioValidationErrorSentryIgnored,
        LabelStudioXMLSyntaxErrorSentryIgnored,
        LSConfigParseException,
        ValueError,
    )
    try:
        parsed = LabelInterface(xml)
        parsed.validate()
    except invalid as error:
        raise LabelStudioError(f"The labelling page is not valid: {brief(str(error), 400)}") from error
    return parsed


def check_prediction(xml: str, prediction: dict[str, Any], width: int, height: int, where: str) -> None:
    """Checks a prediction before it is sent: the server takes anything, and annotators would find out.

    Args:
        xml: labelling page.
        prediction: ``{"model_version", "score", "result"}``.
        width: of the image, pixels.
        height: of the image, pixels.
        where: how to name it in an error, e.g. the task's key.

    Raises:
        LabelStudioError: unknown labels or controls, a score outside [0, 1], damaged masks, or masks of another size.
    """
    # Without the numbers of the masks: the SDK would look at each, and print them all.
    bare = {**prediction, "result": [_without_rle(region) for region in prediction["result"]]}
    problems = interface(xml).validate_prediction(bare, return_errors=True)
    if problems:
        raise LabelStudioError(f"{where}: the prediction does not fit the labelling page: {'; '.join(problems)}.")
    for region in prediction["result"]:
        if region["type"] != "brushlabels":
            continue
        size = (region["original_width"], region["original_height"])
        if size != (width, height):
            raise LabelStudioError(
                f"{where}: the mask is {size[0]}x{size[1]} pixels, but its image {width}x{height}. Run `dagkit "
                "premask` again."
            )
        try:
            codec.decode(region["value"]["rle"], width, height)
        except LabelStudioError as error:
            raise LabelStudioError(f"{where}: {error}") from error


def _without_rle(region: dict[str, Any]) -> dict[str, Any]:
    return {**region, "value": {**region["value"], "rle": [0]}} if "rle" in region["value"] else region
