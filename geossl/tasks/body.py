"""What the tasks on CroCo's encoder, or its encoder and decoder, share."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from geossl.errors import ConfigError
from geossl.models import CroCoPair, CroCoViT


class BodyTask(nn.Module):
    """A task that reads a pretrained body; sub-classes add a ``head``.

    Args:
        body: The encoder, or encoder and decoder.
        freeze: Train the head alone; the body then stays in evaluation mode.
    """

    def __init__(self, body: CroCoViT | CroCoPair, freeze: bool) -> None:
        super().__init__()
        self.body = body
        self.frozen = freeze
        if freeze:
            body.requires_grad_(False)

    @property
    def backbone(self) -> CroCoViT:
        """The encoder."""
        return self.body.backbone if isinstance(self.body, CroCoPair) else self.body

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts; a frozen body stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Nothing beyond what the body names."""
        return {f"body.{name}" for name in self.body.no_weight_decay()}

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        return [*([f"body.{prefix}" for prefix in prefixes] for prefixes in self.body.layer_groups()), ["head."]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass."""
        self.body.set_grad_checkpointing(enabled)


def with_decoder(config: Any, backbone: nn.Module) -> CroCoPair:
    """The encoder ``backbone`` with a fresh decoder of the numbers ``config.decoder``; a pair of both as it is.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(backbone, CroCoPair):
        return backbone
    if not isinstance(backbone, CroCoViT):
        raise ConfigError(f"task {config.name} needs a croco_vit_* backbone, got {type(backbone).__name__}")
    return CroCoPair(backbone, config.decoder.build(backbone.config))
