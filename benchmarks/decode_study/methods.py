"""The ways to choose that the study compares: baselines, then candidates."""

from __future__ import annotations

from .representatives import (
    Representative,
    box,
    clusters,
    exact,
    few_bits,
    gaussian,
    low_rank,
    mean,
    middle,
    outliers,
    outliers_and_box,
    principal,
    strided,
    sub_means,
)
from .selection import (
    DENSE,
    RANDOM,
    WINDOW_ONLY,
    Method,
    Pool,
    Ranking,
    largest,
    normalised,
    share_of_all,
    summed_mass,
)


def one(representative: Representative, pool: Pool = normalised, block: int = 64) -> Method:
    """One stage, one ranking."""
    return Method((Ranking(representative, pool),), block=block)


def mixed(representative: Representative, share: float, safe: Representative | None = None) -> tuple[Ranking, ...]:
    """Rankings: a share by one, normalised; the rest by bounds, raw, which lose no lone key that is large enough."""
    return (Ranking(representative, normalised, share), Ranking(safe or box(1), largest, 1 - share))


def two(first: tuple[Ranking, ...], widen: int, second: Representative, pool: Pool = normalised) -> Method:
    """Two stages."""
    return Method(first, widen, Ranking(second, pool))


BEST = one(exact(log_sum=True), share_of_all)
"""No choice of blocks holds more of the heads' attention."""
BASELINES = (
    DENSE, WINDOW_ONLY, RANDOM, one(exact(log_sum=False), largest), one(exact(log_sum=False)),
    one(exact(log_sum=True)), BEST,
)

_QUARTER = box(0.25)
_FIRST = (Ranking(_QUARTER, normalised),)

SCREENED = (
    *BASELINES,
    # One stage, 4 D bytes a block unless said.
    one(box(1), largest), one(box(1)), one(box(0.125)), one(_QUARTER), one(box(0.5)),
    one(_QUARTER, largest), one(_QUARTER, summed_mass),
    one(mean(), largest), one(mean()), one(middle(), largest), one(middle()),
    one(box(1, bits=8), largest), one(box(0.25, bits=8)),  # 2 D
    one(box(1, bits=8, part=32, log_sum=False), largest), one(box(0.25, bits=8, part=32)),
    one(box(0.25, bits=8, part=32), summed_mass),
    one(box(0.25, bits=8, part=16)),  # 8 D
    one(box(0.5, bits=4, part=16)),
    one(sub_means(32)), one(sub_means(16)), one(sub_means(8)),  # 2 D, 4 D, 8 D
    one(gaussian(1)), one(gaussian(0.5)), one(gaussian(0.25)),
    one(outliers(1)), one(outliers(3)), one(outliers(7)),  # 2 D, 4 D, 8 D
    one(outliers(3), largest), one(outliers(3), summed_mass), one(outliers(3), share_of_all), one(outliers(15)),
    one(outliers_and_box(1, 0.125)), one(outliers_and_box(2, 0.125)), one(outliers_and_box(2, 0.25)),
    one(clusters(2)), one(clusters(4)), one(clusters(4), summed_mass), one(clusters(4), share_of_all),
    one(clusters(8)),  # 2 D, 4 D, 8 D
    one(low_rank(1)), one(low_rank(2)), one(low_rank(2), summed_mass), one(low_rank(4)),
    one(principal(8)), one(principal(4)), one(few_bits(2)),  # 4.5 D, 9 D, 20 D
    # Mixtures
    Method(mixed(_QUARTER, 0.5)), Method(mixed(_QUARTER, 0.75)),
    Method(mixed(box(0.25, bits=8), 0.75, box(1, bits=8))), Method(mixed(clusters(4), 0.75, box(1, bits=8))),
    Method(mixed(outliers(3), 0.75, box(1, bits=8))), Method(mixed(outliers(1), 0.75, box(1, bits=8))),
    # Two stages
    *(two(first, widen, second) for second in (strided(8), strided(16), few_bits(2), principal(8), principal(4))
      for widen, first in ((2, _FIRST), (4, _FIRST))),
    *(two(mixed(_QUARTER, 0.5), 4, second) for second in (strided(8), strided(16), few_bits(2))),
    two(_FIRST, 4, low_rank(2)), two(_FIRST, 4, clusters(8)),
    two(_FIRST, 4, outliers(7)), two((Ranking(outliers(3), normalised),), 4, strided(8)),
    two((Ranking(outliers(3), normalised),), 4, few_bits(2)), two(_FIRST, 4, exact(log_sum=True)),
    # Blocks of 32, twice as many
    one(_QUARTER, block=32), one(box(1), largest, block=32), one(box(0.25, bits=8), block=32),
    one(clusters(2), block=32), one(outliers(1), block=32), one(exact(log_sum=True), block=32),
)

_BOUNDS, _BOUNDS_8 = (Ranking(box(1), largest),), (Ranking(box(1, bits=8), largest),)
_HALF = mixed(_QUARTER, 0.5)

CHOSEN = two(_BOUNDS, 4, few_bits(2))
"""What the rest is compared with in most detail."""
CHOSEN_RAW = two(_BOUNDS, 4, few_bits(2), largest)
EXACT = one(exact(log_sum=True))

FINALISTS = (
    *BASELINES[1:], one(exact(log_sum=True), largest),
    CHOSEN, two(_BOUNDS, 8, few_bits(2)), two(_BOUNDS, 4, few_bits(2), largest),
    two(_BOUNDS, 4, few_bits(2, log_sum=False), largest),
    two(_BOUNDS_8, 4, few_bits(2)), two(_BOUNDS, 2, few_bits(2)), two(_HALF, 4, few_bits(2)),
    two(_HALF, 8, few_bits(2)), two(_BOUNDS, 4, few_bits(3)), two(_BOUNDS, 4, principal(2)),
    two(_BOUNDS, 4, exact(log_sum=True)), two(_BOUNDS, 4, strided(16)),
    one(few_bits(2)), one(few_bits(2, log_sum=False), largest), one(few_bits(3)), one(principal(4)), one(principal(2)),
    one(box(1), largest), one(box(1, bits=8), largest), one(box(1)), one(_QUARTER), Method(_HALF), one(mean()),
    one(middle(), largest), one(gaussian(0.25)), one(clusters(8)),
)

REUSED = (
    one(exact(log_sum=True)), one(exact(log_sum=False), largest), CHOSEN, two(_BOUNDS, 8, few_bits(2)),
    two(_BOUNDS, 4, few_bits(2), largest), two(_BOUNDS, 4, few_bits(2, log_sum=False), largest),
    two(_HALF, 4, few_bits(2)), one(few_bits(2)), one(principal(4)), one(box(1), largest), one(_QUARTER),
)
"""Measured with choices kept for 8 steps too."""

THRESHOLDED = (CHOSEN, one(box(1), largest))
"""Measured with a value threshold too."""
