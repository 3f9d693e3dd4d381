"""Click models with and without user IDs: DeepFM and its peers, metrics, and paired runs over folds and seeds.

    python ctr.py run --data DIR --profiles DIR --protocol new --label liked --models deepfm
                      --features none,stats,userip --out DIR
    python ctr.py table DIR…                                         Markdown tables of the runs, with intervals

Every row sees only its user's past (a point-in-time join): a training row the rows before it; in `warm`, validation and
test rows the user's training rows. Every extra feature is one or more categorical fields, all as of the same moment,
and all of them quantised by codebook.fit_codebook on training rows only:

    none      nothing: the baseline that every other row is compared with
    userip    the collaborative IDs, from the gradients of the LLM's text table; a profile's name, such as hobby: one ID
    untuned   mean hidden states of the same texts instead of gradients
    reversed  hidden states after "behaviour, then the profile's name"
    bag       the same words, a random direction each: without what an LLM knows of them
    items     a random direction per item, one field: users of the same items, without a word of what they are
    stats     plain statistics, a field each: shares of the items' attributes, mean rating, mean log price
    gap       how far above others the user rates the same items: codes of one number
    random    a code per user, drawn for each seed; shuffled: the codes of another user at the same moment
    a+b       the fields of both, as in stats+userip

Use it alone: `from ctr import DeepFM, fit, auc`; the models take field sizes and give logits.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


# --------------------------------------------------------------------------------------------------- models

def uniform(rows: int, columns: int, bound: float) -> Tensor:
    """[rows, columns] in ±bound, row by row from a seed of its own: one draw of torch's global generator.

    So two models of one `torch.manual_seed`, one with more fields at the end, draw equal numbers for shared fields.
    """
    generator = torch.Generator().manual_seed(int(torch.randint(2 ** 62, ())))
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * bound


class Fields(nn.Module):
    """One embedding table for all fields; a value outside its field (new, negative) reads the field's row 0.

    Weights start in ±0.01: not at 0, which is a saddle point for FM's factors, and close to it, because a value that
    is seen only once hardly moves and should add nearly nothing to the logit.
    """

    def __init__(self, sizes, width: int):
        super().__init__()
        sizes = torch.as_tensor(list(sizes))
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        self.table = nn.Embedding(int(sizes.sum()), width, _weight=uniform(int(sizes.sum()), width, 0.01))

    def forward(self, x: Tensor) -> Tensor:
        """x: integers [B, F] → [B, F, width]."""
        known = (x >= 0) & (x < self.sizes)
        return self.table(torch.where(known, x, 0) + self.offsets)               # (B, F, width)


def mlp(width: int, hidden=(), dropout: float = 0.0) -> nn.Sequential:
    """[B, width] → [B, 1]: linear, ReLU, dropout per hidden layer, then linear. nn.Linear's bounds."""
    layers = []
    for size in (*hidden, 1):
        linear = nn.utils.skip_init(nn.Linear, width, size)           # its own draws would depend on width
        linear.weight = nn.Parameter(uniform(width, size, width ** -0.5).T.contiguous())
        linear.bias = nn.Parameter(uniform(1, size, width ** -0.5)[0])
        layers += [linear, nn.ReLU(), nn.Dropout(dropout)]
        width = size
    return nn.Sequential(*layers[:-2])


class LR(nn.Module):
    """Logistic regression: a weight per value, and a bias; dim is not used. x [B, F] → logits [B]."""

    def __init__(self, field_sizes, dim: int = 8):
        super().__init__()
        self.fields, self.bias = Fields(field_sizes, 1), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + self.fields(x).sum((1, 2))


class FM(nn.Module):
    """Factorisation machine (Rendle 2010): LR + Σ_{i<j} ⟨v_i, v_j⟩. x [B, F] → logits [B].

    Column 0 of a value's row is its weight in LR, the other `dim` its factors v: both come with one gather.
    """

    def __init__(self, field_sizes, dim: int = 8):
        super().__init__()
        self.fields, self.bias = Fields(field_sizes, 1 + dim), nn.Parameter(torch.zeros(()))

    def gather(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """→ the FM's logits [B], by Σ_{i<j} ⟨v_i, v_j⟩ = ½ (|Σ v|² − Σ |v|²), and the factors v [B, F, d]."""
        rows = self.fields(x)                                                    # (B, F, 1 + d)
        w, v = rows.split([1, rows.shape[2] - 1], 2)                             # slices' backward would add
        v = v.contiguous()
        pairs = v.sum(1).square().sum(1) - v.square().sum((1, 2))
        return self.bias + w.sum((1, 2)) + pairs / 2, v

    def forward(self, x: Tensor) -> Tensor:
        return self.gather(x)[0]


class DeepFM(FM):
    """DeepFM (Guo et al. 2017): an FM and an MLP over the same factors, added. x [B, F] → logits [B]."""

    def __init__(self, field_sizes, dim: int = 8, hidden=(64, 32), dropout: float = 0.2):
        super().__init__(field_sizes, dim)
        self.mlp = mlp(len(field_sizes) * dim, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        logits, v = self.gather(x)
        return logits + self.mlp(v.flatten(1))[:, 0]


class Cross(nn.Module):
    """Cross network: x_{l+1} = x_0 (w_l · x_l) + b_l + x_l, and its part of the output. [B, n] → [B]."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.w = nn.Parameter(uniform(width, layers, width ** -0.5))
        self.b = nn.Parameter(torch.zeros(width, layers))
        self.out = nn.Parameter(uniform(width, 1, width ** -0.5)[:, 0])

    def forward(self, x0: Tensor) -> Tensor:
        x = x0                                                                   # (B, n)
        for w, b in zip(self.w.T, self.b.T):
            x = x0 * (x @ w)[:, None] + b + x
        return x @ self.out


class DCN(nn.Module):
    """Deep & cross network (Wang et al. 2017). x [B, F] → logits [B].

    The paper's output layer over [cross; deep] is one weight vector, so a sum of two: each holds its own.
    """

    def __init__(self, field_sizes, dim: int = 8, cross: int = 3, hidden=(16, 16), dropout: float = 0.2):
        super().__init__()
        self.fields = Fields(field_sizes, dim)
        self.cross = Cross(len(field_sizes) * dim, cross)
        self.mlp = mlp(len(field_sizes) * dim, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x0 = self.fields(x).flatten(1)                                           # (B, F·d)
        return self.cross(x0) + self.mlp(x0)[:, 0]


MODELS = {"lr": LR, "fm": FM, "deepfm": DeepFM, "dcn": DCN}


# -------------------------------------------------------------------------------------------------- metrics

def check_labels(y, score=None) -> np.ndarray:
    """y as float64 [n]; ValueError unless every label is 0 or 1, there is one, and a score, not nan, for each."""
    y = np.asarray(y, np.float64)
    if y.ndim != 1 or not len(y) or not np.isin(y, (0, 1)).all():
        raise ValueError(f"labels are one list of 0 and 1, got {np.unique(y)[:5].tolist()}, shape {list(y.shape)}")
    if score is not None and np.shape(score) != y.shape:
        raise ValueError(f"{len(y)} labels need as many scores, got the shape {list(np.shape(score))}")
    if score is not None and np.isnan(np.asarray(score, np.float64)).any():
        raise ValueError("a score is nan")
    return y


def grouped_auc(group, y, score) -> tuple[np.ndarray, np.ndarray]:
    """AUC inside each group, ties count half. group, y, score: [n] → auc [G] (one class: nan), rows [G]."""
    y, score = check_labels(y, score), np.asarray(score)
    order = np.lexsort((score, group))
    g, y, s = np.asarray(group)[order], y[order], score[order]
    first = np.append(True, g[1:] != g[:-1])
    tie = np.cumsum(first | np.append(True, s[1:] != s[:-1])) - 1
    g, size = np.cumsum(first) - 1, np.bincount(tie)
    rank = (np.cumsum(size) - (size - 1) / 2)[tie]                       # the mean rank of equal scores
    rows, positive = np.bincount(g), np.bincount(g, y)
    rank -= (np.cumsum(rows) - rows)[g]                                          # 1 … rows inside the group
    with np.errstate(invalid="ignore"):
        wins = np.bincount(g, rank * y) - positive * (positive + 1) / 2
        return wins / (positive * (rows - positive)), rows


def auc(y, score) -> float:
    """P(positive scores above negative), ties count half. y 0/1, score: [n]; one class: nan, with a warning."""
    if len(np.unique(check_labels(y, score))) < 2:
        warnings.warn(f"AUC is not defined: all {len(y)} labels are of one class", stacklevel=2)
        return math.nan
    return float(grouped_auc(np.zeros(len(y), int), y, score)[0][0])


def gauc(user, y, score) -> float:
    """AUC per user, weighted by rows, over users with both classes (none: nan). user, y 0/1, score: [n]."""
    each, rows = grouped_auc(user, y, score)
    both = np.isfinite(each)
    return float(np.average(each[both], weights=rows[both])) if both.any() else math.nan


def logloss(y, logit) -> float:
    """Mean of −log P(y) in nats, from logits: finite at any finite logit. y 0/1 [n], logit [n]."""
    y, z = check_labels(y, logit), np.asarray(logit, np.float64)
    return float(np.mean(np.logaddexp(0, z) - y * z))


# ------------------------------------------------------------------------------------------------- training

def optimiser(model: nn.Module, lr: float, l2: float) -> torch.optim.Optimizer:
    """Adam, fused where torch has it; l2 acts on the embedding table only."""
    table = model.fields.table.weight
    rest = [weight for weight in model.parameters() if weight is not table]
    return torch.optim.Adam([{"params": [table], "weight_decay": l2}, {"params": rest}], lr=lr,
                            fused=table.device.type in ("cpu", "cuda"))


def train_epoch(model: nn.Module, adam, x: Tensor, y: Tensor, batch: int, generator: torch.Generator) -> None:
    """One pass in a fresh random order. x [R, F], y float [R]: one gather an epoch, batches are slices."""
    model.train()
    order = torch.randperm(len(y), generator=generator).to(y.device)
    for rows, labels in zip(x[order].split(batch), y[order].split(batch)):
        adam.zero_grad()
        F.binary_cross_entropy_with_logits(model(rows), labels).backward()
        adam.step()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> np.ndarray:
    """x [R, F] → logits float32 [R]."""
    model.eval()
    return torch.cat([model(rows) for rows in x.split(65536)]).cpu().numpy()


def fit(model: nn.Module, train, valid, *, lr=1e-2, batch=256, epochs=50, patience=3, l2=1e-5,
        seed=0) -> tuple[float, int, int]:
    """Train until the validation AUC has not risen for `patience` epochs; the model ends at its best epoch.

    train, valid: (x integers [R, F], y float [R]) → best validation AUC, its epoch from 1, epochs run.
    Raises ValueError for no epoch, empty or one-class parts, other labels than 0 and 1, rows without a label each, or
    training that diverges.
    """
    if epochs < 1:
        raise ValueError(f"training needs an epoch at least, got {epochs}")
    for name, (x, y) in (("training", train), ("validation", valid)):
        if len(x) != len(y):
            raise ValueError(f"{len(x)} {name} rows have {len(y)} labels")
        if len(np.unique(check_labels(y.cpu()))) < 2:
            raise ValueError(f"all {len(y)} {name} labels are of one class: there is nothing to learn")
    adam, generator, best, best_epoch = optimiser(model, lr, l2), torch.Generator().manual_seed(seed), -math.inf, 0
    for epoch in range(1, epochs + 1):
        train_epoch(model, adam, *train, batch, generator)
        logits = predict(model, valid[0])
        if not np.isfinite(logits).all():
            raise ValueError(f"training diverged in epoch {epoch}: choose a smaller learning rate than {lr:g}")
        score = auc(valid[1].cpu(), logits)
        if score > best:
            best, best_epoch = score, epoch
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best_epoch >= patience:
            break
    model.load_state_dict(kept)
    return best, best_epoch, epoch


# Two-sided 5 % points of Student's t for 1 … 30 degrees of freedom (standard table).
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def interval(values) -> tuple[float, float]:
    """Mean of n ≥ 1 values and the half width of its 95 % t-interval (nan for n = 1; by 1.96 if n > 31)."""
    n = len(values)
    if n == 1:
        return float(values[0]), math.nan
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n))


# ---- command line

try:
    import data
    from codebook import (MEASUREMENT, Evidence, bag_of_words, code_sizes, fit_codebook, hash_users, ids_before,
                          profile_evidence, read_profiles, read_table, table_hash)
except ImportError:                                                    # copied alone: all but the commands works
    data = None

FEATURES = ("none", "userip", "untuned", "reversed", "bag", "stats", "gap", "random", "shuffled", "items")
ABLATIONS = {"untuned": "tuning", "reversed": "causality", "bag": "llm"}             # feature → the part that it lacks
KNOWN = (0, 1, 2, 4, 8, 16)                                            # least number of known rows in each bucket


class Fold(NamedTuple):
    """Who trains, validates and is tested, and what each row of the data set may know."""
    part: np.ndarray             # int8 [R]: 0 train, 1 valid, 2 test
    seen: np.ndarray             # int64 [R]: how many of its user's first rows a row may see
    row: np.ndarray              # int64 [n]: the data set's row behind each example
    x: np.ndarray                # int32 [n, F]: codes from 1 of values seen in training, 0 = other
    y: np.ndarray                # float32 [n]
    sizes: list[int]             # per field, the 0 included


def assign_parts(source, protocol: str, fold: int) -> np.ndarray:
    """Part of each row. warm: the data set's own split by time. new: a hash puts users into ten groups; of fold f of 5,
    groups 2f and 2f + 1 are tested, 2f + 2 (mod 10) validates, seven train. → int8 [R]"""
    if protocol == "warm":
        return source.part
    group = (hash_users(source.users) % np.uint64(10)).astype(int)
    part = np.zeros(10, np.int8)
    part[(2 * fold + 2) % 10], part[[2 * fold, 2 * fold + 1]] = 1, 2
    return part[group][source.user]


def rows_seen(source, part: np.ndarray, protocol: str) -> np.ndarray:
    """How many of its user's first rows each row may see: those before it; in warm, training rows only. → int64 [R]"""
    before = np.arange(len(source.user)) - np.searchsorted(source.user, source.user)
    if protocol == "new":
        return before
    return np.minimum(before, np.bincount(source.user[part == 0], minlength=len(source.users))[source.user])


def draw_negatives(source, train: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """For each row whose item has training rows, an item that its user never rated (label chosen).

    Drawn by training popularity. → rows [n], items [n]. Rows of items without training rows are left out, since no
    negative is such an item, and a model could tell positives by it. So are rows of users who rated everything.
    """
    rng, count = np.random.default_rng([seed, 7]), np.bincount(source.x[train, 1], minlength=len(source.items))
    rated = np.unique(source.user.astype(np.int64) * len(count) + source.x[:, 1])
    rows, cumulative = np.flatnonzero(count[source.x[:, 1]] > 0), count.cumsum()
    items, todo = np.zeros(len(rows), np.int64), np.arange(len(rows))
    for _ in range(200):
        if not len(todo):
            break
        items[todo] = np.searchsorted(cumulative, rng.integers(cumulative[-1], size=len(todo)), side="right")
        pairs = source.user[rows[todo]].astype(np.int64) * len(count) + items[todo]
        todo = todo[rated[np.minimum(np.searchsorted(rated, pairs), len(rated) - 1)] == pairs]
    return np.delete(rows, todo), np.delete(items, todo)


def make_fold(source, protocol: str, label: str, fold: int) -> Fold:
    """The examples of one fold. Vocabulary and popularity come from training rows only."""
    part = assign_parts(source, protocol, fold)
    row, item, y = np.arange(len(source.user)), source.x[:, 1], source.rating > 3
    if label == "chosen":
        rows, negative = draw_negatives(source, part == 0)
        row, item = np.concatenate([rows, rows]), np.concatenate([item[rows], negative])
        y = np.arange(len(row)) < len(rows)
    columns = [source.x[row, 0]] * (protocol == "warm") + list(source.items[item].T)         # user, item, attributes
    x, sizes = [], []
    for codes in columns:
        known = np.setdiff1d(codes[part[row] == 0], [0])
        new_code = np.zeros(codes.max(initial=0) + 1, np.int32)
        new_code[known] = np.arange(1, len(known) + 1)
        x.append(new_code[codes])
        sizes.append(len(known) + 1)
    return Fold(part, rows_seen(source, part, protocol), row, np.stack(x, 1), y.astype(np.float32), sizes)


def row_evidence(value: np.ndarray, known: np.ndarray | None = None) -> Evidence:
    """Evidence whose rows tell one value each, [R, D], of weight 1; rows that are not known [R] tell nothing."""
    known, row = np.ones(len(value), bool) if known is None else known, torch.arange(len(value))
    return Evidence(row, torch.from_numpy(np.append(0, known.cumsum())), torch.from_numpy(np.flatnonzero(known)),
                    torch.from_numpy(value.astype(np.float32)), torch.ones(len(value)))


def plain_statistics(source, train: np.ndarray) -> list[Evidence]:
    """Control "stats" without any LLM (ours): shares of the items' attribute values, mean rating, mean log price.

    A field each. Of all attribute values the 512 most frequent in training count. A row without a price tells none.
    """
    columns, found = [f for f, name in enumerate(source.fields) if f > 1 and name != "price"], []
    if columns:
        first = np.cumsum([0] + [int(source.items[:, f - 1].max()) for f in columns])        # values, from 1
        text = source.items[:, np.array(columns) - 1]
        text = np.where(text > 0, text + first[:-1], 0)                # (I + 1, attributes)
        count = np.bincount(text[source.x[train, 1]].ravel(), minlength=first[-1] + 1)[1:]
        top = np.argsort(-count, kind="stable")[:min(512, max(1, (count > 0).sum()))] + 1  # those of training rows
        value = np.zeros((first[-1] + 1, len(top)), np.float32)
        value[top, np.arange(len(top))] = 1
        found.append(Evidence(torch.from_numpy(source.x[:, 1]).long(), torch.arange(len(text) + 1) * len(columns),
                              torch.from_numpy(text.reshape(-1)).long(), torch.from_numpy(value),
                              torch.full((len(value),), 1 / len(columns))))
    found.append(row_evidence(source.rating[:, None]))
    priced = np.isfinite(source.price)
    if (priced & train).any():
        found.append(row_evidence(np.log(np.where(priced, source.price, 1).clip(0.01))[:, None], priced))
    return found


def rating_gap(source, train: np.ndarray) -> Evidence:
    """Control "gap" (ours): a row's rating less its item's mean in training, shrunk to the global mean by 5 ratings."""
    item, excess = source.x[:, 1], source.rating - source.rating[train].mean()
    size = int(item.max()) + 1
    usual = np.bincount(item[train], excess[train], size) / (np.bincount(item[train], minlength=size) + 5)
    return row_evidence((excess - usual[item])[:, None])


def item_directions(source) -> Evidence:
    """Control "items" (ours): a row tells which item it is, as a word of its own, and nothing about the item."""
    value, weight = map(torch.from_numpy, bag_of_words(list(map(str, range(len(source.items))))))
    item = torch.arange(len(value))
    return Evidence(torch.from_numpy(source.x[:, 1]).long(), torch.arange(len(value) + 1), item, value, weight)


def ids_as_of_rows(source, fold: Fold, evidence: Evidence, k: int, args) -> tuple[np.ndarray, np.ndarray]:
    """Each row's ID made of the rows that it may see: codes int64 [R] from 1 (0 = nothing known), probability [R].

    The codebook is fitted on training rows only.
    """
    train = torch.from_numpy(np.flatnonzero(fold.part == 0))
    user, item = torch.from_numpy(source.user).long(), torch.from_numpy(source.x[:, 1]).long()
    book, *_ = fit_codebook(evidence._replace(told=evidence.told[train]), user[train], item[train], len(source.users),
                            k, directions=args.directions, seed=args.codebook_seed, without=args.without)
    seen = torch.from_numpy(fold.seen)
    if args.without == "time":                                         # ablation: a training row sees all training rows
        seen = torch.bincount(user[train], minlength=len(source.users))[user]
    if args.without == "ties":                                         # … no row sees one of its own time stamp
        moment = torch.stack([user, torch.from_numpy(source.time)]).unique_consecutive(dim=1, return_inverse=True)[1]
        seen = seen.minimum(torch.searchsorted(moment, moment) - torch.searchsorted(user, user))
    ids, probability = ids_before(book, evidence, user, seen)
    return (ids + 1).numpy(), torch.where(ids >= 0, probability, 0).numpy()


class Features:
    """The codes of each feature set in one fold, made when first asked for."""

    def __init__(self, source, fold: Fold, table: dict | None, codes: list[int], args):
        self.source, self.fold, self.table, self.sizes, self.args, self.made = source, fold, table, codes, args, {}

    def evidence(self, name: str) -> list[tuple[Evidence, int]]:
        """Evidence and number of codes, for each field of one feature."""
        train, profiles = self.fold.part == 0, list(self.source.layout["profiles"])
        if name == "gap":
            return [(rating_gap(self.source, train), max(self.sizes))]
        if name == "items":
            return [(item_directions(self.source), max(self.sizes))]
        if name == "stats":
            return list(zip(plain_statistics(self.source, train), itertools.cycle(self.sizes)))
        lists = data.row_texts(self.source, train, self.args.kinds)
        without = ABLATIONS.get(name, self.args.without)
        found = [(profile_evidence(self.source, self.table, lists, p, without), self.sizes[p])
                 for p, profile in enumerate(profiles) if name not in profiles or name == profile]
        return [one for one in found if len(one[0].text)] or found     # --kinds may leave a profile without a text

    def codes(self, name: str, seed: int) -> tuple[np.ndarray, list[int]]:
        """int64 [R, E] of one feature (not a sum a+b), and codes per field, without the 0."""
        if name not in ("random", "shuffled"):
            return self.fitted(name)
        own, sizes = self.fitted("userip")
        rng, users = np.random.default_rng([seed, FEATURES.index(name)]), len(self.source.users)
        if name == "random":
            drawn = rng.integers(1, np.array(sizes) + 1, (users, len(sizes)))
            return np.where(own > 0, drawn[self.source.user], 0), sizes
        order = rng.permutation(users)                                 # in a circle, so nobody keeps their own code
        donor = np.roll(order, 1)[np.argsort(order)][self.source.user]
        first = np.searchsorted(self.source.user, np.arange(users))
        count = np.bincount(self.source.user, minlength=users)
        return own[first[donor] + np.minimum(self.fold.seen, count[donor] - 1)], sizes    # after as many rows, or last

    def fitted(self, name: str) -> tuple[np.ndarray, list[int]]:
        """codes(name) of a feature that has evidence; made once, as no seed plays a part."""
        if name not in self.made:
            fields = self.evidence(name)
            found = [ids_as_of_rows(self.source, self.fold, *field, self.args) for field in fields]
            sure = [np.where(probability >= self.args.sure, ids, 0) for ids, probability in found]
            self.made[name] = np.stack(sure, 1), [k for _, k in fields]
        return self.made[name]

    def columns(self, names: str, seed: int) -> tuple[np.ndarray, list[int]]:
        """Extra fields of a feature set such as "stats+userip": int64 [R, E], and their sizes, the 0 included."""
        found = [self.codes(name, seed) for name in names.split("+") if name != "none"]
        none = np.zeros((len(self.source.user), 0), np.int64)
        return np.concatenate([none, *(codes for codes, _ in found)], 1), [k + 1 for _, sizes in found for k in sizes]


def run_one(source, fold: Fold, columns: np.ndarray, sizes: list[int], model: str, seed: int, args) -> dict:
    """Trains one model on one fold with one feature set, and scores the test examples once."""
    x = np.concatenate([fold.x, columns[fold.row]], 1).astype(np.int32)                      # (n, F + E)
    part = fold.part[fold.row]
    parts = [[torch.from_numpy(a[part == p]).to(args.device) for a in (x, fold.y)] for p in (0, 1, 2)]
    torch.manual_seed(seed)
    net = MODELS[model](fold.sizes + sizes, dim=args.dim).to(args.device)
    torch.manual_seed(seed)                            # the same dropout masks, whatever the number of fields
    best, epoch, ran = fit(net, *parts[:2], lr=args.lr[model], l2=args.l2[model], batch=args.batch, epochs=args.epochs,
                           patience=args.patience, seed=seed)
    y, logits, row = fold.y[part == 2], predict(net, parts[2][0]), fold.row[part == 2]
    rounded = lambda value: None if math.isnan(value) else round(value, 6)
    figures = {"auc": rounded(auc(y, logits)), "gauc": rounded(gauc(source.user[row], y, logits)),
               "logloss": rounded(logloss(y, logits)), "valid_auc": round(best, 6), "epoch": epoch, "epochs_run": ran}
    if args.protocol == "new":
        bucket = np.searchsorted(KNOWN, fold.seen[row], side="right")
        groups = [(least, bucket == b) for b, least in enumerate(KNOWN, 1)]
        figures["known"] = {str(least): {"rows": int(mine.sum()), "auc": rounded(auc(y[mine], logits[mine])),
                                         "logloss": rounded(logloss(y[mine], logits[mine]))}
                            for least, mine in groups if len(np.unique(y[mine])) == 2}
    return figures


def read_runs(folder: Path, cut: bool = False) -> list[dict]:
    """The lines of runs.jsonl but for a torn last one, left by a killed run; cut: take it off the file, too."""
    path = folder / "runs.jsonl"
    content = path.read_bytes() if path.exists() else b""
    whole = content[:content.rfind(b"\n") + 1]
    if cut and whole != content:
        os.truncate(path, len(whole))
    try:
        runs = [json.loads(line) for line in whole.splitlines()]
        if not all({"model", "features", "fold", "seed", "auc", "gauc", "logloss"} <= set(run) for run in runs):
            raise ValueError("a line is not a run")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): pass --restart to run again") from None
    return runs


def choose(text: str, valid, option: str) -> list[str]:
    """A comma-separated list of names without repeats, each one of `valid`; --features may join some as a+b."""
    names = list(dict.fromkeys(name for name in text.split(",") if name))
    parts = [part for name in names for part in (name.split("+") if option == "--features" else [name])]
    wrong = [part for part in parts if part not in valid]
    if wrong or not names:
        raise data.CommandError(2, f"{option}: {wrong[0] if wrong else 'nothing'!r} is none of {', '.join(valid)}")
    return names


def by_model(text: str) -> dict[str, float]:
    """The argparse type of --lr and --l2: "0.01", or "0.001,lr=0.01,fm=0.03", where some models have their own."""
    first, *others = text.split(",")
    own = dict(part.split("=", 1) for part in others if "=" in part)
    if len(own) < len(others) or not own.keys() <= MODELS.keys():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, and then MODEL=NUMBER of {', '.join(MODELS)}")
    return {model: data.nonnegative_float(own.get(model, first)) for model in MODELS}


def check_fold(fold: Fold, number: int) -> None:
    """ValueError for a fold that nothing can be trained or tested on."""
    for part, what in enumerate(("training", "validation", "test")):
        answers = np.unique(fold.y[fold.part[fold.row] == part]).tolist()
        if len(answers) < 2:
            raise ValueError(f"fold {number} has {'one class of' if answers else 'no'} {what} examples: take more "
                             "users, or fewer --folds")


def read_fitted(args, source, parts: set[str]) -> tuple[dict, dict | None, dict]:
    """How --profiles was fitted, its text table, and what to record of both; without --profiles, uip.py's defaults.

    parts: the features wanted. Raises ValueError or CommandError where --profiles fits neither them nor the data.
    """
    fitted = {"codes": [4, 3], "directions": 16, "seed": 0, "kinds": None, "without": ""}
    if not args.profiles:
        return fitted, None, {"lm": None, "table": None}
    made = data.read_json(Path(args.profiles) / "meta.json", "settings", "lm", "data_sha256")
    fitted |= {name: value for name, value in made["settings"].items() if name in fitted}
    if made["settings"].get("exact_rounds") or made["settings"].get("exact_users"):
        raise data.CommandError(2, f"{args.profiles} was made with --exact-rounds or --exact-users, which have no "
                                   "closed form for IDs as of a row: fit without them")
    if "table" not in made:
        raise data.CommandError(2, f"{args.profiles} was made by infer: pass the folder that fit made")
    if made["data_sha256"]["texts.jsonl"] != source.meta["sha256"]["texts.jsonl"]:
        raise ValueError(f"{args.profiles} was made from other texts than those of {args.data}: run `uip.py fit` on it")
    table, about = read_table(Path(args.profiles) / made["table"])
    if "reversed" not in table and ((args.without or fitted["without"]) == "causality" or "reversed" in parts):
        raise data.CommandError(2, "--features reversed needs a text table with it: pass --reversed to uip.py fit")
    identity = table_hash(about["identity"])
    if made.get("table_sha256", identity) != identity:
        raise ValueError(f"{args.profiles} was made from another text table than is now in {made['table']}: "
                         "run `uip.py fit` again")
    return fitted, table, {"lm": made["lm"], "table": identity}


def command_run(args) -> None:
    """Every model × feature set × fold × seed that --out does not hold yet, a line each in runs.jsonl."""
    began, out = time.time(), Path(args.out)
    source, models = data.read_data(args.data), choose(args.models, MODELS, "--models")
    profiles, kinds = list(source.layout["profiles"]), source.layout["kinds"]
    for name in profiles:
        if name in FEATURES or "+" in name or "," in name:
            raise data.CommandError(2, f"{args.data}: a profile's name, {name!r}, is also the name of a feature or has "
                                       "a + or a comma: rename it in the layout")
    features = choose(args.features, (*FEATURES, *profiles), "--features")
    parts = {part for name in features for part in name.split("+")}
    args.kinds = args.kinds and choose(args.kinds, kinds, "--kinds")
    if args.without == "time" and args.protocol != "warm":
        raise data.CommandError(2, "--without time needs --protocol warm: in new, tested users have no training rows")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:                    # torch without CUDA asserts
        raise data.CommandError(2, f"--device {args.device} is not here: {str(error).splitlines()[0]}") from None
    if not args.profiles and parts - {"none", "stats", "gap", "items"}:
        raise data.CommandError(2, f"--features {args.features} needs --profiles DIR, the folder that uip.py fit wrote")
    fitted, table, origin = read_fitted(args, source, parts)
    for name in ("codes", "directions", "kinds", "without"):
        setattr(args, name, getattr(args, name) or fitted[name])
    args.codebook_seed = fitted["seed"]
    if len(args.codes) != len(profiles):
        raise data.CommandError(2, f"--codes: {len(args.codes)} numbers for {len(profiles)} profiles, "
                                   f"{', '.join(profiles)}")
    if args.folds and args.protocol != "new":
        raise data.CommandError(2, "--folds belongs to --protocol new: warm has one split")
    folds = range(args.folds or 5 if args.protocol == "new" else 1)
    keys = ("codes", "directions", "codebook_seed", "kinds", "without", "sure", "dim", "lr", "l2", "batch", "epochs",
            "patience")
    settings = {
        "dataset": source.name, "protocol": args.protocol, "label": args.label, "folds": len(folds),
        **{key: getattr(args, key) for key in keys},
        "data_sha256": source.meta["sha256"], **origin,
        "code_sha256": {name: data.sha256_of(Path(__file__).with_name(name)) for name in ("ctr.py", "codebook.py")}}
    data.refuse_others(out, "runs.jsonl")
    for number in folds:
        check_fold(make_fold(source, args.protocol, args.label, number), number)
    with data.exclusive_lock(out / ".lock"):
        held = [file for file in out.glob("runs.jsonl") if file.stat().st_size or args.restart]
        data.claim(out / "meta.json", settings, held, args.restart)
        done = {(run["fold"], run["features"], run["model"], run["seed"]) for run in read_runs(out, cut=True)}
        wanted = list(itertools.product(folds, features, models, range(args.seeds)))
        todo = [one for one in wanted if one not in done]
        data.write_json(out / "meta.json", {**settings, "run": data.run_facts(began, "ctr.py")})
        bar = tqdm(todo, initial=len(wanted) - len(todo), total=len(wanted), desc="runs", unit="run", delay=2)
        with open(out / "runs.jsonl", "a", encoding="utf-8") as file:
            for number, group in itertools.groupby(bar, key=lambda one: one[0]):
                fold = make_fold(source, args.protocol, args.label, number)
                columns = Features(source, fold, table, args.codes, args).columns
                for _, feature, model, seed in group:
                    figures = run_one(source, fold, *columns(feature, seed), model, seed, args)
                    one = {"fold": number, "features": feature, "model": model, "seed": seed, **figures}
                    file.write(json.dumps(one) + "\n")
                    file.flush()
        data.write_json(out / "meta.json", {**settings, "run": data.run_facts(began, "ctr.py"),
                                            "sha256": {"runs.jsonl": data.sha256_of(out / "runs.jsonl")}})
    print(f"{args.out}: {len(wanted)} runs, {len(wanted) - len(todo)} of them from before")


# ---------------------------------------------------------------------------------------------------- table

def by_fold(runs: list[dict], metric, model: str, features: str) -> dict[int, dict[int, float]]:
    """fold → seed → metric(run) of one model and feature set; runs where the metric is None are left out."""
    found = {}
    for run in runs:
        if run["model"] == model and run["features"] == features and metric(run) is not None:
            found.setdefault(run["fold"], {})[run["seed"]] = metric(run)
    return found


def difference(runs: list[dict], metric, model: str, a: str, b: str) -> tuple[float, float, int] | None:
    """Mean of a − b, half width of its 95 % interval, number of units; None without pairs.

    Paired per fold and seed, mean over seeds within a fold. With several folds the interval is over folds, so over
    users; with one (protocol warm) it is over seeds.
    """
    first, second = by_fold(runs, metric, model, a), by_fold(runs, metric, model, b)
    gaps = [[first[fold][seed] - second[fold][seed] for seed in sorted(set(first[fold]) & set(second[fold]))]
            for fold in sorted(set(first) & set(second))]
    gaps = [gap for gap in gaps if gap]
    if not gaps:
        return None
    units = gaps[0] if len(gaps) == 1 else [float(np.mean(gap)) for gap in gaps]
    return *interval(units), len(units)


def metric_mean(runs: list[dict], metric, model: str, features: str) -> float | None:
    """Mean over seeds, then over folds; None where nothing was run."""
    found = by_fold(runs, metric, model, features)
    return float(np.mean([np.mean(list(seeds.values())) for seeds in found.values()])) if found else None


def cell(value: float | None) -> str:
    """'0.7123', or blank where nothing was run."""
    return "" if value is None else f"{value:.4f}"


def signed(found: tuple[float, float, int] | None) -> str:
    """'+0.0123 [+0.0100, +0.0146]', or blank where nothing was run."""
    if found is None:
        return ""
    mean, half, _ = found
    return f"{mean:+.4f}" + ("" if math.isnan(half) else f" [{mean - half:+.4f}, {mean + half:+.4f}]")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: first column left, the others right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def overall_table(runs: list[dict], meta: dict) -> str:
    """Model × features: AUC, gAUC, logloss, and AUC and logloss less those of the model without extra features."""
    rows, over = [], "folds" if meta["folds"] > 1 else "seeds"
    order = list(dict.fromkeys(run["model"] for run in runs))
    pairs = dict.fromkeys((run["model"], run["features"]) for run in runs)
    for model, features in sorted(pairs, key=lambda pair: order.index(pair[0])):
        means = [metric_mean(runs, lambda run: run[name], model, features) for name in ("auc", "gauc", "logloss")]
        gaps = [difference(runs, lambda run: run[name], model, features, "none") if features != "none" else None
                for name in ("auc", "logloss")]
        first, second = (set(by_fold(runs, lambda run: run["logloss"], model, one)) for one in (features, "none"))
        if meta["folds"] > 1 and len(first & second) == 1:             # so far: an interval over seeds, none over users
            gaps = [gap and (gap[0], math.nan, 1) for gap in gaps]
        rows.append([model, features, *map(cell, means), *map(signed, gaps)])
    return markdown(["model", "features", "AUC", "gAUC", "logloss", f"AUC − none [95 % over {over}]",
                     f"logloss − none [95 % over {over}]"], rows)


def known_auc(least: int):
    """The metric "AUC of test rows with at least so many known rows", up to the next bucket of KNOWN."""
    return lambda run: run.get("known", {}).get(str(least), {}).get("auc")


def known_table(runs: list[dict], model: str) -> str:
    """AUC by number of rows that are known of a user (protocol new), a row per feature set."""
    names = [f"{a}" if b == a + 1 else f"{a}–{b - 1}" for a, b in zip(KNOWN, KNOWN[1:])] + [f"{KNOWN[-1]}+"]
    return markdown(["features", *(f"{name} known" for name in names)], [
        [features, *(cell(metric_mean(runs, known_auc(least), model, features)) for least in KNOWN)]
        for features in dict.fromkeys(run["features"] for run in runs if run["model"] == model)])


def folder_tables(folder: Path) -> str:
    """The tables of one results folder."""
    meta, runs = data.read_json(folder / "meta.json", "dataset", "protocol", "label", "folds"), read_runs(folder)
    if not runs:
        raise ValueError(f"{folder} holds no runs")
    text = f"{meta['dataset']}, protocol {meta['protocol']}, label {meta['label']}\n\n{overall_table(runs, meta)}"
    for model in dict.fromkeys(run["model"] for run in runs if "known" in run):
        text += f"\nAUC of {model} by number of known rows\n\n{known_table(runs, model)}"
    return text


def command_table(args) -> None:
    """Markdown tables of results folders."""
    print("\n".join(folder_tables(Path(folder)) for folder in args.folder))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("run", help=command_run.__doc__, allow_abbrev=False)
    sub.set_defaults(run=command_run)
    sub.add_argument("--data", required=True, help="folder made by data.py")
    sub.add_argument("--profiles", help="folder made by uip.py fit: its text table, and how it made codebooks")
    sub.add_argument("--out", required=True, help="folder for runs.jsonl and meta.json")
    for flag, default, kind, what in (
            ("protocol", "warm", ["warm", "new"], "all users train, or folds of users"),
            ("label", "liked", ["liked", "chosen"], "rating > 3, or bought against a drawn item"),
            ("models", "deepfm", str, f"of {', '.join(MODELS)}"),
            ("features", "none,random,shuffled,stats,gap,userip", str,
             f"of {', '.join(FEATURES)}, a profile's name, or a+b"),
            ("folds", None, range(1, 6), "with new: the first so many of five folds; None: all"),
            ("seeds", 2, data.positive_int, "training seeds"),
            ("codes", None, code_sizes, "codebook size of each profile; None: as fitted"),
            ("directions", None, data.positive_int, "most directions of a codebook; None: as fitted"),
            ("kinds", None, str, "kinds of evidence to use; None: as fitted"),
            ("sure", 0.0, data.fraction, "IDs less probable than this count as unknown"),
            ("without", "", ["em", "kmeans", "signal", "time", "ties", *MEASUREMENT],
             "leave a part out; blank: as fitted"),
            ("dim", 8, data.positive_int, "width of embeddings"),
            ("lr", "0.01", by_model, "learning rate; also 0.001,lr=0.01,fm=0.03: some models with their own"),
            ("l2", "1e-5", by_model, "weight decay of the embedding table; also by model"),
            ("batch", 256, data.positive_int, "rows per step"),
            ("epochs", 50, data.positive_int, "at most"),
            ("patience", 3, data.positive_int, "epochs without a better validation AUC"),
            ("device", "auto", str, "cpu, cuda, cuda:1 …")):
        sub.add_argument(f"--{flag}", default=default, help=f"{what} [{default}]",
                         **({"type": kind} if callable(kind) else {"type": type(kind[0]), "choices": kind}))
    sub.add_argument("--restart", action="store_true", help="remove runs of other settings in --out")
    sub = commands.add_parser("table", help=command_table.__doc__, allow_abbrev=False)
    sub.set_defaults(run=command_table)
    sub.add_argument("folder", nargs="+", help="results folders made by run")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    data.run_command("ctr.py", main)
