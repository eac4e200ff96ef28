"""A log, as a program writes it: a depot whose parcels are booked, sorted, loaded, delayed, retried and delivered.

Nothing is filled in from a list of sentences: a simulation runs, and says what happens. So numbers, drivers and faults
come again long after they first appear, as in real logs.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

from hip_trt.evaluate.texts import Text

_TOWNS = ("Aldery", "Brinton", "Casterle", "Dunmoor", "Eskdale", "Farlow", "Garsden", "Hexby", "Inverel", "Jarrow")
_DRIVERS = ("okafor", "lindqvist", "moreau", "tanaka", "haddad", "novak", "silva", "byrne")
_FAULTS = ("address not found", "nobody at home", "van breakdown", "label unreadable", "customs hold")


@dataclass(order=True)
class _Event:
    time: int
    number: int
    kind: str = field(compare=False)
    parcel: int = field(compare=False)
    tries: int = field(compare=False, default=0)


def log(lines: int = 30_000, seed: int = 0) -> Text:
    """So many lines of it."""
    chance = random.Random(seed)
    events: list[_Event] = []
    parcels: dict[int, tuple[str, str, int]] = {}  # town, driver, grams
    written: list[str] = []
    counter = time = 0

    def soon(after: int, kind: str, parcel: int, tries: int = 0) -> None:
        nonlocal counter
        counter += 1
        heapq.heappush(events, _Event(time + chance.randrange(after // 2, 2 * after), counter, kind, parcel, tries))

    soon(5, "book", 0)
    while len(written) < lines:
        event = heapq.heappop(events)
        time = event.time
        stamp = f"{8 + time // 3600 % 24:02d}:{time // 60 % 60:02d}:{time % 60:02d}"
        if event.kind == "book":
            number = chance.choice([number for number in chance.sample(range(100_000, 1_000_000), 9)
                                    if number not in parcels])
            parcels[number] = (chance.choice(_TOWNS), chance.choice(_DRIVERS), chance.randrange(50, 30_000))
            town, _, grams = parcels[number]
            written.append(f"{stamp} INFO  desk    booked parcel {number} to {town}, {grams} g")
            soon(20, "book", 0)
            soon(240, "sort", number)
            continue
        town, driver, grams = parcels[event.parcel]
        if event.kind == "sort":
            written.append(f"{stamp} DEBUG sorter  parcel {event.parcel} weighed {grams} g, chute {_TOWNS.index(town)}")
            soon(600, "load", event.parcel)
        elif event.kind == "load":
            written.append(f"{stamp} INFO  bay     parcel {event.parcel} loaded for {town}, driver {driver}")
            soon(900, "deliver", event.parcel, event.tries)
        elif chance.random() < 0.25 and event.tries < 3:
            fault = chance.choice(_FAULTS)
            written.append(f"{stamp} WARN  {driver:<9} parcel {event.parcel}: {fault} in {town}, try {event.tries + 1}")
            soon(1200, "load", event.parcel, event.tries + 1)
        else:
            written.append(f"{stamp} INFO  {driver:<9} parcel {event.parcel} delivered in {town} ({grams} g)")
            del parcels[event.parcel]
    return Text("log", "\n".join(written) + "\n", f"a simulated depot's log, seed {seed}")
