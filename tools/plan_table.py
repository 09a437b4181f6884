"""README's tables of `lora-dist plan` out of the records of tools/plan_records.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_dist.base_format import LinearShape, compute_weight_bytes

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


def format_base_formats(records: Mapping[str, Mapping[str, Any]]) -> str:
    """One job with the frozen base in each format. Bits are of the linears' weights, their scales counted in."""
    columns = ["`model.base_format`", "bits a weight", "base weights, GiB", "fullest GPU, GiB", "fits", "tokens/s/GPU"]
    lines = [_join(columns), _join([":--", *["--:"] * 5])]
    for base_format, record in records.items():
        [job] = record["plan"]["jobs"]
        [process] = job["processes"]
        numbers = [f"{process['ledger']['base weights'] / GIB:.1f}", f"{job['needed_bytes'] / GIB:.1f}"]
        fits, rate = "yes" if job["fits"] else "no", f"{job['tokens_per_sec_per_gpu']:.0f}"
        lines.append(_join([base_format, f"{compute_bits(base_format):.3f}", *numbers, fits, rate]))
    hardware = record["plan"]["hardware"]
    head = f"One {hardware['name']} of {hardware['memory_gib']:.1f} GiB (`{record['command']}` and the others):"
    return "\n".join([head, "", *lines])


def format_models(records: Sequence[Mapping[str, Any]]) -> str:
    """LoRA of each model, and what full fine-tuning of the same shards would take where the base can train."""
    columns = ["model", "base", "shards", "GPUs", "trainable", "fullest GPU, GiB", "step, s", "tokens/s/GPU"]
    if any(len(record["plan"]["jobs"]) > 1 for record in records):
        columns.append("full fine-tuning, GiB")
    lines = [_join(columns), _join([":--", ":--", ":--", ":--", *["--:"] * (len(columns) - 4)])]
    for record in records:
        hardware, (lora, *full) = record["plan"]["hardware"], record["plan"]["jobs"]
        assert lora["fits"], record["command"]
        options = dict(word.split("=", 1) for word in record["command"].split() if "=" in word)
        lines.append(
            _join(
                [
                    options["model"],
                    options.get("model.base_format", options["dtype"]),
                    _describe_shards(lora),
                    f"{lora['world_size']} {hardware['name']} of {hardware['memory_gib']:.1f} GiB",
                    f"{lora['num_trainable'] / 1e6:.1f}M",
                    f"{lora['needed_bytes'] / GIB:.1f}",
                    f"{lora['step_seconds']:.2f}",
                    f"{lora['tokens_per_sec_per_gpu']:.0f}",
                    "".join(f"{job['needed_bytes'] / GIB:.0f}" for job in full),
                ][: len(columns)]
            )
        )
    return "\n".join(lines)


def _describe_shards(job: Mapping[str, Any]) -> str:
    """Records of earlier versions name no cp_size."""
    context = f" x cp {job['cp_size']}" if job.get("cp_size", 1) > 1 else ""
    return f"tp {job['tp_size']}{context} x pp {job['pp_size']}"


def compute_bits(base_format: str) -> float:
    """Bits a weight of GPT-3 175B's linears under `base_format`, bf16 where native."""
    h, f = 12288, 49152
    shapes = [(3 * h, h, True), (h, h, False), (f, h, True), (h, f, False)]
    linears = [LinearShape(out_features=o, in_features=i, column_parallel=column) for o, i, column in shapes]
    num_bytes = sum(compute_weight_bytes(base_format, linear, 2) for linear in linears)
    return 8 * num_bytes / sum(linear.num_elements for linear in linears)


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
