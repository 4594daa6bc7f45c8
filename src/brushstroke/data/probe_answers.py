"""What a chat template writes around answers, found on made-up conversations: how it asks, and what ends an
answer.

No template is known by its name here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from brushstroke.data.forms import INLINE, THOUGHT, Form, forms
from brushstroke.data.layout import LayoutFinder, Unproven
from brushstroke.data.messages import Conversation, read_conversation
from brushstroke.data.template import ChatTemplate, TemplateRefusal, common_opening, without_suffix

QUESTION = {"role": "user", "content": "Hello?"}
CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"where": "there"}}}
ANSWERS = {  # kinds of answers
    "text": {"content": "Hello."},
    "reasoning": {"content": "Hello.", "reasoning_content": "A greeting."},
    "call": {"content": "", "tool_calls": [CALL]},
}


def forms_for(template: ChatTemplate, conversation: Conversation) -> Iterator[tuple[Form, Conversation]]:
    """The forms to try; reasoning goes into a content only where the template looks for it there."""
    for form, told in forms(conversation):
        if form.reasoning == INLINE and not form.thoughts and not reads_think_tags(template):
            continue
        yield form, told


def answered(kind: str) -> Conversation:
    """A made-up conversation with one answer of a kind."""
    return read_conversation([QUESTION, {"role": "assistant", **ANSWERS[kind]}], where="a probe")


def asked_as_answered(template: ChatTemplate) -> ChatTemplate:
    """A template that asks with no more than what every kind of answer begins with.

    Generation prompts may open what answers do not have, such as <think>: a model that was trained on answers
    has never seen that. Such a prompt is cut back to what it has in common with the answers.
    """
    excess = ""
    for kind in ANSWERS:
        finder = next(_readable(template, answered(kind)), None)
        if finder is None:
            continue
        question = finder.outline(1, ask=True)
        common = common_opening(question.text, finder.outline(2).text)
        if common < max((s.stop for s in question.segments if s.slot is not None), default=0):
            return template  # nobody can tell where an answer begins
        excess = max(excess, question.text[common:], key=len)
    return ChatTemplate(template.tokenizer, without_suffix(template.source, excess)) if excess else template


def closing_markers(template: ChatTemplate, known_markers: Sequence[str]) -> tuple[str, ...]:
    """What ends the answers of each kind that a template can print."""
    found = []
    for kind in ("text", "call"):
        for form, told in forms_for(template, answered(kind)):
            finder = LayoutFinder(template, told, form, known_markers=known_markers)
            try:
                (layout,) = finder.whole_or_each()
            except (Unproven, TemplateRefusal):
                continue
            found += [turn.end for turn in layout.turns if turn.end is not None]
            break
    return tuple(dict.fromkeys(found))


def opening_of(template: ChatTemplate, form: Form) -> str:
    """What a template writes before an answer that nothing precedes; "" where it does not tell."""
    finder = LayoutFinder(template, answered("text"), replace(form, thoughts=""))
    try:
        asked, bare = finder.outline(1, ask=True).text, finder.outline(1).text
        if not asked.startswith(bare):
            return ""
        return asked[len(bare) :]
    except TemplateRefusal:
        return ""


def reads_think_tags(template: ChatTemplate) -> bool:
    """Whether a template treats <think>…</think> in a content otherwise than the words of a content."""
    if template.reads_think_tags is None:
        template.reads_think_tags = _treats_think_tags(template)
    return template.reads_think_tags


def _treats_think_tags(template: ChatTemplate) -> bool:
    inline = Form(reasoning=INLINE)
    with_tags, plain = (LayoutFinder(template, answered(kind), inline) for kind in ("reasoning", "text"))
    try:
        written, bare = (finder.outline(2).text for finder in (with_tags, plain))
    except TemplateRefusal:
        return False
    content = with_tags.sketch.messages[1]
    whole = THOUGHT.format(content["reasoning_content"], content["content"])
    return written != bare.replace(plain.sketch.messages[1]["content"], whole)


def _readable(template: ChatTemplate, conversation: Conversation) -> Iterator[LayoutFinder]:
    """Finders of the forms in which a template prints every value."""
    for form, told in forms_for(template, conversation):
        finder = LayoutFinder(template, told, form)
        try:
            outline = finder.outline(len(told.messages))
            finder.outline(1, ask=True)
        except TemplateRefusal:
            continue
        wanted = {slot for used in finder.sketch.uses for slot in used}
        if wanted <= {segment.slot for segment in outline.segments} and not outline.altered:
            yield finder
