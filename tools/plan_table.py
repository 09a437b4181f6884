"""README's tables of `lora-dist plan` out of the records of tools/plan_records.py."""

from collections.abc import Mapping
from typing import Any

GIB = 2**30


def format_plan(record: Mapping[str, Any]) -> str:
    """Each method and recomputation of one job, and what planning it cost."""
    hardware, jobs = record["plan"]["hardware"], record["plan"]["jobs"]
    first = jobs[0]
    shape = f"tp {first['tp_size']} x pp {first['pp_size']} x dp {first['dp_size']}"
    head = f"{first['world_size']} x {hardware['name']} of {hardware['memory_gib']:.1f} GiB: {shape}"
    columns = [
        "method",
        "recompute",
        "trainable",
        "fullest GPU, GiB",
        "fits",
        "PFLOP a step",
        "step, s",
        "tokens/s/GPU",
    ]
    lines = [_join(columns), _join([":--", ":--", *["--:"] * 6]), *(_join(_describe_job(job)) for job in jobs)]
    return "\n".join([f"{head} (`{record['command']}`, {_describe_cost(record)}):", "", *lines])


def _describe_job(job: Mapping[str, Any]) -> list[str]:
    return [
        job["method"],
        job["recompute"],
        f"{job['num_trainable']:,}",
        f"{job['needed_bytes'] / GIB:.1f}",
        "yes" if job["fits"] else "no",
        f"{job['flops'] / 1e15:.1f}",
        f"{job['step_seconds']:.1f}",
        f"{job['tokens_per_sec_per_gpu']:.1f}",
    ]


def format_paper(record: Mapping[str, Any], large_batch: Mapping[str, Any]) -> str:
    """The paper's figures beside the plan's, each with the reason of the difference.

    `large_batch` is the same job with more rows a microbatch; its speed-up is a row of its own.
    """
    rows = [[row["quantity"], row["paper"], row["plan"], row["why"]] for row in record["plan"]["paper"]]
    [speed_up] = [row for row in large_batch["plan"]["paper"] if row["quantity"].startswith("speed-up")]
    option = next(word for word in large_batch["command"].split() if word.startswith("loop."))
    at = 1 + next(i for i, row in enumerate(rows) if row[0] == speed_up["quantity"])
    rows.insert(at, [f"the same with `{option}`", speed_up["paper"], speed_up["plan"], ""])
    header = ["", "paper", "plan", "difference"]
    return "\n".join([_join(header), _join([":--", "--:", "--:", ":--"]), *map(_join, rows)])


def format_search(record: Mapping[str, Any]) -> str:
    """What fits, best first, and how many do not."""
    hardware, candidates = record["search"]["hardware"], record["search"]["candidates"]
    fitting = [one for one in candidates if one["job"] is not None]
    num_gpus = record["command"].rpartition("plan.num_gpus=")[2].split()[0]
    head = (
        f"{num_gpus} x {hardware['name']}, {len(fitting)} of {len(candidates)} topologies fit"
        f" ({_describe_cost(record)}):"
    )
    columns = ["topology", "recompute", "fullest GPU, GiB", "step, s", "tokens/s/GPU"]
    lines = [_join(columns), _join([":--", ":--", *["--:"] * 3]), *(_join(_describe_candidate(one)) for one in fitting)]
    return "\n".join([head, "", *lines])


def _describe_candidate(one: Mapping[str, Any]) -> list[str]:
    job = one["job"]
    numbers = [f"{job['needed_bytes'] / GIB:.1f}", f"{job['step_seconds']:.1f}", f"{job['tokens_per_sec_per_gpu']:.1f}"]
    return [one["name"], one["recompute"], *numbers]


def _describe_cost(record: Mapping[str, Any]) -> str:
    cost = record["cost"]
    return f"{cost['seconds']:.0f} s, {cost['peak_memory_bytes'] / GIB:.1f} GiB on {_count_cores(record)} cores"


def _count_cores(record: Mapping[str, Any]) -> int:
    return int(record["environment"]["cpu"]["num_usable_cores"])


def _join(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
