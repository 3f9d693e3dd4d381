"""Click-through models with and without user IDs: train them over paired seeds, render the results as tables.

    python ctr.py run --data DIR --bank DIR --models deepfm,dcn --features none,stats,userip --out DIR
    python ctr.py table DIR… [--out FILE.md] [--summary FILE.json]      Markdown tables from the runs' JSON
    python ctr.py tables results README.md results/README.md            every table of results, and these files' blocks
    python ctr.py bench --rows 1000000 [--grow] [--out FILE]            training rows per second of DeepFM

Every extra feature is one or more categorical fields beside those of the data, a code per user (0 = unknown):

    none      nothing: the baseline that every other row is compared with, seed by seed
    userip    the collaborative IDs of the feature bank; the name of one of its profiles, such as hobby: that ID alone
    random    codes drawn at random for every user and seed: what a hash of the user brings by itself
    shuffled  the bank's codes, dealt to the wrong users: what the bank's frequencies bring by themselves
    stats     k-means of the user's plain training statistics (taste shares, mean log price, rating and count), a
              field each: what can be had without any LLM. The IDs are worth their cost where userip beats this
    gap       how far above others the user rates the same items, no LLM: codes of one number
    a+b       the fields of both, as in stats+userip

Use it alone: `from ctr import DeepFM, fit, auc`; the models take field sizes and give logits.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
import threading
import time
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl                                             # neither on Windows
    import resource
except ImportError:
    fcntl = resource = None

BANK_VERSION = 1
FEATURES = ("none", "random", "shuffled", "stats", "userip", "gap")


class Fault(Exception):
    """A foreseeable fault: a sentence for the user and the exit code (2 usage, 3 access or network, 4 bad data)."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class Progress(tqdm):
    """A bar with ETA on a terminal (or with UIP_PROGRESS=bar), else a plain line every ten seconds."""

    def __init__(self, *args, **kwargs):
        self.plain = not sys.stderr.isatty() and os.environ.get("UIP_PROGRESS") != "bar"
        if self.plain:
            kwargs.update(mininterval=10, file=io.StringIO())           # tqdm's own line ends are not wanted
        super().__init__(*args, delay=2, **kwargs)                      # what is quick needs no bar

    def display(self, *args, **kwargs):
        if self.plain:
            print(str(self), file=sys.stderr, flush=True)
        else:
            super().display(*args, **kwargs)


# --------------------------------------------------------------------------------------------------- models

def uniform(rows: int, columns: int, bound: float) -> Tensor:
    """[rows, columns] in ±bound, row by row from a seed of its own: one draw of torch's global generator.

    So two models built after the same `torch.manual_seed`, one with more fields at the end, draw the same
    numbers for the fields they share: what differs between two feature sets of one seed is the features.
    """
    generator = torch.Generator().manual_seed(int(torch.randint(2 ** 62, ())))
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * bound


class Fields(nn.Module):
    """One embedding table for all fields; a value outside its field (new, negative) reads the field's row 0.

    Weights start in ±0.01: FM's factors must not be 0, which is a saddle point, and must be small, because a
    value seen once keeps nearly what it started with and should add nothing to the logit.
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
        # indexing's backward is twice as fast as nn.Embedding's on a CPU, and as repeatable on a GPU
        return self.table.weight[torch.where(known, x, 0) + self.offsets]        # (B, F, width)


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
    """Logistic regression: a weight per value, and a bias (so no dim, taken for the sake of an equal call).

    x [B, F] → logits [B].
    """

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
    With all weights of `cross` at zero the model is its MLP.
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

def grouped_auc(group, y, score) -> tuple[np.ndarray, np.ndarray]:
    """AUC inside each group, ties count half. group, y, score: [n] → auc [G] (one class: nan), rows [G]."""
    order = np.lexsort((score, group))
    g, y, s = np.asarray(group)[order], np.asarray(y, float)[order], np.asarray(score)[order]
    if np.isnan(s).any():
        raise ValueError("a score is nan: nothing can be ranked")
    first = np.append(True, g[1:] != g[:-1])[:len(g)]
    tie = np.cumsum(first | np.append(True, s[1:] != s[:-1])[:len(g)]) - 1
    g, size = np.cumsum(first) - 1, np.bincount(tie)
    rank = (np.cumsum(size) - (size - 1) / 2)[tie]                       # the mean rank of equal scores
    rows, positive = np.bincount(g), np.bincount(g, y)
    rank -= (np.cumsum(rows) - rows)[g]                                          # 1 … rows inside the group
    with np.errstate(invalid="ignore"):
        wins = np.bincount(g, rank * y) - positive * (positive + 1) / 2
        return wins / (positive * (rows - positive)), rows


def auc(y, score) -> float:
    """P(positive scores above negative), ties count half (Mann–Whitney). y, score: [n]; one class: nan."""
    y = np.asarray(y)
    if len(np.unique(y)) < 2:
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
    y, z = np.asarray(y, np.float64), np.asarray(logit, np.float64)
    return float(np.mean(np.logaddexp(0, z) - y * z))


# ------------------------------------------------------------------------------------- data and bank folders

class Data(NamedTuple):
    """What data.py wrote, in memory."""
    name: str
    fields: list[str]
    sizes: list[int]             # values per field, 0 = unknown included
    user: np.ndarray             # int [R], row of `users`
    x: np.ndarray                # int [R, F]
    y: np.ndarray                # 0/1 [R]
    rating: np.ndarray           # float [R]
    price: np.ndarray            # float [R], nan = unknown
    split: np.ndarray            # [R]: 0 train, 1 valid, 2 test
    users: np.ndarray            # str [N]
    sha256: str


class Bank(NamedTuple):
    """Codes of a feature bank for the users of a data set."""
    codes: np.ndarray            # int [N, P], 0 = unknown
    sizes: list[int]             # codes per profile, without the 0
    about: dict                  # what a result records: version, users, names, sizes, sha256
    lm: object                   # the LLM behind the IDs, as the bank names it


MOST_JSON, MOST_UNPACKED = 2**24, 2**28        # bytes of a JSON file, and of a packed .npz unpacked: more is a trap


def read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"larger than {MOST_JSON} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        dump(value).encode()                                             # no lone surrogates: can be written again
    except FileNotFoundError:
        raise Fault(2, f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Fault(4, f"{path} is damaged or no JSON: {error}") from None
    if not isinstance(value, dict):
        raise Fault(4, f"{path} holds no JSON object")
    return value


def read_array(file, size: int) -> np.ndarray:
    """An .npy of `size` bytes. ValueError if its header promises more: numpy would allocate that before it reads."""
    head = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = head[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or math.prod(shape) * max(1, dtype.itemsize) > size:
        raise ValueError(f"{shape} of {dtype} in {size} bytes")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def checked(folder: Path, meta: dict, name: str) -> io.BytesIO:
    """The file's bytes, whose SHA-256 is the one in meta.json."""
    path = folder / name
    if not path.is_file():
        raise Fault(4, f"{path} is missing: make the folder anew")
    content, known = path.read_bytes(), meta.get("sha256")
    if not isinstance(known, dict) or hashlib.sha256(content).hexdigest() != known.get(name):
        raise Fault(4, f"{path} is not the file meta.json describes (cut, or of another run): make it anew")
    return io.BytesIO(content)


def read_data(folder) -> Data:
    """A data folder (interactions.npz, meta.json), checked."""
    folder = Path(folder)
    meta = read_json(folder / "meta.json")
    path = folder / "interactions.npz"
    try:
        with zipfile.ZipFile(checked(folder, meta, path.name)) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            if sum(info.file_size for info in members.values()) > max(MOST_UNPACKED, 2 * path.stat().st_size):
                raise ValueError(f"an array that unpacks to more than {MOST_UNPACKED} bytes")
            data = Data(meta["name"], meta["fields"], meta["sizes"], sha256=meta["sha256"][path.name], **{
                key: read_array(file.open(members[key]), members[key].file_size) for key in Data._fields[3:-1]})
        check(data)
    except Fault:
        raise
    except Exception as error:                                           # whatever damage makes zipfile and numpy raise
        raise Fault(4, f"{folder}: {error} is missing or unreadable in its files") from None
    for split, which in enumerate(("training", "validation", "test")):
        if len(set(data.y[data.split == split].tolist())) < (1 if split == 2 else 2):
            raise Fault(4, f"{path}: the {which} rows are none, or all of one label")
    return data


def check(data: Data) -> None:
    """Fault 4 unless all of it fits together; field sizes, which memory follows, are bounded by the rows."""
    rows, shapes = len(data.y), {"user": 1, "x": 2, "y": 1, "rating": 1, "price": 1, "split": 1}
    kinds = {"user": "iu", "x": "iu", "y": "iu", "split": "iu", "rating": "f", "price": "f"}
    for key, ndim in shapes.items():
        array = getattr(data, key)
        if array.ndim != ndim or len(array) != rows or array.dtype.kind not in kinds[key]:
            raise Fault(4, f"interactions.npz: {key} is {array.dtype} {array.shape}, for {rows} rows")
    names = [data.name, *data.fields]
    if any(type(name) is not str for name in names) or any(type(size) is not int or size < 1 for size in data.sizes) \
            or not 0 < len(data.fields) == len(data.sizes) == len(set(data.fields)) or sum(data.sizes) > 100 * rows + 10**6:
        raise Fault(4, f"meta.json: fields {data.fields} with sizes {data.sizes} are none of {rows} rows")
    if data.x.shape[1] != len(data.sizes) or (data.x < 0).any() or (data.x >= data.sizes).any():
        raise Fault(4, f"interactions.npz: x {data.x.shape} does not fit {dict(zip(data.fields, data.sizes))}")
    if data.users.ndim != 1 or data.users.dtype.kind != "U" or (data.user < 0).any() or (data.user >= len(data.users)).any():
        raise Fault(4, f"interactions.npz: a row's user is none of the {data.users.size} users")
    if not (np.isin(data.y, (0, 1)).all() and np.isin(data.split, range(5)).all() and np.isfinite(data.rating).all()):
        raise Fault(4, "interactions.npz: a label, part or rating is out of range")


def hash_users(users) -> np.ndarray:
    """64-bit keys of user ids: FNV-1a over code points, murmur3 finaliser. users: [n] str → uint64 [n]."""
    text = np.asarray(users, dtype=str)
    width = max(1, text.dtype.itemsize // 4)
    points = text.astype(f"=U{width}").view(np.uint32).reshape(len(text), width)   # (n, W), native byte order
    h = np.full(len(points), 0xCBF29CE484222325, np.uint64)
    for column in points.T.astype(np.uint64):
        h = np.where(column != 0, (h ^ column) * np.uint64(0x100000001B3), h)    # NULs are padding
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ (h >> np.uint64(33))) * np.uint64(factor)
    return h ^ (h >> np.uint64(33))


def read_bank(folder, users: np.ndarray) -> Bank:
    """The bank's codes of `users`; 0 for those it does not hold.

    A new bank takes the old one's place in two renames, between which the old one stands beside: hence a second look.
    """
    folder = Path(folder).resolve()
    old = folder.with_name(folder.name + ".replaced")
    for last in (False, False, True):
        try:
            return look(old if old.exists() and not folder.exists() else folder, users)
        except Fault:
            if last:
                raise
            time.sleep(0.05)


def look(folder: Path, users: np.ndarray) -> Bank:
    """read_bank, as the folder stands at this moment."""
    meta = read_json(folder / "meta.json")
    if meta.get("version") != BANK_VERSION:
        raise Fault(4, f"{folder} is a bank of version {meta.get('version')}, not {BANK_VERSION}: redo it")
    try:
        keys, codes = (read_array(file, len(file.getbuffer())) for file in
                       (checked(folder, meta, name) for name in ("keys.npy", "codes.npy")))
        sizes = meta["sizes"]
        if not (keys.dtype == np.uint64 and keys.ndim == 1 and len(keys) and codes.dtype.kind == "u" and sizes
                and all(type(size) is int and 0 < size < 2**16 for size in sizes)
                and codes.shape == (len(keys), len(sizes)) and (codes <= sizes).all()):
            raise ValueError(f"keys {keys.shape} and codes {codes.shape} do not fit the sizes {sizes}")
    except Fault:
        raise
    except Exception as error:                                           # whatever damage makes numpy raise
        raise Fault(4, f"{folder}: damaged bank: {error}") from None
    wanted = hash_users(users)
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    found = keys[at] == wanted
    if not found.any():
        raise Fault(4, f"{folder} holds none of the {len(users)} users: it was built from other data")
    about = {key: meta.get(key) for key in ("version", "users", "names", "sizes")}
    about["sha256"] = {name: meta["sha256"][name] for name in ("keys.npy", "codes.npy")}
    return Bank(np.where(found[:, None], codes[at], 0).astype(np.int64), sizes, about, meta.get("lm"))


# ------------------------------------------------------------------------------------------------- features

def kmeans(x: np.ndarray, k: int, seed: int = 0, n_init: int = 10, iters: int = 50) -> np.ndarray:
    """Codes 0 … k−1 of the rows of x [n, d]: k-means++ and Lloyd, the best of n_init starts (textbook)."""
    rng, best = np.random.default_rng(seed), (math.inf, None)
    for _ in range(n_init):
        centres, near = x[rng.integers(len(x), size=1)], np.full(len(x), math.inf)
        while len(centres) < k:
            near = np.minimum(near, ((x - centres[-1]) ** 2).sum(1) + 1e-12)     # (n,), never all 0
            centres = np.append(centres, x[rng.choice(len(x), size=1, p=near / near.sum())], 0)
        for _ in range(iters):
            distance = (x ** 2).sum(1)[:, None] - 2 * x @ centres.T + (centres ** 2).sum(1)   # (n, k)
            one = np.eye(k)[distance.argmin(1)]                                  # (n, k), one-hot
            size = one.sum(0)[:, None]                                        # an empty code keeps its centre
            centres = np.where(size > 0, one.T @ x / size.clip(1), centres)
        inertia = distance.min(1).sum()
        if inertia < best[0]:
            best = inertia, distance.argmin(1)
    return best[1]


def statistics(data: Data) -> tuple[np.ndarray, list[np.ndarray]]:
    """What training rows plainly say about a user → who has any, bool [N]; [taste [N, T], price [N, 1], habits [N, 2]]
    as far as known.

    Taste: shares over the values of each item attribute (a field that depends on the item alone) of at most
    50 values; without such a field there is no taste. Price: mean log price; an unknown price is left out, and a user
    without any gets the global mean. Habits: mean rating, log count.

    Where users are new, rows of split 3, the first few of every user, take the place of training rows, and the mean
    rating is shrunk by three ratings of the global mean.
    """
    n, new = len(data.users), data.split == 3
    train = new if new.any() else data.split == 0
    user, x = data.user[train], data.x[train].astype(np.int64)
    price = np.log(np.maximum(data.price[train], 0.01))
    total = lambda values, rows=slice(None): np.bincount(user[rows], values[rows], minlength=n)
    count = np.bincount(user, minlength=n)
    rows, known = count.clip(1), np.isfinite(price)
    level = price[known].mean() if known.any() else 0.0
    own = np.where(total(known) > 0, total(price, known) / total(known).clip(1), level)         # (N,)
    habits = np.stack([total(data.rating[train]) / rows, np.log(rows)], 1)
    if new.any():
        habits = (total(data.rating[train] - data.rating[train].mean()) / (rows + 3))[:, None]
    taste = []
    for name, size, values in zip(data.fields, data.sizes, x.T):
        item = x[:, data.fields.index("item")] if "item" in data.fields else values
        pairs, items = np.unique(item * size + values), np.unique(item)
        if size <= 50 and name not in ("user", "item") and len(pairs) == len(items):
            shares = np.bincount(user * size + values, minlength=n * size).reshape(n, size)
            taste.append(shares / rows[:, None])
    prices = [own[:, None]] if known.any() else []
    return count > 0, [*([np.concatenate(taste, 1)] if taste else []), *prices, habits]


def stats_codes(data: Data, sizes: list[int]) -> tuple[np.ndarray, list[int]]:
    """The control without any LLM: k-means of each table of standardised statistics → int64 [N, ≤ 3], codes per field.

    sizes: codes per field of the bank, which its fields take in turn. Three fields of plain counts against two or so of
    the LLM's: the control is meant to be strong. The same for every seed; users without training rows get 0. New users
    take the nearest of the warm users' codes.
    """
    active, tables = statistics(data)
    warm = active & np.isin(np.arange(len(active)), data.user[data.split == 0])
    sizes = [min(sizes[p % len(sizes)], int(warm.sum())) for p in range(len(tables))]
    codes = np.zeros((len(active), len(sizes)), np.int64)
    for p, (table, k) in enumerate(zip(tables, sizes)):
        table = (table - table[warm].mean(0)) / table[warm].std(0).clip(1e-9)
        codes[warm, p] = 1 + kmeans(table[warm], k, seed=p)
        used = np.unique(codes[warm, p])
        centres = np.stack([table[warm & (codes[:, p] == code)].mean(0) for code in used])  # (K, d)
        for user in np.flatnonzero(active & ~warm):
            codes[user, p] = used[((table[user] - centres) ** 2).sum(1).argmin()]
    return codes, sizes


def gap_codes(data: Data, k: int) -> tuple[np.ndarray, list[int]]:
    """The control for evidence that compares a user with others: quantiles of one number → int64 [N, 1], [k].

    The number is the mean of a user's rating less the item's mean in training, that of items shrunk by five ratings, that
    of users by three. Rows and users as in `statistics`; the quantiles are those of users with training rows.
    """
    train, n = data.split == 0, len(data.users)
    rows = data.split == 3 if (data.split == 3).any() else train
    item = data.x[:, data.fields.index("item")] if "item" in data.fields else np.zeros(len(data.y), np.int64)
    excess, count = data.rating - data.rating[train].mean(), np.bincount(data.user[rows], minlength=n)
    most = item.max() + 1
    usual = np.bincount(item[train], excess[train], most) / (np.bincount(item[train], minlength=most) + 5)
    gap = np.bincount(data.user[rows], (excess - usual[item])[rows], n) / (count + 3)           # (N,)
    warm = (count > 0) & np.isin(np.arange(n), data.user[train])
    cuts = np.quantile(gap[warm], np.arange(1, k) / k)
    return np.where(count > 0, 1 + np.digitize(gap, cuts), 0)[:, None], [k]


def add_features(names: str, data: Data, codes: dict, sizes: list[int], seed: int):
    """Codes per user of one feature set such as "stats+userip" → int64 [N, E], sizes of the E new fields.

    codes: "userip" → int64 [N, P], a profile's name → [N, 1] with its size in a list, "stats" → what stats_codes gives,
    as far as needed; sizes: codes per field of the bank, without the 0.
    """
    parts, widths = [np.zeros((len(data.users), 0), np.int64)], []
    for name in names.split("+"):
        if name == "none":
            continue
        rng = np.random.default_rng([seed, FEATURES.index(name) if name in FEATURES else 0])
        part, width = (codes["userip"], sizes) if name in ("userip", "random", "shuffled") else codes[name]
        if name == "random":
            part = rng.integers(1, np.array(sizes) + 1, (len(data.users), len(sizes)))
        elif name == "shuffled":
            part = rng.permutation(part)
        parts.append(part)
        widths += [size + 1 for size in width]
    return np.concatenate(parts, 1), widths


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
    weights = list(model.parameters())
    for rows, labels in zip(x[order].split(batch), y[order].split(batch)):
        for weight in weights:                               # as adam.zero_grad(), in a twentieth of its time
            weight.grad = None
        F.binary_cross_entropy_with_logits(model(rows), labels).backward()
        adam.step()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> np.ndarray:
    """x [R, F] → logits float32 [R]."""
    model.eval()
    return torch.cat([model(rows) for rows in x.split(65536)]).cpu().numpy()


def fit(model: nn.Module, train, valid, *, lr=1e-2, batch=256, epochs=50, patience=3, l2=1e-5, seed=0,
        report=lambda text: None) -> tuple[float, int, int]:
    """Train until the validation AUC has not risen for `patience` epochs; the model ends at its best epoch.

    train, valid: (x integers [R, F], y float [R]) → best validation AUC, its epoch from 1, epochs run.
    """
    adam, generator = optimiser(model, lr, l2), torch.Generator().manual_seed(seed)
    best, best_epoch, kept = -math.inf, 0, None
    for epoch in range(1, epochs + 1):
        train_epoch(model, adam, *train, batch, generator)
        logits = predict(model, valid[0])
        if not np.isfinite(logits).all():
            raise Fault(2, f"training diverged in epoch {epoch}: give a smaller --lr than {lr:g}")
        score = auc(valid[1].cpu(), logits)
        report(f"epoch {epoch}: validation AUC {score:.4f}")
        if score > best:
            best, best_epoch = score, epoch
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best_epoch >= patience:
            break
    model.load_state_dict(kept)
    return best, best_epoch, epoch


def run_one(data: Data, model: str, extra, seed: int, config: dict, report) -> dict:
    """Train one model with one feature set and seed, score the test rows once → the figures of a result."""
    codes, sizes = extra
    keep = [f for f, name in enumerate(data.fields) if name not in config["drop"]]
    x = np.concatenate([data.x[:, keep], codes[data.user]], 1).astype(np.int32)            # (R, F + E)
    device = torch.device(config["device"])
    arrays = x, data.y.astype(np.float32)
    parts = [[torch.from_numpy(a[data.split == s]).to(device) for a in arrays] for s in (0, 1, 2)]
    torch.manual_seed(seed)
    net = MODELS[model]([data.sizes[f] for f in keep] + sizes, **config["model"]).to(device)
    torch.manual_seed(seed)                            # the same dropout masks, whatever the number of fields
    keys = ("lr", "batch", "epochs", "patience", "l2")
    best, epoch, ran = fit(net, *parts[:2], **{key: config[key] for key in keys}, seed=seed, report=report)
    y, logits, user = data.y[data.split == 2], predict(net, parts[2][0]), data.user[data.split == 2]
    figures = {"auc": auc(y, logits), "gauc": gauc(user, y, logits), "logloss": logloss(y, logits)}
    figures = {name: None if math.isnan(value) else value for name, value in figures.items()}
    rows = {name: len(part[1]) for name, part in zip(("train", "valid", "test"), parts)}
    return {**figures, "valid_auc": best, "epoch": epoch, "epochs_run": ran, "rows": rows}


# ------------------------------------------------------------------------------------------------------ run

def publish(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def alone(path: Path):
    """Keeps a second run off: holds the lock file `path` during the block, Fault 2 if another process has it.

    The kernel frees a dead process's lock: none is ever stale. Where there are no locks (Windows) nothing is held.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise Fault(2, f"{path.parent} is a file, not a folder") from None
    while True:
        file = open(path, "a+")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Fault(2, f"{path}: another run writes there, {file.read(200) or 'just begun'}. Wait for its end, stop "
                           "it, or choose another --out") from None
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(FileNotFoundError):  # else the last holder has just removed the file
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()


def dump(value: dict) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def choose(text: str, valid, option: str) -> list[str]:
    """A comma-separated list, each part of a+b one of `valid`."""
    names = [name for name in text.split(",") if name]
    wrong = [part for name in names for part in name.split("+") if part not in valid]
    if wrong or (not names and option != "--drop"):
        raise Fault(2, f"{option}: {wrong[0] if wrong else 'nothing'!r} is none of {', '.join(valid)}")
    return list(dict.fromkeys(names))


def pick_device(name: str) -> str:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Fault(2, f"--device {name}: {str(error).splitlines()[0]}") from None
    return str(device)


def results(folder: Path) -> list[Path]:
    """The files of `folder` that run wrote, known by their names."""
    name = re.compile(rf"({'|'.join(MODELS)})_[a-z+]+_[0-9]+\.json")
    return sorted(path for path in folder.glob("*.json") if name.fullmatch(path.name))


def run(args) -> None:
    """Every model × feature set × seed that --out does not hold yet."""
    models = choose(args.models, MODELS, "--models")
    data = read_data(args.data)
    bank = read_bank(args.bank, data.users) if args.bank else Bank(None, [4, 3], {}, None)
    profiles = {name: p for p, name in enumerate(bank.about.get("names") or []) if name not in FEATURES}
    features = choose(args.features, (*FEATURES, *profiles), "--features")
    parts = {part for name in features for part in name.split("+")}
    if parts & {"userip", "shuffled"} and not args.bank:
        raise Fault(2, f"--features {args.features} needs --bank DIR, the folder that codebook.py bank wrote")
    config = {key: getattr(args, key) for key in ("lr", "batch", "epochs", "patience", "l2")}
    config.update(drop=choose(args.drop, data.fields, "--drop"), device=pick_device(args.device))
    if len(config["drop"]) == len(data.fields):
        raise Fault(2, "--drop leaves no field")
    codes = {"userip": bank.codes, "stats": stats_codes(data, bank.sizes) if "stats" in parts else None,
             "gap": gap_codes(data, max(bank.sizes)) if "gap" in parts else None,
             **{name: (bank.codes[:, [p]], [bank.sizes[p]]) for name, p in profiles.items()}}
    raw = read_json(Path(args.data) / "meta.json").get("raw")             # sha256 of the files the data came from
    code, began, out = hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), time.time(), Path(args.out)

    def setting(model: str, feature: str, seed: int) -> dict:
        """All that a result depends on, as its file says it."""
        signature, uses = inspect.signature(MODELS[model]).parameters, set(feature.split("+"))
        defaults = {name: value.default for name, value in signature.items() if name != "field_sizes"}
        ids = bool(uses & {"userip", "shuffled", *profiles})
        return json.loads(json.dumps({                                   # tuples become lists, as in the file
            "dataset": data.name, "model": model, "features": feature, "seed": seed,
            "code_sha256": code, "config": {**config, "model": {**defaults, "dim": args.dim}},
            "codes": bank.sizes if uses - {"none"} else [], "data_sha256": data.sha256, "raw": raw,
            "bank": bank.about if ids else None, "lm": bank.lm if ids else None}))

    wanted = {out / "{}_{}_{}.json".format(*one): setting(*one)
              for one in itertools.product(models, features, range(args.seeds))}
    with alone(out / ".lock"):
        done = kept(out, wanted, args.restart)
        bar = Progress(total=len(wanted), initial=len(done), desc="runs", unit="run")
        for path, one in wanted.items():
            if path in done:
                continue
            def report(text):
                bar.set_postfix_str(f"{path.stem} {text}", refresh=False)
                bar.update(0)
            start = time.time()
            extra = add_features(one["features"], data, codes, bank.sizes, one["seed"])
            figures = run_one(data, one["model"], extra, one["seed"], one["config"], report)
            publish(path, dump({**one, **figures, "run": facts(start, config["device"])}))
            bar.update()
        bar.close()
        publish(out / "meta.json", dump({
            "dataset": data.name, "data_sha256": data.sha256, "code_sha256": code, "config": {**config, "dim": args.dim},
            "models": models, "features": features, "seeds": args.seeds, "bank": bank.about, "lm": bank.lm,
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in results(out)},
            "run": facts(began, config["device"])}))
    print(f"{args.out}: {len(wanted)} runs, {len(done)} of them kept from before (nothing has changed)")


def kept(out: Path, wanted: dict[Path, dict], restart: bool) -> set[Path]:
    """The results in `out` that the wanted settings would give again. Of others none is used: --restart removes them."""
    done, common = set(), {key: next(iter(wanted.values()))[key] for key in ("dataset", "data_sha256", "code_sha256")}
    for path in results(out):
        if restart:
            path.unlink()
            continue
        old, new = flat(read_json(path)), flat(wanted.get(path, common))
        differs = [f"{key}: {old.get(key)} → {value}" for key, value in new.items() if old.get(key, path) != value]
        if differs:
            raise Fault(2, f"{path} comes from other settings, data or code ({'; '.join(differs)}). Choose another --out, "
                           "or pass --restart to remove the results there")
        done |= {path} & set(wanted)
    return done


def flat(setting: dict, name: str = "") -> dict:
    """{"config.lr": 0.01, …}, for messages."""
    parts = [flat(value, f"{name}{key}.") if isinstance(value, dict) else {name + key: value}
             for key, value in setting.items()]
    return {key: value for part in parts for key, value in part.items()}


def facts(began: float, device: str) -> dict:
    """How, when and where something ran: all that may differ between two runs with equal results."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")
                if importlib.util.find_spec(name)}
    return {"command": shlex.join(["python", "ctr.py", *sys.argv[1:]]), "seconds": round(time.time() - began, 3),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)), "peak_mb": peak_mb(),
            "machine": machine(torch.device(device)), "versions": {"python": platform.python_version(), **versions}}


# ---------------------------------------------------------------------------------------------------- table

# Two-sided 5 % points of Student's t for 1 … 30 degrees of freedom (standard table).
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
       2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
       2.045, 2.042)
PAIRS = (("userip", "random"), ("userip", "shuffled"), ("userip", "stats"), ("stats+userip", "stats"))


def interval(values) -> tuple[float, float]:
    """Mean of n ≥ 1 values and the half width of its 95 % t-interval (nan for n = 1; by 1.96 if n > 31)."""
    n = len(values)
    if n == 1:
        return float(values[0]), math.nan
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n))


def read_runs(folder: Path) -> list[dict]:
    """The results in a folder, other JSON files passed over; a mixture of settings or data is refused."""
    runs, first = [], {}
    if not folder.is_dir():
        raise Fault(2, f"{folder} is no folder")
    for path in results(folder):
        one = read_json(path)
        keys = "dataset model features seed auc gauc logloss config data_sha256 rows"
        missing = set(keys.split()) - set(one)
        if missing:
            raise Fault(4, f"{path} is a damaged result, without {', '.join(sorted(missing))}")
        if not sound(one):
            raise Fault(4, f"{path} is no result: a value is of a wrong type, or not finite")
        same = first.setdefault((one["dataset"], one["model"]), (path, one["config"], one["data_sha256"]))
        if same[1:] != (one["config"], one["data_sha256"]):
            raise Fault(4, f"{path} and {same[0].name} differ in settings or data: remove the older ones")
        runs.append(one)
    if not runs:
        raise Fault(4, f"{folder} holds no result of ctr.py run")
    return runs


def sound(one: dict) -> bool:
    """Whether the values of a result that tables are made of have their types."""
    lm = one.get("lm")
    return (all(type(one[key]) is str for key in ("dataset", "model", "features", "data_sha256")) and type(one["seed"]) is int
            and all(one[key] is None or type(one[key]) in (int, float) and abs(one[key]) < 1e300
                    for key in ("auc", "gauc", "logloss"))
            and isinstance(one["config"], dict) and isinstance(one["rows"], dict)
            and all(type(count) is int for count in one["rows"].values())
            and (lm is None or type(lm) is str or isinstance(lm, dict) and type(lm.get("name")) is str))


def cells(runs: list[dict], key: str) -> dict:
    """{model: {features: {seed: value}}}, models, features and seeds in order, undefined values left out."""
    order = lambda one: (one["model"], one["features"].count("+"), one["features"], one["seed"])
    table = {}
    for one in sorted(runs, key=order):
        row = table.setdefault(one["model"], {}).setdefault(one["features"], {})
        if one[key] is not None:
            row[one["seed"]] = one[key]
    return table


def difference(a: dict | None, b: dict | None) -> str:
    """A table cell: mean of a − b over the seeds of both, with its 95 % interval; blank without any."""
    shared = sorted(set(a or {}) & set(b or {}))
    if not shared:
        return ""
    mean, half = interval([a[seed] - b[seed] for seed in shared])
    span = "" if math.isnan(half) else f" [{mean - half:+.4f}, {mean + half:+.4f}]"
    return f"{mean:+.4f}{span}, n={len(shared)}"


def spread(values: dict) -> str:
    if not values:
        return ""
    deviation = f" ± {np.std(list(values.values()), ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(list(values.values())):.4f}{deviation}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def chart(title: str, names: list[str], values: list[float], kind: str = "bar") -> str:
    """A Mermaid chart, whose axis does not start at 0; kind: bar or line."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.01
    digits = max(0, 3 - math.floor(math.log10(max(high - low, 1e-3))))
    number = lambda value: f"{value:.{min(digits, 4)}f}"
    axis = ", ".join(f'"{name}"' for name in names)
    return (f'```mermaid\nxychart-beta\n    title "{title}"\n    x-axis [{axis}]\n    y-axis {number(low - room)} --> '
            f'{number(high + room)}\n    {kind} [{", ".join(map(number, values))}]\n```')


def render(runs: list[dict]) -> str:
    """The results of one data set as Markdown: model × features, what userip has over each control, a chart."""
    aucs, gaucs, losses = (cells(runs, key) for key in ("auc", "gauc", "logloss"))
    main, minus, own = [], [], {one["features"] for one in runs} - {*FEATURES, "stats+userip"}
    pairs = [*PAIRS, *((name, "stats") for name in sorted(own, key=lambda name: (name.count("+"), name)))]
    for model, by in aucs.items():
        for name, values in by.items():
            delta = difference(values, by.get("none")) if name != "none" else ""
            main.append([model, name, spread(values), delta, spread(gaucs[model][name]),
                         spread(losses[model][name]), str(len(values))])
        minus.append([model, *(difference(by.get(a), by.get(b)) for a, b in pairs)])
    lms = sorted({one["lm"]["name"] if isinstance(one["lm"], dict) else one["lm"] for one in runs
                  if one.get("lm")})
    rows = ", ".join(f"{count:,} {name}" for name, count in runs[0]["rows"].items())
    text = (f"**{runs[0]['dataset']}** ({rows} rows{''.join('; IDs by ' + lm for lm in lms)}). Mean ± std "
            "over seeds; differences are paired by seed, with their 95 % t-interval.\n\n")
    text += markdown(["model", "features", "AUC", "ΔAUC to none", "gAUC", "logloss", "seeds"], main)
    if any(any(row[1:]) for row in minus):
        text += "\n\n" + markdown(["ΔAUC", *(f"{a} − {b}" for a, b in pairs)], minus)
    model = "deepfm" if "deepfm" in aucs else next(iter(aucs))
    means = {name: float(np.mean(list(values.values()))) for name, values in aucs[model].items() if values}
    if len(means) > 1:
        text += "\n\n" + chart(f"{runs[0]['dataset']}: mean AUC of {model}", list(means), list(means.values()))
    return text


def summarise(folder: Path) -> dict:
    """The figures per seed, with score.json (whole) and seconds.json (as "seconds") of the folder."""
    runs = read_runs(folder)
    extra = {name: read_json(folder / f"{name}.json") if (folder / f"{name}.json").exists() else {}
             for name in ("score", "seconds")}
    lm = next((one["lm"] for one in runs if one.get("lm")), None)
    figures = {key: {model: {name: list(values.values()) for name, values in by.items()}
                     for model, by in cells(runs, key).items()} for key in ("auc", "gauc", "logloss")}
    seconds = {**extra["score"].get("seconds", {}), **extra["seconds"]}
    return {"lm": lm, **extra["score"], **figures, "seconds": seconds}


def table(folder: Path) -> str:
    """The results of a folder, one data set after the other."""
    runs = read_runs(folder)
    names = sorted({one["dataset"] for one in runs})
    return "\n\n".join(render([one for one in runs if one["dataset"] == name]) for name in names) + "\n"


def overview(rows: dict[str, dict]) -> str:
    """A row each: mean AUC by feature set, then differences. rows: {what: {features: {seed: AUC}}}"""
    names = list(dict.fromkeys(name for by in rows.values() for name in by))
    own = [name for name in names if name not in (*FEATURES, "stats+userip")]
    pairs = [("userip", "none"), *PAIRS, *([("userip", "gap")] if "gap" in names else []),
             *((name, "stats") for name in own if "+" in name)]
    mean = lambda values: f"{np.mean(list(values.values())):.4f}" if values else ""
    text = markdown(["mean AUC", *names], [[key, *(mean(by.get(name)) for name in names)] for key, by in rows.items()])
    return text + "\n\n" + markdown(["ΔAUC", *(f"{a} − {b}" for a, b in pairs)], [
        [key, *(difference(by.get(a), by.get(b)) for a, b in pairs)] for key, by in rows.items()]) + "\n"


def by_model(folder: Path) -> dict[str, dict]:
    """overview's rows of one folder: a row per model."""
    return cells(read_runs(folder), "auc")


def by_folder(folders: list[Path]) -> dict[str, dict]:
    """overview's rows of several folders: DeepFM's where it is there, else those of the first model."""
    found = {folder.name: by_model(folder) for folder in folders}
    return {name: by.get("deepfm") or next(iter(by.values())) for name, by in found.items()}


def groups(folders: list[Path]) -> str:
    """Planted shops, a row per profile, from their summary.json: are the IDs the groups that made the data?"""
    rows = []
    for folder in folders:
        summary = read_json(folder / "summary.json")
        try:
            for name, own in summary["ari"].items():
                sparse = summary["ari_sparse"][name]              # null where the shop has no such user
                rows.append([folder.name, name, *(f"{own[key]:.3f}" if own else "" for key in ("own", "other")),
                             f"{sparse['own']:.3f}" if sparse else "", f"{summary['perplexity'][name]:.2f}",
                             " → ".join(f"{value:.0f}" for value in summary["F"])])
        except (KeyError, TypeError, AttributeError) as error:
            raise Fault(4, f"{folder / 'summary.json'} is no summary of a planted shop ({error!r})") from None
    return markdown(["shop", "profile", "ARI own", "ARI other", "ARI own, sparse users", "perplexity", "F"], rows) + "\n"


def compare(folders: list[Path]) -> str:
    """The same, and what the IDs add to each model, with charts."""
    text, gains, bars, others = groups(folders), [], {}, ("none", "random", "shuffled", "stats")
    for folder in folders:
        for model, by in by_model(folder).items():
            bars |= {folder.name: float(np.mean(list(by["userip"].values())))} if model == "deepfm" and by.get("userip") else {}
            gains.append([folder.name, model, *(difference(by.get("userip"), by.get(other)) for other in others)])
    text += "\n" + markdown(["shop", "model", *(f"ΔAUC userip − {other}" for other in others)], gains)
    if len(bars) > 1:
        text += "\n\n" + chart("mean AUC of deepfm with userip", list(bars), list(bars.values()))
    traces = {folder.name: read_json(folder / "summary.json")["F"] for folder in folders}
    for name, trace in [(name, trace) for name, trace in traces.items() if len(trace) > 1][:1]:
        steps = ["M 0", *(f"{half} {r}" for r in range(1, len(trace)) for half in "EM")][:len(trace)]
        text += "\n\n" + chart(f"{name}: F after each half-step, from the first codebook on", steps, trace, "line")
    return text + "\n"


def meaning(path: Path) -> str:
    """What IDs tell of users' known attributes, from the JSON of codebook.py meaning."""
    found = read_json(path)
    try:
        lines = [[one["profile"], f"{one['attribute']} ({one['classes']} classes)",
                  *(f"{one[key]:.3f}" for key in ("bits", "bits_shuffled", "p")),
                  *(f"{one[key]:.1%}" for key in ("accuracy", "accuracy_shuffled", "accuracy_majority"))]
                 for one in found["meaning"]]
    except (KeyError, TypeError, ValueError) as error:
        raise Fault(4, f"{path} is not of codebook.py meaning ({error!r})") from None
    return markdown(["profile", "attribute", "bits", "bits, shuffled IDs", "p", "held-out accuracy",
                     "accuracy, shuffled IDs", "accuracy, majority"], lines) + "\n"


def include(path: Path) -> None:
    """Fill each block <!-- include FILE --> … <!-- /include --> of a Markdown file with FILE, relative to it."""
    try:
        old = path.read_text(encoding="utf-8")
        fill = lambda match: match[1] + (path.parent / match[2]).read_text(encoding="utf-8").strip() + "\n" + match[3]
        new, found = re.subn(r"(<!-- include (\S+) -->\n).*?(<!-- /include -->)", fill, old, flags=re.S)
    except OSError as error:
        raise Fault(2, f"{error.filename}: {error.strerror}") from None
    if not found:
        raise Fault(2, f"{path} has no lines '<!-- include FILE -->' and '<!-- /include -->' to fill")
    if new != old:
        publish(path, new)


# Planted shops that are set side by side: file → folders, as far as they are there.
COMPARED = {
    "shops.md": ("demo", "demo-1", "demo-2", "null"),
    "ablations.md": ("demo", *(f"without-{part}" for part in "em views mask kmeans pretraining tuning llm".split())),
    "sizes.md": ("codes-2", "demo", "codes-8", "codes-16", "codes-32")}


def tables(root: Path, files: list[Path]) -> None:
    """Every table under a folder of results, from its JSON alone; then the blocks of Markdown files."""
    if not root.is_dir():
        raise Fault(2, f"{root} is no folder")
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        found = lambda pattern: sorted(path for path in folder.glob(pattern) if path.is_dir())
        if (folder / "score.json").exists():                             # a planted shop
            publish(folder / "table.md", table(folder))
            publish(folder / "summary.json", dump(summarise(folder)))
            if len(by_model(folder)) > 1:
                publish(folder / "brief.md", overview(by_model(folder)))
        if new := found("new[0-9]*"):                                    # a real data set
            publish(folder / "known.md", overview(by_folder(new)))
            publish(folder / "table.md", "\n".join(map(table, new)))
        if (folder / "warm").is_dir():
            publish(folder / "warm.md", table(folder / "warm"))
            publish(folder / "brief.md", overview(by_model(folder / "warm")))
        if parts := found("without-*"):
            whole = sorted({folder / path.name.rpartition("-")[2] for path in parts} & set(new))
            publish(folder / "without.md", overview(by_folder([*whole, *parts])))
        if (folder / "meaning.json").exists():
            publish(folder / "meaning.md", meaning(folder / "meaning.json"))
    for name, members in COMPARED.items():
        there = [root / member for member in members if (root / member / "summary.json").exists()]
        if len(there) > 1:
            publish(root / name, compare(there))
        if there and name == "shops.md":
            publish(root / "groups.md", groups(there))
    if (root / "bench").is_dir():
        publish(root / "bench" / "table.md", benches(root / "bench"))
        publish(root / "bench" / "brief.md", benches(root / "bench", brief=True))
    if (root / "faults").is_dir():
        publish(root / "faults" / "table.md", faults(root / "faults"))
    for file in files:
        include(file)


# ---------------------------------------------------------------------------------------------------- bench

def bench_rows(rows: int, sizes=(20_000, 10_000, 16, 8), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random rows, planted answers: an effect per value and a user × item taste → x int32 [R, 4], y [R]."""
    rng = np.random.default_rng(seed)
    x = np.stack([rng.integers(0, size, rows) for size in sizes], 1)
    logit = sum(rng.normal(0, 0.7, size)[column] for size, column in zip(sizes, x.T))
    user, item = (rng.normal(0, 1, (size, 2))[column] for size, column in zip(sizes, x.T[:2]))
    y = rng.random(rows) < 1 / (1 + np.exp(-logit - (user * item).sum(1)))
    return torch.from_numpy(x.astype(np.int32)), torch.from_numpy(y.astype(np.float32))


def bench_ours(x: Tensor, y: Tensor, rows: int, sizes, seed: int = 0) -> tuple[float, float]:
    """One epoch of DeepFM over the first `rows` → seconds, AUC of the others. Batches of 1,024, Adam."""
    torch.manual_seed(seed)
    model = DeepFM(sizes, dim=8, hidden=(64, 32), dropout=0.0).to(x.device)
    adam, generator = optimiser(model, 1e-3, 1e-6), torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    train_epoch(model, adam, x[:rows], y[:rows], 1024, generator)
    model.bias.item()                                        # a GPU may still be at work: wait for it
    seconds = time.perf_counter() - start
    return seconds, auc(y[rows:].cpu(), predict(model, x[rows:]))


def bench_deepctr(x: Tensor, y: Tensor, rows: int, sizes, seed: int = 0) -> tuple[float, float]:
    """The same by DeepCTR-Torch's fit, silent and without metrics, which is how it is fastest.

    It adds the losses of a batch where we take their mean, and l2 · w² where Adam takes l2 / 2: hence its l2.
    """
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import DeepFM as Theirs
    columns, l2 = [SparseFeat(f"f{f}", size, 8) for f, size in enumerate(sizes)], 1e-6 * 1024 / 2
    model = Theirs(columns, columns, dnn_hidden_units=(64, 32), l2_reg_linear=l2, l2_reg_embedding=l2,
                   seed=seed, device=str(x.device))
    model.compile(torch.optim.Adam(model.parameters(), lr=1e-3), "binary_crossentropy")
    train, test = ({f"f{f}": column for f, column in enumerate(part.T.cpu().numpy())}
                   for part in (x[:rows], x[rows:]))
    labels, start = y[:rows].cpu().numpy(), time.perf_counter()
    model.fit(train, labels, batch_size=1024, epochs=1, verbose=0)
    seconds = time.perf_counter() - start
    return seconds, auc(y[rows:].cpu(), model.predict(test, 65536)[:, 0])


def deepctr_version() -> str | None:
    """DeepCTR-Torch's version, None where not installed. On import it asks PyPI for a newer one: wait."""
    before = set(threading.enumerate())
    try:
        import deepctr_torch
    except ImportError:
        return None
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    return deepctr_torch.__version__


def peak_mb() -> float | None:
    """The most memory this process has had so far, in MiB."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


def machine(device: torch.device) -> dict:
    """What figures were measured on."""
    try:
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        cpu = platform.processor() or platform.machine()
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"device": str(device), **gpu, "processor": cpu, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__}


def bench(args) -> None:
    """DeepFM on random rows, one epoch; the AUC is of a tenth as many further rows. The last line is JSON.

    Three seeds, in turn with DeepCTR-Torch where that is installed: the best time, the mean AUC. With --grow
    instead one run each over rows / 16, rows / 4 and rows, smallest first: peak_mb is the process's so far.
    """
    sizes, device = (20_000, 10_000, 16, 8), torch.device(pick_device(args.device))

    def data(rows: int) -> tuple:
        x, y = bench_rows(rows + max(1000, rows // 10), sizes)
        return x.to(device), y.to(device), rows, sizes

    result = {"rows": args.rows, "machine": machine(device)}
    if args.grow:
        result["grow"] = []
        bench_ours(*data(2048))                              # what the first step alone takes
        for rows in (max(1, args.rows // 16), max(1, args.rows // 4), args.rows):
            seconds, score = bench_ours(*data(rows))
            result["grow"].append({"rows": rows, "seconds": round(seconds, 3), "peak_mb": peak_mb(),
                                   "rows_per_s": round(rows / seconds), "auc": round(score, 4)})
            print(json.dumps(result["grow"][-1]), flush=True)
    else:
        with contextlib.redirect_stdout(io.StringIO()):      # theirs prints even when silent
            version = deepctr_version()
            calls = [bench_ours, bench_deepctr][:2 if version else 1]
            case = data(args.rows)
            runs = np.array([[call(*case, seed) for call in calls] for seed in range(3)])     # (3, calls, 2)
        best = list(zip(runs[..., 0].min(0).tolist(), runs[..., 1].mean(0).tolist()))
        seconds, score = best[0]
        result["compared"] = "nothing: deepctr_torch is not installed"
        if version:
            result["compared"] = f"fit of deepctr_torch {version}, same sizes and settings, in turn"
            result["deepctr"] = {"seconds": round(best[1][0], 3), "rows_per_s": round(args.rows / best[1][0]),
                                 "auc": round(best[1][1], 4)}
            result.update(vs_deepctr=best[1][0] / seconds, auc_gain=score - best[1][1])
    result.update(seconds=round(seconds, 3), auc=round(score, 4), rows_per_s=round(args.rows / seconds))
    if args.out:
        publish(Path(args.out), dump(result))
    print(json.dumps(result))


# A row per figure: file, keys on the way to it (* = each of a list), what it is, its format, its target.
# {names} in what it is are keys beside the figure, or further up.
BENCHES = (
    ("em.json", "of_limit", "E-step: share of the bare LLM's speed", ".2f", "≥ 0.85"),
    ("em.json", "vs_naive", "E-step: ours / naive way in fp32, labelled tokens per second", ".1f", "≥ 3"),
    ("em.json", "vs_naive_same_dtype", "E-step: ours / naive way in equal dtype", ".1f", "≥ 1.8"),
    ("em.json", "tokens_per_s", "E-step: evidence tokens per second, forward and backward", ",.0f", ""),
    ("em.json", "ms_per_user", "E-step: ms per user for one forward and backward pass", ",.0f", ""),
    ("em.json", "peak_mb", "E-step: peak memory of the bench, naive way included, MB", ",.0f", ""),
    ("grow.json", "grow.*.seconds_per_user", "E-step, {users:,} users: seconds per user", ".4f", "flat"),
    ("grow.json", "grow.*.peak_mb", "E-step, {users:,} users: peak memory, MB", ",.0f", ""),
    ("codebook.json", "kmeans.*.seconds.ours", "k-means, {n:,} × {d}, K = {k}: seconds", ".2f", ""),
    ("codebook.json", "kmeans.*.ratio.sklearn", "k-means, {n:,} × {d}, K = {k}: sklearn / ours", ".2f", "≥ 1"),
    ("codebook.json", "kmeans.*.ratio.faiss", "k-means, {n:,} × {d}, K = {k}: faiss / ours", ".2f", "≥ 1"),
    ("codebook.json", "bank.bytes_per_user", "bank, {users:,} users: bytes per user", ".1f", "≤ 16"),
    ("codebook.json", "bank.mb_2m", "bank, 2 M users: MB (computed)", ",.0f", ""),
    ("codebook.json", "bank.mb_100m", "bank, 100 M users: MB (computed)", ",.0f", ""),
    ("codebook.json", "bank.open_ms", "bank, {users:,} users: ms to open", ".1f", "< 50"),
    ("codebook.json", "bank.lookups_per_s", "bank, {users:,} users: lookups per second", ",.0f", "≥ 2,000,000"),
    ("codebook.json", "bank.vs_sqlite", "bank, {users:,} users: SQLite / ours, s per lookup", ".1f", "≥ 20"),
    ("codebook.json", "bank.single_p99_us", "bank, {users:,} users: µs for one lookup (99 %)", ".1f", "< 50"),
    ("codebook_avx2.json", "kmeans.*.ratio.faiss", "without AVX-512: k-means, {n:,} × {d}, K = {k}: faiss / ours", ".2f", "≥ 1"),
    ("codebook_avx2.json", "bank.lookups_per_s", "without AVX-512: bank, lookups per second", ",.0f", "≥ 2,000,000"),
    ("codebook_avx2.json", "bank.vs_sqlite", "without AVX-512: SQLite / ours, s per lookup", ".1f", "≥ 20"),
    ("ctr.json", "rows_per_s", "DeepFM, {rows:,} rows: training rows per second", ",.0f", ""),
    ("ctr.json", "vs_deepctr", "DeepFM, {rows:,} rows: DeepCTR-Torch's fit / ours, seconds", ".1f", "≥ 5"),
    ("ctr.json", "auc_gain", "DeepFM, {rows:,} rows: AUC, ours − DeepCTR-Torch's", "+.4f", "≥ 0 ± 0.001"),
    ("ctr_grow.json", "grow.*.rows_per_s", "DeepFM, {rows:,} rows: training rows per second", ",.0f", "flat"),
    ("ctr_grow.json", "grow.*.peak_mb", "DeepFM, {rows:,} rows: peak memory, MB", ",.0f", ""),
    ("data.json", "of_json", "reviews, {rows:,} lines: ours / json.loads alone, lines per CPU second", ".2f", "≥ 0.6"),
    ("data.json", "grow.*.rows_per_s", "reviews, {rows:,} lines: lines read per CPU second", ",.0f", "flat"),
    ("data.json", "grow.*.peak_mb", "reviews, {rows:,} lines: peak memory, MB", ",.0f", "< 1,000 at 1 M"),
)


# Users of data sets that the kit reads, for an estimate of the EM's time; an EM of one round and three steps takes
# eight passes, the two without a gradient counted as full ones.
SIZES = (("planted shop", 240), ("MovieLens-100K", 943), ("NETE MoviesAndTV", 7_506), ("NETE Yelp", 27_147))
PASSES = 8


def dig(value, path: list[str], around: dict) -> list[tuple]:
    """(the figure at a path of keys or None, the keys around it): one, or one for each item of a list at *."""
    around = {**around, **value} if isinstance(value, dict) else around
    if not path:
        return [(value, around)]
    if path[0] == "*":
        return [one for item in (value if isinstance(value, list) else [None]) or [None]
                for one in dig(item, path[1:], around)]
    return dig(value.get(path[0]) if isinstance(value, dict) else None, path[1:], around)


def benches(folder: Path, brief: bool = False) -> str:
    """One table of the figures in a folder of bench results (brief: those with a target); what is missing is blank."""
    found, rows, places = {}, [], {}
    for name in dict.fromkeys(row[0] for row in BENCHES):
        try:
            found[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            found[name] = None
        except (OSError, ValueError) as error:
            raise Fault(4, f"{folder / name} is damaged or no JSON: {error}") from None
        about = found[name].get("machine") if isinstance(found[name], dict) else None
        if isinstance(about, dict):
            keys = [key for key in ("gpu", "processor", "cores", "threads", "torch") if key in about]
            places.setdefault("; ".join(f"{key} {about[key]}" for key in keys), []).append(name)
    number = lambda value, form: format(value, form) if type(value) in (int, float) else ""
    for name, path, what, form, target in BENCHES:
        for value, near in dig(found[name], path.split("."), {}):
            label = re.sub(r"{(\w+):?(.*?)}", lambda match: number(near.get(match[1]), match[2]) or "…", what)
            rows.append([label, number(value, form), target, name])
    if brief:
        return markdown(["what", "figure", "target"], [row[:3] for row in rows if row[2]]) + "\n"
    text = markdown(["what", "figure", "target", "file"], rows) + "\n"
    text += "".join(f"\n{', '.join(names)}: {place}.\n" for place, names in places.items())
    if ops := [one for one, _ in dig(found["em.json"], ["profile", "*"], {}) if isinstance(one, dict)]:
        share = lambda one, way: number(one.get(way), ".0%")
        text += "\n" + markdown(["share of the time in", "naive way, equal dtype", "E-step"], [
            [str(one.get("op")), share(one, "naive_same_dtype"), share(one, "e_step")] for one in ops]) + "\n"
    one = lambda name, path: dig(found[name], path.split("."), {})[0][0]
    each, parameters = one("em.json", "ms_per_user"), one("em.json", "lm.parameters")
    if type(each) in (int, float):
        text += "\n" + markdown(["EM on this machine, users as in em.json", "users", "minutes (*estimate*)"], [
            [name, f"{users:,}", f"{PASSES * each * users / 60_000:,.0f}"] for name, users in SIZES]) + "\n"
        rate, width = one("codebook.json", "bank.lookups_per_s"), 4 if one("em.json", "lm.dtype") == "float32" else 2
        held = [f"{number(one('codebook.json', 'bank.bytes_per_user'), '.0f')} bytes a user",
                f"the LLM, {number(parameters and width * parameters / 2**20, ',.0f')} MB"]
        text += "\n" + markdown(["a request for one user's IDs", "microseconds", "memory"], [
            ["in the bank, by batches", number(rate and 1e6 / rate, ".2f"), held[0]],
            ["in the bank, alone (99 %)", number(one("codebook.json", "bank.single_p99_us"), ".1f"), held[0]],
            ["not in the bank: E-steps (*estimate*)", number(PASSES * each * 1000, ",.0f"), held[1]]]) + "\n"
    return text


def faults(folder: Path) -> str:
    """faults.json (trials of fault × command) and fuzz_*.json (cases of each loader) of a folder, as two tables."""
    struck = read_json(folder / "faults.json")
    fuzzed = [item for path in sorted(folder.glob("fuzz_*.json")) for item in read_json(path).items()]
    try:
        commands, keys = {name: None for by in struck.values() for name in by}, ("trials", "resumed", "lost")
        cell = lambda by: " / ".join(f"{sum(one[key] for one in by)}" for key in keys)
        rows = [[name, *(cell([by[name]]) if name in by else "" for by in struck.values())] for name in commands]
        rows.append(["all", *(cell(by.values()) for by in struck.values())])
        text = "Trials / resumed bit for bit / lost:\n\n" + markdown(["command", *struck], rows) + "\n"
        counts = [[name, *(f"{one[key]:,}" for key in ("cases", "values", "faults", "other"))] for name, one in fuzzed]
        if counts:
            text += "\n" + markdown(["loader", "cases", "a value", "our own error", "anything else"], counts) + "\n"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Fault(4, f"{folder}: no figures of the fault tests ({error!r})") from None
    return text


# ------------------------------------------------------------------------------------------------------ CLI

def command_table(args) -> None:
    text = "\n\n".join(map(table, args.folders))
    if args.summary:
        if len(args.folders) > 1 or len({one["dataset"] for one in read_runs(args.folders[0])}) > 1:
            raise Fault(2, "--summary takes one folder of one data set")
        publish(args.summary, dump(summarise(args.folders[0])))
    publish(args.out, text) if args.out else print(text, end="")


def positive(kind, zero: bool = False):
    """An argparse type: a finite number above 0, or 0 where that may be."""
    def parse(text):
        value = kind(text)
        if not (0 < value < math.inf or zero and value == 0):
            raise ValueError
        return value
    parse.__name__ = f"positive {kind.__name__}"
    return parse


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="ctr.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("run", help="train models over feature sets and seeds", allow_abbrev=False)
    one.set_defaults(do=run)
    one.add_argument("--data", required=True, help="folder that data.py wrote")
    one.add_argument("--bank", help="folder of codebook.py bank; without it random and stats use 4, 3 codes")
    one.add_argument("--models", default="deepfm,dcn,fm,lr", help="which to train (default: %(default)s)")
    one.add_argument("--features", default="none,random,shuffled,stats,userip",
                     help="feature sets, a+b for both at once (default: %(default)s)")
    one.add_argument("--out", required=True, help="folder for one JSON per run; runs that it holds are kept")
    one.add_argument("--restart", action="store_true", help="remove the results in --out first")
    one.add_argument("--drop", default="", help="fields of the data to leave out, such as user")
    for name, kind, default, text in (
            ("seeds", int, 5, "runs per model and feature set"), ("dim", int, 8, "embedding size"),
            ("lr", float, 1e-2, "Adam's learning rate"), ("batch", int, 256, "rows a step"),
            ("epochs", int, 50, "most epochs"), ("patience", int, 3, "epochs without a better AUC")):
        one.add_argument(f"--{name}", type=positive(kind), default=default, help=f"{text} ({default})")
    one.add_argument("--l2", type=positive(float, zero=True), default=1e-5, help="embeddings' L2 (1e-5)")
    two = commands.add_parser("table", help="render results as Markdown", allow_abbrev=False)
    two.set_defaults(do=command_table)
    two.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="folder of results")
    two.add_argument("--out", type=Path, help="file for the tables (default: print them)")
    two.add_argument("--summary", type=Path, help="file for figures per seed, with DIR's score.json and seconds.json")
    three = commands.add_parser("tables", help="every table of results, and files' blocks", allow_abbrev=False)
    three.set_defaults(do=lambda args: tables(args.folder, args.files))
    three.add_argument("folder", metavar="DIR", type=Path, help="folder such as results")
    three.add_argument("files", nargs="*", metavar="FILE", type=Path, help="Markdown whose <!-- include --> blocks to fill")
    four = commands.add_parser("bench", help="time one epoch of DeepFM on random rows", allow_abbrev=False)
    four.set_defaults(do=bench)
    four.add_argument("--rows", type=positive(int), default=1_000_000, help="rows (default: %(default)s)")
    four.add_argument("--grow", action="store_true", help="rows / 16, rows / 4 and rows, with peak memory")
    four.add_argument("--out", help="file for the figures, beside printing them")
    for command in (one, four):
        command.add_argument("--device", default="auto", help="cpu, cuda, … (default: cuda if there)")
    args = parser.parse_args(argv)
    try:
        args.do(args)
    except OSError as error:                                             # a full disk, a folder that may not be written
        raise Fault(3, f"cannot read or write {error.filename or 'a file'}: {error.strerror or error}") from None


if __name__ == "__main__":
    try:
        main()
    except Fault as fault:
        print(f"ctr.py: {fault}", file=sys.stderr)
        sys.exit(fault.code)
    except KeyboardInterrupt:
        print("ctr.py: stopped; the same command goes on with the runs that are missing", file=sys.stderr)
        sys.exit(130)
