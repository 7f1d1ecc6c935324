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
from typing import Any, Protocol

import torch
from torch import Tensor
from wan.cache.context import StepContext
from wan.cache.policy import Embed, PlannedPolicy, Policy, Sums, below
from wan.cache.predictor import Residuals
from wan.cache.telemetry import Decision, Telemetry

Run = Callable[[Tensor, int, int], Tensor]  # run(h, i, j): blocks i..j-1


class Ranks(Protocol):
    """Processes that make one video; `distributed.Parallel` is one."""

    def reduce_scalar(self, values: Sums) -> Sums:
        """Sums over those that share a sequence, the same on all of them."""

    def exchange(self, values: Sums) -> list[Sums]:
        """Numbers of this process's branch -> those of cond and of uncond, which is computed by other processes."""


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

    policy: decides. predictor, device: see `Residuals`. ranks: None for one process alone. own_uncond: the uncond
    branch measures its own change, for the record; it obeys the cond branch in any case, unless a failsafe makes it
    compute.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        predictor: str = "zero",
        device: torch.device | str | None = None,
        ranks: Ranks | None = None,
        own_uncond: bool = True,
    ):
        self.policy, self.telemetry = policy, Telemetry()
        self._predictor, self._device, self._own_uncond = predictor, device, own_uncond
        self._ranks = ranks
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
            for decision, start, end in self._events:
                end.synchronize()
                decision.seconds = start.elapsed_time(end) / 1000
        finally:
            self.reset()

    def reset(self) -> None:
        """Forget everything but the telemetry."""
        self._steps.clear()
        self._branches.clear()
        self._events.clear()
        self._begun = self._cond = None

    def to(self, device: torch.device | str, expert: str | None = None) -> None:
        """Move what is kept (of one expert) along with a model."""
        for (name, _), branch in self._branches.items():
            if expert in (None, name) and branch.signature:
                branch.residuals.to(device)
                moved = {key: _moved(value, device) for key, value in vars(branch.memory).items()}
                branch.memory = SimpleNamespace(**moved)
                branch.signature = (*branch.signature[:2], torch.empty(0, device=device).device)

    def release(self, expert: str) -> None:
        """Free what is kept for an expert."""
        for key in [key for key in self._branches if key[0] == expert]:
            del self._branches[key]

    def kept_bytes(self) -> int:
        """Bytes of the tensors that are kept."""
        tensors = []
        for branch in self._branches.values():
            tensors += branch.residuals.tensors
            for value in vars(branch.memory).values():
                tensors += [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # The two call sites

    def blocks(self, ctx: StepContext | None, h: Tensor, run: Run, count: int, embed: Embed | None = None) -> Tensor:
        """The block loop: `run(h, 0, count)`, or what stands for it. h: hidden states [B, tokens, C].

        Neither this nor `run` changes its input.
        """
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
        follows, is_last = self._follows(ctx), index == len(steps) - 1
        decision = self._judge(ctx, index, branch, before, probe, follows)
        if ctx.branch == "cond":
            self._cond = decision
        if decision.skipped:
            with self._clock(decision, before):
                out = probe + branch.residuals.predict(ctx.sigma, probe)
            branch.skips_in_a_row += 1
            self.policy.skipped(branch.memory, index)
        else:  # what will be replaced is let go of before the network needs the memory
            if is_last:
                branch.reset()
            else:
                branch.residuals.make_room()
                if self._own_uncond or not follows:
                    self.policy.computing(branch.memory, index, before, probe)
            with self._clock(decision, before):
                out = rest_of(probe)
            if not is_last:
                branch.skips_in_a_row, branch.signature = 0, _signature(before)
                branch.residuals.add(ctx.sigma, (out - probe).to(out.dtype))
                if self._own_uncond or not follows:
                    self.policy.computed(branch.memory, index, before, probe, out)
        self.telemetry.decisions.append(decision)
        if is_last:  # nothing is needed any more
            branch.reset()
        return out

    def _follows(self, ctx: StepContext) -> bool:
        """Whether the cond branch of this step has decided, or does so now."""
        cond = self._cond
        decided = cond is not None and (cond.expert, cond.step) == (ctx.expert, ctx.step)
        return ctx.branch != "cond" and (decided or ctx.apart)

    def _begin(self, expert: str, embed: Embed | None) -> None:
        """The first step of an expert: what another one left is of no use to it."""
        for other in {name for name, _ in self._branches} - {expert}:
            self.release(other)
        self._begun = expert
        self.policy.begin(self._steps[expert], embed)

    def _judge(
        self, ctx: StepContext, index: int, branch: _Branch, before: Tensor, probe: Tensor, follows: bool
    ) -> Decision:
        """What is done with this prediction. `follows`: the cond branch says so, unless a failsafe makes it compute."""
        policy, is_planned = self.policy, isinstance(self.policy, PlannedPolicy)
        count = len(self._steps[ctx.expert])
        life = policy.life(count)
        phase = life.phase(index, count)
        if self._own_uncond or not follows:
            metric, failsafe = self._measure(index, branch, before, probe)
        else:
            metric, failsafe = None if ctx.apart else self._cond.metric, self._failsafe(branch, before)
        told = policy.plan[index] if is_planned else None
        if follows:  # apart, cond's word comes last; until then: could this branch skip?
            told = True if ctx.apart else self._cond.skipped
        if failsafe:
            skip, reason = False, failsafe
        elif phase != "main":
            skip, reason = False, phase
        elif told is not None:
            skip, reason = told, "as cond" if follows else "plan"
        elif metric is None:
            skip, reason = False, "nothing measured"
        elif below(metric, policy.threshold) and branch.skips_in_a_row >= life.max_skips:
            skip, reason = False, "cap"
        else:
            skip = below(metric, policy.threshold)
            reason = "below" if skip else "above"
        lacking = None
        if skip and not len(branch.residuals):
            skip, lacking = False, "no reference"
        if told and phase == "main" and not self._agree(skip) and skip:
            skip, lacking = False, "another rank computes"
        if ctx.apart:
            cond, uncond = self._ranks.exchange((float(skip), math.nan if metric is None else metric))
            if follows and not self._own_uncond:
                metric = cond[1]
            if follows and not cond[0]:
                skip, lacking = False, None
            elif skip and not uncond[0]:
                skip, lacking = False, "another rank computes"
        if failsafe or lacking:
            reason, failsafe = failsafe or lacking, failsafe or lacking
            branch.reset()
        return Decision(
            *(ctx.run, ctx.step, ctx.timestep, ctx.sigma, ctx.expert, ctx.branch, policy.name, phase, metric),
            *(policy.threshold, skip, reason, failsafe is not None),
        )

    def _measure(self, index: int, branch: _Branch, before: Tensor, probe: Tensor) -> tuple[float | None, str | None]:
        """The metric, None where there is nothing to measure against; and why this branch must compute, if it must."""
        policy, is_planned = self.policy, isinstance(self.policy, PlannedPolicy)
        if failsafe := self._failsafe(branch, before):
            branch.reset()  # what is kept does not fit what is measured
        sums = policy.sums(branch.memory, index, before, probe)
        total = sums
        if self._ranks and not is_planned:  # a rank that cannot skip makes all of them compute, none waits
            total = self._ranks.reduce_scalar(sums if sums and len(branch.residuals) else (math.nan, math.nan))
        if sums is None:
            return None, failsafe
        metric = policy.metric(branch.memory, index, total)
        if not failsafe and not is_planned and not math.isfinite(metric):
            ours = all(map(math.isfinite, sums)) and not all(map(math.isfinite, total))
            failsafe = "another rank computes" if ours else "metric not finite"
        return metric, failsafe

    def _agree(self, skip: bool) -> bool:
        """Whether all ranks can do what a plan or the cond branch, the same on all of them, says: to skip."""
        return not self._ranks or math.isfinite(self._ranks.reduce_scalar((0.0 if skip else math.nan, 1.0))[0])

    def _failsafe(self, branch: _Branch, before: Tensor) -> str | None:
        """Why what is kept cannot be used with these hidden states."""
        if branch.signature is None:
            return None
        for what, then, now in zip(("shape", "type", "device"), branch.signature, _signature(before), strict=True):
            if then != now:
                return f"{what} changed"
        return None

    # Clocks

    @contextlib.contextmanager
    def _clock(self, decision: Decision, h: Tensor) -> Iterator[None]:
        if h.device.type == "cuda":  # read at the end of the run, so that nothing waits
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(h.device)
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((decision, start, end))
        else:
            start = time.perf_counter()
            yield
            decision.seconds = time.perf_counter() - start


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _signature(h: Tensor) -> tuple:
    return tuple(h.shape), h.dtype, h.device
