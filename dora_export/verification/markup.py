"""HTML and SVG as trees, so that no text can become markup and no element stays open.

What ``render`` returns is well-formed XML and HTML at once; elements without an end tag in HTML
(``br``, ``img``, ``meta``) cannot be written that way and belong into the page's frame.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

Child = str | ET.Element | None
VOID = {"br", "hr", "img", "input", "link", "meta", "col", "wbr", "source", "base", "area"}


def el(tag: str, *children: Child, **attributes: object) -> ET.Element:
    """Return an element.

    Args:
        tag: Its name.
        children: Text and elements, in order; None is left out.
        attributes: ``class_`` is written class, ``aria_label`` aria-label; None is left out.
    """
    assert tag not in VOID, f"Bug: {tag} has no end tag in HTML"
    element = ET.Element(tag)
    for name, value in attributes.items():
        if value is not None:
            element.set(name.rstrip("_").replace("_", "-"), printable(str(value)))
    add(element, *children)
    return element


def add(element: ET.Element, *children: Child) -> None:
    """Append text and elements to an element."""
    for child in children:
        if child is None:
            continue
        if isinstance(child, ET.Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + printable(child)
        else:
            element.text = (element.text or "") + printable(child)


def printable(text: str) -> str:
    """Return text with what no reader can see (controls, overrides of direction) escaped."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def render(element: ET.Element) -> str:
    """Return an element as text."""
    return ET.tostring(element, encoding="unicode", short_empty_elements=False)
