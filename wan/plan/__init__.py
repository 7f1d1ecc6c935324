"""The plan of a run: files, work, memory and what lies where. Printed by --dry_run, followed by every run.

Work, parameters and memory are those of the models themselves, on the meta device; `benchmarks.plan_memory` has them
beside what is measured.
"""

from wan.plan.decide import choose, measure, settle_dtype
from wan.plan.files import check_one_quantised, find_files, missing_files
from wan.plan.machine import Held, Machine, free_ram, look
from wan.plan.memory import Workload
from wan.plan.placement import Placement
from wan.plan.plan import Plan, make_plan
from wan.plan.runs import forward_flops
from wan.plan.text import duration, format_plan, start_lines
from wan.plan.weights import parameters, resident_indices

__all__ = [
    "Held",
    "Machine",
    "Placement",
    "Plan",
    "Workload",
    "check_one_quantised",
    "choose",
    "duration",
    "find_files",
    "format_plan",
    "forward_flops",
    "free_ram",
    "look",
    "make_plan",
    "measure",
    "missing_files",
    "parameters",
    "resident_indices",
    "settle_dtype",
    "start_lines",
]
