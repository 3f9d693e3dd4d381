"""UserIP-Tuning: infer a user's latent profiles from behaviour by prompt tuning a frozen LLM with EM.

    python uip.py fit   --data DIR --lm NAME_OR_DIR --out DIR      EM over all users of DIR: profiles and codebook
    python uip.py infer --data DIR --profiles DIR --lm … --out DIR   new users, codebook fixed
    python uip.py bench --data DIR --lm NAME_OR_DIR                E-step speed beside the bare LLM and the naive way

The model, for user u with evidence texts b_1 … b_n and profiles p (hobby, background):

    z_u^p ~ Cat(π^p)                 collaborative ID
    θ_u^p | z = k ~ N(μ_k^p, τ_p² I)   soft token(s) in the LLM's input-embedding space
    P(B_u | θ_u) = Π_i P_LM(value(b_i) | BOS, name_p θ_u^p for the profiles p in view(b_i), lead(b_i))

and hard EM is coordinate ascent on

    F = Σ_u [ log P(B_u | θ_u) − λ/2 Σ_p ‖θ_u^p − μ_{z_u^p}^p‖² / τ_p² ].

Read on in this order: Layout, pack → collate (mask) → nll (likelihood) → e_step → m_step → fit.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache

from codebook import (Fault, Progress, alone, as_json, assign, digest, facts, kmeans, need, perplexity, publish, read_json,
                      read_npz, vq, write_text)


# --------------------------------------------------------------------------------------------------- layout

@dataclass(frozen=True)
class Layout:
    """The fixed text around a user's soft tokens (paper, inference module), in tokens.

        BOS | name₁ θ₁ | name₂ θ₂ | lead value | lead value | …

    Every block sees BOS and, causally, itself. A name+θ block sees nothing else. An evidence block (lead value) also
    sees the name+θ blocks of its view, and no other evidence. Each name+θ block starts at position 1, every evidence
    block right after the longest of them: no block knows how many others there are.
    """
    profiles: tuple[str, ...]                                      # P names, in the order of θ's second axis
    names: tuple[tuple[int, ...], ...]                             # P token sequences, "The user's hobby is"
    kinds: dict[str, tuple[tuple[int, ...], tuple[bool, ...]]]     # kind → (lead tokens, view: does it see profile p?)
    bos: int
    tokenizer: object
    m: int = 1                                                     # soft tokens per profile
    cut: int = 32                                                  # longest evidence value, tokens
    without: str = ""                                              # ablation: "views" or "mask"

    @classmethod
    def build(cls, spec: dict, tokenizer, m: int = 1, cut: int = 32, without: str = "") -> "Layout":
        """From {"profiles": {profile: name}, "kinds": {kind: {"lead": text, "view": [profile, …]}}}, as in meta.json."""
        bos = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
        if bos is None:
            raise Fault(4, "the tokenizer has neither a BOS nor an EOS token to start a sequence with")
        try:
            profiles = tuple(spec["profiles"])
            names = tuple(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in spec["profiles"].values())
            layout = cls(profiles, names, {}, bos, tokenizer, m, cut, without)
            for kind, how in spec["kinds"].items():
                view = tuple(p in how["view"] or without == "views" for p in profiles)
                layout.kinds[kind] = layout.encode(how["lead"]), view
                if not (layout.kinds[kind][0] and how["view"] and set(how["view"]) <= set(profiles)):
                    raise ValueError(f"kind {kind!r} needs a lead, and a view of {', '.join(profiles)}; it has {how}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Fault(4, f"the layout is not one: {error!r}") from None
        return layout

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that goes on after others: behind a space, whichever way the tokenizer marks one."""
        before = self.tokenizer.encode("x", add_special_tokens=False)
        return tuple(self.tokenizer.encode("x " + text, add_special_tokens=False)[len(before):])

    @property
    def start(self) -> int:
        """Position of the first token of every evidence block."""
        return 1 + max(len(name) for name in self.names) + self.m

    @property
    def cached(self) -> int:
        """C, the number of columns that depend on no user: BOS and the names."""
        return 1 + sum(len(name) for name in self.names)

    def fixed(self) -> tuple[list[int], list[int], list[int]]:
        """ids, blocks and positions of the columns before the evidence: BOS, then all names, then all slots of θ.

        Block 0 is BOS, block p+1 is name_p with θ_p. Names stand before slots so that what no user changes comes first.
        """
        ids, blocks, positions = [self.bos], [0], [0]
        for p, name in enumerate(self.names, 1):
            ids += name
            blocks += [p] * len(name)
            positions += range(1, 1 + len(name))
        for p, name in enumerate(self.names, 1):
            ids += [self.bos] * self.m                             # replaced by θ
            blocks += [p] * self.m
            positions += range(1 + len(name), 1 + len(name) + self.m)
        return ids, blocks, positions


class Row(NamedTuple):
    """One user's evidence as a prefix tree: node i is a token, seen by the nodes below it."""
    ids: list[int]                 # [T] token
    parents: list[int]             # [T] node before this one in its text; a root is its own parent
    positions: list[int]           # [T]
    views: list[tuple[bool, ...]]  # [T] the profiles it sees
    labels: list[int]              # [T] how many texts have this token as a *value* token here; 0 for a lead token


def pack(evidence: dict[str, list[str]], layout: Layout) -> Row:
    """One user's evidence texts {kind: [value, …]} in one row (ours: shared prefixes are stored, and computed, once).

    Texts are conditionally independent given θ, so two that begin alike share that part exactly: what a token sees is
    its own text's past, whichever texts run through it. log P(B|θ) = Σ_nodes labels · log P(node | its ancestors).
    """
    row, nodes = Row([], [], [], [], []), {}
    for kind, texts in evidence.items():
        if kind not in layout.kinds:
            raise Fault(4, f"evidence of kind {kind!r}, but the layout knows only {sorted(layout.kinds)}")
        lead, view = layout.kinds[kind]
        for text in texts:
            value = layout.encode(text)[:layout.cut]
            node = None
            for depth, token in enumerate((*lead, *value)):
                key = (node, view, token)
                if key not in nodes:
                    nodes[key] = len(row.ids)
                    row.ids.append(token)
                    row.parents.append(nodes[key] if node is None else node)
                    row.positions.append(layout.start + depth)
                    row.views.append(view)
                    row.labels.append(0)
                node = nodes[key]
                row.labels[node] += depth >= len(lead)
    return row


def told(row: Row) -> Tensor:
    """How many texts have a node as a value token, for each profile that it sees: [T, P]."""
    return torch.tensor(row.labels)[:, None] * torch.tensor(row.views)


class Batch(NamedTuple):
    """Packed rows as tensors. Columns: [BOS, names | slots of θ | evidence, right-padded]; C, P·m and T of them."""
    ids: Tensor            # [B, Q] long; Q = P·m + T with a prefix cache, else C + P·m + T
    positions: Tensor      # [B, Q] long
    mask: Tensor           # [B, 1, Q, K] additive float in the LLM's dtype; K = C + P·m + T
    slots: slice           # the columns of ids that θ replaces
    predict: Tensor        # [S] flat index into B × Q of the positions that predict a value token
    source: Tensor         # [L] index into predict: where the label's distribution comes from
    target: Tensor         # [L] the value token
    weight: Tensor         # [L] float: how many texts
    user: Tensor           # [L] row of the batch
    prefix: list | None    # per layer (keys, values) [1, heads, C, head_dim] of BOS and names; None: not cached


def visible(block: Tensor, order: Tensor, own: bool = True) -> Tensor:
    """Own-name mask of the fixed columns, [F, F] bool (query, key): BOS, and causally the own block, nothing else.

    own = False, the ablation: every column sees all before it, so all names and the soft tokens of earlier profiles.
    """
    if not own:
        return torch.ones(len(block), len(block), dtype=torch.bool).tril()
    return (block == 0) | (block[:, None] == block) & (order[:, None] >= order)


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [B, Q, K] → [B, 1, Q, K] to add to attention scores. (Eager attention reads a bool mask silently wrong.)"""
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def collate(rows: list[Row], layout: Layout, prefix: list | None = None, *, device="cpu",
            dtype: torch.dtype = torch.float32) -> Batch:
    """Pads rows into one batch and draws the mask (paper, inference module: causal mask by blocks)."""
    ids, blocks, positions = layout.fixed()
    B, F, T = len(rows), len(ids), max(len(row.ids) for row in rows)
    C = layout.cached
    pad = lambda column, fill: torch.tensor([[*getattr(r, column), *fill(len(r.ids))] for r in rows])  # noqa: E731
    zeros = lambda n: [0] * (T - n)
    node, depth, labels = pad("ids", zeros), pad("positions", zeros), pad("labels", zeros)       # (B, T)
    parents = pad("parents", lambda n: range(n, T))                                              # (B, T)
    views = pad("views", lambda n: [[False] * len(layout.names)] * (T - n))                      # (B, T, P)

    block, order = torch.tensor(blocks), torch.tensor(positions)
    view_of = torch.cat([torch.ones(B, T, 1, dtype=torch.bool), views], 2)                       # BOS is in every view
    sees = torch.zeros(B, F + T, F + T, dtype=torch.bool)
    sees[:, :F, :F] = visible(block, order, layout.without != "mask")
    sees[:, F:, :F] = view_of[:, :, block]                             # BOS, and the name+θ blocks of its view
    up = torch.arange(T).expand(B, T)
    for _ in range(int(depth.max()) - layout.start + 1):               # itself, its parent, its parent's parent …
        sees[:, F:, F:].scatter_(2, up[:, :, None], True)
        up = parents.gather(1, up)

    skip = C if prefix is not None else 0                              # cached columns are keys, not queries
    full = lambda fixed, tail: torch.cat([torch.tensor(fixed[skip:]).expand(B, -1), tail], 1)
    user, child = labels.nonzero(as_tuple=True)                        # (L,) (L,)
    flat = user * (F - skip + T) + F - skip + parents[user, child]     # the parent predicts the child
    predict, source = flat.unique(return_inverse=True)
    tensors = (full(ids, node), full(positions, depth), additive(sees[:, skip:], dtype), predict, source,
               node[user, child], labels[user, child].float(), user)
    ids, positions, mask, *rest = (t.to(device) for t in tensors)
    return Batch(ids, positions, mask, slice(C - skip, F - skip), *rest, prefix)


# ----------------------------------------------------------------------------------------------- likelihood

class Prefix(DynamicCache):
    """The prefix's keys and values before those of the current tokens; keeps none of the latter."""

    def __init__(self, layers: list):
        super().__init__()
        self.prefix = layers

    def update(self, keys, values, layer, *args, **kwargs):
        k, v = self.prefix[layer]                                      # (1, h, C, e)
        return (torch.cat([k.expand(len(keys), -1, -1, -1), keys], 2),
                torch.cat([v.expand(len(keys), -1, -1, -1), values], 2))


@torch.no_grad()
def prefix(lm, layout: Layout) -> list:
    """Keys and values of BOS and the names, [1, heads, C, head_dim] per layer: one pass for all users and steps."""
    ids, block, order = (torch.tensor(column[:layout.cached]) for column in layout.fixed())
    mask = additive(visible(block, order, layout.without != "mask")[None], lm.dtype)
    out = lm.base_model(input_ids=ids[None].to(lm.device), attention_mask=mask.to(lm.device),
                        position_ids=order[None].to(lm.device), past_key_values=DynamicCache(), use_cache=True)
    return [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def hidden(lm, batch: Batch, theta: Tensor) -> Tensor:
    """Last hidden states of the batch's columns, [B, Q, d] in the LLM's dtype, with θ [B, P, m, d] in its slots."""
    x = lm.get_input_embeddings()(batch.ids)                           # (B, Q, d)
    soft = theta.flatten(1, 2).to(x.dtype)                             # (B, P·m, d)
    x = torch.cat([x[:, :batch.slots.start], soft, x[:, batch.slots.stop:]], 1)
    cached = Prefix(batch.prefix) if batch.prefix is not None else None
    return lm.base_model(inputs_embeds=x, attention_mask=batch.mask, position_ids=batch.positions,
                         past_key_values=cached, use_cache=cached is not None).last_hidden_state


def nll(lm, batch: Batch, theta: Tensor) -> Tensor:
    """−log P(B_u | θ_u) in nats, [B] fp32, differentiable in theta [B, P, m, d] (fp32, whatever the LLM's dtype).

    Only value tokens count, never a lead, a name or BOS, and the head runs only where a value token is predicted.
    """
    h = hidden(lm, batch, theta).flatten(0, 1)[batch.predict]          # (S, d)
    logits = lm.get_output_embeddings()(h)                             # (S, V)
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    gain = batch.weight * logp[batch.source, batch.target]             # (L,)
    return -torch.zeros(len(batch.ids), dtype=gain.dtype, device=gain.device).index_add(0, batch.user, gain)


# ------------------------------------------------------------------------------------------------------- EM

class Book(NamedTuple):
    """The codebook: one mixture of codes per profile."""
    mu: list[Tensor]       # P × [K_p, m·d] fp32
    pi: list[Tensor]       # P × [K_p] share of the users
    tau2: Tensor           # [P] variance per coordinate around the own code, of the first M-step


class Fitted(NamedTuple):
    theta: Tensor          # [N, P, m, d] fp32
    ids: Tensor            # [N, P] long, codes from 0
    nll: Tensor            # [N] nats
    book: Book
    trace: list[dict]      # one entry per half-step


def e_step(lm, layout: Layout, rows: list[Row], theta: Tensor, centre: Tensor | None = None,
           precision: Tensor | None = None, *, steps: int = 4, lr: float = 0.02, shrink: float | None = None,
           budget: int = 1024, cache: list | None = None, tick=lambda users: None) -> tuple[Tensor, Tensor]:
    """MAP of θ given the codebook: `steps` of Adam from the θ given, keeping each user's best iterate.

    rows: N packed users, each with evidence. theta: [N, P, m, d] fp32. centre: [N, P, m·d] μ of each user's code;
    precision: [P] λ/τ² (both None in round 0: no prior). budget: tokens in one forward pass, halved when memory runs out.
    shrink (ours): plain gradient steps instead, lr · gradient / (value tokens of the profile + shrink). Adam moves all
    users equally far, whatever they have told; the first of these steps is the MAP under a Gaussian prior around the
    start that is worth `shrink` tokens, as far as each token has the curvature 1/lr.
    Returns (theta [N, P, m, d], nll [N]); the objective of no user is worse than at the start.
    """
    start, theta, best_nll, lengths = theta, theta.clone(), torch.empty(len(rows)), [len(row.ids) for row in rows]

    def climb(users: list[int]) -> None:
        batch = collate([rows[u] for u in users], layout, cache, device=lm.device, dtype=lm.dtype)
        x = start[users].to(lm.device).requires_grad_()
        ascent = (torch.optim.Adam if shrink is None else torch.optim.SGD)([x], lr=lr)
        tokens = torch.stack([told(rows[u]).sum(0) for u in users]).to(x.device)            # (B, P)
        best = torch.full((len(users),), math.inf, device=x.device)
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps):
                value = nll(lm, batch, x)
                loss = value
                if centre is not None:
                    gap = (x.flatten(2) - centre[users].to(x.device)).square().sum(2)       # (B, P)
                    loss = value + 0.5 * gap @ precision.to(x.device)
            better = (loss < best).nonzero().flatten()
            best[better], found = loss.detach()[better], [users[i] for i in better.tolist()]
            theta[found], best_nll[found] = x.detach()[better].cpu(), value.detach()[better].cpu()
            if step < steps:
                loss.sum().backward()
                if shrink is not None:
                    x.grad /= (tokens + shrink).clamp(min=1)[:, :, None, None]
                ascent.step()
                ascent.zero_grad()
            tick(len(users))
        if not (best.isfinite().all() and x.isfinite().all()):
            raise Fault(4, f"likelihood or gradient is not finite in {lm.dtype}: try --dtype bfloat16 or float32")

    todo = batches(lengths, budget)
    while todo:
        try:
            climb(todo[0])
            todo.pop(0)
        except torch.OutOfMemoryError:
            if len(todo[0]) == 1:
                raise
            rest, budget = sum(todo, []), max(1, budget // 2)
            print(f"out of memory: going on with {budget} tokens in one pass", file=sys.stderr)
            todo = [[rest[i] for i in group] for group in batches([lengths[u] for u in rest], budget)]
    return theta, best_nll


def batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of rows, sorted by length, in groups of at most `budget` padded tokens (at least one row each)."""
    groups = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


@torch.no_grad()
def pooled(lm, layout: Layout, rows: list[Row], theta: Tensor, *, budget: int = 1024, cache: list | None = None,
           tick=lambda users: None, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In place of an E-step, for comparison: the LLM's mean last hidden state over the value tokens of a profile's view.

    rows: N packed users; theta [N, P, m, d], the soft tokens meanwhile; table: [V, d], to average rows of it instead of
    hidden states. Returns (the means, in the shape of theta and zeros where a profile has no evidence; zeros [N]).
    """
    found = torch.zeros_like(theta)
    for users in batches([len(row.ids) for row in rows], budget):
        batch = collate([rows[u] for u in users], layout, cache, device=lm.device, dtype=lm.dtype)
        h = table[batch.ids.cpu()] if table is not None else hidden(lm, batch, theta[users].to(lm.device)).float().cpu()
        for own, u in zip(h[:, batch.slots.stop:], users):                                  # (Q − P·m, d)
            weight = told(rows[u])                                                          # (T, P)
            mean = weight.T.float() @ own[:len(weight)] / weight.sum(0).clamp(min=1)[:, None]
            found[u] = mean[:, None]                                                        # (P, 1, d)
        tick(len(users))
    return found, torch.zeros(len(rows))


def m_step(theta: Tensor, codes: list[int], book: Book | None, seed: int = 0, quantise=kmeans) -> tuple[Book, Tensor]:
    """μ, z, π and, the first time, τ² from all θ [N, P, m, d]: k-means per profile, warm-started from round 1 on.

    Returns (book, ids [N, P]). τ² stays as first found, so that F of different rounds can be compared.
    quantise: `codebook.vq`, which does not take a warm start, for comparison.
    """
    x, mu, pi, ids, tau2 = theta.flatten(2), [], [], [], []
    for p, k in enumerate(codes):
        generator = torch.Generator().manual_seed(seed * 1009 + p)
        warm = {"init": book.mu[p]} if book and quantise is kmeans else {}
        found = quantise(x[:, p], k, generator=generator, **warm)
        mu.append(found.centroids)
        ids.append(found.ids)
        pi.append(torch.bincount(found.ids, minlength=k) / len(x))
        tau2.append(max(float(found.inertia) / x[:, p].numel(), 1e-12))
    return Book(mu, pi, torch.tensor(tau2) if book is None else book.tau2), torch.stack(ids, 1)


def centres(book: Book, ids: Tensor) -> Tensor:
    """μ of each user's codes, [N, P, m·d]."""
    return torch.stack([mu[z] for mu, z in zip(book.mu, ids.T)], 1)


def objective(nll: Tensor, theta: Tensor, ids: Tensor, book: Book, lam: float) -> float:
    """F = Σ_u [ log P(B_u|θ_u) − λ/2 Σ_p ‖θ_u^p − μ‖² / τ_p² ], nats."""
    gap = (theta.flatten(2) - centres(book, ids)).square().sum(2)                           # (N, P)
    return float(-nll.double().sum() - 0.5 * lam * (gap.double() / book.tau2).sum())


def fit(lm, layout: Layout, rows: list[Row], codes: list[int], *, rounds: int = 1, steps: int = 4, lr: float = 0.02,
        lam: float = 0.02, shrink: float | None = None, seed: int = 0, shard: int = 128, budget: int = 1024,
        book: Book | None = None, folder: Path | None = None, log=print, without: str = "") -> Fitted:
    """Hard EM (paper, inference and quantisation modules): rounds + 1 times an E-step over all shards and an M-step.

    rows: users with evidence. codes: K_p per profile. With `book` the codebook is fixed and the M-step only picks the
    nearest codes: that is how new users are served. Shards already in `folder` are taken from there. Under torchrun
    each process takes its share of the shards and all then do the same M-step, so that the result is one process's.
    without: an ablation: "em" (round 0 only), "kmeans" (vq instead), "tuning" (pooled hidden states are the θ), "llm"
    (a bag of the value tokens is, each a random direction: the same words without what the LLM knows of them).
    """
    rounds = 0 if without in ("em", "tuning", "llm") else rounds
    shape = lm.get_input_embeddings().weight.shape
    table = torch.randn(shape, generator=torch.Generator().manual_seed(1)) if without == "llm" else None    # (V, d)
    check_input(lm, rows)
    fixed, trace, ids, cache = book is not None, [], None, prefix(lm, layout)
    prior_mean = lm.get_input_embeddings().weight.float().mean(0).cpu()                     # (d,)
    theta = prior_mean.repeat(len(rows), len(codes), layout.m, 1)                           # (N, P, m, d)
    parts = [slice(i, i + shard) for i in range(0, len(rows), shard)]
    files = [[folder and folder / f"shard_{r}_{i:05d}.pt" for i in range(len(parts))] for r in range(rounds + 1)]
    rank, world = place()
    todo = sum(len(rows[part]) for line in files for n, (part, file) in enumerate(zip(parts, line))
               if n % world == rank and not (file and file.exists()))
    bar = Progress(total=todo * (steps + 1), desc="E-step", unit="user-step", disable=rank > 0)

    for r in range(rounds + 1):
        centre, precision = (centres(book, ids), lam / book.tau2) if r else (None, None)    # round 0: no prior yet
        work = [partial(e_step, lm, layout, rows[part], theta[part], None if centre is None else centre[part], precision,
                        steps=steps, lr=lr, shrink=shrink, budget=budget, cache=cache, tick=bar.update) for part in parts]
        if without in ("tuning", "llm"):
            work = [partial(pooled, lm, layout, rows[part], theta[part], budget=budget, cache=cache, tick=bar.update,
                            table=table) for part in parts]
        theta, value = (torch.cat(x) for x in zip(*shared(files[r], theta.split(shard), work)))
        if r:
            trace.append(report(log, layout, r, "E", value, theta, ids, book, lam))
        if fixed:
            ids = torch.stack([assign(theta[:, p].flatten(1), mu)[0] for p, mu in enumerate(book.mu)], 1)
        else:
            book, ids = m_step(theta, codes, book, seed, vq if without == "kmeans" else kmeans)
        trace.append(report(log, layout, r, "M", value, theta, ids, book, lam))
    bar.close()
    return Fitted(theta, ids, value, book, trace)


def check_input(lm, rows: list[Row]) -> None:
    """Exactly one tensor trains, θ; and every text fits the LLM's context."""
    if any(weight.requires_grad for weight in lm.parameters()):
        raise ValueError("exactly one tensor trains, θ: freeze the LLM first, lm.requires_grad_(False)")
    if not rows or not all(any(row.labels) for row in rows):
        raise Fault(4, "EM takes users with evidence only: leave out those whose texts are empty")
    longest, context = 1 + max(max(row.positions) for row in rows), getattr(lm.config, "max_position_embeddings", None)
    if context and longest > context:
        raise Fault(4, f"an evidence text needs {longest} tokens with its prompt, but the LLM reads {context}")


def place() -> tuple[int, int]:
    """This process among those of torchrun: (rank, how many); (0, 1) without."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shared(files: list[Path | None], like: list[Tensor], work: list) -> list[tuple[Tensor, Tensor]]:
    """Results of all shards: this process's share is computed, the other processes' are read from their files."""
    rank, world = place()
    own = {n: kept(files[n], like[n], work[n]) for n in range(rank, len(files), world)}
    meet()
    return [own[n] if n in own else kept(files[n], like[n]) for n in range(len(files))]


def meet() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as error:
            raise Fault(3, "another process of this run has died: see its message, then run the same command again, which "
                           f"goes on from the finished shards ({str(error).splitlines()[0]})") from None


def kept(path: Path | None, like: Tensor, work=None) -> tuple[Tensor, Tensor]:
    """The result of `work`, taken from `path` where an earlier run left it whole, else left there for the next."""
    if path is None:
        return work()
    if path.exists():
        try:
            return read_shard(path, like)
        except Exception as error:                                     # whatever damage makes torch.load raise
            print(f"{path} is damaged ({error}): computed again", file=sys.stderr)
    if work is None:
        raise Fault(4, f"{path}, another process's, is gone or damaged: run the same command again")
    theta, value = work()
    content = io.BytesIO()
    torch.save({"theta": theta, "nll": value}, content)
    publish(path, lambda file: file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest()))
    return theta, value


def read_shard(path: Path, like: Tensor) -> tuple[Tensor, Tensor]:
    """(θ in the shape of `like`, nll) of a file: what torch.save wrote, then its sha256. Raises anything if damaged."""
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError("its checksum is wrong")
    saved = torch.load(io.BytesIO(content), weights_only=True)
    theta, value = saved["theta"], saved["nll"]
    if theta.shape != like.shape or value.shape != like.shape[:1] or not (theta.isfinite().all() and value.isfinite().all()):
        raise ValueError("it is no shard of this run")
    return theta.float(), value.float()


def report(log, layout: Layout, r: int, half: str, value: Tensor, theta: Tensor, ids: Tensor, book: Book,
           lam: float) -> dict:
    """One half-step as a line on the screen and a record for meta.json; loud about a collapsed codebook."""
    F = objective(value, theta, ids, book, lam)
    entry = {"round": r, "half": half, "F": F, "nll": float(value.double().sum()), "usage": {}, "perplexity": {}}
    line = f"round {r}  {half}-step  F {F:.2f}  −log P(B|θ) {entry['nll']:.2f}"
    for p, (name, mu) in enumerate(zip(layout.profiles, book.mu)):
        entry["usage"][name] = torch.bincount(ids[:, p], minlength=len(mu)).tolist()
        entry["perplexity"][name] = perplexity(ids[:, p], len(mu))
        line += f"  {name} {'/'.join(map(str, entry['usage'][name]))} (perplexity {entry['perplexity'][name]:.2f})"
    log(line)
    for name, spread in entry["perplexity"].items():
        if half == "M" and spread < 1.5 and len(entry["usage"][name]) > 1:
            log(f"WARNING: the codebook of {name} has collapsed (perplexity {spread:.2f}): nearly all users share one ID")
    return entry


# ------------------------------------------------------------------------------------------- LLM and files

def load_lm(name: str, dtype: str = "auto", device: str = "auto", random: bool = False):
    """A frozen causal LM and its tokenizer: (lm, tokenizer). name: folder or hub id. random: untrained weights, seed 1.

    auto: the GPU if there is one; bfloat16 there and on CPUs with bf16 instructions, else float32. Raises Fault 2 (no
    such folder), 3 (hub out of reach, gated or unknown id) or 4 (a folder that is no causal LM).
    """
    from huggingface_hub.utils import logging as hub
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
    hub.set_verbosity_error()                                          # its retries fill the screen; the fault below tells
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local = os.path.isdir(name)
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise Fault(2, f"--lm {name}: no such folder")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Fault(2, f"--device {device} is not here: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        dtype = "bfloat16" if computes_bf16(device) else "float32"
    if not local:
        print(f"asking the hub, or its cache, for {name}", file=sys.stderr)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        how = {"dtype": getattr(torch, dtype),                             # sdpa's backward under a mask is slow on CPUs
               "attn_implementation": "eager" if device == "cpu" else "sdpa"}
        if random:
            torch.manual_seed(1)
            lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), **how)
        else:
            lm = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **how)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if local:
            raise Fault(4, f"--lm {name}: the folder holds no causal LM with tokenizer and safetensors ({reason})") from None
        if any(word in str(error) for word in ("gated", "401", "403")):
            raise Fault(3, f"--lm {name}: access is refused. Accept its terms on its hub page, then log in with "
                           f"`hf auth login` or set HF_TOKEN ({reason})") from None
        raise Fault(3, f"--lm {name}: not to be had from the hub: wrong id, or no network? A local folder does instead, "
                       f"such as `python data.py lm --out DIR` makes ({reason})") from None
    lm = lm.to(device).eval().requires_grad_(False)
    check_lm(lm)
    return lm, tokenizer


def computes_bf16(device: str) -> bool:
    """Whether the hardware has bfloat16 instructions; emulated, they are slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


class Digits:
    """A tokenizer for check_lm: numbers are tokens."""
    bos_token_id, eos_token_id = 1, 2

    @staticmethod
    def encode(text: str, **kwargs) -> list[int]:
        return [int(word) for word in text.replace("x", "3").split()]


@torch.no_grad()
def check_lm(lm) -> None:
    """Refuses an LM that reads a packed row otherwise than its texts one by one (ALiBi, local windows, scaled logits)."""
    layout = Layout.build({"profiles": {"a": "4 5", "b": "6 7"}, "kinds": {
        "c": {"lead": "8", "view": ["a"]}, "d": {"lead": "9 8", "view": ["b"]}}}, Digits, m=2)
    texts = [{"c": [f"{i} {i + 1} {i + 2}" for i in range(10, 26)], "d": [f"{i} {i + 2}" for i in range(30, 40)]}]
    theta = lm.get_input_embeddings().weight[10:14].float().reshape(1, 2, 2, -1)
    try:
        batch = collate([pack(texts[0], layout)], layout, prefix(lm, layout), device=lm.device, dtype=lm.dtype)
        packed, single = float(nll(lm, batch, theta)), float(naive(lm, layout, texts, theta))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise Fault(4, f"a {lm.config.model_type} LM is not supported ({error})") from None
    if not math.isclose(packed, single, rel_tol=1e-4 if lm.dtype == torch.float32 else 5e-3):
        raise Fault(4, f"a {lm.config.model_type} LM is not supported: it reads a packed row otherwise than its texts one "
                       f"by one (−log P {packed:.3f} and {single:.3f})")


def describe(name: str, lm) -> dict:
    """Which LLM it was, for every result: what data.py noted, or name and revision; of a folder also a fingerprint."""
    source, sha = Path(name) / "source.json", hashlib.sha256()
    known = read_json(source) if source.exists() else {
        "name": Path(name).name if os.path.isdir(name) else name, "revision": getattr(lm.config, "_commit_hash", None)}
    files = ("*.safetensors", "tokenizer*", "vocab*", "merges*", "*.model")
    for file in sorted({file for pattern in files for file in Path(name).glob(pattern)}) if os.path.isdir(name) else ():
        sha.update(f"{file.name} {digest(file, sample=True)}\n".encode())
    return {**known, "type": lm.config.model_type, "dtype": str(lm.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in lm.parameters()), "fingerprint": sha.hexdigest()[:16]}


def read_evidence(folder: Path) -> tuple[list[str], list[dict], dict]:
    """(user ids, evidence {kind: [text]} per user, meta) of a data folder."""
    meta, users, evidence = read_json(folder / "meta.json", "name", "layout", "sha256"), [], []
    path, number = folder / "evidence.jsonl", 0
    if not path.exists():
        raise Fault(4, f"{path} does not exist: `python data.py …` makes a data folder")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
                if len(line) > LINE:
                    raise ValueError(f"longer than {LINE} bytes")
                user, found = read_line(line)
                users.append(user)
                evidence.append(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Fault(4, f"{path}, line {number}: not a user with evidence ({error!r:.200})") from None
    if not users:
        raise Fault(4, f"{path} holds no users")
    if len(set(users)) < len(users):
        first = {user: n for n, user in reversed([*enumerate(users, 1)])}
        number = next(n for n, user in enumerate(users, 1) if first[user] < n)
        raise Fault(4, f"{path}, line {number}: user {users[number - 1]!r} is there twice")
    return users, evidence, meta


LINE, ID = 2**24, 256        # most bytes of a line of evidence, most characters of a user id: more is no user's


def read_line(line: bytes) -> tuple[str, dict[str, list[str]]]:
    """One user with evidence; ValueError and its like for anything else. All text in it can be written again."""
    entry = json.loads(line.decode())
    user, found = str(entry["user"]), {kind: [*texts] for kind, texts in entry["evidence"].items()}
    if not 0 < len(user) <= ID or "\0" in user or type(entry["user"]) not in (str, int):
        raise ValueError(f"the user id is no text of 1 to {ID} characters, or no number")
    if any(type(texts) is not list or any(type(text) is not str for text in texts) for texts in entry["evidence"].values()):
        raise ValueError("evidence is {kind: [text, …]}")
    "".join([user, *found, *(text for texts in found.values() for text in texts)]).encode()      # no lone surrogates
    return user, found


def nearest_tokens(lm, tokenizer, mu: Tensor, m: int, n: int = 8) -> list[list[str]]:
    """For each centroid [K, m·d] the n vocabulary tokens of highest cosine to its first soft token, mean removed."""
    table = lm.get_input_embeddings().weight.float().cpu()                                  # (V, d)
    mean = table.mean(0)
    unit = torch.nn.functional.normalize(table - mean, dim=1)
    code = torch.nn.functional.normalize(mu[:, :mu.shape[1] // m] - mean, dim=1)            # (K, d)
    return [[tokenizer.decode([i]).strip() for i in row] for row in (code @ unit.T).topk(n, 1).indices.tolist()]


def save_profiles(folder: Path, users: list[str], active: list[int], fitted: Fitted, layout: Layout, meta: dict):
    """profiles.npz and meta.json. Users without evidence get the prior: the largest code and its centroid, flagged."""
    N, P = len(users), len(layout.profiles)
    ids = torch.stack([pi.argmax() for pi in fitted.book.pi]).repeat(N, 1)                  # (N, P)
    theta = centres(fitted.book, ids)                                                       # (N, P, m·d)
    value, empty = torch.zeros(N), torch.ones(N, dtype=torch.bool)
    ids[active], theta[active], value[active], empty[active] = fitted.ids, fitted.theta.flatten(2), fitted.nll, False
    arrays = {"users": np.array(users), "theta": theta.numpy(), "ids": ids.int().numpy(), "empty": empty.numpy(),
              "names": np.array(layout.profiles), "nll": value.numpy(), "tau": fitted.book.tau2.sqrt().numpy()}
    for p in range(P):
        arrays |= {f"mu_{p}": fitted.book.mu[p].numpy(), f"pi_{p}": fitted.book.pi[p].numpy()}
    (folder / "meta.json").unlink(missing_ok=True)                     # it vouches for the other file, so it goes last
    publish(folder / "profiles.npz", lambda file: np.savez(file, **arrays))
    write_text(folder / "meta.json", as_json({
        **meta, "sha256": {"profiles.npz": digest(folder / "profiles.npz")}, "users": N,
        "empty": int(empty.sum()), "perplexity": fitted.trace[-1]["perplexity"],
        "F": [entry["F"] for entry in fitted.trace], "trace": fitted.trace}))
    for part in folder.glob("shard_*.pt*"):
        part.unlink()


def load_book(folder: Path, layout: Layout, width: int) -> Book:
    """The codebook of a profiles folder, refused when it does not fit the profiles or the LLM's width."""
    path = folder / "profiles.npz"
    saved = read_npz(path, "names", "tau", "mu_0", "pi_0")
    names = tuple(saved["names"].flatten().tolist())
    need(path, saved, [f"{key}_{p}" for key in ("mu", "pi") for p in range(len(names))])
    mu, pi = ([saved[f"{key}_{p}"] for p in range(len(names))] for key in ("mu", "pi"))
    if not (names and all(m.ndim == 2 and len(m) and m.dtype == np.float32 and np.isfinite(m).all() for m in mu)
            and all(x.dtype == np.float32 and x.shape == (len(m),) and np.isfinite(x).all() for x, m in zip(pi, mu))
            and saved["tau"].dtype == np.float32 and saved["tau"].shape == (len(names),) and (saved["tau"] > 0).all()):
        raise Fault(4, f"{path}: no codebook of {len(names)} profiles (wrong shapes or types, or not finite)")
    mu, pi = ([torch.from_numpy(x) for x in arrays] for arrays in (mu, pi))
    book = Book(mu, pi, torch.from_numpy(saved["tau"]).square())
    if names != layout.profiles or any(m.shape[1] != width for m in mu):
        raise Fault(4, f"{path}: made for profiles {names} with codes of width {mu[0].shape[1]}; these data and this LLM "
                       f"have {layout.profiles} and {width}")
    return book


# --------------------------------------------------------------------------------------------------- bench

def bare(lm, tokens: int, width: int, predictions: int) -> None:
    """The limit: forward and backward to the inputs over `tokens` tokens in plain causal rows, head where needed."""
    x = torch.randn(max(tokens // width, 1), width, lm.config.hidden_size).to(lm.device, lm.dtype).requires_grad_()
    h = lm.base_model(inputs_embeds=x, use_cache=False).last_hidden_state.flatten(0, 1)[:predictions]
    lm.get_output_embeddings()(h).float().log_softmax(-1)[:, 0].sum().backward()


def naive(lm, layout: Layout, evidence: list[dict], theta: Tensor) -> Tensor:
    """The obvious way, for reference: one text a row behind its own prompt, padded, logits everywhere. → NLL [B]"""
    ids, slots, labels = [], [], []
    for user, texts in enumerate(evidence):
        for kind, text in ((kind, text) for kind in texts for text in texts[kind]):
            lead, view = layout.kinds[kind]
            row = [layout.bos]
            for p, name in enumerate(layout.names):
                if view[p]:
                    row += [*name, *[layout.bos] * layout.m]
                    slots += [(len(ids), len(row) - layout.m + i, user, p, i) for i in range(layout.m)]
            row += lead
            for token in layout.encode(text)[:layout.cut]:
                labels.append((len(ids), len(row) - 1, token, user))
                row.append(token)
            ids.append(row)
    width, at, label = max(map(len, ids)), torch.tensor(slots).T, torch.tensor(labels).T
    x = torch.tensor([row + [layout.bos] * (width - len(row)) for row in ids], device=lm.device)
    x = lm.get_input_embeddings()(x).index_put((at[0], at[1]), theta[at[2], at[3], at[4]].to(lm.dtype))  # (texts, width, d)
    logp = lm(inputs_embeds=x).logits.float().log_softmax(-1)                               # (texts, width, V)
    return theta.new_zeros(len(evidence)).index_add(0, label[3].to(theta.device), -logp[label[0], label[1], label[2]])


def peak_mb() -> int:
    """The most memory that this process, or its GPU, has held so far, MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // (2**20 if sys.platform == "darwin" else 2**10)


def bench(args) -> None:
    """E-step iterations beside the limit and the naive way, in turn; or, with --grow, over 1, 4 and 16 times --users."""
    lm, tokenizer = load_lm(args.lm, args.dtype, args.device)
    _, evidence, source = read_evidence(Path(args.data))
    layout = Layout.build(source["layout"], tokenizer)
    evidence = [texts for texts in evidence if any(texts.values())]
    result = grow(args, lm, layout, evidence) if args.grow else ratios(args, lm, layout, evidence[:args.users])
    result |= {"lm": describe(args.lm, lm), "data": source["name"], "budget": args.budget, "peak_mb": peak_mb(), "machine": {
        "device": str(lm.device), "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__}}
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(args.out), as_json(result))
    print(json.dumps(result))


def processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return next(iter(names), platform.processor() or platform.machine())


def ratios(args, lm, layout: Layout, evidence: list[dict]) -> dict:
    """Tokens per second of an E-step iteration over users, as a share of the LLM's limit and against the naive way.

    The limit takes as many tokens as the evidence has, --budget at a time, predictions in proportion. The naive way
    takes --naive of the users, evenly over their lengths, and is compared by labelled tokens per second.
    """
    rows, cache = sorted((pack(texts, layout) for texts in evidence), key=lambda row: len(row.ids)), prefix(lm, layout)
    theta = lm.get_input_embeddings().weight.float().mean(0).cpu().repeat(len(rows), len(layout.profiles), 1, 1)
    full = load_lm(args.lm, "float32", args.device)[0]
    tokens, labels = sum(len(row.ids) for row in rows), sum(sum(row.labels) for row in rows)
    predictions = sum(len({p for p, n in zip(row.parents, row.labels) if n}) for row in rows)
    width, some = tokens // len(rows), sorted(evidence, key=lambda texts: len(pack(texts, layout).ids))
    some = some[::max(1, len(some) // args.naive)]

    def limit():
        for begin in range(0, tokens, args.budget):
            part = min(args.budget, tokens - begin)
            bare(lm, part, min(width, part), predictions * part // tokens)

    def our_step():
        for group in batches([len(row.ids) for row in rows], args.budget):
            batch = collate([rows[u] for u in group], layout, cache, device=lm.device, dtype=lm.dtype)
            x = theta[group].to(lm.device).requires_grad_()
            nll(lm, batch, x).sum().backward()
            torch.optim.Adam([x]).step()

    def naive_step(model):                       # a few users at a time, and one dense Adam over all of them
        x = theta[:len(some)].to(model.device).requires_grad_()
        adam = torch.optim.Adam([x])
        for start in range(0, len(some), 4):
            naive(model, layout, some[start:start + 4], x[start:start + 4]).sum().backward()
            adam.step()
            adam.zero_grad()

    ways = {"e_step": our_step, "limit": limit, "naive": lambda: naive_step(full), "naive_same_dtype": lambda: naive_step(lm)}
    seconds = {way: [] for way in ways}
    for i in range(args.repeat + 1):             # in turn, the first round a warm-up
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[way] += [time.perf_counter() - began] * (i > 0)
    ops = {way: own_time(ways[way], lm.device) for way in ("naive_same_dtype", "e_step")}
    top = sorted({op for by in ops.values() for op in sorted(by, key=by.get)[-5:]}, key=lambda op: -ops["e_step"].get(op, 0))
    mid = {way: float(np.median(values)) for way, values in seconds.items()}
    ratio = lambda way: float(np.median(np.divide(seconds[way], seconds["e_step"])))
    share = labels / sum(sum(pack(texts, layout).labels) for texts in some)
    return {"users": len(rows), "tokens": tokens, "labelled": labels, "naive_users": len(some), "seconds": seconds,
            "tokens_per_s": round(tokens / mid["e_step"], 1), "labelled_per_s": round(labels / mid["e_step"], 1),
            "ms_per_user": round(1e3 * mid["e_step"] / len(rows), 1), "of_limit": round(ratio("limit"), 3), "vs_naive": round(ratio("naive") * share, 2),
            "vs_naive_same_dtype": round(ratio("naive_same_dtype") * share, 2),
            "profile": [{"op": op, **{way: round(by.get(op, 0), 3) for way, by in ops.items()}} for op in top]}


def own_time(run, device: torch.device) -> dict[str, float]:
    """Each operator's share of the time of run(), its callees' not counted, by torch's profiler."""
    with torch.profiler.profile() as profile:
        run()
    which = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    own = {event.key: getattr(event, which) for event in profile.key_averages()}
    return {op: value / sum(own.values()) for op, value in own.items()}


def grow(args, lm, layout: Layout, evidence: list[dict]) -> dict:
    """Seconds per user and peak memory of `fit` over 1, 4 and 16 times --users; those of --data, over and over."""
    found = []
    for users in (args.users, 4 * args.users, 16 * args.users):
        rows = [pack(evidence[u % min(args.users, len(evidence))], layout) for u in range(users)]
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            fit(lm, layout, rows, [min(4, args.users)] * len(layout.profiles), rounds=0, steps=1, budget=args.budget,
                shard=args.users, folder=Path(folder), log=lambda line: None)
        found.append({"users": users, "seconds_per_user": round((time.perf_counter() - began) / users, 4),
                      "peak_mb": peak_mb()})
    return {"grow": found}


# ----------------------------------------------------------------------------------------------------- CLI

def claim(folder: Path, settings: dict, restart: bool) -> None:
    """Makes `folder` this run's own: shards of other settings, data, LLM or code are refused, or dropped with --restart."""
    path, parts = folder / "settings.json", list(folder.glob("shard_*.pt*"))
    if restart:
        for part in parts:
            part.unlink()
    elif parts:
        old = read_json(path) if path.exists() else {}
        differs = [key for key in sorted({*old, *settings}) if old.get(key) != settings.get(key)]
        if differs:
            what = "; ".join(f"{key}: {old.get(key)} → {settings.get(key)}" for key in differs)
            raise Fault(2, f"{folder} holds half a run with other settings ({what}). Choose another --out, or pass "
                           "--restart to drop it")
    write_text(path, as_json(settings))


def read_settings(path: Path, made: dict) -> dict:
    """The settings that a codebook was made with, from its meta.json."""
    found, counts = made["settings"], {"rounds": 0, "steps": 1, "tokens": 1}
    try:
        numbers = [*(found[key] for key in counts), *found["codes"], found["seed"]]
        good = all(type(n) is int and abs(n) < 10**6 for n in numbers) and all(found[key] >= n for key, n in counts.items())
        good = good and all(type(found[key]) in (int, float) and 0 <= found[key] < math.inf for key in ("lr", "prior"))
        good = good and (found.get("shrink") is None or type(found["shrink"]) in (int, float) and 0 <= found["shrink"] < math.inf)
        good = good and type(made["lm"]["name"]) is str and min(found["codes"]) > 0
        good = good and found.get("without", "") in ("", *ABLATIONS)
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise Fault(4, f"{path}: its settings are none of `uip.py fit`")
    return found


def code() -> str:
    """sha256 of the code that shards are made by."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, kmeans.__code__.co_filename))).hexdigest()


def run_em(args, held: ExitStack) -> None:
    """fit and infer: EM over the users of a data folder; infer takes settings and codebook from --profiles."""
    began, out = time.time(), Path(args.out)
    users, evidence, source = read_evidence(Path(args.data))
    given = Path(args.profiles) if args.command == "infer" else None
    keys = ("rounds", "steps", "lr", "shrink", "prior", "codes", "tokens", "seed", "without")
    made = read_json(given / "meta.json", "settings", "lm", "layout") if given else None
    settings = read_settings(given / "meta.json", made) if given else {key: getattr(args, key) for key in keys}
    if given and given.resolve() == out.resolve():
        raise Fault(2, "infer: --out must not be --profiles, whose codebook stays as it is")
    without = settings["without"] = settings.get("without", "")
    lm, tokenizer = load_lm(args.lm, args.dtype, args.device, random=without == "pretraining")
    identity = describe(args.lm, lm) | ({"weights": "random"} if without == "pretraining" else {})
    if given and (made["layout"] != source["layout"] or {**made["lm"], "dtype": ""} != {**identity, "dtype": ""}):
        raise Fault(4, f"{given}: made with {made['lm']['name']} and its own layout; here are {identity['name']} and a "
                       "layout that may differ. IDs mean something only with the LLM and the texts of their codebook")
    layout = Layout.build(source["layout"], tokenizer, m=settings["tokens"], without=without)
    rows = [pack(texts, layout) for texts in evidence]
    active = [u for u, row in enumerate(rows) if any(row.labels)]
    codes = settings["codes"]
    if len(codes) != len(layout.profiles):
        raise Fault(2, f"--codes: {len(codes)} numbers for {len(layout.profiles)} profiles, {', '.join(layout.profiles)}")
    if not active or not given and max(codes) > len(active):
        raise Fault(2, f"--codes {codes}: more codes than the {len(active)} users with evidence")
    book = load_book(given, layout, layout.m * lm.get_input_embeddings().embedding_dim) if given else None
    evidence_sha = digest(Path(args.data) / "evidence.jsonl")
    if place()[0] == 0:
        held.enter_context(alone(out / ".lock"))
        claim(out, {**settings, "shard": args.shard, "lm": identity, "data": evidence_sha,
                    "layout": source["layout"], "codebook": digest(given / "profiles.npz") if given else None,
                    "code": code()}, args.restart)
    meet()
    log = print if place()[0] == 0 else lambda text: None
    log(f"{len(users)} users ({len(users) - len(active)} without evidence), {sum(len(r.ids) for r in rows)} tokens, "
          f"{sum(sum(r.labels) for r in rows)} labelled; {identity['name']}, {identity['dtype']} on {lm.device}")
    fitted = fit(lm, layout, [rows[u] for u in active], codes, rounds=settings["rounds"], steps=settings["steps"],
                 lr=settings["lr"], lam=settings["prior"], shrink=settings.get("shrink"), seed=settings["seed"],
                 shard=args.shard, budget=args.budget, book=book, folder=out, log=log, without=without)
    meet()                                       # nobody reads shards any more
    if place()[0] == 0:
        save_profiles(out, users, active, fitted, layout, {
            "command": args.command, "settings": settings, "lm": identity, "data": source["name"],
            "data_sha256": evidence_sha, "layout": source["layout"], "code_sha256": code(), "run": facts(began, "uip.py"),
            "tokens": {p: nearest_tokens(lm, tokenizer, mu, layout.m) for p, mu in zip(layout.profiles, fitted.book.mu)}})


ABLATIONS = ("em", "views", "mask", "kmeans", "pretraining", "tuning", "llm")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("fit", "EM over all users of --data"), ("infer", "new users with the codebook of --profiles"),
                       ("bench", "speed of an E-step iteration beside the bare LLM and the naive way")):
        sub = commands.add_parser(name, help=text, allow_abbrev=False)
        sub.add_argument("--data", required=True, help="folder made by data.py")
        sub.add_argument("--lm", required=True, help="causal LM: a folder or a hub id, such as Qwen/Qwen2-0.5B")
        sub.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
        sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …")
        sub.add_argument("--budget", type=whole, default=1024, help="padded tokens in one forward pass")
        if name == "bench":
            sub.add_argument("--users", type=whole, default=128, help="the first so many users of --data")
            sub.add_argument("--naive", type=whole, default=8, help="so many of them for the naive way, which is slow")
            sub.add_argument("--grow", action="store_true", help="time and memory of 1, 4 and 16 times --users instead")
            sub.add_argument("--repeat", type=whole, default=3, help="rounds that count, after one that warms up")
            sub.add_argument("--out", help="JSON file for the figures")
            continue
        sub.add_argument("--out", required=True, help="folder for profiles.npz and meta.json")
        sub.add_argument("--shard", type=whole, default=128, help="users per file, the unit that a killed run redoes")
        sub.add_argument("--restart", action="store_true", help="drop what a run with other settings left")
        if name == "infer":
            sub.add_argument("--profiles", required=True, help="folder made by fit: its codebook and settings")
            continue
        sub.add_argument("--codes", type=lambda text: [whole(k) for k in text.split(",")], default=[4, 3],
                         help="codebook size of each profile, in the order of the layout")
        sub.add_argument("--rounds", type=lambda text: whole(text, least=0), default=1, help="EM rounds after round 0")
        sub.add_argument("--steps", type=whole, default=4, help="steps of Adam in one E-step")
        sub.add_argument("--lr", type=real, default=0.02, help="its learning rate, in units of the embedding space")
        sub.add_argument("--shrink", type=real, help="plain gradient steps instead of Adam's, shrunk as by "
                         "so many more tokens of evidence: who has told little moves little")
        sub.add_argument("--prior", type=real, default=0.02, help="λ: weight of the codebook in an E-step")
        sub.add_argument("--tokens", type=whole, default=1, help="soft tokens per profile")
        sub.add_argument("--seed", type=int, default=0, help="of k-means++; nothing else is random")
        sub.add_argument("--without", default="", choices=ABLATIONS, help="leave a part of the method out, to see its worth")
    args = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:                       # torchrun
        args.device = join(args.device)
    try:
        with ExitStack() as held:
            bench(args) if args.command == "bench" else run_em(args, held)
    except torch.OutOfMemoryError:
        raise Fault(2, "out of memory even with one user at a time (finished shards are kept)") from None
    except OSError as error:
        raise Fault(3, f"cannot read or write {error.filename or args.out}: {error.strerror or error} (finished shards are "
                       "kept)") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(device: str) -> str:
    """Become one of torchrun's processes, each with a GPU of its own if there are any. → the device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=7))
    return device


def whole(text: str, least: int = 1) -> int:
    """argparse type: a whole number from `least` on."""
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def real(text: str) -> float:
    """argparse type: a finite number, not negative."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number from 0 on")
    return value


if __name__ == "__main__":
    try:
        main()
    except Fault as fault:
        print(f"uip.py: {fault}", file=sys.stderr)
        sys.exit(fault.code)
    except KeyboardInterrupt:
        print("uip.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
