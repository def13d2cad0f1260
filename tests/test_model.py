""" model.py against independent oracles: Hugging Face's GPT-2, a re-implemented initialisation, arithmetic. """
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import model
from model import GPT, GPTConfig

SIZES = {'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280), 'gpt2-xl': (48, 25, 1600)}
SMALL = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **changes})).eval()


def ids(*shape, seed=1):
    return torch.randint(SMALL['vocab_size'], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def pair():
    """ a random Hugging Face GPT-2 and ours with its weights """
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)).eval()
    ours, state = small(gelu='tanh'), theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        transposed = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))   # Conv1D stores (in, out)
        with torch.no_grad():
            # larger than at initialisation, so that every part matters
            if tensor.dim() == 2 and name.startswith('transformer.h.'):
                theirs.get_parameter(name).mul_(4)
            tensor.copy_(state[name].t() if transposed else state[name])
    return theirs, ours


def test_logits_and_loss_equal_hugging_face(pair):
    theirs, ours = pair
    x = ids(3, 16)
    reference = theirs(x, labels=x)
    logits, loss = ours(x[:, :-1], x[:, 1:])
    assert (logits - reference.logits[:, :-1]).abs().max() < 2e-5
    assert abs(loss - reference.loss) < 1e-5
    # the exact GELU is visibly another function, so this test can tell
    ours.transformer.h[0].mlp.gelu = ours.transformer.h[1].mlp.gelu = 'none'
    wrong = ours(x[:, :-1], x[:, 1:])[0]
    ours.transformer.h[0].mlp.gelu = ours.transformer.h[1].mlp.gelu = 'tanh'
    assert (wrong - reference.logits[:, :-1]).abs().max() > 2e-5


def test_greedy_text_equals_hugging_face(pair):
    theirs, ours = pair
    x = ids(2, 3)
    reference = theirs.generate(x, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(x),
                                pad_token_id=0)
    assert torch.equal(ours.generate(x, 12, temperature=0.0), reference)


@pytest.mark.parametrize('bias', [True, False])
def test_a_seed_gives_nanogpts_initial_weights(bias):
    """ the recipe, written out: the constructors' own draws in order, then one pass, then the projections again """
    from torch import nn
    V, T, C, L = 50, 16, 32, 2
    torch.manual_seed(7)
    shapes = [nn.Embedding(V, C), nn.Embedding(T, C)]
    for _ in range(L):
        shapes += [nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias), nn.Linear(C, 4 * C, bias),
                   nn.Linear(4 * C, C, bias)]
    shapes.append(nn.Linear(C, V, bias=False))
    drawn = [torch.empty_like(module.weight).normal_(0.0, 0.02) for module in shapes]
    for i in (3, 5, 7, 9):   # attn.c_proj and mlp.c_proj of both blocks
        drawn[i] = torch.empty_like(drawn[i]).normal_(0.0, 0.02 / math.sqrt(2 * L))
    expected = {'lm_head.weight': drawn[10], 'transformer.wte.weight': drawn[10], 'transformer.wpe.weight': drawn[1]}
    for block in range(L):
        for i, name in enumerate(('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')):
            expected[f'transformer.h.{block}.{name}.weight'] = drawn[2 + 4 * block + i]
    for name, tensor in small(seed=7, bias=bias).state_dict().items():
        standard = torch.ones(C) if '.ln_' in name and name.endswith('weight') else torch.zeros(tensor.shape)
        assert torch.equal(tensor, expected.get(name, standard)), name


def test_state_dict_keys():
    block = ['ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj']
    for bias, kinds in ((True, ['weight', 'bias']), (False, ['weight'])):
        golden = ['transformer.wte.weight', 'transformer.wpe.weight',
                  *[f'transformer.h.{i}.{part}.{kind}' for i in range(2) for part in block for kind in kinds],
                  *[f'transformer.ln_f.{kind}' for kind in kinds], 'lm_head.weight']
        assert list(small(bias=bias).state_dict()) == golden


@pytest.mark.parametrize('name, total, without_positions', [
    ('gpt2', 124_439_808, 123_653_376), ('gpt2-medium', 354_823_168, 353_774_592),
    ('gpt2-large', 774_030_080, 772_719_360), ('gpt2-xl', 1_557_611_200, 1_555_972_800)])
def test_parameter_counts(name, total, without_positions):
    n_layer, n_head, n_embd = SIZES[name]
    with torch.device('meta'):
        model = GPT(GPTConfig(1024, 50257, n_layer, n_head, n_embd))
        assert model.get_num_params(non_embedding=False) == total
        assert model.get_num_params() == without_positions


def test_flops_and_mfu():
    """ 875,062,886,400 per sequence of 1024 for 124,337,664 parameters without biases (PaLM's formula) """
    with torch.device('meta'):
        model = GPT(GPTConfig(1024, 50257, bias=False))
    assert model.get_num_params(non_embedding=False) == 124_337_664
    assert model.flops_per_token() * 1024 == 875_062_886_400
    assert model.estimate_mfu(40, 0.5) == pytest.approx(875_062_886_400 * 40 / 0.5 / 312e12)
    assert model.estimate_mfu(40, 0.5, peak_flops=989e12) == pytest.approx(875_062_886_400 * 40 / 0.5 / 989e12)


def test_the_future_does_not_reach_the_past():
    model, x = small(), ids(2, 16)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    before, after = model(x, x)[0], model(changed, x)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_every_position_reaches_the_last():
    model, x = small(), ids(1, 16)
    embedded = model.transformer.wte(x).detach().requires_grad_()
    model.transformer.wte.register_forward_hook(lambda *_: embedded)
    model(x)[0].sum().backward()
    assert (embedded.grad.abs().sum(-1) > 0).all()


def test_last_logits_without_targets():
    model, x = small(), ids(2, 8)
    logits, loss = model(x)
    assert logits.shape == (2, 1, 50) and loss is None
    assert torch.allclose(logits, model(x, x)[0][:, -1:], atol=1e-6)


def test_loss_at_initialisation_is_that_of_a_guess():
    assert abs(small(vocab_size=1000)(ids(8, 16), ids(8, 16, seed=2))[1] - math.log(1000)) < 0.1


def test_targets_of_minus_one_do_not_count():
    model, x, y = small(), ids(2, 8), ids(2, 8, seed=2)
    logits, _ = model(x, y)
    masked = y.clone()
    masked[:, :5] = -1
    expected = torch.nn.functional.cross_entropy(logits[:, 5:].reshape(-1, 50), y[:, 5:].reshape(-1))
    assert torch.allclose(model(x, masked)[1], expected)
    rows = ids(2, 9)   # slices of one tensor, as training passes them
    assert torch.equal(model(rows[:, :-1], rows[:, 1:])[1], model(rows[:, :-1].clone(), rows[:, 1:].clone())[1])


def test_dropout_only_in_training():
    model, x = small(dropout=0.5), ids(2, 8)
    assert torch.equal(model(x, x)[0], model(x, x)[0])
    model.train()
    assert not torch.equal(model(x, x)[0], model(x, x)[0])


@pytest.mark.parametrize('place', ['embedding', 'attention', 'projection', 'mlp'])
def test_each_of_the_four_dropouts_works_alone(place):
    model, x = small(n_layer=1).train(), ids(2, 8)
    block = model.transformer.h[0]
    if place == 'attention':
        block.attn.dropout = 0.5
    else:
        modules = {'embedding': model.transformer.drop, 'projection': block.attn.resid_dropout,
                   'mlp': block.mlp.dropout}
        modules[place].p = 0.5
    assert not torch.equal(model(x, x)[0], model(x, x)[0])


def test_every_parameter_is_in_one_group():
    for bias in (True, False):
        model = small(bias=bias)
        decayed, free = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
        grouped = [id(p) for group in (decayed, free) for p in group['params']]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters()) and len(set(grouped)) == len(grouped)
        assert decayed['weight_decay'] == 0.1 and all(p.dim() == 2 for p in decayed['params'])
        assert free['weight_decay'] == 0 and all(p.dim() == 1 for p in free['params'])
        assert decayed['params'][1] is model.transformer.wpe.weight   # checkpoint.crop counts on it


def test_the_optimizer_is_adamw_as_published():
    """ one step against the update rule written out, decoupled decay first """
    model, x = small(), ids(2, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', eps=1e-5)
    model(x, x)[1].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        decayed = before[name] * (1 - 1e-2 * 0.1 * (p.dim() >= 2))
        expected = decayed - 1e-2 * p.grad / (p.grad.abs() + 1e-5)   # after one step both moments equal the gradient
        assert torch.allclose(p, expected, atol=1e-6), name


def test_learns_a_periodic_sequence():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=32))
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95), 'cpu')
    sequence = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5] * 20)
    for step in range(60):
        rows = torch.stack([sequence[i:i + 17] for i in range(step % 8, step % 8 + 8)])
        loss = model(rows[:, :-1], rows[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # the first token of a row cannot tell which 1 or 5 it is: ln 2 on half the starts of 16 positions is 0.02
    assert loss < 0.1


def test_crop_block_size():
    model, x = small(), ids(2, 6)
    before = model(x, x)[0]
    model.crop_block_size(6)
    assert model.config.block_size == 6 and model.transformer.wpe.weight.shape == (6, 32)
    assert torch.equal(model(x, x)[0], before)
    assert model.transformer.wpe.weight.untyped_storage().nbytes() == 6 * 32 * 4   # the rest is freed
    for size in (7, 0):
        with pytest.raises(ValueError, match=f'block_size={size}'):
            model.crop_block_size(size)
    with pytest.raises(ValueError, match='7 tokens.*block_size=6'):
        model(ids(1, 7))


@pytest.mark.parametrize('change, words', [
    (dict(n_embd=33), 'n_embd=33.*n_head=2'), (dict(n_layer=0), 'n_layer=0'), (dict(vocab_size=-1), 'vocab_size=-1'),
    (dict(dropout=1.0), 'dropout=1.0'), (dict(gelu='relu'), "gelu='relu'"), (dict(block_size=0), 'block_size=0')])
def test_impossible_sizes(change, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**SMALL, **change})


def test_generate_continues_the_prompt_past_block_size():
    model, x = small(), ids(2, 3)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.mul_(12)   # at initialisation every token would follow itself
    y = model.generate(x, 20, 0.0, exact_context=True)
    assert y.shape == (2, 23) and torch.equal(y[:, :3], x) and len(y.unique()) > 5
    for t in range(3, 23):   # each token is the likeliest after the last block_size ones
        assert torch.equal(y[:, t], model(y[:, max(0, t - 16):t])[0][:, -1].argmax(-1))


def draws(model, n=2000, **options):
    """ ids drawn after one fixed prompt """
    torch.manual_seed(0)
    return model.generate(torch.tensor([[1, 2]]).repeat(n, 1), 1, **options)[:, -1]


def test_temperature_and_top_k():
    model = small(seed=3)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(8)
        logits = model(torch.tensor([[1, 2]]))[0][0, -1]
    order = logits.argsort(descending=True)
    assert set(draws(model, top_k=3).tolist()) == set(order[:3].tolist())
    assert set(draws(model, n=50, top_k=1).tolist()) == {order[0].item()}
    assert torch.equal(draws(model, top_k=0), draws(model)) and torch.equal(draws(model, top_k=500), draws(model))
    for temperature in (0.5, 1.0, 2.0):   # frequencies against the softmax: 5 standard errors
        p = torch.softmax(logits / temperature, -1)
        frequency = torch.bincount(draws(model, 20000, temperature=temperature), minlength=50) / 20000
        assert ((frequency - p).abs() < 5 * (p * (1 - p) / 20000).sqrt() + 1e-4).all()
    with pytest.raises(ValueError, match='temperature=-1'):
        draws(model, temperature=-1)
    with pytest.raises(ValueError, match='empty'):
        model.generate(torch.empty(1, 0, dtype=torch.long), 1)


def test_padded_ids_are_never_drawn():
    model = small()
    with torch.no_grad():
        model.lm_head.weight[40:] *= 100
    assert draws(model).max() >= 40
    assert draws(model, num_ids=40).max() < 40 and draws(model, num_ids=40, top_k=500).max() < 40
    assert model.generate(ids(1, 3), 5, 0.0, num_ids=40)[:, 3:].max() < 40


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(dtype):
    model, x = small(), ids(1, 8)
    with torch.autocast('cpu', dtype):
        loss = model(x, x)[1]
    assert loss.dtype == torch.float32 and abs(loss - model(x, x)[1]) < 0.02


def test_recomputed_activations_give_the_same_gradients_and_take_less_memory():
    """ with dropout, whose masks must be those of the first time """
    gradients, kept = [], []
    for grad_checkpoint in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=3, n_head=2, n_embd=16, dropout=0.3))
        model.grad_checkpoint, sizes = grad_checkpoint, []
        x = torch.randint(20, (4, 16))
        keep = lambda tensor, sizes=sizes: (sizes.append(tensor.nbytes), tensor)[1]   # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x, x)[1]
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert torch.equal(model.eval()(x)[0], model(x)[0])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 3


# ---- the loss without the logits in memory

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('chunk', [301, 5000, 301 * 40])   # a row at once, 16 rows, and a last chunk of 8
@pytest.mark.parametrize('tie', [True, False])
def test_the_loss_in_chunks_is_the_loss(monkeypatch, dtype, chunk, tie):
    """ and so are its gradients, with targets that do not count, a factor, and small probabilities in float16 """
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=32, vocab_size=301, n_layer=1, n_head=2, n_embd=32, tie=tie))
    idx, targets = torch.randint(301, (2, 4, 32))
    targets[0, :7] = -1
    found = []
    for size, kind in ((2**30, torch.float32), (2**30, dtype), (chunk, dtype)):
        monkeypatch.setattr(model, 'CHUNK', size)
        gpt.zero_grad()
        with torch.autocast('cpu', kind, enabled=kind != torch.float32):
            logits, loss = gpt(idx, targets, loss_only=True)
        (loss * 1024).backward()
        found.append((loss.detach(), {name: p.grad / 1024 for name, p in gpt.named_parameters()}))
        assert (logits is None) == (size == chunk)
    (_, truth), (whole, expected), (chunked, gradients) = found
    assert torch.allclose(whole, chunked, rtol=1e-6 if dtype != torch.float32 else 0, atol=1e-6)
    for name in gradients:   # as near to the truth as the whole logits bring it
        error, theirs = ((each[name] - truth[name]).abs().max() for each in (gradients, expected))
        assert error <= (3 * theirs + 1e-6 if dtype != torch.float32 else 1e-6), name


def test_chunks_where_something_is_frozen_or_nothing_counts(monkeypatch):
    monkeypatch.setattr(model, 'CHUNK', 500)
    gpt = GPT(GPTConfig(block_size=32, vocab_size=301, n_layer=1, n_head=2, n_embd=32))
    idx = torch.randint(301, (4, 32))
    gpt.lm_head.weight.requires_grad_(False)
    gpt(idx, idx, loss_only=True)[1].backward()
    assert gpt.lm_head.weight.grad is None and gpt.transformer.ln_f.weight.grad.any()
    with torch.no_grad():
        loss = gpt(idx, idx, loss_only=True)[1]
        assert torch.allclose(loss, gpt(idx, idx)[1]) and not loss.requires_grad
        assert gpt(idx, torch.full_like(idx, -1), loss_only=True)[1] == 0


def test_small_batches_keep_their_logits():
    gpt = GPT(GPTConfig(block_size=32, vocab_size=301, n_layer=1, n_head=2, n_embd=32))
    idx = torch.randint(301, (4, 32))
    logits, loss = gpt(idx, idx, loss_only=True)
    assert logits.shape == (4, 32, 301) and torch.equal(loss, gpt(idx, idx)[1])


@pytest.mark.slow
def test_chunks_compiled(monkeypatch):
    monkeypatch.setattr(model, 'CHUNK', 5000)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=32, vocab_size=301, n_layer=1, n_head=2, n_embd=32))
    idx, gradients = torch.randint(301, (4, 32)), []
    for run in (gpt, torch.compile(gpt)):
        gpt.zero_grad()
        run(idx, idx, loss_only=True)[1].backward()
        gradients.append([p.grad.clone() for p in gpt.parameters()])
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(*gradients, strict=True))
