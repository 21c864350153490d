"""Any ResNet checkpoint's object features: O-KNN and disturbed O-KNN (the paper's section 5.3, Table 4); export.

    python evaluate.py --ckpt runs/scenes/last.pt random --arch resnet18         ours beside the untrained network
    python evaluate.py --ckpt A.pth.tar B.pth --data coco --root data/coco       anybody's, a row each
    python evaluate.py --ckpt A.pth.tar --export detectron2 A.pkl                for detectron2; torchvision: a state dict

O-KNN: an object's feature is RoIAlign 7x7 on the C5 map of the whole image, averaged over the 49 bins. The bank holds
--objects objects of each train image, distinct categories first; every object of the val split is a query, and its k
nearest in the bank vote for their categories with weight exp(cos / 0.07). Disturbed: all that lies outside the boxes of
these objects is replaced by another image of the split, in bank and queries.

Images are RGB with ImageNet's mean and deviation, as all these releases expect (detectron2's own MSRA networks, which
want BGR, are not among them).
"""
import argparse
import json
import os
import pickle
import re
import zipfile
from collections import defaultdict

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from augment import COLOURS, normalise, to_float
from d3ssl import positive, roi_align
from data import Parser, Progress, UserError, atomic, error_exit, make_loader, open_labelled, resize, rng

SIZE = {"scenes": 224, "coco": 448}  # side of the input in pixels; not in the paper
TEMPERATURE = 0.07                   # of a vote; not in the paper: instance discrimination's and DINO's
BATCH = 32


# ------------------------------------------------------------------------------------------------ any ResNet checkpoint

# Bottlenecks or not, and the blocks of each stage.
ARCHITECTURES = {(False, 2, 2, 2, 2): "resnet18", (False, 3, 4, 6, 3): "resnet34", (True, 3, 4, 6, 3): "resnet50",
                 (True, 3, 4, 23, 3): "resnet101", (True, 3, 8, 36, 3): "resnet152"}
MOMENTUM = re.compile(r"_k(?![a-z])|teacher|target|momentum|(?<![a-z])ema(?![a-z])", re.IGNORECASE)


def load_backbone(path, arch=None, teacher=False, prefix=None, trust_pickle=False, seed=0):
    """The ResNet in a checkpoint, by one rule for all: among the prefixes under which a ResNet's four stages lie, those of
    momentum encoders (_k, teacher, target, momentum, ema) are dropped, and one must be left.

    Args: path: a file, or "random": the untrained `arch` (default resnet50), seeded; teacher: take the momentum encoder,
    not the other; prefix: settles which; trust_pickle: open pickles, which can run code.
    Returns torchvision's ResNet with fc = Identity in eval mode, and its architecture's name. Raises UserError if there
    is no such file, if it is no checkpoint, holds no ResNet or several, or if one of its weights does not fit."""
    if path == "random":
        return build(arch or "resnet50", seed).eval(), arch or "resnet50"
    found = backbones(dict(flatten(read_checkpoint(path, trust_pickle))))
    if not found:
        raise UserError(f"--ckpt {path} holds no ResNet: no layer1 to layer4 (or detectron2's res2 to res5) under one prefix")
    prefix, weights = choose(path, found, teacher, prefix)
    blocks = [1 + max(int(key.split(".")[1]) for key in weights if key.startswith(f"layer{i}.")) for i in (1, 2, 3, 4)]
    arch = ARCHITECTURES.get((any(".conv3." in key for key in weights), *blocks))
    if arch is None:
        raise UserError(f"--ckpt {path}: stages of {blocks} blocks under {prefix!r} are not {', '.join(ARCHITECTURES.values())}")
    network = build(arch, seed)
    fill(network, weights, f"--ckpt {path}", prefix, arch)
    return network.eval(), arch


def build(arch, seed):
    """torchvision's `arch` without its classifier; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torchvision.models.get_model(arch, weights=None)
    network.fc = nn.Identity()
    return network


def read_checkpoint(path, trust_pickle=False):
    """What a checkpoint file holds, on the CPU. Raises UserError, also for a pickle without `trust_pickle`."""
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"--ckpt {path}: {error.strerror}; name a checkpoint file, or random") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # SoCo, PixPro and DINO save their options
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many classes on a file that is cut or is something else
        reason = type(error).__name__
    if zipfile.is_zipfile(path) or start[:1] == b"\x80":  # a pickle of Python objects, or with some in it
        if not trust_pickle:
            raise UserError(f"--ckpt {path} is a pickle of more than tensors, which can run any code: if you trust whoever "
                            "made it, add --trust-pickle")
        for read in (lambda file: torch.load(file, map_location="cpu", weights_only=False),
                     lambda file: pickle.load(file, encoding="latin1")):
            try:
                with open(path, "rb") as file:
                    return read(file)
            except Exception as error:  # whatever its classes' constructors raise
                reason = type(error).__name__
    raise UserError(f"--ckpt {path} is not a checkpoint, or cut short ({reason}): name what torch.save or detectron2 wrote")


def flatten(tree, prefix=""):
    """(name, tensor) of every array in nested dictionaries and modules, names joined by dots, in torchvision's words."""
    tree = tree.state_dict() if isinstance(tree, nn.Module) else tree
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (torch.Tensor, np.ndarray)):
        yield from_detectron2(prefix), torch.as_tensor(tree)


def from_detectron2(name):
    """res2.0.conv1.norm.weight -> layer1.0.bn1.weight and so on; torchvision's names stay as they are."""
    name = re.sub(r"(^|\.)stem\.(?=conv1\.)", r"\1", name)
    name = re.sub(r"(^|\.)res([2-5])\.(?=\d)", lambda m: f"{m[1]}layer{int(m[2]) - 1}.", name)
    name = re.sub(r"\bconv(\d)\.norm\.", r"bn\1.", name)
    return name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")


def to_detectron2(name):
    """layer1.0.bn1.weight -> res2.0.conv1.norm.weight, as MoCo's and detectron2's own converters name them."""
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name) if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def backbones(weights):
    """{prefix: {torchvision's name: tensor}} for each prefix under which all four stages of a ResNet lie."""
    stages = defaultdict(set)
    for key in weights:
        match = re.fullmatch(r"(.*?\.)?layer([1-4])\.\d+\.(?:conv\d|bn\d|downsample)\..*", key)
        if match:
            stages[match[1] or ""].add(match[2])
    return {prefix: {key[len(prefix):]: value for key, value in weights.items()
                     if key.startswith(prefix) and re.match(r"(conv1|bn1|layer\d+)\.", key[len(prefix):])}
            for prefix, present in stages.items() if len(present) == 4}


def choose(path, found, teacher, prefix):
    """The one (prefix, weights) of `found` that is asked for. Raises UserError if there is none or more than one."""
    listing = ", ".join(name or "''" for name in found)
    if prefix is not None:
        wanted = prefix and prefix.rstrip(".") + "."
        left = {name: w for name, w in found.items() if name == wanted or (wanted and name.endswith("." + wanted))}
        if len(left) != 1:
            raise UserError(f"--prefix {prefix} is {len(left) or 'none'} of the ResNets in {path}: name one of {listing}")
        return left.popitem()
    left = {}
    for name, weights in found.items():
        if bool(MOMENTUM.search(name)) == teacher and not any(same(weights, other) for other in left.values()):
            left[name] = weights  # OpenSelfSup saves its backbone under two names: equal weights count once
    if not left:
        kind, cure = ("no momentum encoder", "leave out --teacher") if teacher else ("only momentum encoders", "add --teacher")
        raise UserError(f"--ckpt {path} holds {kind} ({listing}): {cure}, or name one with --prefix")
    if len(left) > 1:
        raise UserError(f"--ckpt {path} holds {len(left)} ResNets: name one with --prefix, of {', '.join(left)}")
    return left.popitem()


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def fill(network, weights, where, prefix, arch):
    """Copy `weights` into `network`: all must be there, fit and be finite, none be left over; num_batches_tracked aside."""
    own = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    for key, value in own.items():
        if key not in weights:
            raise UserError(f"{where} lacks {prefix}{key}, which a {arch} has: the file is not whole, or of another network")
        if weights[key].shape != value.shape:
            raise UserError(f"{where}: {prefix}{key} is {tuple(weights[key].shape)}, a {arch} has {tuple(value.shape)}")
        if not weights[key].isfinite().all():
            raise UserError(f"{where}: {prefix}{key} is not finite: the run diverged, take an earlier checkpoint")
        value.copy_(weights[key])
    for key in weights:
        if key not in own and not key.endswith("num_batches_tracked"):
            raise UserError(f"{where}: {prefix}{key} has no place in torchvision's {arch}: another variant of ResNet")


def export(network, kind, path):
    """Write the backbone as others load it: detectron2: MODEL.WEIGHTS, with INPUT.FORMAT RGB and ImageNet's mean and
    deviation in pixels (MoCo's configs); torchvision: a state dict without fc, load_state_dict(..., strict=False)."""
    weights = network.state_dict()
    named = {to_detectron2(key): value.numpy() for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    with atomic(path) as file:
        if kind == "torchvision":
            torch.save(weights, file)
        else:
            pickle.dump({"model": named, "__author__": "D3SSL", "matching_heuristics": True}, file)


# -------------------------------------------------------------------------------------------------- objects of a split

def select_objects(labels, crowd, number=None):
    """Rows of `number` of an image's objects (None: all), without crowds, distinct categories first: the first object of
    each category in the order of the annotations, then the second of each, and so on."""
    rows, seen, rank = np.flatnonzero(~crowd), defaultdict(int), []
    for label in labels[rows].tolist():
        rank.append(seen[label])
        seen[label] += 1
    return np.sort(rows[np.argsort(rank, kind="stable")][:number])


class Objects(torch.utils.data.Dataset):
    """The images of a split that have objects, with the selected ones.

    Item -> picture, disturbed (size, size, 3) uint8 RGB; boxes (K, 4) float32 in their pixels and labels (K,) int64,
    padded with zeros and -1 to the same K for all (labels of an unreadable image are all -1). `disturbed` is the
    picture where an object's box touches a pixel, else another image of the split, drawn by (seed, index of the image).

    Args: labelled: data.Labelled; size: pixels; number: objects an image, None: all; limit: only the first so many images.
    Raises UserError if there is no object, or no other image to disturb with."""

    def __init__(self, labelled, size, number=None, limit=None, seed=0):
        self.labelled, self.size, self.seed = labelled, size, seed
        self.n = min(len(labelled.images), limit or len(labelled.images))
        spans = [slice(*labelled.offsets[i:i + 2]) for i in range(self.n)]
        self.rows = [s.start + select_objects(labelled.labels[s], labelled.crowd[s], number) for s in spans]
        self.filled = [i for i in range(self.n) if len(self.rows[i])]
        self.count = sum(len(rows) for rows in self.rows)
        if not self.filled:
            raise UserError(f"{labelled.images.root} has no boxes in its first {self.n:,} images: raise --limit-images")
        if self.n < 2:
            raise UserError(f"{labelled.images.root}: disturbed O-KNN needs a second image, raise --limit-images or add one")
        self.k = max(map(len, self.rows))

    def __len__(self):
        return len(self.filled)

    def __getitem__(self, j):
        i, side = self.filled[j], self.size
        rows, images = self.rows[i], self.labelled.images
        boxes, labels, nothing = np.zeros((self.k, 4), np.float32), np.full(self.k, -1), np.zeros((side, side, 3), np.uint8)
        try:
            image, background = images.read(i), self.background(i)
        except OSError:
            print(f"left out, cannot be read: {images.name(i)}", flush=True)
            return nothing, nothing, boxes, labels
        picture, disturbed = resize(image, side, side), resize(background, side, side)
        boxes[:len(rows)] = self.labelled.boxes[rows] * np.float32([side / image.shape[1], side / image.shape[0]] * 2)
        labels[:len(rows)] = self.labelled.labels[rows]
        for x1, y1, x2, y2 in np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], 1).astype(int):
            disturbed[y1:y2, x1:x2] = picture[y1:y2, x1:x2]
        return picture, disturbed, boxes, labels

    def background(self, i):
        """Another image than i, by (seed, i); the next one if it cannot be read. Raises OSError if none can be."""
        first = int(rng(self.seed, i).integers(self.n - 1))
        for step in range(self.n - 1):
            try:
                return self.labelled.images.read((i + 1 + (first + step) % (self.n - 1)) % self.n)
            except OSError:
                continue  # it is named when its own turn comes
        raise OSError("no background")

    def batches(self):
        return [list(range(j, min(j + BATCH, len(self)))) for j in range(0, len(self), BATCH)]


# ---------------------------------------------------------------------------------------------------- object features

def c5(network):
    """The C5 map of torchvision's ResNet, as a function: images (B, 3, H, W) -> (B, 2048, H/32, W/32) at ResNet-50."""
    extractor = create_feature_extractor(network, {"layer4": "c5"})
    return lambda images: extractor(images)["c5"]


def object_features(maps, boxes, scale):
    """Section 5.3: (B * K, C), L2-normalised: RoIAlign 7x7 with 2x2 samples a bin, averaged over the bins, of the maps
    (B, C, h, w) at boxes (B, K, 4) in pixels of the image; scale: map cells a pixel."""
    mean = roi_align(maps.float(), boxes, 1, scale, ratio=14)  # the mean of 7x7 bins is one bin with their 14x14 samples
    return F.normalize(mean.flatten(1), dim=1)


@torch.inference_mode()
def extract(network, objects, what="objects", workers=0, device="cpu"):
    """The features of all objects, clean and disturbed, in half precision on the CPU, and their labels (M,).

    Args: network: normalised images (B, 3, H, W) -> a map (B, C, h, w), on `device`; objects: Objects.
    Returns features (2, M, C) float16: [0] clean, [1] disturbed, and labels (M,) int64. Images stream: memory is that of the
    features, 2 * M * C * 2 bytes (7 GB for COCO's 860,000 boxes at C = 2,048), and some batches. Raises UserError if
    a feature is not finite."""
    features, labels, filled, done, progress = None, [], 0, 0, Progress(what, len(objects))
    for *pictures, boxes, marks in make_loader(objects, objects.batches(), workers):
        some = max(1, int((marks >= 0).sum(1).max()))
        marks, boxes = marks[:, :some].flatten(), boxes[:, :some].to(device)
        kept = marks >= 0
        for which, pixels in enumerate(pictures):
            images = normalise(to_float(pixels.to(device)))
            maps = network(images)
            rows = object_features(maps, boxes, maps.shape[-1] / images.shape[-1]).half().cpu()[kept]
            if features is None:
                features = torch.empty(2, objects.count, rows.shape[1], dtype=torch.float16)
            if not rows.isfinite().all():
                raise UserError("the network's features are not finite on these images: is it a diverged checkpoint?")
            features[which, filled:filled + len(rows)] = rows
        filled, done = filled + len(rows), done + len(pixels)
        labels.append(marks[kept])
        progress.update(done)
    if not filled:
        raise UserError(f"none of the {len(objects):,} images in {objects.labelled.images.root} can be read")
    return features[:, :filled], torch.cat(labels)


# --------------------------------------------------------------------------------------------------------------- O-KNN

@torch.inference_mode()
def nearest(queries, bank, k, device="cpu", rows=4096, columns=16384, slack=12):
    """The k nearest of bank (M, D) for each query (Q, D), both float16 and L2-normalised, by cosine; ties to the lower index.

    Chunks of the product Q x M in float32 on `device` (half precision times half precision is exact in TF32) keep a running
    k + slack, which are scored again in float64, so that rounding decides nothing; queries with more near-ties than the
    slack go again with a larger one (up to 6,144). Beyond the features it takes rows * columns * 4 bytes a few times (0.3 GB
    each) and 0.15 GB for the scoring at D = 2,048, whatever Q and M.

    Returns cosines (Q, k) float64, descending, and indices (Q, k). Raises UserError if k > M."""
    if k > len(bank):
        raise UserError(f"--k {k} is larger than the bank of {len(bank):,} objects: lower --k, or take more images")
    keep, found, close = min(k + slack, len(bank)), [], []
    for some in queries.split(rows):
        some = some.to(device).float()
        best, index = some.new_empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.long, device=device)
        for start in range(0, len(bank), columns):
            similarity = some @ bank[start:start + columns].to(device).float().T
            value, place = similarity.topk(min(keep, similarity.shape[1]), 1)
            best, order = torch.cat([best, value], 1).sort(1, descending=True)
            best, index = best[:, :keep], torch.cat([index, place + start], 1).gather(1, order)[:, :keep]
        found.append(index.cpu())
        close.append((best[:, -1] > best[:, k - 1] - 4e-6).cpu())
    index, close, chunk = torch.cat(found).sort(1).values, torch.cat(close), max(1, 8192 // keep)
    parts = zip(queries.split(chunk), index.split(chunk))
    exact = torch.cat([(some.double()[:, None] * bank[i].double()).sum(2) for some, i in parts])
    exact, order = exact.sort(dim=1, descending=True, stable=True)
    exact, index = exact[:, :k].contiguous(), index.gather(1, order)[:, :k]
    if keep < len(bank) and slack < 6000 and close.any():
        exact[close], index[close] = nearest(queries[close], bank, k, device, rows, columns, 8 * slack)
    return exact, index


def vote(cosines, labels, categories):
    """The first five categories (Q, 5) for neighbours' cosines and labels (Q, k): summed weights exp(cos / 0.07), ties to the
    lower category; -1 where fewer have a vote."""
    votes = torch.zeros(len(labels), max(categories, 5), dtype=torch.float64)
    votes.scatter_add_(1, labels, (cosines / TEMPERATURE).exp())
    votes, order = votes.sort(dim=1, descending=True, stable=True)
    return torch.where(votes > 0, order, -1)[:, :5]


def o_knn(queries, query_labels, bank, bank_labels, categories, k=20, device="cpu"):
    """Whether each query's category is the first, and among the first five, of its k-NN prediction: (Q, 2) bool.
    Features (Q, D) and (M, D) float16, labels int64, `categories`: their number. Raises UserError if k > M."""
    cosines, index = nearest(queries, bank, k, device)
    hits = vote(cosines, bank_labels[index], categories) == query_labels[:, None]
    return torch.stack([hits[:, 0], hits.any(1)], 1)


def evaluate(network, bank, queries, k=20, workers=0, device="cpu"):
    """Section 5.3 for one network (images -> map): hits (4, Q) bool of O-KNN's top-1 and top-5 and disturbed O-KNN's, the
    queries' labels (Q,) and the number of objects in the bank."""
    stored, stored_labels = extract(network, bank, "bank", workers, device)
    asked, labels = extract(network, queries, "queries", workers, device)
    categories = len(bank.labelled.categories)
    hits = [o_knn(asked[i], labels, stored[i], stored_labels, categories, k, device).T for i in (0, 1)]
    return torch.cat(hits), labels, len(stored_labels)


# -------------------------------------------------------------------------------------------------------- command line

def picture(objects, columns=6, tile=224):
    """A PIL picture of what is evaluated: images on top, below them disturbed, with the selected boxes."""
    columns, gap, head = min(columns, len(objects)), 4, 18
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, 2 * (tile + gap + head)), "#303030")
    draw = ImageDraw.Draw(sheet)
    for c in range(columns):
        *pictures, boxes, labels = objects[c]
        for r, (title, pixels) in enumerate(zip(("as it is", "disturbed: another image outside the boxes"), pictures)):
            left, top = gap + c * (tile + gap), head + r * (tile + gap + head)
            sheet.paste(Image.fromarray(cv2.resize(pixels, (tile, tile), interpolation=cv2.INTER_AREA)), (left, top))
            if c == 0:
                draw.text((left + 2, top - head + 3), title, fill="white")
            for number, (box, label) in enumerate(zip(boxes * tile / objects.size, labels.tolist())):
                if label >= 0:
                    x1, y1, x2, y2 = (box + (left, top) * 2).tolist()
                    ink = COLOURS[number % len(COLOURS)]
                    draw.rectangle([x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)], outline=ink, width=2)
                    draw.text((x1 + 4, min(y1 + 2, top + tile - 14)), objects.labelled.categories[label], fill="white",
                              stroke_width=1, stroke_fill="black")
    return sheet


def save(what, path):
    """Write a PIL picture as a PNG, anything else as JSON."""
    with atomic(path, "wb" if isinstance(what, Image.Image) else "w") as file:
        what.save(file, "PNG") if isinstance(what, Image.Image) else json.dump(what, file, indent=1)
    print(f"wrote {path}")


def add_checkpoint_arguments(parser):
    """What every script that asks checkpoints takes."""
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="checkpoints of ResNets, a row each; random: untrained")
    add("--arch", choices=tuple(ARCHITECTURES.values()), default="resnet50", help="of random; others have it in their shapes")
    add("--teacher", action="store_true", help="the momentum encoder of each checkpoint, not the other one")
    add("--prefix", help="which of several ResNets in a file, if that is not clear")
    add("--trust-pickle", action="store_true", help="open pickles (detectron2's), which can run code")
    add("--data", choices=tuple(SIZE), default="scenes")
    add("--root", help="the data set's folder (default data/DATA)")
    add("--seed", type=int, default=0, help="of random's weights and of what is drawn")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loading processes; changes nothing but speed")
    add("--json", help="write the results there")
    add("--picture", help="write a PNG of the inputs there")


def load_from(args, path):
    """load_backbone of one --ckpt, by the arguments above."""
    return load_backbone(path, args.arch, args.teacher, args.prefix, args.trust_pickle, args.seed)


def parse_arguments(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add("--size", type=positive, help="side of the input in pixels, a multiple of 32 (default: scenes 224, coco 448)")
    add("--k", type=positive, default=20, help="neighbours that vote")
    add("--objects", type=positive, default=3, help="N, objects of a train image in the bank")
    add("--limit-images", type=positive, help="only the first so many images of each split")
    add("--per-category", action="store_true", help="print the top-1 accuracy of each category too")
    add("--export", nargs=2, metavar=("FORMAT", "FILE"), help="detectron2 or torchvision: write the backbone and stop")
    args = parser.parse_args(arguments)
    args.size = args.size or SIZE[args.data]
    if args.size % 32:
        raise UserError(f"--size {args.size}: a multiple of 32, so that C5's cells are 32 pixels")
    if args.export and (args.export[0] not in ("detectron2", "torchvision") or len(args.ckpt) > 1):
        raise UserError("--export FORMAT FILE: the format is detectron2 or torchvision, and --ckpt names one checkpoint")
    return args


def print_categories(categories, hits, labels):
    """Top-1 of each category that has queries, clean and disturbed."""
    width = max(len(name) for name in categories)
    print(f"{'category':{width}}  queries  O-KNN  disturbed")
    for label in labels.unique().tolist():
        of = labels == label
        clean, disturbed = (100 * hits[i, of].double().mean() for i in (0, 2))
        print(f"{categories[label]:{width}}  {int(of.sum()):7,}  {clean:5.1f}  {disturbed:9.1f}")


def main():
    args = parse_arguments()
    networks = [(path, *load_from(args, path)) for path in args.ckpt]  # mistakes show before minutes have passed
    if args.export:
        export(networks[0][1], *args.export)
        return print(f"wrote {args.export[1]}: {networks[0][2]} of {args.ckpt[0]} for {args.export[0]}")
    bank = Objects(open_labelled(args.data, args.root, "train"), args.size, args.objects, args.limit_images, args.seed)
    queries = Objects(open_labelled(args.data, args.root, "val"), args.size, None, args.limit_images, args.seed)
    if args.k > bank.count:
        raise UserError(f"--k {args.k} is larger than the bank of {bank.count:,} objects: lower --k, or take more images")
    if args.picture:
        save(picture(queries), args.picture)
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", []
    torch.set_float32_matmul_precision("high")
    for path, network, arch in networks:
        hits, labels, stored = evaluate(c5(network.to(device)), bank, queries, args.k, args.workers, device)
        names = ("oknn_top1", "oknn_top5", "disturbed_top1", "disturbed_top5")
        percent = (100 * hits.double().mean(1)).tolist()
        rows.append(dict(ckpt=path, arch=arch, **dict(zip(names, percent)), bank=stored, queries=len(labels)))
        if args.per_category:
            print(f"\n{path}")
            print_categories(bank.labelled.categories, hits, labels)
    width = max(len("checkpoint"), *(len(row["ckpt"]) for row in rows))
    print(f"\n{'checkpoint':{width}}  arch       O-KNN top-1  top-5   disturbed top-1  top-5")
    for row in rows:
        print(f"{row['ckpt']:{width}}  {row['arch']:9}  {row['oknn_top1']:11.1f}  {row['oknn_top5']:5.1f}   "
              f"{row['disturbed_top1']:15.1f}  {row['disturbed_top5']:5.1f}")
    print(f"bank: {rows[0]['bank']:,} objects of {len(bank):,} images, queries: {rows[0]['queries']:,} of {len(queries):,}; "
          f"k {args.k}, {args.size} x {args.size} pixels")
    if args.json:
        save(rows, args.json)


if __name__ == "__main__":
    error_exit(main)
