"""python docs/own_loop/lightning_trainer.py

Lightning: one callback, with automatic or manual optimization. Its state is in Lightning's checkpoints.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tritprune.integrations import LightningPruning


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def make_loader():
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    return DataLoader(data, batch_size=64)


def make_trainer(folder, *callbacks, **changes):
    pruning = LightningPruning(pattern="4x1", target_sparsity=0.8, start_step=0.1, end_step=0.7, frequency=3)
    settings = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return lightning.Trainer(
        default_root_dir=folder, callbacks=[pruning, *callbacks], **{**settings, **changes}
    ), pruning


if __name__ == "__main__":
    trainer, pruning = make_trainer("outputs/lightning_trainer")
    trainer.fit(Digits(), make_loader())
    print(f"sparsity {pruning.pruner.sparsity().prunable.sparsity:.4f}, masks {pruning.pruner.digest()[:12]}")
