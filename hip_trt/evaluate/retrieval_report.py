"""Tables, findings and plots of the retrieval study, from its data alone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from hip_trt.evaluate.perplexity_grid import METHODS
from hip_trt.evaluate.retrieval import DEFAULT, DENSE, WINDOW_ONLY, interval
from hip_trt.evaluate.study import Cell, Plot, Study, Table

PASSED = 0.8
"""Share that dense attention must find for a length to say anything about pruning."""
EQUAL = 0.02
"""A config finds as much as dense where it misses at most this share of what dense finds."""

_ASKED = {
    "prefill": "Questions were read as a chunk of prompt, answers decoded.",
    "decode": "Questions were decoded token by token, as answers were.",
}


def study(
    data: Mapping[str, Any], *, synthetic: bool, command: str, parameters: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> Study:
    """The study's files: eval_retrieval.* of real texts, eval_retrieval_recall.* of the recall model, and the same with
    _decoded where questions were decoded.

    Args:
        data: from :func:`hip_trt.evaluate.retrieval.run`.
        synthetic: whether contexts are of the recall model's language.
        command, parameters, machine: see :class:`Study`.
    """
    notes = [
        _ASKED[data["asked"]],
        "A fact counts as found where every token of its answer is the model's first choice, given the right tokens "
        "before it: that is when greedy decoding gives the whole answer."
        + ("" if synthetic else " Choices are among the words of the context's answers."),
        "Intervals are Wilson's, 95%; facts of one context are not quite independent.",
    ]
    if data["missing"]:
        notes.append(f"Left out for want of time: {'; '.join(data['missing'])}.")
    name = "retrieval" + "-recall" * synthetic + "-decoded" * (data["asked"] == "decode")
    where = "long synthetic contexts, recall model" if synthetic else "real texts"
    return Study(
        name, f"Retrieval: facts found in {where}, dense against HiP", command, parameters, machine, data,
        tables=tables(data), findings=findings(data), notes=notes,
    )


def counts(data: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[int, int]:
    """Facts that a row found, and was asked for."""
    outcomes = _found(data, row)
    return sum(outcomes), len(outcomes)


def of_dense(data: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[int, int]:
    """Facts that a row found of those that dense attention found, and how many those were."""
    pairs = zip(_found(data, row), _found(data, _row(data, row["kind"], row["tokens"], DENSE)), strict=False)
    kept = [mine for mine, dense in pairs if dense]
    return sum(kept), len(kept)


def tables(data: Mapping[str, Any]) -> list[Table]:
    """For each kind of context, facts found by config and length; then by depth at each kind's longest length."""
    made = []
    for kind in _kinds(data):
        lengths = _lengths(data, kind)
        body: list[list[Cell]] = []
        for config in _configs(data):
            rows = [_row(data, kind, length, config) for length in lengths]
            body.append([config, *(_cell(data, row) for row in rows)])
        made.append(Table(
            f"Found, {kind}", ["what differs from the default", *(f"{length:,} tokens" for length in lengths)], body,
            note="Facts found of those asked for (95% interval, %).",
        ))
    for kind in _kinds(data):
        longest = _lengths(data, kind)[-1]
        body = []
        for config in _configs(data):
            row = _row(data, kind, longest, config)
            if "right" in row:
                body.append([config, *map(_percent, _by_depth(data, row))])
        made.append(Table(
            f"By depth, {kind}, {longest:,} tokens",
            ["what differs from the default", *(f"{depth:.2f}" for depth in data["depths"])], body,
            note="Percent found by where a fact stands: 0 the context's beginning, 1 its end.",
        ))
    return made


def findings(data: Mapping[str, Any]) -> list[str]:
    """What follows from the numbers, for each kind of context."""
    said = []
    for kind in _kinds(data):
        lengths = _lengths(data, kind)
        passed = [length for length in lengths if _share(data, kind, length, DENSE) >= PASSED]
        if not passed:
            best = max(lengths, key=lambda length: _share(data, kind, length, DENSE))
            said.append(f"{kind}: dense attention itself finds {_share(data, kind, best, DENSE):.0%} at best (of "
                        f"{PASSED:.0%} asked for), so nothing can be said of pruning.")
            continue
        said.append(f"{kind}: dense attention finds {_range(data, kind, passed, DENSE)} up to {passed[-1]:,} tokens"
                    + (f" and fails beyond ({_share(data, kind, lengths[-1], DENSE):.0%} at {lengths[-1]:,})"
                       if lengths[-1] > passed[-1] else "") + ".")
        tried = [config for config in _configs(data) if config not in (DENSE, WINDOW_ONLY)
                 and all("right" in _row(data, kind, length, config) for length in passed)]
        equal = [config for config in tried if _as_dense(data, kind, passed, config)]
        if equal:
            said.append(f"{kind}, as much as dense at every length ({1 - EQUAL:.0%} or more): {'; '.join(equal)}.")
        rest = [config for config in tried if config not in equal]
        told = [config for config in (DEFAULT, METHODS["exact"]) if config in rest]
        if rest:  # and the best of the others, where it matters most
            leader = max(rest, key=lambda config: _share_of_dense(data, kind, passed[-1], config))
            told += [leader] if leader not in told else []
        said += [f"{kind}, {config}: {_verdict(data, kind, passed, config)}." for config in told]
        if WINDOW_ONLY in _configs(data):
            said.append(f"{kind}, {WINDOW_ONLY}: {_verdict(data, kind, passed, WINDOW_ONLY)}.")
    return said


def _as_dense(data: Mapping[str, Any], kind: str, lengths: Sequence[int], config: str) -> bool:
    return all(_share_of_dense(data, kind, length, config) >= 1 - EQUAL for length in lengths)


def _share_of_dense(data: Mapping[str, Any], kind: str, length: int, config: str) -> float:
    found, of = of_dense(data, _row(data, kind, length, config))
    return found / of


def _verdict(data: Mapping[str, Any], kind: str, lengths: Sequence[int], config: str) -> str:
    shares = {length: _share_of_dense(data, kind, length, config) for length in lengths
              if "right" in _row(data, kind, length, config)}
    return ", ".join(f"{share:.0%} of what dense finds at {length:,}" if length == lengths[0] else
                     f"{share:.0%} at {length:,}" for length, share in shares.items()) or "not measured"


def plots(data: Mapping[str, Any]) -> dict[str, Plot]:
    """Heat maps over length and depth, one panel for each kind and config; and shares over lengths."""
    return {"": lambda figure: _draw_lengths(data, figure), "_depths": lambda figure: _draw_depths(data, figure)}


def _draw_lengths(data: Mapping[str, Any], figure: Any) -> None:
    kinds = _kinds(data)
    figure.set_size_inches(4.2 * len(kinds) + 2.6, 4.2)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        for number, config in enumerate(_configs(data)):
            rows = [row for length in _lengths(data, kind) if "right" in (row := _row(data, kind, length, config))]
            pairs = [counts(data, row) for row in rows]
            lengths, shares = [row["tokens"] for row in rows], [100 * found / of for found, of in pairs]
            ends = [interval(*pair) for pair in pairs]
            style = {"color": "black", "linewidth": 2.5} if config == DENSE else {"color": f"C{number % 10}"}
            if config == WINDOW_ONLY:
                style |= {"color": "gray", "linestyle": ":"}
            elif number > 10:
                style["linestyle"] = "--"
            axis.plot(lengths, shares, marker="o", markersize=3, label=config, **style)
            axis.fill_between(lengths, [100 * low for low, _ in ends], [100 * high for _, high in ends], alpha=0.08,
                              color=style["color"], linewidth=0)
        axis.set(xscale="log", title=kind, xlabel="context, tokens", ylim=(-3, 103))
        axis.set_xticks(_lengths(data, kind), [_short(length) for length in _lengths(data, kind)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("facts found, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")


def _draw_depths(data: Mapping[str, Any], figure: Any) -> None:
    kinds, configs = _kinds(data), _configs(data)
    figure.set_size_inches(1.1 * len(configs) + 1.5, 1.9 * len(kinds) + 0.8)
    axes = figure.subplots(len(kinds), len(configs), squeeze=False, sharey=True)
    image = None
    for number, (line, kind) in enumerate(zip(axes, kinds, strict=True)):
        lengths = _lengths(data, kind)
        for axis, config in zip(line, configs, strict=True):
            columns = []
            for length in lengths:
                row = _row(data, kind, length, config)
                columns.append([100 * share for share in _by_depth(data, row)] if "right" in row
                               else [float("nan")] * len(data["depths"]))
            image = axis.imshow(list(zip(*columns, strict=True)), vmin=0, vmax=100, cmap="RdYlGn", aspect="auto",
                                extent=(0, len(lengths), 1, 0))
            middles = [index + 0.5 for index in range(len(lengths))]
            axis.set_xticks(middles, [_short(length) for length in lengths], fontsize=5, rotation=90)
            axis.tick_params(axis="y", labelsize=6)
            axis.set_title("" if number else _wrapped(config), fontsize=6)
        line[0].set_ylabel(f"{kind}\ndepth", fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.8, label="facts found, %")


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 16))


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _kinds(data: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in data["rows"]))


def _configs(data: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["config"] for row in data["rows"]))


def _lengths(data: Mapping[str, Any], kind: str) -> list[int]:
    """Those at which dense attention was measured."""
    rows = data["rows"]
    return sorted(row["tokens"] for row in rows if row["kind"] == kind and row["config"] == DENSE and "right" in row)


def _row(data: Mapping[str, Any], kind: str, tokens: int, config: str) -> Mapping[str, Any]:
    """The row, or an empty one."""
    for row in data["rows"]:
        if (row["kind"], row["tokens"], row["config"]) == (kind, tokens, config):
            found: Mapping[str, Any] = row
            return found
    return {}


def _found(data: Mapping[str, Any], row: Mapping[str, Any]) -> list[bool]:
    return [int(right) == data["answer_tokens"] for probe in row["right"] for right in probe]


def _share(data: Mapping[str, Any], kind: str, tokens: int, config: str) -> float:
    found, of = counts(data, _row(data, kind, tokens, config))
    return found / of


def _range(data: Mapping[str, Any], kind: str, lengths: Sequence[int], config: str) -> str:
    shares = [_share(data, kind, length, config) for length in lengths]
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def _by_depth(data: Mapping[str, Any], row: Mapping[str, Any]) -> list[float]:
    columns = zip(*row["right"], strict=True)
    return [sum(int(right) == data["answer_tokens"] for right in column) / len(row["right"]) for column in columns]


def _cell(data: Mapping[str, Any], row: Mapping[str, Any]) -> Cell:
    if "right" not in row:
        return row.get("failed")
    found, of = counts(data, row)
    low, high = interval(found, of)
    return f"{found} of {of} ({100 * low:.0f} to {100 * high:.0f})"


def _percent(share: float) -> Cell:
    return f"{100 * share:.0f}"
