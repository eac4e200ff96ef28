"""The study's tables, findings and plot, from its data alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hip_trt.evaluate.retrieval import interval as uncertainty
from hip_trt.evaluate.study import Cell, Plot, Study, Table

from . import perplexity
from .methods import CHOSEN, EXACT, FINALISTS, SCREENED
from .run import BUDGET, WIDER
from .selection import DENSE, RANDOM, Method

Row = Mapping[str, Any]
LENGTHS = (32_768, 65_536, 131_072)
NEAR = 608
"""Tokens of sink and window, on average: 9.5 blocks of 64."""
RATE = 4.3e12
"""Bytes a second that an H200 copies."""


@dataclass(frozen=True)
class DecodeStudy(Study):
    """With this study's own file names."""

    @property
    def stem(self) -> str:
        return "decode_study"

    def publish(self, folder: Path) -> list[Path]:
        """Write the files, the plot with them."""
        return self.write(folder, {"": plot(self.data)})


class Found:
    """Rows by what they are of; rows of the screening where the study itself has none."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def _rows(self, part: str) -> Iterator[Row]:
        yield from self._data[part]
        yield from self._data.get("screening", {}).get(part, [])

    def perplexity(self, method: Method, budget: int, interval: int = 1) -> Row | None:
        wanted = (method.name, budget, interval, 0.0)
        return next((row for row in self._rows("perplexity")
                     if (row["method"], row["budget"], row["interval"], row["threshold"]) == wanted), None)

    def facts(self, method: Method, budget: int, length: int, interval: int = 1) -> Row | None:
        wanted = (method.name, budget, interval, length)
        return next((row for row in self._data["facts"]
                     if (row["method"], row["budget"], row["interval"], row["length"]) == wanted), None)

    def mass(self, method: Method, budget: int, length: int) -> Row | None:
        wanted = (method.name, budget, length)
        return next((row for row in self._rows("mass")
                     if (row["method"], row["budget"], row["length"]) == wanted), None)


def worst(row: Row | None) -> str | None:
    """The worst text's change with its standard error, and the mean over texts."""
    if row is None:
        return None
    return f"{row['worst']:+.2f} ± {row['texts'][row['worst_text']]['error']:.2f} ({row['mean']:+.2f})"


def share(row: Row | None) -> str | None:
    return None if row is None else f"{100 * row['right'] / row['of']:.1f}"


def percent(row: Row | None, key: str = "found") -> str | None:
    return None if row is None else f"{100 * row[key]:.0f}"


def megabytes(method: Method, budget: int) -> float:
    """Read by a step at 128k with 8 KV heads of size 128 in bfloat16."""
    return sum(method.bytes_per_step(131_072, budget, heads=8, dim=128, near=NEAR).values()) / 1e6


def main_table(data: Mapping[str, Any]) -> Table:
    found = Found(data)
    quarter, eighth, least = map(perplexity.budget_of, perplexity.SHARES)
    rows: list[Sequence[Cell]] = []
    for method in (DENSE, *FINALISTS):
        everything = method.special == "dense"
        rows.append([
            method.name, *(worst(found.perplexity(method, budget)) for budget in (BUDGET, quarter, eighth, least)),
            *(share(found.facts(method, 0 if everything else BUDGET, length)) for length in LENGTHS),
            percent(found.mass(method, BUDGET, LENGTHS[0])), percent(found.mass(method, BUDGET, LENGTHS[-1])),
            percent(found.mass(method, BUDGET, LENGTHS[-1]), "worst_head"),
            100 * method.state_bytes(128) / (64 * 128 * 4) * 64 / method.block, megabytes(method, BUDGET),
        ])
    return Table(
        "One choice at every step",
        ["chosen by", "perplexity, K 128", "25%", "12.5%", "6%", "facts 32k", "64k", "128k", "mass 32k", "mass 128k",
         "worst head", "state, % of KV", "MB a step"], rows,
        "Perplexity: change against dense at 16k in percent, the worst of six texts with its standard error, in "
        "brackets the mean over texts; two stretches a text at K 128, one at budgets in percent of the candidates. "
        f"Facts: percent of {data['facts'][0]['of']} found with K 128. Mass: percent of the attention outside sink and "
        "window, K 128. MB: read by a step at 128k, 8 KV heads of size 128 in bfloat16; exact rows read all keys. "
        "At 16k 4K holds all candidates where K is 62 or more, so a first stage of 4K shows only at 12.5 and 6%.",
        {"state, % of KV": ".1f", "MB a step": ".1f"},
    )


def kept_table(data: Mapping[str, Any]) -> Table:
    found = Found(data)
    names = {method.name: method for method in (*SCREENED, *FINALISTS)}
    keys = sorted({(row["method"], row["budget"], row["interval"]) for row in data["facts"]
                   if row["interval"] != 1 or row["budget"] != BUDGET},
                  key=lambda key: (key[1], key[2], key[0]))
    rows: list[Sequence[Cell]] = []
    for name, budget, steps in keys:
        if name == DENSE.name:
            continue
        method = names[name]
        rows.append([name, budget // 64, "one step late" if steps == 0 else steps,
                     worst(found.perplexity(method, budget, steps)),
                     *(share(found.facts(method, budget, length, steps)) for length in LENGTHS)])
    return Table("Choices kept, and other numbers of blocks",
                 ["chosen by", "K", "interval", "perplexity", "facts 32k", "64k", "128k"], rows,
                 "With the two newest candidate blocks always in where a choice is kept. One step late: every step "
                 "attends to what the step before it would have chosen.")


def threshold_table(data: Mapping[str, Any]) -> Table:
    rows = [
        [row["method"], f"{row['threshold']:g}", "yes" if row["renormalised"] else "no", worst(row),
         100 * row["values_read"], *(result["change"] for result in row["texts"].values())]
        for row in data["perplexity"] if row["threshold"]
    ]
    texts = list(data["perplexity"][0]["texts"])
    return Table("Values of little probability left out, K 128",
                 ["chosen by", "threshold", "renormalised", "perplexity", "values read, %", *texts], rows,
                 formats={"values read, %": ".1f", **dict.fromkeys(texts, "+.2f")})


def text_table(data: Mapping[str, Any]) -> Table:
    found = Found(data)
    rows: list[Sequence[Cell]] = []
    for method, budget in ((CHOSEN, BUDGET), (CHOSEN, WIDER), (EXACT, BUDGET)):
        row = found.perplexity(method, budget)
        if row is not None:
            rows.append([method.name, budget // 64, *(f"{text['change']:+.2f} ± {text['error']:.2f}"
                                                      for text in row["texts"].values())])
    return Table("By text", ["chosen by", "K", *data["perplexity"][0]["texts"]], rows)


def screening_table(data: Mapping[str, Any]) -> Table:
    found = Found(data)
    quarter, eighth = (perplexity.budget_of(part) for part in perplexity.SHARES[:2])
    screened = {(row["method"], row["budget"], row["length"]): row
                for row in data.get("screening", {}).get("facts", [])}
    rows = [
        [method.name, worst(found.perplexity(method, quarter)), worst(found.perplexity(method, eighth)),
         *(share(screened.get((method.name, BUDGET, length))) for length in LENGTHS[1:]),
         percent(found.mass(method, BUDGET, LENGTHS[-1])), megabytes(method, BUDGET)]
        for method in SCREENED if found.mass(method, BUDGET, LENGTHS[-1]) is not None
    ]
    return Table("All that was screened", ["chosen by", "perplexity, 25%", "12.5%", "facts 64k", "128k", "mass 128k",
                                           "MB a step"], rows,
                 "One stretch of each text, 128 facts a length.", {"MB a step": ".1f"})


def findings(data: Mapping[str, Any]) -> list[str]:
    found = Found(data)
    lines = []
    for title, budget, steps in (("Default", BUDGET, 1), ("Quality", WIDER, 1), ("Default, interval 2", BUDGET, 2),
                                 ("Default, one step late", BUDGET, 0), ("Default, interval 8", BUDGET, 8)):
        row = found.perplexity(CHOSEN, budget, steps)
        if row is None:
            continue
        lost = []
        for length in LENGTHS:
            dense, sparse = found.facts(DENSE, 0, length), found.facts(CHOSEN, budget, length, steps)
            if dense is not None and sparse is not None:
                lost.append(f"{100 * (sparse['right'] - dense['right']) / dense['of']:+.1f}")
        read = f"; {megabytes(CHOSEN, budget):.1f} MB a step at 128k, " \
               f"{megabytes(CHOSEN, budget) * 1e6 / RATE * 1e6:.1f} µs at 4.3 TB/s" if steps == 1 else ""
        lines.append(f"{title}, K {budget // 64}: worst text {worst(row)}%, facts {' / '.join(lost)} points against "
                     f"dense at 32k / 64k / 128k{read}.")
    row = found.facts(CHOSEN, BUDGET, LENGTHS[1])
    if row is not None:
        low, high = uncertainty(row["right"], row["of"])
        lines.append(f"A share of facts is uncertain: {row['right']} of {row['of']} is {100 * low:.1f} to "
                     f"{100 * high:.1f}% (95%).")
    bounds, exact, chosen = (found.perplexity(method, perplexity.budget_of(0.25))
                             for method in (FINALISTS[_index('bounds, raw')], EXACT, CHOSEN))
    if bounds and exact and chosen:
        lines.append(f"At 25% of the candidates the worst text loses {chosen['worst']:.2f}%, exact log-sums "
                     f"{exact['worst']:.2f}%, bounds alone {bounds['worst']:.2f}%.")
    return lines


def _index(name: str) -> int:
    return next(index for index, method in enumerate(FINALISTS) if method.name == name)


LABELLED = (
    CHOSEN.name, EXACT.name, RANDOM.name, "bounds, raw", "centre + 0.25 radius, normalised",
    "8 clusters, 8 bits, normalised", "keys in D/4 channels of 4 bits, log-sum, normalised",
    "4K by bounds, raw; then 16 strided keys, log-sum, normalised", "middle 16 keys, largest, raw",
)
"""Named in the plot."""


def plot(data: Mapping[str, Any]) -> Plot:
    """Quality against bytes read."""
    def draw(figure: Any) -> None:
        found = Found(data)
        figure.set_size_inches(9, 6)
        axes = figure.subplots()
        for method in FINALISTS:
            row = found.perplexity(method, perplexity.budget_of(0.25))
            if row is None or method.special == "sink and window only":
                continue
            place = (megabytes(method, BUDGET), row["mean"])
            axes.plot(*place, "*" if method is CHOSEN else "o", color="C1" if method is CHOSEN else "C0",
                      markersize=16 if method is CHOSEN else 5)
            if method.name in LABELLED:
                axes.annotate(method.name, place, fontsize=7, textcoords="offset points", xytext=(8, -3))
        axes.set_xscale("log")
        axes.set_xlim(right=1000)
        axes.set_yscale("log")
        axes.set_xlabel("MB read by a step at 128k, K 128, 8 KV heads of size 128")
        axes.set_ylabel("change of perplexity at 16k, 25% of the candidates, mean of texts, %")

    return draw


def study(data: Mapping[str, Any], parameters: Mapping[str, Any], measured_on: Mapping[str, Any]) -> DecodeStudy:
    """All of it."""
    tables = [main_table(data), kept_table(data), threshold_table(data), text_table(data)]
    if "screening" in data:
        tables.append(screening_table(data))
    return DecodeStudy(
        "decode_study", "Which key blocks a decode step attends to",
        "python -m benchmarks.decode_study --model FILE.gguf --out benchmarks/results", parameters, measured_on, data,
        tables, findings(data),
        ["Perplexity: 14,336 tokens are read densely, 2,048 are decoded, YaRN of factor 2, float32.",
         "Mass: 16 stretches of 8,192 tokens side by side, which exaggerates far attention: not one long text.",
         "Error of perplexity: from means over 64 predictions of paired differences.",
         "Rows of the screening, where there are any, are of an earlier run of the same code over methods.SCREENED; "
         "intervals 0, 2 and 4, K 192 and 256 and dense facts are of a later one.",
         "Not measured: perplexity beyond 16k, other models, time, facts with a value threshold."],
    )
