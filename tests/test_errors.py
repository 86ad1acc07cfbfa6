"""What comes from a stranger's file reaches a terminal as text, never as an order to it."""

import pytest

from dora_export.errors import printable, shown

ORDERS = {
    "\x1b[2J": r"\x1b[2J", "\x9b31m": r"\x9b31m", "\x07": r"\x07", "\r": r"\r", "\x7f": r"\x7f",
    "\u202e": r"\u202e", "\u2028": r"\u2028", "\ud800": r"\ud800",
}  # fmt: skip


@pytest.mark.parametrize(("order", "text"), ORDERS.items(), ids=ORDERS.values())
def test_orders_to_a_terminal_are_escaped(order, text):
    assert shown(f"a{order}b") == f"a{text}b"
    assert printable(f"a{order}b") == f"a{text}b"


def test_names_stay_in_one_short_line_and_messages_keep_theirs():
    assert shown("a\nb") == r"a\nb"
    assert printable("a\nb") == "a\nb"
    assert shown("layer é 🦜") == printable("layer é 🦜") == "layer é 🦜"
    assert shown("x" * 120) == "x" * 120
    assert shown("x" * 121) == "x" * 119 + "…"
