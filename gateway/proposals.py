"""What can be proposed on one association: it has 128 presentation contexts at most (PS3.8 9.3.2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MOST_CLASSES = 125
"""So many pairs of SOP class and transfer syntax; verification, commitment and query are proposed beside them."""
T = TypeVar("T")


def share_out(items: Sequence[T], needs: Callable[[T], Iterable[tuple[str, str]]]) -> list[list[T]]:
    """Share items among associations, so that what an item `needs` can be proposed on its own; nearly always one."""
    wanted = [frozenset(needs(one)) for one in items]
    if len(frozenset().union(*wanted)) <= MOST_CLASSES:
        return [list(items)]
    parts: list[list[T]] = []
    proposed: frozenset[tuple[str, str]] = frozenset()
    for number in sorted(range(len(items)), key=lambda one: sorted(wanted[one])):
        if not parts or len(proposed | wanted[number]) > MOST_CLASSES:
            parts.append([])
            proposed = frozenset()
        parts[-1].append(items[number])
        proposed |= wanted[number]
    return parts
