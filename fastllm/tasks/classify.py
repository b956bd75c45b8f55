"""Labels of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data import Tokenizer
from ..models.mode import evaluation_mode
from .features import check_asked, padded, text_ids


@torch.no_grad()
def classify(model, tokenizer: Tokenizer, texts: Sequence[str], *, rows: int = 32) -> torch.Tensor:
    """Probabilities (texts, classes) in fp32 on the CPU; the model is run in evaluation mode and left as it was.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of its range; names it.
    """
    check_asked(model, "class_logits", texts, rows)
    device = next(model.parameters()).device
    ids = [text_ids(text, tokenizer, model.config.context_length) for text in texts]
    result = []
    with evaluation_mode(model):
        for begin in range(0, len(ids), rows):
            part = ids[begin : begin + rows]
            lengths = torch.tensor([len(row) for row in part])
            tokens = padded(part, tokenizer.special("sep"))
            encoded = model.encode(tokens.to(device), lengths)
            result.append(model.class_logits(encoded).float().softmax(-1).cpu())
    return torch.cat(result) if result else torch.zeros(0, model.config.num_classes)
