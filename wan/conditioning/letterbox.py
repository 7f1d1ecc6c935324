"""Pictures at other sizes, by OpenCV's rules of rounding. No torch: `wan.prepare` does without."""

from __future__ import annotations

import cv2
import numpy as np

from wan.conditioning.sizes import letterbox_size


def letterbox(image: np.ndarray, height: int, width: int, by_areas: bool = False) -> np.ndarray:
    """uint8 [H, W, 3] -> [height, width, 3]: as large as it fits, in the middle of a black picture; bilinear without
    antialiasing, as the official `padding_resize`, or `by_areas` where it gets smaller."""
    rows, columns = letterbox_size(height, width, *image.shape[:2])
    top, left = (height - rows) // 2, (width - columns) // 2
    out = np.zeros((height, width, 3), np.uint8)
    out[top : top + rows, left : left + columns] = resized(image, rows, columns, by_areas)
    return out


def resized(image: np.ndarray, height: int, width: int, by_areas: bool = True) -> np.ndarray:
    """uint8 [H, W, 3] -> [height, width, 3]."""
    if image.shape[:2] == (height, width):
        return image
    is_smaller = height * width < image.shape[0] * image.shape[1]
    how = cv2.INTER_AREA if by_areas and is_smaller else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how)
