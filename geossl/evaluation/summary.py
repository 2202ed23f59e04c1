"""Probe results as one JSON object, and as a table on the terminal: the encoder and every baseline, always together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from geossl.evaluation.baselines import BASELINES
from geossl.evaluation.probes import PROBES, ProbeProtocol, ProbeScore

BAR = "random"
"""The baseline a training must beat: the same encoder at random initialisation with calibrated statistics."""


def summarise(
    scores: Sequence[ProbeScore],
    baselines: Mapping[str, Sequence[ProbeScore]],
    classes: Sequence[str],
    protocol: ProbeProtocol,
    **about: Any,
) -> dict[str, Any]:
    """Gather everything a reader of the numbers needs in one JSON object.

    Args:
        scores: Of the encoder.
        baselines: From :meth:`geossl.evaluation.Prober.baselines`.
        classes: Class names, in the order of the confusion matrices.
        protocol: The constants used.
        **about: Further facts to keep: the model, the data, the layers read.
    """
    return {
        **about,
        "protocol": asdict(protocol),
        "classes": list(classes),
        "scores": [score.to_json() for score in scores],
        "baselines": {name: [score.to_json() for score in rows] for name, rows in baselines.items()},
        "baselines_about": {name: BASELINES.get(name, "") for name in baselines},
        "verdict": verdict(scores, baselines.get(BAR, ())),
    }


def rows_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of the table: the baselines, then the encoder (``own`` True), each with one score or None per probe."""
    probes = list(summary["protocol"]["probes"])
    rows = []
    for name, scores in summary["baselines"].items():
        by_probe = {score["probe"]: score for score in scores}
        # The majority class needs no probe: it stands under every one of them.
        cells = [by_probe.get(probe) or by_probe.get("majority") for probe in probes]
        rows.append({"name": name, "own": False, "cells": cells})
    by_probe = {score["probe"]: score for score in summary["scores"]}
    rows.append({"name": "encoder", "own": True, "cells": [by_probe.get(probe) for probe in probes]})
    return rows


def verdict(scores: Sequence[ProbeScore], bar: Sequence[ProbeScore]) -> dict[str, Any] | None:
    """Compare the encoder with the bar on equal resplits, by the SVM with fixed C (or the first probe, where that was not fitted).

    Returns:
        ``probe``, ``mean`` and ``std`` of the encoder, ``bar`` (mean of the baseline), ``lead`` (mean of the differences per resplit)
        and ``lead_std`` (their standard deviation), all in [0, 1]; None where the baseline was not probed.
    """
    by_probe = {score.probe: score for score in bar}
    own = next((score for score in scores if score.probe == "svm"), scores[0])
    other = by_probe.get(own.probe)
    if other is None:
        return None
    lead = np.subtract(own.resplits, other.resplits)
    deviation = float(lead.std(ddof=1)) if len(lead) > 1 else 0.0
    return {"probe": own.probe, "mean": own.mean, "std": own.std, "bar": other.mean, "lead": float(lead.mean()), "lead_std": deviation}


def table_of(summary: Mapping[str, Any]) -> Any:
    """Return a rich table: a line per baseline and one for the encoder; mean ± deviation over the resplits (official split)."""
    from rich.table import Table

    probes = list(summary["protocol"]["probes"])
    resplits = len(summary["protocol"]["resplit_seeds"])
    table = Table(title=f"Accuracy in %: mean ± deviation over {resplits} group-aware resplits (official split)", title_justify="left")
    table.add_column("features")
    for probe in probes:
        table.add_column(probe, justify="right")
    for row in rows_of(summary):
        cells = [_cell(score) for score in row["cells"]]
        table.add_row(row["name"], *cells, style="bold" if row["own"] else None, end_section=row is rows_of(summary)[-2])
    table.caption = "\n".join(f"{name}: {text}" for name, text in {**summary["baselines_about"], **{p: PROBES[p] for p in probes}}.items())
    table.caption_justify = "left"
    return table


def class_table(summary: Mapping[str, Any], probe: str) -> Any:
    """Return a rich table of the recall of every class under ``probe``, beside that of the calibrated random encoder."""
    from rich.table import Table

    own = next(score for score in summary["scores"] if score["probe"] == probe)
    bar = next((score for score in summary["baselines"].get(BAR, []) if score["probe"] == probe), None)
    table = Table(title=f"Recall of each class in %, {probe}", title_justify="left")
    for name in ("class", "test samples", "encoder", BAR):
        table.add_column(name, justify="left" if name == "class" else "right")
    for index, name in enumerate(summary["classes"]):
        other = _percent(bar["per_class"][index]) if bar else "-"
        table.add_row(name, str(sum(own["confusion"][index])), _percent(own["per_class"][index]), other)
    return table


def confusion_table(summary: Mapping[str, Any], probe: str) -> Any:
    """Return a rich table of the encoder's confusion matrix under ``probe``: rows true, columns predicted."""
    from rich.table import Table

    own = next(score for score in summary["scores"] if score["probe"] == probe)
    table = Table(title=f"Confusion, {probe}: rows true, columns predicted", title_justify="left", pad_edge=False)
    table.add_column("")
    for name in summary["classes"]:
        table.add_column(name[:4], justify="right")
    for name, counts in zip(summary["classes"], own["confusion"], strict=True):
        table.add_row(name, *(str(count) if count else "·" for count in counts))
    return table


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    official = "" if score["official"] is None else f" ({100 * score['official']:.1f})"
    return f"{100 * score['mean']:.1f} ± {100 * score['std']:.1f}{official}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"
