"""Relative pose of two cameras, regressed from what CroCo's decoder makes of the first image in the light of the second.

The task is that of CroCo (Weinzaepfel et al., NeurIPS 2022, arXiv 2210.10716) on 7-Scenes; its head was not published. This one averages
the last features over the image and regresses a rotation (as two columns, Zhou et al., "On the Continuity of Rotation Representations in
Neural Networks", CVPR 2019, arXiv 1812.07035) and a translation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from geossl.config import require
from geossl.geometry import ImageBatch, Output, pose_matrix, rotation_from_columns
from geossl.models import CroCoDecoderConfig, CroCoPair
from geossl.tasks.body import BodyTask, with_decoder
from geossl.tasks.registry import TASKS


@dataclass(frozen=True, kw_only=True)
class RelativePoseConfig:
    """Numbers of :class:`RelativePose`."""

    name: str = "relative_pose"
    """Registered task."""
    hidden: int = 512
    """Width of the head's two hidden layers."""
    rotation_weight: float = 1.0
    """Factor on the distance of the rotation matrices in the loss; that of the translations (metres) has factor 1."""
    freeze: bool = False
    """Train the head alone, on an encoder and decoder that stay as they are."""
    decoder: CroCoDecoderConfig = field(default_factory=lambda: CroCoDecoderConfig(dim=768, depth=12, heads=12))
    """The decoder, where the weights that are started from bring none; with theirs, its numbers are those."""
    fresh_decoder: bool = False
    """Start the decoder from random weights, even where the weights that are started from bring one."""

    def __post_init__(self) -> None:
        require(self.hidden >= 1, "hidden", "must be at least 1", self.hidden)
        require(self.rotation_weight > 0, "rotation_weight", "must be > 0", self.rotation_weight)

    def build(self, backbone: nn.Module) -> RelativePose:
        """Create the task around ``backbone`` with a fresh head, and a fresh decoder unless ``backbone`` is a pair of both."""
        return RelativePose(self, with_decoder(self, backbone))


class RelativePose(BodyTask):
    """Regression of the motion between two cameras; see the module's docstring.

    Args:
        config: Numbers of the task.
        body: Encoder and decoder; trained along, unless ``config.freeze``.
    """

    def __init__(self, config: RelativePoseConfig, body: CroCoPair) -> None:
        super().__init__(body, config.freeze)
        self.config = config
        layers: list[nn.Module] = []
        for width in (body.decoder.config.dim, config.hidden):
            layers += [nn.Linear(width, config.hidden), nn.ReLU()]
        last = nn.Linear(config.hidden, 9)
        nn.init.normal_(last.weight, std=0.01)
        with torch.no_grad():  # no motion, which is near the truth and far from where two columns make no rotation
            last.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0, 0]))
        self.head = nn.Sequential(*layers, last)

    def forward(self, batch: ImageBatch, *, generator: torch.Generator | None = None) -> Output:
        """Distance to the true motions.

        Args:
            batch: Images with ``reference`` and ``motion``.
            generator: Not used: nothing is random.

        Returns:
            Mean over the pairs of the translation's distance and ``rotation_weight`` times that of the rotation matrices (Frobenius);
            metrics ``translation_error`` and ``rotation_error`` (degrees), means; ``aux``: ``motion [B, 4, 4]``.

        Raises:
            ValueError: the batch has no reference or no motion.
        """
        if batch.motion is None or batch.reference is None:
            raise ValueError(
                "task relative_pose: the batch must have reference and motion; choose pose_pairs, or room_pairs with truth=motion"
            )
        found, true = self.motion(batch.image, batch.reference), batch.motion.float()
        apart = (found[:, :3, 3] - true[:, :3, 3]).norm(dim=1)
        turned = (found[:, :3, :3] - true[:, :3, :3]).flatten(1).norm(dim=1)
        # Frobenius distance d of two rotations: d = 2 sqrt(2) sin(angle / 2).
        angle = torch.rad2deg(2 * torch.asin((turned.detach() / 8**0.5).clamp(max=1)))
        metrics = {"translation_error": apart.detach().mean(), "rotation_error": angle.mean()}
        return Output((apart + self.config.rotation_weight * turned).mean(), metrics, {"motion": found.detach()})

    def motion(self, image: Tensor, reference: Tensor) -> Tensor:
        """The motion ``[B, 4, 4]`` that takes points from the camera of ``image`` to that of ``reference``, both ``[B, 3, H, W]``."""
        last = self.body(image, reference, [len(self.body.feature_info) - 1])[0]
        numbers = self.head(last.mean((2, 3))).float()
        with torch.autocast(numbers.device.type, enabled=False):
            return pose_matrix(rotation_from_columns(numbers[:, :6]), numbers[:, 6:])

    @torch.no_grad()
    def predict(self, image: Tensor, reference: Tensor) -> Tensor:
        """:meth:`motion` without gradients."""
        return self.motion(image, reference)


@TASKS.register
def relative_pose() -> RelativePoseConfig:
    """Rotation and translation between the cameras of two images."""
    return RelativePoseConfig()
