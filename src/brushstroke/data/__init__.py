"""Training examples: readers, chat formats, and the choice of trained tokens.

Nothing here depends on models, batches or tensors.
"""

from brushstroke.data.answers import encode_answers
from brushstroke.data.chat import ChatFormat
from brushstroke.data.columns import Columns, find_columns, read_prompt, read_row
from brushstroke.data.encode import encode
from brushstroke.data.examples import EncodingReport, Example, common_length, segments
from brushstroke.data.hold_out import hold_out, read_share
from brushstroke.data.messages import Conversation, read_conversation
from brushstroke.data.named_templates import Template, find_template
from brushstroke.data.read import read_rows
from brushstroke.data.reply import Reply
from brushstroke.data.rows import Rows
from brushstroke.data.token_arrays import EncodedData
from brushstroke.data.validate import DataWarning

__all__ = [
    "ChatFormat",
    "Columns",
    "Conversation",
    "DataWarning",
    "EncodedData",
    "EncodingReport",
    "Example",
    "Reply",
    "Rows",
    "Template",
    "common_length",
    "encode",
    "encode_answers",
    "find_columns",
    "find_template",
    "hold_out",
    "read_conversation",
    "read_prompt",
    "read_row",
    "read_rows",
    "read_share",
    "segments",
]
