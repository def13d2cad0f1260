""" The switches of GPTConfig, each against an oracle or what it is for, and each with everything else. """
import json
import math
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, equal
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import model as model_file
from checkpoint import build_model, load
from engine import STATIC, CompiledStep, Sampling, generate, prepare
from model import GPT, GPTConfig, KVCache, add_lora, alibi_slopes, merge_lora, turned

SWITCHES = [dict(pos='rope'), dict(pos='rope', rope_base=100.0), dict(pos='alibi'), dict(window=5), dict(n_kv_head=2),
            dict(qk_norm=True),
            dict(pos='rope', qk_norm=True, n_kv_head=1, window=6),
            dict(pos='alibi', window=7, n_kv_head=1, qk_norm=True)]
each_switch = pytest.mark.parametrize('switch', SWITCHES,
                                      ids=lambda switch: ' '.join(f'{key}={switch[key]}' for key in switch))
SIZES = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32)


def build(switch, **options):
    """ a small model whose next token depends on the text, in float64 """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **switch, **options}))
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.mul_(6)
    return model.eval().double()


def ids(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


# ---- each by itself

@pytest.mark.parametrize('base', [10000.0, 100.0])
def test_rope_products_depend_on_the_distance_only(base):
    """ of one query and one key, at any two positions; and position 0 changes nothing """
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=2, n_layer=1, n_head=2, n_embd=32, pos='rope', rope_base=base))
    cos, sin = gpt._rotation(torch.arange(64))                                      # (64, 1, 16)
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64).expand(1, 64, 1, 16) for _ in 'qk')
    q, k = (turned(each, cos.double(), sin.double())[0, :, 0] for each in (q, k))   # (64, 16)
    products = q @ k.T
    for distance in range(-63, 64):
        along = products.diagonal(distance)
        assert (along - along[0]).abs().max() < 1e-5
    assert products[0].std() > 0.1
    assert torch.equal(turned(q[:1, None], cos[0], sin[0])[0, 0], q[0])


def test_rope_turns_pair_i_by_position_times_base_to_minus_2i_over_hs():
    """ equations 14 and 15 of the paper, with complex numbers; the pairs are channels i and i + hs/2 """
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=2, n_layer=1, n_head=2, n_embd=32, pos='rope', rope_base=500.0))
    x = torch.randn(1, 64, 1, 16, dtype=torch.float64)
    angles = torch.arange(64)[:, None] * 500.0 ** (-2 * torch.arange(8, dtype=torch.float64) / 16)
    expected = torch.complex(x[0, :, 0, :8], x[0, :, 0, 8:]) * torch.polar(torch.ones_like(angles), angles)
    got = turned(x, *gpt._rotation(torch.arange(64)))[0, :, 0]
    assert (got - torch.cat((expected.real, expected.imag), dim=1)).abs().max() < 1e-5


def test_rope_is_computed_in_float32():
    """ in bfloat16, position 1000 would be rounded to the next multiple of 4 """
    gpt = GPT(GPTConfig(vocab_size=2, n_layer=1, n_head=1, n_embd=16, pos='rope'))
    with torch.autocast('cpu', torch.bfloat16):
        cos, sin = gpt._rotation(torch.tensor([1001]))
        assert cos.dtype == sin.dtype == turned(torch.ones(1, 1, 1, 16).bfloat16(), cos, sin).dtype == torch.float32
    assert cos[0, 0, 0].item() == pytest.approx(math.cos(1001), abs=1e-4)


def test_alibi_slopes_are_the_published_ones():
    """ 8 heads: 1/2, 1/4, ... 1/256; 12: those, and every second of 16 heads' (2^-0.5, 2^-1, ...) """
    assert alibi_slopes(8).tolist() == [2.0 ** -i for i in range(1, 9)]
    assert alibi_slopes(12).tolist() == pytest.approx([2.0 ** -i for i in range(1, 9)] + [
        2.0 ** -i for i in (0.5, 1.5, 2.5, 3.5)])
    assert alibi_slopes(1).tolist() == [2.0 ** -8] and alibi_slopes(3).tolist() == [2.0 ** -4, 2.0 ** -8, 2.0 ** -2]


def test_alibi_lowers_scores_in_proportion_to_the_distance():
    mask, is_causal = build(dict(pos='alibi'))._visible(None, torch.arange(16), 16)
    assert mask.shape == (4, 16, 16) and not is_causal
    for head, slope in enumerate(alibi_slopes(4)):
        for query in range(16):
            assert torch.equal(mask[head, query, :query + 1], -slope * torch.arange(query, -1, -1))
            assert (mask[head, query, query + 1:] == -math.inf).all()


@pytest.mark.parametrize('window', [1, 3, 15, 16, 99])
def test_a_window_is_the_masked_oracle(window, monkeypatch):
    """ attention with a mask made by hand, position by position """
    model, x = build(dict(window=window)), ids(2, 16)
    got = model(x, x)[0]
    mask = torch.tensor([[max(0, query - window + 1) <= key <= query for key in range(16)] for query in range(16)])
    monkeypatch.setattr(F, 'scaled_dot_product_attention',
                        lambda q, k, v, *_, **__: scaled_dot_product_attention(q, k, v, mask))
    assert (model(x, x)[0] - got).abs().max() < 1e-12


def test_a_window_forgets_what_no_layer_can_pass_on():
    """ two layers of window 5 reach 8 positions back """
    model, x = build(dict(window=5)), ids(1, 16)
    gradient = torch.autograd.functional.jacobian(
        lambda z: model.transformer.h[1](model.transformer.h[0](z, *model._visible(None, torch.arange(16), 16), None),
                                         *model._visible(None, torch.arange(16), 16), None)[0, -1].sum(),
        model.transformer.wte(x))
    assert (gradient[0].abs().amax(-1) > 0).tolist() == [False] * 7 + [True] * 9


@pytest.mark.parametrize('switch', [dict(pos='alibi'), dict(window=5), dict(pos='alibi', window=5, n_kv_head=2)])
def test_the_kernel_for_gpus_sees_the_same(switch, monkeypatch):
    """ FlexAttention with our window and slopes, uncompiled on the CPU, where it has no backward """
    model, x = build(switch).float(), ids(2, 16)
    alibi_heads = 4 if 'pos' in switch else 0
    real = torch.compile   # which the uncompiled one calls itself
    monkeypatch.setattr(torch, 'compile', lambda function, **how: real(function, **how) if how else function)
    monkeypatch.setattr(flex_attention, '_warn_once', lambda *args, **others: None)
    kernel = model_file.sparse_attention.__wrapped__(16, switch.get('window', 0), alibi_heads, x.device)
    with torch.no_grad():
        expected = model(x, x)[0]
        monkeypatch.setattr(GPT, '_visible', lambda *args: (kernel, False))
        assert (model(x, x)[0] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason="compiles for the CPU")
@pytest.mark.parametrize('switch', [dict(pos='alibi', window=40, n_kv_head=2), dict(pos='rope', window=40)])
@torch.no_grad()
def test_the_kernel_for_gpus_compiled(switch, monkeypatch):
    """ over several blocks, by itself and within a compiled model; it is built once """
    model, x, built = build(switch, block_size=256, n_embd=64).float(), ids(2, 256), []
    expected, real = model(x, x)[0], flex_attention.create_block_mask
    monkeypatch.setattr(flex_attention, 'create_block_mask', lambda *args: (built.append(1), real(*args))[1])
    alibi_heads = 4 if switch['pos'] == 'alibi' else 0
    monkeypatch.setattr(GPT, '_visible', lambda self, cache, places, S: (
        torch.compiler.disable(model_file.sparse_attention)(256, 40, alibi_heads, places.device), False))
    model_file.sparse_attention.cache_clear()
    for attempt in (model, *[torch.compile(model)] * 2):
        assert (attempt(x, x)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(built) == 1


@torch.no_grad()
def test_grouped_queries_are_all_heads_with_repeated_keys_and_values():
    grouped, full = build(dict(n_kv_head=2)), build({})
    assert grouped.transformer.h[0].attn.c_attn.weight.shape == (32 + 2 * 16, 32)
    weights = grouped.state_dict()
    for name, tensor in weights.items():
        if 'c_attn' in name:
            q, k, v = tensor.split((32, 16, 16))
            k, v = (each.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for each in (k, v))
            weights[name] = torch.cat((q, k, v))
    full.load_state_dict(weights)
    assert (grouped(ids(2, 16), ids(2, 16))[0] - full(ids(2, 16), ids(2, 16))[0]).abs().max() < 1e-12
    assert KVCache(grouped.config, 1, 16).layers[0][0].shape == (1, 2, 16, 8)


def test_normalized_queries_and_keys(monkeypatch):
    """ have a mean square of 1 whatever their weights are; the values stay """
    model, seen = build(dict(qk_norm=True, pos='rope')), []
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, *options, **others: (
        seen.append((q, k)), scaled_dot_product_attention(q, k, v, *options, **others))[1])
    model(ids(1, 16))
    for tensor in (tensor for pair in seen for tensor in pair):
        assert (tensor.square().mean(-1) - 1).abs().max() < 1e-5


# ---- each with everything

@each_switch
def test_the_default_model_is_another(switch):
    """ so the tests below test something """
    assert not torch.equal(build(switch)(ids(1, 16))[0], build({})(ids(1, 16))[0])


@each_switch
@pytest.mark.parametrize('chunks', [[16], [1] * 16, [5, 1, 9, 1]])
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(switch, chunks):
    model, x, parts, at = build(switch), ids(2, 16), [], 0
    cache = KVCache(model.config, 2, 16, dtype=torch.float64)
    for T in chunks:
        parts.append(model(x[:, at:at + T], x[:, at:at + T], cache=cache)[0])
        at += T
    assert (torch.cat(parts, dim=1) - model(x, x)[0]).abs().max() < 1e-4


@each_switch
def test_texts_past_block_size_are_those_without_a_cache(switch):
    """ rows of different lengths, one longer than block_size, in one batch: exact_context is a crop """
    model, rows = build(switch), [ids(n, seed=n).tolist() for n in (5, 1, 20)]
    texts = generate(model, rows, 30, Sampling(temperature=0), exact_context=True)
    for row, text in zip(rows, texts, strict=True):
        for _ in range(30):
            row.append(model(torch.tensor([row[-16:]]))[0][0, -1].argmax().item())
        assert text == row[-30:]
    assert len({token for text in texts for token in text}) > 4


@pytest.mark.slow
@each_switch
def test_compiled(switch):
    """ training's loss and gradients, and a step of generation of fixed shape """
    torch._dynamo.reset()
    model, x = build(switch).float(), ids(2, 16)
    compiled, found = torch.compile(model, fullgraph=True, backend='aot_eager'), []
    for each in (model, compiled):
        model.zero_grad()
        loss = each(x, x)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() <= 1e-4 * one.abs().max() + 1e-6
    model, prompts = model.double(), [ids(5).tolist(), ids(1).tolist()]
    step = CompiledStep(torch.compile(model, **{**STATIC, 'mode': None}, backend='aot_eager'))
    sampling = Sampling(temperature=0)
    assert generate(model, prompts, 20, sampling, step=step) == generate(model, prompts, 20, sampling)


@each_switch
def test_bfloat16(switch):
    """ autocast's loss near float32's, with and without a cache, and weights of the engine in that type """
    model, x = build(switch, n_layer=1).float(), ids(2, 16)
    expected = model(x, x)[1]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        cache = model.new_cache(torch.zeros(2, dtype=torch.int64), 16)
        assert cache.layers[0][0].dtype == torch.bfloat16
        cached, plain = model(x, x, cache=cache)[1], model(x, x)[1]
    assert abs(plain - expected) < 0.03 * expected and abs(cached - expected) < 0.03 * expected
    texts = generate(prepare(model, torch.bfloat16, rows=2), [[1, 2], [3]], 20, Sampling(temperature=0))
    assert all(len(text) == 20 for text in texts)


@each_switch
def test_a_mask_of_numbers_has_the_type_of_the_queries(switch, monkeypatch):
    """ which kernels on a GPU demand; in the engine's bfloat16 and in float64 """
    plain, seen = F.scaled_dot_product_attention, []

    def attention(q, k, v, mask=None, *others, **how):
        seen.append(mask is None or mask.dtype in (torch.bool, q.dtype))
        return plain(q, k, v, mask, *others, **how)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', attention)
    for dtype in (torch.float64, torch.bfloat16):
        model = prepare(build(switch), dtype, rows=2)
        model(ids(2, 16))
        generate(model, [[1, 2], [3]], 4, Sampling(temperature=0))
    assert len(seen) > 8 and all(seen)


@each_switch
def test_gradient_checkpointing(switch):
    model, x, found = build(switch).train(), ids(2, 16), []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model(x, x)[1].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all((one - two).abs().max() < 1e-12 for one, two in zip(*found, strict=True))


@each_switch
def test_lora(switch):
    """ folded in, it computes the same """
    model = build(switch)
    add_lora(model, 2, 8.0, 0.0, 'c_attn,c_proj,c_fc')
    for name, parameter in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter)
    model.double()
    before = model(ids(2, 16), ids(2, 16))[0]
    merge_lora(model)
    assert (model(ids(2, 16), ids(2, 16))[0] - before).abs().max() < 1e-9


# ---- in the scripts

def options(switch):
    return [*TINY, '--n_head=4', *(f'--{key}={value}' for key, value in {**switch, **(
        {'window': 3} if 'window' in switch else {})}.items())]


@each_switch
def test_training_resumes_and_samples(tiny, script, switch, capsys):
    """ to the bit; the checkpoint says what the model is; sample.py and a new run start from it """
    script('train.py', *options(switch), '--out_dir=straight')
    script('train.py', *options(switch), '--max_iters=3')
    script('train.py', *options({}), '--init_from=resume')   # the checkpoint's switches are what counts
    ours, theirs = load('out/ckpt.pt'), load('straight/ckpt.pt')
    assert equal(ours['model'], theirs['model']) and ours['model_args'] == theirs['model_args']
    said = capsys.readouterr().out
    for key, value in switch.items():
        assert ours['model_args'][key] == (3 if key == 'window' else value)
        assert f'checkpoint: {key} stays ' in said
    script('sample.py', '--out_dir=out', '--device=cpu', '--num_samples=2', '--max_new_tokens=20')


@pytest.mark.slow
@each_switch
def test_fsdp_is_one_process(tiny, script, processes, switch):
    script('train.py', *options(switch), '--out_dir=one')
    run = processes(2, 'train.py', *options(switch), '--parallel=fsdp', '--out_dir=two')
    assert run.wait() == [0, 0], run.text()
    one, two = load('one/ckpt.pt')['model'], load('two/ckpt.pt')['model']
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


@each_switch
def test_export_refuses_it_by_name(tiny, script, fails, switch):
    """ neither format has any of them """
    script('train.py', *options(switch), '--max_iters=1')
    script('train.py', *options(switch), '--init_from=ckpt:out', '--lora_rank=2', '--max_iters=1', '--out_dir=adapter')
    for to, out_dir in dict(nanogpt='out', huggingface='out', peft='adapter').items():
        line = fails('export.py', f'--out_dir={out_dir}', f'--path={to}', f'--to={to}')[1]
        assert all(f'{name}=' in line for name in switch) and not os.path.exists(to)


@pytest.mark.parametrize('pos', ['rope', 'alibi'])
def test_longer_contexts_than_in_training(tiny, script, fails, pos, capsys):
    """ to evaluate, to sample and to train on; a table cannot """
    script('train.py', *options(dict(pos=pos)))
    capsys.readouterr()
    longer = ['--block_size=32', '--eval_only=True', '--init_from=resume', '--eval_iters=0']
    state = script('train.py', *options(dict(pos=pos)), *longer)
    assert state['raw_model'].config.block_size == 32 and 'block_size was 8, is 32' in capsys.readouterr().out
    script('eval_downstream.py', '--out_dir=out', '--ckpt=last', '--device=cpu', '--tasks=perplexity', '--data=tiny',
           '--block_size=32')
    loss = re.search(r'loss \| ([0-9.]+)', ' '.join(json.load(open('out/eval.json'))['table']))
    assert float(loss[1]) == pytest.approx(state['val_loss'], abs=0.003)   # the last windows are cut differently
    # greedily, the last 32 tokens seen, as without a cache
    model = build_model(load('out/ckpt.pt'), 32)
    expected = [1]
    for _ in range(60):
        expected.append(model(torch.tensor([expected[-32:]]))[0][0, -1].argmax().item())
    assert model.generate(torch.tensor([[1]]), 60, 0.0, exact_context=True)[0].tolist() == expected
    script('sample.py', '--out_dir=out', '--device=cpu', '--num_samples=1', '--max_new_tokens=50', '--block_size=32')
    # a run goes on at its length, other training from these weights may be longer
    state = script('train.py', *options({}), '--block_size=32', '--init_from=resume', '--max_iters=7')
    assert state['raw_model'].config.block_size == 8 and 'block_size stays 8, not 32' in capsys.readouterr().out
    state = script('train.py', *options({}), '--block_size=32', '--init_from=ckpt:out', '--out_dir=longer')
    assert state['raw_model'].config.block_size == 32
    script('train.py', *options({}), '--out_dir=table')
    script('train.py', *options({}), *longer, '--out_dir=table')
    assert "block_size stays 8, not 32" in capsys.readouterr().out
    line = fails('sample.py', '--out_dir=table', '--device=cpu', '--block_size=32')[1]
    assert 'block_size=32 must be 1 to 8' in line


def test_a_context_can_grow_only_where_no_table_limits_it():
    with pytest.raises(ValueError, match='block_size=17 must be 1 to 16'):
        build({}).crop_block_size(17)
    for pos in ('rope', 'alibi'):
        model = build(dict(pos=pos))
        expected = model(ids(1, 16))[0]
        model.crop_block_size(64)
        assert torch.equal(model(ids(1, 16))[0], expected) and model(ids(1, 64))[0].isfinite().all()
        with pytest.raises(ValueError, match='65 tokens'):
            model(ids(1, 65))
        with pytest.raises(ValueError, match='block_size=0 must be 1 to 1073741824'):
            model.crop_block_size(0)


@pytest.mark.parametrize('bad, words', [
    (dict(pos='rotary'), "pos='rotary' must be 'learned' or 'rope' or 'alibi'"), (dict(window=-1), 'window=-1'),
    (dict(n_kv_head=3), 'n_kv_head=3 must be 0 or a divisor of n_head=4'), (dict(n_kv_head=8), 'n_kv_head=8'),
    (dict(rope_base=0.0), 'rope_base=0.0 must be'),
    (dict(pos='rope', n_embd=20), 'n_embd=20 must be an even number a head'), (dict(qk_norm='yes'), "qk_norm='yes'"),
    (dict(tie='no'), "tie='no' must be True or False"), (dict(window=2.5), 'window=2.5')])
def test_impossible_switches(bad, words):
    with pytest.raises(ValueError) as error:
        build(bad)
    assert words in str(error.value)


def test_impossible_switches_on_the_command_line(tiny, fails):
    assert "pos='rotary' must be" in fails('train.py', *TINY, '--pos=rotary')[1]
    assert 'n_kv_head=3 must be' in fails('train.py', *options({}), '--n_kv_head=3')[1]
    assert not os.path.exists('out')
