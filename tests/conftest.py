"""What every test shares: reproducible properties, one thread, no network account."""

import os

import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile(
    "tritprune", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tritprune")
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--gates",
        choices=["changed", "all"],
        default="changed",
        help="machine code: compile a choice of the variants that are as recorded, or every one anew (20 minutes)",
    )
