"""Collaborative IDs: k-means codebooks, and the feature bank that serves each user's codes.

    python codebook.py bank   --profiles DIR --out DIR               the bank: user id → codes, memory-mapped
    python codebook.py lookup --bank DIR USER...                     codes of users; exit 4 if one is unknown
    python codebook.py verify DIR...                                 is a folder what its meta.json records? else exit 4
    python codebook.py cards  --profiles DIR --data DIR [--out FILE] what each ID means, as Markdown tables
    python codebook.py score  --profiles DIR --data DIR --out FILE   IDs against known groups (planted data)
    python codebook.py meaning --profiles DIR --data DIR --out FILE  what IDs tell of known attributes (ml-100k)
    python codebook.py bench  [--rows N] [--users N] [--out FILE]    speed of k-means and of the bank

Codes count from 0 in arrays named `ids`, and from 1 in a bank and in cards, where 0 means "unknown user".
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import shlex
import shutil
import sqlite3
import sys
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl                                             # neither on Windows
    import resource
except ImportError:
    fcntl = resource = None


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


# --------------------------------------------------------------------------------------------------- k-means

class Clusters(NamedTuple):
    """A codebook and who uses which code."""
    centroids: Tensor      # [K, d] fp32
    ids: Tensor            # [N] int64, the nearest code
    inertia: float         # Σ squared distance to the nearest of the centroids returned
    history: list[float]   # inertia at the start of each iteration; never rises (beyond fp32 rounding)


def chunk_rows(x: Tensor) -> int:
    """Rows per chunk: 8 MB stay in a CPU's cache between two products, a GPU wants larger pieces.

    At most 8,192 on a CPU, whose sums over a chunk are fp32, one row after the other.
    """
    width = max(1, x.shape[1])
    return max(1, min(8192, 2**21 // width) if x.device.type == "cpu" else 2**26 // width)


def closest(x: Tensor, c: Tensor, half: Tensor) -> Tensor:
    """argmin_k |c_k|²/2 − x·c_k, x [n, d], c [K, d], half [K] -> ids [n]: |x|² is the same for all codes."""
    scores = torch.addmm(half, x, c.T, alpha=-1)                       # (n, K)
    if scores.device.type == "cpu":                                    # numpy's argmin: half the time for many codes
        return torch.from_numpy(scores.numpy().argmin(1))
    return scores.argmin(1)


@torch.no_grad()
def assign(x: Tensor, centroids: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Nearest centroid: x [N, d], centroids [K, d] -> (ids [N] int64, squared distances [N] fp32).

    Both are moved by the centroids' mean first: |x|² − 2xc + |c|² cancels badly far from 0.
    """
    shift = centroids.mean(0)
    c, ids, distances = (centroids - shift).float(), [], []
    half = 0.5 * c.square().sum(1)                                     # (K,)
    for part in x.split(chunk or chunk_rows(x)):
        part = (part - shift).float()                                  # (n, d)
        ids.append(closest(part, c, half))
        distances.append((part - c[ids[-1]]).square().sum(1))
    return torch.cat(ids), torch.cat(distances)


def seed_centroids(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): each start is a row drawn by its squared distance."""
    draw = lambda: torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).item()
    norms, nearest, chosen = torch.linalg.vector_norm(x, dim=1).square(), None, [int(draw() * len(x))]
    while len(chosen) < k:
        c = x[chosen[-1]]
        distance = (norms - 2 * (x @ c) + c @ c).clamp_min(0)          # (N,)
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        nearest[chosen] = 0
        mass = nearest.double().cumsum(0)
        point = draw()
        if mass[-1] > 0:
            chosen.append(min(int(torch.searchsorted(mass, point * mass[-1], right=True)), len(x) - 1))
        else:                                                          # fewer distinct points than codes
            chosen.append(int(point * len(x)))
    return x[chosen]


def sums_by_code(rows: Tensor, codes: Tensor, k: int) -> Tensor:
    """Σ of the rows [m, d] of each code [m] -> [k, d]. Adding rows is d operations a row, a one-hot product k · d;
    but on a GPU only the product gives the same bits every time."""
    if rows.device.type == "cpu":
        return rows.new_zeros(k, rows.shape[1]).index_add_(0, codes, rows)
    return (torch.arange(k, device=rows.device)[:, None] == codes).float() @ rows


def sweep(x: Tensor, c: Tensor, ids: Tensor, sums: Tensor) -> int:
    """One assignment of x [N, d] to c [K, d], ids [N] and sums [K, d] (fp64) updated in place: how many moved.

    Only rows that moved change the sums (ours): soon they are few. ids start at −1, no code's row.
    """
    half, moved = 0.5 * c.square().sum(1), 0
    for part, old in zip(x.split(chunk_rows(x)), ids.split(chunk_rows(x))):
        new = closest(part, c, half)                                   # (n,)
        who = (new != old).nonzero().flatten()                         # (m,)
        if len(who):
            rows = part if len(who) == len(part) else part.index_select(0, who)         # (m, d)
            sums += sums_by_code(rows, new[who], len(c))
            if old[0] >= 0:                                            # the first time nothing is to be taken back
                sums -= sums_by_code(rows, old[who], len(c))
            old.copy_(new)
            moved += len(who)
    return moved


def means(x: Tensor, c: Tensor, ids: Tensor, sums: Tensor) -> Tensor:
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


def lloyd(x: Tensor, c: Tensor, mean: Tensor, total: float, iters: int) -> Clusters:
    """At most `iters` Lloyd iterations on x [N, d] from c [K, d], then one assignment to what is returned.

    x and c are centred: `mean` is added to the centroids returned. total: Σ|x|². Stops when no row moves.
    """
    ids = torch.full((len(x),), -1, device=x.device)
    sums, history = torch.zeros(c.shape, dtype=torch.float64, device=x.device), []

    def inertia() -> float:
        """Σ|x − c|² = Σ|x|² − 2 Σ_k s_k·c_k + Σ_k n_k |c_k|²: K × d work instead of N × d."""
        wide, counts = c.double(), ids.bincount(minlength=len(c))
        return max(0.0, total + float((counts * wide.square().sum(1)).sum() - 2 * (sums * wide).sum()))

    moved = -1
    for _ in range(iters):
        moved = sweep(x, c, ids, sums)
        history.append(inertia())
        if not moved:
            break
        c = means(x, c, ids, sums)
    rounded = (c + mean).float()
    last, c = c, (rounded - mean).float()
    if moved or (c - last).abs().max() > 1e-7 * last.abs().max():      # else the last sweep was by these centroids
        sweep(x, c, ids, sums)
    value = inertia()
    if value < 1e-3 * total:                                           # a difference of two large numbers
        value = float(assign(x, c)[1].double().sum())
    return Clusters(rounded, ids, value, history)


@torch.no_grad()
def kmeans(x: Tensor, k: int, *, n_init: int = 10, iters: int = 50, init: Tensor | None = None,
           generator: torch.Generator | None = None) -> Clusters:
    """Lloyd's k-means (paper, quantisation module: one codebook per profile). x [N, d], any dtype and device.

    Best inertia of n_init k-means++ starts, codes ordered by size (largest first), then by coordinates, so that
    equal data get equal codes; or one warm start from init [k, d], whose order is kept (n_init is then ignored).
    Exactly `iters` iterations unless no row moves any more. Memory: 8 bytes a row, and a centred fp32 copy of x
    unless x is fp32 and its mean is small beside its spread.
    The default generator is seeded with 0; the global one is never used.
    Raises Fault 2 for a bad shape, k < 1, k > N or an unfit init; Fault 4 for NaN, infinite or huge values.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise Fault(2, f"k-means needs a table [rows, dimensions], got the shape {list(x.shape)}")
    if not 1 <= k <= len(x):
        raise Fault(2, f"k-means needs at least one code and as many rows as codes: {k} codes, {len(x)} rows")
    if iters < 0 or n_init < 1:
        raise Fault(2, f"k-means needs iters >= 0 and n_init >= 1, got {iters} and {n_init}")
    if init is not None and init.shape != (k, x.shape[1]):
        raise Fault(2, f"k-means init has the shape {list(init.shape)}, needs {[k, x.shape[1]]}")
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    square = lambda rows: float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
    mean, total, centred = x.mean(0), square(x), None
    largest = total / len(x)                                           # mean |x|², before the mean is taken off
    if len(x) * float(mean.square().sum()) < 0.1 * total < 1e36:       # centred enough for fp32: no copy of x
        mean, centred = torch.zeros_like(mean), x.float()
    else:
        if x.device.type == "cpu":                                     # numpy asks for huge pages, torch does not:
            centred = torch.from_numpy(np.empty(x.shape, np.float32))  # half the time of all before the loop
        centred = torch.sub(x, mean, out=centred).float()              # (N, d)
        total = square(centred)
    if not total < 1e37 or init is not None and not init.isfinite().all():
        bad = (~x.isfinite().all(1)).nonzero().flatten().tolist()
        where = f"row {bad[0]} is the first of {len(bad)}" if bad else "in init, or the squares overflow"
        raise Fault(4, f"k-means got NaN, infinite or huge values ({where})")
    generator = generator or torch.Generator().manual_seed(0)
    best = None
    for _ in range(n_init if init is None else 1):
        start = seed_centroids(centred, k, generator) if init is None else (init.to(x) - mean).float()
        found = lloyd(centred, start, mean, total, iters)
        if best is None or found.inertia < best.inertia:
            best = found
    best = best._replace(ids=together(best, torch.finfo(x.dtype).eps ** 2 * largest))
    return best if init is not None else canonical(best)


def together(clusters: Clusters, rounding: float) -> Tensor:
    """ids [N], where of codes that only rounding tells apart the first has all rows: equal users, equal IDs.

    rounding: squared error of the data's own arithmetic; codes within 64 times its root are one.
    """
    c = clusters.centroids.double()
    return (torch.cdist(c, c) <= 64 * rounding ** 0.5).int().argmax(1)[clusters.ids]


def canonical(clusters: Clusters) -> Clusters:
    """The same codes by size, largest first, then by first, second, … coordinate."""
    centroids, ids, rows = clusters.centroids, clusters.ids, clusters.centroids.tolist()
    size = ids.bincount(minlength=len(rows)).tolist()
    order = torch.tensor(sorted(range(len(rows)), key=lambda j: (-size[j], rows[j])), device=ids.device)
    return clusters._replace(centroids=centroids[order], ids=order.argsort()[ids])


def vq(theta: Tensor, k: int, *, steps: int = 1000, lr: float = 0.01, batch: int = 8, seed: int = 0,
       generator: torch.Generator | None = None) -> Clusters:
    """The gradient-trained codebook of the authors' code, for the ablation: it collapses, k-means does not.

    theta [N, d]. Codes start in U(−1/K, 1/K), Adam lowers ‖sg[θ] − e‖² to the nearest code on random minibatches,
    and nothing brings back a code that nobody is near. history: the minibatch loss per row, times N.
    """
    generator = generator or torch.Generator().manual_seed(seed)
    codes = (2 * torch.rand(k, theta.shape[1], generator=generator) - 1) / k                # (K, d)
    codes = codes.to(theta.device).requires_grad_()
    adam, history = torch.optim.Adam([codes], lr=lr), []
    for _ in range(steps):
        rows = theta[torch.randint(len(theta), (batch,), generator=generator)].detach().float()      # (b, d)
        loss = (rows - codes[assign(rows, codes.detach())[0]]).square().sum(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append(float(loss.detach()) * len(theta))
    ids, distance = assign(theta.detach(), codes.detach())
    return Clusters(codes.detach(), ids, float(distance.double().sum()), history)


def perplexity(ids, k: int) -> float:
    """exp(entropy) of the usage of k codes: 1 = all on one code, k = even use. ids [N] in 0 … k − 1."""
    share = torch.bincount(torch.as_tensor(ids).flatten().long(), minlength=k).double() / len(ids)
    return float(torch.special.entr(share).sum().exp())


def ari(a, b) -> float:
    """Adjusted Rand index of two labellings [N] (Hubert & Arabie 1985): 1 = same, 0 = chance; nan for N = 0."""
    a, b = (np.unique(np.asarray(labels), return_inverse=True)[1] for labels in (a, b))
    if len(a) != len(b):
        raise ValueError(f"two labellings of {len(a)} and {len(b)} rows")
    if not len(a):
        return float("nan")
    pairs = lambda counts: float((counts * (counts - 1.0) / 2).sum())
    both = pairs(np.unique(a * (b.max() + 1) + b, return_counts=True)[1])
    rows, columns, everything = pairs(np.bincount(a)), pairs(np.bincount(b)), pairs(np.array([len(a)]))
    expected = rows * columns / everything if everything else 0.0
    span = (rows + columns) / 2 - expected
    return (both - expected) / span if span else 1.0


# ----------------------------------------------------------------------------------------------------- files

def as_json(value) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def sync(path: Path) -> None:
    """Flushes a file, or the files of a folder, to the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())


def publish(path: Path, write) -> None:
    """A file appears whole or not at all: `write(file)` into NAME.tmp, fsync, rename."""
    fresh = path.with_name(path.name + ".tmp")
    with open(fresh, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def write_text(path: Path, text: str) -> None:
    publish(path, lambda file: file.write(text.encode()))


@contextmanager
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
        except OSError:                                            # a file system without locks
            pass
        with suppress(FileNotFoundError):                          # else the last holder has just removed the file
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            file.close()


def facts(began: float, program: str) -> dict:
    """How, when and where a command ran: all that may differ between two runs with equal results. → meta.json's "run"."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10) \
        if resource else None
    gpu = {"gpu": torch.cuda.get_device_name(), "gpu_peak_mb": torch.cuda.max_memory_allocated() // 2**20} \
        if torch.cuda.is_available() else {}
    versions = {name: version(name) for name in ("torch", "transformers", "numpy") if find_spec(name)}
    return {"command": shlex.join(["python", program, *sys.argv[1:]]), "seconds": round(time.time() - began, 1),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)), "peak_mb": peak,
            "machine": {**machine(), **gpu}, "versions": {"python": platform.python_version(), **versions}}


def unreadable(path: Path, error: Exception) -> Fault:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return Fault(4, f"{path} does not exist")
    return Fault(3 if isinstance(error, PermissionError) else 4, f"{path} cannot be read: {error}")


def need(path: Path, found, keys) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise Fault(4, f"{path} has no {', '.join(map(repr, missing))}")


MOST_JSON, MOST_UNPACKED = 2**24, 2**28        # bytes of a JSON file, and of a packed .npz unpacked: more is a trap


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object that has these keys, else Fault."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"larger than {MOST_JSON} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        as_json(found).encode()                                        # no lone surrogates: what is read can be written
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    need(path, found if isinstance(found, dict) else (), keys)
    return found


def read_array(file, size: int) -> np.ndarray:
    """An .npy of `size` bytes. ValueError if its header promises more: numpy would allocate that before it reads."""
    head = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = head[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or math.prod(shape) * max(1, dtype.itemsize) > size:
        raise ValueError(f"{shape} of {dtype} in {size} bytes")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def read_npz(path: Path, *keys: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz that has these keys, else Fault."""
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            need(path, members, keys)
            if sum(info.file_size for info in members.values()) > max(MOST_UNPACKED, 2 * path.stat().st_size):
                raise ValueError(f"it would unpack to more than {MOST_UNPACKED} bytes")
            return {name: read_array(file.open(info), info.file_size) for name, info in members.items()}
    except Fault:
        raise
    except Exception as error:                                         # whatever damage makes zipfile and numpy raise
        raise unreadable(path, error) from None


# ---------------------------------------------------------------------------------------------- feature bank

VERSION = 1
BLOCK, BLOCKS = 1 << 16, 64          # open() hashes at most 64 blocks of 64 KiB of a file: 4 MiB


def hash_users(users) -> np.ndarray:
    """64-bit keys of user ids. users: str array or list [n] -> uint64 [n].

    FNV-1a over code points, then murmur3's finaliser. Integers count as their decimal text. The array's width does
    not matter: padding NULs are skipped.
    """
    a = np.asarray(users).reshape(-1).astype(str)
    a = np.ascontiguousarray(a, a.dtype.newbyteorder("="))
    points, prime = a.view(np.uint32).reshape(len(a), a.itemsize // 4), np.uint64(0x100000001B3)      # (n, W)
    width, h = points.shape[1], np.full(len(a), 0xCBF29CE484222325, np.uint64)
    while width and not points[:, width - 1].any():
        width -= 1
    for column in points[:, :width].T:                                 # (n,)
        column, text = column.astype(np.uint64), column != 0
        h = (h ^ column) * prime if text.all() else np.where(text, (h ^ column) * prime, h)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ (h >> np.uint64(33))) * np.uint64(factor)
    return h ^ (h >> np.uint64(33))


def hash_user(user: str) -> int:
    """hash_users of one id in plain Python: numpy's overhead per call would be ten times the work."""
    h, mask = 0xCBF29CE484222325, 0xFFFFFFFFFFFFFFFF
    for char in user:
        if char != "\0":
            h = (h ^ ord(char)) * 0x100000001B3 & mask
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ (h >> 33)) * factor & mask
    return h ^ (h >> 33)


def digest(path: Path, sample: bool = False) -> str:
    """sha256 of a file; with sample, of its size and 64 evenly spaced blocks of 64 KiB (all of it up to 4 MiB)."""
    size, sha = path.stat().st_size, hashlib.sha256()
    starts = range(0, size, BLOCK)
    if sample:
        sha.update(str(size).encode())
        if len(starts) > BLOCKS:
            starts = np.linspace(0, size - BLOCK, BLOCKS).astype(int).tolist()
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            sha.update(file.read(BLOCK))
    return sha.hexdigest()


def seal(meta: dict) -> str:
    """sha256 of a bank's meta.json without its own seal and the facts of the run that made it."""
    rest = {key: value for key, value in meta.items() if key not in ("seal", "run")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def replaced(folder: Path) -> Path:
    """Where the old bank stands while the new one takes its place."""
    return folder.with_name(folder.name + ".replaced")


def identity(folder: Path) -> tuple | None:
    """Tells a folder from another that took its name; None: there is none."""
    with suppress(OSError):
        found = os.stat(folder)
        return found.st_dev, found.st_ino, found.st_mtime_ns


class Bank:
    """User id → codes: sorted 64-bit hashes beside their codes, memory-mapped: readers share one page cache.

    keys.npy uint64 [N], codes.npy uint8 or uint16 [N, P], codebook.npz (names, mu_p), meta.json: 8 + P bytes a user
    up to 255 codes. open() is fast at any size and therefore hashes only samples of files above 4 MiB: it sees every
    truncated or exchanged file, and every altered byte of files up to 4 MiB; verify() reads everything.
    A new bank takes the place of the old in two renames; a reader sees one of the two, and keeps the one it has open.
    """

    FILES = ("keys.npy", "codes.npy", "codebook.npz")

    def __init__(self, folder: Path, meta: dict, keys: np.ndarray, codes: np.ndarray):
        self.folder, self.meta, self.keys, self.codes = folder, meta, keys, codes

    @classmethod
    def build(cls, folder, users, codes, meta: dict | None = None, centroids=()) -> "Bank":
        """Writes a bank and opens it. users: N distinct ids (str or int); codes: int [N, P] from 1, 0 = unknown.

        meta: "names" (P profile names), "lm", … are kept as given. centroids: P arrays [K_p, D], kept beside them.
        Takes about 40 bytes of memory a user. A bank already there is replaced only when the new one is complete.
        """
        folder, codes, meta = Path(folder).resolve(), np.asarray(codes), dict(meta or {})
        if codes.shape[:-1] != (len(users),) or not codes.size or codes.dtype.kind not in "iu":
            raise Fault(4, f"a bank needs integer codes [users, profiles]: {len(users)} users, codes {codes.shape}")
        if codes.min() < 0 or codes.max() > 65535:
            raise Fault(4, f"bank codes must lie in 0 … 65535, found {codes.min()} … {codes.max()}")
        names = [str(name) for name in meta.setdefault("names", [f"p{p}" for p in range(codes.shape[1])])]
        if len(names) != codes.shape[1]:
            raise Fault(4, f"{len(names)} profile names for {codes.shape[1]} columns of codes")
        if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not (folder / cls.FILES[0]).exists():
            raise Fault(2, f"{folder} exists and is no bank: name another folder")
        keys = np.concatenate([hash_users(users[i:i + 2**19]) for i in
                               Progress(range(0, len(users), 2**19), desc="user keys", disable=len(users) < 2**22)])
        order = keys.argsort(kind="stable")
        keys = keys[order]
        for i in (keys[1:] == keys[:-1]).nonzero()[0][:1]:
            a, b = str(users[order[i]]), str(users[order[i + 1]])
            raise Fault(4, f"users {a!r} and {b!r} " + ("are the same" if a == b else "have the same hash"))
        with alone(folder.with_name(folder.name + ".lock")):
            fresh, old = folder.with_name(folder.name + ".tmp"), replaced(folder)
            if old.exists() and not folder.exists():                   # a build was killed between its two renames
                old.rename(folder)
            for stale in (fresh, old):
                shutil.rmtree(stale, ignore_errors=True)
            fresh.mkdir(parents=True)
            np.save(fresh / "keys.npy", keys)
            np.save(fresh / "codes.npy", codes[order].astype(np.uint8 if codes.max() <= 255 else np.uint16))
            mu = {f"mu_{p}": np.asarray(centroid) for p, centroid in enumerate(centroids)}
            np.savez(fresh / "codebook.npz", names=np.array(names), **mu)
            meta |= {"version": VERSION, "users": len(users),
                     "sizes": [len(mu) for mu in centroids] or codes.max(0).tolist(),
                     "sha256": {name: digest(fresh / name) for name in cls.FILES},
                     "sample": {name: digest(fresh / name, sample=True) for name in cls.FILES}}
            write_text(fresh / "meta.json", as_json(meta | {"seal": seal(meta)}))
            sync(fresh)
            if folder.exists():                                        # a folder cannot be replaced in one step
                folder.rename(old)
            fresh.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def open(cls, folder) -> "Bank":
        """Memory-maps a bank. Fault 4 if it is missing, truncated, altered or of another version."""
        folder = Path(folder)
        while True:                                                    # until no build came between our looks
            at = replaced(folder) if replaced(folder).exists() and not folder.exists() else folder
            before = identity(at)
            try:
                bank = cls.look(at)
            except Fault:
                if identity(at) == before:
                    raise
            else:
                if identity(at) == before:
                    return bank

    @classmethod
    def look(cls, folder: Path) -> "Bank":
        """The bank as it stands in `folder` at this moment."""
        meta = read_json(folder / "meta.json", "version", "seal", "users", "names", "sample")
        if meta["version"] != VERSION:
            raise Fault(4, f"{folder} has version {meta['version']}, needed is {VERSION}: build the bank again")
        try:
            for name in cls.FILES:
                if digest(folder / name, sample=True) != meta["sample"][name]:
                    raise Fault(4, f"{folder / name} was truncated or altered: build the bank again")
            if seal(meta) != meta["seal"]:
                raise Fault(4, f"{folder / 'meta.json'} was altered: build the bank again")
            keys, codes = (np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False))
                           for name in cls.FILES[:2])
            if not (keys.dtype == np.uint64 and codes.dtype in (np.uint8, np.uint16) and keys.ndim == 1 and len(keys)
                    and codes.shape == (len(keys), len(meta["names"])) and all(type(n) is str for n in meta["names"])):
                raise ValueError(f"keys {keys.dtype} {keys.shape} and codes {codes.dtype} {codes.shape} are no bank's")
        except Fault:
            raise
        except Exception as error:                                     # whatever damage makes numpy raise
            raise Fault(4, f"{folder} is damaged, {error}: build the bank again") from None
        return cls(folder, meta, keys, codes)

    def verify(self) -> None:
        """Reads every byte: Fault 4 if a file is not the one that was built."""
        for name in self.FILES:
            if digest(self.folder / name) != self.meta["sha256"][name]:
                raise Fault(4, f"{self.folder / name} was altered: build the bank again")

    def lookup(self, users) -> np.ndarray:
        """Codes of users: a str, or n ids as a list, str array or int array -> int32 [n, P]; 0 = unknown."""
        if isinstance(users, str):
            key = np.uint64(hash_user(users))
            row = min(int(self.keys.searchsorted(key)), len(self.keys) - 1)
            return self.codes[row:row + 1].astype(np.int32) * (self.keys[row] == key)
        wanted = hash_users(users)
        row = find(self.keys, wanted)
        return self.codes[row].astype(np.int32) * (self.keys[row] == wanted)[:, None]


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Row of each wanted key in sorted `keys`, uint64 [n] -> int64 [n]; any row where it is absent.

    A binary search over all keys misses the cache at most steps. Hashes are uniform, so key · N / 2^64 is nearly
    the row: three interpolation steps, then a binary search in 64 rows. Where that missed, a full search.
    """
    last, scale = len(keys) - 1, len(keys) / 2**64
    row = np.minimum((wanted * scale).astype(np.int64), last)
    for _ in range(3):
        row = (row + np.rint((wanted - keys[row]).view(np.int64) * scale).astype(np.int64)).clip(0, last)
    row = np.maximum(row - 32, 0)
    for step in (32, 16, 8, 4, 2, 1):
        row = row + step * (keys[np.minimum(row + step - 1, last)] < wanted)
    row = np.minimum(row, last)
    missed = ((keys[row] < wanted) | (keys[np.maximum(row - 1, 0)] >= wanted)).nonzero()[0]
    row[missed] = np.minimum(keys.searchsorted(wanted[missed]), last)
    return row


# ------------------------------------------------------------------------------------------------- commands

class Profiles(NamedTuple):
    """The PROFILES folder that uip.py writes."""
    users: np.ndarray          # [N] str
    ids: np.ndarray            # [N, P] int, codes from 0
    names: list[str]           # P
    mu: list[np.ndarray]       # P × [K_p, D]
    meta: dict


def read_profiles(folder) -> Profiles:
    """Users, IDs and codebooks of a PROFILES folder, checked against each other."""
    path = Path(folder) / "profiles.npz"
    found = read_npz(path, "users", "ids", "names")
    users, ids, names = found["users"], found["ids"], [str(name) for name in found["names"].flatten()]
    need(path, found, [f"mu_{p}" for p in range(len(names))])
    mu = [found[f"mu_{p}"] for p in range(len(names))]
    if not (users.ndim == 1 and users.dtype.kind == "U" and ids.dtype.kind in "iu" and len(users)
            and ids.shape == (len(users), len(names)) and all(m.ndim == 2 and m.dtype.kind == "f" for m in mu)):
        raise Fault(4, f"{path}: ids {list(ids.shape)} for {users.size} users and {len(names)} profiles, or of a wrong type")
    if (ids < 0).any() or (ids >= [len(m) for m in mu]).any():
        raise Fault(4, f"{path}: an id lies outside its codebook of {[len(m) for m in mu]} codes")
    return Profiles(users, ids, names, mu, read_json(Path(folder) / "meta.json"))


def match(users, known) -> np.ndarray:
    """Row in `known` of each of `users` (str arrays), −1 where absent: folders are joined by id, not by order."""
    row = {user: i for i, user in enumerate(known.tolist())}
    return np.array([row.get(user, -1) for user in users.tolist()], np.int64)


def command_bank(args) -> None:
    """PROFILES folders → bank. Several share one codebook, as those of fit and of infer do; of a user the last counts."""
    began, folders, first = time.time(), args.profiles, read_profiles(args.profiles[0])
    users, codes = [], []
    for folder, profiles in ((folder, read_profiles(folder)) for folder in reversed(folders)):
        if profiles.names != first.names or not all(map(np.array_equal, profiles.mu, first.mu)):
            raise Fault(4, f"{folder} and {folders[0]} have different codebooks: one bank holds IDs of one codebook")
        new = ~np.isin(profiles.users, np.concatenate(users)) if users else slice(None)
        users.append(profiles.users[new])
        codes.append(profiles.ids[new] + 1)
    meta = {"names": first.names, "lm": first.meta.get("lm"),
            "profiles_sha256": [digest(Path(folder) / "profiles.npz") for folder in folders],
            "settings": first.meta.get("settings"), "data_sha256": first.meta.get("data_sha256"),
            "code_sha256": digest(Path(__file__)), "run": facts(began, "codebook.py")}
    bank = Bank.build(args.out, np.concatenate(users), np.concatenate(codes), meta, first.mu)
    size = sum((bank.folder / name).stat().st_size for name in Bank.FILES[:2])
    print(f"bank of {len(bank.keys)} users in {args.out}: {size / len(bank.keys):.1f} bytes a user, "
          f"codes {dict(zip(first.names, bank.meta['sizes']))}")


def command_verify(args) -> None:
    """Checks folders (data, profiles, bank, results) against their own meta.json; exit 4 names a file that differs."""
    for folder in map(Path, args.folder):
        meta = read_json(folder / "meta.json", "sha256")
        if "seal" in meta and seal(meta) != meta["seal"]:
            raise Fault(4, f"{folder / 'meta.json'} was altered since it was made")
        files = meta["sha256"]
        if not isinstance(files, dict) or not files or any(Path(name).name != name for name in files):
            raise Fault(4, f"{folder / 'meta.json'} records no files of its folder")
        for name, sha in files.items():
            if not (folder / name).is_file():
                raise Fault(4, f"{folder / name} is missing")
            if digest(folder / name) != sha:
                raise Fault(4, f"{folder / name} is not the file that meta.json records")
        print(f"{folder}: {', '.join(files)} as recorded")


def command_lookup(args) -> None:
    """One line a user: id and codes."""
    bank = Bank.open(args.bank)
    codes = bank.lookup(args.user)
    for user, row in zip(args.user, codes):
        known = [f"{name}={code}" for name, code in zip(bank.meta["names"], row)]
        print(user, *(known if row.any() else ["unknown"]))
    if not codes.any(1).all():
        raise Fault(4, f"{int((~codes.any(1)).sum())} of {len(codes)} users are not in {args.bank}")


def distinct(counts: np.ndarray) -> np.ndarray:
    """What sets each group apart: z of the smoothed log-odds against all other groups. counts [K, W] -> [K, W].

    Informative Dirichlet prior (Monroe et al. 2008, "Fightin' Words"): a word's prior is its share of all words, one
    pseudo-count a word on average (ours), so that a rare word needs more than one lucky user.
    """
    total = counts.sum(0)                                              # (W,)
    prior = len(total) * total / max(1, total.sum())
    rest = total - counts
    odds = lambda y: np.log((y + prior) / (y.sum(1, keepdims=True) + prior.sum() - y - prior))
    if len(total) < 2:
        return np.zeros(counts.shape)
    return (odds(counts) - odds(rest)) / np.sqrt(1 / (counts + prior) + 1 / (rest + prior))


def evidence_counts(data, profiles: Profiles, views: dict[str, set]) -> list[tuple[np.ndarray, list[str]]]:
    """Per profile: the W values of the kinds in its view, and how often each occurs per code, [K, W]."""
    path, row = Path(data) / "evidence.jsonl", {user: i for i, user in enumerate(profiles.users.tolist())}
    counters = [Counter() for _ in profiles.names]
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(Progress(file, desc="evidence", unit=" users", leave=False), 1):
                entry = json.loads(line)
                who, evidence = row.get(entry["user"]), entry["evidence"].items()
                for p, name in enumerate(profiles.names if who is not None else ()):
                    code = int(profiles.ids[who, p])
                    counters[p].update((code, value) for kind, values in evidence
                                       if name in views.get(kind, ()) for value in values)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise Fault(4, f"{path}, line {number}: not a line of evidence ({error!r})") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    tables = []
    for mu, counter in zip(profiles.mu, counters):
        words = {word: w for w, word in enumerate(sorted({word for _, word in counter}))}
        counts = np.zeros((len(mu), len(words)))
        for (code, word), n in counter.items():
            counts[code, words[word]] = n
        tables.append((counts, list(words)))
    return tables


def command_cards(args) -> None:
    """What each ID means, one Markdown table a profile."""
    profiles, data = read_profiles(args.profiles), Path(args.data)
    layout = read_json(data / "meta.json", "layout")["layout"]
    need(data / "meta.json: layout", layout, ["kinds"])
    views = {kind: set(how["view"]) for kind, how in layout["kinds"].items()}
    rows = read_npz(data / "interactions.npz", "users", "user", "price", "split")
    who = match(rows["users"], profiles.users)[rows["user"]]           # (R,) row of the profiles, or −1
    priced = (rows["split"] == 0) & np.isfinite(rows["price"]) & (who >= 0)
    if not (who >= 0).any():
        raise Fault(4, f"{args.profiles} and {args.data} have no user in common")
    cell = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    paid, payer = rows["price"][priced], who[priced]
    lines = []
    for p, (counts, words) in enumerate(evidence_counts(data, profiles, views)):
        tokens = profiles.meta.get("tokens", {}).get(profiles.names[p], [])
        lines += [f"### {cell(profiles.names[p])}", "",
                  "| ID | users | share | sets it apart (z of log-odds) | price, 10–90 % | nearest tokens |",
                  "|---:|---:|---:|---|---|---|"]
        for code, z in enumerate(distinct(counts)):
            mine = profiles.ids[:, p] == code
            top = [w for w in (-z).argsort(kind="stable")[:args.top] if z[w] > 0]
            apart = ", ".join(f"{cell(words[w])} ({z[w]:.1f})" for w in top)
            price = paid[mine[payer]]
            price = "{:.2f}–{:.2f}".format(*np.percentile(price, [10, 90])) if len(price) else "unknown"
            near = cell(" ".join(tokens[code])) if code < len(tokens) else ""
            lines.append(f"| {code + 1} | {mine.sum()} | {mine.mean():.1%} | {apart} | {price} | {near} |")
        lines.append("")
    if args.out:
        write_text(Path(args.out), "\n".join(lines))
    else:
        print("\n".join(lines))


def command_score(args) -> None:
    """IDs against the groups that made the data: adjusted Rand index with the own and with other profiles."""
    profiles, path = read_profiles(args.profiles), Path(args.data) / "truth.npz"
    truth = read_npz(path, "users", "n_train", *profiles.names)
    row = match(truth["users"], profiles.users)                        # (M,)
    if not (row >= 0).any():
        raise Fault(4, f"{args.profiles} and {path} have no user in common")
    groups = {"dense": (row >= 0) & (truth["n_train"] >= 6), "sparse": (row >= 0) & (truth["n_train"] < 6)}

    def table(users: np.ndarray) -> dict:
        scores = {}
        for p, name in enumerate(profiles.names):
            each = {other: ari(profiles.ids[row[users], p], truth[other][users]) for other in profiles.names}
            own, others = each.pop(name), [abs(score) for score in each.values()]
            scores[name] = {"own": own, "other": max(others, default=0.0)} if users.any() else None
        return scores

    result = {"lm": profiles.meta.get("lm"), "F": profiles.meta.get("F"),
              "ari": table(groups["dense"]), "ari_sparse": table(groups["sparse"]),
              "perplexity": {name: perplexity(profiles.ids[:, p], len(profiles.mu[p]))
                             for p, name in enumerate(profiles.names)},
              "users": {name: int(group.sum()) for name, group in groups.items()}}
    write_text(Path(args.out), as_json(result))
    print(json.dumps(result, sort_keys=True, ensure_ascii=False))


def information(codes: np.ndarray, classes: np.ndarray) -> float:
    """Mutual information of two labellings [N], in bits: what one tells of the other. Biased upwards by chance."""
    both = np.zeros((codes.max() + 1, classes.max() + 1))
    np.add.at(both, (codes, classes), 1 / len(codes))
    seen = both > 0
    return float((both[seen] * np.log2(both[seen] / (both.sum(1, keepdims=True) * both.sum(0))[seen])).sum())


def guessed(codes: np.ndarray, classes: np.ndarray, folds: int = 10) -> float:
    """Held-out accuracy of guessing a user's class [N]: the most frequent one of the user's code in the other folds.

    A user's fold is its place modulo `folds`; a code that the other folds lack is guessed as their most frequent class.
    """
    right = 0
    for fold in range(folds):
        held = np.arange(len(codes)) % folds == fold
        counts = np.zeros((codes.max() + 1, classes.max() + 1))
        np.add.at(counts, (codes[~held], classes[~held]), 1)
        counts[counts.sum(1) == 0] = counts.sum(0)
        right += int((counts.argmax(1)[codes[held]] == classes[held]).sum())
    return right / len(codes)


def command_meaning(args) -> None:
    """What IDs tell of known attributes of the users (truth.npz): bits and held-out accuracy, beside shuffled IDs."""
    profiles, path = read_profiles(args.profiles), Path(args.data) / "truth.npz"
    truth, rng = read_npz(path, "users", "n_train"), np.random.default_rng(0)
    row = match(truth["users"], profiles.users)
    if not (row >= 0).any():
        raise Fault(4, f"{args.profiles} and {path} have no user in common")
    order = rng.permutation(np.flatnonzero(row >= 0))                  # folds must not follow the users' order
    told = []
    for attribute in sorted(set(truth) - {"users", "n_train"}):
        classes = np.unique(truth[attribute][order], return_inverse=True)[1]
        for p, name in enumerate(profiles.names):
            codes = profiles.ids[row[order], p].astype(np.int64)
            bits, right = information(codes, classes), guessed(codes, classes)
            dealt = [rng.permutation(codes) for _ in range(args.shuffles)]
            chance, luck = [information(one, classes) for one in dealt], [guessed(one, classes) for one in dealt]
            told.append({"profile": name, "attribute": attribute, "classes": int(classes.max()) + 1, "bits": bits,
                         "bits_shuffled": float(np.mean(chance)),
                         "p": (1 + int(np.greater_equal(chance, bits).sum())) / (1 + args.shuffles), "accuracy": right,
                         "accuracy_shuffled": float(np.mean(luck)), "accuracy_majority": guessed(0 * codes, classes)})
    result = {"lm": profiles.meta.get("lm"), "users": len(order), "shuffles": args.shuffles, "meaning": told}
    write_text(Path(args.out), as_json(result))
    print(json.dumps(result, sort_keys=True, ensure_ascii=False))


# ---------------------------------------------------------------------------------------------------- bench

def plain_lloyd(x: Tensor, c: Tensor, iters: int) -> Tensor:
    """The obvious loop, for comparison: all distances at once, sums by index_add_."""
    for _ in range(iters):
        ids = torch.cdist(x, c).argmin(1)
        c = torch.zeros_like(c).index_add_(0, ids, x) / ids.bincount(minlength=len(c))[:, None]
    return c


def rivals(x: Tensor, c: Tensor, iters: int) -> dict:
    """The same iterations from the same start by others -> {name: call}; scikit-learn and faiss where installed."""
    k, calls = len(c), {"plain": lambda: plain_lloyd(x, c, iters)}
    with suppress(ImportError):
        from sklearn.cluster import KMeans
        model = KMeans(k, init=c.numpy(), n_init=1, max_iter=iters, tol=0, algorithm="lloyd")
        calls["sklearn"] = lambda: torch.from_numpy(model.fit(x.numpy()).cluster_centers_)
    with suppress(ImportError):
        import faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
        other = faiss.Kmeans(x.shape[1], k, niter=iters, min_points_per_centroid=1, max_points_per_centroid=len(x))
        calls["faiss"] = lambda: other.train(x.numpy(), init_centroids=c.numpy()) and torch.tensor(other.centroids)
    return calls


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench_kmeans(n: int, d: int, k: int, iters: int = 10, rounds: int = 5) -> dict:
    """Best seconds of `rounds` alternating runs each, and the ratio other / ours (above 1: ours is faster).

    Equal start, equal iterations; inertia, of the centroids each returns, shows that the answers are equal too.
    """
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(k))
    calls = {"ours": lambda: kmeans(x, k, init=x[:k], iters=iters).centroids, **rivals(x, x[:k].clone(), iters)}
    inertia = {name: float(assign(x, call())[1].double().sum()) for name, call in calls.items()}      # a warm-up, too
    runs = [[seconds(call) for call in calls.values()] for _ in range(rounds)]
    best = dict(zip(calls, map(min, zip(*runs))))
    ratio = {name: value / best["ours"] for name, value in best.items() if name != "ours"}
    return {"n": n, "d": d, "k": k, "iters": iters, "seconds": best, "ratio": ratio, "inertia": inertia}


def bench_bank(n: int, folder: Path, batch: int = 10_000) -> dict:
    """Build, open and lookups of n users: in batches beside SQLite's primary key, and one id at a time.

    mb_2m, mb_100m: what so many users take, computed from the bytes a user of this bank. Readers add nothing: the
    files are memory maps (np.memmap), so however many processes read, the pages are in memory once.
    """
    rng = np.random.default_rng(0)
    users = np.char.add("u", rng.permutation(n).astype(str))
    codes = rng.integers(1, 5, (n, 2))
    build = seconds(lambda: Bank.build(folder / "bank", users, codes))
    opened = min(seconds(lambda: Bank.open(folder / "bank")) for _ in range(3))
    bank, batches = Bank.open(folder / "bank"), [users[rng.integers(0, n, batch)] for _ in range(50)]
    median = lambda look, groups: float(np.median([seconds(lambda: look(some)) for some in groups])) / batch
    each = median(bank.lookup, batches)
    single = [seconds(lambda: bank.lookup(user)) for some in batches[:2] for user in some.tolist()]
    with sqlite3.connect(folder / "bank.sqlite") as db:
        db.execute("CREATE TABLE bank (user TEXT PRIMARY KEY, a INT, b INT) WITHOUT ROWID")
        rows = ((str(users[i]), int(codes[i, 0]), int(codes[i, 1])) for i in users.argsort())
        db.executemany("INSERT INTO bank VALUES (?, ?, ?)", rows)
        sql = "SELECT a, b FROM bank WHERE user = ?"
        lite = median(lambda some: [db.execute(sql, (user,)).fetchone() for user in some],
                      map(np.ndarray.tolist, batches))
    size = sum(file.stat().st_size for file in (folder / "bank").iterdir()) / n
    return {"users": n, "build_s": build, "bytes_per_user": size, "mb_2m": 2 * size, "mb_100m": 100 * size,
            "computed": ["mb_2m", "mb_100m"], "readers": "memory maps: all processes share one page cache",
            "open_ms": 1e3 * opened, "lookups_per_s": 1 / each, "vs_sqlite": lite / each,
            "single_p99_us": 1e6 * float(np.quantile(single, 0.99))}


def machine() -> dict:
    """What figures were measured on."""
    try:
        cpu = next(line for line in open("/proc/cpuinfo") if line.startswith("model name")).split(":")[1].strip()
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {"processor": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "numpy": np.__version__}


def command_bench(args) -> None:
    """Speed of k-means and of the bank: figures as they come; the last line is all of them as JSON."""
    result = {"machine": machine(), "kmeans": []}
    for n, d in ((args.rows, 576), (args.rows // 5, 4096)):
        for k in (4, 32):
            result["kmeans"].append(bench_kmeans(n, d, k))
            print(json.dumps(result["kmeans"][-1]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result["bank"] = bench_bank(args.users, Path(folder))
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("sklearn", "faiss")}
    result["compared"] = {"plain": "torch.cdist and index_add_", "sqlite": sqlite3.sqlite_version,
                          **{name: version or "not installed" for name, version in versions.items()}}
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(args.out), as_json(result))
    print(json.dumps(result))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, *options: tuple) -> None:
        text = run.__doc__.strip()
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        for flag, how in options:
            sub.add_argument(flag, **how)

    folder = lambda text: {"required": True, "metavar": "DIR", "help": text}
    profiles = ("--profiles", folder("folder written by uip.py fit"))
    data = ("--data", folder("folder written by data.py"))
    several = ("--profiles", {**folder("folders written by uip.py fit, and by infer with its codebook"), "nargs": "+"})
    command("bank", command_bank, several, ("--out", folder("where the bank goes; a bank there is replaced")))
    command("lookup", command_lookup, ("--bank", folder("bank to look in")),
            ("user", {"nargs": "+", "metavar": "USER", "help": "user id"}))
    command("verify", command_verify, ("folder", {"nargs": "+", "metavar": "DIR", "help": "folder with a meta.json"}))
    command("cards", command_cards, profiles, data,
            ("--out", {"metavar": "FILE", "help": "Markdown file (default: standard output)"}),
            ("--top", {"type": int, "default": 5, "help": "evidence values shown per ID (default: 5)"}))
    command("score", command_score, profiles, data,
            ("--out", {"required": True, "metavar": "FILE", "help": "JSON file for the scores"}))
    command("meaning", command_meaning, profiles, data,
            ("--shuffles", {"type": int, "default": 999, "help": "of the IDs, for comparison (default: 999)"}),
            ("--out", {"required": True, "metavar": "FILE", "help": "JSON file for the figures"}))
    command("bench", command_bench,
            ("--rows", {"type": int, "default": 100_000, "help": "rows for k-means (default: 100000)"}),
            ("--users", {"type": int, "default": 10_000_000, "help": "users in the bank (default: ten million)"}),
            ("--out", {"metavar": "FILE", "help": "JSON file for the figures, beside printing them"}))
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except OSError as error:                                           # a full disk, a folder that may not be written
        raise Fault(3, f"cannot read or write {error.filename or 'a file'}: {error.strerror or error}") from None


if __name__ == "__main__":
    try:
        main()
    except Fault as fault:
        print(f"codebook.py: {fault}", file=sys.stderr)
        sys.exit(fault.code)
    except KeyboardInterrupt:
        print("codebook.py: interrupted", file=sys.stderr)
        sys.exit(130)
