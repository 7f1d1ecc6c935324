"""Contact sheets of a batch: one picture of all clips, and a page that plays them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wan.errors import SwanError, UsageError, printable
from wan.files import atomic
from wan.video import open_video

_NAMES, _TITLE = ("sheet.png", "sheet.html"), "Clips by Swan"
_CELL_PX, _MOST_COLUMNS, _MOST_CELLS = 256, 8, 1000
_LINE_PX, _FONT_PX, _GAP_PX = 18, 14, 8
_STYLE = (
    "body{font:14px sans-serif;background:#111;color:#ddd;margin:16px}"
    "main{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(240px,1fr))}"
    "figure{margin:0}video,img{width:100%;background:#000}figcaption{white-space:pre-line;overflow-wrap:anywhere}"
)


@dataclass(frozen=True)
class Cell:
    """file: of the clip, None where there is none; told: what is said of it."""

    name: str
    file: Path | None
    told: Mapping[str, Any]

    @property
    def lines(self) -> list[str]:
        told = [f"{flag} = {value}" for flag, value in self.told.items()] or [self.name]
        return told if self.file else [*told, "failed"]


def check_sheets(folder: Path) -> None:
    """Raises UsageError where a sheet would take the place of a file that is none."""
    from PIL import Image, UnidentifiedImageError

    for path in (folder / name for name in _NAMES if (folder / name).exists()):
        try:
            if path.suffix == ".png":
                with Image.open(path) as picture:
                    is_ours = picture.info.get("title") == _TITLE
            else:
                is_ours = f"<title>{_TITLE}</title>" in path.read_text(encoding="utf-8", errors="replace")[:1000]
        except (OSError, UnidentifiedImageError):
            is_ours = False
        if not is_ours:
            raise UsageError(f"{printable(path)} is there and of no batch: give another --out")


def write_sheets(folder: Path, cells: Sequence[Cell], columns: int = 0) -> list[Path]:
    """sheet.png and sheet.html in a folder. columns: of the picture, 0: as many as fit. Atomic; raises SwanError."""
    from PIL.PngImagePlugin import PngInfo

    paths, about = [folder / name for name in _NAMES], PngInfo()
    about.add_text("title", _TITLE)
    with atomic(paths[0]) as temporary:
        _picture(cells[:_MOST_CELLS], columns).save(temporary, format="PNG", pnginfo=about)
    with atomic(paths[1]) as temporary:
        temporary.write_text(_page(cells), encoding="utf-8")
    return paths


def _picture(cells: Sequence[Cell], columns: int) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns or round(len(cells) ** 0.5 + 0.49), _MOST_COLUMNS, len(cells))
    text_px = _LINE_PX * max(len(cell.lines) for cell in cells) + _GAP_PX
    side, rows = _CELL_PX + _GAP_PX, -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * side + _GAP_PX, rows * (side + text_px) + _GAP_PX), "#111111")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    for at, cell in enumerate(cells):
        left, top = (at % columns) * side + _GAP_PX, (at // columns) * (side + text_px) + _GAP_PX
        frame = _middle_frame(cell.file)
        if frame is not None:
            frame.thumbnail((_CELL_PX, _CELL_PX)) if max(frame.size) > _CELL_PX else None
            scale = max(1, _CELL_PX // max(frame.size))
            frame = frame.resize((frame.width * scale, frame.height * scale), Image.Resampling.NEAREST)
            sheet.paste(frame, (left + (_CELL_PX - frame.width) // 2, top + (_CELL_PX - frame.height) // 2))
        for line, text in enumerate(cell.lines):
            draw.text((left, top + side + line * _LINE_PX), _fitted(text, font), fill="#dddddd", font=font)
    return sheet


def _fitted(text: str, font: Any) -> str:
    text = text.encode("latin-1", "replace").decode("latin-1").replace("\n", " ")  # what the font has
    while text and font.getlength(text) > _CELL_PX:
        text = text[:-1]
    return text


def _middle_frame(path: Path | None) -> Any:
    from PIL import Image

    if path is None:
        return None
    try:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                return picture.convert("RGB")
        video = open_video(path)
        [frame] = video.frames([len(video) // 2])
        return Image.fromarray(frame)
    except (SwanError, OSError, ValueError):  # gone, or changed by others, meanwhile
        return None


def _page(cells: Sequence[Cell]) -> str:
    figures = []
    for cell in cells:
        caption, shown = html.escape("\n".join(cell.lines)), ""
        if cell.file:
            source = html.escape(quote(cell.file.name))
            is_picture = cell.file.suffix == ".png"
            shown = (
                f'<img src="{source}" alt="">' if is_picture else f'<video src="{source}" muted loop controls></video>'
            )
        figures.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    head = f'<!doctype html><meta charset="utf-8"><title>{_TITLE}</title><style>{_STYLE}</style>'
    return f"{head}<main>{''.join(figures)}</main>\n"
