"""De-coupling and De-positioning Dense Self-supervised Learning: the encoder, the queue, the losses, the training loop.

    python d3ssl.py                                                  minutes on a CPU: the embedded scenes
    python d3ssl.py --data coco --root data/coco                     COCO, one process, on a GPU if there is one
    torchrun --nproc_per_node 8 d3ssl.py --data coco                 COCO, eight GPUs
    python d3ssl.py --data folder --root DIR                         your own images

A run writes last.pt, backbone.pth, config.json and metrics.jsonl into --out, and resumes from last.pt.
"""
import argparse
import fcntl
import inspect
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
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
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from augment import (PRC_SHARE, PRC_THRESHOLD, PRM_RATIO, PRM_SCALE, RBJ_SCALE, RBJ_SHIFT, make_views, normalise,
                     parse_augs, to_float)
from data import (Parser, Proposals, TwoViews, UserError, atomic, compute_proposals, duration, epoch_batches,
                  error_exit, listing, make_loader, open_images, positive, proposals_folder, rng, usable_cores,
                  whole_number)


def setting(default, about, choices=None):
    """A field of Config that is a flag of the same name: its default, and its line in --help."""
    return field(default=default, metadata=dict(help=about, choices=choices))


@dataclass
class Config:
    """Every setting of a run and its flag. The defaults are COCO's; QUICK, COSINE, the command line override them."""
    data: str = setting("scenes", "preset and data set", ("scenes", "coco", "folder", "voc", "openimages-mini"))
    root: str = setting(None, "folder of the data set; default data/DATA")
    proposals: str = setting(None, "folder of the proposals, made if missing; default: below the root")
    out: str = setting(None, "folder that the run writes; default runs/DATA")
    arch: str = setting("resnet50", "architecture; section 4", ("resnet18", "resnet34", "resnet50", "resnet101"))
    size: int = setting(224, "side of views 1 and 2 in pixels, view 2s has half; section 4")
    boxes: int = setting(4, "K, boxes drawn per image; from SoCo")
    regions: str = setting("proposals", "source of the boxes; section 3", ("proposals", "image", "grid"))
    augs: tuple = setting(("prc", "prm", "rbj"), "region augmentations; section 4.1 (cutout, jitter: SoCo's), or none")
    prm: str = setting("reveal", "PRM's variant; reveal: section 4.1 as written", ("reveal", "hide"))
    prc_share: tuple = setting(PRC_SHARE, "PRC: range of the area cut out of a box; section 4.1")
    prc_threshold: float = setting(PRC_THRESHOLD, "PRC: a box of which more is hidden is first made visible; ours")
    prm_scale: tuple = setting(PRM_SCALE, "PRM: range of a rectangle's area, as a share of its box's; section 4.1")
    prm_ratio: tuple = setting(PRM_RATIO, "PRM: range of a rectangle's width / height; section 4.1")
    rbj_scale: tuple = setting(RBJ_SCALE, "RBJ: range of the factor of width and height; ours")
    rbj_shift: float = setting(RBJ_SHIFT, "RBJ: largest shift of the centre, as a share of its sides; ours")
    dp: bool = setting(True, "use L_dp, the de-positioning loss; section 4.2")
    dp_boxes: int = setting(1, "how many of the K boxes de-positioning moves; ours: four leave no room (README)")
    roi: int = setting(None, "side of RoIAlign's output on C4; default SIZE / 16: 14, from detectron2's C4 head")
    objective: str = setting("nce", "loss: InfoNCE (Eq. 5), or SoCo's cosine with its optimiser", ("nce", "cosine"))
    hidden: int = setting(None, "width of the projector; default as MoCo v2: C5's")
    projector_norm: bool = setting(False, "batch norm in the projector; MoCo v2 has none, SoCo and SimCLR have it")
    dim: int = setting(128, "dimension of z; from MoCo v2")
    temperature: float = setting(0.2, "temperature of Eq. 5; from MoCo v2")
    queue: int = setting(65536, "entries of the queue, at most a quarter of what an epoch enqueues; from MoCo v2")
    ema: float = setting(0.999, "momentum of the teacher; from MoCo v2")
    epochs: int = setting(800, "length of the schedule; section 5")
    batch_size: int = setting(256, "images per step, all ranks together; from DenseCL")
    optimizer: str = setting("sgd", "optimiser; from DenseCL (lars: SoCo's)", ("sgd", "adamw", "lars"))
    lr: float = setting(0.3, "peak learning rate for 256 images, scaled with the batch (not adamw's); from DenseCL")
    warmup: int = setting(10, "epochs of linear warm-up, at most a quarter of all; length from SoCo")
    momentum: float = setting(0.9, "momentum of SGD and LARS; from DenseCL")
    weight_decay: float = setting(1e-4, "weight decay (decoupled in adamw, weights alone in lars); from DenseCL")
    amp: str = setting("auto", "autocast; auto: bfloat16 where it is faster", ("auto", "bf16", "off"))
    cuda_graph: bool = setting(False, "replay forward and backward pass as CUDA graphs: see README, Speed")
    workers: int = setting(8, "processes per rank that load images, at most the usable cores")
    seed: int = setting(0, "seed of the initialisation, the order of the data and the augmentations")
    max_steps: int = setting(None, "stop the schedule early, after so many steps")
    snapshots: bool = setting(False, "keep backbone-IMAGES.pth at 0, 512, 1024, 2048, ... images seen")


# Not in the paper: sized so that a laptop's CPU sees learning in minutes. Within 8,192 images SGD does not learn; with
# a faster teacher (0.95) old keys differ visibly from fresh ones, so that age alone gives the negatives away.
QUICK = dict(arch="resnet18", size=112, roi=6, projector_norm=True, temperature=0.1, queue=1024, ema=0.99, epochs=8,
             batch_size=16, optimizer="adamw", lr=1e-3, warmup=1, workers=2)
# Not in the paper's text but what its Table 6 builds on: SoCo's C4 recipe (BYOL's objective and optimiser).
COSINE = dict(hidden=4096, dim=256, projector_norm=True, ema=0.99, optimizer="lars", lr=1.0, weight_decay=1e-5,
              warmup=10)
LOG_EVERY, SAVE_EVERY = 20, 300  # steps, seconds
VERSIONS = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
FREE_ON_RESUME = {"root", "proposals", "out", "cuda_graph", "workers", "max_steps", "snapshots"}  # may change


# ------------------------------------------------------------------------------------------------ the encoder f (Eq. 1)

class Encoder(nn.Module):
    """f: z = H(RoIAlign(E(x), b)), Eq. 1. E is a ResNet up to C4; H is C5, average pooling and the projector.

    Args: arch: torchvision's name; hidden: width of the projector, None: C5's; dim: of z; roi: side of RoIAlign's
    output; norm: batch norm in the projector; grid: C5 runs on the whole map, and a 1x1 RoIAlign after it reads one
    vector per box (the paper's point-level baseline)."""

    def __init__(self, arch="resnet50", hidden=None, dim=128, roi=14, norm=False, grid=False):
        super().__init__()
        self.backbone = torchvision.models.get_model(arch, weights=None)
        width = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.projector = mlp(width, hidden or width, dim, norm)
        self.roi, self.grid = roi, grid

    def features(self, x, boxes):
        """What the projector reads: images (B, 3, H, W), boxes (B, K, 4) -> (B * K, 2048) at ResNet-50."""
        c4 = resnet_stages(self.backbone, x)[-1]
        if self.grid:
            return roi_align(self.backbone.layer4(c4), boxes, 1, 1 / 32).flatten(1)
        regions = roi_align(c4, boxes, self.roi, 1 / 16)
        return self.backbone.layer4(regions).mean((2, 3))

    def forward(self, x, boxes, predictor=None):
        """-> z (B * K, D), L2-normalised, float32. SoCo's and BYOL's `predictor` runs before that."""
        z = self.projector(self.features(x, boxes))
        if predictor is not None:
            z = predictor(z)
        return F.normalize(z.float(), dim=1)


def resnet_stages(network, images):
    """E: images (B, 3, H, W) -> the maps of torchvision's ResNet after res2, res3 and res4 (C4), at ResNet-50
    (B, 256, H/4, W/4), (B, 512, H/8, W/8) and (B, 1024, H/16, W/16); network.layer4 is C5."""
    x = network.conv1(images.contiguous(memory_format=torch.channels_last))
    maps = [network.maxpool(network.relu(network.bn1(x)))]
    for stage in (network.layer1, network.layer2, network.layer3):
        maps.append(stage(maps[-1]))
    return maps[1:]


def mlp(width, hidden, dim, norm=False):
    """A two-layer MLP: MoCo v2's projector; with norm=True BYOL's and SoCo's, batch norm after the first layer."""
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(width, hidden), *middle, nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def roi_align(maps, boxes, bins, scale, ratio=2):
    """torchvision.ops.roi_align with aligned=True (to 1e-5 in float32) as two matrix products per box: interpolation is
    separable. On a CPU its backward is over ten times faster, on a GPU it is deterministic. Boxes get no gradient.

    Args: maps (B, C, H, W); boxes (B, K, 4) in pixels of the view; bins: output side; scale: map cells per pixel;
    ratio: samples per bin along each axis. Returns (B * K, C, bins, bins), channels_last."""
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
    """RoIAlign along one axis: (..., bins, cells) weights that average `ratio` linear samples per bin of the interval
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
    """The negatives of Eq. 5: the last `size` teacher features (size, D), first in, first out. `train` fills it
    before step 1; until then it holds random unit vectors."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, z):
        """Replace the oldest features by z (N, D) of all ranks, in the order of the ranks: the same on each."""
        if dist.is_initialized():
            everyone = [torch.empty_like(z) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, z.contiguous())
            z = torch.cat(everyone)
        size = len(self.features)
        place = (self.pointer + torch.arange(len(z), device=z.device)) % size
        self.features.index_copy_(0, place[-size:], z[-size:])
        self.pointer.copy_((self.pointer + len(z)) % size)


def info_nce(z, z_pos, queue, temperature):
    """Eq. 5, mean over rows: -log(exp(z.z+ / T) / sum over {z+} and queue of exp(z.zj / T)); z, z_pos (N, D), queue
    (Q, D), L2-normalised. Returns it and the accuracy, the share of rows whose positive is nearer than any negative."""
    l_pos = (z * z_pos).sum(1, keepdim=True)                        # (N, 1)
    l_neg = z @ queue.T                                             # (N, Q)
    logits = torch.cat([l_pos, l_neg], 1) / temperature
    labels = torch.zeros(len(z), dtype=torch.long, device=z.device)  # the positive comes first
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels), accuracy


class Output(NamedTuple):
    """What a forward pass returns: scalars, and the teacher's features (2 * B * K, D) for the queue."""
    loss: torch.Tensor
    loss_dc: torch.Tensor
    loss_dp: torch.Tensor
    accuracy: torch.Tensor
    keys: torch.Tensor


class D3SSL(nn.Module):
    """Student f_q, teacher f_k and queue; forward is Eqs. 3-5 and 8-10 on views that augment.make_views prepared.
    amp: the dtype of autocast for the encoders, None for float32; losses are float32 (on GPUs, TF32 products)."""

    def __init__(self, config, amp=None):
        super().__init__()
        c = config
        self.config, self.amp = config, amp
        self.student = Encoder(c.arch, c.hidden, c.dim, c.roi, c.projector_norm, grid=c.regions == "grid")
        self.teacher = deepcopy(self.student).requires_grad_(False)  # in training mode too, with its own buffers
        self.predictor = mlp(c.dim, c.hidden or c.dim, c.dim, norm=True) if c.objective == "cosine" else None
        self.queue = Queue(c.queue, c.dim)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """theta_k <- momentum theta_k + (1 - momentum) theta_q, parameters only (MoCo); before each forward pass."""
        get_ema_multi_avg_fn(momentum)(list(self.teacher.parameters()), list(self.student.parameters()), None)

    def autocast(self):
        return torch.autocast(self.queue.features.device.type, self.amp, enabled=self.amp is not None)

    @torch.no_grad()
    def teacher_forward(self, views):
        """zt1 and zt2 (B * K, D) of Eq. 3. In view 2 the teacher reads x2 itself, neither cut nor masked."""
        with self.autocast():
            return self.teacher(views.x1_hat, views.rois1), self.teacher(views.x2, views.rois2)

    def forward(self, views):
        """views: augment.Views. Returns Output; enqueue its `keys` after the backward pass."""
        accuracies = []

        def nce(z, z_pos):
            loss, accuracy = info_nce(z, z_pos, self.queue.features, self.config.temperature)  # Eq. 5
            accuracies.append(accuracy)
            if self.config.objective == "cosine":  # BYOL's and SoCo's loss instead, without negatives
                return (2 - 2 * (z * z_pos).sum(1)).mean()
            return loss

        with self.autocast():
            zs1 = self.student(views.x1_hat, views.rois1, self.predictor)          # Eq. 3
            zs2 = self.student(views.x2s_hat, views.rois2 / 2, self.predictor)
            if self.config.dp:
                zs3 = self.student(views.x3, views.rois3, self.predictor)          # Eq. 8
        zt1, zt2 = self.teacher_forward(views)
        keys = torch.cat([zt1, zt2])
        loss_dc = nce(zs1, zt2) + nce(zs2, zt1)                                    # Eq. 4
        loss_dp = torch.zeros_like(loss_dc)
        if self.config.dp:
            batch, moved = views.rois3.shape[:2]  # of the K boxes only the first ones are in x3
            zt1, zt2 = (zt.unflatten(0, (batch, -1))[:, :moved].flatten(0, 1) for zt in (zt1, zt2))
            loss_dp = nce(zs3, zt2) + nce(zs3, zt1)                                # Eq. 9
        # Eq. 10, but L_dp is the mean over the moved boxes: each counts K / dp_boxes times what it does in the paper.
        loss = loss_dp + loss_dc
        return Output(loss, loss_dc, loss_dp, torch.stack(accuracies).mean(), keys)


# ------------------------------------------------------------------------------------------------ optimiser, batch norm

class LARS(torch.optim.Optimizer):
    """LARS (You et al. 2017) on SGD with momentum, as in BYOL: biases and norms get neither decay nor adaptation."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.ndim > 1:
                    step = step.add(p, alpha=group["weight_decay"])
                    trust = 0.001 * p.norm() / step.norm()  # BYOL's coefficient
                    step = step * torch.where(torch.isfinite(trust) & (trust > 0), trust, 1.0)
                velocity = self.state[p].get("momentum_buffer", 0) * group["momentum"] + step
                self.state[p]["momentum_buffer"] = velocity
                p.sub_(velocity, alpha=group["lr"])


def make_optimizer(config, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    arguments = dict(lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **arguments)
    if config.optimizer == "lars":
        return LARS(parameters, dict(momentum=config.momentum, **arguments))
    return torch.optim.SGD(parameters, momentum=config.momentum, fused=True, **arguments)


def learning_rate(config, step, total_steps):
    """Linear scaling with the batch (not AdamW's), linear warm-up over at most a quarter of the epochs, cosine to 0."""
    peak = config.lr * (1 if config.optimizer == "adamw" else config.batch_size / 256)
    warmup = min(config.warmup, config.epochs / 4) * total_steps / config.epochs
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def teacher_momentum(config, step, total_steps):
    """Constant with InfoNCE (MoCo); to 1 by a cosine with the cosine objective (BYOL)."""
    if config.objective == "nce":
        return config.ema
    return 1 - (1 - config.ema) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


@torch.no_grad()
def precise_batch_norm(network, batches):
    """Set batch norm's running means and variances to their plain means over `batches`, tuples of arguments of calls of
    `network`; leaves it in evaluation mode. Not in the paper: from Wu and Johnson 2021."""
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None  # of all batches alike
    network.train()
    for arguments in batches:
        network(*arguments)
    network.eval()


def clean_statistics(model, dataset, device, workers, number=256, batch_size=64):
    """{"student": batch norm's statistics of clean view-1 images and their boxes, by torchvision's names, "teacher":
    ...}, the same on every rank. The student's own are of masked, composited and half-size views."""
    chosen = rng("clean", model.config.seed).permutation(len(dataset))[:number]
    parts = np.array_split(chosen, math.ceil(len(chosen) / batch_size))  # of one size: batches count alike
    schedule = [[(0, i) for i in part.tolist()] for part in parts]
    batches = [(normalise(to_float(view1.to(device))), boxes1.to(device))
               for view1, _, boxes1, _ in make_loader(dataset, schedule, workers)]
    statistics = {}
    for name in ("student", "teacher"):
        encoder = deepcopy(getattr(model, name))
        encoder.projector = nn.Identity()
        with model.autocast():
            precise_batch_norm(encoder, batches)
        statistics[name] = {key: x.cpu() for key, x in encoder.backbone.state_dict().items() if "running_" in key}
    return statistics


# ------------------------------------------------------------------------------------- ranks, signals, files of a run

def torchrun_ranks():
    """torchrun's rank, world size, local rank and local world size; 0, 1, 0, 1 without it. May raise UserError."""
    rank, local_rank = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK"))
    world_size, local_world_size = (int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world_size > 1 and not os.environ.get("MASTER_ADDR"):
        raise UserError(f"WORLD_SIZE={world_size} without MASTER_ADDR: start the ranks with torchrun, or unset it")
    if 0 < (gpus := torch.cuda.device_count()) <= local_rank:
        raise UserError(f"{local_world_size} ranks on {gpus} GPUs: one rank per GPU, lower --nproc_per_node")
    return rank, world_size, local_rank, local_world_size


def connect(world_size, local_rank):
    """This rank's device, after joining the others."""
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def data_parallel(model, world_size, views=None):
    """`model`, or for several ranks its DistributedDataParallel, on GPUs with SyncBatchNorm; buffers stay local.
    With `views`, an example, forward and backward pass become CUDA graphs, whose kernels the host launches at once."""
    if world_size > 1 and next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place: the outermost module is no norm
    if views is not None:
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # it is that of the capture: harmless
        torch.cuda.make_graphed_callables(model, (views,))  # in place; before DDP and any other backward pass
    if world_size == 1:
        return model
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # since torch 2.13
    own_buffers = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **own_buffers)


def gather_objects(value):
    """[the value of each rank], over gloo on the CPU: no GPU waits for it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(out, **state):
    """Raises UserError, on all ranks, if their `state` differs: another --out or --root on one machine."""
    states = gather_objects(state)
    for name in state:
        values = [str(other[name]) for other in states]
        if len(set(values)) > 1:
            raise UserError(f"the ranks disagree on {name} ({', '.join(values)[:200]}): share --out {out} and --root")


def stop_on_signal():
    """A dictionary in which SIGTERM and SIGINT note when they came. Another, over a second after the first, ends the
    process at once. Sooner it is the first again: a scheduler signals each process, and torchrun, which forwards it."""
    received = {}

    def handler(number, frame):
        received.setdefault(number, time.monotonic())
        if time.monotonic() - min(received.values()) > 1:
            os._exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return received


def lock_folder(out):
    """A file whose lock keeps other runs out of `out` until this process ends, however it ends. Raises UserError."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out) / ".lock", "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loading processes
        except BlockingIOError:
            raise UserError(f"another run writes into {out}: name another --out") from None
        except OSError:
            print(f"{out} is on a file system without locks: do not start a second run there")
        for unfinished in Path(out).glob("*.pt*.*.tmp"):  # of a run that was killed while it saved
            unfinished.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error.strerror}): name another --out") from None
    return file


def save_checkpoint(path, content):
    """torch.save that appears at `path` complete or not at all."""
    with atomic(path) as file:
        torch.save(content, file)


def write_json(path, content):
    with atomic(path, "w") as file:
        json.dump(content, file, indent=1)


def load_checkpoint(path, settings, world_size):
    """The checkpoint at `path`, None if there is none. Raises UserError if it is broken or was written with other
    `settings`; another world size is allowed."""
    if not Path(path).exists():
        return None
    advice = "name another --out, or delete it to start anew (a schedule cannot be extended)"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = dict(saved["config"])
    except Exception as error:  # torch.load raises many classes on a file that is cut or is something else
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): {advice}") from None
    differences = [f"{key} {theirs.get(key)}, now {settings.get(key)}" for key in sorted({*theirs, *settings})
                   if theirs.get(key) != settings.get(key)]
    if differences:
        raise UserError(f"{path} was written with other settings ({'; '.join(differences)}): {advice}")
    if saved["world_size"] != world_size:
        print(f"{path} was written by {saved['world_size']} ranks, now {world_size}: results will not be bit-identical")
    return saved


def ensure_finite(tensors, step, out):
    """Raises UserError if one of the tensors, losses or parameters, is not finite: such a model is never saved."""
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise UserError(f"{out}: the loss is not finite at step {step:,}: lower --lr, and name another --out")


# ------------------------------------------------------------------------------------------------------------ training

def amp_dtype(amp, device):
    """The dtype of autocast, None for float32. auto: bfloat16 where it is faster: GPUs that multiply it, CPUs with AMX,
    AMD's with AVX512-bf16 (Intel's without AMX are slower with it). It never depends on a timing."""
    if amp != "auto":
        return torch.bfloat16 if amp == "bf16" else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    vectors = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    amd = vectors and "AMD" in Path("/proc/cpuinfo").read_text()  # torch knows of AVX512 on Linux alone
    return torch.bfloat16 if tiles or amd else None


def load_views(batch, config, step, rank, device):
    """The views of a loaded batch on the device; what is drawn is a function of (seed, step, rank)."""
    generator = torch.Generator(device).manual_seed(int(rng("augment", config.seed, step, rank).integers(2**63)))
    return make_views([tensor.to(device, non_blocking=True) for tensor in batch], config, generator)


def train_step(model, parallel_model, optimizer, views, step, total_steps):
    """One step; `parallel_model` is `model` or its DistributedDataParallel. Returns loss, loss_dc, loss_dp and accuracy
    (4,) on the device, from which it reads nothing back; SyncBatchNorm does, three times per norm."""
    config = model.config
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, total_steps)
    model.update_teacher(teacher_momentum(config, step, total_steps))
    output = parallel_model(views)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.queue.enqueue(output.keys)
    return torch.stack(output[:4]).detach()


def train(config):
    """This rank's part of a run, from its data to its files. Returns the exit code: 0, or 128 + a signal's number."""
    rank, world_size, local_rank, local_world_size = torchrun_ranks()
    is_main, out = rank == 0, Path(config.out)
    workers = min(config.workers, max(1, usable_cores() // local_world_size))
    if config.batch_size % world_size or config.batch_size < 2 * world_size:
        raise UserError(f"--batch-size {config.batch_size} on {world_size} ranks: choose a multiple with at least 2 "
                        "images per rank, for batch norm and the background image")
    lock = lock_folder(out) if is_main else None  # held until this process ends

    # Data, with proposals computed first where they are missing.
    images, proposals = open_images(config.data, config.root), None
    if config.regions == "proposals":
        folder = config.proposals or proposals_folder(config.data, config.root)
        compute_proposals(images, folder, local_rank=local_rank)
        proposals = Proposals(folder)
    dataset = TwoViews(images, proposals, config.size, config.boxes, config.regions, config.seed)
    if len(dataset) < len(images):
        print(f"{len(images) - len(dataset):,} of {len(images):,} images have no proposals: left out")
    if len(dataset) < config.batch_size:
        raise UserError(f"{images.root} has {len(dataset):,} usable images: lower --batch-size {config.batch_size}")
    steps_per_epoch = len(dataset) // config.batch_size
    total_steps = config.epochs * steps_per_epoch
    last_step = min(total_steps, config.max_steps or total_steps)

    def batches(first, last):
        schedule = epoch_batches(len(dataset), config.batch_size, config.seed, first, last, rank, world_size)
        return make_loader(dataset, schedule, workers, pin=torch.cuda.is_available())

    # The longer the queue, the more of an image's own earlier features are among its negatives.
    queue = min(config.queue, 2 * config.boxes * config.batch_size * steps_per_epoch // 4)
    if queue < config.queue:
        print(f"--queue {config.queue:,} is cut to {queue:,}, a quarter of what an epoch enqueues")
    config = replace(config, queue=queue)

    # The checkpoint to resume from, the same on every rank.
    settings = {key: value for key, value in asdict(config).items() if key not in FREE_ON_RESUME}
    settings.update(image_names=listing(dataset.names()), number_of_boxes=len(proposals.boxes) if proposals else 0)
    saved = load_checkpoint(out / "last.pt", settings, world_size)
    step = saved["step"] if saved else 0
    device = connect(world_size, local_rank)
    if config.cuda_graph and device.type != "cuda":
        raise UserError("--cuda-graph needs a GPU: leave it out")
    agree(out, step=step, images=len(dataset), last_step=last_step, **settings)
    if step >= last_step:
        print(f"{out}/last.pt has done {step:,} of {total_steps:,} steps; a longer schedule needs another --out, "
              "the rest of this one a larger --max-steps or none")
        return 0

    # Model and optimiser.
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    amp = amp_dtype(saved["amp"] if saved else config.amp, device)
    model = D3SSL(config, amp).to(device, memory_format=torch.channels_last)
    example = load_views(next(iter(batches(step, step + 1))), config, step, rank, device) if config.cuda_graph else None
    parallel_model = data_parallel(model, world_size, example)
    optimizer = make_optimizer(config, model)
    if saved:
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))

    # Files.
    def save_backbone(name, statistics):
        ensure_finite(model.parameters(), step, out)
        if is_main:
            state = {key: value.cpu() for key, value in model.student.backbone.state_dict().items()}
            save_checkpoint(out / name, {**state, **(statistics["student"] if statistics else {})})

    def save(statistics=None):
        save_backbone("backbone.pth", statistics)
        if is_main:
            save_checkpoint(out / "last.pt", {
                "d3ssl": 2, "step": step, "config": settings, "world_size": world_size, "clean": statistics,
                "amp": "bf16" if amp else "off", "model": model.state_dict(), "optimizer": optimizer.state_dict()})
        gather_objects(None)  # a barrier: no rank leaves, upon which torchrun ends all, before the files are written

    def snapshot():
        images = step * config.batch_size
        passed = images >= 512 and images.bit_length() > (images - config.batch_size).bit_length()
        if config.snapshots and (step == 0 or passed):  # on all ranks, for SyncBatchNorm
            save_backbone(f"backbone-{images}.pth", clean_statistics(model, dataset, device, workers))

    print(f"{config.arch} on {len(dataset):,} images of {config.data}, {config.regions}, {world_size} x "
          f"{device.type}, {'bfloat16' if amp else 'float32'}, steps {step:,} to {last_step:,} of {total_steps:,}")
    if is_main:
        folder = shlex.quote(str(Path(__file__).parent))
        commit = subprocess.getoutput(f"git -C {folder} describe --always --dirty 2>/dev/null") or None
        write_json(out / "config.json", dict(config=asdict(config), command=sys.argv, commit=commit, python=sys.version,
                                             **VERSIONS))
        lines = open(out / "metrics.jsonl").readlines() if step and (out / "metrics.jsonl").exists() else []
        with atomic(out / "metrics.jsonl", "w") as file:  # without what came after the checkpoint
            file.writelines(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step)
        metrics = open(out / "metrics.jsonl", "a", buffering=1)
    signals = stop_on_signal()

    # Fill the queue. MoCo's random unit vectors are trivial negatives: loss and accuracy would begin at values that
    # mean nothing. The batches that fill it would come after the full schedule: training never sees them.
    if step == 0:
        fill_steps = math.ceil(config.queue / (2 * config.batch_size * config.boxes))
        print(f"filling the queue with {config.queue:,} teacher features of {fill_steps} batches")
        for i, batch in enumerate(batches(total_steps, total_steps + fill_steps), total_steps):
            views = load_views(batch, config, i, rank, device)
            model.queue.enqueue(torch.cat(model.teacher_forward(views)))
        snapshot()

    # The loop. One collective every LOG_EVERY steps, beside those of the gradients and of the queue, says whether to
    # stop or to save: at the first log line, so that a full disk shows early, then every SAVE_EVERY seconds.
    sums, steps, waited, saved_at = torch.zeros(4, device=device), 0, 0.0, -math.inf
    began = logged = end = time.perf_counter()
    for batch in batches(step, last_step):
        waited += time.perf_counter() - end
        views = load_views(batch, config, step, rank, device)
        sums += train_step(model, parallel_model, optimizer, views, step, total_steps)
        step, steps = step + 1, steps + 1
        snapshot()
        if step % LOG_EVERY == 0 or step in (1, last_step) or (signals and world_size == 1):
            states = gather_objects(dict(losses=(sums / steps).tolist(), stop=max(signals, default=0),
                                         save=time.perf_counter() - saved_at > SAVE_EVERY))
            losses = torch.tensor([state["losses"] for state in states], dtype=torch.double).mean(0)
            stop = step < last_step and max(state["stop"] for state in states)
            ensure_finite([losses], step, out)
            elapsed = time.perf_counter() - logged
            row = dict(step=step, images=step * config.batch_size, epoch=step / steps_per_epoch,
                       **dict(zip(Output._fields, losses.tolist())), lr=optimizer.param_groups[0]["lr"],
                       images_per_second=steps * config.batch_size / elapsed, wait=waited / elapsed)
            if is_main:
                metrics.write(json.dumps(row) + "\n")
            left = duration((last_step - step) * elapsed / steps)
            print(f"step {step:,}/{last_step:,}  epoch {row['epoch']:.2f}  loss {row['loss']:.3f} = "
                  f"dc {row['loss_dc']:.3f} + dp {row['loss_dp']:.3f}  accuracy {row['accuracy']:.3f}  "
                  f"{row['images_per_second']:.1f} images/s, {row['wait']:.0%} waiting for data  {left} left")
            if step < last_step and (stop or any(state["save"] for state in states)):
                save()
                saved_at = time.perf_counter()
            if stop:
                print(f"stopped by {signal.Signals(stop).name} at step {step:,} of {last_step:,} and saved: run the "
                      "same command again to resume")
                return 128 + stop
            sums, steps, waited, logged = torch.zeros_like(sums), 0, 0.0, time.perf_counter()
        end = time.perf_counter()

    save(clean_statistics(model, dataset, device, workers))
    what = "done" if step == total_steps else f"stopped at --max-steps {step:,} of {total_steps:,}"
    data = ("coco", "LABELLED_IMAGES") if config.data == "folder" else (config.data, config.root)
    words = ["evaluate.py", "--ckpt", f"{out}/last.pt", "random", "--data", data[0], "--root", data[1]]
    print(f"{what} in {duration(time.perf_counter() - began)}, see {out}\nnext: python {shlex.join(words)}")
    return 0


# -------------------------------------------------------------------------------------------------------- command line

def interval(text):
    """'0.2,0.5' -> (0.2, 0.5)."""
    values = tuple(map(float, text.split(",")))
    if len(values) != 2 or not 0 <= values[0] <= values[1] < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not LOW,HIGH with 0 <= LOW <= HIGH")
    return values


def parse_config(arguments=None):
    """The command line -> Config, of which every field is a flag."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {int: positive, tuple: interval, "augs": parse_augs, "seed": whole_number, "workers": whole_number,
             "warmup": whole_number}
    for f in fields(Config):
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        values = {"default": default, "scenes": QUICK.get(f.name), "cosine": COSINE.get(f.name)}
        shown = "".join(f" ({name} {value})" for name, value in values.items() if value is not None)
        kind = dict(type=kinds.get(f.name, kinds.get(f.type, f.type)), choices=f.metadata["choices"])
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=f.metadata["help"] + shown, **kind)
    given = vars(parser.parse_args(arguments))
    return configure({key: value for key, value in given.items() if value is not None})


def configure(given):
    """Config from the settings given by name. Raises UserError where they contradict each other."""
    config = replace(Config(), **(QUICK if given.get("data", "scenes") == "scenes" else {}))
    if given.get("objective") == "cosine":
        config = replace(config, **COSINE)
    if given.get("regions", "proposals") != "proposals":
        if given.get("augs") or given.get("dp"):
            raise UserError(f"--regions {given['regions']} implies --augs none --no-dp: these need proposals")
        config = replace(config, augs=(), dp=False)
    if "lr" not in given and given.get("optimizer", config.optimizer) != config.optimizer:
        raise UserError(f"--optimizer {given['optimizer']} needs an --lr: the default is {config.optimizer}'s")
    config = replace(config, **given)
    if config.size % 2 or config.size < 64:
        raise UserError(f"--size {config.size}: an even number of at least 64, view 2s has half of it")
    if config.dp and config.dp_boxes > config.boxes:
        raise UserError(f"--dp-boxes {config.dp_boxes}: at most --boxes {config.boxes}")
    if max(*config.prc_share, *config.rbj_scale, config.ema) > 1 or config.prm_ratio[0] <= 0:
        raise UserError("--prc-share, --rbj-scale and --ema are at most 1, --prm-ratio is above 0")
    if not all(0 <= x < math.inf for x in vars(config).values() if isinstance(x, float)) or config.temperature == 0:
        raise UserError("--lr and other numbers are finite and not negative, --temperature is above 0")
    root, out = config.root or Path("data") / config.data, config.out or Path("runs") / config.data
    boxes = 1 if config.regions == "image" else config.boxes  # the whole view, once
    return replace(config, root=str(root), out=str(out), roi=config.roi or config.size // 16, boxes=boxes)


def main():
    return train(parse_config())


if __name__ == "__main__":
    error_exit(main)
