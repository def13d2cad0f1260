""" engine.py: the cache against no cache, the sampling against Hugging Face's processors and against arithmetic. """
import copy
import itertools
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

import engine
from engine import STATIC, CompiledStep, Sampling, generate, prepare, stream
from model import GPT, GPTConfig, KVCache


@pytest.fixture
def model():
    """ a small model whose next token depends on the text; block_size 16, vocabulary 50

    In float64, because it is chaotic: float32's rounding, which depends on the batch, would grow to another token.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)).eval().double()
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.mul_(12)
    return model


def prompt(length, seed=0):
    return torch.randint(50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- the cache

@pytest.mark.parametrize('chunks', [[16], [1] * 16, [5, 1, 9, 1], [1, 15], [15, 1]])
@pytest.mark.parametrize('rows', [1, 3])
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(model, chunks, rows):
    x = torch.tensor([prompt(16, row) for row in range(rows)])
    expected, cache, parts, at = model(x, x)[0], KVCache(model.config, rows, 16, dtype=torch.float64), [], 0
    for T in chunks:
        parts.append(model(x[:, at:at + T], x[:, at:at + T], cache=cache)[0])
        at += T
    assert cache.length == 16 and (torch.cat(parts, dim=1) - expected).abs().max() < 1e-9


@pytest.mark.parametrize('chunks', [[9], [1] * 9, [4, 1, 3, 1]])
@torch.no_grad()
def test_padded_rows_are_as_if_alone(model, chunks):
    """ lengths 9, 4 and 1 in one batch; what stands in the padding does not matter """
    lengths, cache = (9, 4, 1), KVCache(model.config, 3, 16, dtype=torch.float64, padding=torch.tensor([0, 5, 8]))
    rows = [prompt(length, length) for length in lengths]
    for junk in (0, 7):
        cache.length, at = 0, 0
        x = torch.tensor([[junk] * (9 - len(row)) + row for row in rows])
        for T in chunks:
            logits, at = model(x[:, at:at + T], cache=cache)[0], at + T
        for row, got in zip(rows, logits, strict=True):
            expected = model(torch.tensor([row]))[0][0]
            assert (got - expected).abs().max() < 1e-9


@torch.no_grad()
def test_log_likelihood_is_the_same_by_any_way(model):
    """ of a text: in one forward, token by token, in uneven chunks """
    x, y = torch.tensor([prompt(16)]), torch.tensor([prompt(17)[1:]])
    expected = model(x, y)[1].item()
    for chunks in ([1] * 16, [3, 8, 1, 4]):
        cache, total, at = KVCache(model.config, 1, 16, dtype=torch.float64), 0.0, 0
        for T in chunks:
            total += model(x[:, at:at + T], y[:, at:at + T], cache=cache)[1].item() * T
            at += T
        assert total / 16 == pytest.approx(expected, abs=1e-9)


def test_a_full_cache_says_so(model):
    cache = KVCache(model.config, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match='5 tokens do not fit block_size=4'):
        model(torch.tensor([prompt(5)]), cache=cache)
    with pytest.raises(ValueError, match='17 tokens do not fit block_size=16'):
        model(torch.tensor([prompt(17)]), cache=KVCache(model.config, 1, 99, dtype=torch.float64))


# ---- texts

def uncached(model, row, count, sampling, seed, window):
    """ the tokens after row, by a whole forward each over window(the ids so far) """
    generator, ids = torch.Generator().manual_seed(seed), list(row)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([window(ids)]))[0][:, -1]
        ids.append(sampling.draw(sampling.scores(logits), [generator]).item())
    return ids[len(row):]


@pytest.mark.parametrize('sampling', [Sampling(temperature=0), Sampling(temperature=0.7, top_k=20)])
def test_exact_context_is_nanogpts_sliding_crop(model, sampling):
    """ token for token, well past block_size, rows of different lengths and one longer than block_size in one batch """
    rows = [prompt(5), prompt(1, 1), prompt(20, 2)]
    texts = generate(model, rows, 40, sampling, seeds=[7, 8, 9], exact_context=True)
    for row, seed, text in zip(rows, (7, 8, 9), texts, strict=True):
        assert text == uncached(model, row, 40, sampling, seed, lambda ids: ids[-16:])
    assert len(set(texts[0])) > 5


@pytest.mark.parametrize('block_size', [16, 15, 3, 2, 1])
@pytest.mark.parametrize('length', [1, 5, 15, 16, 20])
def test_a_full_cache_goes_on_with_the_most_recent_half(model, length, block_size):
    """ between half of block_size and all of it are seen; the window begins anew whenever it is full """
    model.crop_block_size(block_size)
    begins = [max(0, length - block_size)]

    def window(ids):
        if len(ids) - begins[-1] > block_size:
            begins.append(len(ids) - max(block_size // 2, 1))
        return ids[begins[-1]:]
    sampling = Sampling(temperature=0)
    expected = uncached(model, prompt(length), 40, sampling, 0, window)
    assert generate(model, [prompt(length)], 40, sampling)[0] == expected and len(begins) > 2


def test_full_windows_are_computed_anew_for_their_own_row_only(model, monkeypatch):
    """ 8 rows that fill up at different times: positions computed are those of each row alone """
    rows, computed, forward = [prompt(length, length) for length in range(5, 13)], [], GPT.forward
    monkeypatch.setattr(GPT, 'forward', lambda self, idx, *inputs, **options: (
        computed.append(idx.numel()), forward(self, idx, *inputs, **options))[1])
    alone = []
    for row in rows:
        alone += generate(model, [row], 60, Sampling(temperature=0))
    expected, computed[:] = sum(computed), []
    assert generate(model, rows, 60, Sampling(temperature=0)) == alone
    assert sum(computed) == expected + sum(12 - length for length in range(5, 13))   # and the padding of the prompts


@pytest.mark.parametrize('exact_context', [False, True])
def test_a_seed_gives_its_text_in_any_batch(model, exact_context):
    """ past block_size too, where rows of different lengths have different windows """
    rows, sampling = [prompt(14), prompt(3, 1), prompt(18, 2)], Sampling(top_k=30)
    alone = [generate(model, [row], 40, sampling, seeds=[seed], exact_context=exact_context)[0]
             for row in rows for seed in (1, 2)]
    together = generate(model, rows, 40, sampling, num_samples=2, seeds=[1, 2] * 3, exact_context=exact_context)
    assert together == alone and len({tuple(text) for text in alone}) == 6


@pytest.mark.parametrize('most_rows', [1, 2, 3, 4, 5, None])
def test_rows_end_by_themselves_in_batches_of_any_size(model, most_rows):
    """ each token is streamed once, a row's last one is marked, and the end of a row does not disturb the others """
    prompts, options = [prompt(3), prompt(14, 1)], dict(num_samples=2, seeds=[1, 2, 3, 4])
    free = generate(model, prompts, 30, Sampling(), **options)
    stop, seen = free[0][4], []
    for row, token, last in stream(model, prompts, 30, Sampling(), is_over=lambda ids: ids[-1] == stop,
                                   most_rows=most_rows, **options):
        assert not any(row == ended and over for ended, _, over in seen)
        seen.append((row, token, last))
    for row, whole in enumerate(free):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert [token for at, token, _ in seen if at == row] == whole[:end]
    assert sum(last for _, _, last in seen) == 4 and len({len(whole) for whole in free}) == 1


def test_the_cache_has_the_type_of_the_products(model):
    with torch.autocast('cpu', torch.bfloat16):
        assert len(generate(model.float(), [prompt(3)], 20, Sampling())[0]) == 20
    assert len(generate(model.bfloat16(), [prompt(3)], 20, Sampling())[0]) == 20


# ---- sampling

def reference(logits, ids, sampling):
    """ Hugging Face's processors in the order of its generate """
    processors = [hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
                  hf.TemperatureLogitsWarper(sampling.temperature)]
    processors += [hf.TopKLogitsWarper(min(sampling.top_k, logits.shape[1]))] if sampling.top_k else []
    processors += [hf.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    processors += [hf.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for processor in processors:
        logits = processor(ids, logits)
    return logits


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 3), st.integers(0, 60), st.floats(0.05, 1), st.floats(0, 1),
       st.floats(0.5, 2), st.floats(0.1, 10))
def test_scores_are_hugging_faces(seed, temperature, top_k, top_p, min_p, penalty, spread):
    torch.manual_seed(seed)
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    logits, ids = torch.randn(3, 50) * spread, torch.randint(50, (3, 9))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(sampling.scores(logits, seen), reference(logits, ids, sampling))


def test_draws_follow_the_probabilities():
    """ 4000 generators against the softmax, 5 standard errors; an id that cannot be drawn never is """
    scores = torch.tensor([[0.0, -math.inf, 1.0, 2.0, -math.inf, -1.0, -math.inf]])
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    counts = torch.bincount(Sampling().draw(scores.expand(4000, 7), generators)[:, 0], minlength=7)
    for count, p in zip(counts.tolist(), scores.softmax(-1)[0].tolist(), strict=True):
        assert abs(count - 4000 * p) <= 5 * math.sqrt(4000 * p * (1 - p))


@pytest.mark.parametrize('dice', [0.0, 1 - 2**-53])
def test_the_ends_of_the_dice(monkeypatch, dice):
    """ 0 takes the first id that can be drawn, and what is next to 1 the last one, where the sum is not quite 1 too """
    monkeypatch.setattr(torch, 'rand', lambda *shape, **options: torch.full(shape, dice, dtype=torch.float64))
    scores = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    scores[:, [0, -1]] = -math.inf
    assert Sampling().draw(scores, [None] * 50).tolist() == [[1 if dice == 0 else 998]] * 50


def test_borders_of_top_p():
    assert Sampling(top_p=1e-9).scores(torch.tensor([[0.0, 1.0, 0.5]])).tolist() == [[-math.inf, 1.0, -math.inf]]
    assert Sampling(top_p=0.5).scores(torch.zeros(1, 4)).isfinite().sum() == 2
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampling = Sampling(0.7, 20, 0.9, 0.01)
    assert sampling.scores(logits).dtype == torch.float32
    assert torch.equal(sampling.scores(logits), sampling.scores(logits.float()))


def test_seeds(model):
    """ as large as one likes; without any, torch's own generator decides """
    assert generate(model, [[1]], 9, seeds=[2**64 + 5]) == generate(model, [[1]], 9, seeds=[5])
    torch.manual_seed(0)
    first = generate(model, [[1]], 9)
    assert generate(model, [[1]], 9) != first
    torch.manual_seed(0)
    assert generate(model, [[1]], 9) == first


def test_the_penalty_follows_its_row(model):
    """ with prompts of several lengths, samples of each, ids that are not for drawing, and rows that end early """
    options = dict(num_ids=40, is_over=lambda ids: ids[-1] % 7 == 0)
    rows, sampling = [prompt(9), prompt(3, 1)], Sampling(repetition_penalty=3.0)
    alone = [generate(model, [row], 30, sampling, seeds=[seed], **options)[0] for row in rows for seed in (1, 2, 3)]
    assert generate(model, rows, 30, sampling, num_samples=3, seeds=[1, 2, 3] * 2, **options) == alone
    assert len({len(text) for text in alone}) > 1 and max(map(max, alone)) < 40


def test_the_penalty_knows_the_text_and_not_the_padding(model):
    """ a penalty so large that a greedy text has no token twice; id 0 fills up the padding and stays free """
    texts = generate(model, [[3] * 6, [5]], 20, Sampling(temperature=0, repetition_penalty=1e6))
    assert len(set(texts[0]) | {3}) == len(set(texts[1]) | {5}) == 21
    strong = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        strong.lm_head.weight.zero_()
        strong.transformer.ln_f.bias.fill_(1.0)
        strong.lm_head.weight[0], strong.lm_head.weight[1] = 1.0, 0.9   # id 0 is ahead, but not by 1.5 times
    assert generate(strong, [[3] * 6, [5]], 1, Sampling(temperature=0, repetition_penalty=1.5)) == [[0], [0]]


@pytest.mark.parametrize('options, words', [
    (dict(temperature=-1), 'temperature=-1'), (dict(top_k=-1), 'top_k=-1'), (dict(top_p=0), 'top_p=0'),
    (dict(top_p=1.5), 'top_p=1.5'), (dict(min_p=2), 'min_p=2'), (dict(repetition_penalty=0), 'repetition_penalty=0')])
def test_impossible_settings(options, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**options)


def test_temperatures_next_to_nothing_are_greedy(model):
    greedy = generate(model, [prompt(3)], 10, Sampling(temperature=0))
    assert generate(model, [prompt(3)], 10, Sampling(temperature=1e-45)) == greedy
    assert generate(model, [prompt(3)], 10, Sampling(temperature=1e-6)) == greedy


@pytest.mark.parametrize('temperature', [0, 1])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(model, temperature, value):
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = value
    with pytest.raises(ValueError, match='not finite'):
        generate(model, [prompt(3)], 10, Sampling(temperature))


def test_a_seed_for_each_row(model):
    for seeds in ([1], [1, 2, 3]):
        with pytest.raises(AssertionError, match='a seed for each row'):
            generate(model, [[1], [2]], 3, seeds=seeds)


def test_an_empty_prompt_is_refused(model):
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match='the prompt is empty'):
            generate(model, prompts, 1)


# ---- weights for speed

@pytest.fixture
def small():
    """ in float32, with biases that are not 0; vocabulary 96 """
    return with_biases(GPT(GPTConfig(block_size=64, vocab_size=96, n_layer=2, n_head=2, n_embd=64)).eval())


def with_biases(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def kinds(model):
    return {name: type(layer) for name, layer in model.named_modules() if 'c_' in name or name == 'lm_head'}


def choose(monkeypatch, name):
    """ let prepare find the other kind slower """
    times = itertools.cycle([2.0, 1.0] if name == '_packed' else [1.0, 2.0])
    monkeypatch.setattr('torch.utils.benchmark.Timer.timeit', lambda self, number: SimpleNamespace(mean=next(times)))


@pytest.mark.parametrize('kind', ['_packed', '_plain'])
@pytest.mark.parametrize('T', [1, 3, 40])
@torch.no_grad()
def test_weights_laid_out_for_speed_give_the_same_logits(small, monkeypatch, kind, T):
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    choose(monkeypatch, kind)
    ours, x = prepare(small), torch.randint(96, (2, T))
    assert (ours(x, x)[0] - small(x, x)[0]).abs().max() < 1e-5
    assert set(kinds(ours).values()) == {torch.nn.Linear if kind == '_plain' else engine._Product}
    assert set(kinds(small).values()) == {torch.nn.Linear}
    assert not prepare(small.train()).training and small.training
    small.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())
    assert ours.transformer.wte.weight is small.transformer.wte.weight


@pytest.mark.parametrize('kind', ['_packed', '_plain'])
@torch.no_grad()
def test_bfloat16_products_are_those_of_autocast(small, monkeypatch, kind):
    choose(monkeypatch, kind)
    x = torch.randint(96, (2, 9))
    with torch.autocast('cpu', torch.bfloat16):
        expected = small(x, x)[0]
    got = prepare(small, torch.bfloat16)(x, x)[0]
    assert got.dtype == torch.bfloat16 and (got.float() - expected.float()).abs().max() < 2e-2
    assert (got.float() - small(x, x)[0]).abs().max() > 1e-4


def test_generating_in_the_middle_of_training(model):
    """ activation checkpointing knows no cache """
    expected = generate(model, [prompt(3)], 10, Sampling(temperature=0))
    model.train().grad_checkpoint = True
    assert generate(model, [prompt(3)], 10, Sampling(temperature=0)) == expected


def test_without_onednn_weights_stay_as_they_are(small, monkeypatch):
    def missing(linear, dtype):
        raise RuntimeError("could not create a primitive")
    monkeypatch.setattr(engine, '_packed', missing)
    assert set(kinds(prepare(small)).values()) == {torch.nn.Linear}


@pytest.mark.parametrize('T', [1, 50])
@pytest.mark.parametrize('n_embd', [64, 40])   # 40 is no multiple of what the kernel reads at once
@torch.no_grad()
def test_int8_is_near(n_embd, T):
    """ against the logits of weights rounded by arithmetic: 127 steps to the largest weight of each output """
    small = with_biases(GPT(GPTConfig(block_size=64, vocab_size=96, n_layer=2, n_head=2, n_embd=n_embd)).eval())
    ours, x = prepare(small, quantize='int8'), torch.randint(96, (1, T))
    expected = small(x, x)[0]
    rounded = copy.deepcopy(small)
    for layer in rounded.modules():
        if isinstance(layer, torch.nn.Linear):
            step = layer.weight.abs().amax(dim=1, keepdim=True) / 127
            layer.weight = torch.nn.Parameter((layer.weight / step).round() * step)
    got = ours(x, x)[0].float()
    assert (got - rounded(x, x)[0]).abs().max() < 3e-2 and (got - expected).abs().max() < 5e-2
    assert generate(ours, [[1], [2, 3]], 30, Sampling(temperature=0))   # the cache is of the products' type


def test_quantize_says_what_is_missing(small, monkeypatch):
    with pytest.raises(ValueError, match='quantize=int4 is not int8'):
        prepare(small, quantize='int4')
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    with pytest.raises(ValueError, match='pip install torchao'):
        prepare(small, quantize='int8')


def test_batches_are_as_large_as_memory_allows(small, monkeypatch):
    monkeypatch.setattr(os, 'sysconf', lambda name: 2**12)   # 16 MB in all
    texts = small.texts_in_memory(64)
    cache = 2 * 2 * 64 * 64 * 4   # bytes: keys and values, layers, width, positions
    assert 2**24 / 4 / cache / 10 < texts < 2**24 / 4 / cache
    rows, forward = [], GPT.forward
    monkeypatch.setattr(GPT, 'forward', lambda self, idx, *inputs, **options: (
        rows.append(len(idx)), forward(self, idx, *inputs, **options))[1])
    generate(small, [[1]], 64, num_samples=2 * texts, is_over=lambda ids: len(ids) == 2)
    assert max(rows) == texts
    assert 1 <= texts == small.texts_in_memory(999) < small.texts_in_memory(9)
    large = GPT(GPTConfig(block_size=1024, vocab_size=96, n_layer=1, n_head=1, n_embd=2**12)).to('meta')
    large.config.n_layer = 10**6
    assert large.texts_in_memory(1024) == 1


# ---- one shape for every token

@pytest.mark.slow
def test_a_compiled_step_is_compiled_once_and_gives_the_same_texts(model):
    """ for prompts of several lengths, past block_size, in one call and the next, and where rows end early """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = CompiledStep(torch.compile(model, **STATIC))
    for graphs, prompts, options in (
            (1, [prompt(5), prompt(1, 1), prompt(20, 2)], dict(seeds=[7, 8, 9])), (2, [prompt(3)], dict(seeds=[7])),
            (2, [prompt(9, 3)], dict(num_samples=3, seeds=[7, 8, 9], is_over=lambda ids: ids[-1] % 5 == 0))):
        texts = generate(model, prompts, 40, Sampling(top_k=20), step=step, **options)
        assert texts == generate(model, prompts, 40, Sampling(top_k=20), **options)
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == graphs
    assert sorted(step.caches) == [1, 3] and len({len(text) for text in texts}) > 1
