"""Width, vocabulary and context are those of the language model, whatever a config looks like."""

import pytest
import torch
import transformers
from torch import nn

import kinds
import toys
from brushstroke.adapter import LoraConfig
from brushstroke.base import (
    Base,
    check_max_length,
    context_length,
    embedding_rows,
    hidden_size,
    model_dtype,
    text_config,
    vocabulary_size,
)
from brushstroke.data import Example
from brushstroke.errors import ConfigError
from brushstroke.formats import load
from brushstroke.merging import merge
from brushstroke.studies import make_material
from brushstroke.studies.arm_run import ArmRunner, Task
from brushstroke.studies.arms import Run, low_rank, rate_grid, whole
from brushstroke.training import TrainConfig, Training, plan
from brushstroke.training.config import default_learning_rate
from training_kit import padded_loss

MPT = {"vocab_size": 48, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 24}
ROWS = [{"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]} for _ in range(8)]


def mpt() -> nn.Module:
    return transformers.MptForCausalLM(transformers.MptConfig(**MPT))


@pytest.mark.parametrize(
    ("make", "width", "vocabulary", "context"),
    [
        (kinds.gemma3, 32, 120, 64),
        (kinds.llava, 32, 120, 64),
        (kinds.qwen2_vl, 32, 120, 64),
        (kinds.clip, 32, 120, 20),
        (kinds.t5, 32, 120, None),
        (kinds.whisper, 32, 120, 24),
        (toys.tiny_gpt2, 32, 64, 128),
        (toys.tiny_llama, 32, 64, 128),
        (mpt, 16, 48, 24),
    ],
)
def test_the_facts_of_every_shape_of_config(make, width, vocabulary, context) -> None:
    model = make()
    assert hidden_size(model) == width
    assert vocabulary_size(model) == vocabulary
    assert context_length(model) == context
    assert context_length(model.config) == context


def test_facts_come_from_embeddings_if_config_is_empty() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(40, 24)

        def get_input_embeddings(self) -> nn.Module:
            return self.words

    assert (hidden_size(Own()), vocabulary_size(Own()), context_length(Own())) == (24, 40, None)
    assert (hidden_size(nn.Linear(3, 3)), vocabulary_size(nn.Linear(3, 3))) == (None, None)
    clip = kinds.clip()  # it has two models that embed, and names neither
    assert (hidden_size(clip), embedding_rows(clip)) == (32, None)


def test_encoder_decoder_facts_come_from_the_decoder() -> None:
    music = transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(**kinds.SMALL_T5),
        audio_encoder=transformers.EncodecConfig(),
        decoder=transformers.MusicgenDecoderConfig(hidden_size=16, vocab_size=50),
    )
    with pytest.raises(ValueError, match="Multiple valid text configs"):
        music.get_text_config()
    assert text_config(music).hidden_size == 16


@pytest.mark.parametrize(
    ("make", "width"),
    [(lambda: kinds.gemma3(hidden_size=64), 64), (kinds.llava, 32), (kinds.qwen2_vl, 32), (mpt, 16)],
)
def test_learning_rate_rule_uses_the_language_models_width(make, width) -> None:
    """The whole config of Gemma 3 knows no width, and gave the rate of one of 2,000."""
    rule = default_learning_rate(width)
    assert rule != default_learning_rate(None)
    model = make().eval()
    targets = LoraConfig(rank=2, targets=[r".*layers\.\d\.self_attn\.q_proj" if width > 16 else "Wqkv"])
    with Training(model, targets) as run:
        assert run.learning_rate == rule
    study = make_material(Base(model), [{**row, "input_ids": [i, 4, 5, 6]} for i, row in enumerate(ROWS * 3)])
    assert study.grid.rates == rate_grid(rule)


def test_the_dtype_is_that_of_the_language_model() -> None:
    """Also where a tower before it has another one."""
    lora = LoraConfig(rank=2, targets=[r".*language_model.*q_proj"])
    heads = []
    for tower in (torch.float32, torch.float64):
        model = kinds.gemma3().eval()
        model.model.vision_tower.to(tower)
        assert next(model.parameters()).dtype == tower
        assert model_dtype(model) == Base(model).dtype == torch.float32
        with Training(model, lora, gradient_checkpointing=True) as run:
            heads.append((run.step.need.head, run.step.need.per_token, run.step.kernels))
    assert heads[0] == heads[1]


@pytest.mark.parametrize("make", [kinds.gemma3, kinds.llava, kinds.qwen2_vl])
def test_a_study_of_a_composite_model_has_the_losses_of_transformers(make, tmp_path) -> None:
    torch.manual_seed(0)
    rows = [Example((i, 4, 5, 6, 7 + i), (0.0, 0.0, 1.0, 1.0, 1.0)) for i in range(3, 12)]
    task = Task("text", tuple(rows[:4]), tuple(rows[4:6]), tuple(rows[6:]))
    runner = ArmRunner(
        Base(make().eval()), {"task": task}, tuple(rows[:2]), TrainConfig(max_steps=3), tmp_path
    )
    targets = (r".*language_model.*q_proj",)
    for arm in (low_rank("q", targets, 2), whole("q", targets, (1e-2,))):
        run = Run(arm, 1e-2, 0)
        outcome = runner.run(run)
        merged = merge(runner.base.model, load(tmp_path / run.key / "adapter"), allow_different_base=True)
        expected = padded_loss(merged, list(task.test)).item()
        assert outcome.test.loss == pytest.approx(expected, rel=1e-5)
        assert outcome.general.divergence > 0
        assert runner.untouched()["task"].loss != outcome.test.loss


def test_the_heads_memory_counts_the_vocabulary_of_the_text() -> None:
    lora = LoraConfig(rank=2, targets=[r".*language_model.*q_proj"])
    needs = []
    for words in (120, 4096):
        with Training(kinds.gemma3(vocab_size=words).eval(), lora) as run:
            needs.append(run.step.need.head)
    assert needs[1] >= 4096 * 4  # bytes of one position's logits at the least
    assert needs[1] > needs[0] > 0


@pytest.mark.parametrize("make", [kinds.llava, kinds.qwen2_vl, toys.tiny_llama, toys.tiny_gpt2, mpt])
def test_a_limit_beyond_the_context_is_refused_with_both_numbers(make) -> None:
    model = make()
    context = context_length(model)
    assert context is not None
    for known in (model, model.config):
        check_max_length(known, context)
        check_max_length(known, None)
        said = rf"\(--max-length\) is {context + 1}, .* context has {context} tokens; lower it to {context}"
        with pytest.raises(ConfigError, match=said):
            check_max_length(known, context + 1)


def test_plan_refuses_it_before_it_reads_the_data(tmp_path) -> None:
    with pytest.raises(ConfigError, match="129, and the model's context has 128 tokens"):
        plan(Base(toys.tiny_llama()), tmp_path / "no file", config=TrainConfig(max_length=129))


def test_dynamic_rope_has_no_maximum_length() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = transformers.LlamaConfig(**{**kinds.DECODER, "rope_parameters": rope})
    check_max_length(config, 1000)
    check_max_length(nn.Linear(2, 2), 1000)  # of which nothing is known
    config = transformers.LlamaConfig(**{**kinds.DECODER, "rope_parameters": {**rope, "rope_type": "linear"}})
    with pytest.raises(ConfigError, match="context has 64"):
        check_max_length(config, 1000)


def test_a_composite_model_trains_on_text_with_a_limit_of_its_texts_context() -> None:
    torch.manual_seed(0)
    lora = LoraConfig(rank=2, targets=[r".*language_model.*q_proj"])
    with pytest.raises(ConfigError, match="context has 64"):
        Training(kinds.llava().eval(), lora, max_length=65)
    with Training(kinds.llava().eval(), lora, max_length=64) as run:
        assert run.forward_backward(ROWS).loss > 0
        run.optim_step()
