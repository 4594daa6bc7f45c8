"""A model at work: answers, conversations, evaluations, and export as a merged folder.

It trains nothing and knows no terminal.
"""

from brushstroke.inference.chat import ChatSession
from brushstroke.inference.decode import run_requests
from brushstroke.inference.evaluate import Evaluation, evaluate, evaluate_all
from brushstroke.inference.export import ExportReport, merge_folder
from brushstroke.inference.generate import Answer, generate, shown_prompt
from brushstroke.inference.loss import Loss, evaluate_loss
from brushstroke.inference.request import Output, Request, Sampling
from brushstroke.inference.scores import Scores, json_object, score

__all__ = [
    "Answer",
    "ChatSession",
    "Evaluation",
    "ExportReport",
    "Loss",
    "Output",
    "Request",
    "Sampling",
    "Scores",
    "evaluate",
    "evaluate_all",
    "evaluate_loss",
    "generate",
    "json_object",
    "merge_folder",
    "run_requests",
    "score",
    "shown_prompt",
]
