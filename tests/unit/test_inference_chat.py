import pytest
from inference_kit import adapter, base

from brushstroke.errors import DataError, RouteError
from brushstroke.inference import ChatSession, SamplingParams, generate
from brushstroke.layers import bank

SHORT = SamplingParams(max_new_tokens=6)


def test_a_session_remembers_its_turns():
    b = base()
    with ChatSession(b, sampling=SHORT, system="be brief") as chat:
        first = chat.say("hi")
        second = chat.say("and?")
        messages = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "and?"},
        ]
        assert chat.messages == (*messages, {"role": "assistant", "content": second})
        assert second == generate(b, [messages], max_new_tokens=6)[0].text
        chat.reset()
        assert chat.messages == tuple(messages[:1])
        assert chat.say("hi") == first


def test_switching_keeps_turns_and_closing_restores_the_base():
    b = base()
    adapters = {"a": adapter(b, 1), "b": adapter(b, 2)}
    expected = {
        name: generate(b, "hi", adapters=adapters, rows=[name], max_new_tokens=6)[0].text
        for name in ("a", "b", None)
    }
    with ChatSession(b, adapters, sampling=SHORT) as chat:
        assert chat.names == ("a", "b")
        assert chat.adapter is None
        for name in ("a", "b", None):
            chat.use(name)
            assert chat.say("hi") == expected[name]
            chat.reset()
        with pytest.raises(RouteError, match="no adapter 'c'"):
            chat.use("c")
        assert chat.adapter is None
    assert not any("bank" in name for name, _ in b.model.named_buffers())


def test_single_adapter_is_selected_first_and_given_bank_stays():
    b = base()
    a = adapter(b)
    with ChatSession(b, a, sampling=SHORT) as chat:
        assert chat.adapter == "adapter"
    with bank(b, {"mine": a}) as loaded:
        with ChatSession(b, loaded, sampling=SHORT) as chat:
            assert chat.adapter == "mine"
            said = chat.say("hi")
        assert loaded.names == ("mine",)
    assert said == generate(b, "hi", adapters=a, max_new_tokens=6)[0].text
    with ChatSession(b, sampling=SHORT) as chat, pytest.raises(RouteError, match="none were given"):
        chat.use("a")


@pytest.mark.parametrize("num_beams", [1, 2])
def test_streamed_pieces_make_up_the_answer(num_beams):
    b = base()
    pieces: list[str] = []
    with ChatSession(b, sampling=SamplingParams(max_new_tokens=20, num_beams=num_beams)) as chat:
        answer = chat.say("hi", pieces.append)
    assert "".join(pieces) == answer
    assert (len(pieces) > 1) == (num_beams == 1)


def test_failed_turn_is_not_stored():
    with ChatSession(base(), sampling=SHORT) as chat:
        with pytest.raises(DataError, match=r"the conversation has \d+ tokens"):
            chat.say("y" * 300)
        with pytest.raises(DataError, match="the message is empty"):
            chat.say("")

        def interrupt(piece: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            chat.say("hi", interrupt)
        assert chat.messages == ()


def test_without_a_template_the_conversation_is_one_text():
    b = base(template=None)
    with ChatSession(b, sampling=SHORT) as chat:
        first = chat.say("ab")
        assert chat.say("cd") == generate(b, f"ab{first}cd", max_new_tokens=6)[0].text
