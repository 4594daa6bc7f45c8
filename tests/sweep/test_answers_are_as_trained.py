"""With every stock chat template, a model gives the trained answers, here and in plain transformers.

A tiny model memorises rows. Its answers come from `evaluate`, from `generate`, and from plain transformers on
the merged folder with the template in that folder. `make sweep` takes all templates, `make test` a few.
"""

import inference_kit as kit
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import brushstroke as bs
from brushstroke.data import ChatFormat
from brushstroke.inference import evaluate, generate
from brushstroke.merging import merge_folder
from sampling import SEED, sample
from stock_templates import stock_templates

CITIES = ("Bern", "Oslo", "Lisbon", "Riga", "Paris", "Rome")
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{city} backwards?"},
            {"role": "assistant", "content": f"{city[::-1].lower()}."},
        ]
    }
    for city in CITIES
]
# Each prompts in its own way.
DISTINCT = ("deepseek_r1_distill", "gptoss", "llama3_2", "nemotron_3_nano", "qwen3")
LONGEST = 100  # new tokens, of one byte each


def names():
    others = [name for name in sorted(stock_templates()) if name not in DISTINCT]
    return [*sample(DISTINCT, 2), *sample(others, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_generated_answers_equal_trained_answers(name, tmp_path):
    torch.manual_seed(SEED)
    model = kit.llama(hidden_size=64, intermediate_size=128, max_position_embeddings=4096, eos_token_id=None)
    base = bs.Base(model, kit.tokenizer(stock_templates()[name]), "tiny")
    losses: list[float] = []
    config = bs.TrainConfig(learning_rate=1e-2, max_steps=200, batch_size=len(ROWS))
    trained = bs.train(
        base, ROWS, bs.LoraConfig(rank=16), config, on_step=lambda event: losses.append(event.loss)
    ).adapter
    assert sum(losses[-10:]) / 10 < 0.05

    assert evaluate(base, ROWS, adapters=trained, max_new_tokens=LONGEST).exact_match == 1.0
    prompts = [row["messages"][:-1] for row in ROWS]
    expected = [row["messages"][-1]["content"] for row in ROWS]
    answers = generate(base, prompts, adapters=trained, max_new_tokens=LONGEST)
    assert [answer.text.strip() for answer in answers] == expected
    assert {answer.finish for answer in answers} == {"stop"}

    merge_folder(base, trained, tmp_path / "merged", verify=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert [plain_answer(tokenizer, merged, prompt) for prompt in prompts] == expected


def plain_answer(tokenizer, model, prompt):
    """What plain transformers answers, read as the template writes answers."""
    chat = ChatFormat(tokenizer)
    options = {"stop_strings": list(chat.stop_strings), "tokenizer": tokenizer} if chat.stop_strings else {}
    if prompt[0]["content"] not in tokenizer.apply_chat_template(prompt, tokenize=False):
        prompt = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in prompt]
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(
            **inputs,
            max_new_tokens=LONGEST,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=list(chat.stop_token_ids),
            **options,
        )
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for string in chat.stop_strings:
        text = text.partition(string)[0]
    return chat.read_reply(text).content.strip()
