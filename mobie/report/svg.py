"""Putting an SVG file into an HTML page: its ids made its own, everything taken out that could act or load."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from mobie.errors import DataError

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
LOCAL_URL = re.compile(r"url\(\s*['\"]?#([^)'\"]+)['\"]?\s*\)")
SELECTOR = re.compile(r"([^{},]+)(?=[,{])")
REMEDY = "draw it again with `python -m mobie figure`"
UNWANTED = frozenset({"metadata", "title", "desc", "script", "foreignObject", "a"})


def inline_svg(text: str, name: str, label: str) -> str:
    """An `svg` element for an HTML page.

    name:  prefix of its ids, unlike that of any other figure of the page.
    label: text for those who do not see it.

    Links to elements of the same file and embedded images (`data:`) are kept; scripts, event handlers and whatever
    loads from elsewhere are not. Style rules reach the figure only.

    Raises:
        DataError: the text is no SVG.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(
            f"{name}: got no well-formed SVG ({error}); draw it again with `python -m mobie figure`"
        ) from error
    if root.tag != f"{{{SVG}}}svg":
        raise DataError(
            f"{name}: got an element {root.tag!r}, expected svg; draw it again with `python -m mobie figure`"
        )
    _remove_unwanted(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
        if element.tag == "style":
            element.text = SELECTOR.sub(rf"#{name} \1", element.text or "")
        element.attrib = _attributes(element, name)
    width = root.attrib.pop("width", "")
    root.attrib.pop("height", None)
    root.attrib |= {"id": name, "role": "img", "aria-label": label}
    if re.fullmatch(r"[\d.]+(pt|px|in)?", width):
        root.set("style", f"max-width: {width}")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _remove_unwanted(parent: ElementTree.Element) -> None:
    for child in list(parent):
        if not isinstance(child.tag, str) or child.tag.rpartition("}")[2] in UNWANTED:
            parent.remove(child)
        else:
            _remove_unwanted(child)


def _attributes(element: ElementTree.Element, name: str) -> dict[str, str]:
    """Attributes with the ids renamed, without namespaces of their own, handlers and outside links."""
    kept = {}
    for key, value in element.attrib.items():
        key = "href" if key == f"{{{XLINK}}}href" else key
        if key.startswith("{") or key.lower().startswith("on"):
            continue
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href":
            if value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            elif not value.startswith("data:image/"):
                continue
        kept[key] = LOCAL_URL.sub(rf"url(#{name}-\1)", value)
    return kept
