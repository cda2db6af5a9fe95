"""The host cache: one worker's routed-expert rows, `[slots, L, K]` in host memory, indexed by KV slot.

A row counts as written only for the owner that its slot had when the step that computed it was launched (R4): a step takes a
`WriteTicket` at launch, which notes each page's generation, and the commit writes only where the generation is still the
same. Reading asks for the same equality, so a stale row of an earlier owner can never pass for the present one's, and nothing
has to be cleared when pages change hands.

It knows neither requests nor steps. Neighbours: `capture` (where rows come from), `collect` (where they go),
`common.memory.page_allocator` (whose generations it reads).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.routed_experts.spec import RowSpec

Slots = npt.NDArray[np.int64]
Rows = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class WriteTicket:
    """Whose slots these are: `[T]`, and the generation of each one's page. The right to write the rows of one launched step."""

    slots: Slots
    generations: npt.NDArray[np.int64]


class HostCache:
    """Rows by slot. `page_generations` is the allocator's own array, read and never written here."""

    def __init__(self, spec: RowSpec, page_generations: npt.NDArray[np.int64], page_size: int) -> None:
        self.spec = spec
        num_slots = len(page_generations) * page_size
        self._rows: Rows = np.zeros((num_slots, spec.num_layers, spec.top_k), dtype=spec.numpy_dtype)
        # The generation that each slot's row was written under; pages start at generation 1, so 0 is "never".
        self._written = np.zeros(num_slots, dtype=np.int64)
        # Touched now, or the first steps would wait for the system to find the memory: 5 ms at a time.
        self._rows.fill(0)
        self._written.fill(0)
        self._page_generations = page_generations
        self._page_size = page_size
        self.rows_committed = 0
        self.rows_dropped = 0

    def reserve(self, slots: Slots) -> WriteTicket:
        """Note who owns these slots now; called at launch by the step that will compute their rows."""
        return WriteTicket(slots, self._page_generations[slots // self._page_size])

    def commit(self, ticket: WriteTicket, rows: Rows) -> None:
        """Write a settled step's rows `[T, L, K]`; rows of slots that changed hands since the launch are dropped and counted."""
        current = ticket.generations == self._page_generations[ticket.slots // self._page_size]
        slots = ticket.slots[current]
        self._rows[slots] = rows[current]
        self._written[slots] = ticket.generations[current]
        self.rows_committed += len(slots)
        self.rows_dropped += len(ticket.slots) - len(slots)

    def is_current(self, ticket: WriteTicket) -> bool:
        """Whether none of a ticket's slots has changed hands; a copy made before this was asked is then the owner's own."""
        return bool((ticket.generations == self._page_generations[ticket.slots // self._page_size]).all())

    def read(self, slots: Slots) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """Copy the rows of `slots`, `[n, L, K]`, and say for each whether its present owner has written it, `[n]`."""
        return self._rows[slots], self._written[slots] == self._page_generations[slots // self._page_size]
