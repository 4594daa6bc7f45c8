"""Examples for training: readers, chat formats, and which tokens are trained.

Nothing here knows a model, a batch or a tensor.
"""

from brushstroke.data.chat import ChatFormat
from brushstroke.data.encode import encode
from brushstroke.data.examples import EncodedData, EncodingReport, Example, common_length, segments
from brushstroke.data.read import Rows, read_rows

__all__ = [
    "ChatFormat",
    "EncodedData",
    "EncodingReport",
    "Example",
    "Rows",
    "common_length",
    "encode",
    "read_rows",
    "segments",
]
