"""How coupled, how position-biased are a checkpoint's features? The paper's sections 3.1 and 3.2, Figures 3 and 4.

    python probes.py --ckpt runs/scenes/last.pt random --arch resnet18 --plot curves.png --picture probe.png
    python probes.py --ckpt A.pth.tar B.pth --data coco --root data/coco --plot curves.png --json curves.json

Coupling rate (CR): cos(A1, B) / cos(A2, B); A1 and B are the features of two neighbouring objects of different categories
on black, A2 is A's when B is gone. 1 is ideal; more means that B has leaked into A.

Mean cosine similarity (MCS): one object in all places of a 3x3 grid; the mean cosine of the central one's feature with
the other eight. 1 is ideal; less means that a feature knows its place.

Both for the maps after res2, res3, res4 and res5: means and standard errors over --pairs pairs of objects of the val split,
the same for every checkpoint. An object is cut out by its mask where the annotations have one, else by its box, and fills
a square of 96 pixels as far as its proportions allow; squares lie at multiples of 32 pixels, so that they are made of whole
cells at every layer. A feature is the plain mean of the cells in its square.
"""
import argparse
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.models.feature_extraction import create_feature_extractor

from augment import normalise, to_float
from d3ssl import positive
from data import Parser, Progress, UserError, atomic, error_exit, make_loader, open_labelled, resize, rng
from evaluate import add_checkpoint_arguments, load_from, save


LAYERS = ("res2", "res3", "res4", "res5")
SIDE = 96                                # of a square, in pixels
PAIR = (224, 320)                        # height and width of the image of two objects, with margins of 64 pixels
A, B = (64, 64), (64 + SIDE, 64)         # x and y of their squares: side by side
GRID = (3 * SIDE, 3 * SIDE)              # height and width of the 3x3 image
PLACES = [(x, y) for y in (0, SIDE, 2 * SIDE) for x in (0, SIDE, 2 * SIDE)]
SMALLEST = 24                            # sides of an object in its image: smaller ones, four times as large, are a blur
BATCH = 16


# -------------------------------------------------------------------------------------------------- synthesised inputs

def cut_out(image, box, mask=None):
    """(96, 96, 3) uint8: what lies in `box` [x1, y1, x2, y2] of image (H, W, 3), on black, black too where mask (H, W) is
    False; as large as the square allows with its proportions kept, centred."""
    (x1, y1), (x2, y2) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    crop = image[y1:y2, x1:x2]
    if mask is not None and mask[y1:y2, x1:x2].any():
        crop = crop * mask[y1:y2, x1:x2, None]
    scale = SIDE / max(crop.shape[:2])
    height, width = (max(1, round(n * scale)) for n in crop.shape[:2])
    square, top, left = np.zeros((SIDE, SIDE, 3), np.uint8), (SIDE - height) // 2, (SIDE - width) // 2
    square[top:top + height, left:left + width] = resize(crop, width, height)
    return square


def paste(size, squares):
    """A black image (*size, 3) uint8 with squares, [((x, y), (96, 96, 3) uint8), ...], at their places."""
    canvas = np.zeros((*size, 3), np.uint8)
    for (x, y), square in squares:
        canvas[y:y + SIDE, x:x + SIDE] = square
    return canvas


class Pairs(torch.utils.data.Dataset):
    """Pairs of objects of different categories, drawn by (seed, pair): A uniformly over all objects, B over those of the
    other categories; crowds and objects with a side of less than 24 pixels are left out.

    Item -> both (224, 320, 3), alone (224, 320, 3), grid (288, 288, 3) uint8 RGB: A beside B, A without B, A nine times.
    Raises UserError if there are no two objects to pair."""

    def __init__(self, labelled, number=500, seed=0):
        self.labelled, self.number, self.seed = labelled, number, seed
        sides = (labelled.boxes[:, 2:] - labelled.boxes[:, :2]).min(1)
        self.rows = np.flatnonzero(~labelled.crowd & (sides >= SMALLEST))
        if len(np.unique(labelled.labels[self.rows])) < 2:
            raise UserError(f"{labelled.images.root} has no two objects of different categories with sides of at least "
                            f"{SMALLEST} pixels: name another data set")

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        a, b = self.draw(i)
        return paste(PAIR, [(A, a), (B, b)]), paste(PAIR, [(A, a)]), paste(GRID, [(place, a) for place in PLACES])

    def draw(self, i):
        """The squares A and B (96, 96, 3) of pair i; drawn again, up to ten times, while an image cannot be read."""
        random, labels = rng(self.seed, i), self.labelled.labels
        for _ in range(10):
            a = random.choice(self.rows)
            b = random.choice(self.rows[labels[self.rows] != labels[a]])
            try:
                return self.square(a), self.square(b)
            except OSError as error:
                problem = error
        raise UserError(f"images of {self.labelled.images.root} cannot be read: {problem}")

    def square(self, row):
        found = self.labelled
        image = found.images.read(int(np.searchsorted(found.offsets, row, side="right")) - 1)
        return cut_out(image, found.boxes[row], found.mask and found.mask(row))


# ------------------------------------------------------------------------------------------------------------ measures

def stages(network):
    """The maps after res2 to res5 of torchvision's ResNet, as a function: images (B, 3, H, W) -> four maps."""
    extractor = create_feature_extractor(network, {f"layer{i}": LAYERS[i - 1] for i in (1, 2, 3, 4)})
    return lambda images: list(extractor(images).values())


def square_feature(maps, place, width):
    """(B, C) float64: the mean of the cells of maps (B, C, h, w) in the square at `place` (x, y) of images `width` wide."""
    stride = width // maps.shape[-1]
    x, y, side = place[0] // stride, place[1] // stride, SIDE // stride
    return maps[:, :, y:y + side, x:x + side].double().mean((2, 3))


def coupling_rate(both, alone, width=PAIR[1]):
    """Section 3.1: cos(A1, B) / cos(A2, B), (N,) float64, of maps (N, C, h, w) of the images with both objects and A alone."""
    a1, b, a2 = square_feature(both, A, width), square_feature(both, B, width), square_feature(alone, A, width)
    return torch.cosine_similarity(a1, b) / torch.cosine_similarity(a2, b)


def mean_cosine_similarity(grid, width=GRID[1]):
    """Section 3.2: the mean cosine (N,) float64 of the central feature with the other eight, of maps (N, C, h, w)."""
    features = torch.stack([square_feature(grid, place, width) for place in PLACES])
    others = [i for i in range(9) if i != 4]
    return torch.cosine_similarity(features[4], features[others], dim=-1).mean(0)


class Curves(NamedTuple):
    """Means and standard errors by layer, each a list."""
    cr: list
    cr_se: list
    mcs: list
    mcs_se: list


@torch.inference_mode()
def probe(network, pairs, what="pairs", workers=0, device="cpu"):
    """CR and MCS of a network on Pairs, layer by layer: Curves.

    Args: network: normalised images (B, 3, H, W) -> a list of maps (B, C, h, w) whose strides divide 32, on `device`.
    Raises UserError if a value is not finite."""
    rates, similarities, progress, done = [], [], Progress(what, len(pairs), "pairs"), 0
    for inputs in make_loader(pairs, [list(range(len(pairs))[i:i + BATCH]) for i in range(0, len(pairs), BATCH)], workers):
        both, alone, grid = (network(normalise(to_float(pixels.to(device)))) for pixels in inputs)
        rates.append(torch.stack([coupling_rate(m1, m2) for m1, m2 in zip(both, alone)], 1).cpu())
        similarities.append(torch.stack([mean_cosine_similarity(m) for m in grid], 1).cpu())
        done += len(inputs[0])
        progress.update(done)
    (cr, cr_se), (mcs, mcs_se) = mean_and_error(torch.cat(rates)), mean_and_error(torch.cat(similarities))
    if not np.isfinite(cr + mcs).all():
        raise UserError(f"{what}: CR or MCS is not finite, features vanish or diverge: is it a trained ResNet?")
    return Curves(cr, cr_se, mcs, mcs_se)


def mean_and_error(values):
    """Mean and standard error by column of values (N, L), N >= 2."""
    return values.mean(0).tolist(), (values.std(0) / len(values) ** 0.5).tolist()


# ------------------------------------------------------------------------------------------------------------ pictures

def plot(rows, path):
    """Figures 3b and 4b: CR and MCS by layer, one curve a checkpoint with its standard errors, as a PNG."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, title in zip(axes, ("cr", "mcs"), ("Coupling rate (Fig. 3b)", "Mean cosine similarity (Fig. 4b)")):
        axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        for row in rows:
            axis.errorbar(LAYERS, row[key], row[f"{key}_se"], label=row["ckpt"], marker="o", markersize=4, capsize=3)
        axis.set(title=title, xlabel="layer", ylabel=key.upper())
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=150)
    pyplot.close(figure)
    print(f"wrote {path}")


def picture(pairs, rows=4):
    """A PIL picture of what is probed, a row a pair: A1 beside B, A2 alone (Figure 3a), nine A (Figure 4a), the squares
    outlined."""
    gap, head, (height, width) = 6, 18, PAIR
    titles = ("CR: A1 and B", "CR: A2, without B", "MCS: the centre against the other eight")
    lefts, tall = (gap, 2 * gap + width, 3 * gap + 2 * width), max(height, GRID[0])
    rows = min(rows, len(pairs))
    sheet = Image.new("RGB", (4 * gap + 2 * width + GRID[1], head + rows * (tall + gap)), "#505050")
    draw = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, titles):
        draw.text((left, 3), title, fill="white")
    for r in range(rows):
        for left, pixels, names in zip(lefts, pairs[r], ({A: "A1", B: "B"}, {A: "A2"}, dict.fromkeys(PLACES, ""))):
            top = head + r * (tall + gap) + (tall - len(pixels)) // 2
            sheet.paste(Image.fromarray(pixels), (left, top))
            for (x, y), name in names.items():
                x, y = left + x, top + y
                draw.rectangle([x, y, x + SIDE - 1, y + SIDE - 1], outline="#707070")
                draw.text((x + 4, y - 14), name, fill="white")
    return sheet


# -------------------------------------------------------------------------------------------------------- command line

def print_table(rows, number):
    """CR and MCS by layer, mean and standard error."""
    width = max(len("checkpoint"), *(len(row["ckpt"]) for row in rows))
    for key, title in (("cr", "coupling rate"), ("mcs", "mean cosine similarity")):
        print(f"\n{title}, {number:,} {'pairs' if key == 'cr' else 'objects'}\n{'checkpoint':{width}}  arch     "
              + "".join(f"{layer:>17}" for layer in LAYERS))
        for row in rows:
            cells = (f"{mean:.4f} +-{error:.4f}" for mean, error in zip(row[key], row[f"{key}_se"]))
            print(f"{row['ckpt']:{width}}  {row['arch']:9}" + "".join(f"{cell:>17}" for cell in cells))


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_arguments(parser)
    parser.add_argument("--pairs", type=positive, default=500, help="pairs of objects, at least 2")
    parser.add_argument("--plot", help="write the curves there, a PNG (needs matplotlib)")
    args = parser.parse_args()
    if args.pairs < 2:
        raise UserError(f"--pairs {args.pairs}: a standard error needs at least 2")
    networks = [(path, *load_from(args, path)) for path in args.ckpt]  # mistakes show before minutes have passed
    pairs = Pairs(open_labelled(args.data, args.root, "val"), args.pairs, args.seed)
    if args.picture:
        save(picture(pairs), args.picture)
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", []
    for path, network, arch in networks:
        curves = probe(stages(network.to(device)), pairs, path, args.workers, device)
        rows.append(dict(ckpt=path, arch=arch, **curves._asdict()))
    print_table(rows, args.pairs)
    if args.json:
        save(rows, args.json)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    error_exit(main)
