"""A process whose torch has pretend GPUs: runs functions of test modules on them, as asked line by line, in forks.

In: {"module", "function", "world_size", "capability", "args"}; out: {"results"}, by global rank, or {"problem"}.
"""

import importlib
import json
import os
import sys
from typing import Any

import torch
from processes import run_distributed

from pretend_gpu import graphs, kernels, torch_cuda


def call(capability: tuple[int, int], module: str, function: str, args: list[Any]) -> Any:
    torch_cuda.set_capability(*capability)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return getattr(importlib.import_module(module), function)(*args)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    importlib.import_module(request["module"])  # once for all forks
    called = request["capability"], request["module"], request["function"], request["args"]
    try:
        return {"results": run_distributed(call, request["world_size"], *called, backend="nccl")}
    except AssertionError as problem:
        return {"problem": str(problem)}


def main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device = torch_cuda.install()
    graphs.install()
    library = kernels.install(device.as_host)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
    del library


if __name__ == "__main__":
    main()
