"""How coupled, how position-biased are a checkpoint's features? The paper's sections 3.1 and 3.2, Figures 3 and 4.

    python probes.py --ckpt runs/scenes/last.pt random --plot curves.png --picture probe.png
    python probes.py --ckpt A.pth.tar B.pth --data coco --root data/coco --plot curves.png --json curves.json

Objects of the val split are cut out and placed on black as squares; a feature is the mean of the cells of its
square, in the maps after res2 to res5 and, `roi`, in C5 of RoIAlign of the square on C4, as region-level C4
networks were trained.

Of the paper, 1 is ideal: the coupling rate CR = cos(A1, B) / cos(A2, B), A1 and B being two neighbouring objects of
different categories and A2 being A when B is gone; the mean cosine similarity MCS of an object with itself at the
other places of a 3x3 grid. Both are near 1 as well where features of all objects are alike, so they compare
networks whose features differ equally.

Relative to how much objects differ, not in the paper, 0 is ideal: rc = mean(1 - cos(A1, A2)) / mean(1 - cos(A2,
B2)) and rp = mean(1 - MCS) / mean(1 - cos(A2, B2)), B2 being B alone at A's place. At 1 a neighbour (a place)
changes a feature as much as another object would. A constant added to all features changes neither; but one large
difference between objects (their colour) hides what becomes of all small ones.

Re-identification, not in the paper, needs no scale; 100 is ideal: does an object's feature, amid four neighbours or
moved to a corner, find the same object, alone in the centre, among 150 (R@1 in %, by cosine; a tie is a miss)? It
tells nothing of how alike two objects of one category are.

From Python: `probe(network, open_inputs(open_labelled("scenes")), bins=6)`, a torchvision ResNet in eval mode,
gives all of these by name, `reid(network, bank, bins=6)` the last two alone: each .value and .error, five numbers
in the order of LAYERS."""
import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from augment import normalise, to_float
from d3ssl import resnet_stages, roi_align
from data import Parser, Progress, UserError, atomic, error_exit, open_images, open_labelled, positive, resize, rng
from evaluate import (SIZE, add_checkpoint_arguments, clean_batches, load_source, measure_rows, open_rows, output_file,
                      print_table, ratio_of_means, write_results)

LAYERS = ("res2", "res3", "res4", "res5", "roi")
SMALLEST = 24                            # sides of an object in its image: smaller ones, enlarged, are a blur
FILLS = {"black": (0, 0, 0), "mean": (124, 116, 104)}  # around the objects; mean: ImageNet's colour, 0 once normalised
BATCH = 16                               # images that a network sees at once
MEASURES = {                             # title, ideal
    "reid_neighbours": ("re-identified amid four neighbours, R@1 in % ↑", 100),
    "reid_moved": ("re-identified in a corner, R@1 in % ↑", 100),
    "rc": ("relative coupling rc ↓: feature change by a neighbour / distance between objects", 0),
    "rp": ("relative position rp ↓: feature change by place / distance between objects", 0),
    "cr": ("coupling rate CR → 1 (Fig. 3b)", 1),
    "mcs": ("mean cosine similarity MCS → 1 (Fig. 4b)", 1)}

# CR and MCS. Squares lie at multiples of 32 pixels, C5's stride: they are made of whole cells at every layer.
SIDE = 96                                # of a square, in pixels
PAIR = (224, 320)                        # height and width of the image of two objects, with margins of 64 pixels
A, B = (64, 64), (64 + SIDE, 64)         # x and y of their squares: side by side
GRID = (3 * SIDE, 3 * SIDE)              # height and width of the 3x3 image
PLACES = [(x, y) for y in (0, SIDE, 2 * SIDE) for x in (0, SIDE, 2 * SIDE)]

# Re-identification, likewise.
OBJECTS = 150                            # in the bank
BANK_SIDE = 64                           # of a square
BANK = (3 * BANK_SIDE, 3 * BANK_SIDE)    # height and width of an image
CENTRE = (64, 64)
NEIGHBOURS = ((0, 64), (128, 64), (64, 0), (64, 128))
CORNERS = ((0, 0), (128, 0), (0, 128), (128, 128))


# -------------------------------------------------------------------------------------------------- synthesised inputs

class Squares(NamedTuple):
    """N objects, each cut out of its image and filling a square."""
    pixels: torch.Tensor  # (N, side, side, 3) uint8 RGB
    masks: torch.Tensor   # (N, side, side) bool: what of the square is the object, all of it without a mask

    def take(self, index, device="cpu"):
        return Squares(self.pixels[index].to(device), self.masks[index].to(device))


class Inputs(NamedTuple):
    """What every network is probed with: pairs (a[i], b[i]) of different categories, 96 pixels; a bank, 64 pixels."""
    a: Squares
    b: Squares
    bank: Squares


def cut_out(image, box, mask, side):
    """An object as a square: pixels (side, side, 3) uint8, and which of them are the object's (side, side) bool.

    Args: image (H, W, 3) uint8; box: [x1, y1, x2, y2] in it; mask: None, then the crop fills the square, as the
    paper places images of objects; or (H, W) bool, then proportions are kept, the object is in the middle and the
    rest is not the object."""
    (x1, y1), (x2, y2) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    crop = image[y1:y2, x1:x2]
    if mask is None:
        return resize(crop, side, side), np.ones((side, side), bool)
    scale = side / max(crop.shape[:2])
    height, width = (max(1, round(n * scale)) for n in crop.shape[:2])
    top, left = (side - height) // 2, (side - width) // 2
    pixels, inside = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), bool)
    pixels[top:top + height, left:left + width] = resize(crop, width, height)
    shape = resize(mask[y1:y2, x1:x2, None].astype(np.uint8) * 255, width, height)[..., 0]
    covered = shape > 127  # by half or more; of an object that is thinner than that everywhere, all it touches
    inside[top:top + height, left:left + width] = covered if covered.any() else shape > 0
    return pixels, inside


def open_inputs(labelled, pairs=100, seed=0, cut="box", workers=1):
    """Inputs of a split (data.Labelled): pairs of objects, A uniform over all, B over those of other categories,
    and 150 objects (or as many as there are) for the bank; crowds and sides of less than 24 pixels are left out.

    Args: cut: box | mask; workers: threads. Raises UserError if there are too few objects, or no masks to cut along."""
    sides = (labelled.boxes[:, 2:] - labelled.boxes[:, :2]).min(1)
    index, random = np.flatnonzero(~labelled.crowd & (sides >= SMALLEST)), rng("pairs", seed)
    if len(index) < 5 or len(np.unique(labelled.labels[index])) < 2:
        raise UserError(f"{labelled.images.root} has no five objects of two categories with sides of at least "
                        f"{SMALLEST} pixels: name another data set")
    a = random.choice(index, pairs)
    b = [random.choice(index[labelled.labels[index] != labelled.labels[i]]) for i in a]
    bank = rng("bank", seed).permutation(index)[:OBJECTS]  # the same for any number of pairs

    def cut_all(index, side):
        with ThreadPoolExecutor(max(1, workers)) as threads:
            pixels, masks = zip(*threads.map(partial(cut_object, labelled, side=side, cut=cut), index))
        return Squares(torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(masks)))
    return Inputs(cut_all(a, SIDE), cut_all(b, SIDE), cut_all(bank, BANK_SIDE))


def cut_object(labelled, index, side, cut):
    """cut_out of object `index` of a split. Raises UserError if its image cannot be read or has another size than its
    annotations, or if it has no mask to cut along."""
    i = int(np.searchsorted(labelled.offsets, index, side="right")) - 1
    mask = labelled.mask(index) if cut == "mask" and labelled.mask else None
    if cut == "mask" and mask is None:
        raise UserError(f"{labelled.images.root / labelled.images.name(i)} has an object without a mask: --cut box")
    return cut_out(labelled.read(i), labelled.boxes[index], mask, side)


def compose(size, placed, fill="black"):
    """(N, *size, 3) uint8: squares `placed`, [((x, y), Squares of N), ...], each on its own image of one colour."""
    first = placed[0][1].pixels
    images = first.new_tensor(FILLS[fill]).repeat(len(first), *size, 1)
    for (x, y), squares in placed:
        side = squares.masks.shape[1]
        images[:, y:y + side, x:x + side][squares.masks] = squares.pixels[squares.masks]
    return images


# ------------------------------------------------------------------------------------------------------------ features

@torch.inference_mode()
def features(network, size, placed, read=None, bins=6, fill="black", seen=None):
    """Features of the first `read` (None: all) squares of `compose(size, placed, fill)`.

    Args: network: torchvision's ResNet in eval mode; bins: of RoIAlign for `roi`; seen: called with the
    number of images after each batch. Returns a list by layer of (N, P, C) float64, P squares read."""
    batches, device = [], network.conv1.weight.device
    for start in range(0, len(placed[0][1].masks), BATCH):
        part = [(place, squares.take(slice(start, start + BATCH), device)) for place, squares in placed]
        images = normalise(to_float(compose(size, part, fill)))
        maps = resnet_stages(network, images)
        maps.append(network.layer4(maps[-1]))
        squares = [read_square(network, maps, place, masks, size[1], bins) for place, (_, masks) in part[:read]]
        batches.append([torch.stack(layer, 1) for layer in zip(*squares)])
        if seen:
            seen(len(images))
    return [torch.cat(parts) for parts in zip(*batches)]


def read_square(network, maps, place, masks, width, bins):
    """An object's features, a list by LAYERS of (N, C) float64, from the maps of images of `width` pixels; its square
    is at `place`, masks (N, side, side)."""
    (x, y), side = place, masks.shape[1]
    strides = [width // cells.shape[3] for cells in maps]
    windows = [cells[:, :, y // stride:(y + side) // stride, x // stride:(x + side) // stride]
               for cells, stride in zip(maps, strides)]
    box = maps[2].new_tensor([x, y, x + side, y + side]).expand(len(masks), 1, 4)
    regions = network.layer4(roi_align(maps[2], box, bins, 1 / 16))
    return [object_mean(cells, masks) for cells in (*windows, regions)]


def object_mean(cells, masks):
    """(N, C) float64: the mean of cells (N, C, h, w) of a square, each weighed by the share of it that is the
    object's, masks (N, side, side) bool: with --cut box the plain mean."""
    share = F.adaptive_avg_pool2d(masks[:, None].double(), cells.shape[2:])
    return (cells.double() * share).sum((2, 3)) / share.sum((2, 3))


# ------------------------------------------------------------------------------------------------------------ measures

def coupling(network, a, b, alone=False, **options):
    """CR and rc (section 3.1), MCS and rp (section 3.2) of a network on pairs of Squares: {name: Estimate}.

    alone: for MCS and rp the object is alone at each of the nine places, not repeated at all: what remains of them
    is place, through padding, without the neighbours. options: bins, fill and seen of `features`."""
    cosine = torch.cosine_similarity
    both = features(network, PAIR, [(A, a), (B, b)], **options)
    only_a = features(network, PAIR, [(A, a)], **options)
    only_b = features(network, PAIR, [(A, b)], **options)
    if alone:
        runs = [features(network, GRID, [(place, a)], **options) for place in PLACES]
        nine = [torch.cat(layer, 1) for layer in zip(*runs)]
    else:
        nine = features(network, GRID, [(place, a) for place in PLACES], **options)
    rates, similarities, coupled, moved, apart = [], [], [], [], []
    for ab, a2, b2, grid in zip(both, only_a, only_b, nine):
        (a1, b1), a2, b2 = ab.unbind(1), a2[:, 0], b2[:, 0]
        rates.append(cosine(a1, b1) / cosine(a2, b1))
        others = torch.cat([grid[:, :4], grid[:, 5:]], 1)
        similarities.append(cosine(grid[:, 4:5], others, dim=2).mean(1))
        coupled.append(1 - cosine(a1, a2))
        moved.append(1 - similarities[-1])
        apart.append(1 - cosine(a2, b2))
    return {"cr": mean_ratio(rates), "mcs": mean_ratio(similarities),
            "rc": mean_ratio(coupled, apart), "rp": mean_ratio(moved, apart)}


def mean_ratio(above, below=None):
    """evaluate.ratio_of_means of lists by layer of (N,) tensors; below None: 1."""
    above = torch.stack(above, 1).cpu().numpy()
    return ratio_of_means(above, np.ones_like(above) if below is None else torch.stack(below, 1).cpu().numpy())


def reid(network, bank, **options):
    """Does an object find itself? R@1 in % of queries amid the next four objects of the bank, and alone in a corner
    (object i in corner i mod 4), in the bank, where each is alone in the centre: {name: Estimate}. options as
    `coupling`'s."""
    stored = features(network, BANK, [(CENTRE, bank)], **options)
    around = neighbours(bank, range(len(bank.masks)))
    amid = features(network, BANK, [(CENTRE, bank), *around], read=1, **options)
    moved = [torch.empty_like(layer) for layer in stored]
    for c, corner in enumerate(CORNERS):
        for layer, part in zip(moved, features(network, BANK, [(corner, bank.take(slice(c, None, 4)))], **options)):
            layer[c::4] = part
    return {"reid_neighbours": mean_ratio([hits(q[:, 0], k[:, 0]) for q, k in zip(amid, stored)]),
            "reid_moved": mean_ratio([hits(q[:, 0], k[:, 0]) for q, k in zip(moved, stored)])}


def neighbours(bank, index):
    """The squares around objects `index` of the bank: the four that follow each, left, right, above and below."""
    return [(place, bank.take([(i + 1 + k) % len(bank.masks) for i in index])) for k, place in enumerate(NEIGHBOURS)]


def hits(queries, bank):
    """(N,) float64: 100 where query i's cosine with entry i of the bank is larger than with every other, else 0."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    own = cosines.diagonal().clone()
    return 100 * (own > cosines.fill_diagonal_(-2).amax(1)).double()


def probe(network, inputs, what="probes", alone=False, bins=6, fill="black"):
    """All measures of a network, torchvision's ResNet in eval mode, on Inputs: {name: Estimate}, in the order of
    MEASURES. Raises UserError if CR or MCS is not finite."""
    pairs, objects = len(inputs.a.masks), len(inputs.bank.masks)
    total = (12 if alone else 4) * pairs + 3 * objects
    progress, done = Progress(what, total), 0

    def seen(images):
        nonlocal done
        done += images
        progress.update(done)

    options = dict(bins=bins, fill=fill, seen=seen)
    measures = {**reid(network, inputs.bank, **options), **coupling(network, inputs.a, inputs.b, alone, **options)}
    if not np.isfinite(measures["cr"].value + measures["mcs"].value).all():
        raise UserError(f"{what}: CR or MCS is not finite, features vanish or diverge: is it a trained ResNet?")
    return {name: measures[name] for name in MEASURES}


# ------------------------------------------------------------------------------------------------------------ pictures

CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's


def new_figure():
    """matplotlib's figure and its axes, one for each measure."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    return figure, figure.subplots(2, 3).flat


def plot(results, path):
    """Figures 3b and 4b and ours, a PNG: every measure by layer, a curve for each row with its standard errors. `roi`
    stands apart: it is no deeper layer than res5 but C5 on RoIAlign's output."""
    figure, axes = new_figure()
    for axis, (name, (title, ideal)) in zip(axes, MEASURES.items()):
        axis.axhline(ideal, color="grey", linewidth=1, linestyle=":")
        axis.annotate(f"ideal {ideal}", (3.5, ideal), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        for i, result in enumerate(results):
            values, errors = (np.array(result[key], float) for key in (name, f"{name}_se"))
            style = dict(color=CURVE_COLOURS[i % 7], marker="osD^v"[i // 7 % 5], markersize=4, capsize=3)
            axis.errorbar(LAYERS[:4], values[:4], errors[:4], label=result["row"], **style)
            axis.errorbar(LAYERS[4:], values[4:], errors[4:], **style)
        axis.set_title(title.replace(" / ", "\n/ "), fontsize=10, loc="left")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
    print(f"wrote {path}")


def picture(inputs, alone=False, fill="black", rows=3):
    """A PIL picture of the inputs, each line a pair and an object of the bank; the squares that are read are framed."""
    gap, head, rows = 8, 18, min(rows, len(inputs.a.masks))
    nine = "alone at each place in turn" if alone else "the centre against eight places"
    titles = ("CR, rc: A1 beside B", "A2: A, without B", "B2: B at A's place", f"MCS, rp: {nine}",
              "bank: in the centre", "amid four neighbours", "moved to a corner")
    widths = (*[PAIR[1]] * 3, GRID[1], *[BANK[1]] * 3)
    sheet = Image.new("RGB", (sum(widths) + gap * 8, head + rows * (GRID[0] + gap)), "#505050")
    draw = ImageDraw.Draw(sheet)
    for r in range(rows):
        a, b, one = (squares.take([r]) for squares in inputs)
        placements = ((PAIR, [(A, a), (B, b)]), (PAIR, [(A, a)]), (PAIR, [(A, b)]),
                      (GRID, [(place, a) for place in PLACES[:1 if alone else 9]]),
                      (BANK, [(CENTRE, one)]), (BANK, [(CENTRE, one), *neighbours(inputs.bank, [r])]),
                      (BANK, [(CORNERS[r % 4], one)]))
        left = gap
        for title, (size, placed) in zip(titles, placements):
            top = head + r * (GRID[0] + gap) + (GRID[0] - size[0]) // 2
            draw.text((left, 3), title, fill="white")
            sheet.paste(Image.fromarray(compose(size, placed, fill)[0].numpy()), (left, top))
            for (x, y), squares in placed[:1] if size == BANK else placed:
                side = squares.masks.shape[1] - 1
                draw.rectangle([left + x, top + y, left + x + side, top + y + side], outline="#909090")
            left += size[1] + gap
    return sheet


# -------------------------------------------------------------------------------------------------------- command line

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add("--pairs", type=positive, default=100, help="pairs of objects for CR, MCS, rc and rp (default: 100)")
    add("--cut", choices=("box", "mask"), default="box", help="what is cut out: the box's crop, which fills its square "
        "as the paper's images do, or the object along its mask, whose feature is its own cells' (default: box)")
    add("--alone", action="store_true", help="for MCS and rp: one object alone at nine places, not nine at once")
    add("--fill", choices=tuple(FILLS), default="black", help="what is around the objects: black, or mean, ImageNet's "
        "mean colour (default: black, section 3)")
    add("--plot", type=output_file, metavar="FILE", help="write the curves there, a PNG (needs matplotlib)")
    add("--picture", type=output_file, metavar="FILE", help="write a PNG of the inputs there")
    args = parser.parse_args()
    if args.pairs < 2:
        raise UserError(f"--pairs {args.pairs}: a standard error needs at least 2")
    if args.plot:
        new_figure()  # that matplotlib is missing should show before the work
    rows = open_rows(args)
    if any(source.path == "colour" for _, sources in rows for source in sources):
        raise UserError("--ckpt colour is no network and has no layers to probe: leave it out")
    inputs = open_inputs(open_labelled(args.data, args.root, "val"), args.pairs, args.seed, args.cut, args.workers)
    if args.picture:
        with atomic(args.picture) as file:
            picture(inputs, args.alone, args.fill).save(file, "PNG")
        print(f"wrote {args.picture}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # differences of nearly equal features are what is measured

    def clean():
        return clean_batches(open_images(args.data, args.root), SIZE[args.data], args.seed, device)

    def measure(source):
        return probe(load_source(source, "roi", clean, device), inputs, source.name, args.alone, source.bins, args.fill)

    results, files = measure_rows(rows, measure)
    for name, (title, _) in MEASURES.items():
        print(f"\n{title}")
        digits, unit = (1, f"{len(inputs.bank.masks)} objects") if "reid" in name else (4, f"{args.pairs:,} pairs")
        print_table(LAYERS, results, [name], digits, unit)
    names = ("data", "root", "seed", "pairs", "cut", "alone", "fill", "statistics")
    settings = dict({name: getattr(args, name) for name in names}, side=SIDE, bank=len(inputs.bank.masks),
                    bank_side=BANK_SIDE, layers=LAYERS)
    write_results(args.json, settings, results, files)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    error_exit(main)
