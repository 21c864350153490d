"""Object features of any ResNet checkpoint: O-KNN and disturbed O-KNN (the paper's section 5.3, Table 4); transfer to
detection and segmentation (section 5.2, Tables 1 and 3); export.

    python evaluate.py --ckpt runs/scenes/last.pt random colour                  ours, an untrained network, no network
    python evaluate.py --ckpt 'D3SSL=runs/d3ssl-*/last.pt' 'w/o dp=runs/nodp-*/last.pt'       means over files
    python evaluate.py --ckpt A.pth.tar B.pth:teacher --data coco --root data/coco           anybody's: one row per file
    torchrun --nproc_per_node 8 evaluate.py --ckpt X --transfer voc --root VOCdevkit        or coco; last.pt is resumed
    python evaluate.py --ckpt A.pth.tar --export A.pkl                 for detectron2; A.pth: torchvision's state dict

O-KNN: the bank holds --objects objects of each train image; every object of the val split is a query, and its k nearest
in the bank vote for their categories with weight exp(cos / 0.07). Crowds, VOC's difficult objects and OpenImages'
groups are neither. Disturbed: all that lies outside the boxes of these objects is replaced by another image.
--head map: RoIAlign 7x7 on the C5 map of the image, averaged: the paper's words. --head roi: C5 on RoIs of C4, as
region-level methods train; for scenes, whose C5 map has only 4 x 4 cells.

A row of the table is one network, or NAME=GLOB, the mean over its files. +- is one standard error, over the files of a
row or, if that is one network, over images. Differences from the first row are paired: file by file, in the order of
their names; of single networks, image by image.
"""
import argparse
import glob
import io
import json
import math
import mmap
import os
import pickle
import re
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from augment import MEAN, STD, normalise, to_float
from d3ssl import (VERSIONS, agree, connect, data_parallel, ensure_finite, gather_objects, load_checkpoint, lock_folder,
                   precise_batch_norm, resnet_stages, roi_align, save_checkpoint, stop_on_signal, torchrun_ranks,
                   write_json)
from data import (SEARCH, Parser, Progress, UserError, atomic, duration, epoch_batches, error_exit, listing,
                  make_loader, mask_coder, open_labelled, positive, resize, rng, usable_cores, whole_number)

# The input's side in pixels; not in the paper. VOC's objects are larger than COCO's, and its photographs smaller.
SIZE = {"scenes": 112, "coco": 448, "voc": 224, "openimages": 448, "openimages-mini": 448}
TEMPERATURE = 0.07  # of a vote; not in the paper: from instance discrimination and DINO
BATCH = 32          # images that a network sees at once


# ------------------------------------------------------------------------------------------------ any ResNet checkpoint

# Bottlenecks or not, and the blocks of each stage.
ARCHITECTURES = {(False, 2, 2, 2, 2): "resnet18", (False, 3, 4, 6, 3): "resnet34", (True, 3, 4, 6, 3): "resnet50",
                 (True, 3, 4, 23, 3): "resnet101", (True, 3, 8, 36, 3): "resnet152"}
MOMENTUM = re.compile(r"_k(ey)?(?![a-z])|teacher|target|momentum|(?<![a-z])ema(?![a-z])", re.IGNORECASE)


def load_backbone(path, arch=None, part=None, seed=0):
    """The ResNet in a checkpoint, by one rule for all: among the prefixes under which a ResNet's four stages lie, those
    of momentum encoders (_k, _key, teacher, target, momentum, ema) are dropped, and one must be left. No code in a
    file is run. Our last.pt's clean batch-norm statistics, where it has them, replace those of training.
    path: a file, or "random": the untrained `arch` (default resnet50), seeded; part: "teacher", for the momentum
    encoder, or a prefix. Returns torchvision's ResNet with fc = Identity in eval mode, its architecture's name."""
    if path == "random":
        return build(arch or "resnet50", seed).eval(), arch or "resnet50"
    with reading(path):
        saved = read_checkpoint(path)
        prefix, weights = choose(flatten(saved), part)
        blocks = [len({key.split(".")[1] for key in weights if key.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
        arch = ARCHITECTURES.get(("layer1.0.conv3.weight" in weights, *blocks))
        if arch is None:
            kind = "bottleneck" if "layer1.0.conv3.weight" in weights else "basic"
            raise UserError(f"has {blocks} {kind} blocks in its stages, as none of {', '.join(ARCHITECTURES.values())}")
        if "d3ssl" in saved and saved.get("clean"):
            weights.update(flatten(saved["clean"]["teacher" if "teacher" in prefix else "student"]))
        network = build(arch, seed)
        own = network.state_dict()
        for key in dict.fromkeys([*own, *weights]):
            if key.endswith("num_batches_tracked"):  # which does not matter
                continue
            if key not in own or key not in weights:
                what = "a missing key" if key in own else "an unexpected key"
                raise UserError(f"is cut short, or no {arch} as torchvision's: {prefix}{key} is {what}")
            tensor = as_tensor(weights[key])  # one at a time: it may be a copy, and one array can have a million names
            theirs, ours = tuple(tensor.shape), tuple(own[key].shape)
            if theirs != ours:
                raise UserError(f"is no {arch} as torchvision's: {prefix}{key} is {theirs}, not {ours}")
            if not tensor.isfinite().all():
                raise UserError(f"has diverged, {prefix}{key} is not finite: take an earlier checkpoint")
            own[key].copy_(tensor)
    return network.eval(), arch


def build(arch, seed):
    """torchvision's `arch` without its classifier; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torchvision.models.get_model(arch, weights=None)
    network.fc = nn.Identity()
    return network


@contextmanager
def reading(path):
    """Turn what reading a checkpoint raises into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--ckpt {path}: {error.strerror}; name a checkpoint file, random or colour") from None
    except UserError as error:
        raise UserError(f"--ckpt {path} {error}") from None
    except Exception as error:  # of many classes, on a file that is cut, damaged or something else
        raise UserError(f"--ckpt {path} is no checkpoint, or cut short ({type(error).__name__}): name one") from None


def read_checkpoint(path):
    """What a checkpoint holds: torch.save's file, a plain pickle (detectron2's) or safetensors. Nothing in it is run or
    imported, and its tensors (see `as_tensor`) stay in the mapped file."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # which does not wait for a pipe
        file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants buffers that can be written
    content = memoryview(file)
    return read_safetensors(content) if content[8:9] == b"{" else read_torch(file, content)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = dict(zip("Double Float Half BFloat16 Long Int Short Char Byte Bool".split(), DTYPES.values()))
MOST = 10_000_000  # bytes of a JSON header and steps of a pickle, each of which may take 100 bytes of memory


def read_safetensors(content):
    """{name: tensor}: eight bytes of length, a JSON header, the numbers (huggingface/safetensors, "Format")."""
    length = min(int.from_bytes(content[:8], "little"), MOST)
    header, numbers = json.loads(bytes(content[8:8 + length])), content[8 + length:]
    header.pop("__metadata__", None)
    return {name: torch.frombuffer(numbers[slice(*entry["data_offsets"])], dtype=DTYPES[entry["dtype"]])
            .reshape(entry["shape"]) for name, entry in header.items()
            if entry["dtype"] in DTYPES and 0 not in entry["shape"]}


def read_torch(file, content):
    """What torch.save wrote, as a zip archive or, before torch 1.6, as pickles with each storage's length and bytes
    behind; or a plain pickle. file: open at its start; content: a view of its bytes."""
    storages = defaultdict(lambda: SimpleNamespace(dtype=None, content=b""))  # the numbers of tensors, by key
    if content[:4] != b"PK\3\4":
        first = Unpickler(file, storages).load()
        if not isinstance(first, int):  # the magic number of files from before torch 1.6
            return first
        _version, _system, saved, keys = (Unpickler(file, storages).load() for _ in range(4))
        for key in keys:
            size = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
            storages[key].content = content[file.tell():file.tell() + size]
            file.seek(size, os.SEEK_CUR)
        return saved
    for entry in zipfile.ZipFile(file).infolist():
        name = entry.filename.partition("/")[2].removeprefix("data/")
        if name == "constants.pkl":
            raise UserError("is a TorchScript archive, whose code is not run: save model.state_dict() instead")
        if entry.compress_type == zipfile.ZIP_STORED:  # torch.save compresses nothing
            start = entry.header_offset + 30 + sum(struct.unpack_from("<2H", content, entry.header_offset + 26))
            storages[name].content = content[start:start + entry.file_size]
    if storages["byteorder"].content == b"big":
        raise UserError("was written on a big-endian machine: save it again on another one")
    return Unpickler(io.BytesIO(storages["data.pkl"].content), storages).load()


class StandIn(dict):
    """In the place of a class or function of a pickle, or of what came of calling it: its name, the arguments and the
    state; a dictionary's entries. Takes whatever a pickle does to it, and does nothing."""
    __slots__ = ("name", "arguments", "state")
    __hash__ = object.__hash__

    def __init__(self, name, arguments=()):
        self.name, self.arguments, self.state = name, arguments, None

    def __call__(self, *arguments):
        made = StandIn(self.name, arguments)
        if self.name == "OrderedDict" and arguments:  # of Python 2: made of a list of pairs, which no other one gets
            made.update(arguments[0])
            arguments[0].clear()
        return made

    def __setstate__(self, state):
        self.state = state

    append = extend = lambda self, _: None


class Tuple(list):
    """A pickle's tuple. As a key it is hashed by identity: the hash of deeply nested tuples overflows C's stack."""
    __hash__ = object.__hash__


def limited(load):
    """One step of a pickle, of which there are at most MOST; a tuple becomes a Tuple."""
    def step(self):
        self.steps += 1
        if self.steps > MOST:
            raise UserError(f"has a pickle of more than {MOST:,} steps: save the state dict alone")
        load(self)
        if self.stack and type(self.stack[-1]) is tuple:
            self.stack[-1] = Tuple(self.stack[-1])
    return step


class Unpickler(pickle._Unpickler):  # the one in Python: C's fills memory for one large index
    """Reads a pickle as dict, list, Tuple, numbers, text, storages and, for whatever else it names, StandIn.
    (torch.load with weights_only=True refuses more, and allocates what it is told.)"""
    dispatch = {code: limited(load) for code, load in pickle._Unpickler.dispatch.items()}
    dispatch[pickle.NEWOBJ[0]] = dispatch[pickle.REDUCE[0]]
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]  # which allocates no more than there is

    def __init__(self, file, storages):
        super().__init__(file, encoding="latin1")
        self.storages, self.steps = storages, 0

    def find_class(self, module, name):
        return StandIn(name)

    def persistent_load(self, saved):  # ("storage", class, key, device, length, view of another storage)
        storage = self.storages[saved[2]]
        storage.dtype = None if any(saved[5:]) else STORAGES.get(saved[1].name.removesuffix("Storage"))
        return storage


ARRAYS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_reconstruct", "_frombuffer")  # functions of torch and numpy
warnings.filterwarnings("ignore", ".*not writable")  # arrays of a file, which are read alone, and not copied

# In torchvision's words: wrappers' names are left out; a C4 detector's fourth stage, in its head; Hugging Face's
# (transformers, modeling_resnet.py); detectron2's; the numbers of nn.Sequential(*children), as lightly keeps it.
SPELLINGS = {
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)": "", r"^\.": "",
    r"(^|\.)roi_heads?\.(shared_head\.)?(?=(layer4|res5)\.\d)": r"\1backbone.",
    r"(^|\.)embedder\.embedder\.": r"\1layer.0.",
    r"(^|\.)encoder\.stages\.([0-3])\.layers\.(?=\d)": lambda m: f"{m[1]}layer{int(m[2]) + 1}.",
    r"\blayer\.([0-2])\.convolution": lambda m: f"conv{int(m[1]) + 1}",
    r"\blayer\.([0-2])\.normalization": lambda m: f"bn{int(m[1]) + 1}",
    r"(^|\.)stem\.(?=conv1\.)": r"\1", r"(^|\.)res([2-5])\.(?=\d)": lambda m: f"{m[1]}layer{int(m[2]) - 1}.",
    r"\bconv(\d)\.norm\.": r"bn\1.", r"\bshortcut\.norm(alization)?\.": "downsample.1.",
    r"\bshortcut\.(convolution\.)?": "downsample.0.",
    r"(^|\.)(?<!downsample\.)0\.(?=weight$)": r"\1conv1.", r"(^|\.)(?<!downsample\.)1\.(?=\w+$)": r"\1bn1.",
    r"(^|\.)([4-7])\.(?=\d+\.(conv|bn|downsample))": lambda m: f"{m[1]}layer{int(m[2]) - 3}."}


def flatten(tree, prefix="", seen=None):
    """(name, what `as_tensor` takes) of every tensor and array in nested dictionaries and objects, each of these read
    once; names are joined by dots, in torchvision's words."""
    seen = set() if seen is None else seen
    if isinstance(tree, torch.Tensor) or (isinstance(tree, StandIn) and tree.name in ARRAYS):
        for pattern, word in SPELLINGS.items():
            prefix = re.sub(pattern, word, prefix)
        yield prefix, tree
    elif isinstance(tree, dict) and id(tree) not in seen:
        seen.add(id(tree))
        entries = list(tree.items())
        if isinstance(tree, StandIn):  # an object: its attributes, and what it was made of, as a wrapped module
            entries += tree.state.items() if isinstance(tree.state, dict) else ()
            entries += [("", argument) for argument in tree.arguments]
        for key, value in entries:
            if key in ("", "_modules", "_parameters", "_buffers"):  # of a module that was saved with its class
                yield from flatten(value, prefix, seen)
            elif isinstance(key, (str, int)) and len(prefix) + len(str(key)) < 300:
                yield from flatten(value, f"{prefix}.{key}" if prefix else str(key), seen)


def as_tensor(leaf):
    """The tensor of a call of one of ARRAYS. Raises an error if it is damaged or reaches outside of its bytes."""
    if isinstance(leaf, torch.Tensor):
        return leaf
    name, given = leaf.name, leaf.arguments
    if name in ("_reconstruct", "_frombuffer"):  # of numpy: floats, integers or bools
        content, dtype, shape, order, *axes = given if name == "_frombuffer" else [leaf.state[i] for i in (4, 2, 1, 3)]
        if isinstance(content, StandIn):  # protocol 2 has bytes as _codecs.encode(text, "latin1")
            content = content.arguments[0].encode("latin1")
        kind = re.fullmatch("[<>|]([fiu][1248]|b1)", dtype.state[1] + dtype.arguments[0])
        values = np.frombuffer(content, kind[0]).reshape(shape, order="F" if order in ("F", True) else "C")
        if axes:  # neither C's nor Fortran's order
            values = values.transpose(axes[0])
        return torch.from_numpy(values.astype(kind[1], copy=False))
    storage, offset, size, stride = given[:4]
    numbers = torch.frombuffer(storage.content, dtype=storage.dtype)
    if math.prod(size) > len(numbers):
        raise ValueError("a tensor that is larger than its storage")
    return numbers.as_strided(size, stride, offset)  # which refuses what lies outside


def choose(leaves, asked):
    """The one (prefix, {torchvision's name: what `as_tensor` takes}) with all four stages of a ResNet that is asked
    for: None: no momentum encoder, "teacher": a momentum encoder, else a prefix."""
    parts = defaultdict(dict)
    for name, leaf in leaves:
        if match := re.fullmatch(r"(.*?\.)??((conv1|bn1|layer\d+)\..*)", name):
            parts[match[1] or ""][match[2]] = leaf
    resnets = {name: part for name, part in parts.items()
               if all(f"layer{i}.0.conv1.weight" in part for i in (1, 2, 3, 4))}
    if asked in (None, "teacher"):
        fits = [name for name in resnets if bool(MOMENTUM.search(name)) == (asked == "teacher")]
    else:
        end = f".{asked.rstrip('.')}."
        fits = [name for name in resnets if (f".{name}".endswith(end) if asked else not name)]
    for name in fits[1:]:  # OpenSelfSup saves its backbone under two names: equal weights count once
        one, two = resnets[fits[0]], resnets[name]
        if one.keys() == two.keys() and all(torch.equal(as_tensor(one[key]), as_tensor(two[key])) for key in one):
            fits.remove(name)
    if not resnets:
        raise UserError("holds no ResNet by the names of torchvision, timm, Hugging Face or detectron2")
    if len(fits) != 1:
        prefixes = ", ".join(name or "''" for name in resnets)
        raise UserError(f"has {len(fits)} of the ResNets asked for, of {prefixes}: name FILE:PREFIX or FILE:teacher")
    return fits[0], resnets[fits[0]]


def export(network, path):
    """Write the backbone as others load it. A .pkl: detectron2's MODEL.WEIGHTS, with INPUT.FORMAT RGB and ImageNet's
    mean and deviation in pixels (MoCo's configs). Else: torchvision's state dict without fc (strict=False loads it).
    Returns which of the two."""
    if Path(path).suffix != ".pkl":
        save_checkpoint(path, network.state_dict())
        return "torchvision"
    named = {}
    for key, value in network.state_dict().items():  # as MoCo's and detectron2's own converters name them
        key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", re.sub("^(?=conv|bn)", "stem.", key))
        key = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", key).replace("downsample.0", "shortcut")
        if not key.endswith("num_batches_tracked"):
            named[key.replace("downsample.1", "shortcut.norm")] = value.numpy()
    with atomic(path) as file:
        pickle.dump({"model": named, "__author__": "D3SSL", "matching_heuristics": True}, file)
    return "detectron2"


# ------------------------------------------------------------------------------------------------------ rows of a table

@dataclass
class Source:
    """Where one network of a row comes from, and how it is evaluated."""
    path: str                    # a file, or random, or colour
    part: str = None             # of the file: its momentum encoder (teacher), or one of several ResNets, by prefix
    arch: str = None             # of random, and of a file once it is read
    seed: int = 0                # of random's weights
    bins: int = None             # side of RoIAlign's output on C4, as it was trained: for --head roi
    statistics: str = "saved"    # of batch norm: saved, clean (estimated here), clean (training run) or none

    @property
    def name(self):
        return self.path if self.part is None else f"{self.path}:{self.part}"

    def load(self):
        return load_backbone(self.path, self.arch, self.part, self.seed)


def parse_entry(entry, args):
    """NAME=GLOB or GLOB, which may be a file, random or colour, and end in :teacher or :PREFIX -> name, [Source]."""
    path, colon, part = entry.rpartition(":")
    if not colon or Path(entry).exists():
        path, part = entry, None
    name, equals, pattern = path.partition("=")
    if not equals or Path(path).exists():
        name, pattern = entry, path
    kind = {"random": "clean", "colour": "none"}.get(pattern, args.statistics)
    paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True)) or [pattern]
    return name, [Source(path, part, args.arch, args.seed, args.roi, kind) for path in paths]


def open_rows(args):
    """The rows of --ckpt, (name, list of Source) each; every file is read, so that mistakes show at once. random has
    the first file's architecture; what does not know its bins has the first known ones. Raises UserError for what
    load_backbone refuses, and under torchrun."""
    if torchrun_ranks()[1] > 1:
        raise UserError("without --transfer this is one process: start it with python, without torchrun")
    rows = [parse_entry(entry, args) for entry in args.ckpt]
    sources = [source for _, some in rows for source in some]
    files = [source for source in sources if source.path not in ("random", "colour")]
    for source in files:
        (network, source.arch), path = source.load(), Path(source.path)
        beside = path.with_name("last.pt")  # of a backbone.pth or a snapshot, which always has clean statistics
        file = beside if re.fullmatch(r"backbone(-\d+)?\.pth", path.name) and beside.exists() else path
        with reading(file):
            run = read_checkpoint(file)
            if isinstance(run, dict) and "d3ssl" in run:
                source.bins = source.bins or run["config"]["roi"]
                if source.statistics == "saved" and (run.get("clean") or path.name.startswith("backbone-")):
                    source.statistics = "clean (training run)"
        if source.statistics == "saved" and not network.bn1.running_mean.any() and (network.bn1.running_var == 1).all():
            print(f"warning: {path}: batch norm's running statistics were never updated (means 0, variances 1): try "
                  "--statistics clean", file=sys.stderr)
    # Bins of networks that do not know theirs: detectron2's C4 head has 14, the scenes' preset, for 112 pixels, 6.
    bins = next((source.bins for source in files if source.bins), 6 if args.data == "scenes" else 14)
    for source in sources:
        source.bins = source.bins or bins
        source.arch = source.arch or (files[0].arch if files else "resnet50")
    return rows


def load_source(source, head, clean_batches, device):
    """A source's network in eval mode; clean statistics are estimated with `head` on clean_batches()."""
    network = source.load()[0].to(device)
    if source.statistics == "clean":
        precise_batch_norm(ObjectFeatures(network, head, source.bins), clean_batches())
    return network


def load_one(args):
    """load_backbone of the only --ckpt."""
    source, *others = [source for entry in args.ckpt for source in parse_entry(entry, args)[1]]
    if others or source.path == "colour" or args.statistics == "clean":
        raise UserError("--transfer and --export take one network as it is: one --ckpt, a file or random, no "
                        "--statistics clean")
    return source.load()


class Estimate(NamedTuple):
    """A measure of one network from N images or objects. Two networks' influences are of the same images: paired."""
    value: np.ndarray      # (...)
    influence: np.ndarray  # (N, ...): how the value changes, times N, with the weight of each image or object

    @property
    def error(self):
        """Standard error (...): that of a bootstrap over the N, to first order (the sandwich formula)."""
        n = len(self.influence)
        return np.sqrt(np.square(self.influence).sum(0) / max(1, n * (n - 1)))

    def minus(self, other):
        return Estimate(self.value - other.value, self.influence - other.influence)


def ratio_of_means(above, below):
    """Estimate of mean(above) / mean(below), arrays (N, ...). Not a number where mean(below) is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = above.mean(0) / below.mean(0)
        return Estimate(value, (above - value * below) / below.mean(0))


# Student's t: 95 % of its mass lies within +- these, for 1 to 30 degrees of freedom; beyond, the normal's 1.96.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def summarise(networks):
    """A row's networks, {measure: Estimate} each -> {measure: mean, measure_se: standard error over the networks, of a
    single one over its images or objects, measure_low, measure_high: 95 % interval}, for JSON: None if not finite."""
    n, numbers = len(networks), {}
    for name, first in networks[0].items():
        values = np.stack([network[name].value for network in networks])
        mean, error = values.mean(0), first.error if n == 1 else values.std(0, ddof=1) / n ** 0.5
        half = error * (T95[n - 2] if 1 < n < len(T95) + 2 else 1.96)
        for suffix, array in (("", mean), ("_se", error), ("_low", mean - half), ("_high", mean + half)):
            numbers[name + suffix] = np.where(np.isfinite(array), array, None).tolist()
    return numbers


def measure_rows(rows, measure):
    """Measure every network of open_rows' rows; measure: Source -> {measure: Estimate}. Returns the rows' results and
    the files', for JSON. A row with as many files as the first has its difference, over pairs in their order."""
    results, files, first = [], [], None
    for name, sources in rows:
        networks = [measure(source) for source in sources]
        files += [{"row": name, **asdict(source), **summarise([one])} for source, one in zip(sources, networks)]
        statistics = ", ".join(dict.fromkeys(source.statistics for source in sources))
        results.append({"row": name, "files": len(sources), "statistics": statistics, **summarise(networks)})
        if first is None:
            first = networks
        elif len(first) == len(networks):
            pairs = [{key: mine[key].minus(theirs[key]) for key in mine} for mine, theirs in zip(networks, first)]
            results[-1]["difference"] = {"from": rows[0][0], **summarise(pairs)}
        elif min(len(first), len(networks)) > 1:
            print(f"warning: {len(networks)} files of {name}, {len(first)} of {rows[0][0]}: unpaired", file=sys.stderr)
    return results, files


def write_results(path, settings, results, files):
    """measure_rows' results and the settings as JSON; nothing without a path."""
    if path:
        write_json(path, {"command": sys.argv, "settings": settings, "versions": VERSIONS, "rows": results,
                          "files": files})
        print(f"wrote {path}")


def print_table(headings, results, names, digits, unit):
    """Print the results of measure_rows, each with its difference from the first row. names: the measures that fill the
    columns, one each or all of them; digits: decimal places; unit: what a single network's errors cover."""
    width = max(len(result["row"]) for result in results)
    print(" " * width + "".join(f"{heading:>24}" for heading in headings) + "   +- over; statistics of batch norm")

    def line(row, form, numbers, suffixes, end):
        columns = zip(*(np.ravel([numbers[name + suffix] for name in names]) for suffix in suffixes))
        cells = ["-" if None in column else form.format(*column, digits) for column in columns]
        print(f"{row:{width}}" + "".join(f"{cell:>24}" for cell in cells) + "   " + end)

    for result in results:
        over = f"{result['files']} files" if result["files"] > 1 else unit
        line(result["row"], "{0:.{2}f} +-{1:.{2}f}", result, ("", "_se"), f"{over}; {result['statistics']}")
        if "difference" in result:
            line("", "{0:+.{3}f} [{1:+.{3}f}, {2:+.{3}f}]", result["difference"], ("", "_low", "_high"),
                 f"difference from {results[0]['row']}, 95 % interval, paired over {over}")


# -------------------------------------------------------------------------------------------------- objects of a split

def open_splits(data, root, strict=False):
    """Train and val split, data.Labelled each. Raises UserError as open_labelled does, and if their classes differ."""
    train, val = (open_labelled(data, root, split, strict) for split in ("train", "val"))
    if train.categories != val.categories:
        odd = ", ".join(sorted({*train.categories} ^ {*val.categories})[:3]) or "their order"
        raise UserError(f"the splits of {root or data} have other classes, as {odd}: give both one list")
    return train, val


def select_objects(labels, crowd, number=None):
    """Indices of `number` of the objects of one image (None: all), without crowds, distinct categories first: the first
    object of each category in the order of the annotations, then the second of each, and so on."""
    index = np.flatnonzero(~crowd)
    rank = np.tril(labels[index, None] == labels[index], -1).sum(1)  # of an object among those of its category
    return np.sort(index[np.argsort(rank, kind="stable")][:number])


class Objects(torch.utils.data.Dataset):
    """The images of a split that have objects, with the selected ones: `number` per image (None: all). index, image
    (M,): the selected objects of all images in their order, and the image of each.

    Item -> picture, disturbed (size, size, 3) uint8 RGB; boxes (K, 4) float32 in their pixels, padded with zeros to the
    K of all. `disturbed` is the picture where an object's box touches a pixel, else another image of the split, drawn
    by (seed, image). Raises UserError if an image cannot be read or does not have its annotated size."""
    def __init__(self, labelled, size, number=None, limit=None, seed=0):
        self.labelled, self.size, self.seed = labelled, size, seed
        self.n = min(len(labelled.images), limit or len(labelled.images))  # images
        spans = [slice(*labelled.offsets[i:i + 2]) for i in range(self.n)]
        self.selected = [s.start + select_objects(labelled.labels[s], labelled.crowd[s], number) for s in spans]
        self.filled = [i for i in range(self.n) if len(self.selected[i])]  # the images with objects
        counts = [len(own) for own in self.selected]
        self.k, self.index = max(counts), np.concatenate(self.selected)
        self.image = np.repeat(np.arange(self.n), counts)
        if not self.filled or self.n < 2:
            raise UserError(f"{labelled.images.root} needs boxes and two images, not {self.n:,}: --limit-images")

    def __len__(self):
        return len(self.filled)

    def __getitem__(self, j):
        i, side = self.filled[j], self.size
        other = (i + 1 + int(rng("background", self.seed, i).integers(self.n - 1))) % self.n
        image, background = self.labelled.read(i), self.labelled.read(other)
        picture, disturbed = resize(image, side, side), resize(background, side, side)
        own, boxes = self.selected[i], np.zeros((self.k, 4), np.float32)
        boxes[:len(own)] = self.labelled.boxes[own] * np.float32([side / image.shape[1], side / image.shape[0]] * 2)
        for x1, y1, x2, y2 in np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], 1).astype(int):
            disturbed[y1:y2, x1:x2] = picture[y1:y2, x1:x2]
        return picture, disturbed, boxes


# ---------------------------------------------------------------------------------------------------- object features

class ObjectFeatures(nn.Module):
    """The features of objects by torchvision's ResNet: normalised images (B, 3, H, W) and boxes (B, K, 4) in their
    pixels, empty ones for padding -> (B * K, 2048) at ResNet-50, not normalised. head "map": RoIAlign 7x7 on C5 of the
    image, averaged (section 5.3); "roi": C5 on RoIAlign of C4, `bins` x `bins`, averaged (d3ssl.Encoder)."""
    def __init__(self, network, head="map", bins=14):
        super().__init__()
        self.network, self.head, self.bins = network, head, bins

    def forward(self, images, boxes):
        c4, layer4 = resnet_stages(self.network, images)[-1], self.network.layer4
        if self.head == "map":  # one bin with 14x14 samples: the mean of 7x7 bins with 2x2 samples each
            return roi_align(layer4(c4).float(), boxes, 1, 1 / 32, ratio=14).flatten(1)
        features = c4.new_zeros(*boxes.shape[:2], 2 * c4.shape[1])
        for k in range(boxes.shape[1]):  # the k-th object of every image that has one: nothing is spent on padding
            there = (boxes[:, k, 2] > boxes[:, k, 0]).nonzero()[:, 0]
            regions = roi_align(c4[there], boxes[there, k:k + 1], self.bins, 1 / 16)
            features[there, k] = layer4(regions).mean((2, 3))
        return features.flatten(0, 1)


def clean_batches(images, size, seed=0, device="cpu", number=256):
    """Yield normalised images (B, 3, size, size) and boxes (B, 4, 4) to estimate batch norm's statistics on: `number`
    train images drawn by seed, in equal batches of about 32. The boxes, which C5 sees with head "roi", are random, with
    sqrt(area share) uniform in the range of the proposals' filter."""
    chosen = rng("clean", seed).choice(len(images), min(number, len(images)), replace=False)
    for some in np.array_split(chosen, max(1, round(len(chosen) / BATCH))):
        pictures, boxes = [], []
        for i in some.tolist():
            with suppress(OSError):
                pictures.append(resize(images.read(i), size, size))
                random = rng("clean boxes", seed, i)
                side = random.uniform(*SEARCH["share"], (4, 1)) * size
                stretch = 2 ** random.uniform(-0.5, 0.5, (4, 1))  # aspects between 1/2 and 2
                sides = np.concatenate([side * stretch, side / stretch], 1).clip(max=size)
                corner = random.uniform(0, 1, (4, 2)) * (size - sides)
                boxes.append(np.concatenate([corner, corner + sides], 1))
        if pictures:
            pixels = torch.from_numpy(np.stack(pictures)).to(device)
            yield normalise(to_float(pixels)), torch.from_numpy(np.stack(boxes)).float().to(device)


def median_colours(images, boxes):
    """(B * K, 3): no network at all, the median colour of each box. Where colour wins, the benchmark is broken."""
    corners = torch.cat([boxes[..., :2].floor(), boxes[..., 2:].ceil()], -1).long()
    crops = [image[:, y1:y2, x1:x2] for image, own in zip(images, corners) for x1, y1, x2, y2 in own.tolist()]
    return torch.stack([crop.flatten(1).median(1).values if crop.numel() else images.new_zeros(3) for crop in crops])


@torch.inference_mode()
def extract(model, objects, what="objects", workers=0, device="cpu"):
    """Features (2, M, C) float16 of all objects (Objects), L2-normalised, [1] disturbed, on the CPU. model: (normalised
    images (B, 3, H, W), boxes (B, K, 4)) -> (B * K, C), on `device`. Raises UserError as Objects does, and if a feature
    is not finite."""
    features, progress = [], Progress(what, len(objects))
    batches = torch.utils.data.BatchSampler(range(len(objects)), BATCH, drop_last=False)
    for n, (*pictures, boxes) in enumerate(make_loader(objects, batches, workers), 1):
        there = boxes[:, :, 2] > 0  # the others are padding
        most = there.sum(1).max()
        boxes, there = boxes[:, :most].to(device), there[:, :most].flatten()
        values = torch.stack([model(normalise(to_float(pixels.to(device))), boxes) for pixels in pictures])
        features.append(F.normalize(values.float(), dim=2).half().cpu()[:, there])
        if not features[-1].isfinite().all():
            raise UserError("the network's features are not finite on these images: is it a diverged checkpoint?")
        progress.update(min(n * BATCH, len(objects)))
    return torch.cat(features, 1)


# --------------------------------------------------------------------------------------------------------------- O-KNN

@torch.inference_mode()
def nearest(queries, bank, k, device="cpu", columns=2048):
    """The k nearest of bank (M, D) for each query (Q, D), both float16 and L2-normalised, by cosine in float32 (DINO's
    eval_knn), `columns` of the bank at once; ties to the lower index of those that topk takes. Returns cosines (Q, k)
    float32, descending, and indices (Q, k); min(k, M) of them."""
    queries = queries.to(device).float()
    best, index = queries[:, :0], torch.empty(len(queries), 0, dtype=torch.long, device=device)
    for start in range(0, len(bank), columns):
        similarity = queries @ bank[start:start + columns].to(device).float().T
        place = similarity.topk(min(k, similarity.shape[1]), 1).indices.sort(1).values
        best, index = torch.cat([best, similarity.gather(1, place)], 1), torch.cat([index, start + place], 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, index = best[:, :k], index.gather(1, order)[:, :k]
    return best.cpu(), index.cpu()


def vote(cosines, labels, categories):
    """The first five categories (Q, 5) for neighbours' cosines and labels (Q, k): summed weights exp(cos / 0.07), ties
    to the lower category; -1 where fewer have a vote."""
    votes = torch.zeros(len(labels), max(categories, 5), dtype=torch.float64)
    votes.scatter_add_(1, labels, (cosines.double() / TEMPERATURE).exp())
    votes, order = votes.sort(dim=1, descending=True, stable=True)
    return torch.where(votes > 0, order, -1)[:, :5]


# Of a network, in percent; lost: what O-KNN's top-1 loses when images are disturbed.
MEASURES = {"oknn_top1": "O-KNN top-1 ↑", "oknn_top5": "top-5 ↑", "disturbed_top1": "disturbed top-1 ↑",
            "disturbed_top5": "top-5 ↑", "lost": "lost ↓"}


def evaluate(model, bank, queries, k=20, workers=0, device="cpu"):
    """O-KNN and disturbed O-KNN (section 5.3) of a model, (images, boxes) -> features, from a bank (Objects): points
    (5, Q) float64 by MEASURES, 100 or 0 for each of the Q queries (Objects); `lost`: a difference."""
    stored = extract(model, bank, "bank", workers, device)
    asked = extract(model, queries, "queries", workers, device)
    known, labels = (torch.from_numpy(some.labelled.labels[some.index]) for some in (bank, queries))
    points = []
    for i in (0, 1):
        cosines, index = nearest(asked[i], stored[i], k, device)
        hits = 100 * (vote(cosines, known[index], len(bank.labelled.categories)) == labels[:, None]).double()
        points += [hits[:, 0], hits.sum(1)]
    return torch.stack([*points, points[0] - points[2]])


def over_images(points, images):
    """{measure: Estimate} of points (5, Q); the queries of one image (images: (Q,) integers) go together."""
    images = np.unique(images, return_inverse=True)[1]
    counts = np.bincount(images)
    return {name: ratio_of_means(np.bincount(images, values), counts) for name, values in zip(MEASURES, points)}


# -------------------------------------------------------------------- transfer to detection (section 5.2, Tables 1, 3)

@dataclass
class Transfer:
    """Every setting of a fine-tuning; the paper names MoCo's protocol: MoCo's detection/configs ("moco") and the
    defaults of detectron2 that they inherit ("d2")."""
    task: str                   # section 5.2. voc: Faster R-CNN, trainval 2007 and 2012; coco: Mask R-CNN, train2017
    root: str
    ckpt: str
    arch: str                   # of the backbone; section 5.2: resnet50
    steps: int                  # SOLVER.MAX_ITER; moco: 24 k (VOC); d2: 90 k, the "1x schedule" of section 5.2 (COCO)
    drops: list                 # SOLVER.STEPS, at which the learning rate drops to a tenth; moco and d2's 1x
    warmup: float               # steps of linear warm-up from a thousandth; moco: 100 (VOC), d2: 1,000 (COCO)
    sides: list                 # short sides drawn in training, in pixels; moco; the last, 800, is the test's
    long_side: int              # at most, 5/3 of the short one; d2: 1,333
    batch_size: int = 16        # of all ranks together; moco
    lr: float = 0.02            # the default is for 16 images, here it is scaled by the batch; moco
    momentum: float = 0.9       # d2
    weight_decay: float = 1e-4  # d2; norms have none
    rois: int = 512             # d2's BATCH_SIZE_PER_IMAGE: boxes that train the RoI head, a quarter of them objects
    precise: int = 200          # batches of precise batch norm before the test; d2 (ours: at most a tenth of the steps)
    seed: int = 0
    limit_images: int = None

    def rate(self, step):
        """The learning rate at `step`."""
        return self.lr * min(1, 0.001 + 0.999 * step / self.warmup) * 0.1 ** sum(step >= drop for drop in self.drops)


RECIPES = {"voc": dict(steps=24_000, drops=[18_000, 22_000], warmup=100, sides=list(range(480, 801, 32))),
           "coco": dict(steps=90_000, drops=[60_000, 80_000], warmup=1_000, sides=list(range(640, 801, 32)))}


def transfer_config(args, arch="resnet50"):
    """Transfer from the command line. Another batch than 16 scales rate and steps linearly; drops and warm-up stay in
    proportion to the steps."""
    recipe, batch = RECIPES[args.transfer], args.batch_size
    steps = args.steps or max(1, round(recipe["steps"] * 16 / batch))
    drops = [round(drop * steps / recipe["steps"]) for drop in recipe["drops"]]
    sides = [args.short_side] if args.short_side else recipe["sides"]
    return Transfer(args.transfer, args.root or f"data/{args.transfer}", args.ckpt[0], arch, steps, drops,
                    recipe["warmup"] * steps / recipe["steps"], sides, round(sides[-1] * 5 / 3), batch,
                    args.lr * batch / 16, rois=args.rois, precise=max(1, min(Transfer.precise, steps // 10)),
                    seed=args.seed, limit_images=args.limit_images)


class RegionProposals(RegionProposalNetwork):
    """torchvision's RPN with detectron2's losses: L1 for the boxes, and both sums divided by 256 anchors per image."""

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        positive, negative = (torch.cat(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        sampled, count = positive | negative, self.fg_bg_sampler.batch_size_per_image * len(labels)
        logits, offsets = objectness.flatten()[sampled], torch.cat(regression_targets)[positive]
        return (F.binary_cross_entropy_with_logits(logits, torch.cat(labels)[sampled], reduction="sum") / count,
                F.l1_loss(pred_bbox_deltas[positive], offsets, reduction="sum") / count)


class C4Heads(RoIHeads):
    """detectron2's Res5ROIHeads with MoCo's extra norm: the box predictor reads the mean of a region's res5 map, the
    mask predictor the map; in training both read one pass (a second would show batch norm the objects alone)."""

    def __init__(self, layer4, categories, masks, rois):
        width = layer4[-1].conv2.out_channels * layer4[-1].expansion
        super().__init__(self.regions, lambda maps: maps.mean((2, 3)), FastRCNNPredictor(width, categories + 1),
                         fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=rois, positive_fraction=0.25,
                         bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
                         mask_roi_pool=self.regions, mask_head=nn.Identity())
        self.layer4, self.norm = layer4, nn.BatchNorm2d(width)
        last = {self.box_predictor.cls_score: 0.01, self.box_predictor.bbox_pred: 0.001}  # standard deviations
        if masks:
            self.mask_predictor = MaskRCNNPredictor(width, 256, categories + 1)
            nn.init.zeros_(self.mask_predictor.conv5_mask.bias)
            last[self.mask_predictor.mask_fcn_logits] = 0.001
        for layer, deviation in last.items():
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def regions(self, features, boxes, shapes=None):
        """{"0": C4 (B, 1024, h, w)}, B lists of boxes (n, 4) in pixels -> (sum of n, 2048, 7, 7)."""
        return self.norm(self.layer4(torchvision.ops.roi_align(features["0"], boxes, 14, 1 / 16, aligned=True)))

    def forward(self, features, proposals, image_shapes, targets=None):
        """torchvision's interface: C4, B lists of boxes -> detections (in test), losses (in training)."""
        if not self.training:
            detections, losses = super().forward(features, proposals, image_shapes)
            for one in detections:  # torchvision would paste "masks" into whole pixels: see `paste`
                one["mask"] = one.pop("masks", None)
            return detections, losses
        boxes, matched, label_lists, offsets = self.select_training_samples(proposals, targets)
        maps, labels = self.regions(features, boxes), torch.cat(label_lists)
        objects = torch.where(labels > 0)[0]
        scores, deltas = self.box_predictor(maps.mean((2, 3)))
        deltas = deltas.view(len(labels), -1, 4)[objects, labels[objects]]
        offset_loss = F.l1_loss(deltas, torch.cat(offsets)[objects], reduction="sum") / len(labels)
        losses = {"loss_classifier": F.cross_entropy(scores, labels), "loss_box_reg": offset_loss}
        if self.mask_predictor is not None:
            shares = torch.cat([  # of a cell that the mask covers; torchvision's RoIAlign is off by half a pixel
                project_masks_on_boxes(target["masks"], box[label > 0] - 0.5, rows[label > 0], 14)
                for target, rows, box, label in zip(targets, matched, boxes, label_lists)])
            logits = self.mask_predictor(maps[objects])[torch.arange(len(objects)), labels[objects]]
            mask_loss = F.binary_cross_entropy_with_logits(logits, (shares >= 0.5).float(), reduction="sum")
            losses["loss_mask"] = mask_loss / max(1, shares.numel())  # the samples may contain no object
        return [], losses


def c4_detector(network, categories, masks=False, sides=(800,), long_side=1333, rois=512):
    """detectron2's Faster or Mask R-CNN C4 with MoCo's extra norm, of torchvision's parts and the layers of `network`
    (.github/RESULTS.md says what differs). categories: their number; sides, long_side: in pixels."""
    backbone = nn.Sequential(OrderedDict(list(network.named_children())[:-3]))  # without layer4, avgpool and fc
    shapes = [(side / ratio**0.5, side * ratio**0.5) for ratio in (0.5, 1, 2) for side in (32, 64, 128, 256, 512)]
    half, anchors = torch.tensor(shapes) / 2, AnchorGenerator()
    anchors.cell_anchors = [torch.cat([-half, half], 1)]  # torchvision's are rounded
    rpn = RegionProposals(anchors, RPNHead(network.layer4[0].conv1.in_channels, 15), fg_iou_thresh=0.7,
                          bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5, nms_thresh=0.7,
                          pre_nms_top_n=dict(training=12000, testing=6000),
                          post_nms_top_n=dict(training=2000, testing=1000))
    transform = GeneralizedRCNNTransform(sides, long_side, MEAN, STD, size_divisible=16)
    return GeneralizedRCNN(backbone, rpn, C4Heads(network.layer4, categories, masks, rois), transform)


class Detection(torch.utils.data.Dataset):
    """Training images (3, H, W) uint8 and their targets {boxes (n, 4), labels (n,) from 1, masks (n, H, W)} by keys
    (epoch, index), which alone decide the flip. kept (M,) bool: the objects to train on."""

    def __init__(self, labelled, kept, masks=False, limit=None, seed=0):
        self.labelled, self.kept, self.masks, self.seed = labelled, kept, masks, seed
        rows = zip(range(len(labelled.images))[:limit], labelled.offsets, labelled.offsets[1:])
        self.index = [i for i, start, end in rows if kept[start:end].any()]

    def __getitem__(self, key):
        split, i = self.labelled, self.index[key[1]]
        image, (start, end) = torch.from_numpy(split.read(i)).permute(2, 0, 1), split.offsets[i:i + 2]
        rows = start + np.flatnonzero(self.kept[start:end])
        target = dict(boxes=torch.tensor(split.boxes[rows]), labels=torch.tensor(split.labels[rows] + 1))
        if self.masks:
            target["masks"] = torch.from_numpy(masks_of(split, i, rows))
        if rng("flip", self.seed, key[0], i).random() < 0.5:
            image = image.flip(2)
            target["boxes"][:, [0, 2]] = image.shape[2] - target["boxes"][:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"].flip(2)
        return image, target


def masks_of(split, i, rows):
    """(n, H, W) uint8 masks of objects `rows` (n,) of image i; of one without a mask, or with an empty one, its box."""
    width, height = split.sizes[i]
    masks = np.zeros((len(rows), height, width), np.uint8)
    for mask, row in zip(masks, rows):
        annotated = split.mask(row)
        if annotated is not None and annotated.any():
            mask[:] = annotated
        else:
            x1, y1, x2, y2 = split.boxes[row].tolist()
            mask[int(y1):math.ceil(y2), int(x1):math.ceil(x2)] = 1
    return masks


def fine_tune(args):
    """--transfer: fine-tune a C4 detector, test it, print AP. Writes OUT/last.pt, from which the same command resumes,
    OUT/detector.pth, the tested weights, and OUT/results.json. Returns 0, or 128 + the signal that stopped it."""
    rank, world_size, local_rank, local_world_size = torchrun_ranks()
    is_main, workers = rank == 0, min(args.workers, max(1, usable_cores() // local_world_size))
    torch.set_float32_matmul_precision("high")
    network, arch = load_one(args)
    c, name = transfer_config(args, arch), re.sub(r"[^\w.]+", "-", args.ckpt[0].removeprefix("runs/"))
    out = Path(args.out or f"runs/{c.task}-{name}")
    lock = lock_folder(out) if is_main else None  # noqa: F841: held until the end
    if c.task == "coco":
        mask_coder()  # that it is missing shows now
    train, val = open_splits(c.task, c.root, strict=True)
    masks = c.task == "coco" and train.mask is not None
    trained = Detection(train, ~train.crowd | (c.task == "voc"), masks, c.limit_images, c.seed)  # with VOC's difficult
    if c.batch_size % world_size or c.batch_size > len(trained.index):
        raise UserError(f"--batch-size {c.batch_size}: choose a multiple of the {world_size} ranks, and at most the "
                        f"{len(trained.index):,} images with objects in {c.root}")
    tested = range(len(val.images))[:c.limit_images]

    # The checkpoint to resume from; the data may have moved.
    names = [train.images.names[i] for i in trained.index] + [name.encode() for name in train.categories]
    weights = [key.encode() + value.numpy().tobytes() for key, value in sorted(network.state_dict().items())]
    settings = {**asdict(c), "root": None, "ckpt": listing(weights), "masks": masks, "image_names": listing(names)}
    saved = load_checkpoint(out / "last.pt", settings, world_size)
    step = saved["step"] if saved else 0
    if not saved:  # what cannot be read shows now, not after a day of training
        used = [(train, i) for i in trained.index] + [(val, i) for i in tested]
        progress = Progress("check", len(used))
        for n, (split, i) in enumerate(used[rank::world_size], 1):
            split.read(i)
            progress.update(min(n * world_size, len(used)))
    device = connect(world_size, local_rank)
    agree(out, step=step, **settings)

    # Model and optimiser.
    torch.manual_seed(c.seed)
    model = c4_detector(network, len(train.categories), masks, c.sides, c.long_side, c.rois)
    model.to(device, memory_format=torch.channels_last)
    parallel_model = data_parallel(model, world_size)
    norms = {p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    optimizer = torch.optim.SGD([
        dict(params=[p for p in model.parameters() if p not in norms], weight_decay=c.weight_decay),
        dict(params=[p for p in model.parameters() if p in norms])], lr=c.lr, momentum=c.momentum)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    def batches(first, last):
        """(images, targets) of steps first to last. What the model samples is a function of (seed, step, rank)."""
        schedule = epoch_batches(len(trained.index), c.batch_size, c.seed, first, last, rank, world_size)
        for n, batch in enumerate(make_loader(trained, schedule, workers, collate=list), first):
            torch.manual_seed(int(rng("sampling", c.seed, n, rank).integers(2**63)))
            yield ([image.to(device).float() / 255 for image, _ in batch],  # of their own sizes
                   [{key: value.to(device) for key, value in target.items()} for _, target in batch])

    def save(name, **more):
        ensure_finite(model.parameters(), step, out)
        if is_main:
            save_checkpoint(out / name, {"config": settings, "world_size": world_size, "categories": train.categories,
                                         "step": step, "model": model.state_dict(), **more})

    # The loop.
    print(f"{c.arch}-C4 of {c.ckpt}, {'boxes and masks' if masks else 'boxes'} of {len(trained.index):,} images of "
          f"{c.root}, {world_size} x {device.type}, steps {step:,} to {c.steps:,}")
    signals, first, began = stop_on_signal(), step, time.perf_counter()
    parallel_model.train()
    for images, targets in batches(step, c.steps):
        for group in optimizer.param_groups:
            group["lr"] = c.rate(step)
        losses = parallel_model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0 or step == c.steps or (signals and world_size == 1):
            # The only collective of the loop beside the gradients': losses, and whether to stop.
            states = gather_objects(([loss.item() for loss in losses.values()], max(signals, default=0)))
            means, stop = np.mean([values for values, _ in states], 0), max(number for _, number in states)
            ensure_finite([torch.from_numpy(means)], step, out)
            rate = (step - first) * c.batch_size / (time.perf_counter() - began)
            parts = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in zip(losses, means))
            print(f"step {step:,}/{c.steps:,}  loss {means.sum():.3f}  {parts}  {rate:.1f} images/s  "
                  f"{duration((c.steps - step) * c.batch_size / rate)} left")
            if stop or step == c.steps or step == 20 or step % 500 == 0:
                save("last.pt", optimizer=optimizer.state_dict())
            if stop:
                print(f"stopped and saved {out}/last.pt: run the same command again to resume")
                gather_objects(step)  # torchrun ends all ranks after the first: none leaves before the save
                return 128 + stop

    # The test, with batch norm's statistics of the final weights. It has nothing to save if a signal comes.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    precise_batch_norm(model, batches(c.steps, c.steps + c.precise))
    save("detector.pth")
    detections, progress = [], Progress("test", len(tested))
    with torch.inference_mode():
        for i in tested[rank::world_size]:
            image = torch.from_numpy(val.read(i)).permute(2, 0, 1).to(device)
            output = model([image.float() / 255])[0]
            boxes, scores, labels = (output[key].cpu().numpy() for key in ("boxes", "scores", "labels"))
            rles = run_lengths(paste(output["mask"], output["boxes"], *image.shape[1:]).numpy()) if masks else []
            detections.append((i, boxes, labels - 1, scores, rles))
            progress.update(min(len(detections) * world_size, len(tested)))  # the other ranks are about as far
    detections = sorted(sum(gather_objects(detections), []), key=lambda one: one[0])
    if is_main:
        measure, kinds = voc_ap if c.task == "voc" else coco_ap, ["box", "mask"] if masks and val.mask else ["box"]
        results = {kind: measure(val, tested, detections, kind) for kind in kinds}
        for kind, result in results.items():
            print(f"{kind:4}", *(f"  {name} {value:.1f}" for name, value in result.items() if value is not None))
        results.update(asdict(c), images=len(trained.index), tested=len(tested), backbone=settings["ckpt"])
        write_json(out / "results.json", dict(results, world_size=world_size))
    return 0


def average_precision(table):
    """AP, AP50 and AP75 in percent of table (categories, COCO's ten thresholds); NaN: no object, None: none at all."""
    columns = dict(AP=table, AP50=table[:, 0], AP75=table[:, 5])
    return {name: None if np.isnan(some).all() else 100 * float(np.nanmean(some)) for name, some in columns.items()}


def voc_ap(labelled, index, detections, kind="box"):
    """VOC2007's 11-point AP as detectron2 computes it, without its rounding of scores and boxes: a detection is right
    if its IoU with the object that it overlaps most is over the threshold and no earlier one was right about that
    object; those of difficult objects do not count. index: the tested images of `labelled`; detections: of each (image,
    boxes (n, 4) in its pixels, labels (n,) from 0, scores (n,), masks in RLE). Returns {AP, AP50, AP75}, in percent."""
    ranked = defaultdict(list)  # of each label: (score, IoU with the object that it overlaps most, its row)
    for i, boxes, labels, scores, _ in detections:
        start, end = labelled.offsets[i:i + 2]
        pair = (torch.as_tensor(some).double() for some in (boxes, labelled.boxes[start:end]))
        iou = torchvision.ops.box_iou(*pair).numpy() * (labels[:, None] == labelled.labels[start:end])
        iou = np.pad(iou, ((0, 0), (0, 1)))  # a last column of zeros: no object
        for label, *one in zip(labels, scores, iou.max(1), start + iou.argmax(1)):
            ranked[label].append(one)
    rows = [row for i in index for row in range(*labelled.offsets[i:i + 2]) if not labelled.crowd[row]]
    objects = np.bincount(labelled.labels[rows], minlength=len(labelled.categories))
    table = np.full((len(objects), 10), math.nan)
    for label, t in np.argwhere(np.isnan(table) & (objects[:, None] > 0)):
        found, right = set(), []
        for _, overlap, row in sorted(ranked[label], key=lambda one: -one[0]):
            hit = overlap > (50 + 5 * t) / 100
            if not (hit and labelled.crowd[row]):
                right.append(hit and row not in found)
                found |= {row} if hit else set()
        hits = np.cumsum(right)
        recall, precision = hits / objects[label], hits / np.arange(1, len(hits) + 1)
        table[label, t] = np.mean([precision[recall >= r].max(initial=0.0) for r in np.arange(0, 1.1, 0.1)])
    return average_precision(table)


def paste(masks, boxes, height, width):
    """(n, H, W) bool on the CPU: masks (n, 1, 14, 14) stretched over their boxes (n, 4), interpolated at the centres of
    the image's pixels and cut at 0.5, as in detectron2."""
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool)
    columns, rows = (torch.arange(n, device=boxes.device) + 0.5 for n in (width, height))
    for one, mask, (x1, y1, x2, y2) in zip(pasted, masks, boxes):
        x, y = 2 * (columns - x1) / (x2 - x1) - 1, 2 * (rows - y1) / (y2 - y1) - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        one.copy_(F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0] >= 0.5)
    return pasted


def run_lengths(masks):
    """COCO's compressed RLE of each of the masks (n, H, W)."""
    return mask_coder().encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))


def coco_ap(labelled, index, detections, kind):
    """pycocotools' AP of `kind`, box or mask; arguments and result as voc_ap's. Its ground truth is made of our labels:
    a raw JSON may lack what pycocotools needs. An object without a mask gets its box, as in training."""
    from pycocotools import coco, cocoeval

    def as_coco(entries, key):
        """Of entries like `detections`, whose fourth value is pycocotools' `key`."""
        result, annotations = coco.COCO(), []
        for i, boxes, *columns in entries:
            for (x1, y1, x2, y2), label, value, mask in zip_longest(boxes.tolist(), *columns):
                annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": label, key: float(value),
                                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": 1, "segmentation": mask})
        result.dataset = dict(annotations=annotations, images=[dict(id=i, height=0, width=0) for i in index],
                              categories=[dict(id=label) for label in range(len(labelled.categories))])
        result.createIndex()
        return result

    truth = []
    for i in index:
        rows = np.arange(*labelled.offsets[i:i + 2])
        masks = run_lengths(masks_of(labelled, i, rows)) if kind == "mask" else []
        truth.append((i, labelled.boxes[rows], labelled.labels[rows], labelled.crowd[rows], masks))
    with redirect_stdout(io.StringIO()):  # pycocotools talks
        evaluation = cocoeval.COCOeval(as_coco(truth, "iscrowd"), as_coco(detections, "score"),
                                       "bbox" if kind == "box" else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1].mean(1).T  # (thresholds, recalls, categories, areas, most)
    return average_precision(np.where(precision < 0, math.nan, precision))


# -------------------------------------------------------------------------------------------------------- command line

def output_file(text):
    """The type of a flag that names a file to write. Raises argparse.ArgumentTypeError, before the work."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.exists() and not path.is_file():
            raise OSError(0, "it is not a file")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text} ({error.strerror}): name another file") from None
    return text


def add_checkpoint_arguments(parser):
    """What every script that asks checkpoints takes."""
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="ENTRY", help="rows of the table: FILE, FILE:teacher (its momentum "
        "encoder), FILE:PREFIX (one of several ResNets), NAME=GLOB, random (untrained), colour (no network)")
    add("--arch", choices=tuple(ARCHITECTURES.values()), help="of random (default: the first file's, else resnet50)")
    add("--statistics", choices=("saved", "clean"), default="saved", help="of batch norm; clean: from 256 train images")
    add("--roi", type=positive, help="side of RoIAlign on C4 (default: as trained; of files that do not tell, that of "
        "the first one that does, else scenes 6, photographs 14)")
    add("--data", choices=tuple(SIZE), default="scenes", help="labelled data set (default: scenes)")
    add("--root", help="the data set's folder (default: data/DATA)")
    add("--seed", type=whole_number, default=0, help="seed of random's weights and of what is drawn (default: 0)")
    add("--workers", type=whole_number, default=min(8, usable_cores()), help="loading processes (default: cores, <= 8)")
    add("--json", type=output_file, metavar="FILE", help="write settings, versions, rows, each file's numbers to FILE")


def parse_arguments(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add("--size", type=positive, help="side of the input, a multiple of 16 (default: scenes 112, voc 224, else 448)")
    add("--head", choices=("map", "roi"), help="object feature, see above (default: scenes roi, else map: section 5.3)")
    add("--k", type=positive, default=20, help="neighbours that vote (default: 20, as in DINO)")
    add("--objects", type=positive, default=3, help="N, objects per train image in the bank (section 5.3; default: 3)")
    add("--limit-images", type=positive, help="images of each split, its first ones (default: all)")
    add("--export", metavar="FILE", help="write the backbone, for detectron2 (*.pkl) or torchvision (else), and exit")
    add = parser.add_argument_group("with --transfer").add_argument
    add("--transfer", choices=tuple(RECIPES), help="fine-tune a C4 detector on the checkpoint, test it (Tables 1, 3)")
    add("--out", help="folder for last.pt, detector.pth, results.json (default: runs/TASK-CKPT)")
    add("--batch-size", type=positive, default=Transfer.batch_size, help="of all ranks together (default: 16, MoCo's)")
    add("--steps", type=positive, help="length of the schedule; drops and warm-up stay in proportion (default: MoCo's)")
    add("--short-side", type=positive, help="of training and test (default: MoCo's 480-800, coco 640-800; test 800)")
    add("--lr", type=float, default=Transfer.lr, help="learning rate for 16 images (default: 0.02, MoCo's)")
    add("--rois", type=positive, default=Transfer.rois, help="boxes per image that train the RoI head (default: 512)")
    args = parser.parse_args(arguments)
    args.size = args.size or SIZE[args.data]
    args.head = args.head or ("roi" if args.data == "scenes" else "map")
    if args.size % 16:
        raise UserError(f"--size {args.size}: a multiple of 16, so that C4's cells are 16 pixels")
    return args


def main():
    args = parse_arguments()
    if args.transfer:
        return fine_tune(args)
    if args.export:
        network, arch = load_one(args)
        if Path(args.export).name == "last.pt":
            raise UserError(f"--export {args.export} would replace a run's checkpoint: name another file")
        reader = export(network, args.export)
        return print(f"wrote {args.export}: {arch} of {args.ckpt[0]} for {reader}")
    rows = open_rows(args)
    train, val = open_splits(args.data, args.root)
    bank = Objects(train, args.size, args.objects, args.limit_images, args.seed)
    queries = Objects(val, args.size, None, args.limit_images, args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")

    def measure(source):
        model = median_colours
        if source.path != "colour":
            clean = partial(clean_batches, train.images, args.size, args.seed, device)
            model = ObjectFeatures(load_source(source, args.head, clean, device), args.head, source.bins)
        points = evaluate(model, bank, queries, args.k, args.workers, device)
        measured = over_images(points.numpy(), queries.image)
        knn, disturbed = measured["oknn_top1"].value, measured["disturbed_top1"].value
        print(f"{source.name}: O-KNN top-1 {knn:.1f}, disturbed {disturbed:.1f}")  # the table comes after the last one
        return measured

    stored, asked = train.labels[bank.index], val.labels[queries.index]
    commonest = np.bincount(stored).argmax()
    chance = 100 * (asked == commonest).mean().item()
    results, files = measure_rows(rows, measure)
    print_table(MEASURES.values(), results, MEASURES, 1, f"{len(queries)} images")
    print(f"bank: {len(stored):,} objects; queries: {len(asked):,}; k {args.k}, {args.size} pixels, head "
          f"{args.head}; always answering the commonest category, {train.categories[commonest]}: {chance:.1f} %")
    names = ("data", "size", "head", "k", "objects", "limit_images", "seed", "statistics")
    settings = dict({name: getattr(args, name) for name in names}, root=str(train.images.root),
                    bank_objects=len(stored), query_objects=len(asked), commonest=chance)
    write_results(args.json, settings, results, files)


if __name__ == "__main__":
    error_exit(main)
