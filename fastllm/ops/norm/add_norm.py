"""What the modules of add_layer_norm and add_rms_norm share."""

from __future__ import annotations

from .operator import check_scalars


class DropsBranch:
    """Before one of torch's norm modules: dropout of the branch, in training mode only."""

    def __init__(self, *args, dropout_p: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        check_scalars(type(self).__name__, 0.0, dropout_p)
        self.dropout_p = dropout_p

    @property
    def active_dropout(self) -> float:
        return self.dropout_p if self.training else 0.0

    def extra_repr(self):
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"
