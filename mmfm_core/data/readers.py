"""Image files to arrays."""

from pathlib import Path

import numpy as np
from PIL import Image

from mmfm_core.config.model import ImageModality
from mmfm_core.errors import MmfmError


def read_image(path: Path, modality: ImageModality) -> np.ndarray:
    """A PNG or JPEG as float32 [C, H, W] in [0, 1] of the file's full scale, resized with antialiasing.

    Raises:
        MmfmError: the file is damaged or no such image; its name is left out, since it comes from a patient's record.
    """
    height, width = modality.size
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.mode == "I;16":
                pixels, full_scale = image.convert("F"), 65535.0
            else:
                pixels, full_scale = image.convert("RGB" if modality.channels == 3 else "L"), 255.0
            resized = pixels.resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MmfmError(
            f"cannot be read as a PNG or JPEG ({type(error).__name__}); restore the file, or empty its cell in the "
            "manifest"
        ) from error
    channels = np.asarray(resized, dtype=np.float32) / full_scale
    channels = channels[None] if channels.ndim == 2 else channels.transpose(2, 0, 1)
    return np.broadcast_to(channels, (modality.channels, height, width)).astype(np.float32)
