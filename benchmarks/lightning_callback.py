"""Lightning's EMAWeightAveraging, called as its Trainer calls it.

The callback is the real one. Of the Trainer it only reads how many optimizer steps were made, and so a counter stands
for the Trainer here; the Trainer's own work at each step is not timed.
"""

import warnings
from types import SimpleNamespace

from torch import nn

from benchmarks.contender import DECAY, Running, pairs_by_name


def ema_weight_averaging(model: nn.Module) -> Running:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from lightning.pytorch import LightningModule
        from lightning.pytorch.callbacks import EMAWeightAveraging

    class Holder(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    holder = Holder().to(next(model.parameters()).device)  # so that it knows where it is
    trainer = SimpleNamespace(global_step=0)
    callback = EMAWeightAveraging(decay=DECAY)
    callback.setup(trainer, holder, "fit")

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, holder, None, None, trainer.global_step - 1)

    return Running(update, lambda: pairs_by_name(callback._average_model.module.model.state_dict(), model))
