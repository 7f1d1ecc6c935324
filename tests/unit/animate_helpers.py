"""Small inputs and networks for Animate."""

from pathlib import Path

import numpy as np
from easydict import EasyDict

from tests.unit.tiny_checkpoint import shrunk
from tests.unit.video_helpers import still, write


def small_spec() -> EasyDict:
    """With one look at the face, after the first block, and a motion encoder as narrow as is still quick."""
    spec = shrunk("animate-14B")
    spec.dit.update(num_layers=6, face_px=64, motion_encoder_dim=24, motion_channels=16)
    return spec


def write_inputs(folder: Path, frames: int = 12, width: int = 48, height: int = 32, face: int = 64) -> Path:
    """The files of --src_root_path, those of a replacement included. Lossless, but for the names of codecs."""
    folder.mkdir(exist_ok=True)
    white = np.zeros((frames, height, width, 3), np.uint8)
    white[:, height // 4 : height // 2, width // 4 : width // 2] = 255
    shades = np.linspace(40, 200, frames).astype(np.uint8)[:, None, None, None]
    videos = {
        "src_pose": white // 2 + shades // 4,
        "src_face": np.broadcast_to(shades, (frames, face, face, 3)),
        "src_bg": np.where(white, 0, 120 + shades // 4).astype(np.uint8),
        "src_mask": white,
    }
    for name, pixels in videos.items():
        write(folder / f"{name}.mp4", pixels, pix_fmt="yuv420p")
    rng = np.random.default_rng(0)
    still(folder / "src_ref.png", rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    return folder
