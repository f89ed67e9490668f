"""Reading back what trackers wrote: files of records, as leveldb and TensorFlow lay them out."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: leveldb's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts = path.read_bytes(), _HEADER, b""
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:  # too short for a record: padding
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + _HEADER])
        body = content[position + _HEADER : position + _HEADER + length]
        if len(body) < length:  # still being written
            return
        position += _HEADER + length
        parts = body if kind in (_WHOLE, _FIRST) else parts + body
        if kind in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def tensorboard_events(path: Path) -> Iterator[Any]:
    """The events of a TensorBoard file: length and checksum, the event, another checksum."""
    from tensorboardX.proto import event_pb2

    content, position = path.read_bytes(), 0
    while position < len(content):
        (length,) = struct.unpack("<Q", content[position : position + 8])
        event = event_pb2.Event()
        event.ParseFromString(content[position + 12 : position + 12 + length])
        position += length + 16
        yield event
