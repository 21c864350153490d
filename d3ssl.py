"""De-coupling and De-positioning Dense Self-supervised Learning: the encoder, the queue, the losses, the training loop.

    python d3ssl.py                                                  some ten minutes on a CPU: the embedded scenes
    python d3ssl.py --data coco --root data/coco                     COCO, one process, GPU if there is one
    torchrun --nproc_per_node 8 d3ssl.py --data coco                 COCO, eight GPUs
    python d3ssl.py --data folder --root DIR                         your own images

A run writes last.pt, backbone.pth, metrics.jsonl and curves.png into --out and resumes from last.pt by itself.
"""
import argparse
import json
import math
import os
import platform
import signal
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from augment import make_views, normalise, parse_augs, to_float
from data import (Parser, Proposals, Schedule, TwoViews, UserError, atomic, compute_proposals, duration,
                  error_exit, listing, make_loader, open_images, positive, proposals_folder, rng, usable_cores,
                  whole_number)


def setting(default, about, choices=None):
    """A field of Config that is a flag of the same name: its default, and what --help says of it with its source."""
    return field(default=default, metadata=dict(help=about, choices=choices))


@dataclass
class Config:
    """Every setting of a run and its flag. A preset, then the objective, then the command line replace these defaults,
    which are COCO's; "of X": the paper is silent, X has it."""
    data: str = setting("scenes", "the preset and the data set")
    root: str = setting(None, "the data set's folder (default data/DATA)")
    proposals: str = setting(None, "folder of proposals (default: under the root)")
    out: str = setting(None, "where the run's files go (default runs/DATA)")
    arch: str = setting("resnet50", "section 4", ("resnet18", "resnet34", "resnet50", "resnet101"))
    size: int = setting(224, "side of views 1 and 2 in pixels, view 2-s has half (section 4)")
    boxes: int = setting(4, "K, boxes an image; of SoCo")
    regions: str = setting("proposals", "section 4.1; image, grid: baselines", ("proposals", "image", "grid"))
    augs: tuple = setting(("prc", "prm", "rbj"), "any of prc,prm,rbj (section 4.1), cutout,jitter (SoCo's), or none")
    prm: str = setting("reveal", "section 4.1, two readings; reveal: the literal one", ("reveal", "hide"))
    dp: bool = setting(True, "L_dp, the de-positioning loss (section 4.2)")
    dp_boxes: int = setting(1, "how many of the K boxes it moves; ours: the union of four leaves no room (README)")
    window: bool = setting(False, "draw the K boxes from a random window of view 2, half to three quarters of its "
                           "side; ours: the other way to room for --dp-boxes 4 (README)")
    roi: int = setting(14, "side of RoIAlign's output on C4; of detectron2's C4 head")
    objective: str = setting("nce", "Eq. 5; cosine: SoCo's, for Table 6", ("nce", "cosine"))
    hidden: int = setting(None, "width of the projector (default: C5's); of MoCo v2")
    projector_norm: bool = setting(False, "batch norm in the projector; SoCo and SimCLR have it, MoCo v2 has not")
    dim: int = setting(128, "of z; of MoCo v2")
    temperature: float = setting(0.2, "tau of Eq. 5; of MoCo v2")
    queue: int = setting(65536, "the memory bank; of MoCo v2, at most a quarter of what an epoch enqueues")
    ema: float = setting(0.999, "momentum of the teacher; of MoCo v2")
    epochs: int = setting(800, "section 5")
    batch_size: int = setting(256, "of all ranks together; of DenseCL")
    optimizer: str = setting("sgd", "of DenseCL; lars: SoCo's", ("sgd", "adamw", "lars"))
    lr: float = setting(0.3, "for 256 images, scaled with the batch, adamw's as it is; of DenseCL's COCO recipe")
    warmup: int = setting(10, "epochs, at most a quarter of all; of SoCo: Eq. 10 sums four terms at DenseCL's rate")
    momentum: float = setting(0.9, "of DenseCL")
    weight_decay: float = setting(1e-4, "of DenseCL")
    amp: str = setting("auto", "autocast; auto: bf16 where that is faster", ("auto", "bf16", "off"))
    workers: int = setting(8, "processes that load images, a rank; at most the cores there are")
    seed: int = setting(0, "of the initialisation, the order of the data and the augmentations")
    max_steps: int = setting(None, "stop this schedule early")
    snapshots: bool = setting(False, "keep backbone-IMAGES.pth at powers of two of images seen")


# Not in the paper: sized so that a laptop's CPU sees learning in minutes. AdamW and the low temperature are what learns
# within 8,192 images; SGD does not. A faster teacher (0.95) outruns the queue: positives are then told by their age.
QUICK = dict(arch="resnet18", size=112, roi=6, projector_norm=True, temperature=0.1, queue=1024, ema=0.99, epochs=8,
             batch_size=16, optimizer="adamw", lr=1e-3, warmup=1, workers=2)
PRESETS = {"coco": {}, "folder": {}, "voc": {}, "openimages-mini": {}, "scenes": QUICK}
# Not in the paper's text but what its Table 6 builds on: SoCo's C4 recipe (BYOL's objective and optimiser).
COSINE = dict(hidden=4096, dim=256, projector_norm=True, ema=0.99, optimizer="lars", lr=1.0, weight_decay=1e-5,
              warmup=10)
# Whatever else differs is another run.
FREE_ON_RESUME = {"root", "proposals", "out", "workers", "max_steps", "snapshots"}


# ------------------------------------------------------------------------------------------------ the encoder f (Eq. 1)

class Encoder(nn.Module):
    """f: z = H(RoIAlign(E(x), b)), Eq. 1. E is a ResNet up to C4; H is C5, average pooling and the projector.

    `backbone` is torchvision's ResNet without its classifier, so its keys are torchvision's. With grid=True C5 runs
    on the whole map and a 1x1 RoIAlign after it reads one vector a box (the paper's point-level baseline).

    Args: hidden: width of the projector, None: C5's; dim: of z; roi: side of RoIAlign's output; norm: batch norm in
    the projector."""

    def __init__(self, arch="resnet50", hidden=None, dim=128, roi=14, norm=False, grid=False):
        super().__init__()
        self.backbone = torchvision.models.get_model(arch, weights=None)
        width = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.projector = perceptron(width, hidden or width, dim, norm)
        self.roi, self.grid = roi, grid

    def c4(self, x):
        """E: images (B, 3, H, W) -> (B, 1024, H/16, W/16) at ResNet-50."""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x.contiguous(memory_format=torch.channels_last)))))
        return net.layer3(net.layer2(net.layer1(x)))

    def features(self, x, boxes):
        """What H projects: images (B, 3, H, W), boxes (B, K, 4) -> (B * K, 2048) at ResNet-50."""
        if self.grid:
            return roi_align(self.backbone.layer4(self.c4(x)), boxes, 1, 1 / 32).flatten(1)
        regions = roi_align(self.c4(x), boxes, self.roi, 1 / 16)
        return self.backbone.layer4(regions).mean((2, 3))

    def forward(self, x, boxes, predictor=None):
        """Images (B, 3, H, W), boxes (B, K, 4) -> z (B * K, D), L2-normalised, float32. SoCo's and BYOL's `predictor`
        reads the projection before it is normalised."""
        z = self.projector(self.features(x, boxes))
        if predictor is not None:
            z = predictor(z)
        return F.normalize(z.float(), dim=1)


def perceptron(width, hidden, dim, norm=False):
    """A two-layer MLP: MoCo v2's projector; with norm=True BYOL's and SoCo's, batch norm after the first layer."""
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(width, hidden), *middle, nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def roi_align(maps, boxes, bins, scale, ratio=2):
    """RoIAlign (He et al. 2017) with aligned=True and a fixed sampling ratio, as two matrix products a box: its
    interpolation is separable. Equal to torchvision.ops.roi_align to 1e-5; on a CPU its backward is over ten times
    faster, on a GPU it is deterministic. Boxes get no gradient.

    Args: maps (B, C, H, W); boxes (B, K, 4) in pixels of the view; bins: output side; scale: map cells a pixel; ratio:
    samples a bin along each axis. Returns (B * K, C, bins, bins), channels_last."""
    batch, channels, height, width = maps.shape
    k = boxes.shape[1]
    with torch.no_grad():
        rows = interpolation(boxes[..., 1], boxes[..., 3], scale, bins, height, ratio).to(maps.dtype)
        columns = interpolation(boxes[..., 0], boxes[..., 2], scale, bins, width, ratio).to(maps.dtype)
    lines = maps.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    bands = (rows.flatten(1, 2) @ lines).view(batch, k, bins, width, channels)  # (B, K * bins, H) @ (B, H, W * C)
    regions = columns[:, :, None] @ bands                    # (B, K, 1, bins, W) @ (B, K, bins, W, C), bins x bins x C
    return regions.flatten(0, 1).permute(0, 3, 1, 2)


def interpolation(low, high, scale, bins, cells, ratio):
    """RoIAlign along one axis: (..., bins, cells) weights that average `ratio` linear samples a bin of the interval
    [low, high) (...), given in pixels, over a map of `cells` cells."""
    start, step = low * scale - 0.5, (high - low) * scale / (bins * ratio)
    sample = torch.arange(bins * ratio, device=low.device) + 0.5
    point = start[..., None] + step[..., None] * sample  # (..., bins * ratio)
    inside = (point >= -1) & (point <= cells)  # as the library: farther out a sample counts as zero, else it is clamped
    distance = point.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=low.device)
    hat = (1 - distance.abs()).clamp(min=0)              # (..., bins * ratio, cells)
    return (hat * inside[..., None]).unflatten(-2, (bins, ratio)).mean(-2)


# --------------------------------------------------------------------------------- queue and losses (Eqs. 3-5 and 8-10)

class Queue(nn.Module):
    """The memory bank of Eq. 5: the last `size` teacher features (size, D), first in, first out. `Run.fill_queue` fills
    it before step 1; until then it holds random unit vectors by `seed`."""

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


class Query(NamedTuple):
    """Student features beside the negatives of the queue; the products with them are made once for all positives."""
    z: torch.Tensor          # (N, D), L2-normalised
    negatives: torch.Tensor  # (N,) log of the sum of exp(z.zj / tau) over the queue
    hardest: torch.Tensor    # (N,) the largest z.zj / tau
    temperature: float       # tau


def make_query(z, queue, temperature):
    """The Query of z (N, D) against `queue` (Q, D), both L2-normalised."""
    similarity = z @ queue.T / temperature
    return Query(z, similarity.logsumexp(1), similarity.detach().amax(1), temperature)


def info_nce(query, z_pos):
    """Eq. 5, mean over rows: -log exp(z.z+ / tau) / sum over {z+} and the queue of exp(z.zj / tau); z_pos (N, D)."""
    positive = (query.z * z_pos).sum(1) / query.temperature
    return (torch.logaddexp(positive, query.negatives) - positive).mean()


def cosine_loss(query, z_pos):
    """BYOL's and SoCo's loss, mean over rows, without negatives: 2 - 2 z.z+; z_pos (N, D)."""
    return (2 - 2 * (query.z * z_pos).sum(1)).mean()


def top1(query, z_pos):
    """(N,) float: whether the positive is nearer than every negative of the queue."""
    return ((query.z * z_pos).sum(1) / query.temperature > query.hardest).float()


class Losses(NamedTuple):
    """What a forward pass returns: scalars, and the teacher's features (2 * B * K, D) for the queue."""
    loss: torch.Tensor
    loss_dc: torch.Tensor
    loss_dp: torch.Tensor
    top1: torch.Tensor
    keys: torch.Tensor


class D3SSL(nn.Module):
    """Student f_q, teacher f_k and queue; forward is Eqs. 3-5 and 8-10 on views that augment.make_views prepared.

    amp: the dtype of autocast for the encoders, or None for float32; losses are float32 always."""

    def __init__(self, config, amp=None):
        super().__init__()
        c = config
        self.config, self.amp = config, amp
        self.student = Encoder(c.arch, c.hidden, c.dim, c.roi, c.projector_norm, grid=c.regions == "grid")
        self.teacher = deepcopy(self.student).requires_grad_(False)  # in training mode too, with its own buffers
        self.predictor = perceptron(c.dim, c.hidden or c.dim, c.dim, norm=True) if c.objective == "cosine" else None
        self.queue = Queue(c.queue, c.dim, c.seed)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """theta_k <- momentum theta_k + (1 - momentum) theta_q, parameters only (MoCo); before each forward pass."""
        get_ema_multi_avg_fn(momentum)(list(self.teacher.parameters()), list(self.student.parameters()), None)

    def autocast(self, x):
        return torch.autocast(x.device.type, self.amp, enabled=self.amp is not None)

    @torch.no_grad()
    def teach(self, views):
        """zt1 and zt2 (B * K, D) of Eq. 3."""
        with self.autocast(views.x2):
            return self.teacher(views.x1_hat, views.rois1), self.teacher(views.x2, views.rois2)

    def forward(self, views):
        """views: augment.Views. Returns Losses; enqueue its `keys` after the backward pass."""
        nce = info_nce if self.config.objective == "nce" else cosine_loss              # Eq. 5; cosine_loss: SoCo's
        with self.autocast(views.x2):
            zs1 = self.student(views.x1_hat, views.rois1, self.predictor)              # Eq. 3
            zs2 = self.student(views.x2s_hat, views.rois2 / 2, self.predictor)
            if self.config.dp:
                zs3 = self.student(views.x3, views.rois3, self.predictor)              # Eq. 8
        zt1, zt2 = self.teach(views)
        q1, q2 = self.query(zs1), self.query(zs2)
        loss_dc = nce(q1, zt2) + nce(q2, zt1)                                          # Eq. 4
        loss_dp = torch.zeros_like(loss_dc)
        hits = [top1(q1, zt2), top1(q2, zt1)]
        if self.config.dp:
            q3 = self.query(zs3)
            zt1_moved, zt2_moved = self.of_moved_boxes(zt1, views), self.of_moved_boxes(zt2, views)
            loss_dp = nce(q3, zt2_moved) + nce(q3, zt1_moved)                          # Eq. 9
            hits += [top1(q3, zt2_moved), top1(q3, zt1_moved)]
        loss = loss_dp + loss_dc                                                       # Eq. 10, though L_dp is a mean
        # over the moved boxes alone, so that each of them counts K / dp_boxes times what it does in the paper.
        return Losses(loss, loss_dc, loss_dp, torch.cat(hits).mean(), torch.cat([zt1, zt2]))

    def query(self, z):
        """The Query of student features z (N, D); with the cosine objective the queue serves top-1 alone."""
        return make_query(z, self.queue.features, self.config.temperature)

    def of_moved_boxes(self, z, views):
        """Of features z (B * K, D) those of the boxes that de-positioning moved: (B * dp_boxes, D)."""
        batch, number = views.rois3.shape[:2]
        return z.unflatten(0, (batch, -1))[:, :number].flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------- optimiser

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
    arguments = dict(lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **arguments)
    if config.optimizer == "lars":
        return LARS(parameters, momentum=config.momentum, **arguments)
    return torch.optim.SGD(parameters, momentum=config.momentum, fused=True, **arguments)


def learning_rate(config, step, total):
    """At `step` of `total`: linear scaling with the batch (not AdamW's), linear warm-up over at most a quarter of the
    epochs, cosine to 0."""
    peak = config.lr * (1 if config.optimizer == "adamw" else config.batch_size / 256)
    warmup = min(config.warmup, config.epochs / 4) * total / config.epochs
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def teacher_momentum(config, step, total):
    """Constant with InfoNCE (MoCo); to 1 by a cosine with the cosine objective (BYOL)."""
    if config.objective == "nce":
        return config.ema
    return 1 - (1 - config.ema) * 0.5 * (1 + math.cos(math.pi * step / total))


@torch.no_grad()
def clean_statistics(network, batches):
    """Estimate batch norm's running means and variances in place, as their plain means over `batches` ("precise batch
    norm"; not in the paper: from Wu and Johnson 2021). Each batch is the tuple of arguments of a call of `network`,
    which comes back in its own mode. The student's own statistics are of masked, composed and half-size views."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes, momenta = [m.training for m in network.modules()], [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    network.train()
    for arguments in batches:
        network(*arguments)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    for module, mode in zip(network.modules(), modes):
        module.training = mode


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


def amp_dtype(amp, device):
    """The dtype of autocast, None for float32. auto: bfloat16 where it is faster: GPUs that multiply it, CPUs with AMX,
    AMD's with AVX512-bf16 (1.5-1.8 times; Intel's without AMX are slower with it). It never depends on a timing."""
    if amp != "auto":
        return torch.bfloat16 if amp == "bf16" else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    vectors = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if tiles or (vectors and "AMD" in cpu_description()) else None


def cpu_description():
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return platform.processor()


class Run:
    """One training run: its data, model, optimiser and files. `train` is the loop."""

    def __init__(self, config, ranks, resume="auto"):
        self.ranks, self.step, self.out, self.stop_asked = ranks, 0, Path(config.out), False
        self.views = open_views(config, ranks)
        self.listing = listing(self.views.names())
        self.config = fit_queue(config, len(self.views), ranks)
        saved = load_last(self.out / "last.pt", self.settings(), ranks) if resume == "auto" else None
        self.per_epoch = len(self.views) // config.batch_size
        self.total = config.epochs * self.per_epoch
        self.last = min(self.total, config.max_steps or self.total)
        ranks.connect()
        agree(ranks, self.out, saved["step"] if saved else 0, len(self.views), self.last, int(self.listing[:12], 16))
        self.build(saved)

    def build(self, saved):
        """Model and optimiser, as they were `saved` or from the seed."""
        config, device = self.config, self.ranks.device
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")
        amp = amp_dtype(saved["amp"] if saved else config.amp, device)  # a resumed run goes on as it began
        self.model = D3SSL(config, amp).to(device, memory_format=torch.channels_last)
        if self.ranks.ranks > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = make_optimizer(config, self.model)
        if saved:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
        self.parallel = self.model if self.ranks.ranks == 1 else nn.parallel.DistributedDataParallel(
            self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    # -------------------------------------------------------------------------------------------------------- files

    def settings(self):
        """What a resumed run must share with the first one, as plain values: how it trains and, by name, on what."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.config).items()
                  if key not in FREE_ON_RESUME}
        return {**values, "listing": self.listing}

    def save(self, clean=None):
        """Write backbone.pth, then last.pt, each by rename, unless a parameter is not finite. Rank 0 only. `clean`: the
        clean statistics of student and teacher, which a run that ends adds."""
        ensure_finite(self.model, self.step, self.out)
        if self.ranks.rank == 0:
            self.save_backbone("backbone.pth", clean)
            save(self.out / "last.pt", {
                "d3ssl": 2, "step": self.step, "config": self.settings(), "ranks": self.ranks.ranks,
                "amp": "bf16" if self.model.amp else "off", "model": self.model.state_dict(), "clean": clean,
                "optimizer": self.optimizer.state_dict()})

    def save_backbone(self, name, clean=None):
        """The student's ResNet as a state dict of torchvision's, with `clean` statistics where they are given."""
        if self.ranks.rank == 0:
            save(self.out / name, {**self.model.student.backbone.state_dict(), **(clean or {}).get("student", {})})

    def clean(self, number=256, batch_size=64):
        """{"student": ..., "teacher": ...}: the statistics of clean view-1 images and their boxes, by torchvision's
        names; every rank estimates the same ones, from the same images."""
        chosen = rng("clean", self.config.seed).permutation(len(self.views))[:number].tolist()
        batches = [[(0, i) for i in chosen[start:start + batch_size]] for start in range(0, len(chosen), batch_size)]
        loaded, found = [self.clean_view(batch) for batch in make_loader(self.views, batches, self.workers())], {}
        for name in ("student", "teacher"):
            encoder = deepcopy(getattr(self.model, name))
            encoder.projector = nn.Identity()
            with self.model.autocast(self.model.queue.features):
                clean_statistics(encoder, loaded)
            found[name] = {key: value for key, value in encoder.backbone.state_dict().items() if "running_" in key}
        return found

    def clean_view(self, batch):
        """Normalised view 1 (B, 3, H, W) of a loaded batch and its boxes (B, K, 4), on the device."""
        view1, _, boxes1, _ = (tensor.to(self.ranks.device) for tensor in batch)
        return normalise(to_float(view1)), boxes1

    def open_metrics(self):
        """metrics.jsonl, cut back to the step that this run starts from; None on other ranks than the first."""
        if self.ranks.rank:
            return None
        path = self.out / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= self.step] if self.step else []
        with atomic(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
        return open(path, "a", buffering=1)

    # --------------------------------------------------------------------------------------------------------- loop

    def workers(self):
        return min(self.config.workers, max(1, usable_cores() // self.ranks.on_machine))

    def batches(self, first, last):
        """The loaded batches of steps first to last - 1."""
        schedule = Schedule(len(self.views), self.config.batch_size, self.config.seed, first, last, self.ranks.rank,
                            self.ranks.ranks)
        return make_loader(self.views, schedule, self.workers(), pin=self.ranks.device.type == "cuda")

    def prepare(self, batch, step):
        """Views of a loaded batch, on the device; their randomness is a function of (seed, step, rank)."""
        seed = int(rng("augment", self.config.seed, step, self.ranks.rank).integers(2**63))
        generator = torch.Generator(self.ranks.device).manual_seed(seed)
        batch = [tensor.to(self.ranks.device, non_blocking=True) for tensor in batch]
        moved = self.config.dp_boxes if self.config.dp else 0
        return make_views(batch, self.config.augs, self.config.prm, moved, generator)

    def fill_queue(self):
        """Fill the queue with teacher features before step 1. Random unit vectors, MoCo's start, are trivial negatives:
        loss and top-1 would begin at values that mean nothing. Its batches are those that would follow the
        last step, in an order of their own."""
        enqueued = 2 * self.config.batch_size * self.config.boxes
        number = math.ceil(self.config.queue / enqueued)
        self.ranks.print(f"the queue: {self.config.queue:,} teacher features of {number} batches, forward passes alone")
        steps = range(self.total, self.total + number)
        for step, batch in zip(steps, self.batches(steps.start, steps.stop)):
            self.model.queue.enqueue(torch.cat(self.model.teach(self.prepare(batch, step))))

    def update(self, views):
        """One step of training on prepared views: teacher, losses, student, queue. It never waits for the device."""
        self.model.update_teacher(teacher_momentum(self.config, self.step, self.total))
        losses = self.parallel(views)
        losses.loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.queue.enqueue(losses.keys)
        self.step += 1
        return torch.stack(losses[:4]).detach()

    def train(self):
        """Train from self.step to self.last: log at step 1, every 20 steps and at the end; save at the first epoch's
        end, then when `Clock.save_due` says so, and on SIGTERM, on all ranks at the same step."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask_to_stop)
        metrics, clock = self.open_metrics(), Clock()
        if self.step == 0:
            self.fill_queue()
            self.snapshot()
            clock.lap()
        batches, stop = iter(self.batches(self.step, self.last)), False
        while self.step < self.last and not stop:
            batch = clock.wait(batches)
            clock.add(self.update(self.prepare(batch, self.step)))
            stop, save_due = self.ranks.maximum(self.stop_asked, clock.save_due(self.step, self.per_epoch))
            if self.step == 1 or self.step % 20 == 0 or stop or save_due or self.step == self.last:
                self.report(clock, metrics)
            if (save_due or stop) and self.step < self.last:
                self.save()
                clock.saved = time.monotonic()
            self.snapshot()
        if self.step < self.last:
            return self.ranks.print(f"stopped at step {self.step:,} and saved: the same command goes on from there")
        self.save(self.clean())

    def ask_to_stop(self, number, frame):
        """Stop after this step; a second signal ends the process at once."""
        self.stop_asked = True
        signal.signal(number, signal.SIG_DFL)

    def snapshot(self):
        """With --snapshots, backbone-IMAGES.pth before step 1 and at the first step at or past each power of two."""
        images, batch = self.step * self.config.batch_size, self.config.batch_size
        passed = images >= 512 and images.bit_length() > (images - batch).bit_length()
        if self.config.snapshots and (images == 0 or passed):
            self.save_backbone(f"backbone-{images}.pth", self.clean())

    def report(self, clock, metrics):
        """Means since the last line: refuse to go on if they are not finite, and log them."""
        values = self.ranks.mean(clock.losses / clock.steps)
        if not all(math.isfinite(value) for value in values):
            raise not_finite(self.step, self.out)
        if self.ranks.rank:
            return clock.lap()
        images = clock.steps * self.config.batch_size
        rate = images / clock.elapsed()
        row = dict(step=self.step, images=self.step * self.config.batch_size, epoch=self.step / self.per_epoch,
                   **dict(zip(Losses._fields, values)), lr=learning_rate(self.config, self.step - 1, self.total),
                   images_per_second=rate, wait=clock.waited / clock.elapsed())
        metrics.write(json.dumps(row) + "\n")
        left = duration((self.last - self.step) * self.config.batch_size / rate)
        print(f"step {self.step:,}/{self.last:,}  epoch {row['epoch']:.2f}  loss {row['loss']:.3f} = "
              f"dc {row['loss_dc']:.3f} + dp {row['loss_dp']:.3f}  top-1 {row['top1']:.3f}  "
              f"{rate:.1f} images/s  {left} left", flush=True)
        clock.lap()


class Clock:
    """Sums since the last line of the log, and when to save."""

    def __init__(self):
        self.saved = time.monotonic()
        self.lap()

    def lap(self):
        self.start, self.waited, self.steps, self.losses = time.perf_counter(), 0.0, 0, 0.0

    def elapsed(self):
        return time.perf_counter() - self.start

    def wait(self, batches):
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def add(self, losses):
        self.losses, self.steps = self.losses + losses, self.steps + 1

    def save_due(self, step, per_epoch):
        """At the end of the first epoch, so that a full disk shows early; later at an epoch's end if the last save is a
        minute old; every five minutes in any case."""
        minutes, epoch_ends = (time.monotonic() - self.saved) / 60, step % per_epoch == 0
        return minutes > 5 or (epoch_ends and (minutes > 1 or step == per_epoch))


# --------------------------------------------------------------------------- what runs and fine-tunings have in common

def save(path, content):
    """torch.save that appears at `path` whole or not at all."""
    with atomic(path) as file:
        torch.save(content, file)


def not_finite(step, out):
    return UserError(f"the loss is not finite at step {step:,}: lower --lr; {out}/last.pt is the last good one")


def ensure_finite(model, step, out):
    """Raises UserError if a parameter is not finite: such a model is never saved."""
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise not_finite(step, out)


def out_of_memory(config, ranks):
    return UserError(f"a batch of {config.batch_size // ranks.ranks} images a GPU does not fit its memory: lower "
                     f"--batch-size {config.batch_size} (or use more GPUs)")


def load_last(path, settings, ranks):
    """The checkpoint at `path`, None if there is none. Raises UserError if it is broken or of another run; another
    number of ranks is none."""
    if not path.exists():
        return None
    advice = "name another --out, or begin anew with --resume never"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["config"]
    except Exception as error:  # torch.load raises many classes on a file that is cut or is something else
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): {advice}") from None
    differences = [f"{flag(key)} {theirs.get(key)}, now {settings.get(key)}" for key in sorted({*theirs, *settings})
                   if theirs.get(key) != settings.get(key)]
    if differences:
        raise UserError(f"{path} is of another run ({'; '.join(differences)}): {advice}")
    if saved["ranks"] != ranks.ranks:
        ranks.print(f"{path} is of {saved['ranks']} ranks, now {ranks.ranks}: it goes on, but not to the same bits")
    return saved


def flag(key):
    """How a setting is called where people set it."""
    otherwise = {"listing": "the images' names", "task": "--transfer", "sides": "--short-side"}
    return otherwise.get(key, "--" + key.replace("_", "-"))


def agree(ranks, out, *state):
    """Raises UserError, on all ranks, if (step, images, last step, listing) differ: another --out or --root."""
    highest, lowest = ranks.maximum(*state), [-int(value) for value in ranks.maximum(*(-value for value in state))]
    if highest != lowest:
        what = ("step", "images", "last step", "hash of the images' names")
        different = "; ".join(f"{name} {low:,.0f} to {high:,.0f}" for name, low, high in zip(what, lowest, highest)
                              if low != high)
        raise UserError(f"the ranks differ ({different}): share --out {out} and --root between the machines")


# -------------------------------------------------------------------------------------------------------- data, queue

def open_views(config, ranks):
    """The training set, its proposals computed first where they are missing, by all ranks together."""
    images, proposals = open_images(config.data, config.root), None
    share, rest = divmod(config.batch_size, ranks.ranks)
    if rest:
        raise UserError(f"--batch-size {config.batch_size} cannot be split over {ranks.ranks} ranks: choose a multiple")
    if share < 2:
        raise UserError(f"--batch-size {config.batch_size} leaves {share} image on each of {ranks.ranks} ranks: "
                        "batch norm and the background image need at least 2")
    ensure_enough(images.root, len(images), "images", config)
    if config.regions == "proposals":
        folder = config.proposals or proposals_folder(config.data, config.root)
        compute_proposals(images, folder, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
        proposals = Proposals(folder)
    if config.data == "scenes":
        images.keep()
    views = TwoViews(images, proposals, config.size, config.boxes, config.regions, config.seed)
    ensure_enough(images.root, len(views), "images with proposals", config)
    if len(views) < len(images):
        ranks.print(f"{len(images) - len(views):,} of {len(images):,} images have no proposals and are left out")
    return views


def ensure_enough(root, number, what, config):
    if number < config.batch_size:
        raise UserError(f"{root} has {number:,} {what}: lower --batch-size {config.batch_size} to that at most")


def fit_queue(config, images, ranks):
    """config with its queue cut to a quarter of what an epoch enqueues: a longer one holds an image's own earlier
    features as its negatives."""
    most = max(1, 2 * config.boxes * images // 4)
    if config.queue > most:
        ranks.print(f"--queue {config.queue:,} is cut to {most:,}, a quarter of what an epoch enqueues")
    return replace(config, queue=min(config.queue, most))


# ------------------------------------------------------------------------------------------------------------- curves

def read_metrics(path):
    """The rows of a metrics.jsonl, up to a line that a kill cut."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_curves(out):
    """OUT/curves.png of OUT/metrics.jsonl: loss and its parts, top-1, learning rate. Returns its path, or None where
    matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows, path = read_metrics(out / "metrics.jsonl"), out / "curves.png"
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = (("loss (Eq. 10)", ("loss", "loss_dc", "loss_dp")), ("learning rate", ("lr",)),
              ("top-1: the positive before all negatives", ("top1",)))
    for axis, (title, keys) in zip(figure.subplots(1, 3), panels):
        for key in keys:
            axis.plot([row["images"] for row in rows], [row[key] for row in rows], label=key)
        axis.set(title=title, xlabel="images seen")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend()
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path


# -------------------------------------------------------------------------------------------- where a step's time goes

def make_floor(model, views):
    """The least a step can do, as a function: E and H, the student's passes forward and backward and the teacher's two
    forward, on ready-made inputs and RoI maps, in the step's dtype and layout; no RoIAlign, loss or optimiser."""
    def head(encoder, regions):
        return encoder.projector(encoder.backbone.layer4(regions).mean((2, 3)))

    def ready(x, boxes):
        """An image batch, its RoI maps and the gradients that C4 and z get back."""
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), model.autocast(x):
            c4 = model.student.c4(x)
            regions = roi_align(c4, boxes, model.student.roi, 1 / 16)
            return x, regions.requires_grad_(), torch.randn_like(c4), torch.randn_like(head(model.student, regions))
    v = views
    taught = [ready(v.x1_hat, v.rois1), ready(v.x2, v.rois2)]
    studied = [taught[0], ready(v.x2s_hat, v.rois2 / 2)] + ([ready(v.x3, v.rois3)] if v.x3 is not None else [])

    def floor():
        outputs, gradients = [], []
        with model.autocast(v.x2):
            for x, regions, *gradient in studied:
                outputs += [model.student.c4(x), head(model.student, regions)]
                gradients += gradient
            with torch.no_grad():
                for x, regions, *_ in taught:
                    model.teacher.c4(x)
                    head(model.teacher, regions)
        torch.autograd.backward(outputs, gradients)
        model.zero_grad(set_to_none=True)
    return floor


def profile(run, seconds=50):
    """Print where a training step's time goes, images/s of its parts and the ratio of a step to its floor: the median
    over whole steps, loader included, alternated with floors for `seconds` (two pairs at least); some two minutes."""
    images, batches, device = run.config.batch_size // run.ranks.ranks, iter(run.batches(0, 10**6)), run.ranks.device

    def step():
        run.update(run.prepare(next(batches), run.step))
    batch = next(batches)
    floor = make_floor(run.model, run.prepare(batch, 0))
    seconds_of(step), seconds_of(floor)  # warm up
    print(f"whole steps and floors in turn, for {seconds} s", flush=True)
    pairs, began = [], time.monotonic()
    while len(pairs) < 2 or time.monotonic() - began < seconds:
        pairs.append((seconds_of(step), seconds_of(floor)))
    steps, floors = np.array(pairs).T
    print(f"{len(pairs)} pairs; now the parts", flush=True)
    alone = np.median([seconds_of(lambda: run.update(run.prepare(batch, run.step))) for _ in range(3)])
    loading = iter(make_loader(run.views, Schedule(len(run.views), images, 1, 0, 10**6), 1))
    loader = np.mean([seconds_of(lambda: next(loading)) for _ in range(12)][4:])
    print_shares(run, step)
    flops, peak = count_flops(floor), matmul_peak(device, run.model.amp or torch.float32)
    rows = [("whole step", np.median(steps)), ("step alone, data ready", alone), ("floor", np.median(floors)),
            (f"the floor's {flops / 1e9:,.0f} GFLOP at {peak / 1e12:.2f} TFLOP/s", flops / peak),
            ("loader alone, one worker", loader)]
    print(f"\n{'':48}{'ms':>10}{'images/s':>11}")
    for label, took in rows:
        print(f"{label:48}{1e3 * took:10.1f}{images / took:11.1f}")
    print(f"peak memory {peak_memory(device) / 2**30:.1f} GiB with {images} images")
    print(f"step / floor {np.median(steps / floors):.3f}")


def seconds_of(work):
    """Seconds of one call of `work`, the device's share included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def print_shares(run, step, steps=2):
    """The table of where a step goes: the parts of `step` under ranges of torch.profiler."""
    model, device = run.model, run.ranks.device
    parts = {"augmentation": (run, "prepare"), "student, forward": (model.student, "forward"), "loss": (model, "query"),
             "teacher, forward": (model, "teach"), "backward": (torch.Tensor, "backward"),
             "EMA": (model, "update_teacher"), "optimiser": (run.optimizer, "step"), "queue": (model.queue, "enqueue")}

    def ranged(inner, label):
        def work(*args, **kwargs):
            with torch.profiler.record_function(label):
                return inner(*args, **kwargs)
        return work
    inner = {label: getattr(owner, method) for label, (owner, method) in parts.items()}
    for label, (owner, method) in parts.items():
        setattr(owner, method, ranged(inner[label], label))
    with torch.profiler.profile(acc_events=True) as recorded:
        for _ in range(steps):
            step()
    torch.Tensor.backward = inner["backward"]
    key = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    found = {row.key: getattr(row, key) / steps / 1e3 for row in recorded.key_averages() if row.key in parts}
    print(f"\n{'where a step goes':26}{'ms':>10}{'share':>9}")
    for label in sorted(found, key=found.get, reverse=True):
        print(f"{label:26}{found[label]:10.1f}{found[label] / sum(found.values()):9.1%}")


def count_flops(work):
    """Floating-point operations of one call of `work`."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / min(seconds_of(lambda: a @ b) for _ in range(6))


def peak_memory(device):
    """Bytes: of the device, on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -------------------------------------------------------------------------------------------------------- command line

def parse_config(arguments=None):
    """The command line -> Config and the parsed arguments. Every field of Config is a flag."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for setting in fields(Config):
        kind, choices = setting.type, setting.metadata["choices"]
        options = dict(help=setting.metadata["help"] + defaults(setting), default=None)
        if setting.name == "data":
            about = setting.metadata["help"] + " (default: scenes)"
            options.update(choices=list(PRESETS), default="scenes", help=about)
        elif kind is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif choices:
            options.update(choices=choices)
        else:
            options.update(type={tuple: parse_augs, int: whole_number if setting.name in ("seed", "workers", "warmup")
                                 else positive}.get(kind, kind))
        parser.add_argument(flag(setting.name), **options)
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes and train nothing")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto")
    args = parser.parse_args(arguments)
    names = [setting.name for setting in fields(Config)]
    return configure({key: value for key, value in vars(args).items() if value is not None and key in names}), args


def defaults(setting):
    """COCO's default of a setting, and the scenes' where it differs, as --help shows them."""
    if setting.default is None:
        return ""
    coco = ",".join(setting.default) if setting.type is tuple else setting.default
    scenes = f"; scenes: {QUICK[setting.name]}" if setting.name in QUICK else ""
    return f" (default: {coco}{scenes})"


def configure(given):
    """Config from the settings given by name. Raises UserError where they contradict each other."""
    config = replace(Config(), **PRESETS[given["data"]])
    if given.get("objective") == "cosine":
        config = replace(config, **COSINE)
    if given.get("regions", "proposals") != "proposals":
        if given.get("augs"):
            raise UserError(f"--augs needs proposals: --regions {given['regions']} implies --augs none --no-dp")
        if given.get("dp"):
            raise UserError(f"--dp needs proposals: --regions {given['regions']} implies --augs none --no-dp")
        if given.get("window"):
            raise UserError(f"--window needs proposals: leave it out, or --regions {given['regions']}")
        config = replace(config, augs=(), dp=False, boxes=1 if given["regions"] == "image" else config.boxes)
    config = replace(config, **given)
    if config.size % 2 or config.size < 64:
        raise UserError(f"--size {config.size}: an even number of at least 64, view 2-s has half of it")
    if config.dp and config.dp_boxes > config.boxes:
        raise UserError(f"--dp-boxes {config.dp_boxes}: at most --boxes {config.boxes}")
    root, out = config.root or Path("data") / config.data, config.out or Path("runs") / config.data
    return replace(config, root=str(root), out=str(out))


def main():
    config, args = parse_config()
    ranks = Ranks()
    run = Run(config, ranks, "never" if args.profile else args.resume)
    if args.profile and ranks.ranks > 1:
        raise UserError("--profile is for one process: start it with python, without torchrun")
    if args.profile:
        return profile(run)
    data = {"scenes": "", "folder": " --data coco --root LABELLED"}.get(config.data)
    data = f" --data {config.data} --root {config.root}" if data is None else data
    commands = [f"python {script} --ckpt {run.out}/last.pt random{data}" for script in ("probes.py", "evaluate.py")]
    following = "\n      ".join(commands)
    if run.step >= run.last:
        return ranks.print(f"{run.out}/last.pt is finished at step {run.step:,} of {run.last:,}\nnext: {following}")
    ranks.print(f"{config.arch} on {len(run.views):,} images of {config.data}, {config.regions}, {ranks.ranks} x "
                f"{ranks.device.type}, {'bfloat16' if run.model.amp else 'float32'}, "
                f"steps {run.step:,} to {run.last:,} of {run.total:,}")
    began = time.monotonic()
    try:
        run.train()
    except torch.cuda.OutOfMemoryError:
        raise out_of_memory(config, ranks) from None
    if run.step == run.last and ranks.rank == 0:
        drawn = draw_curves(run.out)
        files = [run.out / name for name in ("last.pt", "backbone.pth", "metrics.jsonl")] + ([drawn] if drawn else [])
        print(f"done in {duration(time.monotonic() - began)}; wrote {', '.join(map(str, files))}\nnext: {following}"
              + ("" if drawn else "\nno curves.png: pip install matplotlib"), flush=True)
    if ranks.ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    error_exit(main)
