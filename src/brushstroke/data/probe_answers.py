"""Finds how a chat template begins and ends answers, with test conversations.

It does not depend on names of templates.
"""

from collections.abc import Iterator, Sequence

from brushstroke.data.forms import INLINE, THOUGHT, Form, forms
from brushstroke.data.layout import LayoutFinder, Unproven
from brushstroke.data.messages import Conversation, read_conversation
from brushstroke.data.template import (
    ChatTemplate,
    TemplateRefusal,
    common_opening,
    common_start,
    with_other_end,
    without_open_tag,
)

QUESTION = {"role": "user", "content": "Hello?"}
CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"where": "there"}}}
ANSWERS = {  # the kinds of answers
    "text": {"content": "Hello."},
    "reasoning": {"content": "Hello.", "reasoning_content": "A greeting."},
    "call": {"content": "", "tool_calls": [CALL]},
}


def forms_for(template: ChatTemplate, conversation: Conversation) -> Iterator[tuple[Form, Conversation]]:
    """The forms to try; reasoning is put into a content only if the template looks for it there."""
    for form, changed in forms(conversation):
        if form.reasoning == INLINE and not form.thoughts and not reads_think_tags(template):
            continue
        yield form, changed


def answered(kind: str) -> Conversation:
    """A test conversation with one answer of a kind."""
    return read_conversation([QUESTION, {"role": "assistant", **ANSWERS[kind]}], where="a probe")


def asked_as_answered(template: ChatTemplate) -> ChatTemplate:
    """A template whose generation prompt is the common beginning of all kinds of answers.

    Generation prompts may add a beginning that answers do not have, such as <think>; a model trained on such
    answers has never seen it. The prompt is shortened to what it has in common with the answers, and
    continues with the beginning that all of them have.
    """
    excess, openings = "", []
    for kind in ANSWERS:
        finder = next(_readable(template, answered(kind)), None)
        if finder is None:
            continue
        question, answer = finder.outline(1, ask=True), finder.outline(2)
        before = max((s.stop for s in question.segments if s.slot is not None), default=0)
        first = min(s.start for s in answer.segments if s.start >= before and s.slot is not None)
        contents = [s.start for s in answer.segments if s.slot is not None][-1]
        common = common_opening(question.text, answer.text, before, contents)
        if common < before or question.text[:before] != answer.text[:before]:
            return template  # the beginning of an answer cannot be found
        openings.append((question.text, answer.text, before, first, contents))
        excess = max(excess, question.text[common:], key=len)
    if not excess:
        return template
    begun = []
    for asked, answer, before, first, contents in openings:
        common = without_open_tag(answer[: max(before, len(asked) - len(excess))], answer[:contents])
        begun.append((answer[len(common) : first], answer[len(common) : contents]))
    other = begun[0][0]
    for text, _ in begun:
        other = common_start(other, text)
    for _, text in begun:
        other = without_open_tag(other, text)
    return ChatTemplate(template.tokenizer, with_other_end(template.source, excess, other))


def closing_markers(template: ChatTemplate, known_markers: Sequence[str]) -> tuple[str, ...]:
    """The end markers of all kinds of answers that a template can print."""
    found = []
    for kind in ("text", "call"):
        for form, changed in forms_for(template, answered(kind)):
            finder = LayoutFinder(
                template,
                changed,
                form,
                known_markers=known_markers,
                opening=opening_of(template, form),
                repeated=repeated_header(template, known_markers),
            )
            try:
                (layout,) = finder.whole_or_each()
            except (Unproven, TemplateRefusal):
                continue
            found += [turn.end for turn in layout.turns if turn.end is not None]
            break
    return tuple(dict.fromkeys(found))


def repeated_header(template: ChatTemplate, known_markers: Sequence[str]) -> str:
    """The header of the next answer, if a template writes it after every answer and has no other prompt.

    The first marker after a prompt ends the prompt; the text after it is the repeated header.
    """
    if template.repeated_header is None:
        template.repeated_header = _repeated_header(template, known_markers)
    return template.repeated_header


def _repeated_header(template: ChatTemplate, known_markers: Sequence[str]) -> str:
    finder = next(_readable(template, answered("text")), None)
    if finder is None or finder.outline(1, ask=True).text != finder.outline(1).text:
        return ""
    question, answer = finder.outline(1), finder.outline(2)
    closings = [o.text[max(s.stop for s in o.segments if s.slot is not None) :] for o in (question, answer)]
    ends = [closings[0].find(marker) + len(marker) for marker in known_markers if marker in closings[0]]
    header = closings[0][min(ends, default=len(closings[0])) :]
    return header if header.strip() and closings[1].endswith(header) else ""


def opening_of(template: ChatTemplate, form: Form) -> str:
    """The template's text before an answer at the start of a conversation; "" if it cannot be found."""
    plain = Form(parts=form.parts)
    if plain not in template.openings:
        finder = LayoutFinder(template, answered("text"), plain)
        try:
            asked, bare = finder.outline(1, ask=True), finder.outline(1).text
        except TemplateRefusal:
            template.openings[plain] = ""
        else:
            before = max((s.stop for s in asked.segments if s.slot is not None), default=0)
            common = len(common_start(bare, asked.text))  # without the end of the conversation
            template.openings[plain] = asked.text[common:] if common >= before else ""
    return template.openings[plain]


def reads_think_tags(template: ChatTemplate) -> bool:
    """Whether a template treats <think>…</think> in a content differently from other text."""
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
    """Layout finders for the forms in which a template prints every value."""
    for form, changed in forms_for(template, conversation):
        finder = LayoutFinder(template, changed, form)
        try:
            outline = finder.outline(len(changed.messages))
            finder.outline(1, ask=True)
        except TemplateRefusal:
            continue
        wanted = {slot for used in finder.sketch.uses for slot in used}
        if wanted <= {segment.slot for segment in outline.segments} and not outline.altered:
            yield finder
