"""UserIP-Tuning: infer a user's latent profiles from behaviour by prompt tuning a frozen LLM with EM (inference).

    python uip.py fit   --data DIR --lm NAME_OR_DIR --out DIR        text table, codebooks and everybody's IDs
    python uip.py infer --data DIR --profiles DIR --lm … --out DIR   IDs of new users from fitted codebooks

The model, for user u with evidence texts b_1 … b_n and profiles p (hobby, background):

    θ_u^p ~ N(θ⁰, T^p)               soft token(s) in the LLM's input-embedding space; the ID is the nearest of K codes
    P(B_u | θ_u) = Π_i P_LM(value(b_i) | BOS, name_p θ_u^p for the profiles p in view(b_i), lead(b_i))

Texts are independent given θ, so at shared soft tokens θ⁰ the gradient of a user's evidence is a sum over texts. The
LLM makes one forward and backward pass per *distinct text* (the text table); EM on the sums has closed-form steps
(codebook.py), and exact EM rounds tune one prompt per code by the LLM's own likelihood.

Read on in this order: Layout → pack, collate (mask) → nll (likelihood) → score_texts → e_step → m_step → fit.
"""
from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

from codebook import Codebook, Evidence, fit_codebook, kmeans, perplexity, responsibilities, sum_texts, take_lists


# --------------------------------------------------------------------------------------------------- layout

@dataclass(frozen=True)
class Layout:
    """The fixed text around a user's soft tokens (paper, inference module), in tokens.

        BOS | name₁ θ₁ | name₂ θ₂ | lead value | lead value | …

    Every block sees BOS and, causally, itself. A name+θ block sees nothing else (own-name mask). An evidence block
    (lead value) also sees the name+θ blocks of its view, and no other evidence. Each name+θ block starts at position
    1, every evidence block right after the longest of them, so no position depends on the number of other blocks.
    """
    profiles: tuple[str, ...]                                      # P names, in the order of θ's second axis
    names: tuple[tuple[int, ...], ...]                             # P token sequences, "The user's hobby is"
    kinds: dict[str, tuple[tuple[int, ...], tuple[bool, ...], int]]   # kind → lead, view [P], most tokens of a value
    bos: int
    tokenizer: object
    m: int                                                         # soft tokens per profile
    start: int                                                     # position of an evidence block's first token
    own_names: bool = True                                         # False: the ablation without the own-name mask

    @classmethod
    def build(cls, spec: dict, tokenizer, m: int = 1, cut: int = 32, without: str = "") -> "Layout":
        """From {"profiles": {profile: name}, "kinds": {kind: {"lead": text, "view": [profile, …], "cut": tokens}}}.

        m: soft tokens per profile; cut: most tokens of a value. without: "views" (every text sees all profiles) or
        "mask" (names see earlier profiles). Raises ValueError for anything else than a layout.
        """
        bos = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
        if bos is None:
            raise ValueError("the tokenizer has neither a BOS nor an EOS token to start a sequence with")
        try:
            profiles = tuple(spec["profiles"])
            names = tuple(map(tuple, tokenizer(list(spec["profiles"].values()), add_special_tokens=False)["input_ids"]))
            layout = cls(profiles, names, {}, bos, tokenizer, m, 1 + max(map(len, names)) + m, without != "mask")
            leads = layout.encode([how["lead"] for how in spec["kinds"].values()])
            for (kind, how), lead in zip(spec["kinds"].items(), leads):
                view = tuple(p in how["view"] or without == "views" for p in profiles)
                layout.kinds[kind] = tuple(lead), view, how.get("cut", cut)
                if not (layout.kinds[kind][0] and how["view"] and set(how["view"]) <= set(profiles)):
                    raise ValueError(f"kind {kind!r} needs a lead, and a view of {', '.join(profiles)}; it has {how}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not a layout: {error!r}") from None
        return layout

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that go on after others: behind a space, whichever way the tokenizer marks one."""
        before, = self.tokenizer(["x"], add_special_tokens=False)["input_ids"]
        texts, backend = ["x " + text for text in texts], getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            found = self.tokenizer(["x", *texts], add_special_tokens=False)["input_ids"][1:]
        else:                                                          # set up by the call above; a third of its time
            found = [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [tokens[len(before):] for tokens in found]

    def kind(self, name: str) -> tuple[tuple[int, ...], tuple[bool, ...], int]:
        """Lead, view and most tokens of a value. ValueError for a kind that the layout does not know."""
        if name not in self.kinds:
            raise ValueError(f"evidence of kind {name!r}, but the layout knows only {sorted(self.kinds)}")
        return self.kinds[name]

    def only(self, view: tuple[bool, ...]) -> "Layout":
        """The layout of texts with this view, without profiles that they do not see: fewer columns, equal values."""
        pick = lambda items: tuple(item for item, seen in zip(items, view) if seen)
        kinds = {kind: (lead, pick(sees), cut) for kind, (lead, sees, cut) in self.kinds.items() if sees == view}
        return replace(self, profiles=pick(self.profiles), names=pick(self.names), kinds=kinds)

    @property
    def cached(self) -> int:
        """C, the number of columns that depend on no user: BOS and the names."""
        return 1 + sum(map(len, self.names))

    def prompt(self) -> tuple[list["Text"], list["Text"]]:
        """What stands before texts: BOS and the names, which depend on no user, and the places of θ (here BOS)."""
        P = len(self.names)
        view = [tuple(p == q or not self.own_names for q in range(P)) for p in range(P)]
        names = [Text([*name], len(name), view[p], p + 1, 1) for p, name in enumerate(self.names)]
        slots = [Text([self.bos] * self.m, self.m, view[p], p + 1, 1 + len(name)) for p, name in enumerate(self.names)]
        return [Text([self.bos], 1, (False,) * P, 0, 0), *names], slots


class Text(NamedTuple):
    """An evidence text in tokens; or BOS, a name, or the soft tokens of a profile."""
    ids: list[int]             # the lead's, then the value's
    lead: int                  # how many are the lead's; the likelihood of the others counts
    view: tuple[bool, ...]     # [P], the profiles whose names and soft tokens it sees
    block: int                 # 0 BOS, p + 1 the name and the soft tokens of profile p, P + 1 evidence
    start: int                 # position of its first token


def pack(users: list[list[tuple[str, str]]], layout: Layout) -> list[list[Text]]:
    """Evidence texts [(kind, value), …] of each user → a row each. Raises ValueError for a kind the layout lacks."""
    encoded = iter(layout.encode([value for user in users for _, value in user]))

    def in_tokens(kind: str) -> Text:
        lead, view, cut = layout.kind(kind)
        return Text([*lead, *next(encoded)[:cut]], len(lead), view, len(view) + 1, layout.start)

    return [[in_tokens(kind) for kind, _ in user] for user in users]


def length(row: list[Text]) -> int:
    """T, the number of a row's tokens."""
    return sum(len(text.ids) for text in row)


class Batch(NamedTuple):
    """Rows as tensors, on L lines of K columns: [BOS, names | θ, texts of a row | θ, texts of the next | … padding]."""
    ids: Tensor            # [L, Q] int64; Q = K − C with a prefix cache, else K
    positions: Tensor      # [L, Q] int64
    mask: Tensor           # [L, 1, Q, K] additive float in the LLM's dtype
    slots: Tensor          # [B·P·m] flat index into L × Q of the columns that θ replaces
    predict: Tensor        # [V] flat index into L × Q of the positions that predict a value token
    target: Tensor         # [V] the value token
    row: Tensor            # [V] the row that it belongs to
    prefix: list | None    # per layer (keys, values) [1, heads, C, head_dim] of BOS and names; None: not cached


def visible(piece: Tensor, row: Tensor, block: Tensor, view: Tensor) -> Tensor:
    """Own-name mask, [L, K, K] bool (query, key).

    A token sees earlier tokens of its own piece, and BOS, names and soft tokens that are in its view and belong to its
    own row or to all rows (row −1). piece, row, block: [L, K]; view: [L, K, P + 2], by block.
    """
    in_view = view.gather(2, block[:, None].expand(-1, block.shape[1], -1))                  # (L, K, K)
    mine = (row[:, None] < 0) | (row[:, :, None] == row[:, None])
    return (in_view & mine | (piece[:, :, None] == piece[:, None])).tril()


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [B, Q, K] → [B, 1, Q, K] to add to attention scores. (Eager attention reads a bool mask silently wrong.)"""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def send(tensor: Tensor, device) -> Tensor:
    """A tensor of the CPU on another device. From pinned memory, a copy does not wait for the GPU's work."""
    on_gpu = torch.device(device).type == "cuda"                       # what is not contiguous would not be pinned
    return (tensor.contiguous().pin_memory() if on_gpu else tensor).to(device, non_blocking=True)


def fetch(tensor: Tensor) -> Tensor:
    """A tensor of another device on the CPU. Into pinned memory, a copy runs at the bus's speed."""
    on_gpu = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor) if on_gpu else tensor


def collate(rows: list[list[Text]], layout: Layout, prefix: list | None = None, *, per_line: int = 1, device="cpu",
            dtype: torch.dtype = torch.float32) -> Batch:
    """Puts rows on lines, each row behind its own soft tokens, and draws the mask (paper: causal mask by blocks).

    per_line: rows on one line. No row sees another, so no value depends on it: a GPU is quick with few full lines, a
    CPU with many short ones (ours).
    """
    (fixed, slots), pieces = layout.prompt(), []                       # of all lines: (line, row, text)
    for r, row in enumerate(rows):
        if r % per_line == 0:
            pieces += [(r // per_line, -1, text) for text in fixed]
        pieces += [(r // per_line, r, text) for text in (*slots, *row)]
    tensor = lambda values: torch.from_numpy(np.array(values))         # in a third of torch.tensor's time
    size = tensor([len(text.ids) for *_, text in pieces])
    view = tensor([(True, *text.view, False) for *_, text in pieces])  # (pieces, P + 2)
    piece = torch.arange(len(pieces)).repeat_interleave(size)          # of each token: its piece
    within = torch.arange(len(piece)) - (size.cumsum(0) - size)[piece]                       # … and its place there
    line, row, block, start, lead = tensor(
        [(line, row, text.block, text.start, text.lead) for line, row, text in pieces])[piece].T
    width = torch.bincount(line)                                       # (L,)
    filled = torch.arange(int(width.max())) < width[:, None]           # (L, K)

    def pad(values: Tensor, fill: int = 0) -> Tensor:
        return torch.full(filled.shape, fill, dtype=values.dtype).masked_scatter_(filled, values)

    skip = layout.cached if prefix is not None else 0                  # cached columns are keys, not queries
    kept = lambda columns: columns[:, skip:]
    index = lambda where: kept(pad(where)).flatten().nonzero()[:, 0]   # flat, into L × Q
    tokens = tensor(list(chain.from_iterable(text.ids for *_, text in pieces)))
    label, theta = within >= lead, (row >= 0) & (block <= len(slots))
    predict = index(label) - 1                                         # the token before predicts it: no lead is empty
    batch = kept(pad(tokens, layout.bos)), kept(pad(start + within)), index(theta), predict, tokens[label], row[label]
    ids, positions, *rest = (send(tensor, device) for tensor in batch)
    piece, row, block, view = (send(tensor, device) for tensor in (pad(piece, -1), pad(row, -1), pad(block), view))
    mask = additive(kept(visible(piece, row, block, view[piece])), dtype)
    return Batch(ids, positions, mask, *rest, prefix)


# ----------------------------------------------------------------------------------------------- likelihood

@torch.no_grad()
def prefix(lm, layout: Layout) -> list:
    """Keys and values of BOS and the names, [1, heads, C, head_dim] per layer: one pass for all users and steps."""
    batch, C = collate([[]], layout, device=lm.device, dtype=lm.dtype), layout.cached
    out = lm.base_model(input_ids=batch.ids[:, :C], attention_mask=batch.mask[..., :C, :C],
                        position_ids=batch.positions[:, :C], past_key_values=DynamicCache(), use_cache=True)
    return [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def hidden(lm, batch: Batch, theta: Tensor) -> Tensor:
    """Last hidden states of the batch's columns, [L, Q, d] in the LLM's dtype, with θ [B, P, m, d] in its slots."""
    x = lm.get_input_embeddings()(batch.ids)                           # (L, Q, d)
    x = x.flatten(0, 1).index_copy(0, batch.slots, theta.flatten(0, 2).to(x.dtype)).view_as(x)
    each = lambda tensor: tensor.expand(len(x), -1, -1, -1)            # the prefix is that of every line
    cached = DynamicCache([(each(k), each(v)) for k, v in batch.prefix]) if batch.prefix is not None else None
    return lm.base_model(inputs_embeds=x, attention_mask=batch.mask, position_ids=batch.positions,
                         past_key_values=cached, use_cache=cached is not None).last_hidden_state


def nll(lm, batch: Batch, theta: Tensor, states: Tensor | None = None) -> Tensor:
    """−log P(B | θ) of each row in nats, [B] fp32, differentiable in theta [B, P, m, d].

    theta is fp32, whatever the LLM's dtype. Only value tokens count, never a lead, a name or BOS, and the head runs
    only where a value token is predicted. states: hidden(lm, batch, theta), if already there.
    """
    states = hidden(lm, batch, theta) if states is None else states
    logits = lm.get_output_embeddings()(states.flatten(0, 1)[batch.predict])                 # (V, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")         # (V,)
    return torch.zeros(len(theta), dtype=loss.dtype, device=loss.device).index_add(0, batch.row, loss)


# ----------------------------------------------------------------------------------------------- text table

class TextTable(NamedTuple):
    """What the LLM says of each distinct text at the shared soft tokens θ⁰."""
    nll: Tensor            # [T] fp32, nats
    tokens: Tensor         # [T] fp32, number of value tokens
    gradient: Tensor       # [T, P, m·d] fp32, of nll in θ; 0 for profiles outside the text's view
    hidden: Tensor         # [T, d] fp32, Σ of the last hidden states of the value tokens (the untuned LLM)


def shared_prompt(lm, m: int) -> Tensor:
    """θ⁰ of one profile, [m, d] fp32 on the CPU: the mean vocabulary embedding."""
    return lm.get_input_embeddings().weight.float().mean(0).cpu().repeat(m, 1)


def batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of rows, sorted by length, in groups of at most `budget` padded tokens (at least one row each)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def auto_budget(lm) -> int:
    """Tokens in one pass: 1,024 on a CPU; on a GPU as many as fit, forward and backward, into half its free memory."""
    if lm.device.type != "cuda":
        return 1024
    layers, width, size = lm.config.num_hidden_layers, lm.config.hidden_size, lm.dtype.itemsize
    per_token = 16 * layers * width * size + 10 * lm.config.vocab_size             # measured: results/bench/gpu.json
    idle = torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)    # kept by torch for later
    return max(1024, min(65536, (torch.cuda.mem_get_info(lm.device)[0] + idle) // 2 // per_token))


def run_batches(lengths: list[int], budget: int, run) -> None:
    """run(indices) for all batches; where memory runs out, the rest goes on with half the budget."""
    todo = batches(lengths, budget)
    while todo:
        try:
            run(todo[0])
            todo.pop(0)
        except (RuntimeError, MemoryError) as error:
            short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
                words in str(error) for words in ("allocate memory", "bad_alloc", "ALLOC_FAILED"))
            if not short or len(todo[0]) == 1:
                raise
            rest, budget = sum(todo, []), max(1, budget // 2)
            print(f"out of memory: continuing with {budget} tokens in one pass", file=sys.stderr)
            todo = [[rest[i] for i in group] for group in batches([lengths[u] for u in rest], budget)]


def rows_by_view(layout: Layout, texts: list[tuple[str, str]]):
    """Yields for each view: (indices of its texts, their packed rows, the layout of its profiles, its profiles)."""
    groups = {}
    for i, (kind, _) in enumerate(texts):
        groups.setdefault(layout.kind(kind)[1] if layout.own_names else (True,) * len(layout.names), []).append(i)
    for view, members in groups.items():
        part = layout.only(view) if layout.own_names else layout
        seen = [p for p, sees in enumerate(view) if sees]
        yield torch.tensor(members), pack([[texts[i]] for i in members], part), part, seen


def score_texts(lm, layout: Layout, texts: list[tuple[str, str]], theta: Tensor | None = None, *, budget: int = 1024,
                columns: int | None = None, tick=lambda texts: None) -> TextTable:
    """One forward and backward pass per text (ours: gradients of users are sums over their texts).

    texts: [(kind, value), …], each once. theta: [P, m, d] soft tokens, θ⁰ by default. budget: padded tokens in one
    pass (at most one line more), halved when memory runs out. columns: length of a line that several texts share, by
    default 64 on a GPU, and one text a line on a CPU. Raises ValueError where the likelihood is not finite or a text
    exceeds the LLM's context.
    """
    P, m, d, T = len(layout.names), layout.m, lm.get_input_embeddings().embedding_dim, len(texts)
    theta = (shared_prompt(lm, m).repeat(P, 1, 1) if theta is None else theta).to(lm.device)             # (P, m, d)
    columns = columns or (64 if lm.device.type == "cuda" else 1)
    blank = lambda *shape: torch.zeros(shape, device=lm.device)
    table = TextTable(blank(T), torch.zeros(T), blank(T, P, m * d), blank(T, d))
    for members, rows, part, seen in rows_by_view(layout, texts):
        cache, start = prefix(lm, part), theta[seen]
        check_rows(lm, part, rows)
        lengths = [length(row) + m * len(part.names) for row in rows]
        table.tokens[members] = torch.tensor([float(len(text.ids) - text.lead) for text, in rows])

        def run(indices: list[int]) -> None:
            batch = collate([rows[i] for i in indices], part, cache, per_line=max(1, columns // lengths[indices[0]]),
                            device=lm.device, dtype=lm.dtype)
            at = send(members[indices], lm.device)
            x = start.expand(len(indices), -1, -1, -1).contiguous().requires_grad_()
            states = hidden(lm, batch, x)
            value = nll(lm, batch, x, states)
            grad, = torch.autograd.grad(value.sum(), x)                # (B, P of the view, m, d)
            after = states.detach().flatten(0, 1)[batch.predict + 1].float()                 # (V, d)
            table.nll[at] = value.detach().float()
            table.hidden[at] = blank(len(indices), d).index_add(0, batch.row, after)
            for column, p in enumerate(seen):
                table.gradient[at, p] = grad[:, column].flatten(1).float()
            tick(len(indices))

        run_batches(lengths, budget, run)
    if not (table.nll.isfinite().all() and table.gradient.isfinite().all()):
        raise ValueError(f"likelihood or gradient is not finite in {lm.dtype}: try --dtype bfloat16 or float32")
    return TextTable(*map(fetch, table))


@torch.no_grad()
def score_reversed(lm, layout: Layout, texts: list[tuple[str, str]], *, budget: int = 1024,
                   tick=lambda texts: None) -> Tensor:
    """Behaviour first, then the profile's name: hidden states after "BOS lead value name_p" times value tokens.

    The direction that the paper argues against, as a control. → [T, P, d] fp32; 0 for profiles outside the view.
    """
    table = torch.zeros(len(texts), len(layout.names), lm.get_input_embeddings().embedding_dim, device=lm.device)
    for members, rows, part, seen in rows_by_view(layout, texts):
        for name, p in zip(part.names, seen):
            whole = [[layout.bos, *text.ids, *name] for text, in rows]

            def run(indices: list[int]) -> None:                       # right-padded, so the plain causal mask will do
                ids, scored = [torch.tensor(whole[i]) for i in indices], [rows[i][0] for i in indices]
                x = pad_sequence(ids, batch_first=True, padding_value=layout.bos).to(lm.device)
                states = lm.base_model(input_ids=x, use_cache=False).last_hidden_state
                last = states[torch.arange(len(ids)), torch.tensor([len(one) - 1 for one in ids])].float()
                tokens = torch.tensor([len(text.ids) - text.lead for text in scored]).to(last)
                table[members[indices].to(lm.device), p] = last * tokens[:, None]
                tick(len(indices) / len(part.names))

            run_batches([len(ids) for ids in whole], budget, run)
    return fetch(table)


def check_rows(lm, layout: Layout, rows: list[list[Text]]) -> None:
    """ValueError unless the LLM is frozen, knows every token, and reads each text with its prompt in one context."""
    if any(weight.requires_grad for weight in lm.parameters()):
        raise ValueError("exactly one tensor trains, θ: freeze the LLM first, lm.requires_grad_(False)")
    highest, known = max((max(text.ids) for row in rows for text in row), default=0), lm.get_input_embeddings()
    if highest >= known.num_embeddings:
        raise ValueError(f"the tokenizer gives a token {highest}, but the LLM knows only {known.num_embeddings}: they "
                         "do not belong together")
    longest = layout.start + max((len(text.ids) for row in rows for text in row), default=0)
    context = getattr(lm.config, "max_position_embeddings", None)
    if context and longest > context:
        raise ValueError(f"an evidence text needs {longest} tokens with its prompt, but the LLM reads {context}")


# ------------------------------------------------------------------------------------------------------- EM

def e_step(value: Tensor, pi: Tensor, indptr: Tensor, text: Tensor) -> tuple[Tensor, float]:
    """Exact E-step: P(code | evidence) ∝ π_k Π_i P_LM(b_i | μ_k), and F = Σ_u log Σ_k π_k P(B_u | μ_k).

    value: [T, K] −log P of each text under each code's prompt; pi: [K]; indptr [N + 1], text [nnz]: each user's texts.
    → responsibilities [N, K] fp64, F in nats.
    """
    joint = pi.double().log() - sum_texts(indptr, text, value.double())                      # (N, K)
    return joint.softmax(1), float(joint.logsumexp(1).sum())


def m_step(adam: torch.optim.Optimizer, prompts: Tensor, gradient: Tensor, r: Tensor, indptr: Tensor,
           text: Tensor) -> Tensor:
    """Exact M-step: π, and one step of Adam on Σ_t w_tk log P_LM(t | μ_k), w_tk = Σ_u r_uk · (times u has text t).

    prompts: [K, m·d], updated in place; gradient: [K, T, m·d] of each text's NLL under each prompt; r: [N, K]. → π [K]
    """
    w = torch.zeros(gradient.shape[1], r.shape[1], dtype=r.dtype)
    w.index_add_(0, text, r.repeat_interleave(indptr.diff(), 0))                             # (T, K)
    prompts.grad = torch.einsum("tk,ktd->kd", w.float(), gradient) / w.sum(0)[:, None].clamp_min(1).float()
    adam.step()
    return (r.mean(0) + 1e-12) / (1 + 1e-12 * r.shape[1])


class Fitted(NamedTuple):
    """One profile, fitted."""
    book: Codebook
    r: Tensor              # [N, K] fp64 responsibilities; π for users without evidence
    n: Tensor              # [N] fp64, value tokens told of this profile
    F: list[float]         # objective after each exact round (empty without them); never falls
    prompts: Tensor | None # [K, m·d] the codes' soft tokens after exact rounds


def fit(evidence: Evidence, user: Tensor, item: Tensor, users: int, k: int, *, directions: int = 16, seed: int = 0,
        without: str = "", rounds: int = 0, lr: float = 0.02, score=None, start: Tensor | None = None,
        log=print) -> Fitted:
    """EM for one profile (paper, inference and quantisation modules).

    evidence: texts of R rows with their gradients as values and value tokens as weights; user, item: [R], sorted by
    user. The closed-form EM finds directions, codes and responsibilities. rounds: exact EM rounds from there, for
    which score(prompt [m·d]) gives (nll [T], gradient [T, m·d]) of all texts, and start [m·d] is θ⁰. A step that
    would lower F is taken back and halved.
    """
    book, z, n = fit_codebook(evidence, user, item, users, k, directions=directions, seed=seed, without=without)
    r = responsibilities(book, z, n)
    if not rounds:
        return Fitted(book, r, n, [], None)
    indptr, text = take_lists(evidence.indptr, evidence.text, evidence.told)
    indptr = indptr[torch.searchsorted(user, torch.arange(users + 1))]                       # each user's texts
    known = n > 0
    total = sum_texts(indptr, text, evidence.value).double()[known]    # (users with evidence, m·d)
    mean = torch.stack([(share @ total) / (share @ n[known]) for share in r[known].T.contiguous()])      # per token
    downhill = -(mean - book.mean)
    step = lr * math.sqrt(downhill.shape[1]) / downhill.norm(dim=1, keepdim=True).clamp_min(1e-12)
    prompts = torch.nn.Parameter((start + step * downhill).float())    # as long a first step as one of Adam
    adam, history, best, pi = torch.optim.Adam([prompts], lr=lr), [], None, book.pi
    for round in range(rounds + 1):
        scored = [score(prompt) for prompt in prompts.detach()]
        value, gradient = torch.stack([one[0] for one in scored], 1), torch.stack([one[1] for one in scored])
        r_new, F = e_step(value, pi, indptr, text)
        if history and F < history[-1]:                                # take the step back, halve it
            adam.param_groups[0]["lr"] /= 2
            log(f"exact round {round}: F would fall to {F:.2f}; step halved")
            prompts.data.copy_(best[0])
            value, gradient, r_new, F, pi = best[1:]
        else:
            log(f"exact round {round}: F {F:.2f}")
        best, r = (prompts.detach().clone(), value, gradient, r_new, F, pi), r_new
        history.append(F)
        if round < rounds:
            pi = m_step(adam, prompts, gradient, r, indptr, text)
    return Fitted(book._replace(pi=pi), r, n, history, best[0])


def tune_users(lm, layout: Layout, rows: list[list[Text]], theta: Tensor, *, steps: int = 3, lr: float = 0.02,
               budget: int = 1024, tick=lambda users: None) -> tuple[Tensor, Tensor]:
    """Per-user prompt tuning, as the paper describes it, our reference: `steps` of Adam on each user's own θ.

    rows: B packed users with evidence; theta: [B, P, m, d] where they start. Keeps each user's best iterate.
    → (theta [B, P, m, d], nll [B]); no user's NLL is worse than at the start. The text table replaces it: the first
    gradient of a user is the sum of the user's text gradients.
    """
    check_rows(lm, layout, rows)
    start, theta, best_nll, cache = theta, theta.clone(), torch.full((len(rows),), math.inf), prefix(lm, layout)

    def climb(users: list[int]) -> None:
        batch = collate([rows[u] for u in users], layout, cache, device=lm.device, dtype=lm.dtype)
        x = start[users].to(lm.device).requires_grad_()
        adam = torch.optim.Adam([x], lr=lr)
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps):
                value = nll(lm, batch, x)
            now = value.detach().float().cpu()
            better = (now < best_nll[users]).nonzero().flatten()
            found = [users[i] for i in better.tolist()]
            theta[found], best_nll[found] = x.detach()[better.to(x.device)].cpu(), now[better]
            if step < steps:
                x.grad, = torch.autograd.grad(value.sum(), x)
                adam.step()
        if not (best_nll[users].isfinite().all() and x.isfinite().all()):
            raise ValueError(f"likelihood or gradient is not finite in {lm.dtype}: try --dtype bfloat16 or float32")
        tick(len(users))

    run_batches([length(row) for row in rows], budget, climb)
    return theta, best_nll


# ------------------------------------------------------------------------------------------------------ LLM

def load_lm(name: str, dtype: str = "float32", device: str = "auto", random: bool = False):
    """A frozen causal LM and its tokenizer: (lm, tokenizer).

    name: folder, or hub id (its cached copy, if there is one). dtype: of the weights; IDs of float32 are the same on
    all processors that were tried, others depend on the hardware. auto: the GPU if there is one. random: untrained
    weights, seed 1 (ablation). Raises FileNotFoundError (no such folder), OSError (hub out of reach, gated or unknown
    id) or ValueError (no causal LM, weights missing, an architecture that reads packed rows wrongly, no such device).
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = lm_folder(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    how = {"dtype": getattr(torch, dtype),                             # sdpa's backward under a mask is slow on CPUs
           "attn_implementation": "eager" if device == "cpu" else None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if random:
            torch.manual_seed(1)
            lm, info = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **how), {}
        else:
            lm, info = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, output_loading_info=True,
                                                            ignore_mismatched_sizes=True, **how)    # named below
    except Exception as error:                                         # whatever is wrong with the folder
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"--lm {name}: the folder holds no causal LM with tokenizer and safetensors "
                         f"({reason})") from None
    absent = sorted({*info.get("missing_keys", ()), *(key[0] for key in info.get("mismatched_keys", ()))})
    if absent:
        raise ValueError(f"--lm {name}: its weights lack, or have in another size, {', '.join(absent[:5])}"
                         f"{f' and {len(absent) - 5} more' if len(absent) > 5 else ''}: get the folder again")
    lm = lm.to(device).eval().requires_grad_(False)
    check_lm(lm)
    return lm, tokenizer


LM_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def lm_folder(name: str) -> Path:
    """The folder of an LLM: itself, or the hub's snapshot. A cached snapshot is used without asking the network."""
    if os.path.isdir(name):
        return Path(name)
    if os.path.isfile(name):
        raise FileNotFoundError(f"--lm {name} is a file: give its folder, with config, tokenizer and safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".safetensors", ".gguf", ".bin")):
        raise FileNotFoundError(f"--lm {name}: there is no such folder "
                                "(a folder with config, tokenizer and safetensors is needed)")
    from huggingface_hub import errors, snapshot_download
    files = {"allow_patterns": LM_FILES, "ignore_patterns": ["*/*"]}
    try:
        cached = Path(snapshot_download(name, local_files_only=True, **files))
        if has_weights(cached):                                        # not what an interrupted download left
            return cached
    except Exception:                                                  # nothing is cached
        pass
    print(f"downloading {name} from the hub", file=sys.stderr)
    try:
        return Path(snapshot_download(name, etag_timeout=8, **files))
    except errors.GatedRepoError as error:
        raise PermissionError(f"--lm {name}: access is refused. Accept its terms on its hub page, then log in with "
                              f"`hf auth login` or set HF_TOKEN ({str(error).splitlines()[0]})") from None
    except Exception as error:                                         # each version of the hub client has other errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if any(word in str(error) for word in ("401", "403")):
            reason += "; log in with `hf auth login` or set HF_TOKEN"
        raise ConnectionError(f"--lm {name}: not to be had from the hub: wrong id, or no network? A local folder "
                              f"works, such as `python data.py lm --out DIR` makes ({reason})") from None


def has_weights(folder: Path) -> bool:
    """True if a folder holds a configuration and all files of the weights."""
    index, files = folder / "model.safetensors.index.json", {"config.json", "model.safetensors"}
    if index.exists():
        files = {"config.json", *json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    return all((folder / file).exists() for file in files)


def check_device(device: str) -> None:
    """ValueError unless torch can use this device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not here: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def check_lm(lm) -> None:
    """ValueError for an LM that reads a packed row otherwise than its texts one by one (ALiBi, local windows, …)."""
    layout = Layout(("a", "b"), names=((4, 5), (6, 7)), kinds={}, bos=1, tokenizer=None, m=2, start=5)
    texts = [Text([8, i, i + 1, i + 2], 1, (True, False), 3, layout.start) for i in range(10, 26)]
    texts += [Text([9, 8, i, i + 2], 2, (False, True), 3, layout.start) for i in range(30, 40)]
    theta = lm.get_input_embeddings().weight[10:14].float().reshape(1, 2, 2, -1)
    ids = torch.arange(3, 43, device=lm.device)[None]
    causal = additive(torch.ones(1, 40, 40, dtype=torch.bool, device=lm.device).tril(), lm.dtype)
    total = lambda rows, cache: float(nll(lm, collate(rows, layout, cache, device=lm.device, dtype=lm.dtype),
                                          theta.expand(len(rows), -1, -1, -1)).sum())
    value = lambda logits: float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
    try:
        states = lm.base_model(input_ids=ids, attention_mask=causal, use_cache=False).last_hidden_state
        pairs = ((total([3 * texts], prefix(lm, layout)), 3 * total([[text] for text in texts], None)),
                 (value(lm.get_output_embeddings()(states)), value(lm(input_ids=ids, use_cache=False).logits)))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"a {lm.config.model_type} LM is not supported ({error})") from None
    if not math.isfinite(sum(map(sum, pairs))):
        raise ValueError(f"the likelihood is not finite in {lm.dtype}: try --dtype bfloat16 or float32; if it is not "
                         "finite there, the weights are damaged")
    for ours, plain in pairs:      # packed (longer than a usual local window, 256) and alone; our causal mask, its own
        if not math.isclose(ours, plain, rel_tol=1e-4 if lm.dtype == torch.float32 else 5e-3):
            raise ValueError(f"a {lm.config.model_type} LM is not supported: it reads a packed row otherwise than its "
                             f"texts one by one (−log P {ours:.3f} and {plain:.3f})")


# ---- command line

try:
    import data
    from codebook import (MEASUREMENT, Profiles, code_sizes, profile_evidence, read_profiles, read_table, sample_hash,
                          table_hash, write_profiles, write_table)
except ImportError:                                                    # copied alone: all but the commands works
    data = None

TABLE_VERSION = 1                                                      # raise it when score_texts changes its values
IN_TABLE = ("views", "mask", "pretraining")                            # ablations that need a text table of their own
IN_QUANTISER = ("em", "kmeans", "signal")                              # … that change what follows


def lm_identity(name: str, random: bool = False) -> dict:
    """What tells an LLM from any other, without loading it: data.py's note or its name, and a hash of its files."""
    folder, sha = lm_folder(name), hashlib.sha256()
    noted = data.read_json(folder / "source.json") if (folder / "source.json").exists() else {"name": name}
    for file in sorted({file for pattern in LM_FILES for file in folder.glob(pattern)} - {folder / "source.json"}):
        sha.update(f"{file.name} {sample_hash(file)}\n".encode())
    return {**noted, "fingerprint": sha.hexdigest()[:16], **({"weights": "random"} if random else {})}


def rank_and_world_size() -> tuple[int, int]:
    """This process among those of torchrun; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Waits for the other processes of torchrun."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as error:
            raise data.CommandError(3, "another process of this run has died: see its message, then run the same "
                                       f"command again, which resumes ({str(error).splitlines()[0]})") from None


def init_distributed(device: str) -> str:
    """Joins the processes of torchrun, each with a GPU of its own if there are any. → the device."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise data.CommandError(2, f"WORLD_SIZE is set but {', '.join(missing)} is not: start with torchrun, "
                                   "or unset WORLD_SIZE")
    numbers = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    if not all(map(str.isdecimal, numbers.values())) or int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        raise data.CommandError(2, f"these are no settings of torchrun: {numbers}. Start with torchrun, "
                                   "or unset WORLD_SIZE")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
        torch.cuda.set_device(device)
    print("process {RANK} of {WORLD_SIZE} waits for the others".format(**numbers), file=sys.stderr)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=2)))
    except (RuntimeError, ValueError) as error:
        raise data.CommandError(3, "the other processes did not answer in time "
                                   f"({str(error).splitlines()[0]}): start all of them with torchrun") from None
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timedelta(days=7))
    return device


def load_or_compute(path: Path, compute) -> list[np.ndarray]:
    """The arrays of `path` where an earlier run left them whole, else compute()'s, left there for the next run."""
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as found:           # zip members carry their own checksums
                return [found[f"arr_{i}"] for i in range(len(found.files))]
        except Exception as error:                                     # whatever damage makes numpy and zipfile raise
            print(f"{path} is damaged ({error}): computed again", file=sys.stderr)
    arrays = [tensor.numpy() for tensor in compute()]
    data.write_atomically(path, lambda file: np.savez(file, *arrays))
    return arrays


def all_parts(args, folder: Path, name: str, items: list, compute) -> list[np.ndarray]:
    """Arrays of all items by compute(part, tick), a file per part: this process's share is made, the others' read."""
    rank, world = rank_and_world_size()
    parts = [items[i:i + args.part] for i in range(0, len(items), args.part)]
    files = [folder / f"{name}_{i:05d}.npz" for i in range(len(parts))]
    with tqdm(total=len(items), desc=name, delay=2, disable=rank > 0) as bar:
        bar.update(sum(len(part) for part, file in zip(parts, files) if file.exists()))
        for i in range(rank, len(parts), world):
            load_or_compute(files[i], lambda: compute(parts[i], bar.update))
        barrier()
        found = [load_or_compute(file, lambda: compute(part, bar.update)) for file, part in zip(files, parts)]
    barrier()                                                          # until then no process removes a file
    return [np.concatenate(columns) for columns in zip(*found)]


def claim_folder(args, folder: Path, settings: dict) -> None:
    """Makes `folder` this run's own: parts of another run are refused, or dropped with --restart."""
    if rank_and_world_size()[0] == 0:
        settings = {**settings, "part": args.part, "dtype": args.dtype, "code": data.sha256_of(Path(__file__))}
        data.claim(folder / "settings.json", settings, list(folder.glob("*_[0-9]*.npz")), args.restart)
        data.write_json(folder / "settings.json", settings)
    barrier()


def model_when_needed(args, layout: dict):
    """A function that gives the LLM, loaded when it is first called (a finished text table needs none), and Layout."""
    load = functools.cache(lambda: load_lm(args.lm, args.dtype or "float32", args.device,
                                           random=args.without == "pretraining"))
    return lambda: (load()[0], Layout.build(layout, load()[1], m=args.tokens, without=args.without))


def table_identity(args, layout: dict, texts: list[tuple[str, str]]) -> dict:
    """What the values of a text table depend on, but for the dtype, which is known once the LLM is loaded."""
    lm = lm_identity(args.lm, args.without == "pretraining")
    return {"version": TABLE_VERSION, "layout": layout, "tokens": args.tokens,
            "without": args.without if args.without in IN_TABLE else "",
            "lm": {key: lm[key] for key in ("fingerprint", "weights") if key in lm},
            "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


def is_same_table(stored: dict, wanted: dict, dtype: str | None) -> bool:
    """True if the identity `stored` is the one wanted; without a dtype, a table of any dtype will do."""
    return {**stored, "dtype": ""} == {**wanted, "dtype": ""} and dtype in (None, stored.get("dtype"))


def text_table(args, model, folder: Path, layout: dict,
               texts: list[tuple[str, str]]) -> tuple[dict[str, np.ndarray], dict]:
    """The text table in `folder`, made unless it is there for these texts, this layout, LLM and dtype: arrays, meta.

    The array "reversed" is made where it is asked for (args.reversed). One run at a time makes a table in a folder.
    """
    identity, first = table_identity(args, layout, texts), rank_and_world_size()[0] == 0
    log, leftovers = print if first else lambda text: None, lambda: folder.glob("*_[0-9]*.npz")
    data.refuse_others(folder, "gradient.npy")
    with data.exclusive_lock(folder / ".lock") if first else nullcontext():
        if (folder / "meta.json").exists():
            try:
                arrays, meta = read_table(folder)
                for part in leftovers() if first else ():              # of a run killed after it wrote meta.json
                    part.unlink()
                same = is_same_table(meta["identity"], identity, args.dtype)
                if same and ("reversed" in arrays or not args.reversed):
                    log(f"text table of {len(texts)} texts: up to date")
                    return arrays, meta
                log("the text table is made again: the one there has other texts, LLM, layout, settings or dtype")
            except ValueError as error:
                log(f"the text table is made again: {error}")
        claim_folder(args, folder, identity)                           # waits until all processes have read meta.json
        if first:
            (folder / "meta.json").unlink(missing_ok=True)
        (lm, layout), began = model(), time.time()
        gc.set_threshold(100_000)                                      # a GPU would wait for Python's collector
        log(f"text table: {len(texts)} texts to score with {args.lm}, {str(lm.dtype)[6:]} on {lm.device}")
        budget = args.budget or auto_budget(lm)
        arrays = dict(zip(TextTable._fields, all_parts(args, folder, "texts", texts, lambda part, tick: score_texts(
            lm, layout, part, budget=budget, tick=tick))))
        if args.reversed:
            arrays["reversed"], = all_parts(args, folder, "reversed", texts, lambda part, tick: [score_reversed(
                lm, layout, part, budget=budget, tick=tick)])
        if first:
            data.write_text(folder / "texts.jsonl", "".join(f"{json.dumps(text)}\n" for text in texts))
            write_table(folder, arrays, {
                "identity": {**identity, "dtype": str(lm.dtype)[6:]},
                "lm": lm_identity(args.lm, args.without == "pretraining"), "seconds": round(time.time() - began, 1),
                "value_tokens": float(arrays["tokens"].sum())})
            for part in leftovers():
                part.unlink()
        barrier()
        return read_table(folder)


def training_texts(source, kinds: list[str] | None) -> tuple[np.ndarray, tuple]:
    """The training rows [r], and what they tell: told [r], indptr, text, as of `data.row_texts`."""
    train = source.part == 0
    told, indptr, text = data.row_texts(source, train, kinds)
    if not np.diff(indptr)[told[train]].any():
        raise ValueError(f"no training row of {source.name} tells a text, so there is nothing to infer IDs from")
    return np.flatnonzero(train), (told[train], indptr, text)


def command_fit(args) -> None:
    """Text table, codebooks and the IDs of all users of --data, from their training rows."""
    began, out, source = time.time(), Path(args.out), data.read_data(args.data)
    if args.without in MEASUREMENT and (args.exact_rounds or args.exact_users):
        raise data.CommandError(2, "--exact-rounds and --exact-users need gradients, "
                                   f"which --without {args.without} replaces")
    if args.exact_users and (args.exact_rounds or args.reversed or args.without in IN_QUANTISER):
        raise data.CommandError(2, "--exact-users tunes each user's own soft tokens: --exact-rounds, --reversed "
                                   f"and --without {', '.join(IN_QUANTISER)} have no meaning there")
    for flag, used, where in (
            ("steps", args.exact_users, "without --exact-users"),
            ("lr", args.exact_users or args.exact_rounds, "without --exact-rounds or --exact-users"),
            ("table", not args.exact_users, "with --exact-users"),
            ("directions", not args.exact_users, "with --exact-users")):
        if getattr(args, flag) is not None and not used:
            raise data.CommandError(2, f"--{flag} has no meaning {where}")
    args.steps, args.directions, args.lr = args.steps or 3, args.directions or 16, 0.02 if args.lr is None else args.lr
    args.reversed, place = args.reversed or args.without == "causality", Path(args.table or out / "table")
    if place.resolve() == out.resolve():
        raise data.CommandError(2, "--table must be another folder than --out")
    names = list(source.layout["profiles"])
    if len(args.codes) != len(names):
        raise data.CommandError(2, f"--codes: {len(args.codes)} numbers for {len(names)} profiles, {', '.join(names)}")
    rows, lists = training_texts(source, args.kinds)
    for name in names if args.kinds and not args.exact_users else ():
        speak = [kind for kind, how in source.layout["kinds"].items() if name in how["view"]]
        if not set(speak) & set(args.kinds):
            raise data.CommandError(2, f"--kinds {','.join(args.kinds)} leaves nothing that speaks for {name}: add one "
                                       f"of {', '.join(speak)}")
    user, item = (torch.from_numpy(column[rows]).long() for column in (source.user, source.x[:, 1]))
    model = model_when_needed(args, source.layout)
    if args.exact_users:
        ids, probability, books = exact_users(args, model, source, lists, user, out)
    else:
        table, about = text_table(args, model, place, source.layout, source.texts)
        args.dtype = about["identity"].get("dtype", args.dtype)        # exact rounds go on in the table's
    if rank_and_world_size()[0] > 0:
        return
    trace, fitted, prompts, origin = {}, [], {}, {}
    if not args.exact_users:
        origin = {"table": os.path.relpath(os.path.realpath(place), os.path.realpath(out)),
                  "table_sha256": table_hash(about["identity"])}
        for p, (name, k) in enumerate(zip(names, args.codes)):
            evidence = profile_evidence(source, table, lists, p, args.without)
            score = prompt_scorer(args, model, source, evidence, p) if args.exact_rounds else None
            start = shared_prompt(model()[0], args.tokens).flatten() if args.exact_rounds else None
            found = fit(evidence, user, item, len(source.users), k, directions=args.directions, seed=args.seed,
                        without=args.without, rounds=args.exact_rounds, lr=args.lr, score=score, start=start)
            fitted.append(found)
            trace[name] = report_fit(name, found)
        ids, probability = most_probable([one.r for one in fitted], [one.n for one in fitted])
        books = [one.book for one in fitted]
        prompts = {f"prompts_{p}": one.prompts.numpy() for p, one in enumerate(fitted) if one.prompts is not None}
    keys = ("codes", "directions", "tokens", "seed", "without", "kinds", "exact_rounds", "exact_users")
    write_profiles(out, Profiles(source.users, ids, probability, names, books, {
        "command": "fit", "settings": {key: getattr(args, key) for key in keys},
        "lm": lm_identity(args.lm, args.without == "pretraining"),
        "data": source.name, "data_sha256": source.meta["sha256"], "layout": source.layout, "trace": trace, **origin,
        "code_sha256": data.sha256_of(Path(__file__)), "run": data.run_facts(began, "uip.py")}), prompts)


def most_probable(r: list[Tensor], n: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """IDs [N, P], −1 without evidence, and their probability, from each profile's responsibilities and evidence."""
    known = torch.stack(n, 1) > 0
    probability, ids = (torch.stack(column, 1) for column in zip(*(one.max(1) for one in r)))
    return torch.where(known, ids, -1).numpy(), torch.where(known, probability, 0).numpy()


def report_fit(name: str, found: Fitted) -> dict:
    """Prints what EM found for one profile, and returns it for meta.json."""
    known = found.n > 0
    ids, sure = found.r[known].argmax(1), found.r[known].max(1).values
    k, history = len(found.book.pi), found.book.history
    used = torch.bincount(ids, minlength=k).tolist()
    entry = {"usage": used, "perplexity": perplexity(ids, k), "log_likelihood": history, "F": found.F,
             "eigenvalues": [round(float(v), 4) for v in found.book.eigenvalues[:16]], "chance": found.book.chance,
             "directions": found.book.directions.shape[1], "unsure": float((sure < 0.5).double().mean())}
    climb = f"log-likelihood {history[0]:.1f} → {history[-1]:.1f} in {len(history)} rounds, " if history else ""
    print(f"{name}: {entry['directions']} directions (signal over noise "
          f"{', '.join(f'{v:.2f}' for v in entry['eigenvalues'][:4])} …; chance {found.book.chance:.2f}), {climb}"
          f"codes {'/'.join(map(str, used))} (perplexity {entry['perplexity']:.2f}), "
          f"{entry['unsure']:.0%} of the users under 50 % sure, {int((~known).sum())} without evidence")
    if k > 1 and entry["perplexity"] < 1.5:
        print(f"WARNING: the codebook of {name} has collapsed (perplexity {entry['perplexity']:.2f}): "
              "nearly all users share one ID")
    return entry


def prompt_scorer(args, model, source, evidence: Evidence, p: int):
    """score(prompt [m·d]) → (nll [T], gradient [T, m·d]) of profile p's texts, with the other profiles at θ⁰."""
    lm, layout = model()
    used = torch.unique(take_lists(evidence.indptr, evidence.text, evidence.told)[1])
    theta = shared_prompt(lm, args.tokens).repeat(len(layout.names), 1, 1)
    bar = tqdm(desc="exact rounds", total=len(used) * args.codes[p] * (args.exact_rounds + 1), unit="text", delay=2)

    def score(prompt: Tensor) -> tuple[Tensor, Tensor]:
        theta[p] = prompt.reshape(args.tokens, -1)
        texts = [source.texts[i] for i in used.tolist()]
        table = score_texts(lm, layout, texts, theta, budget=args.budget or auto_budget(lm), tick=bar.update)
        value, gradient = torch.zeros(len(evidence.value)), torch.zeros(len(evidence.value), prompt.numel())
        value[used], gradient[used] = table.nll, table.gradient[:, p]
        return value, gradient

    return score


def exact_users(args, model, source, lists, user: Tensor, out: Path):
    """IDs by per-user prompt tuning and k-means, the reference for small sets: ids and probability [N, P], books."""
    told, *texts = (torch.from_numpy(array).long() for array in lists)
    indptr, text = (array.numpy() for array in take_lists(*texts, told))
    lm, layout = model()
    N, P = len(source.users), len(layout.names)
    by_user = indptr[np.searchsorted(user.numpy(), np.arange(N + 1))]
    active = [u for u in range(N) if by_user[u] < by_user[u + 1]]
    start = shared_prompt(lm, args.tokens).repeat(P, 1, 1)
    claim_folder(args, out, {"data": source.meta["sha256"], "lm": lm_identity(args.lm), "steps": args.steps,
                             "lr": args.lr, "tokens": args.tokens, "without": args.without, "kinds": args.kinds})

    def tune(part: list[int], tick):
        rows = pack([[source.texts[t] for t in text[by_user[u]:by_user[u + 1]]] for u in part], layout)
        return tune_users(lm, layout, rows, start.expand(len(part), -1, -1, -1), steps=args.steps, lr=args.lr,
                          budget=args.budget or auto_budget(lm), tick=tick)

    theta, value = map(torch.from_numpy, all_parts(args, out, "users", active, tune))        # (active, P, m, d)
    ids, books, blank = np.full((N, P), -1), [], torch.zeros(0, dtype=torch.float64)
    for p, k in enumerate(args.codes):
        found = kmeans(theta[:, p].flatten(1), min(k, len(active)), generator=torch.Generator().manual_seed(args.seed))
        ids[active, p] = found.ids.numpy()
        share = torch.bincount(found.ids, minlength=len(found.centroids)).double() / len(active)
        books.append(Codebook(blank, blank, blank, blank, share, found.centroids.double(), blank, blank, 0.0, []))
    if rank_and_world_size()[0] == 0:
        print(f"per-user tuning: −log P(B|θ) {value.double().sum():.2f} over {len(active)} users")
        for part in out.glob("users_[0-9]*.npz"):
            part.unlink()
    return ids, (ids >= 0).astype(np.float32), books


def command_infer(args) -> None:
    """IDs of the users of --data from their training rows by the codebooks of --profiles; the LLM reads new texts."""
    began, out, given, source = time.time(), Path(args.out), Path(args.profiles), data.read_data(args.data)
    if given.resolve() == out.resolve():
        raise data.CommandError(2, "infer: --out must not be --profiles, whose codebook stays as it is")
    profiles = read_profiles(given)
    settings = profiles.meta["settings"]
    if settings["exact_users"] or settings["exact_rounds"]:
        raise data.CommandError(2, f"{given} was made with --exact-users or --exact-rounds, which have no "
                                   "closed form for new users: fit without them")
    if "table" not in profiles.meta:
        raise data.CommandError(2, f"{given} was made by infer: pass the folder that fit made")
    if profiles.meta["layout"] != source.layout:
        raise ValueError(f"{given} and {args.data} have different layouts: IDs mean something only with the texts of "
                         "their codebook")
    args.tokens, args.without = settings["tokens"], settings["without"]
    args.reversed = args.without == "causality"
    rows, lists = training_texts(source, settings["kinds"])
    known = given / profiles.meta["table"]
    table, about = read_table(known)
    with open(known / "texts.jsonl", encoding="utf-8") as lines:
        texts = [tuple(json.loads(line)) for line in lines]
    needed, stored = table_identity(args, source.layout, texts), about["identity"]
    if not is_same_table(stored, {**needed, "texts": stored["texts"]}, args.dtype):
        raise ValueError(f"{given} was made with another LLM, layout or --dtype: IDs mean something only with those of "
                         "their codebook")
    args.dtype = stored.get("dtype", args.dtype)
    if stored["texts"] != needed["texts"]:
        raise ValueError(f"{known / 'texts.jsonl'} does not hold the texts of its table: run `uip.py fit` again")
    row_of = {text: row for row, text in enumerate(texts)}
    new = [text for text in source.texts if text not in row_of]
    if new:
        row_of |= {text: len(row_of) + i for i, text in enumerate(new)}
        fresh = text_table(args, model_when_needed(args, source.layout), out / "table", source.layout, new)[0]
        table = {name: np.concatenate([table[name], fresh[name]]) for name in fresh}
    if rank_and_world_size()[0] > 0:
        return
    rows_of_texts = [row_of[text] for text in source.texts]
    table = {name: array[rows_of_texts] for name, array in table.items()}
    begin = torch.from_numpy(np.searchsorted(source.user[rows], np.arange(len(source.users) + 1)))
    r, total = [], []
    for p, book in enumerate(profiles.books):
        told, indptr, text, value, weight = profile_evidence(source, table, lists, p, args.without)
        n = sum_texts(begin, told, sum_texts(indptr, text, weight.double()[:, None]))[:, 0]
        z = sum_texts(begin, told, sum_texts(indptr, text, book.project(value, weight)))
        r.append(responsibilities(book, z, n))
        total.append(n)
    ids, probability = most_probable(r, total)
    write_profiles(out, profiles._replace(users=source.users, ids=ids, probability=probability, meta={
        **{key: profiles.meta[key] for key in ("settings", "layout", "lm")}, "command": "infer", "data": source.name,
        "data_sha256": source.meta["sha256"], "code_sha256": data.sha256_of(Path(__file__)),
        "run": data.run_facts(began, "uip.py")}))
    print(f"IDs of {len(ids)} users in {out}: {int((ids < 0).any(1).sum())} of them without evidence")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("fit", command_fit), ("infer", command_infer)):
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--data", required=True, help="folder made by data.py")
        sub.add_argument("--lm", required=True, help="causal LM: a folder or a hub id, such as Qwen/Qwen2-0.5B")
        sub.add_argument("--out", required=True, help="folder for profiles.npz, the text table and meta.json")
        sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                         help="of the LLM [that of a text table already there, else float32]")
        sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …")
        sub.add_argument("--budget", type=data.positive_int,
                         help="padded tokens in one forward pass [1024 on a CPU, by its memory on a GPU]")
        sub.add_argument("--part", type=data.positive_int,
                         help="texts per file, the unit that a killed run redoes [256 on a CPU, 8192 on a GPU]")
        sub.add_argument("--restart", action="store_true", help="drop what a run with other settings left")
    sub.add_argument("--profiles", required=True, help="folder made by fit: its codebooks and settings")
    sub = commands.choices["fit"]
    sub.add_argument("--codes", type=code_sizes, default=[4, 3],
                     help="codebook size of each profile, in the order of the layout [4,3]")
    sub.add_argument("--directions", type=data.positive_int, help="most directions of a codebook [16]")
    sub.add_argument("--tokens", type=data.positive_int, default=1, help="soft tokens per profile [1]")
    sub.add_argument("--seed", type=data.nonnegative_int, default=0, help="of k-means++; nothing else is random [0]")
    sub.add_argument("--kinds", type=lambda text: text.split(","), help="kinds of evidence to use [all of the layout]")
    sub.add_argument("--table", help="folder of the text table, to share it between runs [OUT/table]")
    sub.add_argument("--reversed", action="store_true",
                     help="also score behaviour first, then the profile's name: the control \"reversed\" of ctr.py")
    sub.add_argument("--exact-rounds", type=data.nonnegative_int, default=0,
                     help="EM rounds by the LLM's own likelihood, each of K passes over the texts; profiles.npz then "
                          "holds each code's soft tokens, as prompts_0 … [0]")
    sub.add_argument("--exact-users", action="store_true",
                     help="per-user prompt tuning instead of the text table (slow)")
    sub.add_argument("--steps", type=data.positive_int, help="steps of Adam per user, with --exact-users [3]")
    sub.add_argument("--lr", type=data.nonnegative_float,
                     help="learning rate of Adam in exact rounds or for exact users [0.02]")
    sub.add_argument("--without", default="", choices=[*IN_TABLE, *MEASUREMENT, *IN_QUANTISER],
                     help="leave a part of the method out, to see its worth")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.part = args.part or (8192 if args.device.startswith("cuda") else 256)
    try:
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):         # torchrun
            args.device = init_distributed(args.device)
        check_device(args.device)
    except ValueError as error:
        raise data.CommandError(2, str(error)) from None
    try:
        out = Path(args.out)
        if rank_and_world_size()[0] > 0:
            return args.run(args)
        data.refuse_others(out, "profiles.npz")
        with data.exclusive_lock(out / ".lock"):
            args.run(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    data.run_command("uip.py", main)
