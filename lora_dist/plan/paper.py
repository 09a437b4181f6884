"""The figures that LoRA's paper gives for GPT-3 175B (arXiv:2106.09685, sections 1 and 4.2), beside the plan's."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_dist.plan.job import GIB, JobPlan

MODEL = "gpt3_175b"


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRow:
    quantity: str
    paper: str
    plan: str
    why: str
    """One sentence on the difference."""


def compare_with_paper(jobs: Sequence[JobPlan]) -> list[PaperRow]:
    """Rows for what `jobs` cover; the throughputs from those with recomputation, as the paper's ratio tells."""
    by_method = {method: [job for job in jobs if job.method == method] for method in ("lora", "full")}
    if not all(by_method.values()):
        return []
    lora, full = (_prefer_recompute(by_method[method]) for method in ("lora", "full"))
    return [_compare_memory(lora, full), *_compare_throughput(lora, full), _compare_file(lora)]


def _prefer_recompute(jobs: Sequence[JobPlan]) -> JobPlan:
    return next((job for job in jobs if job.recompute == "full"), jobs[0])


def _compare_memory(lora: JobPlan, full: JobPlan) -> PaperRow:
    return PaperRow(
        quantity="memory of weights, gradients and optimizer, full -> LoRA",
        paper="1.2 TB -> 350 GB (3.4x)",
        plan=f"{full.state_bytes / 1e12:.2f} TB -> {lora.state_bytes / 1e9:.0f} GB"
        f" ({full.state_bytes / lora.state_bytes:.1f}x)",
        why="fp16 weights alone are 350 GB either way; fine-tuning with fp32 masters and both of Adam's moments takes"
        " 16 bytes a parameter and more, the paper's 1.2 TB only 6.9: part of its state must have been sharded away or"
        " kept in half precision",
    )


def _compare_throughput(lora: JobPlan, full: JobPlan) -> list[PaperRow]:
    """The paper's sequence length and batch are not known, so rates differ with the plan's."""
    rates = full.tokens_per_sec_per_gpu, lora.tokens_per_sec_per_gpu
    return [
        PaperRow(
            quantity=f"tokens/s/GPU, full -> LoRA (recompute {lora.recompute})",
            paper="32.5 -> 43.1 on V100",
            plan=f"{rates[0]:.1f} -> {rates[1]:.1f}",
            why="the plan takes products at the hardware file's achievable fraction and nothing in between; the paper's"
            " rates are 37% of the V100's peak for both methods, by the FLOPs of full recomputation",
        ),
        PaperRow(
            quantity="speed-up of LoRA on the same shards",
            paper="1.326x",
            plan=f"{rates[1] / rates[0]:.3f}x",
            why="with every layer recomputed a frozen linear costs 3 products a token where a trained one costs 4:"
            " 1.32 to 1.33 by FLOPs, and more where microbatches are small: each adds a gradient to every trained"
            " weight's, which takes as long for 384 tokens as for 4,096",
        ),
    ]


def _compare_file(lora: JobPlan) -> PaperRow:
    factors, model = lora.checkpoint_bytes["factors fp16"], lora.checkpoint_bytes["base model"]
    return PaperRow(
        quantity="checkpoint, full -> LoRA",
        paper="350 GB -> 35 MB",
        plan=f"{model / 1e9:.0f} GB -> {factors / 1e6:.2f} MB ({factors / 2**20:.1f} MiB)",
        why="rank 4 on q and v is 18,874,368 numbers of 2 bytes; the paper's 35 MB is that in MiB, rounded down",
    )


def describe_headroom(jobs: Sequence[JobPlan]) -> str | None:
    """What LoRA gains by needing no recomputation where fine-tuning does; None without both."""
    lora = next((job for job in jobs if (job.method, job.recompute) == ("lora", "none")), None)
    full = next((job for job in jobs if (job.method, job.recompute) == ("full", "full")), None)
    if lora is None or full is None or not lora.fits:
        return None
    ratio = lora.tokens_per_sec_per_gpu / full.tokens_per_sec_per_gpu
    return (
        f"LoRA without recomputation needs {lora.needed_bytes / GIB:.1f} GiB a GPU and is {ratio:.2f} times as fast as"
        f" full fine-tuning with it ({full.needed_bytes / GIB:.1f} GiB)"
    )
