"""With this directory on PYTHONPATH every Python that starts has pretend GPUs: for scripts, and what they start.

PRETEND_CAPABILITY is theirs, `9.0` unless given; PRETEND_FULL the global rank whose own has no more than 8 MiB.
"""

import os
import sys
from pathlib import Path

if os.environ.get("DS_ACCELERATOR") == "cuda":  # a plan's process has none
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from pretend_gpu import graphs, kernels, torch_cuda

    _device = torch_cuda.install()
    torch_cuda.set_capability(*map(int, os.environ.get("PRETEND_CAPABILITY", "9.0").split(".")))
    graphs.install()
    _library = kernels.install(_device.as_host)
    if os.environ.get("PRETEND_FULL", "none") == os.environ.get("RANK"):
        import torch

        torch.cuda.set_per_process_memory_fraction(2**23 / torch.cuda.mem_get_info()[1])
