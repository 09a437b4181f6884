"""With this directory on PYTHONPATH every Python that starts has pretend GPUs: for scripts, and what they start.

PRETEND_CAPABILITY is theirs, `9.0` unless given.
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
