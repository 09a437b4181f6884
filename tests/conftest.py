"""What every test needs: heavy packages imported once, before tests fork their processes."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # loads its lazy modules

import deepspeed  # noqa: E402, F401
import megatron.core.models.gpt.gpt_model  # noqa: E402, F401

torch.set_num_threads(1)
