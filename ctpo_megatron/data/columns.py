"""Columns of a data file beside those that are read: which may be ignored, and which hold what a model would have to see.

Models here read text. A column of images, sounds or videos, told by its name or by its type, belongs to the task, and so do the
definitions of tools that a chat template could show: a row that has some is refused, not trained on without it. All other
columns are ignored, and said to be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import DataError

_MEDIA = {
    "images": {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "figure", "figures", "screenshot"}
    | {"screenshots", "pixel", "pixels"},
    "sounds": {"audio", "audios", "sound", "sounds", "speech", "wav", "waveform"},
    "videos": {"video", "videos", "frames", "clip", "clips"},
    "media": {"multimodal", "multi_modal", "multi_modal_data", "multi_modal_inputs", "mm_data", "media"},
}
_PLAIN = {
    "image",
    "images",
    "img",
    "imgs",
    "picture",
    "pictures",
    "screenshot",
    "screenshots",
    "audio",
    "audios",
    "video",
    "videos",
}
# what a name of media may go on with and still mean the media: image_path, video_url, img_1; not image_license
_ENDINGS = {"path", "paths", "url", "urls", "uri", "uris", "file", "files", "bytes", "data", "base64", "b64", "values", "list"}
_FOR_THE_TEMPLATE = {
    "tools": "definitions of tools",
    "functions": "definitions of functions",
    "documents": "documents",
    "system": "a system message",
    "system_prompt": "a system message",
    "chat_template_kwargs": "settings of the chat template",
    "enable_thinking": "a setting of the chat template",
}
_FILE_KEYS = ({"bytes", "path"}, {"array", "sampling_rate"})  # as Hugging Face's datasets store images and sounds


def content_in(name: str, value: Any) -> str | None:
    """Returns what a cell of the column `name` holds that the model would have to see: media at any depth, bytes; or None."""
    if not holds_something(value):
        return None
    if name.lower() in _FOR_THE_TEMPLATE:
        return _FOR_THE_TEMPLATE[name.lower()]
    return _media_in(name, value)


def holds_something(value: Any) -> bool:
    """Whether a cell holds more than nothing: at any depth, something that is neither null nor empty."""
    if isinstance(value, dict):
        return any(map(holds_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_something, value))
    return value is not None and value not in ("", b"")


def check_parquet(path: Path, file: Any, read: Sequence[str]) -> None:
    """Raise DataError for the first row of an open parquet file that holds what the model would have to see.

    Columns that are `read`, and those that by their name and type hold nothing of the kind, are not looked into.
    """
    for field in file.schema_arrow:
        if field.name in read or not _may_hold_content(field.name, field.type):
            continue
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=[field.name]):
            for cell in batch.column(0):
                if (kind := content_in(field.name, cell.as_py())) is not None:
                    raise refused(f"{path} row {row}", field.name, kind)
                row += 1


def refused(place: str, name: str, kind: str) -> DataError:
    """Returns the error about a cell that holds what the model would have to see."""
    if kind in _FOR_THE_TEMPLATE.values():
        return DataError(
            f"{place}: column {name!r} holds {kind}, which would not reach the model. Write it into the conversation's "
            "system message, or remove the column."
        )
    return DataError(
        f"{place}: column {name!r} holds {kind}, which the model cannot see: text alone is trained on. Remove the rows that need "
        "it, or the column where they do not."
    )


def _media_in(name: str, value: Any) -> str | None:
    if not holds_something(value) or isinstance(value, int | float):  # a number is about media
        return None
    if isinstance(value, bytes):
        return "bytes"
    if (kind := _named_media(name)) is not None:
        return kind
    if isinstance(value, dict):
        if any(keys <= value.keys() for keys in _FILE_KEYS):
            return "images, sounds or other files"
        return next((kind for inner, held in value.items() if (kind := _media_in(inner, held))), None)
    if isinstance(value, list) and value and isinstance(value[0], dict | list | bytes):
        return next((kind for entry in value if (kind := _media_in("", entry))), None)
    return None


def _named_media(name: str) -> str | None:
    """Returns which media a name speaks of: `imagePath` and `question_img_1` do, `image_license` and `part_of_speech` do not."""
    whole = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", name).lower()
    words = whole.split("_")
    while len(words) > 1 and (words[-1] in _ENDINGS or words[-1].isdigit()):
        words.pop()
    stem = "_".join(words)
    spoken = {whole, stem, words[-1]} if words[-1] in _PLAIN else {whole, stem}
    return next((kind for kind, names in _MEDIA.items() if spoken & names), None)


def _may_hold_content(name: str, kind: Any) -> bool:
    """Whether cells of this name and Arrow type are worth looking into. It need not be sure; they are looked at one by one."""
    import pyarrow as pa

    if name.lower() in _FOR_THE_TEMPLATE or _named_media(name) is not None:
        return True
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    if pa.types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        names = {field.name for field in fields}
        if any(keys <= names for keys in _FILE_KEYS):
            return True
        return any(_named_media(field.name) or _may_hold_content("", field.type) for field in fields)
    if isinstance(kind, pa.BaseExtensionType):
        return _may_hold_content(name, kind.storage_type)
    return hasattr(kind, "value_type") and not pa.types.is_dictionary(kind) and _may_hold_content("", kind.value_type)
