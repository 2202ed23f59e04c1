"""The part of a report that shows images: what a method saw of each, and what it made of it."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np


def image_panel(arrays: dict[str, np.ndarray] | None) -> list[dict[str, Any]]:
    """Pack what :func:`geossl.evaluation.report_data.save_images` wrote for the page: rows of images with their titles."""
    if arrays is None:
        return []
    titles = [str(title) for title in arrays["titles"]]
    return [
        {"name": str(name), "cells": [{"title": title, "src": jpeg(arrays[f"{title}_{number}"])} for title in titles]}
        for number, name in enumerate(arrays["names"])
    ]


def jpeg(image: np.ndarray) -> str:
    """A colour image ``[H, W, 3]`` uint8 as the address of a JPEG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
