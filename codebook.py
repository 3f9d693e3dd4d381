"""Collaborative IDs: from measurements of users to codes (quantisation module), and the feature bank that serves them.

    python codebook.py bank   --profiles DIR... --out DIR            the bank: user id → codes, memory-mapped
    python codebook.py lookup --bank DIR -- USER...                  codes of users; exit 4 if one is unknown
    python codebook.py verify DIR...                                 is a folder what its meta.json records? else exit 4
    python codebook.py cards  --profiles DIR --data DIR [--out FILE] what each ID means, as Markdown tables

A user is measured by what the user's rows tell: g_u = Σ of the values of the texts told, and n_u = Σ of their weights
(for the LLM's text table: gradients and numbers of value tokens; for plain statistics: one-hot vectors and ones). Then
g_u / n_u measures how θ_u differs from everybody's, with noise C / n_u (its sign does not matter). `fit_codebook`
learns

    the directions in which two halves of a user's evidence agree (signal against noise), and, in these coordinates,
    θ_u ~ N(0, T), g_u / n_u | θ_u ~ N(θ_u, C / n_u)      by EM in closed form (ours); it shrinks users of few rows
    z_u = the nearest of K centroids of the posterior means of θ_u, by k-means: the user's ID

Codes count from 0 in arrays named `ids`, where −1 means "no evidence", and from 1 in a bank and in cards, where 0 means
"unknown user".
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# --------------------------------------------------------------------------------------------------- k-means

class Clusters(NamedTuple):
    """Centroids and which of them each row is nearest to."""
    centroids: Tensor      # [K, d] fp32
    ids: Tensor            # [N] int64, the nearest centroid
    inertia: float         # Σ squared distance to the nearest of the centroids returned
    history: list[float]   # inertia at the start of each iteration; never rises (beyond fp32 rounding)


def rows_per_chunk(x: Tensor, k: int) -> int:
    """Rows of x [N, d] to compare with k codes at once: 8 MB stay in a CPU's cache, a GPU wants larger pieces."""
    return max(1, (2**21 if x.device.type == "cpu" else 2**26) // (x.shape[1] + k))


def nearest(x: Tensor, c: Tensor, half: Tensor) -> Tensor:
    """argmin_k |c_k|²/2 − x·c_k for x [n, d], c [K, d], half = |c|²/2 [K] → [n] (|x|² is the same for all codes)."""
    scores = torch.addmm(half, x, c.T, alpha=-1)                       # (n, K)
    if scores.device.type == "cpu" and len(c) > 8:                     # numpy's argmin: half the time for many codes
        return torch.from_numpy(scores.numpy().argmin(1))
    return scores.argmin(1)


@torch.no_grad()
def assign(x: Tensor, centroids: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Nearest centroid: x [N, d], centroids [K, d] → (ids [N] int64, squared distances [N] fp32).

    Both are moved by the centroids' mean first: |x|² − 2xc + |c|² cancels badly far from 0.
    """
    shift = centroids.double().mean(0).to(x.dtype if x.dtype == torch.float64 else torch.float32)
    c, ids, distances = (centroids - shift).float(), [], []
    half, rows = 0.5 * c.square().sum(1), chunk or rows_per_chunk(x, len(c))                 # (K,)
    moved, near = torch.empty(2, min(rows, len(x)), x.shape[1], device=x.device)             # new memory is slow
    for part in x.split(rows):
        moved, near = moved[:len(part)], near[:len(part)]              # (n, d)
        moved.copy_(part - shift) if x.dtype == torch.float64 else torch.sub(part, shift, out=moved)
        ids.append(nearest(moved, c, half))
        moved -= torch.index_select(c, 0, ids[-1], out=near)
        distances.append(torch.linalg.vector_norm(moved, dim=1).square())
    return torch.cat(ids), torch.cat(distances)


def seed_centroids(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): each start is a row drawn by its squared distance. → [k, d]"""
    draw = lambda: torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).item()
    norms, chosen = torch.linalg.vector_norm(x, dim=1).square(), [int(draw() * len(x))]
    closest = torch.full_like(norms, math.inf)                         # (N,) squared distance to the nearest start
    while len(chosen) < k:
        c = x[chosen[-1]]
        closest = torch.minimum(closest, (norms - 2 * (x @ c) + c @ c).clamp_min(0))
        closest[chosen] = 0
        mass = closest.double().cumsum(0)
        point = draw()
        if mass[-1] > 0:
            chosen.append(min(int(torch.searchsorted(mass, point * mass[-1], right=True)), len(x) - 1))
        else:                                                          # fewer distinct points than codes
            chosen.append(int(point * len(x)))
    return x[chosen]


def sums_by_code(x: Tensor, rows: Tensor, codes: Tensor, k: int, most: int = 2048) -> Tensor:
    """Σ of x [N, d] over the `rows` [m] of each code [m] → [k, d] fp64: at most 2,048 in fp32, their sums in fp64."""
    codes, order = codes.sort(stable=True)
    start, runs = torch.searchsorted(codes, torch.arange(k + 1, device=x.device)), len(codes) // most + 1
    begin = start[:-1, None] + start.diff()[:, None] * torch.arange(runs, device=x.device) // runs      # (k, runs)
    return F.embedding_bag(rows[order], x, begin.flatten(), mode="sum").view(k, runs, -1).sum(1, dtype=torch.float64)


def assign_and_accumulate(x: Tensor, c: Tensor, ids: Tensor, sums: Tensor) -> int:
    """Assigns x [N, d] to c [K, d], updating ids [N] and sums [K, d] (fp64) in place. Returns how many rows moved.

    Only rows that moved change the sums (ours): soon they are few. ids start at −1, no code's row.
    """
    half = 0.5 * c.square().sum(1)
    new = torch.cat([nearest(part, c, half) for part in x.split(rows_per_chunk(x, len(c)))])              # (N,)
    moved = (new != ids).nonzero().flatten()
    if len(moved):
        sums += sums_by_code(x, moved, new[moved], len(c))
        if ids[0] >= 0:                                                # in the first round no row has an old code
            sums -= sums_by_code(x, moved, ids[moved], len(c))
        ids.copy_(new)
    return len(moved)


def update_centroids(x: Tensor, c: Tensor, ids: Tensor, sums: Tensor) -> Tensor:
    """New centroids [K, d]. An empty code takes the row farthest from its centroid out of its old cluster.

    Several empty codes take several rows (as in scikit-learn). A cluster that lost its only row stays where it was.
    """
    counts = ids.bincount(minlength=len(c))
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        sums, distance = sums.clone(), assign(x, c)[1]
        for code, row in zip(empty, distance.topk(len(empty)).indices.tolist()):
            sums[ids[row]] -= x[row]
            counts[ids[row]] -= 1
            sums[code], counts[code] = x[row], 1
    return torch.where(counts[:, None] > 0, (sums / counts.clamp_min(1)[:, None]).float(), c)


def lloyd(x: Tensor, c: Tensor, total: float, iters: int) -> tuple[Tensor, list[float]]:
    """At most `iters` Lloyd iterations on centred x [N, d] from c [K, d] → centroids, inertia of each iteration.

    total: Σ|x|². Stops when no row moves. Σ|x − c|² = Σ|x|² − 2 Σ_k s_k·c_k + Σ_k n_k |c_k|²: K × d work, not N × d.
    """
    ids, history = torch.full((len(x),), -1, device=x.device), []
    sums = torch.zeros(c.shape, dtype=torch.float64, device=x.device)
    for _ in range(iters):
        moved = assign_and_accumulate(x, c, ids, sums)
        wide, counts = c.double(), ids.bincount(minlength=len(c))
        history.append(max(0.0, total + float((counts * wide.square().sum(1)).sum() - 2 * (sums * wide).sum())))
        if not moved:
            break
        c = update_centroids(x, c, ids, sums)
    return c, history


@torch.no_grad()
def kmeans(x: Tensor, k: int, *, n_init: int = 10, iters: int = 50, init: Tensor | None = None,
           generator: torch.Generator | None = None) -> Clusters:
    """Lloyd's k-means (paper, quantisation module: one codebook per profile). x [N, d], any dtype and device.

    Best inertia of n_init k-means++ starts, codes ordered by size (largest first), then by coordinates, so that
    equal data get equal codes; or one warm start from init [k, d], whose order is kept (n_init is then ignored).
    Exactly `iters` iterations unless no row moves any more. ids and inertia are those of `assign(x, centroids)`.
    Memory: 48 bytes a row, and a centred fp32 copy of x unless x is fp32 and its mean is small beside its spread.
    The default generator is seeded with 0; the global one is never used.
    Raises ValueError for a bad shape, k < 1, k > N, an unfit init, NaN, infinite or huge values, or float64 rows so far
    from 0 that fp32 centroids would be equal.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"k-means needs a table [rows, dimensions], got the shape {list(x.shape)}")
    if not 1 <= k <= len(x):
        raise ValueError(f"k-means needs at least one code and as many rows as codes: {k} codes, {len(x)} rows")
    if iters < 0 or n_init < 1:
        raise ValueError(f"k-means needs iters >= 0 and n_init >= 1, got {iters} and {n_init}")
    if init is not None and init.shape != (k, x.shape[1]):
        raise ValueError(f"k-means init has the shape {list(init.shape)}, needs {[k, x.shape[1]]}")
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    square = lambda rows: float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
    mean, total = x.mean(0), square(x)
    size = math.sqrt(total / len(x))                                   # root mean |x|², before the mean is taken off
    if len(x) * float(mean.square().sum()) < 0.1 * total < 1e36:       # centred enough for fp32: no copy of x
        mean, centred = torch.zeros_like(mean), x.float()
    else:
        centred = None
        if x.device.type == "cpu":                                     # numpy asks for huge pages, torch does not:
            centred = torch.from_numpy(np.empty(x.shape, np.float32))  # half the time of all before the loop
        centred = torch.sub(x, mean, out=centred if x.dtype == torch.float32 else None).float()       # (N, d)
        total = square(centred)
    if not total < 1e37 or init is not None and not init.isfinite().all():
        bad = (~x.isfinite().all(1)).nonzero().flatten().tolist()
        where = f"row {bad[0]} is the first of {len(bad)}" if bad else "in init, or the squares overflow"
        raise ValueError(f"k-means got NaN, infinite or huge values ({where})")
    generator = generator or torch.Generator().manual_seed(0)
    best, history = None, [math.inf]
    for _ in range(n_init if init is None else 1):
        start = seed_centroids(centred, k, generator) if init is None else (init.to(x) - mean).float()
        found, inertias = lloyd(centred, start, total, iters)
        if best is None or inertias and inertias[-1] < history[-1]:
            best, history = found, inertias
    if x.dtype == torch.float64:                                       # of equal rows, whose means differ by rounding
        best = merge_equal_codes(best, 4 * torch.finfo(torch.float32).eps * math.sqrt(total / len(x)))
    exact = merge_equal_codes((best + mean).to(x.dtype), 4 * torch.finfo(x.dtype).eps * size)
    centroids = exact.float()
    if len(centroids.unique(dim=0)) < len(exact.unique(dim=0)):
        raise ValueError("float32 cannot tell the centroids apart so far from 0: subtract the mean of x first")
    if init is None:
        centroids = canonical_order(centroids, assign(x, centroids)[0])
    ids, distances = assign(x, centroids)                              # again: their new order decides ties
    return Clusters(centroids, ids, float(distances.double().sum()), history)


def merge_equal_codes(centroids: Tensor, rounding: float) -> Tensor:
    """Centroids [K, d], where those within `rounding` of an earlier one become that one: equal users, equal IDs."""
    same = torch.cdist(centroids.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist") <= rounding
    return centroids[same.int().argmax(1)]


def canonical_order(centroids: Tensor, ids: Tensor) -> Tensor:
    """The same centroids by size, largest first, then by first, second, … coordinate."""
    size, rows = ids.bincount(minlength=len(centroids)).tolist(), centroids.tolist()
    return centroids[sorted(range(len(rows)), key=lambda j: (-size[j], rows[j]))]


@torch.enable_grad()
def vq(x: Tensor, k: int, *, steps: int = 1000, lr: float = 0.01, batch: int = 8,
       generator: torch.Generator | None = None) -> Clusters:
    """The gradient-trained codebook of the authors' code, for the ablation.

    x [N, d]. Codes start in U(−1/K, 1/K), Adam lowers ‖sg[x] − e‖² to the nearest code on random minibatches,
    and nothing brings back a code that nobody is near: where x has a large common part, it collapses to one code.
    history: the minibatch loss per row, times N.
    """
    generator = generator or torch.Generator().manual_seed(0)
    codes = (2 * torch.rand(k, x.shape[1], generator=generator) - 1) / k                    # (K, d)
    codes = codes.to(x.device).requires_grad_()
    adam, history = torch.optim.Adam([codes], lr=lr), []
    for _ in range(steps):
        rows = x[torch.randint(len(x), (batch,), generator=generator)].detach().float()     # (b, d)
        loss = (rows - codes[assign(rows, codes.detach())[0]]).square().sum(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append(float(loss.detach()) * len(x))
    ids, distance = assign(x.detach(), codes.detach())
    return Clusters(codes.detach(), ids, float(distance.double().sum()), history)


def perplexity(ids, k: int) -> float:
    """exp(entropy) of the usage of k codes: 1 = all on one code, k = even use. ids [N] in 0 … k − 1."""
    share = torch.bincount(torch.as_tensor(ids).flatten().long(), minlength=k).double() / max(1, len(ids))
    return float(torch.special.entr(share).sum().exp())


# ---------------------------------------------------------------------------------- measurements and directions

class Evidence(NamedTuple):
    """The texts that R rows tell, and a vector for each text.

    Many rows tell the same. Only V distinct lists are stored: row r tells text[indptr[v]:indptr[v + 1]], v = told[r].
    """
    told: Tensor           # [R] int64, the number of the row's list, 0 … V − 1
    indptr: Tensor         # [V + 1] int64, where each list begins in `text`
    text: Tensor           # [nnz] int64, rows of `value`
    value: Tensor          # [T, D] fp32, for example the gradient of each distinct text
    weight: Tensor         # [T] fp32 ≥ 0, how much a text says: its value tokens, or 1


def sum_texts(indptr: Tensor, text: Tensor, value: Tensor) -> Tensor:
    """Σ of value [T, q] over each list of a CSR → [V, q] in value's dtype (fp32 is up to ten times as fast as fp64)."""
    if not len(text):
        return value.new_zeros(len(indptr) - 1, value.shape[1])
    return F.embedding_bag(text, value, indptr[:-1], mode="sum")


def times_told(evidence: Evidence) -> Tensor:
    """How often the rows tell each text: [T] int64."""
    times = torch.bincount(evidence.told, minlength=len(evidence.indptr) - 1)                # (V,) of each list
    count = torch.zeros(len(evidence.value), dtype=times.dtype, device=times.device)
    return count.index_add_(0, evidence.text, times.repeat_interleave(evidence.indptr.diff()))


def take_lists(indptr: Tensor, text: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """The CSR of the lists number which[0], which[1], …: indptr [len(which) + 1], text [nnz]."""
    size = indptr.diff()[which]
    end = torch.cat([size.new_zeros(1), size.cumsum(0)])
    shift = (indptr[which] - end[:-1]).repeat_interleave(size)         # (nnz,) from the new place to the old
    return end, text[torch.arange(len(shift), device=shift.device) + shift]


def split_halves(user: Tensor, item: Tensor) -> Tensor:
    """Half A (False) or B (True) of each row, bool [R]: a user's distinct items go to A and B in turn.

    user, item: [R] int64, each user's rows in order. All rows of one item fall into one half: texts of an item are the
    same for all its buyers, and a text in both halves of a user would look like agreement.
    """
    pairs, pair = torch.unique(user * (int(item.max()) + 1) + item, return_inverse=True)
    rows = torch.arange(len(user), device=user.device)
    first = torch.full_like(pairs, len(user)).scatter_reduce_(0, pair, rows, "amin")
    order = first.argsort()                                            # distinct (user, item) in the order of rows
    owner = user[first[order]]                                         # (pairs,) rows of one user lie together
    turn = rows[:len(owner)] - torch.searchsorted(owner, owner)        # 0, 1, 2 … within the user
    half = torch.empty_like(pairs, dtype=torch.bool)
    half[order] = turn % 2 == 1
    return half[pair]


def rows_by_half(user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each user's halves (see split_halves): order[pointer[2 u + h]:pointer[2 u + h + 1]] for half h of u.

    user, item: [R] int64, rows sorted by user, the last row's user the largest, N − 1 → pointer [2 N + 1], order [R].
    """
    half = 2 * user + split_halves(user, item)
    order = half.argsort(stable=True)
    return torch.searchsorted(half[order], torch.arange(2 * int(user[-1]) + 3, device=user.device)), order


def noise_within_users(lists: Tensor, weight: Tensor, told: Tensor, user: Tensor) -> Tensor:
    """Covariance of one unit of weight, [D, D] fp64, from how the rows of a user differ; each user counts once (ours).

    lists: [V, D] sums of values; weight: [V] ≥ 0; told: [R] the list of each row; user: [R], sorted, at least one with
    two rows of some weight. Rows are used, not halves: with one difference per user and more dimensions than users,
    some directions would have no noise at all, and dividing by the noise would make them look like pure signal.
    """
    lists, weight = lists.double(), weight.double()                    # fp64: the difference of two sums is taken
    told, user = told[weight[told] > 0], user[weight[told] > 0]
    size = torch.unique_consecutive(user, return_counts=True)[1]
    pointer = torch.cat([size.new_zeros(1), size.cumsum(0)])
    over_user = lambda of_list: sum_texts(pointer, told, of_list)      # (U, …)
    total, square = (over_user((weight ** power)[:, None]) for power in (1, 2))              # (U, 1)
    several = size[:, None] > 1
    scale = torch.where(several, 1 / (total - square / total), 0) / several.sum()
    of_list = torch.zeros_like(weight).index_add_(0, told, scale.repeat_interleave(size))    # Σ of scale over rows
    mean = over_user(lists) / total                                    # (U, D)
    cross = mean.T @ (scale * (over_user(weight[:, None] * lists) - square / 2 * mean))
    return lists.T @ (of_list[:, None] * lists) - cross - cross.T      # Σ scale (row − weight · mean)(…)ᵀ


def find_directions(a: Tensor, n_a: Tensor, b: Tensor, n_b: Tensor, noise: Tensor, most: int = 16,
                    ridge: float = 0.003):
    """Directions in which two halves of a user's evidence agree more than chance (ours).

    a, b: [N, D] Σ of a user's values in each half; n_a, n_b: [N] Σ of weights, > 0; noise: [D, D] of one unit of
    weight. What the halves share across users is the user: C_signal = sym cov(ā, b̄). Directions are the generalised
    eigenvectors of (C_signal, noise / n + ε) at the median user's n; ε is `ridge` of the mean noise, small because a
    few directions hold most of it (results/log.md). As many are kept as have a larger eigenvalue than any of ten trials
    (three from 4,096 users on) in which B is another user's (parallel analysis, Horn 1965), 1 to `most`.
    → directions [D, q] fp64, eigenvalues [min(D, 32)], the largest eigenvalue by chance.
    """
    n_a, n_b = n_a.double(), n_b.double()                              # products over users in fp32, the rest in fp64
    a, b = a.float() / n_a[:, None].float(), b.float() / n_b[:, None].float()
    both = n_a * n_b / (n_a + n_b)
    trust = both / (both + both.median())                              # a user's weight, 0 … 1, by amount of evidence
    share = (trust / trust.sum()).float()[:, None]                     # (N, 1)
    middle = ((a + b) * share).sum(0) / 2
    values, vectors = torch.linalg.eigh(noise / (n_a + n_b).median())  # of the median user's mean
    values = values.clamp_min(0)
    epsilon = ridge * values.mean() + 1e-12 * (1 + a.square().mean())
    whiten = vectors / (values + epsilon).sqrt()                       # (D, D): whitenᵀ (noise + ε) whiten = 1
    a, b = (a - middle) * share, b - middle

    def signal(other: Tensor) -> Tensor:                               # whitened after the sum over users, D × D
        product = whiten.T @ (a.T @ other).double() @ whiten
        return (product + product.T) / 2

    generator, chance = torch.Generator().manual_seed(0), 0.0
    for _ in range(10 if len(a) < 4096 else 3):
        shift = int(torch.randint(1, max(2, len(a)), (), generator=generator))
        chance = max(chance, float(torch.linalg.eigvalsh(signal(b.roll(shift, 0)))[-1]))
    eigenvalues, vectors = torch.linalg.eigh(signal(b))
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    q = min(most, max(1, int((eigenvalues > chance).sum())))
    return whiten @ vectors[:, :q], eigenvalues[:32], chance


# ----------------------------------------------------------------------------------- posterior of a user, and codes

class Codebook(NamedTuple):
    """One profile's codes, and the coordinates that they live in."""
    mean: Tensor           # [D] mean measurement per unit of weight
    directions: Tensor     # [D, q]
    noise: Tensor          # [q] variance of one unit of weight; a user's mean has noise / n_u
    prior: Tensor          # [q] T, the variance of θ_u over users
    pi: Tensor             # [K] share of the users
    mu: Tensor             # [K, q] centroids of the posterior means
    spread: Tensor         # [q] mean squared distance of posterior means to their centroid
    eigenvalues: Tensor    # [≤ 32] signal over noise of the median user, by direction
    chance: float          # the largest eigenvalue that unrelated halves gave
    history: list[float]   # log-likelihood of all measurements after each EM round; never falls

    def project(self, value: Tensor, weight: Tensor) -> Tensor:
        """Coordinates of values [T, D] of `weight` [T] → [T, q] fp64. Linear: sums of texts are sums of coordinates."""
        return (value.double() - weight.double()[:, None] * self.mean) @ self.directions


def posterior(z: Tensor, n: Tensor, noise: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """E-step: mean and variance of θ_u given its evidence, [N, q] each; z [N, q] sums of coordinates, n [N] > 0.

    z/n measures θ_u ~ N(0, T) with variance noise/n. So the prior acts like noise / T more units of weight at 0, and
    little evidence means strong shrinking, without a setting for it.
    """
    total = n[:, None] + noise / prior                                 # (N, q) units of weight
    return z / total, noise / total


def learn_prior(z: Tensor, n: Tensor, noise: Tensor, rounds: int = 500) -> tuple[Tensor, list[float]]:
    """EM for T, the variance of θ_u over users: z [N, q], n [N] > 0 → prior [q], log-likelihood after each round."""
    y, error, history = z / n[:, None], noise / n[:, None], []
    prior = y.square().mean(0).clamp_min(1e-300)
    for _ in range(rounds):
        total = prior + error
        history.append(float(-0.5 * (y.square() / total + (2 * math.pi * total).log()).sum()))
        if len(history) > 1 and history[-1] - history[-2] < 1e-7 * y.numel():
            break
        mean, variance = posterior(z, n, noise, prior)                 # E-step
        prior = (mean.square() + variance).mean(0).clamp_min(1e-300)   # M-step
    return prior, history


def responsibilities(book: Codebook, z: Tensor, n: Tensor) -> Tensor:
    """P(code | evidence) ∝ N(posterior mean; μ_k, spread + posterior variance): z [N, q], n [N] → r [N, K] fp64.

    A user's ID is the most probable code: the nearest centroid, each direction in units of its variance. Without
    evidence (n = 0) r is π.
    """
    mean, variance = posterior(z, n, book.noise, book.prior)
    scale = 1 / (variance + book.spread)                               # (N, q)
    logits = book.mu @ (mean * scale).T - 0.5 * book.mu.square() @ scale.T                   # (K, N)
    return torch.where(n > 0, logits.softmax(0), book.pi[:, None]).T   # the first axis: ten times as fast


def fit_codes(book: Codebook, z: Tensor, n: Tensor, k: int, seed: int = 0, without: str = "") -> Codebook:
    """k codes on the posterior means of users (paper, quantisation module); z [N, q], n [N] > 0, k ≤ N."""
    mean = posterior(z, n, book.noise, book.prior)[0]
    found = (vq if without == "kmeans" else kmeans)(mean, k, generator=torch.Generator().manual_seed(seed))
    spread = (mean - found.centroids[found.ids]).square().mean(0)
    pi = torch.bincount(found.ids, minlength=k).double() / len(mean)
    spread = spread.clamp_min(1e-12 * mean.square().mean(0) + 1e-300)
    return book._replace(pi=pi, mu=found.centroids.double(), spread=spread)


@torch.no_grad()
def fit_codebook(evidence: Evidence, user: Tensor, item: Tensor, users: int, k: int, *, directions: int = 16,
                 most_users: int = 8192, most_rows: int = 32_768, seed: int = 0,
                 without: str = "") -> tuple[Codebook, Tensor, Tensor]:
    """One profile's codebook from the rows of its users (quantisation module; directions and prior are ours).

    evidence: of R rows; user, item: [R] int64, rows sorted by user, users in 0 … users − 1. k: codes, lowered to the
    number of users with evidence. directions: at most so many. without: "signal" (principal components instead of
    directions), "em" (no shrinking) or "kmeans" (VQ instead).
    A sample of users is enough to learn from, so users must come in no meaningful order. Prior, codes and their noise
    use the first 4 · most_users users with evidence; directions use the first most_users of these with two halves; the
    noise within users, which find_directions divides by, uses the users of the first most_rows rows.
    Returns (codebook, z [users, q], n [users]). Raises ValueError where no user has evidence or rows are not sorted.
    """
    told, indptr, text, value, weight = evidence
    if len(user) and (int(user[0]) < 0 or int(user[-1]) >= users or bool((user.diff() < 0).any())):
        raise ValueError(f"rows must be sorted by user, and users be numbers from 0 to {users - 1}")
    begin = torch.searchsorted(user, torch.arange(users + 1, device=user.device))            # each user's rows
    list_weight = sum_texts(indptr, text, weight[:, None].float())     # (V, 1)
    n = sum_texts(begin, told, list_weight)[:, 0].double()
    some = (n > 0).nonzero().flatten()[:4 * most_users]
    if not len(some):
        raise ValueError("no user has evidence of this profile: there is nothing to make a codebook of")
    times = times_told(evidence).double()                              # (T,)
    mean = (times @ value.double()) / (times @ weight.double())        # (D,)
    centred = value.double() - weight.double()[:, None] * mean         # (T, D)
    short, basis, used = centred, None, times.nonzero().flatten()
    if len(used) < len(mean):                                          # few texts span few, E, of D dimensions
        basis = torch.linalg.qr(centred[used].T)[0]                    # (D, E)
        short = centred @ basis                                        # (T, E)

    for rows in (int(begin[some[-1] + 1]), len(user)):                 # of these users; of all if these have no halves
        half_begin, order = rows_by_half(user[:rows], item[:rows])
        told_half = told[order]
        n_half = sum_texts(half_begin, told_half, list_weight).reshape(-1, 2).double()
        paired = (n_half > 0).all(1).nonzero().flatten()
        if len(paired) >= 2:
            break
    if without == "signal" or len(paired) < 2:                         # principal components
        scaled = short * times.sqrt()[:, None]
        values, vectors = torch.linalg.eigh(scaled.T @ scaled / times.sum())
        v, eigenvalues, chance = vectors.flip(1)[:, :directions], values.flip(0)[:32], 0.0
    else:
        first = paired[:most_users]
        pointer = half_begin[:2 * int(first[-1]) + 3]                  # halves of the users up to the last of them
        end, texts = take_lists(indptr, text, told_half[:pointer[-1]])
        sums = sum_texts(end[pointer], texts, short.float()).reshape(-1, 2, short.shape[1])[first]
        last = torch.maximum(user[min(most_rows, rows) - 1], paired[0])                      # somebody has two rows
        few, place = torch.unique(told[:begin[last + 1]], return_inverse=True)               # rows of whole users
        apart = noise_within_users(sum_texts(*take_lists(indptr, text, few), short), list_weight[few, 0], place,
                                   user[:len(place)])
        ridge = 0.003 * short.shape[1] / len(mean)                     # of the mean over E, 0.003 of that over D
        v, eigenvalues, chance = find_directions(sums[:, 0], n_half[first, 0], sums[:, 1], n_half[first, 1], apart,
                                                 directions, ridge)
    v = v if basis is None else basis @ v                              # (D, q)
    v = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()        # else numbers of equal codes were up to LAPACK
    list_z = sum_texts(indptr, text, (centred @ v).float())            # (V, q)
    z = sum_texts(begin, told, list_z).double()
    if len(paired) >= 2:                                               # noise: how far halves differ, per weight
        halves = sum_texts(half_begin, told_half, list_z).reshape(-1, 2, v.shape[1])
        gap = halves[paired].double() / n_half[paired, :, None]
        noise = ((gap[:, 0] - gap[:, 1]).square() * (n_half[paired].prod(1) / n[paired])[:, None]).mean(0)
    else:
        noise = (z[some].square() / n[some, None]).mean(0)
    noise = noise.clamp_min(1e-300)
    prior, history = learn_prior(z[some], n[some], noise)
    if without == "em":                                                # no shrinking
        prior, history = torch.full_like(noise, math.inf), []
    blank = torch.zeros(0, dtype=torch.float64)
    book = Codebook(mean, v, noise, prior, blank, blank, blank, eigenvalues, chance, history)
    return fit_codes(book, z[some], n[some], min(k, len(some)), seed, without), z, n


def ids_before(book: Codebook, evidence: Evidence, user: Tensor, seen: Tensor,
               rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Each row's ID from the first seen[r] rows of its user: ids [R] int64 (−1: no evidence), probability [R] fp32.

    user: [R] int64, rows sorted by user and then by time. Works on about `rows` rows at a time, always whole users:
    memory stays bounded, and a piece fits a CPU's cache.
    """
    rows = rows or (32_768 if user.device.type == "cpu" else 65_536)
    value = torch.cat([book.project(evidence.value, evidence.weight), evidence.weight[:, None]], 1)
    value = sum_texts(evidence.indptr, evidence.text, value.float()).double()                # (V, q + 1) of each list
    ids, sure, begin = torch.empty_like(user), torch.empty_like(user, dtype=torch.float32), 0
    small = book._replace(**{name: getattr(book, name).float() for name in ("noise", "prior", "pi", "mu", "spread")})
    while begin < len(user):
        end = int(torch.searchsorted(user, user[min(begin + rows, len(user)) - 1], right=True))
        each = value.index_select(0, evidence.told[begin:end])         # (rows, q + 1)
        both = sums_before(each, user[begin:end], seen[begin:end]).float()
        sure[begin:end], code = responsibilities(small, both[:, :-1], both[:, -1]).max(1)
        ids[begin:end] = torch.where(both[:, -1] > 0, code, -1)
        begin = end
    return ids, sure


def sums_before(z: Tensor, user: Tensor, seen: Tensor) -> Tensor:
    """Σ of z [R, q] over the first seen[r] rows of row r's user → [R, q]: the past of every row at once.

    user: [R] int64, rows sorted by user and then by time; seen: [R] int64, at most the user's number of rows.
    """
    start = torch.searchsorted(user, user)                             # first row of the same user
    before = torch.cat([z.new_zeros(1, z.shape[1]), z.cumsum(0)])      # (R + 1, q)
    return before.index_select(0, start + seen).sub_(before.index_select(0, start))


def bag_of_words(texts: list[str], width: int = 576) -> tuple[np.ndarray, np.ndarray]:
    """Σ over a text's words of one random direction per word: the words without what an LLM knows of them (control).

    → [T, width] fp32, number of words [T] fp32. A word's direction depends on the word alone. The width is that of the
    default LLM: in fewer dimensions, directions of different words resemble each other too much.
    """
    cache, value, count = {}, np.zeros((len(texts), width), np.float32), np.zeros(len(texts), np.float32)
    for row, text in enumerate(texts):
        for word in text.lower().split():
            if word not in cache:
                seed = np.frombuffer(word.encode(), np.uint8).tolist()
                cache[word] = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
            value[row] += cache[word]
            count[row] += 1
    return value, count


# ---------------------------------------------------------------------------------------------- feature bank

VERSION = 2


def as_ids(users) -> np.ndarray:
    """User ids as an array of texts [n]; whole numbers count as their decimal text. ValueError for anything else."""
    if isinstance(users, np.ndarray) and users.ndim == 1 and users.dtype.kind in "Uiu":
        return users.astype(str, copy=False)
    try:
        users = list(users)                                            # numpy would make texts of floats and None
    except TypeError:
        raise ValueError(f"a user id is a text or a whole number, not {type(users).__name__}") from None
    try:
        text = "\0".join(users) + "\0"
    except TypeError:                                                  # not texts alone
        for kind in set(map(type, users)):
            if kind is bool or not issubclass(kind, (str, int, np.integer)):
                raise ValueError(f"user ids are texts or whole numbers, not {kind.__name__}") from None
        return np.array(list(map(str, users)))
    width = len(text) // max(1, len(users))
    if text[width - 1::width] == "\0" * len(users) and text.count("\0") == len(users):    # equal lengths: the fast way
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), f"<U{width}")
    return np.array(users, str)


def hash_users(users) -> np.ndarray:
    """64-bit keys of user ids. users: iterable of n texts or whole numbers → uint64 [n].

    FNV-1a over code points, then murmur3's finaliser. The array's width does not matter: padding NULs are skipped.
    """
    a = as_ids(users)
    a = np.ascontiguousarray(a, a.dtype.newbyteorder("="))
    points, h = a.view(np.uint32).reshape(len(a), a.itemsize // 4), np.full(len(a), 0xCBF29CE484222325, np.uint64)
    for start in range(0, len(a), 10_000):                             # blocks that fit the cache
        part = h[start:start + 10_000]
        for column in points[start:start + 10_000].T.astype(np.uint64, order="C"):
            np.multiply(part ^ column, np.uint64(0x100000001B3), out=part, where=column != 0)
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            part ^= part >> np.uint64(33)
            part *= np.uint64(factor)
        part ^= part >> np.uint64(33)
    return h


def hash_user(user: str) -> int:
    """hash_users of one id in plain Python: up to about 32 ids numpy's overhead exceeds the work."""
    h, mask = 0xCBF29CE484222325, 0xFFFFFFFFFFFFFFFF
    for point in map(ord, user.replace("\0", "")):
        h = (h ^ point) * 0x100000001B3 & mask
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ (h >> 33)) * factor & mask
    return h ^ (h >> 33)


def find_keys(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Row of each wanted key in sorted `keys`, uint64 [n] → int64 [n]; where it is absent any row, or N.

    A binary search over all keys misses the cache at most steps. Hashes are uniform, so key · N / 2^64 is nearly
    the row: three interpolation steps, then a binary search in 16 rows. Where that missed, a full search.
    """
    if len(wanted) < 64:                                               # a binary search has no such fixed cost
        return keys.searchsorted(wanted)
    scale = len(keys) / 2**64
    row = (wanted * scale).astype(np.int64)
    for _ in range(3):
        row += ((wanted - keys.take(row, mode="clip")).view(np.int64) * scale).astype(np.int64)
    row = np.maximum(row - 8, 0)
    for step in (8, 4, 2, 1):
        row += step * (keys.take(row + (step - 1), mode="clip") < wanted)
    missed = ((keys.take(row, mode="clip") < wanted) | (keys.take(row - 1, mode="clip") >= wanted)).nonzero()[0]
    row[missed] = keys.searchsorted(wanted[missed])
    return row


class Bank:
    """User id → codes: sorted 64-bit hashes beside their codes, memory-mapped: readers share one page cache.

    keys.npy uint64 [N], codes.npy uint8 or uint16 [N, P], sure.npy uint8 [N, P] (probability of the code in 255ths),
    codebook.npz, meta.json: 8 + 2 P bytes a user up to 255 codes. open() is fast at any size: it hashes all of a file
    up to 4 MiB, but only samples of a larger one, which reveal a truncated or exchanged file but not every altered
    byte; the command verify reads everything. A new bank replaces the old by two renames; a reader finds one of the two
    at any moment, and keeps the one that it has open.
    """

    FILES = ("keys.npy", "codes.npy", "sure.npy", "codebook.npz")

    def __init__(self, folder: Path, meta: dict, keys: np.ndarray, codes: np.ndarray, sure: np.ndarray):
        self.folder, self.meta, self.keys, self.codes, self.sure = folder, meta, keys, codes, sure

    @classmethod
    def build(cls, folder, users, codes, meta: dict | None = None, *, probability=None, codebook: dict = {}) -> "Bank":
        """Writes a bank and opens it.

        users: N distinct ids (texts or whole numbers); codes: int [N, P] from 1, 0 = unknown.
        probability: [N, P] of each code; by default 1, and 0 where unknown. meta: "names" (P profile names), "lm", …
        are kept as given. codebook: arrays to keep beside the codes. Takes about 40 bytes of memory a user. A bank
        already there is replaced only when the new one is complete. Raises ValueError for codes, ids or a folder that
        do not fit.
        """
        folder, codes, meta = Path(folder).resolve(), np.asarray(codes), dict(meta or {})
        users = as_ids(users)
        if codes.shape[:-1] != (len(users),) or not codes.size or codes.dtype.kind not in "iu":
            raise ValueError(f"a bank needs integer codes [users, profiles]: {len(users)} users, codes {codes.shape}")
        if codes.min() < 0 or codes.max() > 65535:
            raise ValueError(f"bank codes must lie in 0 … 65535, found {codes.min()} … {codes.max()}")
        names = [str(name) for name in meta.setdefault("names", [f"p{p}" for p in range(codes.shape[1])])]
        if len(names) != codes.shape[1]:
            raise ValueError(f"{len(names)} profile names for {codes.shape[1]} columns of codes")
        if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not (folder / cls.FILES[0]).exists():
            raise ValueError(f"{folder} exists and is not a bank: name another folder")
        sure = codes > 0 if probability is None else np.asarray(probability)
        if sure.shape != codes.shape:
            raise ValueError(f"probabilities have the shape {list(sure.shape)}, codes {list(codes.shape)}")
        keys = hash_users(users)
        order = keys.argsort(kind="stable")
        keys = keys[order]
        equal = (keys[1:] == keys[:-1]).nonzero()[0]
        if len(equal):
            a, b = users[order[equal[0]:equal[0] + 2]].tolist()
            raise ValueError(f"users {a!r} and {b!r} " + ("are the same" if a == b else "have the same hash"))
        fresh, old = (folder.with_name(folder.name + end) for end in (".tmp", ".replaced"))
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        np.save(fresh / "keys.npy", keys)
        np.save(fresh / "codes.npy", codes[order].astype(np.uint8 if codes.max() <= 255 else np.uint16))
        np.save(fresh / "sure.npy", np.rint(255.0 * sure[order].clip(0, 1)).astype(np.uint8))
        np.savez(fresh / "codebook.npz", names=np.array(names), **codebook)
        meta = {"sizes": codes.max(0).tolist(), **meta, "version": VERSION, "users": len(users),
                "sha256": {name: hashlib.sha256((fresh / name).read_bytes()).hexdigest() for name in cls.FILES},
                "sample": {name: sample_hash(fresh / name) for name in cls.FILES}}
        (fresh / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8",
                                        errors="surrogateescape")     # paths in an ASCII locale
        for file in fresh.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        if folder.exists():                                            # a folder cannot be replaced in one step
            shutil.rmtree(old, ignore_errors=True)                     # of a build that was killed after both renames
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def open(cls, folder) -> "Bank":
        """Memory-maps a bank. FileNotFoundError: there is none. ValueError: it is damaged, or of another version."""
        folder, problem = Path(folder).resolve(), None
        at, identity = standing(folder)
        try:
            meta = json.loads((at / "meta.json").read_bytes())
            if meta["version"] != VERSION:
                raise ValueError(f"its version is {meta['version']}, needed is {VERSION}")
            for name in cls.FILES:
                if sample_hash(at / name) != meta["sample"][name]:
                    raise ValueError(f"{name} was truncated or altered")
            arrays = [np.asarray(np.load(at / name, mmap_mode="r", allow_pickle=False)) for name in cls.FILES[:3]]
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            problem = error
        if standing(folder) != (at, identity):                         # a build replaced it between our two looks
            return cls.open(folder)
        if identity is None:
            raise FileNotFoundError(f"{folder} is not a bank: `python codebook.py bank` makes one")
        if problem:
            raise ValueError(f"{folder} is a damaged bank ({problem}): build it again")
        return cls(at, meta, *arrays)

    def find(self, users) -> tuple[np.ndarray, np.ndarray]:
        """(row of each user, whether it is absent): int64 [n], bool [n]; users as in lookup."""
        if isinstance(users, (str, bytes, int, np.integer)):           # one id; as_ids refuses bytes
            users = [users]
        if isinstance(users, list) and len(users) <= 32 and set(map(type, users)) <= {str}:    # see hash_user
            wanted = np.array([hash_user(user) for user in users], np.uint64)
        else:
            wanted = hash_users(users)
        row = find_keys(self.keys, wanted)
        return row, self.keys.take(row, mode="clip") != wanted

    def rows(self, table: np.ndarray, users) -> np.ndarray:
        """The rows of codes or sure [N, P] of these users, 0 where one is unknown: [n, P]."""
        one = users[0] if type(users) is list and len(users) == 1 else users
        if type(one) is str:                                           # arrays of one key would double the time
            key = hash_user(one)
            row = int(self.keys.searchsorted(np.uint64(key)))
            found = row < len(self.keys) and int(self.keys[row]) == key
            return table[row:row + 1] if found else np.zeros((1, table.shape[1]), table.dtype)
        row, absent = self.find(users)
        found = table.take(row, 0, mode="clip")
        found[absent] = 0
        return found

    def lookup(self, users) -> np.ndarray:
        """Codes of a user, or of n users: any iterable of ids, texts or whole numbers → int32 [n, P]; 0 = unknown."""
        return self.rows(self.codes, users).astype(np.int32)

    def probability(self, users) -> np.ndarray:
        """How sure each code is, as P(code | evidence): users as in lookup → float32 [n, P]; 0 = unknown."""
        return self.rows(self.sure, users) / np.float32(255)


def standing(folder: Path) -> tuple[Path, tuple | None]:
    """Where the bank is now (the old one, while the new one takes its place), and what tells it from any other."""
    for at in (folder, folder.with_name(folder.name + ".replaced")):
        try:
            found = os.stat(at / "meta.json")
        except (FileNotFoundError, NotADirectoryError):
            continue
        return at, (found.st_ino, found.st_mtime_ns)
    return folder, None


def sample_hash(path: Path, block: int = 1 << 16, blocks: int = 64) -> str:
    """sha256 of a file's size and 64 evenly spaced blocks of 64 KiB (all of it up to 4 MiB)."""
    size = path.stat().st_size
    sha, starts = hashlib.sha256(str(size).encode()), range(0, size, block)
    if len(starts) > blocks:
        starts = np.linspace(0, size - block, blocks).astype(int).tolist()
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            sha.update(file.read(block))
    return sha.hexdigest()


# ---- command line

try:
    import data
except ImportError:                                                    # copied alone: all but the commands works
    data = None


def write_table(folder: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """A text table: NAME.npy for each array, and meta.json, which goes last."""
    for name, array in arrays.items():
        data.write_atomically(folder / f"{name}.npy", lambda file: np.save(file, array))
    sample = {f"{name}.npy": sample_hash(folder / f"{name}.npy") for name in arrays}
    data.write_json(folder / "meta.json", {**meta, "sample": sample})


def read_table(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a text table by name, memory-mapped (see uip.TextTable), and its meta.json."""
    meta = data.read_json(folder / "meta.json", "sample", "identity")
    for name, sample in meta["sample"].items():
        if not (folder / name).exists() or sample_hash(folder / name) != sample:
            raise ValueError(f"{folder / name} is not the one that meta.json records: run `uip.py fit` again")
    return {name.removesuffix(".npy"): np.load(folder / name, mmap_mode="r") for name in meta["sample"]}, meta


MEASUREMENT = {"tuning": "hidden", "causality": "reversed", "llm": "bag"}    # ablation → array in place of "gradient"


def profile_evidence(source, table: dict, lists, p: int, without: str) -> Evidence:
    """What the rows tell of profile p: gradients of the text table, or what the ablation `without` has instead.

    lists: (told, indptr, text) of `data.row_texts`.
    """
    profile = list(source.layout["profiles"])[p]
    views = torch.tensor([without == "views" or profile in source.layout["kinds"][kind]["view"]
                          for kind, _ in source.texts])
    weight, measurement = torch.from_numpy(np.array(table["tokens"])), MEASUREMENT.get(without, "gradient")
    if measurement == "bag":
        value, weight = map(torch.from_numpy, bag_of_words([value for _, value in source.texts]))
    elif measurement == "hidden":
        value = torch.from_numpy(np.array(table["hidden"]))
    else:
        value = torch.from_numpy(np.array(table[measurement][:, p]))
    told, indptr, text = (torch.from_numpy(array).long() for array in lists)
    speaks = (views & (weight > 0))[text]                              # [nnz], the other texts leave their lists
    indptr = torch.cat([indptr.new_zeros(1), speaks.cumsum(0)])[indptr]
    return Evidence(told, indptr, text[speaks], value, weight)


class Profiles(NamedTuple):
    """The PROFILES folder that uip.py writes."""
    users: np.ndarray          # [N] str
    ids: np.ndarray            # [N, P] int32, codes from 0; −1 = no evidence
    probability: np.ndarray    # [N, P] fp32 of the code
    names: list[str]           # P
    books: list[Codebook]      # P
    meta: dict


def code_sizes(text: str) -> list[int]:
    """The argparse type of --codes: "4,3" → [4, 3]. A bank holds codes up to 65,535."""
    size = data.checked_type(int, lambda k: 1 <= k <= 65535, "a whole number from 1 to 65535")
    return [size(k) for k in text.split(",")]


BOOK = ("mean", "directions", "noise", "prior", "pi", "mu", "spread", "eigenvalues")   # in profiles.npz


def table_hash(identity: dict) -> str:
    """What tells one text table from another in the same folder: sha256 of its identity (texts, layout, LLM, dtype)."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_profiles(folder: Path, profiles: Profiles, more: dict[str, np.ndarray] = {}) -> None:
    """profiles.npz, with `more` arrays, and meta.json, which vouches for the other file and goes last."""
    arrays = {"users": profiles.users, "ids": profiles.ids.astype(np.int32),
              "probability": profiles.probability.astype(np.float32), "names": np.array(profiles.names)}
    for p, book in enumerate(profiles.books):
        arrays |= {f"{name}_{p}": getattr(book, name).numpy() for name in BOOK}
    arrays |= more
    (folder / "meta.json").unlink(missing_ok=True)
    data.write_atomically(folder / "profiles.npz", lambda file: np.savez(file, **arrays))
    sha256 = {"profiles.npz": data.sha256_of(folder / "profiles.npz")}
    data.write_json(folder / "meta.json", {**profiles.meta, "sha256": sha256})


def read_profiles(folder) -> Profiles:
    """Users, IDs and codebooks of a PROFILES folder, checked by its sha256."""
    folder = Path(folder)
    meta = data.read_json(folder / "meta.json", "sha256", "settings")
    data.check_files(folder, meta)
    with np.load(folder / "profiles.npz", allow_pickle=False) as found:
        if "prior_0" not in found:
            raise ValueError(f"{folder} was made by another version of uip.py: fit again")
        names = found["names"].tolist()
        books = [Codebook(*(torch.from_numpy(found[f"{name}_{p}"]) for name in BOOK), 0.0, [])
                 for p in range(len(names))]
        return Profiles(found["users"], found["ids"], found["probability"], names, books, meta)


def command_bank(args) -> None:
    """PROFILES folders → bank. Several share one codebook, as of fit and infer; of a user the last counts."""
    began, first = time.time(), read_profiles(args.profiles[0])
    users, codes, probability = [], [], []
    for folder in reversed(args.profiles):
        profiles = read_profiles(folder)
        same = [torch.equal(a.mu, b.mu) for a, b in zip(profiles.books, first.books)]
        same.append(profiles.meta["settings"] == first.meta["settings"])
        if profiles.names != first.names or not all(same):
            raise ValueError(f"{folder} and {args.profiles[0]} have different codebooks: "
                             "a bank holds IDs of one codebook")
        new = ~np.isin(profiles.users, np.concatenate(users)) if users else slice(None)
        users.append(profiles.users[new])
        codes.append(profiles.ids[new] + 1)
        probability.append(profiles.probability[new])
    meta = {"names": first.names, "sizes": [len(book.pi) for book in first.books], "lm": first.meta.get("lm"),
            "profiles_sha256": [data.sha256_of(Path(folder) / "profiles.npz") for folder in args.profiles],
            "settings": first.meta["settings"], "code_sha256": data.sha256_of(Path(__file__)),
            "run": data.run_facts(began, "codebook.py")}
    out = Path(args.out)
    with data.exclusive_lock(out.resolve().with_name(out.resolve().name + ".lock")):
        bank = Bank.build(out, np.concatenate(users), np.concatenate(codes), meta,
                          probability=np.concatenate(probability),
                          codebook={f"{name}_{p}": getattr(book, name).numpy()
                                    for p, book in enumerate(first.books) for name in BOOK})
    size = sum((bank.folder / name).stat().st_size for name in Bank.FILES[:3])
    print(f"bank of {len(bank.keys)} users in {args.out}: {size / len(bank.keys):.1f} bytes a user, "
          f"codes {dict(zip(first.names, bank.meta['sizes']))}")


def command_verify(args) -> None:
    """Checks folders (data, text table, profiles, bank, results) against their own meta.json.

    Exit 4 names a file that differs. Of a text table, which may be large, only samples are recorded.
    """
    for folder in map(Path, args.folder):
        meta = data.read_json(folder / "meta.json")
        if "identity" in meta:
            files = read_table(folder)[1]["sample"]
        else:
            files = data.read_json(folder / "meta.json", "sha256")["sha256"]
            data.check_files(folder, meta)
        print(f"{folder}: {', '.join(files)} as recorded")


def command_lookup(args) -> None:
    """One line a user: id and codes. Put -- before ids that begin with a dash."""
    bank = Bank.open(args.bank)
    codes, sure = bank.lookup(args.user), bank.probability(args.user)
    for user, row, chance in zip(args.user, codes, sure):
        known = [f"{name}={code} ({p:.0%})" for name, code, p in zip(bank.meta["names"], row, chance)]
        print(user, *(known if row.any() else ["unknown"]))
    if not codes.any(1).all():
        raise ValueError(f"{int((~codes.any(1)).sum())} of {len(codes)} users are not in {args.bank}")


def log_odds_z(counts: np.ndarray) -> np.ndarray:
    """What sets each group apart: z of the smoothed log-odds against all other groups. counts [K, W] → [K, W].

    Informative Dirichlet prior (Monroe et al. 2008, "Fightin' Words"): a word's prior is its share of all words, one
    pseudo-count a word on average (ours), so that a rare word needs more than one lucky user.
    """
    if counts.shape[1] < 2:
        return np.zeros(counts.shape)
    total = counts.sum(0)                                              # (W,)
    prior = len(total) * total / max(1, total.sum())
    rest = total - counts
    odds = lambda y: np.log((y + prior) / (y.sum(1, keepdims=True) + prior.sum() - y - prior))
    return (odds(counts) - odds(rest)) / np.sqrt(1 / (counts + prior) + 1 / (rest + prior))


def rows_by_id(users: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Row in `known` of each of `users` (str arrays), −1 where absent: folders are joined by id, not by order."""
    order = known.argsort()
    at = np.minimum(np.searchsorted(known, users, sorter=order), len(known) - 1)
    return np.where(known[order[at]] == users, order[at], -1)


def command_cards(args) -> None:
    """What each ID means, one Markdown table a profile."""
    profiles, source = read_profiles(args.profiles), data.read_data(args.data)
    who = rows_by_id(source.users, profiles.users)[source.user]        # (R,) row of the profiles, or −1
    if not (who >= 0).any():
        raise ValueError(f"{args.profiles} and {args.data} have no user in common")
    train = source.part == 0
    told, *texts = data.row_texts(source, train, profiles.meta["settings"].get("kinds"))
    rows = np.flatnonzero(train & (who >= 0))
    place, text = data.list_entries(*texts, told[rows])
    teller = who[rows][place]                                          # (nnz,) row of the profiles that tells the text
    cell = lambda words: " ".join(str(words).split()).replace("|", "\\|")
    priced = train & np.isfinite(source.price) & (who >= 0)
    lines = []
    for p, name in enumerate(profiles.names):
        ids, k = profiles.ids[:, p], len(profiles.books[p].pi)
        views = np.array([name in source.layout["kinds"][kind]["view"] for kind, _ in source.texts])
        mine = views[text] & (ids[teller] >= 0)
        counts = np.bincount(ids[teller[mine]] * len(views) + text[mine], minlength=k * len(views))
        counts = counts.reshape(k, len(views))
        used = counts.sum(0) > 0
        words = [text for text, there in zip(source.texts, used) if there]
        lines += [f"### {cell(name)}", "",
                  "| ID | users | share | mean probability | sets it apart (kind, z of log-odds) | price, 10–90 % |",
                  "|---:|---:|---:|---:|---|---|"]
        for code, z in enumerate(log_odds_z(counts[:, used].astype(float))):
            member = ids == code
            top = [w for w in (-z).argsort(kind="stable")[:args.top] if z[w] > 0]
            apart = ", ".join(f"{cell(words[w][1])} ({words[w][0]} {z[w]:.1f})" for w in top)
            price = source.price[priced][member[who[priced]]]
            price = "{:.2f}–{:.2f}".format(*np.percentile(price, [10, 90])) if len(price) else "unknown"
            sure = f"{profiles.probability[member, p].mean():.2f}" if member.any() else ""
            lines.append(f"| {code + 1} | {member.sum()} | {member.mean():.1%} | {sure} | {apart} | {price} |")
        lines.append("")
    if args.out:
        data.write_text(Path(args.out), "\n".join(lines))
    else:
        print("\n".join(lines))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """An id that begins with a dash, as many of Yelp do, looks like an option: the message says what to do."""
        dash = "; put -- before ids that begin with a dash" if "USER" in message or "unrecognized" in message else ""
        super().error(message + dash)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run in (command_bank, command_lookup, command_verify, command_cards):
        name = run.__name__.removeprefix("command_")
        commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False).set_defaults(run=run)
    bank, lookup, verify, cards = commands.choices.values()
    bank.add_argument("--profiles", required=True, metavar="DIR", nargs="+",
                      help="folders written by uip.py fit, and by infer with its codebook")
    bank.add_argument("--out", required=True, metavar="DIR", help="where the bank goes; one there is replaced")
    lookup.add_argument("--bank", required=True, metavar="DIR", help="bank to look in")
    lookup.add_argument("user", nargs="+", metavar="USER", help="user id")
    verify.add_argument("folder", nargs="+", metavar="DIR", help="folder with a meta.json")
    cards.add_argument("--profiles", required=True, metavar="DIR", help="folder written by uip.py fit")
    cards.add_argument("--data", required=True, metavar="DIR", help="folder written by data.py")
    cards.add_argument("--out", metavar="FILE", help="Markdown file (default: standard output)")
    cards.add_argument("--top", type=data.positive_int, default=5, help="evidence values shown per ID (default: 5)")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    data.run_command("codebook.py", main)
