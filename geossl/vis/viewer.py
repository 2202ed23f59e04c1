"""Look at Gaussian splats in a browser."""

from __future__ import annotations

from typing import Any

import torch

from geossl.errors import optional_import
from geossl.geometry import Gaussians, quaternion_to_matrix


def view_gaussians(gaussians: Gaussians, host: str = "127.0.0.1", port: int = 8080) -> Any:
    """Show Gaussians in an interactive viewer (viser) and return its server, which runs until the process ends or ``server.stop()``.

    Colours are those of degree 0: the viewer shows no dependence on the view.

    Args:
        gaussians: The scene.
        host: Address to listen on; only this machine by default.
        port: Port of the page, ``http://host:port``.

    Raises:
        MissingDependencyError: viser is not installed; it comes with ``pip install geossl[vis]``.
    """
    viser = optional_import("viser", "vis")
    scene = gaussians.to("cpu")
    m = quaternion_to_matrix(scene.quats.detach().float()) * scene.scales.detach().float()[:, None]
    server = viser.ViserServer(host=host, port=port)
    server.scene.set_up_direction("+z")
    server.scene.add_gaussian_splats(
        "/gaussians",
        centers=scene.means.detach().float().numpy(),
        covariances=torch.matmul(m, m.mT).numpy(),
        rgbs=scene.colors.detach().float().clamp(max=1).numpy(),
        opacities=scene.opacities.detach().float()[:, None].numpy(),
    )
    return server
