"""Averages kept by libraries that run the training loop."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from makers.common import STEPS, Tiny, batches, case, copied, pretend, tiny, train, write


def _loader() -> DataLoader:
    inputs, targets = (torch.cat(each) for each in zip(*batches(2), strict=True))
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


def _lightning(folder: Path, callback: Any, held: bool, epochs: int = 3) -> tuple[Path, dict[str, Tensor]]:
    """Trains for `epochs` of two steps and a checkpoint; what it gives is the last but one, and the weights then."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    class Layers(pl.LightningModule):
        """With layers of its own, or a model as an attribute."""

        def __init__(self, width: int = 4, rate: float = 0.05) -> None:
            super().__init__()
            self.save_hyperparameters()
            if held:
                self.model = tiny(tied=True)
            else:
                self.stem, self.norm, self.head = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs) if held else self.head(self.norm(self.stem(inputs)))

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
            self.log("loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    saved: dict[int, dict[str, Tensor]] = {}
    averages: dict[int, dict[str, Tensor]] = {}

    class Watch(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            saved[trainer.current_epoch] = copied(pl_module.state_dict())
            averages[trainer.current_epoch] = copied(getattr(callback._average_model, "module", callback._average_model).state_dict())
            counts[trainer.current_epoch] = int(
                getattr(callback._average_model, "n_averaged", getattr(callback, "_n_averaged", -1) or -1)
            )

    counts: dict[int, int] = {}
    pl.seed_everything(0, verbose=False)
    checkpoints = ModelCheckpoint(dirpath=folder, monitor="loss", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, Watch(), checkpoints],
        num_sanity_val_steps=0,
    )
    trainer.fit(Layers(), _loader(), _loader())
    kept = epochs - 2
    for path in folder.glob("*.ckpt"):
        if not path.name.startswith(f"epoch={kept}-"):
            path.unlink()
    (path,) = folder.glob("*.ckpt")
    return path, averages[kept], saved[kept], counts[kept]
