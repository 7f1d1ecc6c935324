"""What a cache did: every decision, and sums by expert and branch. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any


@dataclass
class Decision:
    """One prediction. metric: None where nothing was measured; reason: why it was computed or skipped.

    seconds: of the part that the cache could save; None until the clock of a GPU has been read.
    """

    run: int
    step: int
    timestep: float
    sigma: float
    expert: str
    branch: str
    policy: str
    phase: str
    metric: float | None
    threshold: float
    skipped: bool
    reason: str
    failsafe: bool = False
    seconds: float | None = None


class Telemetry:
    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def report(self) -> dict[str, Any]:
        """By expert, then by branch: total, skipped, computed, average and largest metric, failsafes, seconds saved."""
        experts: dict[str, dict[str, Any]] = {}
        for expert in dict.fromkeys(one.expert for one in self.decisions):
            ours = [one for one in self.decisions if one.expert == expert]
            experts[expert] = {
                branch: _summed([one for one in ours if one.branch == branch])
                for branch in dict.fromkeys(one.branch for one in ours)
            }
        return experts

    def summary(self) -> list[str]:
        """One line an expert."""
        lines = []
        for expert, branches in self.report().items():
            policy = next(one.policy for one in self.decisions if one.expert == expert)
            parts = [_line(branch, sums) for branch, sums in branches.items()]
            saved = sum(sums["seconds_saved"] for sums in branches.values())
            name = f"[{expert}]" if expert != "model" else f"[{policy}]"
            lines.append(f"CacheManager{name} summary: {policy}; {'; '.join(parts)}; {saved:.1f} s saved")
        return lines

    def write(self, path: str | os.PathLike, header: Mapping[str, Any]) -> None:
        """The trace: JSON lines, the `header` first. It appears whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".trace-{secrets.token_hex(8)}")
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                for row in (dict(header), *(asdict(one) for one in self.decisions)):
                    file.write(json.dumps(_plain(row)) + "\n")
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def merged(by_rank: Sequence[Sequence[Decision]]) -> list[Decision]:
    """Every prediction of a run once, in order, from what each process decided; where several did, the first's word."""
    kept: dict[tuple, Decision] = {}
    for one in (decision for decisions in by_rank for decision in decisions):
        kept.setdefault((one.run, one.step, one.branch), one)
    return [kept[key] for key in sorted(kept)]


def read_trace(path: str | os.PathLike) -> tuple[dict[str, Any], list[Decision]]:
    """(header, decisions) of a trace. Raises ValueError where the file is none."""
    try:
        header, *rows = (json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines())
        return header, [Decision(**row) for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a cache trace ({error})") from None


def _summed(decisions: Sequence[Decision]) -> dict[str, Any]:
    metrics = [one.metric for one in decisions if one.metric is not None and math.isfinite(one.metric)]
    skipped = [one for one in decisions if one.skipped]
    computed = [one.seconds for one in decisions if not one.skipped and one.seconds is not None]
    spent = sum(one.seconds or 0 for one in skipped)
    return {
        "total": len(decisions),
        "skipped": len(skipped),
        "computed": len(decisions) - len(skipped),
        "average_metric": round(mean(metrics), 6) if metrics else None,
        "largest_metric": round(max(metrics), 6) if metrics else None,
        "failsafes": dict(Counter(one.reason for one in decisions if one.failsafe)),
        "seconds_saved": round(max(0.0, len(skipped) * mean(computed) - spent), 3) if computed else 0.0,
    }


def _line(branch: str, sums: Mapping[str, Any]) -> str:
    text = f"{branch} {sums['skipped']} of {sums['total']} skipped"
    if sums["average_metric"] is not None:
        text += f", metric {sums['average_metric']:.4f} on average, {sums['largest_metric']:.4f} at most"
    failed = ", ".join(f"{reason} {count}" for reason, count in sums["failsafes"].items())
    return f"{text}, failsafes {failed or 0}"


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Strict JSON has no infinite numbers."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
