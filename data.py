"""Images, labelled boxes, proposals on disk; the loaders; the dataset builders.

    python data.py scenes --out DIR --n 800                      the embedded data set as files, in COCO's layout
    python data.py proposals --data coco --root data/coco        selective search, parallel and resumable
    python data.py openimages-mini --annotations DIR --coco instances_train2017.json --out openimages-mini.txt
    python data.py stats --data coco --root data/coco            Table 2's row

Proposals on disk are a folder that any other source of boxes can write as well:

    names.txt      one image per line, relative to the folder of images, UTF-8
    offsets.npy    (N + 1,) int64: image i owns rows offsets[i] to offsets[i + 1] of boxes.npy
    boxes.npy      (M, 4) float32, xyxy in pixels of the image as a viewer shows it, x2 and y2 exclusive
    sizes.npy      optional: (N, 2) int32, width and height of each image when its boxes were made
    settings.json  {"method": NAME}; proposals of another method are trained on as they are, ours are made again if a
                   setting differs

Boxes are (K, 4) float32 xyxy in pixels, x2/y2 exclusive, here as everywhere in this project. The randomness of a
sample is a function of (seed, epoch, image index), so it does not depend on workers, ranks or an interruption.
"""
import argparse
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
import sys
import threading
import time
import zipfile
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

cv2.setNumThreads(1)  # processes are our parallelism, and OpenCV's own threads do not survive a fork
multiprocessing.set_forkserver_preload(["cv2", "torch"])  # Python 3.14's way: loaded once, not by every process

# What OpenCV or PIL reads.
SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .bmp .dib .webp .avif .tif .tiff .gif .jp2 .j2k .ppm .pgm .pbm .pnm "
               ".tga".split())


# ------------------------------------------------------------------------------------------- errors, files, progress

class UserError(Exception):
    """Invalid input. The message is one line that names the thing and the cure."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, exit code 2, no usage text."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def whole_number(text, least=0):
    """The type of a flag that counts. Raises argparse.ArgumentTypeError below `least`."""
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return value


def positive(text):
    return whole_number(text, 1)


def error_exit(main):
    """Run a command line `main()`. A UserError becomes one line on stderr and exit code 2; so does the death of a
    loading process, which torch raises wherever `main` is at that moment. Ctrl-C: one line and 130."""
    if hasattr(sys.stdout, "reconfigure"):
        # A path that is not UTF-8 must not end what prints it, and a log must show each line at once.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    code = 2
    try:
        return main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        message, code = "interrupted: run the same command again to resume", 128 + signal.SIGINT
    except torch.OutOfMemoryError:
        message = "a batch does not fit the GPU's memory: lower --batch-size, or use more GPUs"
    except UserError as error:  # one from a loading process comes with its traceback and a line break
        message = str(error).rpartition("UserError: ")[2].rstrip()
    except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: it died while it handed over a batch
        if isinstance(error, RuntimeError) and not re.search(r"shared memory\(shm\)|Bus error|DataLoader worker \(pid",
                                                             str(error)):
            raise
        message = ("a loading process died: is memory or /dev/shm short (docker run --shm-size 8g)? To resume, run "
                   "the same command again, with fewer --workers if it happens again")
    rank, world_size = (int(value) if value.isdecimal() else 0
                        for value in (os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")))
    if rank:  # every rank fails alike: let the first one speak, torchrun ends the others
        time.sleep(2)
    message = message.replace("\n", " ")  # of a file's name
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for what is killed here
    for process in multiprocessing.active_children():  # the loaders': some would stay for half a minute
        process.kill()
    if world_size > 1:  # an orderly exit waits for collectives of the other ranks
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def atomic(path, mode="wb"):
    """Open a file that appears at `path` complete or not at all: written beside it under a name of this process alone,
    flushed to disk, renamed. Raises UserError if it cannot be written."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise UserError(f"cannot write {path}: torch.save failed; No space left on device?") from None
    finally:
        with suppress(OSError):
            tmp.unlink()


def duration(seconds):
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Prints 'what: done/total images, rate, time left': one line that renews itself on a terminal, else every 10 s."""

    def __init__(self, what, total):
        self.what, self.total = what, total
        self.start = self.shown = time.monotonic()
        self.wait, self.end = (0.5, "\r") if sys.stdout.isatty() else (10, "\n")

    def update(self, done):
        now, finished = time.monotonic(), done >= self.total
        if finished or now - self.shown > self.wait:
            self.shown, seconds = now, max(now - self.start, 1e-9)
            left = f"{duration((self.total - done) * seconds / max(done, 1))} left"
            print(f"{self.what}: {done:,}/{self.total:,} images, {done / seconds:,.1f} images/s, "
                  f"{f'done in {duration(seconds)}' if finished else left}   ",
                  end="\n" if finished else self.end, flush=True)


def left_out(what):
    """One line on stderr about input that cannot be used."""
    print(f"left out, {what}", file=sys.stderr, flush=True)


def usable_cores():
    """The cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rng(use, *key):
    """A numpy generator that is a function of `use`, which names what is drawn, and of the integers `key`. (numpy alone
    takes the keys 0, (0, 0) and (0, 0, 0) for the same.)"""
    return np.random.default_rng((zlib.crc32(use.encode()), *key))


# -------------------------------------------------------------------------------------------------------------- images

def read_image(path):
    """(H, W, 3) uint8 RGB as a viewer shows the file: EXIF rotation applied; grey, CMYK and 16-bit converted.
    Raises OSError if it cannot be read, or its numbers are floats, whose black and white nobody knows."""
    content, image = np.fromfile(path, np.uint8), None
    with suppress(cv2.error):  # no bytes, or a size that OpenCV refuses
        if content[:4].tobytes() in (b"II*\0", b"MM\0*"):  # TIFF
            stored = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
            if stored is not None and stored.dtype not in (np.uint8, np.uint16):
                raise OSError(f"{path}: {stored.dtype} pixels: convert it to 8 bits")
        image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
    if image is None:  # GIF, exotic TIFF and the like: slower, but reads more
        try:
            with Image.open(path) as picture:
                if picture.mode in ("F", "I") or ";16" in picture.mode:  # PIL would cut them at 255
                    raise OSError(f"{picture.mode} pixels: convert it to 8 bits")
                image = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
        except Exception as error:  # PIL raises a different class per format
            raise OSError(f"{path}: {error}") from None
    return image


class Images:
    """Image files under `root`, in the order of `names` ((N,) array of UTF-8 bytes: one flat buffer, so that worker
    processes share it instead of copying a list of strings page by page). size: of augment.py's views of them."""

    version = None  # of pictures that are rendered; with another one proposals are computed again

    def __init__(self, root, names, size=224):
        self.root, self.size = Path(root), size
        self.names = np.asarray([os.fsencode(name) for name in names], dtype="S")

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return os.fsdecode(self.names[i])

    def read(self, i):
        """(H, W, 3) uint8 RGB of image i. Raises OSError."""
        return read_image(self.root / self.name(i))


def list_images(root):
    """Sorted paths of the images below `root`, relative to it. Links are followed, each folder once; hidden names and
    what a run wrote (its folder, known by metrics.jsonl) are passed over. Other files are counted by suffix in a line
    on stderr. Raises UserError if there is no image."""
    images, others, seen, folders = [], Counter(), set(), deque([""])
    while folders:
        folder = folders.popleft()
        path = os.path.realpath(os.path.join(root, folder))
        if path in seen:
            continue
        seen.add(path)
        try:
            entries = {entry.name: entry for entry in os.scandir(path) if not entry.name.startswith(".")}
        except OSError as error:
            others[f"folder {path} ({error.strerror})"] += 1
            continue
        run = "metrics.jsonl" in entries  # the root itself keeps its images
        for name, entry in entries.items() if not (run and folder) else ():
            if run and name == "curves.png":
                continue
            suffix, below = os.path.splitext(name)[1].lower(), os.path.join(folder, name)
            if entry.is_dir():  # links last: a folder that is reached in two ways goes by its own name
                (folders.append if entry.is_symlink() else folders.appendleft)(below)
            elif suffix in SUFFIXES and entry.is_file():
                images.append(below)
            else:
                others[f"*{suffix}" if entry.is_file() else "broken links, pipes, devices"] += 1
    rest = ", ".join(f"{count:,} {kind}" for kind, count in others.items())
    if not images:
        raise UserError(f"{root} contains no image ({', '.join(sorted(SUFFIXES))})"
                        + (f", but {rest}" if rest else ": name a folder of images with --root"))
    if rest:
        left_out(f"not called as images are: {rest} below {root}")
    return sorted(images)


def open_images(data, root=None, split=None, strict=False):
    """The images of a data set; never reads an annotation.

    Args: data: scenes | coco | voc | openimages | openimages-mini | folder; root: its folder (default
    data/DATA); split: coco: train2017 | val2017, scenes and voc: train | val, openimages: train | validation
    (openimages-mini's train is its list, its validation OpenImages'); strict: as open_labelled's. Raises UserError if
    the folder is missing or empty."""
    root = Path(root or Path("data") / data)
    if data == "scenes":
        return Scenes(split or "train", root)
    if data == "voc":
        return voc_images(root, split or "train", strict)
    if data == "openimages-mini" and split in (None, "train"):
        folder = root / "train"
        return Images(folder, read_list(root / "openimages-mini.txt", "train/([0-9a-f]{16})", "{}.jpg", folder, strict))
    folder = root if data == "folder" else root / (split or folder_of(data, "train"))
    if not folder.is_dir():
        where = "name a folder" if data == "folder" else "download it (README, section Data) or name its folder"
        raise UserError(f"{folder} does not exist: {where} with --root")
    return Images(folder, list_images(folder))


# ------------------------------------------------------------------------------------------------- the embedded scenes

SHAPES = ("disc", "square", "triangle", "star", "cross")
TEXTURES = ("plain", "striped", "checked")
SCENE_CATEGORIES = [f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES]


class Scenes(Images):
    """The embedded data set: pictures of 2-4 objects on textured backgrounds, rendered from (seed, split, index).

    15 categories, each a shape with a texture. Hue is free, so that colour tells nothing and a feature has to see shape
    and texture. Labels and masks are there for evaluation (`render`); `read` returns the picture alone, all that
    training sees.

    Args: split: train | val; root: where its proposals are kept; number: pictures; seed. Raises UserError for another
    split."""

    SIDE = 112
    NUMBER = {"train": 1024, "val": 200}
    VERSION = 2  # of the renderer: proposals of another version's pictures are computed again

    def __init__(self, split="train", root=None, number=None, seed=0):
        if split not in self.NUMBER:
            raise UserError(f"scenes has no split {split}: use train or val")
        super().__init__(root or "data/scenes", [f"{split}-{i:06d}" for i in range(number or self.NUMBER[split])], 112)
        self.split, self.seed, self.kept = split, seed, None
        self.version = f"{self.VERSION} seed {seed}"

    def keep(self):
        """Render every picture now and keep it (38 MB for the train split): a loader's workers then only read."""
        self.kept = np.stack([self.render(i)[0] for i in range(len(self))])

    def read(self, i):
        return self.render(i)[0] if self.kept is None else self.kept[i]

    def render(self, i):
        """Picture (112, 112, 3) uint8 RGB, boxes (n, 4), labels (n,) int64, masks (n, 112, 112) bool, visible parts."""
        random = np.random.default_rng((self.seed, list(self.NUMBER).index(self.split), i))
        canvas, number = _background(random, self.SIDE), random.integers(2, 5)
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
        boxes = np.float32([mask_box(mask) for mask in masks])
        return canvas.clip(0, 255).astype(np.uint8), boxes, labels[:len(masks)], np.stack(masks)

    def _layout(self, random, sides, tries=300):
        """Centres (n, 2), x and y, of objects that lie inside the picture and hide little of each other: the first of
        `tries` random layouts that does, without the smallest object if there is none."""
        low, high = np.stack([sides / 2] * 2, 1), np.stack([self.SIDE - sides / 2] * 2, 1)
        layouts = random.uniform(low, high, (tries, *low.shape))
        one, two = np.triu_indices(len(sides), 1)
        apart = np.linalg.norm(layouts[:, one] - layouts[:, two], axis=-1) > 0.42 * (sides[one] + sides[two])
        good = np.flatnonzero(apart.all(1))
        return layouts[good[0]] if len(good) else self._layout(random, sides[:-1], tries)


def mask_box(mask):
    """The tight box [x1, y1, x2, y2] of a (H, W) boolean mask with at least one pixel set."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]


def _background(random, side):
    """(side, side, 3) float32: two colours mixed by noise of several scales."""
    noise = sum(amplitude * cv2.resize(random.normal(0, 1, (cells, cells)).astype(np.float32), (side, side),
                                       interpolation=cv2.INTER_CUBIC)
                for cells, amplitude in ((3, 1.0), (9, 0.6), (20, 0.3)))
    share = 1 / (1 + np.exp(-1.5 * noise))[..., None]
    one = np.float32(random.uniform(60, 195) + random.uniform(-12, 12, 3))  # nearly grey: colour is the objects'
    two = one + np.float32(random.uniform(25, 50) + random.uniform(-8, 8, 3))
    return one + share * (two - one)


def _outline(shape):
    """(n, 2) corners of a shape of radius 1 around the origin."""
    def ring(n, radii=(1.0,), turn=0.0):
        angle = turn + 2 * np.pi * np.arange(n) / n
        return np.stack([np.sin(angle), -np.cos(angle)], 1) * np.resize(radii, n)[:, None]
    if shape == "cross":
        a, b = 0.33, 0.95
        return np.float32([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a),
                           (-b, -a), (-a, -a)])
    return {"disc": ring(40, (0.9,)), "square": ring(4, (1.15,), np.pi / 4), "triangle": ring(3, (1.1,)),
            "star": ring(10, (1.1, 0.5))}[shape]


def _object(random, label, x, y, side):
    """One object of `side` pixels centred at (x, y): the slices (rows, columns) of the canvas it lies in, its coverage
    (h, w, 1) in [0, 1] there and its paint (h, w, 3)."""
    texture, shape = SCENE_CATEGORIES[label].split()
    angle, stretch = random.uniform(-0.45, 0.45), random.uniform(0.85, 1.0, 2)
    turn = np.float32([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (_outline(shape) * stretch) @ turn.T * side / 2 + (x, y)
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


def write_scenes(out, number, seed=0):
    """Write `number` train and number/4 val scenes under `out` in COCO's layout: PNGs, boxes, masks."""
    coder = mask_coder()
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(SCENE_CATEGORIES)]
    for split, count in (("train", number), ("val", max(1, number // 4))):
        scenes, images, annotations = Scenes(split, number=count, seed=seed), [], []
        progress = Progress(f"{split}2017", count)
        for i in range(count):
            picture, boxes, labels, masks = scenes.render(i)
            name = f"{i:012d}.png"
            with atomic(Path(out) / f"{split}2017" / name) as file:
                file.write(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
            images.append({"id": i, "file_name": name, "height": scenes.SIDE, "width": scenes.SIDE})
            for box, label, mask in zip(boxes.tolist(), labels.tolist(), masks):
                code = coder.encode(np.asfortranarray(mask, np.uint8))
                annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "iscrowd": 0,
                                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "area": int(mask.sum()),
                                    "segmentation": {"size": code["size"], "counts": code["counts"].decode()}})
            progress.update(i + 1)
        with atomic(Path(out) / "annotations" / f"instances_{split}2017.json", "w") as file:
            json.dump({"images": images, "annotations": annotations, "categories": categories}, file)


# ------------------------------------------------------------------------------------------------------ labelled boxes

class Labelled(NamedTuple):
    """The labelled boxes of a split: the one result of every reader. Image i owns rows offsets[i] to offsets[i + 1]."""
    images: Images
    categories: list         # names; a label is an index into it
    offsets: np.ndarray      # (N + 1,) int64
    boxes: np.ndarray        # (M, 4) float32, inside their image, never empty
    labels: np.ndarray       # (M,) int64
    crowd: np.ndarray        # (M,) bool: COCO's crowds, VOC's difficult, OpenImages' groups
    mask: Callable = None    # mask(row) -> (H, W) bool of box `row`, or None if it has none; None if no box has one
    sizes: np.ndarray = None  # (N, 2) int64: width and height as annotated, 0 or None: unknown

    def read(self, i):
        """(H, W, 3) uint8 RGB of image i, to which its boxes belong. Raises OSError if it cannot be read and UserError
        if it has another size than its annotations."""
        image = self.images.read(i)
        if self.sizes is not None and self.sizes[i].all():
            check_size(self.images, i, image, self.sizes[i], "in its annotations: was it resized, or is it turned by "
                                                             "EXIF? Annotate the images as they are")
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
    root, folder = Path(root or Path("data") / data), folder_of(data, split)
    if data == "coco":
        return read_coco(root, split, strict)
    images = open_images(data, root, folder, strict)
    if data == "scenes":
        return read_scenes(images)
    if data == "voc":
        return read_voc(images, strict)
    return read_openimages(root, folder, images, data == "openimages-mini" and split == "train", strict)


def folder_of(data, split):
    """What a data set calls its split train | val."""
    return f"{split}2017" if data == "coco" else "validation" if "openimages" in data and split == "val" else split


class Faults:
    """Counts what is left out of the file `path`, by kind; `report` says so, one line per kind with its first place."""

    def __init__(self, path):
        self.path, self.count, self.first = path, Counter(), {}

    def add(self, kind, place, strict=False):
        """strict: the tables are of all images. Raises UserError."""
        if strict:
            raise UserError(f"{self.path}: {kind}: {place}: tables are of all images, download it again")
        self.count[kind] += 1
        self.first.setdefault(kind, place)

    def report(self, valid, what="box"):
        """Raises UserError if nothing `valid` is left."""
        for kind, count in self.count.items():
            left_out(f"{kind}: {count:,} in {self.path}, the first: {self.first[kind]}")
        if not valid:
            raise UserError(f"{self.path} contains no valid {what}: " + (", ".join(self.count) or "it is empty"))


EMPTY_BOX = "box empty or outside its image"


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


def read_scenes(scenes):
    """The embedded scenes' boxes, labels and masks."""
    pictures, boxes, labels, masks = zip(*map(scenes.render, range(len(scenes))))
    scenes.kept = np.stack(pictures)  # they need not be rendered again
    index = np.repeat(np.arange(len(scenes)), [len(some) for some in labels])
    boxes, labels, masks = np.concatenate(boxes), np.concatenate(labels), np.concatenate(masks)
    # A method of an array can be pickled; a lambda cannot.
    return labelled(scenes, SCENE_CATEGORIES, index, boxes, labels, np.zeros(len(index), bool), masks.__getitem__)


def read_coco(root, split, strict=False):
    """COCO's layout: ROOT/{split}2017 and ROOT/annotations/instances_{split}2017.json; masks where they are annotated.
    The whole file is in memory while it is read."""
    path, folder = root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"
    content, faults = read_json(path, "annotations", "images", "categories"), Faults(path)
    number = (int, float)
    listed = read_entries(path, content, "images", id=(int, str), file_name=str, width=number, height=number)
    categories = read_entries(path, content, "categories", id=(int, str), name=str)
    categories.sort(key=lambda c: (isinstance(c[0], str), c[0]))  # numbers before texts
    files = set(list_images(folder)) if folder.is_dir() else set()
    here = sorted((entry for entry in listed if entry[1] in files), key=itemgetter(1))
    place, names = {entry[0]: i for i, entry in enumerate(here)}, [entry[1] for entry in here]
    sizes = [(int(width), int(height)) for _, _, width, height in here]
    absent = {number: name for number, name, _, _ in listed if name not in files}
    for name in sorted(absent.values()):
        faults.add(f"image listed but absent from {folder}", name, strict)
    label = {number: i for i, (number, _) in enumerate(categories)}
    rows = sorted(coco_rows(content["annotations"], place, sizes, absent, label, faults), key=itemgetter(0))
    faults.report(rows)
    *columns, shapes = zip(*rows)
    masks = Masks(shapes, [sizes[i] for i in columns[0]]) if any(shapes) else None
    return labelled(Images(folder, names), [name for _, name in categories], *columns, masks, np.int64(sizes))


def read_entries(path, content, kind, **types):
    """A list of a COCO file, its images or categories, as tuples of the values of `types`, {key: type}. Raises
    UserError if a value is missing or of another type, a side is below one pixel, or two share an id or a file."""
    rows, seen = [], set()
    for n, entry in enumerate(content[kind]):
        entry = entry if isinstance(entry, dict) else {}
        for key, type_ in types.items():
            value = entry.get(key)
            if not isinstance(value, type_) or (key in ("width", "height") and not 1 <= value < 1e6):
                raise UserError(f"{path}: {kind}[{n}] {entry.get('file_name', '')}: {key} is {value!r}: each needs "
                                f"{', '.join(types)}")
            if key in ("id", "file_name"):
                if (key, value) in seen:
                    raise UserError(f"{path}: {kind}[{n}]: {key} {value!r} occurs twice: give each its own")
                seen.add((key, value))
        rows.append(tuple(map(entry.get, types)))
    return rows


def coco_rows(annotations, place, sizes, absent, label, faults):
    """The valid ones of COCO's annotations, as (image, box, label, crowd, segmentation); the others go to `faults`.

    Args: place: {image id: index into `sizes`, (width, height) each}; absent: ids of images whose annotations are
    passed over; label: {category id: label}."""
    for n, a in enumerate(annotations):
        try:
            kind = "no image_id, category_id or bbox of four numbers"  # what is wrong if the next lines raise
            number, category, (x, y, w, h) = a["image_id"], a["category_id"], a["bbox"]
            x2, y2, crowd = 0 + x + w, 0 + y + h, a.get("iscrowd", 0)
            if number in absent:
                continue
            kind = "image id unknown"
            image = place[number]
            kind = "category id unknown"
            category = label[category]
            kind = EMPTY_BOX
            box = clip_box(x, y, x2, y2, *sizes[image])
            kind = "iscrowd is not 0 or 1"
            crowd = (0, 1).index(crowd)
            kind = "segmentation neither polygons [[x, y, ...], ...] nor run lengths of its image"
            shape = check_segmentation(a.get("segmentation"), *sizes[image])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            faults.add(kind, f"annotations[{n}]")
        else:
            yield image, box, category, crowd, shape


class Masks:
    """COCO's segmentations of M boxes as a function: row -> (H, W) bool, as pycocotools draws it, None where a box has
    none. sizes: width, height.

    They stay a polygon's numbers or run lengths, pickled one after the other into one buffer: COCO's 50 million Python
    numbers would be copied page by page into every worker."""

    def __init__(self, shapes, sizes):
        codes = [pickle.dumps(shape) for shape in shapes]
        self.codes, self.sizes = b"".join(codes), np.int32(sizes)
        self.offsets = np.cumsum([0, *map(len, codes)])

    def __call__(self, row):
        shape = pickle.loads(self.codes[self.offsets[row]:self.offsets[row + 1]])
        width, height = self.sizes[row].tolist()
        if not shape:
            return None
        if isinstance(shape[0], int):  # run lengths, column by column
            return np.repeat(np.arange(len(shape)) % 2 == 1, shape).reshape(width, height).T
        coder = mask_coder()
        return coder.decode(coder.merge(coder.frPyObjects(shape, height, width))).astype(bool)


def check_segmentation(shape, width, height):
    """What can be drawn of COCO's segmentation: a list of polygons of at least three corners or of run lengths, None
    without any. Raises what Python does for other types, or ValueError, if it is neither."""
    if not shape:
        return None
    if isinstance(shape, list):
        for part in shape:
            numbers = isinstance(part, list) and set(map(type, part)) <= {int, float}
            if not numbers or len(part) % 2 or not all(abs(number) < 1e6 for number in part):  # a NaN is not below
                raise ValueError
        return [part for part in shape if len(part) >= 6] or None
    runs = run_lengths(shape["counts"])
    if shape["size"] != [height, width] or min(runs) < 0 or sum(runs) != height * width:
        raise ValueError
    return runs


def run_lengths(counts):
    """COCO's run lengths as a list of integers; compressed they are text, six bits per character (pycocotools, which
    does not check them)."""
    if isinstance(counts, list):
        return [int(run) for run in counts]
    runs, value, shift = [], 0, 0
    for code in counts.encode():
        value |= (code - 48 & 31) << shift
        shift += 5
        if not code - 48 & 32:  # the last character of a number, with its sign; numbers are differences
            value -= (code - 48 & 16) << shift - 4
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def mask_coder():
    """pycocotools' module of masks, which nothing needs but masks. Raises UserError without it."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("masks need pycocotools: pip install pycocotools") from None
    return mask


def read_file(path):
    """The bytes of an annotation file. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"annotations are missing: {path}: {error.strerror} (README, section Data)") from None


def read_json(path, *keys, hook=None):
    """A JSON object that has lists under `keys`; `hook` replaces every object in it. Raises UserError that names file
    and line."""
    text = read_file(path)
    try:
        content = json.loads(text, object_hook=hook)  # of UTF-8, 16 or 32, with or without a byte-order mark
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        line = getattr(error, "lineno", text.count(b"\n", 0, getattr(error, "start", None)) + 1)
        raise UserError(f"{path}, line {line}: not JSON in UTF-8 ({error}); download the file again") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UserError(f"{path} is not a COCO annotation file: it needs lists called {', '.join(keys)}")
    return content


def read_list(path, pattern, form, root, strict=False):
    """Sorted images of a text list: form.format(group) for each line that `pattern` (one group) matches, where that
    exists below `root`; other lines are named and counted. Raises UserError if the list is missing or none is left, or,
    if it is strict, one is absent."""
    lines = read_file(path).decode("utf-8-sig", "replace").splitlines()  # a broken byte then matches no pattern
    names, faults = set(), Faults(path)
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(pattern, line.strip())
        if match and os.path.isfile(root / form.format(match[1])):
            names.add(form.format(match[1]))
        elif line.strip():
            kind = f"image listed but absent from {root}" if match else "not an image's name"
            faults.add(kind, f"line {number}: {line[:40]}", strict and match)
    faults.report(names, "image")
    return sorted(names)


VOC_CATEGORIES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
                  "pottedplant sheep sofa train tvmonitor").split()


def voc_images(root, split, strict=False):
    """The images of a VOCdevkit (`root` or the folder in it), named VOC<year>/JPEGImages/<name>.jpg. If a year has a
    test list, val is that and train is trainval of all years (the paper's section 5.2: trainval of 2007 and 2012, test
    of 2007); else they are the years' own train and val. Raises UserError if there is no such list."""
    base = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    tested = any(base.glob("VOC2*/ImageSets/Main/test.txt"))
    name = f"ImageSets/Main/{({'train': 'trainval', 'val': 'test'} if tested else {}).get(split, split)}.txt"
    lists = sorted(base.glob(f"VOC2*/{name}"))
    if not lists:
        raise UserError(f"{base} has no VOC2007/{name}: download it (README, section Data) or name it with --root")
    names = []
    for path in lists:
        names += read_list(path, r"([\w.-]+)", f"{path.parts[-4]}/JPEGImages/{{}}.jpg", base, strict)
    return Images(base, names)


def read_voc(images, strict=False):
    """VOC's XML of any year; crowd is its "difficult". Its pixels count from 1 and xmax, ymax are included.
    (torchvision's VOCDetection reads one year, as text, and stops at the first broken file.)"""
    faults, rows, sizes = Faults(images.root), [], np.zeros((len(images), 2), np.int64)
    for i in range(len(images)):
        path = Path(images.name(i).replace("JPEGImages", "Annotations")).with_suffix(".xml")
        try:
            tree = ElementTree.fromstring((images.root / path).read_bytes())
            width, height = (float(tree.findtext(f"size/{side}")) for side in ("width", "height"))
            if not (1 <= width < 1e6 and 1 <= height < 1e6):
                raise ValueError
        except (OSError, ElementTree.ParseError, LookupError, TypeError, ValueError):
            faults.add("annotation file missing or not VOC's XML with a size", path, strict)
            continue
        sizes[i] = width, height
        for n, element in enumerate(tree.findall("object"), 1):
            name, kind = element.findtext("name", "").strip(), "category unknown or no corners"
            try:
                label = VOC_CATEGORIES.index(name)
                x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
                kind = EMPTY_BOX
                box = clip_box(x1 - 1, y1 - 1, x2, y2, width, height)
                rows.append((i, box, label, element.findtext("difficult", "0").strip() == "1"))
            except (TypeError, ValueError):
                faults.add(kind, f"{path} object {n} {name!r}")
    faults.report(rows)
    return labelled(images, VOC_CATEGORIES, *zip(*rows), sizes=sizes)


def read_classes(root):
    """OpenImages' class-descriptions-boxable.csv: {label id: index} and the names. A class without a name (the
    published file has one) goes by its id."""
    path, index, names = root / "class-descriptions-boxable.csv", {}, []
    faults = Faults(path)
    for number, line in enumerate(read_file(path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        label, comma, name = line.decode("utf-8", "replace").partition(",")
        if "\ufffd" in label + name or not comma:
            faults.add("not a label id and a name in UTF-8", f"line {number}")
        elif label != "LabelName":  # some versions have a header
            index[label] = len(names)
            names.append(name.strip() or label)
    faults.report(names, "class")
    return index, names


def read_boxes(path, classes, faults):
    """OpenImages' box CSV: images (M,) uint64 (the 16 hex digits of ImageID), labels (M,) int16 by `classes` ({label
    id: label}), boxes (M, 4) float32 xyxy in shares of the sides, group (M,) bool; 27 bytes per row.
    Broken lines go to `faults`. Raises UserError if the file is missing, not a box CSV or cut short."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: download it (README, section Data)")
    images, labels, boxes, groups = map(array, "Qhfb")
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        header = file.readline().strip().split(",")
        try:
            columns = [header.index(name) for name in "ImageID LabelName XMin YMin XMax YMax IsGroupOf".split()]
        except ValueError as error:
            raise UserError(f"{path}, line 1: not OpenImages' box CSV ({error})") from None
        for number, line in enumerate(file, 2):
            cells, kind = line.strip().split(","), "line cannot be read"
            try:
                image, name, *sides, group = [cells[column] for column in columns]
                if len(cells) != len(header) or len(image) != 16 or not image.isalnum() or not cells[-1]:
                    raise ValueError
                image, sides = int(image, 16), [float(side) for side in sides]
                kind = "category id unknown"
                label = classes[name]
                kind = EMPTY_BOX
                boxes.extend(clip_box(*sides, 1, 1))
            except (ValueError, LookupError):
                if kind == "line cannot be read" and not line.endswith("\n"):
                    raise UserError(f"{path}, line {number}: the file is cut short here; download it again") from None
                faults.add(kind, f"line {number}")
            else:
                images.append(image)
                labels.append(label)
                groups.append(group == "1")
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return np.array(images, np.uint64), np.array(labels, np.int16), boxes, np.array(groups, bool)


def read_openimages(root, split, images, listed=False, strict=False):
    """OpenImages' layout: ROOT/{train,validation}/<ImageID>.jpg and the CSVs beside these folders; crowd is its
    IsGroupOf. Sizes come from the images' headers. Rows of other images are left out, and counted unless `listed`."""
    path = root / f"{split}-annotations-bbox.csv"
    classes, categories = read_classes(root)
    faults = Faults(path)
    images = Images(images.root, [name for name in images.names.tolist() if re.fullmatch(rb"[0-9a-f]{16}\.\w+", name)])
    ids = np.array([int(name[:16], 16) for name in images.names.tolist()] or [0], np.uint64)
    image, labels, boxes, group = read_boxes(path, classes, faults)
    index = np.searchsorted(ids, image).clip(max=len(ids) - 1)
    here = (ids[index] == image) & (len(images) > 0)
    for absent in [] if listed else np.unique(image[~here]):
        faults.add(f"image listed but absent from {images.root}", f"{absent:016x}", strict)
    faults.report(here.any())
    index, labels, boxes, group = index[here], labels[here], boxes[here], group[here]
    sizes, faults = np.zeros((len(images), 2), np.float32), Faults(images.root)
    for i in np.unique(index):
        try:
            with Image.open(images.root / images.name(i)) as picture:
                turned = picture.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
                sizes[i] = picture.size[::-1] if turned else picture.size
        except Exception:  # PIL raises a different class per format
            faults.add("image cannot be read", images.name(i))
    kept = sizes[index].any(1)
    faults.report(kept.any(), "image")
    boxes *= np.tile(sizes[index], 2)
    return labelled(images, categories, index[kept], boxes[kept], labels[kept], group[kept])


# ----------------------------------------------------------------------------------------------------------- proposals

# Selective search (paper, section 4.1), its fast mode, on a reduced copy: README's "Speed" has what that costs in
# recall. The filter is SoCo's: width/height in [1/aspect, aspect], sqrt(area share) in `share`, sides >= `side` pixels.
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
    """Boxes on disk, memory-mapped: opening 150,000 images takes milliseconds and every worker reads the same pages.
    proposals[i] is a (P, 4) float32 array of image i of `names`; sizes (N, 2): its width and height then, or None.
    Raises UserError if a file is missing or the files do not fit each other."""

    def __init__(self, folder):
        self.folder, self.sizes = Path(folder), None
        try:
            self.boxes = np.load(self.folder / "boxes.npy", mmap_mode="r")
            self.offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
            self.names = np.array((self.folder / "names.txt").read_bytes().splitlines(), dtype="S")
            if (self.folder / "sizes.npy").exists():
                self.sizes = np.load(self.folder / "sizes.npy", mmap_mode="r")
            n, shapes = len(self.names), [len(self.offsets) - 1, self.boxes.shape, np.shape(self.sizes)]
            if shapes != [n, (self.offsets[-1], 4), () if self.sizes is None else (n, 2)]:
                raise ValueError(f"{n} names; offsets, boxes, sizes {shapes}")
        except (OSError, EOFError, ValueError) as error:  # EOFError: an empty file
            raise UserError(f"proposals in {folder} cannot be read, or do not fit each other ({error}): delete that "
                            "folder to have them made again") from None

    def __getitem__(self, i):
        return np.asarray(self.boxes[self.offsets[i]:self.offsets[i + 1]], dtype=np.float32)

    def __reduce__(self):  # to another process goes the path, not the boxes
        return Proposals, (self.folder,)


def proposals_folder(data, root, split=None):
    """Where a data set's proposals lie unless --proposals names a folder: under its root, one folder per split."""
    return Path(root or Path("data") / data) / ".proposals" / (split or {"coco": "train2017"}.get(data, "train"))


def proposals_state(images, folder):
    """'ready', 'missing' or the reason to make them again."""
    try:
        settings = json.loads((Path(folder) / "settings.json").read_text())
    except OSError:
        return "missing"
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        return "settings.json is not a JSON object"
    if settings.get("method") != SEARCH["method"]:
        return "ready"  # somebody else's boxes, as they are
    other = [key for key, value in proposal_settings(images).items() if settings.get(key) != value]
    return f"written with other settings ({', '.join(other)})" if other else "ready"


def listing(names):
    """16 hex digits that stand for `names`, a list of bytes, in their order."""
    return hashlib.sha1(b"\n".join(names)).hexdigest()[:16]


def proposal_settings(images):
    """What proposals depend on: the search, its filter, the list of images and the version of what draws them."""
    drawn = {} if images.version is None else {"version": images.version}
    return {**SEARCH, "images": len(images), "listing": listing(images.names.tolist()), **drawn}


def compute_proposals(images, folder, workers=None, local_rank=0):
    """Selective search over `images` into `folder`, by `workers` processes; resumable after a kill.

    On each machine local rank 0 searches and the others wait until it has finished. Chunks of CHUNK images are files
    of their own, in a hidden folder that belongs to the settings, until all are there and are joined; machines or runs
    that share the folder use each other's chunks. Raises UserError if the folder cannot be written, no image can be
    read, a name has a line break, a process dies or, in a rank that waits, if there is no new chunk for TIMEOUT
    seconds."""
    folder, state = Path(folder), proposals_state(images, folder)
    if state == "ready":
        return
    for name in images.names.tolist():
        if len(name.splitlines()) != 1:
            raise UserError(f"{images.root}: the name {os.fsdecode(name)!r} has a line break, which names.txt cannot "
                            "hold: rename the file")
    chunks = folder / f".chunks-{listing([json.dumps(proposal_settings(images), sort_keys=True).encode()])}"
    if local_rank:
        return wait_for_proposals(images, folder, chunks)
    if state != "missing":
        print(f"proposals in {folder} are made again: {state}", flush=True)
    try:
        search_chunks(images, folder, chunks, workers)
        join_chunks(images, folder, chunks)
    except UserError:
        if proposals_state(images, folder) != "ready":  # else another run has joined and removed the chunks meanwhile
            raise
    shutil.rmtree(chunks, ignore_errors=True)


def wait_for_proposals(images, folder, chunks):
    """Return once the proposals are there. Raises UserError after TIMEOUT seconds without a new chunk."""
    number, since = None, time.monotonic()
    while proposals_state(images, folder) != "ready":
        last, number = number, len(list(chunks.glob("*.npz")))
        if number != last:
            since = time.monotonic()
        if time.monotonic() - since > TIMEOUT:
            raise UserError(f"local rank 0 has written no proposals to {folder} for {duration(TIMEOUT)}: run the same "
                            "command again to resume")
        time.sleep(0.5)


def chunk_files(images, chunks):
    """{file of a chunk: the range of its images}."""
    starts = range(0, len(images), CHUNK)
    return {chunks / f"{start:08d}.npz": range(start, min(start + CHUNK, len(images))) for start in starts}


def search_chunks(images, folder, chunks, workers=None):
    """Write the chunks by several processes, in random order: machines that share the folder share the work.
    Raises UserError if one of the processes dies."""
    tasks, done, progress = list(chunk_files(images, chunks).items()), 0, Progress("selective search", len(images))
    workers = max(1, min(workers or usable_cores(), len(tasks)))
    print(f"selective search: {len(images):,} images, {workers} processes, kept in {folder}", flush=True)
    np.random.default_rng().shuffle(tasks)
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, initializer=_start_searcher, initargs=(images, folder))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the processes inherit it: Ctrl-C ends this one,
        futures = [executor.submit(_search, *task) for task in tasks]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in as_completed(futures):
            done += future.result()
            progress.update(done)
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:  # which ends them
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise UserError("a process of the selective search was killed (is memory short?): run the same command "
                            "again to resume, with fewer --workers if it happens again") from None
        raise
    finally:
        executor.shutdown(cancel_futures=True)


_job = None  # images and folder, of a process of search_chunks: sent once, for a large set's names are not small


def _start_searcher(*job):
    global _job
    _job = job
    torch.set_num_threads(1)  # of `resize`: processes are our parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_with_parent():  # a killed parent must not leave processes that wait for its chunks for ever
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _search(file, indices):
    """Write a chunk, boxes and sizes but of unreadable images, unless somebody has; returns how many images it has."""
    images, folder = _job
    if file.exists() or proposals_state(images, folder) == "ready":
        return len(indices)
    boxes, rows = [np.empty((0, 4), np.float32)], []
    for i in indices:
        with suppress(OSError):
            image = images.read(i)
            height, width = image.shape[:2]
            kept, level = filter_proposals(selective_search(image), height, width)
            boxes.append(kept)
            rows.append((i, len(kept), level, width, height))
    with atomic(file) as stream:
        np.savez(stream, boxes=np.concatenate(boxes), rows=np.int64(rows).reshape(-1, 5))
    return len(indices)


def join_chunks(images, folder, chunks):
    """Make the files of Proposals from the chunks. Raises UserError if a chunk or all images cannot be read."""
    parts = []
    for file in chunk_files(images, chunks):
        try:
            with np.load(file) as part:
                parts.append((part["boxes"], part["rows"]))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            with suppress(OSError):
                file.unlink()
            raise UserError(f"{file} cannot be read ({error}): run the same command again to search its images "
                            "again") from None
    boxes, rows = map(np.concatenate, zip(*parts))
    indices, counts, levels = rows.T[:3]
    unreadable = np.setdiff1d(np.arange(len(images)), indices)
    if not len(indices):
        raise UserError(f"none of the {len(images):,} images in {images.root} can be read")
    relaxed = {name: int((levels == level).sum()) for level, name in enumerate(RELAXED)}
    report = {**proposal_settings(images), "filtered": relaxed, "unreadable": len(unreadable), "boxes": len(boxes)}
    contents = {"boxes.npy": boxes, "offsets.npy": np.concatenate([[0], counts.cumsum()]),
                "sizes.npy": np.int32(rows[:, 3:]),
                "names.txt": b"".join(name + b"\n" for name in images.names[indices].tolist()),
                "settings.json": json.dumps(report, indent=1).encode()}
    if proposals_state(images, folder) == "ready":  # another run, joining at the same moment, was first
        return
    (folder / "settings.json").unlink(missing_ok=True)  # last in, first out: with it the folder is complete
    for name, content in contents.items():
        with atomic(folder / name) as file:
            file.write(content) if isinstance(content, bytes) else np.save(file, content)
    if len(unreadable):
        left_out(f"cannot be read: {len(unreadable):,} images, the first: {images.name(unreadable[0])}")
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
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return cut, (cut[:, 2:] - cut[:, :2]).prod(1) / np.maximum(area, 1e-6)


class TwoViews(torch.utils.data.Dataset):
    """Views 1 and 2 of an image with the same K boxes in each (paper, section 4, "Views construction").

    Item (epoch, index) -> view1, view2 (size, size, 3) uint8 RGB, boxes1, boxes2 (K, 4) float32 in pixels of each.
    View 1 is the whole image, view 2 a random resized crop; each is flipped with p 0.5. From the boxes with at least
    half of their area inside the crop, K are drawn in random order, with replacement if there are fewer; if there is
    none another crop is drawn, and after ten crops it is the whole image. Both views have the same K boxes, view 2 what
    is inside the crop of each.

    Args: images: Images; proposals: Proposals, or None for regions image | grid; size: pixels; boxes: K;
    regions: proposals | image | grid (section 3's baselines; grid: K cells of 7 x 7); seed. Raises UserError if no
    image has a proposal, no box of an image lies inside it, or it has another size than its proposals."""

    def __init__(self, images, proposals, size, boxes, regions="proposals", seed=0):
        self.images, self.proposals = images, proposals
        self.size, self.k, self.regions, self.seed = size, boxes, regions, seed
        self.pairs = None  # (n, 2): index of the image, row of its proposals
        if regions == "proposals":
            row = {name: i for i, name in enumerate(proposals.names.tolist())}
            filled, names = np.diff(proposals.offsets) > 0, images.names.tolist()
            pairs = [(i, row[name]) for i, name in enumerate(names) if name in row and filled[row[name]]]
            if not pairs:
                raise UserError(f"no image of {images.root} has a proposal in {proposals.folder}: names.txt must hold "
                                "the images' paths relative to it")
            self.pairs = np.array(pairs)

    def __len__(self):
        return len(self.images) if self.pairs is None else len(self.pairs)

    def names(self):
        """The samples' names, bytes, in their order."""
        return (self.images.names if self.pairs is None else self.images.names[self.pairs[:, 0]]).tolist()

    def __getitem__(self, item):
        epoch, index = item
        random = rng("views", self.seed, epoch, index)
        index, image = self._read(index)
        height, width = image.shape[:2]
        if self.regions == "proposals" and getattr(self.proposals, "sizes", None) is not None:
            i, row = self.pairs[index]
            check_size(self.images, i, image, self.proposals.sizes[row],
                       f"when its proposals were made: delete {self.proposals.folder} to have them made again")
        boxes = self._regions(index, height, width)
        whole = np.float32([0, 0, width, height])
        least = 0 if self.regions == "image" else 0.5  # its one box is the whole image: any crop will do
        for attempt in range(11):
            crop = random_crop(random, height, width) if attempt < 10 else whole
            cut, inside = clip_boxes(boxes, crop)
            usable = np.flatnonzero(inside >= least)
            if len(usable):
                break
        if not len(usable):
            raise UserError(f"{self.proposals.folder}: no box of {self.images.name(self.pairs[index, 0])} lies inside "
                            "the image; boxes are [x1, y1, x2, y2] in its pixels")
        chosen = random.choice(usable, self.k, replace=len(usable) < self.k)
        view1, boxes1 = self._view(random, image, whole, boxes[chosen])
        view2, boxes2 = self._view(random, image, crop, cut[chosen])
        return view1, view2, boxes1, boxes2

    def _read(self, index):
        """The image of sample `index`, or the next one that can be read."""
        for i in range(index, index + len(self)):
            i %= len(self)
            which = i if self.pairs is None else self.pairs[i, 0]
            try:
                return i, self.images.read(which)
            except OSError:
                left_out(f"cannot be read: {self.images.name(which)}")
        raise UserError(f"none of the {len(self):,} images in {self.images.root} can be read")

    def _regions(self, index, height, width):
        if self.regions == "proposals":
            return clip_boxes(self.proposals[self.pairs[index, 1]], np.float32([0, 0, width, height]))[0]
        n = {"image": 1, "grid": 7}[self.regions]
        y, x = np.divmod(np.arange(n * n, dtype=np.float32), n)
        return np.stack([x, y, x + 1, y + 1], 1) * np.float32([width, height] * 2) / n

    def _view(self, random, image, crop, boxes):
        x1, y1, x2, y2 = crop.astype(int)
        view = resize(image[y1:y2, x1:x2], self.size, self.size)
        boxes = (boxes - np.float32([x1, y1] * 2)) * np.float32([self.size / (x2 - x1), self.size / (y2 - y1)] * 2)
        boxes = boxes.clip(0, self.size)  # rounding: an edge at -1.5e-5 would let a moved box leave the view
        if random.random() < 0.5:
            view = cv2.flip(view, 1)
            boxes = np.stack([self.size - boxes[:, 2], boxes[:, 1], self.size - boxes[:, 0], boxes[:, 3]], 1)
        return view, boxes


class Schedule:
    """This rank's batches of steps first to last, as lists of (epoch, index): one stream over all epochs, so that
    workers never restart and a resumed run starts in the middle of an epoch. Each epoch is a permutation by
    (seed, epoch); the incomplete last batch is dropped; rank r takes the r-th slice of each global batch."""

    def __init__(self, length, batch_size, seed, first, last, rank=0, world_size=1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first, self.last, self.rank, self.share = first, last, rank, batch_size // world_size

    def __iter__(self):
        per_epoch, order_of = self.length // self.batch_size, -1
        for step in range(self.first, self.last):
            epoch, i = divmod(step, per_epoch)
            if epoch != order_of:
                order_of, order = epoch, rng("order", self.seed, epoch).permutation(self.length).tolist()
            start = i * self.batch_size + self.rank * self.share
            yield [(epoch, index) for index in order[start:start + self.share]]


def _start_loader(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides when a run stops ...
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # ... its workers outlive it by no more than this


def make_loader(views, schedule, workers, pin=False, collate=None):
    """A DataLoader over `views` in the order of `schedule`. TwoViews' batches are four tensors: images (B, size, size,
    3) uint8 first, then boxes (B, K, 4). `workers` changes nothing but speed."""
    return torch.utils.data.DataLoader(views, batch_sampler=schedule, num_workers=workers, pin_memory=pin,
                                       collate_fn=collate, worker_init_fn=_start_loader)


# ---------------------------------------------------------------------------- OpenImage-MINI and Table 2 (section 5.1)

# How OpenImages spells COCO's categories where a capital letter is not all. Cup alone has no counterpart: Coffee cup
# and Mug are kinds of it. OpenImages' Mouse is the animal.
SPELLED = {"cow": "Cattle", "frisbee": "Flying disc", "skis": "Ski", "sports ball": "Ball", "donut": "Doughnut",
           "tv": "Television", "potted plant": "Houseplant", "dining table": "Kitchen & dining room table",
           "remote": "Remote control", "keyboard": "Computer keyboard", "mouse": "Computer mouse",
           "cell phone": "Mobile phone", "microwave": "Microwave oven", "hair drier": "Hair dryer", "cup": None}


def shared_names(names):
    """{COCO's name: OpenImages' name} of COCO's category `names`; "cup" has none."""
    spelled = {name: SPELLED.get(name, name.capitalize()) for name in names}
    return {ours: theirs for ours, theirs in spelled.items() if theirs}


def write_mini(annotations, coco, out, seed=0):
    """Write OpenImage-MINI's list (paper, section 5.1) to `out`: one line train/<ImageID> per image, sorted.

    An image needs an object of a shared category; no shared category gets more objects than COCO has; no other image
    could be added. The paper leaves open what an object and a shared category are. Here an object is a box of either
    file, a group of OpenImages and a crowd of COCO one each, and a category is shared if shared_names pairs it: boxes
    of its subclasses (Man, Woman for Person) count as categories of their own, without a cap, as do all others. The
    choice is random by `seed`, whatever the order of the rows. Raises UserError if a file is missing or unreadable."""
    caps = coco_counts(Path(coco))
    classes, names = read_classes(Path(annotations))
    path = Path(annotations) / "train-annotations-bbox.csv"
    faults = Faults(path)
    print(f"reading {path} (the published file takes minutes)", flush=True)
    image, label, _, _ = read_boxes(path, classes, faults)
    faults.report(len(image))
    ids, index = np.unique(image, return_inverse=True)
    cap = np.full(len(names), -1)
    for ours, theirs in shared_names(caps).items():
        if theirs in names:
            cap[names.index(theirs)] = caps[ours]
        else:
            print(f"not shared: {theirs} is not in {annotations}")
    if (cap < 0).all():
        raise UserError(f"{coco} and {annotations} share no category: is it COCO's instances_train2017.json?")
    chosen = choose_images(index, label, cap, seed)
    kept = np.isin(index, chosen)
    with atomic(out, "w") as file:
        file.writelines(f"train/{i:016x}\n" for i in ids[chosen].tolist())
    print_table2(len(chosen), index[kept], label[kept], TABLE2["openimages-mini", "train"])
    print(f"wrote {out}: {len(chosen):,} of {len(ids):,} images")


def coco_counts(path):
    """{category's name: boxes} of a COCO annotation file. Of an annotation only the category stays in memory."""
    content = read_json(path, "annotations", "images", "categories", hook=lambda o: o.get("category_id", o))
    names = dict(read_entries(path, content, "categories", id=(int, str), name=str))
    count = Counter(a for a in content["annotations"] if isinstance(a, (int, str)))
    return {name: count[number] for number, name in names.items()}


def choose_images(index, label, cap, seed):
    """Greedy choice: images in random order, each taken if it breaks no cap. Counts only grow, so an image that did not
    fit in its turn does not fit at the end either: one pass leaves nothing out that could be added.

    Args: index, label (M,) integers: image and category of each box; cap: boxes allowed of each category, -1 if it is
    not shared. Returns the sorted indices of the images chosen; each has a box of a shared category."""
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


# The paper's Table 2: images, objects per image, categories per image, categories.
TABLE2 = {("coco", "train"): (118_000, 7.4, 2.95, 80), ("openimages-mini", "train"): (146_000, 9.1, 3.2, 569)}


def print_table2(images, index, label, paper=None):
    """Print Table 2's row for boxes of `images` images, index and label (M,) of each box, and the paper's below it."""
    pairs = len(np.unique(index * np.int64(10**6) + label))
    print(f"{'':10}{'images':>12}{'objects/image':>16}{'categories/image':>19}{'categories':>13}")
    here = (images, len(label) / max(images, 1), pairs / max(images, 1), len(np.unique(label)))
    for name, row in (("here", here), ("paper", paper)):
        if row:
            print("{:10}{:12,}{:16.2f}{:19.2f}{:13,}".format(name, *row))


def print_stats(data, root, split):
    """Print Table 2's row of a data set's split (train | val)."""
    objects = open_labelled(data, root, split)
    index = np.repeat(np.arange(len(objects.images)), np.diff(objects.offsets))
    print_table2(len(objects.images), index, objects.labels, TABLE2.get((data, split)))


# -------------------------------------------------------------------------------------------------------- command line

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scenes = commands.add_parser("scenes", help="write the embedded data set in COCO's layout, with masks")
    scenes.add_argument("--out", required=True)
    scenes.add_argument("--n", type=positive, default=800, help="train images; a quarter as many val images are added")
    search = commands.add_parser("proposals", help="selective search over a data set")
    search.add_argument("--split", help="the data set's own name of it (default: its train split)")
    search.add_argument("--workers", type=positive, help="processes (default: all cores)")
    search.add_argument("--proposals", help="the folder to keep them in (default: under the root)")
    mini = commands.add_parser("openimages-mini", help="choose the images of the paper's OpenImage-MINI")
    mini.add_argument("--annotations", required=True, help="folder of OpenImages' two CSVs (README, section Data)")
    mini.add_argument("--coco", required=True, help="COCO's instances_train2017.json")
    mini.add_argument("--out", default="openimages-mini.txt")
    stats = commands.add_parser("stats", help="Table 2's row of a data set")
    stats.add_argument("--split", choices=("train", "val"), default="train")
    labelled_data = ("scenes", "coco", "voc", "openimages", "openimages-mini")
    for command, names in ((search, (*labelled_data, "folder")), (stats, labelled_data)):
        command.add_argument("--data", choices=names, required=True)
        command.add_argument("--root", help="the data set's folder (default data/DATA)")
    for command in (scenes, mini):
        command.add_argument("--seed", type=whole_number, default=0)
    args = parser.parse_args()
    if args.command == "scenes":
        write_scenes(args.out, args.n, args.seed)
        batch = "" if args.n >= 256 else f" --batch-size {max(2, args.n)}"  # d3ssl.py's default is 256
        print(f"next: python d3ssl.py --data coco --root {shlex.quote(args.out)}{batch}")
    elif args.command == "proposals":
        folder = args.proposals or proposals_folder(args.data, args.root, args.split)
        compute_proposals(open_images(args.data, args.root, args.split), folder, args.workers)
    elif args.command == "openimages-mini":
        write_mini(args.annotations, args.coco, args.out, args.seed)
    else:
        print_stats(args.data, args.root, args.split)


if __name__ == "__main__":
    error_exit(main)
