"""A LightningModule that accelerates itself where it is complete.

pip install lightning
python examples/lightning_module.py
"""

import argparse
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import nn

import fastllm


class Module(lightning.LightningModule):
    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        self.losses: list[float] = []

    def configure_model(self):
        # Lightning calls it once for fit, test and so on; a second time changes nothing.
        fastllm.accelerate(self)

    def training_step(self, batch, index):
        mask = nn.Transformer.generate_square_subsequent_mask(batch.shape[1] - 1, device=batch.device)
        logits = self.head(self.layers(self.embedding(batch[:, :-1]), mask=mask, is_causal=True))
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(argv=None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    lightning.seed_everything(0, verbose=False)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    rows = text[: len(text) // 65 * 65].view(-1, 65)
    loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
    module = Module()
    trainer = lightning.Trainer(
        max_steps=options.steps, max_epochs=-1, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
    return module.losses


if __name__ == "__main__":
    main()
