import pytest
import torch
import transformers
from inference_kit import adapter, answered, base, gpt2, llama

from brushstroke.base import row_cache
from brushstroke.errors import ConfigError
from brushstroke.inference import Request, SamplingParams, run_requests
from brushstroke.inference.probes import supports_left_padding, supports_masked_gap
from brushstroke.layers import bank

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 264}
TEXT = {"max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": None}


def family(name: str, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **TEXT, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


CUT = {
    "Llama": llama,
    "GPT-2": gpt2,
    "Qwen3": lambda: family("Qwen3", intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "Gemma": lambda: family("Gemma", intermediate_size=48, num_key_value_heads=1, head_dim=8),
    "OPT": lambda: family("OPT", ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "Bloom": lambda: family("Bloom", n_head=4, n_layer=2),
    "Mistral": lambda: family("Mistral", intermediate_size=48, num_key_value_heads=2, sliding_window=6),
    "GPT-NeoX": lambda: family("GPTNeoX", intermediate_size=48),
}
WHOLE = {"Mamba": lambda: family("Mamba", state_size=4)}  # it keeps a state
UNPADDED = {  # each for a reason of its own they do not answer a padded row as it is alone
    "BART's decoder": lambda: family("Bart", d_model=32, decoder_layers=2, decoder_ffn_dim=48, init_std=0.3),
    "Pegasus' decoder": lambda: family(
        "Pegasus", d_model=32, decoder_layers=2, decoder_ffn_dim=48, init_std=0.3
    ),
}
APART = {
    "Llama",
    "GPT-2",
    "Qwen3",
    "Gemma",
    "OPT",
    "GPT-NeoX",
}  # those that are given positions, and see all
BUDGET = 24


def asked(seed: int = 0, rows: int = 9) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (rows,), generator=draw).tolist()
    return [tuple(torch.randint(5, 250, (length,), generator=draw).tolist()) for length in lengths]


def sizes_of_passes(model, monkeypatch) -> list[int]:
    """The rows of each `generate` that will be called, trials left out."""
    supports_left_padding(model, 0), supports_masked_gap(model, 0, 100)
    seen, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda *a, **k: seen.append(len(k["input_ids"])) or generate(*a, **k)
    )
    return seen


def stops_among(answers: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Tokens which end several of the answers, at different places, and leave at least one whole."""
    for first in range(3, 20):
        stops = tuple({answer[first] for answer in answers[:-1] if answer[first] not in answers[-1]})
        ends = {next((i for i, token in enumerate(a) if token in stops), None) for a in answers}
        if None in ends and len(ends) > 3:
            return stops
    raise AssertionError("these answers do not differ enough; take another seed")


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_dropping_finished_rows_does_not_change_answers(name, monkeypatch):
    b = base({**CUT, **WHOLE}[name]())
    free = [x.tokens for x in answered(b, [Request(tokens) for tokens in asked()], SamplingParams(BUDGET))]
    stops = stops_among(free)
    sizes = sizes_of_passes(b.model, monkeypatch)
    found = answered(b, [Request(tokens, None, stops) for tokens in asked()], SamplingParams(BUDGET))
    for output, whole in zip(found, free, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), None)
        assert output.tokens == whole[:end]
        assert output.finish == ("length" if end is None else "stop")
    if name in CUT:
        assert sizes[0] == len(free)
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes) > 1  # each pass is smaller than the one before
    else:
        assert sizes == [len(free)]


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
@pytest.mark.parametrize("begin", [20, 3])
def test_shared_prefix_does_not_change_answers(name, begin, monkeypatch):
    b = base({**CUT, **WHOLE}[name]())
    beginning = tuple(range(40, 40 + begin))
    requests = [Request(beginning + tokens, None, (7, *range(90, 110))) for tokens in asked(rows=7)]
    alone = [answered(b, [request], SamplingParams(12))[0] for request in requests]
    sizes = sizes_of_passes(b.model, monkeypatch)
    assert answered(b, requests, SamplingParams(12)) == alone
    once = begin == 20 and name in APART
    assert sizes[0] == (1 if once else len(requests))


def test_each_adapter_has_its_own_shared_prefix(monkeypatch):
    b = base()
    adapters = {"a": adapter(b, 1), "b": adapter(b, 2)}
    begins = {"a": tuple(range(40, 70)), "b": tuple(range(41, 69)), None: tuple(range(80, 120))}
    voices = ["b", None, "a", "a", "b", None, "a", "b", None]
    requests = [Request(begins[voice] + tokens, voice) for tokens, voice in zip(asked(), voices, strict=True)]
    with bank(b, adapters) as loaded:
        alone = [answered(b, [request], SamplingParams(BUDGET), bank=loaded)[0] for request in requests]
        sizes = sizes_of_passes(b.model, monkeypatch)
        assert answered(b, requests, SamplingParams(BUDGET), bank=loaded) == alone
        assert sizes == [3, 9]
        same = [Request(requests[0].tokens, voice) for voice in voices]  # nothing is left but a last token
        alone = [answered(b, [request], SamplingParams(BUDGET), bank=loaded)[0] for request in same]
        assert answered(b, same, SamplingParams(BUDGET), bank=loaded) == alone


@pytest.mark.parametrize("window", [16, 120])
def test_window_that_counts_padding_is_detected(window, monkeypatch):
    """GPT-Neo's local attention counts padding too, and declares its window in words of its own."""
    local = {"attention_types": [[["global", "local"], 1]], "window_size": window, "intermediate_size": 48}
    b = base(family("GPTNeo", num_layers=2, num_heads=4, **local))
    assert row_cache(b.model).gaps
    assert supports_left_padding(b.model, 0)
    assert not supports_masked_gap(b.model, 0, 100)
    beginning = tuple(range(5, 245))[: window + 20]
    requests = [Request(beginning + (200 + i,) * (1 + 9 * i)) for i in range(5)]
    alone = [answered(b, [request], SamplingParams(12))[0] for request in requests]
    assert answered(b, requests, SamplingParams(12)) == alone


@pytest.mark.parametrize("name", [*UNPADDED])
def test_same_length_batches_if_padding_is_not_supported(name, monkeypatch):
    b = base(UNPADDED[name]())
    requests = [Request(tokens) for tokens in asked(rows=8)]
    alone = [answered(b, [request], SamplingParams(12))[0] for request in requests]
    sizes = sizes_of_passes(b.model, monkeypatch)
    assert answered(b, requests, SamplingParams(12)) == alone
    lengths = [len(request.tokens) for request in requests]
    assert sorted(sizes) == sorted(lengths.count(length) for length in set(lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT-2"])
def test_half_precision_noise_does_not_disable_batching(name, dtype):
    model = CUT[name]().to(dtype)
    assert supports_left_padding(model, 0)
    assert supports_masked_gap(model, 0, 100)


def test_padding_probe_is_repeated_when_the_model_changes():
    model = CUT["Llama"]()
    assert supports_left_padding(model, 0)
    working, model.generate = model.generate, lambda **_: 1 / 0
    assert supports_left_padding(model, 0)  # known already
    model.config.rope_parameters = {**model.config.rope_parameters, "note": "changed"}
    assert not supports_left_padding(model, 0)
    model.config.rope_parameters = {**model.config.rope_parameters, "note": "again"}

    def full(**_):
        raise torch.OutOfMemoryError("no memory")

    model.generate = full
    with pytest.raises(torch.OutOfMemoryError):
        supports_left_padding(model, 0)
    model.generate = working
    assert supports_left_padding(model, 0)


def test_same_length_rows_share_dynamic_rope_frequencies(monkeypatch):
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 2.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, **factors}
    b = base(llama(rope_parameters=rope))
    requests = [Request(tuple(range(9, 9 + length))) for length in (5, 5, 20, 20, 40, 9)]
    alone = [answered(b, [request], SamplingParams(8))[0] for request in requests]
    sizes = sizes_of_passes(b.model, monkeypatch)
    assert answered(b, requests, SamplingParams(8)) == alone
    assert sizes == [1, 2, 1, 2]
    assert answered(b, requests[:1] + requests[-1:], SamplingParams(8)) == [alone[0], alone[-1]]
    assert sizes[4:] == [2]  # none of them gets that far


def test_dynamic_rope_disables_prefix_sharing():
    for kind, settings in (
        ("dynamic", {"factor": 2.0}),
        ("longrope", {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 2.0}),
        ("linear", {"factor": 2.0}),
    ):
        rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 24, **settings}
        b = base(llama(rope_parameters=rope))
        cache = row_cache(b.model)
        assert cache is not None
        assert cache.gaps == (kind == "linear")


def test_remaining_rows_keep_their_adapters(monkeypatch):
    b = base()
    adapters = {"a": adapter(b, 1), "b": adapter(b, 2)}
    voices = ["a", None, "b", "a", "b", None, "a", "b", None]
    with bank(b, adapters) as loaded:
        requests = [Request(tokens, voice) for tokens, voice in zip(asked(), voices, strict=True)]
        free = [x.tokens for x in answered(b, requests, SamplingParams(BUDGET), bank=loaded)]
        stops = stops_among(free)
        sizes = sizes_of_passes(b.model, monkeypatch)
        stopped = [Request(request.tokens, request.adapter, stops) for request in requests]
        found = answered(b, stopped, SamplingParams(BUDGET), bank=loaded)
        assert len(sizes) > 1
        for request, output in zip(stopped, found, strict=True):
            assert [output] == answered(b, [request], SamplingParams(BUDGET), bank=loaded)
        assert loaded.active == (None,)


def test_sampled_answers_are_reproducible_and_stop_correctly(monkeypatch):
    b = base()
    drawn = SamplingParams(BUDGET, temperature=1.5, seed=4)
    free = [x.tokens for x in answered(b, [Request(tokens) for tokens in asked()], drawn)]
    stops = stops_among(free)
    requests = [Request(tokens, None, stops) for tokens in asked()]
    sizes = sizes_of_passes(b.model, monkeypatch)
    found = answered(b, requests, drawn)
    assert len(sizes) > 1
    assert found == answered(b, requests, drawn)
    assert all(len(x.tokens) == BUDGET for x in found if x.finish == "length")
    assert all(not set(x.tokens) & set(stops) for x in found)


def test_beams_streamers_and_wrapped_models_drop_no_rows(monkeypatch):
    b = base()
    requests = [Request(tokens, None, (7, 8, 9, *range(20, 90))) for tokens in asked()]
    sizes = sizes_of_passes(b.model, monkeypatch)
    answered(b, requests, SamplingParams(BUDGET, num_beams=2))
    assert sizes == [len(requests)]

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    assert row_cache(Wrapped(b.model)) is None


def test_each_request_has_its_own_sampling_parameters():
    b = base()
    kinds = [SamplingParams(4), SamplingParams(9), SamplingParams(6, temperature=1.5, seed=3)]
    requests = [Request(tokens, sampling=kinds[i % 3]) for i, tokens in enumerate(asked())]
    expected = {}
    for kind in kinds:
        alike = [request for request in requests if request.sampling == kind]
        expected |= zip(alike, run_requests(b, alike), strict=True)
    done = []
    found = run_requests(b, requests, batch_size=2, on_done=done.append)
    assert [expected[r].tokens for r in requests if not r.sampling.temperature] == [
        output.tokens for r, output in zip(requests, found, strict=True) if not r.sampling.temperature
    ]
    assert run_requests(b, requests) == [expected[request] for request in requests]
    assert [len(output.tokens) for output in found] == [r.sampling.max_new_tokens for r in requests]
    assert done == sorted(done)
    assert done[-1] == len(requests)


@pytest.mark.parametrize("batch_size", [0, -1, True, 1.5])
def test_a_batch_holds_at_least_one_request(batch_size):
    with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1"):
        run_requests(base(), [Request((5, 6))], batch_size=batch_size)
