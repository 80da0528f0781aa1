"""Make SVG figures small enough to stand inside an HTML page."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ...core.text import visible
from ..figures.style import _ROLE_OF, style


def inline_svg(figure: Figure, name: str, wide: bool = False) -> str:
    """Return ``figure`` as an SVG element for HTML, with the page's colours and ids that begin with ``name``.

    It scales to the width of its box; a ``wide`` one does not shrink below its own width.
    """
    out = io.StringIO()
    with style():
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    root = ElementTree.fromstring(visible("".join(out.getvalue().partition("<svg")[1:])))
    for parent in list(root.iter()):  # no metadata, no styles for the whole page, no backgrounds of figure and axes
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
        if re.match("(figure|axes)_", parent.get("id", "")) and parent[0].get("id", "").startswith("patch_"):
            parent.remove(parent[0])
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {word.rpartition("}")[2]: value for word, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if attributes.get("transform", "").startswith("rotate(-0 "):
            del attributes["transform"]
        element.attrib.clear()
        element.attrib.update({word: _shortened(word, value, name) for word, value in attributes.items()})
        element.tail = None
        if element.tag != "text":
            element.text = None
    width = float(root.attrib["viewBox"].split()[2])
    bounds = f"max-width:{1.35 * width:.0f}px" + (f";min-width:{width:.0f}px" if wide else "")
    root.attrib = {"viewBox": root.attrib["viewBox"], "style": bounds, "aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _shortened(word: str, value: str, name: str) -> str:
    if word == "id":
        return f"{name}-{value}"
    if word == "href" and value.startswith("data:"):
        return value
    if word in ("href", "style", "clip-path"):
        value = re.sub(r"(url\(#|^#)(?=[a-zA-Z])", rf"\g<1>{name}-", value)
    if word == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        return re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: f"var(--{_ROLE_OF[found[0].lower()]})", value)
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", " ".join(value.split()))
