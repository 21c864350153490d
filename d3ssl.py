"""De-coupling and De-positioning Dense Self-supervised Learning: the encoder, the queue, the losses, the training loop.

    python d3ssl.py                                                  a few minutes on a laptop: the embedded scenes
    python d3ssl.py --data coco --root data/coco                     COCO, one process, GPU if there is one
    torchrun --nproc_per_node 8 d3ssl.py --data coco                 COCO, eight GPUs
    python d3ssl.py --data folder --root DIR                         your own images

A run writes last.pt, backbone.pth and metrics.jsonl into --out and resumes from last.pt by itself.
"""
import argparse
import json
import math
import os
import resource
import signal
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from augment import make_views, parse_augs
from data import (Parser, Proposals, Schedule, TwoViews, UserError, atomic, compute_proposals, duration, error_exit,
                  make_loader, open_images, proposals_folder)


@dataclass
class Config:
    """Every setting of a run. A preset, then the objective, then the command line replace these defaults (COCO's)."""
    data: str = "coco"
    root: str = None
    proposals: str = None        # folder of proposals; default: under the root
    out: str = None              # default: runs/DATA
    arch: str = "resnet50"       # paper section 4
    size: int = 224              # paper section 4; view 2-s has half of it
    boxes: int = 4               # K; not in the paper: from SoCo
    regions: str = "proposals"   # paper section 4.1; image | grid: the baselines of section 3
    augs: tuple = ("prc", "prm", "rbj")  # paper section 4.1
    prm: str = "reveal"          # paper section 4.1, the literal reading of "add partial background"
    depositioning: bool = True   # paper section 4.2, L_dp
    roi: int = 14                # RoIAlign's output on C4; not in the paper: from detectron2's C4 head
    objective: str = "nce"       # paper Eq. 5; cosine: SoCo's, for Table 6
    hidden: int = None           # of the projector, None: C5's width; not in the paper: from MoCo v2
    projector_norm: bool = False  # batch norm in the projector; SoCo has it, and short runs start faster with it (SimCLR's)
    dim: int = 128               # of z; not in the paper: from MoCo v2
    temperature: float = 0.2     # tau; not in the paper: from MoCo v2
    queue: int = 65536           # not in the paper: from MoCo v2
    ema: float = 0.999           # not in the paper: from MoCo v2
    epochs: int = 800            # paper section 5
    batch_size: int = 256        # of all ranks together; not in the paper: from DenseCL
    lr: float = 0.3              # for 256 images, scaled with the batch; not in the paper: from DenseCL's COCO recipe
    warmup: int = 0              # epochs; not in the paper: from DenseCL
    momentum: float = 0.9        # not in the paper: from DenseCL
    weight_decay: float = 1e-4   # not in the paper: from DenseCL
    workers: int = 8             # processes that load images, a rank; at most the cores there are
    seed: int = 0
    max_steps: int = None        # stop this schedule early


PRESETS = {
    "coco": dict(data="coco"),
    "folder": dict(data="folder"),
    "openimages-mini": dict(data="openimages-mini"),
    # Not in the paper: sized so that a laptop's CPU sees learning in minutes.
    "scenes": dict(data="scenes", arch="resnet18", size=112, roi=6, projector_norm=True, queue=1024, ema=0.99, epochs=4, warmup=1,
                   batch_size=32, lr=0.48, workers=2),
}
# Not in the paper's text but what its Table 6 builds on: SoCo's C4 recipe (BYOL's objective and optimiser).
COSINE = dict(hidden=4096, dim=256, projector_norm=True, ema=0.99, lr=1.0, weight_decay=1e-5, warmup=10)
FREE_ON_RESUME = {"workers", "max_steps", "proposals", "out"}  # whatever else differs is another run


# ------------------------------------------------------------------------------------------------- encoder (Eqs. 1 and 3)

def interpolation(low, high, scale, bins, cells, ratio):
    """RoIAlign along one axis: (..., bins, cells) weights that average `ratio` linear samples a bin of the interval
    [low, high) (...), given in pixels, over a map of `cells` cells."""
    start, step = low * scale - 0.5, (high - low) * scale / (bins * ratio)
    sample = torch.arange(bins * ratio, device=low.device) + 0.5
    point = start[..., None] + step[..., None] * sample
    inside = (point >= -1) & (point <= cells)  # as the library: farther out a sample counts as zero, nearer it is clamped
    hat = (1 - (point.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
    return (hat * inside[..., None]).unflatten(-2, (bins, ratio)).mean(-2)


def roi_align(maps, boxes, bins, scale, ratio=2):
    """RoIAlign (He et al. 2017) with aligned=True and a fixed sampling ratio, as two matrix products a box: its
    interpolation is separable. Equal to torchvision.ops.roi_align; on a CPU its backward is over ten times faster, on a
    GPU it is deterministic. Boxes get no gradient.

    Args: maps (B, C, H, W); boxes (B, K, 4) in pixels of the view; bins: output side; scale: map cells a pixel.
    Returns (B * K, C, bins, bins), channels_last."""
    batch, channels, height, width = maps.shape
    k = boxes.shape[1]
    with torch.no_grad():
        rows = interpolation(boxes[..., 1], boxes[..., 3], scale, bins, height, ratio).to(maps.dtype)
        columns = interpolation(boxes[..., 0], boxes[..., 2], scale, bins, width, ratio).to(maps.dtype)
    maps = maps.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    maps = (rows.flatten(1, 2) @ maps).view(batch, k, bins, width, channels)
    return (columns[:, :, None] @ maps).flatten(0, 1).permute(0, 3, 1, 2)


def perceptron(width, hidden, dim, norm=False):
    """A two-layer MLP: MoCo v2's projector; with norm=True BYOL's and SoCo's, batch norm after the first layer."""
    return nn.Sequential(nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU(inplace=True),
                         nn.Linear(hidden, dim))


class Encoder(nn.Module):
    """f: z = H(RoIAlign(E(x), b)), Eq. 1. E is a ResNet up to C4; H is C5, average pooling and the projector.

    `backbone` is torchvision's ResNet without its classifier, so its state dict is everybody's. With grid=True C5 runs on
    the whole map and a 1x1 RoIAlign after it reads one vector a box (the paper's point-level baseline)."""

    def __init__(self, arch="resnet50", hidden=None, dim=128, roi=14, norm=False, grid=False):
        super().__init__()
        self.backbone = torchvision.models.get_model(arch, weights=None)
        width, self.backbone.fc = self.backbone.fc.in_features, nn.Identity()
        self.projector = perceptron(width, hidden or width, dim, norm)
        self.roi, self.grid = roi, grid

    def c4(self, x):
        """E: images (B, 3, H, W) -> (B, 1024, H/16, W/16) at ResNet-50."""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x.contiguous(memory_format=torch.channels_last)))))
        return net.layer3(net.layer2(net.layer1(x)))

    def pool(self, maps, boxes):
        """RoIAlign on C4: (B * K, 1024, roi, roi)."""
        return roi_align(maps, boxes, self.roi, 1 / 16)

    def head(self, regions):
        """H: C4 regions (N, 1024, roi, roi) -> z (N, D), L2-normalised, float32."""
        return self.project(self.backbone.layer4(regions).mean((2, 3)))

    def project(self, features):
        return F.normalize(self.projector(features).float(), dim=1)

    def forward(self, x, boxes):
        """Images (B, 3, H, W), boxes (B, K, 4) -> z (B * K, D)."""
        if self.grid:
            return self.project(roi_align(self.backbone.layer4(self.c4(x)), boxes, 1, 1 / 32).flatten(1))
        return self.head(self.pool(self.c4(x), boxes))


# --------------------------------------------------------------------------------------- losses and queue (Eqs. 4, 5, 9, 10)

def contrast(z, z_pos, negatives, temperature):
    """Eq. 5 for each row of z (N, D) with its positive z_pos (N, D) against negatives (Q, D), all L2-normalised.
    Returns the losses (N,) and whether each positive outranks every negative (N,)."""
    positive = (z * z_pos).sum(1) / temperature
    others = z @ negatives.T / temperature
    return torch.logaddexp(positive, others.logsumexp(1)) - positive, positive > others.amax(1)


def info_nce(z, z_pos, negatives, temperature):
    """Eq. 5, mean over rows: -log exp(z.z+/T) / sum over {z+} and the negatives of exp(z.zj/T); shapes as `contrast`."""
    return contrast(z, z_pos, negatives, temperature)[0].mean()


class Queue(nn.Module):
    """The memory bank of Eq. 5: the last `size` teacher features (size, D), first in, first out. It starts as random
    unit vectors by `seed`."""

    def __init__(self, size, dim, seed=0):
        super().__init__()
        start = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("features", F.normalize(start, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, z):
        """Overwrite the oldest features by z (N, D); of several ranks', in the order of the ranks, the same on each."""
        z, size = gather(z), len(self.features)
        place = (self.pointer + torch.arange(len(z), device=z.device)) % size
        self.features.index_copy_(0, place[-size:], z[-size:])
        self.pointer.copy_((self.pointer + len(z)) % size)


def gather(z):
    """z (N, D) of all ranks, (ranks * N, D)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return z
    everyone = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, z.contiguous())
    return torch.cat(everyone)


class Losses(NamedTuple):
    """What a forward pass returns: scalars, and the teacher's features (2 * B * K, D) for the queue."""
    loss: torch.Tensor
    loss_dc: torch.Tensor
    loss_dp: torch.Tensor
    acc: torch.Tensor
    keys: torch.Tensor


class D3SSL(nn.Module):
    """Student f_q, teacher f_k and queue; forward is Eqs. 2-10 on prepared views.

    amp: the dtype of autocast for the encoders, or None for float32; losses are float32 always."""

    def __init__(self, config, amp=None):
        super().__init__()
        c, byol = config, config.objective == "cosine"
        self.config, self.amp = config, amp
        self.student = Encoder(c.arch, c.hidden, c.dim, c.roi, c.projector_norm, grid=c.regions == "grid")
        self.teacher = deepcopy(self.student).requires_grad_(False)  # in training mode too, with its own buffers
        self.predictor = perceptron(c.dim, c.hidden, c.dim, norm=True) if byol else None
        self.queue = Queue(c.queue, c.dim, c.seed)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """theta_k <- momentum theta_k + (1 - momentum) theta_q, parameters only (MoCo); before each forward pass."""
        get_ema_multi_avg_fn(momentum)(list(self.teacher.parameters()), list(self.student.parameters()), None)

    def forward(self, views):
        """views: augment.Views. Returns Losses; enqueue its `keys` after the backward pass."""
        v = views
        with self.autocast(v.x2):
            zs1 = self.predict(self.student(v.x1_hat, v.rois1))                                # Eq. 3
            zs2 = self.predict(self.student(v.x2s_hat, v.rois2 / 2))
            zs3 = None if v.x3 is None else self.predict(self.student(v.x3, v.rois3))          # Eq. 8
            with torch.no_grad():
                zt1, zt2 = self.teacher(v.x1_hat, v.rois1), self.teacher(v.x2, v.rois2)        # Eq. 3
        (a, hit_a), (b, hit_b) = self.compare(zs1, zt2), self.compare(zs2, zt1)
        loss_dc, hits = a + b, [hit_a, hit_b]                                                  # Eq. 4
        loss_dp = torch.zeros_like(loss_dc)
        if zs3 is not None:
            (a, hit_a), (b, hit_b) = self.compare(zs3, zt2), self.compare(zs3, zt1)
            loss_dp, hits = a + b, hits + [hit_a, hit_b]                                       # Eq. 9
        return Losses(loss_dp + loss_dc, loss_dc, loss_dp, torch.stack(hits).mean(), torch.cat([zt1, zt2]))  # Eq. 10

    def autocast(self, x):
        return torch.autocast(x.device.type, self.amp, enabled=self.amp is not None)

    def predict(self, z):
        """SoCo's and BYOL's predictor on the student's features; nothing with InfoNCE."""
        return z if self.predictor is None else F.normalize(self.predictor(z).float(), dim=1)

    def compare(self, z, z_pos):
        """Mean loss of z against z_pos and the share of rows whose positive outranks every negative. The cosine
        objective has no negatives in its loss; there the queue only ranks."""
        loss, hit = contrast(z, z_pos, self.queue.features, self.config.temperature)
        if self.config.objective == "cosine":
            loss = 2 - 2 * (z * z_pos).sum(1)  # BYOL's and SoCo's loss
        return loss.mean(), hit.float().mean()


# ------------------------------------------------------------------------------------------------------------- optimiser

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) over SGD with momentum, as BYOL and SoCo use it: biases and
    norms get neither weight decay nor adaptation."""

    def __init__(self, parameters, lr, momentum, weight_decay, trust=0.001):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.ndim > 1:
                    step = step.add(p, alpha=group["weight_decay"])
                    trust = group["trust"] * p.norm() / step.norm()
                    step = step * torch.where(torch.isfinite(trust) & (trust > 0), trust, 1.0)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                p.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(step), alpha=group["lr"])


def make_optimizer(config, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    arguments = dict(lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    if config.objective == "cosine":
        return LARS(parameters, **arguments)
    return torch.optim.SGD(parameters, fused=True, **arguments)


def learning_rate(config, step, total):
    """At `step` of `total`: linear scaling with the batch, linear warm-up, cosine to 0."""
    peak, warmup = config.lr * config.batch_size / 256, config.warmup * total / config.epochs
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def teacher_momentum(config, step, total):
    """Constant with InfoNCE (MoCo); to 1 by a cosine with the cosine objective (BYOL)."""
    if config.objective == "nce":
        return config.ema
    return 1 - (1 - config.ema) * 0.5 * (1 + math.cos(math.pi * step / total))


# ---------------------------------------------------------------------------------------------------------- the run

class Ranks:
    """This process among those of torchrun (or alone): rank, ranks, device; what they must agree on goes over gloo."""

    def __init__(self):
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")

    def connect(self):
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.ranks > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def maximum(self, *values):
        """The maximum over ranks of each value; between hosts, so that no device is waited for."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.ranks > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def mean(self, values):
        """The mean over ranks of a float tensor on the device, as a list: the host waits for the device here."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return (values / self.ranks).tolist()

    def print(self, *text):
        if self.rank == 0:
            print(*text, flush=True)


def amp_dtype(device):
    """bfloat16 where the hardware multiplies it, else None (float32)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else None


class Run:
    """One training run: its data, model, optimiser and files. `train` is the loop."""

    def __init__(self, config, ranks, resume="auto"):
        self.config, self.ranks, self.step = config, ranks, 0
        self.out = Path(config.out)
        saved = load_last(self.out / "last.pt", config, ranks.ranks) if resume == "auto" else None
        self.views = open_views(config, ranks)
        self.per_epoch = len(self.views) // config.batch_size
        self.total = config.epochs * self.per_epoch
        self.last = min(self.total, config.max_steps or self.total)
        ranks.connect()
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")
        self.model = D3SSL(config, amp_dtype(ranks.device)).to(ranks.device, memory_format=torch.channels_last)
        if ranks.ranks > 1 and ranks.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = make_optimizer(config, self.model)
        if saved:
            self.restore(saved)
        self.parallel = self.model if ranks.ranks == 1 else nn.parallel.DistributedDataParallel(
            self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.stop_asked = False

    # -------------------------------------------------------------------------------------------------------- files

    def restore(self, saved):
        if saved["images"] != len(self.views):
            raise UserError(f"{self.out}/last.pt was trained on {saved['images']:,} images, here are {len(self.views):,}: name "
                            "another --out, or begin anew with --resume never")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]

    def save(self):
        """Write backbone.pth, then last.pt, each by rename, unless a parameter is not finite. Rank 0 only."""
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()]).all()
        if not finite:
            raise not_finite(self)
        if self.ranks.rank == 0:
            with atomic(self.out / "backbone.pth") as file:
                torch.save(self.model.student.backbone.state_dict(), file)
            with atomic(self.out / "last.pt") as file:
                torch.save({"d3ssl": 1, "step": self.step, "config": settings_of(self.config), "ranks": self.ranks.ranks,
                            "images": len(self.views), "model": self.model.state_dict(),
                            "optimizer": self.optimizer.state_dict()}, file)

    def open_metrics(self):
        """metrics.jsonl, cut back to the step that this run starts from; None on other ranks than the first."""
        if self.ranks.rank:
            return None
        path, kept = self.out / "metrics.jsonl", []
        if path.exists() and self.step:
            for line in path.read_text().splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= self.step else []
                except ValueError:
                    break  # the line that a kill cut
        with atomic(path, "w") as file:
            file.writelines(line + "\n" for line in kept)
        return open(path, "a", buffering=1)

    # --------------------------------------------------------------------------------------------------------- loop

    def batches(self):
        schedule = Schedule(len(self.views), self.config.batch_size, self.config.seed, self.step, self.last,
                            self.ranks.rank, self.ranks.ranks)
        workers = min(self.config.workers, max(1, (os.cpu_count() or 1) // self.ranks.on_machine))
        return make_loader(self.views, schedule, workers, pin=self.ranks.device.type == "cuda")

    def generator(self):
        """This step's randomness: a function of (seed, step, rank)."""
        seed = np.random.SeedSequence((self.config.seed, self.step, self.ranks.rank)).generate_state(2, np.uint32)
        return torch.Generator(self.ranks.device).manual_seed(int(seed[0]) << 31 | int(seed[1]) >> 1)

    def prepare(self, batch):
        """Views of a loaded batch, on the device."""
        batch = [tensor.to(self.ranks.device, non_blocking=True) for tensor in batch]
        return make_views(batch, self.config.augs, self.config.prm, self.config.depositioning, self.generator())

    def update(self, views):
        """One step of training on prepared views: teacher, losses, student, queue. Nothing in it waits for the device."""
        self.model.update_teacher(teacher_momentum(self.config, self.step, self.total))
        losses = self.parallel(views)
        losses.loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.queue.enqueue(losses.keys)
        self.step += 1
        return losses

    def train(self):
        """Train from self.step to self.last: log at step 1, every 20 steps and at the end; save every epoch, every 5
        minutes and on SIGTERM, on all ranks at the same step."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask_to_stop)
        metrics, batches = self.open_metrics(), iter(self.batches())
        clock = Clock(self.step)
        while self.step < self.last:
            began = time.perf_counter()
            batch = next(batches)
            clock.waited += time.perf_counter() - began
            losses = self.update(self.prepare(batch))
            stop, save_due = self.ranks.maximum(self.stop_asked, clock.minutes_since_save() > 5)
            ends = stop or self.step == self.last
            save_due = save_due or ends or self.step % self.per_epoch == 0
            log_due = self.step == 1 or self.step % 20 == 0 or ends
            if log_due or save_due:
                self.report(losses, clock, metrics if log_due else None)
            if save_due:
                self.save()
                clock.saved = time.monotonic()
            if stop:
                return self.ranks.print(f"stopped at step {self.step:,} and saved: the same command goes on from there")

    def ask_to_stop(self, number, frame):
        self.stop_asked = True

    def report(self, losses, clock, metrics):
        """Read the losses, refuse to go on if they are not finite, and log them if it is time."""
        values = self.ranks.mean(torch.stack(losses[:4]).detach())
        if not all(math.isfinite(value) for value in values):
            raise not_finite(self)
        if metrics is None or self.ranks.rank:
            return
        rate, wait = clock.lap(self.step, self.config.batch_size)
        row = dict(step=self.step, epoch=self.step / self.per_epoch, **dict(zip(Losses._fields, values)),
                   lr=learning_rate(self.config, self.step - 1, self.total), images_per_second=rate, wait=wait)
        metrics.write(json.dumps(row) + "\n")
        left = duration((self.last - self.step) * self.config.batch_size / rate)
        print(f"step {self.step:,}/{self.last:,}  epoch {row['epoch']:.2f}  loss {row['loss']:.3f}  acc {row['acc']:.3f}  "
              f"{rate:.1f} images/s  {left} left", flush=True)


class Clock:
    """Images per second and the share of time spent waiting for data since the last lap."""

    def __init__(self, step):
        self.step, self.start, self.waited, self.saved = step, time.perf_counter(), 0.0, time.monotonic()

    def lap(self, step, batch_size):
        elapsed = time.perf_counter() - self.start
        rate, wait = (step - self.step) * batch_size / elapsed, self.waited / elapsed
        self.step, self.start, self.waited = step, time.perf_counter(), 0.0
        return rate, wait

    def minutes_since_save(self):
        return (time.monotonic() - self.saved) / 60


def not_finite(run):
    return UserError(f"the loss is not finite at step {run.step:,}: lower --lr; {run.out}/last.pt is the last good one")


def settings_of(config):
    """What a resumed run must share with the first one, as plain values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()
            if key not in FREE_ON_RESUME}


def load_last(path, config, ranks):
    """The checkpoint at `path`, None if there is none. Raises UserError if it is broken or of another run."""
    if not path.exists():
        return None
    advice = "name another --out, or begin anew with --resume never"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs, ours = {**saved["config"], "ranks": saved["ranks"]}, {**settings_of(config), "ranks": ranks}
    except Exception as error:  # torch.load raises many classes on a file that is cut or is something else
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): {advice}") from None
    differences = [f"{FLAGS.get(key, key)} {theirs.get(key)}, now {ours.get(key)}"
                   for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    if differences:
        raise UserError(f"{path} is of another run ({'; '.join(differences)}): {advice}")
    return saved


def open_views(config, ranks):
    """The training set, its proposals computed first where they are missing, by all ranks together."""
    images, proposals = open_images(config.data, config.root), None
    share, rest = divmod(config.batch_size, ranks.ranks)
    if rest:
        raise UserError(f"--batch-size {config.batch_size} cannot be split over {ranks.ranks} ranks: choose a multiple of them")
    if share < 2:
        raise UserError(f"--batch-size {config.batch_size} leaves {share} image on each of {ranks.ranks} ranks: batch norm and "
                        "the background image need at least 2")
    if len(images) < config.batch_size:
        raise UserError(f"{images.root} has {len(images):,} images: lower --batch-size {config.batch_size} to that at most")
    if config.regions == "proposals":
        folder = config.proposals or proposals_folder(config.data, config.root)
        compute_proposals(images, folder, max(1, (os.cpu_count() or 1) // ranks.on_machine), (ranks.rank, ranks.ranks), wait=True)
        proposals = Proposals(folder)
    views = TwoViews(images, proposals, config.size, config.boxes, config.regions, config.seed)
    if len(views) < config.batch_size:
        raise UserError(f"{images.root} has {len(views):,} images with proposals: lower --batch-size {config.batch_size} to that at most")
    if len(views) < len(images):
        ranks.print(f"{len(images) - len(views):,} of {len(images):,} images have no proposals and are left out")
    return views


# -------------------------------------------------------------------------------------------------- where a step's time goes

class Stopwatch:
    """Charges the time between marks to the label of the earlier one; with events on a GPU, so nothing waits for it."""

    def __init__(self, device):
        self.device, self.marks = device, []

    def mark(self, label):
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((label, now))

    def charge(self, totals):
        """Add the seconds since the first mark to `totals` {label: seconds} and begin again."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (label, start), (_, end) in zip(self.marks, self.marks[1:]):
            seconds = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
            totals[label] = totals.get(label, 0.0) + seconds
        self.marks = []


class TimedEncoder(Encoder):
    """An Encoder that marks its stages, in the backward pass too, where a stage begins with its output's gradient."""
    watch, who = None, None

    def stage(self, label, compute, *inputs):
        self.watch.mark(label)
        out = compute(*inputs)
        if out.requires_grad:
            out.register_hook(lambda grad: self.watch.mark(label))
        self.watch.mark("loss and queue")
        return out

    def c4(self, x):
        return self.stage(f"{self.who} backbone", super().c4, x)

    def pool(self, maps, boxes):
        return self.stage("RoIAlign", super().pool, maps, boxes)

    def head(self, regions):
        return self.stage("RoI heads", super().head, regions)


class Floor:
    """The least a step can do: E and H, 3 student passes forward and backward and 2 teacher passes forward, on ready-made
    inputs and RoI maps, in the step's dtype and layout; no RoIAlign, loss or optimiser."""

    def __init__(self, model, views):
        v, self.model = views, model
        self.student = [self.ready(v.x1_hat, v.rois1), self.ready(v.x2s_hat, v.rois2 / 2)]
        self.student += [self.ready(v.x3, v.rois3)] if v.x3 is not None else []
        self.teacher = [self.ready(v.x1_hat, v.rois1), self.ready(v.x2, v.rois2)]

    def ready(self, x, boxes):
        """Image, its RoI maps and the gradients that E and H get back."""
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), self.model.autocast(x):
            c4 = self.model.student.c4(x)
            regions = self.model.student.pool(c4, boxes)
            z = self.model.student.head(regions)
        return x, regions.detach().requires_grad_(), [torch.randn_like(c4), torch.randn_like(z)]

    def __call__(self):
        student, teacher, outputs, grads = self.model.student, self.model.teacher, [], []
        with self.model.autocast(self.student[0][0]):
            for x, regions, grad in self.student:
                outputs += [student.c4(x), student.head(regions)]
                grads += grad
            with torch.no_grad():
                for x, regions, _ in self.teacher:
                    teacher.c4(x), teacher.head(regions)
        torch.autograd.backward(outputs, grads)
        self.model.zero_grad(set_to_none=True)


def profile(run, pairs=20, warmup=4):
    """Print where a training step's time goes, images/s of its parts and the ratio of a step to its floor: the median over
    `pairs` of whole steps, loader included, alternated with floors."""
    watch, device, model = Stopwatch(run.ranks.device), run.ranks.device, run.model
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = lambda work: (sync(), time.perf_counter(), work(), sync(), time.perf_counter())
    for name in ("student", "teacher"):
        encoder = getattr(model, name)
        encoder.__class__, encoder.watch, encoder.who = TimedEncoder, watch, name
    run.optimizer.register_step_pre_hook(lambda *_: watch.mark("optimiser and EMA"))
    run.optimizer.register_step_post_hook(lambda *_: watch.mark("loss and queue"))
    batches, totals, steps, floors = iter(run.batches()), {}, [], []

    def whole():
        watch.mark("waiting for data")
        batch = next(batches)
        watch.mark("augmentation")
        views = run.prepare(batch)
        watch.mark("optimiser and EMA")
        run.update(views)
        watch.mark("end")
        return batch, views
    for i in range(warmup + pairs):
        _, start, (batch, views), _, end = seconds(whole)
        if i == 0:
            floor = Floor(model, views)
        watch.charge(totals if i >= warmup else {})
        _, floor_start, _, _, floor_end = seconds(floor)
        watch.marks = []
        steps, floors = steps + [end - start], floors + [floor_end - floor_start]
    steps, floors = np.array(steps[warmup:]), np.array(floors[warmup:])
    print_profile(run, totals, steps, floors, floor, batch, batches, seconds)


def print_profile(run, totals, steps, floors, floor, batch, batches, seconds):
    """The tables of `profile`."""
    images, step = run.config.batch_size // run.ranks.ranks, sum(totals.values()) / len(steps)
    print(f"\n{'where a step goes':26}{'ms':>10}{'share':>9}")
    for label in sorted(totals, key=totals.get, reverse=True):
        print(f"{label:26}{1e3 * totals[label] / len(steps):10.1f}{totals[label] / len(steps) / step:9.1%}")
    with FlopCounterMode(display=False) as counter:
        floor()
    peak, flops = matmul_peak(run.ranks.device, run.model.amp or torch.float32), counter.get_total_flops()
    alone = [end - start for _, start, _, _, end in (seconds(lambda: run.update(run.prepare(batch))) for _ in range(5))]
    del batches
    loading = iter(make_loader(run.views, Schedule(len(run.views), images, 1, 0, 10**6), 1))
    next(loading)
    load = [end - start for _, start, _, _, end in (seconds(lambda: next(loading)) for _ in range(12))][4:]
    rows = [("whole step", np.median(steps)), ("step alone, data ready", np.median(alone)), ("floor", np.median(floors)),
            (f"the floor's {flops / 1e9:,.0f} GFLOP at {peak / 1e12:.2f} TFLOP/s", flops / peak), ("loader alone, one worker", np.mean(load))]
    print(f"\n{'':48}{'ms':>10}{'images/s':>11}")
    for label, duration_ in rows:
        print(f"{label:48}{1e3 * duration_:10.1f}{images / duration_:11.1f}")
    memory = torch.cuda.max_memory_allocated() if run.ranks.device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {memory / 2**30:.1f} GiB with {images} images")
    print(f"step / floor {np.median(steps / floors):.3f}")


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product."""
    n, times = 8192 if device.type == "cuda" else 2048, []
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(6):
        watch, totals = Stopwatch(device), {}
        watch.mark("product")
        a @ b
        watch.mark("end")
        watch.charge(totals)
        times.append(totals["product"])
    return 2 * n ** 3 / min(times)


# -------------------------------------------------------------------------------------------------------- command line

FLAGS = {"batch_size": "--batch-size", "depositioning": "--no-dp", **{key: f"--{key}" for key in (
    "data", "root", "arch", "epochs", "size", "boxes", "regions", "augs", "prm", "objective", "lr", "seed")}}


def parse_config(arguments=None):
    """The command line -> Config and the parsed arguments."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=list(PRESETS), default="scenes")
    add("--root", help="the data set's folder (default data/DATA)")
    add("--arch", choices=("resnet18", "resnet34", "resnet50", "resnet101"))
    add("--epochs", type=positive)
    add("--batch-size", type=positive, help="of all ranks together")
    add("--size", type=positive, help="side of views 1 and 2 in pixels, even")
    add("--boxes", type=positive, help="K, boxes an image")
    add("--regions", choices=("proposals", "image", "grid"), help="image and grid: the paper's baselines")
    add("--augs", type=parse_augs, help="any of prc,prm,rbj,cutout,jitter, or none")
    add("--prm", choices=("reveal", "hide"))
    add("--no-dp", action="store_false", default=None, dest="depositioning", help="without the de-positioning loss")
    add("--objective", choices=("nce", "cosine"), help="cosine: SoCo's")
    add("--lr", type=float, help="for a batch of 256, scaled with the batch")
    add("--workers", type=int, help="loading processes a rank; changes nothing but speed")
    add("--seed", type=int)
    add("--max-steps", type=positive, help="stop this schedule early")
    add("--proposals", help="folder of proposals (default: under the root)")
    add("--out", help="where the run's files go (default runs/DATA)")
    add("--profile", action="store_true", help="print where a step's time goes and train nothing")
    add("--resume", choices=("auto", "never"), default="auto")
    args = parser.parse_args(arguments)
    return configure({key: value for key, value in vars(args).items() if value is not None and key not in ("resume", "profile")}), args


def configure(given):
    """Config from the settings given by name. Raises UserError where they contradict each other."""
    config = replace(Config(), **PRESETS[given["data"]])
    if given.get("objective") == "cosine":
        config = replace(config, **COSINE)
    if given.get("regions", "proposals") != "proposals":
        if given.get("augs"):
            raise UserError(f"--augs needs proposals: --regions {given['regions']} implies --augs none --no-dp")
        config = replace(config, augs=(), depositioning=False, boxes=1 if given["regions"] == "image" else config.boxes)
    config = replace(config, **given)
    if config.size % 2 or config.size < 64:
        raise UserError(f"--size {config.size}: an even number of at least 64, view 2-s has half of it")
    return replace(config, root=str(config.root or Path("data") / config.data), out=str(config.out or Path("runs") / config.data))


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main():
    config, args = parse_config()
    ranks = Ranks()
    run = Run(config, ranks, "never" if args.profile else args.resume)
    if args.profile:
        run.last = 10**9
        return profile(run)
    following = f"python evaluate.py --ckpt {run.out}/last.pt" + (
        f" --data {config.data} --root {config.root}" if config.data != "scenes" else "")
    if run.step >= run.last:
        ranks.print(f"{run.out}/last.pt is finished at step {run.step:,} of {run.last:,}; next: {following}")
        return
    ranks.print(f"{config.arch} on {len(run.views):,} images of {config.data}, {config.regions}, {ranks.ranks} x {ranks.device.type}, "
                f"{'bfloat16' if run.model.amp else 'float32'}, steps {run.step:,} to {run.last:,} of {run.total:,}")
    began = time.monotonic()
    try:
        run.train()
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"a batch of {config.batch_size // ranks.ranks} images a GPU does not fit its memory: lower --batch-size "
                        f"{config.batch_size} (or use more GPUs)") from None
    if run.step == run.last:
        ranks.print(f"done in {duration(time.monotonic() - began)}; wrote {run.out}/last.pt (resume), {run.out}/backbone.pth (torchvision's "
                    f"names), {run.out}/metrics.jsonl\nnext: {following}")
    if ranks.ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    error_exit(main)
