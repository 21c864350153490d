"""Images, labelled boxes, proposals on disk; the loaders; the dataset builders.

    python data.py scenes --out DIR --n 800                      the embedded data set as files, in COCO's layout
    python data.py proposals --data coco --root data/coco        selective search, parallel and resumable
    python data.py openimages-mini --annotations DIR --coco instances_train2017.json --out openimages-mini.txt

Proposals on disk are a folder that any other source of boxes can write as well:
    names.txt      one image per line, relative to the folder of images, UTF-8
    offsets.npy    (N + 1,) int64: image i owns rows offsets[i] to offsets[i + 1] of boxes.npy
    boxes.npy      (M, 4) float32, xyxy in pixels of the image as a viewer shows it, x2 and y2 exclusive
    sizes.npy      optional: (N, 2) int32, width and height of each image when its boxes were made
    settings.json  {"method": NAME}, needed; boxes of another method than ours are used as they are

Boxes are (K, 4) float32 xyxy in pixels, x2/y2 exclusive, here as everywhere in this project. The randomness of a
sample is a function of (seed, epoch, image index), so it does not depend on workers, ranks or an interruption.
"""
import argparse
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

cv2.setNumThreads(1)  # processes are our parallelism, and OpenCV's own threads do not survive a fork
multiprocessing.set_forkserver_preload(["cv2", "torch"])  # Python 3.14's way: loaded once, not by every process

# What OpenCV reads.
SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .bmp .dib .webp .avif .tif .tiff .gif .jp2 .j2k .ppm .pgm .pbm .pnm".split())
FIRST_RANK = (os.environ.get("LOCAL_RANK") or "0") == "0"  # of torchrun's on this machine; or the only process


# ------------------------------------------------------------------------------------------- errors, files, progress

class UserError(Exception):
    """Invalid input. The message is one line that names the thing and the cure."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, exit code 2, no usage text."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def whole_number(text, least=0):
    """The type of a flag that counts. Raises argparse.ArgumentTypeError for anything else, and below `least`."""
    if not text.isdecimal() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to 2^63 - 1")
    return int(text)


positive = partial(whole_number, least=1)


def error_exit(main):
    """Run a command line, whose main returns an exit code or None, and exit. A UserError becomes one line and exit code
    2, as does a loader's death; Ctrl-C, 130. Of several ranks each just ends its process; one per machine prints."""
    if not FIRST_RANK:
        sys.stdout = open(os.devnull, "w")
    with suppress(AttributeError):  # of another object in the place of stdout
        # A path that is not UTF-8 must not end what prints it; a log shows each line at once.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        code = main() or 0
    except (KeyboardInterrupt, UserError, RuntimeError, OSError, EOFError) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 2
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for what is killed here
        for process in multiprocessing.active_children():  # the loaders', which torch would wait for
            process.kill()
        if code == 130:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            message = "interrupted: run the same command again to resume"
        elif isinstance(error, UserError):  # one from a loading process comes with its traceback and a line break
            message = str(error).rpartition("UserError: ")[2].strip().replace("\n", " ")
        elif isinstance(error, torch.OutOfMemoryError):
            message = "a batch does not fit the GPU's memory: lower --batch-size (O-KNN: --size), or use more GPUs"
        elif isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print must not raise again
            message = "the output was closed, as `| head` does"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # as the log is written; else see `atomic`
            message = "the disk is full: make room, and run the same command again to resume"
        elif re.match(r"Connection|EOF|.*(\(shm\)|Bus error|DataLoader worker \(pid)", repr(error), re.S):
            message = ("a loading process died: is memory or /dev/shm short (docker run --shm-size 8g)? To resume, run "
                       "the same command again, with fewer --workers if it happens again")
        else:
            raise
        if (os.environ.get("RANK") or "0") != "0":  # every rank fails alike: let the first one speak
            time.sleep(2)
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    if (os.environ.get("WORLD_SIZE") or "1") != "1":  # a normal exit may hang: on other ranks, in gloo (torch 2.6)
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def atomic(path, mode="wb"):
    """Open a file that appears at `path` complete or not at all. Raises UserError if it cannot be written."""
    path = Path(path)
    tmp = path.parent / f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", str(error)):
            raise
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or 'is the disk full?'}") from None
    finally:
        with suppress(OSError):
            tmp.unlink()


def duration(seconds):
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Prints 'what: done/total images, rate, time, time left' every ten seconds and at the end. begun: done before."""

    def __init__(self, what, total, begun=0):
        self.what, self.total, self.begun, self.start, self.shown = what, total, begun, time.monotonic(), 0

    def update(self, done):
        seconds, last = max(time.monotonic() - self.start, 1e-9), done >= self.total
        if last and self.shown < math.inf or seconds - self.shown > 10:
            self.shown, rate = math.inf if last else seconds, max(done - self.begun, 1) / seconds
            print(f"{self.what}: {done:,}/{self.total:,} images, {rate:,.1f} images/s, {duration(seconds)}, "
                  f"{duration((self.total - done) / rate)} left", flush=True)


class Faults(dict):
    """What is left out of the file `path`: {kind: [count, first place]}. strict: what is absent is a UserError."""

    def __init__(self, path, strict=False):
        self.path, self.strict = path, strict

    def add(self, kind, place, absent=False):
        if absent and self.strict:
            raise UserError(f"{self.path}: {kind}: {place}: tables are of all images, download it again")
        self.setdefault(kind, [0, place])[0] += 1

    def report(self, valid, what="valid box"):
        """One line per kind. Raises UserError if nothing `valid` is left."""
        for kind, (count, first) in self.items() if FIRST_RANK else ():
            print(f"left out, {kind}: {count:,} in {self.path}, the first: {first}", file=sys.stderr)
        if not valid:
            raise UserError(f"{self.path} contains no {what}: {', '.join(self) or 'it is empty'}")


def usable_cores():
    """The cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rng(use, *key):
    """A numpy generator by `use`, a name of what is drawn (numpy takes keys 0 and (0, 0) for the same), and `key`."""
    return np.random.default_rng((zlib.crc32(use.encode()), *key))


# -------------------------------------------------------------------------------------------------------------- images

def read_image(path):
    """(H, W, 3) uint8 RGB as a viewer shows the file: EXIF rotation applied; grey, CMYK and 16-bit converted; without
    transparency. Raises OSError if it cannot be read, or its numbers are floats, whose black and white nobody knows."""
    if not os.path.isfile(path):  # a pipe would wait for ever
        raise OSError(f"{path} is not a file")
    content, image, rgb = np.fromfile(path, np.uint8), None, cv2.IMREAD_COLOR_RGB  # not in older OpenCVs
    with suppress(cv2.error, AttributeError):  # no bytes, a size that OpenCV refuses; a damaged TIFF is None
        tiff = content[:4].tobytes() in (b"II*\0", b"MM\0*")
        if not tiff or cv2.imdecode(content, cv2.IMREAD_UNCHANGED).dtype in (np.uint8, np.uint16):
            image = cv2.imdecode(content, rgb)
    if image is None:
        raise OSError(f"{path} is no image that OpenCV reads, or one of floats: convert it to 8 bits")
    return image


class Images:
    """Image files under `root`, in the order of `names` ((N,) array of bytes, one flat buffer: a list would be copied
    page by page into every worker)."""

    version = None  # of pictures that are rendered; with another one proposals are computed again

    def __init__(self, root, names):
        self.root = Path(root)
        self.names = np.asarray([os.fsencode(name) for name in names], dtype="S")

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return os.fsdecode(self.names[i])

    def read(self, i):
        """(H, W, 3) uint8 RGB of image i. Raises OSError."""
        return read_image(self.root / self.name(i))


def list_images(root):
    """Sorted paths of the images below `root`, relative to it. Links are followed, each folder once; hidden names and a
    run's folder (with metrics.jsonl) are passed over, other files counted. Raises UserError without any image."""
    root, images, others, seen = str(root), [], Faults(root), set()
    starts = [root]  # then links to folders: one that is reached in two ways goes by its own name
    for start in starts:
        for folder, folders, files in os.walk(start, onerror=lambda error: others.add("folder cannot be read", error)):
            path = os.path.realpath(folder)
            if path in seen or ("metrics.jsonl" in files and folder != root):
                folders.clear()
                continue
            seen.add(path)
            folders[:] = sorted(name for name in folders if name[0] != ".")  # whatever the file system's order
            starts += [link for link in (os.path.join(folder, name) for name in folders) if os.path.islink(link)]
            for name in files:
                below = os.path.join(folder, name).removeprefix(os.path.join(root, ""))
                suffix = os.path.splitext(name)[1].lower()
                if suffix in SUFFIXES and len(os.fsencode(below).splitlines()) == 1 and name[0] != ".":
                    images.append(below)
                elif name[0] != ".":
                    others.add(f"suffix of no image: *{suffix}", repr(below))
    others.report(images, "image")
    return sorted(images)


def open_images(data, root=None, split="train", strict=False):
    """The images of a data set (scenes | coco | voc | openimages | openimages-mini | folder) below `root` (default
    data/DATA), of a split (train | val; a folder has none); never reads an annotation. strict: as open_labelled's.
    Raises UserError if the folder is missing or empty, or has files where scenes are asked for."""
    root = Path(root or Path("data") / data)
    if data == "scenes":
        if root != Path("data/scenes") and root.is_dir() and any(name[0] != "." for name in os.listdir(root)):
            raise UserError(f"{root} has files, but scenes are rendered: say with --data what they are")
        return Scenes(split, root)
    if data == "voc":
        return voc_images(root, split, strict)
    if data == "openimages-mini" and split == "train":
        return Images(root / "train", read_list(root / "openimages-mini.txt", root / "train", strict))
    folder = root if data == "folder" else root / folder_of(data, split)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: name its folder with --root, or download it (README, section Data)")
    return Images(folder, list_images(folder))


# ------------------------------------------------------------------------------------------------- the embedded scenes

def _ring(n, radii=(1.0,), turn=0.0):
    """(n, 2) corners around the origin, at `radii` one after the other."""
    angle = turn + 2 * np.pi * np.arange(n) / n
    return np.stack([np.sin(angle), -np.cos(angle)], 1) * np.resize(radii, n)[:, None]


OUTLINES = {"disc": _ring(40, (0.9,)), "square": _ring(4, (1.15,), np.pi / 4), "triangle": _ring(3, (1.1,)),
            "star": _ring(10, (1.1, 0.5)),
            "cross": np.float32([(-.33, -.95), (.33, -.95), (.33, -.33), (.95, -.33), (.95, .33), (.33, .33),
                                 (.33, .95), (-.33, .95), (-.33, .33), (-.95, .33), (-.95, -.33), (-.33, -.33)])}
SCENE_CATEGORIES = [f"{texture} {shape}" for texture in ("plain", "striped", "checked") for shape in OUTLINES]


class Scenes(Images):
    """The embedded data set: pictures of 2-4 objects on textured backgrounds, rendered from (seed, split, index).

    15 categories, each a shape with a texture. Hue is free, so that colour tells nothing. root: where its proposals
    are kept; number: of pictures."""

    SIDE = 112
    NUMBER = {"train": 1024, "val": 200}
    VERSION = 2  # of the renderer: proposals of another version's pictures are computed again

    def __init__(self, split="train", root=None, number=None, seed=0):
        super().__init__(root or "data/scenes", [f"{split}-{i:06d}" for i in range(number or self.NUMBER[split])])
        self.split, self.seed = split, seed
        self.version = f"{self.VERSION} seed {seed}"

    def read(self, i):
        return self.render(i)[0]

    def render(self, i):
        """Picture (112, 112, 3) uint8 RGB, boxes (n, 4), labels (n,) int64, masks (n, 112, 112) bool, visible parts."""
        random = np.random.default_rng((self.seed, list(self.NUMBER).index(self.split), i))
        canvas, number = self._background(random), random.integers(2, 5)
        sides = np.sort(random.uniform(46, 72 - 4 * number, number))[::-1]
        labels = random.integers(len(SCENE_CATEGORIES), size=number)
        centres = self._layout(random, sides)
        masks = []
        for label, (x, y), side in zip(labels, centres, sides):
            where, coverage, paint = _object(random, label, x, y, side)
            canvas[where] += coverage * (paint - canvas[where])
            solid = np.zeros((self.SIDE, self.SIDE), bool)
            solid[where] = coverage[..., 0] > 0.5
            masks = [old & ~solid for old in masks] + [solid]
        x, y, w, h = np.float32([cv2.boundingRect(mask.view(np.uint8)) for mask in masks]).T
        boxes = np.stack([x, y, x + w, y + h], 1)
        return canvas.clip(0, 255).astype(np.uint8), boxes, labels[:len(masks)], np.stack(masks)

    def _background(self, random):
        """(112, 112, 3) float32: two colours mixed by noise of several scales, nearly grey: colour is the objects'."""
        noise = sum(amplitude * cv2.resize(np.float32(random.normal(0, 1, (cells, cells))), (self.SIDE, self.SIDE),
                                           interpolation=cv2.INTER_CUBIC)
                    for cells, amplitude in ((3, 1.0), (9, 0.6), (20, 0.3)))
        share = 1 / (1 + np.exp(-1.5 * noise))[..., None]
        one = np.float32(random.uniform(60, 195) + random.uniform(-12, 12, 3))
        two = one + np.float32(random.uniform(25, 50) + random.uniform(-8, 8, 3))
        return one + share * (two - one)

    def _layout(self, random, sides, tries=300):
        """Centres (n, 2), x and y, of objects that lie inside the picture and hide little of each other: the first of
        `tries` random layouts that does, without the smallest object if there is none."""
        low, high = np.stack([sides / 2] * 2, 1), np.stack([self.SIDE - sides / 2] * 2, 1)
        layouts = random.uniform(low, high, (tries, *low.shape))
        one, two = np.triu_indices(len(sides), 1)
        apart = np.linalg.norm(layouts[:, one] - layouts[:, two], axis=-1) > 0.42 * (sides[one] + sides[two])
        good = np.flatnonzero(apart.all(1))
        return layouts[good[0]] if len(good) else self._layout(random, sides[:-1], tries)


def _object(random, label, x, y, side):
    """One object of `side` pixels centred at (x, y): the slices (rows, columns) of the canvas it lies in, its coverage
    (h, w, 1) in [0, 1] there and its paint (h, w, 3)."""
    texture, shape = SCENE_CATEGORIES[label].split()
    angle, stretch = random.uniform(-0.45, 0.45), random.uniform(0.85, 1.0, 2)
    turn = np.float32([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (OUTLINES[shape] * stretch) @ turn.T * side / 2 + (x, y)
    left, top = np.maximum(np.floor(corners.min(0)) - 1, 0).astype(int)
    right, bottom = np.minimum(np.ceil(corners.max(0)) + 1, Scenes.SIDE).astype(int)
    mask = np.zeros((bottom - top, right - left), np.uint8)
    cv2.fillPoly(mask, [np.round((corners - (left + 0.5, top + 0.5)) * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
    hue = random.random()
    light, dark = (cv2.cvtColor(np.float32([[[hue * 360, s, v]]]), cv2.COLOR_HSV2RGB)[0, 0] * 255
                   for s, v in ((random.uniform(0.35, 0.7), random.uniform(0.8, 1.0)),
                                (random.uniform(0.6, 0.95), random.uniform(0.35, 0.55))))
    dx, dy = np.meshgrid(np.arange(left, right) + 0.5 - x, np.arange(top, bottom) + 0.5 - y)
    pace = 2 * np.pi * random.uniform(2.2, 2.8) / side
    u, v = (pace * (dx * a + dy * b).astype(np.float32) for a, b in turn.T)
    plain = random.choice([-1, 1])  # all of it light or dark, so that lightness does not tell the texture either
    wave = {"plain": lambda: np.full_like(u, plain), "striped": lambda: np.sin(u * 1.3),
            "checked": lambda: 2 * np.sin(u) * np.sin(v)}[texture]()
    share = (0.5 + 0.5 * np.clip(wave * 2, -1, 1))[..., None]
    return (slice(top, bottom), slice(left, right)), mask[..., None] / np.float32(255), dark + share * (light - dark)


def write_scenes(out, number):
    """Write `number` train and number/4 val scenes below `out` in COCO's layout, with masks. May raise UserError."""
    if (Path(out) / "annotations").exists():  # somebody's COCO?
        raise UserError(f"{out} has annotations already: name another --out")
    coder, categories = mask_coder(), [{"id": i, "name": name} for i, name in enumerate(SCENE_CATEGORIES, 1)]
    for split, count in (("train", number), ("val", max(2, number // 4))):
        scenes, images, annotations = Scenes(split, number=count), [], []
        for i in range(count):
            picture, boxes, labels, masks = scenes.render(i)
            name = f"{i:012d}.png"
            with atomic(Path(out) / f"{split}2017" / name) as file:
                file.write(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
            images.append({"id": i, "file_name": name, "height": scenes.SIDE, "width": scenes.SIDE})
            for box, label, mask in zip(boxes.tolist(), labels.tolist(), masks):
                code = coder.encode(np.asfortranarray(mask, np.uint8))
                code["counts"], (x1, y1, x2, y2) = code["counts"].decode(), box
                annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "iscrowd": 0,
                                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "segmentation": code})
        with atomic(Path(out) / "annotations" / f"instances_{split}2017.json", "w") as file:
            json.dump({"images": images, "annotations": annotations, "categories": categories}, file)


# ------------------------------------------------------------------------------------------------------ labelled boxes

EMPTY_BOX = "box empty or outside its image"
VOC_CATEGORIES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
                  "pottedplant sheep sofa train tvmonitor").split()
BOX_HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,"  # OpenImages'
BOX_ROW = np.dtype([("image", "u8"), ("label", "i2"), ("box", "f4", 4), ("group", "?")])  # 27 bytes


class Labelled(NamedTuple):
    """The labelled boxes of a split: the one result of every reader. Image i owns rows offsets[i] to offsets[i + 1]."""
    images: Images
    categories: list         # names; a label is an index into it
    offsets: np.ndarray      # (N + 1,) int64
    boxes: np.ndarray        # (M, 4) float32, inside their image, never empty
    labels: np.ndarray       # (M,) int64
    crowd: np.ndarray        # (M,) bool: COCO's crowds, VOC's difficult, OpenImages' groups
    mask: object = None      # mask(row) -> (H, W) bool, or None for a box without one; None if none has one
    sizes: np.ndarray = None  # (N, 2) int64: width and height as annotated, 0 or None: unknown

    def read(self, i):
        """(H, W, 3) uint8 RGB of image i. Raises UserError if it cannot be read or has another size than annotated."""
        try:
            image = self.images.read(i)
        except OSError:
            raise UserError(f"{self.images.root / self.images.name(i)} cannot be read: download it again") from None
        if self.sizes is not None and self.sizes[i].all():
            check_size(self.images, i, image, self.sizes[i], "in its annotations: annotate it as it is, EXIF included")
        return image


def check_size(images, i, image, size, where):
    """Raises UserError if image i (H, W, 3) has not the size (width, height)."""
    if image.shape[1::-1] != tuple(size):
        raise UserError(f"{images.root / images.name(i)} is {image.shape[1]} x {image.shape[0]} pixels, but "
                        f"{size[0]} x {size[1]} {where}")


def open_labelled(data, root=None, split="val", strict=False):
    """Labelled boxes of `split` (train | val) of a data set (scenes | coco | voc | openimages | openimages-mini),
    sorted by image name. All of it can be pickled. Raises UserError if the annotations are missing or unreadable;
    single broken ones are left out and counted. strict: an image that is listed and absent is a UserError too."""
    root = Path(root or Path("data") / data)
    if data == "coco":
        return read_coco(root, split, strict)
    images = open_images(data, root, split, strict)
    if data == "scenes":
        _, boxes, labels, masks = zip(*map(images.render, range(len(images))))
        index, masks = np.repeat(np.arange(len(images)), [len(some) for some in labels]), np.concatenate(masks)
        return labelled(images, SCENE_CATEGORIES, index, np.concatenate(boxes), np.concatenate(labels),
                        np.zeros(len(index)), masks.__getitem__)  # which can be pickled; a lambda cannot
    if data == "voc":
        return read_voc(images, strict)
    return read_openimages(root, folder_of(data, split), images, data == "openimages-mini" and split == "train", strict)


def folder_of(data, split):
    """What a data set calls its split train | val."""
    return f"{split}2017" if data == "coco" else "validation" if "openimages" in data and split == "val" else split


def labelled(images, categories, index, boxes, labels, crowd, mask=None, sizes=None):
    """A Labelled from boxes in any order, with masks in that of their images; index (M,) is the image of each box."""
    order = np.argsort(index, kind="stable")
    offsets = np.searchsorted(np.asarray(index)[order], np.arange(len(images) + 1))
    boxes = np.float32(boxes).reshape(-1, 4)[order]
    labels, crowd = np.int64(labels)[order], np.asarray(crowd, bool)[order]
    return Labelled(images, categories, offsets, boxes, labels, crowd, mask, sizes)


def clip_box(x1, y1, x2, y2, width, height):
    """A box clipped to its image. Raises ValueError if it is not finite or nothing is left of it: a side below a
    millionth of the image's could be empty in float32."""
    box = [max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)]
    large = box[2] - box[0] > 1e-6 * width and box[3] - box[1] > 1e-6 * height  # so written, false for a NaN
    if not (large and math.isfinite(x2 - x1 + y2 - y1)):
        raise ValueError(EMPTY_BOX)
    return box


def read_coco(root, split, strict=False):
    """COCO's layout: ROOT/{split}2017, ROOT/annotations/instances_{split}2017.json, which is in memory meanwhile."""
    path, folder = root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"
    content, faults, side, rows = read_json(path), Faults(path, strict), (int, float), []
    listed = sorted(read_entries(path, content, "images", file_name=str, id=int, width=side, height=side))
    categories = sorted(read_entries(path, content, "categories", id=int, name=str))
    label = {category: i for i, (category, _) in enumerate(categories)}
    files = set(list_images(folder)) if folder.is_dir() else set()
    here = [entry for entry in listed if entry[0] in files]
    images, place = Images(folder, [entry[0] for entry in here]), {entry[1]: i for i, entry in enumerate(here)}
    sizes = np.int64([entry[2:] for entry in here])
    absent = {entry[1]: entry[0] for entry in listed if entry[0] not in files}
    for name in absent.values():
        faults.add(f"image listed but absent from {folder}", name, absent=True)
    for n, a in enumerate(content["annotations"]):
        try:
            kind = "no image_id, category_id, bbox of four numbers or iscrowd of 0 or 1"  # if the next lines raise
            image, category, (x, y, w, h) = a["image_id"], a["category_id"], a["bbox"]
            x2, y2, crowd = 0 + x + w, 0 + y + h, (0, 1).index(a.get("iscrowd", 0))
            if image in absent:
                continue
            kind = "image id unknown"
            i = place[image]
            kind = "category id unknown"
            category = label[category]
            kind, size = EMPTY_BOX, sizes[i].tolist()
            box = clip_box(x, y, x2, y2, *size)
            kind = "segmentation neither polygons [[x, y, ...], ...] nor run lengths of its image"
            rows.append((i, box, category, crowd, check_segmentation(a.get("segmentation"), *size)))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            faults.add(kind, f"annotations[{n}]")
    faults.report(rows)
    rows.sort(key=lambda row: row[0])
    *columns, shapes = zip(*rows)
    codes = [pickle.dumps(shape) for shape in shapes]
    mask = partial(draw_mask, b"".join(codes), np.cumsum([0, *map(len, codes)]), sizes[list(columns[0])])
    return labelled(images, [name for _, name in categories], *columns, mask if any(shapes) else None, sizes)


def read_entries(path, content, kind, **types):
    """A list of a COCO file, its images or categories, as tuples of the values of `types`, {key: type}. Raises
    UserError if a value is missing or of another type, a side is below one pixel, or two share an id or a file."""
    rows, seen = [], set()
    for n, entry in enumerate(content[kind]):
        row = tuple(map(entry.get, types)) if isinstance(entry, dict) else (None,)
        if not all(map(isinstance, row, types.values())) or not all(1 <= side < 1e6 for side in row[2:]):
            raise UserError(f"{path}: {kind}[{n}] is {str(entry)[:99]}: each needs {', '.join(types)}, not 0")
        unique = {(key, value) for key, value in zip(types, row) if key in ("id", "file_name")}
        if unique & seen:
            raise UserError(f"{path}: {kind}[{n}]: {unique & seen} occurs twice: give each its own")
        seen |= unique
        rows.append(row)
    return rows


def draw_mask(codes, ends, sizes, row):
    """COCO's segmentation `row` as (H, W) bool, as pycocotools draws it, or None. They are pickled one after the other
    into one buffer: 50 million Python numbers would be copied page by page into every worker."""
    shape = pickle.loads(codes[ends[row]:ends[row + 1]])
    width, height = sizes[row].tolist()
    if not shape:
        return None
    if isinstance(shape[0], int):  # run lengths, column by column
        return np.repeat(np.arange(len(shape)) % 2 == 1, shape).reshape(width, height).T
    coder = mask_coder()
    return coder.decode(coder.merge(coder.frPyObjects(shape, height, width))).astype(bool)


def check_segmentation(shape, width, height):
    """What can be drawn of COCO's segmentation: a list of polygons of at least three corners or of run lengths, None
    without any. Raises what Python does for other types, or ValueError, if it is neither: pycocotools would crash."""
    if not shape:
        return None
    if isinstance(shape, list):
        polygons = [np.float64(part).reshape(-1, 2) for part in shape]
        if not all((abs(polygon) < 1e6).all() for polygon in polygons):  # a NaN is not below
            raise ValueError
        return [polygon.ravel().tolist() for polygon in polygons if len(polygon) >= 3] or None
    counts, runs = shape["counts"], []
    if isinstance(counts, list):
        runs = [int(run) for run in counts]
    else:  # compressed text: five bits per character and one for "goes on"; from the third on numbers are differences
        for digits in re.findall("[P-o]*[0-O]", counts):
            value = sum((ord(digit) - 48 & 31) << 5 * place for place, digit in enumerate(digits))
            value -= (ord(digits[-1]) - 48 & 16) << 5 * len(digits) - 4  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    if shape["size"] != [height, width] or min(runs) < 0 or sum(runs) != height * width:
        raise ValueError
    return runs


def mask_coder():
    """pycocotools' module of masks, which nothing needs but masks. Raises UserError without it."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("masks need pycocotools: pip install pycocotools") from None
    return mask


def open_file(path, mode="rb", **how):
    """Open an annotation file. Raises UserError if it cannot be opened."""
    try:
        return open(path, mode, **how)
    except OSError as error:
        raise UserError(f"annotations are missing: {path}: {error.strerror} (README, section Data)") from None


def read_json(path, hook=None):
    """COCO's annotation file as an object; `hook` replaces every object in it. Raises UserError if it is none."""
    try:
        content = json.load(open_file(path), object_hook=hook)  # of UTF-8, 16 or 32, with or without a byte-order mark
    except (ValueError, RecursionError) as error:  # which names the line
        raise UserError(f"{path} is not JSON in UTF-8 ({error}): download it again") from None
    keys = "annotations", "images", "categories"
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UserError(f"{path} is not a COCO annotation file: it needs lists called {', '.join(keys)}")
    return content


def read_list(path, folder, strict=False):
    """Sorted names of the images in `folder` that a text list names, one per line, without suffix or folder; absent
    ones are counted. Raises UserError if the list is missing or no image is left or, if it is strict, one is absent."""
    names, faults = set(), Faults(path, strict)
    for number, line in enumerate(open_file(path).read().decode("utf-8-sig", "replace").splitlines(), 1):
        name = line.strip().rpartition("/")[2] + ".jpg"
        if os.path.isfile(folder / name):
            names.add(name)
        elif line.strip():
            faults.add(f"image listed but absent from {folder}", f"line {number}: {line[:40]}", absent=True)
    faults.report(names, "image")
    return sorted(names)


def voc_images(root, split, strict=False):
    """The images of a VOCdevkit (`root` or the folder in it), named VOC<year>/JPEGImages/<name>.jpg. If VOC2007 has a
    test list, val is that (2012's has no annotations) and train is trainval of all years (section 5.2). Raises
    UserError without such a list."""
    base = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    if (base / "VOC2007/ImageSets/Main/test.txt").exists():
        split = {"train": "trainval", "val": "test"}[split]
    lists = sorted(base.glob(f"VOC2{'007' if split == 'test' else '*'}/ImageSets/Main/{split}.txt"))
    if not lists:
        raise UserError(f"{base} has no VOC2007/ImageSets/Main/{split}.txt: download it (README, section Data), --root")
    return Images(base, [f"{path.parts[-4]}/JPEGImages/{name}" for path in lists
                         for name in read_list(path, path.parents[2] / "JPEGImages", strict)])


def read_voc(images, strict=False):
    """VOC's XML of any year; crowd is its "difficult". Its pixels count from 1 and xmax, ymax are included."""
    faults, rows, sizes = Faults(images.root, strict), [], np.zeros((len(images), 2), np.int64)
    for i in range(len(images)):
        path = Path(images.name(i).replace("JPEGImages", "Annotations")).with_suffix(".xml")
        try:
            tree = ElementTree.fromstring((images.root / path).read_bytes())
            width, height = (float(tree.findtext(f"size/{side}")) for side in ("width", "height"))
            if not (1 <= width < 1e6 and 1 <= height < 1e6):
                raise ValueError
        except (OSError, ElementTree.ParseError, LookupError, TypeError, ValueError):
            faults.add("annotation file missing or not VOC's XML with a size", path, absent=True)
            continue
        sizes[i] = width, height
        for n, element in enumerate(tree.findall("object"), 1):
            name, kind = element.findtext("name", "").strip(), "category unknown or no corners"
            try:
                label = VOC_CATEGORIES.index(name)
                x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
                kind = EMPTY_BOX
                difficult = element.findtext("difficult", "0").strip() == "1"
                rows.append((i, clip_box(x1 - 1, y1 - 1, x2, y2, width, height), label, difficult))
            except (TypeError, ValueError):
                faults.add(kind, f"{path} object {n} {name!r}")
    faults.report(rows)
    return labelled(images, VOC_CATEGORIES, *zip(*rows), sizes=sizes)


def read_boxes(path, strict=False):
    """OpenImages' box CSV and the classes beside it: rows (M,) of BOX_ROW, their box xyxy in shares of the sides; names
    of the classes; Faults of broken lines. Raises UserError if a file is missing, none of OpenImages' or cut short."""
    faults, rows = Faults(path, strict), bytearray()
    text = dict(mode="r", encoding="utf-8-sig", errors="replace", newline="\n")
    with open_file(path.parent / "class-descriptions-boxable.csv", **text) as file:
        classes = [line.strip().partition(",") for line in file]
    label = {name: i for i, (name, *_) in enumerate(classes)}
    with open_file(path, **text) as file:
        if not file.readline().startswith(BOX_HEADER):
            raise UserError(f"{path}, line 1: not OpenImages' box CSV: it starts with {BOX_HEADER}")
        for number, line in enumerate(file, 2):
            try:
                kind = "line cannot be read"
                image, _, name, _, x1, x2, y1, y2, _, _, group, _ = line.split(",", 11)
                image, x1, y1, x2, y2 = int(image, 16), float(x1), float(y1), float(x2), float(y2)
                kind = "category id unknown"
                i = label[name]
                kind = EMPTY_BOX
                rows += struct.pack("<Qh4f?", image, i, *clip_box(x1, y1, x2, y2, 1, 1), group == "1")
            except (ValueError, LookupError, struct.error):
                if kind == "line cannot be read" and not line.endswith("\n"):
                    raise UserError(f"{path}, line {number}: the file is cut short here; download it again") from None
                faults.add(kind, f"line {number}")
    names = [name.strip() or label for label, _, name in classes]  # the published file has a class without a name
    return np.frombuffer(rows, BOX_ROW), names, faults


def read_openimages(root, split, images, listed=False, strict=False):
    """OpenImages' layout: ROOT/{train,validation}/<ImageID>.jpg and the CSVs beside these folders; crowd is its
    IsGroupOf. Sizes come from the images' headers. Images without boxes or that cannot be read are left out, and rows
    of other images, counted unless `listed`."""
    rows, categories, faults = read_boxes(root / f"{split}-annotations-bbox.csv", strict)
    images = Images(images.root, [name for name in images.names.tolist() if re.fullmatch(rb"[0-9a-f]{16}\.\w+", name)])
    ids = np.array([int(name[:16], 16) for name in images.names.tolist()], np.uint64)
    here = np.isin(rows["image"], ids)
    for absent in [] if listed else np.unique(rows["image"][~here]):
        faults.add(f"image listed but absent from {images.root}", f"{absent:016x}", absent=True)
    faults.report(here.any())
    rows, sizes, faults = rows[here], np.zeros((len(ids), 2), np.float32), Faults(images.root)
    for i in np.flatnonzero(np.isin(ids, rows["image"])):
        try:
            with Image.open(images.root / images.name(i)) as picture:
                turned = picture.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
                sizes[i] = picture.size[::-1] if turned else picture.size
        except Exception:  # PIL raises a different class per format
            faults.add("image cannot be read", images.name(i))
    kept = sizes.any(1)  # images with boxes that can be read
    faults.report(kept.any(), "image")
    images, ids, sizes = Images(images.root, images.names[kept].tolist()), ids[kept], sizes[kept]
    rows = rows[np.isin(rows["image"], ids)]
    index = np.searchsorted(ids, rows["image"])
    boxes = rows["box"] * np.tile(sizes[index], 2)
    return labelled(images, categories, index, boxes, rows["label"], rows["group"])


# ----------------------------------------------------------------------------------------------------------- proposals

# Selective search (paper, section 4.1), fast and on a reduced copy. The filter is SoCo's: width/height in [1/aspect,
# aspect], sqrt(area share) in `share`, sides >= `side` pixels.
SEARCH = {"method": "selective search", "long_side": 200, "resize": "antialiased", "aspect": 3.0, "share": [0.3, 0.8],
          "side": 32}
RELAXED = ("by all of the filter", "relaxed to aspect", "relaxed to sides", "the whole image")
CHUNK = 32  # images to one unit of work, the part that a kill can lose
TIMEOUT = 600  # seconds without a new chunk until a rank that waits for them gives up; a chunk takes some


def selective_search(image):
    """(P, 4) float32 boxes of selective search in its fast mode, in pixels of `image` (H, W, 3) uint8, sorted; the
    search sees the image reduced to SEARCH's long side. Needs opencv-contrib-python; raises UserError without it."""
    if not hasattr(cv2, "ximgproc"):
        raise UserError("this OpenCV has no ximgproc: pip install opencv-contrib-python, or bring --proposals")
    scale = min(1.0, SEARCH["long_side"] / max(image.shape[:2]))
    small = resize(image, max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(small[..., ::-1]))
    search.switchToSelectiveSearchFast()
    boxes = np.unique(search.process().astype(np.float32).reshape(-1, 4), axis=0)
    boxes[:, 2:] += boxes[:, :2]
    return boxes * np.float32([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0]] * 2)


def filter_proposals(boxes, height, width):
    """The boxes (P, 4) that pass SEARCH's filter in an image of height x width, and the index into RELAXED of how far
    the filter had to be relaxed until one did (SoCo)."""
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    sides = np.minimum(w, h) >= SEARCH["side"]
    aspect = sides & (np.maximum(w, h) <= SEARCH["aspect"] * np.minimum(w, h))
    share = np.sqrt(w * h / (height * width))
    every = aspect & (SEARCH["share"][0] <= share) & (share <= SEARCH["share"][1])
    for level, kept in enumerate((every, aspect, sides)):
        if kept.any():
            return boxes[kept], level
    return np.float32([[0, 0, width, height]]), 3


class Proposals:
    """Boxes on disk, memory-mapped: every worker reads the same pages. proposals[i] is a (P, 4) float32 array of image
    i of `names`; sizes (N, 2): its width and height then, or None. Raises UserError if a file is missing or the files
    do not fit each other."""

    def __init__(self, folder):
        self.folder, self.sizes = Path(folder), None
        try:
            self.names = np.array((self.folder / "names.txt").read_bytes().splitlines(), dtype="S")
            self.offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
            self.boxes = np.load(self.folder / "boxes.npy", mmap_mode="r")
            if (self.folder / "sizes.npy").exists():
                self.sizes = np.load(self.folder / "sizes.npy", mmap_mode="r")
            n, shapes = len(self.names), (np.shape(self.offsets), np.shape(self.boxes), np.shape(self.sizes))
            if shapes not in [((n + 1,), (self.offsets[-1], 4), sizes) for sizes in ((), (n, 2))]:
                raise ValueError(f"{n} names; offsets, boxes, sizes {shapes}")
        except (OSError, EOFError, ValueError) as error:  # EOFError: an empty file
            raise UserError(f"proposals in {folder} cannot be read, or do not fit each other ({error}): delete that "
                            "folder to have them made again") from None

    def __getitem__(self, i):
        return np.asarray(self.boxes[self.offsets[i]:self.offsets[i + 1]], dtype=np.float32)

    def __reduce__(self):  # to another process goes the path, not the boxes
        return Proposals, (self.folder,)


def proposals_folder(data, root):
    """Where the proposals of a data set's train split lie unless --proposals names a folder: under its root."""
    return Path(root or Path("data") / data) / ".proposals" / folder_of(data, "train")


def listing(names):
    """16 hex digits that stand for `names`, a list of bytes, in their order."""
    return hashlib.sha1(b"\n".join(names)).hexdigest()[:16]


def proposal_settings(images):
    """What proposals depend on: the search, its filter, the list of images and the version of what draws them."""
    return {**SEARCH, "images": len(images), "listing": listing(images.names.tolist()), "version": images.version}


def proposals_state(images, folder):
    """'ready', 'missing' or the reason to make them again."""
    try:
        settings = dict(json.loads((Path(folder) / "settings.json").read_text()))
    except (OSError, TypeError, ValueError):
        return "missing"
    if settings.get("method") != SEARCH["method"]:
        return "ready"  # somebody else's boxes, as they are
    other = [key for key, value in proposal_settings(images).items() if settings.get(key) != value]
    return f"written with other settings ({', '.join(other)})" if other else "ready"


def search_chunk(images, hidden, indices):
    """Write a chunk, the boxes and sizes of those images `indices` that can be read, in a loader's process."""
    boxes, rows = [np.empty((0, 4), np.float32)], []
    for i in indices:
        with suppress(OSError):
            image = images.read(i)
            kept, level = filter_proposals(selective_search(image), *image.shape[:2])
            boxes.append(kept)
            rows.append((i, len(kept), level, image.shape[1], image.shape[0]))
    with atomic(hidden / f"{indices[0]:08d}.npz") as file:
        np.savez(file, boxes=np.concatenate(boxes), rows=np.int64(rows).reshape(-1, 5))


def compute_proposals(images, folder, workers=None, local_rank=0):
    """Selective search over `images` into `folder`, by `workers` processes (one per core); resumable after a kill.

    On each machine local rank 0 searches, the others wait for it. Chunks of images are files in a hidden folder of
    these settings until all are there and are joined; machines or runs that share the folder use each other's. Raises
    UserError if it cannot be written or has other boxes, no image can be read, or the search stops for TIMEOUT s."""
    folder, since, last = Path(folder), time.monotonic(), None
    hidden = folder / f".chunks-{listing([json.dumps(proposal_settings(images), sort_keys=True).encode()])}"
    foreign = (folder / "boxes.npy").exists() and not hidden.exists()  # asked first: a run that joins removes it last
    state = proposals_state(images, folder)
    while local_rank and proposals_state(images, folder) != "ready":
        there = len(list(hidden.glob("*.npz")))
        since, last = time.monotonic() if there != last else since, there
        if time.monotonic() - since > TIMEOUT:
            raise UserError(f"local rank 0 has written no proposals to {folder} for {duration(TIMEOUT)}: run the same "
                            "command again to resume")
        time.sleep(0.5)
    if local_rank or state == "ready":
        return
    if foreign and (state == "missing" or "listing" in state):
        raise UserError(f"{folder} has other boxes (settings.json {state}): name another folder, delete this one, or "
                        'write {"method": NAME} there to use them as they are')
    files = [hidden / f"{i:08d}.npz" for i in range(0, len(images), CHUNK)]
    progress = Progress("search", len(images), begun=CHUNK * len(list(hidden.glob("*.npz"))))

    def missing():
        for n in np.random.default_rng().permutation(len(files)).tolist():  # machines that share the folder share work
            if not files[n].exists() and proposals_state(images, folder) != "ready":
                yield range(n * CHUNK, min((n + 1) * CHUNK, len(images)))
    workers = min(workers or usable_cores(), usable_cores(), len(files))
    print(f"selective search: {len(images):,} images, {workers} processes, kept in {folder} ({state})", flush=True)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the workers inherit it: Ctrl-C ends this process,
        search = partial(search_chunk, images, hidden)
        chunks = iter(make_loader(range(len(images)), missing(), workers, collate=search))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which ends them
        for _ in chunks:
            progress.update(min(CHUNK * len(list(hidden.glob("*.npz"))), len(images)))
        join_chunks(images, folder, files)
    except UserError:
        if proposals_state(images, folder) != "ready":  # else another run has joined and removed the chunks meanwhile
            raise
    shutil.rmtree(hidden, ignore_errors=True)


def join_chunks(images, folder, files):
    """Make the files of Proposals from the chunks. Raises UserError if a chunk or all images cannot be read."""
    parts = []
    for file in files:
        try:
            with np.load(file) as part:
                parts.append((part["boxes"], part["rows"]))
        except Exception as error:  # numpy raises a different class per damage
            raise UserError(f"{file} cannot be read ({error}): delete it and run the same command again") from None
    boxes, rows = map(np.concatenate, zip(*parts))
    indices, counts, levels = rows.T[:3]
    faults, unreadable = Faults(images.root), np.setdiff1d(np.arange(len(images)), indices)
    for i in unreadable:
        faults.add("image cannot be read", images.name(i))
    faults.report(len(indices), "image")
    relaxed = dict(zip(RELAXED, np.bincount(levels, minlength=len(RELAXED)).tolist()))
    report = {**proposal_settings(images), "filtered": relaxed, "unreadable": len(unreadable), "boxes": len(boxes)}
    contents = {"boxes.npy": boxes, "offsets.npy": np.concatenate([[0], counts.cumsum()]),
                "sizes.npy": np.int32(rows[:, 3:]),
                "names.txt": b"".join(name + b"\n" for name in images.names[indices].tolist()),
                "settings.json": json.dumps(report, indent=1).encode()}
    (folder / "settings.json").unlink(missing_ok=True)  # last in, first out: with it the folder is complete
    for name, content in contents.items():
        with atomic(folder / name) as file:
            file.write(content) if isinstance(content, bytes) else np.save(file, content)
    levels = ", ".join(f"{n:,} {name}" for name, n in relaxed.items() if n)
    print(f"{len(boxes) / len(indices):.1f} proposals per image ({levels}) in {folder}", flush=True)


# --------------------------------------------------------------------------------------------------------- the loaders

def resize(image, width, height):
    """(H, W, C) uint8 -> (height, width, C) uint8 by antialiased bilinear interpolation, PIL's to within one grey
    level, at a quarter of its time: other methods' networks were trained on such inputs."""
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)  # channels_last: the fast path
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def random_crop(random, height, width, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random resized crop's [x1, y1, x2, y2]: area share `scale` (paper, section 4), aspect log-uniform in `ratio`
    (torchvision's RandomResizedCrop); the whole image if ten draws do not fit."""
    for _ in range(10):
        area, aspect = height * width * random.uniform(*scale), math.exp(random.uniform(*np.log(ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = random.integers(width - w + 1), random.integers(height - h + 1)
            return np.float32([x, y, x + w, y + h])
    return np.float32([0, 0, width, height])


def clip_boxes(boxes, window):
    """Boxes (K, 4) cut to `window` [x1, y1, x2, y2] and the share of each box's area that is inside."""
    cut = np.clip(boxes, np.tile(window[:2], 2), np.tile(window[2:], 2))
    area, inside = ((some[:, 2:] - some[:, :2]).clip(0).prod(1) for some in (boxes, cut))  # 0 of a box that is reversed
    return cut, inside / np.maximum(area, 1e-6)


class TwoViews(torch.utils.data.Dataset):
    """Views 1 and 2 of an image with the same K boxes in each (paper, section 4, "Views construction").

    Item (epoch, index) -> view1, view2 (size, size, 3) uint8 RGB, boxes1, boxes2 (K, 4) float32 in pixels of each. View
    1 is the whole image, view 2 a random resized crop; both are flipped with p 0.5. K boxes are drawn of those with at
    least half of their area inside the crop; if there is none, another crop is drawn, after ten the whole image.

    regions: proposals | image | grid (section 3's baselines, proposals None; grid: K cells of 7 x 7). Raises UserError
    if no image has a proposal, no box of an image lies inside it, or it has another size than its proposals."""

    def __init__(self, images, proposals, size, boxes, regions="proposals", seed=0):
        self.images, self.proposals = images, proposals
        self.size, self.k, self.regions, self.seed = size, boxes, regions, seed
        row = dict.fromkeys(images.names.tolist(), -1)
        if regions == "proposals":
            filled = np.diff(proposals.offsets) > 0
            row = {name: i for i, name in enumerate(proposals.names.tolist()) if filled[i]}
        # (n, 2): the samples' images, and the rows of their proposals
        self.pairs = np.array([(i, row[name]) for i, name in enumerate(images.names.tolist()) if name in row])
        if not len(self.pairs):
            raise UserError(f"no image of {images.root} has a proposal in {proposals.folder}: names.txt must hold the "
                            "images' paths relative to it")

    def __len__(self):
        return len(self.pairs)

    def names(self):
        """The samples' names, bytes, in their order."""
        return self.images.names[self.pairs[:, 0]].tolist()

    def __getitem__(self, item):
        epoch, index = item
        random = rng("views", self.seed, epoch, index)
        i, row, image = self._read(index)
        height, width = image.shape[:2]
        whole = np.float32([0, 0, width, height])
        if self.regions == "proposals":
            if self.proposals.sizes is not None:
                check_size(self.images, i, image, self.proposals.sizes[row],
                           f"when its proposals were made: delete {self.proposals.folder} to have them made again")
            boxes, _ = clip_boxes(self.proposals[row], whole)
        else:
            n = {"image": 1, "grid": 7}[self.regions]
            y, x = np.divmod(np.arange(n * n, dtype=np.float32), n)
            boxes = np.stack([x, y, x + 1, y + 1], 1) * np.tile(whole[2:], 2) / n
        least = 0 if self.regions == "image" else 0.5  # its one box is the whole image: any crop will do
        for attempt in range(11):
            crop = random_crop(random, height, width) if attempt < 10 else whole
            cut, inside = clip_boxes(boxes, crop)
            usable = np.flatnonzero(inside >= least)
            if len(usable):
                break
        else:
            raise UserError(f"{self.proposals.folder}: no box of {self.images.name(i)} lies inside the image; boxes "
                            "are [x1, y1, x2, y2] in its pixels")
        chosen = random.choice(usable, self.k, replace=len(usable) < self.k)
        view1, boxes1 = self._view(random, image, whole, boxes[chosen])
        view2, boxes2 = self._view(random, image, crop, cut[chosen])
        return view1, view2, boxes1, boxes2

    def _read(self, index):
        """Index, row of the proposals and pixels of the image of sample `index`, or the next one that can be read."""
        for k in range(index, index + len(self)):
            i, row = self.pairs[k % len(self)]
            try:
                return i, row, self.images.read(i)
            except OSError:
                print(f"left out, cannot be read: {self.images.name(i)}", file=sys.stderr)
        raise UserError(f"none of the {len(self):,} images in {self.images.root} can be read")

    def _view(self, random, image, crop, boxes):
        x1, y1, x2, y2 = crop.astype(int)
        view = resize(image[y1:y2, x1:x2], self.size, self.size)
        boxes = (boxes - np.float32([x1, y1] * 2)) * np.float32([self.size / (x2 - x1), self.size / (y2 - y1)] * 2)
        boxes = boxes.clip(0, self.size)  # rounding: an edge at -1.5e-5 would let a moved box leave the view
        if random.random() < 0.5:
            view = cv2.flip(view, 1)
            boxes = np.stack([self.size - boxes[:, 2], boxes[:, 1], self.size - boxes[:, 0], boxes[:, 3]], 1)
        return view, boxes


def epoch_batches(length, batch_size, seed, first, last, rank=0, world_size=1):
    """Yield this rank's batches of steps first to last, lists of (epoch, index): one stream over all epochs. Each epoch
    is a permutation by (seed, epoch), without the incomplete last batch; rank r takes the r-th slice of each batch."""
    per_epoch, share, order_of = length // batch_size, batch_size // world_size, -1
    for step in range(first, last):
        epoch, i = divmod(step, per_epoch)
        if epoch != order_of:
            order_of, order = epoch, rng("order", seed, epoch).permutation(length).tolist()
        start = i * batch_size + rank * share
        yield [(epoch, index) for index in order[start:start + share]]


def _start_loader(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when a command stops ...
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(300))  # ... its workers may outlive it by this


def make_loader(views, schedule, workers, pin=False, collate=None):
    """A DataLoader over `views` in the order of `schedule`. TwoViews' batches are four tensors: images (B, size, size,
    3) uint8 first, then boxes (B, K, 4). `workers` changes nothing but speed."""
    return torch.utils.data.DataLoader(views, batch_sampler=schedule, num_workers=workers, pin_memory=pin,
                                       collate_fn=collate, worker_init_fn=_start_loader)


# ---------------------------------------------------------------------------- OpenImage-MINI and Table 2 (section 5.1)

# How OpenImages spells COCO's categories where a capital letter is not all. cup has no counterpart; Mouse is an animal.
SPELLED = {"cow": "Cattle", "frisbee": "Flying disc", "skis": "Ski", "sports ball": "Ball", "donut": "Doughnut",
           "tv": "Television", "potted plant": "Houseplant", "dining table": "Kitchen & dining room table",
           "remote": "Remote control", "keyboard": "Computer keyboard", "mouse": "Computer mouse",
           "cell phone": "Mobile phone", "microwave": "Microwave oven", "hair drier": "Hair dryer"}


def write_mini(annotations, coco, out, seed=0):
    """Write OpenImage-MINI's list (paper, section 5.1) to `out`: one line train/<ImageID> per image, sorted.

    An image needs an object of a shared category; no shared category gets more objects than COCO has; no other image
    could be added. Ours, since the paper does not say: an object is a box, a group or crowd too; a category is shared
    if both have its name (SPELLED): subclasses (Man of Person) are of their own, without a cap, as are all others.
    Random by `seed`, whatever the order of the rows. Raises UserError if a file is missing or unreadable."""
    path = Path(annotations) / "train-annotations-bbox.csv"
    content = read_json(coco, hook=lambda o: o.get("category_id", o))  # of an annotation only this stays in memory
    count = Counter(number for number in content["annotations"] if isinstance(number, int))
    caps = {SPELLED.get(name, name.capitalize()): count[number]
            for number, name in read_entries(coco, content, "categories", id=int, name=str)}
    print(f"reading {path} (the published file takes minutes)", flush=True)
    rows, names, faults = read_boxes(path)
    faults.report(len(rows))
    cap = np.array([caps.get(name, -1) for name in names])
    if (cap < 0).all():
        raise UserError(f"{coco} and {annotations} share no category: is it COCO's instances_train2017.json?")
    print("not shared:", ", ".join(sorted(name for name in caps if name not in names)) or "none")
    (ids, index), label = np.unique(rows["image"], return_inverse=True), rows["label"]
    chosen = choose_images(index, label, cap, seed)
    kept = np.isin(index, chosen)
    with atomic(out, "w") as file:
        file.writelines(f"train/{i:016x}\n" for i in ids[chosen].tolist())
    print_stats(len(chosen), index[kept], label[kept])
    print(f"wrote {out}: {len(chosen):,} of {len(ids):,} images")


def choose_images(index, label, cap, seed):
    """Greedy choice: images in random order, each taken if it breaks no cap. Counts only grow, so an image that did not
    fit in its turn does not fit at the end either: one pass leaves nothing out that could be added.

    index, label (M,): image and category of each box; cap: boxes allowed of each category, -1: not shared. Returns the
    sorted indices of the images chosen; each has a box of a shared category."""
    shared = cap[label] >= 0
    pairs, counts = np.unique(index[shared] * len(cap) + label[shared], return_counts=True)  # of (image, category)
    categories, left = pairs % len(cap), cap.copy()
    images, starts = np.unique(pairs // len(cap), return_index=True)
    ends, chosen = np.append(starts[1:], len(pairs)), []
    for i in rng("openimages-mini", seed).permutation(len(images)):
        own, need = categories[starts[i]:ends[i]], counts[starts[i]:ends[i]]
        if (need <= left[own]).all():
            left[own] -= need
            chosen.append(images[i])
    return np.sort(np.int64(chosen))


def print_stats(images, index, label):
    """Print Table 2's row for the boxes of `images` images, index and label (M,) of each, and the paper's below it."""
    pairs = len(np.unique(index * np.int64(10**6) + label))
    print(f"{'':10}{'images':>12}{'objects/image':>16}{'categories/image':>19}{'categories':>13}")
    here = (images, len(label) / max(images, 1), pairs / max(images, 1), len(np.unique(label)))
    for name, row in {"here": here, "paper": (146_000, 9.1, 3.2, 569)}.items():
        print("{:10}{:12,}{:16.2f}{:19.2f}{:13,}".format(name, *row))


# -------------------------------------------------------------------------------------------------------- command line

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scenes = commands.add_parser("scenes", help="write the embedded data set in COCO's layout, with masks")
    scenes.add_argument("--out", required=True)
    scenes.add_argument("--n", type=partial(whole_number, least=2), default=800,
                        help="train images; a quarter as many val images are added")
    search = commands.add_parser("proposals", help="selective search over a data set")
    search.add_argument("--workers", type=positive, help="processes (default: all cores)")
    search.add_argument("--proposals", help="the folder to keep them in (default: under the root)")
    mini = commands.add_parser("openimages-mini", help="choose the images of the paper's OpenImage-MINI")
    mini.add_argument("--annotations", required=True, help="folder of OpenImages' two CSVs (README, section Data)")
    mini.add_argument("--coco", required=True, help="COCO's instances_train2017.json")
    mini.add_argument("--out", default="openimages-mini.txt")
    mini.add_argument("--seed", type=whole_number, default=0)
    names = ("scenes", "coco", "voc", "openimages", "openimages-mini", "folder")
    search.add_argument("--data", choices=names, required=True)
    search.add_argument("--root", help="the data set's folder (default data/DATA)")
    args = parser.parse_args()
    if args.command == "scenes":
        write_scenes(args.out, args.n)
        print(f"next: python d3ssl.py --data coco --root {shlex.quote(args.out)} --batch-size {min(256, args.n)}")
    elif args.command == "proposals":
        folder = args.proposals or proposals_folder(args.data, args.root)
        compute_proposals(open_images(args.data, args.root), folder, args.workers)
    else:
        write_mini(args.annotations, args.coco, args.out, args.seed)


if __name__ == "__main__":
    error_exit(main)
