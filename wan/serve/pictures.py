"""What is shown of a video before it is played: its middle frame, and a sheet of frames from start to end."""

from __future__ import annotations

from pathlib import Path

from wan.files import atomic
from wan.video import open_video

THUMBNAIL, SHEET = "thumbnail.jpg", "spritesheet.jpg"
_MOST_PX, _CELL_PX, _COLUMNS, _CELLS = 1280, 240, 4, 16


def write_pictures(video: Path, folder: Path) -> None:
    """Both, of a video or a picture, into a folder. Atomic; raises SwanError."""
    from PIL import Image

    opened = open_video(video)
    count = min(_CELLS, len(opened))
    ids = [round(at * (len(opened) - 1) / max(1, count - 1)) for at in range(count)]
    middle = len(opened) // 2
    found = dict(zip(sorted({*ids, middle}), opened.frames(sorted({*ids, middle}))))
    thumbnail = Image.fromarray(found[middle])
    thumbnail.thumbnail((_MOST_PX, _MOST_PX))
    cells = [Image.fromarray(found[at]) for at in ids]
    for cell in cells:
        cell.thumbnail((_CELL_PX, _CELL_PX))
    width, height = cells[0].size
    columns = min(_COLUMNS, count)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for at, cell in enumerate(cells):
        sheet.paste(cell, (at % columns * width, at // columns * height))
    for name, picture in ((THUMBNAIL, thumbnail), (SHEET, sheet)):
        with atomic(folder / name) as temporary:
            picture.save(temporary, format="JPEG", quality=90)
