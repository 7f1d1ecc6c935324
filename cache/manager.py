"""One manager for every caching method: two call sites, explicit context, state by expert and branch.

`blocks` goes around the block loop of a network, `prediction` around one whole prediction in the sampler. Where a
policy is in doubt, the network is computed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from cache.context import StepContext
from cache.policy import Embed, PlannedPolicy, Policy, Sums, below
from cache.predictor import Residuals
from cache.telemetry import Decision, Telemetry

Run = Callable[[Tensor, int, int], Tensor]  # run(h, i, j): blocks i..j-1
Reduce = Callable[[Sums], Sums]  # sums over the ranks that share a sequence


class NoCache:
    """Computes everything."""

    def blocks(self, ctx: StepContext | None, h: Tensor, run: Run, count: int, embed: Embed | None = None) -> Tensor:
        return run(h, 0, count)

    def prediction(self, ctx: StepContext, latent: Tensor, call: Callable[[], Tensor]) -> Tensor:
        return call()

    @contextlib.contextmanager
    def run(self, steps: Sequence[StepContext]) -> Iterator[None]:
        yield


NO_CACHE = NoCache()


@dataclass
class _Branch:
    """What is kept for one expert and branch. signature: shape, type and device that it belongs to."""

    residuals: Residuals
    memory: SimpleNamespace = field(default_factory=SimpleNamespace)
    signature: tuple | None = None
    skips_in_a_row: int = 0

    def reset(self) -> None:
        self.residuals.clear()
        self.memory, self.signature, self.skips_in_a_row = SimpleNamespace(), None, 0


class CacheManager(NoCache):
    """Skips what its policy says is safe to skip.

    policy: decides. predictor, device: see `Residuals`. reduce: sums (numerator, denominator) over ranks; without it
    this process is alone. own_uncond: the uncond branch measures its own change, for the record; it obeys the cond
    branch in any case, unless a failsafe makes it compute. clean_up: called when a run ends.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        predictor: str = "zero",
        device: torch.device | str | None = None,
        reduce: Reduce | None = None,
        own_uncond: bool = True,
    ):
        self.policy, self.telemetry = policy, Telemetry()
        self._predictor, self._device, self._reduce, self._own_uncond = predictor, device, reduce, own_uncond
        self._steps: dict[str, list[StepContext]] = {}
        self._branches: dict[tuple[str, str], _Branch] = {}
        self._begun: str | None = None  # the expert whose steps are under way
        self._cond: Decision | None = None  # of the present step
        self._events: list[tuple[Decision, torch.cuda.Event, torch.cuda.Event]] = []

    # A run

    @contextlib.contextmanager
    def run(self, steps: Sequence[StepContext]) -> Iterator[None]:
        """Around one sampling run, whose cond steps are `steps`. All state ends with it, however it ends."""
        self.reset()
        for step in steps:
            self._steps.setdefault(step.expert, []).append(step)
        try:
            yield
        finally:
            self._read_clocks()
            self.reset()

    def reset(self) -> None:
        """Forget everything but the telemetry."""
        self._steps.clear()
        self._branches.clear()
        self._begun = self._cond = None

    def to(self, device: torch.device | str, expert: str | None = None) -> None:
        """Move what is kept (of one expert) along with a model."""
        for (name, _), branch in self._branches.items():
            if expert in (None, name) and branch.signature:
                branch.residuals.to(device)
                for key, value in vars(branch.memory).items():
                    if isinstance(value, Tensor):
                        setattr(branch.memory, key, value.to(device))
                branch.signature = (*branch.signature[:2], torch.empty(0, device=device).device)

    def release(self, expert: str) -> None:
        """Free what is kept for an expert."""
        for key in [key for key in self._branches if key[0] == expert]:
            del self._branches[key]

    def kept_bytes(self) -> int:
        """Bytes of the tensors that are kept."""
        total = 0
        for branch in self._branches.values():
            tensors = [kept for _, kept in branch.residuals._kept]
            for value in vars(branch.memory).values():
                tensors += [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, Tensor)]
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return total

    # The two call sites

    def blocks(self, ctx: StepContext | None, h: Tensor, run: Run, count: int, embed: Embed | None = None) -> Tensor:
        """The block loop: `run(h, 0, count)`, or what stands for it. h: hidden states [B, tokens, C], not changed."""
        if ctx is None or self.policy.level != "blocks":
            return run(h, 0, count)
        first = self.policy.probe_blocks
        return self._decide(ctx, h, lambda: run(h, 0, first) if first else h, lambda x: run(x, first, count), embed)

    def prediction(self, ctx: StepContext, latent: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """One prediction of the sampler: `call()`, or what stands for it."""
        if self.policy.level != "prediction":
            return call()
        return self._decide(ctx, latent, lambda: latent, lambda _: call(), None)

    # The decision

    def _decide(
        self,
        ctx: StepContext,
        before: Tensor,
        probe_of: Callable[[], Tensor],
        rest_of: Callable[[Tensor], Tensor],
        embed: Embed | None,
    ) -> Tensor:
        steps = self._steps.get(ctx.expert)
        index = next((i for i, step in enumerate(steps or ()) if step.step == ctx.step), None)
        if index is None:
            raise RuntimeError(f"step {ctx.step} of expert {ctx.expert} is not in the run that `run` was told of")
        if self._begun != ctx.expert:
            self._begin(ctx.expert, embed)
        branch = self._branches.setdefault((ctx.expert, ctx.branch), _Branch(Residuals(self._predictor, self._device)))
        probe = probe_of()
        decision = self._measure(ctx, index, branch, before, probe)
        if ctx.branch == "cond":
            self._cond = decision
        self.telemetry.decisions.append(decision)
        with self._clock(decision, before):
            if decision.skipped:
                out = probe + branch.residuals.predict(ctx.sigma, probe)
            else:
                out = rest_of(probe)
        if decision.skipped:
            branch.skips_in_a_row += 1
            self.policy.skipped(branch.memory, index)
        elif index < len(steps) - 1:  # after the last step nothing is needed any more
            branch.skips_in_a_row, branch.signature = 0, _signature(before)
            branch.residuals.add(ctx.sigma, (out - probe).to(out.dtype))
            self.policy.computed(branch.memory, index, before, probe, out)
        else:
            branch.reset()
        return out

    def _begin(self, expert: str, embed: Embed | None) -> None:
        """The first step of an expert: what another one left is of no use to it."""
        for other in {name for name, _ in self._branches} - {expert}:
            self.release(other)
        self._begun = expert
        self.policy.begin(self._steps[expert], embed)

    def _measure(self, ctx: StepContext, index: int, branch: _Branch, before: Tensor, probe: Tensor) -> Decision:
        count, life = len(self._steps[ctx.expert]), self.policy.life(len(self._steps[ctx.expert]))
        phase, cond = life.phase(index, count), self._cond
        follows = ctx.branch != "cond" and cond is not None and (cond.expert, cond.step) == (ctx.expert, ctx.step)
        failsafe = self._failsafe(branch, before) if branch.signature else None
        if failsafe:
            branch.reset()
        is_planned = isinstance(self.policy, PlannedPolicy)
        metric = None
        if follows and not self._own_uncond:
            metric = cond.metric
        else:
            sums = self.policy.sums(branch.memory, index, before, probe)
            if self._reduce and not is_planned:  # a rank without a reference makes all of them compute, none waits
                total = self._reduce(sums or (math.nan, math.nan))
                sums = sums and total
            if sums is not None:
                metric = self.policy.metric(branch.memory, index, sums)
        if failsafe is None and metric is not None and not is_planned and not math.isfinite(metric):
            failsafe = "metric not finite"
            branch.reset()
        if failsafe:
            skip, reason = False, failsafe
        elif phase != "main":
            skip, reason = False, phase
        elif not len(branch.residuals):
            skip, reason, failsafe = False, "no reference", "no reference"
        elif follows:
            skip, reason = cond.skipped, "as cond"
        elif is_planned:
            skip = self.policy.plan[index]
            reason = "plan"
        elif metric is None:
            skip, reason = False, "nothing measured"
        elif below(metric, self.policy.threshold) and branch.skips_in_a_row >= life.max_skips:
            skip, reason = False, "cap"
        else:
            skip = below(metric, self.policy.threshold)
            reason = "below" if skip else "above"
        return Decision(
            *(ctx.run, ctx.step, ctx.timestep, ctx.sigma, ctx.expert, ctx.branch, self.policy.name, phase, metric),
            *(self.policy.threshold, skip, reason, failsafe is not None),
        )

    def _failsafe(self, branch: _Branch, before: Tensor) -> str | None:
        """Why what is kept cannot be used with these hidden states."""
        for what, then, now in zip(("shape", "type", "device"), branch.signature, _signature(before), strict=True):
            if then != now:
                return f"{what} changed"
        return None

    # Clocks

    @contextlib.contextmanager
    def _clock(self, decision: Decision, h: Tensor) -> Iterator[None]:
        if h.device.type == "cuda":  # read at the end of the run, so that nothing waits
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((decision, start, end))
        else:
            start = time.perf_counter()
            yield
            decision.seconds = time.perf_counter() - start

    def _read_clocks(self) -> None:
        if self._events:
            torch.cuda.synchronize()
        for decision, start, end in self._events:
            decision.seconds = start.elapsed_time(end) / 1000
        self._events.clear()


def _signature(h: Tensor) -> tuple:
    return tuple(h.shape), h.dtype, h.device
