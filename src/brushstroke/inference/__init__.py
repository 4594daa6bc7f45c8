"""Text generation, conversations and evaluation.

It trains nothing and does not print.
"""

from brushstroke.inference.batching import run_requests
from brushstroke.inference.chat import ChatSession
from brushstroke.inference.evaluate import Evaluation, evaluate
from brushstroke.inference.gain import GainKept, gain_kept
from brushstroke.inference.generate import Answer, generate, shown_prompt
from brushstroke.inference.loss import Loss, evaluate_loss
from brushstroke.inference.request import Output, Request, SamplingParams, check_batch_size
from brushstroke.inference.scores import Scores, json_object, score

__all__ = [
    "Answer",
    "ChatSession",
    "Evaluation",
    "GainKept",
    "Loss",
    "Output",
    "Request",
    "SamplingParams",
    "Scores",
    "check_batch_size",
    "evaluate",
    "evaluate_loss",
    "gain_kept",
    "generate",
    "json_object",
    "run_requests",
    "score",
    "shown_prompt",
]
