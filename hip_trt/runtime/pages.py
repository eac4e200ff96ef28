"""Pages of the KV pool: who holds which, and whether a page table can be trusted.

Everything here works on host integers, before a call or when the table changes; nothing runs on the hot path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hip_trt.errors import RuntimeInputError

NO_PAGE = -1
"""Value of a page table slot that holds no page."""


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that ``tokens`` tokens fill, the last one perhaps in part."""
    return -(-tokens // page_size)


class PageAllocator:
    """Free list of a pool's pages, with a count of the sequences that hold each one.

    A page is free at count 0, owned at 1, and shared (a common prefix, read only) above.

    Args:
        pages: pages in the pool.
    """

    def __init__(self, pages: int) -> None:
        self._holders = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def available(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """Sequences that hold the page."""
        return self._holders[page]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free pages; the caller has checked :attr:`available`."""
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add one holder to each page."""
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Remove one holder from each page; pages without holders are free again."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)


def check_page_table(table: Sequence[Sequence[int]], lengths: Sequence[int], *, pages: int, page_size: int) -> None:
    """Refuse a page table that would make a call read or write outside a sequence's own pages.

    Args:
        table: [B][M] pages of each sequence in order; -1 where none.
        lengths: [B] tokens that each sequence has committed.
        pages: pages in the pool.
        page_size: tokens per page.

    Raises:
        RuntimeInputError: naming sequence, slot and page, if a page is out of range or twice in one sequence, if a
            sequence has a gap or too few pages for its length, or if two sequences share a page that one of them may
            still write.
    """
    readers: dict[int, int] = {}
    writers: dict[int, int] = {}
    for row, (slots, length) in enumerate(zip(table, lengths, strict=True)):
        seen: dict[int, int] = {}
        for slot, page in enumerate(slots):
            if page == NO_PAGE:
                continue
            where = f"page_table: sequence {row}, slot {slot}: page {page}"
            if not 0 <= page < pages:
                raise RuntimeInputError(
                    f"{where} is out of range.", f"The pool has pages 0 to {pages - 1}; {NO_PAGE} means none."
                )
            if page in seen:
                raise RuntimeInputError(
                    f"{where} is already in slot {seen[page]} of the same sequence.",
                    "Give each slot of a sequence a page of its own.",
                )
            if slot > 0 and slots[slot - 1] == NO_PAGE:
                raise RuntimeInputError(
                    f"{where} comes after slot {slot - 1}, which holds none ({NO_PAGE}).", "Fill slots from the first."
                )
            seen[page] = slot
            full = (slot + 1) * page_size <= length
            other = writers.get(page) if full else readers.get(page, writers.get(page))
            if other is not None:
                raise RuntimeInputError(
                    f"{where} is shared with sequence {other} but not full in both.",
                    f"Sequences may share full pages only (sequence {row} has {length} tokens, {page_size} to a page).",
                )
            (readers if full else writers)[page] = row
        needed = pages_for(length, page_size)
        if len(seen) < needed:
            raise RuntimeInputError(
                f"page_table: sequence {row}, slot {len(seen)}: no page ({NO_PAGE}), but its {length} tokens need "
                f"{needed} pages of {page_size}.", "Add pages to the sequence's row.",
            )
